import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train.config
from tests.train.small import experiment
from train.config import Experiment, Mesh, Optimizer, differences, load_config, save_config, to_json


def test_a_config_survives_the_round_trip(tmp_path):
    original = experiment(ema=0.9, seed=3)
    save_config(tmp_path / "config.json", original)
    assert load_config(tmp_path / "config.json") == original
    assert hash(load_config(tmp_path / "config.json").method) == hash(original.method)


def test_differences_name_field_and_both_values():
    old, new = experiment(), experiment(seed=1, noise=0.5, optimizer=Optimizer(b2=0.98))
    lines = differences(to_json(old), to_json(new))
    assert "method.noise: 0.1 -> 0.5" in lines
    assert "seed: 0 -> 1" in lines
    assert "optimizer.b2: 0.999 -> 0.98" in lines
    assert differences(to_json(old), to_json(experiment())) == []


def _edited(tmp_path, edit):
    content = to_json(experiment())
    edit(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update({"class": "subprocess.Popen"}), "only classes of latentjax"),
        (lambda c: c["task"].update({"class": "latentjax.tasks.nothing.Here"}), "config.task.class=.*no such class"),
        (lambda c: c["task"].update({"class": "train.config.load_config"}), "is not a dataclass"),
        (lambda c: c.update({"colour": 1}), "unknown: colour"),
        (lambda c: c["optimizer"].pop("b1"), "config.optimizer.*missing: b1"),
        (lambda c: c.update({"batch_size": -1}), "batch_size=-1"),
    ],
)
def test_a_wrong_config_file_is_rejected(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load_config(_edited(tmp_path, edit))


def test_malformed_json_names_the_line(tmp_path):
    (tmp_path / "config.json").write_text('{\n"name": \n}')
    with pytest.raises(ValueError, match=r"config\.json:3"):
        load_config(tmp_path / "config.json")


def test_a_class_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(train.config, "PACKAGES", ("latentjax.", "train."))
    with pytest.raises(TypeError, match=r"config\.method: tests\.train\.small\.Bigram"):
        save_config(tmp_path / "config.json", experiment())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name='a/b'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accumulate": 3}, "accumulate=3.*batch_size=8"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"valid_split": "test"}, "valid_split='test'"),
        ({"train_examples": 0}, "train_examples=0"),
        ({"train_examples": None, "fresh_data": True}, "train_examples=None"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_experiments_name_field_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(**changes)


@pytest.mark.parametrize("field", ["learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm", "warmup_steps"])
def test_impossible_optimisers_name_the_field(field):
    with pytest.raises(ValueError, match=f"optimizer.{field}=-1"):
        Optimizer(**{field: -1 if field == "warmup_steps" else -1.0})


def test_impossible_meshes_name_the_axis():
    with pytest.raises(ValueError, match=r"mesh\.fsdp=-1"):
        Mesh(fsdp=-1)


def test_the_optimiser_is_clipped_adamw_by_its_definition():
    settings = Optimizer(learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.2, clip_norm=0.5)
    optimizer, rng = settings.build(10), np.random.default_rng(0)
    params = rng.normal(size=5)
    state, ours = optimizer.init(jnp.asarray(params)), jnp.asarray(params)
    m = v = np.zeros(5)
    for t in range(1, 6):
        g = rng.normal(size=5)
        updates, state = optimizer.update(jnp.asarray(g), state, ours)
        ours = optax.apply_updates(ours, updates)
        g = g * min(1.0, 0.5 / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        params = params - 0.1 * ((m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3) + 0.2 * params)
    np.testing.assert_allclose(ours, params, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("linear", 0.1 + 0.9 / 2), ("cosine", 0.1 + 0.9 / 2)]
)
def test_schedules(schedule, middle):
    rate = Optimizer(learning_rate=1.0, warmup_steps=4, schedule=schedule, end_fraction=0.1).learning_rate_schedule(24)
    np.testing.assert_allclose([rate(s) for s in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate(14), middle, rtol=1e-6)
    np.testing.assert_allclose(rate(24), 1.0 if schedule == "constant" else 0.1, rtol=1e-6)


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps=10.*smaller"):
        Optimizer(warmup_steps=10).build(10)


def test_a_warm_up_may_be_a_fraction_of_the_run():
    fraction, steps = Optimizer(warmup_fraction=0.25, schedule="cosine"), Optimizer(warmup_steps=4, schedule="cosine")
    rates = [[float(o.learning_rate_schedule(16)(step)) for step in range(17)] for o in (fraction, steps)]
    assert rates[0] == rates[1]
    with pytest.raises(ValueError, match=r"optimizer\.warmup_fraction=0.1.*warmup_steps=3"):
        Optimizer(warmup_fraction=0.1, warmup_steps=3)


def test_experiments_are_hashable_values():
    assert hash(experiment()) == hash(experiment())
    assert dataclasses.replace(experiment(), seed=1) != experiment()
    assert isinstance(experiment(), Experiment)
    assert jax.tree.leaves(experiment()) == [experiment()]
