"""Small tokenizers in the formats of published models, trained on a few sentences: nothing is downloaded.

`gpt2_tokenizer` and `llama_tokenizer` write what the repositories of GPT-2 and of Llama-3-Instruct hold beside the weights.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Enough repetition that "<<", "###", ">>\n" and frequent words become tokens of their own.
TEXTS = (
    "Tom has 12 apples and buys 3 more.\nHow many apples does Tom have?\n",
    "<<12+3=15>>\n<<15*2=30>>\n<<30-4=26>>\n### 26",
    "Every lempus is a terpus.\nTom is a lempus.\nIs Tom a terpus or a brimpus?\n",
    "Tom is a lempus. Every lempus is a terpus.\n### Tom is a terpus.",
    "user\nsystem\nassistant\n",
)
END_OF_TEXT = "<|endoftext|>"
LLAMA_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# One turn is a header, a blank line, the trimmed text and <|eot_id|>; the prompt ends with the assistant's header.
LLAMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def gpt2_tokenizer(folder: str | os.PathLike, vocab_size: int = 320) -> int:
    """Write a GPT-2 tokenizer: byte-level BPE, `<|endoftext|>` as the last id and its only special token, no padding token.

    Files as in openai-community/gpt2, where the class is known from the model's config.json only; here from the
    tokenizer's. Returns the number of tokens, `vocab_size` at most."""
    backend = _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size, [END_OF_TEXT])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    size = _write(folder, backend, {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024})
    backend.model.save(str(folder))  # vocab.json and merges.txt
    return size


def llama_tokenizer(folder: str | os.PathLike, vocab_size: int = 320) -> int:
    """Write a Llama-3-Instruct tokenizer: byte-level BPE, `<|begin_of_text|>` before each text, a chat template, no padding.

    Returns the number of tokens, `vocab_size` at most."""
    split = [
        pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend = _trained(pre_tokenizers.Sequence(split), vocab_size, LLAMA_SPECIALS)
    bos = LLAMA_SPECIALS[0]
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "model_max_length": 131072,
        "chat_template": LLAMA_TEMPLATE,
    }
    return _write(folder, backend, settings)


def _trained(splitter: pre_tokenizers.PreTokenizer, vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """Byte-level BPE behind `splitter`; the special tokens get the last ids, as in both families."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_special_tokens(list(specials))
    return backend


def _write(folder: str | os.PathLike, backend: Tokenizer, settings: dict) -> int:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()
