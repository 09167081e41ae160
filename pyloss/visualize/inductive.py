"""Inductive bias over the error that is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyloss.visualize.topology import _pyplot, _tensor


def draw_inductive_bias(
    target: Tensor | Sequence[float], biases: Mapping[str, Any], ax: Any = None
) -> Any:
    r"""Draws the information that is needed to generalise over the error that is wanted.

    .. math:: I(\epsilon) = -\log P(L \le \epsilon)

    Args:
        target: epsilon, ``(T,)``.
        biases: by name, :class:`pyloss.analysis.InductiveBias` of shape ``(T,)``, or its nats.
        ax: matplotlib axes; None makes a figure.

    Returns:
        The axes: epsilon is logarithmic, what is infinite is left out.

    Raises:
        ImportError: without matplotlib. TypeError: no mapping. ValueError: shapes that do not fit.

    Example:
        >>> import torch, pyloss.analysis, pyloss.visualize
        >>> losses, target = torch.rand(500).exp() - 0.9, torch.logspace(-3, 0, 30)
        >>> found = {method: pyloss.analysis.inductive_bias(losses, target, method=method)
        ...          for method in ("empirical", "ncx2")}
        >>> ax = pyloss.visualize.draw_inductive_bias(target, found)

    Reference:
        Boopathy, Yue, Hwang, Iyer, Fiete. Towards Exact Computation of Inductive Bias. arXiv
        2406.15941.
    """
    if not isinstance(biases, Mapping):
        raise TypeError(f"biases must be a mapping, got {type(biases).__name__}")
    pyplot = _pyplot()
    target = _tensor(target).double()
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    for name, bias in biases.items():
        nats = _tensor(getattr(bias, "nats", bias)).double()
        if target.dim() != 1 or nats.shape != target.shape:
            raise ValueError(
                f"target and biases must be (T,), got {list(target.shape)} and {list(nats.shape)}"
            )
        y = torch.where(nats.isfinite(), nats, torch.nan)
        ax.plot(target.numpy(), y.numpy(), label=name)
    ax.set(xscale="log", xlabel="test error", ylabel="nats")
    ax.legend(fontsize=8)
    return ax
