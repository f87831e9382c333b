import functools
import itertools
import re

import jax
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.backbone.config import PRESETS, BackboneConfig, Lora
from latentjax.methods import Coconut, CoT
from latentjax.sharding import RULES, check_backbone, make_mesh, param_shardings
from tests.close import assert_close
from tests.methods.battery import EXAMPLES, LENGTHS, Case
from tests.train.small import experiment
from train import state as train_state
from train.config import Mesh, Optimizer
from train.parallel import Parallel
from train.prepare import prepare
from train.state import frozen_mask, parameter_paths
from train.step import gradients, mean_over_devices

# Eight heads, so that every axis of a mesh of eight devices can have all of them. Queries and keys have no biases: with
# learned positions the gradient of the latter is 0, which has no scale.
GPT2 = BackboneConfig(vocab_size=16, max_positions=40, width=16, layers=2, heads=8, qkv_bias=False)
LLAMA = BackboneConfig(
    16, 40, 32, 2, 8, kv_heads=8, mlp_width=24, positions="rotary", norm="rms", activation="silu", gated_mlp=True, qk_norm=True,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=False,
)  # fmt: skip
METHODS = {
    "Coconut": Coconut(GPT2, LENGTHS, max_latent_stage=3),
    "CoT": CoT(GPT2, LENGTHS, steps=4),
    "Coconut on Llama's form": Coconut(LLAMA, LENGTHS, max_latent_stage=3),
}
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
# What `make test` runs; the rest is slow.
QUICK = {
    ("Coconut", (2, 2, 2)),
    ("Coconut", "pmap"),
    ("CoT", (1, 8, 1)),
    ("CoT", "pmap"),
    ("Coconut on Llama's form", (1, 2, 4)),
}


def _gradients(name, kind, mesh, state, batch):
    """Loss, gradients and metrics on `mesh`. Adam has no part in it: it would make a large step of a small difference."""
    parallel = Parallel(kind, mesh, len(EXAMPLES))

    def make(axis):
        def function(state, batch):
            still = frozen_mask(state.params, ())
            found = gradients(METHODS[name], state, batch, jax.random.key(0), still, 1)
            return mean_over_devices(*found, axis)

        return function

    shardings = param_shardings(mesh, state)
    placed = jax.device_put(state, shardings)
    program, _ = parallel.compile(make, placed, shardings, batch, updates=False)
    return jax.device_get(program(placed, parallel.place(batch)))


@functools.cache
def _single(name):
    """State, batch, and what one device makes of them."""
    method = METHODS[name]
    params = train_state.init_params(method, 0)
    state = train_state.create(params, Optimizer().build(4), seed=0, ema=False)
    batch = Case(method, 3).batch()
    return state, batch, _gradients(name, "jit", make_mesh(devices=jax.devices()[:1]), state, batch)


def _cases():
    for name, shape in itertools.product(METHODS, [*SHAPES, "pmap"]):
        marks = () if (name, shape) in QUICK else (pytest.mark.slow,)
        yield pytest.param(name, shape, marks=marks, id=f"{name}-{shape}")


@pytest.mark.parametrize(("name", "shape"), list(_cases()))
def test_loss_and_gradients_are_those_of_one_device(name, shape):
    state, batch, expected = _single(name)
    assert len(set(batch.loss_mask.sum(axis=1).tolist())) > 1  # so that a plain mean over devices is something else
    kind, mesh = ("pmap", make_mesh(8)) if shape == "pmap" else ("jit", make_mesh(*shape))
    assert_close(_gradients(name, kind, mesh, state, batch), expected, 1e-4)


FORMS = {**PRESETS, "tests": LLAMA} | {
    f"{name} with LoRA": PRESETS[name].__class__(
        **{**vars(PRESETS[name]), "lora": Lora(8, 16.0, targets=("query", "key", "value", "attention_out", "mlp_down"))}
    )
    for name in ("gpt2", "llama-3.2-1b")
}


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_of_every_preset_has_a_rule_and_is_split_by_it(name):
    """On a mesh that divides heads and widths no dimension that a rule splits stays whole."""
    config = FORMS[name]
    tensor = 2 if config.vocab_size % 2 == 0 else 1
    mesh = make_mesh(data=8 // (2 * tensor), fsdp=2, tensor=tensor)
    check_backbone(mesh, config)
    params = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    shardings = jax.tree.leaves(param_shardings(mesh, params))
    for path, leaf, sharding in zip(parameter_paths(params), jax.tree.leaves(params), shardings, strict=True):
        rule = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
        assert rule is not None, path
        layers = path.startswith("layers/")
        assert len(rule) + layers == leaf.ndim, path
        assert tuple(sharding.spec) == (None,) * layers + rule, path


def test_optimiser_state_and_average_are_split_as_their_parameters():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = train_state.init_params(METHODS["Coconut"], 0)
    state = train_state.create(params, Optimizer().build(4), seed=0, ema=True)
    of_params = dict(zip(parameter_paths(params), jax.tree.leaves(param_shardings(mesh, params)), strict=True))
    seen = dict.fromkeys(of_params, 0)
    for path, sharding in zip(parameter_paths(state), jax.tree.leaves(param_shardings(mesh, state)), strict=True):
        name = next((name for name in of_params if path.endswith("/" + name)), None)
        if name is None:
            assert sharding.is_fully_replicated, path
        else:
            seen[name] += 1
            assert sharding.spec == of_params[name].spec, path
    assert set(seen.values()) == {4}  # parameter, two moments, average


@pytest.mark.parametrize(
    ("mesh", "field"),
    [((2, 1, 4), "heads=2"), ((1, 8, 1), "width=12"), ((4, 1, 2), "vocab_size=13")],
)
def test_a_mesh_that_does_not_divide_the_backbone_is_named(mesh, field):
    config = BackboneConfig(13, 24, 12, 1, 2)
    with pytest.raises(ValueError, match=rf"mesh\.(tensor|fsdp)=\d: does not divide method\.backbone\.{field}"):
        check_backbone(make_mesh(*mesh), config)


def test_preparing_a_run_checks_its_mesh():
    with pytest.raises(
        ValueError, match=r"mesh\.tensor=4: does not divide method\.backbone\.heads=2; use another mesh"
    ):
        prepare(experiment(mesh=Mesh(data=1, tensor=4)))
