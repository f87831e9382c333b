"""What an experiment is: one frozen dataclass that names task, method, and how training runs; and its JSON form.

Hyper-parameters of a method (curriculum included) belong to the method; data, optimiser and loop to `Experiment`.
"""

import dataclasses
import importlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import optax

from latentjax.backbone import lora
from latentjax.backbone.vocabulary import NewRow
from latentjax.methods.base import Method
from latentjax.tasks.base import Task

# Only classes below these packages are made from a JSON file: a config file must not be able to run anything else.
PACKAGES = ("latentjax.", "train.")


def _require(holds: bool, field: str, value: object, right: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r}: {right}")


def _require_count(owner: object, *fields: str, minimum: int = 1) -> None:
    for field in fields:
        value = getattr(owner, field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and value >= minimum, field, value, f"must be a whole number of at least {minimum}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with decoupled weight decay on every parameter, as in PyTorch."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = None  # global gradient norm; None: no clipping
    warmup_steps: int = 0
    warmup_fraction: float = 0.0  # of all steps, instead of `warmup_steps`
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, until the last step
    end_fraction: float = 0.0  # learning rate at the last step over `learning_rate`; unused by "constant"

    def __post_init__(self):
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        for field in ("b1", "b2"):
            value = getattr(self, field)
            _require(0 <= value < 1, f"optimizer.{field}", value, "a decay rate lies in [0, 1)")
        _require(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must not be negative")
        clips = self.clip_norm is None or self.clip_norm > 0
        _require(clips, "optimizer.clip_norm", self.clip_norm, "must be positive, or None for no clipping")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "must not be negative")
        fraction = self.warmup_fraction
        _require(0 <= fraction < 1, "optimizer.warmup_fraction", fraction, "lies in [0, 1)")
        once = not (fraction and self.warmup_steps)
        _require(once, "optimizer.warmup_fraction", fraction, f"warmup_steps={self.warmup_steps} is set already")
        known = ("constant", "linear", "cosine")
        _require(self.schedule in known, "optimizer.schedule", self.schedule, f"must be one of {', '.join(known)}")
        _require(0 <= self.end_fraction <= 1, "optimizer.end_fraction", self.end_fraction, "lies in [0, 1]")

    def learning_rate_schedule(self, total_steps: int) -> optax.Schedule:
        """Learning rate of step 0, 1, ...: a linear warm-up whose first step is not zero, then the schedule.

        Raises ValueError if the warm-up is not shorter than the run."""
        _require(
            self.warmup_steps < total_steps, "optimizer.warmup_steps", self.warmup_steps,
            f"must be smaller than the number of steps of the run, {total_steps}",
        )  # fmt: skip
        warmup_steps = self.warmup_steps or int(self.warmup_fraction * total_steps)
        peak, decay_steps = self.learning_rate, total_steps - warmup_steps
        main = {
            "constant": lambda: optax.constant_schedule(peak),
            "linear": lambda: optax.linear_schedule(peak, peak * self.end_fraction, decay_steps),
            "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, self.end_fraction),
        }[self.schedule]()
        if not warmup_steps:
            return main
        warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
        return optax.join_schedules([warmup, main], [warmup_steps])

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The optimiser of a run of `total_steps` steps."""
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(
            clip,
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.learning_rate_schedule(total_steps)),
        )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh (see latentjax/sharding.py)."""

    data: int = -1  # -1: all devices that the other axes leave
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field in ("data", "fsdp", "tensor"):
            value = getattr(self, field)
            valid = value >= 1 or (field == "data" and value == -1)
            _require(valid, f"mesh.{field}", value, "must be a positive number of devices")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Published weights and their tokenizer, from which a run starts (see train/starting.py)."""

    path: str  # a folder with config.json and safetensors, or a hub id such as "openai-community/gpt2"
    tokenizer: str | None = None  # a folder or hub id; None: that of `path`
    revision: str | None = None  # of the hub repository: a branch, tag or commit
    new_row: NewRow = NewRow("mean")  # how the embedding rows of the method's special tokens start

    def __post_init__(self):
        for field in ("path", "tokenizer", "revision"):
            value = getattr(self, field)
            named = (value is None and field != "path") or (isinstance(value, str) and bool(value.strip()))
            _require(named, f"pretrained.{field}", value, "must not be empty")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run. How long it lasts is the method's curriculum (`method.stages()`)."""

    name: str
    task: Task
    method: Method
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    # "pmap": plain data parallelism, with noise (dropout) drawn by each device for its rows, so it is another run than "jit".
    parallel: Literal["jit", "pmap"] = "jit"
    pretrained: Pretrained | None = None  # None: new parameters and the task's own tokenizer
    chat: bool = False  # write questions with the tokenizer's chat template (instruct models)
    tuning: Literal["full", "lora", "frozen"] = "full"  # train all, LoRA adapters and the method's own, or only those
    batch_size: int = 128  # examples of one optimiser step, all devices and microbatches together
    accumulate: int = 1  # microbatches that a step is cut into
    effective_batch: int | None = None  # what batch_size is in the paper: another one is an error, None allows any
    train_examples: int | None = None  # examples of one epoch; None: the whole released split
    fresh_data: bool = False  # generate new training problems for every epoch instead of reading the same ones again
    valid_split: str = "valid"
    valid_examples: int | None = None  # None: the whole released split
    validate_every: int = 1
    validate_unit: Literal["epochs", "steps"] = "epochs"
    validate_generation: bool = True  # also generate greedily and let the task judge; else the loss only
    log_every: int = 10  # steps
    checkpoint_every_steps: int = 1000  # besides one at every validation and one at the end
    keep: int = 2  # latest checkpoints kept; the best one (validation accuracy in the last stage) is kept as well
    ema: float | None = None  # decay of an average of the parameters, which validation and evaluation then use
    deterministic: bool = (
        False  # GPUs only, slower: a run repeats and resumes bit for bit, as on CPU and TPU (docs/scaling.md)
    )
    # Run whose parameters to start from: "RUN", "RUN@best" or "RUN@STEP"; or such a run for each part that the method takes
    # from other runs ({"vae": RUN} for LaDiR), beside which the method's own backbone may be `pretrained`. "{seed}" in a
    # name stands for this run's seed.
    init_from: str | Mapping[str, str] | None = None
    seed: int = 0

    def __post_init__(self):
        named = bool(self.name) and not set(self.name) & set("/\\\0")
        _require(named, "name", self.name, "must be a plain word that can name a folder")
        _require(isinstance(self.task, Task), "task", self.task, "must be a latentjax Task")
        _require(isinstance(self.method, Method), "method", self.method, "must be a latentjax Method")
        _require_count(
            self, "batch_size", "accumulate", "validate_every", "log_every", "checkpoint_every_steps", "keep"
        )
        _require_count(self, "seed", minimum=0)
        for field in ("train_examples", "valid_examples"):
            if getattr(self, field) is not None:
                _require_count(self, field)
        _require(
            self.effective_batch in (None, self.batch_size), "batch_size", self.batch_size,
            f"the paper's step has effective_batch={self.effective_batch} examples over all devices and microbatches "
            "(raise accumulate if they do not fit); for another batch set effective_batch to None",
        )  # fmt: skip
        known = ("jit", "pmap")
        _require(self.parallel in known, "parallel", self.parallel, f"must be one of {', '.join(known)}")
        plain = self.parallel == "jit" or (self.mesh.fsdp, self.mesh.tensor) == (1, 1)
        right = f"is data parallelism only; mesh.fsdp={self.mesh.fsdp} and mesh.tensor={self.mesh.tensor} must be 1"
        _require(plain, "parallel", self.parallel, right)
        divides = self.batch_size % self.accumulate == 0
        _require(divides, "accumulate", self.accumulate, f"must divide batch_size={self.batch_size}")
        known = ("epochs", "steps")
        _require(self.validate_unit in known, "validate_unit", self.validate_unit, "must be epochs or steps")
        _require("test" not in self.valid_split, "valid_split", self.valid_split, "a test split cannot choose a model")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a decay rate lies in (0, 1), or None")
        known = ("full", "lora", "frozen")
        _require(self.tuning in known, "tuning", self.tuning, f"must be one of {', '.join(known)}")
        adapters = self.method.backbone.lora
        _require(
            (adapters is not None) == (self.tuning == "lora"), "tuning", self.tuning,
            f"method.backbone.lora={adapters} " + ("has adapters, which only lora trains" if adapters else "says no rank"),
        )  # fmt: skip
        one_start = self.pretrained is None or not isinstance(self.init_from, str)
        right = "the run starts from `pretrained` already: set one of them, or name runs of parts, by role"
        _require(one_start, "init_from", self.init_from, right)
        fresh = not self.fresh_data or self.train_examples is not None
        _require(fresh, "train_examples", self.train_examples, "fresh_data needs the number of examples of an epoch")
        if not isinstance(self.init_from, str):  # a run named as a whole must be of this method (train/starting.py)
            roles, parts = set(self.init_from or {}), set(self.method.parts())
            example = dict.fromkeys(sorted(parts), "RUN") or None
            right = f"{self.method.name} needs a run for each of its parts, init_from={example}"
            _require(roles == parts, "init_from", self.init_from, right)

    @property
    def starts(self) -> dict[str | None, str]:
        """The runs that `init_from` names, by the part that comes from them (None: the whole)."""
        named = {None: self.init_from} if isinstance(self.init_from, str) else self.init_from or {}
        return {role: source.replace("{seed}", str(self.seed)) for role, source in named.items()}

    @property
    def untrained(self) -> tuple[str, ...]:
        """Regular expressions of the parameters that no stage trains: for them there is no optimiser state."""
        return (*lora.frozen_patterns(self.tuning), *self.method.untrained)


def to_json(value: Any, where: str = "config") -> Any:
    """`value` as JSON types: a dataclass becomes its class path and its fields, a tuple a list.

    Raises TypeError naming the field for anything that cannot be read back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        if not path.startswith(PACKAGES):
            raise TypeError(
                f"{where}: {path} is not a class of {' or '.join(PACKAGES)}, so a run could not read it back"
            )
        fields = {f.name: to_json(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"class": path, **fields}
    if isinstance(value, tuple | list):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and "class" not in value:
        return {key: to_json(item, f"{where}.{key}") for key, item in value.items()}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"{where}={value!r}: a {type(value).__name__} cannot be written to a config file")


def from_json(value: Any, where: str = "config") -> Any:
    """What `to_json` wrote; lists become tuples. Raises ValueError naming the place and what is wrong there."""
    if isinstance(value, list):
        return tuple(from_json(item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    fields = {key: from_json(item, f"{where}.{key}") for key, item in value.items() if key != "class"}
    if "class" not in value:
        return fields
    kind = _class(value["class"], where)
    known = {field.name for field in dataclasses.fields(kind)}
    if set(fields) != known:
        wrong = [f"unknown: {name}" for name in sorted(set(fields) - known)]
        wrong += [f"missing: {name}" for name in sorted(known - set(fields))]
        raise ValueError(f"{where}: fields of {value['class']} differ from this version's ({', '.join(wrong)})")
    return kind(**fields)


def _class(path: str, where: str) -> Any:
    module, _, name = path.rpartition(".")
    if not path.startswith(PACKAGES):
        raise ValueError(f"{where}.class={path!r}: only classes of {' and '.join(PACKAGES)} are made from a file")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}.class={path!r}: no such class ({error})") from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"{where}.class={path!r}: is not a dataclass")
    return kind


def save_config(path: os.PathLike, experiment: Experiment) -> None:
    """Write `experiment` as JSON. Raises TypeError naming a field that cannot be read back, writing nothing."""
    text = json.dumps(to_json(experiment), indent=1)
    pathlib.Path(path).write_text(text + "\n")


def read_json(path: os.PathLike) -> Any:
    """The JSON value in the file `path`. Raises ValueError naming file and place if it is malformed."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: is not JSON ({error.msg})") from error


def load_config(path: os.PathLike) -> Experiment:
    """The experiment that `save_config` wrote. Raises FileNotFoundError, or ValueError saying what is wrong."""
    experiment = from_json(read_json(path))
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path}: holds a {type(experiment).__name__}, not an Experiment")
    return experiment


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Fields in which two JSON forms of experiments differ, one line each: `optimizer.b2: 0.999 -> 0.98`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            absent = "(absent)"
            lines += differences(old.get(key, absent), new.get(key, absent), f"{where}.{key}" if where else key)
        return lines
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]
