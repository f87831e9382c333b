"""Directed-graph reachability on two CPU cores: continuous thoughts beside written chains, pauses and direct answers.

Paper: Reasoning by Superposition (arXiv 2505.12514) and Emergence of Superposition (arXiv 2509.23365, shuffled vertex ids),
    reduced: width 128 instead of 768, rotary positions instead of learned ones, no dropout, unit-scale initialisation, a higher
    learning rate, a seventieth of the sequences. The whole experiment is configs/superposition.py.
Hardware: 2 CPU cores.
Time: 15 to 20 minutes an arm on one core.
Expected: docs/results.md has what was measured; the papers report 96-100% for Coconut and about 75% for the others.
Command: python -m train configs/graph_small.py --arm Coconut (or CoT, NoCoT, Pause), then
    python -m eval runs/graph-small-Coconut-seed0 --split test
"""

import dataclasses

from latentjax.backbone.config import tiny
from latentjax.methods import CoT, GraphCoconut, Lengths, Method, NoCoT, Pause
from latentjax.tasks.graph_prosqa import GraphProsQA
from train.config import Experiment, Optimizer

ARMS = ("Coconut", "CoT", "NoCoT", "Pause")
STAGE_STEPS = (600, 250, 250, 250, 650)  # stages 0 to 4
VOCABULARY = 48  # 31 vertices, five marks, padding, end of sequence; the rest is unused


def method(name: str) -> Method:
    """The arm `name` with the same backbone and number of steps."""
    # Rotary positions: with learned ones, attention to "the token before" has to be found for each of 188 slots.
    small = tiny(VOCABULARY, max_positions=208, width=128, layers=2, heads=4)
    backbone = dataclasses.replace(small, positions="rotary")
    question = 188  # the longest generated problem; the released ones need 167
    match name:
        case "Coconut":
            return GraphCoconut(backbone, Lengths(question, text=2), max_latent_stage=4, stage_steps=STAGE_STEPS)
        case "CoT":
            return CoT(backbone, Lengths(question, text=7), steps=sum(STAGE_STEPS))
        case "NoCoT":
            return NoCoT(backbone, Lengths(question, text=3), steps=sum(STAGE_STEPS))
        case "Pause":
            return Pause(
                backbone, Lengths(question, text=7), max_latent_stage=4, stage_steps=STAGE_STEPS, markers="none",
                reset_optimizer="never",
            )  # fmt: skip
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    return Experiment(
        name=f"graph-small-{name}",
        task=GraphProsQA(shuffle_ids=True),
        method=method(name),
        optimizer=Optimizer(
            learning_rate=2e-3,
            b2=0.98,
            weight_decay=0.01,
            clip_norm=1.0,
            warmup_steps=100,
            schedule="linear",
            end_fraction=0.1,
        ),
        batch_size=32,
        train_examples=14_785,
        valid_split="generated_valid",
        valid_examples=256,
        validate_every=500,
        validate_unit="steps",
        log_every=50,
        seed=seed,
    )


config = arm("Coconut")
