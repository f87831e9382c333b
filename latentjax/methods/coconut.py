"""Coconut: chain of continuous thought (Hao et al., arXiv 2412.06769).

Mathematics. With embeddings e and the decoder f (its output after the final norm), a question q_1..q_n and K thoughts:

    e(z_1) = f(.., q_n, <start>)        the hidden state at the start marker
    e(z_{j+1}) = f(.., z_j)             fed back unchanged: no projection, no norm, no stop-gradient
    loss = mean of -log p(text token)   over the text after the thoughts, gradients flow through all of them (section 3)

The curriculum is `Curriculum`'s; inference thinks max_latent_stage * c_thought times, then answers (section 3.3).

Deviations from the released code, none of which changes the function that is computed:
- the question is right-padded and holes are masked, where the released collator left-pads up to the first thought;
- thoughts are written to a cache in one scan, where the released loop re-runs the model with a growing prefix;
- generation is batched and cached, and the first generated token is checked for the end of sequence.
Options that are not the paper's: markers other than "both", `stage_steps`, `mix_earlier`, `answer_sees_question`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.generation import generate
from latentjax.methods.curriculum import Curriculum
from latentjax.methods.layout import states_after_thinking, states_in_one_pass, text_loss
from latentjax.rollout import Backbone
from latentjax.thoughts.feedback import feedback


def thought_limits(thoughts, prompts, slots: int):
    """How many thoughts each row spends, int32 [B]: the override (one for all or one a row) or the prompts' own number.

    Raises ValueError if a number known before compilation exceeds the slots the method was trained with."""
    wanted = prompts.thoughts if thoughts is None else thoughts
    known = not isinstance(wanted, jax.Array)
    if known and (np.min(wanted) < 0 or np.max(wanted) > slots):
        raise ValueError(f"thoughts={wanted}: this method has 0 to {slots} thoughts")
    return jnp.broadcast_to(jnp.asarray(wanted, jnp.int32), prompts.thoughts.shape)


@dataclasses.dataclass(frozen=True)
class Coconut(Curriculum):
    """Continuous thoughts under the step-removal curriculum. `c_thought=0` with `markers="none"` is "w/o thought"."""

    def loss(self, params, batch, key, ctx, *, train):
        backbone = Backbone(self.backbone, params["backbone"])
        if batch.thought_mask.shape[1] == 0:
            states = states_in_one_pass(backbone, batch, key if train else None)
        else:
            source = feedback(batch.thought_mask.sum(axis=1, dtype=jnp.int32))
            states = states_after_thinking(
                backbone, batch, key, source, train=train, hide_question=not self.answer_sees_question
            )  # fmt: skip
        return text_loss(backbone, batch, states)

    def generate(self, params, prompts, key, *, thoughts=None, **options):
        limits = thought_limits(thoughts, prompts, self.max_thoughts())
        return generate(
            Backbone(self.backbone, params["backbone"]), prompts.question, prompts.question_mask, key,
            thinking=feedback(limits), slots=self.max_thoughts(), max_new_tokens=self.lengths.text, ids=prompts.ids,
            end_marker=prompts.ids.get("end_thoughts"), hide_question=not self.answer_sees_question, **options,
        )  # fmt: skip
