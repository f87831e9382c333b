"""The mathematics of flows between noise and latents: paths, targets, time grids, solvers, guidance and repulsion.

Convention of the whole package: t = 0 is clean, t = 1 is noise (LaDiR, arXiv 2510.04573, flow matching). With eps ~ N(0, I)

    z_t = (1-t) z_0 + t eps,    u = dz_t/dt = eps - z_0,    a sample is the solution of dz/dt = E[u | z, t] from t = 1 to t = 0

Shifted times are those of RAE (arXiv 2510.11690): t' = a t / (1 + (a-1) t), in training and in the sampler's grid. Guidance and
repulsion between the samples of one problem are LaDiR's (section "Inference" of the paper, and its released code).

Deviations and what is uncertain:
- the paper adds gamma F to "the prediction" without naming its sign. F is a force on z, and z moves against the velocity, so
  here it is subtracted from the velocity (`diversify`); the released code's force on velocities is added to them;
- "distance between samples" is read as that of whole blocks; per slot is the form "slotwise". The paper says neither;
- the form "early_text" is an older version of the text that was seen only in quotation: see `repulsion`;
- the target kind "v" is a reading of the paper's ablation "v-prediction", whose definition was not found: see `target`.

Letters: B rows (problem-major: the samples of one problem are neighbours), S slots of a block, Z latent width. A time `t` has the
leading axes of its latents: [B] gives each row its own, [] one for all. Everything is computed in the dtype of the latents,
which should be float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

Velocity = Callable[[Any, Any], Any]  # (z, t) -> dz/dt, of the shape of z

# Closer to an end than this, a prediction no longer determines the velocity and its limit is taken.
_END = 1e-4


def spread(t: Float[Array, "..."], z: Float[Array, "..."]) -> Float[Array, "..."]:
    """`t` with axes of length one appended, so that it broadcasts against `z` from the left.

    Raises ValueError unless the shape of `t` is the beginning of that of `z`."""
    if t.shape != z.shape[: t.ndim]:
        raise ValueError(f"t has shape {t.shape}: it must be [] or the leading axes of the latents' shape {z.shape}")
    return t.reshape(t.shape + (1,) * (z.ndim - t.ndim))


# ---- the path and what a network predicts on it


def interpolate(
    clean: Float[Array, "*shape"], noise: Float[Array, "*shape"], t: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """z_t = (1-t) z_0 + t eps."""
    t = spread(t, clean)
    return (1 - t) * clean + t * noise


def target(
    clean: Float[Array, "*shape"], noise: Float[Array, "*shape"], t: Float[Array, "..."], kind: str
) -> Float[Array, "*shape"]:
    """What a network of this kind is trained to output at z_t.

    velocity  eps - z_0, the paper's choice
    x         z_0
    noise     eps
    v         (1-t) eps - t z_0: the v-prediction of diffusion models, alpha eps - sigma z_0, with this path's coefficients. That
              LaDiR's ablation means this one is uncertain
    """
    t = spread(t, clean)
    targets = {"velocity": noise - clean, "x": clean, "noise": noise, "v": (1 - t) * noise - t * clean}
    if kind not in targets:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(targets)}")
    return targets[kind]


def velocity_of(
    prediction: Float[Array, "*shape"], z: Float[Array, "*shape"], t: Float[Array, "..."], kind: str
) -> Float[Array, "*shape"]:
    """The velocity that a prediction at z_t stands for: `velocity_of(target(..., kind), z_t, t, kind)` is eps - z_0.

    Two kinds leave the velocity open at one end, where z_t itself is what they predict: x at t = 0 and noise at t = 1. There
    E[u | z] is taken: E[eps] - z = -z, exact, and z - E[z_0] = z, exact for centred latents. Before that end the error of
    the prediction is divided by t or by 1 - t. The kind v has no such end.
    """
    t = spread(t, z)
    if kind == "velocity":
        return prediction
    if kind == "x":
        at_end = t < _END
        return jnp.where(at_end, -z, (z - prediction) / jnp.where(at_end, 1, t))
    if kind == "noise":
        at_end = 1 - t < _END
        return jnp.where(at_end, z, (prediction - z) / jnp.where(at_end, 1, 1 - t))
    if kind == "v":
        return (prediction + (2 * t - 1) * z) / ((1 - t) ** 2 + t**2)
    raise ValueError(f"kind={kind!r}: must be one of velocity, x, noise, v")


# ---- times


def shift_time(t: Float[Array, "*shape"], a: float | int) -> Float[Array, "*shape"]:
    """t' = a t / (1 + (a-1) t): a > 1 moves times towards noise. Shifts compose: by a, then by b, is by a b.

    It is logit t' = logit t + log a, so that a shifted logit-normal time is one with its mean moved by log a."""
    _check_shift(a)
    return t / (t + (1 - t) / a)  # the same fraction, with the ends 0 and 1 exact


