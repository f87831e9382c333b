"""GSM8K in equations and in sentences: the line formats, published files, and the two rules of reading an answer."""

import hashlib
import json
import re

import pytest

from latentjax.tasks.base import Example, Reason
from latentjax.tasks.gsm8k import GSM8K

TASK = GSM8K()
EXACT = GSM8K(extraction="exact")
SENTENCES = GSM8K(chain="sentences")


@pytest.mark.parametrize(("split", "count"), [("train", 6884), ("valid", 500), ("test", 1319)])
def test_published_files(published, split, count):
    name = "gsm8k_train_equations.txt" if split == "train" else f"gsm8k_aug_{split}.txt"
    lines = (published / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    examples = TASK.examples(split)
    assert len(examples) == len(lines) == count
    for example, line in zip(examples, lines, strict=True):
        assert f"{example.question}||{' '.join(example.steps)} #### {example.answer}" == line
        written = "".join(TASK.format.step.format(s) for s in example.steps) + TASK.format.answer.format(example.answer)
        assert TASK.verify(example, written).correct
        assert EXACT.verify(example, written).correct
        assert not TASK.verify(example, written + "1").correct
        assert not EXACT.verify(example, written + "1").correct


def test_the_vocabulary_spells_every_example(published):
    tokenizer = TASK.tokenizer()
    for split in TASK.splits:
        for example in TASK.examples(split, count=300):
            text = TASK.format.question.format(example.question)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_supplied_training_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("Two and 3?||<<2+3=5>> <<5*1=5>> #### 5\nNone?|| #### 2,125\n")
    task = GSM8K(train_file=str(path))
    assert task.examples("train") == [
        Example("Two and 3?", ("<<2+3=5>>", "<<5*1=5>>"), "5"),
        Example("None?", (), "2,125"),
    ]
    with pytest.raises(ValueError, match="count=3"):
        task.examples("train", count=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no bar #### 5", r"'\|\|' is missing"),
        ("question||<<1+1=2>> 2", "'####' is missing"),
        ("||<<1+1=2>> #### 2", "empty"),
        ("question||<<1+1=2>> ####", "empty"),
        ("question||1+1=2 #### 2", "is not a list of"),
        ("question||<<1+1=2 #### 2", "is not a list of"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    path = tmp_path / "train.txt"
    path.write_text(f"ok||<<1+1=2>> #### 2\n{line}\n")
    with pytest.raises(ValueError, match=message) as error:
        GSM8K(train_file=str(path)).examples("train")
    assert f"{path}:2:" in str(error.value)


def _records(published, name):
    lines = (published / "math" / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("split", "count"), [("train", 6738), ("valid", 735), ("test", 1319)])
def test_sentences_are_the_released_solutions(published, split, count):
    examples = SENTENCES.examples(split)
    assert len(examples) == count
    assert SENTENCES.examples(split, count=3) == examples[:3]
    released = {
        record["question"].strip(): record["answer"]
        for record in _records(published, f"gsm8k_{'test' if split == 'test' else 'train'}.jsonl")
    }
    longest = 0
    for example in examples:
        # Every letter of the solution is there, in order, and no annotation.
        solution = re.sub("<<.*?>>", "", released[example.question])
        written = "".join((*example.steps, "####", example.answer))
        assert re.sub(r"\s", "", written) == re.sub(r"\s", "", solution)
        assert all(step == step.strip() and step and "\n" not in step and "<<" not in step for step in example.steps)
        assert re.fullmatch(r"-?[0-9][0-9,]*(\.[0-9]+)?", example.answer)
        text = "".join(f"{step}\n" for step in example.steps) + f"### {example.answer}"
        assert SENTENCES.verify(example, text).correct
        assert not SENTENCES.verify(example, text + "1").correct
        assert 2 <= len(example.steps) <= 11
        longest = max(longest, len(example.steps))
    assert longest == {"train": 9, "valid": 9, "test": 11}[split]


def test_no_question_of_the_sentences_is_in_two_splits(published):
    questions = {
        split: {re.sub(r"\W+", " ", e.question.lower()) for e in SENTENCES.examples(split)}
        for split in SENTENCES.splits
    }
    assert not questions["train"] & questions["valid"]
    assert not (questions["train"] | questions["valid"]) & questions["test"]
    assert sum(map(len, questions.values())) == 7473 + 1319
    for example in SENTENCES.examples("valid"):
        digest = hashlib.blake2b(example.question.encode(), digest_size=8).digest()
        assert int.from_bytes(digest, "little") % 10 == 1


def test_sentences_by_hand(published):
    first = SENTENCES.examples("train")[0]
    assert first.steps == (
        "Natalia sold 48/2 = 24 clips in May.", "Natalia sold 48+24 = 72 clips altogether in April and May.",
    )  # fmt: skip
    assert first.answer == "72"


def test_the_vocabulary_spells_every_sentence(published):
    tokenizer = SENTENCES.tokenizer()
    for split in SENTENCES.splits:
        for example in SENTENCES.examples(split, count=300):
            text = "\n".join((example.question, *example.steps))
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "Expecting value"),
        ('{"question": "How many?"}', "texts 'question' and 'answer'"),
        ('{"question": "How many?", "answer": 3}', "texts 'question' and 'answer'"),
        ('{"question": "How many?", "answer": "3"}', "no '####'"),
        ('{"question": " ", "answer": "One.\\n#### 1"}', "empty"),
        ('{"question": "How many?", "answer": "One.\\n#### "}', "empty"),
    ],
)
def test_malformed_records_of_the_release_are_named(tmp_path, monkeypatch, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "How many?", "answer": "1+1=<<1+1=2>>2.\\n\\n Two. \\n#### 2"}\n')
    monkeypatch.setattr("latentjax.tasks.gsm8k.locate", lambda name: path)
    assert SENTENCES.examples("test") == [Example("How many?", ("1+1=2.", "Two."), "2")]
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        SENTENCES.examples("test")
    assert f"{path}:2:" in str(error.value)


