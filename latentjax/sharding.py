"""Device meshes and partition rules by parameter name.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits heads, MLP width and
vocabulary. Optimiser state and averages have the names of their parameters inside and are split as they are.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latentjax.backbone.config import BackboneConfig

AXES = ("data", "fsdp", "tensor")

# First match wins; a rule gives the axes of the trailing dimensions, leading ones (the layer axis) stay whole. What no rule
# names is whole on every device: so are biases and vectors of width D, and parameters of thoughts without a rule here.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/tokens$", ("tensor", "fsdp")),  # [V, D]
    (r"embed/positions$", (None, "fsdp")),  # [P, D]
    (r"head/kernel$", ("fsdp", "tensor")),  # [D, V]
    (r"layers/(query|key|value|mlp_up|mlp_gate)/kernel$", ("fsdp", "tensor")),  # [D, H * E] and [D, M]
    (r"layers/(query|key|value|mlp_up|mlp_gate)/bias$", ("tensor",)),
    (r"layers/(attention_out|mlp_down)/kernel$", ("tensor", "fsdp")),  # [H * E, D] and [M, D]
    # Adapters are split as their kernels are; the rank, which is small, stays whole.
    (r"layers/(query|key|value|mlp_up|mlp_gate)/lora_a$", ("fsdp", None)),  # [D, R]
    (r"layers/(query|key|value|mlp_up|mlp_gate)/lora_b$", (None, "tensor")),  # [R, H * E] and [R, M]
    (r"layers/(attention_out|mlp_down)/lora_a$", ("tensor", None)),  # [H * E, R] and [M, R]
    (r"layers/(attention_out|mlp_down)/lora_b$", (None, "fsdp")),  # [R, D]
    (r"layers/(attention_out|mlp_down)/bias$", (None,)),  # [D]: as large as one activation, and added to whole sums
    (r"norm/(scale|bias)$", (None,)),  # [D] or [E], the norms of queries and keys included
    # Thoughts of a VAE: from and to latents, whose width Z is small.
    (r"method/(latent_in|decompress)/kernel$", (None, "fsdp")),  # [Z, D]
    (r"method/(mean|log_variance|head/out|decision)/kernel$", ("fsdp", None)),  # [D, Z]; two outputs of the decision
    # The two layers of an embedding of a time or a length of time, split as an MLP's, and what reads it.
    (r"method/(head_)?(time|span)/in/kernel$", (None, "tensor")),  # [256, D]
    (r"method/(head_)?(time|span)/in/bias$", ("tensor",)),
    (r"method/(head_)?(time|span)/out/kernel$", ("tensor", "fsdp")),  # [D, D]
    (r"method/head/modulation/kernel$", ("tensor", "fsdp")),  # [D, 2 D]
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
    # Neighbours along the last axes are neighbours on a TPU's network; elsewhere devices stay in order.
    grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays of a batch are split along their first dimension over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def split_rows(x: jax.Array) -> jax.Array:
    """`x` with its first dimension split as a batch is, where a function is traced for a mesh (`jax.set_mesh`).

    Left to itself the partitioner may split the width of activations over `fsdp`, as that of the kernels is, which sends all
    activations of the batch at every product instead of the kernels once."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        return x
    if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp")))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raise ValueError if the mesh does not divide the batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of data x fsdp = {ways} (mesh {dict(mesh.shape)}): "
            f"use {batch_size // ways * ways or ways} or another mesh"
        )


def check_backbone(mesh: Mesh, config: BackboneConfig) -> None:
    """Raise ValueError if the mesh does not divide what `RULES` split of the backbone: heads and widths."""
    split = (
        ("tensor", "heads", config.heads),
        ("tensor", "kv_heads", config.num_kv_heads),
        ("tensor", "mlp_width", config.hidden_mlp),
        ("tensor", "vocab_size", config.vocab_size),
        ("fsdp", "width", config.width),
    )
    for axis, field, value in split:
        ways = mesh.shape[axis]
        if value % ways:
            near = value + -value % ways
            advice = f"set it to {near} or use another mesh" if field == "vocab_size" else "use another mesh"
            raise ValueError(f"mesh.{axis}={ways}: does not divide method.backbone.{field}={value}; {advice}")


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """A NamedSharding for every array of `params` (or of any tree with the same names inside: optimiser state, EMA).

    A dimension that its axis does not divide stays whole: a vocabulary that is read before it is padded. `check_backbone`
    refuses a backbone to which that would happen."""

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
