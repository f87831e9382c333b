"""Tokenizers, and the codec that writes an example as token ids.

`WordTokenizer` is the closed vocabulary of a synthetic task (word-level or character-level): an unknown word is an error,
never a silent `<unk>`. `PretrainedTokenizer` is a published model's. Both are saved as `transformers` saves a tokenizer
(tokenizer.json and tokenizer_config.json), so that `AutoTokenizer` reads them, and `load_tokenizer` reads either.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from latentjax.tasks.base import Example, Format

if TYPE_CHECKING:
    import tokenizers
    import transformers

PAD = "<|pad|>"
EOS = "<|eos|>"
START_THOUGHTS = "<|start-latent|>"
END_THOUGHTS = "<|end-latent|>"
PAUSE = "<|pause|>"

# What the chat templates of Llama 3 call the date if they know no other. Left to themselves, those of Llama 3.2 write today's:
# a prompt would depend on the day it is made.
CHAT_DATE = "26 Jul 2024"

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
# What a download from the hub takes; the model's config.json names the family where the tokenizer's own files do not.
_HUB_FILES = (_FILE, _SETTINGS, "special_tokens_map.json", "chat_template.jinja", "config.json")
_CLASS = "PreTrainedTokenizerFast"  # the class that reads any tokenizer.json, under the name that all versions know
_PUNCTUATION = ".?!,"  # characters that are tokens of their own at word level


@runtime_checkable  # so that signatures can be checked at run time
class Tokenizer(Protocol):
    """What the methods need of a tokenizer.

    `pad_id` fills slots that masks exclude and may equal `eos_id`: what is padding is known from a mask, never from an id.
    """

    vocab_size: int  # ids are 0 .. vocab_size - 1
    pad_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added. Raises ValueError naming an unknown word."""
        ...

    def prompt(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a question: `text` behind the tokens that begin a sequence, or, with `chat`, as a user's turn of
        the tokenizer's chat template up to where the answer begins. Raises ValueError if there is no template."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; padding and end-of-sequence tokens are left out."""
        ...

    def token_id(self, token: str) -> int:
        """The id of one (special) token. Raises KeyError naming the token."""
        ...


class Codec:
    """A tokenizer and a task's format: how the parts of an example become token ids. Pieces of text are cached.

    The question, each step and the answer are tokenised on their own and then concatenated, as in Coconut's released code
    (arXiv 2412.06769): a pretrained tokenizer never merges characters across these borders, so the ids may differ from
    those of the concatenated text, and removing a step leaves the other tokens as they were.

    With `chat`, the question (as the format writes it, without surrounding whitespace) is the user's turn of the
    tokenizer's chat template, and steps and answer follow the assistant's header; without, it follows what the tokenizer
    itself begins a sequence with (Llama: `<|begin_of_text|>`; GPT-2, Qwen and closed vocabularies: nothing).
    """

    def __init__(self, tokenizer: Tokenizer, format: Format, chat: bool = False):
        self.tokenizer, self.format, self.chat = tokenizer, format, chat
        self._encode = functools.lru_cache(maxsize=1 << 16)(lambda text: tuple(tokenizer.encode(text)))
        self._prompt = functools.lru_cache(maxsize=1 << 16)(lambda text: tuple(tokenizer.prompt(text, chat=chat)))

    def question(self, example: Example) -> list[int]:
        text = self.format.question.format(example.question)
        return list(self._prompt(text.strip() if self.chat else text))

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

    def prompt(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of `text`: nothing begins a sequence here. Raises ValueError if `chat`: there is no template."""
        if chat:
            raise ValueError(
                "chat=True: the closed vocabulary of a synthetic task has no chat template; set chat=False"
            )
        return self.encode(text)

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

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether `other` gives every text the same ids."""
        return isinstance(other, WordTokenizer) and self._backend.to_str() == other._backend.to_str()

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer into `folder` (made if absent), as `transformers` does: `AutoTokenizer` reads it and gives
        the same ids."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": _CLASS,
            "pad_token": PAD,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        self._backend.save(str(folder / _FILE))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "WordTokenizer":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError if the file is not such a tokenizer."""
        from tokenizers import Tokenizer as Backend

        path = pathlib.Path(folder) / _FILE
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


class PretrainedTokenizer:
    """The tokenizer of a published model, with a method's special tokens added.

    Tokenisation is exactly what the folder's tokenizer.json says (`AutoTokenizer` rebuilds some families' from code, and
    reads the names of special tokens and the chat template here). Special tokens in running text become their ids, as in
    `transformers`. The padding id is that of the tokenizer's own padding token; where it has none (GPT-2, Llama), the
    end-of-sequence id, as in Coconut's released code: no row is added that could be generated.

    Build one by `load`. `added` are the special tokens that the folder did not have: their embedding rows are new
    (latentjax/backbone/vocabulary.py).
    """

    def __init__(self, library: "transformers.PreTrainedTokenizerFast", added: tuple[str, ...] = ()):
        self._library, self.added = library, added
        self._backend = library.backend_tokenizer
        self._backend.no_truncation(), self._backend.no_padding()
        if library.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token: set eos_token in its tokenizer_config.json")
        self.eos_id: int = library.eos_token_id
        self.pad_id: int = self.eos_id if library.pad_token_id is None else library.pad_token_id
        self._known = frozenset(self._backend.get_vocab().values())
        self.vocab_size = max(self._known) + 1
        self._begin = self._beginning()

    @classmethod
    def load(
        cls, path_or_hub_id: str | os.PathLike, specials: Sequence[str] = (), *, revision: str | None = None
    ) -> "PretrainedTokenizer":
        """The tokenizer in a folder or a repository of the Hugging Face hub, with `specials` added after its last id.

        Code that comes with a tokenizer is never run, and no pickle is read.

        Raises FileNotFoundError if there is no such folder or it has no tokenizer.json, OSError, saying how to pass a
        folder, if the hub has no such repository or cannot be reached, ValueError if the files are malformed or lack an
        end-of-sequence token."""
        from latentjax.backbone.pretrained import resolve

        folder = resolve(path_or_hub_id, revision, files=_HUB_FILES)
        _require_file(folder)
        for token in specials:
            if not token or token != token.strip():
                raise ValueError(f"special token {token!r}: must be text without surrounding whitespace")
        library = _read_with_transformers(folder)
        known = library.get_vocab()
        added = tuple(dict.fromkeys(token for token in specials if token not in known))
        if added:
            from tokenizers import AddedToken

            library.add_tokens([AddedToken(t, normalized=False, special=True) for t in added], special_tokens=True)
        return cls(library, added)

    def _beginning(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before a text of its own accord. Raises ValueError if it appends any."""
        bare, whole = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        for cut in range(len(whole) - len(bare) + 1):
            if whole[cut:] == bare:
                return tuple(whole[:cut])
        raise ValueError(
            f"the tokenizer writes 'a' as {[self._backend.id_to_token(i) for i in whole]}: one that ends each text with a "
            f"token of its own (add_eos_token) cannot begin a sequence that goes on"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a question: behind the tokens that the tokenizer begins a sequence with, or, with `chat`, as
        `apply_chat_template` writes a user's turn and the header of the answer, with `CHAT_DATE` for a date.

        Raises ValueError if there is no chat template."""
        if not chat:
            return [*self._begin, *self.encode(text)]
        if self._library.chat_template is None:
            raise ValueError("chat=True: the tokenizer has no chat template (a base model?); set chat=False")
        written: Any = self._library.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, date_string=CHAT_DATE
        )
        return self.encode(written)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without padding and end-of-sequence tokens, every space as it was written; other special tokens
        are spelled out. Raises ValueError for an id that names no token."""
        ids = [int(index) for index in ids]
        for index in ids:
            if index not in self._known:
                raise ValueError(f"token id {index} names no token of the vocabulary [0, {self.vocab_size})")
        kept = [index for index in ids if index not in (self.pad_id, self.eos_id)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def token_id(self, token: str) -> int:
        """The id of the text `token`, special or not, if it is exactly one token. Raises KeyError naming the token."""
        ids = self.encode(token)
        if len(ids) != 1:
            raise KeyError(f"token {token!r} is not one token of this tokenizer: it is encoded as {len(ids)}")
        return ids[0]

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether `other` gives every text the same ids."""
        return isinstance(other, PretrainedTokenizer) and self._backend.to_str() == other._backend.to_str()

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer into `folder` (made if absent), special tokens and chat template included."""
        self._library.save_pretrained(folder)
        path = pathlib.Path(folder) / _SETTINGS
        settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": _CLASS}
        path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | os.PathLike) -> WordTokenizer | PretrainedTokenizer:
    """The tokenizer that either class's `save` wrote into `folder`; a published model's folder does as well.

    Raises FileNotFoundError if the folder or its tokenizer.json is absent, ValueError if a file is malformed."""
    path = pathlib.Path(folder) / _FILE
    _require_file(path.parent)
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        closed = model.get("type") == "WordLevel" and model["vocab"].get(PAD) == 0
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a tokenizer of the `tokenizers` library ({type(error).__name__}: {error})"
        ) from error
    return WordTokenizer.load(folder) if closed else PretrainedTokenizer.load(path.parent)


def _require_file(folder: pathlib.Path) -> None:
    """Raise FileNotFoundError unless `folder` has a tokenizer.json, naming what it has in its place."""
    if (folder / _FILE).is_file():
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    other = sorted(p.name for p in folder.iterdir() if re.search(r"vocab|merges|token|spiece|\.pkl$|\.pickle$", p.name))
    found = f" Of a tokenizer it holds only {', '.join(other)}." if other else ""
    raise FileNotFoundError(
        f"{folder} has no {_FILE}.{found} Other formats are not read, pickles never: write {_FILE} with a version of "
        f"transformers that reads them, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def _read_with_transformers(folder: pathlib.Path) -> "transformers.PreTrainedTokenizerFast":
    """tokenizer.json as it is, with the special tokens and the chat template that `AutoTokenizer` finds for the folder."""
    import tokenizers
    import transformers

    try:
        held = tokenizers.Tokenizer.from_file(str(folder / _FILE)).get_vocab()
        # The family's class knows special tokens that GPT-2's files do not name, and some that a folder may not have.
        named: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        specials = {
            r: token for r, token in named.special_tokens_map.items() if isinstance(token, str) and token in held
        }
        library = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, clean_up_tokenization_spaces=False, **specials
        )
    except Exception as error:  # the libraries raise bare Exception for a malformed file
        raise ValueError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error
    if unheld := sorted(set(library.get_vocab()) - set(held)):
        raise ValueError(
            f"{folder}: its settings name {unheld}, which the vocabulary of {_FILE} lacks: take them out of {_SETTINGS}, or add "
            f"them to the vocabulary"
        )
    return library
