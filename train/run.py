"""The run directory: what is in it, how it is made, compared and read again.

config.json        the experiment; a run continues only with the same one
environment.json   versions, devices and git state at the start, and of every session that continued the run
tokenizer/         the tokenizer, as `transformers` saves one
metrics.jsonl      one record a line: training, validation, events
tensorboard/       the same curves for TensorBoard
checkpoints/       see latentjax/checkpoint.py
checkpoints.address  instead of it, if the run keeps them in a bucket: where
eval/              what the evaluation program writes
lock               held by the program that trains the run (see train/disk.py)
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from typing import Any

import jax

from latentjax.checkpoint import ADDRESS, Which, available_steps, folder_of, load_params, steps_at
from latentjax.tokenizers import Tokenizer, load_tokenizer
from train.config import Experiment, differences, load_config, read_json, save_config, to_json
from train.disk import LOCK
from train.state import with_part

CONFIG, ENVIRONMENT, TOKENIZER, METRICS = "config.json", "environment.json", "tokenizer", "metrics.jsonl"
# Fields that may change when a run goes on: its figures then agree to rounding.
_PLACE = ("mesh",)
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_PACKAGES = (
    "latentjax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain", "tokenizers", "transformers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model: what made it, tokenizer, parameters (the moving average where one was kept), step."""

    experiment: Experiment
    tokenizer: Tokenizer
    params: Any
    step: int


def load_run(path: str | os.PathLike, checkpoint: Which = "last") -> LoadedRun:
    """Read a run directory; `checkpoint` is a step, "last", or "best" (validation accuracy in the last stage).

    Parameters are arrays on the first device. Raises FileNotFoundError if `path` is no run or has no checkpoint,
    ValueError listing the steps if it has not that one, and latentjax.checkpoint.DamagedCheckpoint."""
    path = pathlib.Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path}: is not a run directory (it has no {CONFIG})")
    experiment = load_config(path / CONFIG)
    params, step = run_params(path, checkpoint, experiment)
    return LoadedRun(experiment, load_tokenizer(path / TOKENIZER), params, step)


def run_params(path: pathlib.Path, checkpoint: Which, experiment: Experiment) -> tuple[Any, int]:
    """Parameters of a run of `experiment`, with the moving average of what trained where one was kept, and the step."""
    if experiment.ema is None or not experiment.untrained:  # then the average is of all parameters
        return load_params(path, checkpoint, average=experiment.ema is not None)
    params, step = load_params(path, checkpoint)
    average, _ = load_params(path, step, average=True)
    return with_part(params, average), step


def parse_source(source: str) -> tuple[pathlib.Path, Which]:
    """The run and the checkpoint that `init_from` names: "RUN", "RUN@best", "RUN@STEP"."""
    path, at, which = source.rpartition("@")
    if not at:
        return pathlib.Path(source), "last"
    if which in ("last", "best"):
        return pathlib.Path(path), which
    if not which.isdecimal():
        raise ValueError(f"init_from={source!r}: after '@' comes last, best or a step")
    return pathlib.Path(path), int(which)


def check_run(path: pathlib.Path, experiment: Experiment, checkpoints: str | None = None) -> bool:
    """Whether `path` is a run of `experiment` to continue (True) or free for a new one (False). Writes nothing.

    A run may go on with another mesh: that says where it runs and not what it is. `checkpoints` is where in a bucket its
    checkpoints are to be; None: where they are, and for a new run in its directory.

    Raises ValueError listing the fields, old -> new, if it is a run of another experiment, and ValueError if something
    else is there, or checkpoints of another run in the bucket."""
    if re.match(r"\w+:/", str(path)):
        raise ValueError(
            f"--run {path}: must be a folder, on a network disk or a mounted bucket; only checkpoints can be in a bucket: "
            "--checkpoints gs://BUCKET/FOLDER (docs/scaling.md)"
        )
    if (path / CONFIG).is_file():
        old, new = (
            {name: value for name, value in config.items() if name not in _PLACE}
            for config in (read_json(path / CONFIG), to_json(experiment))
        )
        different = differences(old, new)
        if different:
            raise ValueError(
                f"{path} is a run of another config; give a new --run, or the fields their old values:\n  "
                + "\n  ".join(different)
            )
        if checkpoints is not None and checkpoints.rstrip("/") != str(folder_of(path)):
            raise ValueError(
                f"--checkpoints {checkpoints}: those of the run {path} are in {folder_of(path)}; leave it out"
            )
        return True
    # A program that was killed in its first moments leaves these.
    started = {LOCK, ADDRESS, CONFIG + ".partial"}
    if path.exists() and (not path.is_dir() or {other.name for other in path.iterdir()} - started):
        raise ValueError(f"--run {path}: exists and is not a run directory (it has no {CONFIG})")
    if checkpoints is not None:
        _check_address(checkpoints)
    return False


