"""`config.json` files, as published and as damaged."""

import dataclasses

import pytest

from latentjax.backbone.config import PRESETS, BackboneConfig, Lora, RopeScaling, preset, tiny
from latentjax.backbone.hf_config import from_hf, to_hf

# What the public files say, but for token ids and provenance.
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1,
    "embd_pdrop": 0.1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED = {"gpt2": GPT2, "llama-3.2-1b": LLAMA, "qwen2.5-0.5b": QWEN2, "qwen3-0.6b": QWEN3}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_is_the_preset(name):
    dtype = "float32" if name == "gpt2" else "bfloat16"
    assert from_hf(PUBLISHED[name]) == preset(name, param_dtype=dtype)


def test_both_spellings_of_rotary_positions_mean_the_same():
    old = {key: LLAMA[key] for key in ("rope_theta", "rope_scaling")}
    new = {"rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": 500000.0}}
    rest = {key: value for key, value in LLAMA.items() if key not in old}
    assert from_hf(rest | new) == from_hf(LLAMA) == from_hf(LLAMA | new)
    plain = from_hf(rest | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert plain == from_hf(rest | {"rope_theta": 7.0}) == from_hf(rest | {"rope_theta": 7, "rope_scaling": None})
    assert plain.rope_scaling is None


def test_original_positions_default_to_the_files():
    scaling = {key: x for key, x in LLAMA["rope_scaling"].items() if key != "original_max_position_embeddings"}
    assert from_hf(LLAMA | {"rope_scaling": scaling}).rope_scaling == RopeScaling(32.0, 1.0, 4.0, 131072)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name):
    assert from_hf(to_hf(PRESETS[name])) == PRESETS[name]


def test_absent_fields_have_the_familys_defaults():
    sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
    bare = {key: LLAMA[key] for key in (*sizes, "intermediate_size")}
    llama, qwen3 = (from_hf(bare | {"model_type": name}) for name in ("llama", "qwen3"))
    assert (llama.rope_theta, llama.norm_eps, llama.tied_head, llama.num_kv_heads) == (10000.0, 1e-6, False, 32)
    assert (llama.size_per_head, qwen3.size_per_head) == (64, 128)
    assert from_hf({key: x for key, x in GPT2.items() if "pdrop" not in key}).residual_dropout == 0.1


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"model_type": "mistral"}, "model_type='mistral' is not supported; supported: gpt2, llama, qwen2, qwen3"),
        (LLAMA, {"model_type": None}, "model_type=None"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window=4096"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        (LLAMA, {"auto_map": {"AutoModel": "code.py"}}, "auto_map="),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act='relu' is not supported; supported: gelu_new"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear' is not supported"),
        (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"beta_fast": 32}}, "beta_fast=32"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"type": "default"}}, "rope_type and type"),
        (LLAMA, {"rope_parameters": {"rope_type": "default"}}, "contradict each other"),
        (LLAMA, {"rope_parameters": {"rope_theta": 3.0}}, "rope_theta=500000.0 but rope_parameters has rope_theta=3.0"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        (LLAMA, {"hidden_size": None}, "has no hidden_size"),
        (LLAMA, {"num_key_value_heads": 5}, "heads=32 is not a multiple of kv_heads=5"),
        (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn'"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"n_ctx": 512}, "n_ctx=512 but n_positions=1024"),
        (GPT2, {"rope_theta": 10000.0}, "rope_theta=10000.0"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 20}, "sliding_window=32768 for layers 20 to 23"),
        (QWEN2, {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, "layer_types holds sliding_attention"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 24 layers"),
        (QWEN2, {"attention_bias": False}, "attention_bias=False"),
        (QWEN2, {"use_mrope": True}, "use_mrope=True"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_named(base, change, message):
    with pytest.raises(ValueError, match="config.json") as error:
        from_hf(base | change)
    assert message in str(error.value)


def test_a_window_that_no_layer_uses_is_no_window():
    assert from_hf(QWEN2 | {"use_sliding_window": True}) == from_hf(QWEN2)  # max_window_layers is the number of layers
    assert from_hf(QWEN2 | {"layer_types": ["full_attention"] * 24}) == from_hf(QWEN2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny(23), "logit_scale=0.125 (needs 1.0)"),
        (preset("gpt2", positions="rotary"), "positions='rotary' (needs 'learned')"),
        (preset("llama-3.2-1b", qk_norm=True, mlp_bias=True), "qk_norm=True (needs False)"),
        (preset("llama-3.2-1b", out_bias=True), "out_bias=True (needs False)"),
        (preset("llama-3.2-1b", lora=Lora(rank=2, alpha=4.0)), "latentjax.backbone.lora.merge"),
        (preset("gpt2", vocab_used=50000), "vocab_used=50000 (needs None)"),
        (preset("llama-3.2-1b", width=1000), "width=1000 is not a multiple of heads=32"),
    ],
)  # fmt: skip
def test_backbone_that_no_family_has(config, message):
    with pytest.raises(ValueError, match="backbone") as error:
        to_hf(config)
    assert message in str(error.value)


def test_every_field_is_written_or_checked():
    """Whatever is not written is compared with its default, so that a later field is not dropped in silence; but for dropout
    that a family has no key for, which changes no logits."""
    for name, base in (("gpt2", "gpt2"), ("llama", "llama-3.2-1b"), ("qwen2", "qwen2.5-0.5b"), ("qwen3", "qwen3-0.6b")):
        config, written = PRESETS[base], to_hf(PRESETS[base])
        for field in dataclasses.fields(BackboneConfig):
            value = getattr(config, field.name)
            other = {bool: lambda x: not x, float: lambda x: x + 0.25}.get(type(value))
            free = {"rope_theta"} if name == "gpt2" else {"embedding_dropout", "residual_dropout"}
            if other is None or field.name in free:
                continue
            try:
                changed = to_hf(dataclasses.replace(config, **{field.name: other(value)}))
            except ValueError:
                continue
            assert changed != written, field.name
