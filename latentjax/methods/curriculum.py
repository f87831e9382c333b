"""Coconut's curriculum: stage by stage, the first written steps give way to thought slots.

arXiv 2412.06769 section 3 and the released `dataset.py` / `run.py`. Shared by `Coconut` and by the controls that see exactly
its data with something else in the slots.
"""

import dataclasses
from typing import Literal

import numpy as np

from latentjax.methods.base import Method, Stage
from latentjax.methods.layout import Row, batch_prompts, batch_rows
from latentjax.tokenizers import END_THOUGHTS, START_THOUGHTS


@dataclasses.dataclass(frozen=True)
class Curriculum(Method):
    """Data and schedule of a curriculum over stages 0, 1, ... with stage k replacing k steps by k * c_thought slots.

    Defaults are those of the released ProsQA config; GSM8K-Aug uses c_thought 2, epochs_per_stage 3, max_latent_stage 3,
    num_epochs 25, first_epoch 3.
    """

    c_thought: int = 1  # thoughts per removed step
    max_latent_stage: int = 6
    epochs_per_stage: int = 5
    num_epochs: int = 50
    first_epoch: int = 0  # the released `resume`: start at stage first_epoch // epochs_per_stage
    stage_steps: tuple[int, ...] | None = None  # optimiser steps of stages 0..max_latent_stage, instead of epochs
    pad_latent_to_max: bool = True  # beyond the last stage, problems with few steps still get all thoughts
    curriculum: bool = True  # False: "w/o curriculum", the last stage's data from the first epoch
    uniform_prob: float = 0.0  # with this probability an example is shown at a stage drawn from U{0..its steps}
    mix_earlier: bool = (
        False  # at stage k show stage i <= k with probability proportional to i + 1 (third-party variant)
    )
    reset_optimizer: Literal["never", "stage", "epoch"] = "epoch"  # paper: at each stage; released code: each epoch
    markers: Literal["both", "start", "none"] = "both"  # special tokens around the thoughts; paper: both
    pad_slots: bool = True  # every stage has the last stage's slots, unused ones masked: one compile for all stages
    answer_sees_question: bool = True  # False: positions after the thoughts may attend to thoughts and text only

    def __post_init__(self):
        for field in ("max_latent_stage", "epochs_per_stage", "num_epochs"):
            if getattr(self, field) < 1:
                raise ValueError(f"method.{field}={getattr(self, field)}: must be at least 1")
        if self.c_thought < 0:
            raise ValueError(f'method.c_thought={self.c_thought}: must be 0 ("w/o thought") or positive')
        if not 0 <= self.first_epoch < self.num_epochs:
            raise ValueError(f"method.first_epoch={self.first_epoch}: must lie in [0, num_epochs={self.num_epochs})")
        if not 0.0 <= self.uniform_prob <= 1.0:
            raise ValueError(f"method.uniform_prob={self.uniform_prob}: a probability lies in [0, 1]")
        if self.stage_steps is not None and len(self.stage_steps) != self.max_latent_stage + 1:
            raise ValueError(
                f"method.stage_steps={self.stage_steps} has {len(self.stage_steps)} entries; stages 0 to "
                f"max_latent_stage={self.max_latent_stage} need {self.max_latent_stage + 1}"
            )
        if self.stage_steps is not None and (min(self.stage_steps) < 0 or not any(self.stage_steps)):
            raise ValueError(f"method.stage_steps={self.stage_steps}: none may be negative, and one must be positive")
        if self.mix_earlier and self.uniform_prob:
            raise ValueError("method.mix_earlier and method.uniform_prob both draw the stage: set one of them")
        if not self.answer_sees_question and self.markers == "none" and not self.c_thought:
            raise ValueError("method.answer_sees_question=False needs thoughts: the answer would see nothing")

    def special_tokens(self) -> tuple[str, ...]:
        return {"both": (START_THOUGHTS, END_THOUGHTS), "start": (START_THOUGHTS,), "none": ()}[self.markers]

    def max_thoughts(self) -> int:
        return self.max_latent_stage * self.c_thought

    def thoughts_at(self, stage: int) -> int | None:
        return min(stage, self.max_latent_stage) * self.c_thought

    def stages(self) -> tuple[Stage, ...]:
        last = self.max_latent_stage + 1
        if self.stage_steps is not None:
            schedule = [(i, None, n) for i, n in enumerate(self.stage_steps) if n > 0]
            if not self.curriculum:
                schedule = [(last, None, sum(self.stage_steps))]
        elif not self.curriculum:
            schedule = [(last, self.num_epochs - self.first_epoch, None)]
        else:
            at = [min(epoch // self.epochs_per_stage, last) for epoch in range(self.first_epoch, self.num_epochs)]
            schedule = [(index, at.count(index), None) for index in sorted(set(at))]
        # At the beginning of a run the optimiser is new anyway.
        return tuple(
            Stage(
                index,
                epochs=epochs,
                steps=steps,
                reset_optimizer=self.reset_optimizer != "never" and i > 0,
                reset_optimizer_every_epoch=self.reset_optimizer == "epoch" and steps is None,
            )
            for i, (index, epochs, steps) in enumerate(schedule)
        )

    def draw_stage(self, stage: int, steps: int, rng: np.random.Generator) -> tuple[int, int]:
        """(steps to remove, thoughts to insert) for an example with `steps` steps at `stage`.

        The released rule: up to max_latent_stage both are the stage, whatever the number of steps; beyond it all steps go,
        and the thoughts are those of the last stage, or of min(steps, last stage) without `pad_latent_to_max`."""
        if self.uniform_prob and rng.random() < self.uniform_prob:
            stage = int(rng.integers(0, steps + 1))
        elif self.mix_earlier and stage:
            weights = np.arange(1, stage + 2)
            stage = int(rng.choice(stage + 1, p=weights / weights.sum()))
        if stage <= self.max_latent_stage:
            return stage, stage * self.c_thought
        kept = self.max_latent_stage if self.pad_latent_to_max else min(steps, self.max_latent_stage)
        return steps, kept * self.c_thought

    def slots_at(self, stage: int) -> int:
        """Thought slots of a batch of this stage."""
        stage = self.max_latent_stage if self.pad_slots or self.uniform_prob else min(stage, self.max_latent_stage)
        return stage * self.c_thought

    def _markers(self, codec) -> tuple[list[int], list[int]]:
        ids = [codec.tokenizer.token_id(token) for token in self.special_tokens()]
        return ids[:1], ids[1:]

    def encode(self, examples, codec, stage, rng):
        before, after = self._markers(codec)
        rows = []
        for example in examples:
            steps = codec.steps(example)
            skip, thoughts = self.draw_stage(stage, len(steps), rng)
            written = [token for step in steps[skip:] for token in step]
            text = [*after, *written, *codec.answer(example)]
            rows.append(Row(codec.question(example) + before, thoughts, text, unscored=len(after)))
        return batch_rows(rows, self.lengths, self.slots_at(stage), codec.tokenizer.pad_id)

    def prompts(self, examples, codec):
        before, _ = self._markers(codec)
        counts = [
            self.max_latent_stage if self.pad_latent_to_max else min(len(e.steps), self.max_latent_stage)
            for e in examples
        ]
        questions = [codec.question(e) + before for e in examples]
        thoughts = [count * self.c_thought for count in counts]
        markers = {"end_thoughts": END_THOUGHTS} if self.markers == "both" else {}
        return batch_prompts(questions, thoughts, self.lengths, codec, markers)
