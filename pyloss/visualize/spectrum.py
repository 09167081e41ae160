"""Density of eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyloss.visualize.topology import _pyplot

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def draw_spectrum(
    spectra: Any, axes: Any = None, *, edges: Mapping[str, float] | None = None
) -> Any:
    r"""Draws the density of the eigenvalues of one operator, or of several, on a logarithmic scale.

    A tick at the bottom marks the largest node of each; a dashed line, in the same colour, where
    one was foreseen.

    Args:
        spectra: :class:`pyloss.analysis.SpectralDensity`, or several by their names.
        axes: matplotlib axes; None makes a figure.
        edges: by the same names: predicted largest eigenvalues, as of
            :func:`pyloss.analysis.batch_extremal_eigenvalue`.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib. TypeError: a spectrum of another type. ValueError: an edge
            of no spectrum.

    Example:
        >>> import torch, pyloss
        >>> scale = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> found = pyloss.analysis.slq_density(lambda v: scale * v, 8)
        >>> axes = pyloss.visualize.draw_spectrum({"eight": found}, edges={"eight": 8.0})

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    several = spectra if isinstance(spectra, Mapping) else {"density": spectra}
    for spectrum in several.values():
        if not hasattr(spectrum, "density"):
            raise TypeError(f"spectra must be SpectralDensity, got {type(spectrum).__name__}")
    edges = edges or {}
    if unknown := [name for name in edges if name not in several]:
        raise ValueError(f"edges must be of {', '.join(several)}, got {unknown[0]}")
    pyplot = _pyplot()
    if axes is None:
        axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")[1]
    for at, (name, spectrum) in enumerate(several.items()):
        color = _COLORS[at % len(_COLORS)]
        density = spectrum.density.cpu()
        axes.plot(spectrum.grid.cpu().numpy(), density.numpy(), color=color, label=name)
        top = float(spectrum.nodes.max())
        axes.plot([top], [0.02], "|", color=color, markersize=9, transform=_at_the_bottom(axes))
        if name in edges:
            axes.axvline(float(edges[name]), color=color, linestyle="--", linewidth=1,
                         label=f"{name}, foreseen")  # fmt: skip
    # One eigenvalue of P has a density of 1 / P at most: far less is the tail of the broadening.
    least = min(1 / (s.dim * float(s.sigma)) for s in several.values()) / 100
    axes.set(xlabel="eigenvalue", ylabel="density", yscale="log")
    axes.set_ylim(bottom=least)
    axes.legend(fontsize=8)
    return axes


def _at_the_bottom(axes: Any) -> Any:
    """x as the data, y from 0 to 1 along the axis."""
    return axes.get_xaxis_transform()
