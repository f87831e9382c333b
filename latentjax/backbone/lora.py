"""LoRA, low-rank adapters of dense layers (Hu et al., arXiv 2106.09685; the rank-stabilised scale of arXiv 2312.03732).

y = x W + scale * dropout(x) A B: `Lora` in backbone/config.py says how, `LoraDense` computes it inside the decoder, and the
functions here add, merge and split. An adapter lies beside the kernel that it adapts:

    {"layers": {"query": {"kernel": [L, I, O], "bias": [L, O], "lora_a": [L, I, R], "lora_b": [L, R, O]}, ...}, ...}

Adapters are float32 whatever the kernels are: small updates would vanish in bfloat16. Letters: L layers, R rank, I and O the
input and output widths of a dense layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from latentjax.backbone.config import BackboneConfig, Lora
from latentjax.backbone.dropout import dropout
from latentjax.sharding import param_shardings

LEAVES = ("lora_a", "lora_b")

# U(-1/sqrt(I), 1/sqrt(I)), which is PyTorch's kaiming_uniform_ with a = sqrt(5), PEFT's choice.
_init_a = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoraDense(nn.Module):
    """A dense layer with an adapter beside it. The adapter's dropout is on where the caller gives a key named "lora"."""

    make: Callable[[], nn.Dense]
    lora: Lora

    def setup(self):
        self.dense = self.make()
        nn.share_scope(self, self.dense)  # one level of names: kernel, bias, lora_a, lora_b

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        lora, key = self.lora, None
        y = self.dense(x)
        a = self.param("lora_a", _init_a, (x.shape[-1], lora.rank), jnp.float32)
        b = self.param("lora_b", nn.initializers.zeros, (lora.rank, y.shape[-1]), jnp.float32)
        if lora.dropout and self.has_rng("lora"):
            key = self.make_rng("lora")
        x, a, b = promote_dtype(x, a, b, dtype=self.dense.dtype)
        return y + lora.scale * (dropout(x, lora.dropout, key) @ a) @ b


def add(
    config: BackboneConfig, params: Mapping[str, Any], lora: Lora, key: Key[Array, ""]
) -> tuple[BackboneConfig, dict[str, Any]]:
    """The backbone with new adapters, which change nothing yet: A is random and B zero. They lie on the kernels' mesh.

    Raises ValueError if it has adapters already, or if a target is no dense layer of it."""
    require_none(config)
    config = dataclasses.replace(config, lora=lora)
    new = {}
    for i, name in enumerate(config.dense_layers):
        if name not in config.adapted_layers:
            continue
        count, inputs, outputs = params["layers"][name]["kernel"].shape
        keys = jax.random.split(jax.random.fold_in(key, i), count)
        new[name] = {
            "lora_a": jax.vmap(lambda key, inputs=inputs: _init_a(key, (inputs, lora.rank), jnp.float32))(keys),
            "lora_b": jnp.zeros((count, lora.rank, outputs), jnp.float32),
        }
    return config, join(params, place(params, {"layers": new}))


def merge(config: BackboneConfig, params: Mapping[str, Any]) -> tuple[BackboneConfig, dict[str, Any]]:
    """The same function without adapters: W + scale A B, in float32, rounded once to the dtype of W.

    Keep what `split` returns to be able to `unmerge`. Raises ValueError unless `params` has the adapters that `config` says."""
    lora = require(config)
    base, adapters = split(params)
    check(config, adapters)
    return dataclasses.replace(config, lora=None), _shift(base, adapters, lora.scale)


