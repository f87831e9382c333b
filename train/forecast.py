"""`--plan`: what one training step takes on a machine that is not here.

The real step is compiled ahead of time for the devices that a plan's name stands for (train/chips.py), with the config's
mesh, shardings and donated state. No weights, data, tokenizer or accelerator are needed: only shapes go in. Nothing runs.

The bound on utilisation is a roofline (Williams et al. 2009, doi 10.1145/1498765.1498785): a step cannot be shorter than
its matrix products at peak speed, its memory traffic at full bandwidth, or what it sends at the full bandwidth of all
links, whichever is longest. Real steps are slower: none of the three is reached, and they do not overlap perfectly.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.decoder import check_positions
from latentjax.methods.base import Method, Stage
from latentjax.sharding import check_backbone, check_batch, make_mesh, param_shardings
from train import state as train_state
from train.chips import GIB, Target, target
from train.config import Experiment
from train.flops import matmul_flops
from train.hlo import COLLECTIVES, Collective, Program
from train.parallel import Parallel
from train.step import make_step

_STEPS = 1_000_000  # of the schedule; the program is the same for any number, and the real one depends on the data


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What one step takes. `memory` (by kind), `traffic` and what `collectives` send are bytes of one device."""

    target: Target
    mesh: Mapping[str, int]
    stage: Stage
    positions: tuple[int, int, int]  # of the question, thoughts, text
    experiment: Experiment
    memory: Mapping[str, int]
    model_flops: int  # all devices together, without recomputation
    flops: int  # all devices together
    compiled: bool = False  # False: the compiler found no way to fit the step into memory, and no more is known
    traffic: int = 0
    collectives: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # by kind: times, bytes sent
    loops_of_unknown_length: int = 0

    @property
    def used(self) -> int:
        """Bytes of one device at the peak of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.compiled and self.used <= self.target.memory

    def seconds(self) -> dict[str, float]:
        """Lower bounds on the time of a step by what would set it. Raises ValueError if the devices have no known peaks."""
        chip, count = self.target.chip, math.prod(self.mesh.values())
        if chip is None:
            raise ValueError(f"--plan {self.target.name}: no peaks are known for these devices")
        return {
            "matrix products": self.flops / count / chip.flops,
            "memory traffic": self.traffic / chip.bandwidth,
            "communication": sum(sent for _, sent in self.collectives.values()) / chip.interconnect,
        }

    @property
    def utilisation(self) -> float:
        """Upper bound on the share of the peak that the model's own operations can have (MFU)."""
        seconds, chip = self.seconds(), self.target.chip
        assert chip is not None  # `seconds` has raised
        return self.model_flops / math.prod(self.mesh.values()) / chip.flops / max(seconds.values())


