"""The VAE behind latent diffusion reasoning (LaDiR, arXiv 2510.04573, section 3.1): steps of a chain of thought to blocks of
thought tokens and back. It is trained by a run of its own, from which a reasoner takes it (`init_from={"vae": RUN}`).

The mathematics is in latentjax/thoughts/vae.py. Here: which text becomes a block, and the loss

    mean over blocks of  [ mean over tokens of -log p(token | z, tokens before) + beta sum_l max(0, KL_l - free_bits) / (L Z) ]

with KL_l the divergence of latent vector l, so `beta` is per element of the block, as in the released code (1e-5). In training
the encoder's tokens are replaced with probability `substitution` (paper: 0.3), the decoder's targets stay; and noise of scale
`noise` (paper: 3, released code: 0.3), in units of the latents themselves, is added to z.

Deviations: the released encoder reads the question before the chain (here `encoder_sees_question`, off: the more of the
question the posterior holds, the less the reasoner has to find); tokens are averaged within a block first, so that a
microbatch counts by its blocks; no LoRA on the encoder (rank 512 in the released code).
Uncertain: whether the paper's runs normalised the latents, and with which optimiser the 8B models were trained.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from latentjax.backbone.config import FREE_FIELDS, BackboneConfig
from latentjax.backbone.decoder import check_positions
from latentjax.methods.base import Method, Stage
from latentjax.methods.layout import Row, batch_prompts, batch_rows
from latentjax.objectives.cross_entropy import log_probabilities
from latentjax.rollout import Backbone, Cost, Generation, Kind
from latentjax.sampling import Sampling
from latentjax.thoughts import vae

ANSWER = "<|answer|>"  # begins a reasoner's answer; the VAE knows it so that both have one vocabulary


@dataclasses.dataclass(frozen=True)
class ThoughtVAE(Method):
    """`backbone` is the decoder; `lengths.text` bounds a block's tokens with its end, `lengths.question` the question's."""

    steps: int | None = None  # length of the training; exactly one of `steps` and `epochs`
    epochs: int | None = None
    encoder: BackboneConfig | None = None  # None: as the decoder; another model than that starts from random weights
    latents: int = 4  # vectors of a block
    latent_width: int = 512
    steps_per_block: int | None = 1  # steps of the chain that share a block; None: the whole chain is one block
    max_blocks: int = 8
    posterior: vae.Kind = "gaussian"
    sigma: float | int = 0.75  # of posterior "sigma"
    beta: float | int = 1e-5
    free_bits: float | int = 0.0  # nats of each latent vector that cost nothing
    noise: float | int = 3.0
    substitution: float | int = 0.3
    encoder_sees_question: bool = False
    train_decoder: bool = False  # False: the decoder stays the published model it starts from

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"method.steps={self.steps} and method.epochs={self.epochs}: set exactly one of them")
        for field in ("latents", "latent_width", "max_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"method.{field}={getattr(self, field)}: must be at least 1")
        if self.steps_per_block is not None and self.steps_per_block < 1:
            raise ValueError(
                f"method.steps_per_block={self.steps_per_block}: must be at least 1, or None for the chain"
            )
        for field in ("sigma", "beta", "free_bits", "noise"):
            if getattr(self, field) < 0:
                raise ValueError(f"method.{field}={getattr(self, field)}: must not be negative")
        if not 0.0 <= self.substitution < 1.0:
            raise ValueError(f"method.substitution={self.substitution}: a probability lies in [0, 1)")
        if self.free_bits and self.posterior == "deterministic":
            raise ValueError(
                f"method.free_bits={self.free_bits}: posterior='deterministic' has no divergence to leave free"
            )
        if self.posterior not in ("gaussian", "sigma", "deterministic"):
            raise ValueError(f"method.posterior={self.posterior!r}: must be gaussian, sigma or deterministic")
        for field in ("vocab_size", "width"):
            if getattr(self.encoder_config, field) != getattr(self.backbone, field):
                raise ValueError(
                    f"method.encoder.{field}={getattr(self.encoder_config, field)}: must be that of the decoder, "
                    f"backbone.{field}={getattr(self.backbone, field)}"
                )
        asked = self.lengths.question if self.encoder_sees_question else 0
        for name, config, before in (("decoder", self.backbone, 1), ("encoder", self.encoder_config, asked)):
            what = f"the {name}'s method.lengths.text={self.lengths.text}, latents={self.latents} and {before} others"
            check_positions(config, self.lengths.text + self.latents + before, what)

    @property
    def encoder_config(self) -> BackboneConfig:
        return self.backbone if self.encoder is None else self.encoder

    @property
    def untrained(self):
        return () if self.train_decoder else ("^backbone/",)

    def sizes(self, question, steps, answer):
        size = self.steps_per_block or max(len(steps), 1)
        blocks = [sum(steps[i : i + size]) for i in range(0, len(steps), size)]
        return (*super().sizes(question, steps, answer), max(blocks, default=0))

    def positions(self, question, thoughts):
        """One block at a time is read and written, whatever the number of blocks; checked when the method is made."""
        del question, thoughts
        return self.lengths.text + self.latents + 1

    def special_tokens(self):
        return (ANSWER,)

    def stages(self):
        return (Stage(0, steps=self.steps, epochs=self.epochs),)

    def init(self, key):
        return vae.init(key, self.encoder_config, self.backbone.width, self.latents, self.latent_width)

    def adapt(self, params, published):
        """With published weights the encoder starts from them as well, unless it is another model."""
        same = {field: getattr(self.backbone, field) for field in FREE_FIELDS}
        if dataclasses.replace(self.encoder_config, **same) != self.backbone:
            return params
        # Leaf by leaf: adapters, if there are any, are not published. In the encoder's own precision.
        own = flatten_dict(params["method"]["encoder"])
        theirs = {name: jnp.array(x, own[name].dtype) for name, x in flatten_dict(published["backbone"]).items()}
        return params | {"method": params["method"] | {"encoder": unflatten_dict(own | theirs)}}

    def blocks(self, examples: Sequence, codec) -> list[list[list[int]]]:
        """Token ids of each example's blocks, each ending in the end of sequence.

        Raises ValueError naming an example without steps, with too many blocks, or with a block that is too long."""
        found, eos = [], codec.tokenizer.eos_id
        for number, example in enumerate(examples):
            steps = codec.steps(example)
            size = self.steps_per_block or len(steps)
            what = f"example {number} ({example.question.strip()[:40]!r})"
            if not steps:
                raise ValueError(f"{what} has no steps: thought tokens need a chain of at least one")
            rows = [
                [*(token for step in steps[i : i + size] for token in step), eos] for i in range(0, len(steps), size)
            ]
            if len(rows) > self.max_blocks:
                raise ValueError(
                    f"{what} has {len(steps)} steps, {len(rows)} blocks, but max_blocks={self.max_blocks}: raise it, or "
                    f"steps_per_block={self.steps_per_block}"
                )
            if (longest := max(map(len, rows))) > self.lengths.text:
                raise ValueError(
                    f"{what} has a block of {longest} tokens with its end, but lengths.text={self.lengths.text}: raise it "
                    f"(nothing is cut)"
                )
            found.append(rows)
        return found

    def block_arrays(self, examples, codec) -> tuple[np.ndarray, np.ndarray]:
        """Blocks as int32 [B, N, T] and their validity, N = `max_blocks`, T = `lengths.text`."""
        tokens = np.full((len(examples), self.max_blocks, self.lengths.text), codec.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, rows in enumerate(self.blocks(examples, codec)):
            for j, row in enumerate(rows):
                tokens[i, j, : len(row)], mask[i, j, : len(row)] = row, True
        return tokens, mask

    def encode(self, examples, codec, stage, rng):
        tokens, mask = self.block_arrays(examples, codec)
        lengths = dataclasses.replace(self.lengths, text=self.max_blocks * self.lengths.text)
        rows = [Row(codec.question(example), 0, ()) for example in examples]
        batch = batch_rows(rows, lengths, self.max_thoughts(), codec.tokenizer.pad_id)
        flat = (len(examples), lengths.text)
        used = np.repeat(mask.any(axis=2), self.latents, axis=1)
        return batch.replace(
            thought_mask=used, text=tokens.reshape(flat), text_mask=mask.reshape(flat), loss_mask=mask.reshape(flat)
        )

    def batch_shapes(self, size, stage):
        lengths = dataclasses.replace(self.lengths, text=self.max_blocks * self.lengths.text)
        return Method.batch_shapes(dataclasses.replace(self, lengths=lengths), size, stage)

    def max_thoughts(self):
        return self.max_blocks * self.latents

    def posterior_of(self, own, tokens, mask, question, question_mask, key=None) -> vae.Posterior:
        """The posterior of the blocks `tokens` [B * N, T] of B questions, `own` being params["method"]. `key` draws the replaced
        tokens of training, and its dropout."""
        read = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))  # the encoder does not see the end of sequence
        if self.encoder_sees_question:
            before = [jnp.repeat(x, self.max_blocks, axis=0) for x in (question, question_mask)]
            tokens, read = (jnp.concatenate(x, axis=1) for x in zip(before, (tokens, read), strict=True))
        if key is not None and self.substitution:
            vocabulary = self.backbone.vocab_used or self.backbone.vocab_size
            tokens = vae.substitute(tokens, key, self.substitution, vocabulary)
        dropout_key = None if key is None else jax.random.fold_in(key, 1)
        return vae.posterior(Backbone(self.encoder_config, own["encoder"]), own, tokens, read, dropout_key)

    def loss(self, params, batch, key, ctx, *, train):
        token_key, sample_key, noise_key = jax.random.split(key, 3)
        tokens, mask = (x.reshape(-1, self.lengths.text) for x in (batch.text, batch.text_mask))
        # Validation fills its last batch up with rows that have no targets.
        valid = batch.loss_mask.reshape(mask.shape).any(axis=1)
        drawn = token_key if train else None
        q = self.posterior_of(params["method"], tokens, mask, batch.question, batch.question_mask, drawn)
        # Validated as it is used: the mean of the posterior, without noise.
        z = q.mean
        if train:
            z = vae.sample(q, sample_key, self.posterior, self.sigma)
            z = z + self.noise * jax.random.normal(noise_key, z.shape)
        decoder = Backbone(self.backbone, params["backbone"])
        # The frozen decoder is a published model as it is used: without dropout.
        dropout_key = jax.random.fold_in(key, 3) if train and self.train_decoder else None
        logits = vae.token_logits(decoder, params["method"], z, tokens, mask, dropout_key)
        log_probs, right = log_probabilities(logits, tokens)
        right &= mask
        share = jnp.where(
            mask, 1.0 / jnp.maximum(mask.sum(axis=1, keepdims=True), 1), 0.0
        )  # of each token in its block
        charge = vae.divergence(q, self.posterior)
        free = jnp.maximum(charge - self.free_bits, 0.0).sum(axis=1) / (self.latents * self.latent_width)
        targets = valid.sum().astype(jnp.float32)

        def mean(of_block: jax.Array) -> jax.Array:
            return jnp.where(valid, of_block, 0.0).sum() / jnp.maximum(targets, 1.0)

        reconstruction = mean(-(log_probs * share).sum(axis=1))
        std = vae.statistics(vae.moments(q.mean, valid))[1]
        loss = reconstruction + self.beta * mean(free)
        metrics = {}
        if not train:
            # A decoder that does not read the latents does as well with those of another block.
            exchanged = vae.token_logits(decoder, params["method"], z[vae.others(valid)], tokens, mask)
            wrong = mean(-(log_probabilities(exchanged, tokens)[0] * share).sum(axis=1))
            metrics["shuffle_gap"] = wrong - reconstruction  # nats a token
        return loss, metrics | {
            "loss": loss,
            "token_accuracy": mean((right * share).sum(axis=1)),
            "targets": targets,
            "reconstruction": reconstruction,
            "exact": mean((right == mask).all(axis=1)),  # blocks that greedy decoding gives back token for token
            "divergence": mean(charge.mean(axis=1)),  # of one latent vector; nats for posterior "gaussian"
            "active_units": vae.active_units(std, self.noise).astype(jnp.float32),
            "latent_std": jnp.sqrt((std**2).mean()),
        }

    def prompts(self, examples, codec):
        """The blocks are the question here: what is generated is their reconstruction."""
        tokens, mask = self.block_arrays(examples, codec)
        counts = (mask.any(axis=2).sum(axis=1) * self.latents).astype(np.int32)
        tokens, mask = (x.reshape(len(examples), -1) for x in (tokens, mask))
        asked = batch_prompts(
            [codec.question(example) for example in examples], counts.tolist(), self.lengths, codec, {}
        )
        if self.encoder_sees_question:
            tokens = np.concatenate([asked.question, tokens], axis=1)
            mask = np.concatenate([asked.question_mask, mask], axis=1)
        return asked.replace(question=tokens, question_mask=mask)

    def generate(
        self, params, prompts, key, *, thoughts=None, sampling=Sampling(), intervention=None, prefix=None, record=()
    ):
        """Encode each block and decode its mean: the text is the chain as it comes back."""
        for name, value in (
            ("thoughts", thoughts), ("intervention", intervention), ("prefix", prefix), ("record", record or None),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: a ThoughtVAE reconstructs what it is given, without a rollout")
        batch_size = prompts.question.shape[0]
        asked = self.lengths.question if self.encoder_sees_question else 0
        question, blocks = zip(
            *((x[:, :asked], x[:, asked:]) for x in (prompts.question, prompts.question_mask)), strict=True
        )
        tokens, mask = (x.reshape(-1, self.lengths.text) for x in blocks)
        q = self.posterior_of(params["method"], tokens, mask, *question)
        decoded = self.decode(params, q.mean, mask.any(axis=1), prompts.ids["eos"], key, sampling)
        counts = jnp.asarray(prompts.thoughts)
        # The encoder reads for each block the question, if it sees it, the block but its end, and the queries.
        number = counts // self.latents
        read = blocks[1].sum(axis=1) + number * (question[1].sum(axis=1) - 1 + self.latents)
        cost = Cost(jnp.ones_like(counts), jnp.asarray(read, jnp.int32), jnp.zeros_like(counts))
        latents = q.mean.reshape(batch_size, -1, self.latent_width)
        return decoded_generation(prompts, latents, counts, *decoded, cost)

    def decode(self, params, latents, valid, eos, key, sampling=Sampling()):
        """Text [R, T] of latents [R, L, Z] as they come from the posterior, which of its tokens count, and what it cost; no
        tokens and no cost of a row that is not `valid`."""
        backbone = Backbone(self.backbone, params["backbone"])
        text, kept, cost = vae.decode(backbone, params["method"], latents, eos, self.lengths.text, key, sampling)
        return text, kept & valid[:, None], jax.tree.map(lambda x: jnp.where(valid, x, 0), cost)


def decoded_generation(prompts, thoughts, counts, text, kept, decoding: Cost, before: Cost) -> Generation:
    """A `Generation` whose text is decoded blocks put one after the other: `text` and `kept` are [B * N, T]. Its cost is
    `before` and that of `decoding`, which all blocks of a row do at the same time."""
    batch = prompts.question.shape[0]
    text, kept = text.reshape(batch, -1), kept.reshape(batch, -1)
    decoding = jax.tree.map(lambda x: x.reshape(batch, -1), decoding)
    cost = Cost(
        before.forwards + decoding.forwards.max(axis=1),
        before.positions + decoding.positions.sum(axis=1),
        before.answer_tokens + decoding.answer_tokens.sum(axis=1),
    )
    tokens = jnp.concatenate([prompts.question, jnp.where(kept, text, prompts.ids["pad"])], axis=1)
    kind = jnp.concatenate(
        [jnp.where(prompts.question_mask, Kind.QUESTION, Kind.PAD), jnp.where(kept, Kind.TEXT, Kind.PAD)], axis=1
    )
    used = jnp.arange(thoughts.shape[1]) < counts[:, None]
    return Generation(tokens, kind, jnp.zeros(tokens.shape, jnp.float32), thoughts, used, cost)