def test_sentences_have_no_training_file_of_ones_own():
    with pytest.raises(ValueError, match=r"GSM8K\.train_file='x\.txt': only a chain of equations has one"):
        GSM8K(chain="sentences", train_file="x.txt")


def test_missing_training_file_and_bad_rule(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"GSM8K\.train_file"):
        GSM8K(train_file=str(tmp_path / "absent.txt")).examples("train")


@pytest.mark.parametrize(
    ("gold", "text", "numeric", "exact"),
    [
        ("18", "<<9*2=18>>\n### 18", Reason.RIGHT, Reason.RIGHT),
        ("18", "### 18.0", Reason.RIGHT, Reason.WRONG),
        ("18", "### $18.", Reason.RIGHT, Reason.WRONG),
        ("2,125", "### 2125", Reason.RIGHT, Reason.RIGHT),
        ("2125", "### 2,125", Reason.RIGHT, Reason.RIGHT),
        ("-7", "### -7", Reason.RIGHT, Reason.RIGHT),
        ("-7", "### 7", Reason.WRONG, Reason.WRONG),
        ("0.5", "### .5", Reason.RIGHT, Reason.WRONG),
        ("18", "the answer is 18", Reason.RIGHT, Reason.UNPARSABLE),
        ("18", "18 ### 19", Reason.WRONG, Reason.WRONG),
        ("18", "### none", Reason.UNPARSABLE, Reason.WRONG),
        ("18", "", Reason.UNPARSABLE, Reason.UNPARSABLE),
        ("9300000000001", "### 9300000000003", Reason.RIGHT, Reason.WRONG),
        ("9300000000001", "### 9300100000003", Reason.WRONG, Reason.WRONG),
        ("1/2", "### 1/2", Reason.RIGHT, Reason.RIGHT),
        ("1/2", "### 2", Reason.WRONG, Reason.WRONG),
    ],
)
def test_rules_of_extraction(gold, text, numeric, exact):
    example = Example("question", (), gold)
    assert TASK.verify(example, text).reason is numeric
    assert EXACT.verify(example, text).reason is exact
