"""Pictures of the training curves; the only file of the demo that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Curve(Protocol):
    name: str
    losses: list[float]
    validation_steps: list[int]
    curve_accuracies: list[float]
    head_ms: float
    head_mib: float | None


def draw(path: Path, same: Sequence[Curve], others: Sequence[Curve]) -> str:
    """Draws runs that should agree: curves, differences from the first, costs; and the others'
    accuracy.

    Returns a sentence on what was written; without matplotlib nothing is.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    (together, gap), (cost, noisy) = figure.subplots(2, 2)
    first, *rest = same
    steps = range(1, len(first.losses) + 1)
    together.plot(steps, first.losses, linewidth=5, alpha=0.4, label=first.name)
    for curve, style in zip(rest, _STYLES, strict=False):
        color, line, marker = style
        together.plot(steps, curve.losses, line, linewidth=1.4, color=color, label=curve.name)
        gaps = [abs(a - b) for a, b in zip(first.losses, curve.losses, strict=True)]
        gap.plot(steps, gaps, marker, fillstyle="none", color=color, label=curve.name)
    together.set(title="Training loss", xlabel="step", ylabel="nats per token")
    together.legend(fontsize=8)
    gap.set(title=f"Difference from {first.name}", xlabel="step", ylabel="nats per token")
    gap.legend(fontsize=8)

    _draw_costs(cost, same)
    for curve in others:
        percent = [100 * share for share in curve.curve_accuracies]
        noisy.plot(curve.validation_steps, percent, marker=".", label=curve.name)
    noisy.set(title="Validation accuracy, 20 % wrong targets", xlabel="step", ylabel="%")
    noisy.legend()
    figure.savefig(path, dpi=110)
    return f"Curves: {path}"


# Colour, line, marker: both stay visible where the curves cover each other.
_STYLES = (("black", "-", "o"), ("tab:red", "--", "."))


def _draw_costs(axes: Any, runs: Sequence[Curve]) -> None:
    """Bars of the memory that the output layer and the loss take; of the time where unknown."""
    memory = [run.head_mib for run in runs]
    known = None not in memory
    values = memory if known else [run.head_ms for run in runs]
    names = [run.name.replace("pyloss.", "pyloss.\n") for run in runs]
    bars = axes.barh(names, values, color="tab:blue")
    texts = [
        f"{run.head_mib:.0f} MiB, {run.head_ms:.0f} ms" if known else f"{run.head_ms:.0f} ms"
        for run in runs
    ]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_xlim(0, 1.45 * max(values))
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set(title="Output layer and loss, per step", xlabel="peak memory, MiB" if known else "ms")
