"""How well a thought VAE gives its text back, under noise on the latents: `python -m eval.reconstruction RUN`.

Each block is encoded, noise of `noise` standard deviations of its latent unit (over the blocks of the split) is added to the
posterior's mean, and the decoder writes greedily. A block is exact if all its tokens come back, with nothing after them.
Writes RUN/eval/reconstruction-SPLIT.json, under a free name; a use of a test split is logged.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from eval.controls import Share
from eval.evaluate import encode_prompts
from eval.report import free_stem, interval_text, log_test_use, percent
from latentjax.methods import ThoughtVAE
from latentjax.tasks.base import Example
from latentjax.thoughts import vae
from latentjax.tokenizers import Codec
from train.cli import BAD_INPUT
from train.run import LoadedRun, enable_compilation_cache, load_run


@dataclasses.dataclass(frozen=True)
class Options:
    """Share of blocks that a VAE gives back exactly."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of a ThoughtVAE."""
    split: str = "valid"
    """Split of the run's task."""
    count: int = 200
    """Number of problems."""
    noise: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 1.0)
    """Scales, in standard deviations of a latent unit."""
    checkpoint: str = "last"
    """last, best or a step."""
    seed: int = 0
    """Of the noise."""


def reconstruction(run: LoadedRun, examples: Sequence[Example], options: Options) -> list[Share]:
    """The share of exact blocks of `examples` at each scale of noise. Raises ValueError if a block does not fit the VAE."""
    method, task = run.experiment.method, run.experiment.task
    assert isinstance(method, ThoughtVAE)
    prompts = encode_prompts(method, Codec(run.tokenizer, task.format, run.experiment.chat), examples)
    asked = method.lengths.question if method.encoder_sees_question else 0
    (question, text), (question_mask, text_mask) = (
        (x[:, :asked], x[:, asked:]) for x in (prompts.question, prompts.question_mask)
    )
    tokens, mask = (np.reshape(x, (-1, method.lengths.text)) for x in (text, text_mask))
    valid = mask.any(axis=1)

    @jax.jit
    def back(params: Any, scale: Float[jax.Array, ""], key: jax.Array) -> Any:
        blocks = jnp.asarray(tokens), jnp.asarray(mask)
        q = method.posterior_of(params["method"], *blocks, jnp.asarray(question), jnp.asarray(question_mask))
        std = vae.statistics(vae.moments(q.mean, jnp.asarray(valid)))[1]
        z = q.mean + scale * std * jax.random.normal(key, q.mean.shape)
        return method.decode(params, z, jnp.asarray(valid), prompts.ids["eos"], key)[:2]

    found = []
    for number, scale in enumerate(options.noise):
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        text, kept = jax.device_get(back(run.params, jnp.float32(scale), key))
        # The block's last token is its end, which the decoder writes and does not keep.
        said = mask & np.pad(mask[:, 1:], ((0, 0), (0, 1)))
        same = ((text == tokens) | ~said).all(axis=1) & (kept == said).all(axis=1)
        found.append(Share(int(same[valid].sum()), int(valid.sum())))
    return found


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit code."""
    options = tyro.cli(Options, args=arguments, prog="python -m eval.reconstruction")
    try:
        enable_compilation_cache()
        run = load_run(options.run, checkpoint=options.checkpoint)
        if not isinstance(run.experiment.method, ThoughtVAE):
            raise ValueError(f"run={options.run}: is a {run.experiment.method.name}; only a ThoughtVAE gives text back")
        if min(options.noise, default=-1) < 0:
            raise ValueError(f"noise={options.noise}: name at least one scale, none of them negative")
        examples = run.experiment.task.examples(options.split, count=options.count, seed=0)
        command = shlex.join(["python", "-m", "eval.reconstruction", *arguments])
        log_test_use(
            options.run, split=options.split, checkpoint=options.checkpoint, step=run.step, thoughts=None, command=command
        )  # fmt: skip
        found = reconstruction(run, examples, options)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    shares = {str(scale): share.record() for scale, share in zip(options.noise, found, strict=True)}
    table = Table("noise", "exact %", "n", title=f"{options.run.name}, {options.split}, step {run.step}")
    for scale, share in zip(options.noise, found, strict=True):
        table.add_row(f"{scale:g}", f"{percent(share.value)} ({interval_text(*share.interval)})", str(share.n))
    Console().print(table)
    folder = options.run / "eval"
    folder.mkdir(exist_ok=True)
    path = folder / f"{free_stem(folder, f'reconstruction-{options.split}')}.json"
    header = {"split": options.split, "count": options.count, "step": run.step, "seed": options.seed}
    path.write_text(json.dumps(header | {"exact": shares}, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
