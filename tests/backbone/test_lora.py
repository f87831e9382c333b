"""Adapters against the definition y = x (W + scale A B), and their way on to and off a backbone."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentjax.backbone import decoder, lora
from latentjax.backbone.config import BackboneConfig, Lora
from latentjax.backbone.lora import LoraDense
from latentjax.sharding import make_mesh, param_shardings
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit

GPT = BackboneConfig(vocab_size=13, max_positions=16, width=12, layers=2, heads=2, qkv_bias=False)
LLAMA = dataclasses.replace(
    GPT, heads=4, kv_heads=2, head_dim=8, mlp_width=20, positions="rotary", norm="rms", activation="silu", gated_mlp=True,
    out_bias=False, mlp_bias=False, tied_head=False,
)  # fmt: skip
CASES = {
    "gpt2": dataclasses.replace(GPT, lora=Lora(3, 5.0)),
    "llama, rsLoRA": dataclasses.replace(LLAMA, lora=Lora(3, 5.0, rslora=True)),
    "some layers": dataclasses.replace(LLAMA, lora=Lora(2, 4.0, targets=("query|value", "mlp_.*"))),
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 7)).astype(np.int32)
VALID = np.ones(TOKENS.shape, bool)


def plain(config):
    return dataclasses.replace(config, lora=None)


def folded(config, params):
    """The base parameters with W + scale A B in place of W, by the definition."""
    scale = config.lora.alpha / (np.sqrt(config.lora.rank) if config.lora.rslora else config.lora.rank)
    layers = {}
    for name, weights in params["layers"].items():
        layers[name] = {k: v for k, v in weights.items() if not k.startswith("lora")}
        if "lora_a" in weights:
            a, b = np.asarray(weights["lora_a"], np.float64), np.asarray(weights["lora_b"], np.float64)
            layers[name]["kernel"] = jnp.asarray(
                weights["kernel"] + scale * np.einsum("lir,lro->lio", a, b), jnp.float32
            )
    return {**params, "layers": layers}


def forward(config, params, key=None):
    out = decoder.apply(config, params, jnp.asarray(TOKENS), jnp.asarray(VALID), key=key)
    return decoder.head(config, params, out.hidden)


def loss(config, params, key=None):
    return (jax.nn.log_softmax(forward(config, params, key)) * jnp.sin(jnp.arange(13.0))).sum()


logits = jit(forward, static_argnums=0)
loss_and_gradients = jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
init = jit(decoder.init, static_argnums=0)
add = jit(lambda *inputs: lora.add(*inputs)[1], static_argnums=(0, 2))


@every_case
def test_forward_is_its_definition(config):
    params = naive.random_params(config)
    adapted = {name for name, weights in params["layers"].items() if "lora_a" in weights}
    assert adapted == set(config.adapted_layers)
    base = folded(config, params)
    for row in range(2):
        hidden = naive.forward(plain(config), base, naive.embed(base, TOKENS[row]))
        assert_close(logits(config, params)[row], naive.logits(plain(config), base, hidden), 1e-5)


@pytest.mark.parametrize("config", [CASES["gpt2"], CASES["some layers"]], ids=["gpt2", "llama"])
def test_gradient_is_that_of_the_definition(config):
    params = naive.random_params(config)

    def definition(params):
        lora, layers = config.lora, {}
        scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
        for name, weights in params["layers"].items():
            layers[name] = {k: v for k, v in weights.items() if not k.startswith("lora")}
            if "lora_a" in weights:
                layers[name]["kernel"] += scale * jnp.einsum("lir,lro->lio", weights["lora_a"], weights["lora_b"])
        return loss(plain(config), {**params, "layers": layers})

    value, gradient = loss_and_gradients(config, params)
    expected, expected_gradient = jit(jax.value_and_grad(definition))(params)
    assert_close(value, expected, 1e-5)
    assert_close(gradient, expected_gradient, 1e-4)


def test_new_adapters_change_no_bit():
    for config in CASES.values():
        params = naive.random_params(plain(config))
        with_lora, adapted = lora.add(plain(config), params, config.lora, jax.random.key(1))
        assert with_lora == config
        assert (logits(config, adapted) == logits(plain(config), params)).all()
        base, adapters = lora.split(adapted)
        chex.assert_trees_all_equal(base, params)
        chex.assert_trees_all_equal(lora.join(base, adapters), adapted)


def test_initial_adapters_are_uniform_in_the_inverse_root_of_the_inputs_and_zero():
    """Those of `add` and those of `decoder.init`, whose base is the one without adapters."""
    config = BackboneConfig(8, 8, 64, 2, 2, lora=Lora(100, 1.0))
    base, fresh = init(plain(config), jax.random.key(0)), init(config, jax.random.key(0))
    added = add(plain(config), base, config.lora, jax.random.key(1))
    chex.assert_trees_all_equal(lora.split(fresh)[0], base)
    chex.assert_trees_all_equal_shapes_and_dtypes(added, fresh)
    for params in (fresh, added):
        for name, inputs in (("query", 64), ("mlp_down", 256)):
            a, bound = np.asarray(params["layers"][name]["lora_a"]), inputs**-0.5
            assert np.abs(a).max() <= bound
            assert a.std() == pytest.approx(bound / 3**0.5, rel=0.03)
            assert (a[0] != a[1]).any()
            assert not np.asarray(params["layers"][name]["lora_b"]).any()
        query, key = (np.asarray(params["layers"][name]["lora_a"]) for name in ("query", "key"))
        assert (query != key).any()


def test_scan_unroll_and_remat_agree():
    config = dataclasses.replace(LLAMA, lora=Lora(3, 5.0, dropout=0.3), residual_dropout=0.1)
    params, key = naive.random_params(config), jax.random.key(3)
    value, gradient = loss_and_gradients(naive.with_scan(config, False), params, key)
    for scan, remat in [(True, "full"), (False, "dots")]:
        other = loss_and_gradients(dataclasses.replace(config, scan_layers=scan, remat=remat), params, key)
        assert_close(other[0], value, 1e-5)
        assert_close(other[1], gradient, 1e-4)


def test_dropout_is_of_the_adapters_input_only():
    """With identities for A and B the adapter's output is its input after dropout."""
    width, rate = 40, 0.25
    layer = LoraDense(functools.partial(nn.Dense, width), Lora(width, float(width), dropout=rate))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((500, width)), jnp.float32)
    params = jit(layer.init)(jax.random.key(0), x)["params"] | {"lora_a": np.eye(width), "lora_b": np.eye(width)}
    dense = x @ np.asarray(params["kernel"]) + params["bias"]

    @jit
    def run(key):
        return layer.apply({"params": params}, x, rngs=None if key is None else {"lora": jax.random.key(key)})

    def passed(key):
        return np.asarray(run(key)) - dense

    assert_close(passed(None), x, 1e-5)
    kept = np.abs(passed(1)) > 1e-5
    assert_close(passed(1), np.where(kept, x / (1 - rate), 0), 1e-5)
    assert kept.mean() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / x.size) ** 0.5)
    assert (passed(1) == passed(1)).all()
    assert (passed(1) != passed(2)).any()


