"""Think, then answer: greedy generation against re-running the whole sequence token by token, its layout, and its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.generation import generate
from latentjax.rollout import Backbone, Kind, Prefix
from latentjax.sampling import Sampling
from latentjax.thoughts.feedback import feedback
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit
from tests.test_rollout import CONFIG, MASK, PARAMS, QUESTION, alternate, mixture, row_embeddings

SLOTS, END, TEXT, NEVER = 3, 3, 5, -1
LIMITS = jnp.array([2, 3, 0])
STATIC = ("config", "make", "slots", "slots_per_step", "sampling", "hide_question", "record")


@functools.partial(jit, static_argnames=STATIC)
def generation(
    limits, *, config=CONFIG, make=None, slots=SLOTS, eos=NEVER, question=QUESTION, mask=MASK, key=0, **options
):
    backbone = Backbone(config, PARAMS)
    return generate(
        backbone, jnp.asarray(question), jnp.asarray(mask), jax.random.key(key),
        thinking=feedback(limits) if make is None else make(backbone, limits), slots=slots, max_new_tokens=TEXT,
        ids={"eos": jnp.asarray(eos), "pad": jnp.int32(0)}, **options,
    )  # fmt: skip


def expected(row, k, *after, eos=NEVER, hide=False):
    """Embeddings of the question, k thoughts and the tokens `after`, and the greedy text that follows."""
    x = naive.think(CONFIG, PARAMS, row_embeddings(row), k)
    if after:
        x = jnp.concatenate([x, naive.embed(PARAMS, after)])
    hidden = (int(MASK[row].sum()), k) if hide else None
    return naive.greedy(CONFIG, PARAMS, x, TEXT, eos, hidden_question=hidden)


def assert_text(out, row, text):
    tokens, scores = text
    n = len(tokens)
    start = out.tokens.shape[1] - TEXT
    assert np.asarray(out.tokens)[row, start : start + n].tolist() == tokens
    assert np.asarray(out.kind)[row, start:].tolist() == [Kind.TEXT] * n + [Kind.PAD] * (TEXT - n)
    assert_close(out.log_probs[row, start : start + n], scores, 1e-5)
    assert (np.asarray(out.tokens)[row, start + n :] == 0).all()
    assert (np.asarray(out.log_probs)[row, start + n :] == 0).all()


@pytest.mark.parametrize("end_marker", [None, END], ids=["no marker", "marker"])
def test_greedy_equals_rerunning_token_by_token(end_marker):
    out = generation(LIMITS, end_marker=end_marker)
    for row in range(3):
        assert_text(out, row, expected(row, int(LIMITS[row]), *([] if end_marker is None else [end_marker])))


def test_scanned_layers_generate_the_same():
    ours = generation(LIMITS, config=naive.with_scan(CONFIG, True), end_marker=END)
    unrolled = generation(LIMITS, end_marker=END)
    assert (ours.tokens == unrolled.tokens).all()
    assert_close(ours.log_probs, unrolled.log_probs, 1e-5)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_forced_number_of_thoughts(k):
    out = generation(jnp.full(3, k), end_marker=END)
    assert np.asarray(out.thought_mask).sum(axis=1).tolist() == [k] * 3
    for row in range(3):
        assert_text(out, row, expected(row, k, END))


def test_forced_prefix_of_ragged_tokens():
    tokens, mask = jnp.array([[4, 5], [6, 0], [0, 0]]), jnp.array([[1, 1], [1, 0], [0, 0]], bool)
    out = generation(LIMITS, end_marker=END, prefix=Prefix(tokens, mask))
    for row, after in enumerate(([4, 5], [6], [])):
        assert_text(out, row, expected(row, int(LIMITS[row]), END, *after))
    forced = slice(6 + SLOTS, 6 + SLOTS + 3)
    assert np.asarray(out.tokens)[:, forced].tolist() == [[END, 4, 5], [END, 6, 0], [END, 0, 0]]
    assert np.asarray(out.kind)[:, forced].tolist() == [
        [Kind.MARKER, Kind.TEXT, Kind.TEXT], [Kind.MARKER, Kind.TEXT, Kind.PAD], [Kind.MARKER, Kind.PAD, Kind.PAD],
    ]  # fmt: skip
    assert (np.asarray(out.log_probs)[:, forced] == 0).all()
    assert np.asarray(out.cost.answer_tokens).tolist() == [TEXT] * 3  # produced, not forced


@pytest.mark.parametrize("end_marker", [None, END], ids=["no marker", "marker"])
def test_hidden_question(end_marker):
    out = generation(LIMITS, hide_question=True, end_marker=end_marker)
    after = [] if end_marker is None else [end_marker]
    for row in range(2 if end_marker is None else 3):
        assert_text(out, row, expected(row, int(LIMITS[row]), *after, hide=True))
    assert (out.log_probs != generation(LIMITS, end_marker=end_marker).log_probs).any()


def test_text_ends_at_the_end_of_sequence():
    free = np.asarray(generation(LIMITS, end_marker=END).tokens)[:, -TEXT:]
    eos = int(free[0, 2])  # what row 0 says third; the other rows end where they happen to say it
    out = generation(LIMITS, end_marker=END, eos=eos)
    for row in range(3):
        tokens, scores = expected(row, int(LIMITS[row]), END, eos=eos)
        assert_text(out, row, (tokens, scores))
        assert int(out.cost.answer_tokens[row]) == len(tokens)
    assert len(expected(0, 2, END, eos=eos)[0]) <= 3


def test_layout_of_a_generation():
    out = generation(LIMITS, end_marker=END)
    total = 6 + SLOTS + 1 + TEXT
    assert out.tokens.shape == out.kind.shape == out.log_probs.shape == (3, total)
    assert out.thoughts.shape == (3, SLOTS, 12)
    assert (np.asarray(out.tokens)[:, :6] == np.where(MASK, QUESTION, 0)).all()
    assert (np.asarray(out.kind)[:, :6] == np.where(MASK, Kind.QUESTION, Kind.PAD)).all()
    used = np.arange(SLOTS) < np.asarray(LIMITS)[:, None]
    assert (np.asarray(out.thought_mask) == used).all()
    assert (np.asarray(out.kind)[:, 6 : 6 + SLOTS] == np.where(used, Kind.THOUGHT, Kind.PAD)).all()
    assert (np.asarray(out.tokens)[:, 6 : 6 + SLOTS] == 0).all()
    assert (np.asarray(out.tokens)[:, 6 + SLOTS] == END).all()


def test_mixed_slots_show_their_token():
    out = generation(LIMITS, make=mixture, end_marker=END)
    used = np.asarray(out.thought_mask)
    kind, tokens = np.asarray(out.kind)[:, 6 : 6 + SLOTS], np.asarray(out.tokens)[:, 6 : 6 + SLOTS]
    assert (kind == np.where(used, Kind.MIXED, Kind.PAD)).all()
    hidden = naive.forward(CONFIG, PARAMS, row_embeddings(0))[-1]
    assert tokens[0, 0] == int(jnp.argmax(naive.logits(CONFIG, PARAMS, hidden)))
    assert (tokens[~used] == 0).all()


def test_text_between_thoughts_is_text():
    out = generation(LIMITS, make=alternate, end_marker=END)
    writes = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
    slots = slice(6, 6 + SLOTS)
    assert (np.asarray(out.kind)[:, slots] == np.where(writes, Kind.TEXT, Kind.THOUGHT)).all()
    assert (np.asarray(out.thought_mask) == ~writes).all()
    for row in range(3):
        x, tokens = row_embeddings(row), []
        for write in writes[row]:
            hidden = naive.forward(CONFIG, PARAMS, x)[-1]
            tokens.append(int(jnp.argmax(naive.logits(CONFIG, PARAMS, hidden))) if write else 0)
            x = jnp.concatenate([x, naive.embed(PARAMS, tokens[-1:]) if write else hidden[None]])
        assert np.asarray(out.tokens)[row, slots].tolist() == tokens
        x = jnp.concatenate([x, naive.embed(PARAMS, [END])])
        assert_text(out, row, naive.greedy(CONFIG, PARAMS, x, TEXT, NEVER))
    assert np.asarray(out.cost.answer_tokens).tolist() == [TEXT + 2, TEXT + 1, TEXT + 2]


def test_cost_counts_every_forward_and_every_valid_position():
    """A row's last text token is read by nothing: it costs an answer token and no forward."""
    out = generation(LIMITS, end_marker=END)
    lengths, k = MASK.sum(axis=1), np.asarray(LIMITS)
    assert np.asarray(out.cost.forwards).tolist() == (1 + k + 1 + TEXT - 1).tolist()
    assert np.asarray(out.cost.positions).tolist() == (lengths + k + 1 + TEXT - 1).tolist()
    bare = generation(LIMITS)
    assert np.asarray(bare.cost.forwards).tolist() == (1 + k + TEXT - 1).tolist()


