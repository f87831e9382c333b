"""The whole training program as plain data parallelism."""

import json

import chex
import jax
import numpy as np
import pytest

from latentjax.methods.base import Stage
from tests.close import assert_close
from tests.train.small import experiment
from train.config import Mesh
from train.log import read_metrics
from train.loop import train
from train.parallel import Parallel
from train.prepare import prepare
from train.step import make_step

SCHEDULE = (Stage(0, steps=3), Stage(1, steps=5, reset_optimizer=True, frozen=("^backbone/embed/positions$",)))


def _experiment(**changes):
    settings = dict(
        schedule=SCHEDULE, mesh=Mesh(data=4), parallel="pmap", ema=0.9, noise=0.0, validate_generation=False
    )
    return experiment(**settings | changes)


def _numbers(run):
    """All metrics but times, as [records, values]."""
    return [
        {name: value for name, value in record.items() if isinstance(value, int | float)}
        for record in read_metrics(run)
    ]


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("train.config.PACKAGES", ("latentjax.", "train.", "tests."))
    yield train(_experiment(), tmp_path_factory.mktemp("pmap"), quiet=True)
    patch.undo()


def test_training_and_validation_are_those_of_one_device(mapped, tmp_path):
    single = train(_experiment(parallel="jit", mesh=Mesh(data=1)), tmp_path, quiet=True)
    assert mapped.finished
    assert mapped.compiles == single.compiles == 2
    assert_close(_numbers(mapped.run), _numbers(single.run), 1e-4)
    assert_close(jax.device_get(mapped.params), jax.device_get(single.params), 1e-4)


@pytest.mark.slow
def test_accumulated_microbatches_too(mapped, tmp_path):
    halves = train(_experiment(accumulate=2), tmp_path, quiet=True)
    assert_close(_numbers(halves.run), _numbers(mapped.run), 1e-4)


def test_a_run_in_pieces_is_the_unbroken_run(mapped, tmp_path):
    train(_experiment(), tmp_path, quiet=True, stop_after_steps=5)
    pieces = train(_experiment(), tmp_path, quiet=True)
    chex.assert_trees_all_equal(pieces.params, mapped.params)
    assert _numbers(tmp_path) == _numbers(mapped.run)


def test_each_device_draws_its_own_noise():
    config = _experiment(noise=0.5, mesh=Mesh(data=2))
    prepared = prepare(config)
    state, batch = prepared.first_state(), prepared.training.batch(0)
    twice = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), batch)  # both devices see the same rows
    total = prepared.plan.total_steps
    step, _ = prepared.parallel.compile(
        lambda axis: make_step(config, total, axis=axis), state, prepared.shardings, twice, updates=True
    )  # fmt: skip
    both = float(step(state, prepared.parallel.place(twice))[1]["loss"])
    one = Parallel("pmap", prepare(_experiment(mesh=Mesh(data=1))).parallel.mesh, 4)
    half = jax.tree.map(lambda x: x[:4], batch)
    alone = prepare(_experiment(noise=0.5, mesh=Mesh(data=1)))
    start = alone.first_state()
    step, _ = one.compile(
        lambda axis: make_step(config, total, axis=axis), start, alone.shardings, half, updates=True
    )  # fmt: skip
    first = float(step(start, one.place(half))[1]["loss"])
    assert abs(both - first) > 1e-4  # with the same noise on both devices they would be equal


def test_the_old_state_is_given_up():
    prepared = prepare(_experiment(ema=None))
    state, batch = prepared.first_state(), prepared.training.batch(0)
    step, _ = prepared.parallel.compile(
        lambda axis: make_step(prepared.experiment, 8, axis=axis), state, prepared.shardings, batch, updates=True
    )  # fmt: skip
    new, _ = step(state, prepared.parallel.place(batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(new.params))


@pytest.mark.parametrize("mesh", [Mesh(data=1, fsdp=2), Mesh(data=1, tensor=2)])
def test_it_is_data_parallelism_only(mesh):
    with pytest.raises(ValueError, match="parallel='pmap': is data parallelism only"):
        _experiment(mesh=mesh)


def test_the_choice_belongs_to_the_run(mapped, tmp_path):
    saved = json.loads((mapped.run / "config.json").read_text())
    assert saved["parallel"] == "pmap"
    with pytest.raises(ValueError, match="parallel: 'pmap' -> 'jit'"):
        train(_experiment(parallel="jit"), mapped.run, quiet=True)
