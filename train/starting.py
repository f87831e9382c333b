"""Where a run starts: new parameters, published weights, or other runs; and which tokenizer it has.

Published weights and runs of parts go together: LaDiR's reasoner starts as a published model, its VAE comes from a run.

Published weights (`Experiment.pretrained`) are read once, by the first session of a run, tensor by tensor onto the mesh.
From the first checkpoint on the run holds all that it needs, its tokenizer included: a continued run, an evaluation and an
export never look at the published files again. What a run started from is in its metrics.jsonl as an event with a checksum.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from latentjax.backbone import decoder, pretrained, vocabulary
from latentjax.backbone.config import FREE_FIELDS, BackboneConfig
from latentjax.methods.base import Method
from latentjax.sharding import param_shardings
from latentjax.tokenizers import PretrainedTokenizer, Tokenizer, load_tokenizer
from train import state as train_state
from train.config import Experiment, Pretrained, differences, load_config, to_json
from train.run import CONFIG, TOKENIZER, parse_source, run_params


def run_tokenizer(experiment: Experiment, run: pathlib.Path | None = None) -> Tokenizer:
    """The tokenizer of `experiment`: the published model's, that of the run it starts from if that is a published one, or
    the task's own. Given the directory of a `run` that is to be continued, the one that it has saved.

    Raises FileNotFoundError, ValueError or KeyError saying what is missing or malformed."""
    specials, published = experiment.method.special_tokens(), experiment.pretrained
    if published is None and experiment.init_from is None:
        return experiment.task.tokenizer(specials)
    if run is not None:
        return load_tokenizer(run / TOKENIZER)
    if published is not None:
        source, revision = published.path, published.revision
        if published.tokenizer is not None:
            source, revision = published.tokenizer, None
        return PretrainedTokenizer.load(source, specials, revision=revision)
    return _tokenizer_of_source(experiment)


def _tokenizer_of_source(experiment: Experiment) -> Tokenizer:
    """For `init_from`: a published tokenizer goes on from run to run, a task's is made anew."""
    source, _ = _sources(experiment)[0][1:]
    tokenizer = load_tokenizer(source / TOKENIZER)
    if not isinstance(tokenizer, PretrainedTokenizer):
        return experiment.task.tokenizer(experiment.method.special_tokens())
    for token in experiment.method.special_tokens():
        try:
            tokenizer.token_id(token)
        except KeyError as error:
            raise ValueError(
                f"init_from={experiment.init_from!r}: its tokenizer has no {token}, which {experiment.method.name} needs. "
                f"Export it (python -m train.export {source} FOLDER) and give the folder as pretrained.path: new tokens "
                "then get their rows"
            ) from error
    return tokenizer


def check_start(experiment: Experiment, tokenizer: Tokenizer | None, params: Any) -> Any:
    """Check where the run starts against `params`, the shapes of its parameters; no published weights are read yet.

    `tokenizer` is None if the run continues: the published model is then not looked at.

    Returns the parameters of the run that `init_from` names, those of the backbone only if it trained another method, or of
    the parts from other runs, on the host; None without `init_from`. Raises ValueError or FileNotFoundError naming every
    field or the first array that does not fit."""
    if experiment.tuning == "frozen" and not jax.tree.leaves(params["method"]):
        raise ValueError(
            f"tuning='frozen': nothing would train, because {experiment.method.name} has no parameters besides the backbone's"
        )
    if experiment.pretrained is not None and tokenizer is not None:
        _check_backbone(experiment.pretrained, experiment, tokenizer)
    if experiment.init_from is None:
        return None
    inherited: dict[str, Any] = {}
    for role, source, which in _sources(experiment):
        theirs = load_config(source / CONFIG)
        # On the host, where they stay as long as the run: beside its state one device may not have room for them.
        found = jax.device_get(run_params(source, which, theirs)[0])
        parts = experiment.method.parts()
        if role is not None:
            _check_part(experiment, role, source, theirs.method, tokenizer)
            found = experiment.method.adopt(role, found)
            if experiment.pretrained is not None and "backbone" in found:
                raise ValueError(
                    f"pretrained.path={experiment.pretrained.path!r}: the {role} of {experiment.method.name} brings the "
                    f"backbone with it (init_from={source}); leave `pretrained` out"
                )
        elif type(theirs.method) is type(experiment.method):
            experiment.method.check_source(None, theirs.method)
            for part in parts:  # they come along
                _check_part(experiment, part, source, theirs.method.parts()[part], tokenizer)
        elif parts:
            raise ValueError(
                f"init_from={experiment.init_from!r}: is a run of {theirs.method.name}, which has no "
                f"{' and no '.join(parts)}; name a run for each part that {experiment.method.name} takes from others"
            )
        else:
            # Arrays of another method mean something else, whatever their name.
            found = {"backbone": found["backbone"]}
        inherited = _joined(inherited, found)
    merge = functools.partial(train_state.merge_params, source=f"init_from={experiment.init_from!r}")
    jax.eval_shape(merge, params, inherited)
    return inherited


