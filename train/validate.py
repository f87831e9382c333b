"""Validation during training: the method's loss, and greedy generation judged by the task."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from latentjax.methods.base import Batch, Stage
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec, Tokenizer
from train.config import Experiment
from train.input import valid_batches
from train.parallel import Parallel, batch_form
from train.state import TrainState
from train.step import mean_over_devices


class Validator:
    """Validates the state of a run on the same problems every time."""

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        parallel: Parallel,
        shardings: TrainState,
    ):
        """`shardings`: where the arrays of a state live."""
        self._experiment, self._tokenizer, self._examples = experiment, tokenizer, examples
        self._parallel, self._shardings = parallel, shardings
        self._programs: dict[Hashable, Callable] = {}
        self._codec = Codec(tokenizer, experiment.task.format, experiment.chat)

    def _make_loss(self, axis: str | None) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
        def batch_loss(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
            ctx = {"step": state.step, "ema": state.average}
            loss, metrics = self._experiment.method.loss(state.eval_params, batch, state.key, ctx, train=False)
            return mean_over_devices((), metrics | {"loss": loss}, axis)[1]

        return batch_loss

    def _loss(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """Metrics of a batch (numpy arrays, this process's rows), by a program compiled for its shapes."""
        if (form := batch_form(batch)) not in self._programs:
            compiled, _ = self._parallel.compile(self._make_loss, state, self._shardings, batch, updates=False)
            self._programs[form] = compiled
        return self._programs[form](state, self._parallel.place(batch))

    def __call__(self, state: TrainState, stage: Stage) -> dict[str, float]:
        """Loss and metrics in the form of `stage`, means over all target tokens; and with generation `accuracy` with
        its 95% interval, `n` and `unparsable`, thinking as often as the stage trained the model to."""
        total, weight = {}, 0.0
        rows = self._parallel.rows
        for batch in valid_batches(self._experiment, self._codec, self._examples, stage.index, rows):
            found = jax.device_get(self._loss(state, batch))
            targets = float(found.pop("targets"))
            total = {name: total.get(name, 0.0) + targets * float(value) for name, value in found.items()}
            weight += targets
        record = {name: value / max(weight, 1.0) for name, value in total.items()}
        if self._experiment.validate_generation:
            record |= self._generate(state.eval_params, self._experiment.method.thoughts_at(stage.index))
        return record

    def _generate(self, params: Any, thoughts: int | None) -> dict[str, float]:
        # The evaluation program reads runs, which this package makes.
        from eval.evaluate import evaluate_split
        from eval.samples import grouped

        ways = self._parallel.ways
        result = evaluate_split(
            grouped(self._experiment.method, 1),
            params,
            self._experiment.task,
            self._tokenizer,
            self._examples,
            batch_size=min(self._experiment.batch_size, -(-len(self._examples) // ways) * ways),
            key=jax.random.fold_in(jax.random.key(self._experiment.seed), 2),
            thoughts=thoughts,
            chat=self._experiment.chat,
            sharding=self._parallel.batch_sharding,
        )
        names = ("accuracy", "low", "high", "n", "unparsable")
        return {name: np.asarray(getattr(result, name)).item() for name in names}
