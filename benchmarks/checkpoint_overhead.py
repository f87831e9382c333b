"""What checkpoints cost the training loop: `python -m benchmarks.checkpoint_overhead --json FILE`.

Trains a model of about 100 million parameters for 30 steps through the training program, with a checkpoint every ten, and
then times the parts of a save alone. Prints, and writes to the JSON file:

- parameters, state_bytes: what a checkpoint holds (parameters and two moments of AdamW);
- step_seconds, step_cpu_seconds: a step between checkpoints, with none being written (steps 4 to 10);
- blocking_seconds: how long the loop waits in a save (median of `repeats`), fingerprint_seconds of them for the checksums;
- background_seconds: from there until the checkpoint is on disk, with nothing else running;
- save_cpu_seconds: all work of a save, that in the background included;
- extra_seconds: ten steps with one save in them (steps 21 to 30) minus ten of `step_seconds`: the wait, and how much the
  writing behind the loop slows it down. Means something on a quiet machine only;
- overhead_blocking, overhead_cpu, overhead_wall: blocking_seconds and extra_seconds over the seconds of `every` steps, and
  save_cpu_seconds over their CPU-seconds. The limit is 0.05.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax
import tyro

from benchmarks.setting import cpu_seconds, peak_memory_bytes
from latentjax.backbone.config import BackboneConfig
from latentjax.checkpoint import Checkpoints, fingerprint
from latentjax.methods.base import Lengths
from latentjax.methods.cot import CoT
from latentjax.tasks.successor_list import SuccessorList
from train.config import Experiment, Mesh
from train.loop import train

_WINDOW = 10  # steps from one checkpoint to the next here


@dataclasses.dataclass(frozen=True)
class CheckpointOverhead:
    """Measure the cost of a checkpoint every `every` steps."""

    vocab: int = 32_000
    layers: int = 12
    width: int = 768
    batch: int = 16
    every: int = 100
    repeats: int = 3
    folder: pathlib.Path = pathlib.Path(tempfile.gettempdir())  # on the disk to measure
    json: pathlib.Path | None = None

    def experiment(self) -> Experiment:
        """CoT on the successor list; what is trained does not matter."""
        backbone = BackboneConfig(self.vocab, 64, self.width, self.layers, self.width // 64)
        steps = 3 * _WINDOW
        return Experiment(
            name="checkpoint-overhead",
            task=SuccessorList(size=10, hops=4),
            method=CoT(backbone, Lengths(12, 7), steps=steps),
            mesh=Mesh(data=1),
            batch_size=self.batch,
            train_examples=self.batch * steps,
            valid_examples=self.batch,
            validate_every=steps,
            validate_unit="steps",
            validate_generation=False,
            checkpoint_every_steps=_WINDOW,
        )


def measure(options: CheckpointOverhead) -> dict[str, float]:
    """The figures of the module's docstring."""
    at: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = train(
            options.experiment(),
            folder,
            quiet=True,
            on_step=lambda step: at.update({step: (time.perf_counter(), cpu_seconds())}),
        )
        # From the third step on: the two in flight hide the first ones.
        step_seconds, step_cpu_seconds = ((at[_WINDOW][i] - at[3][i]) / (_WINDOW - 3) for i in range(2))
        # The first save compiles the checksums, so its window does not count.
        extra_seconds = at[3 * _WINDOW][0] - at[2 * _WINDOW][0] - _WINDOW * step_seconds
    params = result.params
    items = {"params": params, "rest": {"first": jax.tree.map(abs, params), "second": jax.tree.map(abs, params)}}
    blocking, checksums, background, cpu = [], [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Checkpoints(folder) as checkpoints:
        for step in range(options.repeats + 1):  # the first one compiles
            start = time.perf_counter()
            for item in items.values():
                fingerprint(item)
            checksums.append(time.perf_counter() - start)
            start, before = time.perf_counter(), cpu_seconds()
            checkpoints.save(step, items, {})
            blocking.append(time.perf_counter() - start)
            checkpoints.wait()
            background.append(time.perf_counter() - start - blocking[-1])
            cpu.append(cpu_seconds() - before)
    blocking_seconds, save_cpu_seconds = statistics.median(blocking[1:]), statistics.median(cpu[1:])
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(items)),
        "step_seconds": step_seconds,
        "step_cpu_seconds": step_cpu_seconds,
        "blocking_seconds": blocking_seconds,
        "fingerprint_seconds": statistics.median(checksums[1:]),
        "background_seconds": statistics.median(background[1:]),
        "save_cpu_seconds": save_cpu_seconds,
        "extra_seconds": extra_seconds,
        "overhead_blocking": blocking_seconds / (options.every * step_seconds),
        "overhead_cpu": save_cpu_seconds / (options.every * step_cpu_seconds),
        "overhead_wall": extra_seconds / (options.every * step_seconds),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main() -> None:
    options = tyro.cli(CheckpointOverhead, description=__doc__)
    result = measure(options)
    settings = {**dataclasses.asdict(options), "folder": str(options.folder), "json": None}
    text = json.dumps(settings | result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
