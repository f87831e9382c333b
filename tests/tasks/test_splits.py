"""Splits of generated tasks: disjoint, distinct, reproducible."""

import hashlib

import numpy as np
import pytest

from latentjax.tasks.affine_chain import AffineChain
from latentjax.tasks.modular_arithmetic import ModularArithmetic
from latentjax.tasks.splits import split_of_hash, split_of_text, split_rng
from latentjax.tasks.successor_list import SuccessorList

TASKS = (SuccessorList(), AffineChain(), ModularArithmetic(), SuccessorList(size=5, hops=2))


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_splits_are_disjoint_at_any_seed(task):
    questions = {
        split: {
            example.question
            for seed in (0, 1)
            for example in task.examples(split, count=8 if task.values == 5 else 300, seed=seed)
        }
        for split in task.splits
    }
    assert not questions["train"] & (questions["valid"] | questions["test"])
    assert not questions["valid"] & questions["test"]


@pytest.mark.parametrize("task", TASKS[:3], ids=repr)
def test_evaluation_problems_are_distinct(task):
    for split in ("valid", "test"):
        questions = [example.question for example in task.examples(split, count=1000)]
        assert len(set(questions)) == 1000


@pytest.mark.parametrize("task", TASKS[:3], ids=repr)
def test_examples_are_a_function_of_split_count_and_seed(task):
    for split in task.splits:
        assert task.examples(split, count=40, seed=3) == task.examples(split, count=40, seed=3)
        assert task.examples(split, count=40, seed=3)[:10] == task.examples(split, count=10, seed=3)
        assert task.examples(split, count=40, seed=3) != task.examples(split, count=40, seed=4)


def test_split_is_a_stable_hash_class():
    text = "7 8 4 0 3 6 1 9 2 5 4"
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    assert split_of_text(text) == ("test", "valid", *["train"] * 8)[value % 10]
    assert [split_of_hash(value) for value in (10, 11, 12, 19)] == ["test", "valid", "train", "train"]
    shares = np.mean([[split_of_text(str(n)) == split for split in ("test", "valid")] for n in range(4000)], axis=0)
    np.testing.assert_allclose(shares, 0.1, atol=4 * (0.09 / 4000) ** 0.5)


def test_streams_of_splits_and_seeds_differ():
    draws = {split_rng(split, seed).integers(2**63) for split in ("train", "valid", "test") for seed in range(5)}
    assert len(draws) == 15


def test_asking_for_more_distinct_problems_than_exist():
    task = AffineChain(modulus=3, hops=3)  # 81 problems
    sizes = {
        split: sum(split_of_text(" ".join(map(str, q))) == split for q in np.ndindex(3, 3, 3, 3))
        for split in ("valid", "test")
    }
    for split, size in sizes.items():
        assert len(task.examples(split, count=size)) == size
        with pytest.raises(ValueError, match=f"count={size + 1}: the split '{split}' has only {size} distinct"):
            task.examples(split, count=size + 1)


@pytest.mark.parametrize("count", [None, 0, -3])
def test_generated_splits_need_a_count(count):
    with pytest.raises(ValueError, match=f"count={count}"):
        SuccessorList().examples("train", count=count)


def test_unknown_split_lists_the_known():
    with pytest.raises(ValueError, match="split='dev': SuccessorList has the splits train, valid, test"):
        SuccessorList().examples("dev", count=1)
