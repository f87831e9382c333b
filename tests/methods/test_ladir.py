"""LaDiR against its definition: one sequence at a time, no cache, no padding (tests/backbone/naive.py)."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import decoder
from latentjax.generation import think
from latentjax.methods import FlowSampler, LaDiR, Lengths, ThoughtVAE
from latentjax.rollout import MAIN, Backbone, Intervention, Kind, Prefix, frozen, prefill, run, start
from latentjax.sharding import RULES, batch_sharding, make_mesh, param_shardings
from latentjax.thoughts import flow, vae
from tests.backbone import naive
from tests.close import assert_close
from tests.methods.battery import BACKBONE, EXAMPLES, Case
from tests.quick import jit
from train import state as train_state

WITH_STEPS = tuple(example for example in EXAMPLES if example.steps)
EIGHT = (*WITH_STEPS, WITH_STEPS[0])  # as many as devices
WIDE = dataclasses.replace(BACKBONE, max_positions=80)
VAE = ThoughtVAE(
    dataclasses.replace(WIDE, layers=1),
    Lengths(7, 4),
    steps=10,
    latents=2,
    latent_width=4,
    max_blocks=4,
    train_decoder=True,
)
METHOD = LaDiR(WIDE, Lengths(7, 5), vae=VAE, steps=10, draws=2, sampler=FlowSampler(3, guidance=2.0))
# Layers in a scan compile faster, and have the other layout of a cache.
PLAIN = dataclasses.replace(
    METHOD, backbone=dataclasses.replace(WIDE, scan_layers=True), sampler=FlowSampler(3, guidance=1, noise_scale=1)
)
BUDGET = dataclasses.replace(PLAIN, stop="budget")
L, Z, N = VAE.latents, VAE.latent_width, VAE.max_blocks
LONGEST = 32  # positions of the longest sequence; one program for all


def variant(**changes):
    return Case(dataclasses.replace(METHOD, **changes))


@functools.cache
def params():
    made = naive.random_like(jax.eval_shape(lambda: train_state.init_params(METHOD, 0)))
    made["method"]["latents"]["std"] = jnp.abs(made["method"]["latents"]["std"]) + 0.5
    made["method"]["decision"]["bias"] = jnp.zeros(2)
    return made


def own():
    return params()["method"]


# ---- the definition


def affine(weights, x):
    return np.asarray(x, np.float64) @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"])


def silu(x):
    return x / (1 + np.exp(-x))


def time_embedding(weights, t):
    angles = [1000 * t * np.exp(-np.log(10000) * i / 128) for i in range(128)]
    return affine(weights["out"], silu(affine(weights["in"], np.concatenate([np.cos(angles), np.sin(angles)]))))


def velocity_head(hidden, t):
    """u = W' ((1 + scale) norm(h) + shift) + b' of hidden states [L, D]."""
    hidden = np.asarray(hidden, np.float64)
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    shift, scale = np.split(affine(own()["head"]["modulation"], silu(time_embedding(own()["head_time"], t))), 2)
    return affine(own()["head"]["out"], (1 + scale) * normed + shift)


def forward(vectors, block):
    """Hidden states [T, D] of one sequence of vectors, positions counted up, latents of one block seeing each other."""
    length, block = len(vectors), np.asarray(block)
    mask = np.eye(LONGEST, dtype=bool)
    mask[:length, :length] = np.tril(np.ones((length, length), bool)) | (
        (block[:, None] == block) & (block[:, None] >= 0)
    )
    x = np.zeros((LONGEST, WIDE.width), np.float32)
    x[:length] = np.stack(vectors)
    return naive.forward(WIDE, params()["backbone"], jnp.asarray(x), mask)[:length]


def embed(tokens):
    return np.asarray(params()["backbone"]["embed"]["tokens"])[np.asarray(tokens)]


def sequence(question, blocks, noisy=None, t=None, null=False):
    """Vectors and block numbers: question, finished blocks, and a noisy one behind its marker and time."""
    vectors, block = list(embed(question)), [-1] * len(question)
    if null:
        vectors[1:] = [np.asarray(own()["null"])] * (len(question) - 1)
    begin, end = np.asarray(own()["markers"])
    for number, z in enumerate(blocks):
        vectors += [begin, *affine(own()["latent_in"], z), end]
        block += [-1, *[number] * L, -1]
    if noisy is not None:
        vectors += [begin, time_embedding(own()["time"], t), *affine(own()["latent_in"], noisy)]
        block += [-1, -1, *[99] * L]
    return vectors, block


def velocity(question, blocks, noisy, t, null=False):
    return velocity_head(forward(*sequence(question, blocks, noisy, t, null))[-L:], t)


# ---- training


@functools.partial(jit, static_argnums=0)
def two_copies(method, params, batch, *arrays):
    return method.two_copies(params, batch, *arrays)


@functools.partial(jit, static_argnums=0, static_argnames="train")
def loss(method, params, batch, key=0, *, train=False):
    return method.loss(params, batch, jax.random.key(key), {}, train=train)


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(method, params, batch):
    return jax.value_and_grad(lambda p: method.loss(p, batch, jax.random.key(0), {}, train=False)[0])(params)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def copies(batch, seed=0):
    """Clean latents of the batch, noisy copies of all blocks twice over, times and block numbers."""
    rng = np.random.default_rng(seed)
    clean, present = METHOD.latents(params(), batch)
    block = np.tile(np.arange(N), (len(present), 2))
    noisy = rng.normal(size=(*block.shape, L, Z)).astype(np.float32)
    t = rng.uniform(size=block.shape).astype(np.float32)
    return clean, jnp.asarray(noisy), jnp.asarray(t), jnp.asarray(block)


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
    never, often = (variant(null_probability=p).method for p in (0, 0.9))
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


# ---- generation


@functools.partial(jit, static_argnames=("method", "record"))
def generate(method, params, prompts, key=3, *, record=(), **options):
    return method.generate(params, prompts, jax.random.key(key), record=record, **options)


@functools.cache
def prompts(count=3):
    return on_device(Case(METHOD).prompts(WITH_STEPS[:count]))


@pytest.mark.parametrize("guidance", [1, 2.0])
def test_generation_equals_the_definition_without_a_cache(guidance):
    """Each block is solved by full passes over the sequence so far, from the noise of the rollout."""
    method = dataclasses.replace(METHOD, sampler=FlowSampler(3, guidance=guidance))
    out = generate(method, params(), prompts(), record=("solver",))
    times, lengths = np.asarray(flow.grid(3)), set()
    solver, thoughts = np.asarray(out.recorded["solver"]), np.asarray(out.thoughts)
    for row in range(3):
        question, blocks = np.asarray(prompts().question)[row][np.asarray(prompts().question_mask)[row]], []
        while True:
            slots = slice(len(blocks) * L, (len(blocks) + 1) * L)
            states = solver[row, slots]
            z = states[:, 0]
            for i in range(3):
                u = velocity(question, blocks, z, times[i])
                if guidance != 1:
                    null = velocity(question, blocks, z, times[i], null=True)
                    u = null + guidance * (u - null)
                z = z - (times[i] - times[i + 1]) * u
                assert_close(states[:, i + 1], z, 1e-4)
            assert (states[:, 3] == thoughts[row, slots]).all()
            blocks.append(thoughts[row, slots])
            end = forward(*sequence(question, blocks))[-1]
            if affine(own()["decision"], end).argmax() == 1 or len(blocks) == N:
                break
        assert int(out.thought_mask[row].sum()) == len(blocks) * L
        vectors, kinds = sequence(question, blocks)
        states = forward([*vectors, *embed(prompts().ids["answer"])[None]], [*kinds, -1])
        first = out.tokens[row][out.kind[row] == Kind.TEXT][0]
        assert int(first) == int(naive.logits(WIDE, params()["backbone"], states[-1]).argmax())
        # Prefill and marker; for each block its <bot>, the solver's evaluations, and the commit; every token but the last.
        contexts, text = 1 + (guidance != 1), int((out.kind[row] == Kind.TEXT).sum())
        assert int(out.cost.forwards[row]) == 2 + len(blocks) * (1 + 3 + 1) + text - 1
        of_block = 1 + 3 * (L + 1) + METHOD.frame
        read = contexts * (len(question) + len(blocks) * of_block + 1)
        assert int(out.cost.positions[row]) == read + text - 1
        lengths.add(len(blocks))
    noise = solver[:, :L, 0]
    assert noise.std() == pytest.approx(2**0.5, rel=0.5)
    assert (noise[0] != noise[1]).all()


RECORD = ("kv", "inputs", "hidden", "last", "solver")


def recorded():
    return generate(BUDGET, params(), prompts(), record=RECORD, thoughts=jnp.full(3, N * L))


def with_decision(bias):
    return params() | {"method": own() | {"decision": own()["decision"] | {"bias": jnp.array(bias)}}}


def test_the_learned_stop_is_obeyed_and_a_budget_is_not_exceeded():
    def used(method, params, *thoughts):
        out = generate(method, params, prompts(), record=RECORD, thoughts=jnp.array(thoughts))
        return out.thought_mask.sum(axis=1).tolist()

    assert used(PLAIN, with_decision([0.0, 1e4]), 8, 8, 8) == [L] * 3
    assert used(PLAIN, with_decision([1e4, 0.0]), 8, 8, 8) == [N * L] * 3
    # Whole blocks that fit, whatever the decision.
    assert used(BUDGET, with_decision([0.0, 1e4]), 0, 3, 8) == [0, 2, 8]
    assert used(PLAIN, with_decision([1e4, 0.0]), 1, 4, 7) == [0, 4, 6]


def change(where, value, add=0.0):
    where = jnp.asarray(where, bool)
    return Intervention(where, jnp.broadcast_to(value, (*where.shape, Z)), jnp.full((*where.shape, Z), add))


def same_bits(a, b):
    return (a.tokens == b.tokens).all() and (a.log_probs == b.log_probs).all() and (a.thoughts == b.thoughts).all()


def test_interventions_act_on_thoughts_and_leave_the_markers_around_them():
    clean = recorded()
    nowhere = jnp.zeros((3, N * L), bool)

    def changed(intervention):
        return generate(BUDGET, params(), prompts(), record=RECORD, intervention=intervention)

    kv = clean.recorded["kv"]
    whole = dict(kv_where=clean.thought_mask, kv=kv)
    assert same_bits(changed(change(clean.thought_mask, clean.thoughts).replace(**whole)), clean)
    first = nowhere.at[0, :L].set(True)
    zeroed = changed(change(first, 0.0).replace(**whole | {"kv_where": nowhere}))
    assert (zeroed.thoughts[0, :L] == 0).all()
    assert (zeroed.thoughts[0, L:] != clean.thoughts[0, L:]).all()
    assert (zeroed.thoughts[1:] == clean.thoughts[1:]).all()
    kept = frozen(change(first, 0.0), clean.thoughts, clean.thought_mask).replace(**whole | {"kv_where": nowhere})
    kept = changed(kept)
    assert (kept.thoughts[0, L:] == clean.thoughts[0, L:]).all()
    assert (kept.log_probs[0] != clean.log_probs[0]).any()
    # Entries alone: the block itself is as it was, what comes after it is not, and the markers' entries are not touched.
    other = changed(change(nowhere, 0.0).replace(kv_where=first, kv=jax.tree.map(lambda x: x + 1.0, kv)))
    assert (other.thoughts[0, :L] == clean.thoughts[0, :L]).all()
    assert (other.recorded["last"][0, 0] == clean.recorded["last"][0, 0]).all()
    assert (other.thoughts[0, L:] != clean.thoughts[0, L:]).all()
    assert_close(other.recorded["kv"][0][:, 0, :L], kv[0][:, 0, :L] + 1.0, 1e-6)


def test_what_is_recorded_is_that_of_the_thoughts_in_one_pass_over_the_sequence():
    out, row = recorded(), 0
    question = np.asarray(prompts().question)[row][np.asarray(prompts().question_mask)[row]]
    vectors, block = sequence(question, np.asarray(out.thoughts)[row].reshape(N, L, Z))
    x = jnp.asarray(np.stack(vectors), jnp.float32)[None]
    mask = decoder.MaskSpec(block=jnp.asarray([block]))
    full = decoder.apply(WIDE, params()["backbone"], x, jnp.ones(x.shape[:2], bool), mask=mask)
    places = np.flatnonzero(np.asarray(block) >= 0)
    assert len(places) == N * L
    assert_close(out.recorded["inputs"][row], x[0, places], 1e-5)
    assert_close(out.recorded["hidden"][row], full.hidden[0, places], 1e-5)
    assert_close(out.recorded["last"][row], full.hidden[0, places[L - 1 :: L] + 1], 1e-5)
    for layer, pair in enumerate(full.kv):
        for ours, theirs in zip(out.recorded["kv"], pair, strict=True):
            assert_close(ours[layer, row], jnp.swapaxes(theirs[0], 0, 1)[places], 1e-5)
    assert out.recorded["solver"].shape == (3, N * L, 4, Z)


def test_repulsion_acts_between_the_samples_of_one_problem_only():
    sampler = FlowSampler(3, guidance=1, repulsion=0.5)
    method = dataclasses.replace(BUDGET, sampler=sampler, group=3)
    a, b, c = (
        jax.tree.map(lambda x, i=i: x[i : i + 1], (prompts().question, prompts().question_mask)) for i in range(3)
    )

    def samples(*rows):
        question, mask = (jnp.concatenate(parts) for parts in zip(*rows, strict=True))
        these = prompts().replace(question=question, question_mask=mask, thoughts=jnp.full(len(rows), N * L))
        return np.asarray(generate(method, params(), these).thoughts)

    together, other = samples(a, a, a, b, b, b), samples(a, a, a, c, c, c)
    assert (together[:3] == other[:3]).all()
    assert (together[3:] != other[3:]).all()
    # The noise of a row depends on its place alone, so that its problem alone gives the same, and other company does not.
    assert_close(samples(a, a, a), together[:3], 1e-4)
    mixed = samples(a, a, b, a, b, b)
    assert (np.abs(mixed - together).max(axis=(1, 2)) > 0.01).all()


def test_answers_of_the_decoder_are_the_vaes_text_of_the_thoughts():
    method = dataclasses.replace(PLAIN, answer_from="decoder", answer_weight=0)
    out = generate(method, params(), prompts(), record=("kv", "solver"))
    assert out.recorded["kv"][0].shape[:3] == (WIDE.layers, 3, N * L)
    own_vae, text = own()["vae"], np.asarray(out.tokens)[:, -N * 4 :].reshape(3, N, 4)
    kept = (np.asarray(out.kind)[:, -N * 4 :] == Kind.TEXT).reshape(3, N, 4)
    for row in range(3):
        count, made = int(out.thought_mask[row].sum()) // L, []
        for number in range(N):
            if number >= count:
                assert not kept[row, number].any()
                continue
            z = np.asarray(out.thoughts)[row].reshape(N, L, Z)[number]
            z = z * np.asarray(own()["latents"]["std"]) + np.asarray(own()["latents"]["mean"])
            x = jnp.asarray(affine(own_vae["method"]["decompress"], np.concatenate([z, own_vae["method"]["start"]])))
            words, _ = naive.greedy(
                VAE.backbone, own_vae["backbone"], x.astype(jnp.float32), 4, int(prompts().ids["eos"])
            )
            assert text[row, number][kept[row, number]].tolist() == [w for w in words if w != int(prompts().ids["eos"])]
            made.append(len(words))
        asked = int(prompts().question_mask[row].sum())
        thinking = count * (1 + 3 * (L + 1) + METHOD.frame)
        assert int(out.cost.forwards[row]) == 1 + count * 5 + max(made)
        assert int(out.cost.positions[row]) == asked + thinking + sum(L + n for n in made)
        assert int(out.cost.answer_tokens[row]) == sum(made)
    empty = jnp.zeros((3, 1), jnp.int32)
    with pytest.raises(ValueError, match="prefix: with answer_from='decoder'"):
        method.generate(params(), prompts(), jax.random.key(0), prefix=Prefix(empty, empty > 0))
    with pytest.raises(ValueError, match=r"record=\['weights'\]: can be recorded: .*solver"):
        method.generate(params(), prompts(), jax.random.key(0), record=("weights",))
    with pytest.raises(ValueError, match=r"intervention.where has 3 thoughts; this rollout has 8"):
        method.generate(params(), prompts(), jax.random.key(0), intervention=change(jnp.zeros((3, 3)), 0.0))


# ---- the second stage


ROLLOUT = dataclasses.replace(METHOD, rollout_steps=2)


def test_the_second_stage_reads_after_the_models_own_blocks():
    batch = on_device(Case(METHOD).batch(WITH_STEPS))
    key = jax.random.key(4)
    at_end, text = jit(lambda p: ROLLOUT.after_own_blocks(p, batch, key, train=False))(params())
    method = dataclasses.replace(METHOD, sampler=FlowSampler(2, guidance=1, noise_scale=1), stop="budget")

    @jit
    def thoughts(params):
        """By the loop that generation runs."""
        source = method.source(params, batch.thought_mask.sum(axis=1))
        return think(
            Backbone(WIDE, params["backbone"]), batch.question, batch.question_mask, jax.random.split(key, 3)[1],
            thinking=source, slots=N * L, slots_per_step=L, capacity=N * METHOD.frame,
        )[2]  # fmt: skip

    steps = thoughts(params())
    made = np.moveaxis(np.asarray(steps.inputs), 0, 1)  # [B, N, L, Z]
    assert (np.moveaxis(np.asarray(steps.valid), 0, 1).all(axis=2) == batch.thought_mask[:, ::L]).all()
    for row in range(len(WITH_STEPS)):
        count = len(WITH_STEPS[row].steps)
        question = np.asarray(batch.question)[row][np.asarray(batch.question_mask)[row]]
        words = np.asarray(batch.text)[row][np.asarray(batch.text_mask)[row]][:-1]
        vectors, kinds = sequence(question, list(made[row, :count]))
        states = forward([*vectors, *embed(words)], [*kinds, *[-1] * len(words)])
        assert_close(text[row, : len(words)], states[len(vectors) :], 1e-4)
        ends = [len(question) + (i + 1) * METHOD.frame - 1 for i in range(count)]
        assert_close(at_end[row, :count], states[jnp.array(ends)], 1e-4)


def test_the_second_stage_keeps_the_flow_loss_and_changes_the_others():
    batch = Case(METHOD).batch(WITH_STEPS)
    first, second = (loss(method, params(), batch)[1] for method in (METHOD, ROLLOUT))
    assert_close(second["flow"], first["flow"], 1e-6)
    assert float(second["answer"]) != float(first["answer"])
    assert float(second["decision"]) != float(first["decision"])


def test_the_gradient_of_the_second_stage_is_a_finite_difference():
    batch = on_device(Case(METHOD).batch(WITH_STEPS[:2]))
    rng = np.random.default_rng(7)
    weights = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, N, 16), (2, 4, 16))]
    masks = [batch.thought_mask[:, ::L], batch.text_mask[:, :-1]]

    def score(params):
        states = ROLLOUT.after_own_blocks(params, batch, jax.random.key(0), train=True)
        return sum((w * x * m[..., None]).sum() for w, x, m in zip(weights, states, masks, strict=True))

    gradient, value = jit(jax.grad(score))(params()), jit(score)
    for part in ("latent_in", "time", "head_time", "head", "markers"):
        direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), own()[part])
        length = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(direction)))

        step = 3e-3 / length
        moved = [
            float(
                value(
                    params()
                    | {"method": own() | {part: jax.tree.map(lambda x, d, s=s: x + s * d, own()[part], direction)}}
                )
            )
            for s in (step, -step)
        ]
        difference = (moved[0] - moved[1]) / (2 * step)
        product = sum(
            jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), gradient["method"][part], direction))
        )
        assert abs(product) > 1e-2
        assert product == pytest.approx(difference, rel=3e-2, abs=2e-2 * length), part


@pytest.mark.slow
def test_a_solver_that_is_run_again_backwards_has_the_same_gradient():
    batch = on_device(Case(METHOD).batch(WITH_STEPS[:2]))
    method = dataclasses.replace(METHOD, sampler=FlowSampler(2, guidance=1), stop="budget")

    def score(params, remat):
        backbone = Backbone(WIDE, params["backbone"])
        context = prefill(backbone, batch.question, batch.question_mask, N * METHOD.frame)
        source = method.source(params, batch.thought_mask.sum(axis=1), remat=remat)
        state, _ = run(backbone, source, start(source, {MAIN: context}), N, jax.random.key(0))
        return (state.contexts[MAIN].hidden ** 3).sum()

    plain, again = (jit(jax.value_and_grad(functools.partial(score, remat=remat)))(params()) for remat in (False, True))
    assert_close(again, plain, 1e-4)


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
