"""Where a run starts: new parameters, published weights, or another run; and which tokenizer it has.

Published weights (`Experiment.pretrained`) are read once, by the first session of a run, tensor by tensor onto the mesh.
From the first checkpoint on the run holds all that it needs, its tokenizer included: a continued run, an evaluation and an
export never look at the published files again. What a run started from is in its metrics.jsonl as an event with a checksum.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from latentjax.backbone import decoder, pretrained, vocabulary
from latentjax.backbone.config import BackboneConfig
from latentjax.sharding import param_shardings
from latentjax.tokenizers import PretrainedTokenizer, Tokenizer, load_tokenizer
from train import state as train_state
from train.config import Experiment, Pretrained, load_config
from train.run import CONFIG, TOKENIZER, parse_source, run_params

# Fields of a backbone in which a run may differ from the folder that it starts from: how it trains, not what it computes.
_FREE = (
    "init", "init_std", "embedding_dropout", "attention_dropout", "residual_dropout", "dtype", "param_dtype",
    "scan_layers", "remat", "platform", "lora",
)  # fmt: skip


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
    source, _ = _source(experiment)
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

    Returns the parameters of the run that `init_from` names, those of the backbone only if it trained another method; None
    without `init_from`. Raises ValueError or FileNotFoundError naming every field or the first array that does not fit."""
    if experiment.tuning == "frozen" and not jax.tree.leaves(params["method"]):
        raise ValueError(
            f"tuning='frozen': nothing would train, because {experiment.method.name} has no parameters besides the backbone's"
        )
    if experiment.pretrained is not None and tokenizer is not None:
        _check_backbone(experiment.pretrained, experiment, tokenizer)
    if experiment.init_from is None:
        return None
    source, which = _source(experiment)
    theirs = load_config(source / CONFIG)
    inherited, _ = run_params(source, which, theirs)
    if type(theirs.method) is not type(experiment.method):
        # Arrays of another method mean something else, whatever their name.
        inherited = {"backbone": inherited["backbone"]}
    merge = functools.partial(train_state.merge_params, source=f"init_from={experiment.init_from!r}")
    jax.eval_shape(merge, params, inherited)
    return inherited


def _source(experiment: Experiment) -> tuple[pathlib.Path, int | str]:
    path, which = parse_source(str(experiment.init_from))
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"init_from={experiment.init_from!r}: {path} is not a run directory (it has no {CONFIG})"
        )
    return path, which


def _check_backbone(source: Pretrained, experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Raise ValueError listing every field in which `method.backbone` is not the published model's."""
    ours = experiment.method.backbone
    folder_config = pretrained.read_config(source.path, revision=source.revision)
    theirs = vocabulary.grown_config(folder_config, tokenizer.vocab_size)
    found, right = _explicit(ours), _explicit(theirs)
    different = [
        f"method.backbone.{name}: {found[name]!r} -> {right[name]!r}"
        for name in found
        if found[name] != right[name] and name not in _FREE
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
