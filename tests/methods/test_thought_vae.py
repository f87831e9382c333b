"""The VAE's data, its loss against numpy, and reconstruction against the metric that foretells it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentjax.backbone.config import Lora
from latentjax.methods import Lengths, ThoughtVAE
from latentjax.rollout import Intervention, Kind, Prefix
from latentjax.sampling import Sampling
from latentjax.sharding import batch_sharding, make_mesh, param_shardings
from latentjax.tasks.base import Example
from latentjax.thoughts import vae
from tests.backbone import naive
from tests.close import assert_close
from tests.methods.battery import BACKBONE, EXAMPLES, Case, loss, loss_and_gradient
from tests.quick import jit
from train import state as train_state
from train.config import Optimizer

WITH_STEPS = tuple(example for example in EXAMPLES if example.steps)
METHOD = ThoughtVAE(
    BACKBONE, Lengths(7, 4), steps=10, latents=2, latent_width=4, max_blocks=4, beta=0.3, noise=0.5, substitution=0.2
)
L, Z = METHOD.latents, METHOD.latent_width


def variant(**changes):
    return Case(dataclasses.replace(METHOD, **changes))


def random_params(method):
    return naive.random_like(jax.eval_shape(lambda: train_state.init_params(method, 0)))


@functools.cache
def params():
    return random_params(METHOD)


@functools.partial(jit, static_argnums=0, static_argnames="sampling")
def generate(method, params, prompts, key=0, sampling=Sampling()):
    return method.generate(params, prompts, jax.random.key(key), sampling=sampling)


@functools.cache
def trained():
    """Parameters with which some blocks come back and others do not."""
    case = variant(noise=0.1, substitution=0, beta=1e-3, train_decoder=True)
    batch, optimizer = jax.device_put(case.batch(WITH_STEPS)), optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(lambda p: case.method.loss(p, batch, key, {}, train=True)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 40)
    return jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])(params())


# ---- data


@pytest.mark.parametrize("size", [1, 2, None])
def test_blocks_are_the_steps_by_that_many_each_with_an_end(size):
    case = variant(steps_per_block=size, lengths=Lengths(7, 9))
    tokens, mask = case.method.block_arrays(WITH_STEPS, case.codec)
    assert tokens.shape == mask.shape == (7, 4, 9)
    eos, pad = case.codec.tokenizer.eos_id, case.codec.tokenizer.pad_id
    for row, example in enumerate(WITH_STEPS):
        steps = [case.codec.tokenizer.encode(step) for step in example.steps]
        groups = [steps] if size is None else [steps[i : i + size] for i in range(0, len(steps), size)]
        expected = [[*(token for step in group for token in step), eos] for group in groups]
        assert [
            block[kept].tolist() for block, kept in zip(tokens[row], mask[row], strict=True) if kept.any()
        ] == expected
        assert (mask[row].sum(axis=1)[: len(expected)] > 0).all()
        assert (tokens[row][~mask[row]] == pad).all()


def test_a_batch_holds_the_blocks_and_is_the_announced_shape():
    case = Case(METHOD)
    batch = case.batch(WITH_STEPS)
    tokens, mask = METHOD.block_arrays(WITH_STEPS, case.codec)
    assert (batch.text.reshape(tokens.shape) == tokens).all()
    assert (batch.text_mask.reshape(tokens.shape) == mask).all()
    assert (batch.loss_mask == batch.text_mask).all()
    counts = [len(example.steps) for example in WITH_STEPS]
    assert (batch.thought_mask == (np.arange(8) < L * np.array(counts)[:, None])).all()
    question = [case.codec.question(example) for example in WITH_STEPS]
    assert [row[kept].tolist() for row, kept in zip(batch.question, batch.question_mask, strict=True)] == question
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert shapes == METHOD.batch_shapes(7, 0)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({}, (), r"example 1 \('1 2'\) has no steps"),
        ({}, ("1",) * 5, r"example 1 .* has 5 steps, 5 blocks, but max_blocks=4.*steps_per_block=1"),
        ({"steps_per_block": 2}, ("1",) * 9, r"has 9 steps, 5 blocks, but max_blocks=4.*steps_per_block=2"),
        ({}, ("1", "1 2 3 4"), r"has a block of 5 tokens with its end, but lengths.text=4"),
        ({"steps_per_block": None}, ("1",), r"example 0 .* has a block of 6 tokens with its end, but lengths.text=4"),
    ],
)
def test_examples_that_do_not_fit_are_named(changes, steps, message):
    examples = (WITH_STEPS[0], Example("1 2", steps, "3", {}))
    with pytest.raises(ValueError, match=message):
        variant(**changes).batch(examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"method\.steps=10 and method\.epochs=3"),
        ({"latents": 0}, r"method\.latents=0: must be at least 1"),
        ({"steps_per_block": 0}, r"method\.steps_per_block=0"),
        ({"noise": -1}, r"method\.noise=-1: must not be negative"),
        ({"substitution": 1}, r"method\.substitution=1: a probability"),
        ({"posterior": "deterministic", "free_bits": 1}, r"method\.free_bits=1: posterior='deterministic'"),
        ({"encoder": dataclasses.replace(BACKBONE, vocab_size=20)}, r"method\.encoder\.vocab_size=20: .*vocab_size=16"),
        ({"encoder": dataclasses.replace(BACKBONE, width=8)}, r"method\.encoder\.width=8: .*backbone\.width=16"),
        ({"lengths": Lengths(7, 38)}, r"decoder's method\.lengths\.text=38, latents=2 .* need 41 .*max_positions=40"),
        (
            {"lengths": Lengths(7, 32), "encoder_sees_question": True},
            r"encoder's method\.lengths\.text=32, latents=2 and 7 .* need 41",
        ),
    ],
)
def test_fields_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHOD, **changes)


# ---- loss


def recomputed(method, params, examples, codec):
    """Loss and metrics block by block, from the posterior and the logits of each block alone (tests/thoughts/test_vae.py)."""
    parts, own = [], params["method"]
    vocabulary = np.arange(BACKBONE.vocab_size)

    def logits_of(row, mean):
        start = vae.linear(own["decompress"], jnp.concatenate([jnp.asarray(mean), own["start"]]))
        x = jnp.concatenate([start, naive.embed(params["backbone"], row[:-1])])
        hidden = naive.forward(BACKBONE, params["backbone"], x)
        return np.asarray(naive.logits(BACKBONE, params["backbone"], hidden)[L:], np.float64)

    def mean_nll(row, mean):
        return np.mean([np.log(np.exp(at - at[i]).sum()) for at, i in zip(logits_of(row, mean), row, strict=True)])

    for rows in method.blocks(examples, codec):
        for row in rows:
            text = codec.tokenizer.decode(row[:-1])
            assert row[:-1] == codec.tokenizer.encode(text)
            x = jnp.concatenate([naive.embed(own["encoder"], row[:-1]), vae.linear(own["decompress"], own["queries"])])
            hidden = naive.forward(BACKBONE, own["encoder"], x)[-L:]
            mean, spread = (np.asarray(vae.linear(own[name], hidden)) for name in ("mean", "log_variance"))
            logits = logits_of(row, mean)
            right = [vocabulary[at.argmax()] == i for at, i in zip(logits, row, strict=True)]
            charge = {
                "gaussian": 0.5 * (mean**2 + np.exp(spread) - spread - 1).sum(axis=1),
                "sigma": (mean**2).sum(axis=1),
                "deterministic": np.zeros(L),
            }[method.posterior]
            parts.append(
                (mean_nll(row, mean), charge, np.mean(right), all(right), mean, functools.partial(mean_nll, row))
            )
    reconstruction = np.mean([part[0] for part in parts])
    free = np.mean([np.maximum(part[1] - method.free_bits, 0).sum() / (L * Z) for part in parts])
    std = np.std([part[4] for part in parts], axis=0)
    # With the latents of the block before, of the first those of the last.
    exchanged = [part[5](parts[number - 1][4]) for number, part in enumerate(parts)]
    return {
        "shuffle_gap": np.mean(exchanged) - reconstruction,
        "loss": reconstruction + method.beta * free,
        "token_accuracy": np.mean([part[2] for part in parts]),
        "targets": len(parts),
        "reconstruction": reconstruction,
        "exact": np.mean([part[3] for part in parts]),
        "divergence": np.mean([part[1].mean() for part in parts]),
        "active_units": (std**2 >= 0.01).sum(),
        "latent_std": np.sqrt((std**2).mean()),
    }


@pytest.mark.parametrize(
    "changes",
    [{"free_bits": 1.0}, {"posterior": "sigma", "beta": 1}, {"posterior": "deterministic"}],
    ids=["gaussian", "sigma", "deterministic"],
)
def test_the_loss_is_the_mean_over_blocks_of_the_definition(changes):
    case = variant(**changes)
    value, metrics = loss(case.method, trained(), case.batch(WITH_STEPS))
    expected = recomputed(case.method, trained(), WITH_STEPS, case.codec)
    if case.method.free_bits:
        whole = recomputed(variant(free_bits=0).method, trained(), WITH_STEPS, case.codec)
        assert 0 < expected["loss"] - expected["reconstruction"] < whole["loss"] - whole["reconstruction"]
    assert float(value) == float(metrics["loss"])
    assert set(metrics) == set(expected)
    for name, right in expected.items():
        assert float(metrics[name]) == pytest.approx(right, rel=1e-4), name


def test_rows_without_targets_do_not_count():
    batch = Case(METHOD).batch(WITH_STEPS)
    filled = batch.replace(loss_mask=batch.loss_mask & (np.arange(7) < 5)[:, None])
    fewer = jax.tree.map(lambda x: x[np.array([0, 1, 2, 3, 4, 0, 1])], batch)
    fewer = fewer.replace(loss_mask=fewer.loss_mask & (np.arange(7) < 5)[:, None])
    value, metrics = loss(METHOD, params(), filled)
    assert float(metrics["targets"]) == sum(len(example.steps) for example in WITH_STEPS[:5])
    alone = loss(METHOD, params(), fewer)
    assert_close((value, metrics), alone, 1e-6)
    assert float(loss(METHOD, params(), batch)[0]) != float(value)


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "sigma"])
def test_training_hides_tokens_from_the_encoder_and_adds_noise_behind_it(monkeypatch, kind):
    """What the two transformers are given, and that validation gives them neither."""
    case, seen = variant(posterior=kind, free_bits=0, noise=0.5, substitution=0.4), {}
    batch = jax.device_put(case.batch(WITH_STEPS))
    text = batch.text.reshape(-1, 4)
    posterior, token_logits = vae.posterior, vae.token_logits

    def encoder(backbone, own, tokens, mask, key):
        q = posterior(backbone, own, tokens, mask, key)
        seen.update(tokens=tokens, mask=mask, mean=q.mean, std=jnp.exp(q.log_variance / 2))
        return q

    def decoder(backbone, own, z, tokens, mask, key=None):
        seen.setdefault("noise", z - seen["mean"])
        seen.update(targets=tokens)
        return token_logits(backbone, own, z, tokens, mask, key)

    @functools.partial(jit, static_argnums=0)
    def given(train):
        seen.clear()
        case.method.loss(params(), batch, jax.random.key(0), {}, train=train)
        return dict(seen)

    monkeypatch.setattr(vae, "posterior", encoder)
    monkeypatch.setattr(vae, "token_logits", decoder)
    seen = jax.device_get(given(True))
    assert (seen["targets"] == text).all()
    ends = np.asarray(text) == case.codec.tokenizer.eos_id
    assert not (seen["mask"] & ends).any()  # it does not read where a block ends
    assert seen["mask"].sum() == np.asarray(batch.text_mask).sum() - ends.sum()
    # Of replaced tokens one in 16 is what it was.
    assert (seen["tokens"] != text).mean() == pytest.approx(0.4 * 15 / 16, abs=0.15)
    drawn = {"deterministic": 0.0, "gaussian": (seen["std"] ** 2).mean(), "sigma": 0.75**2}[kind]  # by the posterior
    assert seen["noise"].std() == pytest.approx((0.5**2 + drawn) ** 0.5, rel=0.2)
    assert abs(seen["noise"].mean()) < 0.15
    seen = jax.device_get(given(False))
    assert (seen["tokens"] == text).all() and not seen["noise"].any()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_dropout_is_on_in_training_and_in_a_decoder_only_if_it_trains(part):
    noisy = dataclasses.replace(BACKBONE, residual_dropout=0.5)
    backbones = (
        {"encoder": noisy, "backbone": BACKBONE} if part == "encoder" else {"encoder": BACKBONE, "backbone": noisy}
    )
    batch = jax.device_put(Case(METHOD).batch(WITH_STEPS))

    @functools.partial(jit, static_argnums=(0, 1))
    def value(train_decoder, train):
        method = dataclasses.replace(
            METHOD,
            **backbones,
            posterior="deterministic",
            noise=0,
            substitution=0,
            free_bits=0,
            train_decoder=train_decoder,
        )
        return method.loss(params(), batch, jax.random.key(0), {}, train=train)[0]

    plain = float(value(True, False))
    assert abs(float(value(True, True)) - plain) > 1e-3
    frozen = float(value(False, True))
    assert (abs(frozen - plain) < 1e-5) == (part == "decoder")


def test_more_padding_and_scanned_layers_change_nothing():
    case = variant(encoder_sees_question=True)
    backbone = dataclasses.replace(BACKBONE, scan_layers=True)
    wide = variant(encoder_sees_question=True, backbone=backbone, lengths=Lengths(9, 6))
    value, gradient = loss_and_gradient(case.method, params(), case.batch(WITH_STEPS))
    other, other_gradient = loss_and_gradient(wide.method, params(), wide.batch(WITH_STEPS))
    assert_close(other, value, 1e-5)
    assert_close(other_gradient, gradient, 1e-4)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    blind = loss(METHOD, params(), Case(METHOD).batch(WITH_STEPS))[0]
    assert float(blind) != float(value)  # the question is read


def test_sharded_equals_single_device():
    batch = Case(METHOD).batch((*WITH_STEPS, WITH_STEPS[0]))
    expected = loss_and_gradient(METHOD, params(), batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params(), param_shardings(mesh, params()))
    split = jax.device_put(batch, batch_sharding(mesh))
    assert_close(jax.block_until_ready(loss_and_gradient(METHOD, placed, split)), expected, 1e-4)


# ---- reconstruction


def blocks_of(out, row):
    """The generated tokens of each block of a row, up to the last that holds any."""
    text = np.asarray(out.tokens)[row, -16:].reshape(4, 4)
    kept = np.asarray(out.kind)[row, -16:].reshape(4, 4) == Kind.TEXT
    return [block[mask].tolist() for block, mask in zip(text, kept, strict=True)]


@pytest.mark.parametrize("question", [False, True], ids=["blocks alone", "with the question"])
def test_the_metric_exact_says_which_blocks_come_back(question):
    case = variant(encoder_sees_question=question)
    out = generate(case.method, trained(), case.prompts(WITH_STEPS))
    expected = case.method.blocks(WITH_STEPS, case.codec)
    same = [
        found == block[:-1]
        for row, blocks in enumerate(expected)
        for found, block in zip(blocks_of(out, row), blocks, strict=False)
    ]
    _, metrics = loss(case.method, trained(), case.batch(WITH_STEPS))
    assert np.mean(same) == pytest.approx(float(metrics["exact"]), abs=1e-6)
    assert 0 < np.mean(same) < 1 or question
    for row, blocks in enumerate(expected):
        assert blocks_of(out, row)[len(blocks) :] == [[]] * (4 - len(blocks))
    assert np.asarray(out.thought_mask).sum(axis=1).tolist() == [L * len(blocks) for blocks in expected]


def test_reconstruction_costs_what_it_runs():
    """Blocks of a row are decoded side by side: forwards are those of the longest."""
    out = generate(METHOD, trained(), Case(METHOD).prompts(WITH_STEPS))
    for row, blocks in enumerate(METHOD.blocks(WITH_STEPS, Case(METHOD).codec)):
        made = [min(len(found) + 1, 4) for found in blocks_of(out, row)[: len(blocks)]]  # with the end, if it comes
        read = sum(len(block) - 1 + L for block in blocks)
        assert int(out.cost.forwards[row]) == 1 + max(made)
        assert int(out.cost.positions[row]) == read + sum(L + n for n in made)
        assert int(out.cost.answer_tokens[row]) == sum(made)


def test_reconstruction_samples_and_takes_no_part_in_a_rollout():
    prompts, draw = Case(METHOD).prompts(WITH_STEPS), Sampling(temperature=3.0)
    one, other = (generate(METHOD, trained(), prompts, key, sampling=draw).tokens for key in (1, 2))
    assert (one != other).any()
    zeros = jnp.zeros((7, 8))
    for name, value in {
        "thoughts": 2,
        "record": ("kv",),
        "prefix": Prefix(zeros, zeros),
        "intervention": Intervention(zeros, zeros, zeros),
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: a ThoughtVAE reconstructs"):
            METHOD.generate(params(), prompts, jax.random.key(0), **{name: value})


# ---- what trains, and where it starts


def test_a_decoder_that_does_not_train_has_no_optimiser_state():
    own = len(jax.tree.leaves(params()["method"]))
    for method, count in ((METHOD, own), (variant(train_decoder=True).method, len(jax.tree.leaves(params())))):
        state = train_state.create(params(), Optimizer().build(4), seed=0, ema=True, untrained=method.untrained)
        assert len(jax.tree.leaves(state.ema)) == count
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        assert len(moments) == 2 * count
        chex.assert_trees_all_equal(state.average, params())
    assert set(train_state.trained_part(params(), METHOD.untrained)) == {"method"}


def test_the_encoder_starts_from_published_weights_and_keeps_its_own_adapters():
    published = {"backbone": naive.random_params(BACKBONE, seed=8)}
    adapted = METHOD.adapt(params(), published)["method"]
    chex.assert_trees_all_equal(adapted["encoder"], published["backbone"])
    chex.assert_trees_all_equal(adapted["mean"], params()["method"]["mean"])
    with_adapters = dataclasses.replace(BACKBONE, lora=Lora(2, 3.0))
    case = variant(backbone=with_adapters)
    start = random_params(case.method)
    encoder = case.method.adapt(start, published)["method"]["encoder"]
    chex.assert_trees_all_equal_shapes(encoder, start["method"]["encoder"])
    kernel, theirs = encoder["layers"]["query"], published["backbone"]["layers"]["query"]
    chex.assert_trees_all_equal(kernel["kernel"], theirs["kernel"])
    chex.assert_trees_all_equal(kernel["lora_a"], start["method"]["encoder"]["layers"]["query"]["lora_a"])
    # Another precision, dropout or compilation is the same model.
    stored = dataclasses.replace(BACKBONE, param_dtype="bfloat16", dtype="bfloat16", residual_dropout=0.1, remat="full")
    case = variant(encoder=stored)
    start = random_params(case.method)
    start["method"]["encoder"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start["method"]["encoder"])
    encoder = case.method.adapt(start, published)["method"]["encoder"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), published["backbone"])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(encoder["layers"]["query"]))
    chex.assert_trees_all_equal(encoder["layers"]["query"], half["layers"]["query"])
    smaller = variant(encoder=dataclasses.replace(BACKBONE, layers=1))
    start = random_params(smaller.method)
    chex.assert_trees_all_equal(smaller.method.adapt(start, published), start)  # another model: nothing to copy
