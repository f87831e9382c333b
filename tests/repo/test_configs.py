"""Every config says what it promises, and its plan can be made without training."""

import ast
import dataclasses
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from latentjax.methods import LaDiR, Method, ThoughtVAE
from latentjax.thoughts import vae
from tests.train.published import write_description, write_model
from train import cli
from train.config import Experiment, Mesh, Pretrained
from train.loop import train
from train.prepare import prepare
from train.state import parameter_paths
from train.step import make_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PRETRAINED = [path for path in CONFIGS if "pretrained=" in path.read_text()]
FIELDS = ("Paper", "Hardware", "Time", "Expected", "Command")


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_is_a_promise(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    missing = [field for field in FIELDS if not re.search(rf"^{field}: *\S", docstring, flags=re.MULTILINE)]
    assert not missing, f"{path.name}: the docstring has no line that starts with {missing}"
    assert f"configs/{path.name}" in docstring, f"{path.name}: Command names another file"


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in PRETRAINED], ids=lambda path: path.stem)
def test_plan_can_be_made(path, tmp_path):
    """`--dry-run` builds the task, the method and the shapes, prints the plan, and leaves no run behind."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "train", str(path.relative_to(ROOT)), "--dry-run", "--run", str(run)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "LATENTJAX_DATA" in result.stderr:
        pytest.skip(f"published data absent: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "steps" in result.stdout
    assert not run.exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_arms_have_names_of_their_own_and_start_from_each_other(path):
    defined = runpy.run_path(str(path))
    arms = [defined["arm"](name) for name in defined.get("ARMS", ())]
    runs = {f"runs/{arm.name}-seed{arm.seed}": arm for arm in arms}
    assert len(runs) == len(arms)
    for arm in arms:
        for role, source in arm.starts.items():
            assert source in runs, f"{path.name}: {arm.name} starts from {source}, which is no arm's run"
            if role is not None:
                assert type(runs[source].method) is type(arm.method.parts()[role])


# Configs that start from published weights. The tokenizers of the tests know few words, so a text has more tokens.

MORE_TOKENS = ("--method.lengths.question", "512", "--method.lengths.text", "300")


def _published_vocabulary(config: Experiment) -> int:
    """Tokens of the published tokenizer: those of the config without the method's special tokens."""
    backbone = config.method.backbone
    return (backbone.vocab_used or backbone.vocab_size) - len(config.method.special_tokens())


def _arms() -> list:
    """(file, arm) of all of them; those that are not the file's `config` are slow."""
    cases = []
    for path in PRETRAINED:
        defined = runpy.run_path(str(path))
        arms = {name: defined["arm"](name) for name in defined.get("ARMS", ())} or {None: defined["config"]}
        for name, config in arms.items():
            marks = () if config == defined["config"] else pytest.mark.slow
            cases.append(pytest.param(path, name, marks=marks, id=f"{path.stem}-{name}" if name else path.stem))
    return cases


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_plan_from_published_weights_can_be_made(path, tmp_path, monkeypatch, capsys, published):
    """`--dry-run` at full size: shapes and shardings of the model that the hub has, a folder without weights in its place."""
    monkeypatch.setenv("LATENTJAX_DATA", str(published))
    config = runpy.run_path(str(path))["config"]
    size = _published_vocabulary(config)
    theirs = dataclasses.replace(config.method.backbone, vocab_size=size, vocab_used=None, lora=None)
    write_description(tmp_path / "model", theirs)
    few = ("--train-examples", str(config.batch_size), "--valid-examples", "4", "--method.backbone.scan-layers", "True")
    run = tmp_path / "run"
    words = [
        str(path),
        "--dry-run",
        "--run",
        str(run),
        "--pretrained.path",
        str(tmp_path / "model"),
        *MORE_TOKENS,
        *few,
    ]
    assert cli.main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert f"effective batch {config.effective_batch} examples" in shown
    assert not run.exists()
    assert cli.main([*words, "--batch-size", "32"]) == cli.BAD_INPUT
    assert f"effective_batch={config.effective_batch}" in capsys.readouterr().err


