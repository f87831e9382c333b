"""Speed of batched generation: `python -m benchmarks.generate --vocab 512 --prompts 64 --new-tokens 20 --json FILE`.

Prints, and writes to the JSON file, prompts_per_second, limit_prompts_per_second (all floating-point work at this machine's
measured matmul peak), seconds_prefill, seconds_think, seconds_decode (of the whole batch, medians). The public PyTorch
implementation of Coconut, batch 1 by construction, makes 3.7 prompts/s at vocabulary 512 and 0.84 at 50,260.
"""

import dataclasses
import json
import pathlib

import jax
import tyro

from benchmarks.setting import Setting, matmul_peak, median_seconds
from latentjax.methods import Lengths
from latentjax.rollout import MAIN, Backbone, prefill, run, start
from latentjax.thoughts.feedback import feedback


@dataclasses.dataclass(frozen=True)
class Generate(Setting):
    """Time question -> thoughts -> text for a batch of prompts."""

    prompts: int = 64
    new_tokens: int = 20
    repeats: int = 5
    json: pathlib.Path | None = None


def measure(options: Generate) -> dict[str, float]:
    """Medians over `repeats` runs after a warm-up."""
    method = dataclasses.replace(options.build(), lengths=Lengths(options.question, options.new_tokens))
    params, prompts = options.params(method), jax.tree.map(jax.numpy.asarray, options.make_prompts(options.prompts))
    key = jax.random.key(options.seed)

    def read(params):
        return prefill(
            Backbone(method.backbone, params["backbone"]), prompts.question, prompts.question_mask, options.thoughts
        )  # fmt: skip

    def think(params, context):
        backbone, source = Backbone(method.backbone, params["backbone"]), feedback(prompts.thoughts)
        return run(backbone, source, start(source, {MAIN: context}), options.thoughts, key, until_done=True)

    def whole(params):
        return method.generate(params, prompts, key).tokens

    seconds_whole = median_seconds(jax.jit(whole), options.repeats, params)
    context, reading = jax.jit(read)(params), median_seconds(jax.jit(read), options.repeats, params)
    thinking = 0.0
    if options.thoughts and options.method.lower() == "coconut":
        thinking = median_seconds(jax.jit(think), options.repeats, params, context)
    positions = options.question + options.thoughts + options.new_tokens
    flops = options.forward_flops(positions, positions / 2, options.new_tokens)
    return {
        "prompts_per_second": options.prompts / seconds_whole,
        "limit_prompts_per_second": matmul_peak(options.dtype) / flops,
        "seconds_prefill": reading,
        "seconds_think": thinking,
        "seconds_decode": seconds_whole - reading - thinking,
    }


def main() -> None:
    options = tyro.cli(Generate, description=__doc__)
    text = json.dumps({**dataclasses.asdict(options), "json": None, **measure(options)}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
