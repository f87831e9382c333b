"""Four arms on a task in which thoughts matter: no chain of thought, a written one, pauses, and continuous thoughts.

Paper: Coconut (arXiv 2412.06769) and its controls, reduced to the successor list: apply a function, given as a list of
    ten values, four times. A model of two layers does not learn that in one pass within this budget.
Hardware: 2 CPU cores.
Time: about 30 seconds an arm, compilation included.
Expected: accuracy on 1,000 held-out problems, seeds 0/1/2: CoT about 1.0, Coconut above 0.9, NoCoT and Pause below 0.2
    (one guess in nine is right).
Command: make quickstart (all arms, evaluation, plots), or python -m train configs/quickstart.py (Coconut alone).
"""

from latentjax.backbone.config import tiny
from latentjax.methods.base import Lengths, Method
from latentjax.methods.coconut import Coconut
from latentjax.methods.cot import CoT
from latentjax.methods.nocot import NoCoT
from latentjax.methods.pause import Pause
from latentjax.tasks.successor_list import SuccessorList
from train.config import Experiment, Optimizer

ARMS = ("NoCoT", "CoT", "Pause", "Coconut")
HOPS = 4
# A written chain first, then one more step of it replaced by a thought in each stage.
STAGE_STEPS = (300, 150, 150, 150, 250)
BATCH = 128


def method(name: str, stage_steps: tuple[int, ...] = STAGE_STEPS) -> Method:
    """The arm `name` (one of `ARMS`); all arms take the same backbone and the same number of steps."""
    backbone = tiny(16)  # ten values, the answer marker and up to four special tokens
    # Question: ten values, the start, the start marker. Text: four steps, answer marker, answer, end of sequence, and one
    # more for `--method.markers both`.
    lengths = Lengths(question=12, text=HOPS + 4)
    if name in ("NoCoT", "CoT"):
        baseline = {"NoCoT": NoCoT, "CoT": CoT}[name]
        return baseline(backbone, lengths, steps=sum(stage_steps), start_marker=True)
    if name not in ARMS:
        raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")
    return {"Pause": Pause, "Coconut": Coconut}[name](
        backbone,
        lengths,
        c_thought=1,
        max_latent_stage=HOPS,
        stage_steps=stage_steps,
        reset_optimizer="never",
        markers="start",  # with an end marker after the thoughts this small model stays near chance
        pad_slots=True,  # one compiled step for all stages
    )


def arm(name: str, seed: int = 0, stage_steps: tuple[int, ...] = STAGE_STEPS) -> Experiment:
    """The training run of one arm. Problems depend on `seed` only, so all arms see the same ones in the same order."""
    return Experiment(
        name=f"quickstart-{name}",
        task=SuccessorList(size=10, hops=HOPS),
        method=method(name, stage_steps),
        optimizer=Optimizer(
            learning_rate=2e-3,
            b2=0.98,
            weight_decay=0.01,
            clip_norm=1.0,
            warmup_steps=min(50, sum(stage_steps) // 10),
            schedule="linear",
            end_fraction=0.1,
        ),
        batch_size=BATCH,
        train_examples=BATCH * sum(stage_steps),  # one epoch: no batch is seen twice
        valid_examples=256,
        validate_every=sum(stage_steps),
        validate_unit="steps",
        seed=seed,
    )


config = arm("Coconut")
