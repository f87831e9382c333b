"""Coconut on the successor list: four hops as continuous thoughts. The smallest complete config.

Paper: Coconut (arXiv 2412.06769); curriculum, optimiser and sizes are those of a reduced setting, not the paper's.
Hardware: 2 CPU cores.
Time: about 120 CPU-seconds, compilation and four validations included.
Expected: validation accuracy above 0.9 after the last stage (chance 0.111); measured 1.000 [0.993, 1.000] of 512, seed 0.
Command: python -m train configs/coconut_hops.py
"""

from latentjax.backbone.config import tiny
from latentjax.methods.base import Lengths
from latentjax.methods.coconut import Coconut
from latentjax.tasks.successor_list import SuccessorList
from train.config import Experiment, Optimizer

config = Experiment(
    name="coconut-hops",
    task=SuccessorList(size=10, hops=4),
    method=Coconut(
        backbone=tiny(14),
        lengths=Lengths(question=12, text=7),  # ten values, start, marker; four steps, ANS, answer, end of sequence
        c_thought=1,
        max_latent_stage=4,
        stage_steps=(300, 150, 150, 150, 250),
        reset_optimizer="never",
        markers="start",
    ),
    optimizer=Optimizer(
        learning_rate=2e-3,
        b2=0.98,
        weight_decay=0.01,
        clip_norm=1.0,
        warmup_steps=50,
        schedule="linear",
        end_fraction=0.1,
    ),
    batch_size=128,
    train_examples=12_800,
    fresh_data=True,
    valid_examples=512,
    validate_every=250,
    validate_unit="steps",
    checkpoint_every_steps=250,
)
