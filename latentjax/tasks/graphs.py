"""Random directed acyclic graphs of ProsQA problems, their breadth-first layers, and splits by isomorphism class.

The sampler follows Coconut (arXiv:2412.06769, appendix A.2) where it is explicit; the choices it leaves open were
fitted to the 800 released problems: 28 vertices before isolated ones are dropped, candidate parents from one root's
descendants with probability 0.35 and 0.475 and any vertex otherwise, depth counted as the shortest chain of parents,
the target among the deepest leaves that only one root reaches, and the distractor any leaf that only the other root
reaches."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from latentjax.tasks.splits import check_count, split_of_hash, split_rng

_VERTICES = 28
_PARENTS = 1.5  # mean of the Poisson number of parents
_ONLY_FIRST, _NOT_ANY = 0.35, 0.825  # u <= 0.35: descendants of root 0; u <= 0.825: of root 1; else any vertex
_DEPTH_WEIGHT = 1.5  # a candidate at depth d is drawn with weight 1.5 d + 1
_HOPS = (3, 6)  # least and most hops of a problem
_BLOCK = 256  # problems hashed together


@dataclasses.dataclass(frozen=True)
class GraphProblem:
    """Which of two leaves does the root reach? Vertices are 0..vertices-1; 0 and 1 are the two roots when generated."""

    vertices: int
    edges: tuple[tuple[int, int], ...]
    root: int
    target: int
    neg_target: int

    def children(self) -> list[list[int]]:
        """The children of every vertex."""
        children: list[list[int]] = [[] for _ in range(self.vertices)]
        for parent, child in self.edges:
            children[parent].append(child)
        return children


def distances(children: Sequence[Sequence[int]], root: int) -> dict[int, int]:
    """Number of hops from `root` to every vertex it reaches, in breadth-first order."""
    found = {root: 0}
    queue = [root]
    for vertex in queue:
        for child in children[vertex]:
            if child not in found:
                found[child] = found[vertex] + 1
                queue.append(child)
    return found


@dataclasses.dataclass(frozen=True)
class Layers:
    """Vertex sets of a problem by hops 0..l from the root, l being the distance of the target; each tuple is sorted.

    `neighbor` holds vertices on shortest paths to the target, `frontier` those at exactly that distance, `reachable`
    those at most that far (the three supervision sets of arXiv:2505.12514 and arXiv:2509.23365)."""

    neighbor: tuple[tuple[int, ...], ...]
    frontier: tuple[tuple[int, ...], ...]
    reachable: tuple[tuple[int, ...], ...]


def layers(problem: GraphProblem) -> Layers:
    """The layers of `problem`. Raises ValueError if the root does not reach the target."""
    children = problem.children()
    distance = distances(children, problem.root)
    if problem.target not in distance:
        raise ValueError(f"target={problem.target} is not reachable from root={problem.root}")
    hops = distance[problem.target]
    frontier: list[list[int]] = [[] for _ in range(hops + 1)]
    for vertex, far in distance.items():
        if far <= hops:
            frontier[far].append(vertex)
    neighbor = [[problem.target]]
    for far in range(hops - 1, -1, -1):
        later = set(neighbor[-1])
        neighbor.append([v for v in frontier[far] if not later.isdisjoint(children[v])])
    neighbor.reverse()
    reachable = [[v for layer in frontier[: far + 1] for v in layer] for far in range(hops + 1)]
    return Layers(*(tuple(tuple(sorted(layer)) for layer in part) for part in (neighbor, frontier, reachable)))


def draw_graph(rng: np.random.Generator) -> GraphProblem | None:
    """One problem, or None if the drawn graph poses none with a permitted number of hops (about one in ten)."""
    parents = _draw_parents(rng)
    children: list[list[int]] = [[] for _ in parents]
    for child, its_parents in enumerate(parents):
        for parent in its_parents:
            children[parent].append(child)
    near = (distances(children, 0), distances(children, 1))
    leaves = [[v for v in near[r] if v not in near[1 - r] and not children[v]] for r in (0, 1)]
    if not leaves[0] or not leaves[1] or not children[0] or not children[1]:
        return None
    hops = max(near[r][leaf] for r in (0, 1) for leaf in leaves[r])
    if not _HOPS[0] <= hops <= _HOPS[1]:
        return None
    deepest = [(r, leaf) for r in (0, 1) for leaf in leaves[r] if near[r][leaf] == hops]
    root, target = deepest[int(rng.random() * len(deepest))]
    neg_target = leaves[1 - root][int(rng.random() * len(leaves[1 - root]))]
    kept = [v for v in range(len(parents)) if parents[v] or children[v]]
    number = {v: index for index, v in enumerate(kept)}
    edges = tuple((number[parent], number[child]) for child in kept for parent in parents[child])
    return GraphProblem(len(kept), edges, number[root], number[target], number[neg_target])


def _draw_parents(rng: np.random.Generator) -> list[list[int]]:
    """The parents of each of the `_VERTICES` vertices, all of them earlier vertices."""
    uniform: Iterator[float] = iter(rng.random(12 * _VERTICES).tolist())
    numbers = np.minimum(rng.poisson(_PARENTS, _VERTICES), 10).tolist()  # P(more than 10) is 1e-6; uniforms suffice
    labels = [1, 2]  # bit mask of the roots that reach the vertex
    weights = [1.0, 1.0]
    parents: list[list[int]] = [[], []]
    for vertex in range(2, _VERTICES):
        u = next(uniform)
        group = 1 if u <= _ONLY_FIRST else 2 if u <= _NOT_ANY else None
        candidates = [v for v in range(vertex) if group is None or labels[v] == group]
        chosen = _sample(candidates, [weights[v] for v in candidates], min(numbers[vertex], len(candidates)), uniform)
        label = 0
        for parent in chosen:
            label |= labels[parent]
        parents.append(chosen)
        labels.append(label)
        # A parent's weight grows with its depth, so the least weight belongs to the least depth.
        weights.append(min(weights[parent] for parent in chosen) + _DEPTH_WEIGHT if chosen else 1.0)
    return parents


def _sample(candidates: list[int], weights: list[float], count: int, uniform: Iterator[float]) -> list[int]:
    """`count` distinct candidates, each drawn with probability proportional to its weight among those left."""
    chosen = []
    for _ in range(count):
        threshold = next(uniform) * sum(weights)
        index = 0
        while index < len(weights) - 1 and threshold >= weights[index]:
            threshold -= weights[index]
            index += 1
        chosen.append(candidates.pop(index))
        weights.pop(index)
    return chosen


def hashes(graphs: Sequence[tuple[int, Sequence[Sequence[int]]]], rounds: int = 4) -> np.ndarray:
    """Weisfeiler-Lehman hashes (uint64 [G]) of directed graphs given as (number of vertices, edges).

    Each round replaces a vertex's colour by a hash of its own, its parents' and its children's colours; the graph's
    hash mixes the sum of all. Isomorphic graphs have equal hashes; a collision of others only costs a rejected graph.
    """
    starts = np.cumsum([0, *(vertices for vertices, _ in graphs)])
    edges = [
        (start + a, start + b) for start, (_, pairs) in zip(starts.tolist(), graphs, strict=False) for a, b in pairs
    ]
    source, target = np.array(edges, np.int64).reshape(-1, 2).T
    colours = np.ones(starts[-1], np.uint64)
    for _ in range(rounds):
        above, below = np.zeros_like(colours), np.zeros_like(colours)
        np.add.at(above, target, _mix(colours[source] + np.uint64(0xA5)))
        np.add.at(below, source, _mix(colours[target] + np.uint64(0xB7)))
        colours = _mix(_mix(colours) + np.uint64(3) * _mix(above) + np.uint64(5) * _mix(below + np.uint64(1)))
    if not len(graphs):
        return np.zeros(0, np.uint64)
    return _mix(np.add.reduceat(colours, starts[:-1]))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_problems(
    split: str,
    count: int | None,
    seed: int,
    excluded: frozenset[int],
    accept: Callable[[GraphProblem], bool] = lambda problem: True,
) -> tuple[list[GraphProblem], dict[str, Any]]:
    """The first `count` accepted problems of `split` ("train", "valid" or "test"), no two of them isomorphic as graphs.

    No graph has a hash in `excluded`; the split is a function of the hash, so no graph of one split is isomorphic to
    one of another, whatever the seeds and counts. Also returns what was rejected: draws without a problem, of other
    splits, excluded, repeated."""
    count = check_count(split, count)
    rng = split_rng(split, seed)
    problems: list[GraphProblem] = []
    seen: set[int] = set()
    rejected = {"no problem": 0, "other split": 0, "excluded": 0, "repeated": 0}
    while len(problems) < count:
        drawn = [draw_graph(rng) for _ in range(_BLOCK)]
        block = [problem for problem in drawn if problem is not None and accept(problem)]
        rejected["no problem"] += len(drawn) - len(block)
        values = hashes([(problem.vertices, problem.edges) for problem in block]).tolist()
        for problem, value in zip(block, values, strict=True):
            reason = (
                "other split" if split_of_hash(value) != split
                else "excluded" if value in excluded
                else "repeated" if value in seen
                else None
            )  # fmt: skip
            if reason is None:
                seen.add(value)
                problems.append(problem)
            else:
                rejected[reason] += 1
    return problems[:count], rejected
