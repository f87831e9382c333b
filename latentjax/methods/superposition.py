"""Continuous thoughts on directed-graph reachability (Zhu et al., arXiv 2505.12514; training dynamics: arXiv 2509.23365).

Coconut's feedback with a supervision of its own: every sequence has exactly one target token. For a problem of l hops at stage
s, let k = min(s, l) + 1, or with probability `uniform_prob` k uniform in 1..min(s, l) + 1. Then

    k <= l      question + (k - 1) thoughts -> one vertex of N_k          (no [A] in between)
    k = l + 1   question + l thoughts [A]   -> the target vertex

N_k are the vertices at hop k on some shortest path from root to target (`supervision="path"`), or all vertices at distance
exactly k (`"frontier"`, Coconut-BFS of the first paper). The loss is cross-entropy on a vertex drawn uniformly from N_k, or
with `loss_on="set"` the BFS loss of the second paper, over the cumulative set R of vertices reachable within k hops, root
included:

    L = -log( sum_{v in R} exp x_v / sum_u exp x_u )

Answer examples have plain cross-entropy. There are no markers around thoughts, and at test time a problem gets as many thoughts
as it has hops (the number is read from the problem: a leak of its depth that the paper has too).

Deviations from the released code: the first token is a start word of its own where the code puts its end-of-sequence token;
positions are right-padded; the optimiser's betas are the run's to set (paper (0.9, 0.95), code (0.9, 0.999)).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.generation import generate
from latentjax.methods.coconut import Coconut, thought_limits
from latentjax.methods.layout import Row, batch_prompts, batch_rows, states_after_thinking, text_loss
from latentjax.objectives.cross_entropy import mean_over_targets
from latentjax.rollout import Backbone
from latentjax.thoughts.feedback import feedback

ANSWER_MARK = "[A]"


@dataclasses.dataclass(frozen=True)
class GraphCoconut(Coconut):
    """Coconut on `GraphProsQA`, with the released settings of arXiv 2505.12514 as defaults."""

    max_latent_stage: int = 4
    epochs_per_stage: int = 25
    num_epochs: int = 300
    uniform_prob: float = 0.1
    reset_optimizer: Literal["never", "stage", "epoch"] = "never"
    markers: Literal["both", "start", "none"] = "none"
    supervision: Literal["path", "frontier"] = "path"
    loss_on: Literal["vertex", "set"] = "vertex"

    def encode(self, examples, codec, stage, rng):
        rows, sets = [], np.zeros((len(examples), self.backbone.vocab_size), bool)
        for i, example in enumerate(examples):
            hops = len(example.steps)
            most = min(stage, self.max_latent_stage, hops) + 1
            k = int(rng.integers(1, most + 1)) if self.uniform_prob and rng.random() < self.uniform_prob else most
            if k > hops:
                text = [*codec.answer(example)][
                    :-1
                ]  # no end of sequence: the target is the one token that is asked for
                sets[i, text[-1]] = True
            else:
                level = example.meta["neighbor_k" if self.supervision == "path" else "frontier_k"][k]
                text = [codec.tokenizer.token_id(str(level[rng.integers(len(level))]))]
                sets[i, [codec.tokenizer.token_id(str(v)) for v in example.meta["reachable_k"][k]]] = True
            rows.append(Row(codec.question(example), k - 1, text, unscored=len(text) - 1))
        extra = {"vertices": sets} if self.loss_on == "set" else {}
        return batch_rows(rows, self.lengths, self.slots_at(stage), codec.tokenizer.pad_id, extra)

    def batch_shapes(self, size, stage):
        batch = super().batch_shapes(size, stage)
        if self.loss_on == "vertex":
            return batch
        return batch.replace(extra={"vertices": jax.ShapeDtypeStruct((size, self.backbone.vocab_size), bool)})

    def prompts(self, examples, codec):
        questions = [codec.question(e) for e in examples]
        return batch_prompts(questions, [len(e.steps) for e in examples], self.lengths, codec, {"answer": ANSWER_MARK})

    def thoughts_at(self, stage):
        """None: always as many as the problem has hops."""
        return None

    def loss(self, params, batch, key, ctx, *, train):
        backbone = Backbone(self.backbone, params["backbone"])
        source = feedback(batch.thought_mask.sum(axis=1, dtype=jnp.int32))
        states = states_after_thinking(backbone, batch, key, source, train=train)
        if self.loss_on == "vertex":
            return text_loss(backbone, batch, states)
        logits = backbone.head(states)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        among = jax.nn.logsumexp(jnp.where(batch.extra["vertices"][:, None], log_probs, -jnp.inf), axis=-1)
        right = jnp.take_along_axis(batch.extra["vertices"], jnp.argmax(logits, axis=-1), axis=1)
        return mean_over_targets(-among, batch.loss_mask, right)

    def generate(self, params, prompts, key, *, thoughts=None, **options):
        """Think, force `[A]`, and read one token."""
        limits = thought_limits(thoughts, prompts, self.max_thoughts())
        return generate(
            Backbone(self.backbone, params["backbone"]), prompts.question, prompts.question_mask, key,
            thinking=feedback(limits), slots=self.max_thoughts(), max_new_tokens=1, ids=prompts.ids,
            end_marker=prompts.ids["answer"], hide_question=not self.answer_sees_question, **options,
        )  # fmt: skip
