"""Countdown: reach a target from k numbers, each used once, in k - 1 equations (CD-3, CD-4, CD-5).

The generator is that of Stream of Search (arXiv:2404.03683, released code), the written form and the test files are those of
MGDM (arXiv:2410.14157) and Dream: the question "86,28,13,31,96" lists the inputs and, last, the target; the response is
"86+28=114,31-13=18,114-18=96". Intermediate results are integers of at least 0; quotients are exact.

Of the targets 10..100 nine are held out: they are those of the published "test", and no training problem has them. So "test"
measures generalisation to unseen targets; "held_out" is the same kind of problem for choosing checkpoints, and "valid" has
the targets of training with inputs that training does not have in any order. (The generator's own third split asks for less,
a solution that training does not have. It is not published.) "game24_test" of CD-4 are the 100 games of 24 that Tree of
Thoughts (arXiv:2305.10601) tests on: 24 is a target that CD-4 trains on, none of the hundred inputs is in its training file.

The training files of CD-3 and CD-4 are what the released generator draws before it draws the published tests. That MGDM
trained on all of them is inferred, not stated. For CD-5 that stream is not known: its "train" is generated.

The response is the answer, and the steps are its equations one by one. So a method without a chain of thought trains on the
released response, and one with thoughts (in text or latent) thinks the equations and then writes them. The answer has no
marker, because the released response has none: it is the last line of a text, and a step ends its line. (A text that ends
with a line's end has steps and no answer: they are judged in its place.)
"""

import collections
import csv
import dataclasses
import functools
import gzip
import itertools
import json
import random
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Int

from latentjax.data import first, locate, read_lines
from latentjax.tasks.base import Example, Format, Reason, Task, Verdict
from latentjax.tasks.splits import check_count, draw
from latentjax.tokenizers import WordTokenizer

OPERATORS = "+*-/"  # in the order in which the search tries them
_EQUATION = re.compile(r"([0-9]{1,18})([-+*/])([0-9]{1,18})=([0-9]{1,18})")
_LARGEST_INPUT = 99
_SMALLEST_RANGE = 10  # with smaller inputs some targets cannot be reached at all
_TARGETS = range(10, 101)
_HELD_OUT = 9
_TRIES = 4096  # candidates whose solutions are searched at once
_CLASSES = {"train": "train", "valid": "valid", "held_out": "test"}  # of generated splits, see `splits.split_of_hash`
_RANKS_24 = slice(900, 1000)  # ranks 901 to 1000 by human time

Equation = tuple[int, str, int, int]  # left operand, operator, right operand, result


