"""Evaluate a method on a list of problems: batched generation, verdicts, costs, wall clock.

B is the batch, N the number of problems, K the thought slots, W the width of a thought.
"""

import dataclasses
import functools
import statistics
import time as clock
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from latentjax.methods.base import Method, Prompts
from latentjax.metrics import wilson
from latentjax.rollout import Generation, Intervention, Kind, Sampling
from latentjax.tasks.base import Example, Reason, Task
from latentjax.tokenizers import Codec, Tokenizer

TIMED_CALLS = 3  # repetitions of one batch whose median is a wall-clock figure
TIMED_PROBLEMS = 10  # problems whose median is the wall clock at batch 1


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model said to one problem, and what it cost."""

    question: str
    reference: str  # the right answer
    text: str  # generated, up to the end-of-sequence token
    parsed: str | None  # the answer that was read from the text
    reason: str  # right, wrong, unparsable
    detail: str
    thoughts: int
    forwards: int
    positions: int
    answer_tokens: int

    @property
    def correct(self) -> bool:
        return self.reason == Reason.RIGHT


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result on `n` problems. Costs are means per problem; times are seconds, None where they were not asked for."""

    n: int
    correct: int
    accuracy: float
    low: float  # 95% Wilson interval of accuracy
    high: float
    unparsable: int
    unparsable_rate: float
    thoughts: float
    forwards: float  # sequential forward passes
    positions: float  # positions processed, peeks and guidance included
    answer_tokens: float
    seconds_per_problem: float | None  # at the evaluation batch
    seconds_per_problem_batch1: float | None
    predictions: tuple[Prediction, ...] = dataclasses.field(repr=False)
    # Recorded thoughts [N, K, W], if asked for; not part of the figures.
    vectors: Float[np.ndarray, "N K W"] | None = dataclasses.field(default=None, repr=False, compare=False)

    def figures(self) -> dict[str, Any]:
        """The figures alone, ready for JSON."""
        left_out = ("predictions", "vectors")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}


