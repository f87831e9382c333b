"""LaDiR's claims on 4x4 Sudoku: latent diffusion, its ablations, second stage and few-step students, beside other methods.

Paper: LaDiR (arXiv 2510.04573), reduced to a task that a small reasoner learns within minutes: a row of the grid is a block of
    one latent. The rows are read by the VAE's decoder, so there is no loss on an answer before Stage1 and Stage2, which go
    on from LaDiR for equally many steps with the language head writing the grid again. The arms whose names begin with
    Open have puzzles of three givens with many solutions, the others those with one, as released.
Hardware: 1 CPU core an arm.
Time: a VAE 1 minute, NoCoT and MGDM 4 to 6, LaDiR and its variants 8, students 5 to 10, Coconut 10, Stage1 5, Stage2 20.
Expected: see docs/results.md.
Command: python -m train configs/sudoku_small.py --arm VAE, then --arm LaDiR (and others; --seed 1), then
    python -m eval runs/sudoku-small-LaDiR-seed0 --split test --sampler.steps 10 (--oracle-blocks 2) and
    python -m eval runs/sudoku-small-Open-LaDiR-seed0 --split held_out --count 200 --samples 100 --temperature 1
"""

import dataclasses
from collections.abc import Mapping

from latentjax.backbone.config import BackboneConfig, tiny
from latentjax.methods import MGDM, Coconut, FlowSampler, LaDiR, Lengths, Method, NoCoT, ThoughtVAE
from latentjax.methods.few_step_ladir import FewStepLaDiR
from latentjax.tasks.sudoku4x4 import Sudoku4x4
from latentjax.thoughts.flow import TimeSampler
from train.config import Experiment, Optimizer

# What the arms change in the VAE (k = 0 and p = 0 are the paper's ablations), and which VAE a reasoner takes.
# With the beta of the others a VAE without noise would learn a posterior as wide as that noise.
VAES: dict[str, dict] = {"VAE": {}, "VAE-k0": {"noise": 0.0, "beta": 1e-5}, "VAE-p0": {"substitution": 0.0}}
REASONERS: dict[str, dict] = {
    "LaDiR": {},
    "LaDiR-k0": {"vae": "VAE-k0"},
    "LaDiR-p0": {"vae": "VAE-p0"},
    "Open-LaDiR": {},
    "Open-LaDiR-x": {"prediction": "x"},
    "Open-LaDiR-v": {"prediction": "v"},
}
FURTHER: dict[str, dict] = {"Stage1": {}, "Stage2": {"rollout_steps": 10}}  # from LaDiR's parameters
STUDENTS: dict[str, dict] = {  # of Open-LaDiR
    "Open-Phased": {"objective": "phased", "times": TimeSampler()},
    "Open-Shortcut": {"objective": "shortcut"},
    "Open-MeanFlow": {
        "objective": "meanflow",
        "times": TimeSampler("logit_normal", mean=-0.4),
        "adaptive_power": 0,  # published: 1, whose weights bias latents of so few numbers (docs/log.md)
    },
}
OTHERS = ("NoCoT", "MGDM", "Coconut", "Open-NoCoT", "Open-MGDM")
ARMS = (*VAES, *REASONERS, *FURTHER, *STUDENTS, *OTHERS)

STEPS, VAE_STEPS, FURTHER_STEPS, STUDENT_STEPS = 2000, 1000, 1000, 1000
VOCABULARY = 9  # 0 to 4, the end of a row, padding, end of sequence, the answer's marker (MGDM: its mask)
QUESTION, ROW, GRID = 20, 6, 22  # tokens, with ends: a row's own and the sequence's


def backbone(width: int, layers: int) -> BackboneConfig:
    """The decoder of every arm, with rotary positions."""
    small = tiny(VOCABULARY, max_positions=96, width=width, layers=layers, heads=4)
    return dataclasses.replace(small, positions="rotary")