def forecast(experiment: Experiment, name: str) -> Forecast:
    """Compile the step of `experiment` for the devices `name`, such as "v5e-8", for the stage with the longest batch.

    Raises ValueError saying what is wrong with the name, the mesh or the lengths."""
    where = target(name)
    mesh = make_mesh(experiment.mesh.data, experiment.mesh.fsdp, experiment.mesh.tensor, devices=where.devices)
    check_batch(mesh, experiment.batch_size // experiment.accumulate)
    check_backbone(mesh, experiment.method.backbone)
    experiment = _retargeted(experiment, platform=where.platform)
    method = experiment.method
    stage = max(method.stages(), key=lambda stage: method.slots_at(stage.index))
    positions = (method.lengths.question, method.slots_at(stage.index), method.lengths.text)
    check_positions(method.backbone, sum(positions), "question, thoughts and text")
    state, shardings = _state(experiment, mesh)
    batch = method.batch_shapes(experiment.batch_size, stage.index)
    parallel = Parallel("jit", mesh, experiment.batch_size)
    traced = parallel.trace(make_step(experiment, _STEPS, stage.frozen), state, shardings, batch, updates=True)
    plain = _retargeted(experiment, remat="none", platform="cpu", scan_layers=True)  # computes nothing twice
    plan = Forecast(
        target=where,
        mesh=dict(mesh.shape),
        stage=stage,
        positions=positions,
        experiment=experiment,
        memory=_argument_memory(state, shardings, batch, parallel.batch_sharding),
        model_flops=matmul_flops(jax.make_jaxpr(make_step(plain, _STEPS, stage.frozen))(state, batch)),
        flops=matmul_flops(traced.jaxpr),
    )
    try:
        compiled = traced.lower(lowering_platforms=(where.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(plan, memory={**plan.memory, "temporaries": _exhausted(error)})
    return _measured(plan, compiled)


def _retargeted(experiment: Experiment, **changes: Any) -> Experiment:
    """The experiment with these fields changed in every backbone of its method, those of its parts included."""

    def changed(value: Any) -> Any:
        if isinstance(value, BackboneConfig):
            return dataclasses.replace(value, **changes)
        if not isinstance(value, Method):
            return value
        fields = {field.name: changed(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)

    return dataclasses.replace(experiment, method=changed(experiment.method))


def _state(experiment: Experiment, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the training state."""
    optimizer = experiment.optimizer.build(_STEPS)

    def make() -> train_state.TrainState:
        params = train_state.init_params(experiment.method, experiment.seed)
        return train_state.create(
            params, optimizer, seed=experiment.seed, ema=experiment.ema is not None, untrained=experiment.untrained
        )

    shapes = jax.eval_shape(make)
    return shapes, param_shardings(mesh, shapes)


def _argument_memory(state: Any, shardings: Any, batch: Any, batch_sharded: Any) -> dict[str, int]:
    """Bytes on one device of what goes into the step."""

    def size(shape: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(shape.shape)) * np.dtype(shape.dtype).itemsize

    def total(shapes: Any, shardings: Any) -> int:
        return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))

    return {
        "parameters": total(state.params, shardings.params),
        "optimiser": total(state.opt_state, shardings.opt_state),
        "moving average": total(state.ema, shardings.ema),
        "batch": sum(size(leaf, batch_sharded) for leaf in jax.tree.leaves(batch)),
    }


def _measured(plan: Forecast, compiled: jax.stages.Compiled) -> Forecast:
    """`plan` with what only the compiled step tells."""
    stats, text = compiled.memory_analysis(), compiled.as_text()
    if stats is None or text is None:
        raise ValueError(f"--plan {plan.target.name}: the compiler of these devices does not describe its programs")
    program = Program(text)
    memory = {
        "padding and counters": stats.argument_size_in_bytes - sum(plan.memory.values()),
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    kinds: dict[str, list[Collective]] = {kind: [] for kind in COLLECTIVES}
    for collective in program.collectives():
        kinds[collective.kind].append(collective)
    return dataclasses.replace(
        plan,
        memory={**plan.memory, **memory},
        compiled=True,
        traffic=program.memory_traffic(),
        collectives={
            kind: (sum(c.count for c in found), sum(c.sent for c in found)) for kind, found in kinds.items() if found
        },
        loops_of_unknown_length=program.loops_of_unknown_length,
    )


def _exhausted(error: Exception) -> int:
    """Bytes of temporaries that the compiler wanted. Raises `error` again if memory is not what it is about."""
    wanted = re.search(r"(?:temporaries \(|[Uu]sed )([\d.]+)([KMGT])", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or wanted is None:
        raise error
    return int(float(wanted[1]) * 1024 ** ("KMGT".index(wanted[2]) + 1))


def report(plan: Forecast) -> list[str]:
    """`plan` in words; the last line says whether the step fits."""
    lines = [*_heading(plan), "", "memory of a device, GiB"]
    lines += [f"  {kind:<22}{size / GIB:10.3f}" for kind, size in plan.memory.items()]
    lines += ["", *(_work(plan) if plan.compiled else ["the compiler found no way to fit the step into memory"])]
    verdict = "yes" if plan.fits else "no"
    return [*lines, f"fits: {verdict} ({plan.used / GIB:.2f} GiB / {plan.target.memory / GIB:.2f} GiB per device)"]


def _heading(plan: Forecast) -> list[str]:
    where, experiment, backbone = plan.target, plan.experiment, plan.experiment.method.backbone
    count = len(where.devices)
    devices = f"{count} CPU devices of one machine, which share its memory"
    if where.chip is not None:
        cores = where.chip.cores * count
        devices = f"{count} chips ({where.topology}, {cores} cores). The name counts CHIPS" + (
            f": public names such as {where.name.split('-')[0]}-{cores} count cores" if cores != count else ""
        )
    question, thoughts, text = plan.positions
    return [
        f"plan {where.name}: {devices}",
        f"{experiment.name}: stage of index {plan.stage.index}, {experiment.batch_size} examples a step in "
        f"{experiment.accumulate} microbatches of {question} + {thoughts} + {text} positions (question, thoughts, text)",
        f"mesh {dict(plan.mesh)}, {backbone.dtype} products, {backbone.param_dtype} parameters, remat {backbone.remat}, "
        f"layers {'scanned' if backbone.scans_layers else 'unrolled'}",
    ]


def _work(plan: Forecast) -> list[str]:
    count = len(plan.target.devices)
    lines = [
        "work of a step",
        f"  {'matrix products of the model':<34}{plan.model_flops / 1e12:12.3f} TFLOP, all devices",
        f"  {'  with recomputation':<34}{plan.flops / 1e12:12.3f} TFLOP, {plan.flops / count / 1e12:.3f} a device",
        f"  {'memory traffic of a device':<34}{plan.traffic / 1e9:12.3f} GB",
        "collectives of a device (those in loops as often as they run; bytes sent by ring algorithms)",
    ]
    for kind, (times, sent) in plan.collectives.items():
        lines.append(f"  {kind:<22}{times:6} times{sent / 1e9:12.4f} GB sent")
    if not plan.collectives:
        lines.append("  none")
    if plan.loops_of_unknown_length:
        lines.append(f"  {plan.loops_of_unknown_length} loops of unknown length count once")
    if plan.target.chip is None:
        return [*lines, "", "utilisation: not bounded, no peaks are known for these devices"]
    lines += ["", "shortest time of a step, ms, if only this took time"]
    lines += [f"  {what:<34}{1e3 * seconds:12.2f}" for what, seconds in plan.seconds().items()]
    return [*lines, f"model FLOP utilisation: at most {100 * plan.utilisation:.1f}%"]
