"""Exact shares of a VAE whose code is known: a token is its own latent, and decoding rounds."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from eval import reconstruction
from latentjax.methods import CoT, Lengths, ThoughtVAE
from latentjax.tasks.base import Example, Task
from latentjax.thoughts.vae import Posterior
from latentjax.tokenizers import WordTokenizer
from tests.methods.battery import BACKBONE, FORMAT, WORDS, Case
from train.config import Experiment
from train.run import LoadedRun

LENGTH = 3  # two words and the end


@dataclasses.dataclass(frozen=True)
class Rounding(ThoughtVAE):
    """Latent j is the id of token j; half of a distance between ids of noise makes it another token."""

    def posterior_of(self, own, tokens, mask, question, question_mask, key=None):
        z = jnp.where(mask, tokens, 0).astype(jnp.float32)[:, None]
        return Posterior(z, jnp.zeros_like(z))

    def decode(self, params, latents, valid, eos, key, sampling=None):
        tokens = jnp.round(latents[:, 0]).astype(jnp.int32)
        kept = jnp.arange(LENGTH) < LENGTH - 1
        return tokens, jnp.broadcast_to(kept, tokens.shape) & valid[:, None], None


@dataclasses.dataclass(frozen=True)
class Pairs(Task):
    """One step of two words."""

    format = FORMAT

    def examples(self, split, *, count=None, seed=0):
        words = np.random.default_rng(seed).choice(WORDS, (count, 2)).tolist()
        return [Example(WORDS[0], (" ".join(pair),), WORDS[0]) for pair in words]

    def vocabulary(self):
        return WORDS


METHOD = Rounding(BACKBONE, Lengths(7, LENGTH), steps=1, latents=1, latent_width=LENGTH, max_blocks=2)


@pytest.fixture
def load(monkeypatch, tmp_path):
    def with_method(method):
        tokenizer = WordTokenizer.word_level(WORDS, method.special_tokens())
        run = LoadedRun(Experiment("pairs", Pairs(), method), tokenizer, Case(method).params(), 7)
        monkeypatch.setattr(reconstruction, "load_run", lambda path, checkpoint: run)
        monkeypatch.setattr(reconstruction, "enable_compilation_cache", lambda: None)
        return run, tmp_path

    return with_method


def test_shares_are_those_of_gaussian_noise_beyond_half_a_step(load):
    run, folder = load(METHOD)
    assert reconstruction.main([str(folder), "--count", "3000", "--noise", "0", "0.1", "0.3"]) == 0
    exact = json.loads((folder / "eval/reconstruction-valid.json").read_text())["exact"]
    assert exact["0.0"]["share"] == 1.0
    ids = [
        [run.tokenizer.token_id(word) for word in example.steps[0].split()]
        for example in Pairs().examples("valid", count=3000)
    ]
    std = np.std(ids, axis=0)
    for scale in ("0.1", "0.3"):
        share = math.prod(math.erf(0.5 / (float(scale) * s) / 2**0.5) for s in std)
        assert 0.02 < share < 0.98
        assert exact[scale]["n"] == 3000
        assert exact[scale]["share"] == pytest.approx(share, abs=5 * (share * (1 - share) / 3000) ** 0.5)


def test_uses_of_test_data_are_logged_and_earlier_results_kept(load):
    _, folder = load(METHOD)
    for split in ("valid", "test", "test"):
        assert reconstruction.main([str(folder), "--split", split, "--count", "3", "--noise", "0"]) == 0
    names = {path.name for path in (folder / "eval").glob("reconstruction-*")}
    assert names == {f"reconstruction-{name}.json" for name in ("valid", "test", "test-2")}
    uses = [json.loads(line) for line in (folder / "eval/test_uses.jsonl").read_text().splitlines()]
    assert [(use["split"], use["step"]) for use in uses] == [("test", 7)] * 2
    assert "python -m eval.reconstruction" in uses[0]["command"]


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        (CoT(BACKBONE, Lengths(7, 12), steps=1), [], "is a CoT; only a ThoughtVAE gives text back"),
        (METHOD, ["--noise", "-0.5"], "noise=(-0.5,): name at least one scale, none of them negative"),
    ],
)
def test_what_cannot_be_measured_is_said(load, capsys, method, words, message):
    _, folder = load(method)
    assert reconstruction.main([str(folder), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "eval").exists()
