"""Kernels and fluctuations of deep networks by depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyloss.visualize.topology import _pyplot

_COLORS = ("#0072b2", "#000000", "#d55e00", "#009e73", "#cc79a7")


def draw_kernel_flow(
    flow: Any, *, width: int = 500, measured: Mapping[str, Any] | None = None, axes: Any = None
) -> Any:
    r"""Draws the kernel of each layer with the fluctuations of networks of a width, and beside it
    these fluctuations by depth over width.

    .. math:: K \pm \sqrt{V / n}, \qquad V / (n K^2)

    Args:
        flow: :class:`pyloss.analysis.KernelFlow` of order 1, or a mapping of names to several; the
            first input of each is drawn.
        width: n.
        measured: names to second moments of preactivations, ``(runs, L)``: points with their
            standard deviation, and the relative variance of theirs.
        axes: two matplotlib axes; None makes a figure.

    Returns:
        The two axes.

    Raises:
        ImportError: without matplotlib. TypeError: a flow of another type. ValueError: a flow
            without V.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(1, 10)
        >>> flows = {
        ...     f"C_W = {C_W}": pyloss.analysis.kernel_flow("relu", x, 30, C_b=0.0, C_W=C_W)
        ...     for C_W in (1.8, 2.0, 2.2)
        ... }
        >>> left, right = pyloss.visualize.draw_kernel_flow(flows, width=300)

    Reference:
        Roberts, Yaida, Hanin. The Principles of Deep Learning Theory. arXiv 2106.10165.
    """
    flows = flow if isinstance(flow, Mapping) else {"": flow}
    for each in flows.values():
        if not hasattr(each, "ntk"):
            raise TypeError(f"flow must be a KernelFlow or a mapping, got {type(each).__name__}")
        if each.V is None:
            raise ValueError("flow must have V: that of order=1")
    pyplot = _pyplot()
    if axes is None:
        axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")[1]
    left, right = axes
    for number, (name, each) in enumerate(flows.items()):
        color = _COLORS[number % len(_COLORS)]
        K, V = each.K[:, 0, 0].cpu().numpy(), each.V[:, 0].cpu().numpy()
        layers = range(1, len(K) + 1)
        off = (V / width) ** 0.5
        low = (K - off).clip(min=0.05 * K)  # a logarithmic axis has no 0
        left.plot(layers, K, color=color, linewidth=1.4, label=name or None)
        left.fill_between(layers, low, K + off, color=color, alpha=0.15, linewidth=0)
        over = [layer / width for layer in layers]
        right.plot(over, V / (width * K**2), color=color, linewidth=1.4, label=name or None)
        if measured is not None and name in measured:
            runs = measured[name].cpu()
            mean, spread = runs.mean(0).numpy(), runs.std(0).numpy()
            down = spread.clip(max=0.95 * mean)
            left.errorbar(layers, mean, yerr=[down, spread], fmt=".", color=color, markersize=4,
                          linewidth=0.6)  # fmt: skip
            right.plot(over, (spread / mean) ** 2, ".", color=color, markersize=4)
    left.set(xlabel="layer", title="second moment of preactivations", yscale="log")
    right.set(xlabel="depth / width", title="relative variance between networks")
    for ax in axes:
        ax.grid(alpha=0.2)
        if any(flows):
            ax.legend(fontsize=8)
    return axes
