"""Targets for samplers of a few steps: consistency, shortcut and average-velocity training of a flow.

Pure functions over any network; times and path are those of `flow` (t = 0 clean, t = 1 noise, u = eps - z_0).

    PCM       Phased Consistency Models, arXiv 2405.18407: every point of a phase is mapped to the phase's lower edge
    LCM       arXiv 2310.04378: the same with one phase, sampled with fresh noise between jumps
    Shortcut  arXiv 2410.12557: one network for all step sizes, a step being two half steps
    MeanFlow  arXiv 2505.13447: the network is the average velocity u(z, r, t) between r and t

Deviations:
- PCM's released code takes its training edges from the clean end and its sampling edges from the noise end, one rounding apart
  where the phases do not divide the steps, and stops at the last time above 0. Here both use the same edges and end at 0;
- LCM is written for diffusion schedules; this is its flow form, in which c_skip and c_out are not needed, as a jump of length 0
  is the identity;
- the shortcut paper's time runs from noise to data and its velocity is z_0 - eps; both are turned round here.

A target never has a gradient. Where latents are guided, the guidance belongs into the teacher that is passed in.
Times have the leading axes of their latents, as in `flow`.
Letters: B rows, T = N + 1 times of N solver steps, E = M + 1 edges of M phases.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from latentjax.thoughts.flow import Velocity, interpolate, spread


def jump(
    z: Float[Array, "*shape"], velocity: Float[Array, "*shape"], t: Float[Array, "..."], end: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """z_s = z_t - (t-s) u: one Euler step from t to s = `end`."""
    return z - spread(t - end, z) * velocity


def consistency_phases(times: Float[Array, "T"], phases: int) -> tuple[Float[Array, "E"], Float[Array, "N"]]:
    """PCM's phases of a solver grid of N + 1 times, falling from 1 to 0: their M + 1 edges, falling, and for each of the N steps
    the lower edge of its phase.

    The edges are grid points at equally spaced indices, rounded towards clean. They are also the grid of the student's sampler:
    M Euler steps. Training draws a step n, z at times[n] and a teacher step to times[n+1]; the published flow model has
    N = 50 and M = 8."""
    steps = len(times) - 1
    if not 1 <= phases <= steps:
        raise ValueError(f"phases={phases}: must lie between 1 and the number of solver steps, {steps}")
    from_clean = np.arange(phases + 1) * steps // phases  # indices counted from t = 0
    ends = steps - 1 - np.arange(steps)
    lower = from_clean[np.searchsorted(from_clean, ends, side="right") - 1]
    return times[steps - from_clean[::-1]], times[steps - lower]


def pcm_target(
    teacher: Velocity,
    student: Velocity,
    z: Float[Array, "*shape"],
    t: Float[Array, "..."],
    after: Float[Array, "..."],
    edge: Float[Array, "..."],
) -> Float[Array, "*shape"]:
    """sg f(z', after, edge), with z' one step of the teacher from z at t to `after` and f the student's jump to `edge`.

    The loss compares it, by `pseudo_huber`, with `jump(z, student(z, t), t, edge)`; t > after >= edge. With edge = 0 this is LCM.
    The student in the target is a copy of the trained one (PCM) or its moving average (LCM). The teacher's velocity is guided:
    PCM's c + 3 (c - u) is `guide` with scale 4."""
    moved = jump(z, teacher(z, t), t, after)
    return jax.lax.stop_gradient(jump(moved, student(moved, after), after, edge))


def pseudo_huber(error: Float[Array, "*shape"], c: float | int = 0.001) -> Float[Array, "*shape"]:
    """sqrt(x² + c²) - c per element, which PCM and LCM average: x²/(2c) near 0, |x| far away."""
    if not c > 0:
        raise ValueError(f"c={c}: must be positive")
    return error**2 / (jnp.sqrt(error**2 + c**2) + c)  # the same, without a difference of near-equal numbers


def resample(
    velocity: Velocity,
    z: Float[Array, "*shape"],
    times: Float[Array, "T"],
    key: Key[Array, ""],
    *,
    record: bool = False,
) -> tuple[Float[Array, "*shape"], Float[Array, "T *shape"] | None]:
    """LCM's sampler, in the place of `flow.solve`: jump to t = 0, and from there with fresh noise up to the next of `times`.

    The last of `times` is 0 and gets no noise. For a network whose jumps end at 0 wherever they begin (one phase)."""

    def step(z: Any, given: Any) -> tuple[Any, Any]:
        t, after, key = given
        noise = jax.random.normal(key, z.shape, z.dtype)
        new = interpolate(jump(z, velocity(z, t), t, jnp.zeros_like(t)), noise, after)
        return new, new if record else None

    last, states = jax.lax.scan(step, z, (times[:-1], times[1:], jax.random.split(key, len(times) - 1)))
    return last, jnp.concatenate([z[None], states]) if record else None


def shortcut_target(
    average: Callable[[Any, Any, Any], Any],
    z: Float[Array, "*shape"],
    t: Float[Array, "..."],
    size: Float[Array, "..."],
    clip: float | int | None = 4.0,
) -> Float[Array, "*shape"]:
    """What average(z, t, size), the velocity of one step from t to t - size, is trained to be: the mean of two half steps.

        first = s(z, t, d/2),  z' = z - d/2 first,  second = s(z', t - d/2, d/2),  target = sg((first + second)/2)

    z' and the target are limited to [-clip, clip]: published with 4, for latents of about unit variance; None switches it off.
    Published use: base steps of 1/128, d in {1/64, ..., 1}, t on the multiples of d, in one row out of 8; the other rows are
    trained by flow matching as steps of 1/128."""

    def limit(x: Any) -> Any:
        return x if clip is None else jnp.clip(x, -clip, clip)

    half = size / 2
    first = average(z, t, half)
    middle = limit(z - spread(half, z) * first)
    second = average(middle, t - half, half)
    return jax.lax.stop_gradient(limit((first + second) / 2))


def meanflow_target(
    average: Callable[[Any, Any, Any], Any],
    z: Float[Array, "*shape"],
    velocity: Float[Array, "*shape"],
    r: Float[Array, "*times"],
    t: Float[Array, "*times"],
    width: float | int = 0.0,
) -> Float[Array, "*shape"]:
    """What the network's u = average(z, r, t) is trained to be: sg(v - (t-r) du/dt), along (dz, dr, dt) = (v, 0, 1).

    velocity  eps - z_0 at z = z_t, or its guided form. For r = t the target is the velocity itself: flow matching
    r, t      r <= t. Published: both sigmoid(N(-0.4, 1)), ordered, and r = t in 75 % of the rows
    width     0: du/dt is a Jacobian-vector product, as published. Else the slope between t - width and t + width, or the ends of
              [r, 1] where those are nearer: for networks that ripple in t, and for kernels without forward-mode derivatives

    One step samples z_0 = z_1 - u(z_1, 0, 1)."""
    if width:
        before, after = jnp.maximum(t - width, r), jnp.minimum(t + width, 1.0)
        ends = [average(z + spread(at - t, z) * velocity, r, at) for at in (before, after)]
        change = (ends[1] - ends[0]) / spread(jnp.maximum(after - before, 1e-6), z)
    else:
        change = jax.jvp(average, (z, r, t), (velocity, jnp.zeros_like(r), jnp.ones_like(t)))[1]
    return jax.lax.stop_gradient(velocity - spread(t - r, z) * change)


def meanflow_loss(
    prediction: Float[Array, "B *shape"],
    wanted: Float[Array, "B *shape"],
    power: float | int = 1.0,
    offset: float | int = 0.01,
) -> Float[Array, "B"]:
    """e / sg(e + offset)^power per row, e being the squared error summed over the row: at power 1 (published) rows count nearly
    alike. Where e varies much from row to row, as with latents of few numbers, that is the gradient of log(e + offset), whose
    optimum is nearer to a mode than to the mean that a flow needs; power 0 is the squared error."""
    error = jnp.sum((prediction - wanted) ** 2, axis=tuple(range(1, prediction.ndim)))
    return error / jax.lax.stop_gradient(error + offset) ** power
