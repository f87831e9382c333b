"""Supervised fine-tuning on the answer alone: the lower baseline of Coconut (arXiv 2412.06769, `no_cot: True`)."""

import dataclasses

from latentjax.methods.cot import CoT


@dataclasses.dataclass(frozen=True)
class NoCoT(CoT):
    """Question -> answer: as `CoT`, with all steps left out."""

    def _text(self, example, codec) -> list[int]:
        return codec.answer(example)
