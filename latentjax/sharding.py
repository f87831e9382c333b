"""Device meshes and partition rules by parameter name.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits heads and MLP width.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# First match wins; a rule gives the axes of the trailing dimensions, leading ones (the layer axis) stay whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/tokens$", ("tensor", "fsdp")),  # [V, D]
    (r"embed/positions$", (None, "fsdp")),  # [P, D]
    (r"head/kernel$", ("fsdp", "tensor")),  # [D, V]
    (r"layers/(query|key|value|mlp_up|mlp_gate)/kernel$", ("fsdp", "tensor")),  # [D, H * E] and [D, M]
    (r"layers/(query|key|value|mlp_up|mlp_gate)/bias$", ("tensor",)),
    (r"layers/(attention_out|mlp_down)/kernel$", ("tensor", "fsdp")),  # [H * E, D] and [M, D]
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Any = None) -> Mesh:
    """A mesh over all devices; `data=-1` takes what the other axes leave. Auto axes, set explicitly.

    Raises ValueError if the product is not the number of devices."""
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    for name, size in (("fsdp", fsdp), ("tensor", tensor)):
        if size < 1:
            raise ValueError(f"mesh.{name}={size}: must be at least 1")
    if data == -1:
        data = count // (fsdp * tensor)
    if data * fsdp * tensor != count:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, but there are {count}"
        )
    return Mesh(
        np.asarray(devices).reshape(data, fsdp, tensor), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays of a batch are split along their first dimension over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raise ValueError if the mesh does not divide the batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of data x fsdp = {ways} (mesh {dict(mesh.shape)}): "
            f"use {batch_size // ways * ways or ways} or another mesh"
        )


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A NamedSharding for every array of `params` (or of any tree with the same names inside: optimiser state, EMA).

    A dimension that its axis does not divide stays whole."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(mesh, "/".join(_name(part) for part in path), np.shape(leaf)))

    return jax.tree_util.tree_map_with_path(sharding, params)


def _name(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    for pattern, axes in RULES:
        if re.search(pattern, name) and len(shape) >= len(axes):
            lead = len(shape) - len(axes)
            fits = [
                axis if axis is None or shape[lead + i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(axes)
            ]
            return PartitionSpec(*[None] * lead, *fits)
    return PartitionSpec()
