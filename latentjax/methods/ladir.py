"""LaDiR: latent diffusion reasoning (Kang et al., arXiv 2510.04573, ICLR 2026).

A VAE (latentjax/methods/thought_vae.py) turns the steps of a chain of thought into blocks of L thought tokens. One backbone
with a language head and a velocity head writes the blocks one after the other, each by solving a flow from Gaussian noise,
decides after each whether to go on, and then writes the answer. With z_t = (1-t) z + t eps (latentjax/thoughts/flow.py):

    sequence   Q, [ <bot> z^1 <eot> ], [ <bot> z^2 <eot> ], ..., <answer> y      while block b is made: Q, .., <bot> [t] z_t^b
    mask       causal; the L latents of one block see each other both ways; block b sees nothing of the blocks after it
    in, out    x = W z + b;   u = W' ((1 + scale) norm(h) + shift) + b',  (shift, scale) = M silu(e(t))    (released code)
    loss       5 mean |u(z_t, t, Q, z^<b) - (eps - z)|^2 + CE(y | Q, z) + CE(<bot> or <answer> | Q, z^<=b)       (stage 1)
    sampler    z <- z - dt [u_null + w (u - u_null) - gamma_t F],  from s N(0, I) at t = 1 to t = 0

How the blocks of a chain are trained in one pass is not stated. Here noisy copies stand behind the clean sequence
(`two_copies`): copy b sees the question, the clean blocks before b, its own <bot> and itself, at the position ids that it has
when it is generated, so one pass gives the same as one pass for each block. `layout="random_block"` makes copies of blocks
drawn at random instead. Stage 2 (`rollout_steps`) reads answer and decisions after the model's own blocks, with gradients
through the sampler; the flow loss stays that of the clean blocks, without which the latents collapse.

Deviations, and what the sources leave open:
- decisions are made by a head of two outputs; the answer begins with a token of the vocabulary, <bot> and <eot> are vectors;
- latents are normalised by mean and standard deviation over the training set (`normalise`), measured when the VAE is adopted.
  The released code has such constants and does not use them; whether the paper's runs did is unknown;
- each loss is averaged within an example first, so that a microbatch counts by its examples;
- stage 2: no guidance, noise of scale 1, teacher-forced flow loss: the paper does not say;
- the null question keeps its first embedding and replaces the others by one learned vector, in training and in generation;
  in training it is that of the whole row, so answer and decisions are then learned from the blocks alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from latentjax.backbone import decoder
from latentjax.backbone.attention import MaskSpec
from latentjax.generation import generate, recorded_slots, slots_of, think
from latentjax.methods.base import Batch, Method, Stage
from latentjax.methods.coconut import thought_limits
from latentjax.methods.layout import Row, batch_prompts, batch_rows
from latentjax.methods.thought_vae import ANSWER, ThoughtVAE, decoded_generation
from latentjax.objectives.cross_entropy import log_probabilities
from latentjax.rollout import MAIN, RECORDABLE, Backbone, Intervention, Kind, Proposal, Source, prefill, run, start
from latentjax.sampling import Sampling
from latentjax.tasks.base import Example
from latentjax.thoughts import flow, vae
from latentjax.thoughts.flow import FlowSampler
from latentjax.thoughts.velocity import TimeEmbedding, VelocityHead
from latentjax.tokenizers import Codec

NULL = "null"  # the context that sees the null question


@dataclasses.dataclass(frozen=True)
class LaDiR(Method):
    """The reasoner. Its `parts` is the VAE: `init_from={"vae": RUN}`, or a run of this method to go on from."""

    vae: ThoughtVAE = dataclasses.field(kw_only=True)
    steps: int | None = None  # length of the training; exactly one of `steps` and `epochs`
    epochs: int | None = None
    flow_weight: float | int = 5.0
    answer_weight: float | int = 1.0
    decision_weight: float | int = 1.0
    prediction: Literal["velocity", "x", "noise", "v"] = "velocity"
    times: flow.TimeSampler = flow.TimeSampler()
    layout: Literal["all_blocks", "random_block"] = "all_blocks"
    draws: int = 8  # noisy copies of each block (random_block: of the sequence)
    null_probability: float | int = 0.1  # of training a row with the null question
    normalise: bool = True
    rollout_steps: int = 0  # 0: stage 1; else stage 2, with as many Euler steps (paper: 10)
    sampler: FlowSampler = FlowSampler()
    stop: Literal["learned", "budget"] = "learned"  # budget: after as many thoughts as were asked for
    answer_from: Literal["head", "decoder"] = (
        "head"  # decoder: the VAE's text of the blocks is the answer (released code)
    )
    group: int = 1  # samples of one problem that stand together in a batch and repel each other

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"method.steps={self.steps} and method.epochs={self.epochs}: set exactly one of them")
        for field, minimum in (("draws", 1), ("group", 1), ("rollout_steps", 0)):
            if getattr(self, field) < minimum:
                raise ValueError(f"method.{field}={getattr(self, field)}: must be at least {minimum}")
        for field in ("flow_weight", "answer_weight", "decision_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"method.{field}={getattr(self, field)}: must not be negative")
        if not 0 <= self.null_probability < 1:
            raise ValueError(f"method.null_probability={self.null_probability}: a probability lies in [0, 1)")
        if self.sampler.guidance != 1 and not self.null_probability:
            raise ValueError(
                f"method.sampler.guidance={self.sampler.guidance}: guides away from the null question, which null_probability=0 "
                "never trains; set guidance=1, or a probability"
            )
        if self.rollout_steps and not self.answer_weight:
            raise ValueError(
                f"method.rollout_steps={self.rollout_steps}: rollouts are made for the loss on the answer; set answer_weight"
            )
        for field, known in (
            ("prediction", ("velocity", "x", "noise", "v")), ("layout", ("all_blocks", "random_block")),
            ("stop", ("learned", "budget")), ("answer_from", ("head", "decoder")),
        ):  # fmt: skip
            if getattr(self, field) not in known:
                raise ValueError(f"method.{field}={getattr(self, field)!r}: must be one of {', '.join(known)}")
        if not self.answer_weight and self.answer_from == "head":
            raise ValueError("method.answer_weight=0: the head learns no answer; set answer_from='decoder'")
        if self.vae.backbone.vocab_size != self.backbone.vocab_size:
            raise ValueError(
                f"method.vae.backbone.vocab_size={self.vae.backbone.vocab_size}: the reasoner has "
                f"backbone.vocab_size={self.backbone.vocab_size}; both read the same tokens"
            )
        if self.backbone.width < self.vae.latent_width:
            raise ValueError(
                f"method.vae.latent_width={self.vae.latent_width}: must not exceed backbone.width={self.backbone.width}, "
                f"or the reasoner cannot carry a latent"
            )
        lengths = self.lengths
        decoder.check_positions(
            self.backbone, self.positions(lengths.question, self.max_thoughts()),
            f"method.lengths.question={lengths.question}, {self.vae.max_blocks} blocks of {self.frame} with their markers "
            f"and method.lengths.text={lengths.text}",
        )  # fmt: skip

    # The method's data

    @property
    def untrained(self):
        return ("^method/vae/", "^method/latents/")

    @property
    def frame(self) -> int:
        """Positions of a finished block: its latents between two markers."""
        return self.vae.latents + 2

    def sizes(self, question, steps, answer):
        return self.vae.sizes(question, steps, answer)

    def positions(self, question, thoughts):
        return question + thoughts // self.vae.latents * self.frame + self.lengths.text

    def check_source(self, role, source):
        if role is None and isinstance(source, LaDiR):
            for field in ("prediction", "normalise"):
                if (theirs := getattr(source, field)) != getattr(self, field):
                    raise ValueError(
                        f"method.{field}={getattr(self, field)!r}: the run that this one goes on from was trained with "
                        f"{theirs!r}; its head and its latents are of that kind"
                    )

    def special_tokens(self):
        return (ANSWER,)

    def stages(self):
        return (Stage(0, steps=self.steps, epochs=self.epochs),)

    def max_thoughts(self):
        return self.vae.max_thoughts()

    def init(self, key):
        names = ("vae", "latent_in", "time", "head_time", "head", "markers", "null", "decision", "decoder")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        width, latent = self.backbone.width, self.vae.latent_width
        time = jnp.zeros((1,))
        return {
            "vae": {"backbone": decoder.init(self.vae.backbone, keys["decoder"]), "method": self.vae.init(keys["vae"])},
            "latents": {"mean": jnp.zeros((self.vae.latents, latent)), "std": jnp.ones((self.vae.latents, latent))},
            "latent_in": {
                "kernel": jax.random.normal(keys["latent_in"], (latent, width)) * latent**-0.5,
                "bias": jnp.zeros(width),
            },
            "time": TimeEmbedding(width).init(keys["time"], time)["params"],
            "head_time": TimeEmbedding(width).init(keys["head_time"], time)["params"],
            "head": VelocityHead(latent).init(keys["head"], jnp.zeros((1, 1, width)), jnp.zeros((1, width)))["params"],
            "markers": jax.random.normal(keys["markers"], (2, width)) * self._embedding_scale,
            "null": jax.random.normal(keys["null"], (width,)) * self._embedding_scale,
            "decision": {
                "kernel": jax.random.normal(keys["decision"], (width, 2)) * width**-0.5,
                "bias": jnp.zeros(2),
            },
        }

    @property
    def _embedding_scale(self) -> float:
        return self.backbone.init_std if self.backbone.init == "gpt2" else 1.0

    def parts(self):
        return {"vae": self.vae}

    def adopt(self, role, params):
        return {"method": {role: params}}

    def measure(self, params, batch):
        latents, present = self._means(params["method"], batch)
        return vae.moments(latents.reshape(-1, *latents.shape[2:]), present.reshape(-1))

    def with_measured(self, params, sums):
        mean, std = vae.statistics(sums)
        active, total = int(vae.active_units(std, self.vae.noise)), std.size
        if active < max(1, total // 100):
            raise ValueError(
                f"the VAE has collapsed: {active} of {total} latent units vary over {int(sums.count)} blocks (variance of "
                f"at least {vae.ACTIVE_VARIANCE * max(1.0, self.vae.noise**2):.3g}; its noise has {self.vae.noise**2:.3g}), so "
                "there is nothing to reason with. Train it with a smaller beta or free_bits"
            )
        # A unit that never moves is left as it is: its noise would be blown up.
        latents = {"mean": mean, "std": jnp.where(std**2 >= vae.ACTIVE_VARIANCE, std, 1.0)}
        return params | {"method": params["method"] | {"latents": latents}} if self.normalise else params

    def encode(self, examples, codec, stage, rng):
        tokens, mask = self.vae.block_arrays(examples, codec)
        counts = mask.any(axis=2).sum(axis=1)
        answer = codec.tokenizer.token_id(ANSWER)
        rows = [
            Row(
                codec.question(example),
                int(count) * self.vae.latents,
                [answer, *self._answer(example, codec)],
                unscored=1,
            )
            for example, count in zip(examples, counts, strict=True)
        ]
        extra = {"blocks": tokens, "blocks_mask": mask}
        return batch_rows(rows, self.lengths, self.max_thoughts(), codec.tokenizer.pad_id, extra)

    def _answer(self, example, codec):
        """Without a loss on it, no answer is written: the VAE's decoder is to read the blocks."""
        return codec.answer(example) if self.answer_weight else [codec.tokenizer.eos_id]

    def batch_shapes(self, size, stage):
        shape = (size, self.vae.max_blocks, self.vae.lengths.text)
        extra = {"blocks": jax.ShapeDtypeStruct(shape, jnp.int32), "blocks_mask": jax.ShapeDtypeStruct(shape, bool)}
        return super().batch_shapes(size, stage).replace(extra=extra)

    def prompts(self, examples, codec):
        questions = [codec.question(example) for example in examples]
        thoughts = [self.max_thoughts()] * len(examples)
        return batch_prompts(questions, thoughts, self.lengths, codec, {"answer": ANSWER})

    # Latents and the maps into and out of the backbone

    def _means(self, own: Any, batch: Batch) -> tuple[Float[Array, "B N L Z"], Bool[Array, "B N"]]:
        """Posterior means of the blocks of a batch, and which blocks there are."""
        tokens, mask = batch.extra["blocks"], batch.extra["blocks_mask"]
        rows = [x.reshape(-1, x.shape[-1]) for x in (tokens, mask)]
        q = self.vae.posterior_of(own["vae"]["method"], *rows, batch.question, batch.question_mask)
        shape = (*tokens.shape[:2], self.vae.latents, self.vae.latent_width)
        return jax.lax.stop_gradient(q.mean.reshape(shape)), mask.any(axis=2)

    def latents(self, params: Any, batch: Batch) -> tuple[Float[Array, "B N L Z"], Bool[Array, "B N"]]:
        """The clean blocks of a batch as the reasoner sees them, normalised; and which blocks there are."""
        own = params["method"]
        means, present = self._means(own, batch)
        return (means - own["latents"]["mean"]) / own["latents"]["std"], present

    def oracle(self, params: Any, examples: Sequence[Example], codec: Codec, blocks: int) -> Intervention:
        """What puts the encoder's blocks in the place of the model's own, the first `blocks` of each chain.

        Accuracy with it over accuracy without is what the model's own blocks cost. Raises ValueError if there are not so
        many blocks, or a chain does not fit."""
        if not 1 <= blocks <= self.vae.max_blocks:
            raise ValueError(f"oracle_blocks={blocks}: this {self.name} has 1 to {self.vae.max_blocks} blocks")
        batch = self.encode(examples, codec, self.stages()[-1], np.random.default_rng(0))
        latents, present = jax.jit(self.latents)(params, batch)
        given = np.asarray(present) & (np.arange(self.vae.max_blocks) < blocks)
        value = np.asarray(latents).reshape(len(examples), self.max_thoughts(), -1)
        return Intervention(np.repeat(given, self.vae.latents, axis=1), value, np.zeros_like(value))

    def decode_blocks(
        self, params: Any, latents: Float[Array, "B N L Z"], present: Bool[Array, "B N"], eos: int | Int[Array, ""]
    ) -> tuple[Int[Array, "R T"], Bool[Array, "R T"]]:
        """The VAE's greedy text of normalised blocks, and which of its tokens count; R = B N."""
        return self._read_blocks(params, latents, present, eos, jax.random.key(0), Sampling())[:2]

    def _read_blocks(self, params, latents, present, eos, key, sampling):
        """The same drawn as `sampling` says, and what it cost."""
        own = params["method"]
        raw = latents * own["latents"]["std"] + own["latents"]["mean"]
        return self.vae.decode(own["vae"], raw.reshape(-1, *raw.shape[2:]), present.reshape(-1), eos, key, sampling)

    def latent_in(self, own: Any, latents: Float[Array, "*B Z"]) -> Float[Array, "*B D"]:
        return vae.linear(own["latent_in"], latents)

    def time_token(self, own: Any, t: Float[Array, "*B"], span: Any = None) -> Float[Array, "*B D"]:
        """The token that tells the backbone the time; students are also told the length of the step, `span`."""
        return jnp.asarray(TimeEmbedding(self.backbone.width).apply({"params": own["time"]}, t))

    def head_time(self, own: Any, t: Float[Array, "*B"], span: Any = None) -> Float[Array, "*B D"]:
        """The same for the velocity head, by an embedding of its own."""
        return jnp.asarray(TimeEmbedding(self.backbone.width).apply({"params": own["head_time"]}, t))

    def grid(self) -> Float[Array, "T"]:
        """The sampler's times."""
        return flow.grid(self.sampler.steps, self.times.shift)

    def span(self) -> Float[Array, ""] | None:
        """The length of the sampler's steps, for a student that is told."""
        return None

    def solve(
        self, velocity: flow.Velocity, noise: Float[Array, "B L Z"], times: Float[Array, "T"], key: Key[Array, ""], *,
        remat: bool, record: bool,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        """A block from noise, and all states if `record`; `key` drew the noise."""
        del key
        return flow.solve(velocity, noise, times, self.sampler.solver, remat=remat, record=record)

    def velocity(
        self,
        own: Any,
        hidden: Float[Array, "*B L D"],
        z: Float[Array, "*B L Z"],
        t: Float[Array, "..."],
        span: Any = None,
    ) -> tuple[Float[Array, "*B L Z"], Float[Array, "*B L Z"]]:
        """The head's prediction at hidden states, and the velocity that it stands for; `t` is a time for each block, or one."""
        time = self.head_time(own, t, span)
        prediction = jnp.asarray(VelocityHead(self.vae.latent_width).apply({"params": own["head"]}, hidden, time))
        return prediction, flow.velocity_of(prediction, z, t, self.prediction)

    def question_embeddings(self, own: Any, backbone: Backbone, question: Array, dropped: Array) -> Array:
        """Embeddings [B, Q, D] of questions; the null question in rows that are `dropped`."""
        embedded = backbone.embed(question)
        hidden = dropped[:, None] & (jnp.arange(question.shape[1]) > 0)
        return jnp.where(hidden[..., None], own["null"].astype(embedded.dtype), embedded)

    # Training

    def two_copies(
        self,
        params: Any,
        batch: Batch,
        clean: Float[Array, "B N L Z"],
        noisy: Float[Array, "B M L Z"],
        t: Float[Array, "B M"],
        block: Int[Array, "B M"],
        dropped: Bool[Array, "B"],
        *,
        span: Any = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B A D"], Float[Array, "B M L D"]]:
        """One pass over question, clean blocks, text, and M noisy copies of blocks number `block` at times `t`.

        Returns hidden states at each <eot>, at the text but its last token, and at the noisy latents."""
        own, backbone = params["method"], Backbone(self.backbone, params["backbone"])
        size, blocks, latents, _ = clean.shape
        copies, frame = noisy.shape[1], self.frame
        question = self.question_embeddings(own, backbone, batch.question, dropped)
        begin, end = (
            jnp.broadcast_to(marker, (size, blocks, 1, marker.shape[-1])) for marker in own["markers"]
        )  # fmt: skip
        framed = jnp.concatenate([begin, self.latent_in(own, clean), end], axis=2)
        copy = jnp.concatenate([self.time_token(own, t, span)[:, :, None], self.latent_in(own, noisy)], axis=2)
        parts = [
            question, framed.reshape(size, blocks * frame, -1), backbone.embed(batch.text[:, :-1]),
            copy.reshape(size, copies * (latents + 1), -1),
        ]  # fmt: skip
        lengths = [x.shape[1] for x in parts]

        present = batch.thought_mask[:, ::latents]  # [B, N]
        count = present.sum(axis=1, keepdims=True)
        asked = batch.question_mask.sum(axis=1, keepdims=True)
        valid = [
            batch.question_mask, jnp.repeat(present, frame, axis=1), batch.text_mask[:, :-1],
            jnp.repeat(block < count, latents + 1, axis=1),
        ]  # fmt: skip
        place = jnp.arange(latents + 1) + 1  # of time token and latents behind their <bot>
        positions = [
            jnp.maximum(jnp.cumsum(batch.question_mask, axis=1) - 1, 0),
            asked + jnp.arange(lengths[1]),
            asked + count * frame + jnp.arange(lengths[2]),
            (asked[..., None] + (block * frame)[..., None] + place).reshape(size, -1),
        ]
        mask = self._mask(lengths, block)
        out = decoder.apply(
            backbone.config, backbone.params, jnp.concatenate([x.astype(question.dtype) for x in parts], axis=1),
            jnp.concatenate(valid, axis=1), positions=jnp.concatenate(positions, axis=1).astype(jnp.int32), mask=mask,
            key=key,
        )  # fmt: skip
        _, thoughts, text, noise = jnp.split(out.hidden, [sum(lengths[:i]) for i in (1, 2, 3)], axis=1)
        at_end = thoughts.reshape(size, blocks, frame, -1)[:, :, -1]
        return at_end, text, noise.reshape(size, copies, latents + 1, -1)[:, :, 1:]

    def _mask(self, lengths: list[int], block: Int[Array, "B M"]) -> MaskSpec:
        """Who sees whom in `two_copies`, besides validity and causality."""
        latents, frame = self.vae.latents, self.frame
        blocks, copies = self.vae.max_blocks, block.shape[1]
        inside = jnp.arange(frame)
        clean = jnp.where((inside > 0) & (inside <= latents), jnp.arange(blocks)[:, None], -1).reshape(-1)
        copy = jnp.where(jnp.arange(latents + 1) > 0, blocks + jnp.arange(copies)[:, None], -1).reshape(-1)
        outside = [jnp.full(length, -1) for length in (lengths[0], lengths[2])]
        together = jnp.concatenate([outside[0], clean, outside[1], copy])[None]

        # A copy sees the question, finished blocks before its own, its own <bot>, and itself.
        number, slot = jnp.arange(blocks * frame) // frame, jnp.arange(blocks * frame) % frame
        mine = block[..., None]  # [B, M, 1]
        finished = (number < mine) | ((number == mine) & (slot == 0))
        own = jnp.arange(copies * (latents + 1)) // (latents + 1) == jnp.arange(copies)[:, None]
        seen = jnp.concatenate(
            [
                jnp.ones((*block.shape, lengths[0]), bool), finished, jnp.zeros((*block.shape, lengths[2]), bool),
                jnp.broadcast_to(own, (*block.shape, own.shape[1])),
            ],
            axis=2,
        )  # fmt: skip
        seen = jnp.repeat(seen, latents + 1, axis=1)
        before = jnp.ones((block.shape[0], sum(lengths[:3]), seen.shape[2]), bool)
        return MaskSpec(block=together, allowed=jnp.concatenate([before, seen], axis=1))

    def draw_copies(self, clean: Array, present: Array, key: Array) -> tuple[Array, Array, Array, Array, Array]:
        """What the flow loss of a batch is taken on: block numbers, clean latents, noise, times of the M copies, and which
        copies are of blocks that there are."""
        block_key, time_key, noise_key = jax.random.split(key, 3)
        size, blocks, latents, width = clean.shape
        if self.layout == "all_blocks":
            block = jnp.tile(jnp.arange(blocks), (size, self.draws))
        else:
            uniform = jax.random.uniform(block_key, (size, self.draws))
            block = (uniform * present.sum(axis=1, keepdims=True)).astype(jnp.int32)
        t = flow.draw_times(time_key, block.shape, self.times)
        noise = jax.random.normal(noise_key, (*block.shape, latents, width))
        chosen = jnp.take_along_axis(clean, block[..., None, None], axis=1)
        return block, chosen, noise, t, jnp.take_along_axis(present, block, axis=1)

    def loss(self, params, batch, key, ctx, *, train):
        own = params["method"]
        draw_key, null_key, dropout_key, rollout_key = jax.random.split(key, 4)
        clean, present = self.latents(params, batch)
        size = clean.shape[0]
        dropped = jax.random.bernoulli(null_key, float(self.null_probability), (size,)) & train
        flow_loss, at_end, text = self.flow_loss(
            params, batch, clean, present, dropped, draw_key, dropout_key if train else None, ctx
        )  # fmt: skip
        if self.rollout_steps:
            at_end, text = self.after_own_blocks(params, batch, rollout_key, train=train)
        backbone = Backbone(self.backbone, params["backbone"])
        labels, scored = batch.text[:, 1:], batch.loss_mask[:, 1:]
        log_probs, right = log_probabilities(backbone.head(text), labels)
        answer = row_means(-log_probs, scored)
        # After the last block the answer comes (1), after the others another block (0).
        last = present & ~jnp.pad(present[:, 1:], ((0, 0), (0, 1)))
        decisions = vae.linear(own["decision"], at_end)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(decisions), last[..., None].astype(jnp.int32), axis=-1)[..., 0]
        decision = row_means(-chosen, present)
        total = self.flow_weight * flow_loss + self.answer_weight * answer + self.decision_weight * decision
        decided = (jnp.argmax(decisions, axis=-1) == last) & present
        # Validation fills its last batch up with rows that have no targets.
        counted = scored.any(axis=1)
        targets = counted.sum().astype(jnp.float32)

        def mean(of_row: Float[Array, "B"]) -> Float[Array, ""]:
            return jnp.where(counted, of_row, 0.0).sum() / jnp.maximum(targets, 1.0)

        return mean(total), {
            "loss": mean(total),
            "token_accuracy": mean(row_means(right.astype(jnp.float32), scored)),
            "targets": targets,
            "flow": mean(flow_loss),
            "answer": mean(answer),
            "decision": mean(decision),
            "decision_accuracy": mean(row_means(decided.astype(jnp.float32), present)),
        }

    def flow_loss(
        self, params: Any, batch: Batch, clean: Array, present: Array, dropped: Array, key: Array, dropout_key: Any,
        ctx: Mapping[str, Any],
    ) -> tuple[Float[Array, "B"], Float[Array, "B N D"], Float[Array, "B A D"]]:  # fmt: skip
        """The flow loss of each example, and the hidden states of the clean sequence that answer and decisions are read from."""
        del ctx
        block, chosen, noise, t, there = self.draw_copies(clean, present, key)
        noisy = flow.interpolate(chosen, noise, t)
        at_end, text, hidden = self.two_copies(
            params, batch, clean, noisy, t, block, dropped, key=dropout_key
        )  # fmt: skip
        prediction, _ = self.velocity(params["method"], hidden, noisy, t)
        error = (prediction - flow.target(chosen, noise, t, self.prediction)) ** 2
        return row_means(error.mean(axis=(2, 3)), there), at_end, text

    def after_own_blocks(
        self, params: Any, batch: Batch, key: Key[Array, ""], *, train: bool
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B A D"]]:
        """As the last two of `flow_loss`, with the model's own blocks in the place of the clean ones: as many, generated from
        noise in `rollout_steps` Euler steps, with gradients."""
        backbone = Backbone(self.backbone, params["backbone"])
        prefill_key, think_key, read_key = jax.random.split(key, 3)
        blocks = self.vae.max_blocks
        context = prefill(
            backbone, batch.question, batch.question_mask, blocks * self.frame, key=prefill_key if train else None
        )  # fmt: skip
        sampler = FlowSampler(self.rollout_steps, guidance=1.0, noise_scale=1.0)
        own = dataclasses.replace(self, sampler=sampler, stop="budget", group=1)
        source = own.source(params, batch.thought_mask.sum(axis=1, dtype=jnp.int32), remat=True)
        state, steps = run(
            backbone, source, start(source, {MAIN: context}), blocks, think_key, train=train, record=("last",)
        )  # fmt: skip
        read = decoder.apply(
            backbone.config, backbone.params, batch.text[:, :-1], batch.text_mask[:, :-1],
            cache=state.contexts[MAIN].cache, key=read_key if train else None,
        )  # fmt: skip
        return slots_of(steps.recorded["last"]), read.hidden

    # Generation

    def source(self, params: Any, limit: Int[Array, "B"], *, remat: bool = False, record: bool = False) -> Source:
        """Block after block, as many as fit in `limit` thoughts or until the model's own decision. With `record` a proposal
        also has the solver's states, "solver" [B, L, steps + 1, Z]."""
        own, sampler, latents = params["method"], self.sampler, self.vae.latents
        times, span = self.grid(), self.span()
        contexts = (MAIN,) if sampler.guidance == 1 else (MAIN, NULL)
        together = MaskSpec(block=jnp.zeros((1, latents), jnp.int32))
        behind_time = MaskSpec(block=jnp.array([[-1, *[0] * latents]]))

        def next(count, hidden, logits, peek, key):
            size = hidden.shape[0]
            active = (count + 1) * latents <= limit
            if self.stop == "learned":
                goes_on = jnp.argmax(vae.linear(own["decision"], hidden), axis=-1) == 0
                active &= (count == 0) | goes_on
            valid = jnp.broadcast_to(active[:, None], (size, latents + 1))

            def velocities(z, t):
                """The velocity at z [B, L, Z] in each context."""
                time = jnp.broadcast_to(self.time_token(own, t, span), (size, 1, hidden.shape[-1]))
                inputs = jnp.concatenate([time, self.latent_in(own, z)], axis=1).astype(hidden.dtype)
                found = []
                for name in contexts:
                    seen = peek(inputs, valid, begun[name], mask=behind_time).hidden[:, 1:]
                    found.append(self.velocity(own, seen, z, t, span)[1])
                return found

            def velocity(z, t):
                conditional, *unconditional = velocities(z, t)
                if unconditional:
                    conditional = flow.guide(conditional, unconditional[0], sampler.guidance)
                if sampler.repulsion:
                    conditional = flow.diversify(
                        conditional, z, jnp.broadcast_to(t, (size,)), active, self.group, sampler.repulsion,
                        sampler.repulsion_form,
                    )  # fmt: skip
                return conditional

            marker = jnp.broadcast_to(own["markers"][0], (size, 1, hidden.shape[-1])).astype(hidden.dtype)
            begun = {name: peek(marker, active[:, None], name).context for name in contexts}
            noise = sampler.noise_scale * jax.random.normal(key, (size, latents, self.vae.latent_width))

            def solve():
                return self.solve(velocity, noise, times, key, remat=remat, record=record)

            def skip():
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(solve))

            z, states = jax.lax.cond(active.any(), solve, skip)
            kind = jnp.where(active, Kind.THOUGHT, Kind.PAD)
            done = ~active | ((count + 2) * latents > limit)
            evaluations = flow.evaluations(sampler.steps, sampler.solver)
            recorded = {"solver": jnp.moveaxis(states, 0, 2)} if record else {}
            return Proposal(
                z, None, kind, valid[:, 1:], done, count + 1, peeks=1 + evaluations,
                peeked=len(contexts) * (1 + evaluations * (latents + 1)), recorded=recorded,
            )  # fmt: skip

        begin, end = own["markers"][:1], own["markers"][1:]
        return Source(
            lambda context: jnp.zeros(limit.shape, jnp.int32), next, lambda z: self.latent_in(own, z), together, (begin, end)
        )  # fmt: skip

    def generate(self, params, prompts, key, *, thoughts=None, record=(), **options):
        backbone = Backbone(self.backbone, params["backbone"])
        limits = thought_limits(thoughts, prompts, self.max_thoughts())
        thinking = self.source(params, limits, record="solver" in record)
        further = {}
        if self.sampler.guidance != 1:
            dropped = jnp.ones(limits.shape, bool)
            null = self.question_embeddings(params["method"], backbone, prompts.question, dropped)
            further = {NULL: (null, prompts.question_mask)}
        common: dict[str, Any] = {
            "thinking": thinking, "slots": self.max_thoughts(), "slots_per_step": self.vae.latents, "record": record,
            "recordable": (*RECORDABLE, "solver"), "further": further,
        }  # fmt: skip
        if self.answer_from == "decoder":
            return self._decoded(params, prompts, key, common, **options)
        return generate(
            backbone, prompts.question, prompts.question_mask, key, ids=prompts.ids, end_marker=prompts.ids["answer"],
            max_new_tokens=self.lengths.text - 1,  # the marker is one of the text's tokens
            **common, **options,
        )  # fmt: skip

    def _decoded(self, params, prompts, key, common, *, sampling=Sampling(), intervention=None, prefix=None):
        """Think, and have the VAE read the blocks."""
        if prefix is not None:
            raise ValueError("prefix: with answer_from='decoder' the backbone writes no text to continue")
        backbone, blocks = Backbone(self.backbone, params["backbone"]), self.vae.max_blocks
        think_key, text_key = jax.random.split(key)
        _, cost, steps = think(
            backbone, prompts.question, prompts.question_mask, think_key, capacity=blocks * self.frame,
            intervention=intervention, **common,
        )  # fmt: skip
        assert steps is not None
        latents, valid = slots_of(steps.inputs), slots_of(steps.valid)
        shaped = latents.reshape(len(latents), blocks, self.vae.latents, -1)
        present = valid[:, :: self.vae.latents]
        decoded = self._read_blocks(params, shaped, present, prompts.ids["eos"], text_key, sampling)
        made = decoded_generation(prompts, latents, valid.sum(axis=1), *decoded, cost)
        return made.replace(recorded=recorded_slots(steps.recorded))


def row_means(values: Float[Array, "B X"], mask: Bool[Array, "B X"]) -> Float[Array, "B"]:
    """Means over the masked-in entries of each row; 0 for a row without any."""
    return jnp.where(mask, values, 0.0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
