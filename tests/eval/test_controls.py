"""Controls of thoughts against a method whose answer is its first thought."""

import dataclasses

import jax
import numpy as np
import pytest

from eval.controls import Share, controls_table, donor_share, run_controls, spelled_shares
from eval.evaluate import evaluate_split
from latentjax.metrics import wilson
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec
from tests.eval.fake import FIRST, SLOTS, WIDTH, Echo, NumberTokenizer, known

TASK = Echo()
CODEC = Codec(NumberTokenizer(), TASK.format)


def with_steps(examples):
    """The steps of a problem are its answer, then 1, 2, ..."""
    return [dataclasses.replace(e, steps=(e.answer, "1", "2", "3")) for e in examples]


def params(vocabulary: int, width: int):
    """A tied head that reads token FIRST + n from the vector (n, slot), for slot 0."""
    numbers = np.arange(vocabulary) - FIRST
    # argmax_n of n x - n^2 / 2 is n = x; the second coordinate stands in for the constant 1.
    table = np.stack([numbers, -(numbers**2) / 2], axis=1)
    return {"backbone": {"embed": {"tokens": table.astype(np.float32)}}}


def test_answers_follow_the_thoughts():
    # Answers 0..12 in turn, then 0, 1, 2: the donor of problem 0 is the last one, with answer 2.
    examples = with_steps(TASK.examples("valid", count=16))
    method = dataclasses.replace(known(), backbone=dataclasses.replace(known().backbone, width=WIDTH))

    def evaluate(intervention):
        return evaluate_split(
            method, params(64, WIDTH), TASK, NumberTokenizer(), examples, batch_size=6, key=jax.random.key(0),
            intervention=intervention, keep_vectors=True,
        )  # fmt: skip

    controls = run_controls(method, params(64, WIDTH), TASK, CODEC, examples, evaluate)
    assert controls.clean.correct == 16
    assert [p.parsed for p in controls.zeroed.predictions] == ["0"] * 16
    assert controls.zeroed.correct == 2  # two problems have the answer 0
    assert controls.swapped.correct == 0
    assert controls.donor == Share(16, 16)
    record = controls.record()
    assert record["zeroed"]["accuracy"] == 2 / 16
    assert record["donor"]["share"] == 1.0
    assert controls_table(controls, "known").row_count == 4 + len(controls.spelled)


def test_donors_with_the_same_answer_do_not_count():
    examples = [Example(f"0 {a}", (), str(a)) for a in (3, 3, 5, 7)]  # donors 7, 3, 3, 5
    method = known(right=6)  # says 8 for 7
    swapped = evaluate_split(
        method, {}, TASK, NumberTokenizer(), [examples[i - 1] for i in range(4)], batch_size=4, key=jax.random.key(0)
    )
    share = donor_share(TASK, examples, [examples[i - 1] for i in range(4)], swapped)
    assert share == Share(2, 3)  # problem 1 is left out, problem 0 was answered with 8 instead of 7
    assert share.interval == wilson(2, 3)


def test_without_different_answers_there_is_no_swap():
    examples = [Example("0 3", (), "3")] * 2
    swapped = evaluate_split(known(), {}, TASK, NumberTokenizer(), examples, batch_size=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="same answer"):
        donor_share(TASK, examples, examples, swapped)


def test_a_thought_spells_the_token_that_the_head_reads_from_it():
    examples = with_steps(TASK.examples("valid", count=13))
    method = dataclasses.replace(known(), backbone=dataclasses.replace(known().backbone, width=WIDTH))
    vectors = np.ones((13, SLOTS, WIDTH), np.float32)
    vectors[:, 0, 0] = np.arange(13)  # step 0 is the answer: always spelled
    vectors[:10, 1, 0] = 1.0  # step 1 is the number 1: spelled by ten
    vectors[10:, 1, 0] = 5.0
    vectors[:, 2, 0] = 9.0  # never
    vectors[:, 3, 0] = 3.0
    shares = spelled_shares(method, params(64, WIDTH), CODEC, examples, vectors)
    assert shares == (Share(13, 13), Share(10, 13), Share(0, 13), Share(13, 13))
