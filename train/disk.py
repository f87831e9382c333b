"""What can stand between a run and its directory: another program that trains it, missing permission, a full disk."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Generator

import jax

from latentjax.checkpoint import ADDRESS, NotSaved, available_steps

LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class RunUnavailable(OSError):
    """The run directory cannot be written, or another program trains the run."""


@contextlib.contextmanager
def hold(run: pathlib.Path) -> Generator[None, None, None]:
    """Make the run directory and keep other programs from training the same run inside the `with` block.

    The lock (flock of the file `lock`) belongs to the process: it ends with it, even by kill -9, so no stale lock is ever
    in the way. The first process of several holds it for all. Raises RunUnavailable naming the path and what is wrong."""
    if jax.process_index() > 0:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise RunUnavailable(f"--run {run}: cannot be written ({error.strerror}: {error.filename})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise RunUnavailable(
                f"--run {run}: is being trained by {file.read().strip() or 'another program'}; wait for it, or give another "
                f"--run ({error.strerror})"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def writing(run: pathlib.Path) -> Generator[None, None, None]:
    """Turn an error of writing inside the `with` block into NotSaved, which says where and how to go on."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, NotSaved) and error.errno not in _FULL:
            raise
        what = str(error) if isinstance(error, NotSaved) else f"{run} could not be written: {error}"
        if (run / ADDRESS).exists():  # in a bucket, which may be out of reach now
            go_on = "from its last checkpoint"
        else:
            steps = available_steps(run)
            go_on = f"at step {steps[-1]}" if steps else "from the start"
        raise NotSaved(f"{what}; with space there, it goes on {go_on}: python -m train --resume {run}") from error
