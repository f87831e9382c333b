import json
import signal

import chex
import jax
import numpy as np
import pytest

from latentjax.checkpoint import FOLDER, available_steps
from latentjax.methods.base import Stage
from latentjax.tokenizers import Codec
from tests.train.small import Bigram, experiment
from train import loop
from train.config import Mesh, load_config
from train.log import TIMING, read_metrics
from train.loop import Interrupted, NonFinite, train
from train.run import load_run

# A stage switch with an optimiser reset at step 5, and a reset inside the second stage at steps 8 and 11.
SCHEDULE = (Stage(0, steps=5), Stage(1, epochs=3, reset_optimizer=True, reset_optimizer_every_epoch=True))
TOTAL = 14


class Killed(Exception):
    pass


def _curriculum(**changes):
    return experiment(schedule=SCHEDULE, **changes)


def _facts(run):
    """Records without what differs between two runs of one experiment."""
    records = [record for record in read_metrics(run) if record["kind"] != "event"]
    return [{name: value for name, value in record.items() if name != TIMING} for record in records]


def _tree(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.PACKAGES", ("latentjax.", "train.", "tests."))
        return train(_curriculum(ema=0.9), run, quiet=True)


def test_a_run_leaves_what_it_promises(unbroken):
    assert (unbroken.step, unbroken.finished) == (TOTAL, True)
    run = unbroken.run
    names = {"config.json", "environment.json", "tokenizer", "metrics.jsonl", "tensorboard", "checkpoints", "lock"}
    assert {path.name for path in run.iterdir()} == names
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert len(environment["devices"]) == 8
    assert environment["continued"] == []
    assert [r["step"] for r in read_metrics(run, "train")] == list(range(1, TOTAL + 1))
    assert [r["stage"] for r in read_metrics(run, "train")] == [0] * 5 + [1] * 9
    assert [r["step"] for r in read_metrics(run, "valid")] == [3, 6, 9, 12, 14]
    timing = read_metrics(run, "train")[-1][TIMING]
    assert all(timing[f"{name}_per_second"] > 0 for name in ("steps", "examples", "tokens", "flops"))
    assert any((run / "tensorboard").iterdir())


def test_a_run_can_be_read_again(unbroken):
    loaded = load_run(unbroken.run)
    assert loaded.experiment == unbroken.experiment
    assert loaded.step == TOTAL
    chex.assert_trees_all_equal(loaded.params, unbroken.params)  # both are the moving average
    text = "3 1 4"
    assert loaded.tokenizer.encode(text) == unbroken.tokenizer.encode(text)


def test_the_loss_falls(tmp_path):
    result = train(experiment(schedule=(Stage(0, steps=60),), log_every=20, validate_every=60), tmp_path, quiet=True)
    losses = [record["loss"] for record in result.records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("killed_at", [4, 5, 9])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, unbroken, killed_at):
    def kill(step):
        if step == killed_at:
            raise Killed

    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(_curriculum(ema=0.9), run, quiet=True, on_step=kill)
    assert max(available_steps(run), default=0) < killed_at  # steps after the checkpoint are lost and made again
    steps = []
    result = train(_curriculum(ema=0.9), run, quiet=True, on_step=steps.append)
    assert steps[0] == max(s for s in (0, 2, 3, 4, 6, 8) if s < killed_at) + 1
    assert result.finished
    chex.assert_trees_all_equal(result.params, unbroken.params)
    chex.assert_trees_all_equal(load_run(run).params, load_run(unbroken.run).params)
    assert _facts(run) == _facts(unbroken.run)


def test_a_run_in_pieces_is_the_unbroken_run(tmp_path, unbroken):
    steps, pieces = [], 0
    while not steps or steps[-1] < TOTAL:
        result = train(_curriculum(ema=0.9), tmp_path, quiet=True, stop_after_steps=5)
        steps.append(result.step)
        pieces += 1
    assert steps == [5, 10, 14]
    chex.assert_trees_all_equal(result.params, unbroken.params)
    assert _facts(tmp_path) == _facts(unbroken.run)
    assert len(json.loads((tmp_path / "environment.json").read_text())["continued"]) == pieces - 1


def test_time_ends_a_piece_too(tmp_path):
    result = train(_curriculum(), tmp_path, quiet=True, stop_after_minutes=1e-9)
    assert (result.step, result.finished) == (1, False)
    assert available_steps(tmp_path) == [1]


def test_a_finished_run_is_read_and_not_trained(unbroken):
    steps, before = [], _facts(unbroken.run)
    again = train(unbroken.experiment, unbroken.run, quiet=True, on_step=steps.append)
    assert (again.finished, again.compiles, steps) == (True, 0, [])
    chex.assert_trees_all_equal(again.params, unbroken.params)
    assert _facts(unbroken.run) == before


def test_several_devices_resume_bit_for_bit(tmp_path):
    config = _curriculum(mesh=Mesh(data=2, fsdp=2))
    whole = train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "pieces", quiet=True, stop_after_steps=7)
    pieces = train(config, tmp_path / "pieces", quiet=True)
    chex.assert_trees_all_equal(pieces.params, whole.params)
    assert _facts(tmp_path / "pieces") == _facts(tmp_path / "whole")


