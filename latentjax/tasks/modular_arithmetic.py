"""Multi-step arithmetic modulo a prime whose operands stand in the question only.

The question is `x op_1 a_1 .. op_n a_n`, read from left to right, with op one of `+ - *` and 1 <= a_i < modulus; step i
is the running result. Each step is a bijection of the result before it (the modulus is prime), so changing any step
changes the answer: a swapped thought has a counterfactual answer that differs from the clean one. Chance is 1 /
modulus."""

import dataclasses

import numpy as np

from latentjax.tasks.base import Example
from latentjax.tasks.chains import ChainTask, chain_example
from latentjax.tasks.splits import check_fields

_OPERATORS = ("+", "-", "*")


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(ChainTask):
    """`hops` operations modulo `modulus`; modulus (3 (modulus - 1))^hops problems in all.

    With `masked` the pass that writes the answer must not see the question (`hide_question`), so that the thoughts are
    the only route from the operands to the answer; a model that answers then does use them."""

    modulus: int = 11
    hops: int = 3
    masked: bool = False

    def __post_init__(self):
        check_fields(self, modulus=3, hops=1)
        if any(self.modulus % divisor == 0 for divisor in range(2, int(self.modulus**0.5) + 1)):
            raise ValueError(
                f"ModularArithmetic.modulus={self.modulus}: must be a prime, so that every step is a bijection"
            )

    @property
    def hide_question(self) -> bool:
        return self.masked

    @property
    def values(self) -> int:
        return self.modulus

    def vocabulary(self) -> tuple[str, ...]:
        return (*map(str, range(self.modulus)), *_OPERATORS, "ANS")

    def _block(self, rng: np.random.Generator, count: int) -> list[Example]:
        starts = rng.integers(self.modulus, size=count).tolist()
        operators = rng.integers(len(_OPERATORS), size=(count, self.hops)).tolist()
        operands = rng.integers(1, self.modulus, size=(count, self.hops)).tolist()
        return [self._example(*problem) for problem in zip(starts, operators, operands, strict=True)]

    def _example(self, start: int, operators: list[int], operands: list[int]) -> Example:
        signs = tuple(_OPERATORS[index] for index in operators)
        question: list[object] = [start]
        results, value = [], start
        for sign, operand in zip(signs, operands, strict=True):
            question += [sign, operand]
            value = self._operate(value, sign, operand)
            results.append(value)
        return chain_example(question, results, {"start": start, "operators": signs, "operands": tuple(operands)})

    def _operate(self, value: int, sign: str, operand: int) -> int:
        results = {"+": value + operand, "-": value - operand, "*": value * operand}
        return results[sign] % self.modulus

    def _apply(self, example: Example, step: int, value: int) -> int:
        return self._operate(value, example.meta["operators"][step], example.meta["operands"][step])
