"""Randomly initialised models of `transformers` (torch) in several shapes, saved as published checkpoints are."""

import copy
import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

_BASE = dict(
    vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, attention_dropout=0.0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
_ROPE = dict(rope_type="default", rope_theta=20.0)
# Short wavelengths, so that all three ranges of the scaling occur within a few positions.
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=20.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=37, n_positions=128, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to build: its family and the arguments of its configuration."""

    family: str
    arguments: dict[str, Any]

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        """fp32, in evaluation mode. Every weight is moved: a fresh model has zero biases and unit scales, which would
        hide a mix-up."""
        torch.manual_seed(seed)
        head = "LMHeadModel" if self.family == "GPT2" else "ForCausalLM"
        config = getattr(transformers, f"{self.family}Config")(**self.arguments)
        model = getattr(transformers, f"{self.family}{head}")(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        return model


SHAPES = {
    "gpt2": Shape("GPT2", _GPT2),
    "gpt2, odd sizes, untied": Shape(
        "GPT2", _GPT2 | dict(vocab_size=29, n_embd=30, n_head=3, n_inner=44, activation_function="gelu",
                             tie_word_embeddings=False),
    ),
    "llama 3, grouped, tied": Shape(
        "Llama", _BASE | dict(num_key_value_heads=2, rope_parameters=_LLAMA3, tie_word_embeddings=True)
    ),
    "llama, biases, wide heads": Shape(
        "Llama", _BASE | dict(head_dim=10, attention_bias=True, mlp_bias=True, rope_parameters=_ROPE),
    ),
    "qwen2, grouped, tied": Shape(
        "Qwen2", _BASE | dict(num_key_value_heads=2, rope_parameters=_ROPE, tie_word_embeddings=True)
    ),
    "qwen2, odd sizes": Shape(
        "Qwen2", _BASE | dict(vocab_size=31, hidden_size=30, intermediate_size=50, num_attention_heads=3,
                              num_key_value_heads=1, rope_parameters=_ROPE),
    ),
    "qwen3, tied": Shape(
        "Qwen3", _BASE | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_ROPE, tie_word_embeddings=True)
    ),
    "qwen3, biases, one key head": Shape(
        "Qwen3", _BASE | dict(num_key_value_heads=1, head_dim=8, attention_bias=True, rope_parameters=_ROPE),
    ),
}  # fmt: skip


def save(model: transformers.PreTrainedModel, folder: pathlib.Path) -> pathlib.Path:
    """`folder`, with the model's files in it."""
    model.save_pretrained(folder)
    return folder


def logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V]. A float32 model computes them in float64, so that rounding is ours alone: two float32 results were seen to
    differ by 2e-5 instead of 1e-6 in 2 of some 300 processes, and which of the two was off is not known."""
    single = next(model.parameters()).dtype == torch.float32
    model = copy.deepcopy(model).double() if single else model
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def loss_gradients(model: transformers.PreTrainedModel, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Mean cross-entropy of the next token, and its gradient by the name of each tensor in the checkpoint."""
    ids = torch.from_numpy(tokens).long()
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = {name: weight.grad.float().numpy().copy() for name, weight in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients
