import collections

import jax
import numpy as np
import pytest

from latentjax.methods.base import Stage
from latentjax.tokenizers import Codec
from tests.train.small import experiment
from train.input import Training, check_lengths, train_examples, valid_batches, valid_examples
from train.plan import lay_out


def _training(**changes):
    config = experiment(schedule=(Stage(0, steps=5), Stage(2, epochs=2)), grow=True, **changes)
    examples = train_examples(config)
    plan = lay_out(config.method.stages(), len(examples) // config.batch_size)
    codec = Codec(config.task.tokenizer(), config.task.format)
    return config, codec, plan, Training(config, codec, plan, examples)


def _equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_an_epoch_is_a_new_order_of_the_examples_without_repeats():
    _, _, plan, training = _training()
    assert plan.steps_per_epoch == 3
    epochs = [[example for step in range(3 * e, 3 * e + 3) for example in training.examples(step)] for e in range(3)]
    for epoch in epochs:
        counts = collections.Counter(example.question for example in epoch)
        assert len(epoch) == 24
        assert set(counts.values()) == {1}
    assert epochs[0] != epochs[1] != epochs[2]
    # What fills no batch is not always the same.
    assert {example.question for example in epochs[0]} != {example.question for example in epochs[1]}


def test_batches_have_the_form_of_their_stage():
    _, _, plan, training = _training()
    for step in range(plan.total_steps):
        assert training.batch(step).thought_mask.shape[1] == (0 if step < 5 else 2)


def test_a_batch_depends_on_seed_and_step_alone():
    training, same, other = _training()[3], _training()[3], _training(seed=1)[3]
    order = [6, 2, 4]
    batches = {step: training.batch(step) for step in order}
    assert all(_equal(batches[step], same.batch(step)) for step in sorted(order))
    assert not _equal(batches[2], batches[4])
    assert not _equal(batches[2], other.batch(2))


def test_the_iterator_gives_every_batch_in_order_and_resumes_exactly():
    _, _, plan, training = _training()
    right = [training.batch(step) for step in range(plan.total_steps)]
    iterator = training.iterator()
    first = [next(iterator) for _ in range(4)]
    place = iterator.get_state()
    assert all(isinstance(value, int) for value in place.values())
    resumed = _training()[3].iterator()
    resumed.set_state(place)
    rest = list(resumed)
    assert len(first + rest) == len(right)
    assert all(_equal(found, batch) for found, batch in zip(first + rest, right, strict=True))


def test_fresh_data_brings_new_problems_in_every_epoch():
    _, _, _, training = _training(fresh_data=True)
    epochs = [{e.question for step in range(3 * n, 3 * n + 3) for e in training.examples(step)} for n in range(3)]
    assert not epochs[0] & epochs[1]
    assert not epochs[1] & epochs[2]
    assert _equal(training.batch(7), _training(fresh_data=True)[3].batch(7))


def test_augmentation_sees_the_batch_generator(monkeypatch):
    config, _, _, training = _training()
    draws = []
    monkeypatch.setattr(type(config.task), "augment", lambda self, e, rng: draws.append(rng.random()) or e)
    training.batch(0)
    training.batch(0)
    assert draws[:8] == draws[8:]
    assert len(set(draws)) == 8


def test_validation_counts_every_example_once():
    config, codec, _, _ = _training()
    examples = valid_examples(config)
    batches = list(valid_batches(config, codec, examples, stage=0))
    assert len(examples) == 11
    assert [batch.question.shape[0] for batch in batches] == [8, 8]
    assert [batch.loss_mask.any(axis=1).sum() for batch in batches] == [8, 3]
    found = np.concatenate([batch.question for batch in batches])[:11]
    np.testing.assert_array_equal(found, [codec.question(example) for example in examples])


def test_validation_problems_do_not_depend_on_the_seed():
    assert valid_examples(experiment(seed=0)) == valid_examples(experiment(seed=1))


def test_a_too_long_example_and_an_unknown_word_are_found_beforehand():
    config, codec, plan, _ = _training()
    good = list(train_examples(config))
    long = good[3].__class__(good[3].question, good[3].steps * 2, good[3].answer)
    with pytest.raises(ValueError, match=r"train split of SuccessorList.*lengths\.text=7"):
        check_lengths(config, codec, plan, [*good, long], "train")
    unknown = good[3].__class__("0 1 2 3 4 5 6 7 8 9 x", good[3].steps, good[3].answer)
    with pytest.raises(ValueError, match="valid split of SuccessorList.*'x'"):
        check_lengths(config, codec, plan, [*good, unknown], "valid")