@dataclasses.dataclass(frozen=True)
class Countdown(Task):
    """`numbers` inputs in 1..`largest`. `example.meta`: inputs (tuple of int), target.

    With `largest` below 99 it is an easier task of our own, for small machines: there is less arithmetic to learn. Then
    "train" is generated too, and there is no published "test".

    "train" (of CD-5), "valid" and "held_out" are generated: no two of them, "test" and the published "train" share a problem, in
    any order of its inputs. Inputs are uniform given that a solution exists, targets are uniform before what other splits
    have is left out. The search is slow for CD-5: some hundreds of problems a second, of which "train" keeps eight tenths and
    the others one."""

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "held_out", "test", "game24_test")
    format: ClassVar[Format] = Format(question="{}\n", step="{}\n", answer="{}")

    numbers: int = 3
    largest: int = _LARGEST_INPUT

    def __post_init__(self):
        if self.numbers not in (3, 4, 5):
            raise ValueError(f"Countdown.numbers={self.numbers!r}: must be 3, 4 or 5")
        if self.largest not in range(_SMALLEST_RANGE, _LARGEST_INPUT + 1):
            raise ValueError(
                f"Countdown.largest={self.largest!r}: must be in {_SMALLEST_RANGE}..{_LARGEST_INPUT} (99: the benchmark)"
            )

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        if split == "game24_test":
            if self.numbers != 4:
                raise ValueError(f"split='game24_test': the game of 24 has 4 numbers, Countdown.numbers={self.numbers}")
            if self.largest < _LARGEST_INPUT:
                raise ValueError(
                    f"split='game24_test': with Countdown.largest={self.largest} some of its puzzles are training problems; "
                    "only the published training file has none of them"
                )
            return first(_games_of_24(), count, split)
        if split == "test":
            if self.largest < _LARGEST_INPUT:
                raise ValueError(
                    f"split='test': its inputs are up to 99, Countdown.largest={self.largest}; use 'held_out'"
                )
            return first(read_lines(locate(f"countdown/cd{self.numbers}_test.jsonl"), _parse), count, split)
        if split == "train" and self._released:
            return first(_Lines(_training_lines(self.numbers)), count, split)
        check_count(split, count)
        held_out = held_out_targets(self.numbers)
        targets = held_out if split == "held_out" else tuple(t for t in _TARGETS if t not in held_out)
        block = functools.partial(self._block, np.array(targets))
        return draw(
            _CLASSES[split],
            count,
            seed,
            block,
            canonical=lambda e: _unordered(e.question),
            exclude=self._published(split),
        )

    @property
    def _released(self) -> bool:
        """Whether the training file is published."""
        return self.numbers < 5 and self.largest == _LARGEST_INPUT

    def _published(self, split: str) -> frozenset[str]:
        """Problems of published splits with the inputs and the targets of `split`."""
        if self.largest < _LARGEST_INPUT:
            return frozenset()
        if split == "held_out":
            return frozenset(_unordered(example.question) for example in self.examples("test"))
        return _training_problems(self.numbers) if self._released else frozenset()

    def _block(self, targets: Int[np.ndarray, "T"], rng: np.random.Generator, count: int) -> list[Example]:
        """`count` problems by the generator's procedure: a target, then inputs, drawn again until there is a solution.

        Several draws of a problem's inputs are searched at once and the first solvable one is taken."""
        chosen = rng.choice(targets, count)
        inputs = np.zeros((count, self.numbers), np.int64)
        solutions = np.zeros((count, self.numbers - 1, 3), np.int64)
        pending = np.arange(count)
        while pending.size:
            tries = -(-_TRIES // pending.size)
            drawn = rng.integers(1, self.largest + 1, size=(pending.size, tries, self.numbers))
            solvable, found = first_solutions(drawn.reshape(-1, self.numbers), np.repeat(chosen[pending], tries))
            solvable = solvable.reshape(pending.size, tries)
            done, place = solvable.any(axis=1), solvable.argmax(axis=1)
            inputs[pending[done]] = drawn[done, place[done]]
            solutions[pending[done]] = found.reshape(pending.size, tries, -1, 3)[done, place[done]]
            pending = pending[~done]
        return [
            _example(tuple(numbers), target, written(solution))
            for numbers, target, solution in zip(inputs.tolist(), chosen.tolist(), solutions, strict=True)
        ]

    def vocabulary(self) -> tuple[str, ...]:
        return tuple("0123456789+-*/=,\n")

    def tokenizer(self, specials: Sequence[str] = ()) -> WordTokenizer:
        """A character-level tokenizer, as MGDM's."""
        return WordTokenizer.character_level(self.vocabulary(), specials)

    def verify(self, example: Example, text: str) -> Verdict:
        """Right if the equations are true, each uses two numbers that are there and puts its result in their place, and the
        target alone remains; the detail names what failed. Unparsable unless the last line is a list of equations (or the text
        is all steps and no answer, as a VAE writes it).

        The rule of Dream's released metric, with one difference: that counts numbers at the end only, so it accepts equations
        in any order, and results that two equations lend to each other."""
        answer = _response(text)
        equations, malformed = _read(answer)
        if malformed is not None:
            return Verdict(Reason.UNPARSABLE, detail=f"{malformed[:40]!r} is not an equation like 86+28=114")
        fault = _fault(equations, example.meta["inputs"], example.meta["target"])
        return Verdict(Reason.WRONG if fault else Reason.RIGHT, answer, fault)

    def judge_step(self, text: str) -> Reason:
        equations, malformed = _read(text)
        if malformed is not None or len(equations) != 1:
            return Reason.UNPARSABLE
        return Reason.RIGHT if _true(*equations[0]) else Reason.WRONG

    def canonical(self, text: str) -> str | None:
        """The equations of the answer in sorted order, operands of + and * sorted too; None if it is not a list of
        equations.

        LaDiR (arXiv:2510.04573) counts distinct valid solutions without stating when two are the same: this form is ours."""
        equations, malformed = _read(_response(text))
        if malformed is not None:
            return None
        ordered = [(min(a, b), op, max(a, b), c) if op in "+*" else (a, op, b, c) for a, op, b, c in equations]
        return ",".join(f"{a}{op}{b}={c}" for a, op, b, c in sorted(ordered))


def held_out_targets(numbers: int) -> tuple[int, ...]:
    """The nine targets of CD-`numbers` that no training problem has, sorted: the generator shuffles all targets with Python's
    Mersenne twister, whose seed is `numbers`, and takes the first tenth."""
    targets = list(_TARGETS)
    random.Random(numbers).shuffle(targets)
    return tuple(sorted(targets[:_HELD_OUT]))


def first_solutions(
    numbers: Int[np.ndarray, "N k"], targets: Int[np.ndarray, "N"]
) -> tuple[Bool[np.ndarray, "N"], Int[np.ndarray, "N k-1 3"]]:
    """The generator's depth-first search, for N problems at once.

    Pairs i < j are tried in lexicographic order, on each of them the operators in the order of `OPERATORS`; the result joins
    the other numbers at the end. Differences are absolute.

    Returns:
        Which problems have a solution, and the first one: an operator's index and its two operands (the larger first for
        differences and quotients) per equation.
    """
    count, size = numbers.shape
    found, solutions = np.zeros(count, bool), np.zeros((count, size - 1, 3), np.int64)
    for i, j in itertools.combinations(range(size), 2):
        a, b = numbers[:, i], numbers[:, j]
        results = _results(a, b)  # [4, N]
        if size == 2:  # the same search without a loop: nearly all of its time is spent here
            hits = results == targets
            found = hits.any(axis=0)
            solutions[:, 0] = _equations(hits.argmax(axis=0), a, b)
            break
        others = np.delete(numbers, (i, j), axis=1)
        for operator, result in enumerate(results):
            rows = np.flatnonzero(~found & (result >= 0))
            if not rows.size:
                continue
            solved, later = first_solutions(np.column_stack([others[rows], result[rows]]), targets[rows])
            rows, later = rows[solved], later[solved]
            found[rows] = True
            solutions[rows, 0] = _equations(np.full(rows.size, operator), a[rows], b[rows])
            solutions[rows, 1:] = later
    return found, solutions


def _results(a: Int[np.ndarray, "N"], b: Int[np.ndarray, "N"]) -> Int[np.ndarray, "4 N"]:
    """Of every operator; -1 where the quotient of the larger by the smaller number is not a whole one."""
    large, small = np.maximum(a, b), np.minimum(a, b)
    quotient, remainder = np.divmod(large, np.maximum(small, 1))
    quotient[(remainder > 0) | (small == 0)] = -1
    return np.stack([a + b, a * b, large - small, quotient])


def _equations(
    operators: Int[np.ndarray, "N"], a: Int[np.ndarray, "N"], b: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "N 3"]:
    swapped = (operators >= 2) & (a < b)
    return np.stack([operators, np.where(swapped, b, a), np.where(swapped, a, b)], axis=1)


def written(solution: Int[np.ndarray, "E 3"]) -> tuple[str, ...]:
    """The equations of one solution of `first_solutions` as text."""
    apply = {"+": int.__add__, "*": int.__mul__, "-": int.__sub__, "/": int.__floordiv__}
    return tuple(f"{a}{OPERATORS[op]}{b}={apply[OPERATORS[op]](a, b)}" for op, a, b in solution.tolist())


def _example(inputs: tuple[int, ...], target: int, steps: tuple[str, ...]) -> Example:
    question = ",".join(map(str, (*inputs, target)))
    return Example(question, steps, ",".join(steps), {"inputs": inputs, "target": target})


def _unordered(question: str) -> str:
    """The same text for all orders of the inputs."""
    *inputs, target = question.split(",")
    return ",".join((*sorted(inputs), target))


def _response(text: str) -> str:
    """The last line; of a text that ends with the end of a step, and so has no answer, its steps."""
    lines = text.strip().split("\n")
    return ",".join(lines) if text.endswith("\n") else lines[-1]


def _read(answer: str) -> tuple[list[Equation], str | None]:
    """The equations of an answer, and the first piece that is none."""
    equations = []
    for piece in answer.split(","):
        match = _EQUATION.fullmatch(piece)
        if match is None:
            return [], piece
        a, op, b, c = match.groups()
        equations.append((int(a), op, int(b), int(c)))
    return equations, None


def _true(a: int, op: str, b: int, c: int) -> bool:
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and b * c == a}[op]


