"""Choosing a token from logits: greedy, temperature, top-k, top-p and min-p.

Letters: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters act on the tempered distribution, in the order top-k, top-p, min-p.

    temperature  0 takes the most likely token; otherwise logits are divided by it
    top_k        keep the k most likely tokens; 0 keeps all
    top_p        keep the smallest set of most likely tokens whose mass reaches p (nucleus sampling, arXiv 1904.09751)
    min_p        keep tokens at least min_p times as likely as the most likely one (arXiv 2407.01082)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k={self.top_k}: must be 0 (all) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p={self.min_p}: must lie in [0, 1]")


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered logits with -inf where `sampling` excludes a token; ties with the last kept token are kept."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        smallest = jnp.min(jnp.where(mass_before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.min_p > 0.0:
        bar = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < bar, -jnp.inf, logits)
    return logits


def sample(logits: Float[Array, "B V"], key: Key[Array, ""], sampling: Sampling) -> Int[Array, "B"]:
    """One token per row."""
    if sampling.temperature == 0.0:
        return most_likely(logits)
    return jax.random.categorical(key, filter_logits(logits, sampling), axis=-1).astype(jnp.int32)


def most_likely(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The first token with the largest logit, as `argmax` defines it, by two plain reductions: XLA:CPU runs those on vectors,
    a reduction over pairs of value and index it does not."""
    size = logits.shape[-1]
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.min(jnp.where(is_largest, jnp.arange(size), size), axis=-1)
    return jnp.minimum(index, size - 1).astype(jnp.int32)  # a row of NaN has no largest logit


def log_probability(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    """log softmax(logits)[token], without an array of all of them; relative to the largest logit, so that the log-probability
    of a near-certain token is not the difference of two large numbers."""
    relative = logits - jnp.max(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(relative, token[:, None], axis=1)[:, 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(relative), axis=-1))
