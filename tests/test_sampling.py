"""Sampling filters against brute force in float64, and drawn frequencies against the filtered distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from latentjax.sampling import Sampling, filter_logits, sample


def kept_by_definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """bool [V]: one row, filter after filter, ties with the last kept token kept."""
    logits = np.asarray(logits, np.float64) / sampling.temperature
    keep = np.ones(len(logits), bool)

    def probabilities():
        weights = np.where(keep, np.exp(logits - logits.max()), 0)
        return weights / weights.sum()

    if 0 < sampling.top_k < len(logits):
        keep &= logits >= sorted(logits)[-sampling.top_k]
    if sampling.top_p < 1:
        p, mass = probabilities(), 0.0
        for i in np.argsort(-p, kind="stable"):
            last, mass = p[i], mass + p[i]
            if mass >= sampling.top_p:
                break
        keep &= p >= last
    if sampling.min_p > 0:
        p = probabilities()
        keep &= p >= sampling.min_p * p.max()
    return keep


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.03, 1.0),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 0.77]),
    ties=st.booleans(),
)
def test_filters_are_their_definition(seed, temperature, top_k, top_p, min_p, ties):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((3, 11)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    filtered = np.asarray(filter_logits(jnp.asarray(logits), sampling))
    for row in range(3):
        keep = kept_by_definition(logits[row], sampling)
        nudged = [kept_by_definition(logits[row], dataclasses.replace(sampling, top_p=min(p, 1.0)))
                  for p in (top_p * (1 - 1e-6), top_p * (1 + 1e-6))]  # fmt: skip
        if any((n != keep).any() for n in nudged):
            continue  # a mass within rounding of p: either answer is right
        assert (np.isfinite(filtered[row]) == keep).all()
        np.testing.assert_allclose(filtered[row][keep], logits[row][keep] / temperature, rtol=1e-6)


def test_the_most_likely_token_always_stays():
    logits = jnp.asarray([[0.0, 3.0, 1.0]])
    for sampling in (Sampling(1.0, top_p=1e-9), Sampling(1.0, top_k=1), Sampling(1.0, min_p=1.0)):
        assert np.isfinite(filter_logits(logits, sampling)).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.6), Sampling(1.0, top_k=3), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.2)],
    ids=str,
)
def test_frequencies_of_samples(sampling):
    logits = np.array([1.2, -0.3, 0.7, 0.0, 2.0, -1.0])
    keep = kept_by_definition(logits, sampling)
    weights = np.where(keep, np.exp(logits / sampling.temperature), 0)
    n = 20_000
    drawn = sample(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, 6)), jax.random.key(0), sampling)
    counts = np.bincount(np.asarray(drawn), minlength=6)
    assert counts[~keep].sum() == 0
    assert stats.chisquare(counts[keep], n * weights[keep] / weights.sum()).pvalue > 1e-3


def test_greedy_takes_the_most_likely_and_the_first_of_equals():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    assert sample(logits, jax.random.key(0), Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5)],
)
def test_impossible_setting_is_an_error_with_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"sampling.{field}={value}"):
        Sampling(**{field: value})
