"""Several processes as one program: how they find each other, how they agree, and how one that fails ends the others.

On accelerators every host runs one process with the same command line. JAX's coordinator (in process 0) introduces them; from
then on `jax.devices()` are those of all hosts.
"""

import collections
import itertools
import os
import socket
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AUTO = "auto"  # as a coordinator: JAX asks the cluster's environment (Cloud TPU, SLURM, Open MPI)
# The number of tasks that a launcher has started, by which one program is told from several.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_A_DAY = 24 * 3600 * 1000  # milliseconds
_meetings = itertools.count()  # no two barriers of a program may have one name


def join(
    coordinator: str | None, processes: int | None, process_id: int | None, *, wait: int, heartbeat: int, failed: int
) -> None:
    """Make this process one of a run on several, before JAX is used otherwise; without flags and launcher, do nothing.

    Args:
        coordinator: HOST:PORT where process 0 listens, AUTO, or None: AUTO if SLURM or Open MPI started several tasks.
        processes: their number; with AUTO it may be None.
        process_id: 0 to processes - 1; with AUTO it may be None.
        wait: seconds until all must have come. Then the process ends with a message and the exit code `failed`.
        heartbeat: seconds of silence after which a process counts as dead, which ends all others.

    Raises:
        ValueError: flags that do not fit together, or fewer or more processes than `processes`.
    """
    if coordinator is None and (processes, process_id) == (None, None):
        if not any(int(os.environ.get(name, 1)) > 1 for name in _LAUNCHERS):
            return
        coordinator = AUTO
    _check(coordinator, processes, process_id, wait, heartbeat)
    # JAX would end the program at a SIGTERM of its own accord's timing; the loop does, after a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    # What JAX does at a timeout is an abort without a word of what to change.
    alarm = threading.Timer(wait, _give_up, (coordinator, processes, process_id, wait, failed))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            None if coordinator == AUTO else coordinator,
            processes,
            process_id,
            initialization_timeout=wait + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--coordinator {coordinator}: {str(error).strip()}") from error
    finally:
        alarm.cancel()
    if processes is not None and jax.process_count() != processes:
        raise ValueError(
            f"--processes {processes}: the coordinator at {coordinator} has a run of {jax.process_count()}; give every "
            "process the same number"
        )


def _check(coordinator: str | None, processes: int | None, process_id: int | None, wait: int, heartbeat: int) -> None:
    for name, seconds in (("join-timeout", wait), ("heartbeat-timeout", heartbeat)):
        if seconds < 1:
            raise ValueError(f"--{name} {seconds}: must be at least 1 second")
    if coordinator is None:
        raise ValueError("--processes and --process-id: also give --coordinator HOST:PORT, the address of process 0")
    if coordinator != AUTO:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"--coordinator {coordinator}: must be HOST:PORT or {AUTO}")
        if processes is None or process_id is None:
            raise ValueError(f"--coordinator {coordinator}: also give --processes N and --process-id 0 ... N - 1")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes {processes}: must be at least 1")
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        raise ValueError(
            f"--process-id {process_id}: must lie in 0 ... {(processes or 1) - 1}, as --processes {processes}"
        )


def _give_up(coordinator: str, processes: int | None, process_id: int | None, wait: int, code: int) -> None:
    """Say why the processes have not met, and end this one."""
    reason = (
        f"not all {processes or 'its'} processes came; start each with the same --processes and its own --process-id"
    )
    if coordinator != AUTO and process_id != 0:
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            reason = f"it cannot be reached ({error}); process 0 must run there, and the port must be open"
    print(f"error: --coordinator {coordinator}: after {wait} seconds {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def several_processes() -> bool:
    """Whether `join` made this process one of several. Unlike `jax.process_count` it starts no device."""
    return jax.distributed.is_initialized()


def together() -> None:
    """Wait until all processes are here, however long that takes: one that dies ends the others.

    Without devices: a collective operation that is new to them waits for a late process 30 seconds only (gloo)."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"latentjax/{next(_meetings)}", timeout_ms=_A_DAY)


class Agreement:
    """Lets processes act on what any one of them knows (a signal, a deadline) at the same step, without waiting.

    Each call gives a number and gets the largest one of those that all processes gave `delay` calls before: that is known
    by then, so the devices never run dry. One process alone gets its own number at once."""

    def __init__(self, delay: int):
        self._delay, self._numbers = delay, collections.deque()
        devices = np.asarray(jax.devices())
        mesh = Mesh(devices, ("all",), axis_types=(jax.sharding.AxisType.Auto,))
        self._one_each, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("all"), PartitionSpec()))
        self._largest = jax.jit(jnp.max, out_shardings=whole)

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        given = jax.make_array_from_callback(
            (jax.device_count(),), self._one_each, lambda index: np.full(1, number, np.int32)
        )
        self._numbers.append(self._largest(given))
        return int(self._numbers.popleft()) if len(self._numbers) > self._delay else 0
