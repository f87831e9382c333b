"""Writes docs/backbones.md: how far published architectures are from `transformers`: `python -m benchmarks.backbones`.

Needs torch (the `torch` extra). Models are small, with random weights that are the same in every run.
"""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
import tyro

from latentjax.backbone import decoder, pretrained
from latentjax.backbone.cache import empty_cache
from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.hf_config import FAMILIES
from tests.backbone import reference

DOCUMENT = pathlib.Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
HEAD = """# Published backbones against their reference

Written by the command below; do not edit. It builds a small random model of each kind with `transformers` {transformers} (torch
{torch}, CPU), saves it as a checkpoint, loads that with `latentjax.backbone.pretrained` (jax {jax}, CPU) and compares on {rows} x
{length} random tokens (seed {seed}).

```bash
.venv/bin/python -m benchmarks.backbones
```

A figure is max|a - b| / max|b|, b the reference's; of gradients (of the mean cross-entropy of the next token, with respect to
every tensor of the checkpoint) the largest over the tensors. *Prefill* is one pass over the sequence, *cached* one token after
another through the key/value cache, both against the reference's single pass.

## float32

Limits in the tests: logits 1e-5, gradients 1e-4.

| model | logits, prefill | logits, cached | gradients |
|---|---|---|---|
{float32}

## bfloat16

Parameters and matrix products in bfloat16; norms, softmax and logits of ours are float32. Here b is the reference in float32 on
the same (rounded) weights; *reference's own* is how far the reference is from that when it runs in bfloat16 itself: what rounding
alone does.

| model | logits, prefill | logits, cached | logits, reference's own | gradients | gradients, reference's own | tensor |
|---|---|---|---|---|---|---|
{bfloat16}

The last column names the tensor of our largest difference.

## What can be read and written

`model_type` {families}; tied or untied; one safetensors file or several with an
index; float32, bfloat16 and float16. Rotary positions: default and `llama3`. What a `config.json` may say beyond that and the
decoder does not do (sliding windows that are used, other rotary scalings, quantisation, custom code) is an error that names the
field, and so is a field that is not known.
"""


@dataclasses.dataclass(frozen=True)
class Backbones:
    """Compare and write the document."""

    rows: int = 2
    length: int = 48
    seed: int = 0
    out: pathlib.Path = DOCUMENT


def difference(ours: Any, theirs: Any) -> float:
    """max|a - b| / max|b|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def largest(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """The largest difference of the arrays of two dictionaries, and its name."""
    return max((difference(ours[name], x), name) for name, x in theirs.items())


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(config: BackboneConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits of one token after another."""
    valid = jnp.ones((tokens.shape[0], 1), bool)

    def step(cache, token):
        out = decoder.apply(config, params, token[:, None], valid, cache=cache)
        return cache.write(out.kv, valid), decoder.head(config, params, out.hidden[:, 0])

    return jnp.swapaxes(jax.lax.scan(step, empty_cache(config, *tokens.shape), tokens.T)[1], 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: BackboneConfig, params: Any, tokens: jax.Array) -> Any:
    """Of the mean cross-entropy of the next token."""

    def loss(params):
        logits = pretrained.logits(config, params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return jax.grad(loss)(params)


def compare(shape: reference.Shape, dtype: str, options: Backbones) -> str:
    """One row of the table of `dtype`, without the model's name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        reference.save(shape.build(options.seed).to(getattr(torch, dtype)), folder)
        config, params = pretrained.load(folder)
        rounded, exact = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=x).eval()
            for x in (getattr(torch, dtype), torch.float32)
        )
    config = dataclasses.replace(config, dtype=dtype)
    rng = np.random.default_rng(options.seed)
    tokens = rng.integers(0, config.vocab_size, (options.rows, options.length)).astype(np.int32)
    logits, slopes = reference.logits(exact, tokens), reference.loss_gradients(exact, tokens)[1]
    prefill = difference(pretrained.logits(config, params, tokens), logits)
    cached = difference(cached_logits(config, params, tokens), logits)
    worst, tensor = largest(dict(pretrained.tensors_of(config, gradients(config, params, tokens))), slopes)
    if dtype == "float32":
        return f"{prefill:.1e} | {cached:.1e} | {worst:.1e}"
    own = difference(reference.logits(rounded, tokens), logits)
    own_worst, _ = largest(reference.loss_gradients(rounded, tokens)[1], slopes)
    return f"{prefill:.1e} | {cached:.1e} | {own:.1e} | {worst:.1e} | {own_worst:.1e} | `{tensor}`"


def main() -> None:
    options = tyro.cli(Backbones, description=__doc__)
    transformers.logging.set_verbosity_error()
    tables = {}
    for dtype in ("float32", "bfloat16"):
        lines = []
        for name, shape in reference.SHAPES.items():
            lines.append(f"| {name} | {compare(shape, dtype, options)} |")
            print(dtype, lines[-1], flush=True)
        tables[dtype] = "\n".join(lines)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    families = ", ".join(f"`{name}`" for name in FAMILIES)
    options.out.write_text(HEAD.format(**versions, **dataclasses.asdict(options), **tables, families=families))


if __name__ == "__main__":
    main()
