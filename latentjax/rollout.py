"""The rollout: one loop over peek and commit, shared by every method, in training and in generation.

A *source* proposes what enters the backbone next: a thought, a token, or a mixture. `peek` runs the backbone against the
cache without writing; `commit` is the only place where anything enters a cache. Interventions act there, once per thought.

    question --prefill--> Context --[source.next -> intervene -> commit]*--> Context --read--> text

Letters: B batch, S slots written together, K thoughts, W width of a thought (D, or the source's own), D model width,
V vocabulary, N steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from latentjax.backbone import cache as caches
from latentjax.backbone import decoder
from latentjax.backbone.attention import MaskSpec
from latentjax.backbone.cache import KVCache
from latentjax.backbone.config import BackboneConfig
from latentjax.sampling import Sampling, log_probability, sample
from latentjax.scan import deferred_scan

MAIN = "main"  # the context whose hidden state and logits a source sees


class Kind:
    """What a slot holds. MIXED is a token and a vector together (soft tokens, HRPO); MARKER is the end of the thoughts."""

    PAD, QUESTION, THOUGHT, TEXT, MIXED, MARKER = range(6)


@struct.dataclass
class Context:
    """One cache and the post-norm hidden state at the last valid position of each row."""

    cache: KVCache
    hidden: Any  # [B, D]


@struct.dataclass
class Peeked:
    """What a forward pass against a context gives, whether or not it is kept."""

    hidden: Any  # [B, S, D] post-norm hidden states of the inputs
    inputs: Any  # [B, S, D]
    context: Context  # the context with these inputs written
    kv: Any  # the new keys and values, in the cache's layout


class Peek(Protocol):
    """Run inputs [B, S, D] with validity [B, S] against a named context, or one that an earlier peek gave; nothing is
    written. `mask` is among the inputs."""

    def __call__(
        self, inputs: Array, valid: Array, context: "str | Context" = MAIN, *, mask: MaskSpec = MaskSpec()
    ) -> Peeked: ...


@struct.dataclass
class Proposal:
    """What a source wants to commit next.

    Rows of kind TEXT commit the embedding of `token`; THOUGHT and MIXED rows commit `project(inputs)`. `candidate` holds
    peeks to adopt instead of running the backbone again (an intervention is computed anew all the same).
    """

    inputs: Any  # [B, S, W]
    token: Any  # int32 [B]: the token of TEXT and MIXED rows; None from a source that has neither
    kind: Any  # int32 [B]
    valid: Any  # bool [B, S]: which slots are committed
    done: Any  # bool [B]: this row asks for nothing more
    carry: Any
    log_prob: Any = None  # fp32 [B], of the token
    candidate: Mapping[str, Peeked] = struct.field(default_factory=dict)
    peeks: int = struct.field(pytree_node=False, default=0)  # sequential forwards spent on peeks
    peeked: int = struct.field(pytree_node=False, default=0)  # positions they processed, per row
    recorded: Mapping[str, Any] = struct.field(default_factory=dict)  # arrays [B, S, ...] that only the source has


class Source(NamedTuple):
    """Where the next input comes from, as two pure functions and a map from a thought's width W to the model's D."""

    init: Callable[[Context], Any]
    next: Callable[[Any, Array, Array, Peek, Array], Proposal]  # (carry, hidden [B, D], logits [B, V], peek, key)
    project: Callable[[Array], Array] = lambda x: x
    mask: MaskSpec = MaskSpec()  # among the S slots of one proposal
    # Marker vectors [1, D] that every proposal is committed between, in the same pass; they are no thoughts.
    frame: tuple[Any, Any] | None = None

    @property
    def framing(self) -> int:
        """Positions that the frame of one proposal takes."""
        return 0 if self.frame is None else 2


@struct.dataclass
class Intervention:
    """What to change, once per thought, at commit: x <- where(where, value, x) + add, in the source's own width W.

    Later thoughts are computed from the changed one (propagating). For the frozen kind, under which the other thoughts keep
    their recorded inputs, see `frozen`. The K slots are those of `Generation.thoughts`. `kv` overwrites a
    thought's cache entries as well: with the clean entries put back, a changed input no longer reaches anything in later steps
    except through the thought's own hidden state (slots of the same step have seen it already).
    """

    where: Any  # bool [B, K]
    value: Any  # [B, K, W]
    add: Any  # [B, K, W]
    kv_where: Any = None  # bool [B, K]
    kv: Any = None  # (k, v), each [entries, B, K, kv_heads, head_dim], as `Generation.recorded["kv"]` holds them


@struct.dataclass
class Prefix:
    """Positions forced before free generation; right-padded.

    They follow the thoughts and the method's end marker, or, with `instead`, take the place of both: that continues from
    the recorded inputs of another rollout. Where `inputs` is given, slots with token -1 take its vector.
    """

    tokens: Any  # int32 [B, P]
    mask: Any  # bool [B, P]
    inputs: Any = None  # [B, P, D]
    instead: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Cost:
    """What a row cost. A forward is sequential: the prefill, each commit, each peek."""

    forwards: Any  # int32 [B]
    positions: Any  # int32 [B]: valid positions processed, peeks and further contexts included
    answer_tokens: Any  # int32 [B]: text tokens produced, end of sequence included


@struct.dataclass
class Generation:
    """What every method returns."""

    tokens: Any  # int32 [B, S]: question, then what was generated; the pad id where a slot holds no token
    kind: Any  # int32 [B, S]: Kind of each slot
    log_probs: Any  # fp32 [B, S]: of each generated token, 0 elsewhere
    thoughts: Any  # [B, K, W], as committed
    thought_mask: Any  # bool [B, K]
    cost: Cost
    recorded: Mapping[str, Any] = struct.field(default_factory=dict)  # what `record` asked for, see RECORDABLE


# Of the slots of thoughts: inputs [B, K, D], hidden states [B, K, D], cache entries (see Intervention.kv). Of each proposal:
# the hidden state of the last position committed [B, N, D]. A source may have more to offer (`Proposal.recorded`).
RECORDABLE = ("inputs", "hidden", "kv", "last")


@struct.dataclass
class Step:
    """One iteration of the loop; `run` stacks N of them."""

    token: Any  # int32 [N, B]
    kind: Any  # int32 [N, B]
    log_prob: Any  # fp32 [N, B]
    inputs: Any  # [N, B, S, W] as committed, after intervention
    valid: Any  # bool [N, B, S]
    recorded: Mapping[str, Any] = struct.field(default_factory=dict)


@struct.dataclass
class State:
    """The loop's carry."""

    contexts: Mapping[str, Context]
    carry: Any
    done: Any  # bool [B]
    count: Any  # int32 [B]: slots so far, used or not: the index of the next one in an `Intervention`
    cost: Cost


