"""Think, then answer: the two phases of a generation put together, for every method of the form question -> thoughts -> text.

Letters: B batch, Q question slots, K thoughts, S slots of one proposal, P forced slots, T text slots, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from latentjax.backbone import decoder
from latentjax.rollout import (
    MAIN,
    RECORDABLE,
    Backbone,
    Context,
    Cost,
    Generation,
    Intervention,
    Kind,
    Prefix,
    Source,
    Step,
    peek,
    prefill,
    run,
    start,
    text_source,
)
from latentjax.sampling import Sampling


def generate(
    backbone: Backbone,
    question: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    key: Key[Array, ""],
    *,
    thinking: Source | None,
    slots: int,
    max_new_tokens: int,
    ids: Mapping[str, Any],
    end_marker: int | Array | None = None,
    slots_per_step: int = 1,
    sampling: Sampling = Sampling(),
    intervention: Intervention | None = None,
    prefix: Prefix | None = None,
    record: tuple[str, ...] = (),
    further: Mapping[str, tuple[Array, Array]] | None = None,
    recordable: tuple[str, ...] = RECORDABLE,
    hide_question: bool = False,
) -> Generation:
    """Prefill the question, run `thinking` for at most `slots` thoughts, force `end_marker` and `prefix`, decode text.

    Everything is static in shape: the generation has Q + slots + P + max_new_tokens slots. `ids` holds the token ids "eos"
    and "pad". `further` names other contexts (tokens or embeddings, mask) that see the same thoughts after a question of their
    own. With `hide_question` the forced positions and the text attend to the thoughts only.
    """
    if intervention is not None and prefix is not None and prefix.instead:
        raise ValueError("intervention: there are no thoughts to change when prefix.instead replaces them")
    if thinking is None or (prefix is not None and prefix.instead):
        thinking, slots = None, 0
    forced = _forced(question.shape[0], end_marker, prefix)
    width = 0 if forced is None else forced[0].shape[1]
    frames = 0 if thinking is None else thinking.framing * (slots // slots_per_step)
    capacity = slots + frames + width + max_new_tokens
    think_key, text_key = jax.random.split(key)
    decoder.check_positions(
        backbone.config,
        question.shape[1] + capacity,
        f"question ({question.shape[1]}), thoughts ({slots}), forced ({width}) and new tokens ({max_new_tokens})",
    )
    contexts, cost, thought_steps = think(
        backbone, question, question_mask, think_key, thinking=thinking, slots=slots, slots_per_step=slots_per_step,
        capacity=capacity, intervention=intervention, record=record, recordable=recordable, further=further,
    )  # fmt: skip
    if hide_question:
        contexts = {name: hidden_question(context) for name, context in contexts.items()}
    if forced is not None:
        contexts, cost = _read(backbone, contexts, *forced[:3], cost)
    source = text_source(backbone, ids["eos"], sampling, max_new_tokens)
    state = start(source, {MAIN: contexts[MAIN]}, cost)
    state, text_steps = run(backbone, source, state, max_new_tokens, text_key, until_done=True)
    return _assemble(question, question_mask, thought_steps, forced, text_steps, state.cost, ids["pad"])


def think(
    backbone: Backbone,
    question: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    key: Key[Array, ""],
    *,
    thinking: Source | None,
    slots: int,
    slots_per_step: int,
    capacity: int,
    intervention: Intervention | None = None,
    record: tuple[str, ...] = (),
    recordable: tuple[str, ...] = RECORDABLE,
    further: Mapping[str, tuple[Array, Array]] | None = None,
) -> tuple[Mapping[str, Context], Cost, Step | None]:
    """The first half of `generate`: prefill the question with room for `capacity` more positions, and run `thinking` for at
    most `slots` thoughts."""
    unknown = set(record) - set(recordable)
    if unknown:
        raise ValueError(f"record={sorted(unknown)}: can be recorded: {', '.join(recordable)}")
    if slots % slots_per_step:
        raise ValueError(f"slots={slots} is not a multiple of slots_per_step={slots_per_step}")
    if intervention is not None and slots and intervention.where.shape[1] != slots:
        raise ValueError(f"intervention.where has {intervention.where.shape[1]} thoughts; this rollout has {slots}")
    prompts = {MAIN: (question, question_mask), **(further or {})}
    contexts = {name: prefill(backbone, *prompt, capacity) for name, prompt in prompts.items()}
    read = sum(mask.sum(axis=1, dtype=jnp.int32) for _, mask in prompts.values())
    one = jnp.ones(question.shape[0], jnp.int32)
    cost = Cost(one, read, jnp.zeros_like(one))
    if thinking is None or not slots:
        return contexts, cost, None
    state, thoughts = run(
        backbone, thinking, start(thinking, contexts, cost), slots // slots_per_step, key, until_done=True,
        intervention=intervention, record=record,
    )  # fmt: skip
    return state.contexts, state.cost, thoughts


def hidden_question(context: Context) -> Context:
    """The context as later positions see it when the question's slots may no longer be attended to."""
    cache = context.cache
    return context.replace(cache=cache.replace(frozen_valid=jnp.zeros_like(cache.frozen_valid)))


