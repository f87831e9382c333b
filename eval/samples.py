"""Repeated sampling: several answers to each problem, pass@k, and how many different solutions are among them.

pass@k is the unbiased estimator of arXiv:2107.03374 (eq. 1), averaged over problems; its interval is one over problems. Samples
differ by what a method draws: tokens at a temperature above 0, noise in its thoughts. A deterministic method at temperature 0
gives one answer many times.

All samples of a problem are in the same batch, one after another, because a method may couple them (LaDiR, arXiv:2510.04573,
pushes the samples of a problem apart): one with a field `group` is told there how many they are.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.evaluate import Evaluation, Prediction
from eval.report import interval_text, percent, write_results
from latentjax.methods.base import Method
from latentjax.metrics import mean_and_error, mean_interval, pass_at_k
from latentjax.tasks.base import Example, Task

BUDGETS = (1, 10, 100)  # the k of pass@k


@dataclasses.dataclass(frozen=True)
class Pass:
    """pass@k, and its 95% interval over problems (`latentjax.metrics.mean_interval`)."""

    k: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Samples:
    """Result of `samples` answers to each of `n` problems. Costs are means per answer."""

    n: int
    samples: int
    passes: tuple[Pass, ...]  # for the budgets up to `samples`
    unparsable_rate: float  # of all answers
    # Different right solutions per problem; None if the task has no canonical form.
    distinct: float | None
    distinct_error: float | None  # standard error over problems; None for a single one
    thoughts: float
    forwards: float
    positions: float
    answer_tokens: float
    problems: tuple["Problem", ...] = dataclasses.field(repr=False)

    def figures(self) -> dict[str, Any]:
        """The figures alone, ready for JSON."""
        figures = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "problems"}
        return figures | {"passes": [dataclasses.asdict(p) for p in self.passes]}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The answers to one problem, ready for JSON."""

    question: str
    reference: str
    correct: int
    distinct: int | None
    reasons: str  # the first letter of each answer's: r(ight), w(rong), u(nparsable)
    texts: tuple[str, ...]


def grouped(method: Method, samples: int) -> Method:
    """`method`, told in its field `group`, if it has one, that so many rows after another belong to one problem."""
    if any(field.name == "group" for field in dataclasses.fields(method)):
        return dataclasses.replace(method, group=samples)
    return method


def repeated(examples: Sequence[Example], samples: int) -> list[Example]:
    """Each example `samples` times, one after another.

    A batch of a multiple of `samples` rows, filled up from the first row on, then holds whole problems only."""
    return [example for example in examples for _ in range(samples)]


def summarise(task: Task, evaluation: Evaluation, samples: int) -> Samples:
    """What `evaluate_split` found on `repeated` examples, problem by problem."""
    rows = evaluation.predictions
    problems = tuple(_problem(task, rows[start : start + samples]) for start in range(0, len(rows), samples))
    distinct = [float(problem.distinct) for problem in problems if problem.distinct is not None]
    mean, error = mean_and_error(distinct) if distinct else (None, None)
    return Samples(
        n=len(problems),
        samples=samples,
        passes=tuple(_pass(problems, samples, k) for k in BUDGETS if k <= samples),
        unparsable_rate=evaluation.unparsable_rate,
        distinct=mean,
        distinct_error=error if len(distinct) > 1 else None,
        thoughts=evaluation.thoughts,
        forwards=evaluation.forwards,
        positions=evaluation.positions,
        answer_tokens=evaluation.answer_tokens,
        problems=problems,
    )


def _problem(task: Task, rows: Sequence[Prediction]) -> Problem:
    """The rows of one problem."""
    right = [row.text for row in rows if row.correct]
    countable = task.canonical(task.format.answer.format(rows[0].reference)) is not None
    return Problem(
        question=rows[0].question,
        reference=rows[0].reference,
        correct=len(right),
        distinct=len(set(map(task.canonical, right))) if countable else None,
        reasons="".join(row.reason[0] for row in rows),
        texts=tuple(row.text for row in rows),
    )


def _pass(problems: Sequence[Problem], samples: int, k: int) -> Pass:
    values = [pass_at_k(samples, problem.correct, k) for problem in problems]
    return Pass(k, statistics.fmean(values), *mean_interval(values))


def save_samples(folder: Path, stem: str, header: dict[str, Any], result: Samples) -> Path:
    """Write `stem`-samplesN.json (header and figures) and .jsonl (a line per problem with every text) under a free name;
    returns the former's path."""
    content = {**header, "results": [result.figures()]}
    return write_results(folder, f"{stem}-samples{result.samples}", content, map(dataclasses.asdict, result.problems))


def sample_table(rows: Sequence[tuple[str, Samples]], title: str) -> Table:
    """pass@k with its interval, a line per run."""
    table = Table(title=title, caption="intervals: 95%, over problems")
    table.add_column("run", no_wrap=True)
    for name in ("n", *(f"pass@{p.k} %" for p in rows[0][1].passes), "unparsable %", "different right answers"):
        table.add_column(name, justify="right")
    for name, result in rows:
        passes = [f"{percent(p.value)} ({interval_text(p.low, p.high)})" for p in result.passes]
        distinct = "-" if result.distinct is None else f"{result.distinct:.2f}"
        if result.distinct_error is not None:
            distinct += f" ± {result.distinct_error:.2f}"
        table.add_row(name, str(result.n), *passes, percent(result.unparsable_rate), distinct)
    return table
