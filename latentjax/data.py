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
from collections.abc import Callable, Mapping, Sequence
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
    "math/gsm8k_train.jsonl": PublishedFile(
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        _RAW + "openai/grade-school-math/master/grade_school_math/data/train.jsonl",
        "MIT",
        "the public file name is train.jsonl",
    ),
    "math/gsm8k_test.jsonl": PublishedFile(
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        _RAW + "openai/grade-school-math/master/grade_school_math/data/test.jsonl",
        "MIT",
        "the public file name is test.jsonl",
    ),
    "countdown/cd3_test.jsonl": PublishedFile(
        "14f727ff203f34f7ddcc05108c95f06414ff1baaa6f8e268c6c72699ec08e389",
        _RAW + "DreamLM/Dream/main/eval/data/cd3_test.jsonl",
        "Apache-2.0",
    ),
    "countdown/cd4_test.jsonl": PublishedFile(
        "c55f37ac962491a1bd9372885827297d22378dcdbb962392dad0747828b2fd39",
        _RAW + "DreamLM/Dream/main/eval/data/cd4_test.jsonl",
        "Apache-2.0",
    ),
    "countdown/cd5_test.jsonl": PublishedFile(
        "a032617b369385373040e68e4c003bb143894ade669a0da2f0ad1f78e85e2eef",
        _RAW + "DreamLM/Dream/main/eval/data/cd5_test.jsonl",
        "Apache-2.0",
    ),
    "countdown/cd3_train.jsonl.gz": PublishedFile(
        "0005c1c1f5081be3de401193acd43771d772a75106a10b665c0bf401e8d0d493",
        None,
        "Apache-2.0",
        "regenerated with the procedure of kanishkg/stream-of-search, seed 3: continued, it draws cd3_test.jsonl",
    ),
    "countdown/cd4_train.jsonl.gz": PublishedFile(
        "b0b4089c192267e928f93559a1f6a2078cf63182a92ac5572a27ee0518adc088",
        None,
        "Apache-2.0",
        "regenerated with the procedure of kanishkg/stream-of-search, seed 4: continued, it draws cd4_test.jsonl",
    ),
    "sudoku4x4/sudoku_4x4_4.jsonl": PublishedFile(
        "e31e11b8af41745fe369ab518c408787d94c720bfa1ce1399e78fb8f3410f9a3",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_4.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_5.jsonl": PublishedFile(
        "7fd5682cd53466ce463d6ec51145832eb7fded72a198fce7b658eb747c5e25c5",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_5.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_6.jsonl": PublishedFile(
        "56b0729a5333c79eb09812d9e001db07147e107bf0cd03eac0ab47cdfa4a503e",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_6.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_7.jsonl": PublishedFile(
        "066da0facc54b7114882c51650a2f2ca700020a68c1ffe1cc698c3f11ca37412",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_7.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_8.jsonl": PublishedFile(
        "e18c0298bd4eda3c5dd11d578a6c73375a9bbf052e30976c6e942ca6175389cd",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_8.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_9.jsonl": PublishedFile(
        "6686e8f8f578e60740fcecd023bc3250b6e1b1a8a7e4472ab70bbeb2521a85a4",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_9.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_10.jsonl": PublishedFile(
        "3f5ceb59a1b2ebca3fa1ca4e4b6c2cfee2818c274e1c66a030148799413151cc",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_10.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_11.jsonl": PublishedFile(
        "de384d57346e5377395f14cbdb5bac346a60250c0ecc5dfeee2a1cf0ac827ef9",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_11.jsonl",
        "Apache-2.0",
    ),
    "sudoku4x4/sudoku_4x4_12.jsonl": PublishedFile(
        "b558a8a803fcb973a8a37e0b84e0e61cd7f3a188062264aaa4976f3546f7055f",
        _RAW + "DreamLM/Dream/main/eval/data/sudoku_4x4_12.jsonl",
        "Apache-2.0",
    ),
    "tasks/game24.csv": PublishedFile(
        "b9f12b3e36d987a3c714c4cef17d89a137d7c59da26532fcfb93b4821d8111b5",
        _RAW + "princeton-nlp/tree-of-thought-llm/master/src/tot/data/24/24.csv",
        "MIT",
        "the public file name is 24.csv",
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


def first(examples: Sequence[_T], count: int | None, split: str) -> Sequence[_T]:
    """The first `count` examples of a published split (all if None). Raises ValueError if it has fewer, or for count <
    1."""
    if count is not None and not 1 <= count <= len(examples):
        raise ValueError(f"count={count}: the published split {split!r} has {len(examples)} examples")
    return examples if count is None else examples[:count]
