"""Weights of published checkpoints: a folder of `config.json` and safetensors <-> (config, params).

Reading is memory-mapped and goes array by array: every device's part is read from the files as a slice and put on its device,
so the host never holds more of the model than one array (all layers of it) beside what its own devices hold. Pickled
checkpoints are refused.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float, Int

from latentjax.backbone import decoder
from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.hf_config import from_hf, to_hf
from latentjax.backbone.hf_names import HEAD, PREFIXES, Place, abstract, places
from latentjax.backbone.vocabulary import check_vocabulary, trim
from latentjax.sharding import param_shardings
from latentjax.tokenizers import PretrainedTokenizer, WordTokenizer

# What a download from the hub takes: no pickles, no code, no copies in other formats.
_DOWNLOADED = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# Buffers that old files hold beside the weights: causal masks and rotary frequencies, constants of the architecture.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ROWS = 256  # read at a time: a block that a core's cache holds while it is transposed
_LISTED = 10  # names in an error


def load(
    path_or_hub_id: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> tuple[BackboneConfig, dict[str, Any]]:
    """The backbone of a folder or of a repository of the Hugging Face hub.

    Args:
      path_or_hub_id: a folder with `config.json` and safetensors (one file, or several with an index), or "owner/name".
      dtype: of the parameters; None keeps the files'. Either way `config.param_dtype` says it.
      mesh: where the parameters go, split by the rules of `latentjax.sharding`; None: the default device.
      revision: branch, tag or commit of a repository of the hub.

    Returns (config, params); `config.dtype`, that of the computation, is float32.

    Raises ValueError for a config that the decoder does not implement, tensors that do not match it (the first ten names, both
    ways), truncated files and pickled checkpoints; FileNotFoundError for missing files; OSError if the hub cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        config, tensors = _checked(path_or_hub_id, dtype, revision, stack)
        wanted = abstract(config)
        shardings = (
            flatten_dict(param_shardings(mesh, unflatten_dict(dict(wanted), sep="/")), sep="/")
            if mesh is not None
            else {}
        )
        pool = stack.enter_context(ThreadPoolExecutor())
        params = {
            ours: _array(place, tensors, wanted[ours], shardings.get(ours), pool)
            for ours, place in places(config).items()
        }
    return config, unflatten_dict(params, sep="/")


def check(path_or_hub_id: str | os.PathLike, *, dtype: str | None = None, revision: str | None = None) -> None:
    """Raise what `load` would raise, from the headers of the files, without reading the weights."""
    with contextlib.ExitStack() as stack:
        _checked(path_or_hub_id, dtype, revision, stack)


def read_config(path_or_hub_id: str | os.PathLike, *, revision: str | None = None) -> BackboneConfig:
    """The backbone that `config.json` describes, without reading or fetching weights. Errors as those of `load`."""
    path = resolve(path_or_hub_id, revision, files=("config.json",)) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no config.json")
    return from_hf(_json(path))


def logits(
    config: BackboneConfig, params: Mapping[str, Any], token_ids: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T V"]:
    """fp32 logits of whole sequences without padding.

    Raises ValueError for ids outside the vocabulary (where they are known, that is outside `jax.jit`) and for sequences that
    are too long."""
    decoder.check_positions(config, token_ids.shape[1], "token_ids")
    if not isinstance(token_ids, Tracer) and token_ids.size:
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"token_ids lie in [{low}, {high}], but the vocabulary is [0, {config.vocab_size})")
    return _logits(config, params, token_ids)


@jax.jit(static_argnums=0)
def _logits(config: BackboneConfig, params: Mapping[str, Any], token_ids: Array) -> Array:
    out = decoder.apply(config, params, token_ids, jnp.ones(token_ids.shape, bool))
    return decoder.head(config, params, out.hidden)


