"""Dropout with an explicit key and few random bits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_BITS = 16  # per element: the rate is met to 2^-17


def dropout(x: Float[Array, "*S E"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*S E"]:
    """Zero each element with probability `rate` and scale the others by 1 / (1 - rate); `key` None: no dropout.

    Two elements of the last axis share one 32-bit word. `jax.random.bits` of a narrower type would not do: it draws a word
    per element and throws the rest away."""
    if key is None or rate == 0.0:
        return x
    dropped = round(rate * 2**_BITS)
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*x.shape[:-1], -1)
    keep = halves[..., : x.shape[-1]] >= dropped
    return jnp.where(keep, x / (1.0 - dropped / 2**_BITS), 0.0)
