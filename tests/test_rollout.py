"""The rollout against re-running whole sequences: feedback, mixtures, Jacobi iteration, per-row modes, two contexts."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone.config import BackboneConfig
from latentjax.rollout import MAIN, Backbone, Kind, Proposal, Source, last_valid, prefill, run, start
from latentjax.thoughts.constant import constant
from latentjax.thoughts.feedback import feedback
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit

# No biases of keys: with learned positions their gradient is 0, which has no scale to compare with.
CONFIG = BackboneConfig(vocab_size=13, max_positions=32, width=12, layers=2, heads=2, qkv_bias=False)
PARAMS = naive.random_params(CONFIG)
MASK = np.arange(6) < np.array([[5], [3], [6]])  # ragged questions
QUESTION = np.random.default_rng(0).integers(2, 13, MASK.shape).astype(np.int32)
NULL, NULL_MASK = QUESTION[:, :2] * 0 + 2, np.array([[1, 0]] * 3, bool)  # the question of a second context: one token


def feed(backbone, limits):
    return feedback(limits)


def mixture(backbone, limits, gate=0.0, top=3):
    """Gate times the top token's embedding plus the mean embedding of the `top` most likely tokens by their probability."""

    def next(count, hidden, logits, peek, key):
        share, which = jax.lax.top_k(jax.nn.softmax(logits), top)
        share = share / share.sum(axis=-1, keepdims=True)
        vectors = gate * backbone.embed(which[:, 0]) + jnp.einsum("bk,bkd->bd", share, backbone.embed(which))
        active = count < limits
        kind = jnp.where(active, Kind.MIXED, Kind.PAD)
        return Proposal(vectors[:, None], which[:, 0], kind, active[:, None], count + 1 >= limits, count + 1)

    return Source(lambda context: jnp.zeros(limits.shape, jnp.int32), next)


def jacobi(backbone, limits, slots=3, iterations=3):
    """A block of thoughts, all guessed to be the first one, then fed back all at once `iterations` times."""

    def next(carry, hidden, logits, peek, key):
        valid = jnp.arange(slots) < limits[:, None]
        z = jnp.repeat(hidden[:, None], slots, axis=1)
        for i in range(iterations):
            if i:
                z = jnp.concatenate([hidden[:, None], peeked.hidden[:, :-1]], axis=1)
            peeked = peek(z, valid)
        kind = jnp.full(limits.shape, Kind.THOUGHT)
        return Proposal(
            z, jnp.zeros_like(kind), kind, valid, kind > 0, carry, candidate={MAIN: peeked}, peeks=iterations,
            peeked=iterations * slots,
        )  # fmt: skip

    return Source(lambda context: (), next)


def think_then_write(backbone, limits):
    """Each row thinks as often as its limit says and then writes the most likely token for ever."""

    def next(count, hidden, logits, peek, key):
        thinks = count < limits
        kind = jnp.where(thinks, Kind.THOUGHT, Kind.TEXT)
        valid = jnp.ones((*kind.shape, 1), bool)
        return Proposal(hidden[:, None], jnp.argmax(logits, -1).astype(jnp.int32), kind, valid, kind < 0, count + 1)

    return Source(lambda context: jnp.zeros(limits.shape, jnp.int32), next)


def alternate(backbone, limits):
    """Each row writes one token, thinks, writes one token, ...; row 1 the other way round."""

    def next(count, hidden, logits, peek, key):
        writes = (count + (jnp.arange(3) == 1)) % 2 == 0
        kind = jnp.where(writes, Kind.TEXT, Kind.THOUGHT)
        valid = jnp.ones((3, 1), bool)
        return Proposal(hidden[:, None], jnp.argmax(logits, -1).astype(jnp.int32), kind, valid, kind < 0, count + 1)

    return Source(lambda context: jnp.zeros(limits.shape, jnp.int32), next)


def guided(backbone, limits, weight=1.5):
    """One look at the fed-back state in both contexts, and a step away from the null context."""

    def next(count, hidden, logits, peek, key):
        one = jnp.ones((limits.shape[0], 1), bool)
        given, null = (peek(hidden[:, None], one, context).hidden for context in (MAIN, "null"))
        active = count < limits
        kind = jnp.where(active, Kind.THOUGHT, Kind.PAD)
        vector = null + weight * (given - null)
        done = count + 1 >= limits
        return Proposal(vector, jnp.zeros_like(kind), kind, active[:, None], done, count + 1, peeks=2, peeked=2)

    return Source(lambda context: jnp.zeros(limits.shape, jnp.int32), next)


