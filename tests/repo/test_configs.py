"""Every config says what it promises, and its plan can be made without training."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
FIELDS = ("Paper", "Hardware", "Time", "Expected", "Command")


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_is_a_promise(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    missing = [field for field in FIELDS if not re.search(rf"^{field}: *\S", docstring, flags=re.MULTILINE)]
    assert not missing, f"{path.name}: the docstring has no line that starts with {missing}"
    assert f"configs/{path.name}" in docstring, f"{path.name}: Command names another file"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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
