"""ProsQA: which of two classes does a named entity belong to, given shuffled is-a statements (arXiv:2412.06769).

The chain of thought is one shortest path, a sentence a hop. Splits "valid" (300) and "test" (500) are the released
files; "train", "generated_valid" and "generated_test" come from the generator of `latentjax/tasks/graphs.py`, and none
of their graphs is isomorphic to a released one or to one of another split. `python -m latentjax.tasks.prosqa` prints
the statistics of generated beside released problems."""

import dataclasses
import enum
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from latentjax.data import first, locate, read_records
from latentjax.tasks.base import Example, Reason, Task, Verdict
from latentjax.tasks.graphs import GraphProblem, distances, draw_problems, hashes, layers
from latentjax.tasks.splits import split_rng

# The names and class nouns that occur in the released files.
NAMES = (
    "Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Gabriel", "Jack", "Max", "Oliver", "Polly", "Rex", "Sally",
    "Sam", "Stella", "Tom", "Wren",
)  # fmt: skip
NOUNS = (
    "bompus", "boompus", "brimpus", "chorpus", "dumpus", "felpus", "fompus", "gerpus", "gorpus", "grimpus",
    "gwompus", "hilpus", "impus", "jelpus", "jompus", "kerpus", "lempus", "lorpus", "numpus", "quimpus",
    "rempus", "rompus", "rorpus", "scrompus", "shumpus", "sterpus", "storpus", "terpus", "timpus", "tumpus",
    "vumpus", "worpus", "wumpus", "yerpus", "yimpus", "yumpus", "zhorpus", "zumpus",
)  # fmt: skip
RECORD = {  # fields of a released problem
    "question": str, "steps": list, "answer": str, "idx_to_symbol": list, "edges": list,
    "root": int, "target": int, "neg_target": int,
}  # fmt: skip
GENERATED = {"train": "train", "generated_valid": "valid", "generated_test": "test"}  # to the class of `split_of_hash`


class Outcome(enum.StrEnum):
    """What a generated chain of thought and answer amount to (the six classes of arXiv:2412.06769, section 5)."""

    CORRECT_PATH = "correct path"  # a shortest path to the target
    LONGER_PATH = "longer path"  # a path to the target that is not shortest
    HALLUCINATION = "hallucination"  # a sentence that is no edge of the graph, or does not continue the one before
    WRONG_TARGET = "wrong target"  # a path to another vertex
    CORRECT_LABEL = "correct label"  # no path, right answer
    INCORRECT_LABEL = "incorrect label"  # no path, any other answer


@dataclasses.dataclass(frozen=True)
class ProsQA(Task):
    """ProsQA in natural text. `example.meta`: names (of the vertices), edges (int32 [E, 2]), root, target,
    neg_target."""

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test", "generated_valid", "generated_test")

    def vocabulary(self) -> tuple[str, ...]:
        return ("Every", "Is", "is", "a", "or", ".", "?", "\n", "###", *NAMES, *NOUNS)

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        if split not in GENERATED:
            return first(read_released(f"prosqa_{split}.json"), count, split)
        problems, _ = draw_problems(GENERATED[split], count, seed, released_hashes())
        rng = split_rng(f"{split} text", seed)
        return [_write(problem, rng) for problem in problems]

    def verify(self, example: Example, text: str) -> Verdict:
        """Judge the sentence after the last `###`, "<name> is a <noun>.". The detail classifies the chain before it."""
        answer = self.format.read_answer(text)
        if answer is None:
            return Verdict(Reason.UNPARSABLE, detail="no ### marker")
        sentence = re.fullmatch(r"(\w+) is a (\w+)\s*\.?", answer)
        if not sentence:
            return Verdict(Reason.UNPARSABLE, detail=f"{answer[:60]!r} is not of the form '<name> is a <noun>.'")
        detail = classify(example, text).value
        subject, noun = sentence.groups()
        root, target = (example.meta["names"][example.meta[key]] for key in ("root", "target"))
        return Verdict(Reason.RIGHT if (subject, noun) == (root, target) else Reason.WRONG, noun, detail)


