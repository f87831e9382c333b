"""Configuration of the decoder-only backbone, and presets of published models.

Preset values are those of the public `config.json` of each model (sources in `PRESETS`).
"""

import dataclasses
import re
import typing
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency-dependent stretching of rotary wavelengths (Llama-3.1 `rope_scaling`, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters of dense layers: y = x W + scale dropout(x) A B with A [in, rank] and B [rank, out] (Hu et al.,
    arXiv 2106.09685). A dense layer is `query`, `key`, `value`, `attention_out`, `mlp_gate`, `mlp_up` or `mlp_down`."""

    rank: int
    alpha: float | int
    dropout: float = 0.0  # of the adapter's input only
    targets: tuple[str, ...] = (".*",)  # regular expressions, matched in full against the dense layers' names
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, arXiv 2312.03732)

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"lora.rank={self.rank!r}: must be a positive integer")
        if not isinstance(self.alpha, (int, float)) or not 0.0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha={self.alpha!r}: must be a positive number")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout={self.dropout!r}: a dropout rate lies in [0, 1)")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"lora.targets={self.targets!r}: must be a tuple of at least one name or pattern")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"lora.targets: {pattern!r} is not a regular expression ({error})") from None

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


# Fields of a `BackboneConfig` that say how a model is trained, stored and compiled, not which one it is: two that differ in
# these alone can have the same weights.
FREE_FIELDS = (
    "init", "init_std", "embedding_dropout", "attention_dropout", "residual_dropout", "dtype", "param_dtype",
    "scan_layers", "remat", "platform", "lora",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Shape and numerics of the decoder. B batch, T positions, D `width`, H `heads`, L `layers`, V `vocab_size`."""

    vocab_size: int
    max_positions: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None  # grouped-query attention; None: one per head
    head_dim: int | None = None  # None: width // heads
    mlp_width: int | None = None  # None: 4 * width
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    activation: Literal["gelu_tanh", "gelu", "silu"] = "gelu_tanh"
    gated_mlp: bool = False  # SwiGLU: down(act(gate(x)) * up(x))
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's q and k before rotary
    qkv_bias: bool = True
    out_bias: bool = True  # bias of the attention output projection
    mlp_bias: bool = True
    tied_head: bool = True  # logits = h E^T
    logit_scale: float = 1.0  # logits are multiplied by it
    vocab_used: int | None = None  # ids from here on are padding and never sampled; None: no padding
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    init: Literal["gpt2", "unit"] = "gpt2"  # "gpt2": N(0, 0.02); "unit": embeddings N(0, 1), weights N(0, 1/fan_in)
    init_std: float = 0.02
    dtype: str = "float32"  # of activations and matrix products; parameters, norms, softmax and losses are float32
    param_dtype: str = "float32"
    scan_layers: bool | None = None  # None: scan on accelerators, unroll on CPU
    remat: Literal["none", "dots", "full"] = "none"
    platform: Literal["cpu", "gpu", "tpu"] | None = (
        None  # what programs are compiled for; None: where this process runs
    )
    lora: Lora | None = None  # adapters beside the kernels of dense layers (latentjax/backbone/lora.py)

    def __post_init__(self):
        for field in ("vocab_size", "max_positions", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            value, optional = getattr(self, field), field in ("kv_heads", "head_dim", "mlp_width")
            if not (optional and value is None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"backbone.{field}={value!r}: must be a positive integer")
        for field in ("positions", "norm", "activation", "init", "remat"):
            value, known = getattr(self, field), typing.get_args(type(self).__annotations__[field])
            if value not in known:
                raise ValueError(f"backbone.{field}={value!r}: must be one of {', '.join(known)}")
        for field in ("dtype", "param_dtype"):
            try:
                jnp.dtype(getattr(self, field))
            except TypeError:
                raise ValueError(
                    f"backbone.{field}={getattr(self, field)!r}: no such dtype; try float32 or bfloat16"
                ) from None
        if self.vocab_used is not None and not 1 <= self.vocab_used <= self.vocab_size:
            raise ValueError(f"backbone.vocab_used={self.vocab_used}: must lie in 1 .. vocab_size={self.vocab_size}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"backbone.width={self.width} is not a multiple of heads={self.heads}; set head_dim")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"backbone.heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        for field in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"backbone.{field}={getattr(self, field)}: a dropout rate lies in [0, 1)")
        if self.positions == "rotary" and self.size_per_head % 2:
            raise ValueError(f"backbone.head_dim={self.size_per_head}: rotary positions need an even head width")
        for pattern in () if self.lora is None else self.lora.targets:
            if not any(re.fullmatch(pattern, name) for name in self.dense_layers):
                raise ValueError(
                    f"backbone.lora.targets: {pattern!r} matches none of this backbone's {', '.join(self.dense_layers)}"
                )

    @property
    def dense_layers(self) -> tuple[str, ...]:
        """Names of the dense layers of a block."""
        gate = ("mlp_gate",) if self.gated_mlp else ()
        return ("query", "key", "value", "attention_out", *gate, "mlp_up", "mlp_down")

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """Names of the dense layers that have adapters."""
        patterns = () if self.lora is None else self.lora.targets
        return tuple(name for name in self.dense_layers if any(re.fullmatch(p, name) for p in patterns))

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def size_per_head(self) -> int:
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    @property
    def hidden_mlp(self) -> int:
        return self.mlp_width if self.mlp_width is not None else 4 * self.width

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def scans_layers(self) -> bool:
        """Whether layers run under `lax.scan`: the field, or by platform (a scan copies residuals on CPU)."""
        return self.scan_layers if self.scan_layers is not None else self.target_platform != "cpu"

    @property
    def target_platform(self) -> str:
        """The platform that defaults depend on. It differs from this process's when compiling ahead of time."""
        return self.platform or jax.default_backend()

    def with_dropout(self, rate: float) -> "BackboneConfig":
        """The same backbone with one dropout rate everywhere, as GPT-2 has."""
        return dataclasses.replace(self, embedding_dropout=rate, attention_dropout=rate, residual_dropout=rate)


def _gpt2(width: int, layers: int, heads: int) -> BackboneConfig:
    return BackboneConfig(50257, 1024, width, layers, heads).with_dropout(0.1)


def _llama3(
    width: int, layers: int, heads: int, mlp: int, factor: float, head_dim: int, tied: bool = True
) -> BackboneConfig:
    return BackboneConfig(
        128256, 131072, width, layers, heads, kv_heads=8, head_dim=head_dim, mlp_width=mlp, positions="rotary",
        rope_theta=500000.0, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192), norm="rms", norm_eps=1e-5,
        activation="silu", gated_mlp=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=tied,
    )  # fmt: skip


def _qwen(
    vocab: int, positions: int, width: int, layers: int, heads: int, kv: int, mlp: int, *, tied: bool, three: bool
) -> BackboneConfig:
    return BackboneConfig(
        vocab, positions, width, layers, heads, kv_heads=kv, head_dim=128 if three else None, mlp_width=mlp,
        positions="rotary", rope_theta=1000000.0, norm="rms", norm_eps=1e-6, activation="silu", gated_mlp=True,
        qk_norm=three, qkv_bias=not three, out_bias=False, mlp_bias=False, tied_head=tied,
    )  # fmt: skip


# Each from the `config.json` of the repository named in the comment.
PRESETS: dict[str, BackboneConfig] = {
    "gpt2": _gpt2(768, 12, 12),  # openai-community/gpt2
    "gpt2-medium": _gpt2(1024, 24, 16),  # openai-community/gpt2-medium
    "llama-3.2-1b": _llama3(2048, 16, 32, 8192, 32.0, 64),  # meta-llama/Llama-3.2-1B
    "llama-3.2-3b": _llama3(3072, 28, 24, 8192, 32.0, 128),  # meta-llama/Llama-3.2-3B
    "llama-3.1-8b": _llama3(4096, 32, 32, 14336, 8.0, 128, tied=False),  # meta-llama/Llama-3.1-8B
    "qwen2.5-0.5b": _qwen(151936, 32768, 896, 24, 14, 2, 4864, tied=True, three=False),  # Qwen/Qwen2.5-0.5B
    "qwen2.5-1.5b": _qwen(151936, 131072, 1536, 28, 12, 2, 8960, tied=True, three=False),  # Qwen/Qwen2.5-1.5B
    "qwen2.5-7b": _qwen(152064, 131072, 3584, 28, 28, 4, 18944, tied=False, three=False),  # Qwen/Qwen2.5-7B
    "qwen3-0.6b": _qwen(151936, 40960, 1024, 28, 16, 8, 3072, tied=True, three=True),  # Qwen/Qwen3-0.6B
    "qwen3-1.7b": _qwen(151936, 40960, 2048, 28, 16, 8, 6144, tied=True, three=True),  # Qwen/Qwen3-1.7B
    "qwen3-8b": _qwen(151936, 40960, 4096, 36, 32, 8, 12288, tied=False, three=True),  # Qwen/Qwen3-8B
}


def preset(name: str, **changes: object) -> BackboneConfig:
    """The preset `name` with some fields changed. Raises KeyError listing the known names."""
    if name not in PRESETS:
        raise KeyError(f"backbone preset {name!r} is unknown; known: {', '.join(sorted(PRESETS))}")
    return dataclasses.replace(PRESETS[name], **changes)


def tiny(
    vocab_size: int, *, max_positions: int = 64, width: int = 64, layers: int = 2, heads: int = 4
) -> BackboneConfig:
    """A backbone that trains from scratch in seconds on a CPU: no biases, unit-scale embeddings, logits h E^T / sqrt(D)."""
    return BackboneConfig(
        vocab_size, max_positions, width, layers, heads, qkv_bias=False, out_bias=False, mlp_bias=False,
        logit_scale=width**-0.5, init="unit",
    )  # fmt: skip
