"""Students: they start as their teacher, and each objective is that of its paper on networks with known answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.methods.few_step_ladir import FewStepLaDiR
from latentjax.methods.ladir import FlowSampler
from latentjax.thoughts import few_step, flow
from tests.backbone import naive
from tests.close import assert_close
from tests.methods import ladir_definition
from tests.methods.battery import Case
from tests.methods.test_ladir import METHOD, WITH_STEPS, on_device
from tests.quick import jit

FIELDS = {f.name: getattr(METHOD, f.name) for f in dataclasses.fields(METHOD)}
FIELDS |= {"null_probability": 0.0, "sampler": FlowSampler(2, guidance=1.0, noise_scale=1)}
OBJECTIVES = ("phased", "shortcut", "meanflow")


def student(objective, **changes):
    return FewStepLaDiR(**{**FIELDS, "objective": objective, "teacher_steps": 6, "phases": 2, **changes})


def sampler(steps, **changes):
    return FlowSampler(**{"steps": steps, "guidance": 1.0, "noise_scale": 1, **changes})


def copies(seed=0):
    """Clean latents, noise and times [B, M, ...] of a few copies."""
    rng = np.random.default_rng(seed)
    clean, noise = (jnp.asarray(rng.normal(size=(3, 4, 2, 4)), jnp.float32) for _ in range(2))
    return clean, noise, jnp.asarray(rng.uniform(0.1, 0.9, (3, 4)), jnp.float32)


def untrained(method):
    """Parameters of a student that was made from its teacher, the teacher's, and a batch of three chains."""
    taught = Case(method.teacher()).params()
    adopted = method.adopt("teacher", taught)
    params = {"backbone": adopted["backbone"], "method": method.init(jax.random.key(3)) | adopted["method"]}
    return params, taught, on_device(Case(method).batch(WITH_STEPS[:3]))


