"""Stepwise internalisation against arXiv 2405.14838: what is removed, how often an offset occurs, what is a target."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from latentjax.methods import ICoT, Stage
from latentjax.tokenizers import END_THOUGHTS, START_THOUGHTS
from tests.methods.battery import BACKBONE, CASES, EXAMPLES, LENGTHS, Case

NO_OFFSET = ICoT(BACKBONE, LENGTHS, steps=5, removals=4, smoothing=50.0)  # an offset has probability e^-50
CHAIN = ["4", "5", "6", "7", "8"]  # of the first example


def chain_left(method, stage, examples=EXAMPLES[:1], seed=0):
    """The remaining chain of every example, as words."""
    case = Case(method, stage)
    batch, tokenizer = case.batch(examples, seed=seed), case.codec.tokenizer
    end, rows = tokenizer.token_id(END_THOUGHTS), []
    for text, mask in zip(batch.text, batch.text_mask, strict=True):
        ids = text[mask].tolist()
        rows.append(tokenizer.decode(ids[: ids.index(end)]).split())
    return rows


@pytest.mark.parametrize("stage", range(7))
def test_tokens_leave_from_the_given_side(stage):
    assert chain_left(NO_OFFSET, stage) == [CHAIN[stage:]]
    from_right = dataclasses.replace(NO_OFFSET, side="right")
    assert chain_left(from_right, stage) == [CHAIN[: max(5 - stage, 0)]]


def test_the_whole_chain_leaves_beyond_a_level():
    method = dataclasses.replace(NO_OFFSET, remove_all_beyond=2)
    assert [chain_left(method, stage)[0] for stage in (0, 1, 2, 3)] == [CHAIN, CHAIN[1:], [], []]


def test_layout_and_targets():
    """Loss on the remaining chain, the separator, the answer and the end; none on the question."""
    case = Case(NO_OFFSET)
    tokenizer = case.codec.tokenizer
    batch = case.batch(EXAMPLES[:1], stage=3)
    start, end = tokenizer.token_id(START_THOUGHTS), tokenizer.token_id(END_THOUGHTS)
    expected = [*tokenizer.encode("7 8"), end, *tokenizer.encode("[A] 9"), tokenizer.eos_id]
    assert batch.question[0, batch.question_mask[0]].tolist() == [*tokenizer.encode("1 2 3"), start]
    assert batch.text[0, batch.text_mask[0]].tolist() == expected
    assert (batch.loss_mask == batch.text_mask).all()
    assert batch.thought_mask.shape == (1, 0)


@pytest.mark.parametrize("smoothing", [0.5, 4.0])
def test_offsets_have_the_papers_distribution(smoothing):
    """P(o = i) = (1 - e^-lam) e^(-lam i), seen through the length of what is left of a chain of five."""
    n = 10_000
    method = dataclasses.replace(NO_OFFSET, smoothing=smoothing)
    left = [len(words) for words in chain_left(method, 1, EXAMPLES[:1] * n, seed=2)]
    counts = np.array([left.count(4 - offset) for offset in range(5)])
    assert counts.sum() == n
    shares = (1 - np.exp(-smoothing)) * np.exp(-smoothing * np.arange(5))
    shares[4] = 1 - shares[:4].sum()  # offsets beyond the chain are cut to it
    if smoothing == 4.0:
        assert shares[0] == pytest.approx(0.982, abs=5e-4)  # the paper's figure
        counts, shares = np.array([counts[0], counts[1], counts[2:].sum()]), np.array([*shares[:2], shares[2:].sum()])
    assert stats.chisquare(counts, n * shares).pvalue > 1e-3


def test_levels_and_resets():
    method = dataclasses.replace(NO_OFFSET, steps_per_removal=7)
    assert method.stages() == (
        Stage(0, steps=7),
        *(Stage(s, steps=7, reset_optimizer=True) for s in (1, 2, 3)),
        Stage(4, steps=5, reset_optimizer=True),
    )


def test_prompts_end_with_the_start_marker():
    case = CASES["ICoT"]
    prompts = case.prompts(EXAMPLES[:1])
    start = case.codec.tokenizer.token_id(START_THOUGHTS)
    assert prompts.question[0, prompts.question_mask[0]].tolist() == [*case.codec.tokenizer.encode("1 2 3"), start]
    assert prompts.thoughts.tolist() == [0]


@pytest.mark.parametrize(("field", "value"), [("smoothing", 0.0), ("removals", 0), ("steps_per_removal", 0)])
def test_impossible_setting_is_an_error_with_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"method.{field}={value}"):
        dataclasses.replace(NO_OFFSET, **{field: value})
