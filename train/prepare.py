"""All that is checked and read before a run starts: nothing here compiles, and nothing on disk changes."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from latentjax.backbone.decoder import check_positions
from latentjax.checkpoint import load_params
from latentjax.methods.base import Batch
from latentjax.sharding import batch_sharding, check_batch, make_mesh, param_shardings
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec, Tokenizer
from train import state as train_state
from train.config import Experiment, load_config, to_json
from train.input import Training, check_lengths, train_examples, valid_examples
from train.plan import Plan, lay_out
from train.run import CONFIG, parse_source
from train.state import TrainState
from train.step import make_step


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment with everything that training needs."""

    experiment: Experiment
    tokenizer: Tokenizer
    plan: Plan
    training: Training
    valid: Sequence[Example]
    dropped: int  # examples of an epoch that fill no batch
    shapes: TrainState  # arrays of the state as shapes and types
    shardings: TrainState
    batch_sharding: NamedSharding
    inherited: Any  # parameters to start from, or None

    def first_state(self) -> TrainState:
        """The state before the first step, on the mesh."""
        experiment = self.experiment
        optimizer = experiment.optimizer.build(self.plan.total_steps)

        def make(inherited: Any) -> TrainState:
            params = train_state.init_params(experiment.method, experiment.seed)
            if inherited is not None:
                params = train_state.merge_params(params, inherited, str(experiment.init_from))
            return train_state.create(params, optimizer, seed=experiment.seed, ema=experiment.ema is not None)

        return jax.jit(make, out_shardings=self.shardings)(self.inherited)


def prepare(experiment: Experiment) -> Prepared:
    """Read and check everything. Raises ValueError, OSError or LookupError with a message that says what to change."""
    to_json(experiment)  # raises for a config that no run could read back
    method, task = experiment.method, experiment.task
    tokenizer = task.tokenizer(method.special_tokens())
    _check_model(experiment, tokenizer)
    mesh = _mesh(experiment)
    check_batch(mesh, experiment.batch_size // experiment.accumulate)

    codec, train, valid = Codec(tokenizer, task.format), train_examples(experiment), valid_examples(experiment)
    steps_per_epoch, dropped = divmod(len(train), experiment.batch_size)
    if not steps_per_epoch:
        raise ValueError(f"train_examples={len(train)}: fewer than one batch, batch_size={experiment.batch_size}")
    if not valid:
        raise ValueError(f"valid_split={experiment.valid_split!r}: has zero examples")
    plan = lay_out(method.stages(), steps_per_epoch)
    check_lengths(experiment, codec, plan, train, "train")
    check_lengths(experiment, codec, plan, valid, experiment.valid_split)

    optimizer = experiment.optimizer.build(plan.total_steps)
    params = jax.eval_shape(functools.partial(train_state.init_params, method, experiment.seed))
    for span in plan.spans:
        train_state.frozen_mask(params, span.stage.frozen)
    create = functools.partial(
        train_state.create, optimizer=optimizer, seed=experiment.seed, ema=experiment.ema is not None
    )
    shapes = jax.eval_shape(create, params)
    return Prepared(
        experiment=experiment,
        tokenizer=tokenizer,
        plan=plan,
        training=Training(experiment, codec, plan, train),
        valid=valid,
        dropped=dropped,
        shapes=shapes,
        shardings=param_shardings(mesh, shapes),
        batch_sharding=batch_sharding(mesh),
        inherited=_inherited(experiment, params),
    )


def _check_model(experiment: Experiment, tokenizer: Tokenizer) -> None:
    method = experiment.method
    backbone, lengths = method.backbone, method.lengths
    if backbone.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"method.backbone.vocab_size={backbone.vocab_size}: the tokenizer of {type(experiment.task).__name__} with "
            f"the special tokens of {method.name} has {tokenizer.vocab_size} tokens; set at least that"
        )
    if experiment.task.hide_question and getattr(method, "answer_sees_question", True):
        raise ValueError(
            f"task {experiment.task.name} hides the question from the answer, but method.answer_sees_question is True in "
            f"{method.name}: set it to False (Coconut and Pause have this field)"
        )
    for field in ("question", "text"):
        if getattr(lengths, field) < 1:
            raise ValueError(f"method.lengths.{field}={getattr(lengths, field)}: must be at least 1")
    what = f"method.lengths.question={lengths.question}, {method.max_thoughts()} thoughts and "
    check_positions(
        backbone, lengths.question + method.max_thoughts() + lengths.text, what + f"method.lengths.text={lengths.text}"
    )


def _mesh(experiment: Experiment) -> jax.sharding.Mesh:
    """The mesh; one that names the size of every axis takes the first devices only."""
    wanted, devices = experiment.mesh, jax.devices()
    if wanted.data != -1 and jax.process_count() == 1:
        devices = devices[: wanted.data * wanted.fsdp * wanted.tensor]
    return make_mesh(wanted.data, wanted.fsdp, wanted.tensor, devices=devices)


def _inherited(experiment: Experiment, params: Any) -> Any:
    """Parameters of the run that `init_from` names, checked against the shapes `params`."""
    if experiment.init_from is None:
        return None
    path, which = parse_source(experiment.init_from)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"init_from={experiment.init_from!r}: {path} is not a run directory (it has no {CONFIG})"
        )
    average = load_config(path / CONFIG).ema is not None
    inherited, _ = load_params(path, which, average=average)
    merge = functools.partial(train_state.merge_params, source=experiment.init_from)
    jax.eval_shape(merge, params, inherited)
    return inherited


def batch_form(batch: Batch) -> Hashable:
    """What the compiled step depends on: structure, shapes and types of the arrays."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def trace(prepared: Prepared) -> None:
    """Trace the step of every stage without compiling it, so that wrong shapes show."""
    seen = set()
    for span in prepared.plan.spans:
        batch = prepared.training.batch(span.start)
        if (form := (span.stage.frozen, batch_form(batch))) not in seen:
            seen.add(form)
            step = make_step(prepared.experiment, prepared.plan.total_steps, span.stage.frozen)
            jax.eval_shape(step, prepared.shapes, batch)


def describe(prepared: Prepared) -> list[str]:
    """The plan in words: parameters, effective batch, stages."""
    experiment, plan = prepared.experiment, prepared.plan
    leaves = jax.tree.leaves(prepared.shapes.params)
    count, size = sum(leaf.size for leaf in leaves), experiment.batch_size
    mesh = {axis: n for axis, n in prepared.batch_sharding.mesh.shape.items() if n > 1}
    lines = [
        f"{experiment.name}: {experiment.method.name} on {type(experiment.task).__name__}, {count:,} parameters",
        f"effective batch {size} examples ({experiment.accumulate} microbatches of {size // experiment.accumulate}, "
        f"mesh {mesh or 'of one device'})",
        f"{plan.steps_per_epoch} steps an epoch ({plan.steps_per_epoch * size} examples; {prepared.dropped} of each "
        f"epoch are left out because they fill no batch); {len(prepared.valid)} validation examples",
    ]
    for number, span in enumerate(plan.spans):
        stage, notes = span.stage, []
        if stage.reset_optimizer_every_epoch:
            notes.append("optimiser reset every epoch")
        elif stage.reset_optimizer:
            notes.append("optimiser reset")
        if stage.frozen:
            notes.append(f"frozen: {', '.join(stage.frozen)}")
        lines.append(
            f"stage {number} (index {stage.index}): steps {span.start} to {span.stop}"
            + (f", {'; '.join(notes)}" if notes else "")
        )
    return lines
