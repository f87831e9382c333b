"""How one program runs on many devices: `jax.jit` over a mesh, or `jax.pmap` over the same devices; on one host or several.

Under `jit` a batch is a global array split over the mesh's `data` and `fsdp` axes, and parameters follow the rules of
latentjax/sharding.py. Under `pmap` (plain data parallelism) every device holds the whole state and its rows of the batch.
Both run the same functions and read and write the same states, so all else of the program knows nothing of the choice.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from latentjax.sharding import batch_sharding
from train.distributed import together

AXIS = "batch"  # of pmap


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Where batches of `batch_size` rows live and how functions of a state and a batch are compiled."""

    kind: Literal["jit", "pmap"]
    mesh: Mesh
    batch_size: int

    @property
    def batch_sharding(self) -> NamedSharding:
        return batch_sharding(self.mesh)

    @property
    def ways(self) -> int:
        """The number of parts into which a batch is split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    def rows(self) -> Int[np.ndarray, "R"]:
        """The rows of a batch that live on devices of this process, ascending."""
        slices = self.batch_sharding.addressable_devices_indices_map((self.batch_size,)).values()
        return np.unique(np.concatenate([np.arange(self.batch_size)[index] for index in slices]))

    def place(self, batch: Any) -> Any:
        """`batch`, this process's `rows` of a batch as numpy arrays, on the devices: what compiled functions take."""
        if self.kind == "pmap":
            count = len(self.mesh.local_devices)
            return jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), batch)
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch_sharding)
        place = np.zeros(self.batch_size, np.int64)
        place[self.rows] = np.arange(len(self.rows))

        def whole(x: np.ndarray) -> jax.Array:
            shape = (self.batch_size, *x.shape[1:])

            def part(index: Any) -> np.ndarray:
                return x[place[index[0]]]

            return jax.make_array_from_callback(shape, self.batch_sharding, part)

        return jax.tree.map(whole, batch)

    def whole(self, batch: Any) -> Any:
        """Shapes and types of the batch of all processes of which `batch` is this process's part."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.batch_size, *x.shape[1:]), x.dtype), batch)

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def trace(self, function: Callable, state: Any, shardings: Any, batch: Any, *, updates: bool) -> jax.stages.Traced:
        """`function` as `compile` treats it, traced under jit. `state` and `batch`, here of all processes, may be shapes."""
        with jax.set_mesh(self.mesh):
            return jax.jit(
                function,
                in_shardings=(shardings, self.batch_sharding),
                out_shardings=(shardings, self._everywhere) if updates else self._everywhere,
                donate_argnums=0 if updates else (),
            ).trace(state, batch)

    def compile(
        self, make: Callable[[str | None], Callable], state: Any, shardings: Any, batch: Any, *, updates: bool
    ) -> tuple[Callable, Any]:
        """Compile the function of a state and a placed batch that `make(axis)` returns.

        Args:
            make: called with the name of the mapped axis of devices, None under jit.
            state: on the devices; its arrays are split as `shardings` say.
            batch: as `place` takes it.
            updates: the function returns a new state, for which the old one is given up, and something replicated; else
                only the latter.

        Returns the compiled function and the jaxpr of what it computes on the whole batch.
        """
        if self.kind == "jit":
            traced = self.trace(make(None), state, shardings, self.whole(batch), updates=updates)
            compiled = traced.lower().compile()
            together()
            return compiled, traced.jaxpr
        jaxpr = jax.make_jaxpr(make(None))(state, self.whole(batch))
        options: dict[str, Any] = dict(in_axes=(None, 0), out_axes=None, donate_argnums=0 if updates else ())
        if jax.process_count() == 1:
            mapped = jax.pmap(make(AXIS), AXIS, devices=list(self.mesh.devices.flat), **options)
            return mapped.lower(state, self.place(batch)).compile(), jaxpr
        # On several hosts pmap takes the devices of all in their own order, and compiles when it is called.
        mapped = jax.pmap(make(AXIS), AXIS, **options)

        def call(state: Any, batch: Any) -> Any:
            return jax.tree.map(functools.partial(_known_to_all, sharding=self._everywhere), mapped(state, batch))

        return call, jaxpr


def _known_to_all(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A result of pmap, which is an array of this process's devices alone, as the same array on all devices."""
    return jax.make_array_from_single_device_arrays(x.shape, sharding, [part.data for part in x.addressable_shards])


def batch_form(batch: Any) -> Hashable:
    """What a compiled function depends on: structure, shapes and types of the arrays of `batch`."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
