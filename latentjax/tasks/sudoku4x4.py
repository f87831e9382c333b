"""4x4 Sudoku: fill a grid so that each row, column and 2x2 box holds 1, 2, 3 and 4.

"test" are the puzzles that Dream publishes (nine files of 108, one for each number of givens from 4 to 12), as released: rows
end in a newline, 0 is an empty cell. "train" and "valid" are generated: a solved grid and the places of the givens are drawn
uniformly, until the givens have that one solution, as the published puzzles do. (How those were drawn is not stated.)

No puzzle is in two splits, but one of "train" may be a puzzle of "test" with other names for its digits or its rows in another
order: there are only 25,728 puzzles with 4 givens, and thousands of such changes. Solved grids are shared: there are 288, of
which the published puzzles have 281.

With `unique=False` any givens that agree with some grid are a puzzle, each of its solutions is right, and training shows them
equally often: a task of our own in which samples can differ and all be right.

A step is a filled row, and the answer is the filled grid: as in `latentjax/tasks/countdown.py`, a method without a chain of
thought trains on the released response. The answer is the last four lines of a text.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int

from latentjax.data import first, locate, read_lines
from latentjax.tasks.base import Example, Format, Reason, Task, Verdict
from latentjax.tasks.splits import check_count, draw
from latentjax.tokenizers import WordTokenizer

LEAST_GIVENS, MOST_GIVENS = 4, 12  # of the published puzzles; with fewer than 4 givens none has only one solution
_CLASSES = {"train": "train", "valid": "valid", "held_out": "test"}  # of generated splits, see `splits.split_of_hash`


@dataclasses.dataclass(frozen=True)
class Sudoku4x4(Task):
    """Puzzles with `givens` filled cells, or with 4 (not `unique`: 1) to 12 of them, each number equally likely.
    `example.meta`: givens. "held_out" is a second generated split that is not trained on, as "valid"."""

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "held_out", "test")
    format: ClassVar[Format] = Format(question="{}\n", step="{}\n", answer="{}")

    givens: int | None = None
    unique: bool = True  # only puzzles with one solution

    def __post_init__(self):
        if self.givens is not None and self.givens not in range(self._least, MOST_GIVENS + 1):
            raise ValueError(
                f"Sudoku4x4.givens={self.givens!r}: must be an integer from {self._least} to {MOST_GIVENS}, or None for all "
                f"(unique={self.unique})"
            )

    @property
    def _least(self) -> int:
        return LEAST_GIVENS if self.unique else 1

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        if split == "test":
            if not self.unique:
                raise ValueError("split='test': its puzzles have one solution, Sudoku4x4.unique=False; use 'held_out'")
            return first(self._released(), count, split)
        check_count(split, count)
        released = self._released() if self.unique else []
        return draw(_CLASSES[split], count, seed, self._block, exclude=frozenset(e.question for e in released))

    def _numbers(self) -> range:
        """The numbers of givens."""
        return range(self._least, MOST_GIVENS + 1) if self.givens is None else range(self.givens, self.givens + 1)

    def _released(self) -> list[Example]:
        files = [read_lines(locate(f"sudoku4x4/sudoku_4x4_{n}.jsonl"), _parse) for n in self._numbers()]
        return list(itertools.chain.from_iterable(files))

    def _block(self, rng: np.random.Generator, count: int) -> list[Example]:
        wanted = rng.choice(np.array(self._numbers()), count)
        puzzles, solutions = np.zeros((count, 16), np.int64), np.zeros((count, 16), np.int64)
        pending = np.arange(count)
        while pending.size:
            drawn = grids()[rng.integers(len(grids()), size=pending.size)]
            places = rng.permuted(np.tile(np.arange(16), (pending.size, 1)), axis=1)
            puzzle = np.where(places < wanted[pending, None], drawn, 0)
            done = (fits(puzzle).sum(axis=1) == 1) | (not self.unique)
            puzzles[pending[done]], solutions[pending[done]] = puzzle[done], drawn[done]
            pending = pending[~done]
        return [_example(_rows(p), _rows(s)) for p, s in zip(puzzles.tolist(), solutions.tolist(), strict=True)]

    def vocabulary(self) -> tuple[str, ...]:
        return tuple("01234\n")

    def tokenizer(self, specials: Sequence[str] = ()) -> WordTokenizer:
        """A character-level tokenizer."""
        return WordTokenizer.character_level(self.vocabulary(), specials)

    def verify(self, example: Example, text: str) -> Verdict:
        """Right if the grid keeps the givens and every row, column and box has all four digits; the detail names what has
        not. Unparsable unless the last four lines are rows of four digits in 1..4."""
        rows = tuple((self.format.read_answer(text) or "").split("\n")[-4:])
        if len(rows) != 4 or not all(re.fullmatch(r"[1-4]{4}", row) for row in rows):
            return Verdict(Reason.UNPARSABLE, detail="the last four lines are not rows of four digits in 1..4")
        fault = _fault(rows, example.question.split("\n"))
        return Verdict(Reason.WRONG if fault else Reason.RIGHT, "\n".join(rows), fault)

    def canonical(self, text: str) -> str | None:
        """The grid; None if there is none."""
        return self.verify(_BLANK, text).parsed


@functools.cache
def grids() -> Int[np.ndarray, "288 16"]:
    """All solved grids, row by row."""
    orders = ["".join(order) for order in itertools.permutations("1234")]
    partial: list[tuple[str, ...]] = [()]
    for _ in range(4):
        partial = [(*rows, row) for rows in partial for row in orders if not _repeats((*rows, row))]
    return np.array([[int(digit) for digit in "".join(rows)] for rows in partial])


def fits(puzzles: Int[np.ndarray, "N 16"]) -> Bool[np.ndarray, "N 288"]:
    """Which of `grids` agree with the givens of each puzzle (0: empty)."""
    return ((puzzles[:, None] == 0) | (puzzles[:, None] == grids())).all(axis=2)


def _fault(rows: Sequence[str], puzzle: Sequence[str]) -> str:
    """Which rule a filled grid breaks; empty if none."""
    for r, c in itertools.product(range(4), repeat=2):
        if puzzle[r][c] not in ("0", rows[r][c]):
            return f"row {r + 1}, column {c + 1} is {rows[r][c]}, given is {puzzle[r][c]}"
    return _repeats(rows)


def _repeats(rows: Sequence[str]) -> str:
    """Which row, column or box of the first rows of a grid has a digit twice; empty if none."""
    cells = {(r, c): digit for r, row in enumerate(rows) for c, digit in enumerate(row)}
    for kind, place in (("row", lambda r, c: r), ("column", lambda r, c: c), ("box", lambda r, c: r // 2 * 2 + c // 2)):
        seen = set()
        for (r, c), digit in cells.items():
            unit = place(r, c)
            if (unit, digit) in seen:
                return f"{kind} {unit + 1} has {digit} twice"
            seen.add((unit, digit))
    return ""


def _rows(cells: Sequence[int]) -> tuple[str, ...]:
    return tuple("".join(map(str, cells[start : start + 4])) for start in range(0, 16, 4))


def _example(puzzle: tuple[str, ...], solution: tuple[str, ...]) -> Example:
    question = "\n".join(puzzle)
    return Example(question, solution, "\n".join(solution), {"givens": 16 - question.count("0")})


_BLANK = _example(("0000",) * 4, ())


def _parse(line: str) -> Example:
    """The example of one line of a published file."""
    record = json.loads(line)
    return _example(tuple(record["input"].split("\n")), tuple(record["output"].split("\n")))
