"""The quickstart: train four arms, judge them on held-out problems, intervene on the thoughts, plot.

`python -m eval.quickstart [--seeds 0 1 2] [--only Coconut]`. A run that is already finished in the folder is evaluated
again without training.
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from configs.quickstart import ARMS, arm
from eval.controls import Controls, controls_table, run_controls
from eval.evaluate import Evaluation, evaluate_split
from eval.plots import plot_accuracies, plot_forced_thoughts, plot_shares, plot_training
from eval.report import Row, accuracy_table, cost_table, free_stem, log_test_use, save_results, seed_lines
from latentjax.rollout import Intervention
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec
from train.cli import BAD_INPUT, INTERRUPTED, reject_assignments
from train.config import Experiment
from train.log import read_metrics
from train.loop import Interrupted, train
from train.run import LoadedRun, check_run, enable_compilation_cache

BATCH = 128  # that of training, so that validation and evaluation share one program
DATA_SEED = 0  # all arms and seeds are judged on the same problems
TEST, VALID = "test", "valid"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

CAVEATS = """\
What these figures do not show:
- NoCoT and Pause fail with two layers and 1,000 steps. That more of either would not help is not shown.
- With fewer thoughts than trained, Coconut writes the missing steps as text (forced_thoughts.png: tokens per answer).
  Its accuracy alone therefore does not show that thoughts are used; the two interventions do.
- The thoughts are nearly the tokens that they replace (thoughts.png): this is a chain of thought in continuous form,
  not a superposition of several.
- Swapped thoughts carry the donor's answer over, but copying the last thought would be enough for that. Whether the
  earlier ones matter needs a swap of one of them.
- Unlike in Coconut's paper, no end marker follows the thoughts, and the backbone is trained from scratch.
- Held out means: a problem's hash decides its split, so no test problem was ever trained on.\
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train NoCoT, CoT, Pause and Coconut on a small task, evaluate them on held-out problems and plot."""

    seeds: tuple[int, ...] = (0,)
    """One training run of each arm per seed."""
    only: tuple[str, ...] = ARMS
    """Arms to run, by name."""
    folder: Path = Path("runs/quickstart")
    """Where runs, results and plots go."""
    count: int = 1000
    """Held-out problems."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Whether an arm's thoughts are used, and what happens with fewer of them."""

    controls: Controls
    curve: dict[int, Evaluation]  # by forced number of thoughts, on validation problems


@dataclasses.dataclass(frozen=True)
class Arm:
    """A trained arm and what its evaluation gave."""

    path: Path
    run: LoadedRun
    evaluation: Evaluation
    analysis: Analysis | None = None  # of an arm whose thoughts carry content

    @property
    def row(self) -> Row:
        experiment = self.run.experiment
        method = experiment.method.name
        return Row(self.path.name, experiment.name, method, experiment.seed, TEST, None, self.evaluation)


def main(arguments: Sequence[str], make: Callable[[str, int], Experiment] = arm) -> int:
    """Run the quickstart; returns the exit code. `make` builds the experiment of an arm from its name and a seed."""
    try:
        options = parse(arguments)
        experiments = [make(name, seed) for seed in options.seeds for name in options.only]
        for experiment in experiments:
            check_run(_run_path(options, experiment), experiment)
        experiments[0].task.examples(TEST, count=options.count, seed=DATA_SEED)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    enable_compilation_cache()
    console, start, compiling = Console(), time.perf_counter(), _listen_to_compiler()
    command = shlex.join(["python", "-m", "eval.quickstart", *arguments])
    try:
        arms = [run_arm(experiment, options, command, console) for experiment in experiments]
    except Interrupted as error:
        print(f"{error}\nor start the quickstart again: it goes on from there", file=sys.stderr)
        return INTERRUPTED
    written = [*write_results(options.folder, arms), *draw(options.folder, arms)]
    show(arms, f"successor list, {options.count} held-out problems", console)
    console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s in all, {sum(compiling):.0f} s of them compiling.")
    console.print(_next_steps(options, arms), highlight=False, soft_wrap=True)
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Options of a command line; arms by their classes' names, case-insensitive. Raises ValueError for bad values."""
    reject_assignments(arguments)
    options = tyro.cli(Options, args=list(arguments), prog="python -m eval.quickstart")
    known: dict[str, str] = {name.lower(): name for name in ARMS}
    for name in options.only:
        if name.lower() not in known:
            raise ValueError(f"only={name!r}: the arms are {', '.join(ARMS)}")
    for field in ("seeds", "only"):
        if not getattr(options, field):
            raise ValueError(f"{field}: name at least one")
    if min(options.seeds) < 0:
        raise ValueError(f"seeds={options.seeds}: a seed must not be negative")
    if options.count < 2:
        raise ValueError(f"count={options.count}: needs at least 2 problems, to swap thoughts between them")
    return dataclasses.replace(options, only=tuple(known[name.lower()] for name in options.only))


