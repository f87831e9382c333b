"""The VAE's two transformers against their definition, and its formulas against numpy and Monte Carlo."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone.config import BackboneConfig
from latentjax.rollout import Backbone
from latentjax.sampling import Sampling
from latentjax.thoughts import vae
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit

DECODER = BackboneConfig(vocab_size=16, max_positions=24, width=12, layers=1, heads=2, qkv_bias=False)
ENCODER = dataclasses.replace(DECODER, layers=2, heads=3)
L, Z, T, EOS = 2, 3, 5, 1
LENGTHS = (3, 5, 1, 4)
MASK = np.arange(T) < np.array(LENGTHS)[:, None]
TOKENS = np.where(MASK, np.random.default_rng(0).integers(2, 16, MASK.shape), 0).astype(np.int32)
LATENTS = np.random.default_rng(1).standard_normal((4, L, Z)).astype(np.float32)
DECODER_PARAMS = naive.random_params(DECODER)
BACKBONE = Backbone(DECODER, DECODER_PARAMS)


@functools.cache
def own():
    """Parameters besides the decoder's; the map to log sigma^2, which starts at zero, is made to matter."""
    params = vae.init(jax.random.key(0), ENCODER, DECODER.width, L, Z)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["log_variance"]))
    params["encoder"] = naive.random_params(ENCODER, seed=1)
    params["log_variance"] = {
        "kernel": 0.3 * jax.random.normal(jax.random.key(1), (ENCODER.width, Z)),
        "bias": jnp.linspace(-1, 1, Z),
    }
    return params


def affine(name, x):
    return np.asarray(x) @ np.asarray(own()[name]["kernel"]) + np.asarray(own()[name]["bias"])


def words(row):
    return TOKENS[row][: LENGTHS[row]]


@jit
def posterior(own, tokens, mask):
    return vae.posterior(Backbone(ENCODER, own["encoder"]), own, tokens, mask)


@jit
def token_logits(own, latents, tokens, mask):
    return vae.token_logits(BACKBONE, own, latents, tokens, mask)


@functools.partial(jit, static_argnames=("limit", "sampling"))
def decode(own, latents, eos, limit, key=0, sampling=Sampling()):
    return vae.decode(BACKBONE, own, latents, eos, limit, jax.random.key(key), sampling)


# ---- the two transformers


def test_the_posterior_is_read_off_the_queries_behind_the_text():
    q = posterior(own(), TOKENS, MASK)
    for row in range(len(LENGTHS)):
        x = jnp.concatenate(
            [naive.embed(own()["encoder"], words(row)), jnp.asarray(affine("decompress", own()["queries"]))]
        )
        hidden = naive.forward(ENCODER, own()["encoder"], x)[-L:]
        assert_close(q.mean[row], affine("mean", hidden), 1e-5)
        assert_close(q.log_variance[row], affine("log_variance", hidden), 1e-5)
    wide = np.pad(TOKENS, ((0, 0), (0, 2)), constant_values=7), np.pad(MASK, ((0, 0), (0, 2)))
    assert_close(posterior(own(), *wide), q, 1e-5)


def start_of_decoding(row):
    return jnp.asarray(affine("decompress", np.concatenate([LATENTS[row], own()["start"]])))


def test_token_logits_are_those_of_the_text_behind_latents_and_start_marker():
    logits = token_logits(own(), LATENTS, TOKENS, MASK)
    for row, length in enumerate(LENGTHS):
        x = jnp.concatenate([start_of_decoding(row), naive.embed(DECODER_PARAMS, words(row)[:-1])])
        right = naive.logits(DECODER, DECODER_PARAMS, naive.forward(DECODER, DECODER_PARAMS, x))[L:]
        assert_close(logits[row, :length], right, 1e-5)
    wide = np.pad(TOKENS, ((0, 0), (0, 2)), constant_values=7), np.pad(MASK, ((0, 0), (0, 2)))
    assert_close(token_logits(own(), LATENTS, *wide)[:, :T], logits, 1e-5)


