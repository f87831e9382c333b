"""Command line of the training program.

    python -m train configs/NAME.py [--field value ...]      start a run, or continue it if it exists
    python -m train configs/NAME.py --arm Pause [...]        the arm of that name, of a config that defines several
    python -m train --resume RUN                             continue a run with its own config
    python -m train configs/NAME.py --plan v5e-8             memory, work and communication of a step on 8 TPU v5e chips

Everything that can be wrong with the input is found before anything is compiled or written: one screen, exit code 2.
Other exit codes: 3 loss or gradients not finite, 4 the disk cannot be written, 5 another process of the run
is lost, 130 stopped by a signal after saving.
"""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from train.config import Experiment, load_config
from train.distributed import join, several_processes
from train.run import CONFIG, check_run, enable_compilation_cache, make_deterministic

BAD_INPUT, NOT_FINITE, NOT_WRITTEN, LOST, INTERRUPTED = 2, 3, 4, 5, 130
USAGE = "usage: python -m train configs/NAME.py [--field value ...] | --resume RUN   (add --help for the fields)"


@dataclasses.dataclass(frozen=True)
class Program:
    """Flags of the program itself."""

    run: pathlib.Path | None = None
    """Run directory; default runs/NAME-seedSEED. A run that exists is continued if its config is the same."""
    checkpoints: str | None = None
    """Where a new run keeps its checkpoints instead of in its directory: gs://BUCKET/FOLDER."""
    stop_after_steps: int | None = None
    """Stop and save after this many steps; the same command goes on from there."""
    stop_after_minutes: float | None = None
    """Stop and save when this much time has passed."""
    dry_run: bool = False
    """Check everything, print the plan, and stop before anything is compiled or written."""
    coordinator: str | None = None
    """Run on several processes: HOST:PORT where process 0 listens, or auto on Cloud TPU, SLURM and Open MPI."""
    processes: int | None = None
    """The number of processes of the run; start each with the same command line but for --process-id."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    join_timeout: int = 300
    """Seconds in which all processes must have come."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as dead; all others then end with an error."""
    plan: str | None = None
    """Compile one step for a machine that is not here and print what it takes: v5e-N, v5p-N, v6e-N (chips), cpu-N."""


@dataclasses.dataclass(frozen=True)
class _Arguments:
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    program: Annotated[Program, tyro.conf.arg(name="")] = Program()


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit code. Bad options leave by SystemExit(2), as tyro's own errors do."""
    try:
        experiment, program = parse(arguments)
        if experiment.deterministic:
            make_deterministic()
        if program.plan is not None:
            from train.forecast import forecast, report

            print("\n".join(report(forecast(experiment, program.plan))))
            return 0
        join(
            program.coordinator,
            program.processes,
            program.process_id,
            wait=program.join_timeout,
            heartbeat=program.heartbeat_timeout,
            failed=BAD_INPUT,
        )
        from train.prepare import describe, prepare, trace  # after parsing: JAX takes a second to start

        run = program.run or pathlib.Path("runs") / f"{experiment.name}-seed{experiment.seed}"
        check_run(run, experiment, program.checkpoints)
        prepared = prepare(experiment, run)
        if program.dry_run:
            trace(prepared)
            print("\n".join([*describe(prepared), f"dry run: {run} is untouched"]))
            return 0
        prepared.check_weights()
    except (ValueError, LookupError, OSError, TypeError) as error:
        return _fail(_message(error), BAD_INPUT)

    from latentjax.checkpoint import DamagedCheckpoint, NotSaved, OtherArrays
    from train.disk import RunUnavailable
    from train.loop import Interrupted, NonFinite, train
    from train.prepare import UnusablePart

    enable_compilation_cache()
    try:
        train(
            prepared,
            run,
            checkpoints=program.checkpoints,
            stop_after_steps=program.stop_after_steps,
            stop_after_minutes=program.stop_after_minutes,
        )
    except (RunUnavailable, OtherArrays, DamagedCheckpoint, UnusablePart) as error:
        return _fail(str(error), BAD_INPUT)
    except NotSaved as error:
        return _fail(str(error), NOT_WRITTEN)
    except NonFinite as error:
        return _fail(str(error), NOT_FINITE)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED)
    except Exception as error:
        if not several_processes():
            raise
        traceback.print_exc()
        again = "start all of them again with the same command: the run continues"
        return _fail(f"this process has lost another one, or failed itself: {_message(error)}\n{again}", LOST)
    return 0