def run_arm(experiment: Experiment, options: Options, command: str, console: Console) -> Arm:
    """Train an arm unless it is finished, evaluate it on the test problems, save its predictions."""
    path = _run_path(options, experiment)
    console.print(f"[bold]{path}[/bold]", soft_wrap=True)
    trained = train(experiment, path, quiet=True)
    run = LoadedRun(experiment, trained.tokenizer, trained.params, trained.step)
    examples = experiment.task.examples(TEST, count=options.count, seed=DATA_SEED)

    def evaluate(intervention: Intervention | None = None, **choices: Any) -> Evaluation:
        return _evaluate(run, examples, intervention=intervention, **choices)

    def log(thoughts: str | None) -> None:
        log_test_use(path, split=TEST, checkpoint="last", step=run.step, thoughts=thoughts, command=command)

    log(None)
    evaluation = evaluate(time=True)
    results = {None: evaluation}
    header = {"run": experiment.name, "split": TEST, "checkpoint": "last", "step": run.step, "command": command}
    save_results(path / "eval", f"{TEST}-last", header, results)
    if experiment.method.name != "Coconut":
        return Arm(path, run, evaluation)
    log("clean, zeroed, swapped")
    codec = Codec(run.tokenizer, experiment.task.format)
    controls = run_controls(
        experiment.method, run.params, experiment.task, codec, examples,
        lambda intervention: evaluate(intervention, keep_vectors=True),
    )  # fmt: skip
    return Arm(path, run, evaluation, Analysis(controls, _curve(run, options.count)))


def _run_path(options: Options, experiment: Experiment) -> Path:
    return options.folder / f"{experiment.method.name}-seed{experiment.seed}"


def _evaluate(run: LoadedRun, examples: Sequence[Example], **choices: Any) -> Evaluation:
    experiment = run.experiment
    return evaluate_split(
        experiment.method, run.params, experiment.task, run.tokenizer, examples, batch_size=BATCH,
        key=jax.random.key(0), **choices,
    )  # fmt: skip


def _curve(run: LoadedRun, count: int) -> dict[int, Evaluation]:
    """Accuracy with 0, 1, ... thoughts; on validation problems, because it could guide a choice."""
    examples = run.experiment.task.examples(VALID, count=count, seed=DATA_SEED)
    return {k: _evaluate(run, examples, thoughts=k) for k in range(run.experiment.method.max_thoughts() + 1)}


def write_results(folder: Path, arms: Sequence[Arm]) -> list[Path]:
    """results.json (a record per arm) and controls.json; earlier ones are kept under a numbered name."""
    records = [{"method": a.row.method, "seed": a.row.seed, **_fixed_figures(a.evaluation)} for a in arms]
    written = [_write_json(folder / "results.json", records)]
    content = [
        {
            "method": a.row.method,
            "seed": a.row.seed,
            **a.analysis.controls.record(),
            "forced_thoughts": [{"thoughts": k, **e.figures()} for k, e in a.analysis.curve.items()],
        }
        for a in arms
        if a.analysis is not None
    ]
    if content:
        written.append(_write_json(folder / "controls.json", content))
    return written


def _fixed_figures(evaluation: Evaluation) -> dict[str, Any]:
    names = (
        "n", "correct", "accuracy", "low", "high", "unparsable", "forwards", "positions",
        "seconds_per_problem_batch1", "seconds_per_problem",
    )  # fmt: skip
    return {name: getattr(evaluation, name) for name in names}


def _write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(path.with_name(f"{free_stem(path.parent, path.stem)}.json"))
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def draw(folder: Path, arms: Sequence[Arm]) -> list[Path]:
    """The plots; returns their paths."""
    paths = {name: folder / f"{name}.png" for name in ("accuracy", "training", "forced_thoughts", "thoughts")}
    plot_accuracies([a.row for a in arms], paths["accuracy"], "successor list, held-out problems")
    plot_training({a.path.name: training_losses(a.path) for a in arms}, paths["training"], "training")
    analyses = {a.path.name: a.analysis for a in arms if a.analysis is not None}
    if not analyses:
        return [paths["accuracy"], paths["training"]]
    curves = {name: analysis.curve for name, analysis in analyses.items()}
    plot_forced_thoughts(curves, paths["forced_thoughts"], "fewer thoughts than trained, validation problems")
    spelled = {name: analysis.controls.spelled for name, analysis in analyses.items()}
    plot_shares(spelled, paths["thoughts"], "thought i is nearest to the token of step i")
    return list(paths.values())


def training_losses(run: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses that a run logged."""
    records = read_metrics(run, "train")
    return [record["step"] for record in records], [record["loss"] for record in records]


def show(arms: Sequence[Arm], title: str, console: Console) -> None:
    """Print the tables and what they do not show."""
    rows = [a.row for a in arms]
    console.print(accuracy_table(rows, title))
    console.print(cost_table(rows, "means per problem"))
    for line in seed_lines(rows):
        console.print(line)
    for a in arms:
        if a.analysis is not None:
            console.print(controls_table(a.analysis.controls, a.path.name))
    console.print(CAVEATS, highlight=False, soft_wrap=True)


def _listen_to_compiler() -> list[float]:
    """A list that grows by the seconds of every compilation from now on."""
    seconds: list[float] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return seconds


def _next_steps(options: Options, arms: Sequence[Arm]) -> str:
    run = next((a.path for a in arms if a.analysis is not None), arms[0].path)
    return (
        "Next:\n"
        "  python -m eval.quickstart --seeds 0 1 2        (three seeds; finished runs are not trained again)\n"
        f"  python -m eval {run} --split valid --count {options.count} --forced-k 4\n"
        "  python -m train configs/quickstart.py --method.markers both --run runs/both-markers\n"
        "  docs/methods_howto.md                          (add a method: one file)"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
