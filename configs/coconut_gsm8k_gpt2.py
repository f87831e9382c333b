"""Coconut on GSM8K-Aug with GPT-2: the released settings, with the arms of the paper's Table 1.

Paper: Coconut (arXiv 2412.06769, Table 1 and released GSM8K configs). First 25 epochs on the written chain (arm CoT), of which
    the best checkpoint by validation goes on as Coconut: epochs 3-5 with 2 thoughts instead of the first step, 6-8 with 4,
    9-11 with 6, 12-24 with 6 and no written step; no warm-up, no clipping, AdamW made anew every epoch. Where the text and
    the code differ (the text has 6 epochs of stage 0 and 50 in all), this is the code.
    Not the paper's: up to 128 tokens are generated instead of 64; products and activations are bfloat16 where the released
    code has float32 throughout (`--method.backbone.dtype float32`); parameters, softmax, norms and loss are float32 here too.
Hardware: the paper's are 4 GPUs with 32 examples each; planned for 8 TPU v5e chips (docs/scaling.md). Data: the training file
    of 385,620 lines (see latentjax/tasks/gsm8k.py) as `--task.train-file`. The default, 6,884 questions of the original GSM8K,
    shows that the program runs; it has 1/56 of the steps, and the published figures are not to be expected of it.
Time: not measured here; 3,012 steps an epoch of 128 examples with the whole file.
Expected: not measured here. Published test accuracy (mean ± std, number of seeds not stated): Coconut 0.341 ± 0.015, CoT
    0.429 ± 0.002, NoCoT 0.165 ± 0.005, Pause ("pause as thought") 0.241 ± 0.007. Best CoT checkpoint: about 0.40 on valid.
    A public rerun with batch 32 had 0.311, hence `effective_batch`.
Command: python -m train configs/coconut_gsm8k_gpt2.py --arm CoT --task.train-file FILE, then
    python -m train.export runs/coconut-gsm8k-gpt2-CoT-seed0 runs/coconut-gsm8k-gpt2-stage0 --checkpoint best, then
    python -m train configs/coconut_gsm8k_gpt2.py --task.train-file FILE, then
    python -m eval runs/coconut-gsm8k-gpt2-Coconut-seed0 --checkpoint best --split test
"""

from latentjax.backbone.config import preset
from latentjax.backbone.vocabulary import NewRow, padded_size
from latentjax.methods import Coconut, CoT, Lengths, Method, NoCoT, Pause
from latentjax.tasks.gsm8k import GSM8K
from train.config import Experiment, Optimizer, Pretrained

ARMS = ("Coconut", "CoT", "NoCoT", "Pause")
EPOCHS = 25
HUB = "openai-community/gpt2"
STAGE0 = "runs/coconut-gsm8k-gpt2-stage0"  # the CoT arm's best checkpoint, exported


def method(name: str) -> Method:
    """The arm `name`. Lengths hold every line of the shipped files; a longer one is an error, nothing is cut."""
    used = 50257 + (2 if name in ("Coconut", "Pause") else 0)  # tokens of the model, and the markers
    # Dropout is on in the passes that make thoughts as well.
    backbone = preset(
        "gpt2", vocab_size=padded_size(used), vocab_used=used, dtype="bfloat16", remat="dots"
    ).with_dropout(0.1)  # fmt: skip
    lengths = Lengths(question=256, text=128)
    curriculum = {
        "c_thought": 2,
        "epochs_per_stage": 3,
        "max_latent_stage": 3,
        "pad_latent_to_max": True,
        "uniform_prob": 0.0,
        "num_epochs": EPOCHS,
        "first_epoch": 3,  # the released `resume`: stage 0 is the arm CoT
        "reset_optimizer": "epoch",
        "markers": "both",
    }
    match name:
        case "Coconut":
            return Coconut(backbone, lengths, **curriculum)
        case "Pause":
            return Pause(backbone, lengths, **curriculum)
        case "CoT":
            return CoT(backbone, lengths, epochs=EPOCHS)
        case "NoCoT":
            return NoCoT(backbone, lengths, epochs=EPOCHS)
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    return Experiment(
        name=f"coconut-gsm8k-gpt2-{name}",
        task=GSM8K(extraction="exact"),
        method=method(name),
        # The released code starts the rows of all markers as copies of the row of "<<".
        pretrained=Pretrained(STAGE0 if name in ("Coconut", "Pause") else HUB, new_row=NewRow("copy", "<<")),
        chat=False,
        tuning="full",
        optimizer=Optimizer(
            learning_rate=1e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            clip_norm=None,
            warmup_steps=0,
            schedule="constant",
        ),
        batch_size=128,
        effective_batch=128,
        accumulate=1,
        validate_every=1,
        validate_unit="epochs",
        seed=seed,
    )


config = arm("Coconut")
