"""Training batches: a pure function of the step, read ahead by a thread, resumable exactly.

Batch s is made from the seed and s alone (which epoch, which order, which random draws), so the state of the iterator
is one integer and a resumed run sees the same batches bit for bit. On several processes each one makes the rows that its
own devices need; the batches are those of a run on one process.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from jaxtyping import Int

from latentjax.methods.base import Batch, Method
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec
from train.config import Experiment
from train.plan import Plan

# Random streams of a run besides the parameters' and the step's keys; each is seeded by (seed, stream, number).
_ORDER, _DRAWS, _FRESH, _VALID = range(4)
_READ_AHEAD = 4  # batches
_PART = 16  # rows that are encoded together with random draws of their own, so that no process has to make all rows


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Independent random numbers for each (seed, stream...)."""
    return np.random.default_rng((seed, *stream))


def encode_rows(
    method: Method,
    codec: Codec,
    stage: int,
    examples: Sequence[Example],
    stream: tuple[int, ...],
    rows: Int[np.ndarray, "R"] | None,
    augment: Callable[[Example, np.random.Generator], Example] | None = None,
) -> Batch:
    """Rows `rows` (None: all) of the batch of `examples`, numpy arrays [R, ...]. Part i of `_PART` rows draws from
    (stream..., i) alone, so that only parts with a wanted row are made."""
    rows = np.arange(len(examples)) if rows is None else rows
    parts, made = np.unique(rows // _PART), []
    for part in parts:
        rng, own = generator(*stream, int(part)), examples[part * _PART : (part + 1) * _PART]
        if augment is not None:
            own = [augment(example, rng) for example in own]
        made.append(method.encode(own, codec, stage, rng))
    # Place of each row in what was made: all parts but the last of a batch have _PART rows.
    places = np.searchsorted(parts, rows // _PART) * _PART + rows % _PART
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[places], *made)


class Training:
    """The training batches of an experiment: `batch(step)`, or `iterator()` in order and ahead of time."""

    def __init__(
        self,
        experiment: Experiment,
        codec: Codec,
        plan: Plan,
        examples: Sequence[Example],
        rows: Int[np.ndarray, "R"] | None = None,
    ):
        """`examples`: those of epoch 0; every later epoch has as many. `rows`: of each batch, all if None."""
        self._experiment, self._codec, self._plan, self._examples = experiment, codec, plan, examples
        self._rows = rows
        self._lock = threading.Lock()
        self._order = functools.lru_cache(maxsize=2)(self._new_order)
        self._fresh = functools.lru_cache(maxsize=2)(self._new_examples)

    def _new_order(self, epoch: int) -> np.ndarray:
        return generator(self._experiment.seed, _ORDER, epoch).permutation(len(self._examples))

    def _new_examples(self, epoch: int) -> Sequence[Example]:
        return train_examples(self._experiment, epoch)

    def examples(self, step: int) -> list[Example]:
        """The examples of batch `step`, before augmentation."""
        size = self._experiment.batch_size
        epoch, place = divmod(step, self._plan.steps_per_epoch)
        rows = range(place * size, (place + 1) * size)
        if self._experiment.fresh_data:
            with self._lock:  # so that two threads never generate the same epoch
                problems = self._examples if epoch == 0 else self._fresh(epoch)
            return [problems[row] for row in rows]
        return [self._examples[index] for index in self._order(epoch)[rows.start : rows.stop]]

    def batch(self, step: int) -> Batch:
        """The rows of batch `step` (numpy arrays): augmented and encoded for the stage that the step belongs to."""
        experiment, stage = self._experiment, self._plan.span(step).stage.index
        return encode_rows(
            experiment.method, self._codec, stage, self.examples(step), (experiment.seed, _DRAWS, step), self._rows,
            experiment.task.augment,
        )  # fmt: skip

    def iterator(self) -> "grain.DatasetIterator[Batch]":
        """Batches 0, 1, ..., read ahead by one thread (more would only wait for each other: encoding is Python).

        `get_state` and `set_state` save and restore the place."""
        dataset = grain.MapDataset.range(self._plan.total_steps).map(self.batch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)))


def train_examples(experiment: Experiment, epoch: int = 0) -> Sequence[Example]:
    """Training problems: of the released or generated split, or new ones for `epoch` with `fresh_data`."""
    seed = experiment.seed
    if experiment.fresh_data:
        seed = int(generator(experiment.seed, _FRESH, epoch).integers(2**31))
    return experiment.task.examples("train", count=experiment.train_examples, seed=seed)


def valid_examples(experiment: Experiment) -> Sequence[Example]:
    """Validation problems, the same for every run of a task: generated ones do not depend on the experiment's seed."""
    return experiment.task.examples(experiment.valid_split, count=experiment.valid_examples, seed=0)


def valid_batches(
    experiment: Experiment,
    codec: Codec,
    examples: Sequence[Example],
    stage: int,
    rows: Int[np.ndarray, "R"] | None = None,
) -> Iterator[Batch]:
    """Rows `rows` (None: all) of the batches of all `examples` for `stage`; the last one is filled up with repeats, whose
    targets are masked."""
    size = experiment.batch_size
    for number, start in enumerate(range(0, len(examples), size)):
        problems = list(examples[start : start + size])
        counts = np.arange(size) < len(problems)
        problems += [problems[i % len(problems)] for i in range(size - len(problems))]
        batch = encode_rows(experiment.method, codec, stage, problems, (experiment.seed, _VALID, number), rows)
        yield batch.replace(loss_mask=batch.loss_mask & (counts if rows is None else counts[rows])[:, None])


def positions_used(batch: Batch) -> int:
    """Valid positions of `batch`, thoughts included: what throughput counts as tokens."""
    return int(batch.question_mask.sum() + batch.thought_mask.sum() + batch.text_mask.sum())


def check_lengths(experiment: Experiment, codec: Codec, plan: Plan, examples: Sequence[Example], split: str) -> None:
    """Encode the `examples` that are largest in one of the method's `sizes`, for every stage, so that one that does not fit is
    found before anything is compiled.

    Raises ValueError, of the tokenizer for an unknown word or of the method for a length, naming the split."""
    try:
        sizes = [
            experiment.method.sizes(
                len(codec.question(example)), [len(step) for step in codec.steps(example)], len(codec.answer(example))
            )
            for example in examples
        ]
        longest = sorted({i for column in np.array(sizes).T for i in np.argsort(column)[-4:].tolist()})
        for stage in {span.stage.index for span in plan.spans}:
            experiment.method.encode([examples[i] for i in longest], codec, stage, generator(experiment.seed, _VALID))
    except ValueError as error:
        raise ValueError(f"{split} split of {type(experiment.task).__name__}: {error}") from error
