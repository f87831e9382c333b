"""The training loop: steps, logs, validation, checkpoints, and how a run ends and continues."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from latentjax.checkpoint import Checkpoints, fingerprint
from latentjax.methods.base import Batch
from latentjax.tokenizers import Tokenizer
from train import state as train_state
from train.config import Experiment, load_config
from train.disk import hold, writing
from train.distributed import Agreement, together
from train.flops import matmul_flops
from train.input import positions_used
from train.log import Metrics, Speed, Terminal, read_metrics, summary
from train.parallel import batch_form
from train.prepare import Prepared, describe, prepare
from train.run import CONFIG, check_deterministic, check_run, open_run
from train.state import TrainState
from train.step import make_step
from train.validate import Validator

# Steps that may be queued on the devices. Simulated CPU devices deadlock when many programs with collectives wait.
_IN_FLIGHT = 2
_LATE = 1000  # what a process wishes that is past its deadline, larger than any signal's number
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal ended the run after a checkpoint at `step`."""

    def __init__(self, run: pathlib.Path, step: int, name: str):
        super().__init__(f"{name}: stopped at step {step}, saved; continue with: python -m train --resume {run}")
        self.run, self.step = run, step


class NonFinite(Exception):
    """Loss or gradients of `step` were NaN or infinite. The batch is in `batch_file`."""

    def __init__(self, run: pathlib.Path, step: int, batch_file: pathlib.Path, last_good: int | None):
        kept = f"the last good checkpoint is that of step {last_good}" if last_good is not None else "no checkpoint yet"
        super().__init__(f"loss or gradients of step {step} are not finite; its batch is in {batch_file}; {kept}")
        self.run, self.step, self.batch_file = run, step, batch_file


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run has become: `params` are those of step `step` (the moving average where one is kept)."""

    run: pathlib.Path
    experiment: Experiment
    tokenizer: Tokenizer
    params: Any
    step: int
    finished: bool  # all stages are done; else the run was asked to stop earlier
    records: list[dict[str, Any]]  # metrics.jsonl of the whole run
    compiles: int  # programs compiled for training steps by this call
    compile_seconds: float
    seconds: float  # of this call


def train(
    experiment: Experiment | Prepared,
    run: str | os.PathLike,
    *,
    checkpoints: str | None = None,
    quiet: bool = False,
    progress: bool = True,
    stop_after_steps: int | None = None,
    stop_after_minutes: float | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Result:
    """Train `experiment` in the run directory `run`; a run that exists is continued, one that is finished is read.

    Args:
        experiment: or what `prepare` made of it.
        run: the run directory, made if absent.
        checkpoints: where in a bucket a new run keeps its checkpoints, gs://BUCKET/FOLDER; None: in its directory.
        quiet: print nothing.
        progress: show a progress bar if there is a terminal.
        stop_after_steps: stop and save after that many steps of this call.
        stop_after_minutes: stop and save after the step at which that much time of this call has passed.
        on_step: called after each step with the number of steps done.

    Raises:
        ValueError, OSError, LookupError: bad input, before anything is compiled or written. Of these, RunUnavailable: the
            run directory cannot be written or another program trains the run; OtherArrays: a checkpoint of another
            architecture; DamagedCheckpoint: all checkpoints are damaged.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint was saved.
        NonFinite: the loss or a gradient was NaN or infinite.
        NotSaved: a checkpoint or a log could not be written, for example because the disk is full.
    """
    started = time.perf_counter()
    if not isinstance(experiment, Prepared):
        check_run(pathlib.Path(run), experiment, checkpoints)
        experiment = prepare(experiment, pathlib.Path(run))
    prepared, run = experiment, pathlib.Path(run)
    check_run(run, prepared.experiment, checkpoints)
    check_deterministic(prepared.experiment)
    prepared.check_weights()
    terminal = Terminal(quiet=quiet or jax.process_index() > 0, progress=progress)
    notes: dict[str, Any] = {"mesh": dataclasses.asdict(prepared.experiment.mesh)}
    if prepared.inherited is not None:
        starts = prepared.experiment.starts
        notes["init_from"] = {"run": starts.get(None, starts), "checksum": fingerprint(prepared.inherited)}
    with contextlib.ExitStack() as stack:
        together()  # before the first process makes the run directory
        stack.enter_context(hold(run))
        stack.enter_context(writing(run))
        if jax.process_index() == 0:
            check_run(run, prepared.experiment, checkpoints)  # again: another program may have made it meanwhile
            open_run(run, prepared.experiment, prepared.tokenizer, checkpoints, **notes)
        together()
        keep = prepared.experiment.keep
        saved = stack.enter_context(Checkpoints(run, keep=keep, report=terminal.line))
        loop = _Loop(prepared, run, saved, terminal, on_step)
        deadline = None if stop_after_minutes is None else started + 60 * stop_after_minutes
        with contextlib.closing(loop):
            loop.run_until(loop.done + stop_after_steps if stop_after_steps is not None else None, deadline)
    return Result(
        run=run,
        experiment=prepared.experiment,
        tokenizer=prepared.tokenizer,
        params=loop.state.eval_params,
        step=loop.done,
        finished=loop.done == prepared.plan.total_steps,
        records=read_metrics(run),
        compiles=len(loop.programs),
        compile_seconds=loop.compile_seconds,
        seconds=time.perf_counter() - started,
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled step and the floating-point operations that one call of it takes (see train/flops.py)."""

    call: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    flops: int


