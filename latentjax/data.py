"""Published data files: where they come from, how they are found and checked, and readers that say what is malformed.

Files are read in place and never changed. Each is looked for in the folder named by the environment variable
`LATENTJAX_DATA`, in `shared/data` beside the checkout, and in the user's cache folder
(`$XDG_CACHE_HOME/latentjax/data`, by default under `~/.cache`); a file that is nowhere is downloaded into the cache
from its public source."""

import dataclasses
import hashlib
import json
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
_RAW = "https://raw.githubusercontent.com/"
_TIMEOUT = 30  # seconds


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A published file: SHA-256 of its bytes, public address (None: derived, see `note`) and licence."""

    sha256: str
    url: str | None
    licence: str
    note: str = ""


FILES: Mapping[str, PublishedFile] = {
    "prosqa_valid.json": PublishedFile(
        "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249",
        _RAW + "facebookresearch/coconut/main/data/prosqa_valid.json",
        "MIT",
    ),
    "prosqa_test.json": PublishedFile(
        "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680",
        _RAW + "facebookresearch/coconut/main/data/prosqa_test.json",
        "MIT",
    ),
    "prosqa_valid_graph_4_coconut.json": PublishedFile(
        "f444aa99112907b5b989188a8b44be7609fdfe30fd5caac4e2840234a82bad65",
        _RAW + "Ber666/reasoning-by-superposition/main/data/prosqa_valid_graph_4_coconut.json",
        "MIT",
    ),
    "prosqa_test_graph_4_coconut.json": PublishedFile(
        "584083aebf7ee583308d56a909d7e62bd560ad9acd0bf0a1dec514bff9143267",
        _RAW + "Ber666/reasoning-by-superposition/main/data/prosqa_test_graph_4_coconut.json",
        "MIT",
    ),
    "prosqa_test_graph_4_shuffled_with_bfs.json": PublishedFile(
        "36ef225a8d8c2f25be94af778a31e984349ce2eae2475f808726ff73e90e5d13",
        _RAW + "Ber666/emergence-of-superposition/main/data/prosqa_test_graph_4_coconut_shuffled_with_bfs.json",
        "MIT",
        "the public file name is prosqa_test_graph_4_coconut_shuffled_with_bfs.json",
    ),
    "gsm8k_aug_valid.txt": PublishedFile(
        "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87",
        _RAW + "da03/Internalize_CoT_Step_by_Step/main/data/gsm8k/valid.txt",
        "MIT",
        "the public file name is valid.txt",
    ),
    "gsm8k_aug_test.txt": PublishedFile(
        "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8",
        _RAW + "da03/Internalize_CoT_Step_by_Step/main/data/gsm8k/test.txt",
        "MIT",
        "the public file name is test.txt",
    ),
    "gsm8k_train_equations.txt": PublishedFile(
        "d5af780ed73f0468193cf7b7086a7746134eeecab0b7c7502f8847847afdad40",
        None,
        "MIT",
        "derived from train.jsonl of openai/grade-school-math: 6,884 questions with their <<..>> annotations",
    ),
}


def locate(name: str) -> pathlib.Path:
    """The path of the published file `name`, downloaded if it is in none of the folders; its checksum is verified.

    Raises KeyError for a name that is not in `FILES`, FileNotFoundError if the file cannot be had (the message says how
    to supply it) and ValueError if a file has another checksum (expected and found are named, the file is left as it
    is)."""
    if name not in FILES:
        raise KeyError(f"published file {name!r} is unknown; known: {', '.join(FILES)}")
    for folder in _folders():
        path = folder / name
        if path.is_file():
            _check(path.read_bytes(), FILES[name].sha256, str(path))
            return path
    return _download(name)


def _folders() -> list[pathlib.Path]:
    """Where published files may lie, in order."""
    named = os.environ.get("LATENTJAX_DATA")
    if named and not pathlib.Path(named).is_dir():
        raise FileNotFoundError(f"LATENTJAX_DATA={named!r} is not a folder")
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    return [*([pathlib.Path(named)] if named else []), beside, _cache()]


def _cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "latentjax" / "data"


def _check(content: bytes, expected: str, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{where} is not the published file: SHA-256 is {found}, expected {expected}. It was left as it is; "
            "move it away, or set LATENTJAX_DATA to a folder with the published file."
        )


def _download(name: str) -> pathlib.Path:
    """Fetch `name` into the cache folder; nothing is written unless the checksum is right."""
    file = FILES[name]
    advice = f"put it into a folder and set LATENTJAX_DATA to that folder. {file.note}".strip()
    if file.url is None:
        raise FileNotFoundError(f"{name} is not in {', '.join(map(str, _folders()))} and has no download; {advice}")
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        looked = ", ".join(map(str, _folders()))
        raise FileNotFoundError(
            f"{name} is not in {looked} and {file.url} cannot be read ({error}); download it elsewhere, {advice}"
        ) from error
    _check(content, file.sha256, file.url)
    path = _cache() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)  # atomic: another process never sees half a file
    return path


def read_lines(path: pathlib.Path, parse: Callable[[str], _T]) -> list[_T]:
    """`parse` of every line of a UTF-8 text file. A ValueError of `parse` is raised again with file and line number; so
    are an empty line inside the file and an empty file."""
    text = path.read_text(encoding="utf-8")
    lines = text.removesuffix("\n").split("\n")  # not splitlines: the data hold other Unicode line separators
    if not text.strip():
        raise ValueError(f"{path} is empty")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.strip():
                raise ValueError("the line is empty")
            parsed.append(parse(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error} (line: {line[:80]!r})") from error
    return parsed


def read_records(path: pathlib.Path, fields: Mapping[str, type], parse: Callable[[dict[str, Any]], _T]) -> list[_T]:
    """`parse` of every object of a JSON list, each of which must have `fields` with values of these types.

    Raises ValueError with the file and the line of a JSON error, or the index of the record and the field that is
    missing or of another type; a ValueError of `parse` is raised again with file and index."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a JSON list with at least one record, found {type(records).__name__}")
    parsed = []
    for index, record in enumerate(records):
        try:
            _check_fields(record, fields)
            parsed.append(parse(record))
        except ValueError as error:
            raise ValueError(f"{path}: record {index}: {error}") from error
    return parsed


def _check_fields(record: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    for field, kind in fields.items():
        if field not in record:
            raise ValueError(f"field {field!r} is missing")
        if not isinstance(record[field], kind) or isinstance(record[field], bool):
            raise ValueError(f"field {field!r} is {type(record[field]).__name__}, expected {kind.__name__}")


def first(examples: list[_T], count: int | None, split: str) -> list[_T]:
    """The first `count` examples of a published split (all if None). Raises ValueError if it has fewer, or for count <
    1."""
    if count is not None and not 1 <= count <= len(examples):
        raise ValueError(f"count={count}: the published split {split!r} has {len(examples)} examples")
    return examples if count is None else examples[:count]
