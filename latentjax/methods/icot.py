"""iCoT: stepwise internalisation of a written chain of thought (Deng et al., arXiv 2405.14838).

The model is fine-tuned on question, chain, answer; the chain loses tokens from the left as training goes on, until nothing is
left and the answer is given directly. At scheduled removal level s an example loses its first s + o tokens, where o is drawn
per example from P(o = i) = (1 - e^-lam) e^(-lam i) ("removal smoothing", lam = 4: no offset in 98.2% of cases). The optimiser
is made anew at every new level. Loss on the remaining chain, the separator, and the answer.

Deviations: levels last a number of optimiser steps (`steps_per_removal`, one token each) instead of a fraction of an epoch of
808,000 lines; the chain stands between the start and end markers where the released code uses its end-of-sequence token
three times, so that generation can end at the end of sequence; offsets are not cut at 99.
"""

import dataclasses
from typing import Literal

import numpy as np

from latentjax.methods.base import Stage
from latentjax.methods.cot import CoT
from latentjax.methods.layout import Row, batch_rows
from latentjax.tokenizers import END_THOUGHTS, START_THOUGHTS


@dataclasses.dataclass(frozen=True)
class ICoT(CoT):
    """`steps_per_removal` optimiser steps per removed token, `removals` levels, then `steps` (or `epochs`) at the last."""

    steps_per_removal: int = 100
    removals: int = 8
    remove_all_beyond: int | None = None  # from this level on the whole chain is removed (GSM8K: 39)
    smoothing: float = 4.0  # lam; the paper's value
    side: Literal["left", "right"] = "left"

    def __post_init__(self):
        for field in ("steps_per_removal", "removals"):
            if getattr(self, field) < 1:
                raise ValueError(f"method.{field}={getattr(self, field)}: must be at least 1")
        if self.smoothing <= 0:
            raise ValueError(f"method.smoothing={self.smoothing}: lam must be positive")

    def special_tokens(self) -> tuple[str, ...]:
        return (START_THOUGHTS, END_THOUGHTS)

    def _question(self, example, codec) -> list[int]:
        return [*codec.question(example), codec.tokenizer.token_id(START_THOUGHTS)]

    def encode(self, examples, codec, stage, rng):
        # numpy's geometric counts trials from 1 with success probability 1 - e^-lam.
        offsets = rng.geometric(1.0 - np.exp(-self.smoothing), size=len(examples)) - 1
        everything = self.remove_all_beyond is not None and stage >= self.remove_all_beyond
        end = codec.tokenizer.token_id(END_THOUGHTS)
        rows = []
        for example, offset in zip(examples, offsets, strict=True):
            chain = [token for step in codec.steps(example) for token in step]
            removed = len(chain) if everything else min(stage + int(offset), len(chain))
            kept = chain[removed:] if self.side == "left" else chain[: len(chain) - removed]
            rows.append(Row(self._question(example, codec), 0, [*kept, end, *codec.answer(example)]))
        return batch_rows(rows, self.lengths, 0, codec.tokenizer.pad_id)

    def stages(self):
        levels = [Stage(s, steps=self.steps_per_removal, reset_optimizer=s > 0) for s in range(self.removals)]
        return (*levels, Stage(self.removals, epochs=self.epochs, steps=self.steps, reset_optimizer=True))
