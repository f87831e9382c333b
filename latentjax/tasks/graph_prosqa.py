"""Symbolic ProsQA: graph reachability with vertex ids as tokens (arXiv:2505.12514; ids shuffled: arXiv:2509.23365).

Question: `<s> a b | c d | ... | y z [Q] c1 c2 [R] r`, every edge `source target`, then the two candidates and the root.
Steps: the vertices v_1 .. v_l of a shortest path, the last of which is the target; answer: `[A] target`. The released
code opens the question with its end-of-sequence token; here `<s>` is a word of its own.

Splits "valid" (257) and "test" (419) are the released files of problems with 3 or 4 hops, "test_shuffled" the release
of the same test problems with permuted vertex ids; "prosqa_valid" (300) and "prosqa_test" (500) are the problems of 3 to 6
hops that ProsQA was released with, as symbols. Edges and candidates stand in the order of the statements and
options of the released natural-language question. "train", "generated_valid" and "generated_test" are generated,
disjoint as in ProsQA."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from latentjax.data import first, locate, read_records
from latentjax.tasks.base import Example, Format, Reason, Task, Verdict
from latentjax.tasks.graphs import GraphProblem, draw_problems, layers
from latentjax.tasks.prosqa import GENERATED, RECORD, parse_record, problem_of, released_hashes
from latentjax.tasks.splits import split_rng

VERTICES = 31  # ids 0..30
_WORDS = tuple(map(str, range(VERTICES)))
_PAIRS = tuple(tuple(f"{a} {b}" for b in _WORDS) for a in _WORDS)
_FILES = {
    "valid": "prosqa_valid_graph_4_coconut.json",
    "test": "prosqa_test_graph_4_coconut.json",
    "test_shuffled": "prosqa_test_graph_4_shuffled_with_bfs.json",
    "prosqa_valid": "prosqa_valid.json",
    "prosqa_test": "prosqa_test.json",
}
_LAYERS = ("neighbor_k", "frontier_k", "reachable_k")


@dataclasses.dataclass(frozen=True)
class GraphProsQA(Task):
    """Symbolic ProsQA. Generated problems have one of the numbers of `hops`, and permuted ids if `shuffle_ids`.

    Without shuffling ids follow the order of construction and carry information: roots are 0 and 1, deeper vertices
    have larger ids. `example.meta`: vertices (their number n; ids are 0..n-1), edges (int32 [E, 2]), root, target,
    neg_target, and for j = 0..l hops sorted vertex tuples: neighbor_k[j] on shortest paths to the target, frontier_k[j]
    at distance exactly j, reachable_k[j] at distance at most j."""

    splits: ClassVar[tuple[str, ...]] = (
        "train", "valid", "test", "test_shuffled", "prosqa_valid", "prosqa_test", "generated_valid", "generated_test",
    )  # fmt: skip
    format: ClassVar[Format] = Format(question="{}", step="{}", answer="[A] {}")

    shuffle_ids: bool = True
    hops: tuple[int, ...] = (3, 4)

    def __post_init__(self):
        if not self.hops or not set(self.hops) <= {3, 4, 5, 6}:
            raise ValueError(f"GraphProsQA.hops={self.hops!r}: the generator makes problems of 3, 4, 5 or 6 hops")

    def vocabulary(self) -> tuple[str, ...]:
        return (*_WORDS, "|", "[Q]", "[R]", "[A]", "<s>")

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        if split in _FILES:
            return first(read_records(locate(_FILES[split]), _record(split), _parse), count, split)
        problems, _ = draw_problems(GENERATED[split], count, seed, released_hashes(), self._accepts)
        rng = split_rng(f"{split} text", seed)
        return [self.augment(_plain(problem), rng) for problem in problems]

    def _accepts(self, problem: GraphProblem) -> bool:
        return len(layers(problem).neighbor) - 1 in self.hops

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """The same problem with edges and candidates in another order, another demonstrated shortest path and, if
        `shuffle_ids`, permuted vertex ids."""
        meta = example.meta
        edges = meta["edges"][rng.permutation(len(meta["edges"]))]  # [E, 2]
        layered = {name: meta[name] for name in _LAYERS}
        root, target, neg_target = meta["root"], meta["target"], meta["neg_target"]
        if self.shuffle_ids:
            renamed = rng.permutation(meta["vertices"]).astype(np.int32)
            edges = renamed[edges]
            new = renamed.tolist()
            root, target, neg_target = new[root], new[target], new[neg_target]
            layered = {
                name: tuple([tuple(sorted([new[v] for v in layer])) for layer in part])
                for name, part in layered.items()
            }
        uniform = rng.random(len(layered["neighbor_k"])).tolist()
        pairs = edges.tolist()
        path = _path(pairs, layered["neighbor_k"], uniform)
        candidates = (target, neg_target) if uniform[0] < 0.5 else (neg_target, target)
        vertices = meta["vertices"]
        new_meta = {
            "vertices": vertices, "edges": edges, "root": root, "target": target, "neg_target": neg_target, **layered
        }  # fmt: skip
        return Example(_question(pairs, candidates, root), path, _WORDS[target], new_meta)

    def verify(self, example: Example, text: str) -> Verdict:
        """Judge the vertex after the last `[A]`, or the last vertex of the text if it has no `[A]`."""
        answer = self.format.read_answer(text)
        if answer is None:
            answer = next((word for word in reversed(text.split()) if word in _WORDS), "")
        if answer not in _WORDS:
            return Verdict(Reason.UNPARSABLE, detail=f"{answer[:40]!r} is not one vertex")
        if answer == example.answer:
            return Verdict(Reason.RIGHT, answer)
        other = answer == str(example.meta["neg_target"])
        return Verdict(Reason.WRONG, answer, "the other candidate" if other else "no candidate")


def _record(split: str) -> Mapping[str, type]:
    """Fields of a released problem; the files of ProsQA itself have no vertex sets."""
    return {**RECORD} if split.startswith("prosqa") else {**RECORD, "neighbor_k": dict}


def _question(edges: Sequence[Sequence[int]], candidates: Sequence[int], root: int) -> str:
    listed = " | ".join([_PAIRS[a][b] for a, b in edges])
    return f"<s> {listed} [Q] {_PAIRS[candidates[0]][candidates[1]]} [R] {root}"


def _path(
    edges: Sequence[Sequence[int]], neighbor: Sequence[Sequence[int]], uniform: Sequence[float]
) -> tuple[str, ...]:
    """Vertices v_1..v_l, as words, of a path drawn edge by edge inside the layers `neighbor`; uses `uniform[1:]`."""
    level = {vertex: hop for hop, layer in enumerate(neighbor) for vertex in layer}
    onward: dict[int, list[int]] = {}
    after = {vertex: hop + 1 for vertex, hop in level.items()}
    for a, b in edges:
        if a in after and level.get(b) == after[a]:
            onward.setdefault(a, []).append(b)
    vertex, path = neighbor[0][0], []
    for u in uniform[1:]:
        choices = onward[vertex]
        vertex = choices[int(u * len(choices))]
        path.append(_WORDS[vertex])
    return tuple(path)


def _plain(problem: GraphProblem, candidates: Sequence[int] = (), path: tuple[str, ...] | None = None) -> Example:
    """The example of `problem` with edges in its own order and without `path` the first shortest path there is."""
    layered = layers(problem)
    parts = (layered.neighbor, layered.frontier, layered.reachable)
    candidates = candidates or (problem.target, problem.neg_target)
    meta = {
        "vertices": problem.vertices,
        "edges": np.array(problem.edges, np.int32),
        "root": problem.root,
        "target": problem.target,
        "neg_target": problem.neg_target,
        **dict(zip(_LAYERS, parts, strict=True)),
    }
    if path is None:
        path = _path(problem.edges, layered.neighbor, [0.0] * len(layered.neighbor))
    return Example(_question(problem.edges, candidates, problem.root), path, _WORDS[problem.target], meta)


def _parse(record: Mapping[str, Any]) -> Example:
    """A released problem, in the order of its natural-language question. Raises ValueError if its text contradicts its
    graph, or if its vertex sets are not those of the graph."""
    text = parse_record(record)
    names = text.meta["names"]
    if len(names) > VERTICES:
        raise ValueError(f"field 'idx_to_symbol' has {len(names)} vertices, the vocabulary {VERTICES}")
    number = {name: vertex for vertex, name in enumerate(names)}
    statements, _, query = text.question.rpartition(" Is ")
    try:
        edges = tuple(_edge(sentence, number) for sentence in statements.removesuffix(".").split(". "))
        options = query.removesuffix("?").partition(" a ")[2].split(" or ")
        candidates = tuple(number[name] for name in options)
        path = tuple(str(_edge(step.removesuffix("."), number)[1]) for step in text.steps)
    except (KeyError, ValueError) as error:
        raise ValueError(f"field 'question' or 'steps' has words that are no vertex: {error}") from error
    released = problem_of(text.meta)
    if sorted(edges) != sorted(released.edges) or set(candidates) != {released.target, released.neg_target}:
        raise ValueError("field 'question' does not state the graph of field 'edges'")
    problem = dataclasses.replace(released, edges=edges)
    example = _plain(problem, candidates, path)
    if "neighbor_k" in record:
        _check_layers(record, "neighbor_k", example.meta["neighbor_k"])
    if "bfs_neighbor_k" in record:
        _check_layers(record, "bfs_neighbor_k", example.meta["frontier_k"])
    return example


def _edge(sentence: str, number: Mapping[str, int]) -> tuple[int, int]:
    parent, child = sentence.removeprefix("Every ").split(" is a ")
    return number[parent], number[child]


def _check_layers(record: Mapping[str, Any], field: str, expected: Sequence[Sequence[int]]) -> None:
    found = {hop: sorted(layer) for hop, layer in record[field].items()}
    if found != {str(hop): list(layer) for hop, layer in enumerate(expected)}:
        raise ValueError(f"field {field!r}={record[field]} does not follow from the edges, which give {expected}")
