"""Thoughts that carry nothing: one learned vector in every slot (pause tokens, arXiv 2310.02226)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from latentjax.rollout import Kind, Proposal, Source


def constant(vector: Float[Array, "D"], limit: Int[Array, "B"], slots: int) -> Source:
    """All `slots` positions at once, the first `limit` of each row valid: nothing in them depends on one another's state,
    so they cost one forward pass."""

    def next(carry, hidden, logits, peek, key):
        shape = (limit.shape[0], slots, vector.shape[0])
        valid = jnp.arange(slots) < limit[:, None]
        kind = jnp.full(limit.shape, Kind.THOUGHT)
        inputs = jnp.broadcast_to(vector, shape).astype(hidden.dtype)
        return Proposal(inputs, None, kind, valid, jnp.ones(limit.shape, bool), carry)

    return Source(lambda context: (), next)
