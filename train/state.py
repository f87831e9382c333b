"""The training state: one pytree that holds all that a step reads and writes, and where it lives on the mesh."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from latentjax.backbone import decoder, lora
from latentjax.methods.base import Method


@struct.dataclass
class TrainState:
    """Everything that training changes. `ema` is None when no average is kept."""

    params: Any  # {"backbone": ..., "method": ...}
    opt_state: Any  # of the part that trains
    ema: Any  # like the part of params that trains, or None
    step: Any  # int32 []: completed steps
    key: Any  # PRNG key []: never changes; step s draws from fold_in(key, s)

    @property
    def average(self) -> Any:
        """`params` with the moving average of what trains in its place; None where no average is kept."""
        return None if self.ema is None else with_part(self.params, self.ema)

    @property
    def eval_params(self) -> Any:
        """What validation and evaluation use: the average where one is kept."""
        return self.params if self.ema is None else self.average


def init_params(method: Method, seed: int) -> dict[str, Any]:
    """New parameters of `method`: those of its backbone and its own."""
    backbone_key, method_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
    return {"backbone": decoder.init(method.backbone, backbone_key), "method": method.init(method_key)}


def trained_part(params: Any, untrained: tuple[str, ...]) -> Any:
    """The part of `params` (or of a tree like it) that trains, as nested dicts without the leaves whose path one of the
    regular expressions `untrained` (`Experiment.untrained`) is found in.

    Gradients, optimiser state and average are trees like this one, so what does not train costs none of them."""
    if not untrained:
        return params
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: leaf for path, leaf in flat.items() if not any(re.search(pattern, path) for pattern in untrained)},
        sep="/",
    )


def with_part(params: Any, part: Any) -> Any:
    """`params` with the leaves of `part`, a tree such as `trained_part` makes, in place of its own."""
    if jax.tree.structure(params) == jax.tree.structure(part):
        return part
    flat = flatten_dict(params, keep_empty_nodes=True, sep="/")
    return unflatten_dict(flat | flatten_dict(part, sep="/"), sep="/")


def create(
    params: Any, optimizer: optax.GradientTransformation, *, seed: int, ema: bool, untrained: tuple[str, ...] = ()
) -> TrainState:
    """The state before the first step. Pure, so that it can run under jit with shardings or under `eval_shape`."""
    trained = trained_part(params, untrained)
    return TrainState(
        params=params,
        opt_state=optimizer.init(trained),
        ema=jax.tree.map(jnp.copy, trained) if ema else None,
        step=jnp.int32(0),
        key=jax.random.fold_in(jax.random.key(seed), 1),
    )


def reset_optimizer(
    state: TrainState, optimizer: optax.GradientTransformation, untrained: tuple[str, ...] = ()
) -> TrainState:
    """`state` with new moments. The learning-rate schedule goes on: it belongs to the run, not to the moments."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    new = optimizer.init(trained_part(state.params, untrained))
    kept = jax.tree.map(lambda new, old: old if is_schedule(old) else new, new, state.opt_state, is_leaf=is_schedule)
    return state.replace(opt_state=kept)


def parameter_paths(params: Any) -> list[str]:
    """Path of each parameter as in `backbone/layers/attention/query/kernel`, in the order of the tree's leaves."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def frozen_mask(params: Any, patterns: Sequence[str]) -> Any:
    """Tree of bools: whether any of the regular expressions is found in a parameter's path.

    Raises ValueError naming a pattern that is malformed or that no parameter matches."""
    paths, found = parameter_paths(params), set()
    for pattern in patterns:
        try:
            matches = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise ValueError(f"frozen pattern {pattern!r}: is not a regular expression ({error})") from error
        if not matches:
            raise ValueError(f"frozen pattern {pattern!r}: matches none of {', '.join(paths)}")
        found |= matches
    return jax.tree.unflatten(jax.tree.structure(params), [path in found for path in paths])


def merge_params(params: Mapping[str, Any], other: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`params` with every array that `other` has too taken from `other`. If there is a backbone in it, the whole of it must
    be, but for LoRA adapters: new ones change nothing at first.

    Raises ValueError naming a parameter of the backbone that `other` lacks or that has another shape."""
    theirs = dict(zip(parameter_paths(other), jax.tree.leaves(other), strict=True))
    merged = []
    for path, own in zip(parameter_paths(params), jax.tree.leaves(params), strict=True):
        new = theirs.get(path)
        if new is None and "backbone" in other and path.startswith("backbone/") and not path.endswith(lora.LEAVES):
            raise ValueError(f"{source}: has no parameter {path}")
        if new is not None and new.shape != own.shape:
            raise ValueError(f"{source}: {path} has shape {new.shape}, here it is {own.shape}")
        merged.append(own if new is None else jnp.asarray(new, own.dtype))
    return jax.tree.unflatten(jax.tree.structure(params), merged)
