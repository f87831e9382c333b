"""Write a trained run as a folder that `transformers` reads: config.json, safetensors, tokenizer.

    python -m train.export RUN FOLDER [--checkpoint last|best|STEP]

LoRA adapters are merged into the weights, and padding rows of the vocabulary are left out. A method's own parameters, which
`transformers` has no place for, go into method.safetensors beside them. The folder can be the `pretrained.path` of another
run. Bad input is one line on standard error, exit code 2, and nothing is written.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from flax.traverse_util import flatten_dict

from latentjax.backbone import lora, pretrained
from latentjax.tokenizers import load_tokenizer
from train.cli import BAD_INPUT
from train.run import TOKENIZER, load_run

METHOD = "method.safetensors"


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a trained run as a folder that `transformers` reads."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run directory."""
    folder: Annotated[pathlib.Path, tyro.conf.Positional]
    """Absent or empty folder to write."""
    checkpoint: str = "last"
    """last, best (by validation during training) or a step."""


def export(run: pathlib.Path, folder: pathlib.Path, checkpoint: str = "last") -> int:
    """Write `folder` from a checkpoint of `run`; returns its step.

    Raises FileNotFoundError or ValueError for a run or checkpoint that is not there or a backbone that no published family
    has, FileExistsError if `folder` is not empty."""
    loaded = load_run(run, checkpoint)
    config, params = loaded.experiment.method.backbone, loaded.params["backbone"]
    if config.lora is not None:
        config, params = lora.merge(config, params)
    pretrained.save(folder, config, params, tokenizer=load_tokenizer(run / TOKENIZER))
    if own := flatten_dict(loaded.params["method"], sep="/"):
        from safetensors.flax import save_file

        save_file(own, folder / METHOD)
    return loaded.step


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns its exit code."""
    options = tyro.cli(Options, args=arguments, prog="python -m train.export")
    try:
        step = export(options.run, options.folder, options.checkpoint)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"wrote {options.folder} from step {step} of {options.run}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