def _roll(config, params, make: Callable, limits, steps, *, slots=1, until_done=False, contexts=(MAIN,), **options):
    """(state, step) of a rollout from QUESTION; `contexts` may add "null"."""
    backbone = Backbone(config, params)
    prompts = {MAIN: (QUESTION, MASK), "null": (NULL, NULL_MASK)}
    caches = {name: prefill(backbone, *map(jnp.asarray, prompts[name]), steps * slots) for name in contexts}
    source = make(backbone, limits)
    return run(
        backbone, source, start(source, caches), steps, jax.random.key(0), until_done=until_done, **options
    )  # fmt: skip


roll = jit(
    _roll, static_argnames=("config", "make", "steps", "slots", "until_done", "contexts", "record", "train")
)  # fmt: skip


def row_embeddings(row, params=PARAMS):
    return naive.embed(params, QUESTION[row, MASK[row]])


LIMITS = jnp.array([2, 3, 0])


@pytest.mark.parametrize("until_done", [False, True], ids=["scan", "while"])
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_feedback_equals_rerunning_the_sequence_for_every_thought(scan_layers, until_done):
    config = naive.with_scan(CONFIG, scan_layers)
    record = ("inputs", "hidden", "kv")
    state, step = roll(config, PARAMS, feed, LIMITS, 4, until_done=until_done, record=record)
    for row in range(3):
        n, k = MASK[row].sum(), int(LIMITS[row])
        x = naive.think(config, PARAMS, row_embeddings(row), k)
        states = naive.forward(config, PARAMS, x)
        assert np.asarray(step.valid)[:, row, 0].tolist() == [j < k for j in range(4)]
        assert (np.asarray(step.kind)[:k, row] == Kind.THOUGHT).all()
        assert_close(state.contexts[MAIN].hidden[row], states[-1], 1e-5)
        if k:
            for committed in (step.inputs, step.recorded["inputs"]):
                assert_close(committed[:k, row, 0], x[n:], 1e-5)
            assert_close(step.recorded["hidden"][:k, row, 0], states[n:], 1e-5)
    keys = np.asarray(step.recorded["kv"][0])  # [N, entries, B, S, heads, head_dim]
    assert keys.shape == (4, 2, 3, 1, 2, 6)
    x = naive.think(config, PARAMS, row_embeddings(1), 3) + PARAMS["embed"]["positions"][:6]
    weights = jax.tree.map(lambda w: w[0], PARAMS["layers"])
    first = naive.affine(weights["key"], naive.norm(config, weights["attention_norm"], x))
    assert_close(keys[:3, 0, 1, 0].reshape(3, -1), first[3:], 1e-5)


def test_cost_counts_forwards_and_valid_positions():
    state, _ = roll(CONFIG, PARAMS, feed, LIMITS, 4)
    assert np.asarray(state.cost.forwards).tolist() == [2, 3, 0]
    assert np.asarray(state.cost.positions).tolist() == [2, 3, 0]
    assert np.asarray(state.cost.answer_tokens).tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [feed, mixture, think_then_write])
def test_while_loop_equals_scan(make):
    scanned, steps = roll(CONFIG, PARAMS, make, LIMITS, 4)
    looped, steps_looped = roll(CONFIG, PARAMS, make, LIMITS, 4, until_done=True)
    valid = np.asarray(steps.valid)
    for name in ("token", "kind", "valid"):
        ran = valid[..., 0] if name != "valid" else np.ones_like(valid)
        assert (np.asarray(getattr(steps, name))[ran] == np.asarray(getattr(steps_looped, name))[ran]).all()
    assert_close(np.asarray(steps_looped.inputs)[valid], np.asarray(steps.inputs)[valid], 1e-5)
    assert_close(looped.contexts[MAIN].hidden, scanned.contexts[MAIN].hidden, 1e-5)
    assert_close(looped.cost, scanned.cost, 0)


