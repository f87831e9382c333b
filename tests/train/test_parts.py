"""A method that holds a part which another run trained: LaDiR and its VAE, through the training program."""

import dataclasses
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.evaluate import encode_prompts
from latentjax.backbone.config import tiny
from latentjax.methods import FlowSampler, LaDiR, Lengths, ThoughtVAE
from latentjax.methods.few_step_ladir import FewStepLaDiR
from latentjax.rollout import Backbone
from latentjax.tasks.base import Example
from latentjax.tasks.successor_list import SuccessorList
from latentjax.thoughts import vae
from latentjax.thoughts.flow import TimeSampler
from latentjax.tokenizers import Codec
from tests.train.small import experiment as small
from train import cli
from train.config import Experiment
from train.input import check_lengths
from train.loop import train
from train.plan import lay_out
from train.prepare import prepare
from train.run import load_run
from train.validate import Validator

BACKBONE = dataclasses.replace(tiny(16, width=16, layers=1, heads=2, max_positions=40), init="unit")
VAE = ThoughtVAE(
    BACKBONE,
    Lengths(11, 2),
    steps=4,
    latents=2,
    latent_width=4,
    max_blocks=2,
    noise=0.1,
    substitution=0,
    train_decoder=True,
)
TIMES = TimeSampler("logit_normal")
REASONER = LaDiR(BACKBONE, Lengths(11, 4), vae=VAE, steps=4, draws=2, sampler=FlowSampler(2, guidance=1), times=TIMES)


def experiment(method, **changes) -> Experiment:
    return dataclasses.replace(
        small(), **{"method": method, "task": SuccessorList(hops=2), "validate_every": 4} | changes
    )


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    return train(experiment(VAE, ema=0.5), tmp_path_factory.mktemp("vae"), quiet=True)


@pytest.fixture(scope="module")
def reasoner_run(vae_run, tmp_path_factory):
    config = experiment(REASONER, init_from={"vae": str(vae_run.run)})
    return train(config, tmp_path_factory.mktemp("reasoner"), quiet=True)


def test_the_part_is_that_of_its_run_and_stays_so(vae_run, reasoner_run):
    part = load_run(vae_run.run)  # its moving average
    for params in (reasoner_run.params, load_run(reasoner_run.run).params):
        chex.assert_trees_all_equal(jax.device_get(params["method"]["vae"]), jax.device_get(part.params))
    before = prepare(reasoner_run.experiment).first_state()
    chex.assert_trees_all_equal(before.params["method"]["vae"], reasoner_run.params["method"]["vae"])
    chex.assert_trees_all_equal(before.params["method"]["latents"], reasoner_run.params["method"]["latents"])
    for name in ("latent_in", "head", "decision"):
        old, new = before.params["method"][name], reasoner_run.params["method"][name]
        assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)), name
    whole, still = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (before.params, [before.params["method"][name] for name in ("vae", "latents")])
    )
    moments = [leaf for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * (whole - still)


def test_statistics_of_the_part_are_those_of_an_epoch_and_in_the_checkpoint(reasoner_run):
    prepared = prepare(reasoner_run.experiment)
    own, means = load_run(reasoner_run.run).params["method"], []
    for step in range(prepared.plan.steps_per_epoch):
        extra = prepared.training.batch(step).extra
        tokens, mask = (jnp.asarray(extra[name]).reshape(-1, 2) for name in ("blocks", "blocks_mask"))
        assert mask.all()  # one token and an end in every block
        encoder = own["vae"]["method"]["encoder"]
        read = mask & jnp.array([True, False])
        means.append(vae.posterior(Backbone(BACKBONE, encoder), own["vae"]["method"], tokens, read).mean)
    means = np.concatenate(means)
    assert len(means) == 3 * 8 * 2
    assert means.std(axis=0).max() > 0.1
    assert own["latents"]["mean"] == pytest.approx(means.mean(axis=0), abs=1e-4)
    moving = means.std(axis=0) >= 0.1
    assert own["latents"]["std"] == pytest.approx(np.where(moving, means.std(axis=0), 1.0), rel=1e-3)


def test_a_broken_run_goes_on_as_if_it_had_not_been(reasoner_run, tmp_path):
    train(reasoner_run.experiment, tmp_path, quiet=True, stop_after_steps=2)
    result = train(reasoner_run.experiment, tmp_path, quiet=True)
    assert result.finished
    chex.assert_trees_all_equal(jax.device_get(result.params), jax.device_get(reasoner_run.params))


def test_the_second_stage_starts_from_the_first_with_all_that_it_holds(reasoner_run):
    config = experiment(dataclasses.replace(REASONER, rollout_steps=1), init_from=str(reasoner_run.run))
    state = prepare(config).first_state()
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(load_run(reasoner_run.run).params))


