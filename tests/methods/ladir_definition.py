"""LaDiR by its definition: one sequence at a time, no cache, no padding (tests/backbone/naive.py); and a small one to test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.methods import FlowSampler, LaDiR, Lengths, ThoughtVAE
from tests.backbone import naive
from tests.methods.battery import BACKBONE, EXAMPLES, Case
from tests.quick import jit
from train import state as train_state

WITH_STEPS = tuple(example for example in EXAMPLES if example.steps)
EIGHT = (*WITH_STEPS, WITH_STEPS[0])  # as many as devices
WIDE = dataclasses.replace(BACKBONE, max_positions=80)
VAE = ThoughtVAE(
    dataclasses.replace(WIDE, layers=1),
    Lengths(7, 4),
    steps=10,
    latents=2,
    latent_width=4,
    max_blocks=4,
    train_decoder=True,
)
METHOD = LaDiR(WIDE, Lengths(7, 5), vae=VAE, steps=10, draws=2, sampler=FlowSampler(3, guidance=2.0))
# Layers in a scan compile faster, and have the other layout of a cache.
PLAIN = dataclasses.replace(
    METHOD, backbone=dataclasses.replace(WIDE, scan_layers=True), sampler=FlowSampler(3, guidance=1, noise_scale=1)
)
BUDGET = dataclasses.replace(PLAIN, stop="budget")
L, Z, N = VAE.latents, VAE.latent_width, VAE.max_blocks
LONGEST = 32  # positions of the longest sequence; one program for all


def variant(**changes):
    return Case(dataclasses.replace(METHOD, **changes))


@functools.cache
def params():
    made = naive.random_like(jax.eval_shape(lambda: train_state.init_params(METHOD, 0)))
    made["method"]["latents"]["std"] = jnp.abs(made["method"]["latents"]["std"]) + 0.5
    made["method"]["decision"]["bias"] = jnp.zeros(2)
    return made


def own():
    return params()["method"]


# ---- the definition


def affine(weights, x):
    return np.asarray(x, np.float64) @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"])


def silu(x):
    return x / (1 + np.exp(-x))


def time_embedding(weights, t):
    angles = [1000 * t * np.exp(-np.log(10000) * i / 128) for i in range(128)]
    return affine(weights["out"], silu(affine(weights["in"], np.concatenate([np.cos(angles), np.sin(angles)]))))


def velocity_head(hidden, t):
    """u = W' ((1 + scale) norm(h) + shift) + b' of hidden states [L, D]."""
    hidden = np.asarray(hidden, np.float64)
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    shift, scale = np.split(affine(own()["head"]["modulation"], silu(time_embedding(own()["head_time"], t))), 2)
    return affine(own()["head"]["out"], (1 + scale) * normed + shift)


def forward(vectors, block):
    """Hidden states [T, D] of one sequence of vectors, positions counted up, latents of one block seeing each other."""
    length, block = len(vectors), np.asarray(block)
    mask = np.eye(LONGEST, dtype=bool)
    mask[:length, :length] = np.tril(np.ones((length, length), bool)) | (
        (block[:, None] == block) & (block[:, None] >= 0)
    )
    x = np.zeros((LONGEST, WIDE.width), np.float32)
    x[:length] = np.stack(vectors)
    return naive.forward(WIDE, params()["backbone"], jnp.asarray(x), mask)[:length]


def embed(tokens):
    return np.asarray(params()["backbone"]["embed"]["tokens"])[np.asarray(tokens)]


def sequence(question, blocks, noisy=None, t=None, null=False):
    """Vectors and block numbers: question, finished blocks, and a noisy one behind its marker and time."""
    vectors, block = list(embed(question)), [-1] * len(question)
    if null:
        vectors[1:] = [np.asarray(own()["null"])] * (len(question) - 1)
    begin, end = np.asarray(own()["markers"])
    for number, z in enumerate(blocks):
        vectors += [begin, *affine(own()["latent_in"], z), end]
        block += [-1, *[number] * L, -1]
    if noisy is not None:
        vectors += [begin, time_embedding(own()["time"], t), *affine(own()["latent_in"], noisy)]
        block += [-1, -1, *[99] * L]
    return vectors, block


def velocity(question, blocks, noisy, t, null=False):
    return velocity_head(forward(*sequence(question, blocks, noisy, t, null))[-L:], t)


# ---- training


@functools.partial(jit, static_argnums=0)
def two_copies(method, params, batch, *arrays):
    return method.two_copies(params, batch, *arrays)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def copies(batch, seed=0):
    """Clean latents of the batch, noisy copies of all blocks twice over, times and block numbers."""
    rng = np.random.default_rng(seed)
    clean, present = METHOD.latents(params(), batch)
    block = np.tile(np.arange(N), (len(present), 2))
    noisy = rng.normal(size=(*block.shape, L, Z)).astype(np.float32)
    t = rng.uniform(size=block.shape).astype(np.float32)
    return clean, jnp.asarray(noisy), jnp.asarray(t), jnp.asarray(block)
