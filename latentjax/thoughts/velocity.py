"""The parts of a flow-matching network that know the time: its embedding, and the head that reads velocities off hidden states.

As in the released code of LaDiR (arXiv 2510.04573), whose head is the last layer of DiT (arXiv 2212.09748).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEATURES = 256  # sinusoids of the time embedding


class TimeEmbedding(nn.Module):
    """e(t): sinusoids of 1000 t with frequencies 10000^(-i/128), then Linear, SiLU, Linear (released code)."""

    width: int

    @nn.compact
    def __call__(self, t: Float[Array, "*B"]) -> Float[Array, "*B D"]:
        frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(_FEATURES // 2) / (_FEATURES // 2))
        angles = 1000.0 * t[..., None] * frequencies
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return nn.Dense(self.width, name="out")(nn.silu(nn.Dense(self.width, name="in")(features)))


class VelocityHead(nn.Module):
    """From hidden states to the prediction: a norm without parameters, modulated by the time, then a linear map. `time` is an
    embedding for each block, or one for all."""

    latent_width: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B S D"], time: Float[Array, "... D"]) -> Float[Array, "*B S Z"]:
        hidden = nn.LayerNorm(1e-6, use_bias=False, use_scale=False)(hidden.astype(jnp.float32))
        zero = nn.initializers.zeros
        modulation = nn.Dense(2 * hidden.shape[-1], kernel_init=zero, name="modulation")(nn.silu(time))
        shift, scale = jnp.split(modulation[..., None, :], 2, axis=-1)
        return nn.Dense(self.latent_width, name="out")((1.0 + scale) * hidden + shift)