def inherited_params(inherited: Any, mesh: Mesh) -> Any:
    """The arrays that `check_start` returned on `mesh`, each split by its name, so that no device holds all of them."""

    def place(x: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(place, inherited, param_shardings(mesh, inherited))


def _sources(experiment: Experiment) -> list[tuple[str | None, pathlib.Path, int | str]]:
    """Each run that `init_from` names: the part that comes from it (None: the method itself), directory, checkpoint."""
    sources: list[tuple[str | None, pathlib.Path, int | str]] = []
    for role, source in experiment.starts.items():
        path, which = parse_source(source)
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(f"init_from={source!r}: {path} is not a run directory (it has no {CONFIG})")
        sources.append((role, path, which))
    return sources


# Fields of a part in which the run that trained it may differ from what the method says of it: how it was trained and how it
# generates, and fields of its backbones that say how they are stored and compiled.
_TRAINING = (
    "steps", "epochs", "draws", "null_probability", "rollout_steps", "sampler", "stop", "group", "times", "layout",
)  # fmt: skip
_STORED = ("param_dtype", "scan_layers", "remat", "platform")


def _check_part(
    experiment: Experiment, role: str, source: pathlib.Path, theirs: Method, tokenizer: Tokenizer | None
) -> None:
    """Raise ValueError unless `theirs` of the run `source` is the part that the method expects, with the same tokenizer."""
    wanted, found = (
        {name: _unstored(value) for name, value in to_json(method).items() if name not in _TRAINING}
        for method in (experiment.method.parts()[role], theirs)
    )
    if different := differences(found, wanted, f"method.{role}"):
        raise ValueError(
            f"init_from: {source} is not the {role} that {experiment.method.name} expects (there -> here):\n  "
            + "\n  ".join(different)
        )
    experiment.method.check_source(role, theirs)
    if tokenizer is not None and not tokenizer.same_as(load_tokenizer(source / TOKENIZER)):
        raise ValueError(
            f"init_from: {source} was trained with another tokenizer, so its tokens are not this run's; train the {role} "
            "again on this task"
        )


def _unstored(value: Any) -> Any:
    """The JSON form `value` without the fields `_STORED` of the backbones in it."""
    if not isinstance(value, dict):
        return value
    is_backbone = value.get("class", "").endswith(f".{BackboneConfig.__name__}")
    return {name: _unstored(x) for name, x in value.items() if not (is_backbone and name in _STORED)}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of parameters as one."""
    flat = flatten_dict(first, keep_empty_nodes=True) | flatten_dict(second, keep_empty_nodes=True)
    return unflatten_dict(flat)


def _check_backbone(source: Pretrained, experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Raise ValueError listing every field in which `method.backbone` is not the published model's."""
    ours = experiment.method.backbone
    folder_config = pretrained.read_config(source.path, revision=source.revision)
    theirs = vocabulary.grown_config(folder_config, tokenizer.vocab_size)
    found, right = _explicit(ours), _explicit(theirs)
    different = [
        f"method.backbone.{name}: {found[name]!r} -> {right[name]!r}"
        for name in found
        if found[name] != right[name] and name not in FREE_FIELDS
    ]
    if different:
        raise ValueError(
            f"pretrained.path={source.path!r}: method.backbone is another model; with the special tokens of "
            f"{experiment.method.name} and padding to a multiple of {vocabulary.MULTIPLE} rows it must be (here -> right):\n  "
            + "\n  ".join(different)
        )
    # A rule that cannot be followed, such as the copy of a row that the tokenizer has no token for, shows now.
    shapes = jax.eval_shape(functools.partial(decoder.init, folder_config), jax.random.key(0))
    jax.eval_shape(functools.partial(_grow, source, experiment.seed, tokenizer, folder_config), shapes)


def check_weights(source: Pretrained, backbone: BackboneConfig) -> None:
    """Check names, shapes and types of all tensors in the files of the published weights, reading none of them."""
    pretrained.check(source.path, dtype=backbone.param_dtype, revision=source.revision)


def _explicit(config: BackboneConfig) -> dict[str, Any]:
    """The fields of `config` with what None stands for written out."""
    config = dataclasses.replace(
        config,
        kv_heads=config.num_kv_heads,
        head_dim=config.size_per_head,
        mlp_width=config.hidden_mlp,
        vocab_used=config.vocab_used or config.vocab_size,
    )
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _grow(source: Pretrained, seed: int, tokenizer: Tokenizer, config: BackboneConfig, params: Any) -> dict[str, Any]:
    """`params` of the published backbone `config` with rows for the method's special tokens, and padding."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise TypeError(f"a run from published weights has a PretrainedTokenizer, not a {type(tokenizer).__name__}")
    rules = dict.fromkeys(tokenizer.added, source.new_row)
    key = jax.random.fold_in(jax.random.key(seed), 3)
    return vocabulary.grow(config, params, tokenizer, rules, key)[1]


def published_params(source: Pretrained, experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
    """{"backbone": ...} of the published weights, grown to the run's vocabulary, on `mesh` by the rules of
    latentjax/sharding.py.

    Raises ValueError, FileNotFoundError or OSError as `latentjax.backbone.pretrained.load` does."""
    config, params = pretrained.load(
        source.path, dtype=experiment.method.backbone.param_dtype, mesh=mesh, revision=source.revision
    )
    grown = _grow(source, experiment.seed, tokenizer, config, params)
    return {"backbone": jax.device_put(grown, param_shardings(mesh, grown))}
