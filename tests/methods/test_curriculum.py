"""Coconut's curriculum against the rule and the tables of arXiv 2412.06769 and its released configurations."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from latentjax.methods import Coconut, Pause, Stage
from tests.methods.battery import BACKBONE, CASES, LENGTHS

PROSQA = Coconut(BACKBONE, LENGTHS)
GSM8K = Coconut(
    BACKBONE, LENGTHS, c_thought=2, epochs_per_stage=3, max_latent_stage=3, num_epochs=25, first_epoch=3
)  # fmt: skip


def released_rule(stage, steps, *, max_latent_stage, pad_latent_to_max, c_thought):
    if stage > max_latent_stage:
        skipped = steps
        thoughts = max_latent_stage if pad_latent_to_max else min(steps, max_latent_stage)
    else:
        skipped, thoughts = stage, stage
    return skipped, thoughts * c_thought


def test_thoughts_of_every_stage_and_length():
    settings = itertools.product((1, 3, 6), (True, False), (0, 1, 2))
    for most, pad, c in settings:
        rule = dict(max_latent_stage=most, pad_latent_to_max=pad, c_thought=c)
        method = Coconut(BACKBONE, LENGTHS, **rule)
        for stage, steps in itertools.product(range(9), range(9)):
            drawn = method.draw_stage(stage, steps, np.random.default_rng(0))
            assert drawn == released_rule(stage, steps, **rule)
            assert drawn[1] <= method.slots_at(stage) == most * c


def by_epoch(method) -> list[int]:
    return [stage.index for stage in method.stages() for _ in range(stage.epochs)]


def test_stage_of_every_epoch_on_prosqa():
    """Six stages of five epochs after stage 0; stage 6 in epochs 30-34, the last stage afterwards."""
    assert by_epoch(PROSQA) == [min(epoch // 5, 7) for epoch in range(50)]
    assert by_epoch(PROSQA)[30:35] == [6] * 5
    assert by_epoch(PROSQA)[35:] == [7] * 15


def test_stage_of_every_epoch_on_gsm8k():
    """Epochs 3-5 stage 1, 6-8 stage 2, 9-11 stage 3, 12-24 all steps gone."""
    assert by_epoch(GSM8K) == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 13
    assert [GSM8K.thoughts_at(s) for s in range(5)] == [0, 2, 4, 6, 6]


def test_optimiser_resets():
    """The paper resets at each stage, the released code at each epoch; a run's first stage has nothing to reset."""
    for reset, at_stage, at_epoch in (("never", False, False), ("stage", True, False), ("epoch", True, True)):
        stages = dataclasses.replace(PROSQA, reset_optimizer=reset).stages()
        assert [s.reset_optimizer for s in stages] == [False] + [at_stage] * 7
        assert {s.reset_optimizer_every_epoch for s in stages} == {at_epoch}


def test_without_curriculum_the_last_stage_from_the_first_epoch():
    assert by_epoch(dataclasses.replace(PROSQA, curriculum=False)) == [7] * 50
    steps = dataclasses.replace(PROSQA, curriculum=False, max_latent_stage=2, stage_steps=(5, 0, 7))
    assert steps.stages() == (Stage(3, steps=12),)


def test_stages_in_steps():
    method = dataclasses.replace(PROSQA, max_latent_stage=3, stage_steps=(30, 0, 20, 10), reset_optimizer="stage")
    assert method.stages() == (
        Stage(0, steps=30), Stage(2, steps=20, reset_optimizer=True), Stage(3, steps=10, reset_optimizer=True),
    )  # fmt: skip


def test_uniform_mixing():
    """With probability 0.3 a stage from U{0..steps}, else the given one."""
    method = dataclasses.replace(PROSQA, uniform_prob=0.3, max_latent_stage=3)
    rng = np.random.default_rng(0)
    removed = [method.draw_stage(2, 5, rng) for _ in range(20_000)]
    # Stages 4 and 5 are beyond the last: all five steps go, three thoughts come.
    outcomes = [(0, 0), (1, 1), (2, 2), (3, 3), (5, 3)]
    shares = 0.3 * np.array([1, 1, 1, 1, 2]) / 6 + 0.7 * np.array([0, 0, 1, 0, 0])
    counts = [removed.count(outcome) for outcome in outcomes]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts, 20_000 * shares).pvalue > 1e-3


@pytest.mark.parametrize("stage", [0, 3, 5])
def test_earlier_stages_mixed_in_proportion(stage):
    """At stage k, stage i with probability proportional to i + 1."""
    method = dataclasses.replace(PROSQA, mix_earlier=True)
    rng = np.random.default_rng(1)
    drawn = np.array([method.draw_stage(stage, 8, rng) for _ in range(20_000)])
    assert (drawn[:, 0] == drawn[:, 1]).all()
    counts = np.bincount(drawn[:, 0], minlength=stage + 1)
    weights = np.arange(1, stage + 2)
    assert stats.chisquare(counts, 20_000 * weights / weights.sum()).pvalue > 1e-3 or stage == 0
    assert counts.sum() == counts[: stage + 1].sum() == 20_000


def test_slots_are_padded_to_the_last_stage_only_if_asked():
    short = dataclasses.replace(GSM8K, pad_slots=False)
    assert [short.slots_at(s) for s in range(6)] == [0, 2, 4, 6, 6, 6]
    assert [GSM8K.slots_at(s) for s in range(6)] == [6] * 6
    mixed = dataclasses.replace(short, uniform_prob=0.1)
    assert mixed.slots_at(0) == 6  # an example may be shown at any stage


def test_prompts_think_as_in_the_last_stage():
    case = CASES["Coconut"]
    steps = [3, 2, 2, 1, 0, 3, 4, 1]
    for pad, expected in ((True, [3] * 8), (False, [min(s, 3) for s in steps])):
        method = dataclasses.replace(case.method, pad_latent_to_max=pad)
        assert dataclasses.replace(case, method=method).prompts().thoughts.tolist() == expected


@pytest.mark.parametrize("method", [Coconut, Pause])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(max_latent_stage=0), "max_latent_stage=0"),
        (dict(epochs_per_stage=0), "epochs_per_stage=0"),
        (dict(num_epochs=-1), "num_epochs=-1"),
        (dict(c_thought=-1), "c_thought=-1"),
        (dict(uniform_prob=1.5), "uniform_prob=1.5"),
        (dict(stage_steps=(1, 2)), r"stage_steps=\(1, 2\) has 2 entries.*need 7"),
        (dict(max_latent_stage=1, stage_steps=(0, 0)), r"stage_steps=\(0, 0\).*positive"),
        (dict(max_latent_stage=1, stage_steps=(2, -1)), r"stage_steps=\(2, -1\).*negative"),
        (dict(mix_earlier=True, uniform_prob=0.1), "mix_earlier and method.uniform_prob"),
        (dict(answer_sees_question=False, markers="none", c_thought=0), "answer_sees_question=False needs thoughts"),
        (dict(first_epoch=50), "first_epoch=50"),
        (dict(first_epoch=-1), "first_epoch=-1"),
    ],
    ids=str,
)
def test_impossible_setting_is_an_error_with_field_and_value(method, changes, message):
    with pytest.raises(ValueError, match=message):
        method(BACKBONE, LENGTHS, **changes)