def _forced(batch: int, end_marker: Any, prefix: Prefix | None) -> tuple[Array, Array, Array | None, Array] | None:
    """Tokens [B, P], mask [B, P], vectors [B, P, D] (or none) and kinds [P] to commit between thoughts and free text."""
    parts = []
    if end_marker is not None and not (prefix is not None and prefix.instead):
        marker = jnp.broadcast_to(jnp.asarray(end_marker, jnp.int32), (batch, 1))
        parts.append((marker, jnp.ones((batch, 1), bool)))
    if prefix is not None:
        parts.append((prefix.tokens, prefix.mask))
    if not parts:
        return None
    tokens, mask = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    lead = tokens.shape[1] - (0 if prefix is None else prefix.tokens.shape[1])
    vectors = None
    if prefix is not None and prefix.inputs is not None:
        vectors = jnp.pad(prefix.inputs, ((0, 0), (lead, 0), (0, 0)))
    kinds = jnp.where(jnp.arange(tokens.shape[1]) < lead, Kind.MARKER, Kind.TEXT)
    return tokens, mask, vectors, kinds


def _read(
    backbone: Backbone, contexts: Mapping[str, Context], tokens: Array, mask: Array, vectors: Array | None, cost: Cost
) -> tuple[dict[str, Context], Cost]:
    """Commit forced positions in one pass."""
    inputs = backbone.embed(jnp.maximum(tokens, 0))
    if vectors is not None:
        inputs = jnp.where((tokens < 0)[..., None], vectors.astype(inputs.dtype), inputs)
    contexts = {name: peek(backbone, context, inputs, mask).context for name, context in contexts.items()}
    used = mask.sum(axis=1, dtype=jnp.int32)
    cost = cost.replace(forwards=cost.forwards + (used > 0), positions=cost.positions + used * len(contexts))
    return contexts, cost


def _assemble(question, question_mask, thought_steps: Step | None, forced, text_steps: Step, cost, pad) -> Generation:
    """One row of slots: question, thoughts, forced positions, text."""
    batch = question.shape[0]
    tokens = [jnp.where(question_mask, question, pad)]
    kinds = [jnp.where(question_mask, Kind.QUESTION, Kind.PAD)]
    scores = [jnp.zeros(question.shape, jnp.float32)]
    recorded: dict[str, Any] = {}
    if thought_steps is None:
        thoughts, thought_mask = jnp.zeros((batch, 0, 0)), jnp.zeros((batch, 0), bool)
    else:
        thoughts, thought_mask = slots_of(thought_steps.inputs), slots_of(thought_steps.valid)
        size = thought_steps.valid.shape[2]
        for parts, x, blank in (
            (tokens, thought_steps.token, pad), (kinds, thought_steps.kind, Kind.PAD), (scores, thought_steps.log_prob, 0),
        ):  # fmt: skip
            parts.append(jnp.where(thought_mask, jnp.repeat(x.T, size, axis=1), blank))
        tokens[-1] = jnp.where((kinds[-1] == Kind.MIXED) | (kinds[-1] == Kind.TEXT), tokens[-1], pad)
        thought_mask &= kinds[-1] != Kind.TEXT  # a source may write text between its thoughts
        recorded = recorded_slots(thought_steps.recorded)
    if forced is not None:
        tokens.append(jnp.where(forced[1], forced[0], pad))
        kinds.append(jnp.where(forced[1], jnp.where(forced[0] < 0, Kind.THOUGHT, forced[3]), Kind.PAD))
        scores.append(jnp.zeros(forced[0].shape, jnp.float32))
    text = text_steps.kind.T
    tokens.append(jnp.where(text == Kind.TEXT, text_steps.token.T, pad))
    kinds.append(text)
    scores.append(jnp.where(text == Kind.TEXT, text_steps.log_prob.T, 0.0))
    joined = [jnp.concatenate(parts, axis=1) for parts in (tokens, kinds, scores)]
    return Generation(*joined, thoughts, thought_mask, cost, recorded)


def slots_of(x: Array) -> Array:
    """[N, B, S, ...] of a run -> [B, N * S, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def recorded_slots(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a run recorded, as `Generation.recorded` holds it."""
    found: dict[str, Any] = {name: slots_of(x) for name, x in recorded.items() if name != "kv"}
    if "kv" in recorded:  # [N, entries, B, S, heads, head_dim] -> [entries, B, K, heads, head_dim]
        found["kv"] = tuple(jax.vmap(slots_of, 1)(x) for x in recorded["kv"])
    return found
