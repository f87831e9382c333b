"""LaDiR on CD-4 with Llama-3.1-8B: the released Countdown code's settings.

Paper: LaDiR (arXiv 2510.04573, ICLR 2026), Countdown. Settings are those of the released code: the whole chain is one block of
    three latents, its VAE's encoder sees the question, and its decoder's text of the block is the answer. So there is no loss
    on an answer or a decision, and what is generated is always one block. Not stated and chosen here: batch and clipping of the
    VAE (128, 1.0), no replaced tokens in it, the length of the reasoner's training (20 epochs, as in the maths runs).
    Deviations: the encoder trains in full (rank 512 LoRA there) and latents are normalised (constants are there, but unused).
Hardware: planned for 64 TPU v5p chips (docs/papers.md); the paper's ran on 4 GPUs with 64 examples each, the VAE on 8.
    The reasoner's run holds the VAE, two 8B models that never train, in bfloat16.
Data: the released generator's 220,000 problems of CD-4; the paper's, by its name, had 500,000 problems of Countdown.
Time: not measured. VAE 30,000 steps, reasoner 17,180.
Expected: not measured. Published on CD-4: 76.6 pass@1, 96.4 pass@100, 7.3 distinct solutions in 100 samples; fine-tuned Llama
    46.7 and 3.0, MGDM (85M parameters, for this task alone) 91.5 and 3.2, LLaDA 8B 51.2 (36.5 in one of our sources).
Command: python -m train configs/ladir_countdown_llama8b.py --arm VAE, then --arm LaDiR, both with
    --pretrained.path FOLDER where the weights are not taken from the hub, then
    python -m eval runs/ladir-countdown-llama8b-LaDiR-seed0 --split test --samples 100 --temperature 0.7 --batch 8
    on one device that holds the parameters (64 GB) and the caches of the samples of 8 problems (7 GB).
"""

import dataclasses

from latentjax.backbone.config import preset
from latentjax.backbone.vocabulary import NewRow, padded_size
from latentjax.methods import FlowSampler, LaDiR, Lengths, Method, ThoughtVAE
from latentjax.tasks.countdown import Countdown
from latentjax.thoughts.flow import TimeSampler
from train.config import Experiment, Mesh, Optimizer, Pretrained

ARMS = ("VAE", "LaDiR")
HUB = "meta-llama/Llama-3.1-8B"
QUESTION, CHAIN = 12, 28  # tokens of five numbers, and of three equations with their end, digits taken in threes

USED = 128256 + 1  # tokens of the model, and the one that begins an answer
LLAMA = preset("llama-3.1-8b", vocab_size=padded_size(USED), vocab_used=USED, dtype="bfloat16", param_dtype="float32")
FROZEN = dataclasses.replace(LLAMA, param_dtype="bfloat16")

VAE = ThoughtVAE(
    LLAMA,
    Lengths(QUESTION, CHAIN),
    steps=30_000,
    latents=3,
    latent_width=128,
    steps_per_block=None,
    max_blocks=1,
    posterior="gaussian",
    beta=1e-5,
    free_bits=0.0,
    noise=0.3,
    substitution=0.0,
    encoder=None,  # as the decoder
    encoder_sees_question=True,
    train_decoder=False,
)


def method(name: str) -> Method:
    """The arm `name`."""
    match name:
        case "VAE":
            return VAE
        case "LaDiR":
            return LaDiR(
                LLAMA,
                Lengths(QUESTION, text=2),
                vae=dataclasses.replace(VAE, backbone=FROZEN),
                epochs=20,
                flow_weight=1.0,
                answer_weight=0.0,
                decision_weight=0.0,
                prediction="velocity",
                times=TimeSampler("uniform", shift=1.0),
                layout="all_blocks",
                draws=8,
                null_probability=0.1,
                normalise=True,
                rollout_steps=0,
                sampler=FlowSampler(
                    steps=30, solver="euler", guidance=4.0, noise_scale=2**0.5, repulsion=0.0, repulsion_form="paper"
                ),
                stop="budget",
                answer_from="decoder",
            )
    raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")


OPTIMIZERS = {
    "VAE": Optimizer(
        2e-5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0, warmup_steps=1000, schedule="cosine"
    ),
    "LaDiR": Optimizer(
        1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.02, clip_norm=1.0, warmup_steps=1000, schedule="constant"
    ),
}


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    return Experiment(
        name=f"ladir-countdown-llama8b-{name}",
        task=Countdown(4),
        method=method(name),
        pretrained=Pretrained(HUB, new_row=NewRow("mean")),
        init_from={"vae": "runs/ladir-countdown-llama8b-VAE-seed{seed}"} if name == "LaDiR" else None,
        chat=False,
        tuning="full",
        optimizer=OPTIMIZERS[name],
        mesh=Mesh(tensor=8),
        batch_size=128 if name == "VAE" else 256,
        effective_batch=128 if name == "VAE" else 256,
        accumulate=1,
        valid_split="held_out",
        valid_examples=500,
        validate_every=1,
        validate_unit="epochs",
        validate_generation=name != "VAE",  # its metric `exact` says how many chains come back
        seed=seed,
    )


config = arm("VAE")  # the reasoner starts from its run
