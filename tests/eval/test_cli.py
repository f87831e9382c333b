"""The evaluation program: what it writes, what it refuses, and the log of test-set uses."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from eval import cli
from eval.report import free_stem, log_test_use
from latentjax.rollout import Intervention
from tests.eval.fake import SLOTS, WIDTH, Echo, NumberTokenizer, known
from train.config import Experiment
from train.run import LoadedRun


@pytest.fixture
def run_folder(tmp_path, monkeypatch) -> Path:
    """A run of the method with known answers: right below 6, unparsable from 9 on, noise without thoughts."""
    folder = tmp_path / "known-seed0"
    folder.mkdir()

    def load(path: Path, checkpoint: str):
        if path != folder:
            raise FileNotFoundError(f"{path}: is not a run directory (it has no config.json)")
        if checkpoint not in ("last", "best", "7"):
            raise ValueError(f"checkpoint={checkpoint}: the steps are 7")
        method = known(right=6, wrong=9, needs=1)
        return LoadedRun(Experiment("known", Echo(), method), NumberTokenizer(), {}, 7)

    monkeypatch.setattr(cli, "load_run", load)
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    monkeypatch.setenv("COLUMNS", "200")
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_evaluation_writes_figures_predictions_and_a_plot(run_folder, capsys):
    assert cli.main([str(run_folder), "--count", "26", "--batch", "8"]) == 0
    assert files(run_folder) == {"eval/valid-last.json", "eval/valid-last.jsonl", "eval/valid-last.png"}
    saved = json.loads((run_folder / "eval/valid-last.json").read_text())
    assert (saved["split"], saved["checkpoint"], saved["step"], saved["count"]) == ("valid", "last", 7, 26)
    (result,) = saved["results"]
    assert (result["n"], result["correct"], result["unparsable"]) == (26, 12, 8)
    assert result["low"] < result["accuracy"] < result["high"]
    predictions = [json.loads(line) for line in (run_folder / "eval/valid-last.jsonl").read_text().splitlines()]
    assert len(predictions) == 26
    assert sum(p["reason"] == "right" for p in predictions) == 12
    out = capsys.readouterr().out
    assert "46.2" in out  # 12 of 26


def test_repeated_sampling_writes_every_text_and_logs_test_data(run_folder, capsys):
    arguments = [str(run_folder), "--count", "13", "--samples", "10", "--batch", "4", "--split", "test", "--seed", "5"]
    assert cli.main(arguments) == 0
    stem = "eval/test-last-samples10"
    assert files(run_folder) == {f"{stem}.json", f"{stem}.jsonl", "eval/test_uses.jsonl"}
    saved = json.loads((run_folder / f"{stem}.json").read_text())
    assert (saved["count"], saved["seed"], saved["requested_thoughts"]) == (13, 5, None)
    (result,) = saved["results"]
    assert (result["n"], result["samples"]) == (13, 10)
    assert [p["value"] for p in result["passes"]] == pytest.approx([6 / 13] * 2)  # all samples of a problem are equal
    lines = [json.loads(line) for line in (run_folder / f"{stem}.jsonl").read_text().splitlines()]
    assert [line["reasons"] for line in lines] == ["r" * 10] * 6 + ["w" * 10] * 3 + ["u" * 10] * 4
    assert "46.2" in capsys.readouterr().out


def test_given_blocks_go_to_all_samples_of_their_problem(run_folder, monkeypatch):
    def next_numbers(run, examples, blocks):
        value = np.zeros((len(examples), SLOTS, WIDTH), np.float32)
        value[:, :blocks, 0] = [[int(e.answer) + 1] for e in examples]
        where = np.tile(np.arange(SLOTS) < blocks, (len(examples), 1))
        return Intervention(where=where, value=value, add=np.zeros_like(value))

    monkeypatch.setattr(cli, "oracle", next_numbers)
    arguments = [str(run_folder), "--count", "5", "--samples", "3", "--batch", "2", "--oracle-blocks", "1"]
    assert cli.main(arguments) == 0
    lines = (run_folder / "eval/valid-last-oracle1-samples3.jsonl").read_text().splitlines()
    assert [json.loads(line)["texts"] for line in lines] == [[f"= {n + 1}"] * 3 for n in range(5)]


def test_earlier_results_stay_as_they_are(run_folder):
    arguments = [str(run_folder), "--count", "5"]
    assert cli.main(arguments) == 0
    first = (run_folder / "eval/valid-last.json").read_bytes()
    assert cli.main([*arguments, "--seed", "1"]) == 0
    assert (run_folder / "eval/valid-last.json").read_bytes() == first
    assert {"eval/valid-last-2.json", "eval/valid-last-2.jsonl", "eval/valid-last-2.png"} < files(run_folder)


def test_free_names_count_on(tmp_path):
    assert free_stem(tmp_path, "a") == "a"
    (tmp_path / "a.json").touch()
    (tmp_path / "a-2.jsonl").touch()  # predictions of an evaluation that was cut off
    assert free_stem(tmp_path, "a") == "a-3"


def test_the_curve_is_evaluated_and_the_best_number_comes_from_validation(run_folder):
    assert cli.main([str(run_folder), "--count", "13", "--forced-k", "4"]) == 0
    assert {"eval/valid-last-curve.json", "eval/valid-last-curve.png"} < files(run_folder)
    saved = json.loads((run_folder / "eval/valid-last-curve.json").read_text())
    assert [r["requested_thoughts"] for r in saved["results"]] == [0, 1, 2, 3, 4]
    assert [r["correct"] for r in saved["results"]] == [0, 6, 6, 6, 6]
    # Of equally accurate numbers the smallest.
    assert cli.main([str(run_folder), "--count", "13", "--split", "test", "--thoughts", "best"]) == 0
    assert "eval/test-last-k1.json" in files(run_folder)


def test_a_curve_on_test_data_chooses_nothing(run_folder, capsys):
    assert cli.main([str(run_folder), "--count", "13", "--split", "test", "--forced-k", "4"]) == 0
    before = files(run_folder)
    capsys.readouterr()
    assert cli.main([str(run_folder), "--count", "13", "--thoughts", "best"]) == cli.BAD_INPUT
    assert "no forced-k curve on valid at step 7" in capsys.readouterr().err
    assert files(run_folder) == before


def test_each_use_of_test_data_is_logged_before_it_happens(run_folder, monkeypatch):
    log = run_folder / "eval/test_uses.jsonl"
    assert cli.main([str(run_folder), "--count", "3"]) == 0
    assert not log.exists()
    assert cli.main([str(run_folder), "--count", "3", "--split", "test", "--thoughts", "2"]) == 0

    def fail(*_, **__):
        raise RuntimeError("cut off")

    monkeypatch.setattr(cli, "evaluate_split", fail)
    with pytest.raises(RuntimeError, match="cut off"):
        cli.main([str(run_folder), "--count", "4", "--split", "test", "--checkpoint", "best"])
    first, second = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["split"], first["checkpoint"], first["thoughts"]) == ("test", "last", [2])
    assert (second["checkpoint"], second["thoughts"], second["step"]) == ("best", [None], 7)
    assert second["command"].endswith("--count 4 --split test --checkpoint best")


def test_only_splits_named_test_are_logged(tmp_path):
    for split in ("valid", "train", "test", "generated_test", "test_shuffled"):
        log_test_use(tmp_path, split=split, checkpoint="last", step=1, thoughts=None, command="")
    lines = (tmp_path / "eval/test_uses.jsonl").read_text().splitlines()
    assert [json.loads(line)["split"] for line in lines] == ["test", "generated_test", "test_shuffled"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["split=test"], r"'split=test': write --split test"),
        (["forced_k=3"], r"write --forced-k 3"),
        (["--splt", "test"], r"--split"),
        (["--batch", "many"], r"--batch"),
        (["--split", "dev"], r"split='dev': Echo has the splits train, valid, test"),
        (["--count", "0"], r"count=0"),
        ([], r"count=None: valid of Echo is generated"),
        (["--batch", "0"], r"batch=0"),
        (["--count", "3", "--checkpoint", "12"], r"checkpoint=12: the steps are 7"),
        (["--count", "3", "--thoughts", "9"], r"thoughts=9: this Known has at most 4"),
        (["--count", "3", "--forced-k", "9"], r"thoughts=9"),
        (["--count", "3", "--forced-k", "-1"], r"forced_k=-1"),
        (["--count", "3", "--thoughts", "1", "--forced-k", "2"], r"give one of them"),
        (["--count", "3", "--samples", "0"], r"samples=0"),
        (["--count", "3", "--samples", "2", "--forced-k", "1"], r"samples=2: goes with one number of thoughts"),
        (["--count", "3", "--samples", "2", "--device-time"], r"samples=2: goes with .* without device_time"),
        (["--count", "3", "--temperature", "-1"], r"temperature=-1.0"),
        (["--count", "3", "--top-p", "0"], r"top_p=0.0"),
        (["--count", "3", "--sampler.steps", "4"], r"sampler=\{'steps': 4\}: Known has no sampler"),
        (["--count", "3", "--sampler.repulsion", "0.3"], r"sampler\.repulsion=0\.3: .*give --samples"),
        (["--count", "3", "--oracle-blocks", "1"], r"oracle_blocks=1: Known has no encoder .*; LaDiR has"),
        (["elsewhere", "--count", "3"], r"elsewhere: is not a run directory"),
    ],
)
def test_bad_input_is_one_screen_and_leaves_the_disk_alone(run_folder, capsys, arguments, named):
    before = files(run_folder)
    try:
        code = cli.main([str(run_folder), *arguments])
    except SystemExit as leaving:  # tyro's own errors
        code = leaving.code
    captured = capsys.readouterr()
    assert code == cli.BAD_INPUT
    assert re.search(named, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) <= 24
    assert files(run_folder) == before


def test_no_runs_at_all(capsys):
    assert cli.main([]) == cli.BAD_INPUT
    assert "name at least one run directory" in capsys.readouterr().err


def test_runs_are_compared_pairwise_and_over_seeds(run_folder, tmp_path, monkeypatch, capsys):
    load = cli.load_run

    def two(path: Path, checkpoint: str):
        run = load(run_folder, checkpoint=checkpoint)
        if path.name != "other":
            return run
        experiment = dataclasses.replace(run.experiment, seed=1, method=known(right=13))
        return dataclasses.replace(run, experiment=experiment)

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(cli, "load_run", two)
    assert cli.main([str(run_folder), str(tmp_path / "other"), "--count", "13"]) == 0
    out = capsys.readouterr().out
    assert "0.016" in out  # 7 problems that only the second solves: 2 * 2^-7
    assert "73.1 ± 26.9 %" in out  # 6/13 and 13/13
