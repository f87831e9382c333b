"""Symbolic ProsQA: released files against their own graphs, augmentation, verifier."""

import json

import networkx
import numpy as np
import pytest

from latentjax.tasks import graph_prosqa
from latentjax.tasks.base import Reason
from latentjax.tasks.graph_prosqa import GraphProsQA
from latentjax.tasks.graphs import hashes, layers
from latentjax.tasks.prosqa import problem_of, released_hashes

TASK = GraphProsQA()
FILES = {
    "valid": ("prosqa_valid_graph_4_coconut.json", 257),
    "test": ("prosqa_test_graph_4_coconut.json", 419),
    "test_shuffled": ("prosqa_test_graph_4_shuffled_with_bfs.json", 419),
    "prosqa_valid": ("prosqa_valid.json", 300),
    "prosqa_test": ("prosqa_test.json", 500),
}


@pytest.fixture(scope="module")
def train(published):
    return TASK.examples("train", count=300, seed=0)


def parsed(question):
    """Edges, candidates and root of a question, from its words only."""
    start, *words = question.split()
    assert start == "<s>"
    query, root_mark = words.index("[Q]"), words.index("[R]")
    listed = " ".join(words[:query]).split(" | ")
    edges = [tuple(map(int, edge.split())) for edge in listed]
    return edges, tuple(map(int, words[query + 1 : root_mark])), int(words[root_mark + 1])


def check(example):
    """Everything an example says follows from its question and its meta agrees with networkx."""
    edges, candidates, root = parsed(example.question)
    meta = example.meta
    assert edges == list(map(tuple, meta["edges"].tolist()))
    assert meta["edges"].dtype == np.int32
    assert root == meta["root"]
    assert set(candidates) == {meta["target"], meta["neg_target"]}
    graph = networkx.DiGraph(edges)
    assert sorted(graph) == list(range(meta["vertices"]))
    far = networkx.single_source_shortest_path_length(graph, root)
    hops = far[meta["target"]]
    paths = list(networkx.all_shortest_paths(graph, root, meta["target"]))
    for j in range(hops + 1):
        assert meta["neighbor_k"][j] == tuple(sorted({path[j] for path in paths}))
        assert meta["frontier_k"][j] == tuple(sorted(v for v, d in far.items() if d == j))
        assert meta["reachable_k"][j] == tuple(sorted(v for v, d in far.items() if d <= j))
    assert len(meta["neighbor_k"]) == len(example.steps) + 1 == hops + 1
    assert [root, *map(int, example.steps)] in paths
    assert example.answer == example.steps[-1] == str(meta["target"])
    assert meta["neg_target"] not in far


@pytest.mark.parametrize("split", list(FILES))
def test_released_problems_agree_with_their_graphs(published, split):
    name, count = FILES[split]
    raw = json.loads((published / name).read_text())
    examples = TASK.examples(split)
    assert len(examples) == len(raw) == count
    for example, record in zip(examples, raw, strict=True):
        check(example)
        assert sorted(example.meta["edges"].tolist()) == sorted(record["edges"])
        assert (example.meta["root"], example.meta["target"]) == (record["root"], record["target"])
        for j, layer in record.get("neighbor_k", {}).items():
            assert example.meta["neighbor_k"][int(j)] == tuple(sorted(layer))
        for j, layer in record.get("bfs_neighbor_k", {}).items():
            assert example.meta["frontier_k"][int(j)] == tuple(sorted(layer))
        sentence = record["question"].split(". ")[0].removeprefix("Every ").split(" is a ")
        assert example.meta["edges"][0].tolist() == [record["idx_to_symbol"].index(word) for word in sentence]


def test_shuffled_test_holds_the_same_graphs(published):
    for plain, shuffled in zip(TASK.examples("test"), TASK.examples("test_shuffled"), strict=True):
        a, b = (hashes([(e.meta["vertices"], e.meta["edges"].tolist())]) for e in (plain, shuffled))
        assert a == b
        assert a.item() in released_hashes()


def test_generated_problems(train):
    assert {len(example.steps) for example in train} == {3, 4}
    for example in train[:100]:
        check(example)
    drawn = set(hashes([(e.meta["vertices"], e.meta["edges"].tolist()) for e in train]).tolist())
    assert len(drawn) == len(train)
    assert not drawn & released_hashes()


def test_generated_splits_are_disjoint_reproducible_and_of_the_hops_asked(published, train):
    task = GraphProsQA(hops=(5,))
    examples = task.examples("generated_valid", count=10, seed=4)
    assert {len(example.steps) for example in examples} == {5}
    assert [e.question for e in examples] == [e.question for e in task.examples("generated_valid", count=10, seed=4)]
    held = TASK.examples("generated_test", count=40, seed=0)
    assert not {problem_hash(e) for e in held} & {problem_hash(e) for e in train}
    for bad in ((), (2,), (3, 7)):
        with pytest.raises(ValueError, match=r"GraphProsQA\.hops"):
            GraphProsQA(hops=bad)


def problem_hash(example):
    return int(hashes([(example.meta["vertices"], example.meta["edges"].tolist())])[0])


