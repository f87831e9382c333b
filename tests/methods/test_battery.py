"""The battery that every method of `battery.CASES` passes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.methods.base import Batch
from latentjax.rollout import Kind
from latentjax.sharding import batch_sharding, make_mesh, param_shardings
from tests.close import assert_close
from tests.methods.battery import CASES, EXAMPLES, LENGTHS, loss, loss_and_gradient
from tests.quick import jit

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
_AUTOREGRESSIVE = {name: case for name, case in CASES.items() if case.autoregressive}


@functools.partial(jit, static_argnums=0)
def generate(method, params, prompts):
    return method.generate(params, prompts, jax.random.key(0))


@every_case
def test_loss_is_finite_and_reaches_every_parameter(case):
    value, gradient = loss_and_gradient(case.method, case.params(), case.batch())
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert (leaf != 0).any(), jax.tree_util.keystr(path)


@every_case
def test_a_batch_is_the_mean_over_its_rows(case):
    """A row is given eight times over, so that one compiled program serves all, and once in a batch of one."""
    params, batch = case.params(), case.batch()
    total, gradients = 0.0, None
    for row in range(8):
        copies = jax.tree.map(lambda x, r=row: np.repeat(x[r : r + 1], 8, axis=0), batch)
        value, gradient = loss_and_gradient(case.method, params, copies)
        share = batch.loss_mask[row].sum() / batch.loss_mask.sum()
        total += share * value
        weighted = jax.tree.map(lambda g, s=share: s * g, gradient)
        gradients = weighted if gradients is None else jax.tree.map(jnp.add, gradients, weighted)
    value, gradient = loss_and_gradient(case.method, params, batch)
    assert_close(total, value, 1e-5)
    assert_close(gradients, gradient, 1e-4)
    one = jax.tree.map(lambda x: x[:1], batch)
    copies = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), one)
    assert_close(loss(case.method, params, one)[0], loss_and_gradient(case.method, params, copies)[0], 1e-5)


@every_case
def test_metrics_say_what_the_loss_is(case):
    value, metrics = loss(case.method, case.params(), case.batch())
    assert float(metrics["loss"]) == float(value)
    assert float(metrics["targets"]) == case.batch().loss_mask.sum()
    assert 0 <= float(metrics["token_accuracy"]) <= 1
    assert value.dtype == jnp.float32


def widen(x: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, columns)))


@every_case
def test_more_padding_and_scanned_layers_change_nothing(case):
    """Both at once: one program to compile instead of two."""
    params, batch = case.params(), case.batch()
    wide = batch.replace(
        question=widen(batch.question, 2), question_mask=widen(batch.question_mask, 2), text=widen(batch.text, 3),
        text_mask=widen(batch.text_mask, 3), loss_mask=widen(batch.loss_mask, 3),
        thought_mask=widen(batch.thought_mask, 2 if batch.thought_mask.shape[1] else 0),
        extra={name: widen(x, 3) if x.shape == batch.text.shape else x for name, x in batch.extra.items()},
    )  # fmt: skip
    value, gradient = loss_and_gradient(case.method, params, batch)
    other, other_gradient = loss_and_gradient(case.with_backbone(scan_layers=True).method, params, wide)
    assert_close(other, value, 1e-5)
    assert_close(other_gradient, gradient, 1e-4)


@every_case
def test_what_padding_contains_changes_no_bit(case):
    params, batch = case.params(), case.batch()
    scribbled = batch.replace(
        question=np.where(batch.question_mask, batch.question, 5), text=np.where(batch.text_mask, batch.text, 6)
    )
    value, gradient = loss_and_gradient(case.method, params, batch)
    other, other_gradient = loss_and_gradient(case.method, params, scribbled)
    assert other == value
    chex.assert_trees_all_equal(other_gradient, gradient)


@every_case
def test_longer_lengths_give_the_same_batch_with_more_padding(case):
    more_text = 3 if case.autoregressive else 0
    lengths = dataclasses.replace(LENGTHS, question=LENGTHS.question + 2, text=LENGTHS.text + more_text)
    longer = dataclasses.replace(case, method=dataclasses.replace(case.method, lengths=lengths)).batch()
    batch = case.batch()
    for name in ("question", "question_mask", "text", "text_mask", "loss_mask"):
        grown = getattr(longer, name)
        assert (grown[:, : getattr(batch, name).shape[1]] == getattr(batch, name)).all()
        assert (grown[:, getattr(batch, name).shape[1] :] == 0).all()  # the padding id is 0


@every_case
def test_sharded_equals_single_device(case):
    params, batch = case.params(), case.batch()
    expected = loss_and_gradient(case.method, params, batch)
    meshes = [make_mesh(data=8), make_mesh(data=2, fsdp=2, tensor=2)]
    for mesh in meshes if type(case.method).__name__ == "Coconut" else meshes[:1]:
        placed = jax.device_put(params, param_shardings(mesh, params))
        split = jax.device_put(batch, batch_sharding(mesh))
        # One step at a time: CPU devices that wait for one another in several programs at once can deadlock.
        value, gradient = jax.block_until_ready(loss_and_gradient(case.method, placed, split))
        assert_close(value, expected[0], 1e-4)
        assert_close(gradient, expected[1], 1e-4)


@pytest.mark.parametrize("case", _AUTOREGRESSIVE.values(), ids=_AUTOREGRESSIVE)
def test_cached_generation_equals_the_loss_of_its_text(case):
    """Generated token by token against a cache, then scored by the training loss in parallel."""
    params, prompts = case.params(), case.prompts()
    out = generate(case.method, params, prompts)
    after = LENGTHS.question + case.method.max_thoughts()
    tokens, kind = np.asarray(out.tokens)[:, after:], np.asarray(out.kind)[:, after:]
    text_mask = (kind == Kind.TEXT) | (kind == Kind.MARKER)
    assert (np.asarray(out.thought_mask).sum(axis=1) == prompts.thoughts).all()
    batch = Batch(
        prompts.question, prompts.question_mask, np.asarray(out.thought_mask), tokens, text_mask, kind == Kind.TEXT
    )
    method = case.method
    if hasattr(method, "loss_on"):
        method = dataclasses.replace(method, loss_on="vertex")
    value, metrics = loss(method, params, batch)
    assert_close(-np.asarray(out.log_probs).sum(), value * metrics["targets"], 1e-5)
    assert float(metrics["token_accuracy"]) == 1.0  # greedy tokens are the most likely ones


@every_case
def test_generation_of_a_batch_equals_that_of_its_rows(case):
    params = case.params()
    whole = generate(case.method, params, case.prompts())
    one = slice(2, 3)
    alone = generate(case.method, params, case.prompts(EXAMPLES[one]))
    assert (alone.tokens == whole.tokens[one]).all()
    assert_close(alone.log_probs, whole.log_probs[one], 1e-5)
    assert_close(alone.cost, jax.tree.map(lambda x: x[one], whole.cost), 0)


@every_case
def test_one_program_for_all_stages_and_equal_methods(case):
    """A method is a static argument by value; slots of a curriculum are padded to its last stage's."""

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def traced(method, params, batch):
        return method.loss(params, batch, jax.random.key(0), {}, train=False)[0]

    chex.clear_trace_counter()  # it counts by name, over all cases
    params = case.params()
    for i, stage in enumerate([*(s.index for s in case.method.stages()), 0]):
        same, batch = dataclasses.replace(case.method), case.batch(stage=stage, seed=i)
        assert same is not case.method
        assert hash(same) == hash(case.method)
        jax.eval_shape(functools.partial(traced, same), params, batch)
        assert np.isfinite(loss(case.method, params, batch)[0])


