"""Affine chain: r <- (2 r + a_i) mod m, starting from x. The question is `x a_1 .. a_n`; chance is 1 / m."""

import dataclasses

import numpy as np

from latentjax.tasks.base import Example
from latentjax.tasks.chains import ChainTask, chain_example
from latentjax.tasks.splits import check_fields


@dataclasses.dataclass(frozen=True)
class AffineChain(ChainTask):
    """`hops` steps modulo `modulus`; modulus^(hops + 1) problems in all.

    The modulus is odd: doubling is then a bijection and every operand bears on the answer."""

    modulus: int = 7
    hops: int = 4

    def __post_init__(self):
        check_fields(self, modulus=3, hops=1)
        if self.modulus % 2 == 0:
            raise ValueError(f"AffineChain.modulus={self.modulus}: must be odd, or early operands lose their effect")

    @property
    def values(self) -> int:
        return self.modulus

    def vocabulary(self) -> tuple[str, ...]:
        return (*map(str, range(self.modulus)), "ANS")

    def _block(self, rng: np.random.Generator, count: int) -> list[Example]:
        numbers = rng.integers(self.modulus, size=(count, self.hops + 1))
        results = np.empty((count, self.hops), np.int64)
        value = numbers[:, 0]
        for step in range(self.hops):
            value = (2 * value + numbers[:, step + 1]) % self.modulus
            results[:, step] = value
        return [
            chain_example(row, r, {"start": row[0], "operands": tuple(row[1:])})
            for row, r in zip(numbers.tolist(), results.tolist(), strict=True)
        ]

    def _apply(self, example: Example, step: int, value: int) -> int:
        return (2 * value + example.meta["operands"][step]) % self.modulus
