"""The decoder against its definition, in all its forms of computation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.backbone.attention import MaskSpec, build_mask, rotary_angles
from latentjax.backbone.config import BackboneConfig, RopeScaling
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit

SMALL = BackboneConfig(vocab_size=13, max_positions=16, width=12, layers=2, heads=2)
# Wavelengths of an 8-wide head at base 20: 6.3, 13, 28, 60 positions; with 32 original ones all three cases occur.
LLAMA = dataclasses.replace(
    SMALL, heads=4, kv_heads=2, head_dim=8, mlp_width=20, positions="rotary", rope_theta=20.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), norm="rms", norm_eps=1e-6, activation="silu", gated_mlp=True,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=False,
)  # fmt: skip
VARIANTS = {
    "learned positions, layer norm, tanh GELU, biases, tied": SMALL,
    "exact GELU, no biases, logit scale": dataclasses.replace(
        SMALL, activation="gelu", qkv_bias=False, out_bias=False, mlp_bias=False, logit_scale=0.3, init="unit"
    ),
    "rotary, no scaling, biases": dataclasses.replace(SMALL, positions="rotary", tied_head=False),
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, rope_scaling=None, qkv_bias=True, tied_head=True),
    "qwen3": dataclasses.replace(LLAMA, rope_scaling=None, qk_norm=True),
    "one key head, RMS norm, gated GELU": dataclasses.replace(SMALL, kv_heads=1, norm="rms", gated_mlp=True),
}
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9)).astype(np.int32)
VALID = np.ones(TOKENS.shape, bool)
# Rows of 5, 4 and 6 tokens with holes at the end, in the middle, and none at all.
HOLES = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1], [1, 1, 1, 0, 1, 1, 1]], bool)
RAGGED = np.random.default_rng(1).integers(0, 13, HOLES.shape).astype(np.int32)


@functools.partial(jit, static_argnums=0, static_argnames="collect")
def apply(config, params, inputs, valid, **options):
    out = decoder.apply(config, params, inputs, valid, **options)
    return decoder.head(config, params, out.hidden), out


def naive_logits(config, params, tokens, mask=None):
    return naive.logits(config, params, naive.forward(config, params, naive.embed(params, tokens), mask))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_its_definition(config):
    params = naive.random_params(config)
    logits, out = apply(config, params, TOKENS, VALID)
    for row in range(2):
        hidden = naive.forward(config, params, naive.embed(params, TOKENS[row]))
        assert_close(out.hidden[row], hidden, 1e-5)
        assert_close(logits[row], naive.logits(config, params, hidden), 1e-5)


def test_llama3_scaling_cases_all_occur():
    scaled, plain = naive.frequencies(LLAMA), naive.frequencies(dataclasses.replace(LLAMA, rope_scaling=None))
    ratio = plain / scaled
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(8.0)
    assert any(1.01 < r < 7.99 for r in ratio)


def test_residual_is_the_hidden_state_before_the_final_norm():
    params = naive.random_params(SMALL)
    _, out = apply(SMALL, params, TOKENS, VALID)
    assert_close(out.hidden, naive.norm(SMALL, params["norm"], out.residual), 1e-5)


@functools.partial(jit, static_argnums=0)
def loss_and_gradients(config, params, key=None):
    def loss(params):
        out = decoder.apply(config, params, jnp.asarray(RAGGED), jnp.asarray(HOLES), key=key)
        log_probs = jax.nn.log_softmax(decoder.head(config, params, out.hidden))
        return -jnp.where(jnp.asarray(HOLES)[..., None], log_probs * jnp.sin(jnp.arange(13.0)), 0).sum()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("key", [None, 3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("config", [dataclasses.replace(SMALL, qkv_bias=False), LLAMA], ids=["gpt2", "llama"])
def test_scan_unroll_and_remat_agree(config, key):
    # No key bias with learned positions: all scores of a row move together, so its gradient is 0 and has no scale.
    config = config if key is None else config.with_dropout(0.2)
    params = naive.random_params(config)
    key = None if key is None else jax.random.key(key)
    value, gradient = loss_and_gradients(naive.with_scan(config, False), params, key)
    for scan, remat in [(True, "none"), (True, "full"), (False, "dots")]:
        other, other_gradient = loss_and_gradients(
            dataclasses.replace(config, scan_layers=scan, remat=remat), params, key
        )
        assert_close(other, value, 1e-5)
        assert_close(other_gradient, gradient, 1e-4)


def test_gradient_is_that_of_the_definition():
    params = naive.random_params(LLAMA)

    def definition(params):
        total = 0.0
        for tokens, valid in zip(RAGGED, HOLES, strict=True):
            hidden = naive.forward(LLAMA, params, naive.embed(params, tokens[valid]))
            log_probs = jax.nn.log_softmax(naive.logits(LLAMA, params, hidden))
            total -= (log_probs * jnp.sin(jnp.arange(13.0))).sum()
        return total

    value, gradient = loss_and_gradients(LLAMA, params)
    expected, expected_gradient = jit(jax.value_and_grad(definition))(params)
    assert_close(value, expected, 1e-5)
    assert_close(gradient, expected_gradient, 1e-4)


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["learned", "rotary"])
def test_rows_with_holes_equal_unpadded_rows(config):
    params = naive.random_params(config)
    logits, out = apply(config, params, RAGGED, HOLES)
    for row in range(3):
        assert_close(logits[row, HOLES[row]], naive_logits(config, params, RAGGED[row, HOLES[row]]), 1e-5)
        assert (out.positions[row, HOLES[row]] == np.arange(HOLES[row].sum())).all()


def test_what_holes_contain_changes_no_bit():
    params = naive.random_params(SMALL)
    others = np.where(HOLES, RAGGED, (RAGGED + 5) % 13)
    ours, theirs = (apply(SMALL, params, tokens, HOLES)[0] for tokens in (RAGGED, others))
    assert (np.asarray(ours)[HOLES] == np.asarray(theirs)[HOLES]).all()


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["learned", "rotary"])
def test_embeddings_in_equal_token_ids_in(config):
    params = naive.random_params(config)
    by_token, _ = apply(config, params, TOKENS, VALID)
    by_vector, _ = apply(config, params, params["embed"]["tokens"][TOKENS], VALID)
    assert (by_token == by_vector).all()


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["learned", "rotary"])
def test_packed_segments_equal_separate_rows(config):
    params = naive.random_params(config)
    tokens, segment = TOKENS[:1], np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    logits, _ = apply(config, params, tokens, VALID[:1], positions=positions, mask=MaskSpec(segment=segment))
    for s in range(3):
        assert_close(logits[0, segment[0] == s], naive_logits(config, params, tokens[0, segment[0] == s]), 1e-5)


def test_block_mask_is_its_definition_and_opens_only_the_block():
    params = naive.random_params(SMALL)
    block = np.array([[-1, -1, 0, 0, 0, 1, 1, -1, -1]])
    mask = np.tril(np.ones((9, 9), bool))
    mask[2:5, 2:5] = mask[5:7, 5:7] = True
    logits, _ = apply(SMALL, params, TOKENS[:1], VALID[:1], mask=MaskSpec(block=block))
    assert_close(logits[0], naive_logits(SMALL, params, TOKENS[0], mask), 1e-5)
    for changed in range(9):
        tokens = TOKENS[:1].copy()
        tokens[0, changed] = (tokens[0, changed] + 1) % 13
        other, _ = apply(SMALL, params, tokens, VALID[:1], mask=MaskSpec(block=block))
        moved = (np.asarray(other) != np.asarray(logits)).any(axis=-1)[0]
        assert (moved == mask[:, changed]).all()  # more layers reach no further: the mask is transitive


def test_arbitrary_mask_is_its_definition():
    params = naive.random_params(LLAMA)
    allowed = np.random.default_rng(2).random((1, 9, 9)) < 0.5
    allowed |= np.eye(9, dtype=bool)
    for causal in (True, False):
        mask = allowed & np.tril(np.ones((9, 9), bool)) if causal else allowed
        logits, _ = apply(LLAMA, params, TOKENS[:1], VALID[:1], mask=MaskSpec(allowed=allowed, causal=causal))
        assert_close(logits[0], naive_logits(LLAMA, params, TOKENS[0], mask[0]), 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_layer_ranges_compose(scan):
    config = naive.with_scan(LLAMA, scan)
    params = naive.random_params(config)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    mask = build_mask(jnp.asarray(VALID), jnp.zeros((2, 0), bool))
    x = decoder.embed(config, params, jnp.asarray(TOKENS))
    run = jit(decoder.layers, static_argnums=0, static_argnames=("start", "stop"))
    for start, stop in ((0, 1), (1, None)):
        x, kv, _ = run(config, params, x, positions, mask, start=start, stop=stop)
        assert len(jax.tree.leaves(kv)) == 2
    _, out = apply(config, params, TOKENS, VALID)
    assert_close(x, out.residual, 1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_collected_activations_are_what_they_are_called(scan):
    config = naive.with_scan(dataclasses.replace(LLAMA, qk_norm=True), scan)
    params = naive.random_params(config)
    plain, _ = apply(config, params, RAGGED, HOLES)
    collected, out = apply(config, params, RAGGED, HOLES, collect=decoder.COLLECTABLE)
    seen = out.activations
    assert set(seen) == set(decoder.COLLECTABLE)
    assert_close(collected, plain, 1e-5)  # requesting weights takes the einsum path instead of the library's
    weights = np.asarray(seen["attention_weights"])
    assert weights.shape == (2, 3, 4, 7, 7)
    assert_close(weights.sum(axis=-1), np.ones((2, 3, 4, 7)), 1e-6)
    may_see = np.tril(np.ones((7, 7), bool)) & HOLES[:, None, :]
    rows = np.broadcast_to(HOLES[None, :, None, :], (2, 3, 4, 7))
    assert (weights[rows] == np.where(np.broadcast_to(may_see[None, :, None], weights.shape), weights, 0)[rows]).all()
    ends = [*seen["residual"][1:], out.residual]
    for i, end in enumerate(ends):
        assert_close(seen["residual"][i] + seen["attention_output"][i] + seen["mlp_output"][i], end, 1e-5)
    row = HOLES[0]
    for name in ("query", "key"):
        for i in range(2):
            turned = naive.rotary(config, seen[name][i, 0, 1, row], np.arange(row.sum()))
            assert_close(seen[f"{name}_rotated"][i, 0, 1, row], turned, 1e-5)
    values = jnp.repeat(seen["value"], 2, axis=2)  # two query heads share a value head
    mixed = jnp.einsum("lbhst,lbhte->lbshe", weights, values).reshape(2, 3, 7, -1)
    out_kernel = params["layers"]["attention_out"]["kernel"]
    assert_close(jnp.einsum("lbsf,lfd->lbsd", mixed, out_kernel), seen["attention_output"], 1e-5)


def test_unknown_activation_is_an_error_that_lists_the_known():
    params = naive.random_params(SMALL)
    with pytest.raises(ValueError, match=r"atention.*attention_weights"):
        decoder.apply(SMALL, params, jnp.asarray(TOKENS), jnp.asarray(VALID), collect=("atention",))


def test_rotary_angles_depend_on_differences_of_positions_only():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 4, 9, 8)), jnp.float32)
    scores = []
    for shift in (0, 5):
        angles = rotary_angles(LLAMA, jnp.arange(9)[None] + shift)
        turned = decoder.rotate(x, angles)
        scores.append(jnp.einsum("bhse,bhte->bhst", turned, turned))
    assert_close(scores[0], scores[1], 1e-5)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = naive.random_params(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, out = apply(config, params, TOKENS, VALID)
    assert (out.hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = apply(SMALL, params, TOKENS, VALID)
    assert_close(logits, exact, 0.05)  # eight bits of mantissa


def test_too_many_positions_is_an_error_that_says_which_parts():
    decoder.check_positions(SMALL, 16, "question and text")
    with pytest.raises(ValueError, match=r"question and text need 17 positions.*max_positions=16"):
        decoder.check_positions(SMALL, 17, "question and text")
