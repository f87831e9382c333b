"""The quickstart at a few steps an arm: what it writes, and what it refuses."""

import json
import math

import pytest

from configs.quickstart import ARMS, STAGE_STEPS, arm
from eval import quickstart
from latentjax.metrics import wilson
from train.cli import BAD_INPUT

FIELDS = {
    "method", "seed", "n", "correct", "accuracy", "low", "high", "unparsable", "forwards", "positions",
    "seconds_per_problem_batch1", "seconds_per_problem",
}  # fmt: skip


def few_steps(name: str, seed: int):
    return arm(name, seed, (2, 1, 1, 1, 1))


def test_all_arms_train_equally_long_on_the_same_problems():
    experiments = [arm(name) for name in ARMS]
    assert {sum(stage.steps for stage in e.method.stages()) for e in experiments} == {sum(STAGE_STEPS)}
    for field in ("task", "optimizer", "batch_size", "train_examples", "seed"):
        assert len({getattr(e, field) for e in experiments}) == 1, field
    assert len({e.method.backbone for e in experiments}) == 1
    assert not any(s.reset_optimizer or s.reset_optimizer_every_epoch for e in experiments for s in e.method.stages())


def test_it_writes_results_controls_plots_and_the_log(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    arguments = ["--folder", str(folder), "--count", "40", "--only", "nocot", "Coconut"]
    assert quickstart.main(arguments, few_steps) == 0
    records = json.loads((folder / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in records] == [("NoCoT", 0), ("Coconut", 0)]
    for record in records:
        assert set(record) == FIELDS
        assert record["n"] == 40
        assert record["accuracy"] == record["correct"] / 40
        assert (record["low"], record["high"]) == wilson(record["correct"], 40)
        assert 0 <= record["unparsable"] <= 40 - record["correct"]
        for field in ("forwards", "positions", "seconds_per_problem", "seconds_per_problem_batch1"):
            assert math.isfinite(record[field])
            assert record[field] > 0
    # Ten values, the start and the start marker; then, for Coconut, four thoughts; then at least one token.
    assert records[0]["positions"] >= 12
    assert records[1]["positions"] >= 12 + 4
    (controls,) = json.loads((folder / "controls.json").read_text())
    assert [point["thoughts"] for point in controls["forced_thoughts"]] == [0, 1, 2, 3, 4]
    assert {"clean", "zeroed", "swapped", "donor", "spelled"} < set(controls)
    for plot in ("accuracy", "training", "forced_thoughts", "thoughts"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    uses = [json.loads(line) for line in (folder / "Coconut-seed0/eval/test_uses.jsonl").read_text().splitlines()]
    assert [use["thoughts"] for use in uses] == [None, "clean, zeroed, swapped"]
    out = capsys.readouterr().out
    assert "What these figures do not show" in out
    assert "Next:" in out

    # Once more: nothing is trained, the earlier results stay under another name.
    trained = (folder / "NoCoT-seed0/metrics.jsonl").read_bytes()
    before = (folder / "results.json").read_bytes()
    assert quickstart.main(["--folder", str(folder), "--count", "40", "--only", "NoCoT"], few_steps) == 0
    assert (folder / "NoCoT-seed0/metrics.jsonl").read_bytes() == trained
    assert (folder / "results-2.json").read_bytes() == before
    assert len(json.loads((folder / "results.json").read_text())) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "Cocnut"], "only='Cocnut': the arms are NoCoT, CoT, Pause, Coconut"),
        (["seeds=1"], "write --seeds 1"),
        (["--seeds", "-1"], "seeds="),
        (["--count", "1"], "count=1"),
    ],
)
def test_bad_input_trains_nothing(tmp_path, capsys, arguments, named):
    folder = tmp_path / "quickstart"
    assert quickstart.main([*arguments, "--folder", str(folder)], few_steps) == BAD_INPUT
    assert named in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_with_other_runs_is_refused(tmp_path, capsys):
    (tmp_path / "NoCoT-seed0").mkdir()
    (tmp_path / "NoCoT-seed0" / "letter.txt").write_text("mine")
    assert quickstart.main(["--only", "NoCoT", "--folder", str(tmp_path)], few_steps) == BAD_INPUT
    assert "is not a run directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["NoCoT-seed0", "letter.txt"]
