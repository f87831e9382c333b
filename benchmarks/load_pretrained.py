"""Memory and time of loading a checkpoint: `python -m benchmarks.load_pretrained --preset llama-3.2-1b --json FILE`.

Writes random bfloat16 weights of the preset's shape into a temporary folder (--folder says where there is room), loads them onto
a mesh of fake CPU devices, and prints, and writes to the JSON file:

bytes                     size of the files
peak_over_size            largest anonymous resident memory (RssAnon of /proc/self/status, read every 2 ms) during `load`, less
                          what it was before, as a multiple of `bytes`; limit 1.3. On fake devices the parameters lie in
                          host memory and count 1.0. Pages of mapped files (RssFile) are page cache and do not count.
before_over_size          what it was before, likewise
seconds_read              reading the files into memory, nothing else
seconds_load              `load`; limit 2 x seconds_read

Times are medians of --repeats runs that alternate, with the files in the page cache; those of the first of each, from disk, are
`cold`. `cpu_seconds` tell how much of a time is waiting for neighbours on a busy machine. Linux only.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
import tyro
from flax.traverse_util import unflatten_dict

from benchmarks.setting import cpu_seconds
from latentjax.backbone import pretrained
from latentjax.backbone.config import preset
from latentjax.backbone.hf_names import abstract
from latentjax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class LoadPretrained:
    """Write a checkpoint, then load it as often as asked."""

    preset: str = "llama-3.2-1b"
    fsdp: int = 4
    tensor: int = 2
    repeats: int = 5
    seed: int = 0
    folder: pathlib.Path | None = None  # None: the system's folder for temporary files
    json: pathlib.Path | None = None


def write_checkpoint(options: LoadPretrained, folder: pathlib.Path) -> None:
    """Random finite bfloat16 numbers below 1."""
    config, rng = preset(options.preset, param_dtype="bfloat16"), np.random.default_rng(options.seed)
    shapes = {name: x.shape for name, x in abstract(config).items()}
    bits = {name: rng.integers(0, 0x3F80, shape, dtype=np.uint16) for name, shape in shapes.items()}
    params = {name: x.view(ml_dtypes.bfloat16) for name, x in bits.items()}
    pretrained.save(folder, config.with_dropout(0.0), unflatten_dict(params, sep="/"))


def anonymous_bytes() -> int:
    """Resident memory of this process that is not a file's."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The largest `anonymous_bytes` while the context is open, less those at its start."""

    def __enter__(self) -> "Peak":
        self.before, self._stop, self.bytes = anonymous_bytes(), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes() - self.before)


def forget(files: list[pathlib.Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function) -> tuple[float, float]:
    """Seconds of wall-clock and of CPU."""
    jax.device_put(0.0).block_until_ready()  # JAX gives memory of dropped arrays back with its next call
    begin, used = time.perf_counter(), cpu_seconds()
    jax.block_until_ready(function())
    return time.perf_counter() - begin, cpu_seconds() - used


def measure(options: LoadPretrained, folder: pathlib.Path) -> dict[str, float]:
    """Memory in a run of its own, then times of alternating runs."""
    files = sorted(folder.glob("*.safetensors"))
    mesh = make_mesh(1, options.fsdp, options.tensor)

    def read() -> list[bytes]:
        return [file.read_bytes() for file in files]

    def load() -> dict:
        return pretrained.load(folder, mesh=mesh)[1]

    forget(files)
    cold_reading, _ = timed(read)
    forget(files)
    with Peak() as peak:  # of the first load: a later one may find memory of an earlier one that is not given back yet
        cold_loading, _ = timed(load)
    size = sum(file.stat().st_size for file in files)
    times = [(*timed(read), *timed(load)) for _ in range(options.repeats)]
    reading, reading_cpu, loading, loading_cpu = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "bytes": size, "peak_over_size": peak.bytes / size, "before_over_size": peak.before / size,
        "seconds_read": reading, "seconds_load": loading, "load_over_read": loading / reading,
        "seconds_read_cold": cold_reading, "seconds_load_cold": cold_loading,
        "cpu_seconds_read": reading_cpu, "cpu_seconds_load": loading_cpu,
    }  # fmt: skip


def main() -> None:
    options = tyro.cli(LoadPretrained, description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.fsdp * options.tensor)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = pathlib.Path(scratch) / "checkpoint"
        write_checkpoint(options, folder)
        figures = measure(options, folder)
    settings = dataclasses.asdict(options) | {"folder": None, "json": None}
    text = json.dumps({**settings, **figures}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
