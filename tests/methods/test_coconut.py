"""Coconut against its definition: the whole sequence of embeddings is run again for every thought, one row at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.methods import Coconut
from latentjax.methods.base import Batch
from latentjax.methods.coconut import thought_limits
from latentjax.methods.layout import states_after_thinking
from latentjax.rollout import Backbone
from latentjax.thoughts.feedback import feedback
from latentjax.tokenizers import END_THOUGHTS, START_THOUGHTS
from tests.backbone import naive
from tests.close import assert_close
from tests.methods.battery import BACKBONE, CASES, EXAMPLES, LENGTHS, Case
from tests.quick import jit

# Three rows of 5, 2 and 6 question tokens, 2, 3 and 0 thoughts, 4, 2 and 5 text tokens, the first one no target if a marker.
QUESTION_MASK = np.arange(6) < np.array([[5], [2], [6]])
THOUGHTS = (2, 3, 0)
TEXT_MASK = np.arange(5) < np.array([[4], [2], [5]])
_rng = np.random.default_rng(0)
QUESTION, TEXT = (_rng.integers(0, 16, mask.shape).astype(np.int32) for mask in (QUESTION_MASK, TEXT_MASK))


def ragged_batch(unscored: int) -> Batch:
    thought_mask = np.arange(4) < np.array(THOUGHTS)[:, None]  # one slot more than any row uses
    return Batch(QUESTION, QUESTION_MASK, thought_mask, TEXT, TEXT_MASK, TEXT_MASK & (np.arange(5) >= unscored))


def definition(config, params, unscored):
    """(mean loss over the targets of all rows, logits of each row's text)."""
    total, targets, all_logits = 0.0, 0, []
    for row, k in enumerate(THOUGHTS):
        question, text = QUESTION[row, QUESTION_MASK[row]], TEXT[row, TEXT_MASK[row]]
        x = naive.think(config, params, naive.embed(params, question), k)
        x = jnp.concatenate([x, naive.embed(params, text)])
        logits = naive.logits(config, params, naive.forward(config, params, x))
        logits = logits[len(question) + k - 1 :][: len(text)]  # the position before each text token
        for t in range(unscored, len(text)):
            total -= jax.nn.log_softmax(logits[t])[text[t]]
            targets += 1
        all_logits.append(logits)
    return total / targets, all_logits


definition_and_gradient = jit(
    jax.value_and_grad(definition, argnums=1, has_aux=True), static_argnums=(0, 2)
)  # fmt: skip


@functools.partial(jit, static_argnums=0)
def ours(method, params, batch):
    def loss(backbone):
        return method.loss({"backbone": backbone, "method": {}}, batch, jax.random.key(0), {}, train=False)[0]

    source = feedback(batch.thought_mask.sum(axis=1, dtype=jnp.int32))
    backbone = Backbone(method.backbone, params)
    states = states_after_thinking(backbone, batch, jax.random.key(0), source, train=False)
    return *jax.value_and_grad(loss)(params), decoder.head(method.backbone, params, states)


ROTARY = dataclasses.replace(
    BACKBONE, positions="rotary", norm="rms", activation="silu", gated_mlp=True, kv_heads=1, qk_norm=True,
    tied_head=False, qkv_bias=True,
)  # fmt: skip


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("config", "markers"), [(BACKBONE, "both"), (BACKBONE, "none"), (ROTARY, "both")],
    ids=["markers", "no markers", "rotary, GQA"],
)  # fmt: skip
def test_loss_logits_and_gradients_are_those_of_the_definition(config, markers, scan):
    unscored = 1 if markers == "both" else 0
    method = Coconut(naive.with_scan(config, scan), LENGTHS, markers=markers, max_latent_stage=4)
    params = naive.random_params(config)
    (expected, expected_logits), expected_gradient = definition_and_gradient(config, params, unscored)
    loss, gradient, logits = ours(method, params, ragged_batch(unscored))
    assert_close(loss, expected, 1e-5)
    assert_close(gradient, expected_gradient, 1e-4)
    for row in range(3):
        assert_close(logits[row, TEXT_MASK[row]], expected_logits[row], 1e-5)


def test_gradient_reaches_the_question_through_the_thoughts_alone():
    """The answer may not see the question, so its embeddings matter through the thoughts only."""
    method = Coconut(BACKBONE, LENGTHS, markers="none", answer_sees_question=False, max_latent_stage=4)
    config = dataclasses.replace(BACKBONE, tied_head=False)  # a tied head would add the gradient of the logits
    method = dataclasses.replace(method, backbone=config)
    params, row = naive.random_params(config), jax.tree.map(lambda x: jnp.asarray(x[:1]), ragged_batch(0))
    n, k, m, mark = 5, 2, 4, 15  # `mark` is the text, and in no question
    row = row.replace(question=row.question % mark, text=jnp.full_like(row.text, mark))

    def with_table(table):
        return {**params, "embed": {**params["embed"], "tokens": table}}

    @jit
    @jax.value_and_grad
    def by_rollout(table):
        return method.loss({"backbone": with_table(table), "method": {}}, row, jax.random.key(0), {}, train=False)[0]

    @jit
    @jax.value_and_grad
    def by_definition(table):
        x = naive.think(config, with_table(table), table[row.question[0, :n]], k)
        x = jnp.concatenate([x, table[jnp.full(m, mark)]])
        hidden = naive.forward(config, params, x, naive.answer_mask(n, k, m))[n + k - 1 :][:m]
        return -jnp.mean(jax.nn.log_softmax(naive.logits(config, params, hidden))[:, mark])

    (loss, gradient), (expected, expected_gradient) = (
        f(params["embed"]["tokens"]) for f in (by_rollout, by_definition)
    )
    assert_close(loss, expected, 1e-5)
    assert_close(gradient, expected_gradient, 1e-4)
    assert (np.asarray(gradient)[np.asarray(row.question[0, :n])] != 0).any(axis=1).all()


