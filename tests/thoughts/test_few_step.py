"""Few-step targets on flows whose maps and average velocities are known, and against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.thoughts.few_step import (
    consistency_phases,
    jump,
    meanflow_loss,
    meanflow_target,
    pcm_target,
    pseudo_huber,
    resample,
    shortcut_target,
)
from latentjax.thoughts.flow import grid, interpolate, shift_time, solve, spread
from tests.close import assert_close

RATE = 0.8


@pytest.fixture
def rows():
    """Latents [6, 2, 3]: clean, noise."""
    clean, noise = np.random.default_rng(0).standard_normal((2, 6, 2, 3)).astype(np.float32)
    return jnp.asarray(clean), jnp.asarray(noise)


def exact_average(z, r, t):
    """Average velocity between r and t of dz/dt = RATE z, whose solution is z_r = exp(-RATE (t-r)) z_t; limit at r = t."""
    length = spread(t - r, z)
    return -jnp.expm1(-RATE * length) / length * z


# ---- phases and consistency


@pytest.mark.parametrize(("steps", "phases"), [(50, 8), (12, 4), (7, 7), (9, 1), (7, 3)])
def test_edges_are_equally_spaced_grid_points(steps, phases):
    times = np.asarray(grid(steps, 2.0))
    edges, lower = (np.asarray(a) for a in consistency_phases(jnp.asarray(times), phases))
    indices = [int(np.floor(m * steps / phases)) for m in range(phases, -1, -1)]  # counted from clean
    assert edges.tolist() == [times[steps - index] for index in indices]
    for n in range(steps):  # a step lies inside one phase and leads to its lower end
        assert lower[n] == max(edge for edge in edges if edge <= times[n + 1])
        assert min(edge for edge in edges if edge > lower[n]) >= times[n]


def test_a_number_of_phases_that_the_grid_cannot_hold_is_named():
    for phases in (0, 6):
        with pytest.raises(ValueError, match=f"phases={phases}.*5"):
            consistency_phases(grid(5), phases)


def test_the_target_is_exact_on_a_straight_flow(rows):
    """Where every path is straight, each jump ends on it: at the point of the edge's time."""
    clean, noise = rows
    times = grid(20, 1.5)
    _, lower = consistency_phases(times, 4)
    step = jnp.asarray([0, 3, 7, 12, 18, 19])
    t, after, edge = times[step], times[step + 1], lower[step]

    def straight(z, t):
        return noise - clean

    found = pcm_target(straight, straight, interpolate(clean, noise, t), t, after, edge)
    assert_close(found, interpolate(clean, noise, edge), 1e-5)


def test_the_target_is_a_teacher_step_and_then_the_students_jump(rows):
    _, noise = rows
    z, t, after, edge = (np.asarray(a, np.float64) for a in (noise, [0.9] * 6, [0.8] * 6, [0.8, 0.5, 0, 0, 0.3, 0.8]))
    found = pcm_target(
        lambda z, t: jnp.sin(z), lambda z, t: z**2 + spread(t, z), noise, *map(jnp.float32, (t, after, edge))
    )
    moved = z - 0.1 * np.sin(z)
    expected = moved - (after - edge)[:, None, None] * (moved**2 + 0.8)
    assert_close(found, expected, 1e-5)
    assert_close(found[0], moved[0], 1e-6)  # the teacher's step alone where it reaches the edge


def test_a_student_that_fits_the_targets_samples_in_one_step_per_phase(rows):
    """The student whose jumps are the exact flow: M Euler steps over the edges then end where the flow does."""
    _, noise = rows
    edges, _ = consistency_phases(grid(50), 8)
    _, states = solve(lambda z, t: z, noise, edges, record=True)
    assert states is not None and states.shape[0] == 9

    def student(z, t):
        upper = jnp.argmin(jnp.abs(edges - t))
        return exact_average(z, edges[upper + 1], t)

    assert_close(solve(student, noise, edges)[0], np.exp(-RATE) * noise, 1e-5)


def test_targets_have_no_gradient(rows):
    clean, noise = rows
    t = jnp.full(6, 0.8)

    def of_weight(weight):
        def velocity(z, t):
            return weight * z

        def average(z, first, second):
            return weight * z * spread(second, z)

        return (
            pcm_target(velocity, velocity, noise, t, t - 0.1, t - 0.3),
            shortcut_target(average, noise, t, jnp.full(6, 0.25)),
            meanflow_target(average, noise, noise - clean, t - 0.5, t, width=0.01),
            meanflow_target(average, noise, noise - clean, t - 0.5, t),
        )

    for index in range(4):
        assert jax.grad(lambda weight, index=index: jnp.sum(of_weight(weight)[index] ** 2))(1.3) == 0