@pytest.mark.parametrize(("path", "arm"), _arms())
def test_a_step_from_published_weights_at_reduced_size(path, arm, tmp_path, monkeypatch, published):
    """One optimiser step with the arm's own method, optimiser and tuning, on a narrow model of one layer."""
    monkeypatch.setenv("LATENTJAX_DATA", str(published))
    monkeypatch.setattr(vae, "ACTIVE_VARIANCE", 1e-12)  # a VAE of one step hardly tells one block from another
    config = _startable(path, arm, tmp_path)
    prepared = prepare(config)
    state, batch = prepared.first_state(), prepared.training.batch(0)
    before = jax.device_get(state.params)
    new, metrics = jax.jit(make_step(config, prepared.plan.total_steps))(state, batch)
    assert metrics["finite"] == 1
    # Random weights know nothing: the loss on tokens is near that of guessing, log V.
    tokens = next(metrics[name] for name in ("reconstruction", "answer", "loss") if name in metrics)
    assert abs(float(tokens) - np.log(config.method.backbone.vocab_used)) < 1.0
    still = {}
    for name, old, now in zip(
        parameter_paths(before), *map(jax.tree.leaves, (before, jax.device_get(new.params))), strict=True
    ):
        still[name] = (old == now).all()
        # A loss that the config leaves out gives no gradient, and decay moves nothing that is zero.
        idle = not old.any()
        trains = not any(re.search(pattern, name) for pattern in config.untrained)
        assert still[name] or trains, name
        assert not still[name] or idle or not trains or config.tuning != "full", name
    assert not all(still.values())


def _startable(path: pathlib.Path, arm: str | None, folder: pathlib.Path) -> Experiment:
    """An arm at reduced size. The runs that it starts from are made first, of one step: of the arms of the same file whose
    default run directories it names."""
    config = cli.load_config_file(str(path), arm)

    def made(source: str) -> str:
        others = [cli.load_config_file(str(path), name) for name in runpy.run_path(str(path))["ARMS"]]
        [name] = [other.name for other in others if f"runs/{other.name}-seed{other.seed}" == source]
        if not (folder / name).exists():
            train(_startable(path, name.rpartition("-")[2], folder), folder / name, quiet=True, stop_after_steps=1)
        return str(folder / name)

    start = {role: made(source) for role, source in config.starts.items()}
    return dataclasses.replace(_reduced(config, folder / "model"), init_from=start.get(None, start) or None)


def _narrow(method: Method) -> Method:
    """`method` on one narrow layer, with room for the many tokens of a text."""
    backbone = dataclasses.replace(
        method.backbone, width=16, layers=1, heads=2, kv_heads=None, head_dim=8, mlp_width=24, vocab_size=384,
        vocab_used=320 + len(method.special_tokens()),
    )  # fmt: skip
    changes = {"backbone": backbone, "lengths": dataclasses.replace(method.lengths, question=512, text=300)}
    if isinstance(method, ThoughtVAE):
        changes["latent_width"] = 8
    if isinstance(method, LaDiR):
        changes["vae"] = _narrow(method.vae)
    return dataclasses.replace(method, **changes)


def _reduced(config: Experiment, folder: pathlib.Path) -> Experiment:
    """`config` from a folder of random weights of one narrow layer, with few examples in as many microbatches as it has."""
    method, source = _narrow(config.method), config.pretrained
    if not folder.exists():
        published = {"lora": None, "param_dtype": "float32", "vocab_size": 320, "vocab_used": None}
        write_model(folder, dataclasses.replace(method.backbone, **published))
    return dataclasses.replace(
        config, method=method, mesh=Mesh(data=1),
        pretrained=None if source is None else Pretrained(str(folder), new_row=source.new_row),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
        batch_size=2 * config.accumulate, effective_batch=None, train_examples=8, valid_examples=2,
    )  # fmt: skip
