"""Validation during training: the method's loss, and greedy generation judged by the task."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from latentjax.methods.base import Stage
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec, Tokenizer
from train.config import Experiment
from train.input import to_devices, valid_batches
from train.state import TrainState


class Validator:
    """Validates the state of a run on the same problems every time."""

    def __init__(
        self, experiment: Experiment, tokenizer: Tokenizer, examples: Sequence[Example], sharding: NamedSharding
    ):
        """`sharding`: where a batch lives."""
        self._experiment, self._tokenizer, self._examples, self._sharding = experiment, tokenizer, examples, sharding
        self._codec = Codec(tokenizer, experiment.task.format)
        self._loss = jax.jit(self._batch_loss)

    def _batch_loss(self, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        ctx = {"step": state.step, "ema": state.ema}
        loss, metrics = self._experiment.method.loss(state.eval_params, batch, state.key, ctx, train=False)
        return metrics | {"loss": loss}

    def __call__(self, state: TrainState, stage: Stage) -> dict[str, float]:
        """Loss and metrics in the form of `stage`, means over all target tokens; and with generation `accuracy` with
        its 95% interval, `n` and `unparsable`, thinking as often as the stage trained the model to."""
        total, weight = {}, 0.0
        for batch in valid_batches(self._experiment, self._codec, self._examples, stage.index):
            found = jax.device_get(self._loss(state, to_devices(batch, self._sharding)))
            targets = float(found.pop("targets"))
            total = {name: total.get(name, 0.0) + targets * float(value) for name, value in found.items()}
            weight += targets
        record = {name: value / max(weight, 1.0) for name, value in total.items()}
        if self._experiment.validate_generation:
            record |= self._generate(state.eval_params, self._experiment.method.thoughts_at(stage.index))
        return record

    def _generate(self, params: Any, thoughts: int | None) -> dict[str, float]:
        from eval.evaluate import evaluate_split  # the evaluation program reads runs, which this package makes

        result = evaluate_split(
            self._experiment.method,
            params,
            self._experiment.task,
            self._tokenizer,
            self._examples,
            batch_size=min(self._experiment.batch_size, len(self._examples)),
            key=jax.random.fold_in(jax.random.key(self._experiment.seed), 2),
            thoughts=thoughts,
        )
        names = ("accuracy", "low", "high", "n", "unparsable")
        return {name: np.asarray(getattr(result, name)).item() for name in names}
