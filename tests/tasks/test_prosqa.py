"""ProsQA: released files, generated problems beside them, verifier and classes of outcome."""

import json
import subprocess
import sys

import numpy as np
import pytest

from latentjax.tasks import prosqa
from latentjax.tasks.base import Example, Reason
from latentjax.tasks.graphs import GraphProblem, hashes, layers
from latentjax.tasks.prosqa import Outcome, ProsQA, classify, problem_of, released_hashes
from latentjax.tasks.prosqa_statistics import isomorphic_pairs, rows

TASK = ProsQA()
RECORD = {
    "question": "Tom is a impus. Every impus is a lempus. Every lempus is a rorpus. Sam is a yimpus. "
    "Is Tom a rorpus or yimpus?",
    "steps": ["Tom is a impus.", "Every impus is a lempus.", "Every lempus is a rorpus."],
    "answer": "Tom is a rorpus.",
    "idx_to_symbol": ["Tom", "Sam", "impus", "lempus", "rorpus", "yimpus"],
    "edges": [[0, 2], [2, 3], [3, 4], [1, 5]],
    "root": 0,
    "target": 4,
    "neg_target": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def released(published) -> list[Example]:
    return [*TASK.examples("valid"), *TASK.examples("test")]


@pytest.fixture(scope="module")
def generated(published) -> list[Example]:
    return list(TASK.examples("train", count=1500, seed=0))


def written(example):
    return "\n".join(example.steps) + "\n### " + example.answer


def test_released_files_are_read_as_released(published, released):
    raw = [
        record for split in ("valid", "test") for record in json.loads((published / f"prosqa_{split}.json").read_text())
    ]
    assert len(released) == 800
    for example, record in zip(released, raw, strict=True):
        assert (example.question, list(example.steps), example.answer) == (
            record["question"], record["steps"], record["answer"],
        )  # fmt: skip
        assert example.meta["edges"].tolist() == record["edges"]
    assert [e.question for e in TASK.examples("test", count=3)] == [r["question"] for r in raw[300:303]]
    with pytest.raises(ValueError, match="count=501: the published split 'test' has 500"):
        TASK.examples("test", count=501)


@pytest.mark.parametrize("kind", ["released", "generated"])
def test_reference_chains_are_right_and_corrupted_ones_are_not(kind, request):
    rng = np.random.default_rng(0)
    for example in request.getfixturevalue(kind)[:300]:
        verdict = TASK.verify(example, written(example))
        assert verdict.correct
        assert verdict.detail == Outcome.CORRECT_PATH
        assert TASK.verify(example, "### " + example.answer).detail == Outcome.CORRECT_LABEL
        names, meta = example.meta["names"], example.meta
        wrong = f"{names[meta['root']]} is a {names[meta['neg_target']]}."
        assert TASK.verify(example, "### " + wrong).reason is Reason.WRONG
        cut = int(rng.integers(len(example.steps)))
        steps = [
            *example.steps[:cut],
            f"Every {names[meta['target']]} is a {names[meta['neg_target']]}.",
            *example.steps[cut + 1 :],
        ]
        assert classify(example, "\n".join(steps) + "\n### " + example.answer) is Outcome.HALLUCINATION


def test_questions_state_the_graph(released, generated):
    for example in [*released, *generated[:300]]:
        names = example.meta["names"]
        statements, _, query = example.question.rpartition(" Is ")
        stated = {tuple(s.removeprefix("Every ").split(" is a ")) for s in statements.removesuffix(".").split(". ")}
        assert stated == {(names[a], names[b]) for a, b in example.meta["edges"].tolist()}
        options = query.removesuffix("?").split(" a ")[1].split(" or ")
        assert set(options) == {names[example.meta["target"]], names[example.meta["neg_target"]]}
        persons = {name for name in names if name[0].isupper()}
        assert persons == set(names) - {child for _, child in stated}
        assert len(example.steps) == len(layers(problem_of(example.meta)).neighbor) - 1


def test_vocabulary_covers_every_problem(released, generated):
    tokenizer = TASK.tokenizer()
    for example in [*released, *generated[:100]]:
        for text in (TASK.format.question.format(example.question), written(example)):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_statistics_of_generated_problems_are_those_of_the_released(released, generated):
    ours, theirs = rows(generated), rows(released)
    assert ours.keys() == theirs.keys()
    # Four standard errors of the difference of 800 and 1500 draws; spreads are those of the released problems.
    error = (1 / 800 + 1 / 1500) ** 0.5
    spread = {
        "vertices, mean": 2.0, "vertices, standard deviation": 1.4,
        "edges, mean": 5.8, "edges, standard deviation": 4.1,
        "hops, mean": 0.8, "shortest paths, mean": 0.9, "persons, mean": 0.8,
        "vertices reached by only root, mean": 2.8, "vertices reached by only other, mean": 2.6,
        "vertices reached by both, mean": 1.2, "vertices reached by neither, mean": 1.0,
    }  # fmt: skip
    for name, value in theirs.items():
        deviation = spread[name] if name in spread else (value * (100 - value)) ** 0.5
        assert abs(ours[name] - value) <= 4 * deviation * error, name
    assert theirs["target deepest %"] == ours["target deepest %"] == 100.0


def test_statistics_reject_another_generator(released, generated):
    short = [example for example in generated if len(example.steps) == 3]
    assert abs(rows(short)["hops 3 %"] - rows(released)["hops 3 %"]) > 50


def test_no_generated_graph_is_isomorphic_to_a_released_one(released, generated):
    theirs, ours = ([problem_of(example.meta) for example in part] for part in (released, generated))
    assert isomorphic_pairs(ours, theirs) == 0
    rng = np.random.default_rng(0)
    new = rng.permutation(theirs[7].vertices).tolist()
    copy = GraphProblem(
        theirs[7].vertices, tuple((new[a], new[b]) for a, b in reversed(theirs[7].edges)), 0, 0, 0
    )  # fmt: skip
    assert isomorphic_pairs([copy, *ours[:5]], theirs) == 1
    assert int(hashes([(copy.vertices, copy.edges)])[0]) in released_hashes()


def test_generated_splits_are_disjoint_and_reproducible(published, generated):
    def graph_hashes(examples):
        return set(hashes([(len(e.meta["names"]), e.meta["edges"].tolist()) for e in examples]).tolist())

    splits = {split: TASK.examples(split, count=60, seed=1) for split in ("generated_valid", "generated_test")}
    kept = [graph_hashes(generated), *map(graph_hashes, splits.values()), set(released_hashes())]
    assert len(set.union(*kept)) == sum(map(len, kept)) == 1500 + 60 + 60 + 800
    again = TASK.examples("generated_test", count=60, seed=1)
    assert [e.question for e in again] == [e.question for e in splits["generated_test"]]
    assert [e.steps for e in again] == [e.steps for e in splits["generated_test"]]


@pytest.mark.parametrize(
    ("text", "reason", "parsed"),
    [
        ("### Tom is a rorpus.", Reason.RIGHT, "rorpus"),
        ("### Tom is a rorpus", Reason.RIGHT, "rorpus"),
        ("### Tom is a yimpus.", Reason.WRONG, "yimpus"),
        ("### Sam is a rorpus.", Reason.WRONG, "rorpus"),
        ("Tom is a rorpus.", Reason.UNPARSABLE, None),
        ("### Tom is rorpus.", Reason.UNPARSABLE, None),
        ("### Tom is a rorpus. Tom is a yimpus.", Reason.UNPARSABLE, None),
        ("###", Reason.UNPARSABLE, None),
        ("", Reason.UNPARSABLE, None),
    ],
)
def test_verdicts(text, reason, parsed):
    verdict = TASK.verify(prosqa.parse_record(RECORD), text)
    assert (verdict.reason, verdict.parsed) == (reason, parsed)


@pytest.mark.parametrize(
    ("chain", "outcome"),
    [
        ("A is a b.\nEvery b is a d.\nEvery d is a t.", Outcome.CORRECT_PATH),
        ("Every b is a d.\nEvery d is a t.", Outcome.CORRECT_PATH),  # completed by A -> b
        ("A is a b.\nEvery b is a c.\nEvery c is a d.\nEvery d is a t.", Outcome.LONGER_PATH),
        ("Every c is a d.\nEvery d is a t.", Outcome.LONGER_PATH),  # c is two hops from A
        ("A is a b.\nEvery b is a t.", Outcome.HALLUCINATION),  # no such edge
        ("A is a b.\nEvery d is a t.", Outcome.HALLUCINATION),  # does not continue
        ("A is a b.\nnonsense.", Outcome.HALLUCINATION),
        ("B is a n.", Outcome.HALLUCINATION),  # an edge that no path from A reaches
        ("A is a b.\nEvery b is a c.", Outcome.WRONG_TARGET),
        ("", Outcome.CORRECT_LABEL),
    ],
)
def test_outcome_classes(chain, outcome):
    names = ("A", "B", "b", "c", "d", "t", "n")
    edges = np.array([(0, 2), (2, 3), (2, 4), (3, 4), (4, 5), (1, 6)], np.int32)
    meta = {"names": names, "edges": edges, "root": 0, "target": 5, "neg_target": 6}
    example = Example("", (), "A is a t.", meta)
    assert classify(example, f"{chain}\n### A is a t.") is outcome
    if not chain:
        assert classify(example, "### A is a n.") is Outcome.INCORRECT_LABEL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [[0, 2], [2, 9]]}, "record 1: field 'edges' must list pairs of vertices"),
        ({"edges": []}, "field 'edges' must list pairs"),
        ({"root": 6}, "field 'root'=6 is not a vertex"),
        ({"target": "4"}, "field 'target' is str, expected int"),
    ],
)
def test_malformed_released_file(change, message, tmp_path, monkeypatch):
    path = tmp_path / "prosqa_test.json"
    path.write_text(json.dumps([RECORD, RECORD | change]))
    monkeypatch.setattr(prosqa, "locate", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        TASK.examples("test")
    assert "prosqa_test.json" in str(error.value)


def test_command_prints_the_table(published, repository):
    done = subprocess.run(
        [sys.executable, "-m", "latentjax.tasks.prosqa", "--count", "40", "--seed", "2"],
        capture_output=True, text=True, cwd=repository, check=True,
    )  # fmt: skip
    assert "generated graphs isomorphic to a released one: 0" in done.stdout
    assert "hops 4 %" in done.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "latentjax.tasks.prosqa", "--count", "0"], capture_output=True, text=True, cwd=repository
    )
    assert bad.returncode == 2
    assert "count=0" in bad.stderr
    assert "Traceback" not in bad.stderr
