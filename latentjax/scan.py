"""A scan for loops of few steps over large parameters, such as a rollout of thoughts.

The gradient of `jax.lax.scan` with respect to what its body closes over is a sum that every step reads and writes: for K
thoughts, K passes over an array as large as all parameters, and on a mesh K rounds of communication. Here the backward loop
carries only the gradient of the carry; that of the closed-over values is taken for all steps at once, from the carries of
the forward loop. It is the same sum, in another order. The price: two more forward passes of each step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The floating-point leaves of `tree`, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(tree)

    def put(floats: list[Any]) -> Any:
        rest = iter(floats)
        return structure.unflatten([next(rest) if _is_float(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_float(leaf)], put


def deferred_scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan(body, carry, xs)`, with the gradients of closed-over values taken after the backward loop.

    Reverse-mode differentiation only; `xs` get no gradient: they must not depend on anything that has one."""
    step, constants = jax.closure_convert(body, carry, jax.tree.map(lambda x: x[0], xs))

    @jax.custom_vjp
    def loop(constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda carry, x: step(carry, x, *constants), carry, xs)

    def forward(constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        def keep(carry: Any, x: Any) -> tuple[Any, Any]:
            new, y = step(carry, x, *constants)
            return new, (y, carry)

        last, (ys, carries) = jax.lax.scan(keep, carry, xs)
        return (last, ys), (constants, carries, xs)

    def backward(kept: Any, gradient: Any) -> tuple[Any, Any, None]:
        constants, carries, xs = kept

        def floats(carry_floats: Any, carry: Any, x: Any, constants: Any) -> tuple[Any, Any]:
            """The floating-point part of a step as a function of that of its carry."""
            new, y = step(_split(carry)[1](carry_floats), x, *constants)
            return _split(new)[0], _split(y)[0]

        def back(last: Any, inputs: Any) -> tuple[Any, Any]:
            carry, x, of_y = inputs
            _, pull = jax.vjp(lambda c: floats(c, carry, x, constants), _split(carry)[0])
            return pull((last, of_y))[0], last

        of_last, of_ys = _split_gradient(gradient)
        of_first, of_carries = jax.lax.scan(back, of_last, (carries, xs, of_ys), reverse=True)

        def all_steps(constants: Any) -> tuple[Any, Any]:
            return jax.vmap(lambda carry, x: floats(_split(carry)[0], carry, x, constants))(carries, xs)

        of_constants = jax.vjp(all_steps, constants)[1]((of_carries, of_ys))[0]
        first = jax.tree.map(lambda x: x[0], carries)
        return of_constants, _zeros_elsewhere(first, of_first), None

    loop.defvjp(forward, backward)
    return loop(constants, carry, xs)


def _split_gradient(gradient: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
    first, second = ([x for x in jax.tree.leaves(part) if x.dtype != jax.dtypes.float0] for part in gradient)
    return first, second


def _zeros_elsewhere(tree: Any, floats: list[Any]) -> Any:
    """A gradient with respect to `tree`: `floats` for its floating-point leaves, none for the others."""
    leaves, structure = jax.tree.flatten(tree)
    rest = iter(floats)
    return structure.unflatten([next(rest) if _is_float(leaf) else None for leaf in leaves])
