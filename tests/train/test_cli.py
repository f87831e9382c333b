import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from latentjax.checkpoint import available_steps
from train import cli
from train.log import TIMING, read_metrics
from train.run import load_run

CONFIG = """
from latentjax.backbone.config import tiny
from latentjax.methods.base import Lengths
from latentjax.methods.coconut import Coconut
from latentjax.tasks.successor_list import SuccessorList
from train.config import Experiment, Mesh, Optimizer

config = Experiment(
    name="sample",
    task=SuccessorList(hops=2),
    method=Coconut(
        tiny(14, width=16, layers=1, heads=2, max_positions=32), Lengths(12, 5),
        max_latent_stage=2, stage_steps=(5, 5, 10), markers="start", reset_optimizer="stage",
    ),
    optimizer=Optimizer(learning_rate=1e-2),
    mesh=Mesh(data=1),
    batch_size=8, train_examples=64, valid_examples=16,
    validate_every=10, validate_unit="steps", log_every=1, checkpoint_every_steps=3,
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with one config file, sample.py."""
    (tmp_path / "sample.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)  # the tests have their own
    return tmp_path


def _tree(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def _run(*words):
    try:
        return cli.main(words)
    except SystemExit as exit:
        return exit.code


BAD = {
    "no config file": (["smaple.py"], "sample.py"),
    "flag before config": (["--seed", "1"], "the config file comes first"),
    "assignment": (["sample.py", "seed=1"], "write --seed 1"),
    "nested assignment": (["sample.py", "optimizer.learning_rate=1"], "write --optimizer.learning-rate 1"),
    "unknown field": (["sample.py", "--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
    "unknown method field": (["sample.py", "--method.c-thoughts", "1"], "--method.c-thought"),
    "wrong type": (["sample.py", "--batch-size", "many"], "--batch-size"),
    "wrong choice": (["sample.py", "--optimizer.schedule", "sine"], "linear"),
    "impossible shape": (["sample.py", "--method.backbone.heads", "3"], "width=16 is not a multiple of heads=3"),
    "impossible batch": (["sample.py", "--batch-size", "9", "--accumulate", "2"], "accumulate=2"),
    "small batch": (["sample.py", "--batch-size", "128"], "train_examples=64"),
    "mesh": (["sample.py", "--mesh.data", "3"], "batch_size=8"),
    "devices": (["sample.py", "--mesh.data", "99"], "devices"),
    "zero examples": (["sample.py", "--train-examples", "0"], "train_examples=0"),
    "zero validation": (["sample.py", "--valid-examples", "0"], "valid_examples=0"),
    "unknown split": (["sample.py", "--valid-split", "dev"], "train, valid, test"),
    "test split": (["sample.py", "--valid-split", "test"], "valid_split='test'"),
    "vocabulary": (["sample.py", "--method.backbone.vocab-size", "12"], "vocab_size=12.*14 tokens"),
    "long prompt": (["sample.py", "--method.lengths.question", "10"], "12"),
    "long text": (["sample.py", "--method.lengths.text", "3"], "3"),
    "context": (["sample.py", "--method.backbone.max-positions", "18"], "max_positions=18"),
    "more thoughts than positions": (["sample.py", "--method.c-thought", "10"], "20 thoughts.*max_positions=32"),
    "warm-up": (["sample.py", "--optimizer.warmup-steps", "20"], "warmup_steps=20"),
    "init_from": (["sample.py", "--init-from", "elsewhere"], "init_from='elsewhere'"),
    "resume nothing": (["--resume"], "name the run directory"),
    "resume no run": (["--resume", "."], "is not a run directory"),
    "run is a file": (["sample.py", "--run", "sample.py"], "is not a run directory"),
    "no steps": (["sample.py", "--stop-after-steps", "0"], "must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_screen_and_changes_nothing(case, folder, capsys, monkeypatch):
    monkeypatch.setattr("train.loop.open_run", lambda *a, **k: pytest.fail("the run was opened"))
    words, message = BAD[case]
    before = _tree(folder)
    assert _run(*words) == cli.BAD_INPUT
    output = capsys.readouterr()
    shown = output.out + output.err
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())), shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 24
    assert _tree(folder) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 1", "config is int"),
        ("x = (", r"bad\.py:1"),
        ("import nothing_here", "nothing_here"),
        ("from train.config import Experiment\nconfig = Experiment(name='a')", "missing"),
        ("from train.config import Optimizer\nOptimizer(b1=2.0)", r"optimizer\.b1=2"),
    ],
)
def test_a_bad_config_file_is_named(text, message, folder, capsys):
    (folder / "bad.py").write_text(text)
    assert _run("bad.py") == cli.BAD_INPUT
    shown = capsys.readouterr().err
    assert "bad.py" in shown
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "missing.txt"), ("one||<<1+2=3>> #### 3\nno bars here\n", r"missing\.txt:2")],
)
def test_a_missing_or_malformed_task_file_is_named(content, message, folder, capsys):
    text = CONFIG.replace("SuccessorList(hops=2)", "GSM8K(train_file='missing.txt')")
    (folder / "gsm.py").write_text("from latentjax.tasks.gsm8k import GSM8K\n" + text)
    if content is not None:
        (folder / "missing.txt").write_text(content)
    before = _tree(folder)
    assert _run("gsm.py", "--method.backbone.vocab-size", "500") == cli.BAD_INPUT
    shown = capsys.readouterr().err
    assert re.search(message, shown), shown
    assert _tree(folder) == before