@pytest.mark.parametrize("ends", ["in some rows", "nowhere"])
def test_decoding_is_greedy_recursion_of_the_definition(ends):
    eos = -1
    if ends == "in some rows":
        texts = [
            set(naive.greedy(DECODER, DECODER_PARAMS, start_of_decoding(row), 6, -1)[0]) for row in range(len(LENGTHS))
        ]
        eos = min(set.union(*texts) - set.intersection(*texts))
    tokens, kept, cost = decode(own(), LATENTS, eos, 6)
    found = []
    for row in range(len(LENGTHS)):
        right, _ = naive.greedy(DECODER, DECODER_PARAMS, start_of_decoding(row), 6, eos)
        text = [token for token in right if token != eos]
        assert np.asarray(kept)[row].tolist() == [i < len(text) for i in range(6)]
        assert np.asarray(tokens)[row, : len(text)].tolist() == text
        # Latents and marker in one pass, then one token each, but the last, which nothing follows.
        assert [int(x[row]) for x in jax.tree.leaves(cost)] == [len(right), L + len(right), len(right)]
        found.append(len(text))
    assert (min(found) < 6) == (ends == "in some rows")


def test_sampled_text_depends_on_the_key():
    draw = Sampling(temperature=2.0)
    one, again, other = (decode(own(), LATENTS, -1, 6, key, draw)[0] for key in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


# ---- the posterior's formulas


def gaussians():
    rng = np.random.default_rng(2)
    return vae.Posterior(
        jnp.asarray(rng.standard_normal((1, 2, 3)), jnp.float32),
        jnp.asarray(rng.uniform(-2, 1, (1, 2, 3)), jnp.float32),
    )


def repeated(q, times):
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), q)


def test_the_divergence_is_the_mean_of_log_q_minus_log_p_over_samples():
    q = gaussians()
    mean, variance = (np.asarray(x, np.float64)[0] for x in (q.mean, jnp.exp(q.log_variance)))
    z = np.asarray(vae.sample(repeated(q, 100_000), jax.random.key(0), "gaussian", 0.0), np.float64)
    log_q = -0.5 * ((z - mean) ** 2 / variance + np.log(variance))
    difference = (log_q + 0.5 * z**2).sum(axis=2)  # the constants of both are the same
    error = difference.std(axis=0) / np.sqrt(len(z))
    found = np.asarray(vae.divergence(q, "gaussian"))[0]
    assert (np.abs(found - difference.mean(axis=0)) < 5 * error).all()
    assert (error < 0.01 * found).all()  # so that a factor or a missing term would show
    standard = vae.Posterior(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4)))
    assert float(vae.divergence(standard, "gaussian")[0, 0]) == 0.0


def test_what_the_other_kinds_charge():
    q = gaussians()
    assert_close(vae.divergence(q, "sigma"), (np.asarray(q.mean) ** 2).sum(axis=2), 1e-6)
    assert vae.divergence(q, "deterministic").tolist() == [[0.0, 0.0]]


