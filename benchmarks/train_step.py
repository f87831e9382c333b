"""Time of one optimiser step: `python -m benchmarks.train_step --method Coconut --vocab 512 --json FILE`.

Prints, and writes to the JSON file, cpu_seconds_per_step, wall_seconds_per_step, tokens_per_second (positions),
flops_per_second (model FLOP: forward + 2x backward, attention over the causal half), peak_fraction (of this machine's measured
matmul peak), compile_seconds, peak_memory_bytes. The public PyTorch implementation of Coconut takes 5.9 CPU-seconds at
vocabulary 512 and 14.8 at 50,260 with these sizes on two quiet cores.
"""

import dataclasses
import json
import pathlib
import statistics
import time

import jax
import optax
import tyro

from benchmarks.setting import Setting, cpu_seconds, matmul_peak, peak_memory_bytes


@dataclasses.dataclass(frozen=True)
class TrainStep(Setting):
    """Time one AdamW step at the reference sizes."""

    repeats: int = 7
    json: pathlib.Path | None = None


def measure(options: TrainStep) -> dict[str, float]:
    """Median over `repeats` steps after two warm-up steps."""
    method, batch = options.build(), jax.tree.map(jax.numpy.asarray, options.make_batch())
    params = options.params(method)
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    opt_state = optimizer.init(params)

    def step(params, opt_state, key):
        grads, metrics = jax.grad(lambda p: method.loss(p, batch, key, {}, train=True), has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics["loss"]

    key = jax.random.key(options.seed)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, key).compile()
    compile_seconds = time.perf_counter() - start
    cpu, wall = [], []
    for i in range(options.repeats + 2):
        before = cpu_seconds(), time.perf_counter()
        params, opt_state, loss = jax.block_until_ready(compiled(params, opt_state, jax.random.fold_in(key, i)))
        cpu.append(cpu_seconds() - before[0])
        wall.append(time.perf_counter() - before[1])
    cpu_median, wall_median = statistics.median(cpu[2:]), statistics.median(wall[2:])
    positions = options.batch * (batch.question.shape[1] + batch.thought_mask.shape[1] + batch.text.shape[1])
    flops = 3 * options.forward_flops(positions, positions / options.batch / 2, batch.text.size)
    return {
        "cpu_seconds_per_step": cpu_median,
        "wall_seconds_per_step": wall_median,
        "tokens_per_second": positions / wall_median,
        "flops_per_second": flops / wall_median,
        "peak_fraction": flops / wall_median / matmul_peak(options.dtype),
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "loss": float(loss),
    }


def main() -> None:
    options = tyro.cli(TrainStep, description=__doc__)
    result = measure(options)
    text = json.dumps({**dataclasses.asdict(options), "json": None, **result}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
