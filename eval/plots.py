"""Plots of evaluations, written as PNG files without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.controls import Share
from eval.evaluate import Evaluation
from eval.report import Row


def plot_accuracies(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of accuracy with 95% Wilson intervals, one per row."""
    figure, axes = _canvas(width=1.6 + 1.3 * len(rows))
    evaluations = [row.evaluation for row in rows]
    axes.bar(range(len(rows)), [100 * e.accuracy for e in evaluations], width=0.6, color="C0")
    _intervals(axes, list(range(len(rows))), evaluations)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    names = [row.run if len(rows) > 1 else row.method for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=20 if len(rows) > 2 else 0)
    _percent_axis(axes)
    axes.set_title(title)
    _save(figure, path)


def plot_forced_thoughts(curves: Mapping[str, Mapping[int, Evaluation]], path: Path, title: str) -> None:
    """Accuracy against the forced number of thoughts, one line per run, with 95% Wilson intervals and text tokens."""
    figure, axes = _canvas()
    for number, (name, curve) in enumerate(curves.items()):
        counts = sorted(curve)
        evaluations = [curve[k] for k in counts]
        axes.plot(counts, [100 * e.accuracy for e in evaluations], marker="o", label=name, color=f"C{number}")
        _intervals(axes, counts, evaluations, color=f"C{number}")
        for k, e in zip(counts, evaluations, strict=True):
            # A model may write as text what it no longer thinks.
            note = f"{e.answer_tokens:.1f} tokens"
            axes.annotate(note, (k, 100 * e.accuracy), (0, -16), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(sorted({k for curve in curves.values() for k in curve}))
    axes.margins(x=0.12)  # room for the notes of the outermost points
    axes.set_xlabel("forced number of thoughts")
    axes.legend()
    _percent_axis(axes)
    axes.set_title(title)
    _save(figure, path)


def plot_solver(times: Sequence[float], curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Shares of the blocks' texts against the solver's time, from noise on the left to clean on the right."""
    figure, axes = _canvas()
    for name, values in curves.items():
        axes.plot(times, [100 * value for value in values], marker=".", label=name)
    axes.invert_xaxis()
    axes.set_xlabel("t (1: noise, 0: finished block)")
    axes.legend()
    _percent_axis(axes, "share of blocks (%)")
    _save(figure, path)


def plot_training(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path, title: str) -> None:
    """Training loss against optimiser steps on a logarithmic axis, one line per run: name -> (steps, losses)."""
    figure, axes = _canvas(width=8.0)
    colors, styles = 10, ("-", "--", ":", "-.")
    for number, (name, (steps, losses)) in enumerate(curves.items()):
        style = styles[number // colors % len(styles)]
        axes.plot(steps, losses, style, label=name, linewidth=1, color=f"C{number % colors}")
    axes.set_yscale("log")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss (nats per target token)")
    figure.legend(loc="outside right upper", fontsize=8)  # beside the curves: there is no empty corner
    axes.set_title(title)
    _save(figure, path)


def plot_shares(shares: Mapping[str, Sequence[Share]], path: Path, title: str) -> None:
    """Shares of thought 1, 2, ... with 95% Wilson intervals, one line per run."""
    figure, axes = _canvas()
    for number, (name, row) in enumerate(shares.items()):
        places, values = list(range(1, len(row) + 1)), [share.value for share in row]
        axes.plot(places, [100 * value for value in values], marker="o", label=name, color=f"C{number}")
        _error_bars(axes, places, values, [share.interval for share in row], f"C{number}")
    axes.set_xticks(range(1, max(map(len, shares.values())) + 1))
    axes.set_xlabel("thought")
    axes.legend()
    _percent_axis(axes, "share of problems (%)")
    axes.set_title(title)
    _save(figure, path)


def _intervals(axes: Axes, places: Sequence[int], evaluations: Sequence[Evaluation], color: str = "black") -> None:
    _error_bars(axes, places, [e.accuracy for e in evaluations], [(e.low, e.high) for e in evaluations], color)


def _error_bars(
    axes: Axes, places: Sequence[int], values: Sequence[float], bounds: Sequence[tuple[float, float]], color: str
) -> None:
    # A value of 0 or 1 may differ from its bound by a rounding error, which matplotlib would refuse as negative.
    below = [max(0.0, 100 * (value - low)) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, 100 * (high - value)) for value, (_, high) in zip(values, bounds, strict=True)]
    axes.errorbar(places, [100 * v for v in values], yerr=[below, above], fmt="none", ecolor=color, capsize=4)


def _percent_axis(axes: Axes, label: str = "accuracy (%)") -> None:
    axes.set_ylim(0, 105)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)


def _canvas(width: float = 6.0) -> tuple[Figure, Axes]:
    # No pyplot: it keeps figures alive and asks for a display.
    figure = Figure(figsize=(max(width, 4.0), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
