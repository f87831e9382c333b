import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.scan import deferred_scan
from tests.close import assert_close
from tests.methods.battery import CASES

STEPS, ROWS, WIDTH = 5, 3, 4


def _run(scan, parameters, start):
    """A loop with integers and a key in it, outputs that depend on the parameters, and a step that forgets its carry."""

    def body(carry, inputs):
        count, mask, x = carry
        number, key = inputs
        noise = jax.random.normal(key, x.shape)
        y = jnp.tanh(x @ parameters["w"] + parameters["b"] + 0.1 * noise)
        new = jnp.where(mask[:, None] & (number != 3), y, x * parameters["scale"])
        return (count + 1, ~mask, new), (y.sum(axis=1), count)

    keys = jax.random.split(jax.random.key(0), STEPS)
    first = (jnp.int32(0), jnp.array([True, False, True]), start)
    (count, _, last), (sums, counts) = scan(body, first, (jnp.arange(STEPS), keys))
    return jnp.sum(last**2) + jnp.sum(jnp.sin(sums)), (count, counts, last)


def _arguments():
    rng = np.random.default_rng(0)
    parameters = {"w": rng.normal(size=(WIDTH, WIDTH)), "b": rng.normal(size=WIDTH), "scale": np.array(0.7)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (parameters, rng.normal(size=(ROWS, WIDTH))))


@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.jit(jax.checkpoint(f))], ids=["jit", "checkpoint"])
def test_values_and_gradients_are_those_of_scan(transform):
    gradient = {
        scan: transform(jax.grad(lambda *arguments, scan=scan: _run(scan, *arguments), (0, 1), has_aux=True))(
            *_arguments()
        )
        for scan in (jax.lax.scan, deferred_scan)
    }
    (ours, values), (right, right_values) = gradient[deferred_scan], gradient[jax.lax.scan]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), values, right_values))
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), ours, right)


def test_the_backward_loop_carries_no_gradient_of_what_is_closed_over():
    """The point of it: with `jax.lax.scan` an array as large as the parameters is in the carry."""

    def carried(scan):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, x: _run(scan, p, x)[0]))(*_arguments())
        loops = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "scan"]
        shapes = []
        for loop in loops:
            skip, count = loop.params["num_consts"], loop.params["num_carry"]
            shapes += [v.aval.shape for v in loop.invars[skip : skip + count]]
        return shapes

    assert (WIDTH, WIDTH) in carried(jax.lax.scan)
    assert (WIDTH, WIDTH) not in carried(deferred_scan)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(getattr(inner, "jaxpr", inner))


def test_gradients_of_thoughts_are_the_same_for_every_platform():
    """On accelerators a rollout is a `deferred_scan` over scanned layers, on CPU a `jax.lax.scan` over unrolled ones."""
    dropout = {f"{place}_dropout": 0.1 for place in ("embedding", "attention", "residual")}

    def gradient(platform):
        case = CASES["Coconut"].with_backbone(platform=platform, **dropout)

        def loss(params, batch, key):
            return case.method.loss(params, batch, key, {"step": 0, "ema": None}, train=True)[0]

        return jax.jit(jax.value_and_grad(loss))(case.params(), case.batch(), jax.random.key(3))

    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), gradient("tpu"), gradient(None))
