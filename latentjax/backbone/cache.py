"""The key/value cache: an explicit pytree that owns its layout.

Two parts, so that what no longer changes is never copied. `frozen` holds the question, written once by the prefill;
`live` holds the slots written after it. In a training scan only `live` is carried from thought to thought.

Entries are addressed by (visit, layer): visit v of layer l is entry v * L + l, so that a range of layers can be visited
again (depth recurrence) without overwriting what the first visit cached. Letters: B batch, N key/value heads, E width of
a head, F frozen slots, C live slots, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from latentjax.backbone.config import BackboneConfig


@struct.dataclass
class KVCache:
    """Layout: unrolled layers keep one (k, v) pair per entry, head-major [B, N, slots, E]; scanned layers keep one pair
    with a leading entry axis."""

    frozen: Any  # pairs [B, N, F, E]
    live: Any  # pairs [B, N, C, E]
    frozen_valid: Any  # bool [B, F]
    live_valid: Any  # bool [B, C]
    index: Any  # int32 scalar: the next free live slot
    length: Any  # int32 [B]: valid positions so far, the next position id
    stacked: bool = struct.field(pytree_node=False)

    @property
    def valid(self) -> Bool[Array, "B T"]:
        return jnp.concatenate([self.frozen_valid, self.live_valid], axis=1)

    @property
    def free(self) -> int | Array:
        """Live slots that are left."""
        return self.live_valid.shape[1] - self.index

    def entries(self, start: int, stop: int) -> list[Any]:
        """The past of entries [start, stop), as segments for attention: per layer (unrolled) or stacked (scanned)."""
        if self.stacked:
            return [jax.tree.map(lambda x: x[start:stop], part) for part in (self.frozen, self.live)]
        return [part[start:stop] for part in (self.frozen, self.live)]

    def write(self, new: Any, valid: Bool[Array, "B S"], first_entry: int = 0, *, advance: bool = True) -> "KVCache":
        """The cache with S new slots: `new` holds pairs [B, N, S, E] in the cache's layout for entries from `first_entry`.

        `advance=False` writes further entries of the same slots (another layer range or visit)."""
        index = self.index
        if self.stacked:
            live = jax.tree.map(
                lambda old, add: jax.lax.dynamic_update_slice(
                    old, add.astype(old.dtype), (first_entry, 0, 0, index, 0)
                ),
                self.live,
                new,
            )
        else:
            changed = [
                jax.tree.map(
                    lambda old, add: jax.lax.dynamic_update_slice(old, add.astype(old.dtype), (0, 0, index, 0)),
                    pair,
                    add,
                )
                for pair, add in zip(self.live[first_entry : first_entry + len(new)], new, strict=True)
            ]
            live = (*self.live[:first_entry], *changed, *self.live[first_entry + len(new) :])
        if not advance:
            return self.replace(live=live)
        live_valid = jax.lax.dynamic_update_slice(self.live_valid, valid, (0, index))
        return self.replace(
            live=live,
            live_valid=live_valid,
            index=index + valid.shape[1],
            length=self.length + valid.sum(axis=1, dtype=jnp.int32),
        )


def slot_major(kv: Any, *, stacked: bool) -> tuple[Array, Array]:
    """Keys and values in one form whatever the layout: (k, v), each [entries, B, S, N, E]."""
    keys, values = kv if stacked else jax.tree.map(lambda *x: jnp.stack(x), *kv)
    return jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)


def from_slot_major(pairs: tuple[Array, Array], *, stacked: bool) -> Any:
    """The inverse of `slot_major`."""
    keys, values = jnp.swapaxes(pairs[0], 2, 3), jnp.swapaxes(pairs[1], 2, 3)
    return (keys, values) if stacked else tuple(zip(keys, values, strict=True))


def empty_cache(config: BackboneConfig, batch: int, capacity: int, *, visits: int = 1) -> KVCache:
    """A cache with no frozen part and `capacity` free live slots, for `visits` visits of every layer."""
    entries = visits * config.layers
    shape = (batch, config.num_kv_heads, 0, config.size_per_head)
    zeros = jnp.zeros(shape, config.compute_dtype)
    if config.scans_layers:
        zeros = jnp.broadcast_to(zeros, (entries, *shape))
        new = (zeros, zeros)
    else:
        new = tuple((zeros, zeros) for _ in range(entries))
    return freeze(new, jnp.zeros((batch, 0), bool), capacity, stacked=config.scans_layers)


def freeze(new: Any, valid: Bool[Array, "B F"], capacity: int, *, stacked: bool) -> KVCache:
    """A cache whose frozen part is what a prefill returned, with `capacity` free live slots after it."""

    def room(x: Array) -> Array:
        return jnp.zeros((*x.shape[:-2], capacity, x.shape[-1]), x.dtype)

    return KVCache(
        frozen=new,
        live=jax.tree.map(room, new),
        frozen_valid=valid,
        live_valid=jnp.zeros((valid.shape[0], capacity), bool),
        index=jnp.zeros((), jnp.int32),
        length=valid.sum(axis=1, dtype=jnp.int32),
        stacked=stacked,
    )


def next_positions(length: Int[Array, "B"], valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Position ids of new slots: they count valid slots only; an invalid slot repeats its predecessor's (0 at the start)."""
    return jnp.maximum(length[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