def evaluate_split(
    method: Method,
    params: Any,
    task: Task,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int,
    key: jax.Array,
    thoughts: int | None = None,
    sampling: Sampling = Sampling(),
    intervention: Intervention | None = None,
    time: bool = False,
    keep_vectors: bool = False,
    chat: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Evaluation:
    """Generate an answer to each of `examples` and judge it.

    Batches have one size, so that generation compiles once; the last one is filled up with repeats that do not count.

    Args:
        params: {"backbone": ..., "method": ...}.
        examples: the N problems.
        batch_size: problems per call.
        key: randomness of sampling and of the thoughts; each batch gets its own fold.
        thoughts: number of thoughts for every problem instead of the method's own number.
        intervention: over all N problems: its batch axis has length N.
        time: also measure wall clock, compilation excluded: the median of `TIMED_CALLS` calls of the first full batch,
            and the median over `TIMED_PROBLEMS` problems (the first ones, repeated if there are fewer) at batch 1.
        keep_vectors: also return the thoughts of all problems in `Evaluation.vectors`.
        chat: write questions with the tokenizer's chat template, as a run of an experiment with `chat` was trained.
        sharding: how a batch of problems is split over devices, on which `params` are too. With several processes all of
            them make the same call and get the same result. None: one device.

    Raises:
        ValueError: before anything is compiled; see `encode_prompts`.
    """
    method = within_vocabulary(method, tokenizer)
    prompts = encode_prompts(method, Codec(tokenizer, task.format, chat), examples, thoughts)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    call = functools.partial(_generate, method, params, sampling=sampling)
    predictions: list[Prediction] = []
    vectors: list[np.ndarray] = []
    for number, rows in enumerate(_batches(len(examples), batch_size)):
        batch_key = jax.random.fold_in(key, number)
        asked, edits = _take(prompts, rows), _take_intervention(intervention, rows)
        generation = _gather(call(_split(asked, sharding), batch_key, edits))
        kept = min(batch_size, len(examples) - number * batch_size)
        predictions += _judge(task, tokenizer, [examples[i] for i in rows[:kept]], generation)
        if keep_vectors:
            vectors.append(generation.thoughts[:kept])
    seconds = _wall_clock(call, prompts, intervention, len(examples), batch_size, key) if time else (None, None)
    return _summarise(predictions, seconds, np.concatenate(vectors) if keep_vectors else None)


def check_split(
    method: Method,
    params: Any,
    task: Task,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int,
    thoughts: int | None = None,
    sampling: Sampling = Sampling(),
    chat: bool = False,
) -> None:
    """Raise the ValueErrors that `evaluate_split` would raise, method's own included, without compiling anything."""
    method = within_vocabulary(method, tokenizer)
    prompts = encode_prompts(method, Codec(tokenizer, task.format, chat), examples, thoughts)
    batch = _take(prompts, np.arange(batch_size) % len(examples))
    _generate.eval_shape(method, params, batch, jax.random.key(0), None, sampling=sampling)


def within_vocabulary(method: Method, tokenizer: Tokenizer) -> Method:
    """`method` that never generates an id which its tokenizer has no token for: a backbone may have rows to spare, which are
    improbable after training and not impossible. A VAE in it writes text too."""
    changed: dict[str, Any] = {}
    backbone, vae = method.backbone, getattr(method, "vae", None)
    if backbone.vocab_used is None and backbone.vocab_size > tokenizer.vocab_size:
        changed["backbone"] = dataclasses.replace(backbone, vocab_used=tokenizer.vocab_size)
    if vae is not None:
        changed["vae"] = within_vocabulary(vae, tokenizer)
    return dataclasses.replace(method, **changed)


def encode_prompts(method: Method, codec: Codec, examples: Sequence[Example], thoughts: int | None = None) -> Prompts:
    """All questions as one batch [N, ...] of prompts on the host, checked against the model's context.

    Raises ValueError if there are no examples, a question is longer than `method.lengths`, `thoughts` is not between 0
    and `method.max_thoughts()`, or question, thoughts and text exceed the backbone's positions.
    """
    if not examples:
        raise ValueError("examples: there are none, an evaluation needs at least one")
    _check_thoughts(method, thoughts)
    prompts = method.prompts(examples, codec)
    if thoughts is not None:
        # As data, not as a static number: a curve over numbers of thoughts compiles once.
        prompts = prompts.replace(thoughts=np.full(len(examples), thoughts, np.int32))
    spent, question = np.asarray(prompts.thoughts), np.asarray(prompts.question_mask).sum(axis=1)
    needed = np.broadcast_to(method.positions(question, spent), spent.shape)
    available = method.backbone.max_positions
    if needed.max() > available:
        row = int(needed.argmax())
        raise ValueError(
            f"thoughts={spent[row]}: example {row} needs {needed[row]} positions ({question[row]} of the question, "
            f"{spent[row]} thoughts, {method.lengths.text} of text, and markers), but backbone.max_positions={available}"
        )
    return prompts


def _check_thoughts(method: Method, thoughts: int | None) -> None:
    if thoughts is None:
        return
    if thoughts < 0:
        raise ValueError(f"thoughts={thoughts}: must not be negative")
    if thoughts > method.max_thoughts():
        raise ValueError(f"thoughts={thoughts}: this {method.name} has at most {method.max_thoughts()}")


@functools.partial(jax.jit, static_argnames=("method", "sampling"))
def _generate(
    method: Method,
    params: Any,
    prompts: Prompts,
    key: jax.Array,
    intervention: Intervention | None,
    *,
    sampling: Sampling,
) -> Generation:
    return method.generate(params, prompts, key, sampling=sampling, intervention=intervention)


def _batches(n: int, size: int) -> Iterator[Int[np.ndarray, "B"]]:
    """Indices of each batch; the last one starts again at the first example to fill up."""
    for start in range(0, n, size):
        yield np.arange(start, start + size) % n


def _take(tree: Any, rows: Int[np.ndarray, "B"]) -> Any:
    """The given rows of every array; scalars (token ids) stay."""
    return jax.tree.map(lambda leaf: leaf if np.ndim(leaf) == 0 else leaf[rows], tree)


def _split(prompts: Prompts, sharding: jax.sharding.NamedSharding | None) -> Prompts:
    """Every array but scalars, which all processes know, split as `sharding` says."""
    if sharding is None:
        return prompts

    def split(leaf: Any) -> Any:
        if np.ndim(leaf) == 0:
            return leaf
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda index: leaf[index])

    return jax.tree.map(split, prompts)


