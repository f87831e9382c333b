"""Finding, checking, downloading and reading published files. Nothing here uses a network."""

import hashlib
import json

import pytest

from latentjax import data

CONTENT = b"one\ntwo\n"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders of data and cache, and one known file `x.txt` whose public source is a file of this machine."""
    source = tmp_path / "source" / "x.txt"
    (tmp_path / "named").mkdir()
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    monkeypatch.setenv("LATENTJAX_DATA", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = data.PublishedFile(hashlib.sha256(CONTENT).hexdigest(), source.as_uri(), "MIT")
    monkeypatch.setitem(data.FILES, "x.txt", file)
    monkeypatch.setitem(data.FILES, "derived.txt", data.PublishedFile("0" * 64, None, "MIT", "derived from y"))
    return tmp_path


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_the_named_folder_comes_first(folders):
    (folders / "named" / "x.txt").write_bytes(CONTENT)
    before = everything(folders)
    assert data.locate("x.txt") == folders / "named" / "x.txt"
    assert everything(folders) == before


def test_download_goes_into_the_cache_once(folders):
    path = data.locate("x.txt")
    assert path == folders / "cache" / "latentjax" / "data" / "x.txt"
    assert path.read_bytes() == CONTENT
    (folders / "source" / "x.txt").unlink()
    assert data.locate("x.txt") == path
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_wrong_checksum_names_both_and_leaves_the_file(folders):
    path = folders / "named" / "x.txt"
    path.write_bytes(b"other")
    expected, found = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match=f"(?s){found}.*{expected}"):
        data.locate("x.txt")
    assert path.read_bytes() == b"other"


def test_wrong_download_writes_nothing(folders):
    (folders / "source" / "x.txt").write_bytes(b"truncated")
    before = everything(folders)
    with pytest.raises(ValueError, match="is not the published file"):
        data.locate("x.txt")
    assert everything(folders) == before


def test_missing_file_says_how_to_supply_it(folders):
    (folders / "source" / "x.txt").unlink()
    before = everything(folders)
    for name in ("x.txt", "derived.txt"):
        with pytest.raises(FileNotFoundError, match="set LATENTJAX_DATA"):
            data.locate(name)
    assert everything(folders) == before
    with pytest.raises(KeyError, match="unknown"):
        data.locate("nothing.txt")


def test_named_folder_must_exist(folders, monkeypatch):
    monkeypatch.setenv("LATENTJAX_DATA", str(folders / "absent"))
    with pytest.raises(FileNotFoundError, match="LATENTJAX_DATA"):
        data.locate("x.txt")


def test_published_files_have_the_listed_checksums(published):
    for name in data.FILES:
        assert data.locate(name).as_posix().endswith(name)


def test_malformed_lines_name_file_and_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("1\n2\nthree\n")
    with pytest.raises(ValueError, match=r"lines\.txt:3: invalid literal"):
        data.read_lines(path, int)
    path.write_text("1\n\n2\n")
    with pytest.raises(ValueError, match=r"lines\.txt:2: the line is empty"):
        data.read_lines(path, int)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        data.read_lines(path, int)
    path.write_text("a\u2028b\nc")  # a line separator of Unicode is no end of line
    assert data.read_lines(path, str) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": }]', r"records\.json:2: not valid JSON"),
        ('{"a": 1}', "expected a JSON list"),
        ("[]", "at least one record"),
        ('[{"a": 1}, {"b": 2}]', r"record 1: field 'a' is missing"),
        ('[{"a": 1}, {"a": "2"}]', r"record 1: field 'a' is str, expected int"),
        ('[{"a": true}]', r"record 0: field 'a' is bool, expected int"),
        ("[3]", r"record 0: expected an object"),
    ],
)
def test_malformed_records_name_index_and_field(tmp_path, content, message):
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        data.read_records(path, {"a": int}, lambda record: record["a"])


def test_records_and_errors_of_parse(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"a": 1}, {"a": 2}]))
    assert data.read_records(path, {"a": int}, lambda record: record["a"]) == [1, 2]

    def parse(record):
        if record["a"] == 2:
            raise ValueError("two is wrong")
        return record

    with pytest.raises(ValueError, match="record 1: two is wrong"):
        data.read_records(path, {"a": int}, parse)


def test_first_never_gives_less_than_asked():
    assert data.first([1, 2, 3], None, "valid") == [1, 2, 3]
    assert data.first([1, 2, 3], 2, "valid") == [1, 2]
    for count in (0, 4, -1):
        with pytest.raises(ValueError, match=f"count={count}"):
            data.first([1, 2, 3], count, "valid")
