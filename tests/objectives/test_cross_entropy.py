"""Cross-entropy against loops over tokens and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentjax.objectives.cross_entropy import mean_over_targets, token_cross_entropy
from tests.close import assert_close


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4, 5, 7)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, 7, (4, 5))), jnp.asarray(rng.random((4, 5)) < 0.5)


def test_mean_over_the_targets_of_the_batch(case):
    logits, labels, mask = case
    loss, metrics = token_cross_entropy(logits, labels, mask)
    terms, right = [], 0
    for b in range(4):
        for t in range(5):
            if mask[b, t]:
                row = np.asarray(logits[b, t], np.float64)
                terms.append(np.log(np.exp(row).sum()) - row[labels[b, t]])
                right += int(row.argmax() == labels[b, t])
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(metrics["loss"]) == float(loss)
    assert float(metrics["targets"]) == len(terms)
    assert float(metrics["token_accuracy"]) == pytest.approx(right / len(terms))


def test_gradient_is_that_of_optax(case):
    logits, labels, mask = case

    def by_optax(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.where(mask, losses, 0).sum() / mask.sum()

    ours = jax.grad(lambda x: token_cross_entropy(x, labels, mask)[0])(logits)
    assert_close(ours, jax.grad(by_optax)(logits), 1e-5)
    assert (np.asarray(ours)[~np.asarray(mask)] == 0).all()


def test_a_batch_without_targets_has_loss_and_gradient_zero(case):
    logits, labels, mask = case
    loss, gradient = jax.value_and_grad(lambda x: token_cross_entropy(x, labels, mask & False)[0])(logits)
    assert float(loss) == 0
    assert (gradient == 0).all()


def test_large_logits_stay_finite():
    loss, _ = token_cross_entropy(jnp.full((1, 1, 3), 1e4), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    assert float(loss) == pytest.approx(np.log(3), abs=1e-3)  # 1e4 has steps of 1e-3


def test_bfloat16_logits_are_summed_in_float32(case):
    logits, labels, mask = case
    loss, _ = token_cross_entropy(logits.astype(jnp.bfloat16), labels, mask)
    rounded, _ = token_cross_entropy(logits.astype(jnp.bfloat16).astype(jnp.float32), labels, mask)
    assert loss.dtype == jnp.float32
    assert loss == rounded


def test_mean_over_targets_counts_what_is_right():
    loss, metrics = mean_over_targets(
        jnp.asarray([1.0, 2.0, 9.0]), jnp.asarray([True, True, False]), jnp.asarray([True, False, True])
    )
    assert (float(loss), float(metrics["token_accuracy"]), float(metrics["targets"])) == (1.5, 0.5, 2.0)