def test_recorded_inputs_and_hidden_states():
    out = generation(LIMITS, end_marker=END, record=("inputs", "hidden", "kv"))
    for row in range(2):
        k, n = int(LIMITS[row]), int(MASK[row].sum())
        x = naive.think(CONFIG, PARAMS, row_embeddings(row), k)
        assert_close(out.recorded["inputs"][row, :k], x[n:], 1e-5)
        assert_close(out.recorded["hidden"][row, :k], naive.forward(CONFIG, PARAMS, x)[n:], 1e-5)
    assert [x.shape for x in out.recorded["kv"]] == [(2, 3, SLOTS, 2, 6)] * 2


def test_a_batch_equals_its_rows():
    whole = generation(LIMITS, end_marker=END)
    for row in range(3):
        one = slice(row, row + 1)
        alone = generation(LIMITS[one], question=QUESTION[one], mask=MASK[one], end_marker=END)
        assert (alone.tokens[0] == whole.tokens[row]).all()
        assert_close(alone.log_probs[0], whole.log_probs[row], 1e-5)
        assert_close(jax.tree.map(lambda x: x[0], alone.cost), jax.tree.map(lambda x, r=row: x[r], whole.cost), 0)


def test_wider_padding_changes_nothing():
    whole = generation(LIMITS, end_marker=END)
    wide = generation(
        LIMITS,
        question=np.pad(QUESTION, ((0, 0), (0, 3))),
        mask=np.pad(MASK, ((0, 0), (0, 3))),
        slots=5,
        end_marker=END,
    )
    assert (wide.tokens[:, -TEXT:] == whole.tokens[:, -TEXT:]).all()
    assert_close(wide.log_probs[:, -TEXT:], whole.log_probs[:, -TEXT:], 1e-5)


