"""What an intervention changes, and what it leaves alone to the last bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.generation import generate
from latentjax.rollout import MAIN, Backbone, Intervention, Prefix, frozen, prefill, run, start
from latentjax.thoughts.constant import constant
from latentjax.thoughts.feedback import feedback
from tests.backbone import naive
from tests.close import assert_close
from tests.quick import jit
from tests.test_rollout import CONFIG, MASK, PARAMS, QUESTION, alternate, jacobi, mixture, row_embeddings

LIMITS = jnp.array([2, 3, 1])
SLOTS, END, TEXT = 3, 3, 4  # thought slots, end marker, text tokens
VECTOR = jnp.asarray(np.random.default_rng(4).standard_normal(12), jnp.float32)
SOURCES = {
    "feedback": lambda backbone: (feedback(LIMITS), 1),
    "mixture": lambda backbone: (mixture(backbone, LIMITS), 1),
    "pauses": lambda backbone: (constant(VECTOR, LIMITS, SLOTS), SLOTS),
    "text between thoughts": lambda backbone: (alternate(backbone, LIMITS), 1),
    "jacobi": lambda backbone: (jacobi(backbone, LIMITS, SLOTS, 2), SLOTS),
}


@functools.partial(jit, static_argnames=("name", "end_marker", "record"))
def generation(params, name="feedback", *, end_marker=None, **options):
    backbone = Backbone(CONFIG, params)
    source, step = SOURCES[name](backbone)
    return generate(
        backbone, jnp.asarray(QUESTION), jnp.asarray(MASK), jax.random.key(0), thinking=source, slots=SLOTS,
        slots_per_step=step, max_new_tokens=TEXT, ids={"eos": jnp.int32(-1), "pad": jnp.int32(0)},
        end_marker=end_marker, **options,
    )  # fmt: skip


def change(where, value=0.0, add=0.0):
    """An intervention on the thoughts [row, slot] where `where` is set."""
    shape = (3, SLOTS, 12)
    return Intervention(
        jnp.asarray(where, bool), jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape),
        jnp.where(jnp.asarray(where, bool)[..., None], jnp.broadcast_to(jnp.asarray(add, jnp.float32), shape), 0),
    )  # fmt: skip


def at(*pairs):
    where = np.zeros((3, SLOTS), bool)
    for row, slot in pairs:
        where[row, slot] = True
    return where


def same_bits(a, b):
    """Tokens, log-probabilities, and thoughts where they exist."""
    used = np.asarray(a.thought_mask)
    return (
        (a.tokens == b.tokens).all()
        and (a.log_probs == b.log_probs).all()
        and (used == np.asarray(b.thought_mask)).all()
        and (np.asarray(a.thoughts)[used] == np.asarray(b.thoughts)[used]).all()
    )


@pytest.mark.parametrize("name", SOURCES)
def test_reinjecting_recorded_thoughts_changes_no_bit(name):
    clean = generation(PARAMS, name, end_marker=END)
    injected = generation(PARAMS, name, end_marker=END, intervention=change(clean.thought_mask, clean.thoughts))
    nowhere = generation(PARAMS, name, end_marker=END, intervention=change(at(), 7.0))
    assert same_bits(injected, clean)
    assert same_bits(nowhere, clean)


def expected_text(row, edit, end_marker=None):
    x = naive.think(CONFIG, PARAMS, row_embeddings(row), int(LIMITS[row]), edit)
    if end_marker is not None:
        x = jnp.concatenate([x, naive.embed(PARAMS, [end_marker])])
    return x, naive.greedy(CONFIG, PARAMS, x, TEXT, eos=-1)


def assert_text(out, row, expected, tolerance=1e-5):
    tokens, scores = expected
    assert np.asarray(out.tokens)[row, -TEXT:].tolist() == tokens
    assert_close(out.log_probs[row, -TEXT:], scores, tolerance)


@pytest.mark.parametrize("kind", ["value", "add"])
def test_a_changed_thought_propagates_as_in_the_definition(kind):
    where = at((0, 0), (1, 1), (2, 2))  # row 2 has no third thought: nothing may happen there
    out = generation(PARAMS, intervention=change(where, 0.0) if kind == "value" else change_by_adding(where))
    for row in range(3):

        def edit(j, vector, row=row):
            if not where[row, j]:
                return vector
            return 0 * vector if kind == "value" else vector + 0.5

        x, text = expected_text(row, edit)
        assert_text(out, row, text)
        k = int(LIMITS[row])
        assert_close(out.thoughts[row, :k], x[-k:], 1e-5)
    clean = generation(PARAMS)
    assert (np.asarray(out.log_probs) != np.asarray(clean.log_probs)).any(axis=1).tolist() == [True, True, False]


def change_by_adding(where):
    intervention = change(where, 7.0, 0.5)
    return intervention.replace(where=jnp.zeros_like(intervention.where))  # nothing replaced, only added to


def test_add_comes_after_value():
    out = generation(PARAMS, intervention=change(at((0, 1)), 2.0, 0.5))
    assert_close(out.thoughts[0, 1], np.full(12, 2.5), 0)


def test_slots_of_an_intervention_are_those_of_the_generation():
    """Also where a row writes text between its thoughts: row 0 thinks in slot 1 only, row 1 in slots 0 and 2."""
    out = generation(PARAMS, "text between thoughts", intervention=change(at((0, 0), (0, 1), (1, 2)), 3.0))
    assert np.asarray(out.thought_mask).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    changed = (np.asarray(out.thoughts) == 3.0).all(axis=2)
    assert changed.tolist() == at((0, 1), (1, 2)).tolist()  # slot 0 of row 0 holds text, which is left alone


def test_pauses_of_one_block_are_changed_one_by_one():
    where = at((0, 1), (1, 2))
    out = generation(PARAMS, "pauses", intervention=change(where, 0.0))
    for row in range(3):
        pauses = [0 * VECTOR if where[row, j] else VECTOR for j in range(int(LIMITS[row]))]
        x = jnp.concatenate([row_embeddings(row), jnp.stack(pauses)])
        assert_text(out, row, naive.greedy(CONFIG, PARAMS, x, TEXT, eos=-1))


def test_frozen_keeps_the_other_thoughts_as_recorded():
    clean = generation(PARAMS)
    where = at((0, 0), (1, 0))
    out = generation(PARAMS, intervention=frozen(change(where, 0.0), clean.thoughts, clean.thought_mask))
    for row in range(2):
        k = int(LIMITS[row])
        recorded = naive.think(CONFIG, PARAMS, row_embeddings(row), k)[-k:]
        x = jnp.concatenate([row_embeddings(row), 0 * recorded[:1], recorded[1:]])
        assert_text(out, row, naive.greedy(CONFIG, PARAMS, x, TEXT, eos=-1))
        used = np.arange(SLOTS)[1:k]
        assert (np.asarray(out.thoughts)[row, used] == np.asarray(clean.thoughts)[row, used]).all()
    propagating = generation(PARAMS, intervention=change(where, 0.0))
    assert (propagating.thoughts[1, 1:] != clean.thoughts[1, 1:]).any()


def test_cache_entries_put_back_hide_a_changed_input_from_all_that_follows():
    """Needs an end marker: the last thought's own hidden state is not in the cache, and the first token would read it."""
    clean = generation(PARAMS, end_marker=END, record=("kv",))
    where = at((0, 0), (0, 1), (1, 1), (2, 0))
    hidden = frozen(change(where, 0.0), clean.thoughts, clean.thought_mask)
    seen = generation(PARAMS, end_marker=END, intervention=hidden)
    assert (seen.log_probs != clean.log_probs).any(axis=1).all()
    put_back = hidden.replace(kv_where=jnp.asarray(where), kv=clean.recorded["kv"])
    out = generation(PARAMS, end_marker=END, intervention=put_back, record=("kv",))
    text = slice(-TEXT, None)
    assert (out.tokens[:, text] == clean.tokens[:, text]).all()
    assert (out.log_probs == clean.log_probs).all()
    used = np.asarray(clean.thought_mask)
    for ours, theirs in zip(out.recorded["kv"], clean.recorded["kv"], strict=True):
        assert (np.asarray(ours)[:, used] == np.asarray(theirs)[:, used]).all()


