"""LoRA adapters in the format of PEFT: a folder of `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps A as [R, I] and B as [O, R], one pair a layer. GPT-2 has one dense layer c_attn for query, key and value, hence one
adapter, while ours are three. Both ways are exact: a c_attn adapter is read as three that have the same A, each with its third
of B; three adapters with the same A are written as one, others as one of rank 3R, the A beside one another and B in blocks,
under an alpha that keeps the scale. (Dropout is not shared: here each of the three draws its own mask.)
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from latentjax.backbone import lora
from latentjax.backbone.config import BackboneConfig, Lora
from latentjax.backbone.hf_config import to_hf
from latentjax.backbone.hf_names import places

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"

_FIRST = 10  # names that an error lists

# Settings that `load_adapters` reads, and settings that say where the adapters come from or how they were trained. The tensors
# themselves say which layers are adapted. Of all others only the empty value is supported.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
         "init_lora_weights", "bias"}  # fmt: skip
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
             "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core", "runtime_config",
             "qalora_group_size", "eva_config"}  # fmt: skip
_DTYPES = {"F32", "BF16", "F16"}


def save_adapters(
    folder: str | os.PathLike, config: BackboneConfig, params: Mapping[str, Any], *, base_model: str | None = None
) -> None:
    """Write the adapters of `params`, without the backbone, for `peft.PeftModel.from_pretrained`.

    `base_model` is the hub id or folder of the backbone that they belong to. The folder appears whole or not at all.

    Raises ValueError if there are no adapters, if no published architecture has this backbone, or if GPT-2's query, key and
    value are not all adapted or all not; FileExistsError if `folder` is anything but an absent or empty folder.
    """
    import safetensors.numpy

    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: choose another, nothing is overwritten")
    setting, adapters = lora.require(config), lora.split(params)[1]
    lora.check(config, adapters)
    adapters = jax.tree.map(np.asarray, adapters["layers"])
    tensors, ranks = {}, {}
    for module, names in _modules(config).items():
        if not set(names) & set(adapters):
            continue
        if not set(names) <= set(adapters):
            raise ValueError(
                f"backbone.lora.targets={setting.targets}: PEFT has one adapter for {', '.join(names)} of a GPT-2; adapters "
                "can be saved in its format if these layers are all targets or none is"
            )
        a, b = _fused([(adapters[name]["lora_a"], adapters[name]["lora_b"]) for name in names])
        ranks[module.partition("{}.")[2]] = a.shape[-1]
        for layer in range(config.layers):
            name_a, name_b = _tensor_names(module, layer)
            tensors[name_a], tensors[name_b] = np.ascontiguousarray(a[layer].T), np.ascontiguousarray(b[layer].T)
    values = _settings(setting, ranks, base_model) | {"fan_in_fan_out": _gpt2(config)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = pathlib.Path(scratch) / folder.name
        new.mkdir()
        (new / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        safetensors.numpy.save_file(tensors, new / MODEL, metadata={"format": "pt"})
        new.replace(folder)


def load_adapters(
    folder: str | os.PathLike, config: BackboneConfig, params: Mapping[str, Any]
) -> tuple[BackboneConfig, dict[str, Any]]:
    """The backbone with the adapters of a folder that PEFT or `save_adapters` wrote, in float32, on the mesh of the kernels.

    Raises ValueError if the backbone has adapters already, for settings that are not plain LoRA of one rank and scale (naming
    them), for tensors that do not fit the backbone (the first ten, both ways), for truncated files and for pickles;
    FileNotFoundError for a missing file.
    """
    folder = pathlib.Path(folder)
    lora.require_none(config)
    values = _read_settings(folder)
    tensors = _read_tensors(folder)
    setting = Lora(
        values["r"], values["lora_alpha"], values.get("lora_dropout", 0.0), rslora=values.get("use_rslora", False)
    )
    modules = {
        module: names
        for module, names in _modules(config).items()
        if any(name in tensors for layer in range(config.layers) for name in _tensor_names(module, layer))
    }
    _check_tensors(folder, config, params, tensors, modules, _ranks(folder, config, values, setting, modules))
    _check_targets(folder, config, values, modules)
    layers = {}
    for module, names in modules.items():
        a, b = (
            np.stack([tensors[_tensor_names(module, layer)[i]].T for layer in range(config.layers)]).astype(np.float32)
            for i in (0, 1)
        )
        pairs = _unfused(a, b, len(names), setting.rank)
        if pairs is None:
            raise ValueError(
                f"{folder}: the adapter of {module} has rank {a.shape[-1]}, and r={setting.rank}: one rank for all is supported"
            )
        layers |= {name: {"lora_a": a, "lora_b": b} for name, (a, b) in zip(names, pairs, strict=True)}
    targets = tuple(name for name in config.dense_layers if name in layers)
    config = dataclasses.replace(config, lora=dataclasses.replace(setting, targets=targets))
    return config, lora.join(params, lora.place(params, {"layers": layers}))


def _modules(config: BackboneConfig) -> dict[str, tuple[str, ...]]:
    """The module of each dense layer in the published model, "{}" being the layer -> which of ours it holds."""
    stem = f"base_model.model.{'transformer' if _gpt2(config) else 'model'}."
    where, modules = places(dataclasses.replace(config, lora=None)), {}
    for name in config.dense_layers:
        module = stem + where[f"layers/{name}/kernel"].name.removesuffix(".weight")
        modules[module] = (*modules.get(module, ()), name)
    return modules


def _gpt2(config: BackboneConfig) -> bool:
    return to_hf(dataclasses.replace(config, lora=None))["model_type"] == "gpt2"


def _tensor_names(module: str, layer: int) -> tuple[str, str]:
    path = module.format(layer)
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _fused(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One adapter that does what several on the same input do: a [L, I, R], b [L, R, O] of each."""
    first = pairs[0][0]
    if all(np.array_equal(a, first) for a, _ in pairs):
        return first, np.concatenate([b for _, b in pairs], axis=-1)
    blocks = [[b if i == j else np.zeros_like(b) for j, (_, b) in enumerate(pairs)] for i in range(len(pairs))]
    return np.concatenate([a for a, _ in pairs], axis=-1), np.block(blocks)


