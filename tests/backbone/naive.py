"""The decoder and the feedback of thoughts written out from their definitions, to test against.

One sequence at a time, loops over layers, heads and thoughts, no cache, no padding, nothing shared with the code under test
except the names of the parameters. Letters: T positions, D width, V vocabulary, E width of a head, K thoughts.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.backbone import decoder
from latentjax.backbone.config import BackboneConfig


def random_params(config: BackboneConfig, seed: int = 0):
    """Parameters of the right shapes in which every array matters: no bias is 0 and no scale is 1."""
    return random_like(jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0)), seed)


def random_like(shapes, seed: int = 0):
    """The same for any tree of shapes with such names."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        spread = {"kernel": leaf.shape[-2:][0] ** -0.5, "tokens": 0.7, "positions": 0.7}.get(name, 0.2)
        drawn = (name == "scale") + spread * rng.standard_normal(leaf.shape)
        return jnp.asarray(drawn, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def norm(config, weights, x):
    if config.norm == "layer":
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        scaled = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + config.norm_eps)
        return scaled * weights["scale"] + weights["bias"]
    return rms(x, weights["scale"], config.norm_eps)


def rms(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def affine(weights, x):
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def frequencies(config) -> np.ndarray:
    """Rotary frequencies, with Llama-3's rule in its three cases by wavelength."""
    size, scaling, found = config.size_per_head, config.rope_scaling, []
    for i in range(size // 2):
        frequency = 1.0 / config.rope_theta ** (2 * i / size)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_max_positions / scaling.low_freq_factor
            shortest = scaling.original_max_positions / scaling.high_freq_factor
            if wavelength > longest:
                frequency = frequency / scaling.factor
            elif wavelength >= shortest:
                part = scaling.original_max_positions / wavelength - scaling.low_freq_factor
                part = part / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = (1 - part) * frequency / scaling.factor + part * frequency
        found.append(frequency)
    return np.array(found)


def rotary(config, x, positions):
    """Turn feature pairs (i, i + E/2) of [T, E], as complex numbers, by position times frequency."""
    half = x.shape[-1] // 2
    turn = jnp.exp(1j * positions[:, None] * frequencies(config)[None, :])
    turned = (x[:, :half] + 1j * x[:, half:]) * turn
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def activate(config, x):
    if config.activation == "silu":
        return x / (1 + jnp.exp(-x))
    if config.activation == "gelu":
        return 0.5 * x * (1 + jax.scipy.special.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer(config, weights, x, positions, mask):
    """One layer on [T, D]; mask [T, T] says which column a row may see."""
    size, group = config.size_per_head, config.heads // config.num_kv_heads
    normed = norm(config, weights["attention_norm"], x)
    heads = []
    for h in range(config.heads):
        parts = {}
        for name, which in (("query", h), ("key", h // group), ("value", h // group)):
            part = affine(weights[name], normed)[:, which * size : (which + 1) * size]
            if config.qk_norm and name != "value":
                part = rms(part, weights[f"{name}_norm"]["scale"], config.norm_eps)
            if config.positions == "rotary" and name != "value":
                part = rotary(config, part, positions)
            parts[name] = part
        scores = jnp.where(mask, parts["query"] @ parts["key"].T / math.sqrt(size), -jnp.inf)
        exponent = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        heads.append(exponent / jnp.sum(exponent, axis=1, keepdims=True) @ parts["value"])
    x = x + affine(weights["attention_out"], jnp.concatenate(heads, axis=1))
    normed = norm(config, weights["mlp_norm"], x)
    inner = affine(weights["mlp_up"], normed)
    inner = (
        activate(config, affine(weights["mlp_gate"], normed)) * inner if config.gated_mlp else activate(config, inner)
    )
    return x + affine(weights["mlp_down"], inner)


def layers(config, params, x, positions, mask, start=0, stop=None):
    for i in range(start, config.layers if stop is None else stop):
        x = layer(config, jax.tree.map(lambda w, i=i: w[i], params["layers"]), x, positions, mask)
    return x


def forward(config, params, x, mask=None):
    """Post-norm hidden states [T, D] of input embeddings [T, D] at positions 0..T-1; causal unless `mask` [T, T] is given.

    Runs at a multiple of eight positions, so that few lengths are compiled: what follows the end is seen by nothing."""
    length = x.shape[0]
    more = -length % 8
    mask = np.tril(np.ones((length, length), bool)) if mask is None else mask
    full = np.eye(length + more, dtype=bool)
    full[:length, :length] = mask
    return _forward(config, params, jnp.pad(x, ((0, more), (0, 0))), full)[:length]


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, x, mask):
    positions = jnp.arange(x.shape[0])
    if config.positions == "learned":
        x = x + params["embed"]["positions"][positions]
    return norm(config, params["norm"], layers(config, params, x, positions, mask))


def embed(params, tokens):
    """[T, D] of token ids."""
    return params["embed"]["tokens"][jnp.asarray(tokens, int)]


def logits(config, params, hidden):
    """[V] or [T, V] of post-norm hidden states."""
    kernel = params["embed"]["tokens"].T if config.tied_head else params["head"]["kernel"]
    return config.logit_scale * (hidden @ kernel)


def think(config, params, x, thoughts, change=lambda j, vector: vector):
    """Coconut: [T, D] -> [T + K, D], each thought from a new run of the whole sequence. `change` edits thought j."""
    for j in range(thoughts):
        x = jnp.concatenate([x, change(j, forward(config, params, x)[-1])[None]])
    return x


def answer_mask(question: int, thoughts: int, text: int) -> np.ndarray:
    """[T, T]: causal, and positions after the thoughts do not see the question."""
    total = question + thoughts + text
    mask = np.tril(np.ones((total, total), bool))
    mask[question + thoughts :, :question] = False
    return mask


def greedy(config, params, x, steps, eos, *, hidden_question=None):
    """Text after input embeddings [T, D]: (tokens, their log-probabilities), re-running the whole sequence per token.

    `hidden_question` (question, thoughts): lengths of what the text may not see and of what it may."""
    tokens, scores = [], []
    for _ in range(steps):
        mask = None
        if hidden_question is not None:
            mask = answer_mask(*hidden_question, len(x) - sum(hidden_question))
        row = np.asarray(logits(config, params, forward(config, params, x, mask)[-1]), np.float64)
        tokens.append(int(row.argmax()))
        scores.append(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max())
        if tokens[-1] == eos:
            break
        x = jnp.concatenate([x, embed(params, tokens[-1:])])
    return tokens, np.array(scores)


def with_scan(config: BackboneConfig, scan: bool) -> BackboneConfig:
    return dataclasses.replace(config, scan_layers=scan)
