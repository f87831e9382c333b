"""Edge recall: every part of an example against the edges that its question lists."""

import numpy as np
import pytest

from latentjax.tasks.base import Reason
from latentjax.tasks.graph_edges import GraphEdges
from latentjax.tokenizers import Codec

TASK = GraphEdges(listed=8)


@pytest.fixture(scope="module")
def train(published):
    return TASK.examples("train", count=50, seed=0)


def check(example):
    start, *words = example.question.split()
    assert start == "<s>" and words[-2] == "[R]"
    edges = [tuple(part.split()) for part in " ".join(words[:-2]).split(" | ")]
    graph = {(str(a), str(b)) for a, b in example.meta["edges"].tolist()}
    assert len(set(edges)) == len(edges) == TASK.listed
    assert set(edges) <= graph
    chain = [tuple(step.split()) for step in example.steps]
    assert sorted([*chain, (words[-1], example.answer)]) == sorted(edges)


def test_examples_and_their_augmentation_recall_listed_edges(train):
    rng = np.random.default_rng(0)
    for example in train:
        check(example)
        check(TASK.augment(example, rng))
    assert len({TASK.augment(train[0], rng).question for _ in range(20)}) == 20


def test_examples_are_a_function_of_the_seed(train):
    assert TASK.examples("train", count=50, seed=0) is not train
    again = TASK.examples("train", count=50, seed=0)
    assert [(e.question, e.steps, e.answer) for e in again] == [(e.question, e.steps, e.answer) for e in train]
    assert [e.question for e in TASK.examples("train", count=50, seed=1)] != [e.question for e in train]


def test_verdicts(train):
    for example in train:
        root = example.question.split()[-1]
        listed = {(str(a), str(b)) for a, b in example.meta["listed"].tolist()}
        for vertex in map(str, range(31)):
            verdict = TASK.verify(example, f"{example.steps[0]} [A] {vertex}")
            assert verdict.correct == ((root, vertex) in listed)
        assert TASK.verify(example, f"[A] {example.answer}").correct
        for text in ("", example.answer, "[A] 31", "[A] 1 2", "[A]"):
            assert TASK.verify(example, text).reason is Reason.UNPARSABLE


def test_tokens(train):
    codec = Codec(TASK.tokenizer(), TASK.format)
    for example in train:
        assert len(codec.question(example)) == 3 * TASK.listed + 2
        assert sum(map(len, codec.steps(example))) + len(codec.answer(example)) == 2 * TASK.listed + 1


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"GraphEdges.listed=1"):
        GraphEdges(listed=1)
    with pytest.raises(ValueError, match=r"hops=\(2,\)"):
        GraphEdges(hops=(2,))


def test_a_graph_with_fewer_edges_than_asked_is_an_error(published):
    with pytest.raises(ValueError, match=r"GraphEdges.listed=60: a problem has \d+ edges only"):
        GraphEdges(listed=60).examples("train", count=20)
