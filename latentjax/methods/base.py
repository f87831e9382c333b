"""What a method is: how examples become a batch, what the loss is, where thoughts come from, and its curriculum.

A method is a frozen dataclass whose fields are its hyper-parameters and whose methods are pure functions, so jit treats
it as static. `params` is always {"backbone": ..., "method": ...}; `Method.init` makes the second part.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from latentjax.backbone.config import BackboneConfig
from latentjax.rollout import Generation, Intervention, Prefix
from latentjax.sampling import Sampling
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec


@struct.dataclass
class Batch:
    """Fixed-shape training batch in the static layout: question slots [0, Tq), thought slots [Tq, Tq+K), text after.

    Every part is right-padded; invalid slots are masked holes. A text token whose `loss_mask` is set is a target, predicted
    from the last valid position before it.
    """

    question: Any  # int32 [B, Tq]
    question_mask: Any  # bool [B, Tq]
    thought_mask: Any  # bool [B, K]: which thought slots a row uses (always the first n)
    text: Any  # int32 [B, Tt]
    text_mask: Any  # bool [B, Tt]
    loss_mask: Any  # bool [B, Tt], a subset of text_mask
    extra: Mapping[str, Any] = struct.field(default_factory=dict)  # what one method's loss needs besides


@struct.dataclass
class Prompts:
    """Batched questions for generation, right-padded: what `Method.prompts` makes from examples."""

    question: Any  # int32 [B, Tq]
    question_mask: Any  # bool [B, Tq]
    thoughts: Any  # int32 [B]: the number of thoughts the method spends on each row unless told otherwise
    ids: Mapping[str, Any]  # int32 scalars: token ids that generation needs ("eos", "pad", the method's markers)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a curriculum: which `index` the method's `encode` sees, for how many epochs (or steps), and whether the
    optimiser state is made anew when the stage begins (and, Coconut's released code, at every epoch of it).

    Exactly one of `epochs` and `steps` is set. `frozen` lists regular expressions of parameter paths that do not train.
    """

    index: int
    epochs: int | None = None
    steps: int | None = None
    reset_optimizer: bool = False
    reset_optimizer_every_epoch: bool = False
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Static sizes of a batch: maximal tokens of the question (with its marker) and of the text (with its end)."""

    question: int
    text: int


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods; see latentjax/methods/coconut.py for a complete one."""

    backbone: BackboneConfig
    lengths: Lengths

    @property
    def name(self) -> str:
        return type(self).__name__

    def special_tokens(self) -> tuple[str, ...]:
        """Tokens the tokenizer must know besides the task's words, padding and end of sequence."""
        return ()

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters besides the backbone's."""
        del key
        return {}

    @property
    def untrained(self) -> tuple[str, ...]:
        """Regular expressions of paths of parameters that no stage trains (parts of other runs, measured constants)."""
        return ()

    def adapt(self, params: dict[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
        """`params` of a run that starts from the weights of a `published` model, {"backbone": ...}, already in place: what
        else of the method starts from them is put in."""
        del published
        return params

    def parts(self) -> Mapping[str, "Method"]:
        """Methods whose trained parameters this one holds, by role: `init_from` names a run for each."""
        return {}

    def adopt(self, role: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Where the parameters of the part `role` go: a tree like this method's params with nothing else in it."""
        raise NotImplementedError

    def measure(self, params: Any, batch: Batch) -> Any:
        """Sums over a training batch of what has to be known about adopted parts before training."""
        del params, batch
        return ()

    def with_measured(self, params: dict[str, Any], sums: Any) -> dict[str, Any]:
        """`params` with what follows from the `sums` over several batches. Raises ValueError if the parts cannot be used."""
        del sums
        return params

    def encode(self, examples: Sequence[Example], codec: Codec, stage: int, rng: np.random.Generator) -> Batch:
        """Host side: one training batch of curriculum stage `stage`, numpy arrays, fixed shapes.

        Raises ValueError naming the example and the length if anything is longer than `lengths`."""
        raise NotImplementedError

    def batch_shapes(self, size: int, stage: int) -> Batch:
        """Shapes and types of what `encode` makes of `size` examples at `stage`, for plans without data or tokenizer."""
        lengths = self.lengths

        def array(kind: Any, length: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, length), kind)

        return Batch(
            question=array(np.int32, lengths.question),
            question_mask=array(bool, lengths.question),
            thought_mask=array(bool, self.slots_at(stage)),
            text=array(np.int32, lengths.text),
            text_mask=array(bool, lengths.text),
            loss_mask=array(bool, lengths.text),
        )

    def prompts(self, examples: Sequence[Example], codec: Codec) -> Prompts:
        """Host side: questions ready for `generate`, numpy arrays."""
        raise NotImplementedError

    def loss(
        self, params: Any, batch: Batch, key: jax.Array, ctx: Mapping[str, Any], *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar fp32 loss and metrics: fp32 scalars `loss` and `token_accuracy`, means over the batch's `targets` target
        tokens. Dropout is on if `train`."""
        raise NotImplementedError

    def generate(
        self,
        params: Any,
        prompts: Prompts,
        key: jax.Array,
        *,
        thoughts: int | jax.Array | None = None,
        sampling: Sampling = Sampling(),
        intervention: Intervention | None = None,
        prefix: Prefix | None = None,
        record: tuple[str, ...] = (),
    ) -> Generation:
        """Think and answer, batched and jittable. `thoughts` overrides the number of thoughts (one for all or one a row)."""
        raise NotImplementedError

    def sizes(self, question: int, steps: Sequence[int], answer: int) -> tuple[int, ...]:
        """From the token counts of an example's parts: numbers whose largest values over a data set decide whether it fits."""
        return question, sum(steps) + answer, answer, max(steps, default=0), len(steps), -len(steps)

    def positions(self, question: Any, thoughts: Any) -> Any:
        """How many of the backbone's positions a problem of so many question tokens and thoughts takes: numbers, or arrays of
        one entry a problem. One number if it is the same for all."""
        return question + thoughts + self.lengths.text

    def check_source(self, role: str | None, source: "Method") -> None:
        """Raise ValueError if a run of `source` cannot be this method's part `role` (None: a run of the same method to go on
        from), for reasons that differing fields of the part do not show."""
        del role, source

    def max_thoughts(self) -> int:
        """The number of thought slots of a batch, the largest `thoughts` that the method was trained for."""
        return 0

    def slots_at(self, stage: int) -> int:
        """Thought slots of a batch of `stage`."""
        del stage
        return self.max_thoughts()

    def thoughts_at(self, stage: int) -> int | None:
        """How many thoughts to generate with after training stage `stage`; None: what `prompts` says."""
        del stage
        return None

    def stages(self) -> tuple[Stage, ...]:
        """The curriculum, in order. Methods without one train stage 0 for as long as the run asks."""
        raise NotImplementedError
