"""Targets for samplers of a few steps: consistency, shortcut and average-velocity training of a flow.

Pure functions over any network; times and path are those of `flow` (t = 0 clean, t = 1 noise, u = eps - z_0).

    PCM       Phased Consistency Models, arXiv 2405.18407: every point of a phase is mapped to the phase's lower edge
    LCM, TCD  arXiv 2310.04378 and 2402.19159: the same target with another end, and TCD's re-noising between jumps
    Shortcut  arXiv 2410.12557: one network for all step sizes, a step being two half steps
    MeanFlow  arXiv 2505.13447: the network is the average velocity u(z, r, t) between r and t

Deviations:
- PCM's released code takes its training edges from the clean end and its sampling edges from the noise end, one rounding apart
  where the phases do not divide the steps, and stops at the last time above 0. Here both use the same edges and end at 0;
- LCM and TCD are written for diffusion schedules; this is their flow form, in which c_skip and c_out are not needed, as a jump
  of length 0 is the identity;
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
from jaxtyping import Array, Float

from latentjax.thoughts.flow import Velocity, spread


def jump(
    z: Float[Array, "*shape"], velocity: Float[Array, "*shape"], t: Float[Array, "..."], end: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """z_s = z_t - (t-s) u: one Euler step (TCD's first-order parametrisation in its flow form) from t to s = `end`."""
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

    The loss compares it, by `pseudo_huber`, with `jump(z, student(z, t), t, edge)`; t > after >= edge. With edge = 0 this is LCM,
    with a random edge <= after, which the student is then told, TCD. The student in the target is a copy of the trained
    one (PCM) or its moving average (LCM). The teacher's velocity is guided: PCM's c + 3 (c - u) is `guide` with scale 4."""
    moved = jump(z, teacher(z, t), t, after)
    return jax.lax.stop_gradient(jump(moved, student(moved, after), after, edge))


def pseudo_huber(error: Float[Array, "*shape"], c: float | int = 0.001) -> Float[Array, "*shape"]:
    """sqrt(x² + c²) - c per element, which PCM and LCM average: x²/(2c) near 0, |x| far away."""
    if not c > 0:
        raise ValueError(f"c={c}: must be positive")
    return error**2 / (jnp.sqrt(error**2 + c**2) + c)  # the same, without a difference of near-equal numbers


def renoising(
    start: Float[Array, "*shape"], end: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """a = (1-t)/(1-s) and b = sqrt(t² - a² s²): with fresh noise xi, a z_s + b xi has the distribution of z_t, for s <= t.

    TCD (strategic stochastic sampling) jumps to s = (1-gamma) t and diffuses up to t, with gamma in [0, 1], 0.3 by default: 0 is
    deterministic, 1 is LCM's sampler. The last jump, to t = 0, has no noise."""
    at_noise = start >= 1
    a = jnp.where(at_noise, 1, (1 - end) / jnp.where(at_noise, 1, 1 - start))
    return a, jnp.sqrt(jnp.maximum(end**2 - (a * start) ** 2, 0))


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
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The network's u = average(z, r, t), and what it is trained to be: sg(v - (t-r) du/dt), along (dz, dr, dt) = (v, 0, 1).

    velocity  eps - z_0 at z = z_t, or its guided form. For r = t the target is the velocity itself: flow matching
    r, t      r <= t. Published: both sigmoid(N(-0.4, 1)), ordered, and r = t in 75 % of the rows

    One step samples z_0 = z_1 - u(z_1, 0, 1)."""
    tangents = (velocity, jnp.zeros_like(r), jnp.ones_like(t))
    prediction, change = jax.jvp(average, (z, r, t), tangents)
    return prediction, jax.lax.stop_gradient(velocity - spread(t - r, z) * change)


def meanflow_loss(
    prediction: Float[Array, "B *shape"],
    wanted: Float[Array, "B *shape"],
    power: float | int = 1.0,
    offset: float | int = 0.01,
) -> Float[Array, "B"]:
    """e / sg(e + offset)^power per row, e being the squared error summed over the row: at power 1 rows count nearly alike."""
    error = jnp.sum((prediction - wanted) ** 2, axis=tuple(range(1, prediction.ndim)))
    return error / jax.lax.stop_gradient(error + offset) ** power
