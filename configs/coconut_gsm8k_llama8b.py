"""Coconut on GSM8K-Aug with Llama-3.1-8B: the paper's schedule for larger backbones.

Paper: Coconut (arXiv 2412.06769, Table 5: Llama-3.2-3B and Llama-3-8B): one thought a step, 3 epochs on the written chain
    (arm CoT), then one epoch a stage. Everything else of that table's settings is not stated: optimiser and batch are those
    of GPT-2; three stages of thoughts and four epochs without written steps are our choice, and so is bf16 for products.
Hardware: planned for 64 TPU v5p chips (docs/scaling.md). Data: the training file of 385,620 lines (see
    latentjax/tasks/gsm8k.py) as `--task.train-file`; the default, 6,884 questions of the original GSM8K, has 1/56 of the steps.
Time: not measured here; 3,012 steps an epoch of 128 examples with the whole file.
Expected: not measured here. Published test accuracy on Llama-3-8B: 0.43 with Coconut, 0.422 without a chain of thought (the
    decimals of the first are not legible in our source); on GSM8K-Aug with Llama-3.1-8B no figure of Coconut is known to us.
Command: python -m train configs/coconut_gsm8k_llama8b.py --arm CoT --pretrained.path FOLDER --task.train-file FILE, then
    python -m train.export runs/coconut-gsm8k-llama8b-CoT-seed0 runs/coconut-gsm8k-llama8b-stage0 --checkpoint best, then
    python -m train configs/coconut_gsm8k_llama8b.py --task.train-file FILE
"""

from latentjax.backbone.config import preset
from latentjax.backbone.vocabulary import NewRow, padded_size
from latentjax.methods import Coconut, CoT, Lengths, Method
from latentjax.tasks.gsm8k import GSM8K
from train.config import Experiment, Mesh, Optimizer, Pretrained

ARMS = ("Coconut", "CoT")
HUB = "meta-llama/Llama-3.1-8B"
STAGE0 = "runs/coconut-gsm8k-llama8b-stage0"  # the CoT arm's best checkpoint, exported


def method(name: str) -> Method:
    """The arm `name`. Lengths hold every line of the shipped files; a longer one is an error, nothing is cut."""
    used = 128256 + (2 if name == "Coconut" else 0)  # tokens of the model, and the markers
    backbone = preset(
        "llama-3.1-8b", vocab_size=padded_size(used), vocab_used=used, dtype="bfloat16", param_dtype="float32"
    )
    lengths = Lengths(question=256, text=128)
    match name:
        case "Coconut":
            return Coconut(
                backbone,
                lengths,
                c_thought=1,
                epochs_per_stage=1,
                max_latent_stage=3,
                pad_latent_to_max=True,
                uniform_prob=0.0,
                num_epochs=8,
                first_epoch=1,  # stage 0 is the arm CoT
                reset_optimizer="epoch",
                markers="both",
            )
        case "CoT":
            return CoT(backbone, lengths, epochs=3)
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    return Experiment(
        name=f"coconut-gsm8k-llama8b-{name}",
        task=GSM8K(extraction="exact"),
        method=method(name),
        # As in the released code for GPT-2: the rows of the markers start as copies of the row of "<<".
        pretrained=Pretrained(STAGE0 if name == "Coconut" else HUB, new_row=NewRow("copy", "<<")),
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
        mesh=Mesh(tensor=8),  # a thought reads all weights for one position a row: an eighth of them on each device
        batch_size=128,
        effective_batch=128,
        accumulate=1,
        validate_every=1,
        validate_unit="epochs",
        seed=seed,
    )


config = arm("Coconut")
