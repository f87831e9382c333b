"""Repeated sampling: pass@k and different right answers against their definitions, on answers that are known."""

import dataclasses
import itertools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from eval.evaluate import Evaluation, Prediction, evaluate_split
from eval.samples import grouped, repeated, sample_table, save_samples, summarise
from latentjax.metrics import wilson
from latentjax.rollout import Generation
from latentjax.tasks.base import Example
from latentjax.tasks.countdown import Countdown
from tests.eval.fake import FIRST, NOISE_ID, Echo, Known, NumberTokenizer, known


@dataclasses.dataclass(frozen=True)
class Coupled(Known):
    """Of the `group` rows of a problem that is answered by n, the first n are right. Noise if they are not one problem's."""

    group: int = 1

    def generate(self, params: Any, prompts, key, **options: Any) -> Generation:
        plain = super().generate(params, prompts, key, **options)
        batch, length = prompts.question.shape
        assert batch % self.group == 0
        problems = prompts.question.reshape(-1, self.group, length)
        whole = jnp.repeat((problems == problems[:, :1]).all((1, 2)), self.group)
        said = plain.tokens[:, length + 1]
        right = jnp.arange(batch) % self.group < said - FIRST
        tokens = plain.tokens.at[:, length + 1].set(jnp.where(right, said, said + 1))
        return plain.replace(tokens=tokens.at[:, length].set(jnp.where(whole, tokens[:, length], NOISE_ID)))


def sampled(method, examples, samples, batch):
    evaluation = evaluate_split(
        grouped(method, samples), {}, Echo(), NumberTokenizer(), repeated(examples, samples),
        batch_size=batch * samples, key=jax.random.key(0),
    )  # fmt: skip
    return summarise(Echo(), evaluation, samples)


def coupled():
    return Coupled(**{field.name: getattr(known(), field.name) for field in dataclasses.fields(Known)})


@pytest.mark.parametrize(("samples", "batch"), [(1, 4), (3, 1), (10, 4), (12, 40)])
def test_passes_are_shares_of_all_subsets(samples, batch):
    examples = Echo().examples("valid", count=13)  # answers 0..12
    result = sampled(coupled(), examples, samples, batch)
    assert (result.n, result.samples, result.unparsable_rate) == (13, samples, 0)
    counts = [min(int(e.answer), samples) for e in examples]
    assert [p.correct for p in result.problems] == counts
    assert [p.k for p in result.passes] == [k for k in (1, 10, 100) if k <= samples]
    for found in result.passes:
        shares = []
        for count in counts:
            right = [True] * count + [False] * (samples - count)
            shares.append(statistics.fmean(map(any, itertools.combinations(right, found.k))))
        assert found.value == pytest.approx(statistics.fmean(shares), abs=1e-12)
        half = 1.959963984540054 * statistics.stdev(shares) / 13**0.5
        assert (found.low, found.high) == pytest.approx((max(0, found.value - half), min(1, found.value + half)))


def test_answers_stay_with_their_problem_in_order():
    examples = Echo().examples("valid", count=5)
    result = sampled(coupled(), examples, 4, batch=2)
    for example, problem in zip(examples, result.problems, strict=True):
        right = int(example.answer)
        assert (problem.question, problem.reference) == (example.question, example.answer)
        assert problem.texts == (f"= {right}",) * right + (f"= {right + 1}",) * (4 - right)
        assert problem.reasons == "r" * right + "w" * (4 - right)


def test_a_method_without_groups_is_left_alone():
    assert grouped(known(), 5) == known()
    assert grouped(coupled(), 5).group == 5


def evaluation_of(task, answers):
    """An `Evaluation` of the texts `answers[i]` to example i."""
    predictions = []
    for example, texts in answers:
        for text in texts:
            verdict = task.verify(example, text)
            predictions.append(
                Prediction(example.question, example.answer, text, verdict.parsed, str(verdict.reason), "", 0, 1, 1, 1)
            )
    n, correct = len(predictions), sum(p.correct for p in predictions)
    unparsable = sum(p.reason == "unparsable" for p in predictions)
    return Evaluation(
        n,
        correct,
        correct / n,
        0.0,
        1.0,
        unparsable,
        unparsable / n,
        0.0,
        1.0,
        1.0,
        1.0,
        None,
        None,
        tuple(predictions),
    )


def test_different_right_answers_are_counted_once():
    task = Countdown(4)
    first, second = (
        Example("", (), "1+2=3", meta)
        for meta in ({"inputs": (1, 2, 3, 4), "target": 10}, {"inputs": (1, 1, 1, 1), "target": 4})
    )
    answers = [
        (first, ("1+2=3,3+3=6,6+4=10", "2+1=3,3+3=6,4+6=10", "1+2=3,3+4=7,3+7=10", "3+4=7,1+2=3,7+3=10", "1+2=4", "?")),
        (second, ("1+1=2", "1+1=2,1+1=2,2*2=5", "", "1", "2", "3")),
    ]
    result = summarise(task, evaluation_of(task, answers), 6)
    assert [p.distinct for p in result.problems] == [2, 0]
    assert [p.reasons for p in result.problems] == ["rrrrwu", "wwuuuu"]
    assert (result.distinct, result.distinct_error) == (1.0, 1.0)
    assert result.passes[0].value == pytest.approx(2 / 6)


def test_a_task_without_a_canonical_form_counts_none():
    result = sampled(coupled(), Echo().examples("valid", count=3), 2, batch=2)
    assert result.distinct is None
    assert {p.distinct for p in result.problems} == {None}


def test_interval_when_every_problem_is_solved():
    result = sampled(known(), Echo().examples("valid", count=6), 2, batch=4)
    assert (result.passes[0].value, result.passes[0].low, result.passes[0].high) == (1.0, *wilson(6, 6))


def test_saved_files_hold_every_text_and_the_table_every_figure(tmp_path):
    examples = Echo().examples("valid", count=5)
    result = sampled(coupled(), examples, 10, batch=2)
    path = save_samples(tmp_path, "valid-last", {"seed": 3}, result)
    assert path.name == "valid-last-samples10.json"
    saved = json.loads(path.read_text())
    assert (saved["seed"], saved["results"][0]["n"], saved["results"][0]["samples"]) == (3, 5, 10)
    assert [p["k"] for p in saved["results"][0]["passes"]] == [1, 10]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [len(line["texts"]) for line in lines] == [10] * 5
    assert [line["correct"] for line in lines] == [0, 1, 2, 3, 4]
    table = sample_table([("a", result)], "title")
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:2] == ["a", "5"]
    assert cells[2].startswith("20.0 (")  # 0, 1, 2, 3, 4 of 10
    assert cells[3].startswith("80.0 (")  # all but the first are solved once
