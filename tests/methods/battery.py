"""What every method is tested on. A new method is covered by adding a case here."""

import dataclasses
import functools

import jax
import numpy as np

from latentjax.backbone.config import BackboneConfig, Lora
from latentjax.methods import MGDM, Coconut, CoT, ICoT, Lengths, Method, NoCoT, Pause
from latentjax.methods.superposition import GraphCoconut
from latentjax.tasks.base import Example, Format
from latentjax.tokenizers import Codec, WordTokenizer
from tests.backbone import naive
from tests.quick import jit

# No biases of queries and keys: with learned positions the gradient of the latter is 0, which has no scale.
BACKBONE = BackboneConfig(vocab_size=16, max_positions=40, width=16, layers=2, heads=2, qkv_bias=False)
FORMAT = Format(question="{}", step="{}", answer="[A] {}")
WORDS = ("[A]", *map(str, range(10)))
LENGTHS = Lengths(question=7, text=12)  # the longest text: five written steps, end marker, [A], answer, end


def _example(question: str, steps: str, answer: str) -> Example:
    written = tuple(steps.split(", ")) if steps else ()
    levels = [[(i + k) % 10 for i in range(2)] for k in range(len(written) + 1)]
    meta = {
        "neighbor_k": levels,
        "frontier_k": [[*level, (level[0] + 5) % 10] for level in levels],
        "reachable_k": [sorted({v for level in levels[: k + 1] for v in level}) for k in range(len(levels))],
    }
    return Example(question, written, answer, meta)


# Eight of them, as many as the tests have devices: questions of 2 to 6 tokens, chains of 0 to 4 steps.
EXAMPLES = (
    _example("1 2 3", "4 5, 6, 7 8", "9"),
    _example("4 4", "1, 2", "3"),
    _example("0 9 8 7 6 5", "3 1, 2", "0"),
    _example("2 3", "5", "5"),
    _example("7 1 7", "", "2"),
    _example("6 5 4 3", "2, 1, 0", "1"),
    _example("8 0", "9 9, 1, 1, 4", "4"),
    _example("5 5 5 1", "3", "6"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and the stage whose data it is tested on."""

    method: Method
    stage: int = 0
    autoregressive: bool = True  # False: text is written all at once, its padding included

    @property
    def codec(self) -> Codec:
        return Codec(WordTokenizer.word_level(WORDS, self.method.special_tokens()), FORMAT)

    def batch(self, examples=EXAMPLES, *, stage: int | None = None, seed: int = 0):
        stage = self.stage if stage is None else stage
        return self.method.encode(examples, self.codec, stage, np.random.default_rng(seed))

    def prompts(self, examples=EXAMPLES):
        return self.method.prompts(examples, self.codec)

    def params(self):
        return {"backbone": naive.random_params(self.method.backbone), "method": self.method.init(jax.random.key(1))}

    def with_backbone(self, **changes) -> "Case":
        backbone = dataclasses.replace(self.method.backbone, **changes)
        return dataclasses.replace(self, method=dataclasses.replace(self.method, backbone=backbone))


_curriculum = dict(max_latent_stage=3, epochs_per_stage=2, num_epochs=10)
CASES = {
    "CoT": Case(CoT(BACKBONE, LENGTHS, steps=10)),
    "CoT with LoRA": Case(
        CoT(dataclasses.replace(BACKBONE, lora=Lora(2, 3.0, dropout=0.1)), LENGTHS, steps=10)
    ),
    "MGDM": Case(MGDM(BACKBONE, LENGTHS, steps=10, diffusion_steps=3, noise=0), autoregressive=False),
    "NoCoT": Case(NoCoT(BACKBONE, LENGTHS, steps=10, start_marker=True)),
    "ICoT": Case(ICoT(BACKBONE, LENGTHS, steps=10, removals=3, smoothing=1.0), 2),
    "Pause": Case(Pause(BACKBONE, LENGTHS, **_curriculum, mix_earlier=True), 3),
    "Coconut": Case(Coconut(BACKBONE, LENGTHS, **_curriculum, mix_earlier=True), 3),
    "Coconut without markers, question hidden": Case(
        Coconut(BACKBONE, LENGTHS, **_curriculum, markers="none", pad_latent_to_max=False, answer_sees_question=False), 4
    ),
    "Coconut without thought": Case(Coconut(BACKBONE, LENGTHS, **_curriculum, c_thought=0, markers="none"), 2),
    "GraphCoconut": Case(
        GraphCoconut(BACKBONE, LENGTHS, uniform_prob=0.5, loss_on="set", supervision="frontier"), 4
    ),
}  # fmt: skip


@functools.partial(jit, static_argnums=0, static_argnames="train")
def loss(method, params, batch, key=0, *, train=False):
    return method.loss(params, batch, jax.random.key(key), {}, train=train)


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(method, params, batch):
    return jax.value_and_grad(lambda p: method.loss(p, batch, jax.random.key(0), {}, train=False)[0])(params)
