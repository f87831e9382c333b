"""The reference sizes of the speed figures, as command-line options, and the machine's matmul peak."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.backbone import decoder
from latentjax.backbone.config import BackboneConfig
from latentjax.methods import Batch, Coconut, CoT, Lengths, Method, NoCoT, Pause, Prompts


@dataclasses.dataclass(frozen=True)
class Setting:
    """A from-scratch GPT-2-shaped model on random tokens; nothing about speed depends on what the tokens are."""

    method: str = "Coconut"  # Coconut, Pause, CoT or NoCoT; case does not matter
    vocab: int = 512
    thoughts: int = 6
    layers: int = 4
    width: int = 256
    heads: int = 4
    batch: int = 16
    question: int = 201  # tokens, the start marker included
    answer: int = 21  # tokens of the text, the end marker included
    dtype: str = "float32"
    seed: int = 0

    def build(self) -> Method:
        """The method with dropout 0.1 on embeddings, attention and residuals."""
        positions = self.question + self.thoughts + self.answer + 64
        backbone = BackboneConfig(
            self.vocab, positions, self.width, self.layers, self.heads, dtype=self.dtype
        ).with_dropout(0.1)
        lengths = Lengths(self.question, self.answer)
        named = {"coconut": Coconut, "pause": Pause, "cot": CoT, "nocot": NoCoT}
        if self.method.lower() not in named:
            raise ValueError(f"method={self.method!r}: the benchmark has Coconut, Pause, CoT and NoCoT")
        chosen = named[self.method.lower()]
        if issubclass(chosen, CoT):
            return chosen(backbone, lengths, steps=1)
        return chosen(backbone, lengths, max_latent_stage=max(self.thoughts, 1), c_thought=min(self.thoughts, 1))

    def params(self, method: Method) -> dict:
        """Random parameters."""
        first, second = jax.random.split(jax.random.key(self.seed))
        return {"backbone": decoder.init(method.backbone, first), "method": method.init(second)}

    def make_batch(self) -> Batch:
        """A full batch: every question, thought and text slot is used; all text but the end marker is scored."""
        rng = np.random.default_rng(self.seed)
        question = rng.integers(0, self.vocab, (self.batch, self.question), dtype=np.int32)
        text = rng.integers(0, self.vocab, (self.batch, self.answer), dtype=np.int32)
        slots = self.thoughts if self.method.lower() in ("coconut", "pause") else 0
        scored = np.ones(text.shape, bool)
        scored[:, 0] = slots == 0
        every = np.ones((self.batch, slots), bool)
        return Batch(question, np.ones(question.shape, bool), every, text, np.ones(text.shape, bool), scored)

    def make_prompts(self, count: int) -> Prompts:
        """`count` full-length questions and an end-of-sequence id that is never produced, so that every row runs on."""
        rng = np.random.default_rng(self.seed)
        question = rng.integers(0, self.vocab, (count, self.question), dtype=np.int32)
        ids = {"eos": np.int32(-1), "pad": np.int32(0), "end_thoughts": np.int32(1)}
        return Prompts(question, np.ones(question.shape, bool), np.full(count, self.thoughts, np.int32), ids)

    def forward_flops(self, positions: int, context: float, logits: int) -> float:
        """2 per weight and position outside embeddings, 4 D per position and attended position and layer, 2 D V per logit row."""
        weights = 12 * self.layers * self.width**2
        attention = 4 * self.layers * self.width * context
        return positions * (2 * weights + attention) + logits * 2 * self.width * self.vocab


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the best of `repeats` square matrix products on all cores of the default device: the limit to compare with."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def median_seconds(function: Callable[..., Any], repeats: int, *arguments: Any) -> float:
    """The median time of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