def dimension_shift(size: int, reference: int) -> float:
    """RAE's a = sqrt(m/m0) for latents of m = slots * width numbers; m0 (4096 for images) is fitted once, at a small size."""
    if size < 1 or reference < 1:
        raise ValueError(
            f"size={size}, reference={reference}: both count the numbers in a latent and must be at least 1"
        )
    return (size / reference) ** 0.5


def _check_shift(a: float | int) -> None:
    if not 0 < a < np.inf:
        raise ValueError(f"shift={a}: must be positive; 1 changes nothing, more moves times towards noise")


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """How training times are drawn, in (0, 1).

    kind       uniform (LaDiR), or logit_normal: sigmoid(N(mean, std²)) (RAE with mean 0, MeanFlow with mean -0.4)
    mean, std  of the logit; only of logit_normal
    shift      `shift_time`'s a, applied afterwards; the sampler's `grid` takes the same
    """

    kind: str = "uniform"
    mean: float | int = 0.0
    std: float | int = 1.0
    shift: float | int = 1.0

    def __post_init__(self):
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(f"kind={self.kind!r}: must be uniform or logit_normal")
        if self.kind == "uniform" and (self.mean, self.std) != (0, 1):
            raise ValueError(f"mean={self.mean}, std={self.std}: only logit_normal times have them, not uniform ones")
        if not self.std > 0:
            raise ValueError(f"std={self.std}: must be positive")
        _check_shift(self.shift)


def draw_times(key: Key[Array, ""], shape: tuple[int, ...], sampler: TimeSampler) -> Float[Array, "..."]:
    """Independent times of the given shape, float32."""
    if sampler.kind == "uniform":
        t = jax.random.uniform(key, shape)
    else:
        t = jax.nn.sigmoid(sampler.mean + sampler.std * jax.random.normal(key, shape))
    return shift_time(t, sampler.shift)


def grid(steps: int, shift: float | int = 1.0) -> Float[Array, "T"]:
    """The sampler's `steps` + 1 times from 1 to 0: equal steps, shifted as the training times were."""
    if steps < 1:
        raise ValueError(f"steps={steps}: a sampler needs at least 1")
    return shift_time(jnp.linspace(1.0, 0.0, steps + 1), shift)


# ---- solvers

_EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2}


def evaluations(steps: int, solver: str) -> int:
    """Velocity evaluations of `solve`: one a step for euler (order 1), two for heun and midpoint (order 2)."""
    if solver not in _EVALUATIONS:
        raise ValueError(f"solver={solver!r}: must be one of {', '.join(_EVALUATIONS)}")
    return steps * _EVALUATIONS[solver]