@pytest.mark.parametrize("markers", ["both", "start", "none"])
def test_targets_are_all_tokens_after_the_end_marker_and_not_the_marker(markers):
    case = Case(Coconut(BACKBONE, LENGTHS, markers=markers, max_latent_stage=3, c_thought=2))
    tokenizer = case.codec.tokenizer
    batch = case.batch(EXAMPLES[:1], stage=2)  # "1 2 3": 4 5, 6, 7 8 -> 9
    before = [tokenizer.token_id(START_THOUGHTS)] if markers != "none" else []
    after = [tokenizer.token_id(END_THOUGHTS)] if markers == "both" else []
    rest = [*tokenizer.encode("7 8 [A] 9"), tokenizer.eos_id]
    assert batch.question[0, batch.question_mask[0]].tolist() == tokenizer.encode("1 2 3") + before
    assert batch.thought_mask[0].tolist() == [True] * 4 + [False] * 2
    assert batch.text[0, batch.text_mask[0]].tolist() == after + rest
    assert batch.text[0, batch.loss_mask[0]].tolist() == rest
    prompts = case.prompts(EXAMPLES[:1])
    assert prompts.question[0, prompts.question_mask[0]].tolist() == tokenizer.encode("1 2 3") + before
    assert prompts.thoughts.tolist() == [6]
    assert int(prompts.ids["eos"]) == tokenizer.eos_id
    assert ("end_thoughts" in prompts.ids) == (markers == "both")


def test_without_thought_steps_leave_and_nothing_comes():
    case = CASES["Coconut without thought"]
    assert case.method.max_thoughts() == 0
    batch = case.batch(EXAMPLES[:1], stage=2)
    tokenizer = case.codec.tokenizer
    assert batch.thought_mask.shape == (1, 0)
    assert batch.text[0, batch.loss_mask[0]].tolist() == [*tokenizer.encode("7 8 [A] 9"), tokenizer.eos_id]


def test_number_of_thoughts_of_a_generation():
    case = CASES["Coconut"]
    prompts = case.prompts()
    assert np.asarray(thought_limits(None, prompts, 3)).tolist() == [3] * 8
    assert np.asarray(thought_limits(2, prompts, 3)).tolist() == [2] * 8
    assert np.asarray(thought_limits(np.arange(8) % 4, prompts, 3)).tolist() == [0, 1, 2, 3] * 2
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=f"thoughts={wrong}.*0 to 3"):
            thought_limits(wrong, prompts, 3)


def test_bfs_loss_is_its_formula():
    """-log of the probability of the reachable set, for each row's one target; the answer's for rows that ask for it."""
    case = CASES["GraphCoconut"]
    params, batch = case.params(), case.batch(stage=2)
    value, metrics = jit(lambda p, b: case.method.loss(p, b, jax.random.key(0), {}, train=False))(params, batch)
    total, right = 0.0, 0
    for row in range(8):
        question, text = batch.question[row, batch.question_mask[row]], batch.text[row, batch.text_mask[row]]
        assert batch.loss_mask[row].sum() == 1
        x = naive.think(
            BACKBONE, params["backbone"], naive.embed(params["backbone"], question), batch.thought_mask[row].sum()
        )
        x = jnp.concatenate([x, naive.embed(params["backbone"], text[:-1])])
        logits = naive.logits(BACKBONE, params["backbone"], naive.forward(BACKBONE, params["backbone"], x)[-1])
        weights = np.exp(np.asarray(logits, np.float64))
        among = batch.extra["vertices"][row]
        total -= np.log(weights[among].sum() / weights.sum())
        right += int(among[weights.argmax()])
    assert_close(value, total / 8, 1e-5)
    assert float(metrics["token_accuracy"]) == pytest.approx(right / 8)


def test_graph_examples_are_those_of_the_card():
    """k = min(stage, hops) + 1; up to the hops a vertex of level k is asked for after k - 1 thoughts, then the answer."""
    case = CASES["GraphCoconut"]
    method = dataclasses.replace(case.method, uniform_prob=0.0, supervision="path")
    case = dataclasses.replace(case, method=method)
    tokenizer = case.codec.tokenizer
    for stage in range(6):
        batch = case.batch(stage=stage, seed=stage)
        for row, example in enumerate(EXAMPLES):
            hops = len(example.steps)
            k = min(stage, 4, hops) + 1
            assert batch.thought_mask[row].sum() == k - 1
            text = tokenizer.decode(batch.text[row, batch.text_mask[row]].tolist())
            if k > hops:
                assert text == f"[A] {example.answer}"
                chosen = [example.answer]
            else:
                assert int(text) in example.meta["neighbor_k"][k]
                chosen = map(str, example.meta["reachable_k"][k])
            assert np.flatnonzero(batch.extra["vertices"][row]).tolist() == sorted(map(tokenizer.token_id, chosen))
    assert case.prompts().thoughts.tolist() == [len(e.steps) for e in EXAMPLES]


def test_mixed_graph_stages_are_uniform():
    case = CASES[
        "GraphCoconut"
    ]  # with probability 1/2 k is uniform in 1..4, else 4: an example of three hops at stage 4
    batch = case.batch(EXAMPLES[:1] * 4000, stage=4)
    counts = np.bincount(batch.thought_mask.sum(axis=1), minlength=4)
    expected = 4000 * np.array([1, 1, 1, 5]) / 8
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
