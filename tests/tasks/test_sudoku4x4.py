"""4x4 Sudoku: grids and uniqueness by brute force, published files, every mutation of a right answer."""

import itertools
import json

import numpy as np
import pytest

from latentjax.tasks.base import Example, Reason
from latentjax.tasks.sudoku4x4 import Sudoku4x4, fits, grids
from latentjax.tokenizers import Codec

TASK = Sudoku4x4()
ORDERS = ["".join(order) for order in itertools.permutations("1234")]


def valid(rows):
    """Whether four rows are a solved grid, by the sets of its twelve units."""
    columns = ["".join(row[c] for row in rows) for c in range(4)]
    boxes = ["".join(rows[r + i][c + j] for i in (0, 1) for j in (0, 1)) for r in (0, 2) for c in (0, 2)]
    return all(set(unit) == set("1234") for unit in [*rows, *columns, *boxes])


def solutions(puzzle, rows=()):
    """All solutions of a puzzle (four rows), by trying every order of digits row by row."""
    if len(rows) == 4:
        return [rows] if valid(rows) else []
    fitting = [
        o for o in ORDERS if all(given in ("0", digit) for given, digit in zip(puzzle[len(rows)], o, strict=True))
    ]
    return [s for o in fitting for s in solutions(puzzle, (*rows, o))]


def test_all_solved_grids():
    bands = [(a, b) for a in ORDERS for b in ORDERS if len({*a[:2], *b[:2]}) == 4 == len({*a[2:], *b[2:]})]
    expected = {"".join(top + bottom) for top in bands for bottom in bands if valid(top + bottom)}
    assert {"".join(map(str, grid)) for grid in grids().tolist()} == expected
    assert len(grids()) == 288


@pytest.mark.parametrize("givens", range(4, 13))
def test_published_puzzles(published, givens):
    lines = (published / f"sudoku4x4/sudoku_4x4_{givens}.jsonl").read_text().splitlines()
    task = Sudoku4x4(givens)
    examples = task.examples("test")
    assert len(examples) == len(lines) == 108
    for example, line in zip(examples, lines, strict=True):
        assert json.loads(line) == {"input": example.question, "output": example.answer}
        assert example.answer == "\n".join(example.steps)
        assert example.meta["givens"] == givens == 16 - example.question.count("0")
        assert task.verify(example, example.answer).correct
    assert fits(cells(examples)).sum(axis=1).tolist() == [1] * 108


def cells(examples):
    return np.array([[int(digit) for digit in e.question.replace("\n", "")] for e in examples])


def test_generated_puzzles_have_one_solution_and_are_in_one_split(published):
    del published
    released = {example.question for example in TASK.examples("test")}
    assert len(released) == 972
    questions = {}
    for split in ("train", "valid", "held_out"):
        drawn = [TASK.examples(split, count=300, seed=seed) for seed in (0, 1)]
        assert drawn[0] != drawn[1]
        assert drawn[0] == TASK.examples(split, count=300, seed=0)
        assert drawn[0][:100] == TASK.examples(split, count=100, seed=0)
        for example in itertools.chain.from_iterable(drawn):
            assert 16 - example.question.count("0") == example.meta["givens"]
            assert TASK.verify(example, example.answer).correct
        for example in drawn[0][:20]:
            assert solutions(example.question.split("\n")) == [example.steps]
        assert {example.meta["givens"] for example in drawn[0]} == set(range(4, 13))
        questions[split] = {example.question for example in itertools.chain.from_iterable(drawn)}
    for one, other in itertools.combinations((*questions.values(), released), 2):
        assert not one & other


def test_puzzles_are_drawn_uniformly_from_those_with_one_solution():
    """With 4 givens there are 25,728, found here place by place; single cells are given equally often by symmetry."""
    total = 0
    for places in itertools.combinations(range(16), 4):
        total += (np.unique(grids()[:, places], axis=0, return_counts=True)[1] == 1).sum()
    assert total == 25_728
    drawn = cells(Sudoku4x4(4)._block(np.random.default_rng(0), 3000))
    share = (drawn > 0).mean(axis=0)
    np.testing.assert_allclose(share, 0.25, atol=4 * (0.25 * 0.75 / 3000) ** 0.5)
    digits = np.bincount(drawn[drawn > 0], minlength=5)[1:] / (drawn > 0).sum()
    np.testing.assert_allclose(digits, 0.25, atol=0.02)
    assert len(np.unique(drawn, axis=0)) == pytest.approx(25_728 * (1 - np.exp(-3000 / 25_728)), rel=0.02)