def test_dropout_differs_by_layer_and_by_projection():
    config = dataclasses.replace(GPT, lora=Lora(12, 12.0, dropout=0.5, targets=("query", "key")), scan_layers=False)
    params = naive.random_params(plain(config))
    eye = {
        name: {"lora_a": jnp.stack([jnp.eye(12)] * 2), "lora_b": jnp.stack([jnp.eye(12)] * 2)}
        for name in ("query", "key")
    }
    same = {name: {"kernel": jnp.zeros((2, 12, 12))} for name in ("query", "key")}
    params = lora.join(lora.join(params, {"layers": same}), {"layers": eye})
    run = jit(functools.partial(decoder.apply, config, collect=("query", "key")))
    out = run(params, jnp.asarray(TOKENS), jnp.asarray(VALID), key=jax.random.key(0))
    dropped = {name: np.asarray(seen == 0) for name, seen in out.activations.items()}
    assert 0.3 < dropped["query"].mean() < 0.7
    assert (dropped["query"] != dropped["key"]).mean() > 0.3
    assert (dropped["query"][0] != dropped["query"][1]).mean() > 0.3


def test_bfloat16_compute_keeps_float32_adapters_even_over_a_bfloat16_backbone():
    config = dataclasses.replace(CASES["llama, rsLoRA"], dtype="bfloat16", param_dtype="bfloat16")
    params = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    base, adapters = lora.split(params)
    assert {x.dtype for x in jax.tree.leaves(base["layers"]["query"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    exact = naive.random_params(CASES["llama, rsLoRA"])
    rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), exact, params)
    assert_close(logits(config, rounded), logits(CASES["llama, rsLoRA"], exact), 0.05)


@every_case
def test_merge_keeps_the_function_and_unmerge_restores(config):
    params = naive.random_params(config)
    base, adapters = lora.split(params)
    merged_config, merged = lora.merge(config, params)
    assert merged_config == plain(config)
    assert_close(merged, folded(config, params), 1e-6)
    assert_close(logits(merged_config, merged), logits(config, params), 1e-5)
    again_config, again = lora.unmerge(merged_config, merged, config.lora, adapters)
    assert again_config == config
    assert_close(again, params, 1e-6)
    kernels = {
        name: weights.pop("kernel") for name, weights in lora.split(again)[0]["layers"].items() if "kernel" in weights
    }
    chex.assert_trees_all_equal(lora.split(again)[1], adapters)  # bit for bit, as all but the adapted kernels
    for name in set(kernels) - set(config.adapted_layers):
        assert (kernels[name] == base["layers"][name]["kernel"]).all()


def test_merged_bfloat16_kernels_are_rounded_once():
    config = dataclasses.replace(CASES["gpt2"], param_dtype="bfloat16")
    params = naive.random_params(config)
    base, adapters = lora.split(params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = lora.merge(config, lora.join(rounded, adapters))[1]["layers"]["query"]["kernel"]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    expected = folded(config, lora.join(wide, adapters))["layers"]["query"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert (np.abs(merged.astype(np.float32) - expected) <= 2.0**-8 * np.abs(expected)).all()


def test_sharded_equals_single_device_and_new_adapters_lie_on_the_mesh():
    mesh, config = make_mesh(data=2, fsdp=2, tensor=2), CASES["llama, rsLoRA"]
    params = naive.random_params(config)
    shardings = param_shardings(mesh, params)
    query, down = shardings["layers"]["query"], shardings["layers"]["mlp_down"]
    assert [*map(tuple, (query["lora_a"].spec, query["lora_b"].spec))] == [(None, "fsdp", None), (None, None, "tensor")]
    assert [*map(tuple, (down["lora_a"].spec, down["lora_b"].spec))] == [(None, "tensor", None), (None, None, "fsdp")]
    placed = jax.device_put(params, shardings)
    value, gradient = jax.block_until_ready(loss_and_gradients(config, placed))
    expected, expected_gradient = loss_and_gradients(config, params)
    assert_close(value, expected, 1e-4)
    assert_close(gradient, expected_gradient, 1e-4)
    base, _ = lora.split(placed)
    _, fresh = lora.add(plain(config), base, config.lora, jax.random.key(0))
    _, unplaced = lora.add(plain(config), lora.split(params)[0], config.lora, jax.random.key(0))
    chex.assert_trees_all_equal(fresh, unplaced)
    merged = jax.block_until_ready(lora.merge(config, placed)[1])
    assert_close(merged, folded(config, params), 1e-6)
    for tree, wanted in ((fresh, shardings), (merged, param_shardings(mesh, merged))):
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_merge_can_be_compiled():
    config = CASES["gpt2"]
    params = naive.random_params(config)
    assert_close(jit(lambda params: lora.merge(config, params)[1])(params), folded(config, params), 1e-6)


@pytest.mark.parametrize(
    ("tuning", "training"),
    [
        ("full", {"kernel", "bias", "scale", "tokens", "positions", "lora_a", "lora_b", "projection"}),
        ("lora", {"lora_a", "lora_b", "projection"}),
        ("frozen", {"projection"}),
    ],
)
def test_frozen_patterns_leave_what_the_tuning_trains(tuning, training):
    """Through `optax.masked`, as the training program uses them: what is frozen has no update and no optimiser state."""
    from train.state import frozen_mask, parameter_paths

    params = {"backbone": naive.random_params(CASES["gpt2"]), "method": {"projection": jnp.ones(3)}}
    still = frozen_mask(params, lora.frozen_patterns(tuning))
    paths = parameter_paths(params)
    moving = {p for p, stop in zip(paths, jax.tree.leaves(still), strict=True) if not stop}
    assert moving == {p for p in paths if p.rpartition("/")[2] in training}
    optimizer = optax.partition({True: optax.set_to_zero(), False: optax.adam(1.0)}, still)
    state = jax.eval_shape(optimizer.init, params)
    assert sum(x.ndim > 0 for x in jax.tree.leaves(state)) == 2 * len(moving)
    updates = jit(lambda params: optimizer.update(params, optimizer.init(params), params)[0])(params)
    assert {p for p, x in zip(paths, jax.tree.leaves(updates), strict=True) if np.asarray(x).any()} == moving


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), r"lora.rank=0.*positive integer"),
        (dict(rank=True), r"lora.rank=True.*positive integer"),
        (dict(alpha=0.0), r"lora.alpha=0.0.*positive"),
        (dict(alpha=float("nan")), r"lora.alpha=nan.*positive"),
        (dict(dropout=1.0), r"lora.dropout=1.0.*\[0, 1\)"),
        (dict(targets=()), r"lora.targets=\(\).*at least one"),
        (dict(targets=("(",)), r"lora.targets: '\('.*regular expression"),
    ],
    ids=str,
)
def test_impossible_settings_are_an_error_with_field_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        Lora(**dict(rank=2, alpha=1.0) | changes)


