"""`config.json` of published checkpoints <-> `BackboneConfig`.

A key of `config.json` is read, or must have the one value that the decoder implements, or is known to change nothing. Any
other key is an error: a feature that is not understood is never ignored. Keys, defaults and their meaning are those of the
configuration classes of `transformers` 5 and of the `config.json` files that its 3.x and 4.x versions wrote.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from latentjax.backbone.config import BackboneConfig, RopeScaling

REQUIRED = object()  # no default: a checkpoint's size is never guessed

# Ours -> (key, value if the key is absent or null).
_GPT2_KEYS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "max_positions": ("n_positions", REQUIRED),
    "width": ("n_embd", REQUIRED),
    "layers": ("n_layer", REQUIRED),
    "heads": ("n_head", REQUIRED),
    "mlp_width": ("n_inner", None),
    "activation": ("activation_function", "gelu_new"),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "embedding_dropout": ("embd_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "residual_dropout": ("resid_pdrop", 0.1),
    "init_std": ("initializer_range", 0.02),
    "tied_head": ("tie_word_embeddings", True),
}
_LLAMA_KEYS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "max_positions": ("max_position_embeddings", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "layers": ("num_hidden_layers", REQUIRED),
    "heads": ("num_attention_heads", REQUIRED),
    "kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "mlp_width": ("intermediate_size", REQUIRED),
    "activation": ("hidden_act", "silu"),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
    "init_std": ("initializer_range", 0.02),
    "tied_head": ("tie_word_embeddings", False),
}
_ROTARY = {"positions": "rotary", "norm": "rms", "gated_mlp": True}
_WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`: which keys it reads, what all its models have, and which values of other keys are supported."""

    model_class: str  # of transformers; `architectures` names it
    keys: Mapping[str, tuple[str, Any]]
    always: Mapping[str, Any]  # ours -> value
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # key -> the one supported value
    further: tuple[str, ...] = ()  # keys that functions below read


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        _GPT2_KEYS,
        {"positions": "learned", "norm": "layer", "gated_mlp": False, "qk_norm": False, "kv_heads": None,
         "head_dim": None, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "rope_scaling": None},
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        further=("n_ctx",),
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _LLAMA_KEYS | {"qkv_bias": ("attention_bias", False), "out_bias": ("attention_bias", False),
                       "mlp_bias": ("mlp_bias", False)},
        _ROTARY | {"qk_norm": False},
        further=_ROPE_KEYS,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _LLAMA_KEYS,
        _ROTARY | {"qk_norm": False, "qkv_bias": True, "out_bias": False, "mlp_bias": False},
        only={"use_mrope": False},
        further=(*_ROPE_KEYS, *_WINDOW_KEYS),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _LLAMA_KEYS | {"head_dim": ("head_dim", 128), "qkv_bias": ("attention_bias", False),
                       "out_bias": ("attention_bias", False)},
        _ROTARY | {"qk_norm": True, "mlp_bias": False},
        only={"use_mrope": False},
        further=(*_ROPE_KEYS, *_WINDOW_KEYS),
    ),
}  # fmt: skip

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}