def test_help_lists_fields_of_method_and_task(folder, capsys):
    assert _run("sample.py", "--help") == 0
    shown = capsys.readouterr().out
    for field in ("--method.c-thought", "--task.hops", "--optimizer.learning-rate", "--run", "--dry-run"):
        assert field in shown


def test_overrides_reach_method_task_and_optimiser(folder):
    experiment, program = cli.parse(
        ["sample.py", "--method.c-thought", "2", "--task.hops", "3", "--optimizer.b2", "0.5", "--run", "x"]
    )
    assert (experiment.method.c_thought, experiment.task.hops, experiment.optimizer.b2) == (2, 3, 0.5)
    assert program.run == pathlib.Path("x")
    assert experiment.method.markers == "start"  # what the file says stays


def test_a_value_may_contain_an_equals_sign(folder):
    assert cli.parse(["sample.py", "--name", "a=b"])[0].name == "a=b"


def test_a_dry_run_prints_the_plan_and_touches_nothing(folder, capsys):
    before = _tree(folder)
    assert _run("sample.py", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "effective batch 8" in shown
    assert "stage 2 (index 2): steps 10 to 20, optimiser reset" in shown
    assert _tree(folder) == before


def test_a_run_from_the_command_line_in_two_pieces(folder, capsys):
    assert _run("sample.py", "--stop-after-steps", "12") == 0
    assert "sample-seed0" in capsys.readouterr().out
    assert _run("sample.py", "--seed", "1", "--run", "runs/sample-seed0") == cli.BAD_INPUT
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert _run("--resume", "runs/sample-seed0") == 0
    assert load_run("runs/sample-seed0").step == 20
    valid = read_metrics(pathlib.Path("runs/sample-seed0"), "valid")
    assert [(record["step"], record["n"]) for record in valid] == [(10, 16), (20, 16)]
    assert all(record["low"] <= record["accuracy"] <= record["high"] for record in valid)
    assert load_run("runs/sample-seed0", "best").step == 20  # step 10 was of an earlier stage


# The first terminal that the leader of a session opens becomes the one whose loss it is told of.
TAKE_TERMINAL = (
    "-c",
    "import os, sys; os.open(os.ttyname(0), os.O_RDWR);"
    "os.execv(sys.executable, [sys.executable, '-m', 'train', *sys.argv[1:]])",
)


def _start(folder, *words, program=("-m", "train"), **options):
    """The program in a process of its own."""
    root = pathlib.Path(cli.__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, *program, *words], cwd=folder, env=environment, **options)


def _wait_for_step(process, run, step, seconds=300):
    deadline = time.monotonic() + seconds
    while not any(record["step"] >= step for record in read_metrics(run, "train")):
        assert process.poll() is None, "the program ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_resumes_bit_for_bit(folder):
    """SIGKILL leaves no time for anything; the checkpoints that are whole must do."""
    long = ["sample.py", "--method.stage-steps", "5", "60", "60"]
    assert _start(folder, *long, "--run", "whole", stdout=subprocess.DEVNULL).wait() == 0
    process = _start(folder, *long, "--run", "killed", stdout=subprocess.DEVNULL)
    _wait_for_step(process, folder / "killed", 8)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert max(available_steps(folder / "killed"), default=0) < 125
    assert _start(folder, *long, "--run", "killed", stdout=subprocess.DEVNULL).wait() == 0
    whole, resumed = load_run(folder / "whole"), load_run(folder / "killed")
    assert whole.step == resumed.step == 125
    chex.assert_trees_all_equal(resumed.params, whole.params)
    facts = [
        [{k: v for k, v in r.items() if k != TIMING} for r in read_metrics(folder / name)]
        for name in ("whole", "killed")
    ]
    assert facts[0] == facts[1]


def test_a_lost_terminal_leaves_a_checkpoint(folder):
    """The kernel sends SIGHUP when the terminal goes, and whatever is printed afterwards fails."""
    outer, inner = pty.openpty()
    long = ["sample.py", "--method.stage-steps", "5", "5", "4000", "--checkpoint-every-steps", "9000"]
    process = _start(
        folder, *long, "--run", "lost", program=TAKE_TERMINAL, stdin=inner, stdout=inner, stderr=inner,
        start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    _wait_for_step(process, folder / "lost", 15)
    os.close(outer)
    assert process.wait(timeout=300) == cli.INTERRUPTED
    records = read_metrics(folder / "lost", "train")
    assert max(available_steps(folder / "lost")) == records[-1]["step"]
    assert np.isfinite(records[-1]["loss"])


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(folder):
    long = ["sample.py", "--method.stage-steps", "5", "5", "4000", "--checkpoint-every-steps", "9000"]
    process = _start(folder, *long, "--run", "stopped", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for_step(process, folder / "stopped", 15)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == cli.INTERRUPTED
    assert "continue with: python -m train --resume stopped" in errors
    assert "Traceback" not in errors
    step = max(available_steps(folder / "stopped"))
    assert _start(folder, "--resume", "stopped", "--stop-after-steps", "1", stdout=subprocess.DEVNULL).wait() == 0
    assert max(available_steps(folder / "stopped")) == step + 1


def test_a_step_that_is_not_finite_has_its_own_exit_code(folder, capsys):
    assert _run("sample.py", "--optimizer.learning-rate", "1e38") == cli.NOT_FINITE
    shown = capsys.readouterr().err
    assert "are not finite; its batch is in" in shown
    assert list(folder.glob("runs/sample-seed0/nonfinite-step-*.npz"))
