"""GSM8K in equations: the line format, published files, and the two rules of reading an answer."""

import pytest

from latentjax.tasks.base import Example, Reason
from latentjax.tasks.gsm8k import GSM8K

TASK = GSM8K()
EXACT = GSM8K(extraction="exact")


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
