"""Edge recall on the graphs of symbolic ProsQA: a warm-up for small models that are trained from scratch.

Question: `<s> a b | c d | ... [R] r`, some edges of a problem's graph and the source r of one of them. Steps: the other
listed edges in random order, `source target`; answer: `[A] t` with an edge from r to t in the list. A graph problem of
`graph_prosqa.py` has one or a few targets that need an edge looked up, here every second token of the chain does, so the
attention heads that bind the two ends of an edge form in far fewer steps. No paper has this task."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from latentjax.tasks.base import Example, Format, Reason, Task, Verdict
from latentjax.tasks.graph_prosqa import GraphProsQA
from latentjax.tasks.splits import split_rng


@dataclasses.dataclass(frozen=True)
class GraphEdges(Task):
    """Recall of `listed` edges. Graphs and permuted vertex ids are those of `GraphProsQA`, whose splits these are too.

    `example.meta`: that of the graph's problem, and listed (int32 [listed, 2])."""

    splits: ClassVar[tuple[str, ...]] = ("train", "generated_valid", "generated_test")
    format: ClassVar[Format] = GraphProsQA.format

    listed: int = 8
    hops: tuple[int, ...] = (3, 4)

    def __post_init__(self):
        if self.listed < 2:
            raise ValueError(
                f"GraphEdges.listed={self.listed}: must be at least 2, one edge to recall and one to ask for"
            )
        GraphProsQA(hops=self.hops)  # raises for hops that it cannot make

    def vocabulary(self) -> tuple[str, ...]:
        return self._graphs().vocabulary()

    def _graphs(self) -> GraphProsQA:
        return GraphProsQA(shuffle_ids=True, hops=self.hops)

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        rng = split_rng(f"{split} edges", seed)
        return [self._ask(problem, rng) for problem in self._graphs().examples(split, count=count, seed=seed)]

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Other edges of the same graph, with other vertex ids."""
        return self._ask(self._graphs().augment(example, rng), rng)

    def _ask(self, problem: Example, rng: np.random.Generator) -> Example:
        edges = problem.meta["edges"]
        if len(edges) < self.listed:
            raise ValueError(f"GraphEdges.listed={self.listed}: a problem has {len(edges)} edges only; list fewer")
        listed = edges[rng.permutation(len(edges))[: self.listed]]  # [listed, 2]
        *recalled, (root, target) = [f"{a} {b}".split() for a, b in listed[rng.permutation(self.listed)].tolist()]
        question = f"<s> {' | '.join(f'{a} {b}' for a, b in listed.tolist())} [R] {root}"
        steps = tuple(" ".join(edge) for edge in recalled)
        return Example(question, steps, target, {**problem.meta, "listed": listed})

    def verify(self, example: Example, text: str) -> Verdict:
        """Right if the vertex after the last `[A]` ends a listed edge from the asked source."""
        answer = self.format.read_answer(text)
        if answer is None or answer not in self.vocabulary()[:31]:
            return Verdict(Reason.UNPARSABLE, detail=f"{text[-40:]!r} does not end in [A] and a vertex")
        root = int(example.question.split()[-1])
        right = [root, int(answer)] in example.meta["listed"].tolist()
        return Verdict(Reason.RIGHT if right else Reason.WRONG, answer)