def _gather(generation: Generation) -> Generation:
    """`generation` as numpy arrays, from all processes."""
    if jax.process_count() == 1:
        return jax.device_get(generation)
    return multihost_utils.process_allgather(generation, tiled=True)


def _take_intervention(intervention: Intervention | None, rows: Int[np.ndarray, "B"]) -> Intervention | None:
    if intervention is None:
        return None
    # Cache entries have the batch on their second axis.
    kv = jax.tree.map(lambda leaf: leaf[:, rows], intervention.kv)
    return _take(intervention.replace(kv=None), rows).replace(kv=kv)


def _judge(
    task: Task, tokenizer: Tokenizer, examples: Sequence[Example], generation: Generation
) -> Iterator[Prediction]:
    counts = np.asarray(generation.thought_mask).sum(axis=1)
    for row, example in enumerate(examples):
        text = tokenizer.decode(_text_ids(generation.tokens[row], generation.kind[row], tokenizer.eos_id))
        verdict = task.verify(example, text)
        yield Prediction(
            question=example.question,
            reference=example.answer,
            text=text,
            parsed=verdict.parsed,
            reason=str(verdict.reason),
            detail=verdict.detail,
            thoughts=int(counts[row]),
            forwards=int(generation.cost.forwards[row]),
            positions=int(generation.cost.positions[row]),
            answer_tokens=int(generation.cost.answer_tokens[row]),
        )


def _text_ids(tokens: Int[np.ndarray, "S"], kind: Int[np.ndarray, "S"], eos: int) -> list[int]:
    """Tokens of the text slots before the first end-of-sequence token."""
    ids = tokens[kind == Kind.TEXT].tolist()
    return ids[: ids.index(eos)] if eos in ids else ids


def _wall_clock(
    call: Any, prompts: Prompts, intervention: Intervention | None, n: int, batch_size: int, key: jax.Array
) -> tuple[float, float]:
    """Seconds per problem at the evaluation batch and at batch 1."""
    batch = np.arange(batch_size) % n
    singles = [np.array([i % n]) for i in range(TIMED_PROBLEMS)]

    def seconds(rows: Int[np.ndarray, "B"]) -> float:
        inputs = (_take(prompts, rows), key, _take_intervention(intervention, rows))
        start = clock.perf_counter()
        jax.block_until_ready(call(*inputs))
        return clock.perf_counter() - start

    seconds(batch)  # the first call of a shape compiles
    at_batch = statistics.median(seconds(batch) for _ in range(TIMED_CALLS)) / batch_size
    seconds(singles[0])
    return at_batch, statistics.median(seconds(rows) for rows in singles)


def _summarise(
    predictions: Sequence[Prediction],
    seconds: tuple[float | None, float | None],
    vectors: Float[np.ndarray, "N K W"] | None,
) -> Evaluation:
    n, correct = len(predictions), sum(p.correct for p in predictions)
    unparsable = sum(p.reason == Reason.UNPARSABLE for p in predictions)
    low, high = wilson(correct, n)
    return Evaluation(
        n=n,
        correct=correct,
        accuracy=correct / n,
        low=low,
        high=high,
        unparsable=unparsable,
        unparsable_rate=unparsable / n,
        thoughts=statistics.fmean(p.thoughts for p in predictions),
        forwards=statistics.fmean(p.forwards for p in predictions),
        positions=statistics.fmean(p.positions for p in predictions),
        answer_tokens=statistics.fmean(p.answer_tokens for p in predictions),
        seconds_per_problem=seconds[0],
        seconds_per_problem_batch1=seconds[1],
        predictions=tuple(predictions),
        vectors=vectors,
    )
