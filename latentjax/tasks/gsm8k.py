"""Grade-school arithmetic with equations or sentences as chain of thought (GSM8K, arXiv:2110.14168).

Equations (line format of arXiv:2405.14838): a line is `question||<<a*b=c>> <<..>> #### answer`; every `<<..>>` is a step.
"valid" (500) and "test" (1,319) are the released files of GSM8K-Aug. Its training file (385,620 lines, Git LFS in
da03/Internalize_CoT_Step_by_Step, data/gsm8k/train.txt) is too large to fetch unasked: download it and give its path as
`train_file`. The default, gsm8k_train_equations.txt, has the 6,884 questions of the original training set that carry
annotations. In 6 problems of "valid" (the first is number 89) and 18 of "test" the released file has no step, of which a
VAE of thoughts makes no block: `valid_examples` of 89 or fewer, or sentences.

Sentences: the solutions of the original release (7,473 and 1,319) as they were written, one line a step, mostly one sentence,
without the `<<..>>` annotations of a calculator in them; 2 to 9 steps, and once 11 in the test. The release has no validation
part: "valid" is the tenth of its training file that a stable hash of the question picks (735), "train" the rest (6,738).
So it is another "valid" than that of the equations, whose 500 questions are all in the training file.
"""

import dataclasses
import json
import pathlib
import re
import string
from collections.abc import Sequence
from typing import ClassVar, Literal

from latentjax.data import FILES, first, locate, read_lines
from latentjax.tasks.base import Example, Reason, Task, Verdict
from latentjax.tasks.splits import split_of_text
from latentjax.tokenizers import WordTokenizer

_EQUATIONS = "gsm8k_train_equations.txt"
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
_RELATIVE = 1e-6  # tolerance of the comparison of numbers


@dataclasses.dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K with a `chain` of equations or sentences. `train_file`, for equations, is the name of a published file or the path
    of a file in the same format.

    `extraction` says how an answer is read. "numeric": the last number after the last `###` (of the whole text if there
    is none), with `, $ %` removed, compared in float64 at a relative tolerance of 1e-6 (a gold answer that is no number
    is compared as a string). "exact": Coconut's rule (arXiv:2412.06769, released code), the string after the last `#`,
    commas removed."""

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test")

    chain: Literal["equations", "sentences"] = "equations"
    train_file: str = _EQUATIONS
    extraction: Literal["numeric", "exact"] = "numeric"

    def __post_init__(self):
        if self.extraction not in ("numeric", "exact"):
            raise ValueError(f"GSM8K.extraction={self.extraction!r}: must be 'numeric' or 'exact'")
        if self.chain not in ("equations", "sentences"):
            raise ValueError(f"GSM8K.chain={self.chain!r}: must be 'equations' or 'sentences'")
        if self.chain == "sentences" and self.train_file != _EQUATIONS:
            raise ValueError(f"GSM8K.train_file={self.train_file!r}: only a chain of equations has one")

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """The first `count` problems of the split in the order of its file, all if None. Nothing is drawn: `seed` has no
        effect."""
        del seed
        self._check_split(split)
        parse = _parse if self.chain == "equations" else _parse_sentences
        examples = read_lines(self._file(split), parse)
        if self.chain == "sentences" and split != "test":
            examples = [e for e in examples if (split_of_text(e.question) == "valid") == (split == "valid")]
        return first(examples, count, split)

    def _file(self, split: str) -> pathlib.Path:
        if self.chain == "sentences":
            return locate(f"math/gsm8k_{'test' if split == 'test' else 'train'}.jsonl")
        if split != "train":
            return locate(f"gsm8k_aug_{split}.txt")
        if self.train_file in FILES:
            return locate(self.train_file)
        path = pathlib.Path(self.train_file)
        if not path.is_file():
            raise FileNotFoundError(
                f"GSM8K.train_file={self.train_file!r}: no such file, and no published file has this name"
            )
        return path

    def vocabulary(self) -> tuple[str, ...]:
        """Characters, for a character-level tokenizer: printable ASCII, the newline and what else the three splits
        have."""
        parts = ((e.question, *e.steps, e.answer) for split in self.splits for e in self.examples(split))
        text = (text for part in parts for text in part)
        ascii_characters = (string.digits, string.ascii_letters, string.punctuation, " \n")
        return tuple(sorted(set().union(*ascii_characters, *text)))

    def tokenizer(self, specials: Sequence[str] = ()) -> WordTokenizer:
        """A character-level tokenizer: the questions are open text."""
        return WordTokenizer.character_level(self.vocabulary(), specials)

    def verify(self, example: Example, text: str) -> Verdict:
        """Judge by the rule `extraction`. Unparsable: no number ("numeric"), or neither a marker nor the answer
        ("exact")."""
        return _verify_exact(example, text) if self.extraction == "exact" else self._verify_number(example, text)

    def _verify_number(self, example: Example, text: str) -> Verdict:
        answer = self.format.read_answer(text)
        answer_text = _strip_signs(text if answer is None else answer)
        gold = _strip_signs(example.answer)
        if not _NUMBER.fullmatch(gold):  # such as a fraction or a time of day
            return Verdict(
                Reason.RIGHT if answer_text == gold else Reason.WRONG, answer_text, "gold answer is no number"
            )
        numbers = _NUMBER.findall(answer_text)
        if not numbers:
            return Verdict(Reason.UNPARSABLE, detail="no number in the answer")
        right = abs(float(numbers[-1]) - float(gold)) <= _RELATIVE * max(1.0, abs(float(gold)))
        return Verdict(
            Reason.RIGHT if right else Reason.WRONG, numbers[-1], "" if answer is not None else "no ### marker"
        )


def _strip_signs(text: str) -> str:
    return re.sub(r"[,$%]", "", text).strip().removesuffix(".")


def _verify_exact(example: Example, text: str) -> Verdict:
    answer = text.rpartition("#")[2].replace(",", "").strip()
    if answer == example.answer.replace(",", "").strip():
        return Verdict(Reason.RIGHT, answer)
    return (
        Verdict(Reason.WRONG, answer)
        if "#" in text and answer
        else Verdict(Reason.UNPARSABLE, detail="no answer after #")
    )


def _parse(line: str) -> Example:
    """The example of one line. Raises ValueError saying what is malformed."""
    question, bar, rest = line.partition("||")
    chain, marker, answer = rest.rpartition("####")
    if not bar or not marker:
        raise ValueError(f"expected 'question||<<..>> .. #### answer', but {'####' if bar else '||'!r} is missing")
    if not question.strip() or not answer.strip():
        raise ValueError("the question or the answer is empty")
    if not re.fullmatch(r"\s*(?:<<[^<>]*>>\s*)*", chain):
        raise ValueError(f"{chain.strip()[:60]!r} between || and #### is not a list of <<..>> items")
    return Example(question.strip(), tuple(re.findall(r"<<[^<>]*>>", chain)), answer.strip())


def _parse_sentences(line: str) -> Example:
    """The example of one line of the original release. Raises ValueError saying what is malformed."""
    record = json.loads(line)
    if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in ("question", "answer")):
        raise ValueError("expected an object with the texts 'question' and 'answer'")
    chain, marker, answer = record["answer"].rpartition("####")
    if not marker:
        raise ValueError("the answer has no '####'")
    if not record["question"].strip() or not answer.strip():
        raise ValueError("the question or the answer is empty")
    steps = (re.sub(r"<<[^<>]*>>", "", step).strip() for step in chain.split("\n"))
    return Example(record["question"].strip(), tuple(step for step in steps if step), answer.strip())
