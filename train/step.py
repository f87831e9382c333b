"""One optimiser step as a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latentjax.methods.base import Batch, Method
from train.config import Experiment
from train.state import TrainState, frozen_mask, trained_part, with_part

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    experiment: Experiment, total_steps: int, frozen: tuple[str, ...] = (), *, axis: str | None = None
) -> Step:
    """The step of a stage in which the parameters that match `frozen` do not train. Under a mapping over devices (pmap)
    `axis` is its name: each device sees its rows of the batch and draws noise of its own, and all make the same new state.

    The step returns the new state and float32 scalars: the method's metrics, `grad_norm` (before clipping),
    `learning_rate`, and `finite` (1 if loss and gradients are finite, else 0: the new state is then worthless).
    """
    method, optimizer, untrained = experiment.method, experiment.optimizer.build(total_steps), experiment.untrained
    schedule = experiment.optimizer.learning_rate_schedule(total_steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        trained, still = trained_part(state.params, untrained), frozen_mask(state.params, frozen)
        key = jax.random.fold_in(state.key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        grads, metrics = gradients(method, state, batch, key, still, experiment.accumulate, untrained)
        grads, metrics = mean_over_devices(grads, metrics, axis)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        # Weight decay would move a frozen parameter although its gradient is zero.
        updates = jax.tree.map(
            lambda update, stop: jnp.zeros_like(update) if stop else update, updates, trained_part(still, untrained)
        )
        trained = optax.apply_updates(trained, updates)
        ema = state.ema
        if experiment.ema is not None:
            ema = optax.incremental_update(trained, state.ema, 1.0 - experiment.ema)
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": (jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)).astype(jnp.float32),
        }
        params = with_part(state.params, trained)
        return state.replace(params=params, opt_state=opt_state, ema=ema, step=state.step + 1), metrics

    return step


def gradients(
    method: Method,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    still: Any,
    accumulate: int,
    untrained: tuple[str, ...] = (),
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of all but the `untrained` parameters, and metrics, of the mean loss over all targets of `batch`, one
    microbatch at a time.

    `method.loss` and its metrics are means over the `targets` that it counts, so a microbatch weighs as many as it has.
    `still` marks parameters whose gradient is to be zero; every array of the batch has the batch as its first axis.
    """
    trained = trained_part(state.params, untrained)

    def loss(trained: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = with_part(state.params, trained)
        params = jax.tree.map(lambda p, stop: jax.lax.stop_gradient(p) if stop else p, params, still)
        value, metrics = method.loss(params, micro, key, {"step": state.step, "ema": state.average}, train=True)
        return value, metrics | {"loss": value}

    differentiate = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return differentiate(trained, batch, key)

    def add(sums: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        micro, number = item
        grads, metrics = differentiate(trained, micro, jax.random.fold_in(key, number))
        weighted = jax.tree.map(lambda x: x * metrics["targets"], (grads, metrics | {"targets": jnp.float32(1)}))
        return jax.tree.map(jnp.add, sums, weighted), None

    # Rows i, i + A, ... make microbatch i: with a batch sharded along its first axis no row changes its device.
    micros = jax.tree.map(lambda x: x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(differentiate, trained, first, key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, (micros, jnp.arange(accumulate)))
    targets = jnp.maximum(metrics["targets"], 1.0)
    means = jax.tree.map(lambda x: x / targets, (grads, metrics))
    return means[0], means[1] | {"targets": metrics["targets"]}


def mean_over_devices(values: Any, metrics: dict[str, jax.Array], axis: str | None) -> tuple[Any, dict[str, jax.Array]]:
    """`values` and `metrics`, means over the targets of each device of the mapping `axis`, as means over all targets.

    Without a mapping they are that already."""
    if axis is None:
        return values, metrics
    targets = metrics["targets"]
    total = jax.lax.psum(targets, axis)
    share = targets / jnp.maximum(total, 1.0)
    means = jax.tree.map(lambda x: jax.lax.psum(x * share.astype(x.dtype), axis), (values, metrics))
    return means[0], means[1] | {"targets": total}
