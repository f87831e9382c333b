"""Statistics of generated ProsQA problems beside those of the 800 released ones, and the check that no graph is
shared."""

import argparse
import collections
import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from latentjax.tasks.base import Example
from latentjax.tasks.graphs import GraphProblem, distances, draw_problems, layers
from latentjax.tasks.prosqa import GENERATED, ProsQA, problem_of, released_hashes


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured on one problem."""

    vertices: int
    edges: int
    hops: int
    shortest_paths: int
    target_deepest: bool  # among the leaves that only the root reaches
    distractor_depth: int  # hops from the other root
    distractor_deepest: bool
    persons: int
    root_is_first: bool  # the root is vertex 0
    first_option_right: bool
    only_root: int  # vertices that only the root reaches
    only_other: int
    both: int
    neither: int
    in_degrees: tuple[int, ...]  # of all vertices but 0 and 1


def measure(example: Example) -> Measures:
    """The measures of one ProsQA example. The two roots are vertices 0 and 1."""
    problem = problem_of(example.meta)
    children = problem.children()
    other = 1 - problem.root
    near, far = distances(children, problem.root), distances(children, other)
    target_leaves = [near[v] for v in near if v not in far and not children[v]]
    other_leaves = [far[v] for v in far if v not in near and not children[v]]
    in_degrees = np.bincount([child for _, child in problem.edges], minlength=problem.vertices)
    options = example.question.rpartition(" a ")[2]
    both = len(near.keys() & far.keys())
    return Measures(
        vertices=problem.vertices,
        edges=len(problem.edges),
        hops=near[problem.target],
        shortest_paths=_count_shortest(problem),
        target_deepest=near[problem.target] == max(target_leaves),
        distractor_depth=far[problem.neg_target],
        distractor_deepest=far[problem.neg_target] == max(other_leaves),
        persons=int((in_degrees == 0).sum()),
        root_is_first=problem.root == 0,
        first_option_right=options.startswith(example.meta["names"][problem.target] + " or "),
        only_root=len(near) - both,
        only_other=len(far) - both,
        both=both,
        neither=problem.vertices - len(near) - len(far) + both,
        in_degrees=tuple(in_degrees[2:].tolist()),
    )


def _count_shortest(problem: GraphProblem) -> int:
    """The number of shortest paths from root to target."""
    children, ways = problem.children(), {problem.root: 1}
    for layer in layers(problem).neighbor[1:]:
        later = dict.fromkeys(layer, 0)
        for vertex, count in ways.items():
            for child in children[vertex]:
                if child in later:
                    later[child] += count
        ways = later
    return ways[problem.target]


def rows(examples: Sequence[Example]) -> dict[str, float]:
    """Named statistics over `examples`: means, and shares in percent."""
    all_measures = [measure(example) for example in examples]

    def values(field: str) -> list[Any]:
        return [getattr(measures, field) for measures in all_measures]

    table = {
        "vertices, mean": float(np.mean(values("vertices"))),
        "vertices, standard deviation": float(np.std(values("vertices"))),
        "edges, mean": float(np.mean(values("edges"))),
        "edges, standard deviation": float(np.std(values("edges"))),
        "hops, mean": float(np.mean(values("hops"))),
        **_shares("hops", values("hops"), range(3, 7)),
        "shortest paths, mean": float(np.mean(values("shortest_paths"))),
        **_shares("distractor depth", values("distractor_depth"), range(1, 6)),
        "persons, mean": float(np.mean(values("persons"))),
        **_shares("persons", values("persons"), range(2, 6)),
        **_shares("parents", [n for degrees in values("in_degrees") for n in degrees], range(6)),
    }
    for field in ("target_deepest", "distractor_deepest", "root_is_first", "first_option_right"):
        table[f"{field.replace('_', ' ')} %"] = 100.0 * float(np.mean(values(field)))
    for field in ("only_root", "only_other", "both", "neither"):
        table[f"vertices reached by {field.replace('_', ' ')}, mean"] = float(np.mean(values(field)))
    return table


def _shares(name: str, values: Sequence[int], bins: Iterable[int]) -> dict[str, float]:
    counts = collections.Counter(values)
    return {f"{name} {value} %": 100.0 * counts[value] / len(values) for value in bins}


def isomorphic_pairs(left: Sequence[GraphProblem], right: Sequence[GraphProblem]) -> int:
    """The number of pairs (one of each) whose directed graphs are isomorphic, checked exactly with networkx.

    Pairs are compared if their sorted degree pairs agree; this does not rest on the hash that the generator uses."""
    import networkx

    def degrees(problem: GraphProblem) -> tuple:
        sources, targets = (
            np.bincount(ends, minlength=problem.vertices).tolist() for ends in zip(*problem.edges, strict=True)
        )
        return tuple(sorted(zip(sources, targets, strict=True)))

    def graph(problem: GraphProblem) -> "networkx.DiGraph":
        made = networkx.DiGraph(list(problem.edges))
        made.add_nodes_from(range(problem.vertices))
        return made

    groups = collections.defaultdict(list)
    for problem in right:
        groups[degrees(problem)].append(problem)
    return sum(
        networkx.is_isomorphic(graph(problem), graph(candidate))
        for problem in left
        for candidate in groups.get(degrees(problem), ())
    )


def main() -> None:
    """Print the table of the released problems beside `--count` generated ones."""
    parser = argparse.ArgumentParser(prog="python -m latentjax.tasks.prosqa", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="generated problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator (default: %(default)s)")
    parser.add_argument("--split", choices=sorted(GENERATED), default="train", help="(default: %(default)s)")
    arguments = parser.parse_args()
    task = ProsQA()
    try:
        released = [*task.examples("valid"), *task.examples("test")]
        begin = time.perf_counter()
        generated = task.examples(arguments.split, count=arguments.count, seed=arguments.seed)
        seconds = time.perf_counter() - begin
        problems, rejected = draw_problems(
            GENERATED[arguments.split], arguments.count, arguments.seed, released_hashes()
        )
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{'':42} {'released':>10} {'generated':>10}\n{'problems':42} {len(released):10d} {len(generated):10d}")
    ours = rows(generated)
    for name, value in rows(released).items():
        print(f"{name:42} {value:10.2f} {ours[name]:10.2f}")
    overlap = isomorphic_pairs(problems, [problem_of(example.meta) for example in released])
    print(f"\ngenerated graphs isomorphic to a released one: {overlap}")
    print("draws rejected: " + ", ".join(f"{reason} {count}" for reason, count in rejected.items()))
    print(f"{len(generated) / seconds:.0f} problems/s (seed {arguments.seed}, split {arguments.split})")
