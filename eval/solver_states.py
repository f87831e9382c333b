"""What latents say while they are made: `python -m eval.solver_states RUN` decodes every state of a LaDiR's solver.

The paper (arXiv 2510.04573) reports that on Countdown the text starts as rough drafts and is right and stable from about
t = 0.25 down. For each state of the solver, from noise (t = 1) to the finished block (t = 0), the VAE's decoder reads all blocks.
Written into RUN/eval: a table of how the text of some problems changes (.txt), the shares below over all blocks (.json), and
a figure of them (.png).

    final   the text is that of the finished block
    right   the text is one of the task's steps and true (`Task.judge_step`), whatever the problem
"""

import dataclasses
import functools
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
from rich.console import Console
from rich.table import Table

from eval.evaluate import encode_prompts, within_vocabulary
from eval.plots import plot_solver
from eval.report import free_stem, log_test_use
from latentjax.methods.ladir import LaDiR
from latentjax.tasks.base import Example, Reason
from latentjax.tokenizers import Codec
from train.cli import BAD_INPUT
from train.run import LoadedRun, enable_compilation_cache, load_run


@dataclasses.dataclass(frozen=True)
class Options:
    """Decode every state of the solver on some problems of a split."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of a LaDiR."""
    split: str = "valid"
    """Split of the run's task."""
    count: int = 200
    """Number of problems."""
    shown: int = 4
    """How many of them the table shows."""
    checkpoint: str = "last"
    """last, best or a step."""
    seed: int = 0
    """Of the noise."""


def states(
    run: LoadedRun, examples: Sequence[Example], options: Options
) -> tuple[list[str], list[list[list[str]]], np.ndarray]:
    """Questions, texts [problem][block][state] of the blocks that were made, and the times of the states."""
    task = run.experiment.task
    method = within_vocabulary(run.experiment.method, run.tokenizer)
    assert isinstance(method, LaDiR)
    prompts = encode_prompts(method, Codec(run.tokenizer, task.format, run.experiment.chat), examples)
    generate = jax.jit(functools.partial(method.generate, record=("solver",)))
    out = generate(run.params, jax.tree.map(jnp.asarray, prompts), jax.random.key(options.seed))
    count, blocks = len(examples), method.vae.max_blocks
    recorded = out.recorded["solver"].reshape(count, blocks, method.vae.latents, -1, method.vae.latent_width)
    made = out.thought_mask[:, :: method.vae.latents]
    decode = jax.jit(method.decode_blocks)
    texts: list[list[list[str]]] = [[[] for _ in range(int(n))] for n in made.sum(axis=1)]
    for state in range(recorded.shape[3]):
        tokens, kept = jax.device_get(decode(run.params, recorded[:, :, :, state], made, prompts.ids["eos"]))
        for row, (ids, keep) in enumerate(zip(tokens, kept, strict=True)):
            problem, block = divmod(row, blocks)
            if block < len(texts[problem]):
                texts[problem][block].append(run.tokenizer.decode(ids[keep].tolist()).strip())
    return [example.question for example in examples], texts, np.asarray(method.grid())


def shares(run: LoadedRun, texts: list[list[list[str]]]) -> dict[str, list[float]]:
    """`final` and `right` of each state, shares of all blocks."""
    blocks = [block for problem in texts for block in problem]
    judged = [[run.experiment.task.judge_step(text) for text in block] for block in blocks]
    return {
        "final": np.mean([[text == block[-1] for text in block] for block in blocks], axis=0).tolist(),
        "right": np.mean([[reason is Reason.RIGHT for reason in block] for block in judged], axis=0).tolist(),
    }


def table(questions: list[str], texts: list[list[list[str]]], times: np.ndarray, shown: int) -> Table:
    """One line for each state, one column for each block of the first `shown` problems; a text that stays is not repeated."""
    result = Table("t")
    columns = []
    for question, problem in list(zip(questions, texts, strict=True))[:shown]:
        for number, block in enumerate(problem, start=1):
            result.add_column(f"{question} block {number}")
            columns.append(["" if i and text == block[i - 1] else text for i, text in enumerate(block)])
    for i, time in enumerate(times):
        result.add_row(f"{time:.2f}", *(column[i] for column in columns))
    return result


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit code."""
    options = tyro.cli(Options, args=arguments, prog="python -m eval.solver_states")
    try:
        enable_compilation_cache()
        run = load_run(options.run, checkpoint=options.checkpoint)
        if not isinstance(run.experiment.method, LaDiR):
            raise ValueError(f"run={options.run}: is a {run.experiment.method.name}; only a LaDiR has solver states")
        examples = run.experiment.task.examples(options.split, count=options.count, seed=0)
        command = shlex.join(["python", "-m", "eval.solver_states", *arguments])
        log_test_use(
            options.run, split=options.split, checkpoint=options.checkpoint, step=run.step, thoughts=None, command=command
        )  # fmt: skip
        questions, texts, times = states(run, examples, options)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    found: dict[str, Any] = {"split": options.split, "count": len(texts), "step": run.step, "seed": options.seed}
    found |= {"blocks": sum(map(len, texts)), "times": times.tolist(), **shares(run, texts)}
    folder = options.run / "eval"
    folder.mkdir(exist_ok=True)
    stem = folder / free_stem(folder, f"solver-{options.split}")
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    with stem.with_suffix(".txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=200).print(table(questions, texts, times, options.shown))
    Console().print(table(questions, texts, times, options.shown))
    plot_solver(times.tolist(), {name: found[name] for name in ("final", "right")}, stem.with_suffix(".png"))
    for suffix in (".json", ".txt", ".png"):
        print(f"wrote {stem.with_suffix(suffix)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
