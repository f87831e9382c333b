"""The program that the fault drills kill: a short run in a process of its own, forked from one that has imported JAX.

It has all that a checkpoint must hold: a stage switch, optimiser resets, a moving average, dropout-like noise; and every
record of a step has a checksum of its batch, so that another order of the data would show.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time
from typing import Any, Literal

import grain  # noqa: F401
import jax
import jax.numpy as jnp
import optax  # noqa: F401
import tensorboardX  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401  # like the three above: imported once, before the fork

import train.config
import train.loop
from latentjax.checkpoint import FOLDER, NotSaved
from latentjax.methods.base import Batch, Stage
from tests.train.small import Bigram, experiment
from train.disk import RunUnavailable

SCHEDULE = (Stage(0, steps=5), Stage(1, epochs=3, reset_optimizer=True, reset_optimizer_every_epoch=True))
TOTAL = 14
INTERRUPTED, UNSAVED, UNAVAILABLE = 130, 4, 2  # exit codes, those of `python -m train`


@dataclasses.dataclass(frozen=True)
class Traced(Bigram):
    """Bigram that logs a checksum of the batch."""

    def loss(self, params: Any, batch: Batch, key: jax.Array, ctx: Any, *, train: bool) -> tuple[jax.Array, dict]:
        loss, metrics = super().loss(params, batch, key, ctx, train=train)
        ids = jnp.concatenate([batch.question, batch.text, batch.loss_mask.astype(jnp.int32)], axis=1)
        weights = 1 + jnp.arange(ids.size).reshape(ids.shape)
        return loss, metrics | {"batch": ((ids * weights).sum() % 2**20).astype(jnp.float32)}


def config(**changes: Any) -> train.config.Experiment:
    """The experiment of all drills."""
    small = experiment(**{"schedule": SCHEDULE, "ema": 0.9} | changes)
    fields = {field.name: getattr(small.method, field.name) for field in dataclasses.fields(small.method)}
    return dataclasses.replace(small, method=Traced(**fields))


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to the process: `kind` at step `step` ("start": at once), `delay` seconds later."""

    kind: Literal["start", "step", "save", "term", "limit", "fill", "hang"]
    # SIGKILL; the same; the same while a checkpoint is written; SIGTERM; files cannot grow beyond `size` bytes; the disk of
    # the run's parent folder is filled; the process sleeps
    step: int = 0
    delay: float = 0.0
    size: int = 0

    @classmethod
    def draw(cls, rng: random.Random) -> "Fault":
        """A random moment: one in four from the start of the program on, else after a random step."""
        kind = rng.choice(["start", "step", "step", "save"])
        return cls(kind, rng.randrange(1, TOTAL), rng.uniform(0, {"start": 2.5, "step": 0.1, "save": 0.05}[kind]))

    def strike(self, run: pathlib.Path) -> None:
        """Let it happen in this process."""
        if self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
        elif self.kind == "fill":
            _fill(run.parent / "filler")
        elif self.kind == "hang":
            time.sleep(600)
        else:
            threading.Thread(target=self._kill, args=(run / FOLDER,), daemon=True).start()

    def _kill(self, folder: pathlib.Path) -> None:
        while self.kind == "save" and not any(folder.glob("*.orbax-checkpoint-tmp*")):
            time.sleep(0.0005)
        time.sleep(self.delay)
        os.kill(os.getpid(), signal.SIGKILL)


def _fill(file: pathlib.Path) -> None:
    with file.open("wb", buffering=0) as filler:
        for size in (4096, 1):
            try:
                while filler.write(b"\0" * size):
                    pass
            except OSError:
                continue


def _life(run: pathlib.Path, fault: Fault | None) -> None:
    train.config.PACKAGES += ("tests.",)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # these programs are small and made many times

    def on_step(step: int) -> None:
        if fault is not None and fault.kind != "start" and step == fault.step:
            fault.strike(run)

    if fault is not None and fault.kind == "start":
        fault.strike(run)
    codes = {train.loop.Interrupted: INTERRUPTED, NotSaved: UNSAVED, RunUnavailable: UNAVAILABLE}
    try:
        train.loop.train(config(), run, progress=False, on_step=on_step)
    except tuple(codes) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(codes[type(error)])


def start(run: pathlib.Path, fault: Fault | None = None) -> tuple[Any, Any]:
    """A new process that trains in `run` until it is done or `fault` ends it, and the end of a pipe that it prints to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_redirected, args=(writer, run, fault), daemon=True)
    process.start()
    writer.close()
    return process, reader


def live(run: pathlib.Path, fault: Fault | None = None) -> tuple[int, str]:
    """Exit code (negative: the signal) of a process that trains in `run`, and what it printed."""
    process, reader = start(run, fault)
    with reader, open(reader.fileno(), closefd=False, errors="replace") as pipe:
        text = pipe.read()  # until the process is gone
    process.join(timeout=60)
    assert process.exitcode is not None, f"{fault}: the process hangs"
    return process.exitcode, text


def _redirected(pipe: Any, run: pathlib.Path, fault: Fault | None) -> None:
    for output in (sys.stdout, sys.stderr):
        os.dup2(pipe.fileno(), output.fileno())
    pipe.close()
    _life(run, fault)
