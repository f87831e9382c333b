"""Checkpoints of a run: what one holds, which are kept, and how damage is noticed. All of Orbax is in this file.

A checkpoint is the folder `RUN/checkpoints/STEP` with the parameters, the rest of the training state, and `record.json`
(stage, iterator, accuracy, checksums). Orbax writes it under a temporary name and renames it when it is whole, so a run
killed while saving leaves no half checkpoint under a step's name. Damage done later is found by two checksums: one of
every file, and one of the arrays' values. The first is taken of files up to 1 MiB; a larger one holds nothing but
arrays, which the second covers wherever and by how many processes they were written.

A run may keep its checkpoints in a bucket instead: the file `RUN/checkpoints.address` then says where (gs://BUCKET/FOLDER). An
object store has no rename: there Orbax writes under the step's name, and `commit_success.txt` last of all. Without that mark
a checkpoint there is none.
"""

import dataclasses
import json
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FOLDER, ADDRESS, RECORD = "checkpoints", "checkpoints.address", "record.json"
Folder = Any  # etils' epath.Path, which is imported where it is used
Which = int | str  # a step (also as digits), "last", or "best" (validation accuracy)
_LARGE = 2**20  # bytes
# Orbax still writes these after the record, so their checksums cannot be in it. Of the first it is checked that Orbax can
# read it and that it names the same items; the second only marks a checkpoint as whole where there is no rename.
_METADATA, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read, or whose content is not what was saved."""


class OtherArrays(ValueError):
    """A whole checkpoint, but of arrays with other names, shapes or types: of another architecture."""


class NotSaved(OSError):
    """A checkpoint could not be written, for example because the disk is full. Earlier ones are as they were."""


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


class Checkpoints:
    """The checkpoints of the run that this program trains. `keep` of them, the latest, stay, and the most accurate one.

    Not thread-safe; with several processes every one makes the same calls. Close it (or use `with`) to finish saving.
    """

    def __init__(self, run: str | os.PathLike, *, keep: int = 2, report: Callable[[str], None] = warnings.warn):
        """`report` gets a line about every damaged checkpoint. What an interrupted save or deletion left is removed."""
        from orbax.checkpoint import v1 as ocp  # heavy, and only training and evaluation need it

        self.folder, self._keep, self._report = folder_of(run), keep, report
        self._accuracies: dict[int, float] = {}
        self._sealing: tuple[int, dict[str, Any]] | None = None
        for step in self.steps():
            try:
                self._note_accuracy(step, _read_record(self.folder / str(step)))
            except DamagedCheckpoint as error:
                self._set_aside(step, error)
        context = ocp.Context()
        # Called before the rename. Not the method itself: Orbax copies its options, and with a method its object.
        context.asynchronous.post_finalization_callback = lambda: self._seal()
        # The protocols of these are stricter than what the library passes.
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        self._ocp: Any = ocp.training.Checkpointer(
            str(self.folder),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self._accuracies)]),
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
            context=context,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except NotSaved as error:
            if kind is None:
                raise
            self._report(str(error))  # what ended the block is worth more than this

    def close(self) -> None:
        """Wait for the checkpoint that is being written. Raises NotSaved."""
        with self._saving():
            self._ocp.close()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        return steps_at(self.folder)

    def save(
        self, step: int, items: Mapping[str, Any], record: Mapping[str, Any], *, accuracy: float | None = None
    ) -> None:
        """Start writing a checkpoint of `items` (pytrees of arrays) and `record` (JSON), and return.

        The arrays may be changed or donated at once. `accuracy` makes it a candidate for "best". A step that already
        has a checkpoint keeps it: it is the same one. Raises NotSaved, also for the checkpoint before this one."""
        self.wait()
        with self._saving(step):
            exists = step in self.steps()
        if exists:
            return
        content = {"record": dict(record), "accuracy": None if accuracy is None else float(accuracy)}
        content |= {"fingerprints": {name: fingerprint(item) for name, item in items.items()}}
        content |= {"arrays": {name: _describe(item) for name, item in items.items()}}
        self._note_accuracy(step, content)
        self._sealing = step, content
        with self._saving():
            self._ocp.save_checkpointables_async(step, dict(items), force=True)

    def wait(self) -> None:
        """Block until the checkpoint that is being written is on disk. Raises NotSaved."""
        with self._saving():
            self._ocp.wait()

    def _seal(self) -> None:
        """Add the record to a checkpoint that is complete but for its final name. Orbax calls it on the first process."""
        assert self._sealing is not None
        step, content = self._sealing
        folder = next(self.folder.glob(f"{step}.orbax-checkpoint-tmp*"), self.folder / str(step))
        files = {name: _checksum(folder / name) for name in _files(folder)}
        body = json.dumps(content | {"files": files})
        (folder / RECORD).write_text(json.dumps({"checksum": f"{zlib.crc32(body.encode()):08x}", "body": body}) + "\n")

    @contextmanager
    def _saving(self, step: int | None = None) -> Generator[None, None, None]:
        """Turn any error inside the `with` block into NotSaved of `step`, by default the one that is being written."""
        try:
            yield
        except Exception as error:  # Orbax, tensorstore and clients of buckets raise many kinds
            failed = step if step is not None else self._sealing[0] if self._sealing else "?"
            which = ""
            if not is_address(str(self.folder)):  # a bucket may be out of reach now
                which = f" (steps {', '.join(map(str, self.steps())) or 'none'})"
            raise NotSaved(
                f"checkpoint {self.folder / str(failed)} could not be written: {_first_line(error)}; "
                f"the earlier ones are untouched{which}"
            ) from error

    def load(self, step: int, like: Mapping[str, Any]) -> Restored:
        """The checkpoint of `step`, each array with the shape, type and sharding of that in `like` (arrays or shapes).

        The sharding, and so the mesh, may be another than that of the arrays that were saved. Raises OtherArrays, or
        DamagedCheckpoint saying what is wrong."""
        return _load(self.folder / str(step), like)

    def load_latest(self, like: Mapping[str, Any]) -> Restored | None:
        """The latest checkpoint that is whole; None if there has never been one.

        A damaged one is reported and renamed to `damaged-STEP`. Raises DamagedCheckpoint if all are damaged, and
        OtherArrays (nothing is renamed) if the latest whole one is of another architecture."""
        for step in reversed(self.steps()):
            try:
                return self.load(step, like)
            except DamagedCheckpoint as error:
                self._set_aside(step, error)
                self._ocp.reload()
        damaged = sorted(path.name for path in self.folder.glob("damaged-*"))
        if damaged:
            raise DamagedCheckpoint(
                f"{self.folder}: all checkpoints are damaged ({', '.join(damaged)}); to start again at step 0, remove them"
            )
        return None

    def _note_accuracy(self, step: int, content: Mapping[str, Any]) -> None:
        if content["accuracy"] is not None:
            self._accuracies[step] = content["accuracy"]

    def _set_aside(self, step: int, error: DamagedCheckpoint) -> None:
        """Rename a damaged checkpoint, loudly; or remove one that was being deleted when the program was killed."""
        source, target = self.folder / str(step), self.folder / f"damaged-{step}"
        outdated = sum(other > step for other in self.steps()) >= self._keep
        deleted = outdated and not all((source / name).exists() for name in (RECORD, _METADATA))
        self._accuracies.pop(step, None)
        while target.exists():
            target = target.with_name(target.name + "-again")
        if jax.process_index() == 0:
            source.rmtree() if deleted else source.rename(target)
        if deleted:
            self._report(f"{source} was being deleted: the rest of it is gone now")
        else:
            self._report(f"DAMAGED CHECKPOINT: {error}; moved to {target.name}, trying the one before")


class _Best:
    """Orbax policy: keep the checkpoint with the highest of `accuracies` (by step); of equal ones the latest."""

    def __init__(self, accuracies: Mapping[int, float]):
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = _best({c.step: self._accuracies[c.step] for c in checkpoints if c.step in self._accuracies})
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best(accuracies: Mapping[int, float]) -> int | None:
    return max(accuracies, key=lambda step: (accuracies[step], step), default=None)


# Reading, which changes nothing on disk


def folder_of(run: str | os.PathLike) -> Folder:
    """Where the checkpoints of the run folder `run` are: in it, or where its file `checkpoints.address` says."""
    from etils import epath

    address = pathlib.Path(run) / ADDRESS
    return epath.Path(address.read_text().strip() if address.is_file() else pathlib.Path(run).absolute() / FOLDER)


def steps_at(folder: Folder) -> list[int]:
    """Steps of the whole checkpoints in a folder of a disk or a bucket, ascending."""
    if not folder.is_dir():
        return []
    steps = [path for path in folder.iterdir() if path.name.isdecimal()]
    if is_address(str(folder)):
        steps = [path for path in steps if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in steps)


def is_address(where: str) -> bool:
    """Whether `where` names a folder of a bucket and not of a disk."""
    return "://" in where


def _files(folder: Folder) -> list[str]:
    """Names, relative to a checkpoint's folder, of the files that its record speaks of."""

    def below(path: Folder) -> Generator[Folder, None, None]:
        for each in path.iterdir():
            yield from below(each) if each.is_dir() else [each]

    names = (str(file.relative_to(folder)) for file in below(folder))
    return sorted(name for name in names if name not in (RECORD, _METADATA, _COMMITTED))


