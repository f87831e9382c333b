"""Draws docs/images/overview.png: the one rollout and the four questions a method answers. Run it from any folder.

Command: python docs/images/overview.py
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY = "#22303c", "#7a8793"
QUESTION, THOUGHT, TEXT, BACKBONE = "#d7e3f4", "#f7d9b4", "#d5ecd4", "#eceff2"
SLOTS = (
    [("f(0)", QUESTION), ("...", QUESTION), ("s", QUESTION), ("start", QUESTION)]
    + [(f"$z_{k}$", THOUGHT) for k in (1, 2, 3, 4)]
    + [("ANS", TEXT), ("7", TEXT), ("end", TEXT)]
)
QUESTIONS = (
    ("1  What is\n    a thought?", "a vector or a block of\nvectors at an input\nposition"),
    (
        "2  Where does the\n    next come from?",
        "the last hidden state,\na Gaussian head, a flow,\na mixture, a codebook",
    ),
    ("3  What supervises\n    it?", "a curriculum on the text,\ndistillation, a posterior,\na reward"),
    ("4  When does\n    thinking stop?", "after K thoughts, at a\nmarker, when confident,\nat a budget"),
)


def box(axes, x, y, width, height, color, text, size=11.0, weight="normal"):
    """A rounded box with `text` in its middle; lower left corner (x, y), in the units of the axes."""
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=INK, linewidth=1.0
    )
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, weight=weight)


def arrow(axes, start, end, bend=0.0, color=INK, style="-|>"):
    """An arrow from `start` to `end`, bent by the fraction `bend` of its length."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle=style, mutation_scale=12, color=color, lw=1.2
        )
    )


def draw(axes):
    """The slots of one sequence, the backbone above them, the feedback arrows, and the four questions below."""
    left = [index * 1.0 + 0.25 * (index > 3) + 0.25 * (index > 7) for index in range(len(SLOTS))]
    right_end = left[-1] + 0.8
    box(axes, left[0], 5.3, right_end, 0.9, BACKBONE, "backbone (decoder and key-value cache)", 12, "bold")
    for x, (word, color) in zip(left, SLOTS, strict=True):
        box(axes, x, 3.3, 0.8, 0.7, color, word)
        if word != "end":
            arrow(axes, (x + 0.4, 4.05), (x + 0.4, 5.25), color=GREY)
    for index in (3, 4, 5, 6):
        arrow(axes, (left[index] + 0.55, 5.25), (left[index + 1] + 0.25, 4.05), color="#c4701a")
    for index in (7, 8, 9):
        arrow(axes, (left[index] + 0.55, 5.25), (left[index + 1] + 0.25, 4.05), color="#3d8b40")
    labels = (("question (tokens)", 0, 3), ("thoughts (vectors)", 4, 7), ("text (tokens)", 8, 10))
    for label, first, last in labels:
        middle = (left[first] + left[last] + 0.8) / 2
        axes.plot([left[first], left[last] + 0.8], [3.13, 3.13], color=GREY, lw=1)
        axes.text(middle, 2.85, label, ha="center", va="center", fontsize=11, color=INK)
    commit = (left[4] + left[7] + 0.8) / 2
    axes.text(
        commit, 2.42, "each is committed at one point:\nnoise, search and interventions act there",
        ha="center", va="center", fontsize=9.5, color="#a35a10", style="italic",
    )  # fmt: skip
    width = right_end / 4
    for index, (question, answer) in enumerate(QUESTIONS):
        x = index * width
        axes.text(x + 0.05, 1.35, question, fontsize=10.5, weight="bold", color=INK, va="bottom")
        axes.text(x + 0.05, 1.15, answer, fontsize=9.5, color=INK, va="top", linespacing=1.4)
    axes.set(xlim=(-0.15, right_end + 0.15), ylim=(0.0, 6.35), aspect="equal")
    axes.axis("off")


def main():
    figure, axes = plt.subplots(figsize=(11.5, 5.6), dpi=130)
    draw(axes)
    figure.savefig(
        pathlib.Path(__file__).with_suffix(".png"), bbox_inches="tight", facecolor="white", metadata={"Software": None}
    )


if __name__ == "__main__":
    main()
