import jax
import jax.numpy as jnp
import pytest

from tests.train.small import experiment
from train.flops import matmul_flops
from train.prepare import prepare
from train.step import make_step

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
ONE = 2 * 3 * 5 * 7


def _looped(x, w):
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, length=6)[0]


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (lambda a, b: a @ b, (A, B), ONE),
        (lambda a, b: jnp.einsum("gij,gjk->gik", a, b), (jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))), 4 * ONE),
        (lambda a, b: jax.jit(jnp.matmul)(a, b) + a.sum(), (A, B), ONE),
        (_looped, (jnp.ones((2, 4)), jnp.ones((4, 4))), 6 * 2 * 2 * 4 * 4),
        (jax.grad(lambda w, x: _looped(x, w).sum()), (jnp.ones((4, 4)), jnp.ones((2, 4))), 3 * 6 * 2 * 2 * 4 * 4),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 7))), (A, B), ONE),
        (lambda a, b: jax.checkpoint(jnp.matmul)(a, b), (A, B), ONE),
    ],
    ids=["product", "batched", "nested", "scan", "gradient", "condition", "checkpoint"],
)
def test_products_are_counted_as_often_as_they_run(function, arguments, flops):
    assert matmul_flops(jax.make_jaxpr(function)(*arguments)) == flops


def test_accumulation_does_not_change_the_work():
    counts = []
    for accumulate in (1, 2, 4):
        config = experiment(accumulate=accumulate)
        prepared = prepare(config)
        step = jax.jit(make_step(config, 4)).trace(prepared.shapes, prepared.training.batch(0))
        counts.append(matmul_flops(step.jaxpr))
    width, vocabulary, positions = 8, 14, 8 * 7
    assert counts == [3 * 2 * width * vocabulary * positions] * 3
