"""LaDiR on grade-school mathematics with Llama-3.1-8B: the VAE, stage 1 and stage 2 with the paper's settings.

Paper: LaDiR (arXiv 2510.04573, ICLR 2026), maths runs; learning rates, batches, epochs, weights and sizes are from the authors'
    reply to the reviews. Draws of (t, eps) and the dropped question are from the released Countdown code, and so are betas,
    weight decay and clipping: the optimiser of the maths runs was not found. A warm-up of 3% of the steps is our choice.
Hardware: planned for 64 TPU v5p chips (docs/papers.md); stage 2 on 32, because its batch of 12 does not divide by 8.
    Stages 1 and 2 hold the VAE, two 8B models that never train, in bfloat16.
Data: the paper's training set was not found (its tests are the seven of DART-Math). Here: the 6,738 training solutions of
    GSM8K in sentences, one sentence a block; blocks, questions and answers as long as these need (one test solution of 11
    sentences has no room; only the VAE would read it). The answer begins with "###", in the paper with "The answer is".
Time: not measured. VAE 104 steps, stage 1 2,100, stage 2 11,220.
Expected: not measured; with GSM8K alone less than the paper, which trained on more. Published: GSM8K 84.2 pass@1 and 93.7
    pass@100, MATH 45.2 / 63.7 (earlier version of the paper); average of seven sets 43.5 / 52.0 (final version), 27.9 pass@1
    without stage 2. Fine-tuned on written chains: GSM8K 84.5 / 89.0.
Command: python -m train configs/ladir_math_llama8b.py --arm VAE, then --arm Stage1, then --arm Stage2, each with
    --pretrained.path FOLDER where the weights are not taken from the hub (Stage2 needs none), then
    python -m eval runs/ladir-math-llama8b-Stage2-seed0 --split test --samples 100 --temperature 0.7 --batch 1
    on one device that holds the parameters (64 GB) and the caches of the samples of a problem (9 GB).
"""

import dataclasses

from latentjax.backbone.config import preset
from latentjax.backbone.vocabulary import NewRow, padded_size
from latentjax.methods import FlowSampler, LaDiR, Lengths, Method, ThoughtVAE
from latentjax.tasks.gsm8k import GSM8K
from latentjax.thoughts.flow import TimeSampler
from train.config import Experiment, Mesh, Optimizer, Pretrained

ARMS = ("VAE", "Stage1", "Stage2")
HUB = "meta-llama/Llama-3.1-8B"
EPOCHS = {"VAE": 2, "Stage1": 20, "Stage2": 20}
BATCH = {"VAE": 128, "Stage1": 64, "Stage2": 12}

USED = 128256 + 1  # tokens of the model, and the one that begins an answer
LLAMA = preset("llama-3.1-8b", vocab_size=padded_size(USED), vocab_used=USED, dtype="bfloat16", param_dtype="float32")
FROZEN = dataclasses.replace(LLAMA, param_dtype="bfloat16")

VAE = ThoughtVAE(
    LLAMA,
    Lengths(question=256, text=128),
    epochs=EPOCHS["VAE"],
    latents=4,
    latent_width=512,
    steps_per_block=1,
    max_blocks=9,
    posterior="gaussian",
    beta=1e-5,
    free_bits=0.0,
    noise=3.0,
    substitution=0.3,
    encoder=None,  # as the decoder
    encoder_sees_question=False,
    train_decoder=False,
)


def method(name: str) -> Method:
    """The arm `name`."""
    if name == "VAE":
        return VAE
    if name not in ARMS:
        raise ValueError(f"arm {name!r} is unknown; known: {', '.join(ARMS)}")
    return LaDiR(
        LLAMA,
        Lengths(question=256, text=24),
        vae=dataclasses.replace(VAE, backbone=FROZEN),
        epochs=EPOCHS[name],
        flow_weight=5.0,
        answer_weight=1.0,
        decision_weight=1.0,
        prediction="velocity",
        times=TimeSampler("uniform", shift=1.0),
        layout="all_blocks",
        draws=8,
        null_probability=0.1,
        normalise=True,
        rollout_steps=10 if name == "Stage2" else 0,
        sampler=FlowSampler(
            steps=30, solver="euler", guidance=4.0, noise_scale=2**0.5, repulsion=0.0, repulsion_form="paper"
        ),
        stop="learned",
        answer_from="head",
    )


def arm(name: str, seed: int = 0) -> Experiment:
    """The training run of one arm."""
    vae, stage1 = (f"runs/ladir-math-llama8b-{name}-seed{{seed}}" for name in ("VAE", "Stage1"))
    return Experiment(
        name=f"ladir-math-llama8b-{name}",
        task=GSM8K(chain="sentences"),
        method=method(name),
        pretrained=None if name == "Stage2" else Pretrained(HUB, new_row=NewRow("mean")),
        init_from={"VAE": None, "Stage1": {"vae": vae}, "Stage2": stage1}[name],
        chat=False,
        tuning="full",
        optimizer=Optimizer(
            learning_rate=2e-5 if name == "VAE" else 1e-5,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.02,
            clip_norm=1.0,
            warmup_fraction=0.03,
            schedule="constant",
        ),
        mesh=Mesh(tensor=8),
        batch_size=BATCH[name],
        effective_batch=BATCH[name],
        accumulate=1,
        validate_every=1,
        validate_unit="epochs",
        validate_generation=name != "VAE",  # its metric `exact` says how many sentences come back
        seed=seed,
    )


config = arm("VAE")  # the others start from its run