def test_a_name_with_the_seed_in_it_is_that_of_the_run_with_this_seed(tmp_path):
    runs = {seed: train(experiment(VAE, seed=seed), tmp_path / f"vae-{seed}", quiet=True) for seed in (1, 2)}
    for seed, result in runs.items():
        config = experiment(REASONER, init_from={"vae": f"{tmp_path}/vae-{{seed}}"}, seed=seed)
        adopted = prepare(config).first_state().params["method"]["vae"]
        chex.assert_trees_all_equal(jax.device_get(adopted), jax.device_get(result.params))
    first, second = (jax.tree.leaves(result.params)[0] for result in runs.values())
    assert (first != second).any()


def test_a_student_may_differ_from_its_teacher_in_how_it_trains_and_samples(reasoner_run):
    fields = {f.name: getattr(REASONER, f.name) for f in dataclasses.fields(LaDiR)}
    fields |= {"steps": 5, "draws": 1, "null_probability": 0.0, "sampler": FlowSampler(4, guidance=1, noise_scale=1)}
    fields |= {"times": TimeSampler(), "layout": "random_block"}
    student = FewStepLaDiR(**fields, teacher_guidance=1, phases=4)
    own = prepare(experiment(student, init_from={"teacher": str(reasoner_run.run)})).first_state().params["method"]
    theirs = load_run(reasoner_run.run).params["method"]
    for copy in (own, own["teacher"]["method"]):
        chex.assert_trees_all_equal(
            *(jax.device_get([x[name] for name in ("latent_in", "head")]) for x in (copy, theirs))
        )
    other = dataclasses.replace(student, flow_weight=1.0)
    with pytest.raises(ValueError, match=r"is not the teacher .*\n.*method\.teacher\.flow_weight: 5\.0 -> 1\.0"):
        prepare(experiment(other, init_from={"teacher": str(reasoner_run.run)}))
    guided = dataclasses.replace(student, teacher_guidance=2)
    prepare(experiment(guided, init_from={"teacher": str(reasoner_run.run)}))
    guided.check_source("teacher", REASONER)
    with pytest.raises(ValueError, match=r"method\.teacher_guidance=2: .*null_probability=0"):
        guided.check_source("teacher", dataclasses.replace(REASONER, null_probability=0))


def test_a_collapsed_vae_ends_the_command_with_an_explanation(vae_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae, "ACTIVE_VARIANCE", 1e9)  # as if no unit told one block from another
    source = {"vae": str(vae_run.run)}
    file = tmp_path / "config.py"
    file.write_text(
        f"from tests.train.test_parts import REASONER, experiment\nconfig = experiment(REASONER, init_from={source})"
    )
    assert cli.main([str(file), "--run", str(tmp_path / "run"), "--seed", "3"]) == cli.BAD_INPUT
    shown = capsys.readouterr().err
    assert "the VAE has collapsed: 0 of" in shown
    assert "Train it with a smaller beta" in shown
    assert not list((tmp_path / "run/checkpoints").iterdir())


def with_vae(**changes):
    return dataclasses.replace(REASONER, vae=dataclasses.replace(VAE, **changes))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (with_vae(latent_width=8), {}, r"is not the vae that LaDiR expects.*\n.*method\.vae\.latent_width: 4 -> 8"),
        (with_vae(noise=1, steps=9), {}, r"method\.vae\.noise: 0\.1 -> 1$"),
        (REASONER, {"task": SuccessorList(size=9, hops=2)}, r"with another tokenizer.*train the vae again"),
        (REASONER, {"init_from": {"vae": "{reasoner}"}}, r"is not the vae .*\n.*method\.vae\.class: '.*LaDiR' -> '.*VAE'"),
        (REASONER, {"init_from": {"vae": "nowhere"}}, r"init_from='nowhere': nowhere is not a run directory"),
        (REASONER, {"init_from": "{vae}"}, r"is a run of ThoughtVAE, which has no vae; name a run for each part"),
        (
            dataclasses.replace(with_vae(posterior="sigma"), rollout_steps=1), {"init_from": "{reasoner}"},
            r"method\.vae\.posterior: 'gaussian' -> 'sigma'",
        ),
        (
            dataclasses.replace(REASONER, rollout_steps=1, prediction="x"), {"init_from": "{reasoner}"},
            r"method\.prediction='x': the run that this one goes on from was trained with 'velocity'",
        ),
        (
            dataclasses.replace(REASONER, rollout_steps=1, normalise=False), {"init_from": "{reasoner}"},
            r"method\.normalise=False: .* trained with True",
        ),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_named(vae_run, reasoner_run, method, changes, message):
    runs = {"vae": vae_run.run, "reasoner": reasoner_run.run}
    source = changes.get("init_from", {"vae": "{vae}"})
    named = source.format(**runs) if isinstance(source, str) else {k: v.format(**runs) for k, v in source.items()}
    config = experiment(method, **changes | {"init_from": named})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(config)


