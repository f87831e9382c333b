"""One file per published method. See `latentjax.methods.base` for what a method is."""

from latentjax.methods.base import Batch, Lengths, Method, Prompts, Stage
from latentjax.methods.coconut import Coconut
from latentjax.methods.cot import CoT
from latentjax.methods.icot import ICoT
from latentjax.methods.nocot import NoCoT
from latentjax.methods.pause import Pause
from latentjax.methods.superposition import GraphCoconut

__all__ = ["Batch", "Coconut", "CoT", "GraphCoconut", "ICoT", "Lengths", "Method", "NoCoT", "Pause", "Prompts", "Stage"]
