"""Tokenizers of published models against `transformers` and the `tokenizers` library, on folders made here."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from latentjax.backbone.config import tiny
from latentjax.methods import CoT
from latentjax.methods.base import Lengths
from latentjax.tasks.base import Example, Format
from latentjax.tokenizers import (
    CHAT_DATE,
    END_THOUGHTS,
    START_THOUGHTS,
    Codec,
    PretrainedTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from tests.pretrained_folders import END_OF_TEXT, TEXTS, gpt2_tokenizer, llama_tokenizer

FAMILIES = {"gpt2": gpt2_tokenizer, "llama": llama_tokenizer}
MARKERS = (START_THOUGHTS, END_THOUGHTS)
TEXT = "Tom has 12345 apples!  \n\nnaïve 東京 🙂\t<<12+3=15>>\n### 26 ."
EXAMPLE = Example("How many apples does Tom have?", ("<<12+3=15>>", "<<15*2=30>>"), "30")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, write in FAMILIES.items():
        assert write(made[name]) == 320
    return made


@pytest.fixture(scope="module")
def plain(folders) -> dict[str, PretrainedTokenizer]:
    return {name: PretrainedTokenizer.load(folder) for name, folder in folders.items()}


def settings_of(folder: pathlib.Path, **changes) -> None:
    """Change the tokenizer_config.json of `folder`; None takes a setting out."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


@pytest.fixture
def copy(folders, tmp_path):
    """A function that copies a family's folder, to be changed."""
    return lambda name: pathlib.Path(shutil.copytree(folders[name], tmp_path / name))


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(folders, plain, name):
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
    ours = plain[name]
    assert isinstance(ours, Tokenizer)
    for text in (TEXT, *TEXTS, "", " "):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.prompt(text) == theirs(text)["input_ids"]
    assert ours.vocab_size == len(theirs) == 320
    assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("name", FAMILIES)
