"""Gaps of invariance by environment."""

from __future__ import annotations

from typing import Any

from pyloss.visualize.topology import _pyplot

_GAP_COLOR, _EPS_COLOR, _LARGEST_COLOR = "#0072b2", "#d55e00", "#999999"


def draw_invariance(test: Any, *, eps: float | None = None, ax: Any = None) -> Any:
    r"""Draws how far a head is from the best in each environment.

    .. math:: \|G_e\|_2 \pm \text{two standard errors}, \qquad \hat\varepsilon = \max_e \|G_e\|_2

    Args:
        test: :class:`pyloss.analysis.InvarianceTest`.
        eps: a line to compare with.
        ax: matplotlib axes; None makes a figure.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib. TypeError: a test of another type.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(100, 2), torch.randn(100)
        >>> found = pyloss.analysis.invariance_test(x, y, torch.tensor([0, 40, 100]))
        >>> ax = pyloss.visualize.draw_invariance(found, eps=0.1)

    Reference:
        Parulekar, Shanmugam, Shakkottai. PAC Generalization via Invariant Representations. arXiv
        2205.15196.
    """
    if not hasattr(test, "eps_hat"):
        raise TypeError(f"test must be an InvarianceTest, got {type(test).__name__}")
    pyplot = _pyplot()
    if ax is None:
        ax = pyplot.subplots(figsize=(4.8, 3.4), layout="constrained")[1]
    gap, stderr = test.gap.cpu().numpy(), test.stderr.cpu().numpy()
    ax.errorbar(range(len(gap)), gap, yerr=2 * stderr, fmt="o", color=_GAP_COLOR, markersize=4,
                linewidth=1, label="gap")  # fmt: skip
    ax.axhline(float(test.eps_hat), color=_LARGEST_COLOR, linestyle=":", label="largest")
    if eps is not None:
        ax.axhline(eps, color=_EPS_COLOR, linewidth=1, label="eps")
    verdict = "not refused" if bool(test.holds) else "refused"
    ax.set(xlabel="environment", ylabel="gap", ylim=(0, None), title=f"invariance is {verdict}")
    ax.grid(alpha=0.2)
    ax.legend(fontsize=8)
    return ax