def _check_address(checkpoints: str) -> None:
    """Raise ValueError unless a new run can keep its checkpoints in the bucket's folder `checkpoints`."""
    if not re.fullmatch(r"gs://[^/]+/[^/].*", checkpoints):
        raise ValueError(f"--checkpoints {checkpoints}: must be gs://BUCKET/FOLDER, with a folder for this run alone")
    from etils import epath

    try:
        steps = steps_at(epath.Path(checkpoints))
    except ImportError as error:
        raise ValueError(f"--checkpoints {checkpoints}: needs gcsfs: pip install -e '.[gcs]' ({error})") from error
    except Exception as error:  # of the client, its credentials and the network: many kinds
        raise ValueError(f"--checkpoints {checkpoints}: cannot be read ({type(error).__name__}: {error})") from error
    if steps:
        raise ValueError(
            f"--checkpoints {checkpoints}: holds those of another run (steps {', '.join(map(str, steps))})"
        )


def open_run(
    path: pathlib.Path, experiment: Experiment, tokenizer: Tokenizer, checkpoints: str | None = None, **notes: Any
) -> None:
    """Make the run directory, or add a session to one that `check_run` approved. `notes` go into the environment.

    Of several processes the first alone calls it."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / CONFIG).exists():
        (path / ADDRESS).unlink(missing_ok=True)
        if checkpoints is not None:
            (path / ADDRESS).write_text(checkpoints.rstrip("/") + "\n")
        partial = path / (CONFIG + ".partial")
        save_config(partial, experiment)
        partial.rename(path / CONFIG)  # whole or absent: it is what makes the folder a run
    if not (path / TOKENIZER).exists():
        partial = path / (TOKENIZER + ".partial")
        tokenizer.save(partial)
        partial.rename(path / TOKENIZER)  # whole or absent: it is several files
    session = environment() | notes
    file = path / ENVIRONMENT
    record = read_json(file) | {} if file.exists() else session | {"continued": []}
    if file.exists():
        record["continued"].append(session | {"from_step": max(available_steps(path), default=0)})
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(file)


def environment() -> dict[str, Any]:
    """Versions, devices, git state, command and time, as JSON types."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None  # a clone that is not installed
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether the files differ from it; None outside a git checkout."""
    folder = pathlib.Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()  # fmt: skip

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def make_deterministic() -> None:
    """Have XLA use GPU kernels that add in one order, and no autotuning, which may choose others each time. Call it before
    JAX meets its devices. CPU and TPU programs repeat bit for bit without it."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()


def check_deterministic(experiment: Experiment) -> None:
    """Raise ValueError if `experiment` is to be deterministic and XLA was not told in time."""
    told = _DETERMINISTIC in os.environ.get("XLA_FLAGS", "")
    if experiment.deterministic and jax.default_backend() == "gpu" and not told:
        raise ValueError(
            f"deterministic=True: set the environment variable XLA_FLAGS={_DETERMINISTIC} before JAX is used "
            "(python -m train does so)"
        )


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk between runs, in ~/.cache/latentjax/xla; JAX's own environment variables win."""
    settings = {
        "jax_compilation_cache_dir": str(pathlib.Path("~/.cache/latentjax/xla").expanduser()),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    for name, value in settings.items():
        if not os.environ.get(name.upper()):
            jax.config.update(name, value)