def test_a_further_context_costs_its_positions_and_changes_no_text():
    null = (jnp.full((3, 2), 2), jnp.array([[1, 0]] * 3, bool))
    out, plain = generation(LIMITS, end_marker=END, further={"null": null}), generation(LIMITS, end_marker=END)
    assert (out.tokens == plain.tokens).all()
    assert_close(out.log_probs, plain.log_probs, 1e-5)
    extra = np.asarray(out.cost.positions - plain.cost.positions)
    assert extra.tolist() == [1 + 2 + 1, 1 + 3 + 1, 1 + 0 + 1]  # its question, the thoughts, the marker
    assert (out.cost.forwards == plain.cost.forwards).all()


def test_sampled_text_depends_on_the_key_and_has_the_log_probability_of_the_model():
    draw = Sampling(temperature=1.5)
    a, b, c = (generation(LIMITS, end_marker=END, key=key, sampling=draw) for key in (1, 1, 2))
    assert (a.tokens == b.tokens).all()
    assert (a.tokens != c.tokens).any()
    for row in range(3):
        x = naive.think(CONFIG, PARAMS, row_embeddings(row), int(LIMITS[row]))
        text = np.asarray(a.tokens)[row, -TEXT:]
        x = jnp.concatenate([x, naive.embed(PARAMS, [END, *text[:-1]])])
        scores = jax.nn.log_softmax(naive.logits(CONFIG, PARAMS, naive.forward(CONFIG, PARAMS, x)))[-TEXT:]
        assert_close(a.log_probs[row, -TEXT:], scores[np.arange(TEXT), text], 1e-5)


def test_errors_come_before_compiling():
    with pytest.raises(ValueError, match=r"record=\['solver'\].*inputs, hidden, kv"):
        generation(LIMITS, record=("solver",))
    with pytest.raises(ValueError, match=r"slots=3 is not a multiple of slots_per_step=2"):
        generation(LIMITS, slots_per_step=2)
    with pytest.raises(ValueError, match=r"question \(30\), thoughts \(3\), forced \(0\) and new tokens \(5\) need 38"):
        generation(LIMITS, question=np.ones((3, 30), np.int32), mask=np.ones((3, 30), bool))
