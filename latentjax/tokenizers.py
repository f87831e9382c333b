"""Tokenizers of synthetic tasks (word-level, character-level) and the codec that writes an example as token ids.

Both are built with the `tokenizers` library and saved in its JSON format. An unknown word is an error, never a silent
`<unk>`.
"""

import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from latentjax.tasks.base import Example, Format

if TYPE_CHECKING:
    import tokenizers

PAD = "<|pad|>"
EOS = "<|eos|>"
START_THOUGHTS = "<|start-latent|>"
END_THOUGHTS = "<|end-latent|>"
PAUSE = "<|pause|>"

_PUNCTUATION = ".?!,"  # characters that are tokens of their own at word level


@runtime_checkable  # so that signatures can be checked at run time
class Tokenizer(Protocol):
    """What the methods need of a tokenizer."""

    vocab_size: int
    pad_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added. Raises ValueError naming an unknown word."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; padding and end-of-sequence tokens are left out."""
        ...

    def token_id(self, token: str) -> int:
        """The id of one (special) token. Raises KeyError naming the token."""
        ...


class Codec:
    """A tokenizer and a task's format: how the parts of an example become token ids. Pieces of text are cached."""

    def __init__(self, tokenizer: Tokenizer, format: Format):
        self.tokenizer, self.format = tokenizer, format
        self._encode = functools.lru_cache(maxsize=1 << 16)(lambda text: tuple(tokenizer.encode(text)))

    def question(self, example: Example) -> list[int]:
        return list(self._encode(self.format.question.format(example.question)))

    def steps(self, example: Example) -> list[list[int]]:
        return [list(self._encode(self.format.step.format(step))) for step in example.steps]

    def answer(self, example: Example) -> list[int]:
        """Ids of the marked answer and the end of the sequence."""
        return [*self._encode(self.format.answer.format(example.answer)), self.tokenizer.eos_id]


class WordTokenizer:
    """Closed-vocabulary tokenizer of a synthetic task: one token a word, or one token a character.

    Word level: text is split at whitespace, each of `. ? ! ,` is a token of its own, and a newline is one if the
    vocabulary has it (else it is whitespace). Character level: every character is a token. Special tokens are reached
    through `token_id`; in running text they are words like any other (word level) or spelled out (character level).

    Build one by `word_level`, `character_level` or `load`. Ids: padding 0, end of sequence 1, then the method's special
    tokens, then the words in the order given.
    """

    _FILE = "tokenizer.json"

    def __init__(self, backend: "tokenizers.Tokenizer"):
        self._backend = backend
        self._ids: dict[str, int] = backend.get_vocab()
        self._words = sorted(self._ids, key=self._ids.__getitem__)
        if self._words[:2] != [PAD, EOS] or len(self._words) != self._ids[self._words[-1]] + 1:
            raise ValueError(
                f"tokenizer starts with {self._words[:2]}: expected {PAD!r}, {EOS!r} and ids without a gap"
            )
        self.vocab_size, self.pad_id, self.eos_id = len(self._words), 0, 1
        self._joined = backend.decoder is not None  # character level: tokens are joined without spaces
        self._plain = not self._joined and "\n" not in self._ids

    @classmethod
    def word_level(cls, words: Sequence[str], specials: Sequence[str] = ()) -> "WordTokenizer":
        """A word-level tokenizer. Raises ValueError for a repeated word and for one that splitting would tear apart."""
        from tokenizers import Regex, pre_tokenizers

        for word in words:
            if word not in set(_PUNCTUATION) and word != "\n" and not re.fullmatch(rf"[^\s{_PUNCTUATION}]+", word):
                raise ValueError(f"word {word!r}: a word is one of {_PUNCTUATION!r} or has neither them nor whitespace")
        blank = r"[^\S\n]+" if "\n" in words else r"\s+"
        split = [
            pre_tokenizers.Split(Regex(blank), "removed"),
            pre_tokenizers.Split(Regex(rf"[{_PUNCTUATION}\n]"), "isolated"),
        ]
        return cls(_backend(words, specials, pre_tokenizers.Sequence(split), decoder=None))

    @classmethod
    def character_level(cls, characters: Sequence[str], specials: Sequence[str] = ()) -> "WordTokenizer":
        """A character-level tokenizer. Raises ValueError for a repeated entry and for one that is not one character."""
        from tokenizers import Regex, decoders, pre_tokenizers

        for character in characters:
            if len(character) != 1:
                raise ValueError(f"character {character!r}: must be a single character")
        return cls(_backend(characters, specials, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added. Raises ValueError naming an unknown word."""
        if self._plain:  # much faster than the library, and equal to it if every piece between blanks is a word
            try:
                return [self._ids[word] for word in text.split()]
            except KeyError:
                pass
        pieces = [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        for piece in pieces:
            if piece not in self._ids:
                kind = "character" if self._joined else "word"
                raise ValueError(
                    f"{kind} {piece!r} is not in the vocabulary of {self.vocab_size} tokens (text: {text[:80]!r})"
                )
        return [self._ids[piece] for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without padding and end-of-sequence tokens. Raises ValueError for an id outside the vocabulary.

        Words are joined by single spaces, with no space before punctuation and none around a newline."""
        words = []
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside the vocabulary [0, {self.vocab_size})")
            if index not in (self.pad_id, self.eos_id):
                words.append(self._words[index])
        if self._joined:
            return "".join(words)
        return re.sub(rf" ([{_PUNCTUATION}])", r"\1", " ".join(words)).replace(" \n", "\n").replace("\n ", "\n")

    def token_id(self, token: str) -> int:
        """The id of one (special) token. Raises KeyError naming the token."""
        if token not in self._ids:
            raise KeyError(f"token {token!r} is not in the vocabulary of {self.vocab_size} tokens")
        return self._ids[token]

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer into `folder` (made if absent) in the `tokenizers` library's JSON format."""
        path = pathlib.Path(folder) / self._FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "WordTokenizer":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError if the file is not such a tokenizer."""
        from tokenizers import Tokenizer as Backend

        path = pathlib.Path(folder) / cls._FILE
        text = path.read_text(encoding="utf-8")
        try:
            return cls(Backend.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer saved by WordTokenizer: {error}") from error


def _backend(words: Sequence[str], specials: Sequence[str], split, decoder) -> "tokenizers.Tokenizer":
    """The library's tokenizer: a whole-piece vocabulary without an unknown token, behind `split`."""
    import tokenizers

    tokens = [PAD, EOS, *specials, *words]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        repeated = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ValueError(f"token {repeated!r} is given twice among the special tokens and words")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    backend.pre_tokenizer = split
    if decoder is not None:
        backend.decoder = decoder
    return backend
