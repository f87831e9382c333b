"""A method whose answers are known beforehand, with the smallest task and tokenizer that it needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latentjax.backbone.config import BackboneConfig
from latentjax.methods.base import Lengths, Method, Prompts
from latentjax.rollout import Cost, Generation, Kind
from latentjax.tasks.base import Example, Format, Reason, Task, Verdict
from latentjax.tokenizers import Codec

PAD_ID, EOS_ID, ANSWER_ID, NOISE_ID, FIRST = 0, 1, 2, 3, 4
TEXT, WIDTH, SLOTS = 3, 2, 4


class NumberTokenizer:
    """Words are numbers; the number n has id n + FIRST."""

    vocab_size, pad_id, eos_id = 64, PAD_ID, EOS_ID

    def __init__(self):
        self.words = {"=": ANSWER_ID, "?": NOISE_ID}

    def encode(self, text: str) -> list[int]:
        return [self.words[w] if w in self.words else int(w) + FIRST for w in text.split()]

    def prompt(self, text: str, *, chat: bool = False) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        names = {token: word for word, token in self.words.items()}
        return " ".join(names.get(i) or str(i - FIRST) for i in ids if i not in (PAD_ID, EOS_ID))

    def token_id(self, token: str) -> int:
        return self.words[token]


@dataclasses.dataclass(frozen=True)
class Echo(Task):
    """The answer is the question's last number."""

    format = Format(question="{}", step="{}", answer="= {}")

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        self._check_split(split)
        if count is None:
            raise ValueError(f"count=None: {split} of Echo is generated, say how many problems")
        return [Example(f"{i % 7} {i % 13}", (), str(i % 13)) for i in range(seed, seed + count)]

    def verify(self, example: Example, text: str) -> Verdict:
        parsed = self.format.read_answer(text)
        if parsed is None:
            return Verdict(Reason.UNPARSABLE)
        return Verdict(Reason.RIGHT if parsed == example.answer else Reason.WRONG, parsed)


@dataclasses.dataclass(frozen=True)
class Known(Method):
    """Says the right number n where n < `right`, n + 1 where n < `wrong`, and noise otherwise; with fewer thoughts than
    `needs`, always noise. A thought is (n, slot); an intervention that replaces the last used one replaces n."""

    right: int = 100
    wrong: int = 100
    needs: int = 0
    slots: int = SLOTS

    def max_thoughts(self) -> int:
        return self.slots

    def prompts(self, examples: Sequence[Example], codec: Codec) -> Prompts:
        question = np.full((len(examples), self.lengths.question), PAD_ID, np.int32)
        mask = np.zeros_like(question, bool)
        for row, example in enumerate(examples):
            ids = codec.question(example)
            if len(ids) > self.lengths.question:
                raise ValueError(f"lengths.question={self.lengths.question}: example {row} has {len(ids)} tokens")
            question[row, : len(ids)], mask[row, : len(ids)] = ids, True
        spent = np.full(len(examples), min(2, self.slots), np.int32)
        return Prompts(question, mask, spent, {"eos": np.int32(EOS_ID), "pad": np.int32(PAD_ID)})

    def generate(
        self, params: Any, prompts: Prompts, key, *, thoughts=None, sampling, intervention=None, prefix=None, record=()
    ) -> Generation:
        TRACES.append(prompts.question.shape)
        batch, length = prompts.question.shape
        slots, counts = self.slots, prompts.thoughts
        last = jnp.take_along_axis(prompts.question, prompts.question_mask.sum(1, keepdims=True) - 1, 1)[:, 0]
        number = (last - FIRST).astype(jnp.float32)
        vectors = jnp.stack([jnp.tile(number[:, None], (1, slots)), jnp.tile(jnp.arange(slots), (batch, 1))], -1)
        if intervention is not None:
            vectors = jnp.where(intervention.where[..., None], intervention.value, vectors) + intervention.add
            number = vectors[:, 0, 0]
        number = number.astype(jnp.int32)
        said = jnp.where(number < self.right, number, number + 1) + FIRST
        noise = (number >= self.wrong) | (counts < self.needs)
        start = jnp.where(noise, NOISE_ID, ANSWER_ID)
        end = jnp.full_like(said, EOS_ID)
        text = jnp.stack([start, said, end, said], 1)  # what follows the end of the sequence must not be read
        kind = jnp.concatenate([jnp.full((batch, length), Kind.QUESTION), jnp.full((batch, 4), Kind.TEXT)], 1)
        tokens = jnp.concatenate([prompts.question, text], 1)
        cost = Cost(counts + 3, prompts.question_mask.sum(1) + counts + 3, jnp.full(batch, 3))
        mask = jnp.arange(slots) < counts[:, None]
        return Generation(tokens, kind, jnp.zeros(tokens.shape), vectors, mask, cost)


TRACES: list[tuple[int, ...]] = []  # shapes that `generate` was traced with


def known(max_positions: int = 32, **fields: Any) -> Known:
    backbone = BackboneConfig(vocab_size=64, max_positions=max_positions, width=4, layers=1, heads=1)
    return Known(backbone, Lengths(question=4, text=TEXT), **fields)
