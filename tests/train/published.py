"""Folders such as a published model's: random weights and a tokenizer in the family's own format, nothing downloaded."""

import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp

from latentjax.backbone import decoder, pretrained
from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.hf_config import to_hf
from latentjax.tokenizers import PretrainedTokenizer
from tests.pretrained_folders import gpt2_tokenizer, llama_tokenizer


def write_tokenizer(folder: os.PathLike, backbone: BackboneConfig) -> PretrainedTokenizer:
    """The tokenizer of the backbone's family with `backbone.vocab_size` tokens, most of which no text contains."""
    small = {"learned": gpt2_tokenizer, "rotary": llama_tokenizer}[backbone.positions](folder)
    file = pathlib.Path(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"<unused {i}>": i for i in range(small, backbone.vocab_size)}
    file.write_text(json.dumps(content))
    return PretrainedTokenizer.load(folder)


def write_description(folder: os.PathLike, backbone: BackboneConfig) -> None:
    """What a dry run reads: config.json and the tokenizer, no weights."""
    write_tokenizer(folder, backbone)
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(to_hf(backbone)))


def write_model(folder: os.PathLike, backbone: BackboneConfig, seed: int = 0) -> dict:
    """A whole folder; returns the weights. Biases and scales of norms are random too, so that a mix-up shows."""
    params = decoder.init(backbone, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, [jnp.add(leaf, x) for leaf, x in zip(leaves, noise, strict=True)])
    with tempfile.TemporaryDirectory() as scratch:
        pretrained.save(folder, backbone, params, tokenizer=write_tokenizer(scratch, backbone))
    return params