def _unfused(a: np.ndarray, b: np.ndarray, parts: int, rank: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """The reverse of `_fused`: one adapter of `rank` for each part of the output; None if they would need another rank."""
    outputs = np.split(b, parts, axis=-1)
    if a.shape[-1] == rank:
        return [(a, output) for output in outputs]
    if a.shape[-1] != parts * rank:
        return None
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(parts)]
    pairs = [(a[..., block], output[:, block]) for block, output in zip(blocks, outputs, strict=True)]
    return pairs if np.count_nonzero(b) == sum(np.count_nonzero(b) for _, b in pairs) else None


def _settings(setting: Lora, ranks: Mapping[str, int], base_model: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says; `ranks` are those of the modules that get an adapter."""
    wider = {module: rank for module, rank in ranks.items() if rank != setting.rank}
    more = {m: rank / setting.rank for m, rank in wider.items()}  # times the alpha for the same scale
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": setting.rank,
        "lora_alpha": setting.alpha,
        "lora_dropout": setting.dropout,
        "use_rslora": setting.rslora,
        "target_modules": list(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {m: setting.alpha * (x**0.5 if setting.rslora else x) for m, x in more.items()},
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed `adapter_config.json`. Raises ValueError naming what is not plain LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if absent := [key for key in ("peft_type", "r", "lora_alpha") if not isinstance(values, dict) or key not in values]:
        raise ValueError(f"{path} lacks {', '.join(absent)}: it is not a configuration of LoRA")
    wrong = {key: value for key, value in values.items() if key not in _READ | _HARMLESS and value}
    # PEFT's other initialisations start from a changed base model.
    supported = {
        "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    }  # fmt: skip
    wrong |= {key: values[key] for key, known in supported.items() if key in values and values[key] not in known}
    if wrong:
        raise ValueError(
            f"{path}: {', '.join(f'{k}={v!r}' for k, v in wrong.items())} is not supported, only plain LoRA"
        )
    return values


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors

    path = folder / MODEL
    if not path.is_file():
        if pickles := sorted(file.name for file in folder.glob("*.bin")):
            raise ValueError(
                f"{folder} has no {MODEL}, only {', '.join(pickles)}: a pickle can run any code and is never loaded. Convert it "
                "where you trust it: PEFT's from_pretrained, then save_pretrained, writes safetensors"
            )
        raise FileNotFoundError(f"{folder} has no {MODEL}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = sorted(file.keys())
            if other := {file.get_slice(name).get_dtype() for name in names} - _DTYPES:
                raise ValueError(
                    f"{path} holds {', '.join(sorted(other))} tensors: {', '.join(sorted(_DTYPES))} are supported"
                )
            return {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None


def _check_targets(
    folder: pathlib.Path, config: BackboneConfig, values: Mapping[str, Any], modules: Mapping[str, Any]
) -> None:
    """Raise ValueError if there are no adapters at all, or none of a layer that the settings name."""
    targets = values.get("target_modules")
    named = [] if targets is None or isinstance(targets, str) else targets
    paths = [f".{module.format(layer)}" for module in modules for layer in range(config.layers)]
    absent = sorted(target for target in named if not any(path.endswith(f".{target}") for path in paths))
    if absent or not modules:
        raise ValueError(
            f"{folder}: {MODEL} has no adapters of {', '.join(absent) or 'any dense layer of this backbone'}"
        )


def _ranks(
    folder: pathlib.Path, config: BackboneConfig, values: Mapping[str, Any], setting: Lora, modules: Mapping[str, Any]
) -> dict[str, int]:
    """The rank that the settings give each module. Raises ValueError unless all have the scale of `setting`."""

    def of(key: str, path: str, default: Any) -> Any:
        found = (value for pattern, value in (values.get(key) or {}).items() if re.match(rf"(.*\.)?({pattern})$", path))
        return next(found, default)

    ranks: dict[str, int] = {}
    for module in modules:
        for layer in range(config.layers):
            path = module.format(layer)
            rank, alpha = of("rank_pattern", path, setting.rank), of("alpha_pattern", path, setting.alpha)
            scale = dataclasses.replace(setting, rank=rank, alpha=alpha).scale
            if not math.isclose(scale, setting.scale, rel_tol=1e-9) or ranks.setdefault(module, rank) != rank:
                raise ValueError(
                    f"{folder}: {CONFIG} gives {path} rank {rank} and scale {scale:g}, but r={setting.rank} and scale "
                    f"{setting.scale:g} elsewhere: one rank and one scale for all adapters is supported"
                )
    return ranks


def _check_tensors(
    folder: pathlib.Path, config: BackboneConfig, params: Mapping[str, Any], tensors: Mapping[str, np.ndarray],
    modules: Mapping[str, tuple[str, ...]], ranks: Mapping[str, int],
) -> None:  # fmt: skip
    """Raise ValueError unless names and shapes of `tensors` are those of `modules` in this backbone."""
    wanted = {}
    for module, names in modules.items():
        inputs = params["layers"][names[0]]["kernel"].shape[1]
        outputs = sum(params["layers"][name]["kernel"].shape[2] for name in names)
        for layer in range(config.layers):
            name_a, name_b = _tensor_names(module, layer)
            wanted |= {name_a: (ranks[module], inputs), name_b: (outputs, ranks[module])}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    kinds = {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [name for name in shapes if name not in wanted],
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:_FIRST])}{', ...' if len(names) > _FIRST else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if faults:
        raise ValueError(f"{folder}: the tensors of {MODEL} do not fit this backbone; {'; '.join(faults)}")