@given(text=st.text(max_size=30))
def test_decode_gives_the_text_back(plain, name, text):
    tokenizer = plain[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", ["Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_the_file_decides_and_not_the_class(copy, family):
    """`AutoTokenizer` makes some families anew from code, with a splitting rule of their own."""
    folder = copy("llama")
    settings_of(folder, tokenizer_class=family)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = PretrainedTokenizer.load(folder)
    assert tokenizer.prompt(TEXT) == file.encode(TEXT).ids
    assert tokenizer.vocab_size == file.get_vocab_size()


def test_the_family_names_the_end_where_the_files_do_not(copy, plain, tmp_path):
    """The published folder of GPT-2: neither special tokens nor a class, but a model's config.json."""
    folder = copy("gpt2")
    settings_of(folder, tokenizer_class=None)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = PretrainedTokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (319, 320)
    assert tokenizer.prompt(TEXT) == plain["gpt2"].prompt(TEXT)
    tokenizer.save(tmp_path / "exported")  # beside a model: `transformers` still reads the same tokenizer
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs(TEXT)["input_ids"] == tokenizer.prompt(TEXT)
    assert theirs.eos_token_id == 319


def test_only_a_beginning_of_sequence_that_the_tokenizer_adds_itself(plain):
    assert plain["gpt2"].prompt("Tom") == plain["gpt2"].encode("Tom")
    begin = plain["llama"].token_id("<|begin_of_text|>")
    assert plain["llama"].prompt("Tom") == [begin, *plain["llama"].encode("Tom")]


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_come_after_the_last_id(folders, plain, name):
    tokenizer = PretrainedTokenizer.load(folders[name], (*MARKERS, START_THOUGHTS))
    assert tokenizer.added == MARKERS
    assert [tokenizer.token_id(token) for token in MARKERS] == [320, 321]
    assert tokenizer.vocab_size == 322
    pieces = [plain[name].encode(text) for text in ("Tom has ", " 12")]
    assert tokenizer.encode(f"Tom has {START_THOUGHTS} 12") == [*pieces[0], 320, *pieces[1]]
    assert (
        PretrainedTokenizer.load(folders[name], ("<<", "<|eot_id|>" if name == "llama" else "<|endoftext|>")).added
        == ()
    )
    for token in ("", " <|x|>"):
        with pytest.raises(ValueError, match="without surrounding whitespace"):
            PretrainedTokenizer.load(folders[name], (token,))


@pytest.mark.parametrize("name", FAMILIES)
def test_token_id_is_of_exactly_one_token(plain, name):
    backend = tokenizers.Tokenizer.from_str(plain[name]._backend.to_str())
    for token in ("<<", "###", "Tom"):
        assert backend.id_to_token(plain[name].token_id(token)) == token
    for token in (START_THOUGHTS, "Tom has", ""):
        with pytest.raises(KeyError, match="is not one token"):
            plain[name].token_id(token)


def test_padding_is_the_tokenizers_own_or_the_end(copy, plain):
    assert plain["gpt2"].pad_id == plain["gpt2"].eos_id == 319
    folder = copy("llama")
    settings_of(folder, pad_token="<|end_of_text|>")
    tokenizer = PretrainedTokenizer.load(folder)
    assert tokenizer.pad_id == tokenizer.token_id("<|end_of_text|>") != tokenizer.eos_id


def test_the_end_is_a_target_though_it_looks_like_padding(plain):
    """Padding has the end's id in GPT-2; masks tell them apart."""
    tokenizer, format = plain["gpt2"], Format()
    method = CoT(tiny(320), Lengths(question=40, text=60), epochs=1)
    examples = [EXAMPLE, Example("Tom?", (), "3")]
    codec = Codec(tokenizer, format)
    batch = method.encode(examples, codec, 0, np.random.default_rng(0))
    for row, example in enumerate(examples):
        text = [*(token for step in codec.steps(example) for token in step), *codec.answer(example)]
        assert batch.text[row][batch.loss_mask[row]].tolist() == text
        assert text[-1] == tokenizer.eos_id and text.count(tokenizer.eos_id) == 1
        assert batch.text_mask[row].sum() == len(text) < (batch.text[row] == tokenizer.eos_id).sum() + len(text)
        assert batch.question_mask[row].sum() == len(codec.question(example))


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_leaves_out_padding_and_end_only(folders, name):
    tokenizer = PretrainedTokenizer.load(folders[name], MARKERS)
    ids = [tokenizer.pad_id, *tokenizer.encode(f" a .{START_THOUGHTS} Tom"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == f" a .{START_THOUGHTS} Tom"
    for index in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {index} names no token"):
            tokenizer.decode([index])


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_tokenizer_is_the_same(folders, tmp_path, name):
    tokenizer = PretrainedTokenizer.load(folders[name], MARKERS)
    tokenizer.save(tmp_path / "made" / "here")
    loaded = load_tokenizer(tmp_path / "made" / "here")
    assert isinstance(loaded, PretrainedTokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "made" / "here")
    text = TEXT + START_THOUGHTS
    assert loaded.prompt(text) == theirs(text)["input_ids"] == tokenizer.prompt(text)
    for field in ("vocab_size", "pad_id", "eos_id"):
        assert getattr(loaded, field) == getattr(tokenizer, field)
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    if name == "llama":
        assert loaded.prompt("Tom", chat=True) == tokenizer.prompt("Tom", chat=True)


def test_pieces_are_tokenised_on_their_own(plain):
    """The last letter of "apples" is a step: tokens never cross the border, and the written text is the same."""
    tokenizer = plain["gpt2"]
    codec = Codec(tokenizer, Format(question="{}", step="{}", answer="###{}"))
    example = Example("Tom has apple", ("s", "<<", "<3"), "26")
    ids = [
        *codec.question(example),
        *(token for step in codec.steps(example) for token in step),
        *codec.answer(example),
    ]
    parts = ["Tom has apple", "s", "<<", "<3", "###26"]
    assert ids == [*(token for part in parts for token in tokenizer.encode(part)), tokenizer.eos_id]
    assert ids[:-1] != tokenizer.encode("".join(parts))
    assert tokenizer.decode(ids) == "".join(parts)


def test_chat_is_the_tokenizers_template(folders, plain):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    codec = Codec(plain["llama"], Format(), chat=True)
    turn = [{"role": "user", "content": EXAMPLE.question}]
    prompt = theirs.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert codec.question(EXAMPLE) == prompt
    whole = [*prompt, *(token for step in codec.steps(EXAMPLE) for token in step), *codec.answer(EXAMPLE)]
    answer = "<<12+3=15>>\n<<15*2=30>>\n### 30"
    written = theirs.apply_chat_template([*turn, {"role": "assistant", "content": answer}], tokenize=False)
    assert theirs.decode(whole) == written  # steps, answer and end stand where the assistant's turn does
    assert prompt.count(theirs.bos_token_id) == 1


def test_chat_needs_a_template(plain):
    with pytest.raises(ValueError, match="chat=True: the tokenizer has no chat template"):
        Codec(plain["gpt2"], Format(), chat=True).question(EXAMPLE)


def test_a_prompt_does_not_depend_on_the_day(copy):
    folder = copy("llama")
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    settings_of(folder, chat_template=today + "{{ date_string }}")
    tokenizer = PretrainedTokenizer.load(folder)
    assert tokenizer.decode(tokenizer.prompt("Tom", chat=True)) == CHAT_DATE


def test_missing_folder_and_unreachable_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="[Pp]ass a folder"):
        PretrainedTokenizer.load("latentjax-tests/no-such-model")
    for load in (PretrainedTokenizer.load, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="not a folder|no such folder"):
            load(tmp_path / "nowhere")


@pytest.mark.parametrize("files", [(), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("tokenizer.pkl",)])
def test_folder_without_tokenizer_json(tmp_path, files):
    for file in files:
        (tmp_path / file).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    named = rf"holds only {', '.join(sorted(files))}" if files else "has no tokenizer.json"
    for load in (PretrainedTokenizer.load, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=named):
            load(tmp_path)


def test_malformed_files(copy):
    folder = copy("llama")
    settings_of(folder, pad_token="<pad>")
    with pytest.raises(ValueError, match=r"name \['<pad>'\], which the vocabulary of tokenizer.json lacks"):
        PretrainedTokenizer.load(folder)
    settings_of(folder, pad_token=None, eos_token=None)
    with pytest.raises(ValueError, match="no end-of-sequence token: set eos_token"):
        PretrainedTokenizer.load(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    for load in (PretrainedTokenizer.load, load_tokenizer):
        with pytest.raises(ValueError, match="its tokenizer cannot be read"):
            load(folder)


def test_code_beside_a_tokenizer_is_not_run(copy):
    folder = copy("llama")
    settings_of(folder, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="custom code"):
        PretrainedTokenizer.load(folder)
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_ends_every_text_is_refused(copy):
    folder = copy("llama")
    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    end = "<|eot_id|>"
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    backend.save(str(path))
    with pytest.raises(ValueError, match="cannot begin a sequence that goes on"):
        PretrainedTokenizer.load(folder)


def test_truncation_in_the_file_is_not_applied(copy):
    folder = copy("gpt2")
    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=4, pad_id=319, pad_token=END_OF_TEXT)
    backend.save(str(path))
    tokenizer = PretrainedTokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("Tom")) == 1


def test_load_tokenizer_tells_the_kinds_apart(folders, tmp_path):
    WordTokenizer.word_level(("a", "b")).save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), WordTokenizer)
    assert isinstance(load_tokenizer(folders["llama"]), PretrainedTokenizer)
