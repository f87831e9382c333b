"""New rows by their rules, padding that is never sampled, and padding taken off again."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentjax.backbone import decoder
from latentjax.backbone.config import BackboneConfig
from latentjax.backbone.vocabulary import NewRow, check_vocabulary, grow, grown_config, padded_size, trim
from latentjax.methods import CoT
from latentjax.methods.base import Lengths
from latentjax.rollout import Kind
from latentjax.sampling import Sampling
from latentjax.sharding import make_mesh, param_shardings
from latentjax.tasks.base import Example, Format
from latentjax.tokenizers import END_THOUGHTS, START_THOUGHTS, Codec, PretrainedTokenizer, WordTokenizer
from tests.close import assert_close
from tests.pretrained_folders import gpt2_tokenizer
from train.config import from_json, to_json

WORDS = tuple("abcdefgh")
OLD = WordTokenizer.word_level(WORDS)  # 10 tokens
NEW = WordTokenizer.word_level((*WORDS, "x", "y"))  # two more, at the end
TIED = BackboneConfig(vocab_size=10, max_positions=32, width=12, layers=1, heads=2, qkv_bias=False)
UNTIED = dataclasses.replace(TIED, tied_head=False)
COPY, MEAN, RANDOM = NewRow("copy", "c"), NewRow("mean"), NewRow("random")
KEY = jax.random.key(3)


def fresh(config: BackboneConfig):
    return jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))


def tables(config: BackboneConfig, params) -> list[np.ndarray]:
    """The embedding, and the head if it is untied, as [V, D]."""
    found = [params["embed"]["tokens"]]
    return [np.asarray(x) for x in (found if config.tied_head else [*found, params["head"]["kernel"].T])]


@given(st.integers(1, 2000), st.integers(1, 300))
def test_padded_size_is_the_next_multiple(tokens, multiple):
    assert padded_size(tokens, multiple) == next(n for n in range(tokens, tokens + multiple) if n % multiple == 0)


def test_published_sizes():
    assert padded_size(50257 + 2) == 50304
    assert padded_size(128256) == 128256


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_rows_by_their_rules(config):
    params = fresh(config)
    grown, new = grow(config, params, NEW, {"x": COPY, "y": MEAN}, KEY)
    assert (grown.vocab_size, grown.vocab_used) == (128, 12)
    for old, table in zip(tables(config, params), tables(grown, new), strict=True):
        np.testing.assert_array_equal(table[:10], old)
        np.testing.assert_array_equal(table[10], old[OLD.token_id("c")])
        np.testing.assert_allclose(table[11], old.astype(np.float64).mean(0), rtol=0, atol=1e-8)
        assert not table[12:].any()
    expected = jax.eval_shape(lambda: decoder.init(grown, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, expected)
    for part in ("layers", "norm"):
        assert new[part] is params[part]
    np.testing.assert_array_equal(new["embed"]["positions"], params["embed"]["positions"])


def test_random_rows_have_the_spread_of_the_existing_ones():
    config = dataclasses.replace(UNTIED, width=4096, heads=1)
    draws = jax.random.normal(jax.random.key(1), (2, 10, 4096))
    params = {"embed": {"tokens": 3.0 * draws[0] + 1.0}, "head": {"kernel": 0.5 * draws[1].T}}
    grown, new = grow(config, params, NEW, {"x": RANDOM, "y": RANDOM}, KEY)
    for old, table in zip(tables(config, params), tables(grown, new), strict=True):
        for row in (table[10], table[11]):
            assert abs(row.std() / old.std() - 1) < 0.1
            assert abs(row.mean()) < 0.1 * old.std()
        assert abs(np.corrcoef(table[10], table[11])[0, 1]) < 0.1
    embed, head = tables(grown, new)
    assert abs(np.corrcoef(embed[10], head[10])[0, 1]) < 0.1
    _, alone = grow(config, params, NEW, {"x": MEAN, "y": RANDOM}, KEY)  # a draw depends on the id only
    np.testing.assert_array_equal(tables(grown, alone)[0][11], embed[11])
    _, other = grow(config, params, NEW, {"x": MEAN, "y": RANDOM}, jax.random.key(4))
    assert (tables(grown, other)[0][11] != embed[11]).mean() > 0.9


def test_new_tokens_take_spare_rows():
    """As in Qwen: more rows than tokens. Spare rows are no tokens, so no statistic counts them."""
    config = dataclasses.replace(TIED, vocab_size=130)
    params = fresh(config)
    grown, new = grow(config, params, NEW, {"x": MEAN, "y": COPY}, KEY)
    assert (grown.vocab_size, grown.vocab_used) == (256, 12)
    (old,), (table,) = tables(config, params), tables(grown, new)
    np.testing.assert_allclose(table[10], old[:10].astype(np.float64).mean(0), rtol=0, atol=1e-8)
    np.testing.assert_array_equal(table[11], old[4])
    np.testing.assert_array_equal(table[12:130], old[12:])


def test_growing_again_counts_no_padding():
    grown, new = grow(TIED, fresh(TIED), NEW, {"x": COPY, "y": COPY}, KEY)
    more = WordTokenizer.word_level((*WORDS, "x", "y", "z"))
    again, newer = grow(grown, new, more, {"z": MEAN}, KEY)
    assert (again.vocab_size, again.vocab_used) == (128, 13)
    (table,) = tables(grown, new)
    np.testing.assert_allclose(tables(again, newer)[0][12], table[:12].astype(np.float64).mean(0), rtol=0, atol=1e-8)


def test_rows_keep_the_parameters_dtype():
    config = dataclasses.replace(UNTIED, param_dtype="bfloat16")
    grown, new = grow(config, fresh(config), NEW, {"x": MEAN, "y": RANDOM}, KEY)
    assert {x.dtype for x in (new["embed"]["tokens"], new["head"]["kernel"])} == {jnp.dtype("bfloat16")}
    assert grown.param_dtype == "bfloat16"


def test_coconuts_rule(tmp_path):
    """The released code copies the row of `<<` for its markers."""
    config = dataclasses.replace(TIED, vocab_size=gpt2_tokenizer(tmp_path))
    tokenizer = PretrainedTokenizer.load(tmp_path, (START_THOUGHTS, END_THOUGHTS))
    rules = {token: NewRow("copy", "<<") for token in tokenizer.added}
    grown, new = grow(config, fresh(config), tokenizer, rules, KEY)
    assert (grown.vocab_size, grown.vocab_used) == (384, 322)
    (table,) = tables(grown, new)
    for marker in (START_THOUGHTS, END_THOUGHTS):
        np.testing.assert_array_equal(table[tokenizer.token_id(marker)], table[tokenizer.token_id("<<")])


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_growing_on_a_mesh_gives_the_same_rows(config):
    params = fresh(config)
    mesh = make_mesh(2, 2, 2)
    rules = {"x": MEAN, "y": RANDOM}
    config_here, here = grow(config, params, NEW, rules, KEY)

    def grow_params(params, key):
        return grow(config, params, NEW, rules, key)[1]

    shardings = param_shardings(mesh, jax.eval_shape(grow_params, params, KEY))
    there = jax.jit(grow_params, out_shardings=shardings)(jax.device_put(params, param_shardings(mesh, params)), KEY)
    assert_close(there, here, 1e-5)
    table = there["embed"]["tokens"]
    assert table.addressable_shards[0].data.shape == (config_here.vocab_size // 2, config.width // 2)


def padded(config: BackboneConfig):
    """A grown backbone whose padding rows, were they tokens, would beat every token at every position."""
    grown, params = grow(config, fresh(config), NEW, {"x": MEAN, "y": MEAN}, KEY)
    direction = 50.0 * jax.random.normal(jax.random.key(5), (1, config.width))
    rows = jnp.concatenate([direction, -direction] * 58)  # one of the two has a large positive logit
    if config.tied_head:
        params["embed"] = {**params["embed"], "tokens": params["embed"]["tokens"].at[12:].set(rows)}
    else:
        params["head"] = {"kernel": params["head"]["kernel"].at[:, 12:].set(rows.T)}
    return grown, params


@pytest.mark.parametrize(
    ("config", "sampling"),
    [(TIED, Sampling()), (UNTIED, Sampling(temperature=1.5)), (TIED, Sampling(temperature=1.0, top_k=20, top_p=0.9))],
    ids=["tied", "untied, sampled", "tied, sampled"],
)
def test_padding_is_never_generated(config, sampling):
    codec = Codec(NEW, Format(question="{}", step="{}", answer="{}"))
    grown, params = padded(config)
    examples = [Example(q, (), "a") for q in ("a b c", "x", "y h g f", "d d")]

    def ids(backbone):
        method = CoT(backbone, Lengths(question=4, text=12), epochs=1)
        generate = jax.jit(functools.partial(method.generate, sampling=sampling))
        generation = generate({"backbone": params, "method": {}}, method.prompts(examples, codec), jax.random.key(1))
        text = np.asarray(generation.kind) == Kind.TEXT
        assert np.isfinite(np.asarray(generation.log_probs)[text]).all()
        return np.asarray(generation.tokens)[text]

    assert (ids(grown) < NEW.vocab_size).all()
    assert (ids(dataclasses.replace(grown, vocab_used=None)) >= NEW.vocab_size).any()  # without the mask they win


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_padding_adds_nothing_to_a_softmax_and_gets_no_gradient(config):
    grown, params = padded(config)
    small, kept = trim(grown, params)
    assert (small.vocab_size, small.vocab_used) == (12, None)
    tokens = jnp.array([[2, 5, 10, 11, 3]])

    def surprise(config, params):
        out = decoder.apply(config, params, tokens, jnp.ones(tokens.shape, bool))
        log_probs = jax.nn.log_softmax(decoder.head(config, params, out.hidden))
        entropy = -(jnp.exp(log_probs) * log_probs).sum()
        return entropy - log_probs[..., 4].sum(), log_probs

    differentiate = jax.jit(jax.value_and_grad(surprise, argnums=1, has_aux=True), static_argnums=0)
    (value, log_probs), gradient = differentiate(grown, params)
    (expected, expected_log_probs), expected_gradient = differentiate(small, kept)
    assert_close(log_probs[..., :12], expected_log_probs, 1e-5)
    assert_close(value, expected, 1e-5)
    assert_close(trim(grown, gradient)[1], expected_gradient, 1e-4)
    for table in tables(grown, gradient):
        assert not table[12:].any()
        assert table[:12].any()


def test_trim_without_padding_changes_nothing():
    params = fresh(TIED)
    config, same = trim(TIED, params)
    assert config == TIED
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))


def test_vocabulary_that_disagrees_with_the_embedding():
    params = fresh(TIED)
    with pytest.raises(
        ValueError, match=r"tokenizer has 12 tokens, the embedding rows for 10.*id 10 starts \(nor 1 more"
    ):
        grow(TIED, params, NEW, {}, KEY)
    with pytest.raises(ValueError, match="id 11 starts"):
        grow(TIED, params, NEW, {"x": MEAN}, KEY)
    with pytest.raises(ValueError, match="vocab_size=11: the embedding has 10 rows"):
        grow(dataclasses.replace(TIED, vocab_size=11), params, OLD, {}, KEY)
    with pytest.raises(KeyError, match="'z'"):
        grow(TIED, params, NEW, {"x": MEAN, "y": MEAN, "z": MEAN}, KEY)
    with pytest.raises(KeyError, match="'z'"):
        grow(TIED, params, NEW, {"x": MEAN, "y": NewRow("copy", "z")}, KEY)
    with pytest.raises(ValueError, match="source='x': is a new token itself"):
        grow(TIED, params, NEW, {"x": MEAN, "y": NewRow("copy", "x")}, KEY)
    with pytest.raises(ValueError, match="vocab_size=10: the tokenizer has 12 tokens"):
        check_vocabulary(TIED, NEW)
    with pytest.raises(ValueError, match="vocab_used=11: the tokenizer has 12 tokens"):
        check_vocabulary(dataclasses.replace(TIED, vocab_size=128, vocab_used=11), NEW)
    check_vocabulary(grown_config(TIED, 12), NEW)
    check_vocabulary(dataclasses.replace(TIED, vocab_size=16), NEW)


def test_bad_rules_and_sizes():
    for wrong in ({"rule": "copy"}, {"rule": "mean", "source": "a"}):
        with pytest.raises(ValueError, match=r"new_row\.source"):
            NewRow(**wrong)
    with pytest.raises((ValueError, TypeError), match="rule"):  # of type under the tests' type checker
        NewRow("median")
    for used in (0, 11):
        with pytest.raises(ValueError, match=f"vocab_used={used}: must lie in 1 .. vocab_size=10"):
            dataclasses.replace(TIED, vocab_used=used)


def test_rules_are_part_of_a_config_file():
    for rule in (COPY, MEAN, RANDOM):
        assert from_json(json.loads(json.dumps(to_json(rule)))) == rule