@pytest.mark.parametrize(("grow", "compiles"), [(False, 1), (True, 3)])
def test_a_stage_compiles_once(tmp_path, monkeypatch, grow, compiles):
    """Shapes that differ between stages cost one compilation each, equal shapes share one."""
    schedule = (Stage(0, steps=4), Stage(1, steps=4, reset_optimizer=True), Stage(2, steps=4))
    make, traced = loop.make_step, []

    def make_counted(*arguments, **options):
        step = make(*arguments, **options)

        def counted(state, batch):
            traced.append(batch.thought_mask.shape)
            return step(state, batch)

        return counted

    monkeypatch.setattr(loop, "make_step", make_counted)
    result = train(experiment(schedule=schedule, grow=grow), tmp_path, quiet=True)
    assert (result.finished, result.compiles) == (True, compiles)
    assert len(traced) == len(set(traced)) == compiles


def test_frozen_parameters_are_a_program_of_their_own(tmp_path):
    schedule = (Stage(0, steps=2), Stage(0, steps=2, frozen=("^backbone/",)))
    first = train(experiment(schedule=schedule), tmp_path, quiet=True, stop_after_steps=2)
    kept = jax.device_get(first.params)
    result = train(experiment(schedule=schedule), tmp_path, quiet=True)
    assert result.compiles == 1
    chex.assert_trees_all_equal(result.params["backbone"], kept["backbone"])
    assert (np.asarray(result.params["method"]["out"]) != kept["method"]["out"]).all()


@pytest.mark.parametrize("bad_step", [0, 4])
def test_a_step_that_is_not_finite_ends_the_run_with_its_batch(tmp_path, bad_step):
    config = experiment(schedule=(Stage(0, steps=20),), poison_step=bad_step, checkpoint_every_steps=3)
    with pytest.raises(NonFinite, match=f"step {bad_step + 1} are not finite") as caught:
        train(config, tmp_path, quiet=True)
    # Step 3 was whole; a checkpoint after the bad step would be worthless.
    assert available_steps(tmp_path) == ([3] if bad_step else [])
    assert read_metrics(tmp_path, "event")[0]["event"] == "nonfinite"
    right = loop.prepare(config).training.batch(bad_step)
    with np.load(caught.value.batch_file) as saved:
        assert saved["step"] == bad_step + 1
        for name in ("question", "text", "loss_mask"):
            np.testing.assert_array_equal(saved[name], getattr(right, name))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    def send(step):
        if step == 5:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"step 5.*--resume {tmp_path}"):
        train(
            experiment(schedule=(Stage(0, steps=20),), checkpoint_every_steps=100), tmp_path, quiet=True, on_step=send
        )
    assert max(available_steps(tmp_path)) == 5
    assert signal.getsignal(number) is before