def vae(name: str) -> ThoughtVAE:
    """One latent of width 8 for a row, of which there are 24; noise of about 0.4 standard deviations."""
    fields = {"noise": 1.0, "substitution": 0.02, "beta": 6e-3} | VAES[name]
    return ThoughtVAE(
        backbone(64, 1), Lengths(QUESTION, ROW), steps=VAE_STEPS, latents=1, latent_width=8, max_blocks=4,
        train_decoder=True, **fields,
    )  # fmt: skip


def reasoner(steps: int, **changes) -> dict:
    """Fields of a LaDiR."""
    fields = {
        "backbone": backbone(128, 4),
        "lengths": Lengths(QUESTION, text=2),
        "vae": vae(changes.pop("vae", "VAE")),
        "steps": steps,
        "answer_weight": 0.0,
        "answer_from": "decoder",
        "draws": 2,
        "times": TimeSampler("logit_normal"),
        "sampler": FlowSampler(steps=30, guidance=1.0, noise_scale=1.0),
    }
    return fields | changes


def method(name: str) -> Method:
    """The arm `name`."""
    if name in VAES:
        return vae(name)
    if name in REASONERS:
        return LaDiR(**reasoner(STEPS, **REASONERS[name]))
    if name in FURTHER:
        read = {"lengths": Lengths(QUESTION, GRID), "answer_weight": 1.0, "answer_from": "head"}
        return LaDiR(**reasoner(FURTHER_STEPS, **read, **FURTHER[name]))
    if name in STUDENTS:
        sampler = FlowSampler(steps=4, guidance=1.0, noise_scale=1.0)
        fields = reasoner(STUDENT_STEPS, null_probability=0.0, sampler=sampler, **STUDENTS[name])
        return FewStepLaDiR(**fields, teacher_guidance=1.0, teacher_steps=32, phases=4, base_steps=32)
    other = name.removeprefix("Open-")
    if other == "NoCoT":
        return NoCoT(backbone(128, 4), Lengths(QUESTION, GRID), steps=STEPS)
    if other == "MGDM":  # trained too shortly for the released decoding: no grid would be right
        return MGDM(backbone(128, 4), Lengths(QUESTION, GRID), steps=STEPS, revise=False)
    if name == "Coconut":  # rows in text, then one after the other as a thought
        return Coconut(
            backbone(128, 4), Lengths(QUESTION, text=2 * GRID), c_thought=1, max_latent_stage=4, stage_steps=(STEPS // 5,) * 5,
            markers="none", reset_optimizer="never", pad_slots=True,
        )  # fmt: skip
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


def start(name: str) -> str | Mapping[str, str] | None:
    """The run of the same seed that an arm starts from."""
    if name in REASONERS:
        return {"vae": f"runs/sudoku-small-{REASONERS[name].get('vae', 'VAE')}-seed{{seed}}"}
    if name in STUDENTS:
        return {"teacher": "runs/sudoku-small-Open-LaDiR-seed{seed}"}
    return "runs/sudoku-small-LaDiR-seed{seed}" if name in FURTHER else None


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    later = name in FURTHER or name in STUDENTS
    return Experiment(
        name=f"sudoku-small-{name}",
        task=Sudoku4x4(givens=3, unique=False) if name.startswith("Open-") else Sudoku4x4(),
        method=method(name),
        optimizer=Optimizer(
            learning_rate=5e-4 if later else 2e-3,
            b2=0.98,
            weight_decay=0.01,
            clip_norm=1.0,
            warmup_steps=100,
            schedule="cosine",
            end_fraction=0.05,
        ),
        batch_size=32,
        train_examples=100_000,
        valid_examples=200,
        validate_every=1000,
        validate_unit="steps",
        validate_generation=name not in VAES,  # their metric `exact` says how many rows come back
        log_every=50,
        init_from=start(name),
        seed=seed,
    )


config = arm("VAE")  # LaDiR starts from its run