@pytest.mark.parametrize("init_from", [None, {}, {"teacher": "x"}, {"vae": "x", "teacher": "x"}])
def test_every_part_needs_a_run_and_no_other_is_taken(init_from):
    message = re.escape("LaDiR needs a run for each of its parts, init_from={'vae': 'RUN'}")
    with pytest.raises(ValueError, match=message):
        experiment(REASONER, init_from=init_from)
    if init_from:
        with pytest.raises(ValueError, match=r"ThoughtVAE needs a run for each of its parts, init_from=None"):
            experiment(VAE, init_from=init_from)


def test_a_collapsed_part_is_refused_before_training(reasoner_run, monkeypatch):
    prepared = prepare(reasoner_run.experiment)
    monkeypatch.setattr(vae, "ACTIVE_VARIANCE", 1e6)
    with pytest.raises(ValueError, match=r"VAE has collapsed: 0 of 8 latent units vary over 48 blocks"):
        prepared.first_state()


def test_a_chain_that_no_block_holds_is_found_before_anything_is_compiled():
    """Also where neither the question nor the whole text is among the longest."""
    config = experiment(dataclasses.replace(VAE, max_blocks=1, lengths=Lengths(11, 2)))
    with pytest.raises(ValueError, match=r"train split of SuccessorList: example 0 .*max_blocks=1"):
        prepare(config)


def test_the_longest_block_and_the_longest_answer_are_tried_beforehand():
    """They need not be in the longest chain, nor have the longest single step."""
    task = SuccessorList(hops=2)
    config = experiment(dataclasses.replace(VAE, steps_per_block=2, max_blocks=3, lengths=Lengths(11, 4)), task=task)
    codec = Codec(task.tokenizer(), task.format)
    good = list(task.examples("train", count=40, seed=0))
    question = good[0].question
    longer = Example(question, ("1", "1 2", "1", "1"), "1 2 3")  # in blocks of 3 and 2 tokens
    chains = [longer] * 6
    chains += [Example(question, ("1 2",), "1")] * 6
    plan = lay_out(config.method.stages(), 4)
    check_lengths(config, codec, plan, [*good, *chains], "train")
    with pytest.raises(ValueError, match=r"has a block of 5 tokens with its end, but lengths\.text=4"):
        check_lengths(config, codec, plan, [*chains, Example(question, ("1 2", "1 2"), "1"), *chains], "train")
    # Of a chain only the answer stands in a reasoner's text: its marker, three tokens with their own sign, the end.
    reasoner = dataclasses.replace(REASONER, vae=config.method, lengths=Lengths(11, 6))
    config = experiment(reasoner, task=task, init_from={"vae": "x"})
    codec = Codec(task.tokenizer(reasoner.special_tokens()), task.format)
    check_lengths(config, codec, plan, chains, "train")
    with pytest.raises(ValueError, match=r"has 7 tokens, but lengths\.text=6"):
        check_lengths(config, codec, plan, [*chains, Example(question, ("1",), "1 2 3 4"), *chains], "train")


def test_a_decoder_that_would_stay_at_random_is_refused():
    with pytest.raises(ValueError, match=r"method\.train_decoder=False: the backbone of ThoughtVAE .* at random"):
        prepare(experiment(dataclasses.replace(VAE, train_decoder=False)))


def test_a_vae_needs_positions_for_a_block_and_not_for_the_chain():
    """Blocks of 11 + 2 + 1 positions, more of them than positions; validated and evaluated like any other."""
    backbone = dataclasses.replace(BACKBONE, max_positions=16)
    method = dataclasses.replace(VAE, backbone=backbone, lengths=Lengths(11, 13), max_blocks=9)
    prepared = prepare(experiment(method))
    tokenizer, task = prepared.tokenizer, prepared.experiment.task
    found = encode_prompts(method, Codec(tokenizer, task.format), task.examples("valid", count=3))
    assert found.question.shape == (3, 9 * 13)


def test_in_validation_no_problem_has_neighbours_that_repel_it(monkeypatch):
    """One sample of each is drawn, whatever the method says of groups."""
    seen = []

    def evaluate_split(method, *_, **options):
        seen.append(method.group)
        return SimpleNamespace(accuracy=0.0, low=0.0, high=1.0, n=3, unparsable=0)

    monkeypatch.setattr("eval.evaluate.evaluate_split", evaluate_split)
    config = experiment(dataclasses.replace(REASONER, group=3), init_from={"vae": "x"})
    validator = SimpleNamespace(
        _experiment=config,
        _tokenizer=None,
        _examples=[None] * 3,
        _parallel=SimpleNamespace(ways=1, batch_sharding=None),
    )
    assert Validator._generate(validator, None, None)["n"] == 3
    assert seen == [1]