def test_cache_entries_changed_alone_matter_and_leave_the_thought_itself():
    clean = generation(PARAMS, end_marker=END, record=("kv",))
    changed = jax.tree.map(lambda x: x + 1.0, clean.recorded["kv"])
    where = jnp.asarray(at((1, 1)))
    intervention = change(at()).replace(kv_where=where, kv=changed)
    out = generation(PARAMS, end_marker=END, intervention=intervention, record=("kv",))
    assert (out.thoughts[1, :2] == clean.thoughts[1, :2]).all()
    # Its hidden state was computed before its entries were replaced, so the next thought is the clean one as well.
    assert (out.thoughts[1, 2] == clean.thoughts[1, 2]).all()
    moved = (np.asarray(out.log_probs) != np.asarray(clean.log_probs)).any(axis=1)
    assert moved.tolist() == [False, True, False]
    keys, clean_keys = np.asarray(out.recorded["kv"][0]), np.asarray(clean.recorded["kv"][0])
    assert_close(keys[:, 1, 1], clean_keys[:, 1, 1] + 1.0, 1e-6)


def test_gradient_of_add_is_a_finite_difference():
    score = jnp.asarray(np.random.default_rng(5).standard_normal((3, 13)), jnp.float32)

    def scalar(add):
        backbone = Backbone(CONFIG, PARAMS)
        context = prefill(backbone, jnp.asarray(QUESTION), jnp.asarray(MASK), SLOTS)
        source = feedback(LIMITS)
        intervention = change(at()).replace(add=add)
        state = start(source, {MAIN: context})
        state, _ = run(backbone, source, state, SLOTS, jax.random.key(0), intervention=intervention)
        return (score * jax.nn.log_softmax(backbone.head(state.contexts[MAIN].hidden))).sum()

    zero = jnp.zeros((3, SLOTS, 12))
    influence = np.asarray(jit(jax.grad(scalar))(zero))
    scalar = jit(scalar)
    assert (influence[0, 2] == 0).all()  # a slot that row 0 does not use
    assert (influence[2, 1:] == 0).all()
    rng = np.random.default_rng(6)
    for row, slot in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 0)):
        direction = np.zeros(zero.shape, np.float32)
        direction[row, slot] = rng.standard_normal(12)
        step = 1e-2
        difference = (float(scalar(step * direction)) - float(scalar(-step * direction))) / (2 * step)
        assert (influence * direction).sum() == pytest.approx(difference, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("end_marker", [None, END])
def test_recorded_inputs_as_a_prefix_continue_exactly(end_marker):
    clean = generation(PARAMS, end_marker=end_marker, record=("inputs",))
    tokens = jnp.full((3, SLOTS), -1)
    mask, inputs = clean.thought_mask, clean.recorded["inputs"]
    if end_marker is not None:
        tokens = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=end_marker)
        mask, inputs = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True), jnp.pad(inputs, ((0, 0), (0, 1), (0, 0)))
    prefix = Prefix(tokens, mask, inputs, instead=True)
    out = generation(PARAMS, end_marker=end_marker, prefix=prefix)
    assert out.thoughts.shape[1] == 0
    assert (out.tokens[:, -TEXT:] == clean.tokens[:, -TEXT:]).all()
    assert_close(out.log_probs[:, -TEXT:], clean.log_probs[:, -TEXT:], 1e-5)


def test_an_intervention_of_another_number_of_thoughts_is_an_error():
    short = jax.tree.map(lambda x: x[:, :2], change(at()))
    with pytest.raises(ValueError, match=r"intervention.where has 2 thoughts; this rollout has 3"):
        generation(PARAMS, intervention=short)