def velocities(method, params, batch, clean, points, block, *, null=False, span=None):
    """Of the copies of blocks `block` at `points`, noisy latents [B, M, L, Z] and their times [B, M]."""
    dropped = jnp.full(len(clean), null)
    hidden = method.two_copies(params, batch, clean, *points, block, dropped, span=span)[2]
    return method.velocity(params["method"], hidden, *points, span)[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_starts_as_its_teacher_and_its_gradient_leaves_the_teacher_alone(objective):
    method = student(objective, reward_weight=0.1, phases=1)
    assert method.parts() == {"teacher": method.teacher()}
    params, taught, batch = untrained(method)
    clean, _ = method.latents(params, batch)
    block = jnp.tile(jnp.arange(method.vae.max_blocks), (3, 1))
    points = clean, jnp.full(block.shape, 0.4)
    expected = velocities(method.teacher(), taught, batch, clean, points, block)
    assert_close(velocities(method, params, batch, clean, points, block, span=points[1]), expected, 1e-6)
    gradient = jit(jax.grad(lambda p: method.loss(p, batch, jax.random.key(0), {}, train=True)[0]))(params)
    for name in ("teacher", "vae"):
        assert not any(np.any(x) for x in jax.tree.leaves(gradient["method"][name])), name
    assert np.any(gradient["backbone"]["layers"]["query"]["kernel"])
    assert set(method.untrained) == {"^method/vae/", "^method/latents/", "^method/teacher/"}


def test_the_target_is_the_guided_teacher():
    method = student("shortcut", teacher_guidance=3.0, bootstrap_every=10**9)
    params, _, batch = untrained(method)
    clean, present = method.latents(params, batch)
    key, nothing_dropped = jax.random.key(5), jnp.zeros(3, bool)
    loss = method.flow_loss(params, batch, clean, present, nothing_dropped, key, None, {})[0]
    block, chosen, noise, t, there = method.draw_copies(clean, present, jax.random.split(key)[0])
    points = flow.interpolate(chosen, noise, t), t
    u, without = (velocities(method, params, batch, clean, points, block, null=null) for null in (False, True))
    # The student still is the teacher: u - (u_null + 3 (u - u_null)) = 2 (u_null - u).
    error = np.asarray((2 * (without - u)) ** 2).mean(axis=(2, 3))
    assert error.max() > 1e-4
    assert_close(loss, np.array([error[row][np.asarray(there)[row]].mean() for row in range(3)]), 1e-5)


@pytest.mark.parametrize("answer_from", ["head", "decoder"])
def test_the_reward_of_clean_blocks_is_the_likelihood_of_the_reasoner_or_the_decoder(answer_from):
    method = student("meanflow", answer_from=answer_from)
    chains = [example for example in WITH_STEPS if len(example.steps) == 1]  # a mean over tokens is one over blocks
    params, _, _ = untrained(method)
    batch = on_device(Case(method).batch(chains))
    clean, present = method.latents(params, batch)
    found = method._unlikelihood(params, batch, jnp.concatenate([clean, 0 * clean], axis=1), present)
    if answer_from == "head":
        expected = method.teacher().loss(params, batch, jax.random.key(0), {}, train=False)[1]["answer"]
    else:
        blocks = on_device(Case(method.vae).batch(chains))
        expected = method.vae.loss(params["method"]["vae"], blocks, jax.random.key(0), {}, train=False)[1][
            "reconstruction"
        ]
    assert_close(found.mean(), expected, 1e-5)


def with_spans(params):
    """The same parameters with random embeddings of a step's length, which start at zero."""
    spans = {name: naive.random_like(params["method"][name], seed) for seed, name in enumerate(("span", "head_span"))}
    return params | {"method": params["method"] | spans}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reward_is_of_the_blocks_that_one_step_from_noise_makes(objective):
    @dataclasses.dataclass(frozen=True)
    class Rewarded(FewStepLaDiR):
        def _unlikelihood(self, params, batch, jumped, present):
            return jumped.sum(axis=(1, 2, 3))

    fields = {**FIELDS, "objective": objective, "phases": 1, "teacher_steps": 6}
    params = with_spans(untrained(Rewarded(**fields))[0])
    _, _, batch = untrained(Rewarded(**fields))
    key, losses = jax.random.key(2), []
    for weight in (0.0, 0.5):
        method = Rewarded(**fields, reward_weight=weight)
        clean, present = method.latents(params, batch)
        losses.append(method.flow_loss(params, batch, clean, present, jnp.zeros(3, bool), key, None, {})[0])
    noise = method.draw_copies(clean, present, jax.random.split(key)[0])[2][:, : present.shape[1]]
    block = jnp.tile(jnp.arange(present.shape[1]), (3, 1))
    one = jnp.ones(block.shape)
    # That is what the sampler does in one step.
    sampler = dataclasses.replace(method, sampler=dataclasses.replace(method.sampler, steps=1))
    assert sampler.grid().tolist() == [1, 0]
    span = None if objective == "phased" else jnp.broadcast_to(sampler.span(), one.shape)
    made = noise - velocities(method, params, batch, clean, (noise, one), block, span=span)
    assert_close(losses[1] - losses[0], 0.5 * made.sum(axis=(1, 2, 3)), 1e-4)


@pytest.mark.parametrize(("objective", "told"), [("shortcut", 1 + np.log2(0.5) / 10), ("meanflow", 0.5 / 100)])
def test_a_student_generates_as_a_reasoner_that_is_told_the_length_of_its_steps(objective, told):
    """For steps of one length what is told of it is a constant beside the embedding of the time."""
    method = student(objective)
    params = with_spans(untrained(method)[0])
    own = dict(params["method"])
    for name, span in (("time", "span"), ("head_time", "head_span")):
        out = own[name]["out"]
        moved = out["bias"] + np.float32(ladir_definition.time_embedding(own[span], told))
        own[name] = own[name] | {"out": out | {"bias": moved}}
    prompts = on_device(Case(method).prompts(WITH_STEPS[:3]))
    key = jax.random.key(1)
    made = jit(lambda p: method.generate(p, prompts, key))(params)
    plain = dataclasses.replace(method.teacher(), sampler=method.sampler)
    expected = jit(lambda p: plain.generate(p, prompts, key))(params | {"method": own})
    assert_close(made.thoughts, expected.thoughts, 1e-4)
    untold = jit(lambda p: plain.generate(p, prompts, key))(params)
    assert np.abs(made.thoughts - untold.thoughts).max() > 1e-2


def test_a_consistency_student_jumps_to_the_clean_end_and_goes_up_again_with_fresh_noise():
    method = student("phased", phases=1)
    params = untrained(method)[0] | {"backbone": ladir_definition.params()["backbone"]}
    params["method"] |= {name: x for name, x in ladir_definition.own().items() if name != "vae"}
    prompts = on_device(Case(method).prompts(WITH_STEPS[:3]))
    out = jit(lambda p: method.generate(p, prompts, jax.random.key(1), record=("solver",)))(params)
    states, fresh = np.asarray(out.recorded["solver"])[:, : method.vae.latents], []
    for row in range(3):
        question = np.asarray(prompts.question)[row][np.asarray(prompts.question_mask)[row]]
        start, middle, end = (states[row, :, i] for i in range(3))
        jumped = start - ladir_definition.velocity(question, [], start, 1.0)
        fresh.append((middle - 0.5 * jumped) / 0.5)
        assert_close(end, middle - 0.5 * ladir_definition.velocity(question, [], middle, 0.5), 1e-4)
    start, fresh = states[:, :, 0].ravel(), np.ravel(fresh)
    assert 0.5 < fresh.std() < 1.5 and abs(fresh.mean()) < 0.7
    assert abs(np.corrcoef(fresh, start)[0, 1]) < 0.7


def test_dropout_is_on_in_training_only():
    base = student("phased")
    method = dataclasses.replace(base, backbone=dataclasses.replace(base.backbone, residual_dropout=0.5))
    params, _, batch = untrained(method)
    loss = jit(lambda key, train: method.loss(params, batch, key, {}, train=train)[1]["flow"], static_argnums=1)
    on, off = (float(loss(jax.random.key(4), train)) for train in (True, False))
    assert abs(on - off) > 1e-4
    without = jit(lambda key: base.loss(params, batch, key, {}, train=True)[1]["flow"])(jax.random.key(4))
    assert float(without) == pytest.approx(off, rel=1e-5)


def test_phased_is_the_huber_distance_of_two_jumps_to_the_edge():
    method = student("phased")
    clean, noise, t = copies()

    def net(z, t, span=None):
        return 0.3 * z + flow.spread(t, z)

    def teacher(z, t):
        return 0.5 * z - flow.spread(t, z)

    z, at, span, error_of = method._phased(net, net, teacher, clean, noise, t, jax.random.key(1))
    assert span is None
    error = error_of(net(z, at))
    times = np.asarray(flow.grid(6))
    edges = np.array([times[3], 0.0])  # two phases of three steps
    for b in range(3):
        for m in range(4):
            step = int(np.argmin(abs(times[:-1] - float(at[b, m]))))
            t0, t1 = times[step], times[step + 1]
            edge = edges[0] if t1 >= edges[0] - 1e-6 else edges[1]
            point = (1 - t0) * np.asarray(clean[b, m]) + t0 * np.asarray(noise[b, m])
            here = point - (t0 - edge) * (0.3 * point + t0)
            moved = point - (t0 - t1) * (0.5 * point - t0)
            there = moved - (t1 - edge) * (0.3 * moved + t1)
            wanted = np.mean(np.sqrt((here - there) ** 2 + 0.001**2) - 0.001)
            assert_close(error[b, m], np.float32(wanted), 1e-3)
            assert_close(z[b, m], np.float32(point), 1e-5)


def test_shortcut_is_flow_matching_at_the_base_step_and_two_half_steps_otherwise():
    clean, noise, t = copies()

    def net(z, t, span=None):
        return 0.3 * z + flow.spread(span, z)

    seen = set()
    for seed in range(12):
        method = student("shortcut", teacher_guidance=1.0, bootstrap_every=2, base_steps=8)
        z, at, span, error_of = method._shortcut(net, net, None, clean, noise, t, jax.random.key(seed))
        error = error_of(net(z, at, span))
        bootstrap = not np.array_equal(at, t)
        seen.add(bootstrap)
        if not bootstrap:
            base = 0.3 * z + 1 / 8
            assert_close(error, ((base - (noise - clean)) ** 2).mean(axis=(2, 3)), 1e-5)
            continue
        sizes = [1.0, 0.5, 0.25]
        for b in range(3):
            for m in range(4):
                point, time, size = np.asarray(z[b, m]), float(at[b, m]), float(span[b, m])
                assert size in sizes and time % size == 0
                first = 0.3 * point + size / 2
                second = 0.3 * np.clip(point - size / 2 * first, -4, 4) + size / 2
                wanted = np.mean((0.3 * point + size - np.clip((first + second) / 2, -4, 4)) ** 2)
                assert float(error[b, m]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert seen == {False, True}


def test_meanflow_where_both_times_agree_is_flow_matching_and_else_has_the_derivative():
    clean, noise, t = copies()

    def net(z, t, span=None):
        return 0.3 * z + flow.spread(span, z) + 2 * flow.spread(t, z)

    method = student("meanflow", teacher_guidance=1.0, flow_share=1.0)
    z, at, span, error = method._meanflow(net, None, None, clean, noise, t, jax.random.key(0))
    assert not span.any()
    u = net(z, at, span)
    squares = ((u - (noise - clean)) ** 2).sum(axis=(2, 3))
    assert_close(error(u), squares / (squares + 0.01), 1e-5)
    method = student("meanflow", teacher_guidance=1.0, flow_share=0.0)
    z, at, span, error = method._meanflow(net, None, None, clean, noise, t, jax.random.key(0))
    assert (span >= 0).all() and span.max() > 0.1
    u, velocity = net(z, at, span), noise - clean
    change = 0.3 * velocity + 1.0 + 2.0  # d/dt of 0.3 z + (t - r) + 2 t along the path, a slope of any width
    squares = ((u - (velocity - flow.spread(span, z) * change)) ** 2).sum(axis=(2, 3))
    assert_close(error(u), squares / (squares + 0.01), 1e-4)
    method = student("meanflow", teacher_guidance=1.0, flow_share=0.0, adaptive_power=0)
    assert_close(method._meanflow(net, None, None, clean, noise, t, jax.random.key(0))[3](u), squares, 1e-4)


def test_a_phased_student_steps_over_the_phases():
    method = student("phased", teacher_steps=50, phases=4, sampler=sampler(4))
    edges, _ = few_step.consistency_phases(flow.grid(50), 4)
    assert_close(method.grid(), edges, 0)
    assert method.span() is None
    assert float(student("meanflow").span()) == 0.5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampler": FlowSampler(2)}, r"sampler\.guidance=4\.0.*set 1 and 0"),
        ({"null_probability": 0.1}, r"null_probability=0\.1.*set 1 and 0"),
        ({"prediction": "x"}, r"method\.prediction='x'"),
        ({"phases": 9}, r"method\.phases=9: must lie between 1 and teacher_steps=6"),
        ({"bootstrap_every": 0}, r"method\.bootstrap_every=0: must be at least 1"),
        ({"adaptive_power": -1}, r"method\.adaptive_power=-1: must not be negative"),
        ({"flow_share": 1.5}, r"method\.flow_share=1\.5: a share"),
        ({"reward_weight": -1}, r"method\.reward_weight=-1: must not be negative"),
        (
            {"reward_weight": 1, "phases": 1, "layout": "random_block"},
            r"method\.reward_weight=1: .*layout='random_block'",
        ),
        ({"reward_weight": 1}, r"method\.phases=2: with reward_weight=1 one jump.*set phases=1"),
        ({"teacher_guidance": -1}, r"method\.teacher_guidance=-1: must not be negative"),
        ({"sampler": sampler(3)}, r"method\.sampler\.steps=3: .*phases=2"),
        ({"sampler": sampler(2, solver="heun")}, r"method\.sampler\.solver='heun'"),
        ({"sampler": sampler(2, noise_scale=1.5)}, r"noise_scale=1\.5: .*noise of scale 1"),
        ({"objective": "shortcut", "sampler": sampler(6)}, r"method\.sampler\.steps=6: .*power of two"),
        ({"objective": "shortcut", "sampler": sampler(8), "base_steps": 4}, r"sampler\.steps=8: .*base_steps=4"),
        ({"times": flow.TimeSampler("logit_normal")}, r"method\.times\.kind='logit_normal': phased draws"),
        ({"base_steps": 100}, r"method\.base_steps=100: must be a power of two"),
        ({"objective": "meanflow", "times": flow.TimeSampler(shift=2.0)}, r"method\.times\.shift=2\.0"),
    ],
)
def test_bad_input_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        student(**{"objective": "phased", **changes})
