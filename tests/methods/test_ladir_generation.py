"""LaDiR's blockwise generation against its definition (tests/methods/ladir_definition.py)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.evaluate import encode_prompts
from latentjax.backbone import decoder
from latentjax.methods import FlowSampler
from latentjax.rollout import Intervention, Kind, Prefix, frozen
from latentjax.thoughts import flow
from tests.backbone import naive
from tests.close import assert_close
from tests.methods.battery import Case
from tests.methods.ladir_definition import (
    BUDGET,
    METHOD,
    PLAIN,
    VAE,
    WIDE,
    WITH_STEPS,
    L,
    N,
    Z,
    affine,
    embed,
    forward,
    on_device,
    own,
    params,
    sequence,
    velocity,
)
from tests.quick import jit
from train import state as train_state


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


def test_generation_needs_the_positions_that_were_checked():
    """Question, blocks with their markers, and the text, of which the answer's marker is the first token."""
    needed = 7 + N * (L + 2) + 5
    exact = dataclasses.replace(METHOD, backbone=dataclasses.replace(WIDE, max_positions=needed))
    shapes = jax.eval_shape(lambda: train_state.init_params(exact, 0))
    out = jax.eval_shape(lambda params: exact.generate(params, prompts(), jax.random.key(0)), shapes)
    assert out.tokens.shape == (3, 7 + N * L + 5)
    found = encode_prompts(exact, Case(METHOD).codec, WITH_STEPS)
    asked, thoughts = found.question_mask.sum(axis=1), np.array([0, 2, 3, 4, 5, 6, 8])
    assert (exact.positions(asked, thoughts) == asked + np.array([0, 4, 4, 8, 8, 12, 16]) + 5).all()
    with pytest.raises(ValueError, match=f"need {needed} positions"):
        dataclasses.replace(METHOD, backbone=dataclasses.replace(WIDE, max_positions=needed - 1))


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


@pytest.mark.parametrize("blocks", [1, 2])
def test_oracle_blocks_are_the_encoders_and_later_ones_are_made_after_them(blocks):
    case = Case(dataclasses.replace(BUDGET, answer_from="decoder"))
    oracle = case.method.oracle(params(), WITH_STEPS, case.codec, blocks)
    clean, present = (np.asarray(x) for x in BUDGET.latents(params(), on_device(case.batch(WITH_STEPS))))
    made = generate(case.method, params(), prompts(len(WITH_STEPS)), intervention=oracle)
    plain = generate(case.method, params(), prompts(len(WITH_STEPS)))
    thoughts, own = (np.asarray(x.thoughts).reshape(clean.shape) for x in (made, plain))
    given = present & (np.arange(N) < blocks)
    assert 0 < given.sum() < given.size
    assert_close(thoughts[given], clean[given], 1e-6)
    behind = np.asarray(made.thought_mask)[:, ::L] & ~given
    assert behind.any()
    assert (np.abs(thoughts - own)[behind].max(axis=(1, 2)) > 1e-4).all()
    for wrong in (0, N + 1):
        with pytest.raises(ValueError, match=rf"oracle_blocks={wrong}: this LaDiR has 1 to {N} blocks"):
            case.method.oracle(params(), WITH_STEPS, case.codec, wrong)


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