def test_while_loop_ends_when_all_rows_have():
    """The cache's index counts the iterations that wrote."""
    looped, steps = roll(CONFIG, PARAMS, feed, LIMITS, 9, until_done=True)
    scanned, _ = roll(CONFIG, PARAMS, feed, LIMITS, 9)
    assert int(looped.contexts[MAIN].cache.index) == 3
    assert int(scanned.contexts[MAIN].cache.index) == 9
    assert steps.valid.shape == (9, 3, 1)
    assert not np.asarray(steps.valid)[3:].any()
    assert (np.asarray(steps.inputs)[3:] == 0).all()
    nobody, _ = roll(CONFIG, PARAMS, feed, 0 * LIMITS, 9, until_done=True)
    assert int(nobody.contexts[MAIN].cache.index) == 0
    assert_close(nobody.contexts[MAIN].hidden[0], naive.forward(CONFIG, PARAMS, row_embeddings(0))[-1], 1e-5)


@pytest.mark.parametrize("gate", [0.0, 0.8], ids=["soft tokens", "token plus vector"])
def test_mixture_of_token_embeddings(gate):
    state, step = roll(CONFIG, PARAMS, functools.partial(mixture, gate=gate), LIMITS, 3)
    for row in range(3):
        x, tokens = row_embeddings(row), []
        for _ in range(int(LIMITS[row])):
            scores = np.asarray(naive.logits(CONFIG, PARAMS, naive.forward(CONFIG, PARAMS, x)[-1]), np.float64)
            order = np.argsort(-scores)[:3]
            share = np.exp(scores[order]) / np.exp(scores[order]).sum()
            vector = sum(p * PARAMS["embed"]["tokens"][i] for p, i in zip(share, order, strict=True))
            x = jnp.concatenate([x, (gate * PARAMS["embed"]["tokens"][order[0]] + vector)[None]])
            tokens.append(int(order[0]))
        k = len(tokens)
        assert np.asarray(step.token)[:k, row].tolist() == tokens
        assert (np.asarray(step.kind)[:k, row] == Kind.MIXED).all()
        assert_close(state.contexts[MAIN].hidden[row], naive.forward(CONFIG, PARAMS, x)[-1], 1e-5)


@pytest.mark.parametrize("limits", [[3, 3, 3], [2, 3, 0]], ids=["full", "ragged"])
def test_jacobi_with_enough_iterations_equals_feedback(limits):
    limits = jnp.array(limits)
    expected, steps = roll(CONFIG, PARAMS, feed, limits, 3)
    thoughts = np.asarray(steps.inputs)[:, :, 0].swapaxes(0, 1)
    used = np.arange(3) < np.asarray(limits)[:, None]
    for iterations in (3, 4):
        make = functools.partial(jacobi, iterations=iterations)
        state, block = roll(CONFIG, PARAMS, make, limits, 1, slots=3)
        assert_close(np.asarray(block.inputs)[0][used], thoughts[used], 1e-5)
        assert_close(state.contexts[MAIN].hidden, expected.contexts[MAIN].hidden, 1e-5)
        assert (np.asarray(state.contexts[MAIN].cache.length) == MASK.sum(axis=1) + np.asarray(limits)).all()
    early, _ = roll(CONFIG, PARAMS, functools.partial(jacobi, iterations=2), jnp.array([3, 3, 3]), 1, slots=3)
    assert np.abs(np.asarray(early.contexts[MAIN].hidden[1] - expected.contexts[MAIN].hidden[1])).max() > 1e-3


def test_jacobi_costs_its_peeks_and_nothing_for_the_adopted_commit():
    for iterations in (3, 4):
        make = functools.partial(jacobi, iterations=iterations)
        state, _ = roll(CONFIG, PARAMS, make, jnp.array([3, 3, 0]), 1, slots=3)
        assert np.asarray(state.cost.forwards).tolist() == [iterations, iterations, 0]
        assert np.asarray(state.cost.positions).tolist() == [3 * iterations, 3 * iterations, 0]


def test_gradients_through_jacobi_equal_those_through_feedback():
    def scalar(params, make, steps, slots):
        state, _ = _roll(CONFIG, params, make, jnp.array([3, 3, 3]), steps, slots=slots)
        return (state.contexts[MAIN].hidden * jnp.sin(jnp.arange(12.0))).sum()

    gradient = jit(jax.grad(scalar), static_argnums=(1, 2, 3))
    assert_close(gradient(PARAMS, jacobi, 1, 3), gradient(PARAMS, feed, 3, 1), 1e-4)


