"""Several processes on this machine, with simulated CPU devices and gloo, against one process."""

import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from latentjax.checkpoint import available_steps
from latentjax.tokenizers import Codec
from tests.close import assert_close
from tests.train.published import write_model
from tests.train.small import experiment
from tests.train.test_pretrained import FAMILIES
from train import distributed
from train.cli import BAD_INPUT, INTERRUPTED, load_config_file
from train.input import encode_rows
from train.log import read_metrics
from train.loop import train
from train.prepare import prepare
from train.run import check_run

# Random stages, so that a process that drew other numbers than one process alone would be noticed. 40 rows are three parts.
CONFIG = """
from latentjax.backbone.config import tiny
from latentjax.methods.base import Lengths
from latentjax.methods.coconut import Coconut
from latentjax.tasks.successor_list import SuccessorList
from train.config import Experiment, Mesh, Optimizer

config = Experiment(
    name="sample",
    task=SuccessorList(hops=2),
    method=Coconut(
        tiny(14, width=16, layers=1, heads=2, max_positions=32), Lengths(12, 5),
        max_latent_stage=2, stage_steps=(3, 0, 5), markers="start", reset_optimizer="stage", uniform_prob=0.3,
    ),
    optimizer=Optimizer(learning_rate=1e-2),
    mesh=Mesh(data=4),
    batch_size=40, train_examples=160, valid_examples=18, ema=0.9,
    validate_every=4, validate_unit="steps", validate_generation=False, log_every=1, checkpoint_every_steps=4,
)
"""
PUBLISHED = """
import dataclasses
import pathlib

from tests.train.test_pretrained import experiment
from train.config import Mesh

config = dataclasses.replace(experiment(pathlib.Path({folder!r}), "Coconut", "gpt2"), mesh=Mesh(data=2, fsdp=2))
"""
BATCH, PATIENCE = 40, 500  # seconds: the machine may be busy


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "sample.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """The run of one process."""
    return train(load_config_file(str(config)), tmp_path_factory.mktemp("one"), quiet=True)


def _port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start(config, *words, flags=(), devices=2):
    """One process for each of `flags`, of `devices` devices."""
    environment = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}", JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "train", str(config), *words]
    return [
        subprocess.Popen(
            [*command, *own], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for own in flags
    ]  # fmt: skip


def _pair(config, run, *words, heartbeat=60, devices=2):
    """Two processes that train one run."""
    together = ["--coordinator", f"localhost:{_port()}", "--processes", "2", "--heartbeat-timeout", str(heartbeat)]
    flags = [[*together, "--process-id", str(number)] for number in range(2)]
    return _start(config, "--run", str(run), *words, flags=flags, devices=devices)


def _end(processes):
    """Exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def _numbers(run):
    records = [r for r in read_metrics(run) if r["kind"] != "event"]
    return [{k: v for k, v in record.items() if isinstance(v, int | float)} for record in records]


def _wait_for_step(run, step, processes):
    deadline = time.monotonic() + PATIENCE
    while not any(record["step"] >= step for record in read_metrics(run, "train")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), _end(processes)
        time.sleep(0.1)


def test_a_run_of_two_processes_goes_on_in_one(config, unbroken, tmp_path):
    codes, outputs = _end(_pair(config, tmp_path, "--stop-after-steps", "4"))
    assert codes == [0, 0], outputs
    assert available_steps(tmp_path) == [4]
    assert "finished" not in outputs[0] and "stopped at step 4" in outputs[0]
    assert "stopped" not in outputs[1]  # the first process alone speaks and writes
    result = train(unbroken.experiment, tmp_path, quiet=True)
    assert_close(_numbers(tmp_path), _numbers(unbroken.run), 1e-4)
    assert_close(jax.device_get(result.params), jax.device_get(unbroken.params), 1e-4)


def test_a_run_of_one_process_goes_on_in_two(config, unbroken, tmp_path):
    train(unbroken.experiment, tmp_path, quiet=True, stop_after_steps=4)
    codes, outputs = _end(_pair(config, tmp_path))
    assert codes == [0, 0], outputs
    assert f"continuing {tmp_path} at step 4 of 8" in outputs[0]
    assert_close(_numbers(tmp_path), _numbers(unbroken.run), 1e-4)
    result = train(unbroken.experiment, tmp_path, quiet=True)  # is finished: only reads the checkpoint of two
    assert result.finished
    assert_close(jax.device_get(result.params), jax.device_get(unbroken.params), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--mesh.data", "8"),
        ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
        ("--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "8", "--method.backbone.heads", "8",
         "--method.backbone.vocab-size", "16"),
        ("--mesh.data", "8", "--parallel", "pmap"),
        ("--mesh.data", "2", "--mesh.fsdp", "4", "--accumulate", "5"),
    ],
    ids=["data", "all axes", "tensor over both", "pmap", "accumulate"],
)  # fmt: skip
def test_the_loss_curve_of_two_processes_is_that_of_one(config, tmp_path, words):
    """Eight devices, generation in validation included, and every process makes its own rows only."""
    words = (*words, "--validate-generation")
    codes, outputs = _end(_start(config, "--run", str(tmp_path / "one"), *words, flags=[[]], devices=8))
    assert codes == [0], outputs
    codes, outputs = _end(_pair(config, tmp_path / "two", *words, devices=4))
    assert codes == [0, 0], outputs
    assert len(_numbers(tmp_path / "one")) == 10
    assert_close(_numbers(tmp_path / "two"), _numbers(tmp_path / "one"), 1e-4)


