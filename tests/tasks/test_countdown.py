"""Countdown: the generator against a naive one, published files, the verifier against all rewritings of right answers."""

import collections
import gzip
import itertools
import json
import operator
import random

import numpy as np
import pytest

from latentjax.tasks.base import Example, Reason
from latentjax.tasks.countdown import Countdown, first_solutions, held_out_targets, written
from latentjax.tasks.splits import split_of_text
from latentjax.tokenizers import Codec

SLOW = pytest.mark.slow
TASKS = tuple(map(Countdown, (3, 4, 5)))
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CLASS = {"train": "train", "valid": "valid", "held_out": "test"}


def search(numbers, target):
    """The first chain of the depth-first search, straight from its definition; None if there is none."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for place, n in enumerate(numbers) if place not in (i, j)]
        options = [(f"{a}+{b}", a + b), (f"{a}*{b}", a * b), (f"{max(a, b)}-{min(a, b)}", abs(a - b))]
        if a <= b and a != 0 and b % a == 0:
            options.append((f"{b}/{a}", b // a))
        elif a > b and b != 0 and a % b == 0:
            options.append((f"{a}/{b}", a // b))
        for text, result in options:
            later = search([*rest, result], target)
            if later is not None:
                return [f"{text}={result}", *later]
    return None


def problem(example):
    """Canonical form: the inputs, as text, in sorted order, and the target."""
    return canonical(example.question)


def canonical(question):
    *inputs, target = question.split(",")
    return (*sorted(inputs), target)


def training_inputs(published, numbers):
    with gzip.open(published / f"countdown/cd{numbers}_train.jsonl.gz", "rt") as file:
        return [json.loads(line)["input"] for line in file]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_search_finds_what_the_naive_one_finds_first(size):
    rng = np.random.default_rng(size)
    numbers = rng.integers(
        0, 13, size=(400 if size < 4 else 150, size)
    )  # small, so that 0, ties and quotients are common
    targets = rng.integers(0, 30, size=len(numbers))
    found, solutions = first_solutions(numbers, targets)
    expected = [search(row.tolist(), target) for row, target in zip(numbers, targets.tolist(), strict=True)]
    assert found.tolist() == [chain is not None for chain in expected]
    assert 0.05 < found.mean() < 0.95
    for solution, chain in zip(solutions[found], [chain for chain in expected if chain is not None], strict=True):
        assert list(written(solution)) == chain


@pytest.mark.parametrize(
    ("numbers", "targets"),
    [
        (3, {22, 24, 25, 30, 32, 50, 65, 67, 96}),
        (4, {14, 39, 41, 57, 62, 81, 87, 89, 96}),
        pytest.param(5, {43, 48, 51, 68, 73, 80, 92, 95, 98}, marks=SLOW),
    ],
)
def test_published_tests_are_the_first_solutions_for_the_held_out_targets(published, numbers, targets):
    lines = (published / f"countdown/cd{numbers}_test.jsonl").read_text().splitlines()
    examples = Countdown(numbers).examples("test")
    assert len(examples) == len(lines) == 1000
    inputs = np.array([e.meta["inputs"] for e in examples])
    found, solutions = first_solutions(inputs, np.array([e.meta["target"] for e in examples]))
    assert found.all()
    for example, line, solution in zip(examples, lines, solutions, strict=True):
        assert line == json.dumps({"input": example.question, "output": ",".join(written(solution))})
        assert example.answer == ",".join(example.steps) == ",".join(written(solution))
    assert {e.meta["target"] for e in examples} == targets == set(held_out_targets(numbers))


@pytest.mark.parametrize(
    ("numbers", "lines", "distinct"), [pytest.param(3, 500_000, 458_494, marks=SLOW), (4, 220_000, 219_974)]
)
def test_published_training_files(published, numbers, lines, distinct):
    questions = training_inputs(published, numbers)
    assert len(questions) == lines
    assert len(set(questions)) == distinct
    assert not {int(q.rpartition(",")[2]) for q in questions} & set(held_out_targets(numbers))
    task = Countdown(numbers)
    examples = task.examples("train")
    assert len(examples) == lines
    assert task.examples("train", count=7)[6] == examples[6]
    assert [example.question for example in examples[1000:1100]] == questions[1000:1100]
    places = np.random.default_rng(0).integers(lines, size=500).tolist()
    sample = [examples[i] for i in places]
    assert [example.question for example in sample] == [questions[i] for i in places]
    assert all(task.verify(example, example.answer).correct for example in sample)
    solutions = first_solutions(
        np.array([e.meta["inputs"] for e in sample]), np.array([e.meta["target"] for e in sample])
    )[1]
    assert [written(solution) for solution in solutions] == [example.steps for example in sample]


def draws(task, split):
    """Generated problems of two seeds, each checked against the definition of its split."""
    first, second = (task.examples(split, count=60, seed=seed) for seed in (0, 1))
    assert first != second
    assert task.examples(split, count=9, seed=1) == second[:9]
    for examples in (first, second):
        assert len(examples) == 60
        assert split == "train" or len(set(map(problem, examples))) == 60
    for example in [*first, *second]:
        inputs, target = example.meta["inputs"], example.meta["target"]
        assert example.question == ",".join(map(str, (*inputs, target)))
        assert 10 <= target <= 100
        assert all(1 <= n <= task.largest for n in inputs)
        assert (target in held_out_targets(task.numbers)) == (split == "held_out")
        assert split_of_text(",".join(problem(example))) == CLASS[split]
        assert task.verify(example, example.answer).correct
        if task.numbers < 5:
            assert list(example.steps) == search(list(inputs), target)
    return [*first, *second]


@pytest.mark.parametrize("numbers", [3, 4])
def test_generated_problems_follow_the_procedure(published, numbers):
    del published
    task = Countdown(numbers)
    assert not set(map(problem, draws(task, "held_out"))) & set(map(problem, task.examples("test")))


@SLOW
@pytest.mark.parametrize("numbers", [3, 4, 5])
def test_no_two_splits_share_a_problem(published, numbers):
    task = Countdown(numbers)
    problems = {split: set(map(problem, draws(task, split))) for split in ("valid", "held_out")}
    problems["test"] = set(map(problem, task.examples("test")))
    if numbers < 5:
        problems["train"] = set(map(canonical, training_inputs(published, numbers)))
    else:
        problems["train"] = set(map(problem, draws(task, "train")))
    for one, other in itertools.combinations(problems, 2):
        assert not problems[one] & problems[other], (one, other)


def test_smaller_inputs_make_an_easier_task_of_the_same_form():
    task = Countdown(3, largest=25)
    drawn = {split: draws(task, split) for split in ("train", "valid", "held_out")}
    for one, other in itertools.combinations(drawn, 2):
        assert not set(map(problem, drawn[one])) & set(map(problem, drawn[other]))
    assert max(n for examples in drawn.values() for e in examples for n in e.meta["inputs"]) == 25
    with pytest.raises(ValueError, match=r"split='test'.*Countdown\.largest=25"):
        task.examples("test")
    with pytest.raises(ValueError, match="count=None: the split 'train' is generated"):
        task.examples("train")


@pytest.mark.parametrize("largest", [9, 100])
def test_other_ranges_of_inputs_are_refused(largest):
    with pytest.raises(ValueError, match=rf"Countdown\.largest={largest}: must be in 10\.\.99"):
        Countdown(3, largest)


def test_inputs_are_drawn_uniformly_given_the_target():
    """The shares of single inputs against those of naive draws, and of targets against the uniform one."""
    task, rng = Countdown(3), random.Random(0)
    targets = [t for t in range(10, 101) if t not in held_out_targets(3)]
    drawn = task._block(np.array(targets), np.random.default_rng(0), 4000)
    naive = []
    while len(naive) < 300:
        target, chain = rng.choice(targets), None
        while chain is None:
            numbers = [rng.randint(1, 99) for _ in range(3)]
            chain = search(numbers, target)
        naive.append((numbers, chain))
    for place in range(3):
        ours, theirs = np.array([e.meta["inputs"][place] for e in drawn]), np.array([n[place] for n, _ in naive])
        assert abs(ours.mean() - theirs.mean()) < 4 * theirs.std() / 300**0.5
    signs = [np.mean([any(sign in step for step in chain) for _, chain in naive]) for sign in "+*/"]
    ours = [np.mean([sign in example.answer for example in drawn]) for sign in "+*/"]
    np.testing.assert_allclose(ours, signs, atol=4 * (0.25 / 300) ** 0.5)
    counts = collections.Counter(example.meta["target"] for example in drawn)
    expected = 4000 / len(targets)
    assert set(counts) == set(targets)
    assert max(abs(n - expected) for n in counts.values()) < 5 * expected**0.5


def test_games_of_24(published):
    lines = (published / "tasks/game24.csv").read_text(encoding="utf-8-sig").splitlines()
    task = Countdown(4)
    examples = task.examples("game24_test")
    assert len(examples) == 100
    for example, line in zip(examples, lines[901:1001], strict=True):
        assert example.question == line.split(",")[1].replace(" ", ",") + ",24"
        assert list(example.steps) == search(list(example.meta["inputs"]), 24)
        assert task.verify(example, example.answer).correct
    assert not set(map(problem, examples)) & set(map(canonical, training_inputs(published, 4)))
    with pytest.raises(ValueError, match=r"game24_test.*Countdown\.numbers=3"):
        Countdown(3).examples("game24_test")
    with pytest.raises(ValueError, match=r"game24_test.*largest=13 some of its puzzles are training problems"):
        Countdown(4, largest=13).examples("game24_test")


def grammatical(text):
    """Whether the last line is a list of equations of two whole numbers."""
    for piece in text.strip().split("\n")[-1].split(","):
        left, _, right = piece.partition("=")
        signs = [c for c in left if c in OPERATORS]
        if len(signs) != 1 or not all(part.isdecimal() for part in (*left.split(signs[0]), right)):
            return False
    return True


def replay(inputs, target, answer):
    """Whether a list of equations is right, with a list of the numbers that are left."""
    numbers = list(inputs)
    for equation in answer.split(","):
        left, _, result = equation.partition("=")
        sign = next(c for c in left if c in OPERATORS)
        a, b = map(int, left.split(sign))
        if (sign == "/" and b == 0) or OPERATORS[sign](a, b) != int(result):
            return False
        for operand in (a, b):
            if operand not in numbers:
                return False
            numbers.remove(operand)
        numbers.append(int(result))
    return numbers == [target]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_every_change_of_one_character_is_judged_as_a_replay_judges_it(published, task):
    del published
    seen = collections.Counter()
    for example in task.examples("test", count=25):
        right = example.answer
        for place, new in itertools.product(range(len(right)), "0123456789+-*/=,\n"):
            text = right[:place] + new + right[place + 1 :]
            verdict = task.verify(example, text)
            seen[verdict.reason] += 1
            assert (verdict.reason is not Reason.UNPARSABLE) == grammatical(text), text
            if grammatical(text):
                assert verdict.correct == replay(example.meta["inputs"], example.meta["target"], verdict.parsed), text
                assert verdict.correct == (not verdict.detail)
    assert len(seen) == 3
    assert min(seen.values()) > 10


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("86+28=114,31-13=18,114-18=96", Reason.RIGHT, ""),
        ("28+86=114,31-13=18,114-18=96\n", Reason.RIGHT, ""),
        ("31-13=18,86+28=114,114-18=96", Reason.RIGHT, ""),
        ("1+1=3\n86+28=114\n86+28=114,31-13=18,114-18=96", Reason.RIGHT, ""),  # steps stand before the answer
        ("86+28=113,31-13=18,114-18=96", Reason.WRONG, "equation 1: 86+28 is not 113"),
        ("86+28=114,86+10=96", Reason.WRONG, "equation 2: there is no 86 to use"),
        ("114-18=96,86+28=114,31-13=18", Reason.WRONG, "equation 1: there is no 114 to use"),
        ("86+28=114,31-13=18", Reason.WRONG, "[18, 114] remain, not the target 96 alone"),
        ("86+28=114,31-13=18,114+18=132", Reason.WRONG, "[132] remain"),
        ("86+28=114,31/13=2,114-2=112", Reason.WRONG, "31/13 is not 2"),
        ("86/0=0", Reason.WRONG, "86/0 is not 0"),
        ("13-31=18", Reason.WRONG, "13-31 is not 18"),
        ("13-31=-18", Reason.UNPARSABLE, "'13-31=-18' is not an equation"),
        ("86+28=114,31-13=18,114-18=", Reason.UNPARSABLE, "'114-18=' is not"),
        ("86+28=114,", Reason.UNPARSABLE, "'' is not"),
        ("86+28=114 ,31-13=18", Reason.UNPARSABLE, "is not"),
        ("86+28+1=115", Reason.UNPARSABLE, "is not"),
        ("٨+1=9", Reason.UNPARSABLE, "is not"),  # digits of another script
        (f"{'9' * 5000}+1=1", Reason.UNPARSABLE, "is not"),  # longer than Python turns into an integer
        ("", Reason.UNPARSABLE, "is not"),
    ],
)
def test_rules_of_the_verifier(text, reason, detail):
    example = _example("86,28,13,31,96", "86+28=114,31-13=18,114-18=96")
    verdict = TASKS[1].verify(example, text)
    assert verdict.reason is reason
    assert detail in verdict.detail
    assert (verdict.parsed is None) == (reason is Reason.UNPARSABLE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("86+28=114", Reason.RIGHT),
        ("7/0=0", Reason.WRONG),
        ("31-13=17", Reason.WRONG),
        ("1+1=2,1+1=2", Reason.UNPARSABLE),
        ("86+28", Reason.UNPARSABLE),
    ],
)
def test_a_single_step_is_true_or_false_whatever_the_problem(text, reason):
    assert TASKS[1].judge_step(text) is reason


def test_equations_may_not_lend_results_to_each_other():
    """5+3=8 and 8-3=5 use up two threes and nothing else if numbers are counted at the end only."""
    example = _example("3,3,20,4,24", "")
    verdict = TASKS[1].verify(example, "5+3=8,8-3=5,20+4=24")
    assert (verdict.reason, verdict.detail) == (Reason.WRONG, "equation 1: there is no 5 to use")
    assert TASKS[1].verify(example, "3-3=0,20+4=24,24+0=24").correct


def test_the_canonical_form_forgets_order_and_nothing_else():
    task, equations = TASKS[1], ["86+28=114", "31-13=18", "114-18=96"]
    forms = {task.canonical(",".join(order)) for order in itertools.permutations(equations)}
    forms |= {task.canonical("31-13=18,28+86=114,114-18=96"), task.canonical("steps\n086+28=114,31-13=18,114-18=96")}
    assert len(forms) == 1
    others = ["86+28=114,31-13=18", "86*28=114,31-13=18,114-18=96", "86+28=114,13-31=18,114-18=96"]
    others += ["86+28=114,31-13=18,114-18=96,114-18=96"]
    assert len({*forms, *map(task.canonical, others)}) == 5
    assert task.canonical("2*3=6") == task.canonical("3*2=6") != task.canonical("3+2=6")
    assert task.canonical("6/2=3") != task.canonical("2/6=3")
    assert task.canonical("86+28") is None
    assert task.canonical("") is None


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_the_written_form_is_the_released_one(published, task):
    del published
    codec = Codec(task.tokenizer(), task.format)
    for example in task.examples("test", count=50):
        question, answer = codec.question(example), codec.answer(example)
        assert codec.tokenizer.decode(question) == example.question + "\n"
        assert codec.tokenizer.decode(answer) == example.answer
        assert len(question) == len(example.question) + 1
        assert len(answer) == len(example.answer) + 1
        thought = "".join(codec.tokenizer.decode(step) for step in codec.steps(example))
        assert task.verify(example, thought + example.answer).correct
        assert task.verify(example, thought).correct  # steps alone, each of which ends its line
        assert not task.verify(example, thought.removesuffix("\n")).correct  # the last line has one equation only
        assert task.format.read_answer(example.answer) == example.answer


@pytest.mark.parametrize("numbers", [2, 6, -1])
def test_other_sizes_are_refused(numbers):
    with pytest.raises(ValueError, match=rf"Countdown\.numbers={numbers}"):
        Countdown(numbers)


def test_generated_splits_need_a_count():
    for task, split in ((TASKS[0], "valid"), (TASKS[1], "held_out"), (TASKS[2], "train")):
        with pytest.raises(ValueError, match=f"count=None: the split '{split}' is generated"):
            task.examples(split)


def _example(question, answer):
    *inputs, target = map(int, question.split(","))
    return Example(question, tuple(answer.split(",")), answer, {"inputs": tuple(inputs), "target": target})
