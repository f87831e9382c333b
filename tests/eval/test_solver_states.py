"""What the solver's states say: shapes of the record, shares that must hold by construction, files, refusals."""

import dataclasses
import json

import numpy as np
import pytest

from eval import solver_states
from latentjax.methods import CoT, FlowSampler, LaDiR, Lengths, ThoughtVAE
from latentjax.tasks.base import Reason, Task
from latentjax.tokenizers import WordTokenizer
from tests.methods.battery import BACKBONE, EXAMPLES, FORMAT, WORDS, Case
from train.config import Experiment
from train.run import LoadedRun

SMALL = dataclasses.replace(BACKBONE, max_positions=80)
VAE = ThoughtVAE(SMALL, Lengths(7, 4), steps=1, latents=2, latent_width=4, max_blocks=4, train_decoder=True)
METHOD = LaDiR(SMALL, Lengths(7, 5), vae=VAE, steps=1, sampler=FlowSampler(3, guidance=1.0), stop="budget")


@dataclasses.dataclass(frozen=True)
class Chains(Task):
    """The battery's examples that have steps; a step is true if it has two words."""

    format = FORMAT

    def examples(self, split, *, count=None, seed=0):
        return [example for example in EXAMPLES if example.steps][:count]

    def judge_step(self, text):
        return Reason.RIGHT if len(text.split()) == 2 else Reason.WRONG

    def vocabulary(self):
        return WORDS


@pytest.fixture
def load(monkeypatch, tmp_path):
    def with_method(method):
        tokenizer = WordTokenizer.word_level(WORDS, method.special_tokens())
        parts = dict.fromkeys(method.parts(), "elsewhere")
        experiment = Experiment("chains", Chains(), method, init_from=parts or None)
        run = LoadedRun(experiment, tokenizer, Case(method).params(), 7)
        monkeypatch.setattr(solver_states, "load_run", lambda path, checkpoint: run)
        monkeypatch.setattr(solver_states, "enable_compilation_cache", lambda: None)
        return tmp_path

    return with_method


def test_every_state_is_read_and_the_last_is_the_finished_block(load, capsys):
    folder = load(METHOD)
    assert solver_states.main([str(folder), "--count", "3", "--shown", "1"]) == 0
    found = json.loads((folder / "eval/solver-valid.json").read_text())
    assert np.allclose(found["times"], [1, 2 / 3, 1 / 3, 0])
    assert found["blocks"] == 3 * 4
    assert len(found["final"]) == len(found["right"]) == 4
    assert found["final"][-1] == 1.0
    assert (folder / "eval/solver-valid.png").stat().st_size > 1000
    assert "block 4" in (folder / "eval/solver-valid.txt").read_text()
    assert "1.00" in capsys.readouterr().out


def test_uses_of_test_data_are_logged_and_earlier_results_kept(load):
    folder = load(METHOD)
    for _ in range(2):
        assert solver_states.main([str(folder), "--split", "test", "--count", "2"]) == 0
    assert {path.name for path in (folder / "eval").glob("*.json")} == {"solver-test.json", "solver-test-2.json"}
    uses = (folder / "eval/test_uses.jsonl").read_text().splitlines()
    assert len(uses) == 2
    assert "python -m eval.solver_states" in json.loads(uses[0])["command"]


def test_other_methods_have_no_solver(load, capsys):
    folder = load(CoT(SMALL, Lengths(7, 12), steps=1))
    assert solver_states.main([str(folder)]) == 2
    assert "is a CoT; only a LaDiR has solver states" in capsys.readouterr().err
    assert not (folder / "eval").exists()


def test_shares_count_blocks(load):
    load(METHOD)
    run = solver_states.load_run(None, "last")
    texts = [[["1", "1 2", "3 4"], ["5 6", "3 4", "3 4"]], [["7", "7", "7"]]]
    assert solver_states.shares(run, texts) == {"final": [1 / 3, 2 / 3, 1.0], "right": [1 / 3, 2 / 3, 2 / 3]}
