"""Long proofs: what docs/results.md claims, trained again from nothing."""

import jax
import pytest

from configs.quickstart import arm
from eval.evaluate import evaluate_split
from train.loop import train
from train.prepare import prepare
from train.run import load_run


def held_out(name, folder):
    """The evaluation of a quickstart arm, seed 0, on 500 test problems."""
    experiment = arm(name)
    train(prepare(experiment), folder / name, quiet=True, progress=False)
    run = load_run(folder / name)
    examples = experiment.task.examples("test", count=500)
    return evaluate_split(
        experiment.method, run.params, experiment.task, run.tokenizer, examples, batch_size=125, key=jax.random.key(0)
    )


@pytest.mark.slow
def test_coconut_beats_no_chain_by_fifteen_points_with_intervals_apart(tmp_path):
    coconut, nothing = held_out("Coconut", tmp_path), held_out("NoCoT", tmp_path)
    assert coconut.accuracy >= nothing.accuracy + 0.15
    assert coconut.low > nothing.high
