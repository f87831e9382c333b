"""LaDiR's second stage: losses after the model's own blocks, gradients through the solver."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.generation import think
from latentjax.methods import FlowSampler
from latentjax.rollout import MAIN, Backbone, prefill, run, start
from tests.close import assert_close
from tests.methods.battery import Case, loss
from tests.methods.ladir_definition import (
    METHOD,
    WIDE,
    WITH_STEPS,
    L,
    N,
    embed,
    forward,
    on_device,
    own,
    params,
    sequence,
)
from tests.quick import jit

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
        # Along the gradient itself the slope is its length, far above the error of a difference.
        slope = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(gradient["method"][part])))
        direction = jax.tree.map(lambda x, slope=slope: x / slope, gradient["method"][part])
        step = 3e-3
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
        assert slope > 0.5, part
        assert difference == pytest.approx(slope, rel=3e-2), part


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
