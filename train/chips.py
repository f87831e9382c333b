"""What a program can be planned for: TPU slices by the number of their chips, and emulated CPU devices.

Peaks and memory are per chip, from the tables of docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e (read 2026-11). They give
the bandwidth of a chip's links in both directions together; here is one direction, what a chip can send. `memory` is what the
compiler (libtpu 0.0.42) lets a program use, a little less than what is on the chip.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

GIB = 2**30
# So that the compiler asks no metadata server, takes no lock file, and does not complain that it is not on a TPU host.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    # The stacks of its threads are small: libtpu 0.0.42 overflows them on GPT-2 with bfloat16 products, and ends with signal 11.
    "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=1048576",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of chips."""

    cores: int  # TensorCores; two of them are one device
    flops: float  # bfloat16 floating-point operations per second
    memory: float  # bytes
    bandwidth: float  # of memory, bytes per second
    interconnect: float  # that a chip can send over all of its links together, bytes per second
    topologies: tuple[str, ...]


_TWO_D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_D = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v5e": Chip(1, 197e12, 15.75 * GIB, 819e9, 200e9, _TWO_D),
    "v5p": Chip(2, 459e12, 95.74 * GIB, 2765e9, 600e9, _THREE_D),
    "v6e": Chip(1, 918e12, 31.25 * GIB, 1600e9, 400e9, _TWO_D),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. `chip` is None for emulated CPU devices."""

    name: str
    platform: str
    devices: Sequence[Any]
    memory: float  # bytes that one device offers
    chip: Chip | None = None
    topology: str = ""


def topologies() -> dict[str, tuple[str, str]]:
    """Generation and topology by plan name, such as v5e-256."""
    found = {}
    for generation, chip in CHIPS.items():
        for shape in chip.topologies:
            count = math.prod(map(int, shape.split("x")))
            found[f"{generation}-{count}"] = (generation, shape)
    return found


def target(name: str) -> Target:
    """The devices that a plan's name stands for: v5e-N, v5p-N, v6e-N with N chips, or cpu-N with N CPU devices.

    No accelerator is needed or touched. Must be called before JAX has started its backend, unless that is a CPU already
    with enough devices. Raises ValueError naming the known names, or saying what is missing."""
    cpu = re.fullmatch(r"cpu-([1-9]\d*)", name)
    known = topologies()
    if cpu is None and name not in known:
        near = difflib.get_close_matches(name, [*known, "cpu-8"], n=3, cutoff=0.5)
        hint = f"perhaps you meant {' or '.join(near)}; " if near else ""
        raise ValueError(
            f"--plan {name}: no such topology; {hint}a name counts chips: {', '.join(known)}, or cpu-N for N CPU devices"
        )
    jax.config.update("jax_platforms", "cpu")
    if cpu:
        count = int(cpu[1])
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
        return Target(name, "cpu", _cpu_devices(count), memory)
    generation, shape = known[name]
    return Target(
        name, "tpu", _tpu_devices(name, generation, shape), CHIPS[generation].memory, CHIPS[generation], shape
    )


def _cpu_devices(count: int) -> list[Any]:
    """The first `count` CPU devices; the backend starts with as many if nothing has said otherwise."""
    if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it has started
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--plan cpu-{count}: JAX has started with {len(devices)} CPU devices; set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} for more"
        )
    return devices[:count]


def _tpu_devices(name: str, generation: str, shape: str) -> list[Any]:
    """Descriptions of the chips of a slice, from the TPU compiler. Raises ValueError if it is not installed."""
    from jax.experimental import topologies as aot

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    sides = [int(side) for side in shape.split("x")]
    host = tuple(min(side, 2) for side in sides[:2]) + (1,)  # a host has 2 x 2 chips, or as many as there are
    try:
        described = aot.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}", chips_per_host_bounds=host
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ModuleNotFoundError) as error:
        raise ValueError(
            f"--plan {name}: the TPU compiler did not start ({str(error).splitlines()[0]}); it is in the package libtpu: "
            "pip install --target FOLDER libtpu, and set TPU_LIBRARY_PATH=FOLDER/libtpu/libtpu.so (docs/scaling.md)"
        ) from error
    return list(described.devices)