def classify(example: Example, text: str) -> Outcome:
    """The class of a generated text: steps, then `###` and the answer.

    Steps may begin in the middle of a path, as they do after latent thoughts: they then count as the path from the root
    that completes them in the fewest hops, and as a hallucination if there is none."""
    chain, _, answer = text.rpartition("###")
    steps = [step.strip() for step in re.findall(r"[^.\n]+", chain) if step.strip()]
    names, edges = example.meta["names"], {tuple(edge) for edge in np.asarray(example.meta["edges"]).tolist()}
    if not steps:
        right = answer.strip().removesuffix(".").rstrip() == example.answer.removesuffix(".")
        return Outcome.CORRECT_LABEL if right else Outcome.INCORRECT_LABEL
    number = {name: vertex for vertex, name in enumerate(names)}
    path = []
    for step in steps:
        found = re.fullmatch(r"(?:Every )?(\w+) is a (\w+)", step)
        edge = tuple(number.get(name) for name in found.groups()) if found else None
        if edge not in edges or (path and path[-1][1] != edge[0]):
            return Outcome.HALLUCINATION
        path.append(edge)
    problem = problem_of(example.meta)
    near = distances(problem.children(), problem.root)
    if path[0][0] not in near:
        return Outcome.HALLUCINATION
    if path[-1][1] != problem.target:
        return Outcome.WRONG_TARGET
    shortest = near[path[0][0]] + len(path) == near[problem.target]
    return Outcome.CORRECT_PATH if shortest else Outcome.LONGER_PATH


def problem_of(meta: Mapping[str, Any]) -> GraphProblem:
    """The graph problem that an example's `meta` describes."""
    edges = tuple(map(tuple, np.asarray(meta["edges"]).tolist()))
    vertices = 1 + max(map(max, edges))
    return GraphProblem(vertices, edges, meta["root"], meta["target"], meta["neg_target"])


def shortest_path(problem: GraphProblem, rng: np.random.Generator) -> list[int]:
    """Vertices v_1..v_l of one shortest path from the root (left out) to the target, drawn edge by edge."""
    children, path = problem.children(), [problem.root]
    for layer in layers(problem).neighbor[1:]:
        choices = [child for child in children[path[-1]] if child in layer]
        path.append(choices[int(rng.random() * len(choices))])
    return path[1:]


@functools.cache
def released_hashes() -> frozenset[int]:
    """Weisfeiler-Lehman hashes of the 800 released graphs; the graph_4 files hold 676 of the same graphs."""
    graphs = []
    for name in ("prosqa_valid.json", "prosqa_test.json"):
        for example in read_released(name):
            problem = problem_of(example.meta)
            graphs.append((problem.vertices, problem.edges))
    return frozenset(hashes(graphs).tolist())


def read_released(name: str) -> list[Example]:
    """The problems of a released file of ProsQA. Raises ValueError naming file, record and what is malformed."""
    return read_records(locate(name), RECORD, parse_record)


def parse_record(record: Mapping[str, Any]) -> Example:
    """The example of a released record. Raises ValueError naming the field that is malformed."""
    names, edges = tuple(record["idx_to_symbol"]), record["edges"]
    if not edges or not all(
        isinstance(e, list) and len(e) == 2 and all(v in range(len(names)) for v in e) for e in edges
    ):
        raise ValueError(f"field 'edges' must list pairs of vertices in [0, {len(names)})")
    for field in ("root", "target", "neg_target"):
        if record[field] not in range(len(names)):
            raise ValueError(f"field {field!r}={record[field]} is not a vertex in [0, {len(names)})")
    meta = {"names": names, "edges": np.array(edges, np.int32)}
    meta |= {field: record[field] for field in ("root", "target", "neg_target")}
    return Example(record["question"], tuple(record["steps"]), record["answer"], meta)


def _write(problem: GraphProblem, rng: np.random.Generator) -> Example:
    """`problem` in words: names drawn, statements and the two options in random order, a random shortest path."""
    edges = np.array(problem.edges, np.int32)
    persons = np.setdiff1d(np.arange(problem.vertices), edges[:, 1])
    names = np.empty(problem.vertices, object)
    names[persons] = rng.choice(NAMES, len(persons), replace=False)
    others = np.setdiff1d(np.arange(problem.vertices), persons)
    names[others] = rng.choice(NOUNS, len(others), replace=False)
    names = tuple(map(str, names))

    def sentence(parent: int, child: int) -> str:
        every = "" if names[parent][0].isupper() else "Every "
        return f"{every}{names[parent]} is a {names[child]}."

    statements = [sentence(*problem.edges[index]) for index in rng.permutation(len(edges))]
    options = [names[vertex] for vertex in rng.permutation([problem.target, problem.neg_target])]
    root = names[problem.root]
    path = [problem.root, *shortest_path(problem, rng)]
    meta = {
        "names": names, "edges": edges,
        "root": problem.root, "target": problem.target, "neg_target": problem.neg_target,
    }  # fmt: skip
    return Example(
        f"{' '.join(statements)} Is {root} a {options[0]} or {options[1]}?",
        tuple(sentence(parent, child) for parent, child in itertools.pairwise(path)),
        f"{root} is a {names[problem.target]}.",
        meta,
    )


if __name__ == "__main__":
    from latentjax.tasks.prosqa_statistics import main

    main()