# Supported values of keys that any family's file may hold.
_ONLY = {"is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False, "pruned_heads": {}}

# Keys that change neither weights nor logits: provenance, token ids, defaults of generation, heads of other tasks, what a
# forward pass returns, and how (not what) it computes.
_HARMLESS = frozenset(
    (
        "model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "dtype",
        "torch_dtype", "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        "decoder_start_token_id", "use_cache", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "output_scores",
        "return_dict_in_generate", "task_specific_params", "id2label", "label2id", "num_labels", "problem_type",
        "finetuning_task", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout", "n_special", "predict_special_tokens", "output_hidden_states", "output_attentions",
        "output_past", "return_dict", "is_decoder", "torchscript", "tf_legacy_loss", "use_bfloat16",
        "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "reorder_and_upcast_attn",
    )
)  # fmt: skip

# Ours that only say how a model is trained or run here; a family without a key for one leaves it out, logits stay the same.
_OWN = (
    "init", "init_std", "embedding_dropout", "attention_dropout", "residual_dropout", "dtype", "param_dtype", "scan_layers",
    "remat", "platform",
)  # fmt: skip


def from_hf(values: Mapping[str, Any]) -> BackboneConfig:
    """The backbone that a parsed `config.json` describes; `param_dtype` is the file's, `dtype` (of the computation) float32.

    Raises ValueError that names the key and its value for whatever the decoder does not implement or does not know."""
    name = values.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _check_keys(name, family, values)
    read = {ours: _value(values, key, default) for ours, (key, default) in family.keys.items()}
    if read["activation"] not in ACTIVATIONS:
        key = family.keys["activation"][0]
        raise ValueError(
            f"config.json: {key}={read['activation']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    read["activation"] = ACTIVATIONS[read["activation"]]
    read["param_dtype"] = _dtype(values)
    if "rope_theta" in family.further:
        read |= _rope(values, read["max_positions"])
    if values.get("n_ctx") not in (None, read["max_positions"]):
        raise ValueError(
            f"config.json: n_ctx={values['n_ctx']} but n_positions={read['max_positions']}: they must agree"
        )
    try:
        config = BackboneConfig(**{**family.always, **read})
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    if "layer_types" in family.further:
        _check_window(values, config.layers)
    return config


def to_hf(config: BackboneConfig) -> dict[str, Any]:
    """The `config.json` of the family that has this backbone.

    Raises ValueError naming the fields that no family has. Rotary positions are written in both spellings, that of
    transformers 4 (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`)."""
    own_width = config.width % config.heads == 0 and config.size_per_head == config.width // config.heads
    plain = dataclasses.replace(
        config,
        kv_heads=None if config.num_kv_heads == config.heads else config.kv_heads,
        head_dim=None if own_width else config.head_dim,
    )
    name = _family_of(plain)
    family = FAMILIES[name]
    values: dict[str, Any] = {"architectures": [family.model_class], "model_type": name}
    values |= {key: getattr(config, ours) for ours, (key, _) in family.keys.items()}
    values[family.keys["activation"][0]] = next(key for key, ours in ACTIVATIONS.items() if ours == config.activation)
    if config.positions == "rotary":
        if config.width % config.heads:
            raise ValueError(
                f"backbone.width={config.width} is not a multiple of heads={config.heads}: transformers has no such model"
            )
        values |= {
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.size_per_head,
            "intermediate_size": config.hidden_mlp,
        }
        if config.head_dim is None and family.keys["head_dim"][1] is None:
            del values["head_dim"]  # width / heads, as the family has it; null is not understood everywhere
        values |= _rope_values(config)
    # Null, and not the family's own default, which need not be in this vocabulary; `save` knows the tokenizer's.
    return values | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": config.param_dtype}


def _check_keys(name: str, family: Family, values: Mapping[str, Any]) -> None:
    only = _ONLY | dict(family.only)
    for key, supported in only.items():
        if values.get(key) is not None and values[key] != supported:
            raise ValueError(f"config.json: {key}={values[key]!r} is not supported for {name}, only {supported!r}")
    known = _HARMLESS | set(only) | {key for key, _ in family.keys.values()} | set(family.further)
    unknown = {key: value for key, value in values.items() if key not in known and value is not None}
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise ValueError(
            f"config.json: unknown for {name}: {listed}. It may change the model, so it is not ignored; "
            "if it does not, remove it from the file"
        )
    classes = {family.model_class, family.model_class.replace("LMHeadModel", "Model").replace("ForCausalLM", "Model")}
    other = set(values.get("architectures") or ()) - classes
    if other:
        raise ValueError(f"config.json: architectures={sorted(other)} is not supported, only {family.model_class}")


def _value(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"config.json has no {key}: the model's size is not guessed")
        return default
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={value!r} must be true or false")
    if isinstance(default, float):
        return _number(key, value)
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {key}={value!r} must be a number")
    return float(value)


def _dtype(values: Mapping[str, Any]) -> str:
    for key in ("dtype", "torch_dtype"):
        if values.get(key) is not None:
            if values[key] not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"config.json: {key}={values[key]!r} is not supported: float32, bfloat16 or float16")
            return values[key]
    return "float32"


def _rope(values: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either spelling; both may stand in one file if they agree."""
    new, old, theta = (values.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta"))
    parameters = [_one_spelling(name, x, theta) for name, x in (("rope_parameters", new), ("rope_scaling", old)) if x]
    if len(parameters) == 2 and parameters[0] != parameters[1]:
        raise ValueError(f"config.json: rope_parameters={new} and rope_scaling={old} contradict each other")
    rope = dict(parameters[0]) if parameters else _one_spelling("rope_theta", {}, theta)
    rope.setdefault("partial_rotary_factor", values.get("partial_rotary_factor"))
    if (part := rope.pop("partial_rotary_factor")) not in (None, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor={part} is not supported, only 1.0")
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    scaling = None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        if missing := [name for name in names if name not in rope]:
            raise ValueError(f"config.json: rope_type='llama3' lacks {', '.join(missing)}")
        stretched = [_number(name, rope.pop(name)) for name in names]
        scaling = RopeScaling(*stretched, rope.pop("original_max_position_embeddings", max_positions))
    elif kind != "default":
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; supported: default, llama3")
    if rope:
        raise ValueError(f"config.json: unknown for rope_type={kind!r}: {', '.join(f'{k}={rope[k]!r}' for k in rope)}")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _one_spelling(name: str, parameters: Any, theta: Any) -> dict[str, Any]:
    """A copy with `rope_type` and `rope_theta` filled in."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json: {name}={parameters!r} must be an object")
    rope = {key: value for key, value in parameters.items() if value is not None}
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    if len(kinds) > 1:
        raise ValueError(f"config.json: {name} has both rope_type and type, and they differ: {sorted(kinds)}")
    inner = rope.pop("rope_theta", theta)
    if theta is not None and inner != theta:
        raise ValueError(f"config.json: rope_theta={theta} but {name} has rope_theta={inner}: they must agree")
    return rope | {"rope_type": kinds.pop(), "rope_theta": _number("rope_theta", 10000.0 if inner is None else inner)}


def _rope_values(config: BackboneConfig) -> dict[str, Any]:
    scaling = None
    if config.rope_scaling is not None:
        ours = config.rope_scaling
        scaling = {
            "rope_type": "llama3", "factor": ours.factor, "low_freq_factor": ours.low_freq_factor,
            "high_freq_factor": ours.high_freq_factor, "original_max_position_embeddings": ours.original_max_positions,
        }  # fmt: skip
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _check_window(values: Mapping[str, Any], layers: int) -> None:
    """Raise ValueError if a layer attends to a sliding window. Qwen's files name a window that no layer uses."""
    types = values.get("layer_types")
    if types is not None:
        if len(types) != layers:
            raise ValueError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
        if other := sorted(set(types) - {"full_attention"}):
            raise ValueError(f"config.json: layer_types holds {', '.join(other)}; only full_attention is supported")
    elif values.get("use_sliding_window") and values.get("sliding_window") is not None:
        first = _value(values, "max_window_layers", 28)
        if first < layers:
            raise ValueError(
                f"config.json: use_sliding_window=True with sliding_window={values['sliding_window']} for layers "
                f"{first} to {layers - 1} (max_window_layers={first}): sliding windows are not supported"
            )


def _family_of(config: BackboneConfig) -> str:
    """The `model_type` whose models include this backbone; the error lists what the nearest one lacks."""
    defaults = {field.name: field.default for field in dataclasses.fields(BackboneConfig)}
    lacking = {}
    for name, family in FAMILIES.items():
        free = {*family.keys, *_OWN, "rope_theta", "rope_scaling"}
        wanted = {ours: value for ours, value in defaults.items() if ours not in free} | dict(family.always)
        if "qkv_bias" in family.keys:  # one key, attention_bias, gives both
            wanted["out_bias"] = config.qkv_bias
        lacking[name] = {ours: value for ours, value in wanted.items() if getattr(config, ours) != value}
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    if lacking[nearest]:
        listed = ", ".join(f"{x}={getattr(config, x)!r} (needs {value!r})" for x, value in lacking[nearest].items())
        hint = "; fold the adapters in first with latentjax.backbone.lora.merge" if "lora" in lacking[nearest] else ""
        raise ValueError(
            f"this backbone cannot be written as a published architecture; the nearest, {nearest}, differs in "
            f"backbone.{listed}{hint}"
        )
    return nearest
