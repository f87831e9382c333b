"""The chain tasks against their definitions, their verifier, and chains continued from a changed step."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentjax.tasks.affine_chain import AffineChain
from latentjax.tasks.base import Reason
from latentjax.tasks.modular_arithmetic import ModularArithmetic
from latentjax.tasks.successor_list import SuccessorList

TASKS = (
    SuccessorList(),
    AffineChain(),
    ModularArithmetic(),
    SuccessorList(7, 9),
    AffineChain(11, 2),
    ModularArithmetic(7, 5),
)
EXAMPLES = {task: task.examples("train", count=100, seed=5) for task in TASKS}
DRAWN = st.sampled_from([(task, example) for task, examples in EXAMPLES.items() for example in examples])
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def rerun(task, question):
    """Results of all steps, from the text of the question only."""
    words = question.split()
    if isinstance(task, SuccessorList):
        f, value = list(map(int, words[:-1])), int(words[-1])
        return [value := f[value] for _ in range(task.hops)]
    value = int(words[0])
    if isinstance(task, AffineChain):
        return [value := (2 * value + int(a)) % task.modulus for a in words[1:]]
    return [
        value := OPERATORS[sign](value, int(a)) % task.modulus for sign, a in zip(words[1::2], words[2::2], strict=True)
    ]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_steps_and_answer_follow_from_the_question(task):
    for example in EXAMPLES[task]:
        results = rerun(task, example.question)
        assert example.steps == tuple(map(str, results))
        assert example.answer == str(results[-1])


@given(DRAWN)
def test_the_reference_is_right_and_a_corrupted_one_is_not(drawn):
    task, example = drawn
    chain = " ".join(example.steps)
    assert task.verify(example, f"{chain} ANS {example.answer}").correct
    for value in range(task.values):
        verdict = task.verify(example, f"{chain} ANS {value}")
        assert verdict.reason is (Reason.RIGHT if str(value) == example.answer else Reason.WRONG)
        assert verdict.parsed == str(value)
    for text in ("", chain, f"ANS {example.answer} {example.answer}", "ANS", f"ANS {task.values}", "ANS ANS", "ANS -1"):
        assert task.verify(example, text).reason is Reason.UNPARSABLE


@given(DRAWN, st.data())
def test_evaluate_continues_the_chain(drawn, data):
    task, example = drawn
    step = data.draw(st.integers(0, len(example.steps) - 1))
    value = data.draw(st.integers(0, task.values - 1))
    assert task.evaluate(example, step, int(example.steps[step])) == example.answer
    words = example.question.split()
    expected = value
    if isinstance(task, SuccessorList):
        for _ in range(len(example.steps) - 1 - step):
            expected = int(words[expected])
    elif (
        step < len(example.steps) - 1
    ):  # the problem that starts at the changed result, with the operands that are left
        width = 1 if isinstance(task, AffineChain) else 2
        expected = rerun(task, " ".join([str(value), *words[1 + width * (step + 1) :]]))[-1]
    assert task.evaluate(example, step, value) == str(expected)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_every_change_of_a_step_changes_the_answer(task):
    example = EXAMPLES[task][0]
    for step in range(len(example.steps)):
        assert len({task.evaluate(example, step, value) for value in range(task.values)}) == task.values


def test_evaluate_names_what_is_out_of_range():
    task = AffineChain()
    example = EXAMPLES[task][0]
    with pytest.raises(ValueError, match="step=4"):
        task.evaluate(example, 4, 0)
    with pytest.raises(ValueError, match="value=7"):
        task.evaluate(example, 0, 7)


def test_successors_are_one_cycle():
    for example in EXAMPLES[SuccessorList()]:
        f, value, seen = example.meta["successors"], 0, set()
        while value not in seen:
            seen.add(value)
            value = f[value]
        assert len(seen) == 10
        assert example.answer != str(example.meta["start"])


def test_values_are_drawn_evenly():
    examples = ModularArithmetic().examples("train", count=20_000)
    counts = [sum(int(example.answer) == value for example in examples) for value in range(11)]
    # Multiplication by a nonzero operand fixes 0 and moves the rest about, so answers stay uniform.
    assert all(abs(count - 20_000 / 11) < 5 * (20_000 / 11) ** 0.5 for count in counts)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_tokenizer_knows_every_word_one_token_a_step(task):
    tokenizer = task.tokenizer(("<bot>",))
    for example in EXAMPLES[task]:
        assert tokenizer.decode(tokenizer.encode(example.question)) == example.question
        assert [len(tokenizer.encode(step)) for step in example.steps] == [1] * len(example.steps)
        assert len(tokenizer.encode(task.format.answer.format(example.answer))) == 2


def test_hidden_question():
    assert ModularArithmetic(masked=True).hide_question
    assert not ModularArithmetic().hide_question
    assert not SuccessorList().hide_question


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuccessorList(size=1), "SuccessorList.size=1"),
        (lambda: SuccessorList(hops=0), "SuccessorList.hops=0"),
        (lambda: SuccessorList(size=4, hops=8), "leads back to the start"),
        (lambda: AffineChain(modulus=6), "AffineChain.modulus=6: must be odd"),
        (lambda: ModularArithmetic(modulus=9), "ModularArithmetic.modulus=9: must be a prime"),
        (lambda: ModularArithmetic(hops=-1), "ModularArithmetic.hops=-1"),
    ],
)
def test_impossible_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()
