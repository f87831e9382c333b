"""What a task is: problems as text, the written form of a chain of thought, and a verifier that says why.

A task knows nothing of models or tokens. It yields `Example`s, may redraw the parts of an example that carry no
information (`augment`), and judges a model's text (`verify`).
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from latentjax.tokenizers import WordTokenizer


class Reason(enum.StrEnum):
    """Why a verdict was given."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement of one answer. `parsed` is the answer that was read from the text, `detail` a longer reason."""

    reason: Reason
    parsed: str | None = None
    detail: str = ""

    @property
    def correct(self) -> bool:
        return self.reason is Reason.RIGHT


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem: its question, the steps of its reference chain of thought, and its answer, all as text.

    `meta` holds what a verifier, an augmentation or an analysis needs besides (graphs, operands, vertex sets).
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Format:
    """How an example is written out: templates of the question, of each step and of the answer.

    Coconut writes `question + "\\n"`, each `step + "\\n"` and `"### " + answer`, followed by the end-of-sequence token. An
    answer without a marker ("{}") is for a task that can tell its answer from the steps before it.
    """

    question: str = "{}\n"
    step: str = "{}\n"
    answer: str = "### {}"

    def read_answer(self, text: str) -> str | None:
        """The answer in a generated `text`: what follows the last answer marker, None if it does not occur; all of the
        text, steps included, in a format without a marker."""
        marker = self.answer.format("").strip()
        if not marker:
            return text.strip()
        _, found, tail = text.rpartition(marker)
        return tail.strip() if found else None


@dataclasses.dataclass(frozen=True)
class Task:
    """Base of all tasks. Subclasses are frozen dataclasses whose fields are the task's parameters."""

    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test")
    format: ClassVar[Format] = Format()

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def examples(self, split: str, *, count: int | None = None, seed: int = 0) -> Sequence[Example]:
        """Problems of `split` (one of `splits`): a generated split needs `count` and depends on `seed`; a published one
        is read as released and cut to its first `count`. Splits are disjoint by construction."""
        raise NotImplementedError

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """The same problem with its uninformative parts redrawn (for example the order of edges). Default:
        unchanged."""
        del rng
        return example

    def verify(self, example: Example, text: str) -> Verdict:
        """Judge the text that a model generated after the question."""
        raise NotImplementedError

    def judge_step(self, text: str) -> Reason:
        """Whether the text of one step says something true, whatever the problem. Default: nothing can be read from it."""
        del text
        return Reason.UNPARSABLE

    def canonical(self, text: str) -> str | None:
        """The form that right texts share if they hold the same solution, for counting distinct ones. None for a text
        without a solution, and always in a task with one solution per problem (the default)."""
        del text
        return None

    def vocabulary(self) -> tuple[str, ...]:
        """All words of the task, for a word-level tokenizer. Open-vocabulary tasks raise and name a tokenizer to
        use."""
        raise NotImplementedError

    def tokenizer(self, specials: Sequence[str] = ()) -> "WordTokenizer":
        """The task's own closed-vocabulary tokenizer with `specials` (a method's special tokens) added: word-level
        unless the task says otherwise."""
        from latentjax.tokenizers import WordTokenizer  # tokenizers imports this module

        return WordTokenizer.word_level(self.vocabulary(), specials)

    @property
    def hide_question(self) -> bool:
        """Whether the pass that writes the answer must not attend to the question, so that thoughts are the only
        route."""
        return False

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"split={split!r}: {type(self).__name__} has the splits {', '.join(self.splits)}")
