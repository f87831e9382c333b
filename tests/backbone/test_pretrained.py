"""Folders of published checkpoints: reading onto meshes, writing, and everything that can be wrong with one.

Names and orientation of tensors are proved against `transformers` in test_transformers.py; here it is bits and errors."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from latentjax.backbone import decoder, pretrained
from latentjax.backbone.config import BackboneConfig, Lora
from latentjax.backbone.vocabulary import padded_size
from latentjax.sharding import make_mesh, param_shardings
from latentjax.tokenizers import WordTokenizer

LLAMA = BackboneConfig(
    24, 64, 16, 3, 4, kv_heads=2, mlp_width=40, positions="rotary", norm="rms", activation="silu", gated_mlp=True,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=False,
)  # fmt: skip
GPT2 = BackboneConfig(24, 64, 16, 3, 4)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA}


def random_params(config, dtype="float32", seed=0):
    """Random in every array, biases and scales included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


@pytest.fixture(params=list(CONFIGS))
def saved(request, tmp_path):
    config = CONFIGS[request.param]
    params = random_params(config)
    pretrained.save(tmp_path / "model", config, params)
    return tmp_path / "model", config, params


@pytest.fixture
def llama(tmp_path):
    pretrained.save(tmp_path / "model", LLAMA, random_params(LLAMA))
    return tmp_path / "model"


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def rewrite(folder: pathlib.Path, change) -> None:
    """Change the tensors of a folder with a single file."""
    held = tensors(folder)
    change(held)
    save_file(held, folder / "model.safetensors")