def test_gaussian_samples_have_the_posteriors_mean_and_deviation():
    q = gaussians()
    z = np.asarray(vae.sample(repeated(q, 100_000), jax.random.key(1), "gaussian", 9.0))
    std = np.exp(0.5 * np.asarray(q.log_variance)[0])
    assert (np.abs(z.mean(axis=0) - q.mean[0]) < 5 * std / np.sqrt(len(z))).all()
    assert z.std(axis=0) == pytest.approx(std, rel=0.02)
    flat = (z - z.mean(axis=0)).reshape(len(z), -1)
    correlation = np.corrcoef(flat.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.02  # independent of one another


def test_sigma_samples_have_one_scale_for_all_of_a_text():
    """In 400 numbers of a text its scale shows: over texts it is the absolute value of N(0, sigma^2)."""
    rows, sigma = 2000, 0.75
    q = vae.Posterior(jnp.full((rows, 4, 100), 3.0), jnp.full((rows, 4, 100), 5.0))
    noise = np.asarray(vae.sample(q, jax.random.key(2), "sigma", sigma)) - 3.0
    per_text = noise.reshape(rows, -1).std(axis=1)
    assert (per_text**2).mean() == pytest.approx(sigma**2, rel=0.15)
    assert per_text.mean() == pytest.approx(sigma * np.sqrt(2 / np.pi), rel=0.1)
    halves = noise.reshape(rows, 2, -1).std(axis=2)
    assert np.abs(np.log(halves[:, 0] / halves[:, 1])).max() < 0.5  # all latents of a text share it
    assert per_text.max() > 3 * np.median(per_text)  # and texts do not


def test_deterministic_samples_are_the_mean():
    q = gaussians()
    assert (vae.sample(q, jax.random.key(0), "deterministic", 1.0) == q.mean).all()


def test_tokens_are_substituted_at_the_given_rate_by_uniform_ones():
    tokens, count, vocabulary = jnp.full((400, 100), 20), 40_000, 10
    found = np.asarray(vae.substitute(tokens, jax.random.key(0), 0.3, vocabulary))  # 20 is outside the vocabulary
    replaced = found != 20
    assert replaced.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / count))
    share = np.bincount(found[replaced], minlength=vocabulary) / replaced.sum()
    assert share == pytest.approx(np.full(vocabulary, 0.1), abs=0.02)
    assert (vae.substitute(tokens, jax.random.key(0), 0, vocabulary) == tokens).all()


# ---- statistics


def test_statistics_are_those_of_all_batches_together():
    rng = np.random.default_rng(3)
    batches = [rng.normal(2.0, 3.0, (size, L, Z)).astype(np.float32) for size in (5, 1, 8)]
    valid = [rng.random(len(batch)) < 0.7 for batch in batches]
    assert not all(mask.all() for mask in valid)
    sums = functools.reduce(
        functools.partial(jax.tree.map, jnp.add),
        [vae.moments(jnp.asarray(batch), jnp.asarray(mask)) for batch, mask in zip(batches, valid, strict=True)],
    )
    kept = np.concatenate([batch[mask] for batch, mask in zip(batches, valid, strict=True)]).astype(np.float64)
    mean, std = vae.statistics(sums)
    assert int(sums.count) == len(kept)
    assert_close(mean, kept.mean(axis=0), 1e-5)
    assert_close(std, kept.std(axis=0), 1e-5)
    nothing = vae.statistics(vae.moments(jnp.ones((2, L, Z)), jnp.zeros(2, bool)))
    assert all((x == 0).all() for x in nothing)


def test_active_units_vary_by_at_least_the_threshold():
    std = jnp.sqrt(jnp.array([[0.0, 0.009, 0.0101], [1.0, 0.02, 0.0]]))
    assert int(vae.active_units(std)) == 3


# ---- gradients


def test_the_gradient_reaches_the_encoder_through_a_decoder_that_does_not_train():
    eps = np.random.default_rng(4).standard_normal(LATENTS.shape).astype(np.float32)
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(MASK)

    def loss(own, decoder):
        q = vae.posterior(Backbone(ENCODER, own["encoder"]), own, tokens, mask)
        z = q.mean + jnp.exp(0.5 * q.log_variance) * eps
        logits = vae.token_logits(Backbone(DECODER, decoder), own, z, tokens, mask)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return -jnp.where(mask, chosen, 0.0).sum() / mask.sum()

    gradient = jit(jax.grad(lambda own: loss(own, jax.lax.stop_gradient(DECODER_PARAMS))))(own())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and (leaf != 0).any(), jax.tree_util.keystr(path)
    value = jit(lambda own: loss(own, DECODER_PARAMS))
    rng = np.random.default_rng(5)
    for name in ("encoder", "queries", "start", "mean", "log_variance", "decompress"):
        direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), own()[name])
        length = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(direction)))
        step = 1e-2 / length
        moved = [
            float(value(own() | {name: jax.tree.map(lambda x, d, s=s: x + s * d, own()[name], direction)}))
            for s in (step, -step)
        ]
        products = jax.tree.map(lambda g, d: float((g * d).sum()), gradient[name], direction)
        assert sum(jax.tree.leaves(products)) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=2e-2, abs=2e-3)
