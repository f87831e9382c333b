"""Checkpoints of a run: what one holds, which are kept, and how damage is noticed. All of Orbax is in this file.

A checkpoint is the folder `RUN/checkpoints/STEP` with the parameters, the rest of the training state, and a JSON record
(stage, iterator, checksums). Orbax writes it under a temporary name and renames it when it is whole, so a run killed
while saving leaves no half checkpoint under a step's name; damage done later is found by the checksums.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

FOLDER = "checkpoints"
METRIC = "accuracy"  # on validation data; what "best" compares
Which = int | str  # a step (also as digits), "last", or "best"


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read, or whose arrays are not those that were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: `items` by name (pytrees of arrays), and the JSON `record` saved with it."""

    step: int
    items: Mapping[str, Any]
    record: Mapping[str, Any]


@jax.jit
def _fingerprint(tree: Any) -> jax.Array:
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        unsigned = jnp.dtype(f"uint{8 * words.dtype.itemsize}") if words.dtype.itemsize <= 4 else jnp.dtype("uint32")
        words = jax.lax.bitcast_convert_type(words, unsigned).astype(jnp.uint32).ravel()
        # Weights are odd, so that a change of any one word changes the sum.
        weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + jnp.uint32(2 * number + 1)
        total = total * jnp.uint32(31) + jnp.sum(words * weights, dtype=jnp.uint32)
    return total


def fingerprint(tree: Any) -> str:
    """A 32-bit checksum of all arrays of `tree` in order, as 8 hexadecimal digits.

    Computed where the arrays live, in integers modulo 2^32, so neither sharding nor the order of sums changes it."""
    return f"{int(_fingerprint(tree)):08x}"


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one run. `keep` of them, the latest, stay, and the one with the best METRIC.

    Not thread-safe; with several processes every one makes the same calls. Close it (or use `with`) to finish saving.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        *,
        keep: int = 2,
        write: bool = True,
        report: Callable[[str], None] = warnings.warn,
    ):
        """`report` gets a line about every damaged checkpoint. With `write`, what an interrupted save left is removed:
        of the programs that look at a run, only the one that trains it may do that."""
        from orbax.checkpoint import v1 as ocp  # heavy, and only training and evaluation need it

        policies: Any = ocp.training.preservation_policies  # their protocols are stricter than what the library passes
        decisions: Any = ocp.training.save_decision_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC], n=1, keep_checkpoints_without_metrics=False
        )
        self.folder, self._report = pathlib.Path(run).absolute() / FOLDER, report
        self._ocp: Any = ocp.training.Checkpointer(
            str(self.folder),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            cleanup_tmp_directories=write,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._ocp.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._ocp.checkpoints]

    def save(
        self, step: int, items: Mapping[str, Any], record: Mapping[str, Any], *, accuracy: float | None = None
    ) -> None:
        """Start writing a checkpoint of `items` (pytrees of arrays) and `record` (JSON), and return.

        The arrays may be changed or donated at once. `accuracy` makes it a candidate for "best". A step that
        already has a checkpoint keeps it: it is the same one."""
        if step in self.steps():
            return
        record = {"record": dict(record), "fingerprints": {name: fingerprint(item) for name, item in items.items()}}
        metrics = None if accuracy is None else {METRIC: float(accuracy)}
        self._ocp.save_checkpointables_async(step, dict(items), metrics=metrics, custom_metadata=record, force=True)

    def wait(self) -> None:
        """Block until the checkpoint that is being written is on disk."""
        self._ocp.wait()

    def load(self, step: int, like: Mapping[str, Any]) -> Restored:
        """The checkpoint of `step`, each array with the shape, type and sharding of that in `like` (arrays or shapes).

        Raises DamagedCheckpoint saying what is wrong."""
        try:
            record = self._record(step)
            items = self._ocp.load_checkpointables(step, dict(like))
        except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged file
            raise DamagedCheckpoint(
                f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}"
            ) from error
        self._check(step, items, record)
        return Restored(step, items, record["record"])

    def load_latest(self, like: Mapping[str, Any]) -> Restored | None:
        """The latest checkpoint that is whole; None if there is none at all.

        A damaged one is reported and renamed to `damaged-STEP`. Raises DamagedCheckpoint if all are damaged."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step, like)
            except DamagedCheckpoint as error:
                moved = self._set_aside(step)
                self._report(f"DAMAGED CHECKPOINT: {error}; moved to {moved.name}, trying the one before")
        if steps:
            raise DamagedCheckpoint(f"{self.folder}: all checkpoints are damaged (steps {', '.join(map(str, steps))})")
        return None

    def _set_aside(self, step: int) -> pathlib.Path:
        source, target = self.folder / str(step), self.folder / f"damaged-{step}"
        if jax.process_index() == 0:
            while target.exists():
                target = target.with_name(target.name + "-again")
            source.rename(target)
        self._ocp.reload()
        return target

    def _record(self, step: int) -> Mapping[str, Any]:
        record = self._ocp.checkpointables_metadata(step).custom_metadata
        if not record or "fingerprints" not in record:
            raise ValueError("its record is missing")
        return record

    def _check(self, step: int, items: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        for name, item in items.items():
            found, saved = fingerprint(item), record["fingerprints"].get(name)
            if found != saved:
                raise DamagedCheckpoint(
                    f"checkpoint {self.folder / str(step)}: {name} has checksum {found}, saved was {saved}"
                )

    def resolve(self, which: Which) -> int:
        """The step that `which` names. Raises ValueError listing the steps there are."""
        steps = self.steps()
        if which == "last" and steps:
            return steps[-1]
        if which == "best":
            scored = [(c.metrics[METRIC], c.step) for c in self._ocp.checkpoints if c.metrics and METRIC in c.metrics]
            if scored:
                return max(scored)[1]
            raise ValueError(
                f"checkpoint='best': no checkpoint of {self.folder} was validated in the last stage; "
                f"there are the steps {', '.join(map(str, steps)) or 'none'}"
            )
        if str(which).isdecimal() and int(which) in steps:
            return int(which)
        raise ValueError(f"checkpoint={which!r}: {self.folder} has the steps {', '.join(map(str, steps)) or 'none'}")

    def load_item(self, step: int, name: str) -> Any:
        """One item of the checkpoint of `step`, as arrays on the first device, nothing else being read.

        Raises DamagedCheckpoint saying what is wrong."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            stored = self._ocp.checkpointables_metadata(step).metadata[name]
        except Exception as error:
            raise DamagedCheckpoint(
                f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}"
            ) from error
        like = jax.tree.map(lambda meta: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=device), stored)
        return self.load(step, {name: like}).items[name]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"


def available_steps(run: str | os.PathLike) -> list[int]:
    """Steps of the run folder `run` that have a checkpoint, ascending. Writes nothing."""
    folder = pathlib.Path(run) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def load_params(run: str | os.PathLike, which: Which = "last", *, average: bool = False) -> tuple[Any, int]:
    """Parameters (or their moving `average`) of a checkpoint of the run folder `run`, and its step. Reads nothing else.

    Raises FileNotFoundError if the run has no checkpoint, ValueError if not that one, or DamagedCheckpoint."""
    if not available_steps(run):
        raise FileNotFoundError(f"{pathlib.Path(run)}: no checkpoint there (looked in its folder {FOLDER!r})")
    with Checkpoints(run, write=False) as checkpoints:
        step = checkpoints.resolve(which)
        return checkpoints.load_item(step, "ema" if average else "params"), step
