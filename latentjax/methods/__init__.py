"""One file per published method. See `latentjax.methods.base` for what a method is."""

from latentjax.methods.base import Batch, Lengths, Method, Prompts, Stage
from latentjax.methods.coconut import Coconut
from latentjax.methods.cot import CoT
from latentjax.methods.icot import ICoT
from latentjax.methods.ladir import FlowSampler, LaDiR
from latentjax.methods.mgdm import MGDM
from latentjax.methods.nocot import NoCoT
from latentjax.methods.pause import Pause
from latentjax.methods.superposition import GraphCoconut
from latentjax.methods.thought_vae import ThoughtVAE

__all__ = [
    "Batch", "Coconut", "CoT", "FlowSampler", "GraphCoconut", "ICoT", "LaDiR", "Lengths", "MGDM", "Method", "NoCoT",
    "Pause", "Prompts", "Stage", "ThoughtVAE",
]  # fmt: skip
