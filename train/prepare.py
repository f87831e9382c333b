"""All that is checked and read before a run starts: nothing here compiles, and nothing on disk changes."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from latentjax.backbone.decoder import check_positions
from latentjax.checkpoint import available_steps
from latentjax.sharding import check_backbone, check_batch, make_mesh, param_shardings
from latentjax.tasks.base import Example
from latentjax.tokenizers import Codec, Tokenizer
from train import state as train_state
from train.config import Experiment, Pretrained, to_json
from train.input import Training, check_lengths, train_examples, valid_examples
from train.parallel import Parallel, batch_form
from train.plan import Plan, lay_out
from train.starting import check_start, check_weights, inherited_params, published_params, run_tokenizer
from train.state import TrainState
from train.step import make_step

_MEASURED = 4096  # examples from which the statistics of an adopted part are taken


class UnusablePart(ValueError):
    """What was measured of a part from another run forbids its use, as a collapsed VAE's latents do."""


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
    parallel: Parallel
    inherited: Any  # parameters of the runs that `init_from` names, on the host, or None
    published: Pretrained | None  # weights of which the first state is made; None for a run with checkpoints

    @property
    def batch_sharding(self) -> NamedSharding:
        return self.parallel.batch_sharding

    def check_weights(self) -> None:
        """Check the files of published weights, if the run is to start from them, without reading the weights (a hub id is
        downloaded). Raises ValueError, FileNotFoundError or OSError saying what is wrong."""
        if self.published is not None:
            check_weights(self.published, self.experiment.method.backbone)

    def first_state(self) -> TrainState:
        """The state before the first step, on the mesh. Published weights are read now."""
        experiment = self.experiment
        optimizer = experiment.optimizer.build(self.plan.total_steps)

        def make(published: Any, inherited: Any) -> TrainState:
            params = train_state.init_params(experiment.method, experiment.seed)
            if published is not None:
                params = train_state.merge_params(params, published, str(self.published))
                params = experiment.method.adapt(params, published)
            if inherited is not None:
                params = train_state.merge_params(params, inherited, f"init_from={experiment.init_from!r}")
            return train_state.create(
                params, optimizer, seed=experiment.seed, ema=experiment.ema is not None, untrained=experiment.untrained
            )

        mesh, published, inherited = self.parallel.mesh, None, None
        if self.published is not None:
            published = published_params(self.published, experiment, self.tokenizer, mesh)
        if self.inherited is not None:
            inherited = inherited_params(self.inherited, mesh)
        # Published arrays are donated, so that the state's parameters are these and not copies of them.
        state = jax.jit(make, out_shardings=self.shardings, donate_argnums=0)(published, inherited)
        return self._measured(state) if isinstance(experiment.init_from, Mapping) else state

    def _measured(self, state: TrainState) -> TrainState:
        """`state` with what has to be known about adopted parts, from about `_MEASURED` training examples.

        Raises UnusablePart saying why."""
        method, batch = self.experiment.method, self.training.batch(0)
        parallel = dataclasses.replace(self.parallel, kind="jit")
        measure, _ = parallel.compile(
            lambda _: method.measure, state.params, self.shardings.params, batch, updates=False
        )
        steps = min(-(-_MEASURED // self.experiment.batch_size), self.plan.steps_per_epoch)
        sums = measure(state.params, parallel.place(batch))
        for step in range(1, steps):
            sums = jax.tree.map(jnp.add, sums, measure(state.params, parallel.place(self.training.batch(step))))
        try:
            params = method.with_measured(state.params, sums)
        except ValueError as error:
            raise UnusablePart(f"init_from={self.experiment.init_from}: {error}") from error
        return jax.device_put(state.replace(params=params), self.shardings)


def prepare(experiment: Experiment, run: pathlib.Path | None = None) -> Prepared:
    """Read and check everything but published weights (`Prepared.check_weights`). `run` is the run directory: one with
    checkpoints needs its published model no more.

    Raises ValueError, OSError or LookupError with a message that says what to change."""
    to_json(experiment)  # raises for a config that no run could read back
    method, task = experiment.method, experiment.task
    continues = run is not None and bool(available_steps(run))
    tokenizer = run_tokenizer(experiment, run if continues else None)
    _check_model(experiment, tokenizer)
    mesh = _mesh(experiment)
    check_batch(mesh, experiment.batch_size // experiment.accumulate)
    check_backbone(mesh, method.backbone)
    parallel = Parallel(experiment.parallel, mesh, experiment.batch_size)

    codec = Codec(tokenizer, task.format, experiment.chat)
    train, valid = train_examples(experiment), valid_examples(experiment)
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
        train_state.create, optimizer=optimizer, seed=experiment.seed, ema=experiment.ema is not None,
        untrained=experiment.untrained,
    )  # fmt: skip
    shapes = jax.eval_shape(create, params)
    return Prepared(
        experiment=experiment,
        tokenizer=tokenizer,
        plan=plan,
        training=Training(experiment, codec, plan, train, parallel.rows),
        valid=valid,
        dropped=dropped,
        shapes=shapes,
        shardings=param_shardings(mesh, shapes),
        parallel=parallel,
        inherited=check_start(experiment, None if continues else tokenizer, params),
        published=None if continues else experiment.pretrained,
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
    if "^backbone/" in method.untrained and experiment.pretrained is None and experiment.init_from is None:
        raise ValueError(
            f"method.train_decoder=False: the backbone of {method.name} stays as it starts, and without `pretrained` or "
            "init_from that is at random; name one of them, or set True"
        )
    for field in ("question", "text"):
        if getattr(lengths, field) < 1:
            raise ValueError(f"method.lengths.{field}={getattr(lengths, field)}: must be at least 1")
    what = f"method.lengths.question={lengths.question}, {method.max_thoughts()} thoughts and "
    check_positions(
        backbone,
        method.positions(lengths.question, method.max_thoughts()),
        what + f"method.lengths.text={lengths.text}",
    )


def _mesh(experiment: Experiment) -> jax.sharding.Mesh:
    """The mesh; one that names the size of every axis takes the first devices only."""
    wanted, devices = experiment.mesh, jax.devices()
    if wanted.data != -1 and jax.process_count() == 1:
        devices = devices[: wanted.data * wanted.fsdp * wanted.tensor]
    return make_mesh(wanted.data, wanted.fsdp, wanted.tensor, devices=devices)


def trace(prepared: Prepared) -> None:
    """Trace the step of every stage without compiling it, so that wrong shapes show."""
    seen = set()
    for span in prepared.plan.spans:
        batch = prepared.parallel.whole(prepared.training.batch(span.start))
        if (form := (span.stage.frozen, batch_form(batch))) not in seen:
            seen.add(form)
            step = make_step(prepared.experiment, prepared.plan.total_steps, span.stage.frozen)
            jax.eval_shape(step, prepared.shapes, batch)


def describe(prepared: Prepared) -> list[str]:
    """The plan in words: parameters, effective batch, stages."""
    experiment, plan = prepared.experiment, prepared.plan
    leaves = jax.tree.leaves(prepared.shapes.params)
    count, size = sum(leaf.size for leaf in leaves), experiment.batch_size
    trained = train_state.trained_part(prepared.shapes.params, experiment.untrained)
    trains = sum(leaf.size for leaf in jax.tree.leaves(trained))
    mesh = {axis: n for axis, n in prepared.batch_sharding.mesh.shape.items() if n > 1}
    lines = [
        f"{experiment.name}: {experiment.method.name} on {type(experiment.task).__name__}, {count:,} parameters, of which "
        f"{trains:,} train (tuning {experiment.tuning})",
        f"effective batch {size} examples ({experiment.accumulate} microbatches of {size // experiment.accumulate}, "
        f"mesh {mesh or 'of one device'}{', pmap' if experiment.parallel == 'pmap' else ''})",
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