class Backbone(NamedTuple):
    """A configuration and its parameters."""

    config: BackboneConfig
    params: Any

    def embed(self, tokens: Array) -> Array:
        return decoder.embed(self.config, self.params, tokens)

    def head(self, hidden: Array) -> Array:
        return decoder.head(self.config, self.params, hidden)


def prefill(
    backbone: Backbone,
    tokens: Int[Array, "B S"] | Float[Array, "B S D"],
    valid: Bool[Array, "B S"],
    capacity: int,
    *,
    key: Key[Array, ""] | None = None,
) -> Context:
    """Run the question, as tokens or embeddings, once. Its keys and values become the frozen part of a cache with
    `capacity` free slots.

    Rows are right-padded and hold at least one token; `key` turns dropout on."""
    out = decoder.apply(backbone.config, backbone.params, tokens, valid, key=key)
    cache = caches.freeze(out.kv, valid, capacity, stacked=backbone.config.scans_layers)
    return Context(cache, last_valid(out.hidden, valid, out.hidden[:, 0]))


def last_valid(
    hidden: Float[Array, "B S D"], valid: Bool[Array, "B S"], before: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """The hidden state of each row's last valid slot, or `before` where a row has none."""
    if hidden.shape[1] == 1:
        return jnp.where(valid, hidden[:, 0], before)
    last = jnp.max(jnp.where(valid, jnp.arange(hidden.shape[1]), 0), axis=1)
    found = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return jnp.where(valid.any(axis=1, keepdims=True), found, before)


def peek(
    backbone: Backbone,
    context: Context,
    inputs: Float[Array, "B S D"] | Int[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    mask: MaskSpec = MaskSpec(),
    key: Key[Array, ""] | None = None,
    replace: Callable[[Any], Any] | None = None,
) -> Peeked:
    """Run `inputs` against the context. The context itself is unchanged; adopting `Peeked.context` is what a commit does.

    `replace` maps the new keys and values to those to write in their place."""
    embedded = backbone.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
    out = decoder.apply(
        backbone.config, backbone.params, embedded, valid, cache=context.cache, mask=mask, key=key
    )  # fmt: skip
    kv = out.kv if replace is None else replace(out.kv)
    written = Context(context.cache.write(kv, valid), last_valid(out.hidden, valid, context.hidden))
    return Peeked(out.hidden, embedded, written, kv)


def start(source: Source, contexts: Mapping[str, Context], cost: Cost | None = None) -> State:
    """The state before the first step of `source`; `cost` carries on from an earlier phase."""
    main = contexts[MAIN]
    zero = jnp.zeros(main.hidden.shape[0], jnp.int32)
    cost = Cost(zero, zero, zero) if cost is None else cost
    return State(dict(contexts), source.init(main), jnp.zeros(zero.shape, bool), zero, cost)


def advance(
    backbone: Backbone,
    source: Source,
    state: State,
    key: Key[Array, ""],
    *,
    train: bool = False,
    intervention: Intervention | None = None,
    record: tuple[str, ...] = (),
    skip_empty: bool = False,
) -> tuple[State, Step]:
    """One iteration: ask the source, intervene, commit to every context. `skip_empty` spares the forward pass when no row
    commits anything, as in the last step of a generation."""
    source_key, dropout_key = jax.random.split(key)
    dropout_key = dropout_key if train else None
    hidden = state.contexts[MAIN].hidden

    def look(inputs: Array, valid: Array, context: str | Context = MAIN, *, mask: MaskSpec = MaskSpec()) -> Peeked:
        past = state.contexts[context] if isinstance(context, str) else context
        return peek(backbone, past, inputs, valid, mask=mask, key=dropout_key)

    proposal = source.next(state.carry, hidden, backbone.head(hidden), look, source_key)
    thinks = (proposal.kind == Kind.THOUGHT) | (proposal.kind == Kind.MIXED)
    inputs, replace = _intervene(intervention, proposal, thinks, state.count, stacked=backbone.config.scans_layers)
    vectors, token = source.project(inputs).astype(hidden.dtype), proposal.token
    if token is None:  # and no look-up either: its gradient would be a table [V, D] of zeros for every thought
        token = jnp.zeros_like(proposal.kind)
    else:
        vectors = jnp.where((proposal.kind == Kind.TEXT)[:, None, None], backbone.embed(token)[:, None], vectors)
    adopted = proposal.candidate if intervention is None else {}
    framed, framed_valid, mask, framed_replace = _framed(source, vectors, proposal.valid, replace)

    def commit(name: str, context: Context) -> Peeked:
        if name in adopted:
            return adopted[name]
        peeked = peek(backbone, context, framed, framed_valid, mask=mask, key=dropout_key, replace=framed_replace)
        if source.frame is None:
            return peeked
        inner = {"hidden": peeked.hidden[:, 1:-1], "inputs": peeked.inputs[:, 1:-1], "kv": _without_frame(peeked.kv)}
        return peeked.replace(**inner)

    def commit_all() -> dict[str, Peeked]:
        return {name: commit(name, context) for name, context in state.contexts.items()}

    def leave() -> dict[str, Peeked]:
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(commit_all))
        return {name: blank[name].replace(context=context) for name, context in state.contexts.items()}

    committed = jax.lax.cond(proposal.valid.any(), commit_all, leave) if skip_empty else commit_all()
    contexts = {name: peeked.context for name, peeked in committed.items()}
    used = framed_valid.sum(axis=1, dtype=jnp.int32)
    runs = len(committed) - len(adopted)
    looked = jnp.where(used > 0, 1, 0)
    cost = Cost(
        state.cost.forwards + looked * (proposal.peeks + min(runs, 1)),
        state.cost.positions + looked * proposal.peeked + used * runs,
        state.cost.answer_tokens + ((proposal.kind == Kind.TEXT) & ~state.done),
    )
    available = {
        "inputs": committed[MAIN].inputs, "hidden": committed[MAIN].hidden, "last": contexts[MAIN].hidden[:, None],
    } | dict(proposal.recorded)  # fmt: skip
    recorded = {name: available[name] for name in record if name != "kv"}
    if "kv" in record:
        recorded["kv"] = caches.slot_major(committed[MAIN].kv, stacked=backbone.config.scans_layers)
    log_prob = jnp.zeros(used.shape, jnp.float32) if proposal.log_prob is None else proposal.log_prob
    step = Step(token, proposal.kind, log_prob, inputs, proposal.valid, recorded)
    return State(contexts, proposal.carry, proposal.done, state.count + proposal.valid.shape[1], cost), step


def _framed(source: Source, vectors: Array, valid: Array, replace: Any) -> tuple[Array, Array, MaskSpec, Any]:
    """What a commit runs, with the source's frame around it: inputs [B, 1 + S + 1, D], validity, mask, map on new keys and
    values."""
    if source.frame is None:
        return vectors, valid, source.mask, replace
    before, after = (jnp.broadcast_to(x, (*vectors.shape[:1], 1, vectors.shape[2])) for x in source.frame)
    used = valid.any(axis=1, keepdims=True)
    mask = source.mask
    if mask.block is not None:
        mask = mask.replace(block=jnp.pad(mask.block, ((0, 0), (1, 1)), constant_values=-1))

    def replace_thoughts(kv: Any) -> Any:
        return jax.tree.map(lambda whole, part: whole.at[..., 1:-1, :].set(part), kv, replace(_without_frame(kv)))

    return (
        jnp.concatenate([before.astype(vectors.dtype), vectors, after.astype(vectors.dtype)], axis=1),
        jnp.concatenate([used, valid, used], axis=1),
        mask,
        None if replace is None else replace_thoughts,
    )


def _without_frame(kv: Any) -> Any:
    """Keys and values of the thoughts alone; slots are the last axis but one in every layout."""
    return jax.tree.map(lambda x: x[..., 1:-1, :], kv)


def _intervene(intervention, proposal, thinks, count, *, stacked):
    """The inputs [B, S, W] to commit and the map on new keys and values, for slots number count .. count + S - 1."""
    if intervention is None:
        return proposal.inputs, None
    total = intervention.where.shape[1]
    index = count[:, None] + jnp.arange(proposal.valid.shape[1])  # [B, S]
    applies = thinks[:, None] & (index < total)
    index = jnp.minimum(index, total - 1)

    def pick(x: Array) -> Array:  # [B, K, ...] -> [B, S, ...]
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    where = (applies & pick(intervention.where))[..., None]
    inputs = jnp.where(where, pick(intervention.value).astype(proposal.inputs.dtype), proposal.inputs)
    inputs = inputs + jnp.where(applies[..., None], pick(intervention.add), 0).astype(inputs.dtype)
    if intervention.kv is None:
        return inputs, None
    kv_where = (applies & pick(intervention.kv_where))[..., None, None]

    def replace(kv: Any) -> Any:
        keys, values = caches.slot_major(kv, stacked=stacked)
        new_keys, new_values = (jax.vmap(pick)(x) for x in intervention.kv)
        keys = jnp.where(kv_where, new_keys.astype(keys.dtype), keys)
        values = jnp.where(kv_where, new_values.astype(values.dtype), values)
        return caches.from_slot_major((keys, values), stacked=stacked)

    return inputs, replace


def frozen(intervention: Intervention, thoughts: Float[Array, "B K W"], mask: Bool[Array, "B K"]) -> Intervention:
    """The frozen form of an intervention: all other thoughts keep the inputs recorded in a clean rollout."""
    value = jnp.where(intervention.where[..., None], intervention.value, thoughts)
    return intervention.replace(where=intervention.where | mask, value=value)


def run(
    backbone: Backbone,
    source: Source,
    state: State,
    steps: int,
    key: Key[Array, ""],
    *,
    until_done: bool = False,
    train: bool = False,
    intervention: Intervention | None = None,
    record: tuple[str, ...] = (),
) -> tuple[State, Step]:
    """At most `steps` iterations: a `scan` (differentiable, for training), or with `until_done` a `while_loop` that ends
    when all rows have. Steps that did not run are zeros: kind PAD, nothing valid."""
    keys = jax.random.split(key, steps)
    # The frozen part of a cache is closed over: as part of a scan's carry, its gradient would be stored for every step.
    frozen_parts = {name: context.cache.frozen for name, context in state.contexts.items()}

    def put(state: State, parts: Mapping[str, Any]) -> State:
        contexts = {
            name: context.replace(cache=context.cache.replace(frozen=parts[name]))
            for name, context in state.contexts.items()
        }
        return state.replace(contexts=contexts)

    nothing = dict.fromkeys(frozen_parts)

    def body(state: State, step_key: Array) -> tuple[State, Step]:
        state, step = advance(
            backbone, source, put(state, frozen_parts), step_key, train=train, intervention=intervention, record=record,
            skip_empty=until_done,
        )  # fmt: skip
        return put(state, nothing), step

    if not until_done:
        # On CPU, at the sizes that run there, memory traffic is no limit and the extra forward passes are.
        scan = deferred_scan if train and backbone.config.target_platform != "cpu" else jax.lax.scan
        state, recorded = scan(body, put(state, nothing), keys)
        return put(state, frozen_parts), recorded
    shapes = jax.eval_shape(body, put(state, nothing), keys[0])[1]
    buffers = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)

    def loop(carry):
        i, state, buffers = carry
        state, step = body(state, keys[i])
        return i + 1, state, jax.tree.map(lambda buffer, x: buffer.at[i].set(x), buffers, step)

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done.all()

    _, state, recorded = jax.lax.while_loop(unfinished, loop, (jnp.int32(0), put(state, nothing), buffers))
    return put(state, frozen_parts), recorded


def text_source(backbone: Backbone, eos: int | Array, sampling: Sampling, limit: int) -> Source:
    """Ordinary decoding: sample a token from the logits, commit its embedding, end a row at `eos` or after `limit` tokens.

    A row's last token is not committed: nothing would read its hidden state."""

    def next(produced, hidden, logits, peek, key):
        token = sample(logits, key, sampling)
        log_prob = log_probability(logits, token)
        ended = (produced < 0) | (token == eos)
        last = produced + 1 >= limit
        count = jnp.where(ended, -1, produced + 1)  # -1 marks a row that has ended
        kind = jnp.where(produced < 0, Kind.PAD, Kind.TEXT)
        inputs = jnp.zeros((token.shape[0], 1, hidden.shape[-1]), hidden.dtype)
        return Proposal(inputs, token, kind, ~(ended | last)[:, None], ended | last, count, log_prob)

    return Source(lambda context: jnp.zeros(context.hidden.shape[0], jnp.int32), next)