def solve(
    velocity: Velocity,
    z: Float[Array, "*shape"],
    times: Float[Array, "T"],
    solver: str = "euler",
    *,
    remat: bool = False,
    record: bool = False,
) -> tuple[Float[Array, "*shape"], Float[Array, "T *shape"] | None]:
    """Integrate dz/dt = velocity(z, t) through `times`, usually those of `grid`: the last state, and all states if `record`.

    velocity  a pure function of z and a scalar time. heun evaluates it at both ends of a step, t = 0 included
    z         the state at times[0]
    remat     keep only the states for the gradient and evaluate the velocities again in the backward pass
    """
    evaluations(len(times) - 1, solver)  # rejects an unknown solver
    if len(times) < 2:
        raise ValueError(f"times has {len(times)} entries: a step needs two")

    def step(z: Any, ends: Any) -> tuple[Any, Any]:
        t, after = ends
        dt = after - t  # negative towards clean
        slope = velocity(z, t)
        if solver == "heun":
            slope = (slope + velocity(z + dt * slope, after)) / 2
        elif solver == "midpoint":
            slope = velocity(z + dt / 2 * slope, t + dt / 2)
        new = z + dt * slope
        return new, new if record else None

    last, states = jax.lax.scan(jax.checkpoint(step) if remat else step, z, (times[:-1], times[1:]))
    return last, jnp.concatenate([z[None], states]) if record else None


# ---- guidance and repulsion


