"""The decoder-only transformer: `embed`, `layers` and `head` are pure functions, `apply` composes them.

Parameters have one stored tree whatever the compute form; every array under "layers" has a leading layer axis:

    {"embed": {"tokens": [V, D], "positions": [P, D]}, "layers": {...: [L, ...]}, "norm": {...}, "head": {"kernel": [D, V]}}

("positions" only when learned, "head" only when untied; "lora_a" and "lora_b" beside the kernel of an adapted dense layer.)
Letters: B batch, S new positions, D width, V vocabulary, L layers.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from latentjax.backbone.attention import MaskSpec, attend, build_mask, rotary_angles, rotate
from latentjax.backbone.cache import KVCache, next_positions
from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.dropout import dropout
from latentjax.backbone.lora import LoraDense
from latentjax.sharding import split_rows

ACTIVATIONS = {"gelu_tanh": nn.gelu, "gelu": lambda x: nn.gelu(x, approximate=False), "silu": nn.silu}

# Logit of an id that is only padding of the vocabulary: probability exactly 0, and finite, so that p log p is 0 as well.
PADDING_LOGIT = -1e9

# What `collect` can name, each with the shape that one layer returns.
COLLECTABLE = (
    "residual",  # [B, S, D] input of the layer
    "query",  # [B, H, S, E] before rotary positions; "query_rotated" after
    "query_rotated",
    "key",  # [B, N, S, E] before rotary positions; "key_rotated" after
    "key_rotated",
    "value",  # [B, N, S, E]
    "attention_weights",  # fp32 [B, H, S, P + S]
    "attention_output",  # [B, S, D] what attention adds to the residual
    "mlp_output",  # [B, S, D] what the MLP adds to the residual
)


@struct.dataclass
class Output:
    """What a forward pass returns."""

    hidden: Any  # [B, S, D] after the final norm: what the head sees and what Coconut feeds back
    residual: Any  # [B, S, D] before the final norm
    kv: Any  # new keys and values in the cache's layout
    positions: Any  # int32 [B, S]
    activations: Mapping[str, Any] = struct.field(default_factory=dict)  # name -> [L, ...] of what `collect` named


def _norm(config: BackboneConfig, name: str | None = None) -> nn.Module:
    if config.norm == "rms":
        return _rms_norm(config, name)
    dtype = jnp.dtype(config.param_dtype)
    return nn.LayerNorm(config.norm_eps, dtype=jnp.float32, param_dtype=dtype, use_fast_variance=False, name=name)


def _rms_norm(config: BackboneConfig, name: str | None) -> nn.Module:
    return nn.RMSNorm(config.norm_eps, dtype=jnp.float32, param_dtype=jnp.dtype(config.param_dtype), name=name)


def _fenced(x: Array, fence: Array | None) -> Array:
    """`x`, unchanged, as something a compiler does not compute twice.

    XLA:CPU fuses the sum of the residual stream, and of its gradient, through all unrolled layers into every reader and
    computes it anew for each. A division counts as too expensive for that (an optimisation barrier is removed too early)."""
    return x if fence is None else x / fence.astype(x.dtype)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: BackboneConfig

    def _dense(
        self, x: Array, features: int, bias: bool, name: str, fence: Array | None, output: bool = False
    ) -> Array:
        config = self.config
        shrink = (2 * config.layers) ** -0.5 if output else 1.0  # GPT-2: projections into the residual stream
        if config.init == "gpt2":
            init = nn.initializers.normal(config.init_std * shrink)
        else:
            init = nn.initializers.variance_scaling(shrink**2, "fan_in", "normal")
        make = functools.partial(
            nn.Dense, features, bias, dtype=config.compute_dtype, param_dtype=jnp.dtype(config.param_dtype),
            kernel_init=init,
        )  # fmt: skip
        if config.lora is not None and name in config.adapted_layers:
            dense = LoraDense(make, config.lora, name=name)
        else:
            dense = make(name=name)
        return _fenced(dense(x), fence)

    @nn.compact
    def __call__(self, x, angles, mask, past, key, collect: tuple[str, ...], fence=None):
        config, seen = self.config, {}
        keys = (None, None, None) if key is None else jax.random.split(key, 3)

        def note(name: str, value: Any) -> None:
            if name in collect:
                seen[name] = value

        x = _fenced(x, fence)
        note("residual", x)
        normed = _norm(config, "attention_norm")(x).astype(config.compute_dtype)
        query, keys_new, values = self._project(normed, fence)
        note("query", query), note("key", keys_new), note("value", values)
        if angles is not None:
            query, keys_new = rotate(query, angles), rotate(keys_new, angles)
        note("query_rotated", query), note("key_rotated", keys_new)
        wants_weights = "attention_weights" in collect
        mixed, weights = attend(
            query, past, (keys_new, values), mask, dropout_rate=config.attention_dropout, key=keys[0],
            return_weights=wants_weights, platform=config.target_platform,
        )  # fmt: skip
        note("attention_weights", weights)
        merged = jnp.swapaxes(mixed, 1, 2).reshape(*x.shape[:2], -1)
        attended = self._dense(merged, config.width, config.out_bias, "attention_out", fence, output=True)
        note("attention_output", attended)
        x = _fenced(x + dropout(attended, config.residual_dropout, keys[1]), fence)
        normed = _norm(config, "mlp_norm")(x).astype(config.compute_dtype)
        fed = self._mlp(normed, fence)
        note("mlp_output", fed)
        return x + dropout(fed, config.residual_dropout, keys[2]), (keys_new, values), seen

    def _project(self, x: Array, fence: Array | None) -> tuple[Array, Array, Array]:
        """Queries [B, H, S, E], keys and values [B, N, S, E]."""
        config, outputs = self.config, []
        for name, heads in (("query", config.heads), ("key", config.num_kv_heads), ("value", config.num_kv_heads)):
            y = self._dense(x, heads * config.size_per_head, config.qkv_bias, name, fence)
            y = y.reshape(*x.shape[:2], heads, config.size_per_head)
            if config.qk_norm and name != "value":
                y = _rms_norm(config, f"{name}_norm")(y).astype(y.dtype)
            outputs.append(jnp.swapaxes(y, 1, 2))
        return tuple(outputs)

    def _mlp(self, x: Array, fence: Array | None) -> Array:
        config = self.config
        inner = self._dense(x, config.hidden_mlp, config.mlp_bias, "mlp_up", fence)
        act = ACTIVATIONS[config.activation]
        if config.gated_mlp:
            inner = act(self._dense(x, config.hidden_mlp, config.mlp_bias, "mlp_gate", fence)) * inner
        else:
            inner = act(inner)
        return self._dense(inner, config.width, config.mlp_bias, "mlp_down", fence, output=True)


def init(config: BackboneConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Fresh parameters. "gpt2": N(0, 0.02), residual projections divided by sqrt(2L); "unit": embeddings N(0, 1), weights
    N(0, 1/fan_in), residual projections divided by sqrt(2L)."""
    tokens_key, positions_key, layers_key, head_key = jax.random.split(key, 4)
    dtype = jnp.dtype(config.param_dtype)
    std = config.init_std if config.init == "gpt2" else 1.0
    x = jnp.zeros((1, 1, config.width), config.compute_dtype)
    angles = rotary_angles(config, jnp.zeros((1, 1), jnp.int32)) if config.positions == "rotary" else None

    def one_layer(layer_key: Array) -> Any:
        return Block(config).init(layer_key, x, angles, jnp.ones((1, 1, 1), bool), (), None, ())["params"]

    embed = {"tokens": std * jax.random.normal(tokens_key, (config.vocab_size, config.width), dtype)}
    if config.positions == "learned":
        embed["positions"] = std * jax.random.normal(positions_key, (config.max_positions, config.width), dtype)
    params = {
        "embed": embed,
        "layers": jax.vmap(one_layer)(jax.random.split(layers_key, config.layers)),
        "norm": _norm(config).init(head_key, x)["params"],
    }
    if not config.tied_head:
        scale = config.init_std if config.init == "gpt2" else config.width**-0.5
        params["head"] = {"kernel": scale * jax.random.normal(head_key, (config.width, config.vocab_size), dtype)}
    return params