def test_rows_think_while_others_write():
    limits = jnp.array([1, 4, 0])
    state, step = roll(CONFIG, PARAMS, think_then_write, limits, 4)
    for row in range(3):
        k = int(limits[row])
        x = naive.think(CONFIG, PARAMS, row_embeddings(row), k)
        tokens, _ = naive.greedy(CONFIG, PARAMS, x, 4 - k, eos=-1)
        assert np.asarray(step.token)[k:, row].tolist() == tokens
        assert np.asarray(step.kind)[:, row].tolist() == [Kind.THOUGHT] * k + [Kind.TEXT] * (4 - k)
        if tokens:
            x = jnp.concatenate([x, naive.embed(PARAMS, tokens)])
        assert_close(state.contexts[MAIN].hidden[row], naive.forward(CONFIG, PARAMS, x)[-1], 1e-5)
    assert np.asarray(state.cost.answer_tokens).tolist() == [3, 0, 4]


def test_two_contexts_receive_the_same_commits():
    state, step = roll(CONFIG, PARAMS, guided, LIMITS, 3, contexts=(MAIN, "null"))
    for row in range(3):
        given, null = row_embeddings(row), naive.embed(PARAMS, NULL[row, :1])
        n, k = len(given), int(LIMITS[row])
        for _ in range(k):
            vector = naive.forward(CONFIG, PARAMS, given)[-1][None]
            to, away = (naive.forward(CONFIG, PARAMS, jnp.concatenate([x, vector]))[-1] for x in (given, null))
            step_taken = (away + 1.5 * (to - away))[None]
            given, null = jnp.concatenate([given, step_taken]), jnp.concatenate([null, step_taken])
        if k:
            assert_close(step.inputs[:k, row, 0], given[n:], 1e-5)
        for name, x in ((MAIN, given), ("null", null)):
            assert_close(state.contexts[name].hidden[row], naive.forward(CONFIG, PARAMS, x)[-1], 1e-5)
    # A step: two peeks and one commit, run for both contexts.
    assert np.asarray(state.cost.forwards).tolist() == [6, 9, 0]
    assert np.asarray(state.cost.positions).tolist() == [8, 12, 0]


def test_constant_thoughts_are_one_commit():
    vector = jnp.asarray(np.random.default_rng(4).standard_normal(12), jnp.float32)
    make = lambda backbone, limits: constant(vector, limits, 4)  # noqa: E731
    state, step = roll(CONFIG, PARAMS, make, LIMITS, 1, slots=4)
    assert np.asarray(step.valid)[0].sum(axis=1).tolist() == [2, 3, 0]
    for row in range(3):
        x = jnp.concatenate([row_embeddings(row), *[vector[None]] * int(LIMITS[row])])
        assert_close(state.contexts[MAIN].hidden[row], naive.forward(CONFIG, PARAMS, x)[-1], 1e-5)
    assert np.asarray(state.cost.forwards).tolist() == [1, 1, 0]


def test_dropout_in_thoughts_is_decided_by_the_key_and_off_outside_training():
    config = CONFIG.with_dropout(0.3)
    rows = [
        roll(config, PARAMS, feed, LIMITS, 4, train=train)[0].contexts[MAIN].hidden for train in (True, True, False)
    ]
    assert (rows[0] == rows[1]).all()
    assert (rows[0][:2] != rows[2][:2]).any()
    assert (rows[0][2] == rows[2][2]).all()  # this row has no thoughts, and its prefill had no key
    assert_close(rows[2], roll(CONFIG, PARAMS, feed, LIMITS, 4)[0].contexts[MAIN].hidden, 0)


def test_last_valid_is_the_last_valid_slot_or_what_was_before():
    hidden, before = jnp.arange(12.0).reshape(3, 4, 1), -jnp.ones((3, 1))
    valid = jnp.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    assert last_valid(hidden, valid, before)[:, 0].tolist() == [2.0, -1.0, 11.0]
    assert last_valid(hidden[:, :1], valid[:, :1], before)[:, 0].tolist() == [0.0, -1.0, 8.0]
