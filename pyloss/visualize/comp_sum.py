"""Bounds of comp-sum losses over tau."""

from __future__ import annotations

from typing import Any

from pyloss.visualize.topology import _pyplot

_RISK_COLOR, _GAP_COLOR, _BOUND_COLOR, _TRUE_COLOR = "#0072b2", "#e69f00", "#d55e00", "#000000"


def draw_comp_sum(analysis: Any, axes: Any = None) -> Any:
    r"""Draws risks and minimizability gaps of comp-sum losses over tau, and beside them what they
    say of the zero-one risk.

    .. math:: R_\tau(h), \quad M_\tau, \qquad \Gamma_\tau\big(R_\tau(h) - R^*_\tau + M_\tau\big) -
              M_{01} \ge R_{01}(h) - R^*_{01}

    Args:
        analysis: :class:`pyloss.analysis.CompSumAnalysis`, of
            :func:`pyloss.analysis.comp_sum.analyze`.
        axes: two matplotlib axes; None makes a figure.

    Returns:
        The two axes.

    Raises:
        ImportError: without matplotlib. TypeError: an analysis of another type.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.analysis.comp_sum import analyze
        >>> found = analyze(torch.randn(50, 3), torch.randint(3, (50,)), tau=[0.0, 1.0, 2.0])
        >>> left, right = pyloss.visualize.draw_comp_sum(found)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    if not hasattr(analysis, "surrogate_risk"):
        raise TypeError(f"analysis must be a CompSumAnalysis, got {type(analysis).__name__}")
    pyplot = _pyplot()
    if axes is None:
        axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")[1]
    left, right = axes
    tau = analysis.tau.numpy()
    for value, label, color in (
        (analysis.surrogate_risk, "surrogate risk", _RISK_COLOR),
        (analysis.gap, "minimizability gap", _GAP_COLOR),
    ):
        left.plot(tau, value.cpu().numpy(), marker="o", color=color, label=label)
    left.set(xlabel="tau", title="surrogate loss")
    left.legend(fontsize=8)
    excess = float(analysis.zero_one_risk - analysis.zero_one_minimum - analysis.zero_one_gap)
    for value, label, style in (
        (analysis.bound_closed_form, "closed form", ":"),
        (analysis.bound, "bound", "-"),
    ):
        line = value.cpu().clamp(max=1).numpy()
        right.plot(tau, line, style, marker="o", color=_BOUND_COLOR, label=label)
    right.axhline(excess, color=_TRUE_COLOR, linewidth=1, label="as it is")
    right.set(xlabel="tau", title="excess zero-one risk")
    right.legend(fontsize=8)
    return axes
