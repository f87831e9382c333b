"""Masks against brute force; the library's attention against ours; dropout."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentjax.backbone import decoder
from latentjax.backbone.attention import MaskSpec, attend, build_mask, library_attention
from latentjax.backbone.dropout import dropout
from tests.backbone import naive
from tests.backbone.test_decoder import HOLES, RAGGED, SMALL, apply
from tests.close import assert_close


@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_mask_is_its_definition_entry_by_entry(seed, causal, has_block, has_segment, has_allowed):
    rng = np.random.default_rng(seed)
    valid, past = rng.random((2, 4)) < 0.7, rng.random((2, 3)) < 0.7
    block = rng.integers(-1, 2, (2, 4)) if has_block else None
    segment = rng.integers(0, 2, (2, 4)) if has_segment else None
    allowed = rng.random((2, 4, 7)) < 0.6 if has_allowed else None
    mask = build_mask(jnp.asarray(valid), jnp.asarray(past), MaskSpec(block, segment, allowed, causal=causal))
    for b, i, j in itertools.product(range(2), range(4), range(7)):
        if j < 3:
            expected = past[b, j]
        else:
            k = j - 3
            expected = valid[b, k] and (
                not causal or k <= i or (has_block and block[b, i] == block[b, k] and block[b, i] >= 0)
            )
            expected = expected and (not has_segment or segment[b, i] == segment[b, k])
        expected = expected and (not has_allowed or allowed[b, i, j])
        assert bool(mask[b, i, j]) == bool(expected), (b, i, j)


def qkv(batch=2, heads=4, kv_heads=2, length=5, size=8):
    rng = np.random.default_rng(0)
    draw = lambda h: jnp.asarray(rng.standard_normal((batch, h, length, size)), jnp.float32)  # noqa: E731
    return draw(heads), (draw(kv_heads), draw(kv_heads))


def test_library_attention_equals_ours():
    query, new = qkv()
    mask = jnp.asarray(np.tril(np.ones((2, 5, 5), bool)))
    ours, nothing = attend(query, [], new, mask)
    _, weights = attend(query, [], new, mask, return_weights=True)
    assert nothing is None
    assert weights.shape == (2, 4, 5, 5)
    assert_close(library_attention(query, new, mask, "cpu"), ours, 1e-5)


def test_past_in_segments_equals_one_array():
    query, (keys, values) = qkv()
    mask = jnp.asarray(np.tril(np.ones((2, 5, 5), bool)))
    whole, _ = attend(query, [], (keys, values), mask)
    cut = [
        (keys[:, :, :1], values[:, :, :1]),
        (keys[:, :, 1:1], values[:, :, 1:1]),
        (keys[:, :, 1:3], values[:, :, 1:3]),
    ]
    pieces, _ = attend(query, cut, (keys[:, :, 3:], values[:, :, 3:]), mask)
    assert_close(pieces, whole, 1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_right_share_and_the_mean(rate):
    n = 1_000_000
    out = np.asarray(dropout(jnp.ones(n), rate, jax.random.key(0)), np.float64)
    error = (rate * (1 - rate) / n) ** 0.5
    assert abs((out > 0).mean() - (1 - rate)) < 5 * error
    assert abs(out.mean() - 1) < 5 * error / (1 - rate)
    assert np.unique(out).size == 2
    assert out.max() == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_dropout_is_off_without_a_key_and_decided_by_the_key():
    x = jnp.arange(1.0, 1001.0)
    assert dropout(x, 0.3, None) is x
    first, again, other = (dropout(x, 0.3, jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_attention_dropout_acts_on_the_weights():
    length = 64
    query = jnp.zeros((8, 2, length, length))
    identity = jnp.broadcast_to(jnp.eye(length), (8, 2, length, length))  # values whose mixture shows the weights
    mask = jnp.ones((8, length, length), bool)
    out, weights = attend(
        query, [], (query, identity), mask, dropout_rate=0.25, key=jax.random.key(0), return_weights=True
    )
    kept = np.asarray(out) > 0
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / kept.size) ** 0.5
    assert_close(np.asarray(out)[kept], np.full(kept.sum(), 1 / length / 0.75), 1e-4)
    assert_close(weights, np.full(weights.shape, 1 / length), 1e-6)  # as they were before dropout


@pytest.mark.parametrize("scan", [False, True])
def test_each_dropout_acts_where_it_says(scan):
    rates = dataclasses.replace(SMALL, embedding_dropout=0.3, residual_dropout=0.4, scan_layers=scan)
    params = naive.random_params(rates)
    _, out = apply(rates, params, RAGGED, HOLES, key=jax.random.key(1), collect=decoder.COLLECTABLE)
    _, clean = apply(rates, params, RAGGED, HOLES, collect=("residual",))
    embedded, dropped = np.asarray(clean.activations["residual"][0]), np.asarray(out.activations["residual"][0])
    kept = dropped != 0
    assert 0.5 < kept.mean() < 0.9
    assert_close(dropped[kept], embedded[kept] / 0.7, 1e-4)
    seen, ends = out.activations, [*out.activations["residual"][1:], out.residual]
    patterns = []
    for i in range(2):
        added = np.asarray(ends[i] - seen["residual"][i])
        attention, mlp = np.asarray(seen["attention_output"][i]) / 0.6, np.asarray(seen["mlp_output"][i]) / 0.6
        choices = np.stack([0 * mlp, attention, mlp, attention + mlp])
        distance = np.abs(choices - added)
        assert distance.min(axis=0).max() < 1e-3  # each element is one of the four
        patterns.append(distance.argmin(axis=0))
    assert (patterns[0] != patterns[1]).any()  # layers draw masks of their own


def test_forward_without_a_key_has_no_dropout_and_with_one_is_deterministic():
    config = SMALL.with_dropout(0.2)
    params = naive.random_params(config)
    plain = apply(SMALL, params, RAGGED, HOLES)[0]
    assert (apply(config, params, RAGGED, HOLES)[0] == plain).all()
    drawn = [apply(config, params, RAGGED, HOLES, key=jax.random.key(k))[0] for k in (1, 1, 2)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert (drawn[0] != plain).any()
