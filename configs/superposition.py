"""Reasoning by Superposition, whole: a 2-layer model searches graphs breadth-first in continuous thoughts.

Paper: Reasoning by Superposition (arXiv 2505.12514), released config symbol-2layer-8head-768dim; vertex ids are permuted per
    example as in Emergence of Superposition (arXiv 2509.23365). 2 layers, width 768, 8 heads, dropout 0.1, 14,785 problems of
    3 or 4 hops, 300 epochs, batch 256, AdamW 1e-4 constant, weight decay 0.01. Betas (0.9, 0.95) as the paper says; the
    released code has PyTorch's (0.9, 0.999). Matrix products in bfloat16; parameters, softmax, norms and loss in float32.
Hardware: one GPU with at least 24 GB (about 4.5e16 floating-point operations for the Coconut arm), or more with --mesh.data.
Time: not measured on a GPU; run at small size only (docs/results.md). The authors report about 24 hours on two A100 for
    their code.
Expected: accuracy at least 0.97 on generated_test and 0.95 on the released test (419 problems). Published: near-perfect
    (figure), 0.962 with shuffled ids; CoT and direct answers about 0.75.
Command: python -m train configs/superposition.py --arm Coconut --stop-after-minutes 9, repeated until the run is complete (each
    call continues where the last one stopped), then python -m eval runs/superposition-Coconut-seed0 --split test (and
    test_shuffled, generated_test --count 1000).
"""

from latentjax.backbone.config import BackboneConfig
from latentjax.methods import CoT, GraphCoconut, Lengths, Method, NoCoT
from latentjax.tasks.graph_prosqa import GraphProsQA
from train.config import Experiment, Optimizer

ARMS = ("Coconut", "CoT", "NoCoT")
EPOCHS = 300


def method(name: str) -> Method:
    """The arm `name`, GPT-2 architecture from random initialisation."""
    backbone = BackboneConfig(
        vocab_size=40, max_positions=1024, width=768, layers=2, heads=8, dtype="bfloat16", scan_layers=False
    ).with_dropout(0.1)  # fmt: skip
    question = 188
    match name:
        case "Coconut":
            return GraphCoconut(
                backbone, Lengths(question, text=2), c_thought=1, max_latent_stage=4, epochs_per_stage=25,
                num_epochs=EPOCHS, uniform_prob=0.1, reset_optimizer="never", markers="none",
            )  # fmt: skip
        case "CoT":
            return CoT(backbone, Lengths(question, text=7), epochs=EPOCHS)
        case "NoCoT":
            return NoCoT(backbone, Lengths(question, text=3), epochs=EPOCHS)
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    return Experiment(
        name=f"superposition-{name}",
        task=GraphProsQA(shuffle_ids=True),
        method=method(name),
        optimizer=Optimizer(learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.01),
        batch_size=256,
        train_examples=14_785,
        valid_split="generated_valid",
        valid_examples=512,
        validate_every=10,
        checkpoint_every_steps=1000,
        log_every=50,
        seed=seed,
    )


config = arm("Coconut")
