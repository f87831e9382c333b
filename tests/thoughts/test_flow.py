"""Flows with known velocities, and every formula against loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from latentjax.thoughts.flow import (
    TimeSampler,
    dimension_shift,
    diversify,
    draw_times,
    evaluations,
    grid,
    guide,
    interpolate,
    repulsion,
    repulsion_strength,
    shift_time,
    solve,
    spread,
    target,
    velocity_of,
)
from tests.close import assert_close
from tests.quick import jit

KINDS = ("velocity", "x", "noise", "v")


@pytest.fixture
def path():
    """Clean latents and noise, [6, 3, 4], and times [6] away from the ends."""
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 6, 3, 4)).astype(np.float32)
    return jnp.asarray(clean), jnp.asarray(noise), jnp.asarray(rng.uniform(0.05, 0.95, 6).astype(np.float32))


# ---- the path


def test_the_path_is_straight_and_its_slope_is_the_velocity(path):
    clean, noise, t = path
    assert_close(interpolate(clean, noise, jnp.zeros(6)), clean, 0)
    assert_close(interpolate(clean, noise, jnp.ones(6)), noise, 0)
    _, slope = jax.jvp(lambda t: interpolate(clean, noise, t), (t,), (jnp.ones(6),))
    assert_close(slope, target(clean, noise, t, "velocity"), 1e-6)
    row = interpolate(clean[2], noise[2], t[2])
    assert_close(interpolate(clean, noise, t)[2], row, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_of_any_kind_gives_the_velocity(path, kind):
    clean, noise, t = path
    z = interpolate(clean, noise, t)
    assert_close(velocity_of(target(clean, noise, t, kind), z, t, kind), noise - clean, 1e-5)


def test_targets_are_the_named_quantities(path):
    clean, noise, t = (np.asarray(a, np.float64) for a in path)
    of = {kind: target(*path, kind) for kind in KINDS}
    row = t[:, None, None]
    expected = {"velocity": noise - clean, "x": clean, "noise": noise, "v": (1 - row) * noise - row * clean}
    assert_close(of, expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_velocities_and_their_gradients_are_finite_at_the_ends(path, kind):
    clean, noise, _ = path
    for t in (0.0, 1e-9, 1 - 1e-7, 1.0):
        t = jnp.full(6, t)
        value, pull = jax.vjp(lambda p, z, t=t: velocity_of(p, z, t, kind), clean, noise)
        assert all(np.isfinite(a).all() for a in (value, *pull(value)))


def test_the_limits_are_the_mean_velocity_at_the_ends():
    """E[u|z] for z_0 ~ N(0, s²), by linear regression: Cov(u, z)/Var(z) z."""
    z, s2 = jnp.asarray([[-1.0, 0.5, 2.0]]), 0.7
    for kind, t in (("x", 0.0), ("noise", 1.0)):
        mean = (t - (1 - t) * s2) / ((1 - t) ** 2 * s2 + t**2) * z
        assert_close(velocity_of(z, z, jnp.asarray([t]), kind), mean, 1e-6)


def test_times_of_another_shape_are_rejected(path):
    clean, noise, _ = path
    with pytest.raises(ValueError, match=r"t has shape \(3,\).*\(6, 3, 4\)"):
        interpolate(clean, noise, jnp.zeros(3))
    assert spread(jnp.zeros(6), clean).shape == (6, 1, 1)


# ---- times


@pytest.mark.parametrize("shift", [0.5, 1.0, 6.93])
def test_uniform_times_follow_the_shifted_distribution(shift):
    times = np.asarray(draw_times(jax.random.key(0), (4000,), TimeSampler(shift=shift)))

    def cdf(x):  # the inverse of x = a t / (1 + (a-1) t)
        return x / (shift - (shift - 1) * x)

    assert scipy.stats.kstest(times, cdf).pvalue > 0.01
    if shift != 1:
        assert scipy.stats.kstest(times, "uniform").pvalue < 1e-6


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_logit_normal_times_follow_their_distribution(shift):
    sampler = TimeSampler("logit_normal", mean=-0.4, std=1.2, shift=shift)
    times = np.asarray(draw_times(jax.random.key(1), (40, 100), sampler)).ravel()
    assert ((times > 0) & (times < 1)).all()

    def cdf(x, mean):
        return scipy.stats.norm.cdf((np.log(x / (1 - x)) - mean) / 1.2)

    assert scipy.stats.kstest(times, lambda x: cdf(x, -0.4 + np.log(shift))).pvalue > 0.01
    assert scipy.stats.kstest(times, lambda x: cdf(x, 0.4 + np.log(shift))).pvalue < 1e-6


def test_shifts_compose_and_move_towards_noise():
    t = jnp.linspace(0.0, 1.0, 33)
    assert_close(shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6), 1e-6)
    assert_close(shift_time(shift_time(t, 2.0), 0.5), t, 1e-6)
    assert_close(shift_time(t, 6.93), 6.93 * t / (1 + 5.93 * t), 1e-6)
    assert (shift_time(t, 2.0)[1:-1] > t[1:-1]).all()
    assert dimension_shift(196_608, 4096) == pytest.approx(6.93, abs=0.005)  # RAE's latents of 256 tokens, 768 channels


@pytest.mark.parametrize("shift", [0.3, 1.0, 6.93])
def test_the_grid_holds_the_quantiles_of_the_training_times(shift):
    times = np.asarray(grid(8, shift))
    assert times.shape == (9,) and times[0] == 1 and times[-1] == 0
    assert (np.diff(times) < 0).all()
    drawn = np.asarray(draw_times(jax.random.key(2), (20_000,), TimeSampler(shift=shift)))
    assert np.abs(np.quantile(drawn, np.linspace(1, 0, 9)[1:-1]) - times[1:-1]).max() < 0.015


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeSampler("uniform", mean=-0.4), "mean=-0.4"),
        (lambda: TimeSampler("logit_normal", std=0.0), "std=0.0"),
        (lambda: TimeSampler(shift=0), "shift=0"),
        (lambda: TimeSampler("cosine"), "kind='cosine'"),
        (lambda: grid(0), "steps=0"),
        (lambda: grid(4, -1.0), "shift=-1.0"),
        (lambda: dimension_shift(0, 4096), "size=0"),
        (lambda: evaluations(4, "rk4"), "solver='rk4'"),
        (lambda: solve(lambda z, t: z, jnp.zeros(2), jnp.ones(1)), "times has 1"),
        (lambda: target(jnp.zeros(2), jnp.zeros(2), jnp.zeros(()), "score"), "kind='score'"),
        (lambda: velocity_of(jnp.zeros(2), jnp.zeros(2), jnp.zeros(()), "score"), "kind='score'"),
        (lambda: repulsion(jnp.zeros((4, 1, 2)), jnp.ones(4, bool), 3), "group=3.*4"),
        (lambda: repulsion(jnp.zeros((4, 1, 2)), jnp.ones(4, bool), 2, "rbf"), "form='rbf'"),
        (lambda: repulsion_strength(jnp.zeros(()), 0.3, "rbf"), "form='rbf'"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- solvers


def swing(z, t):
    """dz/dt = 2 cos(2t) z: from t = 1 to t = 0 a state shrinks by exp(-sin 2)."""
    return 2 * jnp.cos(2 * t) * z


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_solvers_converge_with_their_order(solver, order):
    start = jnp.asarray([1.0, -2.0])

    def error(steps):  # at 64 steps still 1e-5, far above float32's rounding
        last, _ = solve(swing, start, grid(steps), solver)
        return np.abs(np.asarray(last) / np.asarray(start) - np.exp(-np.sin(2.0))).max()

    ratios = [error(n) / error(2 * n) for n in (16, 32)]
    assert ratios == pytest.approx([2**order] * 2, rel=0.2)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_evaluations_are_counted(solver):
    """Counted while the program runs, not while it is traced."""
    calls = []

    def velocity(z, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return z

    jax.block_until_ready(solve(velocity, jnp.ones(2), grid(5), solver))
    jax.effects_barrier()
    assert len(calls) == evaluations(5, solver)
    assert max(calls) == 1 and (min(calls) == 0) == (solver == "heun")


def unrolled(velocity, z, times, solver):
    states = [z]
    for t, after in itertools.pairwise(times):
        dt, first = after - t, velocity(z, t)
        if solver == "euler":
            z = z + dt * first
        elif solver == "heun":
            z = z + dt * (first + velocity(z + dt * first, after)) / 2
        else:
            z = z + dt * velocity(z + dt * first / 2, (t + after) / 2)
        states.append(z)
    return jnp.stack(states)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_states_and_gradients_are_those_of_a_loop(solver, remat):
    rng = np.random.default_rng(3)
    weights = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
    z = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
    weight_of_state = jnp.arange(1.0, 8.0)[:, None, None, None]
    times = grid(6, 2.0)

    def states(weights, z, loop):
        def velocity(z, t):
            return jnp.tanh(z @ weights + t)

        return loop(velocity, z)

    def scanned(velocity, z):
        return solve(velocity, z, times, solver, remat=remat, record=True)[1]

    def looped(velocity, z):
        return unrolled(velocity, z, times, solver)

    assert_close(states(weights, z, scanned), states(weights, z, looped), 1e-5)
    gradients = [
        jax.grad(lambda w, z, loop=loop: jnp.sum(weight_of_state * states(w, z, loop) ** 2), (0, 1))(weights, z)
        for loop in (scanned, looped)
    ]
    assert_close(*gradients, 1e-4)


def test_remat_keeps_fewer_values_for_the_gradient():
    def saved(remat):
        def loss(z):
            return jnp.sum(solve(lambda z, t: jnp.sin(jnp.sin(jnp.sin(z))), z, grid(8), remat=remat)[0])

        residuals = jax.tree.leaves(jax.eval_shape(lambda z: jax.vjp(loss, z)[1], jnp.ones(1000)))
        return sum(leaf.size for leaf in residuals)

    assert saved(True) <= 9 * 1000 + 100 < 3 * 8 * 1000 <= saved(False)


def test_without_recording_only_the_last_state_comes_back():
    last, states = solve(swing, jnp.ones(3), grid(4))
    recorded_last, recorded = solve(swing, jnp.ones(3), grid(4), record=True)
    assert states is None and recorded is not None
    assert_close([last, recorded_last], [recorded[-1], recorded[-1]], 0)


@pytest.mark.parametrize(("solver", "tolerance"), [("euler", 0.02), ("heun", 4e-4), ("midpoint", 4e-4)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_gaussian_is_transported_to_its_mean_and_variance(solver, tolerance, shift):
    """z_0 ~ N(m, s²) has E[u|z_t] = -m + Cov(u, z_t)/Var(z_t) (z_t - (1-t) m), and the flow takes noise e to m + s e."""
    mean, std = jnp.asarray([2.0, -1.0, 0.5]), jnp.asarray([0.3, 1.5, 1.0])

    def velocity(z, t):
        covariance = t - (1 - t) * std**2
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + covariance / variance * (z - (1 - t) * mean)

    noise = jnp.linspace(-2.5, 2.5, 11)[:, None] * jnp.ones(3)
    times = grid(128, shift)
    _, states = solve(velocity, noise, times, solver, record=True)
    assert states is not None
    for index in (32, 64, 128):  # the marginals on the way, too
        t = times[index]
        exact = (1 - t) * mean + jnp.sqrt((1 - t) ** 2 * std**2 + t**2) * noise
        assert_close(states[index], exact, tolerance)


def test_a_mixture_is_sampled_in_its_proportions():
    """The velocity of a mixture is the mean of its components' velocities under their posterior probabilities."""
    means, weights, std = jnp.asarray([[4.0, 0.0], [-2.0, 3.0], [-2.0, -3.0]]), jnp.asarray([0.2, 0.3, 0.5]), 0.4

    def velocity(z, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        offset = z[:, None] - (1 - t) * means
        posterior = jax.nn.softmax(jnp.log(weights) - jnp.sum(offset**2, -1) / (2 * variance))
        of_component = -means + (t - (1 - t) * std**2) / variance * offset
        return jnp.einsum("nk,nkd->nd", posterior, of_component)

    count = 6000
    noise = jax.random.normal(jax.random.key(4), (count, 2))
    samples = np.asarray(solve(velocity, noise, grid(60), "heun")[0])
    nearest = np.linalg.norm(samples[:, None] - np.asarray(means), axis=-1).argmin(axis=1)
    for k, weight in enumerate(np.asarray(weights)):
        inside = samples[nearest == k]
        assert abs(len(inside) / count - weight) < 4 * np.sqrt(weight * (1 - weight) / count)
        assert np.abs(inside.mean(0) - means[k]).max() < 4 * std / np.sqrt(len(inside))
        assert np.abs(inside.std(0) / std - 1).max() < 0.08


# ---- guidance and repulsion


def test_guidance_is_linear_between_the_two_velocities():
    conditional, unconditional = jnp.asarray([1.0, 2.0]), jnp.asarray([0.0, 5.0])
    assert_close(guide(conditional, unconditional, 0), unconditional, 0)
    assert_close(guide(conditional, unconditional, 1.0), conditional, 0)
    w = 3.0  # LCM's and PCM's other way of counting
    assert_close(guide(conditional, unconditional, w + 1), conditional + w * (conditional - unconditional), 1e-6)


def reference_force(points, sigma, form):
    """Double loop in float64."""
    force = np.zeros_like(points)
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            if i != j:
                d = np.sqrt(((a - b) ** 2).sum())
                if form == "early_text":
                    force[i] += 2 / sigma**2 * np.exp(-d / (2 * sigma**2)) * (a - b)
                else:
                    force[i] += 2 * (1 - d**2 / sigma**2) * np.exp(-(d**2) / sigma**2) * (a - b)
    return force


def reference_sigma(points, middle=np.median):
    return middle([np.sqrt(((a - b) ** 2).sum()) for a, b in itertools.combinations(points, 2)])


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def reference_repulsion(z, mask, group, form):
    z = np.asarray(z, np.float64)
    force = np.zeros_like(z)
    for first in range(0, len(z), group):
        rows = [row for row in range(first, first + group) if mask[row]]
        real = z[rows]
        if form == "released":
            sigma = reference_sigma(real.reshape(-1, z.shape[2]), lower_median)
            for row in rows:
                force[row] = reference_force(z[row], sigma, form)
        elif form == "slotwise":
            for slot in range(z.shape[1]):
                force[rows, slot] = reference_force(real[:, slot], reference_sigma(real[:, slot]), form)
        else:
            flat = real.reshape(len(rows), -1)
            force[rows] = reference_force(flat, reference_sigma(flat), form).reshape(real.shape)
    return force


@pytest.fixture
def samples():
    """Two problems of five samples, one of the first and two of the second padding."""
    rng = np.random.default_rng(5)
    z = rng.standard_normal((10, 3, 4)) + 2 * rng.standard_normal((10, 1, 1))
    mask = np.ones(10, bool)
    mask[[4, 5, 8]] = False
    return jnp.asarray(z, jnp.float32), jnp.asarray(mask)


repel = jit(repulsion, static_argnums=(2, 3))
FORMS = ("paper", "slotwise", "early_text", "released")


@pytest.mark.parametrize("form", FORMS)
def test_repulsion_equals_a_double_loop(samples, form):
    z, mask = samples
    assert_close(repel(z, mask, 5, form), reference_repulsion(z, np.asarray(mask), 5, form), 1e-5)
    everyone = jnp.ones(10, bool)
    assert_close(repel(z, everyone, 5, form), reference_repulsion(z, np.ones(10, bool), 5, form), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_samples_neither_feel_nor_exert_a_force(samples, form):
    z, mask = samples
    force = repel(z, mask, 5, form)
    assert (np.asarray(force)[~np.asarray(mask)] == 0).all()
    moved = jnp.where(mask[:, None, None], z, 100 * z + 7)
    assert_close(repel(moved, mask, 5, form), force, 0)


@pytest.mark.parametrize("form", FORMS)
def test_problems_do_not_see_each_other(samples, form):
    z, mask = samples
    changed = z.at[5:].multiply(3.0)
    assert_close(repel(changed, mask, 5, form)[:5], repel(z, mask, 5, form)[:5], 0)


def test_the_force_is_the_gradient_of_its_potential(samples):
    """Of sum over pairs of d² exp(-d²/sigma²), with sigma fixed."""
    z, mask = samples
    z, present = z[5:], np.flatnonzero(mask[5:])
    sigma = reference_sigma(np.asarray(z, np.float64)[present].reshape(len(present), -1))

    def potential(z):
        squared = [jnp.sum((z[i] - z[j]) ** 2) for i, j in itertools.combinations(present, 2)]
        return sum(d2 * jnp.exp(-d2 / sigma**2) for d2 in squared)

    assert_close(repel(z, mask[5:], 5), jit(jax.grad(potential))(z), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_degenerate_groups_feel_no_force(form):
    z = jnp.broadcast_to(jnp.asarray([[1.0, 2.0]]), (4, 2, 2))  # all samples equal
    everyone = jnp.ones(4, bool)
    assert (repel(z, everyone, 4, form) == 0).all()
    gradient = jit(jax.grad(lambda z: jnp.sum(z * repulsion(z, everyone, 4, form))))(z)
    assert np.isfinite(gradient).all()
    lonely = jax.random.normal(jax.random.key(6), (4, 1, 2))  # one sample and one token: no pair
    assert (repel(lonely, jnp.asarray([True, False, False, False]), 4, form) == 0).all()
    assert (repel(lonely, everyone, 1, form) == 0).all()


def test_two_samples_alone_are_at_the_median_distance_and_feel_nothing():
    z = jax.random.normal(jax.random.key(7), (2, 3, 4))
    assert np.abs(repel(z, jnp.ones(2, bool), 2)).max() < 1e-5


def test_strengths_are_the_published_ones():
    t = jnp.asarray([0.0, 0.5, 1.0])
    assert_close(repulsion_strength(t, 0.4), jnp.asarray([0.0, 0.2, 0.4]), 1e-6)
    assert_close(repulsion_strength(t, 0.4, "released"), jnp.asarray([0.1, 0.175, 0.4]), 1e-6)


@pytest.mark.parametrize("form", ["paper", "slotwise", "early_text"])
def test_a_step_with_a_force_on_latents_drives_close_samples_apart(form):
    """Subtracted from the velocity, since the step to clean is z - dt v."""
    z = jnp.asarray([0.0, 0.5, 3.0, -3.0])[:, None, None] * jnp.ones((1, 1, 2))

    def gap(gamma):
        velocity = diversify(jnp.zeros_like(z), z, jnp.ones(4), jnp.ones(4, bool), 4, gamma, form)
        after = z - 0.1 * velocity
        return float(after[1, 0, 0] - after[0, 0, 0])

    assert gap(0.3) > gap(0.0) + 1e-3 and gap(0.0) == 0.5


def test_the_released_force_drives_close_velocities_of_a_block_apart():
    velocity = jnp.asarray([0.0, 0.5, 3.0, -3.0])[None, :, None] * jnp.ones((1, 1, 2))
    arguments = (jnp.zeros_like(velocity), jnp.ones(1), jnp.ones(1, bool), 1)
    pushed = diversify(velocity, *arguments, 0.3, "released")
    assert float(pushed[0, 1, 0] - pushed[0, 0, 0]) > 0.5 + 1e-3
    assert_close(pushed, velocity + 0.3 * repel(velocity, jnp.ones(1, bool), 1, "released"), 1e-6)


def test_each_row_has_the_strength_of_its_own_time(samples):
    z, mask = samples
    t = jnp.linspace(0.0, 1.0, 10)
    expected = -0.5 * np.asarray(t)[:, None, None] * np.asarray(repel(z, mask, 5))
    assert_close(diversify(jnp.zeros_like(z), z, t, mask, 5, 0.5), expected, 1e-6)
