"""What an evaluation leaves behind: result files, saved predictions, the log of test-set uses, and a table."""

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.evaluate import Evaluation
from latentjax.metrics import mcnemar, mean_and_error

TEST_USES = "test_uses.jsonl"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: an evaluation and what was evaluated."""

    run: str  # its label
    experiment: str
    method: str
    seed: int
    split: str
    thoughts: int | None  # as requested
    evaluation: Evaluation


def log_test_use(run: Path, *, split: str, checkpoint: str, step: int, thoughts: Any, command: str) -> None:
    """Append one line to `run`/eval/test_uses.jsonl if `split` is a test split.

    To be called before the evaluation, so that an interrupted look at the test data counts too."""
    if "test" not in split:
        return
    folder = run / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    what = {"split": split, "checkpoint": checkpoint, "step": step, "thoughts": thoughts}
    line = {"time": _now(), **what, "command": command}
    with (folder / TEST_USES).open("a") as file:
        file.write(json.dumps(line) + "\n")


def free_stem(folder: Path, stem: str) -> str:
    """`stem`, or the first of `stem`-2, `stem`-3, ... that names no result in `folder` yet."""
    taken = {path.stem for path in folder.glob("*.json*")}
    number = 1
    while (candidate := stem if number == 1 else f"{stem}-{number}") in taken:
        number += 1
    return candidate


def save_results(
    folder: Path, stem: str, header: Mapping[str, Any], evaluations: Mapping[int | None, Evaluation]
) -> Path:
    """Write `stem`.json (header and figures) and `stem`.jsonl (every prediction) under a free name.

    Args:
        header: what was evaluated, ready for JSON.
        evaluations: by requested number of thoughts (None: the method's own number).

    Returns:
        The path of the JSON file.
    """
    lines = (
        {"requested_thoughts": requested, **dataclasses.asdict(prediction)}
        for requested, evaluation in evaluations.items()
        for prediction in evaluation.predictions
    )
    results = [{"requested_thoughts": k, **evaluation.figures()} for k, evaluation in evaluations.items()]
    return write_results(folder, stem, {**header, "results": results}, lines)


def write_results(folder: Path, stem: str, content: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write `stem`.json (`content` and the time) and `stem`.jsonl (`lines`) under a free name; returns the former's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{free_stem(folder, stem)}.json"
    with path.with_suffix(".jsonl").open("x") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    # Written last: a JSON file means that its lines are complete.
    with path.open("x") as file:
        json.dump({"time": _now(), **content}, file, indent=2)
        file.write("\n")
    return path


def accuracy_table(rows: Sequence[Row], title: str) -> Table:
    """Accuracy with its interval, a line per evaluation; with several lines, each is tested against the first."""
    table = Table(title=title)
    table.add_column("run", no_wrap=True)
    for name in ("n", "correct", "accuracy %", "95% Wilson", "unparsable", *["McNemar p"] * (len(rows) > 1)):
        table.add_column(name, justify="right")
    for row in rows:
        e = row.evaluation
        interval, test = interval_text(e.low, e.high), [_paired(rows[0], row)] * (len(rows) > 1)
        table.add_row(row.run, str(e.n), str(e.correct), percent(e.accuracy), interval, str(e.unparsable), *test)
    if len(rows) > 1:
        table.caption = f"p: McNemar's exact test against {rows[0].run}, on the same problems"
    return table


def cost_table(rows: Sequence[Row], title: str) -> Table:
    """Means per problem: thoughts, sequential forwards, positions, text tokens; and milliseconds where measured."""
    timed = any(row.evaluation.seconds_per_problem is not None for row in rows)
    table = Table(title=title)
    table.add_column("run", no_wrap=True)
    for name in ("thoughts", "forwards", "positions", "tokens", *["ms", "ms, batch 1"] * timed):
        table.add_column(name, justify="right")
    for row in rows:
        e = row.evaluation
        costs = [f"{cost:.1f}" for cost in (e.thoughts, e.forwards, e.positions, e.answer_tokens)]
        times = [_milliseconds(e.seconds_per_problem), _milliseconds(e.seconds_per_problem_batch1)] * timed
        table.add_row(row.run, *costs, *times)
    return table


def p_text(p: float) -> str:
    """A p-value with two digits; tiny ones as a bound."""
    return f"{p:.2g}" if p >= 1e-6 else "<1e-6"


def seed_lines(rows: Sequence[Row]) -> list[str]:
    """For what was evaluated with several training seeds: mean accuracy and its standard error, in words."""
    groups: dict[tuple[str, str, int | None], dict[int, float]] = {}
    for row in rows:
        groups.setdefault((row.experiment, row.split, row.thoughts), {})[row.seed] = row.evaluation.accuracy
    lines = []
    for (experiment, split, thoughts), by_seed in groups.items():
        if len(by_seed) > 1:
            name = experiment if thoughts is None else f"{experiment}, {thoughts} thoughts,"
            mean, error = mean_and_error(list(by_seed.values()))
            seeds = ", ".join(map(str, sorted(by_seed)))
            lines.append(
                f"{name} on {split}: {percent(mean)} ± {percent(error)} % (mean ± standard error, seeds {seeds})"
            )
    return lines


def percent(share: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * share:.1f}"


def interval_text(low: float, high: float) -> str:
    """An interval of fractions in percent."""
    return f"{percent(low)}-{percent(high)}"


def _paired(first: Row, other: Row) -> str:
    """McNemar's p against the table's first line, where both judged the same problems."""
    ours, theirs = first.evaluation.predictions, other.evaluation.predictions
    if other is first or [p.question for p in ours] != [p.question for p in theirs]:
        return "-"
    return p_text(mcnemar([p.correct for p in ours], [p.correct for p in theirs]))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