def test_jump_is_one_euler_step(rows):
    clean, noise = rows
    t, end = jnp.float32(0.9), jnp.float32(0.4)
    expected, _ = solve(lambda z, t: clean, noise, jnp.stack([t, end]))
    assert_close(jump(noise, clean, t, end), expected, 1e-6)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    error = np.concatenate([-np.logspace(-6, 2, 50), [0.0], np.logspace(-6, 2, 50)])
    expected = np.sqrt(error**2 + 1e-3**2) - 1e-3
    found = np.asarray(pseudo_huber(jnp.float32(error)), np.float64)
    assert np.abs(found - expected).max() <= 1e-5 * expected.max()
    small = np.abs(error) < 1e-4  # where the difference of two square roots would lose every digit
    assert found[small] == pytest.approx(error[small] ** 2 / 2e-3, rel=0.01)
    with pytest.raises(ValueError, match="c=0"):
        pseudo_huber(jnp.ones(2), 0)


# ---- LCM's sampler


def test_jumps_with_fresh_noise_between_them_keep_a_gaussian():
    """Data N(0, v), jumps by its consistency function z_t -> sqrt(v / ((1-t)² v + t²)) z_t: each result is N(0, v), and the
    second remembers of the first as much as z_0.6 does."""
    v, count = 0.5, 200_000

    def velocity(z, t):
        return (z - jnp.sqrt(v / ((1 - t) ** 2 * v + t**2)) * z) / t

    noise = jax.random.normal(jax.random.key(0), (count,))
    last, states = resample(velocity, noise, jnp.array([1.0, 0.6, 0.0]), jax.random.key(1), record=True)
    assert states.shape == (3, count)
    assert_close(states[0], noise, 0)
    assert_close(states[2], last, 0)
    assert float(states[1].var()) == pytest.approx(0.4**2 * v + 0.6**2, rel=0.02)
    assert float(last.var()) == pytest.approx(v, rel=0.02)
    kept = 0.4 * v**0.5 / (0.4**2 * v + 0.6**2) ** 0.5
    assert float(jnp.corrcoef(noise, last)[0, 1]) == pytest.approx(kept, abs=0.01)
    one, nothing = resample(velocity, noise, jnp.array([1.0, 0.0]), jax.random.key(1))
    assert nothing is None
    assert_close(one, v**0.5 * noise, 1e-5)  # no noise after the last jump


# ---- shortcut


def test_an_exact_flow_map_has_shortcut_loss_zero(rows):
    _, noise = rows
    t, size = jnp.asarray([1.0, 0.5, 0.75, 1.0, 0.25, 1.0]), jnp.asarray([1.0, 0.5, 0.25, 0.5, 0.125, 0.25])

    def average(z, t, size):
        return exact_average(z, t - size, t)

    assert_close(shortcut_target(average, noise, t, size, clip=None), average(noise, t, size), 1e-5)
    wrong = shortcut_target(lambda z, t, size: z, noise, t, size, clip=None)
    assert np.abs(wrong - noise).max() > 0.01  # Euler's slope is no flow map


def test_the_shortcut_target_is_that_of_the_papers_time(rows):
    """The paper's time runs from noise at 0 to data at 1 and its velocity is z_0 - eps."""
    _, noise = rows
    t, size = np.asarray([1.0, 0.5, 0.75, 1.0, 0.25, 1.0]), np.asarray([1.0, 0.5, 0.25, 0.5, 0.125, 0.25])

    def network(z, t, size, sine, shape):
        return 3 * sine(z * shape(t)) + z * shape(size) + 2

    def ours(z, t, size):
        return network(z, t, size, jnp.sin, lambda x: x[:, None, None])

    def theirs(x, tau, size):
        return -network(x, 1 - tau, size, np.sin, lambda x: x[:, None, None])

    x, tau = 2 * np.asarray(noise, np.float64), 1 - t
    first = theirs(x, tau, size / 2)
    middle = np.clip(x + (size / 2)[:, None, None] * first, -4, 4)
    expected = np.clip((first + theirs(middle, tau + size / 2, size / 2)) / 2, -4, 4)
    assert (np.abs(expected) == 4).any() and (np.abs(expected) < 4).any()
    assert_close(shortcut_target(ours, 2 * noise, jnp.float32(t), jnp.float32(size)), -expected, 1e-5)


# ---- MeanFlow


