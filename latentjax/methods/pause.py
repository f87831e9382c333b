"""Pause tokens: positions that compute but carry no thought (Goyal et al., arXiv 2310.02226).

Every thought slot holds one and the same learned vector; the model sees question, pauses and text in one parallel pass, and
the answer is predicted from the last pause onward. Two uses, both baselines in Coconut (arXiv 2412.06769, Table 1):

- "pause as thought": Coconut's curriculum with pauses in the slots (the default here);
- "pause token": no curriculum, `curriculum=False`.

Deviation: the pause vector is a parameter of its own rather than a row of the (tied) embedding table, so a pause can never be
generated as text. It starts as a draw of the same scale as token embeddings.
"""

import dataclasses

import jax

from latentjax.generation import generate
from latentjax.methods.coconut import thought_limits
from latentjax.methods.curriculum import Curriculum
from latentjax.methods.layout import states_in_one_pass, text_loss
from latentjax.rollout import Backbone
from latentjax.thoughts.constant import constant


@dataclasses.dataclass(frozen=True)
class Pause(Curriculum):
    """One learned vector in place of every thought."""

    def init(self, key):
        scale = self.backbone.init_std if self.backbone.init == "gpt2" else 1.0
        return {"pause": scale * jax.random.normal(key, (self.backbone.width,))}

    def loss(self, params, batch, key, ctx, *, train):
        backbone = Backbone(self.backbone, params["backbone"])
        states = states_in_one_pass(
            backbone, batch, key if train else None, params["method"]["pause"],
            hide_question=not self.answer_sees_question,
        )  # fmt: skip
        return text_loss(backbone, batch, states)

    def generate(self, params, prompts, key, *, thoughts=None, **options):
        slots = self.max_thoughts()
        limits = thought_limits(thoughts, prompts, slots)
        return generate(
            Backbone(self.backbone, params["backbone"]), prompts.question, prompts.question_mask, key,
            thinking=constant(params["method"]["pause"], limits, slots), slots=slots, slots_per_step=slots,
            max_new_tokens=self.lengths.text, ids=prompts.ids, end_marker=prompts.ids.get("end_thoughts"),
            hide_question=not self.answer_sees_question, **options,
        )  # fmt: skip
