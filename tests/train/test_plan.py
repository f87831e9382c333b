import pytest

from latentjax.methods.base import Stage
from train.plan import lay_out


def test_epochs_and_steps_follow_each_other():
    plan = lay_out([Stage(0, epochs=2), Stage(3, steps=5), Stage(7, epochs=1)], steps_per_epoch=10)
    assert [(s.start, s.stop) for s in plan.spans] == [(0, 20), (20, 25), (25, 35)]
    assert plan.total_steps == 35
    assert [plan.span(step).stage.index for step in (0, 19, 20, 24, 25, 34)] == [0, 0, 3, 3, 7, 7]
    assert [plan.epoch(step) for step in (0, 9, 10, 34)] == [0, 0, 1, 3]
    assert [plan.is_last_stage(step) for step in (24, 25)] == [False, True]


@pytest.mark.parametrize(
    ("stage", "resets"),
    [
        ({}, []),
        ({"reset_optimizer": True}, [20]),
        ({"reset_optimizer_every_epoch": True}, [20, 30, 40]),
    ],
)
def test_resets(stage, resets):
    plan = lay_out([Stage(0, epochs=2), Stage(1, epochs=3, **stage)], steps_per_epoch=10)
    assert [step for step in range(51) if plan.resets_optimizer(step)] == resets


def test_every_epoch_of_the_first_stage_resets_but_not_the_start():
    plan = lay_out([Stage(0, epochs=3, reset_optimizer=True, reset_optimizer_every_epoch=True)], steps_per_epoch=4)
    assert [step for step in range(13) if plan.resets_optimizer(step)] == [4, 8]


@pytest.mark.parametrize("stage", [Stage(0), Stage(0, epochs=1, steps=1), Stage(0, steps=0)])
def test_a_stage_needs_one_length(stage):
    with pytest.raises(ValueError, match=r"stages\[1\]"):
        lay_out([Stage(0, steps=1), stage], steps_per_epoch=10)


def test_an_empty_curriculum_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        lay_out([], steps_per_epoch=10)