def test_the_average_velocity_of_a_linear_field_is_its_own_target(rows):
    """Along dz/dt = RATE z the identity u = v - (t-r) du/dt holds for the known average, and not for another."""
    _, noise = rows
    r, t = jnp.asarray([0.0, 0.2, 0.1, 0.4, 0.0, 0.5]), jnp.asarray([1.0, 0.9, 0.6, 0.5, 0.3, 1.0])
    wanted = meanflow_target(exact_average, noise, RATE * noise, r, t)
    assert_close(exact_average(noise, r, t), wanted, 1e-5)
    wanted = meanflow_target(lambda z, r, t: RATE * z, noise, RATE * noise, r, t)
    assert np.abs(RATE * noise - wanted).max() > 0.05
    assert_close(
        noise - spread(t - r, noise) * exact_average(noise, r, t), jnp.exp(-RATE * spread(t - r, noise)) * noise, 1e-5
    )


def test_the_total_derivative_is_that_of_finite_differences(rows):
    """Along (v, 0, 1): z and t move, r does not."""
    clean, noise = rows
    velocity = np.asarray(noise - clean, np.float64)
    r, t, h = np.full(6, 0.2), np.linspace(0.3, 0.9, 6), 1e-5

    def network(z, r, t, tanh):
        r, t = r[:, None, None], t[:, None, None]
        return tanh(z * t + r) + t**2 * z - 3 * r * t

    z = np.asarray(noise, np.float64)
    change = (
        network(z + h * velocity, r, t + h, np.tanh) - network(z - h * velocity, r, t - h, np.tanh)
    ) / (2 * h)  # fmt: skip
    given = noise, noise - clean, jnp.float32(r), jnp.float32(t)
    expected = velocity - (t - r)[:, None, None] * change
    assert_close(meanflow_target(lambda z, r, t: network(z, r, t, jnp.tanh), *given), expected, 1e-5)

    # A slope of some width is that difference, and not yet the derivative.
    h = 0.02
    ends = [network(z + s * velocity, r, t + s, np.tanh) for s in (h, -h)]
    slope = velocity - (t - r)[:, None, None] * (ends[0] - ends[1]) / (2 * h)
    found = meanflow_target(lambda z, r, t: network(z, r, t, jnp.tanh), *given, width=h)
    assert_close(found, slope, 1e-4)
    assert np.abs(slope - expected).max() > 1e-3
    square = [meanflow_target(lambda z, r, t: z * spread(t - 2 * r, z), *given, width=w) for w in (0, 0.05)]
    assert_close(*square, 1e-4)


def test_a_slope_stays_between_r_and_noise(rows):
    clean, noise = rows
    r, t = jnp.array([0.5, 0.995, 0.4, 0.7, 0.2, 1.0]), jnp.array([0.51, 1.0, 0.4, 0.99, 1.0, 1.0])
    seen = []

    def average(z, r, t):
        seen.append((r, t))
        return z * spread(t, z)

    slope = meanflow_target(average, noise, noise - clean, r, t, width=0.05)
    assert all((t >= r).all() and (t <= 1).all() for r, t in seen)
    assert np.isfinite(slope).all()
    same = np.asarray(r == t)
    assert_close(slope[same], (noise - clean)[same], 0)


def test_a_slope_averages_ripples_out(rows):
    """A network with a ripple of 1% that turns ten thousand times: its derivative is all ripple, its slope hardly."""
    clean, noise = rows
    r, t = jnp.full(6, 0.1), jnp.linspace(0.3, 0.9, 6)

    def network(z, r, t):
        return spread(t, z) + 0.01 * jnp.sin(10_000.0 * spread(t, z)) + 0 * z

    smooth = np.asarray(noise - clean) - np.asarray(t - r)[:, None, None]
    exact, slope = (meanflow_target(network, noise, noise - clean, r, t, width=w) for w in (0, 0.02))
    assert np.abs(exact - smooth).max() > 10
    assert np.abs(slope - smooth).max() < 0.5


def test_at_equal_times_the_target_is_the_velocity(rows):
    clean, noise = rows
    t = jnp.linspace(0.1, 0.9, 6)
    wanted = meanflow_target(lambda z, r, t: jnp.sin(z * spread(t, z)), noise, noise - clean, t, t)
    assert_close(wanted, noise - clean, 0)


def test_the_adaptive_weight_has_no_gradient(rows):
    clean, noise = rows
    error = ((np.asarray(clean, np.float64) - np.asarray(noise, np.float64)) ** 2).sum((1, 2))
    assert_close(meanflow_loss(clean, noise), error / (error + 0.01), 1e-5)
    assert_close(meanflow_loss(clean, noise, power=0.5, offset=1), error / np.sqrt(error + 1), 1e-5)
    gradient = jax.grad(lambda x: meanflow_loss(x, noise).sum())(clean)
    assert_close(gradient, 2 * np.asarray(clean - noise) / (error + 0.01)[:, None, None], 1e-5)


def test_phases_of_a_shifted_grid_are_shifted_phases():
    edges, _ = consistency_phases(grid(40, 3.0), 4)
    assert_close(edges, shift_time(jnp.linspace(1.0, 0.0, 5), 3.0), 1e-6)
