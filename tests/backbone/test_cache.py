"""The cache: whatever the pieces in which a sequence is written, and whatever lies between, it is the same forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import cache as caches
from latentjax.backbone import decoder
from latentjax.backbone.attention import MaskSpec, build_mask
from tests.backbone import naive
from tests.backbone.test_decoder import LLAMA, SMALL, apply
from tests.close import assert_close
from tests.quick import jit

# Three ragged rows of 12 slots, read as a prefill of 5 and pieces of 1, 3, 1 and 2 slots; some slots are holes.
VALID = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0],
    ],
    bool,
)
PIECES = (5, 6, 9, 10, 12)
TOKENS = np.random.default_rng(0).integers(0, 13, VALID.shape).astype(np.int32)


@functools.partial(jit, static_argnums=0)
def in_pieces(config, params, tokens, valid):
    """Hidden states [B, T, D]: a prefill, then pieces; before each is written, another one is peeked at and dropped."""
    out = decoder.apply(config, params, tokens[:, : PIECES[0]], valid[:, : PIECES[0]])
    cache = caches.freeze(out.kv, valid[:, : PIECES[0]], 8, stacked=config.scans_layers)
    hidden = [out.hidden]
    for start, stop in itertools.pairwise(PIECES):
        dropped = decoder.apply(config, params, (tokens[:, :2] + 1) % 13, jnp.ones((3, 2), bool), cache=cache)
        cache.write(dropped.kv, jnp.ones((3, 2), bool))
        out = decoder.apply(config, params, tokens[:, start:stop], valid[:, start:stop], cache=cache)
        cache = cache.write(out.kv, valid[:, start:stop])
        hidden.append(out.hidden)
    return jnp.concatenate(hidden, axis=1), cache


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["learned", "rotary, GQA"])
def test_pieces_equal_one_pass_of_unpadded_rows(config, scan):
    config = naive.with_scan(config, scan)
    params = naive.random_params(config)
    hidden, cache = in_pieces(config, params, TOKENS, VALID)
    for row in range(3):
        expected = naive.forward(config, params, naive.embed(params, TOKENS[row, VALID[row]]))
        assert_close(hidden[row, VALID[row]], expected, 1e-5)
    assert (np.asarray(cache.valid)[:, :12] == VALID).all()
    assert not np.asarray(cache.valid)[:, 12:].any()
    assert (np.asarray(cache.length) == VALID.sum(axis=1)).all()
    assert (int(cache.index), int(cache.free)) == (7, 1)


def test_gradients_through_the_cache_are_those_of_one_pass():
    params = naive.random_params(LLAMA)
    weight = jnp.sin(jnp.arange(12.0))

    def ours(params):
        hidden, _ = in_pieces.__wrapped__(LLAMA, params, jnp.asarray(TOKENS), jnp.asarray(VALID))
        return jnp.where(VALID[..., None], hidden * weight, 0).sum()

    def expected(params):
        rows = [naive.forward(LLAMA, params, naive.embed(params, t[v])) for t, v in zip(TOKENS, VALID, strict=True)]
        return sum((row * weight).sum() for row in rows)

    gradient, definition = jit(jax.grad(ours))(params), jit(jax.grad(expected))(params)
    for tree in (gradient, definition):  # neither has a head: `hidden` does not pass it
        tree.pop("head")
    assert_close(gradient, definition, 1e-4)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_second_visit_of_a_layer_range_has_entries_of_its_own(scan):
    """Layers 0..2, then 1..2 again: token by token against a cache of two visits = the whole sequence, range by range."""
    config = naive.with_scan(LLAMA, scan)
    params = naive.random_params(config)
    tokens = jnp.asarray(TOKENS[:2, :6])
    one = jnp.ones((2, 1), bool)

    @jit
    def by_token(params):
        cache, states = caches.empty_cache(config, 2, 6, visits=2), []
        for t in range(6):
            x = decoder.embed(config, params, tokens[:, t : t + 1])
            positions = jnp.full((2, 1), t)
            mask = build_mask(one, cache.valid)
            x, kv, _ = decoder.layers(config, params, x, positions, mask, cache=cache)
            again = dict(start=1, cache=cache, visit=1)
            x, kv_again, _ = decoder.layers(config, params, x, positions, mask, **again)
            written = cache.write(kv, one, 0, advance=False)
            cache = written.write(kv_again, one, config.layers + 1)
            states.append(x)
        return jnp.concatenate(states, axis=1)

    states = by_token(params)
    causal = np.tril(np.ones((6, 6), bool))
    for row in range(2):
        x = naive.embed(params, tokens[row])
        x = naive.layers(config, params, x, jnp.arange(6), causal)
        x = naive.layers(config, params, x, jnp.arange(6), causal, start=1)
        assert_close(states[row], x, 1e-5)


def test_block_mask_against_a_cache():
    """A block read after a cached question: its slots see the question and one another, both ways."""
    params = naive.random_params(SMALL)
    tokens, valid = jnp.asarray(TOKENS[:1, :8]), jnp.ones((1, 8), bool)
    apply = jit(decoder.apply, static_argnums=0)
    question = apply(SMALL, params, tokens[:, :5], valid[:, :5])
    cache = caches.freeze(question.kv, valid[:, :5], 3, stacked=SMALL.scans_layers)
    spec = MaskSpec(block=jnp.array([[0, 0, -1]]))
    out = apply(SMALL, params, tokens[:, 5:], valid[:, 5:], cache=cache, mask=spec)
    mask = np.tril(np.ones((8, 8), bool))
    mask[5, 6] = True
    expected = naive.forward(SMALL, params, naive.embed(params, TOKENS[0, :8]), mask)
    assert_close(out.hidden[0], expected[5:], 1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_slot_major_form_and_back_is_the_same_bits(scan):
    config = naive.with_scan(LLAMA, scan)
    _, out = apply(config, naive.random_params(config), TOKENS, VALID)
    pairs = caches.slot_major(out.kv, stacked=scan)
    assert {x.shape for x in pairs} == {(2, 3, 12, 2, 8)}
    back = caches.from_slot_major(pairs, stacked=scan)
    assert jax.tree.structure(back) == jax.tree.structure(out.kv)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(out.kv), strict=True))


def test_position_ids_count_valid_slots():
    positions = caches.next_positions(jnp.array([0, 4]), jnp.array([[0, 1, 0, 1], [1, 0, 1, 1]], bool))
    assert np.asarray(positions).tolist() == [[0, 0, 0, 1], [4, 4, 5, 6]]