class _Loop:
    """The state of a running training loop."""

    def __init__(
        self,
        prepared: Prepared,
        run: pathlib.Path,
        checkpoints: Checkpoints,
        terminal: Terminal,
        on_step: Callable[[int], None] | None,
    ):
        self._prepared, self._run, self._checkpoints, self._terminal = prepared, run, checkpoints, terminal
        self._experiment, self._plan, self._on_step = prepared.experiment, prepared.plan, on_step
        self.programs: dict[Any, _Program] = {}
        self.compile_seconds = 0.0
        self._pending: collections.deque = collections.deque()
        self._speed = Speed()
        self._batches = prepared.training.iterator()
        self.state: TrainState
        self.state, self.done = self._restore()
        self._metrics = Metrics(run, self.done, write=jax.process_index() == 0)
        if self._metrics.forgotten:
            terminal.line(f"{self._metrics.forgotten} records of steps after {self.done} go: they will be made again")
        if self.done == 0 and prepared.published is not None:
            start = {"pretrained": prepared.published.path, "checksum": fingerprint(self.state.params)}
            self._metrics.write("event", 0, {"event": "start"} | start)
        optimizer = self._experiment.optimizer.build(self._plan.total_steps)
        self._reset = jax.jit(
            lambda state: train_state.reset_optimizer(state, optimizer, self._experiment.untrained),
            out_shardings=prepared.shardings,
            donate_argnums=0,
        )
        self._validate = Validator(
            self._experiment, prepared.tokenizer, prepared.valid, prepared.parallel, prepared.shardings
        )
        self._agree = Agreement(delay=_IN_FLIGHT)

    def close(self) -> None:
        self._batches.close()
        self._metrics.close()

    # Saving and restoring

    def _restore(self) -> tuple[TrainState, int]:
        """The latest whole checkpoint, or a new state."""
        like = _items(
            jax.tree.map(
                lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                self._prepared.shapes.replace(key=jax.eval_shape(jax.random.key_data, self._prepared.shapes.key)),
                self._prepared.shardings,
            )
        )
        restored = self._checkpoints.load_latest(like)
        if restored is None:
            for line in describe(self._prepared):
                self._terminal.line(line)
            return self._prepared.first_state(), 0
        self._batches.set_state(dict(restored.record["iterator"]))
        self._terminal.line(f"continuing {self._run} at step {restored.step} of {self._plan.total_steps}")
        if (mesh := load_config(self._run / CONFIG).mesh) != self._experiment.mesh:
            self._terminal.line(
                f"the run began on another mesh ({mesh}): figures now agree to rounding, not bit for bit"
            )
        rest = dict(restored.items["rest"])
        key = jax.random.wrap_key_data(rest.pop("key"))
        params, ema = restored.items["params"], restored.items.get("ema")
        return TrainState(params=params, ema=ema, key=key, **rest), restored.step

    def _save(self, accuracy: float | None = None) -> None:
        record = {
            "iterator": self._batches.get_state(),
            "stage": self._plan.span(max(self.done - 1, 0)).stage.index,
            "epoch": self._plan.epoch(max(self.done - 1, 0)),
        }
        state = self.state.replace(key=jax.random.key_data(self.state.key))
        self._checkpoints.save(self.done, _items(state), record, accuracy=accuracy)

    # Steps

    def run_until(self, stop: int | None, deadline: float | None) -> None:
        """Train to the end, to step `stop`, past the time `deadline`, or until a signal comes; on several processes, until
        any of them has had one, and all stop at the same step."""
        with _signals() as received, self._terminal.bar(self._plan.total_steps, self.done):
            self._speed.start()
            while self.done < self._plan.total_steps:
                self._step()
                late = deadline is not None and time.perf_counter() >= deadline
                wish = self._agree(received[0] if received else _LATE if late else 0)
                if wish or self.done == stop:
                    self._drain(0)
                    self._save()
                    self._checkpoints.wait()
                    if wish not in (0, _LATE):
                        raise Interrupted(self._run, self.done, signal.Signals(wish).name)
                    break
        verb = "finished" if self.done == self._plan.total_steps else "stopped"
        self._terminal.line(f"{verb} at step {self.done} of {self._plan.total_steps}: {self._run}")

    def _step(self) -> None:
        if self._plan.resets_optimizer(self.done):
            self.state = self._reset(self.state)
        batch = next(self._batches)
        program = self._program(batch)
        self.state, metrics = program.call(self.state, self._prepared.parallel.place(batch))
        self.done += 1
        self._pending.append((self.done, metrics, batch, program.flops))
        self._drain(_IN_FLIGHT)
        if self._on_step is not None:
            self._on_step(self.done)
        self._validate_and_save()

    def _program(self, batch: Batch) -> _Program:
        """The compiled step for the shapes of `batch` and the frozen parameters of the stage."""
        frozen = self._plan.span(self.done).stage.frozen
        form = (frozen, batch_form(batch))
        if form not in self.programs:
            self._drain(0)
            start = time.perf_counter()
            call, jaxpr = self._prepared.parallel.compile(
                lambda axis: make_step(self._experiment, self._plan.total_steps, frozen, axis=axis),
                self.state,
                self._prepared.shardings,
                batch,
                updates=True,
            )
            self.programs[form] = _Program(call, matmul_flops(jaxpr))
            self.compile_seconds += time.perf_counter() - start
            self._speed.start()
        return self.programs[form]

    def _drain(self, keep: int) -> None:
        """Wait for all steps but the last `keep` and log them. Raises NonFinite."""
        while len(self._pending) > keep:
            step, metrics, batch, flops = self._pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not values.pop("finite"):
                raise NonFinite(self._run, step, self._keep_batch(step, batch), self._last_good())
            self._speed.count(positions_used(batch) * jax.process_count())
            stage = self._plan.span(step - 1).stage.index
            if step % self._experiment.log_every == 0 or step == self._plan.total_steps:
                timing = self._speed.read(self._experiment.batch_size, flops)
                place = {"epoch": self._plan.epoch(step - 1), "stage": stage}
                self._metrics.write("train", step, place | values, timing)
                self._terminal.update(step, summary(values, timing, stage))
            else:
                self._terminal.update(step)

    def _validate_and_save(self) -> None:
        """Validation and checkpoint, each if due at this step."""
        experiment, plan, end = self._experiment, self._plan, self.done == self._plan.total_steps
        every = experiment.validate_every * (plan.steps_per_epoch if experiment.validate_unit == "epochs" else 1)
        validates = end or self.done % every == 0
        if not validates and self.done % experiment.checkpoint_every_steps:
            return
        self._drain(0)  # so that no checkpoint follows a step that was not finite
        accuracy = None
        if validates:
            start, stage = time.perf_counter(), plan.span(self.done - 1).stage
            values = self._validate(self.state, stage)
            place = {"epoch": plan.epoch(self.done - 1), "stage": stage.index}
            self._metrics.write("valid", self.done, place | values, {"seconds": time.perf_counter() - start})
            self._terminal.line(_validation_line(self.done, stage.index, values))
            if plan.is_last_stage(self.done - 1):
                accuracy = values.get("accuracy")
        self._save(accuracy)
        self._speed.start()

    def _keep_batch(self, step: int, batch: Batch) -> pathlib.Path:
        file = self._run / f"nonfinite-step-{step}.npz"
        paths = jax.tree_util.tree_flatten_with_path(batch)[0]
        arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}
        if jax.process_index() == 0:
            np.savez(file, allow_pickle=False, step=np.int64(step), **arrays)
        self._metrics.write("event", step, {"event": "nonfinite", "batch": file.name})
        return file

    def _last_good(self) -> int | None:
        self._checkpoints.wait()
        return max(self._checkpoints.steps(), default=None)


def _items(state: TrainState) -> dict[str, Any]:
    """A state as the named parts of a checkpoint, so that parameters can be read alone."""
    items = {"params": state.params, "rest": {"opt_state": state.opt_state, "step": state.step, "key": state.key}}
    return items if state.ema is None else items | {"ema": state.ema}


def _validation_line(step: int, stage: int, values: dict[str, float]) -> str:
    text = f"step {step} (stage {stage}): validation loss {values['loss']:.4f}"
    text += f", token accuracy {values['token_accuracy']:.3f}"
    if "accuracy" in values:
        text += (
            f", accuracy {values['accuracy']:.3f} [{values['low']:.3f}, {values['high']:.3f}] of {values['n']}"
            f", {values['unparsable']} unparsable"
        )
    return text


@contextlib.contextmanager
def _signals() -> Generator[list[int], None, None]:
    """Collects signals that ask the program to end; a second one acts as usual. Outside the main thread none come."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, _: Any) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, receive) for each in _SIGNALS}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
