"""Thought tokens from a variational autoencoder: a piece of text becomes a block of L latent vectors and back.

Equations of LaDiR (arXiv 2510.04573, section 3.1), with the encoder f_e and the decoder f_d, two causal transformers:

    encoder     h = f_e(text tokens, L learned queries), its output after the final norm at the queries
    posterior   q(z | text) = N(mu, diag(sigma^2)),  mu = W_mu h + b_mu,  log sigma^2 = W_s h + b_s
    decoder     p(text | z) = prod_i f_d(W_d z_1 .. W_d z_L, start marker, tokens before i)
    loss        -log p(text | z) + beta KL(q || N(0, I))

Queries and start marker live in latent space and pass through the same map W_d as the latents (released code), so encoder
and decoder have one width. What the decoder reads is made harder in training: tokens of the encoder's input are replaced at
random, and noise of a fixed scale is added to z. Letters: R texts, T tokens, L latents of a block, Z latent width, D model
width, V vocabulary.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from latentjax.backbone import decoder
from latentjax.rollout import MAIN, Backbone, Cost, prefill, run, start, text_source
from latentjax.sampling import Sampling

# Variance of a latent's mean over the data from which on the unit counts as active (Burda et al., arXiv 1509.00519).
ACTIVE_VARIANCE = 0.01

Kind = Literal["gaussian", "sigma", "deterministic"]


@struct.dataclass
class Posterior:
    """q(z | text) of R texts, fp32."""

    mean: Any  # [R, L, Z]
    log_variance: Any  # [R, L, Z]


def init(key: Key[Array, ""], encoder: Any, width: int, latents: int, latent_width: int) -> dict[str, Any]:
    """Parameters of everything but the decoder: `encoder` is the encoder's BackboneConfig, `width` the decoder's D, which
    is the encoder's too.

    The map to log sigma^2 starts at zero: sigma = 1."""
    keys = jax.random.split(key, 5)

    def dense(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
        return {
            "kernel": jax.random.normal(key, (inputs, outputs)) * inputs**-0.5,
            "bias": jnp.zeros(outputs),
        }

    return {
        "encoder": decoder.init(encoder, keys[0]),
        "queries": jax.random.normal(keys[1], (latents, latent_width)),
        "start": jax.random.normal(keys[2], (1, latent_width)),
        "mean": dense(keys[3], encoder.width, latent_width),
        "log_variance": jax.tree.map(jnp.zeros_like, dense(keys[3], encoder.width, latent_width)),
        "decompress": dense(keys[4], latent_width, width),
    }


def linear(params: Any, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """x W + b in fp32."""
    return x.astype(jnp.float32) @ params["kernel"].astype(jnp.float32) + params["bias"].astype(jnp.float32)


def posterior(
    encoder: Backbone, params: Any, tokens: Int[Array, "R T"], mask: Bool[Array, "R T"], key: Key[Array, ""] | None = None
) -> Posterior:  # fmt: skip
    """The posterior of right-padded texts; `key` turns dropout on."""
    rows, latents = tokens.shape[0], params["queries"].shape[0]
    queries = linear(params["decompress"], params["queries"])
    text = encoder.embed(tokens)
    inputs = jnp.concatenate([text, jnp.broadcast_to(queries, (rows, *queries.shape)).astype(text.dtype)], axis=1)
    valid = jnp.concatenate([mask, jnp.ones((rows, latents), bool)], axis=1)
    hidden = decoder.apply(encoder.config, encoder.params, inputs, valid, key=key).hidden[:, -latents:]
    return Posterior(linear(params["mean"], hidden), linear(params["log_variance"], hidden))


def sample(q: Posterior, key: Key[Array, ""], kind: Kind, sigma: float | int) -> Float[Array, "R L Z"]:
    """z of each text.

    gaussian        z = mu + exp(log_variance / 2) eps
    sigma           z = mu + s eps with one s ~ N(0, sigma^2) for each text (LatentLM, arXiv 2412.08635: a learned variance
                    shrinks to nothing, this one cannot)
    deterministic   z = mu
    """
    if kind == "deterministic":
        return q.mean
    eps_key, scale_key = jax.random.split(key)
    eps = jax.random.normal(eps_key, q.mean.shape)
    if kind == "gaussian":
        return q.mean + jnp.exp(0.5 * q.log_variance) * eps
    return q.mean + sigma * jax.random.normal(scale_key, (len(q.mean), 1, 1)) * eps


def divergence(q: Posterior, kind: Kind) -> Float[Array, "R L"]:
    """What the loss charges for each latent vector, summed over Z: KL(q || N(0, I)) in nats for "gaussian"; |mu|^2 for
    "sigma" (LatentLM's regulariser); 0 for "deterministic"."""
    if kind == "gaussian":
        return -0.5 * jnp.sum(1.0 + q.log_variance - q.mean**2 - jnp.exp(q.log_variance), axis=-1)
    return jnp.sum(q.mean**2, axis=-1) if kind == "sigma" else jnp.zeros(q.mean.shape[:2])


def substitute(
    tokens: Int[Array, "R T"], key: Key[Array, ""], probability: float | int, vocabulary: int
) -> Int[Array, "R T"]:  # fmt: skip
    """Each token replaced with `probability` by one drawn uniformly from the vocabulary (which may be the same)."""
    where_key, token_key = jax.random.split(key)
    replaced = jax.random.bernoulli(where_key, float(probability), tokens.shape)
    return jnp.where(replaced, jax.random.randint(token_key, tokens.shape, 0, vocabulary), tokens)


def beginning(backbone: Backbone, params: Any, latents: Float[Array, "R L Z"]) -> Float[Array, "R L+1 D"]:
    """What the decoder reads before the first token: the latents and the start marker in the model's width."""
    marker = jnp.broadcast_to(params["start"], (latents.shape[0], 1, latents.shape[2]))
    vectors = linear(params["decompress"], jnp.concatenate([latents, marker.astype(latents.dtype)], axis=1))
    return vectors.astype(backbone.config.compute_dtype)


def token_logits(
    backbone: Backbone, params: Any, latents: Float[Array, "R L Z"], tokens: Int[Array, "R T"], mask: Bool[Array, "R T"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, "R T V"]:  # fmt: skip
    """Logits of each token of right-padded texts given the latents and the tokens before it; `key` turns dropout on."""
    head = beginning(backbone, params, latents)
    inputs = jnp.concatenate([head, backbone.embed(tokens[:, :-1])], axis=1)
    valid = jnp.concatenate([jnp.ones(head.shape[:2], bool), mask[:, :-1]], axis=1)
    hidden = decoder.apply(backbone.config, backbone.params, inputs, valid, key=key).hidden
    return backbone.head(hidden[:, head.shape[1] - 1 :])


def decode(
    backbone: Backbone,
    params: Any,
    latents: Float[Array, "R L Z"],
    eos: int | Array,
    limit: int,
    key: Key[Array, ""],
    sampling: Sampling = Sampling(),
) -> tuple[Int[Array, "R T"], Bool[Array, "R T"], Cost]:
    """At most `limit` tokens of each text, which of them count (those before the end of sequence), and what it cost; greedy
    unless `sampling` says otherwise."""
    head = beginning(backbone, params, latents)
    context = prefill(backbone, head, jnp.ones(head.shape[:2], bool), limit)
    source = text_source(backbone, eos, sampling, limit)
    one = jnp.ones(len(head), jnp.int32)
    state = start(source, {MAIN: context}, Cost(one, one * head.shape[1], 0 * one))
    state, steps = run(backbone, source, state, limit, key, until_done=True)
    tokens = steps.token.T
    ended = jnp.cumsum(tokens == eos, axis=1) > 0
    return tokens, (steps.kind.T > 0) & ~ended, state.cost


@struct.dataclass
class Moments:
    """Sums over latent vectors from which their statistics follow; add two of them with `jax.tree.map(jnp.add, ...)`."""

    count: Any  # fp32 scalar: blocks
    total: Any  # fp32 [L, Z]
    squares: Any  # fp32 [L, Z]


def moments(latents: Float[Array, "R L Z"], valid: Bool[Array, "R"]) -> Moments:
    """The sums over the valid blocks."""
    kept = jnp.where(valid[:, None, None], latents, 0.0)
    return Moments(valid.sum().astype(jnp.float32), kept.sum(axis=0), (kept**2).sum(axis=0))


def statistics(sums: Moments) -> tuple[Float[Array, "L Z"], Float[Array, "L Z"]]:
    """Mean and standard deviation of every latent unit over the blocks."""
    count = jnp.maximum(sums.count, 1.0)
    mean = sums.total / count
    return mean, jnp.sqrt(jnp.maximum(sums.squares / count - mean**2, 0.0))


def active_units(std: Float[Array, "L Z"], noise: float | int = 0.0) -> Int[Array, ""]:
    """How many units' means vary with the text: variance of at least `ACTIVE_VARIANCE`, and of as large a share of that of the
    training's `noise`, under which the decoder cannot see a smaller one."""
    return (std**2 >= ACTIVE_VARIANCE * max(1.0, noise**2)).sum()


def others(valid: Bool[Array, "R"]) -> Int[Array, "R"]:
    """For each valid row the valid row before it, for the first the last: whose latents to give it in their stead."""
    count = jnp.maximum(valid.sum(), 1)
    return jnp.argsort(~valid, stable=True)[(jnp.cumsum(valid) - 2) % count]