@pytest.mark.parametrize("shuffle", [True, False])
def test_augmentation_keeps_the_problem(train, shuffle):
    task, rng = GraphProsQA(shuffle_ids=shuffle), np.random.default_rng(0)
    for example in train[:60]:
        other = task.augment(example, rng)
        check(other)
        assert problem_hash(other) == problem_hash(example)
        assert [len(layer) for layer in other.meta["neighbor_k"]] == [
            len(layer) for layer in example.meta["neighbor_k"]
        ]
        assert other.question != example.question
        if not shuffle:
            assert sorted(other.meta["edges"].tolist()) == sorted(example.meta["edges"].tolist())
            assert other.answer == example.answer


def test_augmentation_redraws_everything_it_may(train):
    rng = np.random.default_rng(0)
    example = max(train, key=lambda e: sum(map(len, e.meta["neighbor_k"])))
    plain, shuffled = GraphProsQA(shuffle_ids=False), GraphProsQA()
    drawn = [plain.augment(example, rng) for _ in range(400)]
    graph = networkx.DiGraph(example.meta["edges"].tolist())
    paths = {
        tuple(path[1:]) for path in networkx.all_shortest_paths(graph, example.meta["root"], example.meta["target"])
    }
    assert len(paths) > 1
    assert {tuple(map(int, e.steps)) for e in drawn} == paths
    assert {parsed(e.question)[1] for e in drawn} == {
        (example.meta["target"], example.meta["neg_target"]), (example.meta["neg_target"], example.meta["target"]),
    }  # fmt: skip
    first_edges = {parsed(e.question)[0][0] for e in drawn}
    assert first_edges == set(map(tuple, example.meta["edges"].tolist()))
    roots = {shuffled.augment(example, rng).meta["root"] for _ in range(400)}
    assert roots == set(range(example.meta["vertices"]))


def test_path_is_drawn_edge_by_edge(train):
    """Each edge of the demonstrated path is uniform among those that stay inside neighbor_k."""
    example = max(train, key=lambda e: len(e.meta["neighbor_k"][1]))
    rng, n = np.random.default_rng(1), 3000
    task = GraphProsQA(shuffle_ids=False)
    drawn = [task.augment(example, rng) for _ in range(n)]
    first = [int(e.steps[0]) for e in drawn]
    options = example.meta["neighbor_k"][1]
    assert len(options) > 1
    for vertex in options:
        share = first.count(vertex) / n
        assert abs(share - 1 / len(options)) < 4.5 * (0.25 / n) ** 0.5
    # The order of the edges must not tell which branch is demonstrated.
    listed = [next(b for a, b in e.meta["edges"].tolist() if a == e.meta["root"] and b in options) for e in drawn]
    share = np.mean([a == b for a, b in zip(first, listed, strict=True)])
    assert abs(share - 1 / len(options)) < 4.5 * (0.25 / n) ** 0.5


def test_augmentation_is_a_function_of_the_generator(train):
    a, b = (TASK.augment(train[0], np.random.default_rng(5)) for _ in range(2))
    assert (a.question, a.steps) == (b.question, b.steps)


def test_ids_are_those_of_construction_without_shuffling(published):
    for example in GraphProsQA(shuffle_ids=False).examples("train", count=30):
        assert example.meta["root"] in (0, 1)
        assert (example.meta["edges"][:, 0] < example.meta["edges"][:, 1]).all()


def test_verdicts(train):
    example = train[0]
    target, other = example.answer, str(example.meta["neg_target"])
    chain = " ".join(example.steps[:-1])
    third = next(str(v) for v in range(31) if str(v) not in (target, other))
    for text in (f"[A] {target}", f"{chain} {target} [A] {target}", target, f"{chain} {target}"):
        assert TASK.verify(example, text).correct
    assert TASK.verify(example, f"[A] {other}").detail == "the other candidate"
    assert TASK.verify(example, f"{target} [A] {third}").reason is Reason.WRONG
    for text in ("", "[A]", "[A] 31", f"{target} [A]", f"[A] {target} {target}", "| [Q]"):
        assert TASK.verify(example, text).reason is Reason.UNPARSABLE


def test_tokens(train):
    tokenizer = TASK.tokenizer()
    for example in train[:50]:
        ids = tokenizer.encode(example.question)
        assert len(ids) == 3 * len(example.meta["edges"]) + 5
        assert tokenizer.decode(ids) == example.question
        assert [len(tokenizer.encode(step)) for step in example.steps] == [1] * len(example.steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(neighbor_k=r["neighbor_k"] | {"1": [0]}), "record 0: field 'neighbor_k'"),
        (lambda r: r.update(question=r["question"].replace("Every ", "Every x", 1)), "no vertex"),
        (lambda r: r["edges"].pop(), "does not state the graph"),
        (lambda r: r.pop("neighbor_k"), "field 'neighbor_k' is missing"),
    ],
)
def test_malformed_released_file(published, tmp_path, monkeypatch, change, message):
    name = FILES["test"][0]
    record = json.loads((published / name).read_text())[0]
    change(record)
    (tmp_path / name).write_text(json.dumps([record]))
    monkeypatch.setattr(graph_prosqa, "locate", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match=message):
        TASK.examples("test")


def test_layers_of_the_meta_are_those_of_the_problem(train):
    for example in train[:20]:
        found = layers(problem_of(example.meta))
        assert (found.neighbor, found.frontier, found.reachable) == tuple(
            example.meta[name] for name in ("neighbor_k", "frontier_k", "reachable_k")
        )
