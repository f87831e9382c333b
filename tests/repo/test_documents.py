"""The commands, links and paths that the documents name exist."""

import collections
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CONFIG_FILES = [f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py"))]
CONFIGS = "".join((ROOT / name).read_text() for name in CONFIG_FILES)
OUTSIDE = {".git", ".venv", ".cache", ".ruff_cache", ".pytest_cache", "runs", "dist", "build", "__pycache__"}
# Absolute paths of one machine. A letter before the slash makes it part of a URL or of a relative path.
MACHINE_PATH = re.compile(r"(?<![\w.~*-])/(?:work|tmp|home|root|Users|mnt|opt)/\w")


def commands(document: pathlib.Path) -> list[list[str]]:
    """The commands of a document's fenced bash blocks as words, without comments and settings of the environment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line), comments=True) for line in lines]
    return [words for words in split if words]


ALL = [(path.name, words) for path in DOCUMENTS for words in commands(path)]


def is_program(name: str) -> bool:
    """Whether `python -m name` runs something: a module, or a package with a main module."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return found is not None
    return importlib.util.find_spec(f"{name}.__main__") is not None


def test_readme_opens_with_the_two_commands():
    assert commands(ROOT / "README.md")[:2] == [["make", "quickstart"], ["make", "test"]]


@pytest.mark.parametrize(("document", "words"), ALL, ids=[f"{name}: {' '.join(words)}" for name, words in ALL])
def test_documented_command_exists(document, words):
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0].rpartition("/")[2] == "python":
        assert is_program(words[2]) if words[1] == "-m" else (ROOT / words[1]).is_file(), f"{document}: {words}"
        for word in words[2:]:
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), f"{document}: {word} does not exist"
            if run := re.fullmatch(r"runs/([\w-]+)-seed\d+", word):
                assert f'name="{run[1]}"' in CONFIGS, f"{document}: no config makes {word}"
    else:
        assert words[0] in {"git", ".venv/bin/pip"}, f"{document}: {words[0]} is no program of this repository"


@pytest.mark.parametrize("program", ["train", "eval"])
def test_documented_options_exist(program):
    """Every option that a document gives to a program is one that the program's help lists for the same config."""
    options = collections.defaultdict(set)
    for words in (words for _, words in ALL if words[1:3] == ["-m", program]):
        named = [words[3]] if words[3] in CONFIG_FILES else ["configs/coconut_hops.py"]
        options[tuple(named if program == "train" else [])] |= {word for word in words if word.startswith("--")}
    assert options
    for config, given in options.items():
        command = [sys.executable, "-m", program, *config, "--help"]
        result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert given <= set(re.findall(r"--[\w.-]+", result.stdout)), config


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_exist(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing


def test_every_document_is_reachable_from_the_readme():
    seen, open_documents = set(), [ROOT / "README.md"]
    while open_documents:
        document = open_documents.pop()
        if document in seen or not document.is_file():
            continue
        seen.add(document)
        targets = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", document.read_text())
        open_documents += [(document.parent / target).resolve() for target in targets if "://" not in target]
    assert set(DOCUMENTS) <= seen


def text_files():
    """The repository's own text files; generated and ignored folders are not entered."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(set(folders) - OUTSIDE)
        for path in (pathlib.Path(folder, name) for name in sorted(names)):
            # In a linked worktree .git is a file with a path in it.
            kept = path.suffix in {".py", ".md", ".toml", ".yaml", ".lock", ".json", ""} and path.name != ".git"
            if kept and path.is_file():
                yield path


def test_no_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found
