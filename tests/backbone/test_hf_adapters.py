"""Adapters in PEFT's format: equal to PEFT's own model, exact on the way back, and errors of bad folders."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import decoder, lora, pretrained
from latentjax.backbone.config import BackboneConfig, Lora
from latentjax.backbone.hf_adapters import load_adapters, save_adapters
from latentjax.sharding import make_mesh, param_shardings
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit

safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason="safetensors is not installed: pip install latentjax[hub]"
)

GPT = BackboneConfig(vocab_size=13, max_positions=16, width=12, layers=2, heads=2)
LLAMA = BackboneConfig(
    vocab_size=13, max_positions=16, width=12, layers=2, heads=2, kv_heads=1, mlp_width=20, positions="rotary", norm="rms",
    activation="silu", gated_mlp=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=False,
)  # fmt: skip
QWEN = dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9)).astype(np.int32)
ATTENTION = ("query", "key", "value", "attention_out")
# The backbone, our settings, and PEFT's target_modules for the same: suffixes, a regular expression, or all.
SETTINGS = {
    "gpt2": (GPT, Lora(3, 5.0), ["c_attn", "c_proj", "c_fc"]),
    "gpt2, rsLoRA, attention": (GPT, Lora(2, 4.0, 0.25, ATTENTION, rslora=True), ["attn.c_attn", "attn.c_proj"]),
    "llama": (LLAMA, Lora(3, 5.0), r".*\.(self_attn|mlp)\.\w+_proj"),
    "llama, rsLoRA, attention": (
        LLAMA,
        Lora(2, 4.0, 0.0, ATTENTION, rslora=True),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "qwen2": (QWEN, Lora(2, 0.5), "all-linear"),
}
every_setting = pytest.mark.parametrize(("base", "setting", "targets"), SETTINGS.values(), ids=SETTINGS)


def adapted(base, setting):
    config = dataclasses.replace(base, lora=setting)
    return config, naive.random_params(config)


def logits(config, params):
    out = decoder.apply(config, params, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool))
    return decoder.head(config, params, out.hidden)


def loss(config, params):
    return (jax.nn.log_softmax(logits(config, params)) * jnp.sin(jnp.arange(13.0))).sum()


run = jit(logits, static_argnums=0)
gradients = jit(jax.grad(loss, argnums=1), static_argnums=0)


@pytest.fixture
def peft():
    pytest.importorskip("torch", reason="torch is not installed: pip install latentjax[torch]")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install latentjax[hub]")
    return pytest.importorskip("peft", reason="peft is not installed: pip install latentjax[torch]")


def reference(tmp_path, base, params):
    """The transformers model of a backbone."""
    import transformers

    pretrained.save(tmp_path / "base", base, params)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


def peft_model(tmp_path, peft, base, params, setting, targets):
    """PEFT's model over `params` with random adapters, saved by PEFT in tmp_path / "adapters"."""
    import torch

    settings = peft.LoraConfig(
        r=setting.rank, lora_alpha=setting.alpha, lora_dropout=setting.dropout, use_rslora=setting.rslora,
        target_modules=targets, fan_in_fan_out=base is GPT, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(reference(tmp_path, base, params), settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapters")
    return model


def their_logits(model):
    import torch

    return model(torch.from_numpy(TOKENS).long()).logits


@every_setting
@pytest.mark.filterwarnings("default")  # transformers and peft warn about themselves
def test_adapters_that_peft_saved_give_its_logits(peft, tmp_path, base, setting, targets):
    params = naive.random_params(base)
    model = peft_model(tmp_path, peft, base, params, setting, targets)
    config, ours = load_adapters(tmp_path / "adapters", base, params)
    assert config.lora == dataclasses.replace(setting, targets=dataclasses.replace(base, lora=setting).adapted_layers)
    assert_close(run(config, ours), their_logits(model).detach().numpy(), 1e-5)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
@pytest.mark.filterwarnings("default")
def test_gradients_and_merged_weights_are_those_of_peft(peft, tmp_path, case):
    import torch

    base, setting, targets = SETTINGS[case]
    params = naive.random_params(base)
    model = peft_model(tmp_path, peft, base, params, setting, targets)
    config, ours = load_adapters(tmp_path / "adapters", base, params)
    (torch.log_softmax(their_logits(model), -1) * torch.sin(torch.arange(13.0))).sum().backward()
    _, gradient = lora.split(gradients(config, ours))
    theirs = {name: weight.grad.numpy().T for name, weight in model.named_parameters() if "lora_" in name}
    assert len(theirs) == 2 * 2 * (4 if base is GPT else 7)
    for name, expected in theirs.items():
        assert_close(as_in_peft(gradient["layers"], name), expected, 1e-4)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(lora.merge(config, ours)[1], pretrained.load(tmp_path / "merged")[1], 1e-6)


def as_in_peft(gradient, name):
    """Our gradient of PEFT's tensor `name`: those of GPT-2's shared A add up, those of its B lie side by side."""
    names = {
        "attn.c_attn": ATTENTION[:3], "attn.c_proj": ["attention_out"], "c_fc": ["mlp_up"], "mlp.c_proj": ["mlp_down"],
        "q_proj": ["query"], "k_proj": ["key"], "v_proj": ["value"], "o_proj": ["attention_out"],
        "gate_proj": ["mlp_gate"], "up_proj": ["mlp_up"], "down_proj": ["mlp_down"],
    }  # fmt: skip
    ours = next(ours for theirs, ours in names.items() if f"{theirs}.lora_" in name)
    layer = 0 if ".0." in name else 1
    if "lora_A" in name:
        return sum(np.asarray(gradient[name]["lora_a"][layer]) for name in ours)
    return np.concatenate([gradient[name]["lora_b"][layer] for name in ours], axis=-1)


@every_setting
@pytest.mark.filterwarnings("default")
def test_saved_adapters_give_the_same_logits_in_peft(peft, tmp_path, base, setting, targets):
    del targets
    config, params = adapted(base, setting)
    save_adapters(tmp_path / "adapters", config, params, base_model=str(tmp_path / "base"))
    model = reference(tmp_path, base, lora.split(params)[0])
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
    assert_close(their_logits(theirs).detach().numpy(), run(config, params), 1e-5)
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapters").base_model_name_or_path == str(tmp_path / "base")


@every_setting
def test_a_round_trip_changes_no_bit(tmp_path, base, setting, targets):
    del targets
    config, params = adapted(base, setting)
    save_adapters(tmp_path / "adapters", config, params)
    loaded_config, loaded = load_adapters(tmp_path / "adapters", base, lora.split(params)[0])
    assert loaded_config.adapted_layers == config.adapted_layers
    assert loaded_config.lora == dataclasses.replace(setting, targets=config.adapted_layers)
    chex.assert_trees_all_equal(loaded, params)


def test_adapters_of_query_key_and_value_with_one_a_are_one_adapter_of_the_same_rank(tmp_path):
    config, params = adapted(*SETTINGS["gpt2"][:2])
    for name in ("key", "value"):
        params["layers"][name]["lora_a"] = params["layers"]["query"]["lora_a"]
    save_adapters(tmp_path / "adapters", config, params)
    tensors = safetensors_numpy.load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    stem = "base_model.model.transformer.h.1.attn.c_attn"
    assert (tensors[f"{stem}.lora_A.weight"] == params["layers"]["value"]["lora_a"][1].T).all()
    assert tensors[f"{stem}.lora_B.weight"].shape == (36, 3)
    assert (tensors[f"{stem}.lora_B.weight"][12:24] == params["layers"]["key"]["lora_b"][1].T).all()
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["rank_pattern"] == {}
    chex.assert_trees_all_equal(load_adapters(tmp_path / "adapters", GPT, lora.split(params)[0])[1], params)


def test_separate_adapters_are_one_in_blocks_whose_alpha_keeps_the_scale(tmp_path):
    config, params = adapted(*SETTINGS["gpt2"][:2])
    save_adapters(tmp_path / "adapters", config, params)
    values = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (values["rank_pattern"], values["alpha_pattern"]) == ({"attn.c_attn": 9}, {"attn.c_attn": 15.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]  # nothing else is left behind


def test_bfloat16_tensors_become_float32_and_lie_on_the_mesh_of_the_kernels(tmp_path):
    config, params = adapted(*SETTINGS["llama"][:2])
    save_adapters(tmp_path / "adapters", config, params)
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    tensors = {name: x.astype(jnp.bfloat16) for name, x in safetensors_numpy.load_file(path).items()}
    safetensors_numpy.save_file(tensors, path)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    base = lora.split(params)[0]
    _, loaded = load_adapters(tmp_path / "adapters", LLAMA, jax.device_put(base, param_shardings(mesh, base)))
    _, adapters = lora.split(params)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), adapters)
    chex.assert_trees_all_equal(lora.split(loaded)[1], rounded)
    for leaf, sharding in zip(jax.tree.leaves(loaded), jax.tree.leaves(param_shardings(mesh, params)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.fixture
def folder(tmp_path):
    """A good folder of llama adapters, to be spoiled, and how it is read."""
    config, params = adapted(*SETTINGS["llama"][:2])
    save_adapters(tmp_path / "adapters", config, params)
    return tmp_path / "adapters", functools.partial(load_adapters, tmp_path / "adapters", LLAMA, lora.split(params)[0])


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), r"use_dora=True is not supported"),
        (dict(peft_type="IA3"), r"peft_type='IA3' is not supported"),
        (dict(bias="all"), r"bias='all' is not supported"),
        (dict(init_lora_weights="pissa"), r"init_lora_weights='pissa' is not supported"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] is not supported"),
        (dict(something_new=1), r"something_new=1 is not supported"),
        (dict(target_modules=["q_proj", "router"]), r"no adapters of router"),
        (dict(alpha_pattern={"q_proj": 1.0}), r"q_proj rank 3 and scale 0.333333, but r=3 and scale 1.66667 elsewhere"),
        (dict(rank_pattern={"layers.1.mlp.up_proj": 6}), r"layers.1.mlp.up_proj rank 6"),
        (dict(r=4), r"28 of another shape: .*q_proj.lora_A.weight \[3, 12\] instead of \[4, 12\].*, \.\.\.$"),
        (dict(lora_alpha=-1), r"lora.alpha=-1"),
    ],
    ids=str,
)
def test_settings_other_than_plain_lora_of_one_scale_are_named(folder, changes, message):
    path, load = folder
    values = json.loads((path / "adapter_config.json").read_text()) | changes
    (path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{STEM}.lora_A.weight"), rf"1 missing: {STEM}.lora_A.weight$"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), r"1 unexpected: extra$"),
        (lambda t: t.update({f"{STEM}.lora_B.weight": np.zeros((5, 3), np.float32)}), r"\[5, 3\] instead of \[12, 3\]"),
        (lambda t: t.update({f"{STEM}.lora_B.weight": np.zeros((12, 3))}), r"holds F64 tensors"),
        (lambda t: t.clear(), r"no adapters of .*q_proj"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "empty"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    path, load = folder
    tensors = safetensors_numpy.load_file(path / "adapter_model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load()


def test_broken_missing_and_pickled_files_are_named(folder):
    path, load = folder
    model, settings = path / "adapter_model.safetensors", path / "adapter_config.json"
    whole = model.read_bytes()
    model.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated"):
        load()
    model.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        load()
    (path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"adapter_model.bin: a pickle .* never loaded"):
        load()
    for text, message in (("{", "is not JSON"), ("{}", "lacks peft_type, r, lora_alpha"), ("[]", "lacks peft_type")):
        settings.write_text(text)
        with pytest.raises(ValueError, match=message):
            load()
    settings.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load()


def test_what_cannot_be_saved_is_an_error_and_writes_nothing(tmp_path):
    target = tmp_path / "adapters"
    config, params = adapted(GPT, Lora(2, 1.0, targets=("query", "value")))
    with pytest.raises(ValueError, match=r"targets=\('query', 'value'\).*one adapter for query, key, value"):
        save_adapters(target, config, params)
    with pytest.raises(ValueError, match=r"backbone.lora=None.*no adapters"):
        save_adapters(target, GPT, lora.split(params)[0])
    unknown, odd = adapted(dataclasses.replace(GPT, logit_scale=0.5), Lora(2, 1.0))
    with pytest.raises(ValueError, match=r"logit_scale=0.5"):
        save_adapters(target, unknown, odd)
    assert not list(tmp_path.iterdir())
    target.mkdir()
    (target / "kept").write_text("")
    with pytest.raises(FileExistsError, match=r"not an empty folder"):
        save_adapters(target, *adapted(*SETTINGS["llama"][:2]))


def test_adapters_on_a_backbone_that_has_some_are_an_error(folder):
    path, _ = folder
    with pytest.raises(ValueError, match=r"backbone.lora=.*already"):
        load_adapters(path, *adapted(*SETTINGS["llama"][:2]))


def test_three_ranks_that_are_not_in_blocks_are_an_error(tmp_path):
    config, params = adapted(*SETTINGS["gpt2"][:2])
    save_adapters(tmp_path / "adapters", config, params)
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"] += 1
    safetensors_numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"c_attn has rank 9, and r=3: one rank for all"):
        load_adapters(tmp_path / "adapters", GPT, lora.split(params)[0])
