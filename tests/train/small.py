"""The smallest method and experiment on which every part of the training program can be tested in seconds."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.backbone.config import tiny
from latentjax.methods.base import Batch, Lengths, Method, Stage
from latentjax.objectives.cross_entropy import token_cross_entropy
from latentjax.tasks.base import Example
from latentjax.tasks.successor_list import SuccessorList
from train.config import Experiment, Mesh, Optimizer


@dataclasses.dataclass(frozen=True)
class Bigram(Method):
    """Predicts a text token from the mean of the question's embeddings and the token before it. Stage i has i thought slots
    if `grow`, and drops its first i steps. Noise on the embeddings plays dropout."""

    schedule: tuple[Stage, ...] = (Stage(0, steps=4),)
    noise: float = 0.1
    grow: bool = False
    poison_step: int | None = None  # the loss of this step is NaN

    def init(self, key: jax.Array) -> dict[str, Any]:
        return {"out": jax.random.normal(key, (self.backbone.width, self.backbone.vocab_size)) * 0.1}

    def encode(self, examples: Sequence[Example], codec: Any, stage: int, rng: np.random.Generator) -> Batch:
        question = np.array([codec.question(example) for example in examples], np.int32)
        text = np.zeros((len(examples), self.lengths.text), np.int32)
        mask = np.zeros_like(text, bool)
        for row, example in enumerate(examples):
            ids = [*np.ravel(codec.steps(example)[stage:]).astype(int), *codec.answer(example)]
            if len(ids) > self.lengths.text:
                raise ValueError(f"example {row}: text of {len(ids)} tokens, lengths.text={self.lengths.text}")
            text[row, : len(ids)], mask[row, : len(ids)] = ids, True
        scored = mask & (rng.random(mask.shape) < 0.7)  # so that microbatches have unequal numbers of targets
        return Batch(
            question=question,
            question_mask=np.ones_like(question, bool),
            thought_mask=np.ones((len(examples), stage if self.grow else 0), bool),
            text=text,
            text_mask=mask,
            loss_mask=scored,
        )

    def loss(self, params: Any, batch: Batch, key: jax.Array, ctx: Any, *, train: bool) -> tuple[jax.Array, dict]:
        embedding = params["backbone"]["embed"]["tokens"]
        asked = embedding[batch.question].mean(axis=1, keepdims=True)
        before = jnp.pad(embedding[batch.text[:, :-1]], ((0, 0), (1, 0), (0, 0)))
        hidden = jnp.tanh(asked + before)
        if train and self.noise:
            hidden += self.noise * jax.random.normal(key, hidden.shape)
        loss, metrics = token_cross_entropy(hidden @ params["method"]["out"], batch.text, batch.loss_mask)
        if self.poison_step is not None:
            loss = jnp.where(ctx["step"] == self.poison_step, jnp.nan, loss)
        return loss, metrics

    def stages(self) -> tuple[Stage, ...]:
        return self.schedule


def experiment(**changes: Any) -> Experiment:
    """A run of a few steps on one device; `changes` go to the method where it has such a field, else to the experiment."""
    of_method = {field.name for field in dataclasses.fields(Bigram)}
    method = functools.partial(Bigram, tiny(14, width=8, layers=1, heads=2, max_positions=24), Lengths(11, 7))
    settings: dict[str, Any] = {
        "name": "small",
        "task": SuccessorList(),
        "optimizer": Optimizer(learning_rate=1e-2, clip_norm=1.0, warmup_steps=2, schedule="cosine", end_fraction=0.1),
        "mesh": Mesh(data=1),
        "batch_size": 8,
        "train_examples": 27,
        "valid_examples": 11,
        "validate_every": 3,
        "validate_unit": "steps",
        "validate_generation": False,
        "log_every": 1,
        "checkpoint_every_steps": 2,
    }
    settings |= {name: value for name, value in changes.items() if name not in of_method}
    return Experiment(method=method(**{k: v for k, v in changes.items() if k in of_method}), **settings)
