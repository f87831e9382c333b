"""Pauses against one naive pass over question, one repeated vector, and text; and the two baselines without thoughts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.methods import CoT, NoCoT, Stage
from latentjax.tokenizers import START_THOUGHTS
from tests.backbone import naive
from tests.close import assert_close
from tests.methods.battery import BACKBONE, CASES, EXAMPLES, LENGTHS, Case
from tests.quick import jit


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(method, params, batch):
    return jax.value_and_grad(lambda p: method.loss(p, batch, jax.random.key(0), {}, train=False)[0])(params)


@pytest.mark.parametrize("sees", [True, False], ids=["question seen", "question hidden"])
def test_loss_and_gradient_are_those_of_one_naive_pass(sees):
    case = CASES["Pause"]
    method = dataclasses.replace(case.method, answer_sees_question=sees)
    params, batch = case.params(), case.batch(EXAMPLES[:3])

    def definition(params):
        total, targets = 0.0, 0
        for row in range(3):
            question, text = batch.question[row, batch.question_mask[row]], batch.text[row, batch.text_mask[row]]
            k = int(batch.thought_mask[row].sum())
            backbone, pause = params["backbone"], params["method"]["pause"]
            x = jnp.concatenate([naive.embed(backbone, question), jnp.tile(pause, (k, 1)), naive.embed(backbone, text)])
            mask = None if sees else naive.answer_mask(len(question), k, len(text))
            logits = naive.logits(BACKBONE, backbone, naive.forward(BACKBONE, backbone, x, mask))
            for t in np.flatnonzero(batch.loss_mask[row]):
                total -= jax.nn.log_softmax(logits[len(question) + k + t - 1])[text[t]]
                targets += 1
        return total / targets

    expected, expected_gradient = jit(jax.value_and_grad(definition))(params)
    loss, gradient = loss_and_gradient(method, params, batch)
    assert_close(loss, expected, 1e-5)
    assert_close(gradient, expected_gradient, 1e-4)


def test_a_pause_starts_at_the_scale_of_token_embeddings():
    case = CASES["Pause"]
    for kind, scale in (("gpt2", 0.02), ("unit", 1.0)):
        wide = dataclasses.replace(BACKBONE, init=kind, width=4096)
        pause = dataclasses.replace(case.method, backbone=wide).init(jax.random.key(0))["pause"]
        assert pause.shape == (4096,)
        assert float(pause.std()) == pytest.approx(scale, rel=0.05)


def test_pauses_see_the_data_of_coconut():
    ours, theirs = (CASES[name].batch(seed=5) for name in ("Pause", "Coconut"))
    for name in ("question", "thought_mask", "text", "loss_mask"):
        assert (getattr(ours, name) == getattr(theirs, name)).all()


def test_written_chain_and_answer_alone():
    for kind, text in ((CoT, "4 5 6 7 8 [A] 9"), (NoCoT, "[A] 9")):
        case = Case(kind(BACKBONE, LENGTHS, epochs=25))
        tokenizer = case.codec.tokenizer
        batch = case.batch(EXAMPLES[:1])
        assert batch.question[0, batch.question_mask[0]].tolist() == tokenizer.encode("1 2 3")  # no marker
        assert batch.text[0, batch.text_mask[0]].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        assert (batch.loss_mask == batch.text_mask).all()
        assert case.method.stages() == (Stage(0, epochs=25),)
        with pytest.raises(ValueError, match="thoughts=2.*no thoughts"):
            case.method.generate(case.params(), case.prompts(), jax.random.key(0), thoughts=2)


def test_start_marker_ends_the_question():
    case = CASES["NoCoT"]
    batch = case.batch(EXAMPLES[:1])
    assert batch.question[0, batch.question_mask[0]][-1] == case.codec.tokenizer.token_id(START_THOUGHTS)
