"""Curves of what a threshold of the distance does for each class."""

from __future__ import annotations

from typing import Any

from pyloss.visualize.topology import _pyplot

_WORST_COLOR, _MEAN_COLOR, _REST_COLOR = "#d55e00", "#0072b2", "#999999"
_MANY = 60  # classes of which each is drawn


def draw_opis(curves: Any, ax: Any = None, *, worst: int = 3) -> Any:
    r"""Draws the utility of each class over the threshold, and its spread, whose mean is OPIS.

    .. math:: U_c(t), \qquad \operatorname{mean}_c U_c(t) \pm \operatorname{std}_c U_c(t)

    Args:
        curves: :class:`pyloss.metrics.OPISCurves`, of ``pyloss.metrics.opis(...,
            return_curves=True)``.
        ax: matplotlib axes; None makes a figure.
        worst: how many classes are named: those furthest from the mean. Of more than 60 classes
            these alone are drawn, beside the mean.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib. TypeError: curves of another type. ValueError: worst < 0.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> curves = pyloss.metrics.opis(x, y, return_curves=True)
        >>> ax = pyloss.visualize.draw_opis(curves)

    Reference:
        Zhang et al. arXiv 2307.04047.
    """
    if not hasattr(curves, "utility"):
        raise TypeError(f"curves must be OPISCurves, got {type(curves).__name__}")
    if worst < 0:
        raise ValueError(f"worst must be at least 0, got {worst}")
    pyplot = _pyplot()
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    t, utility = curves.thresholds.cpu().numpy(), curves.utility.cpu()
    mean, spread = utility.mean(0), utility.std(0, correction=0)
    away = (utility - mean).square().mean(1)
    named = away.argsort(descending=True, stable=True)[:worst].tolist()
    for c, (label, line) in enumerate(zip(curves.classes.tolist(), utility.numpy())):
        if c in named:
            ax.plot(t, line, color=_WORST_COLOR, linewidth=1.2, label=f"class {label}")
        elif len(utility) <= _MANY:
            ax.plot(t, line, color=_REST_COLOR, linewidth=0.6, alpha=0.7)
    low, high = (mean - spread).numpy(), (mean + spread).numpy()
    ax.fill_between(t, low, high, color=_MEAN_COLOR, alpha=0.2, linewidth=0)
    ax.plot(t, mean.numpy(), color=_MEAN_COLOR, linewidth=2, label=f"mean of {len(utility)}")
    ax.set(xlabel="distance threshold", ylabel="utility", title=f"OPIS {float(curves.opis):.2e}")
    ax.legend(fontsize=8)
    return ax
