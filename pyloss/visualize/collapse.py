"""Curves of neural collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyloss.visualize.topology import _pyplot

_PANELS = (
    ("NC1", (("nc1", "tr S_W S_B^+ / K"), ("nc1_trace", "tr S_W / tr S_B"), ("cdnv", "CDNV"))),
    ("NC2", (("nc2_w", "classifier"), ("nc2_h", "class means"))),
    ("NC3", (("nc3", "classifier and means"),)),
)
_COLORS = ("#0072b2", "#e69f00", "#009e73")


def draw_collapse(
    records: Sequence[Any], steps: Sequence[float] | None = None, axes: Any = None
) -> Any:
    r"""Draws NC1, NC2 and NC3 over a training, on a logarithmic scale: how fast features and
    classifier go to the geometry of the minimum.

    .. math:: \tfrac{1}{K} \operatorname{tr} \Sigma_W \Sigma_B^+, \qquad
              \Big\| \frac{G}{\|G\|} - \frac{T}{\|T\|} \Big\|, \qquad
              \Big\| \frac{W H}{\|W H\|} - \frac{T}{\|T\|} \Big\|

    What is NaN in all records is left out.

    Args:
        records: :class:`pyloss.metrics.NeuralCollapse` of several times.
        steps: the times; default: 0, 1, ...
        axes: three matplotlib axes; None makes a figure.

    Returns:
        The three axes.

    Raises:
        ImportError: without matplotlib. TypeError: records of another type. ValueError: none, or
            as many steps as records there are not.

    Example:
        >>> import torch, pyloss
        >>> records = []
        >>> for spread in (1.0, 0.1):
        ...     metrics = pyloss.metrics.NeuralCollapseMetrics(3, 5)
        ...     metrics.update(torch.eye(3, 5).repeat(9, 1) + spread * torch.randn(27, 5),
        ...                    torch.arange(3).repeat(9))
        ...     records.append(metrics.compute(torch.eye(3, 5)))
        >>> axes = pyloss.visualize.draw_collapse(records)

    Reference:
        Dang et al. arXiv 2301.00437.
    """
    records = list(records)
    if not records:
        raise ValueError("records must hold at least one record")
    if not all(hasattr(r, "nc1_trace") and hasattr(r, "nc3") for r in records):
        raise TypeError("records must be those of NeuralCollapseMetrics.compute()")
    steps = list(range(len(records)) if steps is None else steps)
    if len(steps) != len(records):
        raise ValueError(f"steps must be {len(records)} numbers, got {len(steps)}")
    pyplot = _pyplot()
    if axes is None:
        axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")[1]
    for axis, (title, lines) in zip(axes, _PANELS):
        for (name, label), color in zip(lines, _COLORS):
            values = [float(getattr(r, name)) for r in records]
            if any(v == v for v in values):
                axis.plot(steps, values, color=color, label=label)
        axis.set(title=title, xlabel="step", yscale="log")
        if axis.lines:
            axis.legend(fontsize=8)
    return axes


def draw_central_path(path: Any, axes: Any = None) -> Any:
    r"""Draws the variability within classes along the central path, and the value beside it.

    .. math:: \operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B, \qquad f(W^*(H_t), H_t)

    Args:
        path: :class:`pyloss.analysis.CentralPath`.
        axes: two matplotlib axes; None makes a figure.

    Returns:
        The two axes.

    Raises:
        ImportError: without matplotlib. TypeError: a path of another type.

    Example:
        >>> import torch, pyloss
        >>> path = pyloss.analysis.central_path(torch.randn(40, 6), torch.arange(40) % 4, 0.05, 20)
        >>> left, right = pyloss.visualize.draw_central_path(path)

    Reference:
        Tirer, Huang, Niles-Weed. arXiv 2210.16658.
    """
    if not hasattr(path, "nc1_trace") or not hasattr(path, "time"):
        raise TypeError(f"path must be a CentralPath, got {type(path).__name__}")
    pyplot = _pyplot()
    if axes is None:
        axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")[1]
    left, right = axes
    time = path.time.cpu().numpy()
    for (name, label), color in zip(_PANELS[0][1][:2], _COLORS):
        left.plot(time, getattr(path, name).cpu().numpy(), color=color, label=label)
    left.set(title="variability within classes", xlabel="time", yscale="log")
    left.legend(fontsize=8)
    right.plot(time, path.value.cpu().numpy(), color=_COLORS[0])
    right.set(title="value with the best classifier", xlabel="time", yscale="log")
    return axes
