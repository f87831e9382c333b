"""Command line of the evaluation program.

Everything that can be wrong with a request is found before anything is written or compiled; such an error is one line
on standard error and exit code 2.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from eval.evaluate import Evaluation, check_split, evaluate_split
from eval.plots import plot_accuracies, plot_forced_thoughts
from eval.report import Row, accuracy_table, cost_table, log_test_use, save_results, seed_lines
from eval.samples import Samples, grouped, repeated, sample_table, save_samples, summarise
from latentjax.methods import LaDiR
from latentjax.rollout import Intervention, Sampling
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec
from train.cli import BAD_INPUT, reject_assignments
from train.run import LoadedRun, enable_compilation_cache, load_run

REDIRECTED_WIDTH = 140  # characters of a table that goes to a file or a pipe; at 80 its intervals would be cut


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How a method that generates its thoughts step by step (LaDiR) does so, where it is not as its config says."""

    steps: int | None = None
    """Solver steps of a block."""
    solver: Literal["euler", "heun", "midpoint"] | None = None
    """Order 1 (euler) or 2, with twice the forward passes a step."""
    guidance: float | None = None
    """Weight of the question; 1 is none."""
    noise_scale: float | None = None
    """Standard deviation of the noise that a block starts from."""
    repulsion: float | None = None
    """Strength of the force between the samples of a problem; needs --samples."""
    repulsion_form: Literal["paper", "slotwise", "early_text", "released"] | None = None
    """See latentjax/thoughts/flow.py."""

    def given(self) -> dict[str, Any]:
        """The fields that were set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluate trained runs: accuracy with 95% Wilson intervals, unparsable answers, costs; saves every prediction.

    Writes RUN/eval/SPLIT-CHECKPOINT[-oracleN][-kK|-curve][-samplesN].json, the predictions beside it as .jsonl, and plots as
    .png. Earlier results are kept: a second evaluation gets a numbered name. Each use of a test split is logged in
    RUN/eval/test_uses.jsonl before it happens.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    split: str = "valid"
    """Split of the run's task."""
    count: int | None = None
    """Number of problems. A generated split needs one; a published split is whole without."""
    batch: int = 64
    """Problems per call; with --samples a call has BATCH x SAMPLES rows."""
    samples: int | None = None
    """Answers to each problem, for pass@k and the number of different right ones; give a temperature, too."""
    thoughts: int | Literal["best"] | None = None
    """Number of thoughts instead of the method's own; "best": the most accurate one of the run's newest forced-k curve
    on the experiment's validation split at the same checkpoint (the smallest of equals)."""
    forced_k: int | None = None
    """Evaluate with 0, 1, ..., FORCED_K thoughts and plot the curve."""
    oracle_blocks: int | None = None
    """Put the encoder's thoughts in the place of the model's own in so many blocks, from the first one on (LaDiR)."""
    checkpoint: str = "last"
    """last, best (by validation during training) or a step."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    min_p: float = 0.0
    """Sample from tokens at least this probable relative to the best."""
    sampler: SamplerOptions = SamplerOptions()
    """Only of methods that have one."""
    seed: int = 0
    """Of sampling."""
    data_seed: int = 0
    """Of a generated split: runs evaluated with the same seed see the same problems."""
    device_time: bool = False
    """Also measure seconds per problem, at this batch and at batch 1."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One run, loaded and checked: what will be evaluated."""

    path: Path
    run: LoadedRun
    examples: Sequence[Example]
    thoughts: tuple[int | None, ...]  # requested numbers; None: the method's own
    oracle: Intervention | None  # of each problem


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit code."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=REDIRECTED_WIDTH)
    try:
        options = parse(arguments)
        enable_compilation_cache()
        requests = [prepare(path, options) for path in options.runs]
    except (ValueError, KeyError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT
    command = shlex.join(["python", "-m", "eval", *arguments])
    title = f"{options.split}, checkpoint {options.checkpoint}"
    if options.samples is not None:
        sampled = [sample_request(request, options, options.samples, command) for request in requests]
        lines = [(request.path.name, result) for request, (_, result) in zip(requests, sampled, strict=True)]
        console.print(sample_table(lines, f"{title}, {options.samples} samples a problem"))
        for path, _ in sampled:
            console.print(f"wrote {path}", soft_wrap=True)
        return 0
    done = [(request, evaluate_request(request, options, command)) for request in requests]
    rows = [
        _row(request, options.split, k, evaluation)
        for request, (_, evaluations) in done
        for k, evaluation in evaluations.items()
    ]
    console.print(accuracy_table(rows, title))
    console.print(cost_table(rows, "means per problem"))
    for line in seed_lines(rows):
        console.print(line)
    for path in [path for _, (path, _) in done] + _plot(done, rows, options):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Options of a command line.

    Raises ValueError for `field=value` words and values out of range; what tyro rejects (unknown fields, wrong types)
    leaves by SystemExit with code 2 and a message on standard error."""
    reject_assignments(arguments)
    options = tyro.cli(Options, args=arguments, prog="python -m eval")
    if not options.runs:
        raise ValueError("runs: name at least one run directory")
    if options.thoughts is not None and options.forced_k is not None:
        raise ValueError(f"thoughts={options.thoughts} and forced_k={options.forced_k}: give one of them")
    if options.samples is not None and (options.forced_k is not None or options.device_time):
        raise ValueError(f"samples={options.samples}: goes with one number of thoughts and without device_time")
    if options.sampler.repulsion and (options.samples or 1) < 2:
        raise ValueError(
            f"sampler.repulsion={options.sampler.repulsion}: acts between the samples of a problem; give --samples"
        )
    for field in ("count", "batch", "samples"):
        if (value := getattr(options, field)) is not None and value < 1:
            raise ValueError(f"{field}={value}: an evaluation needs at least 1")
    if options.forced_k is not None and options.forced_k < 0:
        raise ValueError(f"forced_k={options.forced_k}: must not be negative")
    _sampling(options)
    return options


def prepare(path: Path, options: Options) -> Request:
    """Load a run and check that it can be evaluated as asked; compiles and writes nothing."""
    run = with_sampler(load_run(path, checkpoint=options.checkpoint), options.sampler)
    task, method = run.experiment.task, run.experiment.method
    examples = task.examples(options.split, count=options.count, seed=options.data_seed)
    if options.count is not None and len(examples) != options.count:
        raise ValueError(f"count={options.count}: split {options.split!r} of {task.name} has {len(examples)} problems")
    if options.forced_k is not None:
        numbers: tuple[int | None, ...] = tuple(range(options.forced_k + 1))
    elif options.thoughts == "best":
        numbers = (best_thoughts(path, run.experiment.valid_split, run.step),)
    else:
        numbers = (options.thoughts,)
    # The largest number needs the most positions.
    samples = options.samples or 1
    check_split(
        grouped(method, samples), run.params, task, run.tokenizer, examples, batch_size=options.batch * samples,
        thoughts=numbers[-1], sampling=_sampling(options), chat=run.experiment.chat,
    )  # fmt: skip
    return Request(path, run, examples, numbers, oracle(run, examples, options.oracle_blocks))


def oracle(run: LoadedRun, examples: Sequence[Example], blocks: int | None) -> Intervention | None:
    """Reference thoughts in the first `blocks` blocks. Raises ValueError if the method has none."""
    method = run.experiment.method
    if blocks is None:
        return None
    if not isinstance(method, LaDiR):
        raise ValueError(
            f"oracle_blocks={blocks}: {method.name} has no encoder that makes reference thoughts; LaDiR has"
        )
    return method.oracle(
        run.params, examples, Codec(run.tokenizer, run.experiment.task.format, run.experiment.chat), blocks
    )


def with_sampler(run: LoadedRun, options: SamplerOptions) -> LoadedRun:
    """`run` with another sampler of its method. Raises ValueError if the method has none."""
    given, method = options.given(), run.experiment.method
    sampler: Any = getattr(method, "sampler", None)
    if not given:
        return run
    if sampler is None:
        raise ValueError(f"sampler={given}: {method.name} has no sampler; only latent diffusion has one")
    method = dataclasses.replace(method, sampler=dataclasses.replace(sampler, **given))
    return dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, method=method))


def best_thoughts(path: Path, split: str, step: int) -> int:
    """The most accurate number of thoughts of the newest forced-k curve on the validation split `split` at `step`.

    Of equals the smallest. Raises ValueError if there is no such curve."""
    newest: list[Mapping[str, Any]] = []
    for file in sorted((path / "eval").glob("*-curve*.json"), key=lambda file: file.stat().st_mtime_ns):
        content = json.loads(file.read_text())
        if content["split"] == split and content["step"] == step:
            newest = content["results"]
    if not newest:
        raise ValueError(
            f"thoughts=best: {path} has no forced-k curve on {split} at step {step}; first run "
            f"python -m eval {path} --split {split} --forced-k K"
        )
    return max(newest, key=lambda result: (result["accuracy"], -result["requested_thoughts"]))["requested_thoughts"]


def evaluate_request(request: Request, options: Options, command: str) -> tuple[Path, dict[int | None, Evaluation]]:
    """Log the use of test data, evaluate every requested number of thoughts, save; returns the result file as well."""
    _log(request, options, command)
    evaluations = {k: _evaluate(request, options, request.examples, k) for k in request.thoughts}
    header = _header(request, options, command)
    return save_results(request.path / "eval", _stem(request, options), header, evaluations), evaluations


def sample_request(request: Request, options: Options, samples: int, command: str) -> tuple[Path, Samples]:
    """The same with so many answers to each problem."""
    _log(request, options, command)
    (thoughts,) = request.thoughts
    evaluation = _evaluate(request, options, repeated(request.examples, samples), thoughts, samples)
    result = summarise(request.run.experiment.task, evaluation, samples)
    header = _header(request, options, command) | {"requested_thoughts": thoughts}
    return save_samples(request.path / "eval", _stem(request, options), header, result), result


def _evaluate(
    request: Request, options: Options, examples: Sequence[Example], thoughts: int | None, samples: int = 1
) -> Evaluation:
    """On examples of which each problem has `samples` in a row."""
    run, experiment = request.run, request.run.experiment
    intervention = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), request.oracle)
    return evaluate_split(
        grouped(experiment.method, samples), run.params, experiment.task, run.tokenizer, examples,
        batch_size=options.batch * samples, key=jax.random.key(options.seed), thoughts=thoughts,
        sampling=_sampling(options), intervention=intervention, time=options.device_time, chat=experiment.chat,
    )  # fmt: skip


def _log(request: Request, options: Options, command: str) -> None:
    log_test_use(
        request.path, split=options.split, checkpoint=options.checkpoint, step=request.run.step,
        thoughts=list(request.thoughts), command=command,
    )  # fmt: skip


def _header(request: Request, options: Options, command: str) -> dict[str, Any]:
    """What was evaluated, ready for JSON."""
    run, experiment = request.run, request.run.experiment
    return {
        "run": experiment.name, "method": experiment.method.name, "task": experiment.task.name,
        "training_seed": experiment.seed, "split": options.split, "checkpoint": options.checkpoint, "step": run.step,
        "count": len(request.examples), "data_seed": options.data_seed, "seed": options.seed, "batch": options.batch,
        "sampling": dataclasses.asdict(_sampling(options)), "device": jax.devices()[0].device_kind,
        "jax": jax.__version__, "command": command, "sampler": options.sampler.given(), "oracle_blocks": options.oracle_blocks,
    }  # fmt: skip


def _sampling(options: Options) -> Sampling:
    """Raises ValueError naming a value out of range."""
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p)


def _stem(request: Request, options: Options) -> str:
    stem = f"{options.split}-{options.checkpoint}"
    stem += "" if options.oracle_blocks is None else f"-oracle{options.oracle_blocks}"
    if options.forced_k is not None:
        return f"{stem}-curve"
    return stem if request.thoughts[0] is None else f"{stem}-k{request.thoughts[0]}"


def _row(request: Request, split: str, thoughts: int | None, evaluation: Evaluation) -> Row:
    experiment = request.run.experiment
    name = request.path.name if thoughts is None else f"{request.path.name}, k={thoughts}"
    return Row(name, experiment.name, experiment.method.name, experiment.seed, split, thoughts, evaluation)


def _plot(
    done: Sequence[tuple[Request, tuple[Path, dict[int | None, Evaluation]]]], rows: Sequence[Row], options: Options
) -> list[Path]:
    """A forced-k curve per run, or the accuracies of all runs together beside the first run's result."""
    title = f"{options.split}, checkpoint {options.checkpoint}"
    if options.forced_k is None:
        path = done[0][1][0].with_suffix(".png")
        plot_accuracies(rows, path, title)
        return [path]
    written = []
    for request, (path, evaluations) in done:
        curve = {k: evaluation for k, evaluation in evaluations.items() if k is not None}
        plot_forced_thoughts({request.path.name: curve}, path.with_suffix(".png"), title)
        written.append(path.with_suffix(".png"))
    return written
