"""Curves of the Lyapunov function of Lion-K over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyloss.visualize.topology import _pyplot

_H_COLOR, _OBJECTIVE_COLOR, _OUTSIDE_COLOR = "#d55e00", "#0072b2", "#999999"


def draw_lyapunov(records: Sequence[Any], ax: Any = None) -> Any:
    r"""Draws the Lyapunov function of Lion-K, and the objective that it bounds from above.

    .. math:: H_t \ge f(x_t) + K^*(\lambda x_t) / \lambda

    Steps whose parameters were outside of the constraint are shaded: there H may rise.

    Args:
        records: ``LyapunovMonitor(...).records``.
        ax: matplotlib axes; None makes a figure.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib. TypeError: records of another type. ValueError: none.

    Example:
        >>> import torch, pyloss
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> monitor = pyloss.optim.LyapunovMonitor(pyloss.optim.Lion([x], weight_decay=1.0))
        >>> for value in (2.0, 1.5):
        ...     _ = monitor.record(value)
        >>> ax = pyloss.visualize.draw_lyapunov(monitor.records)

    Reference:
        Chen, Liu, Liang, Liu, arXiv 2310.05898.
    """
    records = list(records)
    if not records:
        raise ValueError("records must hold at least one record")
    if not all(hasattr(r, "fenchel_gap") for r in records):
        raise TypeError("records must be those of a LyapunovMonitor")
    pyplot = _pyplot()
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    steps = range(len(records))
    for at, record in enumerate(records):
        if float(record.violation) > 1e-6:
            ax.axvspan(at - 0.5, at + 0.5, color=_OUTSIDE_COLOR, alpha=0.2, linewidth=0)
    ax.plot(steps, [float(r.H) for r in records], color=_H_COLOR, linewidth=2, label="H")
    ax.plot(steps, [float(r.composite) for r in records], color=_OBJECTIVE_COLOR, linewidth=1.2,
            label="objective")  # fmt: skip
    ax.set(xlabel="step", ylabel="value")
    ax.legend(fontsize=8)
    return ax
