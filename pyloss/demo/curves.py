"""Pictures of the training curves; the only file of the demo that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Curve(Protocol):
    name: str
    losses: list[float]
    validation_steps: list[int]
    curve_accuracies: list[float]


def draw(path: Path, pair: Sequence[Curve], others: Sequence[Curve]) -> str:
    """Draws two runs that should agree, their difference, and the accuracy of others.

    Returns a sentence on what was written; without matplotlib nothing is.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    together, gap, noisy = figure.subplots(1, 3)
    first, second = pair
    steps = range(1, len(first.losses) + 1)
    together.plot(steps, first.losses, linewidth=4, alpha=0.4, label=first.name)
    together.plot(steps, second.losses, linewidth=1.2, color="black", label=second.name)
    together.set(title="Training loss", xlabel="step", ylabel="nats per token")
    together.legend()

    gaps = [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]
    gap.plot(steps, gaps, ".")
    gap.set(title="Difference of the two", xlabel="step", ylabel="nats per token")

    for curve in others:
        percent = [100 * share for share in curve.curve_accuracies]
        noisy.plot(curve.validation_steps, percent, marker=".", label=curve.name)
    noisy.set(title="Validation accuracy, 20 % wrong targets", xlabel="step", ylabel="%")
    noisy.legend()
    figure.savefig(path, dpi=110)
    return f"Curves: {path}"
