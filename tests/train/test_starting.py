"""A method that starts as a published model and holds a part from another run: LaDiR's reasoner and its VAE."""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.backbone import pretrained
from latentjax.backbone.config import preset
from latentjax.backbone.vocabulary import grown_config
from latentjax.methods import FlowSampler, LaDiR, Lengths, ThoughtVAE
from latentjax.methods.few_step_ladir import FewStepLaDiR
from latentjax.tasks.successor_list import SuccessorList
from latentjax.thoughts import vae
from tests.train.published import write_model, write_tokenizer
from train.config import Experiment, Mesh, Optimizer, Pretrained
from train.loop import train
from train.prepare import prepare

SIZES = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp_width": 24, "max_positions": 160}
THEIRS = preset("llama-3.1-8b", vocab_size=320, rope_scaling=None, init="unit", **SIZES)
BACKBONE = grown_config(THEIRS, 321)
VAE = ThoughtVAE(BACKBONE, Lengths(40, 12), steps=2, latents=2, latent_width=4, max_blocks=2, noise=0.1)
STORED = dataclasses.replace(VAE, backbone=dataclasses.replace(BACKBONE, param_dtype="bfloat16", remat="full"))
REASONER = LaDiR(BACKBONE, Lengths(40, 24), vae=STORED, steps=2, draws=2, sampler=FlowSampler(2, guidance=1))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> pathlib.Path:
    """A published model, the same with other weights, and the model with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        write_model(folder / name, THEIRS, seed)
    (folder / "words").mkdir()
    write_tokenizer(folder / "words", dataclasses.replace(THEIRS, positions="learned"))
    return folder


def experiment(models: pathlib.Path, method, name: str = "first", **changes) -> Experiment:
    settings = {
        "name": "small",
        "task": SuccessorList(hops=2),
        "method": method,
        "pretrained": Pretrained(str(models / name)),
        "optimizer": Optimizer(learning_rate=1e-2),
        "mesh": Mesh(data=1, fsdp=8),
        "batch_size": 8,
        "train_examples": 16,
        "valid_examples": 8,
        "validate_unit": "steps",
        "validate_every": 4,
        "validate_generation": False,
    }
    return Experiment(**settings | changes)


@pytest.fixture(scope="module")
def vae_run(models, tmp_path_factory):
    config = experiment(models, VAE, mesh=Mesh(data=1))
    return train(config, tmp_path_factory.mktemp("vae") / "run", quiet=True, stop_after_steps=1)


@pytest.fixture(scope="module")
def reasoner_run(models, vae_run, tmp_path_factory):
    method = dataclasses.replace(REASONER, null_probability=0)
    config = experiment(models, method, mesh=Mesh(data=1), init_from={"vae": str(vae_run.run)})
    return train(config, tmp_path_factory.mktemp("reasoner") / "run", quiet=True, stop_after_steps=1)


def test_a_reasoner_starts_as_the_published_model_with_the_vae_of_its_run(models, vae_run):
    """The order: new parameters, the published backbone, adopted parts as they are to be stored, what is measured of them."""
    prepared = prepare(experiment(models, REASONER, "second", init_from={"vae": str(vae_run.run)}))
    state = prepared.first_state()
    _, right = pretrained.load(models / "second")
    chex.assert_trees_all_equal(state.params["backbone"]["layers"], right["layers"])
    np.testing.assert_array_equal(state.params["backbone"]["embed"]["tokens"][:320], right["embed"]["tokens"])

    part, run = jax.device_get((state.params["method"]["vae"], vae_run.params))
    encoder = part["method"]["encoder"]
    for stored, theirs in ((part["backbone"], run["backbone"]), (encoder, run["method"]["encoder"])):
        assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}
        chex.assert_trees_all_equal(stored, jax.tree.map(lambda x: x.astype(jnp.bfloat16), theirs))
    own = [{k: x for k, x in tree["method"].items() if k != "encoder"} for tree in (part, run)]
    chex.assert_trees_all_equal(*own)  # what is small stays in float32

    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *(prepared.training.batch(step) for step in range(2)))
    latents, present = REASONER._means(state.params["method"], batch)
    found = np.asarray(latents)[np.asarray(present)]
    measured = jax.device_get(state.params["method"]["latents"])
    np.testing.assert_allclose(measured["mean"], found.mean(axis=0), atol=1e-4)
    moves = found.var(axis=0) >= vae.ACTIVE_VARIANCE
    assert moves.any()
    np.testing.assert_allclose(measured["std"], np.where(moves, found.std(axis=0), 1.0), rtol=1e-3)
    # An eighth of each large array on each device, and no optimiser state of what does not train.
    kernel = state.params["method"]["vae"]["backbone"]["layers"]["mlp_up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 2, kernel.shape[2])}
    assert not any("vae" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state))


@pytest.mark.slow
def test_a_run_of_both_goes_on_without_the_published_folder(models, reasoner_run):
    (models / "first").rename(models / "gone")
    try:
        result = train(reasoner_run.experiment, reasoner_run.run, quiet=True)
    finally:
        (models / "gone").rename(models / "first")
    assert result.finished
    stored = result.params["method"]["vae"]["backbone"]["layers"]["mlp_up"]["kernel"]
    assert stored.dtype == jnp.bfloat16


def test_a_vae_with_another_tokenizer_is_refused(models, vae_run):
    other = Pretrained(str(models / "first"), tokenizer=str(models / "words"))
    with pytest.raises(ValueError, match=r"trained with another tokenizer.*train the vae again"):
        prepare(experiment(models, REASONER, pretrained=other, init_from={"vae": str(vae_run.run)}))


def test_what_a_part_computes_must_be_that_of_its_run(models, vae_run):
    """How it is stored is free; what it computes is not."""
    other = dataclasses.replace(REASONER, vae=dataclasses.replace(STORED, backbone=grown_config(THEIRS, 321)))
    prepare(experiment(models, other, init_from={"vae": str(vae_run.run)}))
    wrong = dataclasses.replace(STORED.backbone, rope_theta=10000.0)
    other = dataclasses.replace(REASONER, vae=dataclasses.replace(STORED, backbone=wrong))
    with pytest.raises(ValueError, match=r"method\.vae\.backbone\.rope_theta: 500000\.0 -> 10000\.0$"):
        prepare(experiment(models, other, init_from={"vae": str(vae_run.run)}))


@pytest.mark.slow
def test_a_part_that_brings_the_backbone_excludes_published_weights(models, reasoner_run):
    fields = {f.name: getattr(reasoner_run.experiment.method, f.name) for f in dataclasses.fields(LaDiR)}
    fields["sampler"] = FlowSampler(4, guidance=1, noise_scale=1)
    student = FewStepLaDiR(**fields, teacher_guidance=1)
    with pytest.raises(ValueError, match=r"pretrained\.path=.*the teacher of FewStepLaDiR brings the backbone"):
        prepare(experiment(models, student, init_from={"teacher": str(reasoner_run.run)}))


def test_a_whole_run_and_published_weights_exclude_each_other(models):
    with pytest.raises(ValueError, match=r"init_from='runs/x'.*set one of them, or name runs of parts"):
        experiment(models, REASONER, init_from="runs/x")