def test_targets_that_the_backbone_lacks_are_an_error_that_lists_its_layers():
    for target in ("mlp_gate", "attention", "quer"):
        with pytest.raises(ValueError, match=rf"lora.targets: '{target}' matches none of.*query, .*mlp_down"):
            dataclasses.replace(GPT, lora=Lora(2, 1.0, targets=("query", target)))
    assert dataclasses.replace(LLAMA, lora=Lora(2, 1.0, targets=("mlp_gate",))).adapted_layers == ("mlp_gate",)


def test_misplaced_adapters_are_an_error():
    config = CASES["gpt2"]
    params = naive.random_params(config)
    base, adapters = lora.split(params)
    with pytest.raises(ValueError, match=r"backbone.lora=Lora\(rank=3.*already"):
        lora.add(config, params, config.lora, jax.random.key(0))
    with pytest.raises(ValueError, match=r"backbone.lora=None.*no adapters"):
        lora.merge(plain(config), base)
    with pytest.raises(ValueError, match=r"no layer, but backbone.lora.targets=.*means query"):
        lora.merge(config, base)
    with pytest.raises(ValueError, match=r"adapters of .*mlp_up.* means query, key$"):
        lora.unmerge(plain(config), base, Lora(3, 1.0, targets=("query", "key")), adapters)
    with pytest.raises(ValueError, match=r"adapter of .* has rank 3, but backbone.lora.rank=4"):
        lora.unmerge(plain(config), base, Lora(4, 1.0), adapters)
    with pytest.raises(ValueError, match=r"tuning='adapters'.*full, lora, frozen"):
        lora.frozen_patterns("adapters")
