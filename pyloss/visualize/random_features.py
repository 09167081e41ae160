"""Errors of random-feature regression over samples, features or ridge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyloss.visualize.topology import _pyplot, _tensor


def draw_rf_risk(
    risk: Any,
    x: Tensor | Sequence[float],
    labels: Sequence[str] | None = None,
    axes: Any = None,
    *,
    xlabel: str = "features k",
) -> Any:
    r"""Draws test and train error of random-feature regression, a line for each row.

    .. math:: E_{test}(n, k, \delta), \qquad E_{train}(n, k, \delta)

    Args:
        risk: :class:`pyloss.analysis.RFRisk` of shape ``(X,)`` or ``(lines, X)``.
        x: what varies along the last dimension, ``(X,)``; an infinite one is left out.
        labels: of the lines.
        axes: two matplotlib axes; None makes a figure.
        xlabel: what x is.

    Returns:
        The two axes, logarithmic. Errors that are 0 or infinite are left out.

    Raises:
        ImportError: without matplotlib. TypeError: a risk of another type. ValueError: shapes or
            labels that do not fit.

    Example:
        >>> import torch, pyloss.analysis, pyloss.visualize
        >>> i, k = torch.arange(1, 501), torch.logspace(0.5, 3, 30)
        >>> ridge = torch.tensor([[1e-4], [1e-1]])
        >>> risk = pyloss.analysis.rf_risk(i**-1.5, i**-1.8, n=64, k=k, ridge=ridge)
        >>> left, right = pyloss.visualize.draw_rf_risk(risk, k, ["ridge 0.0001", "ridge 0.1"])

    Reference:
        Simon, Karkada, Ghosh, Belkin. More is Better in Modern Machine Learning. arXiv 2311.14646.
    """
    if not hasattr(risk, "kappa"):
        raise TypeError(f"risk must be an RFRisk, got {type(risk).__name__}")
    pyplot = _pyplot()
    x = _tensor(x).double()
    if risk.test.dim() not in (1, 2) or risk.test.shape[-1:] != x.shape:
        raise ValueError(
            f"risk must be (X,) or (lines, X) for x of shape {list(x.shape)}, got "
            f"{list(risk.test.shape)}"
        )
    lines = risk.test.numel() // max(1, x.numel())
    if labels is not None and len(labels) != lines:
        raise ValueError(f"labels must name {lines} lines, got {len(labels)}")
    if axes is None:
        axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")[1]
    for ax, title, errors in zip(
        axes, ("test error", "train error"), (risk.test, risk.train), strict=True
    ):
        for row, error in enumerate(errors.detach().cpu().reshape(lines, -1)):
            shown = x.isfinite() & error.isfinite() & (error > 0)
            y = torch.where(shown, error, torch.nan)
            ax.plot(x.numpy(), y.numpy(), label=None if labels is None else labels[row])
        ax.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
        if labels is not None:
            ax.legend(fontsize=8)
    return axes