def test_puzzles_with_several_solutions_show_each_of_them_equally_often():
    task = Sudoku4x4(3, unique=False)
    examples = task.examples("train", count=4000)
    assert all(e.meta["givens"] == 3 and task.verify(e, e.answer).correct for e in examples)
    number = fits(cells(examples)).sum(axis=1)
    for example, n in list(zip(examples, number, strict=True))[:10]:
        found = solutions(example.question.split("\n"))
        assert len(found) == n
        assert all(task.verify(example, "\n".join(rows)).correct for rows in found)
    # The places are uniform and then the grid, so of the puzzle's n solutions each is the answer as often as another.
    shown = fits(cells(examples)).astype(int)
    answers = [
        np.flatnonzero((grids() == np.array([int(d) for d in e.answer.replace("\n", "")])).all(axis=1))[0]
        for e in examples
    ]
    rank = np.array([row[:answer].sum() for row, answer in zip(shown, answers, strict=True)])
    assert (number > 4).mean() > 0.9
    assert ((rank + 0.5) / number).mean() == pytest.approx(0.5, abs=4 / (12 * 4000) ** 0.5)
    with pytest.raises(ValueError, match=r"split='test'.*unique=False; use 'held_out'"):
        task.examples("test")


def test_two_grids_are_the_same_solution_if_their_digits_are():
    grid = "1234\n3412\n2143\n4321"
    assert TASK.canonical(grid) == TASK.canonical(f"steps\n{grid}\n") == grid
    assert TASK.canonical("1234\n3412\n2143\n4312") != grid
    assert TASK.canonical("1234\n3412") is None


def test_every_grid_is_judged_by_the_rules(published):
    del published
    for example in TASK.examples("valid", count=6):
        puzzle = example.question.split("\n")
        for place, digit in itertools.product(range(16), "1234"):
            changed = example.answer.replace("\n", "")
            changed = changed[:place] + digit + changed[place + 1 :]
            rows = [changed[i : i + 4] for i in range(0, 16, 4)]
            assert TASK.verify(example, "\n".join(rows)).correct == ("\n".join(rows) == example.answer)
        for grid in grids()[::7].tolist():  # solved grids that mostly contradict the givens
            rows = ["".join(map(str, grid[i : i + 4])) for i in range(0, 16, 4)]
            keeps = all(g in ("0", d) for g, d in zip("".join(puzzle), "".join(rows), strict=True))
            verdict = TASK.verify(example, "\n".join(rows))
            assert verdict.reason is (Reason.RIGHT if keeps else Reason.WRONG)
            assert ("given is" in verdict.detail) != keeps


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("1234\n3412\n2143\n4321", Reason.RIGHT, ""),
        ("steps\n1234\n3412\n2143\n4321\n1234\n3412\n2143\n4321\n", Reason.RIGHT, ""),
        ("2134\n3412\n1243\n4321", Reason.WRONG, "row 1, column 1 is 2, given is 1"),
        ("1134\n3412\n2143\n4321", Reason.WRONG, "row 1 has 1 twice"),
        ("1234\n3412\n2143\n1324", Reason.WRONG, "column 1 has 1 twice"),
        ("1234\n2143\n3412\n4321", Reason.WRONG, "box 1 has 2 twice"),
        ("1234\n3412\n2143", Reason.UNPARSABLE, "not rows"),
        ("1234\n3412\n2143\n4320", Reason.UNPARSABLE, "not rows"),
        ("1234\n3412\n2143\n43211", Reason.UNPARSABLE, "not rows"),
        ("1234341221434321", Reason.UNPARSABLE, "not rows"),
        ("", Reason.UNPARSABLE, "not rows"),
    ],
)
def test_rules_of_the_verifier(text, reason, detail):
    example = Example("1000\n0000\n0000\n0000", (), "")
    verdict = TASK.verify(example, text)
    assert verdict.reason is reason
    assert detail in verdict.detail
    assert (verdict.parsed is None) == (reason is Reason.UNPARSABLE)


def test_the_written_form_is_the_released_one(published):
    del published
    codec = Codec(TASK.tokenizer(), TASK.format)
    for example in TASK.examples("test")[::50]:
        assert codec.tokenizer.decode(codec.question(example)) == example.question + "\n"
        assert codec.tokenizer.decode(codec.answer(example)) == example.answer
        thought = "".join(codec.tokenizer.decode(step) for step in codec.steps(example))
        assert TASK.verify(example, thought + example.answer).correct


@pytest.mark.parametrize("givens", [0, 3, 13])
def test_other_numbers_of_givens_are_refused(givens):
    with pytest.raises(ValueError, match=rf"Sudoku4x4\.givens={givens}"):
        Sudoku4x4(givens)


def test_fewer_givens_need_several_solutions():
    assert Sudoku4x4(1, unique=False).givens == 1
    with pytest.raises(ValueError, match=r"Sudoku4x4\.givens=0.*from 1 to 12.*unique=False"):
        Sudoku4x4(0, unique=False)