def edit_config(folder: pathlib.Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_was_saved_is_loaded_bit_for_bit(saved):
    folder, config, params = saved
    loaded, found = pretrained.load(folder)
    assert loaded == pretrained.read_config(folder) and to_plain(loaded) == to_plain(config)
    assert_same_bits(found, params)


def to_plain(config):
    return (
        config.num_kv_heads,
        config.size_per_head,
        config.hidden_mlp,
        config.tied_head,
        config.vocab_size,
        config.norm,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_of_a_file_keeps_every_bit(dtype, tmp_path):
    for name, config in CONFIGS.items():
        pretrained.save(tmp_path / name, config, random_params(config, dtype))
        loaded, params = pretrained.load(tmp_path / name)
        assert loaded.param_dtype == dtype
        pretrained.save(tmp_path / f"{name}-again", loaded, params)
        first, second = ((tmp_path / x / "model.safetensors").read_bytes() for x in (name, f"{name}-again"))
        assert first == second
        assert (tmp_path / name / "config.json").read_text() == (tmp_path / f"{name}-again" / "config.json").read_text()


def test_dtype_is_converted_as_numpy_does(llama):
    exact = pretrained.load(llama)[1]
    for dtype in ("bfloat16", "float16"):
        config, params = pretrained.load(llama, dtype=dtype)
        assert config.param_dtype == dtype
        assert_same_bits(params, jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(jnp.dtype(dtype)), exact))


@pytest.mark.parametrize("axes", [(1, 4, 2), (2, 2, 2), (8, 1, 1)], ids=str)
def test_a_mesh_gets_its_parts(saved, axes):
    folder, _, params = saved
    mesh = make_mesh(*axes)
    _, found = pretrained.load(folder, mesh=mesh)
    assert_same_bits(found, params)
    assert jax.tree.map(lambda x: x.sharding, found) == param_shardings(mesh, params)
    if axes == (1, 4, 2):
        assert found["layers"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert found["layers"]["query"]["kernel"].addressable_shards[0].data.shape == (3, 4, 8)


def test_many_files_with_an_index(saved):
    folder, config, params = saved
    split = folder.parent / "split"
    pretrained.save(split, config, params, max_file_bytes=2000)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(folder).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(split / file)
    assert all(len(load_file(path)) == 1 or path.stat().st_size < 2000 + 2000 for path in split.glob("*.safetensors"))
    assert_same_bits(pretrained.load(split)[1], params)


@pytest.mark.parametrize("prefixed", [True, False])
def test_names_with_and_without_prefix_and_buffers(saved, prefixed):
    folder, _, params = saved

    def change(held):
        for name in list(held):
            if not prefixed and name != "lm_head.weight":
                held[name.split(".", 1)[1]] = held.pop(name)
        lead = "" if not prefixed else "transformer." if "transformer.wte.weight" in held else "model."
        held[f"{lead}h.0.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
        held[f"{lead}h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
        held[f"{lead}layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    rewrite(folder, change)
    assert_same_bits(pretrained.load(folder)[1], params)


def test_a_tied_head_may_be_repeated_but_not_contradicted(tmp_path):
    params = random_params(GPT2)
    pretrained.save(tmp_path / "model", GPT2, params)
    rewrite(tmp_path / "model", lambda held: held.update({"lm_head.weight": held["transformer.wte.weight"]}))
    assert_same_bits(pretrained.load(tmp_path / "model")[1], params)
    rewrite(tmp_path / "model", lambda held: held.update({"lm_head.weight": held["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"1 unexpected \(config.json says tie_word_embeddings=true\): lm_head.weight"):
        pretrained.load(tmp_path / "model")


def test_an_untied_head_must_be_there(llama):
    rewrite(llama, lambda held: held.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(config.json says tie_word_embeddings=false\): lm_head.weight"):
        pretrained.load(llama)


def test_logits_refuse_ids_and_lengths_that_the_backbone_lacks():
    config, params = LLAMA, random_params(LLAMA)
    with pytest.raises(ValueError, match=r"token_ids lie in \[0, 24\], but the vocabulary is \[0, 24\)"):
        pretrained.logits(config, params, np.array([[0, 24]], np.int32))
    with pytest.raises(ValueError, match="token_ids need 65 positions"):
        pretrained.logits(config, params, np.zeros((1, 65), np.int32))


def test_mismatch_lists_ten_names_both_ways(llama):
    edit_config(llama, num_hidden_layers=5, intermediate_size=44)
    with pytest.raises(ValueError, match=r"18 missing: layers.3.*and 8 more; 9 of another shape: layers.0") as error:
        pretrained.load(llama)
    assert "layers.0.mlp.down_proj.weight [16, 40] instead of [16, 44]" in str(error.value)
    edit_config(llama, num_hidden_layers=1, intermediate_size=40)
    with pytest.raises(ValueError, match=r"; 18 unexpected: layers.1.*and 8 more$"):
        pretrained.load(llama)


def test_missing_shard(saved):
    folder, config, params = saved
    split = folder.parent / "split"
    pretrained.save(split, config, params, max_file_bytes=2000)
    gone = sorted(split.glob("*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone.name}, which model.safetensors.index.json names"):
        pretrained.load(split)


def test_index_that_promises_what_a_file_lacks(llama):
    held = tensors(llama)
    (llama / "model.safetensors").rename(llama / "a.safetensors")
    weight_map = dict.fromkeys([*held, "model.layers.9.mlp.up_proj.weight"], "a.safetensors")
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"a.safetensors lacks model.layers.9.mlp.up_proj.weight, which"):
        pretrained.load(llama)
    index.write_text(json.dumps({"weight_map": {"x": "../model/a.safetensors"}}))
    with pytest.raises(ValueError, match="no plain file name"):
        pretrained.load(llama)
    index.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        pretrained.load(llama)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(held, "a.safetensors")}))
    shutil.copy(llama / "a.safetensors", llama / "model.safetensors")
    with pytest.raises(ValueError, match="has both model.safetensors and model.safetensors.index.json"):
        pretrained.load(llama)


@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "in the length", "in the header", "in the data"])
def test_truncated_file(llama, kept):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors \([\d,]+ bytes\) is truncated or no safetensors file"):
        pretrained.load(llama)


def test_pickles_are_refused_and_absent_files_named(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        pretrained.load(llama)
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin: a pickle .* never loaded.*safetensors"):
        pretrained.load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        pretrained.load(llama)


def test_dtypes_that_are_not_supported(llama):
    rewrite(llama, lambda held: held.update({"model.norm.weight": held["model.norm.weight"].astype(np.float16)}))
    with pytest.raises(ValueError, match="mixes F16, F32 tensors: say which dtype"):
        pretrained.load(llama)
    assert pretrained.load(llama, dtype="float32")[1]["norm"]["scale"].dtype == jnp.float32
    rewrite(llama, lambda held: held.update({"model.layers.1.mlp.up_proj.weight": np.ones((40, 16), np.float16)}))
    with pytest.raises(ValueError, match=r"mixes F16, F32 in the layers of layers.\{\}.mlp.up_proj.weight"):
        pretrained.load(llama, dtype="float32")
    with pytest.raises(ValueError, match="dtype='float64'"):
        pretrained.load(llama, dtype="float64")
    rewrite(llama, lambda held: held.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(ValueError, match="holds I8 tensors"):
        pretrained.load(llama, dtype="float32")


def test_paths_and_names_that_lead_nowhere(tmp_path, monkeypatch):
    import huggingface_hub

    for path in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            pretrained.load(path)
    with pytest.raises(OSError, match=r"'owner/na me'.*Pass a folder that holds config.json and model.safetensors"):
        pretrained.load("owner/na me")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for function in (pretrained.load, pretrained.read_config):
        with pytest.raises(OSError, match=r"could not be fetched.*Pass a folder that holds config.json"):
            function("nobody/nothing")


def test_hub_name_is_fetched_without_pickles(llama, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: (asked.append((name, options)), str(llama))[1]
    )
    assert_same_bits(pretrained.load("owner/name", revision="v1")[1], pretrained.load(llama)[1])
    ((name, options),) = asked
    assert (name, options["revision"]) == ("owner/name", "v1")
    assert "model.safetensors" in options["allow_patterns"] and not any(".bin" in x for x in options["allow_patterns"])


def test_save_never_overwrites_and_leaves_nothing_behind(llama, monkeypatch):
    params = random_params(LLAMA)
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        pretrained.save(llama, LLAMA, params)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        pretrained.save(llama / "config.json", LLAMA, params)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    monkeypatch.setattr(pretrained, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pretrained.save(llama.parent / "new", LLAMA, params)
    assert [path.name for path in llama.parent.iterdir()] == ["model"]
    monkeypatch.undo()
    (llama.parent / "empty").mkdir()
    pretrained.save(llama.parent / "empty", LLAMA, params)
    assert_same_bits(pretrained.load(llama.parent / "empty")[1], params)


def test_save_refuses_what_it_cannot_say(tmp_path):
    params = random_params(LLAMA)
    with pytest.raises(ValueError, match=r"logit_scale=0.5 \(needs 1.0\)"):
        pretrained.save(tmp_path / "x", dataclasses.replace(LLAMA, logit_scale=0.5), params)
    adapted = dataclasses.replace(LLAMA, lora=Lora(rank=2, alpha=2.0))
    with pytest.raises(ValueError, match="latentjax.backbone.lora.merge"):
        pretrained.save(tmp_path / "x", adapted, random_params(adapted))
    with pytest.raises(ValueError, match=r"head/kernel is unexpected"):
        pretrained.save(tmp_path / "x", dataclasses.replace(LLAMA, tied_head=True), params)
    with pytest.raises(ValueError, match=r"layers/mlp_up/kernel is \[3, 16, 40\] instead of \[3, 16, 44\]"):
        pretrained.save(tmp_path / "x", dataclasses.replace(LLAMA, mlp_width=44), params)
    with pytest.raises(ValueError, match=r"embed/tokens is missing, .*head/kernel is missing, .* and 14 more"):
        pretrained.save(tmp_path / "x", LLAMA, {"backbone": params})
    assert not list(tmp_path.iterdir())


def test_padding_of_the_vocabulary_stays_behind_and_the_tokenizer_comes_along(tmp_path):
    tokenizer = WordTokenizer.word_level(["a", "b", "c"])
    size = tokenizer.vocab_size
    config = dataclasses.replace(LLAMA, vocab_size=padded_size(size), vocab_used=size)
    params = random_params(config)
    pretrained.save(tmp_path / "model", config, params, tokenizer=tokenizer)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (values["vocab_size"], values["eos_token_id"], values["pad_token_id"]) == (size, 1, 0)
    assert WordTokenizer.load(tmp_path / "model").encode("a b c") == tokenizer.encode("a b c")
    loaded, found = pretrained.load(tmp_path / "model")
    tokens = np.arange(size, dtype=np.int32)[None]
    ours = pretrained.logits(config, params, tokens)[..., :size]
    np.testing.assert_allclose(pretrained.logits(loaded, found, tokens), ours, atol=1e-5 * np.abs(ours).max())
    large = WordTokenizer.word_level([f"w{i}" for i in range(40)])
    with pytest.raises(ValueError, match="vocab_size=24: the tokenizer has"):
        pretrained.save(tmp_path / "large", LLAMA, random_params(LLAMA), tokenizer=large)
