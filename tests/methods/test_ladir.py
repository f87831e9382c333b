"""LaDiR's training pass, data and parameters against its definition (tests/methods/ladir_definition.py)."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.methods import FlowSampler, Lengths
from latentjax.rollout import Backbone
from latentjax.sharding import RULES, batch_sharding, make_mesh, param_shardings
from latentjax.thoughts import vae
from tests.backbone import naive
from tests.close import assert_close
from tests.methods.battery import Case, loss, loss_and_gradient
from tests.methods.ladir_definition import (
    EIGHT,
    METHOD,
    VAE,
    WIDE,
    WITH_STEPS,
    L,
    N,
    Z,
    affine,
    copies,
    embed,
    forward,
    on_device,
    own,
    params,
    sequence,
    two_copies,
    variant,
    velocity_head,
)
from tests.quick import jit
from train import state as train_state


def test_one_pass_over_two_copies_equals_one_pass_for_each_block():
    batch = on_device(Case(METHOD).batch(WITH_STEPS))
    clean, noisy, t, block = copies(batch)
    dropped = jnp.arange(len(WITH_STEPS)) == 1
    at_end, text, hidden = two_copies(METHOD, params(), batch, clean, noisy, t, block, dropped)
    prediction = np.asarray(METHOD.velocity(own(), hidden, noisy, t)[0])
    for row in range(4):
        question = np.asarray(batch.question)[row][np.asarray(batch.question_mask)[row]]
        count = int(batch.thought_mask[row].sum()) // L
        blocks = list(np.asarray(clean)[row, :count])
        for copy in range(block.shape[1]):
            number = int(block[row, copy])
            if number < count:
                noise, time = np.asarray(noisy)[row, copy], float(t[row, copy])
                states = forward(*sequence(question, blocks[:number], noise, time, null=row == 1))[-L:]
                assert_close(hidden[row, copy], states, 1e-5)
                assert_close(prediction[row, copy], velocity_head(states, time), 1e-5)
        vectors, kinds = sequence(question, blocks, null=row == 1)
        words = np.asarray(batch.text)[row][np.asarray(batch.text_mask)[row]][:-1]
        states = forward([*vectors, *embed(words)], [*kinds, *[-1] * len(words)])
        assert_close(text[row, : len(words)], states[len(vectors) :], 1e-5)
        ends = [len(question) + (i + 1) * METHOD.frame - 1 for i in range(count)]
        assert_close(at_end[row, :count], states[jnp.array(ends)], 1e-5)


def test_a_block_moves_with_its_own_latents_and_not_with_those_after_it():
    batch = on_device(Case(METHOD).batch(WITH_STEPS))
    clean, noisy, t, block = copies(batch)
    arrays = (clean, noisy, t, block, jnp.zeros(len(clean), bool))
    at_end, text, hidden = two_copies(METHOD, params(), batch, *arrays)
    row, last = 0, L - 1  # a chain of three blocks
    _, _, moved = two_copies(METHOD, params(), batch, clean, noisy.at[row, 1, last].add(1.0), *arrays[2:])
    assert (np.asarray(moved[row, 1, 0]) != np.asarray(hidden[row, 1, 0])).all()  # an earlier latent of the same block
    same = np.ones(hidden.shape[:2], bool)
    same[row, 1] = False
    assert (np.asarray(moved)[same] == np.asarray(hidden)[same]).all()
    end_moved, text_moved, moved = two_copies(METHOD, params(), batch, clean.at[row, 1].add(1.0), *arrays[1:])
    changed = (np.asarray(moved) != np.asarray(hidden)).any(axis=(2, 3))
    assert changed[row].tolist() == [False, False, True, True] * 2
    assert (np.asarray(end_moved[row, 0]) == np.asarray(at_end[row, 0])).all()
    assert (np.asarray(end_moved[row, 1]) != np.asarray(at_end[row, 1])).any()
    assert (np.asarray(text_moved[row]) != np.asarray(text[row])).any()


@pytest.mark.parametrize("prediction", ["velocity", "v"])
def test_the_loss_is_that_of_the_definition_row_by_row(prediction):
    """From the hidden states of `two_copies` on; the last two rows fill the batch up and do not count."""
    case = variant(prediction=prediction, flow_weight=3, answer_weight=2.0, decision_weight=0.5)
    batch = on_device(case.batch(WITH_STEPS))
    batch = batch.replace(loss_mask=batch.loss_mask & (jnp.arange(7) < 5)[:, None])
    value, metrics = loss(case.method, params(), batch)
    clean, present = case.method.latents(params(), batch)
    draw_key = jax.random.split(jax.random.key(0), 4)[0]
    block, chosen, noise, t, there = map(np.asarray, case.method.draw_copies(clean, present, draw_key))
    along = t[..., None, None]
    noisy = (1 - along) * chosen + along * noise
    dropped = jnp.zeros(7, bool)
    at_end, text, hidden = two_copies(METHOD, params(), batch, clean, *map(jnp.asarray, (noisy, t, block)), dropped)
    wanted = {"velocity": noise - chosen, "v": (1 - along) * noise - along * chosen}[prediction]
    parts = {name: [] for name in ("flow", "answer", "decision", "token_accuracy", "decision_accuracy")}
    for row in range(5):
        count = len(WITH_STEPS[row].steps)
        errors = []
        for copy in range(block.shape[1]):
            assert there[row, copy] == (block[row, copy] < count)
            if there[row, copy]:
                assert (chosen[row, copy] == clean[row, block[row, copy]]).all()
                found = velocity_head(hidden[row, copy], float(t[row, copy]))
                errors.append(((found - wanted[row, copy]) ** 2).mean())
        assert len(errors) == 2 * count  # each block as often as `draws` says
        parts["flow"].append(np.mean(errors))
        words = case.codec.answer(WITH_STEPS[row])
        scores = np.asarray(naive.logits(WIDE, params()["backbone"], text[row, : len(words)]), np.float64)
        parts["answer"].append(
            np.mean([np.log(np.exp(at).sum()) - at[word] for at, word in zip(scores, words, strict=True)])
        )
        parts["token_accuracy"].append(np.mean(scores.argmax(axis=1) == words))
        decisions = affine(own()["decision"], at_end[row, :count])
        right = [0] * (count - 1) + [1]
        parts["decision"].append(
            np.mean([np.log(np.exp(d).sum()) - d[i] for d, i in zip(decisions, right, strict=True)])
        )
        parts["decision_accuracy"].append(np.mean(decisions.argmax(axis=1) == right))
    expected = {name: np.mean(values) for name, values in parts.items()}
    expected["loss"] = 3 * expected["flow"] + 2 * expected["answer"] + 0.5 * expected["decision"]
    assert set(metrics) == {*expected, "targets"}
    assert float(metrics["targets"]) == 5
    assert float(value) == float(metrics["loss"])
    for name, right in expected.items():
        assert float(metrics[name]) == pytest.approx(right, rel=1e-4), name


def test_copies_of_random_blocks_are_of_blocks_that_there_are_equally_often():
    method = dataclasses.replace(METHOD, layout="random_block", draws=3000)
    present = jnp.arange(N) < jnp.array([1, 3, 4])[:, None]
    clean = jnp.arange(3.0)[:, None, None, None] * 10 + jnp.broadcast_to(jnp.arange(4.0)[:, None, None], (3, N, L, Z))
    block, chosen, noise, t, there = map(np.asarray, method.draw_copies(clean, present, jax.random.key(0)))
    assert there.all()
    for row, count in enumerate((1, 3, 4)):
        share = np.bincount(block[row], minlength=N) / 3000
        assert share == pytest.approx([1 / count] * count + [0] * (N - count), abs=0.05)
        assert (chosen[row] == (10 * row + block[row])[:, None, None]).all()
        assert np.abs(np.corrcoef(block[row], t[row])[0, 1]) < 0.1 if count > 1 else True
    assert noise.std() == pytest.approx(1, rel=0.02)
    assert t.mean() == pytest.approx(0.5, abs=0.02)


def test_the_flow_loss_of_random_blocks_is_on_average_that_of_all_blocks():
    batch = Case(METHOD).batch(WITH_STEPS)
    found = {}
    for layout, draws in (("all_blocks", 2), ("random_block", 8)):
        method = dataclasses.replace(METHOD, layout=layout, draws=draws)
        found[layout] = np.array([float(loss(method, params(), batch, key)[1]["flow"]) for key in range(60)])
    (all_mean, all_error), (mean, error) = ((x.mean(), x.std() / np.sqrt(len(x))) for x in found.values())
    assert abs(mean - all_mean) < 4 * np.hypot(error, all_error) < 0.1 * all_mean


def test_training_drops_questions_and_validation_does_not():
    batch = Case(METHOD).batch(WITH_STEPS)
    unguided = FlowSampler(3, guidance=1)
    never, often = (variant(null_probability=p, sampler=unguided).method for p in (0, 0.9))
    plain = loss(never, params(), batch)[0]
    assert float(loss(often, params(), batch)[0]) == float(plain)
    assert_close(loss(never, params(), batch, train=True)[0], plain, 1e-6)  # nothing else is drawn: dropout is 0
    assert abs(float(loss(often, params(), batch, train=True)[0]) - float(plain)) > 1e-3


def test_more_padding_and_scanned_layers_change_nothing():
    backbone = dataclasses.replace(WIDE, scan_layers=True)
    wide = variant(backbone=backbone, lengths=Lengths(9, 8), vae=dataclasses.replace(VAE, lengths=Lengths(9, 6)))
    value, gradient = loss_and_gradient(METHOD, params(), Case(METHOD).batch(EIGHT))
    other, other_gradient = loss_and_gradient(wide.method, params(), wide.batch(EIGHT))
    assert_close(other, value, 1e-5)
    assert_close(other_gradient, gradient, 1e-4)
    trained = train_state.trained_part(gradient, METHOD.untrained)
    unread = ("null", "start")  # nothing is dropped in validation
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        name = jax.tree_util.keystr(path)
        assert (leaf != 0).any() or any(word in name for word in unread), name
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["method"]["vae"]))  # the VAE is stopped


def test_sharded_equals_single_device():
    batch = Case(METHOD).batch(EIGHT)
    expected = loss_and_gradient(METHOD, params(), batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params(), param_shardings(mesh, params()))
    split = jax.device_put(batch, batch_sharding(mesh))
    assert_close(jax.block_until_ready(loss_and_gradient(METHOD, placed, split)), expected, 1e-4)


# ---- data, parts and parameters


def test_a_batch_holds_question_blocks_and_answer_and_is_the_announced_shape():
    case = Case(METHOD)
    batch = case.batch(WITH_STEPS)
    answer = case.codec.tokenizer.token_id("<|answer|>")
    for row, example in enumerate(WITH_STEPS):
        text = batch.text[row][batch.text_mask[row]].tolist()
        assert text == [answer, *case.codec.answer(example)]
        assert batch.loss_mask[row].tolist() == [0 < i < len(text) for i in range(5)]
        assert batch.thought_mask[row].sum() == L * len(example.steps)
    tokens, mask = VAE.block_arrays(WITH_STEPS, case.codec)
    chex.assert_trees_all_equal(batch.extra, {"blocks": tokens, "blocks_mask": mask})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert shapes == METHOD.batch_shapes(7, 0)
    silent = variant(answer_weight=0, answer_from="decoder").batch(WITH_STEPS)
    assert silent.text[:, :2].tolist() == [[answer, case.codec.tokenizer.eos_id]] * 7
    assert silent.text_mask.sum(axis=1).tolist() == [2] * 7


def test_statistics_of_the_latents_are_those_of_all_blocks_of_all_batches():
    case = Case(METHOD)
    rows = [on_device(case.batch(examples)) for examples in (WITH_STEPS[:4], WITH_STEPS[3:])]
    sums = functools.reduce(
        functools.partial(jax.tree.map, jnp.add), [METHOD.measure(params(), batch) for batch in rows]
    )
    means = []
    for batch in rows:
        tokens, mask = (batch.extra[name].reshape(-1, 4) for name in ("blocks", "blocks_mask"))
        own_vae = own()["vae"]["method"]
        q = vae.posterior(
            Backbone(VAE.backbone, own_vae["encoder"]), own_vae, tokens, mask & jnp.roll(mask, -1, axis=1)
        )
        means.append(np.asarray(q.mean)[np.asarray(mask.any(axis=1))])
    means = np.concatenate(means)
    assert int(sums.count) == len(means)
    measured = METHOD.with_measured(params(), sums)
    found = measured["method"]["latents"]
    assert_close(found["mean"], means.mean(axis=0), 1e-5)
    assert (means.std(axis=0) > 0.1).all()
    assert_close(found["std"], means.std(axis=0), 1e-5)
    chex.assert_trees_all_equal(measured | {"method": measured["method"] | {"latents": own()["latents"]}}, params())
    clean, _ = METHOD.latents(measured, rows[0])
    raw, _ = METHOD.latents(params(), rows[0])
    undone = raw * own()["latents"]["std"] + own()["latents"]["mean"]
    assert_close(clean, (undone - means.mean(axis=0)) / means.std(axis=0), 1e-4)
    plain = variant(normalise=False).method
    chex.assert_trees_all_equal(plain.with_measured(params(), sums), params())


def test_a_unit_that_does_not_vary_keeps_its_scale_and_a_vae_without_others_is_refused():
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((50, L, Z)), jnp.float32)
    latents = latents.at[:, 0, 1:].multiply(0.01).at[:, 1].set(2.0)
    sums = vae.moments(latents, jnp.ones(50, bool))
    std = np.asarray(METHOD.with_measured(params(), sums)["method"]["latents"]["std"])
    assert std[0, 0] == pytest.approx(float(latents[:, 0, 0].std()), rel=1e-4)
    assert (std.reshape(-1)[1:] == 1).all()
    sums = vae.moments(latents * 0.05, jnp.ones(50, bool))
    for method in (METHOD, variant(normalise=False).method):
        with pytest.raises(ValueError, match="VAE has collapsed: 0 of 8 latent units vary over 50 blocks.*free_bits"):
            method.with_measured(params(), sums)


@pytest.mark.parametrize(("init", "scale"), [("gpt2", 0.02), ("unit", 1.0)])
def test_markers_and_null_question_are_as_large_as_embeddings(init, scale):
    backbone = dataclasses.replace(WIDE, init=init, width=64, heads=4)
    method = variant(backbone=backbone).method
    made = jit(lambda key: {name: method.init(key)[name] for name in ("markers", "null", "head")})(jax.random.key(0))
    drawn = np.concatenate([made["markers"].ravel(), made["null"]])
    assert drawn.std() == pytest.approx(scale, rel=0.25)
    embeddings = jit(lambda key: decoder.init(backbone, key)["embed"]["tokens"])(jax.random.key(1))
    assert np.asarray(embeddings).std() == pytest.approx(scale, rel=0.1)
    assert not made["head"]["modulation"]["kernel"].any()  # at first every time is treated alike


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"method\.steps=10 and method\.epochs=3"),
        ({"draws": 0}, r"method\.draws=0: must be at least 1"),
        ({"flow_weight": -1}, r"method\.flow_weight=-1: must not be negative"),
        ({"null_probability": 1}, r"method\.null_probability=1"),
        ({"answer_weight": 0}, r"method\.answer_weight=0: .*answer_from='decoder'"),
        ({"null_probability": 0}, r"method\.sampler\.guidance=2\.0: .*null_probability=0 never trains; set guidance=1"),
        (
            {"rollout_steps": 2, "answer_weight": 0, "answer_from": "decoder"},
            r"method\.rollout_steps=2: .*set answer_weight",
        ),
        (
            {"vae": dataclasses.replace(VAE, latent_width=17)},
            r"method\.vae\.latent_width=17: must not exceed backbone\.width=16",
        ),
        (
            {"vae": dataclasses.replace(VAE, backbone=dataclasses.replace(WIDE, vocab_size=20))},
            r"method\.vae\.backbone\.vocab_size=20: .*backbone\.vocab_size=16",
        ),
        (
            {"vae": dataclasses.replace(VAE, max_blocks=18)},
            r"question=7, 18 blocks of 4 with their markers and method\.lengths\.text=5 need 84 positions",
        ),
    ],
)
def test_fields_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHOD, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"sampler\.steps=0|steps=0"),
        ({"guidance": -1}, r"sampler\.guidance=-1: must not be negative"),
        ({"repulsion_form": "strong"}, r"sampler\.repulsion_form='strong'"),
    ],
)
def test_samplers_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowSampler(**changes)


def test_parameters_are_split_as_meant():
    """Nested backbones as any backbone; what goes from and to latents along the model's width only."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    backbone = dataclasses.replace(WIDE, tied_head=False)
    method = variant(backbone=backbone, vae=dataclasses.replace(VAE, backbone=backbone)).method
    shapes = jax.eval_shape(lambda: train_state.init_params(method, 0))
    specs = dict(
        zip(
            train_state.parameter_paths(shapes),
            (tuple(s.spec) for s in jax.tree.leaves(param_shardings(mesh, shapes))),
            strict=True,
        )
    )
    for prefix in ("method/vae/backbone/", "method/vae/method/encoder/"):
        nested = {path.removeprefix(prefix): spec for path, spec in specs.items() if path.startswith(prefix)}
        assert nested == {p.removeprefix("backbone/"): s for p, s in specs.items() if p.startswith("backbone/")}
    assert specs["method/vae/backbone/head/kernel"] == ("fsdp", "tensor")
    expected = {
        "vae/method/decompress/kernel": (None, "fsdp"), "vae/method/mean/kernel": ("fsdp", None),
        "vae/method/log_variance/kernel": ("fsdp", None), "latent_in/kernel": (None, "fsdp"),
        "decision/kernel": ("fsdp", None), "head/out/kernel": ("fsdp", None), "head/modulation/kernel": ("tensor", "fsdp"),
        "time/in/kernel": (None, "tensor"), "time/in/bias": ("tensor",), "time/out/kernel": ("tensor", "fsdp"),
        "head_time/in/kernel": (None, "tensor"), "head_time/in/bias": ("tensor",),
        "head_time/out/kernel": ("tensor", "fsdp"),
    }  # fmt: skip
    rest = {
        path.removeprefix("method/"): spec for path, spec in specs.items()
        if path.startswith("method/") and "/backbone/" not in path and "/encoder/" not in path
    }  # fmt: skip
    for path, spec in rest.items():
        assert spec == expected.pop(path, ()), path
        matching = [pattern for pattern, _ in RULES if re.search(pattern, "method/" + path)]
        assert len(matching) == (spec != ()), path  # no rule hides another
    assert not expected
