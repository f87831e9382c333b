"""Successor list: follow a permutation that the question lists for a number of hops.

The question is `f(0) f(1) .. f(size-1) s`, step i is f^i(s). f is a single cycle through all values, so no start
returns to itself early: with shorter cycles a model can score above chance without following them. The answer never
equals s, so chance is 1 / (size - 1)."""

import dataclasses

import numpy as np

from latentjax.tasks.base import Example
from latentjax.tasks.chains import ChainTask, chain_example
from latentjax.tasks.splits import check_fields


@dataclasses.dataclass(frozen=True)
class SuccessorList(ChainTask):
    """f is a cycle of `size` values, the answer is f applied `hops` times to s. size! problems in all."""

    size: int = 10
    hops: int = 4

    def __post_init__(self):
        check_fields(self, size=2, hops=1)
        if self.hops % self.size == 0:
            raise ValueError(f"SuccessorList.hops={self.hops}: a multiple of size={self.size} leads back to the start")

    @property
    def values(self) -> int:
        return self.size

    def vocabulary(self) -> tuple[str, ...]:
        return (*map(str, range(self.size)), "ANS")

    def _block(self, rng: np.random.Generator, count: int) -> list[Example]:
        cycles = rng.permuted(np.tile(np.arange(self.size), (count, 1)), axis=1)  # [count, size], the order of visits
        successors = np.empty_like(cycles)
        np.put_along_axis(successors, cycles, np.roll(cycles, -1, axis=1), axis=1)
        starts = rng.integers(self.size, size=count)
        return [self._example(f, s) for f, s in zip(successors.tolist(), starts.tolist(), strict=True)]

    def _example(self, successors: list[int], start: int) -> Example:
        results, value = [], start
        for _ in range(self.hops):
            value = successors[value]
            results.append(value)
        return chain_example((*successors, start), results, {"successors": tuple(successors), "start": start})

    def _apply(self, example: Example, step: int, value: int) -> int:
        return example.meta["successors"][value]
