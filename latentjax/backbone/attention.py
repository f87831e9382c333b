"""Attention: masks, rotary positions, and scaled dot products over a cache and the new positions.

Letters: B batch, S new positions, P past (cached) positions, H query heads, N key/value heads, E width of a head.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.dropout import dropout

# Keys and values of one layer's past: head-major, [B, N, P, E] each.
KeyValue = tuple[Any, Any]


@struct.dataclass
class MaskSpec:
    """Which new position may look at which position, beyond validity. Slots, not position ids, define "before".

    causal     a position sees itself and the slots before it:       1 . .
                                                                     1 1 .
                                                                     1 1 1
    block      int [B, S]; new positions of one non-negative block   1 1 .   (slots 0 and 1 share a block)
               see each other both ways (LaDiR):                     1 1 .
                                                                     1 1 1
    segment    int [B, S]; new positions see only their own segment  1 . .   (slots 1 and 2 share a segment)
               (packing; not for use with a cache):                  . 1 .
                                                                     . 1 1
    allowed    bool [B, S, P + S]; an arbitrary mask, and-ed with the others
    """

    block: Any = None
    segment: Any = None
    allowed: Any = None
    causal: bool = struct.field(pytree_node=False, default=True)


def build_mask(
    valid: Bool[Array, "B S"], past_valid: Bool[Array, "B P"], spec: MaskSpec = MaskSpec()
) -> Bool[Array, "B S P+S"]:
    """True where a new position (row) may attend to a past or new position (column). Invalid columns are never attended."""
    batch, new = valid.shape
    among_new = jnp.tril(jnp.ones((new, new), bool)) if spec.causal else jnp.ones((new, new), bool)
    among_new = jnp.broadcast_to(among_new, (batch, new, new))
    if spec.block is not None:
        same = (spec.block[:, :, None] == spec.block[:, None, :]) & (spec.block[:, :, None] >= 0)
        among_new = among_new | same
    if spec.segment is not None:
        among_new = among_new & (spec.segment[:, :, None] == spec.segment[:, None, :])
    among_new = among_new & valid[:, None, :]
    past = jnp.broadcast_to(past_valid[:, None, :], (batch, new, past_valid.shape[1]))
    mask = jnp.concatenate([past, among_new], axis=2)
    return mask if spec.allowed is None else mask & spec.allowed


def rotary_frequencies(config: BackboneConfig) -> Float[np.ndarray, "half"]:
    """Inverse wavelengths theta^(-2i/E), i < E/2, of rotary positions (arXiv 2104.09864, Eq. 15), with Llama-3's scaling.

    Llama-3.1: wavelengths longer than original/low_freq_factor are divided by `factor`, those shorter than
    original/high_freq_factor are kept, and the frequencies between are interpolated linearly in original/wavelength.
    """
    half = np.arange(0, config.size_per_head, 2, dtype=np.float64) / config.size_per_head
    frequency = config.rope_theta**-half
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_positions * frequency / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
    return frequency.astype(np.float32)


def rotary_angles(config: BackboneConfig, positions: Int[Array, "B S"]) -> tuple[Array, Array]:
    """Cosine and sine, fp32 [B, 1, S, E/2] each, of the angle of each position and frequency."""
    angle = positions.astype(jnp.float32)[:, None, :, None] * rotary_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B H S E"], angles: tuple[Array, Array]) -> Float[Array, "B H S E"]:
    """Rotary embedding in the half-split convention of the public Llama and Qwen checkpoints: feature i pairs with i + E/2."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "B H S E"],
    past: Sequence[KeyValue],
    new: KeyValue,
    mask: Bool[Array, "B S T"],
    *,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    return_weights: bool = False,
    platform: str | None = None,
) -> tuple[Float[Array, "B H S E"], Float[Array, "B H S T"] | None]:
    """softmax(q k^T / sqrt(E)) v over the segments of the past and the new positions, T = P + S, softmax in fp32.

    Without dropout, past and requested weights an accelerator runs `jax.nn.dot_product_attention` (cuDNN flash attention on
    GPU in half precision). Otherwise, and on CPU, where that is slower (docs/results.md), the products run here, segment by
    segment, so that a cache is never copied together.
    Rows that may attend to nothing get the mean of all values; nothing valid reads them.
    """
    plain = not past and not return_weights and (key is None or dropout_rate == 0.0)
    platform = platform or jax.default_backend()
    if plain and platform != "cpu":
        return library_attention(query, new, mask, platform), None
    batch, heads, length, size = query.shape
    segments = [*past, new]
    kv_heads = new[0].shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, size)
    scores = [
        jnp.einsum("bngse,bnpe->bngsp", grouped, keys, preferred_element_type=jnp.float32) for keys, _ in segments
    ]
    logits = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    logits = jnp.where(mask[:, None, None], logits * size**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    used = dropout(weights, dropout_rate, key).astype(query.dtype)
    out, start = jnp.zeros((), query.dtype), 0
    for keys, values in segments:
        stop = start + keys.shape[2]
        out = out + jnp.einsum("bngsp,bnpe->bngse", used[..., start:stop], values)
        start = stop
    shaped = out.reshape(batch, heads, length, size)
    return shaped, weights.reshape(batch, heads, length, -1) if return_weights else None


def library_implementation(dtype: jnp.dtype, size_per_head: int, platform: str) -> Literal["cudnn", "xla"]:
    """Which implementation of `jax.nn.dot_product_attention` runs: "cudnn" for half precision on GPU, else "xla"."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return "cudnn" if platform == "gpu" and half and size_per_head % 8 == 0 else "xla"


def library_attention(query: Array, new: KeyValue, mask: Array, platform: str) -> Array:
    """`jax.nn.dot_product_attention` on head-major arrays [B, H, S, E]."""
    queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (query, *new))
    implementation = library_implementation(query.dtype, query.shape[-1], platform)
    out = jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None], implementation=implementation)
    return jnp.swapaxes(out, 1, 2)
