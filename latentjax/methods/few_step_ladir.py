"""Students of a LaDiR reasoner that make a block in one to four steps (equations in latentjax/thoughts/few_step.py).

    phased     Phased Consistency Models (arXiv 2405.18407): from any point of a phase to the phase's lower edge, consistent with
               one step of the guided teacher; M phases are M Euler steps. One phase is a consistency model (arXiv 2310.04378):
               any number of jumps to t = 0, with fresh noise between them
    shortcut   Shortcut models (arXiv 2410.12557): the velocity of a step of any size d, one step being two half steps
    meanflow   MeanFlow (arXiv 2505.13447): the average velocity between two times, by its derivative along the path

A student starts as its teacher (`init_from={"teacher": RUN}`), whose guidance it takes in: it samples without. What it reads
besides the time is the length of the step, embedded like the time, with an output that starts at zero. `reward_weight` adds
the negative log-likelihood of the right answer given the blocks that one jump from noise makes (Reward Guided Latent Consistency
Distillation, arXiv 2403.11027, with a language model's likelihood as reward): a cheap form of LaDiR's second stage.

Deviations: the papers are about images; that these objectives suit thought tokens is to be shown. Prefixes are the clean blocks
(a student that also saw its own would need rollouts). The reward's jump begins at t = 1, from where every student has learnt to
reach 0; the paper's at the drawn time. Shortcut's bootstrap takes one training step in `bootstrap_every`, not one row. MeanFlow
with guidance takes the guided velocity from the teacher, not from itself. Its du/dt is a slope over t +- 0.02 instead of a
Jacobian-vector product: embeddings of 1000 t ripple, and in a trained reasoner of ours the product is three to eleven
times the slope and points elsewhere; nor do fused attention kernels have one.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from latentjax.backbone import decoder
from latentjax.methods.ladir import LaDiR, TimeEmbedding, row_means
from latentjax.objectives.cross_entropy import log_probabilities
from latentjax.rollout import Backbone
from latentjax.thoughts import few_step, flow, vae

_WIDTH = 0.02  # MeanFlow: du/dt is a slope over t +- so much


@dataclasses.dataclass(frozen=True)
class FewStepLaDiR(LaDiR):
    """A `LaDiR` with another flow loss. `sampler.steps` is the number of steps that it is validated with."""

    objective: Literal["phased", "shortcut", "meanflow"] = "phased"
    teacher_guidance: float | int = 4.0  # w of the teacher; 1: none
    teacher_steps: int = 50  # phased: the solver grid
    phases: int = 4
    base_steps: int = 128  # shortcut: the smallest step is 1 / base_steps; a power of two
    bootstrap_every: int = 8
    flow_share: float | int = 0.75  # meanflow: of copies with r = t
    adaptive_power: float | int = 1.0  # meanflow: p of `few_step.meanflow_loss`; 0: squared error
    reward_weight: float | int = 0.0

    def __post_init__(self):
        if self.objective not in ("phased", "shortcut", "meanflow"):
            raise ValueError(f"method.objective={self.objective!r}: must be phased, shortcut or meanflow")
        if self.sampler.guidance != 1 or self.null_probability:
            raise ValueError(
                f"method.sampler.guidance={self.sampler.guidance}, null_probability={self.null_probability}: a student has "
                "taken its teacher's guidance in; set 1 and 0"
            )
        super().__post_init__()
        if self.prediction != "velocity":
            raise ValueError(f"method.prediction={self.prediction!r}: a student's output is a velocity")
        if not self.teacher_guidance >= 0:
            raise ValueError(f"method.teacher_guidance={self.teacher_guidance}: must not be negative")
        if self.objective == "phased" and not 1 <= self.phases <= self.teacher_steps:
            raise ValueError(f"method.phases={self.phases}: must lie between 1 and teacher_steps={self.teacher_steps}")
        if self.objective == "phased" and self.times.kind != "uniform":
            raise ValueError(
                f"method.times.kind={self.times.kind!r}: phased draws points of the solver grid; set uniform"
            )
        if self.objective != "phased" and self.times.shift != 1:
            raise ValueError(
                f"method.times.shift={self.times.shift}: step lengths of {self.objective} need equal steps"
            )
        if self.bootstrap_every < 1:
            raise ValueError(f"method.bootstrap_every={self.bootstrap_every}: must be at least 1")
        if not 0 <= self.flow_share <= 1:
            raise ValueError(f"method.flow_share={self.flow_share}: a share lies in [0, 1]")
        if not self.adaptive_power >= 0:
            raise ValueError(f"method.adaptive_power={self.adaptive_power}: must not be negative")
        if self.reward_weight < 0:
            raise ValueError(f"method.reward_weight={self.reward_weight}: must not be negative")
        if self.reward_weight and self.layout != "all_blocks":
            raise ValueError(
                f"method.reward_weight={self.reward_weight}: the answer is read after all blocks of a chain, and "
                f"layout={self.layout!r} makes some of them; set layout='all_blocks'"
            )
        if self.reward_weight and self.objective == "phased" and self.phases > 1:
            raise ValueError(
                f"method.phases={self.phases}: with reward_weight={self.reward_weight} one jump must lead to t = 0; set phases=1"
            )
        if self.base_steps < 2 or self.base_steps & (self.base_steps - 1):
            raise ValueError(f"method.base_steps={self.base_steps}: must be a power of two of at least 2")
        self._check_sampler()

    def _check_sampler(self):
        """Raise ValueError unless `sampler` takes the steps that the objective trains."""
        sampler = self.sampler
        if sampler.solver != "euler" or sampler.noise_scale != 1:
            raise ValueError(
                f"method.sampler.solver={sampler.solver!r}, noise_scale={sampler.noise_scale}: a student has learnt Euler "
                "steps from noise of scale 1; set euler and 1"
            )
        steps = sampler.steps
        if self.objective == "shortcut" and (self.base_steps % steps or steps & (steps - 1)):
            raise ValueError(
                f"method.sampler.steps={steps}: a shortcut student knows steps of 1/2, 1/4 and so on; set a power of two up "
                f"to base_steps={self.base_steps}"
            )
        if self.objective == "phased" and self.phases > 1 and steps != self.phases:
            raise ValueError(
                f"method.sampler.steps={steps}: a phased student jumps to the end of a phase; set phases={self.phases}"
            )

    @property
    def untrained(self):
        return (*super().untrained, "^method/teacher/")

    def teacher(self) -> LaDiR:
        """The method of the run that a student starts from."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(LaDiR)}
        return LaDiR(**fields)

    def parts(self):
        return {"teacher": self.teacher()}

    def init(self, key):
        teacher_key, span_key = jax.random.split(key)
        made = super().init(teacher_key)
        span = TimeEmbedding(self.backbone.width).init(span_key, jnp.zeros((1,)))["params"]
        made["span"] = span | {"out": jax.tree.map(jnp.zeros_like, span["out"])}
        made["head_span"] = made["span"]
        made["teacher"] = self._copy({"backbone": decoder.init(self.backbone, key), "method": made})
        return made

    @staticmethod
    def _copy(params: Any) -> Any:
        """What of a reasoner makes velocities."""
        left_out = ("vae", "latents", "decision", "span", "head_span", "teacher")
        own = {name: x for name, x in params["method"].items() if name not in left_out}
        return {"backbone": params["backbone"], "method": own}

    def check_source(self, role, source):
        super().check_source(role, source)
        if role == "teacher" and self.teacher_guidance != 1 and not source.null_probability:
            raise ValueError(
                f"method.teacher_guidance={self.teacher_guidance}: the teacher was trained with null_probability=0, so it "
                "has no null question to guide away from; set 1"
            )

    def adopt(self, role, params):
        return params | {"method": params["method"] | {role: self._copy(params)}}

    def measure(self, params, batch):
        return ()  # the teacher's statistics stay

    def with_measured(self, params, sums):
        return params

    def grid(self):
        if self.objective != "phased" or self.sampler.steps != self.phases:
            return super().grid()
        return few_step.consistency_phases(flow.grid(self.teacher_steps, self.times.shift), self.phases)[0]

    def span(self):
        return None if self.objective == "phased" else jnp.float32(1.0 / self.sampler.steps)

    def solve(self, velocity, noise, times, key, *, remat, record):
        if self.objective == "phased" and self.phases == 1:
            return few_step.resample(velocity, noise, times, jax.random.fold_in(key, 1), record=record)
        return super().solve(velocity, noise, times, key, remat=remat, record=record)

    def _with_span(self, name: str, own: Any, span: Any) -> Array:
        """The embedding of a step's length. Shortcut's differ by factors of two: it embeds 1 + log2(d) / 10. MeanFlow's lie
        close together and are differentiated: it embeds d / 100, whose sinusoids turn by 10 radians at most."""
        if self.objective == "meanflow":
            scaled = span / 100.0
        else:
            scaled = 1.0 + jnp.log2(jnp.maximum(span, 1e-3)) / 10.0
        return jnp.asarray(TimeEmbedding(self.backbone.width).apply({"params": own[name]}, scaled))

    def time_token(self, own, t, span=None):
        token = super().time_token(own, t)
        return token if span is None else token + self._with_span("span", own, jnp.broadcast_to(span, t.shape))

    def head_time(self, own, t, span=None):
        time = super().head_time(own, t)
        return time if span is None else time + self._with_span("head_span", own, jnp.broadcast_to(span, t.shape))

    def flow_loss(self, params, batch, clean, present, dropped, key, dropout_key, ctx):
        copies_key, own_key = jax.random.split(key)
        block, chosen, noise, t, there = self.draw_copies(clean, present, copies_key)
        slow = params if ctx.get("ema") is None else ctx["ema"]

        def network(params: Any, z: Array, t: Array, span: Any = None, *, null: bool = False) -> Array:
            out = self.two_copies(params, batch, clean, z, t, block[:, : z.shape[1]], dropped | null, span=span)
            return self.velocity(params["method"], out[2], z, t, span)[1]

        def teacher(z: Array, t: Array) -> Array:
            frozen = jax.lax.stop_gradient(params["method"]["teacher"])
            u = network(frozen, z, t)
            if self.teacher_guidance == 1:
                return u
            return flow.guide(u, network(frozen, z, t, null=True), self.teacher_guidance)

        def student(z: Array, t: Array, span: Any = None) -> Array:
            return network(jax.lax.stop_gradient(params), z, t, span)

        def average(z: Array, t: Array, span: Any = None) -> Array:
            return network(jax.lax.stop_gradient(slow), z, t, span)

        objective = {"phased": self._phased, "shortcut": self._shortcut, "meanflow": self._meanflow}[self.objective]
        z, t, span, error = objective(student, average, teacher, chosen, noise, t, own_key)
        at_end, text, hidden = self.two_copies(params, batch, clean, z, t, block, dropped, span=span, key=dropout_key)
        loss = row_means(error(self.velocity(params["method"], hidden, z, t, span)[1]), there)
        if self.reward_weight:
            start = noise[:, : present.shape[1]]  # of the first copy of each block
            whole = jnp.ones(start.shape[:2])
            u = network(params, start, whole, None if self.objective == "phased" else whole)
            loss = loss + self.reward_weight * self._unlikelihood(params, batch, start - u, present)
        return loss, at_end, text

    # Each objective returns point, time and step length of every copy [B, M, ...], and the error [B, M] of the velocity there.
    # Nothing in it has a gradient but that velocity.

    def _phased(self, student, average, teacher, clean, noise, t, key):
        times = flow.grid(self.teacher_steps, self.times.shift)
        _, lower = few_step.consistency_phases(times, self.phases)
        step = jax.random.randint(key, t.shape, 0, self.teacher_steps)
        t, after, edge = times[step], times[step + 1], lower[step]
        z = flow.interpolate(clean, noise, t)
        wanted = few_step.pcm_target(teacher, student, z, t, after, edge)

        def error(u: Array) -> Array:
            return few_step.pseudo_huber(few_step.jump(z, u, t, edge) - wanted).mean(axis=(2, 3))

        return z, t, None, error

    def _shortcut(self, student, average, teacher, clean, noise, t, key):
        draw_key, size_key, place_key = jax.random.split(key, 3)
        levels = self.base_steps.bit_length() - 1
        size = 2.0 ** -jax.random.randint(size_key, t.shape, 0, levels).astype(jnp.float32)  # 1 .. 2 / base_steps
        start = (jnp.floor(jax.random.uniform(place_key, t.shape) / size) + 1) * size  # a multiple of the size, up to 1
        bootstrap = jax.random.bernoulli(draw_key, 1.0 / self.bootstrap_every)
        base = jnp.full(t.shape, 1.0 / self.base_steps)
        t, span = jnp.where(bootstrap, start, t), jnp.where(bootstrap, size, base)
        z = flow.interpolate(clean, noise, t)

        def halves() -> Array:
            return few_step.shortcut_target(average, z, t, span)

        def plain() -> Array:
            return teacher(z, t) if self.teacher_guidance != 1 else noise - clean

        wanted = jax.lax.stop_gradient(jax.lax.cond(bootstrap, halves, plain))
        return z, t, span, lambda u: ((u - wanted) ** 2).mean(axis=(2, 3))

    def _meanflow(self, student, average, teacher, clean, noise, t, key):
        other_key, same_key = jax.random.split(key)
        other = flow.draw_times(other_key, t.shape, self.times)
        same = jax.random.bernoulli(same_key, float(self.flow_share), t.shape)
        r, t = jnp.minimum(t, other), jnp.maximum(t, other)
        r = jnp.where(same, t, r)
        z = flow.interpolate(clean, noise, t)
        velocity = noise - clean if self.teacher_guidance == 1 else teacher(z, t)
        wanted = few_step.meanflow_target(lambda z, r, t: student(z, t, t - r), z, velocity, r, t, _WIDTH)

        def error(u: Array) -> Array:
            rows = (-1, *u.shape[2:])
            errors = few_step.meanflow_loss(u.reshape(rows), wanted.reshape(rows), self.adaptive_power)
            return errors.reshape(t.shape)

        return z, t, t - r, error

    def _unlikelihood(
        self, params: Any, batch: Any, jumped: Float[Array, "B M L Z"], present: Array
    ) -> Float[Array, "B"]:
        """-log p(right answer | blocks made by one jump), a mean over its tokens: by the language head, or by the VAE's decoder
        where that writes the answer."""
        blocks = jumped[:, : present.shape[1]]  # the first copy of each block
        if self.answer_from == "decoder":
            own, tokens, mask = params["method"], batch.extra["blocks"], batch.extra["blocks_mask"]
            raw = blocks * own["latents"]["std"] + own["latents"]["mean"]
            flat = [x.reshape(-1, *x.shape[2:]) for x in (raw, tokens, mask)]
            backbone = Backbone(self.vae.backbone, own["vae"]["backbone"])
            logits = vae.token_logits(backbone, own["vae"]["method"], *flat)
            losses = -log_probabilities(logits, flat[1])[0]
            return row_means(losses.reshape(len(tokens), -1), mask.reshape(len(tokens), -1))
        numbers = jnp.broadcast_to(jnp.arange(present.shape[1]), present.shape)
        kept = jnp.zeros(present.shape[:1], bool)
        _, text, _ = self.two_copies(params, batch, blocks, blocks, jnp.zeros(present.shape), numbers, kept)
        logits = Backbone(self.backbone, params["backbone"]).head(text)
        return row_means(-log_probabilities(logits, batch.text[:, 1:])[0], batch.loss_mask[:, 1:])
