"""Presets against published parameter counts; errors of a configuration; initial parameters."""

import dataclasses

import jax
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.backbone.config import PRESETS, BackboneConfig, preset, tiny

# Parameters of the released checkpoints, tied heads counted once.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
}


def test_every_preset_has_a_published_count():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    shapes = jax.eval_shape(lambda key: decoder.init(preset(name), key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_preset_with_changes_and_unknown_preset():
    assert preset("gpt2", layers=2).layers == 2
    with pytest.raises(KeyError, match=r"gpt-2.*gpt2-medium"):
        preset("gpt-2")


GOOD = dict(vocab_size=8, max_positions=8, width=12, layers=1, heads=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=0), r"width=0.*positive"),
        (dict(layers=-1), r"layers=-1.*positive"),
        (dict(width=13), r"width=13.*heads=2"),
        (dict(heads=4, kv_heads=3), r"heads=4.*kv_heads=3"),
        (dict(residual_dropout=1.0), r"residual_dropout=1.0.*\[0, 1\)"),
        (dict(attention_dropout=-0.1), r"attention_dropout=-0.1.*\[0, 1\)"),
        (dict(heads=4, positions="rotary"), r"head_dim=3.*even"),
        (dict(kv_heads=0), r"kv_heads=0"),
        (dict(head_dim=0), r"head_dim=0"),
        (dict(mlp_width=0), r"mlp_width=0"),
        (dict(dtype="float12"), r"dtype='float12'"),
    ],
    ids=str,
)
def test_impossible_configuration_is_an_error_with_field_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**GOOD | changes)


@pytest.mark.parametrize("field", ["positions", "norm", "activation", "init", "remat"])
def test_unknown_choice_is_an_error(field):
    """Of type under the tests' type checker, of value without it."""
    with pytest.raises((ValueError, TypeError), match=field):
        BackboneConfig(**GOOD, **{field: "other"})


def test_configuration_is_hashable_and_equal_by_value():
    assert hash(BackboneConfig(**GOOD)) == hash(BackboneConfig(**GOOD))
    assert BackboneConfig(**GOOD) == BackboneConfig(**GOOD)
    assert BackboneConfig(**GOOD).with_dropout(0.1) != BackboneConfig(**GOOD)


@pytest.mark.parametrize("kind", ["gpt2", "unit"])
def test_initial_parameters_have_the_stated_spread(kind):
    base = dataclasses.replace(tiny(500, width=64, layers=2), init=kind, tied_head=False)
    params = jax.jit(decoder.init, static_argnums=0)(base, jax.random.key(0))
    depth = (2 * base.layers) ** -0.5
    embedding, square, wide = (0.02, 0.02, 0.02) if kind == "gpt2" else (1.0, 64**-0.5, 256**-0.5)
    expected = {
        "query": square,
        "mlp_up": square,
        "attention_out": square * depth,
        "mlp_down": wide * depth,
    }
    for name, spread in expected.items():
        kernel = np.asarray(params["layers"][name]["kernel"])
        assert abs(kernel.mean()) < 5 * spread / kernel.size**0.5
        assert kernel.std() == pytest.approx(spread, rel=0.05), name
    assert (np.asarray(params["layers"]["query"]["kernel"][0]) != params["layers"]["query"]["kernel"][1]).any()
    for name in ("tokens", "positions"):
        assert np.asarray(params["embed"][name]).std() == pytest.approx(embedding, rel=0.05)
    assert np.asarray(params["head"]["kernel"]).std() == pytest.approx(0.02 if kind == "gpt2" else 64**-0.5, rel=0.05)
