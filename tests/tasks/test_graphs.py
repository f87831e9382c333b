"""Graph problems against brute force, the hash against relabelled copies, and splits against exact isomorphism."""

import itertools

import networkx
import numpy as np
import pytest

from latentjax.tasks import graphs
from latentjax.tasks.graphs import GraphProblem, distances, draw_graph, draw_problems, hashes, layers


@pytest.fixture(scope="module")
def problems() -> list[GraphProblem]:
    rng = np.random.default_rng(0)
    return [problem for problem in (draw_graph(rng) for _ in range(200)) if problem is not None]


def relabelled(problem, rng):
    new = rng.permutation(problem.vertices).tolist()
    edges = [(new[a], new[b]) for a, b in problem.edges]
    order = rng.permutation(len(edges))
    marks = (new[problem.root], new[problem.target], new[problem.neg_target])
    return GraphProblem(problem.vertices, tuple(edges[index] for index in order), *marks)


def hashed(problem):
    return int(hashes([(problem.vertices, problem.edges)])[0])


def all_walks(problem):
    """Every walk from the root, by plain recursion (the graphs have no cycles)."""

    def extend(walk):
        yield walk
        for a, b in problem.edges:
            if a == walk[-1]:
                yield from extend([*walk, b])

    return list(extend([problem.root]))


def test_layers_equal_brute_force(problems):
    for problem in problems[:40]:
        walks = all_walks(problem)
        shortest = {}
        for walk in walks:
            shortest[walk[-1]] = min(len(walk) - 1, shortest.get(walk[-1], 99))
        hops = shortest[problem.target]
        paths = [walk for walk in walks if walk[-1] == problem.target and len(walk) - 1 == hops]
        found = layers(problem)
        for far in range(hops + 1):
            assert found.neighbor[far] == tuple(sorted({path[far] for path in paths}))
            assert found.frontier[far] == tuple(sorted(v for v, d in shortest.items() if d == far))
            assert found.reachable[far] == tuple(sorted(v for v, d in shortest.items() if d <= far))
        assert len(found.neighbor) == len(found.frontier) == len(found.reachable) == hops + 1


def test_unreachable_target_is_an_error():
    with pytest.raises(ValueError, match="target=2 is not reachable from root=0"):
        layers(GraphProblem(4, ((0, 1), (3, 2)), 0, 2, 1))


def test_drawn_problems_are_what_prosqa_asks(problems):
    assert len(problems) > 150
    for problem in problems:
        assert all(a < b for a, b in problem.edges)
        assert len(set(problem.edges)) == len(problem.edges)
        assert {vertex for edge in problem.edges for vertex in edge} == set(range(problem.vertices))
        near, far = (distances(problem.children(), root) for root in (problem.root, 1 - problem.root))
        assert {problem.root, 1 - problem.root} == {0, 1}
        assert problem.target in near.keys() - far.keys()
        assert problem.neg_target in far.keys() - near.keys()
        parents = {a for a, _ in problem.edges}
        assert parents.isdisjoint({problem.target, problem.neg_target})
        leaves = [v for v in near if v not in far and v not in parents]
        assert near[problem.target] == max(near[v] for v in leaves)
        assert 3 <= near[problem.target] <= 6


def test_sampling_without_replacement_has_the_stated_probabilities():
    weights, rng = [1.0, 2.5, 4.0], np.random.default_rng(0)
    n = 20_000
    counts = dict.fromkeys(itertools.permutations(range(3), 2), 0)
    for _ in range(n):
        counts[tuple(graphs._sample([0, 1, 2], list(weights), 2, iter(rng.random(2).tolist())))] += 1
    for (i, j), count in counts.items():
        expected = weights[i] / 7.5 * weights[j] / (7.5 - weights[i])
        assert abs(count / n - expected) < 4.5 * (expected / n) ** 0.5


def test_hash_ignores_names_and_order_of_edges(problems):
    rng = np.random.default_rng(1)
    for problem in problems[:60]:
        assert hashed(relabelled(problem, rng)) == hashed(problem)


def test_hash_is_that_of_a_single_graph_in_any_batch(problems):
    batch = hashes([(problem.vertices, problem.edges) for problem in problems])
    assert batch.tolist() == [hashed(problem) for problem in problems]
    assert hashes([]).tolist() == []


def test_hash_tells_graphs_apart(problems):
    values = [hashed(problem) for problem in problems]
    assert len(set(values)) == len(values)
    chain, reverse = GraphProblem(3, ((0, 1), (0, 2)), 0, 1, 2), GraphProblem(3, ((1, 0), (2, 0)), 0, 1, 2)
    assert hashed(chain) != hashed(reverse)  # direction matters
    moved = GraphProblem(problems[0].vertices, ((*problems[0].edges[0][::-1],), *problems[0].edges[1:]), 1, 2, 3)
    assert hashed(moved) != hashed(problems[0])


def test_hash_does_not_change_between_versions():
    # The splits rest on it: a changed value would move problems from one split to another.
    assert hashed(GraphProblem(4, ((0, 1), (0, 2), (2, 3)), 0, 3, 1)) == 14525004581873020401


def graph(problem):
    made = networkx.DiGraph(list(problem.edges))
    made.add_nodes_from(range(problem.vertices))
    return made


def test_splits_share_no_graph_up_to_isomorphism():
    splits = {split: draw_problems(split, 60, 0, frozenset())[0] for split in ("train", "valid", "test")}
    every = [(split, problem) for split, drawn in splits.items() for problem in drawn]
    for (_, a), (_, b) in itertools.combinations(every, 2):
        if a.vertices == b.vertices and len(a.edges) == len(b.edges):
            assert not networkx.is_isomorphic(graph(a), graph(b))


def test_a_relabelled_copy_of_an_excluded_graph_is_rejected(problems, monkeypatch):
    rng = np.random.default_rng(2)
    taken, fresh = problems[:20], problems[20:120]
    copies = [relabelled(problem, rng) for problem in taken]
    stream = itertools.cycle([*copies, *fresh])
    monkeypatch.setattr(graphs, "draw_graph", lambda rng: next(stream))
    excluded = frozenset(hashed(problem) for problem in taken)
    drawn, rejected = draw_problems("train", 20, 0, excluded)
    assert rejected["excluded"] > 0
    assert not excluded & {hashed(problem) for problem in drawn}
    without, rejected = draw_problems("train", 20, 0, frozenset())  # the copies would have been taken
    assert rejected["excluded"] == 0
    assert excluded & {hashed(problem) for problem in without}


def test_repeated_graphs_are_rejected(problems, monkeypatch):
    rng = np.random.default_rng(3)
    stream = itertools.cycle([relabelled(problem, rng) for problem in problems for _ in range(3)])
    monkeypatch.setattr(graphs, "draw_graph", lambda rng: next(stream))
    drawn, rejected = draw_problems("train", 50, 0, frozenset())
    assert len({hashed(problem) for problem in drawn}) == 50
    assert rejected["repeated"] > 0


def test_longer_draws_begin_with_the_shorter():
    assert draw_problems("valid", 20, 7, frozenset())[0][:5] == draw_problems("valid", 5, 7, frozenset())[0]
    assert draw_problems("valid", 5, 8, frozenset())[0] != draw_problems("valid", 5, 7, frozenset())[0]
