"""The vocabulary of a backbone: rows for new tokens, padding to a round size, and padding taken off again.

Row i of the embedding (and column i of an untied head) belongs to token id i. V rows are stored, the first `vocab_used` of
them are tokens of the tokenizer, and the rest is padding whose logits `decoder.head` shuts off: it is never sampled, adds
nothing to a softmax and gets no gradient. Letters: V rows, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from latentjax.backbone.config import BackboneConfig
from latentjax.tokenizers import Tokenizer

MULTIPLE = 128  # of rows: whole tiles of a matrix unit, and divisible by the usual numbers of devices


@dataclasses.dataclass(frozen=True)
class NewRow:
    """How the row of a new token starts, in the embedding and, where it is untied, in the head.

    copy    the row of the token `source`. Coconut's released code copies that of `<<` for all of its markers
    mean    the mean of the existing rows
    random  each number from N(0, s^2), s the standard deviation of all numbers of the existing rows

    Existing rows are those of the tokens that the vocabulary had before.
    """

    rule: Literal["copy", "mean", "random"]
    source: str | None = None

    def __post_init__(self):
        if self.rule not in ("copy", "mean", "random"):
            raise ValueError(f"new_row.rule={self.rule!r}: must be copy, mean or random")
        if (self.rule == "copy") != (self.source is not None):
            raise ValueError(
                f"new_row.source={self.source!r}: rule copy needs the token to copy, the other rules have none"
            )


def padded_size(tokens: int, multiple: int = MULTIPLE) -> int:
    """The smallest multiple of `multiple` that is at least `tokens`."""
    return -(-tokens // multiple) * multiple


def grown_config(config: BackboneConfig, tokenizer_size: int) -> BackboneConfig:
    """`config` with room for `tokenizer_size` tokens: rows padded to a multiple of 128 and never fewer than before."""
    size = padded_size(max(config.vocab_size, tokenizer_size))
    return dataclasses.replace(config, vocab_size=size, vocab_used=tokenizer_size)


def check_vocabulary(config: BackboneConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError, naming both sizes, if some token of `tokenizer` has no row in the backbone or may not be sampled."""
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"backbone.vocab_size={config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; set at least that"
        )
    if config.vocab_used is not None and config.vocab_used != tokenizer.vocab_size:
        raise ValueError(
            f"backbone.vocab_used={config.vocab_used}: the tokenizer has {tokenizer.vocab_size} tokens; set exactly that, "
            f"or None if no row is padding"
        )


def grow(
    config: BackboneConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    rules: Mapping[str, NewRow],
    key: Key[Array, ""],
) -> tuple[BackboneConfig, dict[str, Any]]:
    """Give the tokens of `tokenizer` that the backbone does not know yet their rows, and pad.

    All other parameters, the rows of known tokens included, keep their values. For parameters on a mesh, jit it as a
    function of `params` and `key`, with the shardings of what it returns.

    Args:
        params: the backbone's: "embed" holds "tokens" [V, D], "head" (untied) holds "kernel" [D, V].
        tokenizer: with the new tokens in it. A published vocabulary may have spare rows, which new tokens then take.
        rules: how the row of each new token starts. A token with a rule is new.
        key: for rule random; a row's draw depends on its id, not on what else is new.

    Returns:
        `grown_config` and the parameters for it; padding rows are zero, spare rows keep what they had.

    Raises:
        KeyError: a token of `rules` is unknown to the tokenizer.
        ValueError: `params` do not have `config.vocab_size` rows, the tokenizer has ids beyond them without a rule (it
            belongs to another model), or a row is to be copied from a token that is new itself.
    """
    ids, sources = _resolve(config, params, tokenizer, rules)
    known = min(_rows_before(config), tokenizer.vocab_size)
    existing = np.arange(config.vocab_size) < known
    existing[[i for i in ids if i < config.vocab_size]] = False
    grown = grown_config(config, tokenizer.vocab_size)

    def extend(table: Float[Array, "V D"], key: Key[Array, ""]) -> Float[Array, "W D"]:
        rows = {
            i: _new_row(table, existing, rule.rule, sources.get(i), jax.random.fold_in(key, i))
            for i, rule in ids.items()
        }
        table = jnp.pad(table, ((0, grown.vocab_size - config.vocab_size), (0, 0)))
        return table.at[jnp.array(list(rows))].set(jnp.stack(list(rows.values()))) if rows else table

    embed_key, head_key = jax.random.split(key)
    params = {**params, "embed": {**params["embed"], "tokens": extend(params["embed"]["tokens"], embed_key)}}
    if not config.tied_head:
        params["head"] = {**params["head"], "kernel": extend(params["head"]["kernel"].T, head_key).T}
    return grown, params


def _rows_before(config: BackboneConfig) -> int:
    return config.vocab_size if config.vocab_used is None else config.vocab_used


def _resolve(
    config: BackboneConfig, params: Mapping[str, Any], tokenizer: Tokenizer, rules: Mapping[str, NewRow]
) -> tuple[dict[int, NewRow], dict[int, int]]:
    """The rule of each new id, and the id that it copies if it copies one. Raises what `grow` raises."""
    table = params["embed"]["tokens"]
    if table.shape[0] != config.vocab_size:
        raise ValueError(f"backbone.vocab_size={config.vocab_size}: the embedding has {table.shape[0]} rows")
    ids = {tokenizer.token_id(token): rule for token, rule in rules.items()}
    before = _rows_before(config)
    missing = [i for i in range(before, tokenizer.vocab_size) if i not in ids]
    if missing:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding rows for {before}: no rule for a new row says how "
            f"id {missing[0]} starts (nor {len(missing) - 1} more). Is it this model's tokenizer?"
        )
    sources = {i: tokenizer.token_id(rule.source) for i, rule in ids.items() if rule.source is not None}
    for i, source in sources.items():
        if source in ids:
            raise ValueError(f"new_row.source={ids[i].source!r}: is a new token itself, without a row to copy")
    return ids, sources


def _new_row(
    table: Float[Array, "V D"], existing: np.ndarray, rule: str, source: int | None, key: Key[Array, ""]
) -> Float[Array, "D"]:
    """One row by its rule, in the table's dtype, with statistics in fp32."""
    if source is not None:
        return table[source]
    where = existing[:, None]
    if rule == "mean":
        return jnp.mean(table, axis=0, dtype=jnp.float32, where=where).astype(table.dtype)
    std = jnp.std(table, dtype=jnp.float32, where=where)
    return (std * jax.random.normal(key, table.shape[1:], jnp.float32)).astype(table.dtype)


def trim(config: BackboneConfig, params: Mapping[str, Any]) -> tuple[BackboneConfig, dict[str, Any]]:
    """Take the padding off, for programs that know none (an exported folder): logits of all tokens stay what they are."""
    size = config.vocab_used
    if size is None:
        return config, dict(params)
    params = {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"][:size]}}
    if not config.tied_head:
        params["head"] = {**params["head"], "kernel": params["head"]["kernel"][:, :size]}
    return dataclasses.replace(config, vocab_size=size, vocab_used=None), params