@pytest.mark.slow
def test_two_processes_start_from_another_run(config, unbroken, tmp_path):
    changes = {"init_from": str(unbroken.run), "seed": 1}
    one = train(dataclasses.replace(unbroken.experiment, **changes), tmp_path / "one", quiet=True)
    codes, outputs = _end(_pair(config, tmp_path / "two", "--init-from", str(unbroken.run), "--seed", "1"))
    assert codes == [0, 0], outputs
    assert_close(_numbers(tmp_path / "two"), _numbers(one.run), 1e-4)


@pytest.mark.slow
def test_two_processes_start_from_published_weights(tmp_path):
    write_model(tmp_path / "gpt2", FAMILIES["gpt2"])
    path = tmp_path / "sample.py"
    path.write_text(PUBLISHED.format(folder=str(tmp_path)))
    one = train(load_config_file(str(path)), tmp_path / "one", quiet=True)
    codes, outputs = _end(_pair(path, tmp_path / "two"))
    assert codes == [0, 0], outputs
    assert_close(_numbers(tmp_path / "two"), _numbers(one.run), 1e-4)


def test_a_signal_to_one_process_stops_all_at_one_step(config, tmp_path):
    endless = ("--method.stage-steps", "0", "0", "100000", "--validate-every", "100000")
    processes = _pair(config, tmp_path, *endless)
    _wait_for_step(tmp_path, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = _end(processes)
    assert codes == [INTERRUPTED, INTERRUPTED], outputs
    steps = [re.search(r"SIGTERM: stopped at step (\d+), saved", output)[1] for output in outputs]
    assert steps[0] == steps[1]
    assert available_steps(tmp_path)[-1] == int(steps[0])


def test_a_process_that_dies_ends_the_other_one(config, tmp_path):
    endless = ("--method.stage-steps", "0", "0", "100000", "--validate-every", "100000")
    processes = _pair(config, tmp_path, *endless, heartbeat=10)
    _wait_for_step(tmp_path, 5, processes)
    processes[1].kill()
    codes, outputs = _end(processes)  # fails if the other one hangs
    assert codes[0] != 0
    assert "another" in outputs[0]
    assert available_steps(tmp_path)


def test_an_unreachable_coordinator_is_named(config, tmp_path):
    port = _port()
    flags = [["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", "1", "--join-timeout", "2"]]
    codes, outputs = _end(_start(config, "--run", str(tmp_path / "run"), flags=flags))
    assert codes == [BAD_INPUT]
    assert re.search(rf"--coordinator localhost:{port}: after 2 seconds it cannot be reached", outputs[0]), outputs
    assert not (tmp_path / "run").exists()


def test_a_process_that_waits_alone_says_for_whom(config, tmp_path):
    flags = [["--coordinator", f"localhost:{_port()}", "--processes", "2", "--process-id", "0", "--join-timeout", "2"]]
    codes, outputs = _end(_start(config, "--run", str(tmp_path / "run"), flags=flags))
    assert codes == [BAD_INPUT]
    assert "after 2 seconds not all 2 processes came" in outputs[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("coordinator", "processes", "process_id", "message"),
    [
        (None, 2, None, "also give --coordinator"),
        (None, None, 0, "also give --coordinator"),
        ("localhost", 2, 0, "must be HOST:PORT or auto"),
        ("localhost:high", 2, 0, "must be HOST:PORT or auto"),
        ("localhost:1", None, 0, "also give --processes"),
        ("localhost:1", 2, None, "also give --processes N and --process-id"),
        ("localhost:1", 0, 0, "--processes 0: must be at least 1"),
        ("localhost:1", 2, 2, r"--process-id 2: must lie in 0 \.\.\. 1"),
        ("localhost:1", 2, -1, r"--process-id -1: must lie in 0 \.\.\. 1"),
    ],
)
def test_flags_that_do_not_fit_together(coordinator, processes, process_id, message):
    with pytest.raises(ValueError, match=message):
        distributed.join(coordinator, processes, process_id, wait=5, heartbeat=5, failed=BAD_INPUT)


@pytest.mark.parametrize(
    ("launcher", "tasks", "joins"),
    [
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
        ("OMPI_COMM_WORLD_SIZE", "4", True),
        ("NONE", "2", False),
    ],
)
def test_a_launcher_of_several_tasks_is_noticed(monkeypatch, launcher, tasks, joins):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv(launcher, tasks)
    distributed.join(None, None, None, wait=5, heartbeat=5, failed=BAD_INPUT)
    assert calls == ([(None, None, None)] if joins else [])


def test_a_run_of_another_size_is_an_error(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(ValueError, match="--processes 3: the coordinator at localhost:1 has a run of 1"):
        distributed.join("localhost:1", 3, 0, wait=5, heartbeat=5, failed=BAD_INPUT)


@pytest.mark.parametrize("rows", [range(20), range(20, 40), [0, 17, 18, 39], range(32, 40)])
def test_a_part_of_the_rows_is_that_part_of_the_batch(config, rows):
    sample, rows = load_config_file(str(config)), np.array(rows)
    training = prepare(sample).training
    codec = Codec(sample.task.tokenizer(sample.method.special_tokens()), sample.task.format)
    augmented = []

    def augment(example, rng):
        augmented.append(example)
        return sample.task.augment(example, rng)

    stage, stream = 2, (sample.seed, 1, 4)
    part = encode_rows(sample.method, codec, stage, training.examples(4), stream, rows, augment)
    for found, right in zip(jax.tree.leaves(part), jax.tree.leaves(training.batch(4)), strict=True):
        np.testing.assert_array_equal(found, right[rows])
    # Only parts of 16 rows in which a wanted one lies are made.
    assert len(augmented) == sum(min(16, BATCH - 16 * int(number)) for number in np.unique(rows // 16))


def test_an_address_is_no_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--run gs:/bucket/run: must be a folder"):
        check_run(pathlib.Path("gs://bucket/run"), experiment())
    assert not list(tmp_path.iterdir())