def _fault(equations: Sequence[Equation], inputs: Sequence[int], target: int) -> str:
    """Which rule the equations break first; empty if none."""
    left = collections.Counter(inputs)
    for number, (a, op, b, c) in enumerate(equations, start=1):
        if not _true(a, op, b, c):
            return f"equation {number}: {a}{op}{b} is not {c}"
        for operand in (a, b):
            if not left[operand]:
                return f"equation {number}: there is no {operand} to use"
            left[operand] -= 1
        left[c] += 1
    remaining = sorted(left.elements())
    return "" if remaining == [target] else f"{remaining} remain, not the target {target} alone"


def _parse(line: str) -> Example:
    """The example of one line of a published file."""
    record = json.loads(line)
    *inputs, target = map(int, record["input"].split(","))
    return _example(tuple(inputs), target, tuple(record["output"].split(",")))


class _Lines(Sequence[Example]):
    """Examples of a large file, parsed when they are asked for: half a million of them do not fit in little memory."""

    def __init__(self, lines: Sequence[str]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        return _Lines(self._lines[index]) if isinstance(index, slice) else _parse(self._lines[index])


@functools.cache
def _training_lines(numbers: int) -> tuple[str, ...]:
    path = locate(f"countdown/cd{numbers}_train.jsonl.gz")
    return tuple(gzip.decompress(path.read_bytes()).decode().splitlines())


@functools.cache
def _training_problems(numbers: int) -> frozenset[str]:
    """All problems of a training file without the order of their inputs."""
    return frozenset(_unordered(json.loads(line)["input"]) for line in _training_lines(numbers))


def _games_of_24() -> list[Example]:
    """The hundred puzzles with the chain that the generator's search finds; each of them has one in whole numbers."""
    with locate("tasks/game24.csv").open(encoding="utf-8-sig", newline="") as file:
        puzzles = [tuple(map(int, row["Puzzles"].split())) for row in csv.DictReader(file)][_RANKS_24]
    _, solutions = first_solutions(np.array(puzzles), np.full(len(puzzles), 24))
    return [_example(inputs, 24, written(solution)) for inputs, solution in zip(puzzles, solutions, strict=True)]
