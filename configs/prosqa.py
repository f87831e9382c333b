"""ProsQA in words, Coconut's curriculum with the released settings, on a small model from scratch.

Paper: Coconut (arXiv 2412.06769), released config for ProsQA: c_thought 1, 5 epochs per stage, 6 stages, 50 epochs, batch 128,
    AdamW 1e-4, weight decay 0.01, optimiser new every epoch, markers on both sides. Reduced: 4 layers of width 256 from random
    initialisation instead of GPT-2's pretrained weights; one token per word; training problems are generated.
Hardware: one GPU or TPU.
Time: not measured; about 7,000 steps of 128 x 450 positions.
Expected: not measured here. Published with pretrained GPT-2: Coconut 0.970, CoT 0.775, no CoT 0.767, pause as thought 0.966.
Command: python -m train configs/prosqa.py --arm Coconut (or CoT, NoCoT, Pause), then
    python -m eval runs/prosqa-Coconut-seed0 --split test
"""

from latentjax.backbone.config import BackboneConfig
from latentjax.methods import Coconut, CoT, Lengths, Method, NoCoT, Pause
from latentjax.tasks.prosqa import ProsQA
from train.config import Experiment, Optimizer

ARMS = ("Coconut", "CoT", "NoCoT", "Pause")
EPOCHS = 50


def method(name: str) -> Method:
    """The arm `name` with the same backbone and number of epochs."""
    backbone = BackboneConfig(vocab_size=128, max_positions=520, width=256, layers=4, heads=4).with_dropout(0.1)
    lengths = Lengths(question=448, text=64)
    curriculum = {
        "c_thought": 1,
        "epochs_per_stage": 5,
        "max_latent_stage": 6,
        "num_epochs": EPOCHS,
        "pad_latent_to_max": True,
        "uniform_prob": 0.0,
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
        name=f"prosqa-{name}",
        task=ProsQA(),
        method=method(name),
        optimizer=Optimizer(learning_rate=1e-4, weight_decay=0.01),
        batch_size=128,
        train_examples=17_886,
        validate_every=5,
        seed=seed,
    )


config = arm("Coconut")
