"""When what happens in a run: the method's curriculum laid out in optimiser steps."""

import bisect
import dataclasses
from collections.abc import Sequence

from latentjax.methods.base import Stage


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps [start, stop) of one stage."""

    stage: Stage
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The curriculum in steps. A step is counted from 0; step s belongs to epoch s // steps_per_epoch."""

    spans: tuple[Span, ...]
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.spans[-1].stop

    def position(self, step: int) -> int:
        """Index of the span that `step` belongs to; the last one after the end."""
        return min(bisect.bisect_right([span.stop for span in self.spans], step), len(self.spans) - 1)

    def span(self, step: int) -> Span:
        return self.spans[self.position(step)]

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def is_last_stage(self, step: int) -> bool:
        return self.position(step) == len(self.spans) - 1

    def resets_optimizer(self, step: int) -> bool:
        """Whether the optimiser state is made anew just before `step` (it is new anyway before step 0)."""
        span = self.span(step)
        since = step - span.start
        if step == 0 or step >= self.total_steps:
            return False
        every_epoch = span.stage.reset_optimizer_every_epoch and since % self.steps_per_epoch == 0
        return every_epoch or (span.stage.reset_optimizer and since == 0)


def lay_out(stages: Sequence[Stage], steps_per_epoch: int) -> Plan:
    """The plan of `stages`. Raises ValueError naming a stage without a length, or with two."""
    if not stages:
        raise ValueError("method.stages() is empty: a curriculum has at least one stage")
    spans, start = [], 0
    for number, stage in enumerate(stages):
        if (stage.epochs is None) == (stage.steps is None):
            raise ValueError(f"stages[{number}]={stage}: set exactly one of epochs and steps")
        length = (stage.steps or 0) + (stage.epochs or 0) * steps_per_epoch
        if length < 1:
            raise ValueError(f"stages[{number}]={stage}: lasts {length} steps; leave an empty stage out")
        spans.append(Span(stage, start, start + length))
        start += length
    return Plan(tuple(spans), steps_per_epoch)
