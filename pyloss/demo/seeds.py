"""Results over several seeds: a cell of a table, and a picture of means with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


def spread(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """Mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} +- {deviation:.{digits}f}{unit}"


class Panel(NamedTuple):
    """Lines over x: one list of y for each seed; or a single number, a level."""

    title: str
    xlabel: str
    ylabel: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[Sequence[float]] | float]
    log: bool = False  # both axes


def draw(path: Path, panels: Sequence[Panel]) -> str:
    """Means as lines, one standard deviation around them as bands.

    Returns a sentence on what was written; without matplotlib nothing is.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, runs in panel.lines.items():
            if isinstance(runs, (int, float)):
                axes.axhline(runs, color="black", linestyle=":", linewidth=1, label=name)
                continue
            columns = list(zip(*runs, strict=True))
            mean = [statistics.fmean(column) for column in columns]
            off = [statistics.stdev(column) if len(runs) > 1 else 0.0 for column in columns]
            (line,) = axes.plot(panel.x, mean, linewidth=1.4, label=name)
            low = [m - d for m, d in zip(mean, off, strict=True)]
            high = [m + d for m, d in zip(mean, off, strict=True)]
            axes.fill_between(panel.x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.log:
            axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return f"Plot: {path}"
