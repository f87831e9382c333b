import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.methods.base import Stage
from latentjax.sharding import batch_sharding, make_mesh, param_shardings
from tests.train.small import experiment
from train import state as train_state
from train.config import Optimizer
from train.prepare import prepare
from train.state import frozen_mask, parameter_paths, reset_optimizer
from train.step import gradients, make_step

STEPS = 10


def _start(config):
    prepared = prepare(config)
    return prepared.first_state(), jax.device_put(prepared.training.batch(0))


def _assert_close(found, right, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        difference = np.abs(np.asarray(a) - np.asarray(b)).max()
        assert difference <= tolerance * max(np.abs(np.asarray(b)).max(), 1e-30)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulate):
    config = experiment(noise=0.0)
    state, batch = _start(config)
    still = frozen_mask(state.params, ())
    found = jax.jit(functools.partial(gradients, config.method, accumulate=accumulate, still=still))
    whole = jax.jit(functools.partial(gradients, config.method, accumulate=1, still=still))
    key = jax.random.key(0)
    batch = batch.replace(loss_mask=batch.loss_mask.at[0].set(False))  # unequal numbers of targets in the microbatches
    (grads, metrics), (right, right_metrics) = found(state, batch, key=key), whole(state, batch, key=key)
    _assert_close(grads, right, 1e-6)
    _assert_close(metrics, right_metrics, 1e-6)

    # A plain mean over the microbatches is something else.
    parts = [jax.tree.map(lambda x, i=i: x[i::accumulate], batch) for i in range(accumulate)]
    assert len({int(part.loss_mask.sum()) for part in parts}) > 1
    plain = [whole(state, part, key=key)[1]["loss"] for part in parts]
    assert abs(sum(plain) / accumulate - right_metrics["loss"]) > 1e-4


def test_microbatches_have_their_own_noise():
    state, batch = _start(experiment())
    twice = jax.tree.map(lambda x: np.repeat(x[:4], 2, axis=0), batch)  # rows 2i and 2i + 1 are equal
    still = frozen_mask(state.params, ())
    losses = [gradients(experiment().method, state, twice, jax.random.key(0), still, n)[1]["loss"] for n in (1, 2)]
    assert losses[0] != losses[1]


def test_a_step_is_adamw_on_the_mean_loss():
    config = experiment(noise=0.0)
    state, batch = _start(config)
    new, metrics = jax.jit(make_step(config, STEPS))(state, batch)

    def loss(params):
        return config.method.loss(params, batch, state.key, {"step": 0, "ema": None}, train=True)[0]

    value, grads = jax.value_and_grad(loss)(state.params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 / 3, rtol=1e-6)
    assert metrics["finite"] == 1
    assert new.step == 1
    rate = float(metrics["learning_rate"])
    for old, g, found in zip(*map(jax.tree.leaves, (state.params, grads, new.params)), strict=True):
        g = np.asarray(g) * min(1.0, 1.0 / norm)
        # The first step of Adam moves by sign(g), up to eps.
        right = np.asarray(old) - rate * (g / (np.abs(g) + 1e-8) + 0.01 * np.asarray(old))
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


def test_the_noise_of_a_step_depends_on_the_step_alone():
    config = experiment()
    state, batch = _start(config)
    step = jax.jit(make_step(config, STEPS))
    first, again = step(state, batch)[1]["loss"], step(state, batch)[1]["loss"]
    later = step(state.replace(step=state.step + 1), batch)[1]["loss"]
    assert first == again
    assert first != later


def test_frozen_parameters_do_not_move_and_the_others_do():
    config = experiment()
    state, batch = _start(config)
    new, _ = jax.jit(make_step(config, STEPS, ("backbone/embed/tokens$",)))(state, batch)
    for path, old, found in zip(
        parameter_paths(state.params), jax.tree.leaves(state.params), jax.tree.leaves(new.params), strict=True
    ):
        still = path == "backbone/embed/tokens"
        assert bool((old == found).all()) == (still or not bool(old.any())), path


@pytest.mark.parametrize(("pattern", "message"), [("nothing", "matches none of"), ("(", "is not a regular expression")])
def test_frozen_patterns_are_checked(pattern, message):
    state, _ = _start(experiment())
    with pytest.raises(ValueError, match=message):
        frozen_mask(state.params, (pattern,))


def test_ema_by_its_definition():
    config = experiment(ema=0.75)
    state, batch = _start(config)
    step, average = jax.jit(make_step(config, STEPS)), state.params
    chex.assert_trees_all_equal(state.ema, state.params)
    for _ in range(3):
        state, _ = step(state, batch)
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, state.params)
    _assert_close(state.ema, average, 1e-6)
    assert state.eval_params is state.ema


def test_a_reset_forgets_the_moments_and_keeps_the_learning_rate():
    config = experiment(optimizer=Optimizer(learning_rate=1e-2, warmup_steps=6), schedule=(Stage(0, steps=STEPS),))
    state, batch = _start(config)
    step = jax.jit(make_step(config, STEPS))
    for _ in range(3):
        state, _ = step(state, batch)
    optimizer = config.optimizer.build(STEPS)
    reset = reset_optimizer(state, optimizer)
    fresh = train_state.create(state.params, optimizer, seed=0, ema=False).opt_state
    assert all(not leaf.any() for leaf in jax.tree.leaves(fresh))
    moved = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (reset.opt_state, fresh)), strict=True)]
    assert sum(moved) == 1  # the schedule's count alone
    chex.assert_trees_all_equal(reset.params, state.params)
    _, metrics = step(reset, batch)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 * 4 / 7, rtol=1e-6)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_guard_sees_a_loss_or_a_gradient_that_is_not_finite(what):
    config = experiment(poison_step=0) if what == "loss" else experiment()
    state, batch = _start(config)
    if what == "gradient":
        spoilt = jax.tree.map(lambda x: x, state.params)
        spoilt["method"]["out"] = spoilt["method"]["out"].at[0, 0].set(jnp.inf)
        state = state.replace(params=spoilt)
    assert jax.jit(make_step(config, STEPS))(state, batch)[1]["finite"] == 0


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_sharded_step_is_the_step_of_one_device(data, fsdp, tensor):
    config = experiment(noise=0.0, accumulate=1 if data * fsdp == 8 else 2)
    state, batch = _start(config)
    right, right_metrics = jax.jit(make_step(config, STEPS))(state, batch)
    mesh = make_mesh(data, fsdp, tensor)
    where = param_shardings(mesh, state)
    step = jax.jit(make_step(config, STEPS), in_shardings=(where, batch_sharding(mesh)), out_shardings=(where, None))
    found, metrics = step(jax.device_put(state, where), jax.device_put(batch, batch_sharding(mesh)))
    _assert_close(metrics, right_metrics, 1e-4)
    _assert_close(found.params, right.params, 1e-4)