def _checksum(file: Folder) -> list[Any]:
    """Size in bytes, and CRC-32 of a file that is not large."""
    size = file.stat().length
    return [size, None if size > _LARGE else f"{zlib.crc32(file.read_bytes()):08x}"]


def _describe(item: Any) -> dict[str, str]:
    """Path of each array of a pytree -> type and shape, as in `float32[40,30]`."""
    leaves = jax.tree_util.tree_flatten_with_path(item)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in leaves
    }


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"


def _damaged(folder: Folder, what: object) -> DamagedCheckpoint:
    what = _first_line(what) if isinstance(what, Exception) else what
    return DamagedCheckpoint(f"checkpoint {folder} cannot be read: {what}")


def _read_record(folder: Folder) -> dict[str, Any]:
    """What `Checkpoints._seal` wrote. Raises DamagedCheckpoint."""
    try:
        sealed = json.loads((folder / RECORD).read_text())
        content = json.loads(sealed["body"])
        intact = sealed["checksum"] == f"{zlib.crc32(sealed['body'].encode()):08x}"
        names = _item_names(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error
    for name, holds in ((RECORD, intact), (_METADATA, intact and names == set(content["arrays"]))):
        if not holds:
            raise _damaged(folder, f"{name} is not as it was saved")
    return content


def _item_names(folder: Folder) -> set[str]:
    """The items that a checkpoint has by Orbax's own account. Raises ValueError or TypeError where Orbax would."""
    from orbax.checkpoint import metadata

    return set(dict(metadata.get_step_metadata(str(folder)).item_handlers))  # ty: ignore[no-matching-overload]


def _check_files(folder: Folder, content: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise DamagedCheckpoint for a file of the items `names`, or of none, that is not as the record says."""
    for file, saved in content["files"].items():
        if file.split("/")[0] not in content["arrays"].keys() - set(names):
            try:
                found = _checksum(folder / file)
            except OSError as error:
                raise _damaged(folder, error) from error
            if found != saved:
                raise _damaged(folder, f"{file} has size and CRC-32 {found}, saved were {saved}")


def _check_arrays(folder: Folder, content: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise OtherArrays listing the first arrays in which the checkpoint differs from `like`."""
    different = []
    for name, item in like.items():
        saved, wanted = content["arrays"].get(name, {}), _describe(item)
        for path in [*wanted, *(path for path in saved if path not in wanted)]:
            if saved.get(path) != wanted.get(path):
                there, here = saved.get(path, "absent"), wanted.get(path, "absent")
                different.append(f"{name}/{path}: {there} in the checkpoint, {here} here")
    if different:
        more = f"\n  and {len(different) - 5} more" if len(different) > 5 else ""
        raise OtherArrays(f"checkpoint {folder} is of another architecture:\n  " + "\n  ".join(different[:5]) + more)


def _load(folder: Folder, like: Mapping[str, Any]) -> Restored:
    from orbax.checkpoint import v1 as ocp

    content, items, failure = {}, {}, None
    try:
        content = _read_record(folder)
        _check_files(folder, content, list(like))
        _check_arrays(folder, content, like)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(like))
        items = ocp.load_checkpointables(str(folder), shapes)
    except (DamagedCheckpoint, OtherArrays) as error:
        failure = error
    except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged file
        failure = _damaged(folder, error)
        failure.__cause__ = error
    if not _everywhere(failure is None):
        raise failure or _damaged(folder, "another process could not read its part")
    for name, item in items.items():
        found, saved = fingerprint(item), content["fingerprints"][name]
        if found != saved:
            raise DamagedCheckpoint(f"checkpoint {folder}: {name} has checksum {found}, saved was {saved}")
    return Restored(int(folder.name), items, content["record"])


def _everywhere(holds: bool) -> bool:
    """Whether `holds` on every process: all of them must go the same way."""
    if jax.process_count() == 1:
        return holds
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(holds)).all())


