"""Supervised fine-tuning on the written chain of thought: question, all steps, answer.

The explicit baseline of Coconut (arXiv 2412.06769, `cot: True` in its configs): no markers, no thoughts, cross-entropy on
every token after the question.
"""

import dataclasses
from typing import Any

from latentjax.generation import generate
from latentjax.methods.base import Method, Stage
from latentjax.methods.layout import Row, batch_prompts, batch_rows, states_in_one_pass, text_loss
from latentjax.rollout import Backbone
from latentjax.tokenizers import START_THOUGHTS


@dataclasses.dataclass(frozen=True)
class CoT(Method):
    """Question -> steps -> answer. Exactly one of `epochs` (the paper: 25 on GSM8K-Aug) and `steps` says how long."""

    epochs: int | None = None
    steps: int | None = None
    start_marker: bool = False  # end the question with the token that starts thoughts, as stage 0 of a curriculum does

    def special_tokens(self) -> tuple[str, ...]:
        return (START_THOUGHTS,) if self.start_marker else ()

    def _question(self, example, codec) -> list[int]:
        return codec.question(example) + [codec.tokenizer.token_id(token) for token in self.special_tokens()]

    def _text(self, example, codec) -> list[int]:
        return [*(token for step in codec.steps(example) for token in step), *codec.answer(example)]

    def encode(self, examples, codec, stage, rng):
        rows = [Row(self._question(e, codec), 0, self._text(e, codec)) for e in examples]
        return batch_rows(rows, self.lengths, 0, codec.tokenizer.pad_id)

    def prompts(self, examples, codec):
        questions = [self._question(e, codec) for e in examples]
        return batch_prompts(questions, [0] * len(examples), self.lengths, codec, {})

    def loss(self, params, batch, key, ctx, *, train):
        backbone = Backbone(self.backbone, params["backbone"])
        return text_loss(backbone, batch, states_in_one_pass(backbone, batch, key if train else None))

    def generate(self, params: Any, prompts, key, *, thoughts=None, intervention=None, **options):
        if intervention is not None or (isinstance(thoughts, int) and thoughts > 0):
            what = f"thoughts={thoughts}" if intervention is None else "intervention"
            raise ValueError(f"{what}: {self.name} has no thoughts")
        backbone = Backbone(self.backbone, params["backbone"])
        return generate(
            backbone, prompts.question, prompts.question_mask, key, thinking=None, slots=0,
            max_new_tokens=self.lengths.text, ids=prompts.ids, **options,
        )  # fmt: skip

    def stages(self):
        return (Stage(0, epochs=self.epochs, steps=self.steps),)
