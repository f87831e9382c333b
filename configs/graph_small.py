"""Directed-graph reachability on one CPU core: continuous thoughts beside written chains, pauses and direct answers.

Paper: Coconut's curriculum (arXiv 2412.06769) on ProsQA's problems as symbols with permuted ids, the setting of Emergence of
    Superposition (arXiv 2509.23365). Reduced: 2 layers of width 128, rotary positions, no dropout, unit-scale initialisation,
    1,500 steps of 32 instead of 300 epochs. Every arm starts from one model that has learned to recall edges (arm WarmUp),
    which no paper has; from random weights none leaves chance in this many steps (docs/log.md). The whole experiment is
    configs/superposition.py.
Hardware: 1 CPU core.
Time: WarmUp 6 minutes, each other arm 15 to 20 minutes.
Expected: see docs/results.md; published for 2 layers of width 768: Coconut 96-100%, the others about 75%.
Command: python -m train configs/graph_small.py --arm WarmUp, then --arm Coconut (or CoT, NoCoT, Pause), then
    python -m eval runs/graph-small-Coconut-seed0 --split test
"""

import dataclasses

from latentjax.backbone.config import tiny
from latentjax.methods import Coconut, CoT, Lengths, Method, NoCoT, Pause
from latentjax.tasks.graph_edges import GraphEdges
from latentjax.tasks.graph_prosqa import GraphProsQA
from train.config import Experiment, Optimizer

ARMS = ("WarmUp", "Coconut", "CoT", "NoCoT", "Pause")
HOPS = (3, 4, 5, 6)  # as ProsQA; graph_4 has the problems of 3 and 4
STAGE_STEPS = (400, 200, 200, 200, 200, 100, 200)  # stages 0 to 6: stage k writes the steps after the k-th
WARM_UP_STEPS = 1200
VOCABULARY = 48  # 31 vertices, five marks, padding, end of sequence; the rest is unused


def method(name: str) -> Method:
    """The arm `name` with the same backbone and, but for WarmUp, the same number of steps."""
    # Rotary positions: with learned ones, attention to "the token before" has to be found for each of 188 slots.
    small = tiny(VOCABULARY, max_positions=208, width=128, layers=2, heads=4)
    backbone = dataclasses.replace(small, positions="rotary", qkv_bias=True)
    question, chain = 188, 9  # the longest generated problem (the released ones need 167); 6 steps, [A], answer, end
    curriculum = {"c_thought": 1, "max_latent_stage": 6, "stage_steps": STAGE_STEPS, "reset_optimizer": "never"}
    match name:
        case "WarmUp":
            return CoT(backbone, Lengths(question=27, text=17), steps=WARM_UP_STEPS)
        case "Coconut":
            return Coconut(backbone, Lengths(question, chain), markers="none", **curriculum)
        case "Pause":
            return Pause(backbone, Lengths(question, chain), markers="none", **curriculum)
        case "CoT":
            return CoT(backbone, Lengths(question, chain), steps=sum(STAGE_STEPS))
        case "NoCoT":
            return NoCoT(backbone, Lengths(question, text=3), steps=sum(STAGE_STEPS))
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    warm_up = name == "WarmUp"
    return Experiment(
        name=f"graph-small-{name}",
        task=GraphEdges(hops=HOPS) if warm_up else GraphProsQA(hops=HOPS),
        method=method(name),
        optimizer=Optimizer(
            learning_rate=3e-3 if warm_up else 2e-3,
            b2=0.98,
            weight_decay=0.01,
            clip_norm=1.0,
            warmup_steps=100 if warm_up else 50,
            schedule="linear",
            end_fraction=0.2,
        ),
        batch_size=64 if warm_up else 32,
        train_examples=14_785,
        valid_split="generated_valid",
        valid_examples=256,
        validate_every=500,
        validate_unit="steps",
        log_every=50,
        init_from=None if warm_up else "runs/graph-small-WarmUp-seed0",
        seed=seed,
    )


config = arm("WarmUp")  # the other arms start from its run
