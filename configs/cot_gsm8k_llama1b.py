"""Supervised fine-tuning of Llama-3.2-1B-Instruct on written chains of GSM8K-Aug with LoRA: the explicit baseline.

Paper: CODI (arXiv 2502.21074), its settings for Llama-1B on GSM8K-Aug: LoRA of rank 128 and alpha 32 with dropout 0.1 on all
    matrices of attention and MLP, 10 epochs, AdamW 8e-4 with a cosine, 3% warm-up, weight decay 0.1, clipping at 2.0, batch
    128, bf16, seed 11. The settings of its CoT baseline are not given; those of its own method are taken.
    Not the paper's: the answer is written "### N", base weights stay float32 and only products are bf16, no token is added.
Hardware: not stated; 32 examples x 4 microbatches. Data: the training file of 385,620 lines (see latentjax/tasks/gsm8k.py) as
    `--task.train-file`; the default, 6,884 questions of the original GSM8K, has 1/56 of the steps.
Time: not measured here; 3,012 steps an epoch of 128 examples with the whole file.
Expected: not measured here. Published test accuracy of CoT fine-tuning: 0.616 (CODI, unverified in our source), 0.584 (SIM-CoT),
    0.494 (CoLaR: LoRA on q and v only, learning rate 1e-4, sampled at T = 1).
Command: python -m train configs/cot_gsm8k_llama1b.py --pretrained.path FOLDER --task.train-file FILE, then
    python -m eval runs/cot-gsm8k-llama1b-seed11 --split test
"""

from latentjax.backbone.config import Lora, preset
from latentjax.methods import CoT, Lengths
from latentjax.tasks.gsm8k import GSM8K
from train.config import Experiment, Optimizer, Pretrained

config = Experiment(
    name="cot-gsm8k-llama1b",
    task=GSM8K(extraction="numeric"),
    method=CoT(
        preset(
            "llama-3.2-1b",
            dtype="bfloat16",
            lora=Lora(
                rank=128,
                alpha=32.0,
                dropout=0.1,
                targets=("query", "key", "value", "attention_out", "mlp_gate", "mlp_up", "mlp_down"),
                rslora=False,
            ),
        ),
        Lengths(
            question=256, text=128
        ),  # for every line of the shipped files; a longer one is an error, nothing is cut
        epochs=10,
    ),
    pretrained=Pretrained("meta-llama/Llama-3.2-1B-Instruct"),
    chat=False,
    tuning="lora",
    optimizer=Optimizer(
        learning_rate=8e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=2.0,
        warmup_fraction=0.03,
        schedule="cosine",
        end_fraction=0.0,
    ),
    batch_size=128,
    effective_batch=128,
    accumulate=4,
    validate_every=1,
    validate_unit="epochs",
    seed=11,
)
