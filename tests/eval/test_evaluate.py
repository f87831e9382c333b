"""evaluate_split against a method whose generations are known."""

import dataclasses

import jax
import numpy as np
import pytest

from eval.evaluate import encode_prompts, evaluate_split, within_vocabulary
from latentjax.backbone import decoder
from latentjax.backbone.config import tiny
from latentjax.methods import LaDiR, Lengths, NoCoT, ThoughtVAE
from latentjax.methods.thought_vae import ANSWER
from latentjax.metrics import wilson
from latentjax.rollout import Intervention
from latentjax.sampling import Sampling
from latentjax.tasks.successor_list import SuccessorList
from latentjax.tokenizers import Codec
from tests.eval.fake import SLOTS, TRACES, WIDTH, Echo, NumberTokenizer, known

KEY = jax.random.key(0)


def run(method, examples, **options):
    options = {"batch_size": 8, "key": KEY} | options
    return evaluate_split(method, {}, Echo(), NumberTokenizer(), examples, **options)


@pytest.mark.parametrize("batch_size", [1, 7, 8, 26, 40])
def test_counts_are_exact_and_padding_of_the_last_batch_is_not_counted(batch_size):
    examples = Echo().examples("valid", count=26)  # each answer 0..12 twice
    result = run(known(right=5, wrong=9), examples, batch_size=batch_size)
    assert (result.n, result.correct, result.unparsable) == (26, 2 * 5, 2 * 4)
    assert (result.low, result.high) == wilson(10, 26)
    assert result.accuracy == 10 / 26
    assert result.unparsable_rate == 8 / 26
    assert [p.question for p in result.predictions] == [e.question for e in examples]
    for example, prediction in zip(examples, result.predictions, strict=True):
        answer = int(example.answer)
        assert prediction.reason == ("right" if answer < 5 else "wrong" if answer < 9 else "unparsable")
        assert prediction.parsed == (str(answer + (answer >= 5)) if answer < 9 else None)
        assert prediction.text.split()[0] == ("=" if answer < 9 else "?")
        assert len(prediction.text.split()) == 2  # nothing after the end of the sequence


def test_costs_are_means_over_problems_of_what_the_method_counts():
    examples = [*Echo().examples("valid", count=3)]
    result = run(known(), examples, batch_size=2)
    assert (result.thoughts, result.forwards, result.positions, result.answer_tokens) == (2, 5, 7, 3)
    assert result.seconds_per_problem is None
    assert result.seconds_per_problem_batch1 is None


def test_all_batches_and_all_smaller_numbers_of_thoughts_share_one_program():
    method, examples = known(needs=3), Echo().examples("valid", count=20)
    TRACES.clear()
    accuracies = [run(method, examples, thoughts=k).accuracy for k in range(SLOTS + 1)]
    assert accuracies == [0, 0, 0, 1, 1]
    assert len(TRACES) == 1


def test_an_intervention_follows_its_problem_through_the_batches():
    examples = Echo().examples("valid", count=11)
    clean = run(known(), examples, batch_size=4, keep_vectors=True)
    assert clean.vectors is not None
    assert clean.vectors.shape == (11, SLOTS, WIDTH)
    swapped = Intervention(
        where=np.ones((11, SLOTS), bool), value=np.roll(clean.vectors, 1, axis=0), add=np.zeros_like(clean.vectors)
    )
    result = run(known(), examples, batch_size=4, intervention=swapped)
    donors = np.roll([e.answer for e in examples], 1)
    assert [p.parsed for p in result.predictions] == list(donors)
    assert clean.correct == 11
    assert result.correct == 0


def test_wall_clock_is_measured_on_request_without_counting_compilation(monkeypatch):
    examples = Echo().examples("valid", count=5)
    ticks = iter(range(1000))
    monkeypatch.setattr("eval.evaluate.clock.perf_counter", lambda: float(next(ticks)))
    result = run(known(), examples, batch_size=4, time=True)
    # every call lasts one tick of the fake clock
    assert result.seconds_per_problem == 0.25
    assert result.seconds_per_problem_batch1 == 1.0


def test_rows_that_no_token_has_are_never_generated():
    task = SuccessorList(hops=2)
    tokenizer = task.tokenizer()
    spare = 6
    backbone = tiny(tokenizer.vocab_size + spare, width=16, layers=1, heads=2)
    method = NoCoT(backbone, Lengths(question=12, text=3), steps=1)
    params = {"backbone": decoder.init(backbone, KEY), "method": method.init(KEY)}
    table = params["backbone"]["embed"]["tokens"]
    params["backbone"]["embed"]["tokens"] = table.at[-spare:].multiply(50.0)  # by far the most probable, or improbable
    prompts = encode_prompts(method, Codec(tokenizer, task.format), task.examples("valid", count=40))
    ids = method.generate(params, jax.tree.map(jax.numpy.asarray, prompts), KEY).tokens
    assert (np.asarray(ids) >= tokenizer.vocab_size).any()
    result = evaluate_split(
        method, params, task, tokenizer, task.examples("valid", count=40), batch_size=40, key=KEY,
        sampling=Sampling(temperature=1.0),
    )  # fmt: skip
    assert result.n == 40


def test_the_vae_in_a_reasoner_writes_no_such_rows_either():
    tokenizer = SuccessorList(hops=2).tokenizer((ANSWER,))
    backbone = tiny(tokenizer.vocab_size + 6, width=16, layers=1, heads=2)
    vae = ThoughtVAE(backbone, Lengths(12, 3), steps=1, latents=1, latent_width=4, max_blocks=2)
    limited = within_vocabulary(LaDiR(backbone, Lengths(12, 3), vae=vae, steps=1), tokenizer)
    assert limited.backbone.vocab_used == limited.vae.backbone.vocab_used == tokenizer.vocab_size
    exact = dataclasses.replace(backbone, vocab_size=tokenizer.vocab_size)
    method = LaDiR(exact, Lengths(12, 3), vae=dataclasses.replace(vae, backbone=exact), steps=1)
    assert within_vocabulary(method, tokenizer) == method


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (known(), {"examples": []}, "examples: there are none"),
        (known(), {"batch_size": 0}, "batch_size=0"),
        (known(), {"thoughts": -1}, "thoughts=-1"),
        (known(), {"thoughts": 5}, "thoughts=5: this Known has at most 4"),
        (known(slots=0), {"thoughts": 1}, "thoughts=1: this Known has at most 0"),
        (known(slots=30), {"thoughts": 28}, "needs 33 positions .*max_positions=32"),
        (known(max_positions=6), {}, "needs 7 positions .*max_positions=6"),
    ],
)
def test_bad_requests_are_named_before_anything_compiles(method, options, named):
    TRACES.clear()
    options = {"examples": Echo().examples("valid", count=3)} | options
    with pytest.raises(ValueError, match=named):
        run(method, **options)
    assert not TRACES