def unmerge(
    config: BackboneConfig, params: Mapping[str, Any], lora: Lora, adapters: Mapping[str, Any]
) -> tuple[BackboneConfig, dict[str, Any]]:
    """Undo `merge` with the adapters that it folded in.

    Exact are the adapters and every array that has none; an adapted kernel comes back up to the two roundings, of the sum
    and of the difference (2^-24 of the larger kernel in float32, 2^-8 in bfloat16). Raises ValueError if `config` has
    adapters or `adapters` are not those that `lora` says."""
    require_none(config)
    config = dataclasses.replace(config, lora=lora)
    check(config, adapters)
    return config, join(_shift(params, adapters, -lora.scale), adapters)


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(base, adapters): the backbone's parameters without adapters, and {"layers": {name: {"lora_a", "lora_b"}}}."""
    base, adapters = {}, {}
    for name, weights in params["layers"].items():
        base[name] = {leaf: value for leaf, value in weights.items() if leaf not in LEAVES}
        if len(base[name]) < len(weights):
            adapters[name] = {leaf: weights[leaf] for leaf in LEAVES}
    return {**params, "layers": base}, {"layers": adapters}


def join(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `split`."""
    layers = dict(base["layers"])
    for name, pair in adapters["layers"].items():
        layers[name] = {**layers[name], **pair}
    return {**base, "layers": layers}


def frozen_patterns(tuning: str) -> tuple[str, ...]:
    """Regular expressions for the paths of the parameters (`backbone/...`, `method/...`) that do not train.

    "full": everything trains; "lora": adapters and the method's own parameters; "frozen": the latter only. Raises ValueError
    naming any other word."""
    patterns = {"full": (), "lora": (r"^backbone/(?!.*/lora_[ab]$)",), "frozen": (r"^backbone/",)}
    if tuning not in patterns:
        raise ValueError(f"tuning={tuning!r}: must be one of {', '.join(patterns)}")
    return patterns[tuning]


def require(config: BackboneConfig) -> Lora:
    """The adapters' settings. Raises ValueError if there are none."""
    if config.lora is None:
        raise ValueError("backbone.lora=None: this backbone has no adapters; lora.add puts new ones on")
    return config.lora


def require_none(config: BackboneConfig) -> None:
    """Raise ValueError if the backbone has adapters."""
    if config.lora is not None:
        raise ValueError(f"backbone.lora={config.lora}: has adapters already; lora.merge or lora.split them off first")


def check(config: BackboneConfig, adapters: Mapping[str, Any]) -> None:
    """Raise ValueError unless `adapters` are of the layers and of the rank that `config` says."""
    layers, setting = adapters["layers"], require(config)
    if set(layers) != set(config.adapted_layers):
        raise ValueError(
            f"there are adapters of {', '.join(layers) or 'no layer'}, but backbone.lora.targets={setting.targets} "
            f"means {', '.join(config.adapted_layers)}"
        )
    for name, pair in layers.items():
        if (rank := pair["lora_a"].shape[-1]) != setting.rank:
            raise ValueError(f"the adapter of {name} has rank {rank}, but backbone.lora.rank={setting.rank}")


def place(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> Any:
    """`adapters` on the mesh of `params` by the rules of latentjax/sharding.py, or as they are if those lie on no mesh."""
    sharding = getattr(jax.tree.leaves(params["layers"])[0], "sharding", None)  # None while tracing
    if isinstance(sharding, NamedSharding):
        return jax.device_put(adapters, param_shardings(sharding.mesh, adapters))
    return jax.tree.map(jnp.asarray, adapters)


def _shift(base: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """`base` with scale A B added to each adapted kernel."""
    layers = dict(base["layers"])
    for name, pair in adapters["layers"].items():
        kernel = _shifted(layers[name]["kernel"], pair["lora_a"], pair["lora_b"], scale)
        layers[name] = {**layers[name], "kernel": kernel}
    return {**base, "layers": layers}


@jax.jit
def _shifted(
    kernel: Float[Array, "L I O"], a: Float[Array, "L I R"], b: Float[Array, "L R O"], scale: Float[Array, ""] | float
) -> Float[Array, "L I O"]:
    def one_layer(weights: tuple[Array, Array, Array]) -> Array:
        w, a, b = weights
        change = scale * jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        return (w.astype(jnp.float32) + change).astype(w.dtype)

    return jax.lax.map(one_layer, (kernel, a, b))  # one layer at a time: no float32 copy of a bfloat16 stack
