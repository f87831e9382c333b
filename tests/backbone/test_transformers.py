"""Published architectures against `transformers` (torch): what `pretrained` loads computes the same, and what it saves loads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentjax.backbone import decoder, pretrained
from latentjax.backbone.cache import empty_cache
from latentjax.backbone.config import BackboneConfig
from latentjax.generation import generate
from latentjax.rollout import Backbone, Kind
from tests.close import assert_close

torch = pytest.importorskip("torch", reason="torch is not installed: pip install latentjax[torch]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install latentjax[hub]")
reference = pytest.importorskip("tests.backbone.reference")
pytestmark = pytest.mark.filterwarnings("default")  # those two warn about themselves


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of theirs, and what we load from its folder."""

    model: Any
    config: BackboneConfig
    params: Any
    forward: Any  # compiled: tokens [3, T], valid [3, T] -> logits [3, T, V]


@pytest.fixture(scope="module", params=list(reference.SHAPES))
def pair(request, tmp_path_factory):
    model = reference.SHAPES[request.param].build()
    config, params = pretrained.load(reference.save(model, tmp_path_factory.mktemp("model")))

    def forward(tokens, valid):
        return decoder.head(config, params, decoder.apply(config, params, tokens, valid).hidden)

    return Pair(model, config, params, jax.jit(forward))


def tokens_of(config, shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def next_token_loss(config, params, tokens):
    out = pretrained.logits(config, params, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], tokens[:, 1:]).mean()


def test_logits(pair):
    model, config = pair.model, pair.config
    tokens = tokens_of(config, (3, 24))
    assert_close(pair.forward(tokens, np.ones(tokens.shape, bool)), reference.logits(model, tokens), 1e-5)


def test_gradient_of_every_parameter(pair):
    model, config, params = pair.model, pair.config, pair.params
    tokens = tokens_of(config, (2, 24))
    loss, gradients = jax.jit(jax.value_and_grad(next_token_loss, argnums=1), static_argnums=0)(config, params, tokens)
    their_loss, theirs = reference.loss_gradients(model, tokens)
    assert_close(loss, np.float64(their_loss), 1e-5)
    assert_close(dict(pretrained.tensors_of(config, gradients)), theirs, 1e-4)


def test_cached_decoding_equals_prefill(pair):
    model, config, params = pair.model, pair.config, pair.params
    tokens = tokens_of(config, (2, 24))
    cache = empty_cache(config, 2, 24)

    @jax.jit
    def step(cache, token):
        valid = jnp.ones((2, 1), bool)
        out = decoder.apply(config, params, token[:, None], valid, cache=cache)
        return cache.write(out.kv, valid), decoder.head(config, params, out.hidden[:, 0])

    _, rows = jax.lax.scan(step, cache, tokens.T)
    assert_close(jnp.swapaxes(rows, 0, 1), reference.logits(model, tokens), 1e-5)


def test_padding_on_either_side_changes_nothing(pair):
    lengths, width = (11, 24, 17), 24
    rows = [tokens_of(pair.config, (1, length), seed) for seed, length in enumerate(lengths)]
    alone = [reference.logits(pair.model, row) for row in rows]
    for side in ("left", "right"):
        gaps = [(width - length, 0) if side == "left" else (0, width - length) for length in lengths]
        padded = np.concatenate([np.pad(row, ((0, 0), gap)) for row, gap in zip(rows, gaps, strict=True)])
        valid = np.concatenate(
            [np.pad(np.ones_like(row, bool), ((0, 0), gap)) for row, gap in zip(rows, gaps, strict=True)]
        )
        for (before, after), got, expected in zip(gaps, pair.forward(padded, valid), alone, strict=True):
            assert_close(got[None, before : width - after], expected, 1e-5)


def test_greedy_generation_is_theirs_token_for_token(pair):
    model, config, params = pair.model, pair.config, pair.params
    prompts = tokens_of(config, (3, 7))
    write = jax.jit(
        lambda params, question: generate(
            Backbone(config, params), question, jnp.ones(question.shape, bool), jax.random.key(0), thinking=None, slots=0,
            max_new_tokens=64, ids={"eos": -1, "pad": 0},
        )
    )  # fmt: skip
    ours = write(params, prompts)
    assert (np.asarray(ours.kind[:, 7:]) == Kind.TEXT).all()
    theirs = model.generate(
        torch.from_numpy(prompts).long(), attention_mask=torch.ones(prompts.shape, dtype=torch.long), do_sample=False,
        max_new_tokens=64, min_new_tokens=64, pad_token_id=0,
    ).numpy()  # fmt: skip
    np.testing.assert_array_equal(ours.tokens, theirs)
    assert len(np.unique(theirs[:, 7:])) > 1  # one token over and over would prove little


def test_what_is_saved_loads_in_transformers(pair, tmp_path):
    model, config, params = pair.model, pair.config, pair.params
    pretrained.save(tmp_path / "ours", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = tokens_of(config, (2, 24))
    assert type(theirs) is type(model)
    np.testing.assert_array_equal(reference.logits(theirs, tokens), reference.logits(model, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, tmp_path):
    folder = tmp_path / "model"
    reference.save(reference.SHAPES["qwen3, tied"].build().to(getattr(torch, dtype)), folder)
    config, params = pretrained.load(folder)
    assert config.param_dtype == dtype and {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    wide, widened = pretrained.load(folder, dtype="float32")
    assert wide.param_dtype == "float32" and {str(x.dtype) for x in jax.tree.leaves(widened)} == {"float32"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokens_of(config, (2, 24))
    theirs = reference.logits(model, tokens)
    assert_close(pretrained.logits(config, params, tokens), theirs, 1e-5)
    assert_close(pretrained.logits(wide, widened, tokens), theirs, 1e-5)
