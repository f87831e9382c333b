"""Thoughts that are the model's own last hidden state (Coconut, arXiv 2412.06769, section 3): z_{j+1} = h(z_j)."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from latentjax.rollout import Kind, Proposal, Source


def feedback(limit: Int[Array, "B"]) -> Source:
    """Feed back the post-norm hidden state, unchanged and with its gradient, `limit` times per row."""

    def next(count, hidden, logits, peek, key):
        active = count < limit
        kind = jnp.where(active, Kind.THOUGHT, Kind.PAD)
        return Proposal(hidden[:, None], None, kind, active[:, None], count + 1 >= limit, count + 1)

    return Source(lambda context: jnp.zeros(limit.shape, jnp.int32), next)