@every_case
def test_dropout_is_decided_by_the_key_and_off_outside_training(case):
    dropped = dataclasses.replace(case.method, backbone=case.method.backbone.with_dropout(0.2))
    params, batch = case.params(), case.batch()
    one, again, other = (loss(dropped, params, batch, key, train=True)[0] for key in (1, 1, 2))
    assert one == again
    assert one != other
    assert_close(loss(dropped, params, batch)[0], loss(case.method, params, batch)[0], 1e-6)


@every_case
def test_encoding_is_decided_by_the_generator_and_masks_are_consistent(case):
    first, again = case.batch(seed=3), case.batch(seed=3)
    chex.assert_trees_all_equal(first, again)
    assert not (first.loss_mask & ~first.text_mask).any()
    assert first.loss_mask.any(axis=1).all()
    for mask in (first.question_mask, first.thought_mask, first.text_mask):
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # right-padded


@every_case
def test_what_does_not_fit_is_an_error_with_row_and_lengths(case):
    for field, needed in (("question", 6), ("text", 1)):
        short = dataclasses.replace(LENGTHS, **{field: needed - 1})
        method = dataclasses.replace(case.method, lengths=short)
        with pytest.raises(ValueError, match=rf"{field} of row \d.*lengths.{field}={needed - 1}"):
            dataclasses.replace(case, method=method).batch()
    with pytest.raises(ValueError, match="at least one example"):
        case.batch(())
