"""Logits of randomly initialised models of `transformers` (torch) against ours, weights carried over one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.backbone.config import BackboneConfig, RopeScaling
from tests.close import assert_close

torch = pytest.importorskip("torch", reason="torch is not installed: pip install latentjax[torch]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install latentjax[hub]")
pytestmark = pytest.mark.filterwarnings("default")  # those two warn about themselves

SIZES = dict(vocab_size=23, max_position_embeddings=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
GROUPED = SIZES | dict(num_key_value_heads=2, intermediate_size=48, attention_dropout=0.0)
ROPE = dict(rope_type="llama3", rope_theta=20.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
OURS = dict(
    vocab_size=23, max_positions=64, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, positions="rotary",
    norm="rms", norm_eps=1e-6, activation="silu", gated_mlp=True, out_bias=False, mlp_bias=False,
)  # fmt: skip


def gpt2():
    theirs = transformers.GPT2Config(vocab_size=23, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    return transformers.GPT2LMHeadModel(theirs), BackboneConfig(23, 64, 32, 3, 4)


def llama():
    scaling = ROPE | dict(original_max_position_embeddings=32)
    theirs = transformers.LlamaConfig(**GROUPED, rope_parameters=scaling, rms_norm_eps=1e-6, tie_word_embeddings=False)
    ours = dict(rope_theta=20.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), qkv_bias=False, tied_head=False)
    return transformers.LlamaForCausalLM(theirs), BackboneConfig(**OURS, **ours)


def qwen2():
    rope = dict(rope_type="default", rope_theta=20.0)
    theirs = transformers.Qwen2Config(**GROUPED, rope_parameters=rope, rms_norm_eps=1e-6, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(theirs), BackboneConfig(**OURS, rope_theta=20.0, qkv_bias=True)


def qwen3():
    rope = dict(rope_type="default", rope_theta=20.0)
    theirs = transformers.Qwen3Config(
        **GROUPED, rope_parameters=rope, rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=16
    )
    ours = dict(rope_theta=20.0, qkv_bias=False, qk_norm=True, head_dim=16, tied_head=False)
    return transformers.Qwen3ForCausalLM(theirs), BackboneConfig(**OURS, **ours)


def gpt2_params(state, layers):
    def stack(name, index=slice(None)):
        return jnp.stack([state[f"transformer.h.{i}.{name}"][..., index] for i in range(layers)])

    def dense(name, index=slice(None)):  # GPT-2 stores [in, out], as we do
        return {"kernel": stack(f"{name}.weight", index), "bias": stack(f"{name}.bias", index)}

    def norm(name):
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    third = 32
    return {
        "embed": {"tokens": state["transformer.wte.weight"], "positions": state["transformer.wpe.weight"]},
        "layers": {
            "attention_norm": norm("ln_1"),
            "query": dense("attn.c_attn", slice(0, third)),
            "key": dense("attn.c_attn", slice(third, 2 * third)),
            "value": dense("attn.c_attn", slice(2 * third, None)),
            "attention_out": dense("attn.c_proj"),
            "mlp_norm": norm("ln_2"),
            "mlp_up": dense("mlp.c_fc"),
            "mlp_down": dense("mlp.c_proj"),
        },
        "norm": {"scale": state["transformer.ln_f.weight"], "bias": state["transformer.ln_f.bias"]},
    }


def llama_params(state, layers):
    names = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "attention_out": "self_attn.o_proj", "mlp_gate": "mlp.gate_proj", "mlp_up": "mlp.up_proj",
        "mlp_down": "mlp.down_proj",
    }  # fmt: skip
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}

    def stack(name):
        found = [state.get(f"model.layers.{i}.{name}") for i in range(layers)]
        return None if found[0] is None else np.stack(found)

    tree = {ours: {"kernel": np.swapaxes(stack(f"{name}.weight"), 1, 2)} for ours, name in names.items()}
    for ours, name in names.items():
        if (bias := stack(f"{name}.bias")) is not None:
            tree[ours]["bias"] = bias
    tree |= {ours: {"scale": scale} for ours, name in norms.items() if (scale := stack(f"{name}.weight")) is not None}
    return {
        "embed": {"tokens": state["model.embed_tokens.weight"]},
        "layers": tree,
        "norm": {"scale": state["model.norm.weight"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }


@pytest.mark.parametrize("make", [gpt2, llama, qwen2, qwen3], ids=lambda f: f.__name__)
def test_logits_equal_those_of_transformers(make):
    torch.manual_seed(0)
    model, config = make()
    model = model.eval()
    with torch.no_grad():
        for weight in model.parameters():  # a fresh model has zero biases and unit scales, which would hide a mix-up
            weight.add_(0.1 * torch.randn_like(weight))
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    params = (gpt2_params if make is gpt2 else llama_params)(state, config.layers)
    if config.tied_head:
        params.pop("head", None)
    params = jax.tree.map(jnp.asarray, params)
    expected = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, expected)
    tokens = np.random.default_rng(0).integers(0, 23, (2, 40)).astype(np.int32)
    out = jax.jit(decoder.apply, static_argnums=0)(config, params, tokens, np.ones(tokens.shape, bool))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(decoder.head(config, params, out.hidden), theirs, 1e-5)