def embed(config: BackboneConfig, params: Mapping[str, Any], tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Token embeddings, without positions: the space in which thoughts replace tokens."""
    return params["embed"]["tokens"][tokens].astype(config.compute_dtype)


def head(config: BackboneConfig, params: Mapping[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """fp32 logits of post-norm hidden states. Ids from `config.vocab_used` on cannot be sampled and get no gradient."""
    hidden = split_rows(hidden.astype(config.compute_dtype))
    if config.tied_head:
        weight = params["embed"]["tokens"].astype(config.compute_dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    else:
        weight = params["head"]["kernel"].astype(config.compute_dtype)
        logits = jnp.einsum("...d,dv->...v", hidden, weight, preferred_element_type=jnp.float32)
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    if config.vocab_used is None:
        return logits
    return jnp.where(jnp.arange(config.vocab_size) < config.vocab_used, logits, PADDING_LOGIT)


def final_norm(
    config: BackboneConfig, params: Mapping[str, Any], residual: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """The norm between the last layer and the head."""
    return jnp.asarray(_norm(config).apply({"params": params["norm"]}, residual), config.compute_dtype)


def layers(
    config: BackboneConfig,
    params: Mapping[str, Any],
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B S T"],
    *,
    start: int = 0,
    stop: int | None = None,
    cache: KVCache | None = None,
    visit: int = 0,
    key: Key[Array, ""] | None = None,
    collect: tuple[str, ...] = (),
) -> tuple[Float[Array, "B S D"], Any, dict[str, Any]]:
    """Run layers [start, stop) on `x`; the past is visit `visit` of these layers in `cache`. Nothing is written.

    Returns the residual stream, the new keys and values (layout of the cache), and collected activations [layers, ...].
    """
    stop = config.layers if stop is None else stop
    unknown = set(collect) - set(COLLECTABLE)
    if unknown:
        raise ValueError(f"collect={sorted(unknown)}: known activations are {', '.join(COLLECTABLE)}")
    first = visit * config.layers + start
    past = [] if cache is None else cache.entries(first, first + stop - start)
    angles = rotary_angles(config, positions) if config.positions == "rotary" else None

    # Always 1, which the compiler cannot know.
    fence = None if config.scans_layers else 1.0 + 0.0 * positions[0, 0].astype(jnp.float32)

    def run_block(x, layer_params, layer_past, layer_key):
        inputs = (split_rows(x), angles, mask, layer_past, layer_key, collect, fence)
        rngs = None if config.lora is None or layer_key is None else {"lora": layer_key}  # adapters fold their names in
        return Block(config).apply({"params": layer_params}, *inputs, rngs=rngs)

    block = run_block
    if config.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        block = jax.checkpoint(run_block, policy=policy)
    stacked = jax.tree.map(lambda leaf: leaf[start:stop], params["layers"])
    keys = (
        None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + stop - start))
    )
    if config.scans_layers:

        def body(x, inputs):
            x, kv, seen = block(x, *inputs)
            return x, (kv, seen)

        x, (kv, seen) = jax.lax.scan(body, x, (stacked, tuple(past), keys))
        return x, kv, seen
    # `lax.split` and not indexing: its transpose joins the layers' gradients instead of adding padded copies.
    split = jax.tree.map(lambda leaf: jax.lax.split(leaf, [1] * (stop - start)), stacked)
    kv, seen = [], []
    for i in range(stop - start):
        layer_params = jax.tree.map(
            lambda parts, i=i: parts[i][0], split, is_leaf=lambda x: isinstance(x, (tuple, list))
        )
        layer_past = tuple(part[i] for part in past)
        x, kv_i, seen_i = block(x, layer_params, layer_past, None if keys is None else keys[i])
        kv.append(kv_i), seen.append(seen_i)
    return x, tuple(kv), {name: jnp.stack([s[name] for s in seen]) for name in seen[0]}


def apply(
    config: BackboneConfig,
    params: Mapping[str, Any],
    inputs: Int[Array, "B S"] | Float[Array, "B S D"],
    valid: Bool[Array, "B S"],
    *,
    cache: KVCache | None = None,
    positions: Int[Array, "B S"] | None = None,
    mask: MaskSpec = MaskSpec(),
    key: Key[Array, ""] | None = None,
    collect: tuple[str, ...] = (),
) -> Output:
    """One forward pass over S new positions, given as token ids or as embeddings, after what `cache` holds.

    `positions` default to counting valid slots. `key` turns dropout on. Nothing is written: pass `Output.kv` to
    `KVCache.write`. Position ids beyond `max_positions` are the caller's to prevent (`check_positions`).
    """
    batch = valid.shape[0]
    x = embed(config, params, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
    x = x.astype(config.compute_dtype)
    if positions is None:
        length = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        positions = next_positions(length, valid)
    if config.positions == "learned":
        x = x + params["embed"]["positions"][positions].astype(x.dtype)
    embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
    x = dropout(x, config.embedding_dropout, embed_key)
    past_valid = jnp.zeros((batch, 0), bool) if cache is None else cache.valid
    residual, kv, seen = layers(
        config, params, x, positions, build_mask(valid, past_valid, mask), cache=cache, key=layers_key, collect=collect
    )
    return Output(final_norm(config, params, residual), residual, kv, positions, seen)


def check_positions(config: BackboneConfig, needed: int, what: str) -> None:
    """Raise ValueError if `needed` positions do not fit the backbone; `what` says which parts add up to them."""
    if needed > config.max_positions:
        raise ValueError(
            f"{what} need {needed} positions, but backbone.max_positions={config.max_positions}: raise it or shorten them"
        )