def parse(arguments: Sequence[str]) -> tuple[Experiment, Program]:
    """The experiment, overrides applied, and the program's flags.

    Raises ValueError or FileNotFoundError that say what to write instead; unknown fields and wrong types leave by
    SystemExit(2) with tyro's message."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if words else BAD_INPUT)
    reject_assignments(words)
    if words[0] == "--resume":
        experiment, rest = _resumed(words[1:])
    elif words[0].startswith("-"):
        raise ValueError(f"{words[0]}: the config file comes first\n{USAGE}")
    else:
        arm, rest = _take_arm(words[1:])
        experiment = load_config_file(words[0], arm)
    parsed = tyro.cli(
        _Arguments,
        args=rest,
        default=_Arguments(experiment),
        prog="python -m train CONFIG",
        description=__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )
    program = parsed.program
    for field in ("stop_after_steps", "stop_after_minutes"):
        value = getattr(program, field)
        if value is not None and value <= 0:
            raise ValueError(f"--{field.replace('_', '-')} {value}: must be positive")
    return parsed.experiment, program


def _take_arm(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--arm`, if it is there, and the other words."""
    if "--arm" not in words:
        return None, words
    at = words.index("--arm")
    if at + 1 == len(words) or words[at + 1].startswith("-"):
        raise ValueError(f"--arm: name the arm\n{USAGE}")
    return words[at + 1], words[:at] + words[at + 2 :]


def _resumed(words: list[str]) -> tuple[Experiment, list[str]]:
    if not words or words[0].startswith("-"):
        raise ValueError(f"--resume: name the run directory\n{USAGE}")
    run = pathlib.Path(words[0])
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"--resume {run}: is not a run directory (it has no {CONFIG})")
    return load_config(run / CONFIG), ["--run", str(run), *words[1:]]


def reject_assignments(words: Sequence[str]) -> None:
    """Raise ValueError for a word like `field=value` that is not an option's value, with the right way to write it."""
    for before, word in zip(["", *words], words, strict=False):
        match = re.fullmatch(r"([A-Za-z_][\w.-]*)=(.*)", word, re.DOTALL)
        if match and not before.startswith("--"):
            name, value = match.groups()
            raise ValueError(f"{word!r}: write --{name.replace('_', '-')} {value}")


def load_config_file(path: str, arm: str | None = None) -> Experiment:
    """The `config` that a Python file defines, or what its function `arm` returns for one of its `ARMS` (case does not
    matter). Raises FileNotFoundError naming near files, or ValueError."""
    file = pathlib.Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else pathlib.Path("configs")
        there = sorted(str(other) for other in folder.glob("*.py"))
        near = difflib.get_close_matches(path, there, n=3, cutoff=0.4) or there
        raise FileNotFoundError(f"config file {path} does not exist; there are: {', '.join(near) or 'none'}")
    if file.suffix != ".py":
        raise ValueError(f"config file {path}: must be a Python file that defines `config = Experiment(...)`")
    try:
        defined = runpy.run_path(str(file))
        config = defined.get("config") if arm is None else _choose_arm(path, defined, arm)
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from error
    except (ValueError, TypeError, LookupError, ImportError, NameError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {_message(error)}") from error
    if not isinstance(config, Experiment):
        raise ValueError(f"{path}: defines no `config = Experiment(...)` (config is {type(config).__name__})")
    return config


def _choose_arm(path: str, defined: dict[str, Any], arm: str) -> Experiment:
    known = {name.lower(): name for name in defined.get("ARMS", ())}
    if arm.lower() not in known:
        raise ValueError(f"--arm {arm}: it has {', '.join(known.values()) or 'no arms'}")
    return defined["arm"](known[arm.lower()])


def _message(error: BaseException) -> str:
    # str() of a KeyError is the repr of its message.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _fail(message: str, code: int) -> int:
    try:
        print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr, flush=True)
    except OSError:
        # The terminal is gone; what Python still holds for it would turn the exit code into 120.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    if code not in (INTERRUPTED, NOT_FINITE) and several_processes():
        # All others wait for this one, and an ordinary exit would wait for them; that it is gone they notice.
        os._exit(code)
    return code