def test_a_run_of_another_config_is_left_alone(tmp_path):
    train(_curriculum(), tmp_path, quiet=True, stop_after_steps=1)
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match=r"another config(.|\n)*seed: 0 -> 1"):
        train(_curriculum(seed=1), tmp_path, quiet=True)
    assert _tree(tmp_path) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a run directory"):
        train(_curriculum(), tmp_path, quiet=True)
    assert list(_tree(tmp_path)) == ["thesis.txt"]


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(tmp_path, unbroken, capsys):
    train(_curriculum(ema=0.9), tmp_path, quiet=True, stop_after_steps=7)
    files = [file for file in (tmp_path / FOLDER / "7" / "rest").rglob("*") if file.is_file()]
    max(files, key=lambda file: file.stat().st_size).write_bytes(b"")
    result = train(_curriculum(ema=0.9), tmp_path, progress=False)
    assert "DAMAGED CHECKPOINT" in capsys.readouterr().out
    chex.assert_trees_all_equal(result.params, unbroken.params)
    assert _facts(tmp_path) == _facts(unbroken.run)


def test_init_from_takes_the_other_runs_parameters(tmp_path, unbroken):
    config = experiment(init_from=f"{unbroken.run}@{TOTAL}")
    prepared = loop.prepare(config)
    chex.assert_trees_all_equal(prepared.first_state().params, unbroken.params)
    result = train(config, tmp_path, quiet=True)
    assert result.finished
    noted = json.loads((tmp_path / "environment.json").read_text())["init_from"]
    assert noted["run"] == config.init_from
    assert len(noted["checksum"]) == 8


@pytest.mark.parametrize(
    ("source", "message"), [("nowhere", "is not a run directory"), ("{}@7", "checkpoint=7"), ("{}@x", "after '@'")]
)
def test_init_from_is_checked(unbroken, source, message):
    with pytest.raises((ValueError, OSError), match=message):
        loop.prepare(experiment(init_from=source.format(unbroken.run)))


def test_the_best_checkpoint_is_one_of_the_last_stage(tmp_path, monkeypatch):
    """Generation is scripted: the best accuracy falls into the first stage, where it does not count."""
    accuracies = iter([0.9, 0.8, 0.3, 0.5, 0.4])
    monkeypatch.setattr(
        "train.validate.Validator.__call__",
        lambda self, state, stage: (
            {"loss": 1.0, "token_accuracy": 0.0, "accuracy": next(accuracies)}
            | {"low": 0.0, "high": 1.0, "n": 1, "unparsable": 0}
        ),
    )
    train(_curriculum(keep=1, checkpoint_every_steps=100), tmp_path, quiet=True)  # validates at 3, 6, 9, 12, 14
    assert available_steps(tmp_path) == [6, 14]
    assert load_run(tmp_path, "best").step == 6


def test_validation_loss_is_the_mean_over_all_targets(tmp_path):
    result = train(experiment(noise=0.0), tmp_path, quiet=True)
    config = result.experiment
    examples = config.task.examples("valid", count=11, seed=0)
    codec = Codec(result.tokenizer, config.task.format)
    losses, targets = 0.0, 0
    for number, rows in enumerate((examples[:8], [*examples[8:], *examples[8:], *examples[8:10]])):
        rng = np.random.default_rng((0, 3, number))
        batch = config.method.encode(rows, codec, 0, rng)
        mask = batch.loss_mask.copy()
        mask[3 if number else 8 :] = False
        batch = jax.device_put(batch.replace(loss_mask=mask))
        loss, _ = config.method.loss(result.params, batch, jax.random.key(0), {"step": 0}, train=False)
        losses, targets = losses + float(loss) * mask.sum(), targets + mask.sum()
    np.testing.assert_allclose(read_metrics(tmp_path, "valid")[-1]["loss"], losses / targets, rtol=1e-5)


def test_the_saved_config_is_the_experiment(unbroken):
    loaded = load_config(unbroken.run / "config.json")
    assert loaded == unbroken.experiment
    assert isinstance(loaded.method, Bigram)