def available_steps(run: str | os.PathLike) -> list[int]:
    """Steps of the run folder `run` that have a checkpoint, ascending. Writes nothing."""
    return steps_at(folder_of(run))


def load_params(run: str | os.PathLike, which: Which = "last", *, average: bool = False) -> tuple[Any, int]:
    """Parameters (or their moving `average`) of a checkpoint of the run folder `run`, and its step: see `load_item`."""
    return load_item(run, "ema" if average else "params", which)


def load_item(run: str | os.PathLike, name: str, which: Which = "last") -> tuple[Any, int]:
    """One item of a checkpoint of the run folder `run`, as arrays on the first device, and the checkpoint's step.

    Reads nothing else. Raises FileNotFoundError if the run has no checkpoint, ValueError if not that one, or
    DamagedCheckpoint."""
    place = folder_of(run)
    if not steps_at(place):
        raise FileNotFoundError(f"{pathlib.Path(run)}: no checkpoint there (looked in {place})")
    from orbax.checkpoint import v1 as ocp

    step = _resolve(place, which)
    folder = place / str(step)
    _check_files(folder, _read_record(folder), [name])  # before Orbax reads what it may not understand
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        stored = ocp.checkpointables_metadata(str(folder)).metadata[name]
    except Exception as error:
        raise _damaged(folder, error) from error
    like = jax.tree.map(lambda meta: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=device), stored)
    return _load(folder, {name: like}).items[name], step


def _resolve(folder: Folder, which: Which) -> int:
    """The step that `which` names. Raises ValueError listing the steps there are."""
    steps = steps_at(folder)
    there = ", ".join(map(str, steps)) or "none"
    if which == "last":
        return steps[-1]
    if which == "best":
        accuracies = {step: _read_record(folder / str(step))["accuracy"] for step in steps}
        best = _best({step: accuracy for step, accuracy in accuracies.items() if accuracy is not None})
        if best is None:
            raise ValueError(
                f"checkpoint='best': no checkpoint of {folder} was validated in the last stage; there are the steps {there}"
            )
        return best
    if str(which).isdecimal() and int(which) in steps:
        return int(which)
    raise ValueError(f"checkpoint={which!r}: {folder} has the steps {there}")