def save(
    path: str | os.PathLike,
    config: BackboneConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: WordTokenizer | PretrainedTokenizer | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `load` and `transformers` read: `config.json`, safetensors in the parameters' own dtype, tokenizer.

    Padding rows of the vocabulary are left out. Weights of more than `max_file_bytes` are split into several files with an
    index. The folder appears whole or not at all.

    Raises ValueError if no published architecture has this backbone (naming the fields), if `params` are not its parameters, or
    if the tokenizer is not its own; FileExistsError if `path` is anything but an absent or empty folder.
    """
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not an empty folder: choose another, nothing is overwritten")
    _check_params(config, params)
    if tokenizer is not None:
        check_vocabulary(config, tokenizer)
    config, params = trim(config, params)
    values = to_hf(config) | {"dtype": str(params["embed"]["tokens"].dtype)}
    if tokenizer is not None:
        values |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = pathlib.Path(scratch) / path.name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        _write(folder, tensors_of(config, params), max_file_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)
        folder.replace(path)


def tensors_of(config: BackboneConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor of the checkpoint; the host gets one array of ours after another.

    Any tree with the parameters' shapes will do, their gradients for example. Raises ValueError as `to_hf` does."""
    prefix = PREFIXES[to_hf(config)["model_type"]]
    arrays = flatten_dict(params, sep="/")
    fused: dict[str, dict[int, np.ndarray]] = {}  # parts that wait for the others
    for ours, place in places(config).items():
        whole = np.asarray(jax.device_get(arrays[ours]))
        for name, x in zip(place.names(config.layers), whole if place.stacked else [whole], strict=True):
            found = fused.setdefault(name, {})
            found[place.part] = x.T if place.transposed else x
            if len(found) == place.parts:
                parts = [found[i] for i in range(place.parts)]
                del fused[name]
                joined = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
                yield name if name == HEAD else prefix + name, np.ascontiguousarray(joined)  # as safetensors assumes


def resolve(
    path_or_hub_id: str | os.PathLike, revision: str | None = None, *, files: Sequence[str] = _DOWNLOADED
) -> pathlib.Path:
    """The folder itself, or the local copy of a repository of the hub, fetched if need be (only `files`).

    Raises FileNotFoundError for a path that is no folder, OSError if the repository cannot be had."""
    folder, name = pathlib.Path(path_or_hub_id).expanduser(), os.fspath(path_or_hub_id)
    if folder.is_dir():
        return folder
    if isinstance(path_or_hub_id, os.PathLike) or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is not a folder")
    try:
        import huggingface_hub

        return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # whatever the client and its transport raise, the remedy is the same
        raise OSError(
            f"{name!r} is not a folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Pass a folder that holds config.json and "
            f"model.safetensors, for example one made where there is a connection: hf download {name} --local-dir FOLDER"
        ) from error


def _checked(
    path_or_hub_id: str | os.PathLike, dtype: str | None, revision: str | None, stack: contextlib.ExitStack
) -> tuple[BackboneConfig, dict[str, Any]]:
    """The config, with the parameters' dtype, and a reader of slices for every tensor."""
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: parameters are {', '.join(_DTYPES.values())}, or None for the files' own")
    folder = resolve(path_or_hub_id, revision)
    config = read_config(folder)
    tensors = _open(folder, stack)
    _check_names(folder, config, tensors)
    return dataclasses.replace(config, param_dtype=_param_dtype(folder, config, tensors, dtype)), tensors


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A reader of slices for every tensor of the folder, by name without prefix. Constant buffers are left out."""
    import safetensors

    tensors, origin = {}, {}
    for path, promised in _files(folder).items():
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except safetensors.SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(f"{path} ({size:,} bytes) is truncated or no safetensors file: {error}") from None
        held = sorted(file.keys())
        if absent := sorted(promised - set(held)):
            raise ValueError(f"{path} lacks {_some(absent)}, which {_INDEX} says it holds")
        for name in held:
            plain = next((name.removeprefix(x) for x in set(PREFIXES.values()) if name.startswith(x)), name)
            if plain in tensors:
                raise ValueError(f"{folder}: {name} in {path.name} and {origin[plain]} are the same tensor")
            if not plain.endswith(_BUFFERS):
                tensors[plain], origin[plain] = file.get_slice(name), f"{name} in {path.name}"
    return tensors


def _files(folder: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """The safetensors files of a checkpoint, each with the tensors that the index says it holds."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} has both {_SINGLE} and {_INDEX}: remove the one that is not meant")
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
            raise ValueError(
                f"{folder} has no {_SINGLE}, only {_some(pickles)}: a pickle can run any code and is never loaded. "
                "Convert it where you trust it: transformers' from_pretrained, then save_pretrained, writes safetensors"
            )
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    files: dict[pathlib.Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.Path(file).name != file:
            raise ValueError(f"{index}: weight_map sends {name} to {file!r}, which is no plain file name")
        files.setdefault(folder / file, set()).add(name)
    if missing := sorted(path.name for path in files if not path.is_file()):
        raise FileNotFoundError(f"{folder} lacks {_some(missing)}, which {_INDEX} names")
    return files


def _check_names(folder: pathlib.Path, config: BackboneConfig, tensors: dict[str, Any]) -> None:
    """Raise ValueError unless names and shapes in the files are those of `config`. Drops a head that repeats the embedding."""
    shapes, where = abstract(config), places(config)
    wanted = {
        name: place.shape(shapes[ours].shape) for ours, place in where.items() for name in place.names(config.layers)
    }
    embedding = where["embed/tokens"].name
    if config.tied_head and {HEAD, embedding} <= tensors.keys() and _equal(tensors[HEAD], tensors[embedding]):
        del tensors[HEAD]
    found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    faults = []
    if missing := [name for name in wanted if name not in found]:
        hint = " (config.json says tie_word_embeddings=false)" if HEAD in missing else ""
        faults.append(f"{len(missing)} missing{hint}: {_some(missing)}")
    if unexpected := [name for name in found if name not in wanted]:
        hint = " (config.json says tie_word_embeddings=true)" if config.tied_head and HEAD in unexpected else ""
        faults.append(f"{len(unexpected)} unexpected{hint}: {_some(unexpected)}")
    shared = [name for name in wanted if name in found and found[name] != wanted[name]]
    if shared:
        listed = _some([f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in shared])
        faults.append(f"{len(shared)} of another shape: {listed}")
    if faults:
        raise ValueError(f"{folder}: the tensors are not those of config.json; {'; '.join(faults)}")


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors of the files hold the same numbers."""
    if one.get_shape() != other.get_shape() or one.get_dtype() != other.get_dtype():
        return False
    rows = one.get_shape()[0]
    blocks = (slice(i, min(i + _ROWS, rows)) for i in range(0, rows, _ROWS))
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def _param_dtype(folder: pathlib.Path, config: BackboneConfig, tensors: Mapping[str, Any], dtype: str | None) -> str:
    """The asked dtype, or the one of all tensors. One array of ours, all layers of it, must have one dtype in any case."""
    kinds = {tensor.get_dtype() for tensor in tensors.values()}
    if unsupported := sorted(kinds - _DTYPES.keys()):
        raise ValueError(f"{folder} holds {', '.join(unsupported)} tensors; supported: {', '.join(_DTYPES)}")
    for place in places(config).values():
        if len(mixed := {tensors[name].get_dtype() for name in place.names(config.layers)}) > 1:
            raise ValueError(f"{folder} mixes {', '.join(sorted(mixed))} in the layers of {place.name}")
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"{folder} mixes {', '.join(sorted(kinds))} tensors: say which dtype the parameters get")
    return dtype or _DTYPES[kinds.pop()]


def _array(
    place: Place,
    tensors: Mapping[str, Any],
    wanted: jax.ShapeDtypeStruct,
    sharding: Sharding | None,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """One array of ours on its devices, in the wanted dtype. The devices do the conversion, so the host reads as is."""
    names = place.names(wanted.shape[0])
    parts: dict[str, np.ndarray] = {}  # devices that hold copies of one part share one reading of it

    def read(index: Any) -> np.ndarray:
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, wanted.shape, strict=True)]
        if str(bounds) not in parts:
            parts[str(bounds)] = _read(place, [tensors[name] for name in names], bounds, wanted.shape, pool)
        return parts[str(bounds)]

    if sharding is None:
        array = jnp.asarray(read((slice(None),) * len(wanted.shape)))
    else:
        array = jax.make_array_from_callback(wanted.shape, sharding, read)
    # One array after another: the host's copy of this one is gone before the next is read.
    return array.astype(wanted.dtype).block_until_ready()


def _read(
    place: Place, tensors: Sequence[Any], bounds: Sequence[slice], shape: Sequence[int], pool: ThreadPoolExecutor
) -> np.ndarray:
    """The part `bounds` of an array of ours (of `shape`) in the dtype of the files, by blocks of rows of the files."""
    dtype = jnp.dtype(_DTYPES[tensors[0].get_dtype()])
    plain = np.dtype(f"u{dtype.itemsize}")  # of the same size; numpy copies it without holding Python's lock
    out = _empty([x.stop - x.start for x in bounds], plain)
    inner = list(bounds[1:] if place.stacked else bounds)
    offset = place.part * shape[-1]
    inner[-1] = slice(inner[-1].start + offset, inner[-1].stop + offset)
    rows, *columns = reversed(inner) if place.transposed else inner

    def copy(tensor: Any, into: np.ndarray, start: int) -> None:
        block = tensor[(slice(start, min(start + _ROWS, rows.stop)), *columns)].view(plain)
        into[start - rows.start : start - rows.start + len(block)] = block

    chosen = zip(tensors[bounds[0]], out, strict=True) if place.stacked else [(tensors[0], out)]
    jobs = [
        (tensor, whole.T if place.transposed else whole, start)
        for tensor, whole in chosen
        for start in range(rows.start, rows.stop, _ROWS)
    ]
    list(pool.map(copy, *zip(*jobs, strict=True)))
    return out.view(dtype)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: XLA:CPU takes such memory over instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _check_params(config: BackboneConfig, params: Mapping[str, Any]) -> None:
    """Raise ValueError unless `params` have the names and shapes of `config` and are whole on this host's devices."""
    wanted = {ours: x.shape for ours, x in abstract(config).items()}
    found = flatten_dict(params, sep="/")
    faults = [f"{ours} is missing" for ours in wanted if ours not in found]
    faults += [f"{ours} is unexpected" for ours in found if ours not in wanted]
    faults += [
        f"{ours} is {list(x.shape)} instead of {list(wanted[ours])}"
        for ours, x in found.items()
        if ours in wanted and x.shape != wanted[ours]
    ]
    if faults:
        raise ValueError(f"params are not those of the config: {_some(faults)}")
    elsewhere = [ours for ours, x in found.items() if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if elsewhere:
        raise ValueError(
            f"parts of {_some(elsewhere)} are on other hosts: restore the checkpoint in one process to export it"
        )


def _write(folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], max_file_bytes: int) -> None:
    """Safetensors of at most `max_file_bytes` (or one tensor) each; the index only if there are several."""
    from safetensors.numpy import save_file

    weight_map: dict[str, int] = {}
    held: dict[str, np.ndarray] = {}
    total = count = 0

    def flush() -> None:
        nonlocal held, count
        save_file(held, folder / f"part-{count}", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, count))
        held, count = {}, count + 1

    for name, x in tensors:
        if held and sum(other.nbytes for other in held.values()) + x.nbytes > max_file_bytes:
            flush()
        held[name] = x
        total += x.nbytes
    flush()
    files = [_SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        (folder / f"part-{i}").rename(folder / file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: files[i] for name, i in weight_map.items()}}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
