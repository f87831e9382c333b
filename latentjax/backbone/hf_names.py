"""Where the arrays of a backbone lie in published checkpoints: names, orientation and fusion of their tensors."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence

import jax
from flax.traverse_util import flatten_dict

from latentjax.backbone import decoder
from latentjax.backbone.config import BackboneConfig

# Our names -> theirs; "{}" is the layer. Dense layers and norms go on with ".weight" and ".bias".
_GPT2 = {
    "embed/tokens": "wte.weight",
    "embed/positions": "wpe.weight",
    "norm": "ln_f",
    "head": "lm_head",
    "layers/attention_norm": "h.{}.ln_1",
    "layers/query": "h.{}.attn.c_attn",
    "layers/key": "h.{}.attn.c_attn",
    "layers/value": "h.{}.attn.c_attn",
    "layers/attention_out": "h.{}.attn.c_proj",
    "layers/mlp_norm": "h.{}.ln_2",
    "layers/mlp_up": "h.{}.mlp.c_fc",
    "layers/mlp_down": "h.{}.mlp.c_proj",
}
_LLAMA = {
    "embed/tokens": "embed_tokens.weight",
    "norm": "norm",
    "head": "lm_head",
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/query": "layers.{}.self_attn.q_proj",
    "layers/query_norm": "layers.{}.self_attn.q_norm",
    "layers/key": "layers.{}.self_attn.k_proj",
    "layers/key_norm": "layers.{}.self_attn.k_norm",
    "layers/value": "layers.{}.self_attn.v_proj",
    "layers/attention_out": "layers.{}.self_attn.o_proj",
    "layers/mlp_norm": "layers.{}.post_attention_layernorm",
    "layers/mlp_gate": "layers.{}.mlp.gate_proj",
    "layers/mlp_up": "layers.{}.mlp.up_proj",
    "layers/mlp_down": "layers.{}.mlp.down_proj",
}
HEAD = "lm_head.weight"
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "qwen2": "model.", "qwen3": "model."}  # but for the head
_FUSED = ("query", "key", "value")  # GPT-2 keeps the three side by side in one array, in this order


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our arrays lies in a checkpoint."""

    name: str  # of the tensor, without prefix; "{}" is the layer
    stacked: bool  # ours has a leading layer axis over one tensor a layer
    transposed: bool  # torch's Linear keeps [out, in], ours (and GPT-2's Conv1D) [in, out]
    part: int = 0  # which of `parts` equal pieces of the last axis it is
    parts: int = 1

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        shape = tuple(ours[1:] if self.stacked else ours)
        shape = (*shape[:-1], shape[-1] * self.parts)
        return shape[::-1] if self.transposed else shape

    def names(self, layers: int) -> list[str]:
        """The tensors of all layers, or the one tensor."""
        return [self.name.format(layer) for layer in range(layers)] if self.stacked else [self.name]


def places(config: BackboneConfig) -> dict[str, Place]:
    """Our name of each array ("layers/query/kernel") -> its place in a published checkpoint."""
    gpt2 = config.positions == "learned"
    table, found = _GPT2 if gpt2 else _LLAMA, {}
    for ours in abstract(config):
        module, _, leaf = ours.rpartition("/")
        name = table.get(ours) or f"{table[module]}.{'bias' if leaf == 'bias' else 'weight'}"
        transposed = leaf == "kernel" and (module == "head" or not gpt2)
        part = _FUSED.index(module.removeprefix("layers/")) if ".c_attn" in name else None
        fused = {} if part is None else {"part": part, "parts": len(_FUSED)}
        found[ours] = Place(name, ours.startswith("layers/"), transposed, **fused)
    return found


@functools.cache
def abstract(config: BackboneConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of the backbone, by our name."""
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return types.MappingProxyType(flatten_dict(shapes, sep="/"))
