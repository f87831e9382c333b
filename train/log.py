"""What a run tells: metrics.jsonl, TensorBoard, and the terminal."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Generator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.run import METRICS

# Fields of a record that differ between two runs of one experiment on the same machine.
TIMING = "timing"


def read_metrics(run: pathlib.Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl, of one `kind` ("train", "valid", "event") or all, without a torn last line."""
    file = run / METRICS
    lines = file.read_text().splitlines() if file.exists() else []
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{file}:{number + 1}: is not JSON ({error.msg})") from error
    return [record for record in records if kind in (None, record["kind"])]


class Metrics:
    """Writes metrics.jsonl and TensorBoard of a run that stands at `step`."""

    def __init__(self, run: pathlib.Path, step: int, *, write: bool = True):
        """A run that was killed has records of steps after its checkpoint: they will be written again, so they go.
        `write=False`, on all processes but the first, makes every call do nothing."""
        self._file = self._board = None
        self.forgotten = 0
        if not write:
            return
        before = read_metrics(run)
        kept = [record for record in before if record["kind"] == "event" or record["step"] <= step]
        self.forgotten = len(before) - len(kept)
        partial = run / (METRICS + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.rename(run / METRICS)
        self._file = (run / METRICS).open("a")
        self._board = _Board(run / "tensorboard", step)

    def write(self, kind: str, step: int, values: Mapping[str, Any], timing: Mapping[str, float] | None = None) -> None:
        """Append one record; numbers go to TensorBoard as `kind/name` too."""
        if self._file is None or self._board is None:
            return
        record = {"kind": kind, "step": step, **values} | ({TIMING: dict(timing)} if timing else {})
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in {**values, **(timing or {})}.items():
            if isinstance(value, int | float) and kind != "event":
                self._board.add(f"{kind}/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


class _Board:
    """Scalars for TensorBoard, written by the caller: tensorboardX's own writer has a thread, which a full disk ends, and
    then waits for it for ever."""

    def __init__(self, folder: pathlib.Path, step: int):
        """TensorBoard drops what earlier sessions wrote of steps after `step`."""
        from tensorboardX.event_file_writer import EventsWriter  # protobuf and its friends: only a run needs them
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        folder.mkdir(exist_ok=True)
        # Without the suffix a session would overwrite one that began in the same second.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, name: str, value: float | int, step: int) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Speed:
    """Throughput of the steps since the last `start`, which is to be called after whatever is not training."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self._since, self._steps, self._positions = time.perf_counter(), 0, 0

    def count(self, positions: int) -> None:
        self._steps, self._positions = self._steps + 1, self._positions + positions

    def read(self, batch_size: int, flops: int) -> dict[str, float]:
        """Steps, examples, tokens (valid positions, thoughts included) and FLOP per second; starts again.

        Empty if nothing was counted."""
        seconds, steps, positions = time.perf_counter() - self._since, self._steps, self._positions
        self.start()
        if not steps:
            return {}
        return {
            "steps_per_second": steps / seconds,
            "examples_per_second": steps * batch_size / seconds,
            "tokens_per_second": positions / seconds,
            "flops_per_second": steps * flops / seconds,
        }


class Terminal:
    """Lines and a progress bar. Losing the terminal must not end a run, so errors of writing to it are ignored."""

    def __init__(self, *, quiet: bool, progress: bool):
        self._console = Console(quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._wanted = progress and not quiet and self._console.is_terminal

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, total: int, done: int) -> Generator[None, None, None]:
        """Show the progress bar inside the `with` block."""
        if not self._wanted:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, refresh_per_second=4, speed_estimate_period=120)
        self._task = self._bar.add_task("training", total=total, completed=done, state="compiling")
        with contextlib.suppress(OSError):
            self._bar.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def update(self, done: int, state: str | None = None) -> None:
        """`done` steps of the bar; `state` is the text beside it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            if state is not None:
                self._bar.update(self._task, state=state)


def summary(values: Mapping[str, float], timing: Mapping[str, float], stage: int) -> str:
    """One line for the progress bar."""
    text = f"stage {stage} loss {values['loss']:.3f} acc {values['token_accuracy']:.3f}"
    if timing:
        text += (
            f" | {timing['examples_per_second']:,.0f} ex/s {timing['tokens_per_second']:,.0f} tok/s "
            f"{timing['flops_per_second'] / 1e9:,.1f} GFLOP/s"
        )
    return text