def guide(
    conditional: Float[Array, "*shape"], unconditional: Float[Array, "*shape"], scale: float | int | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Classifier-free guidance u + w (c - u): 0 is unconditional, 1 conditional, LaDiR uses 4.

    Papers that write c + w' (c - u) mean w = w' + 1."""
    return unconditional + scale * (conditional - unconditional)


FORMS = ("paper", "slotwise", "early_text", "released")


def repulsion(
    z: Float[Array, "B S Z"], mask: Bool[Array, "B"], group: int, form: str = "paper"
) -> Float[Array, "B S Z"]:
    """The force F that drives the samples of one problem apart; rows come in groups of `group` samples of one problem.

    With d_ij = ||z_i - z_j|| and sigma = median_{i<j} d_ij over the pairs of one problem (LaDiR, diversity guidance):

    paper       F_i = sum_{j != i} 2 (1 - d²/sigma²) exp(-d²/sigma²) (z_i - z_j), a point being the whole block of a sample,
                flattened: a block is denoised as one and says one thing, and samples that agree in one slot only are different.
                F is the gradient of sum_{i<j} d² exp(-d²/sigma²) at fixed sigma: it repels where d < sigma and attracts where
                d > sigma, so half of the pairs attract, and two samples alone feel nothing (d = sigma)
    slotwise    the same between the tokens of one slot, each slot with its own sigma: the other reading
    early_text  F_i = sum_{j != i} 2/sigma² exp(-d/(2 sigma²)) (z_i - z_j), which only repels. Uncertain: whether d was meant
                squared, as in a Gaussian kernel, and whether the factor (1 - d²/sigma²) stood there as well
    released    as in the public code: `z` is the predicted VELOCITY, F as in the paper's form, but between the S tokens inside
                one sample; sigma is the lower median over all tokens of the problem, of one sample or of two (a
                batch of the released sampler is one problem)

    mask marks the samples that count: the others enter neither sigma nor F and feel no force. sigma is at least 1e-6 (the
    released code adds that to it) and gets no gradient.
    """
    _check_form(form)
    rows, slots, _ = z.shape
    if group < 1 or rows % group:
        raise ValueError(f"group={group}: must be positive and divide the number of rows, {rows}")

    def between(points: Any, present: Any) -> Any:
        return _force(points, present, _median_distance(points, present, "linear"), form)

    def one_problem(blocks: Any, present: Any) -> Any:
        if form == "released":
            tokens = blocks.reshape(group * slots, -1)
            sigma = _median_distance(tokens, jnp.repeat(present, slots), "lower")
            return jax.vmap(lambda block, here: _force(block, jnp.full(slots, here), sigma, form))(blocks, present)
        if form == "slotwise":
            return jax.vmap(between, in_axes=(1, None), out_axes=1)(blocks, present)
        return between(blocks.reshape(group, -1), present).reshape(blocks.shape)

    return jax.vmap(one_problem)(z.reshape(-1, group, *z.shape[1:]), mask.reshape(-1, group)).reshape(z.shape)


def _distances(points: Float[Array, "N W"]) -> tuple[Float[Array, "N N W"], Float[Array, "N N"]]:
    """z_i - z_j, and its length with a gradient that is 0 and not NaN between equal points."""
    difference = points[:, None] - points[None]
    squared = jnp.sum(difference**2, axis=-1)
    apart = squared > 0
    return difference, jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def _median_distance(points: Float[Array, "N W"], present: Bool[Array, "N"], method: str) -> Float[Array, ""]:
    """Over the pairs of present points; 1e-6 where there is none. For an even number of pairs, "linear" halves the two middle
    ones, "lower" takes the smaller."""
    first, second = np.triu_indices(len(points), 1)
    if not len(first):
        return jnp.full((), 1e-6, points.dtype)
    distance = _distances(jax.lax.stop_gradient(points))[1][first, second]
    of_pairs = jnp.where(present[first] & present[second], distance, jnp.nan)
    return jnp.fmax(jnp.nanquantile(of_pairs, 0.5, method=method), 1e-6)


def _force(
    points: Float[Array, "N W"], present: Bool[Array, "N"], sigma: Float[Array, ""], form: str
) -> Float[Array, "N W"]:
    difference, distance = _distances(points)
    if form == "early_text":
        weight = 2 / sigma**2 * jnp.exp(-distance / (2 * sigma**2))
    else:
        ratio = (distance / sigma) ** 2
        weight = 2 * (1 - ratio) * jnp.exp(-ratio)
    weight = jnp.where(present[:, None] & present[None], weight, 0)
    return jnp.sum(weight[..., None] * difference, axis=1)


def repulsion_strength(
    t: Float[Array, "*shape"], gamma_max: float | int, form: str = "paper"
) -> Float[Array, "*shape"]:
    """gamma_t: strong early, at noise. gamma_max t in the paper; 0.1 + (gamma_max - 0.1) t² in the released code."""
    _check_form(form)
    return 0.1 + (gamma_max - 0.1) * t**2 if form == "released" else gamma_max * t


def diversify(
    velocity: Float[Array, "B S Z"],
    z: Float[Array, "B S Z"],
    t: Float[Array, "..."],
    mask: Bool[Array, "B"],
    group: int,
    gamma_max: float | int,
    form: str = "paper",
) -> Float[Array, "B S Z"]:
    """The velocity with repulsion between the samples of a problem (`repulsion`), in the sign that drives them apart.

    A force on z is subtracted, as a step towards clean is z <- z - dt velocity; the released force acts on the velocities
    and is added. Published gamma_max: 0.3 to 0.5 best, 1.0 and more costs accuracy."""
    gamma = spread(repulsion_strength(t, gamma_max, form), z)
    if form == "released":
        return velocity + gamma * repulsion(velocity, mask, group, form)
    return velocity - gamma * repulsion(z, mask, group, form)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r}: must be one of {', '.join(FORMS)}")


# ---- a sampler


@dataclasses.dataclass(frozen=True)
class FlowSampler:
    """How a block is generated. Defaults are the paper's."""

    steps: int = 30  # paper: 10 to 50
    solver: Literal["euler", "heun", "midpoint"] = "euler"
    guidance: float | int = 4.0  # w; 1: none
    noise_scale: float | int = 2**0.5  # s
    repulsion: float | int = 0.0  # gamma_max; paper: 0.3 to 0.5 for the most diverse samples
    repulsion_form: str = "paper"

    def __post_init__(self):
        evaluations(self.steps, self.solver)  # rejects an unknown solver
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps}: must be at least 1")
        if self.repulsion_form not in FORMS:
            raise ValueError(f"sampler.repulsion_form={self.repulsion_form!r}: must be one of {', '.join(FORMS)}")
        for field in ("guidance", "noise_scale", "repulsion"):
            if getattr(self, field) < 0:
                raise ValueError(f"sampler.{field}={getattr(self, field)}: must not be negative")
