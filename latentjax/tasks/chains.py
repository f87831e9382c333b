"""What the tasks with a chain of single-token results share: answers are one word after the marker `ANS`."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from latentjax.tasks.base import Example, Format, Reason, Task, Verdict
from latentjax.tasks.splits import draw


@dataclasses.dataclass(frozen=True)
class ChainTask(Task):
    """Base of tasks whose steps are the values r_1 .. r_n in [0, `values`) and whose answer is r_n.

    `example.meta` holds the operands, so that `evaluate` can run the chain again from a changed step.
    """

    format: ClassVar[Format] = Format(question="{}", step="{}", answer="ANS {}")

    @property
    def values(self) -> int:
        """The number of values that a step can take; 1 / values is chance."""
        raise NotImplementedError

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        return draw(split, count, seed, self._block)

    def _block(self, rng: np.random.Generator, count: int) -> list[Example]:
        """`count` problems, whatever their split."""
        raise NotImplementedError

    def _apply(self, example: Example, step: int, value: int) -> int:
        """The result of step `step` (0-based) when the value before it is `value`."""
        raise NotImplementedError

    def evaluate(self, example: Example, step: int, value: int) -> str:
        """The answer if the result of step `step` (0-based, as in `example.steps`) were `value`: the steps after it are
        recomputed from the example's own operands. Raises ValueError if there is no such step or value."""
        if not 0 <= step < len(example.steps):
            raise ValueError(f"step={step}: the example has the steps 0..{len(example.steps) - 1}")
        if not 0 <= value < self.values:
            raise ValueError(f"value={value}: values lie in [0, {self.values})")
        for later in range(step + 1, len(example.steps)):
            value = self._apply(example, later, value)
        return str(value)

    def verify(self, example: Example, text: str) -> Verdict:
        """Right if exactly the reference value follows the last `ANS`; unparsable unless one value follows it."""
        answer = self.format.read_answer(text)
        if answer is None:
            return Verdict(Reason.UNPARSABLE, detail="no ANS marker")
        if answer not in map(str, range(self.values)):
            return Verdict(Reason.UNPARSABLE, detail=f"{answer[:40]!r} after ANS is not one value below {self.values}")
        return Verdict(Reason.RIGHT if answer == example.answer else Reason.WRONG, answer)


def chain_example(question: Sequence[object], results: Sequence[int], meta: dict) -> Example:
    """The example with the words `question` and the step results `results`, the last of which is the answer."""
    steps = tuple(map(str, results))
    return Example(" ".join(map(str, question)), steps, steps[-1], meta)
