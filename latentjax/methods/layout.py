"""The static layout that all methods share: from rows of token ids to a batch, and from a batch to the states that predict text.

slots     [0, Tq)      [Tq, Tq + K)    [Tq + K, Tq + K + Tt)
          question     thoughts        text                     each part right-padded, invalid slots are masked holes
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from latentjax.backbone import decoder
from latentjax.backbone.attention import MaskSpec
from latentjax.generation import hidden_question
from latentjax.methods.base import Batch, Lengths, Prompts
from latentjax.objectives.cross_entropy import token_cross_entropy
from latentjax.rollout import MAIN, Backbone, Source, last_valid, prefill, run, start
from latentjax.tokenizers import Codec


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as token ids: `text` follows the thoughts, and its first `unscored` tokens are no targets."""

    question: Sequence[int]
    thoughts: int
    text: Sequence[int]
    unscored: int = 0


def batch_rows(rows: Sequence[Row], lengths: Lengths, slots: int, pad_id: int, extra: Mapping[str, Any] = {}) -> Batch:
    """Pad rows to the fixed shapes of `lengths` and `slots`. Raises ValueError naming the row that does not fit."""
    question, question_mask = _pad([row.question for row in rows], lengths.question, pad_id, "question")
    text, text_mask = _pad([row.text for row in rows], lengths.text, pad_id, "text")
    counts = np.array([row.thoughts for row in rows])
    if counts.size and counts.max() > slots:
        raise ValueError(
            f"row {counts.argmax()} of the batch has {counts.max()} thoughts; the method has {slots} slots"
        )
    unscored = np.array([row.unscored for row in rows])
    scored = text_mask & (np.arange(lengths.text) >= unscored[:, None])
    return Batch(question, question_mask, np.arange(slots) < counts[:, None], text, text_mask, scored, dict(extra))


def batch_prompts(
    questions: Sequence[Sequence[int]],
    thoughts: Sequence[int],
    lengths: Lengths,
    codec: Codec,
    markers: Mapping[str, str],
) -> Prompts:
    """Questions padded for generation; `markers` maps names used by the method to special tokens."""
    tokens, mask = _pad(questions, lengths.question, codec.tokenizer.pad_id, "question")
    ids = {"eos": codec.tokenizer.eos_id, "pad": codec.tokenizer.pad_id}
    ids |= {name: codec.tokenizer.token_id(token) for name, token in markers.items()}
    return Prompts(tokens, mask, np.array(thoughts, np.int32), {name: np.int32(x) for name, x in ids.items()})


def _pad(rows: Sequence[Sequence[int]], length: int, pad_id: int, part: str) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([len(row) for row in rows])
    if not sizes.size:
        raise ValueError("a batch needs at least one example, got none")
    if sizes.max() > length:
        raise ValueError(
            f"the {part} of row {sizes.argmax()} of the batch has {sizes.max()} tokens, but lengths.{part}={length}: "
            f"raise it (nothing is cut)"
        )
    if part == "question" and sizes.min() == 0:
        raise ValueError(f"the question of row {sizes.argmin()} of the batch is empty")
    mask = np.arange(length) < sizes[:, None]
    tokens = np.full(mask.shape, pad_id, np.int32)
    tokens[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return tokens, mask


def states_in_one_pass(
    backbone: Backbone,
    batch: Batch,
    key: Key[Array, ""] | None,
    middle: Float[Array, "D"] | None = None,
    *,
    hide_question: bool = False,
) -> Float[Array, "B Tt D"]:
    """Hidden states that predict each text token, from one parallel pass; thought slots, if any, hold the vector `middle`.

    With `hide_question` text positions attend to thoughts and text only."""
    inputs, valid = [backbone.embed(batch.question)], [batch.question_mask]
    if middle is not None:
        shape = (*batch.thought_mask.shape, middle.shape[0])
        inputs.append(jnp.broadcast_to(middle, shape).astype(inputs[0].dtype))
        valid.append(batch.thought_mask)
    before_text = sum(x.shape[1] for x in valid)
    inputs.append(backbone.embed(batch.text[:, :-1]))  # nothing reads what follows the last token
    valid.append(batch.text_mask[:, :-1])
    mask = jnp.concatenate(valid, axis=1)
    spec = MaskSpec()
    if hide_question:
        slot = jnp.arange(mask.shape[1])
        hidden_from = (slot[:, None] >= before_text) & (slot < batch.question.shape[1])
        spec = MaskSpec(allowed=jnp.broadcast_to(~hidden_from, (mask.shape[0], *hidden_from.shape)))
    out = decoder.apply(
        backbone.config, backbone.params, jnp.concatenate(inputs, axis=1), mask, mask=spec, key=key
    )  # fmt: skip
    head = out.hidden[:, :before_text]
    before = last_valid(head, mask[:, :before_text], head[:, 0])
    return jnp.concatenate([before[:, None], out.hidden[:, before_text:]], axis=1)


def states_after_thinking(
    backbone: Backbone, batch: Batch, key: Key[Array, ""], source: Source, *, train: bool, hide_question: bool = False
) -> Float[Array, "B Tt D"]:
    """Hidden states that predict each text token, after a rollout of `source` over the batch's thought slots.

    The question is run once, each thought is one commit in a scan, and the text is read in one pass against the cache."""
    prefill_key, think_key, read_key = jax.random.split(key, 3)
    slots = batch.thought_mask.shape[1]
    context = prefill(backbone, batch.question, batch.question_mask, slots, key=prefill_key if train else None)
    if slots:
        state, _ = run(backbone, source, start(source, {MAIN: context}), slots, think_key, train=train)
        context = state.contexts[MAIN]
    if hide_question:
        context = hidden_question(context)
    read = decoder.apply(  # read only: the cache has no room for the text, and nothing needs its keys and values
        backbone.config, backbone.params, batch.text[:, :-1], batch.text_mask[:, :-1], cache=context.cache,
        key=read_key if train else None,
    )  # fmt: skip
    return jnp.concatenate([context.hidden[:, None], read.hidden], axis=1)


def text_loss(backbone: Backbone, batch: Batch, states: Float[Array, "B Tt D"]) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the text's target tokens; logits are computed for text positions only."""
    return token_cross_entropy(backbone.head(states), batch.text, batch.loss_mask)
