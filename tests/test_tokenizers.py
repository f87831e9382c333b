"""The closed-vocabulary tokenizers: round trips, errors, the saved form, and the codec."""

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from latentjax.tasks.base import Example, Format
from latentjax.tokenizers import END_THOUGHTS, EOS, PAD, START_THOUGHTS, Codec, WordTokenizer, load_tokenizer

WORDS = ("Tom", "is", "a", "lempus", "[Q]", "12", "###", ".", "?", ",", "!")


@pytest.fixture(scope="module")
def words() -> WordTokenizer:
    return WordTokenizer.word_level(WORDS, (START_THOUGHTS, END_THOUGHTS))


def test_ids_are_padding_end_specials_words(words):
    assert (words.pad_id, words.eos_id, words.vocab_size) == (0, 1, 4 + len(WORDS))
    expected = [PAD, EOS, START_THOUGHTS, END_THOUGHTS, *WORDS]
    assert [words.token_id(token) for token in expected] == list(range(len(expected)))


def test_punctuation_is_split_and_closed_up(words):
    ids = words.encode("is a? Tom  is a lempus.")
    assert ids == [words.token_id(word) for word in ("is", "a", "?", "Tom", "is", "a", "lempus", ".")]
    assert words.decode(ids) == "is a? Tom is a lempus."


@given(st.lists(st.sampled_from([word for word in WORDS if word not in ".?,!"]), max_size=8), st.data())
def test_round_trip_up_to_whitespace(parts, data):
    tokenizer = WordTokenizer.word_level(WORDS)
    blanks = data.draw(
        st.lists(st.sampled_from([" ", "  ", "\t", "\n", ". ", "? "]), min_size=len(parts), max_size=len(parts))
    )
    text = "".join(part + blank for part, blank in zip(parts, blanks, strict=True))
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


@given(st.lists(st.sampled_from(["ab", "c", "12", "[Q]"]), max_size=10))
def test_plain_path_equals_the_library(parts):
    tokenizer = WordTokenizer.word_level(("ab", "c", "12", "[Q]", "."))
    text = " ".join(parts)
    assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids


def test_library_encodes_the_same_with_punctuation_and_newlines():
    for vocabulary in (WORDS, (*WORDS, "\n")):
        tokenizer = WordTokenizer.word_level(vocabulary)
        text = "Tom is a lempus.\nTom  is\ta lempus?\n### 12"
        assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids


def test_newline_is_a_token_only_if_in_the_vocabulary(words):
    assert words.encode("Tom\nis") == words.encode("Tom is")
    lines = WordTokenizer.word_level((*WORDS, "\n"))
    assert lines.decode(lines.encode("Tom is\n### a lempus.\n")) == "Tom is\n### a lempus.\n"
    assert len(lines.encode("\n\n")) == 2


@pytest.mark.parametrize(("text", "unknown"), [("Tom is a dog", "dog"), ("Tom is_", "is_"), ("Tom: is", "Tom:")])
def test_unknown_word_is_named(words, text, unknown):
    with pytest.raises(ValueError, match=f"word '{unknown}' is not in the vocabulary"):
        words.encode(text)


def test_decode_leaves_out_padding_and_end_and_checks_ids(words):
    assert words.decode([words.pad_id, *words.encode("Tom"), words.eos_id, words.pad_id]) == "Tom"
    for index in (-1, words.vocab_size):
        with pytest.raises(ValueError, match=f"token id {index} is outside"):
            words.decode([index])
    with pytest.raises(KeyError, match="nothing"):
        words.token_id("nothing")


@pytest.mark.parametrize(
    ("tokens", "specials"),
    [
        (("a", "b", "a"), ()),
        (("a", EOS), ()),
        (("a",), ("a",)),
        (("a b",), ()),
        (("a.b",), ()),
        (("",), ()),
        ((".?",), ()),
    ],
)
def test_bad_vocabulary(tokens, specials):
    with pytest.raises(ValueError, match=r"token|word"):
        WordTokenizer.word_level(tokens, specials)


def test_character_level_is_lossless():
    tokenizer = WordTokenizer.character_level("ab1 \n<>’", (START_THOUGHTS,))
    text = "a b\n\n<<1b>>  ’"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids
    with pytest.raises(ValueError, match="character 'z'"):
        tokenizer.encode("abz")
    with pytest.raises(ValueError, match="single character"):
        WordTokenizer.character_level(("a", "bc"))


@pytest.mark.parametrize("newline", [False, True])
def test_saved_tokenizer_is_the_same(tmp_path, newline):
    tokenizer = WordTokenizer.word_level((*WORDS, "\n") if newline else WORDS, (START_THOUGHTS,))
    tokenizer.save(tmp_path / "made" / "here")
    loaded = load_tokenizer(tmp_path / "made" / "here")
    text = "Tom is a lempus.\nTom?"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert loaded.token_id(START_THOUGHTS) == 2
    characters = WordTokenizer.character_level("abc")
    characters.save(tmp_path)
    assert load_tokenizer(tmp_path).decode(characters.encode("abcba")) == "abcba"


@pytest.mark.parametrize("kind", ["words", "lines", "characters"])
def test_transformers_reads_what_was_saved(tmp_path, kind):
    specials, text = (START_THOUGHTS, END_THOUGHTS), "Tom is a lempus.\nTom  is\ta lempus?\n### 12"
    if kind == "characters":
        tokenizer = WordTokenizer.character_level(sorted(set(text)), specials)
    else:
        tokenizer = WordTokenizer.word_level((*WORDS, "\n") if kind == "lines" else WORDS, specials)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, tokenizer.vocab_size)
    assert theirs.convert_tokens_to_ids(list(specials)) == [2, 3]


def test_load_of_a_missing_or_broken_file(tmp_path):
    for load in (WordTokenizer.load, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
            load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half')
    with pytest.raises(ValueError, match="is not a tokenizer saved by WordTokenizer"):
        WordTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="is not a tokenizer of the `tokenizers` library"):
        load_tokenizer(tmp_path)


def test_codec_writes_the_format():
    tokenizer = WordTokenizer.word_level(("1", "2", "3", "ANS"))
    codec = Codec(tokenizer, Format(question="{}", step="{}", answer="ANS {}"))
    example = Example("1 2", ("2", "3"), "3")
    assert tokenizer.decode(codec.question(example)) == "1 2"
    assert [tokenizer.decode(step) for step in codec.steps(example)] == ["2", "3"]
    assert codec.answer(example) == [tokenizer.token_id("ANS"), tokenizer.token_id("3"), tokenizer.eos_id]
    with pytest.raises(ValueError, match="chat=True: the closed vocabulary"):
        Codec(tokenizer, codec.format, chat=True).question(example)
