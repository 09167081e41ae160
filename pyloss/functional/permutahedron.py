"""Soft rank and soft sort by projection onto the permutahedron."""

from __future__ import annotations

from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.permutahedron import permutahedron

_REGULARIZATIONS = ("l2", "kl")


def permutahedron_rank(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    dim: int = -1,
    descending: bool = False,
) -> Tensor:
    r"""Soft ranks, the smallest near 1, by projection onto the permutahedron, in O(n log n).

    With z = values / e, e the regularization strength, and P(w) the convex hull of the
    permutations of w = (n, ..., 1):

    .. math::
        \mathrm{l2}:\ \arg\min_{y \in P(w)} \tfrac12 \|y - z\|^2, \qquad
        \mathrm{kl}:\ \arg\min_{y \in P(w)} \sum_i y_i (\log y_i - z_i) - y_i

    Args:
        values: any shape, floating.
        regularization: ``"l2"`` or ``"kl"``.
        regularization_strength: > 0. Ranks are exact, and their gradient 0, where it is less than
            the smallest gap between two values (``"l2"``).
        dim: the dimension that is ranked.
        descending: the largest gets the rank near 1: the ranks of ``-values``.

    Returns:
        Ranks of the shape of ``values`` and its dtype; float32 for half types under autocast. Equal
        values share their mean rank. Infinite values have the ranks at the ends, and no gradient.
        A NaN makes its row NaN.

    Raises:
        TypeError: ``values`` not a floating Tensor, or the strength not a number.
        ValueError: no dimension, or a dimension of size 0; an unknown regularization; a strength
            that is not positive and finite.
        IndexError: ``dim`` out of range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[0.3, -1.0, 0.4]])
        >>> pyloss.functional.permutahedron_rank(x, regularization_strength=0.2)
        tensor([[2.2500, 1.0000, 2.7500]])
        >>> pyloss.functional.permutahedron_rank(x, regularization_strength=0.01)
        tensor([[2., 1., 3.]])

    Reference:
        Blondel, Teboul, Berthet, Djolonga. Fast Differentiable Sorting and Ranking. arXiv
        2002.08871.
    """
    rows, restore, kl = _rows(values, regularization, regularization_strength, dim)
    rows = -rows if descending else rows
    return restore(permutahedron(rows, True, kl, float(regularization_strength)))


def permutahedron_sort(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    dim: int = -1,
    descending: bool = False,
) -> Tensor:
    r"""Softly sorted values, ascending, by projection onto the permutahedron, in O(n log n).

    With w = (n, ..., 1), e the regularization strength, and P(u) the convex hull of the
    permutations of u:

    .. math::
        \mathrm{l2}:\ -\arg\min_{y \in P(-\mathrm{values})} \tfrac12 \|y - w / e\|^2, \qquad
        \mathrm{kl}:\ -\log \arg\min_{y \in P(\exp(-\mathrm{values}))}
                      \sum_i y_i (\log y_i - w_i / e) - y_i

    Args:
        values: any shape, floating.
        regularization: ``"l2"`` or ``"kl"``.
        regularization_strength: > 0. The values are sorted exactly where neighbours differ by less
            than ``1 / regularization_strength`` (``"l2"``).
        dim: the dimension that is sorted.
        descending: the largest first: ``-permutahedron_sort(-values)``.

    Returns:
        Values of the shape of ``values`` and its dtype; float32 for half types under autocast.
        Infinite values stay at the ends, without gradient and without an effect on the others. A
        NaN makes its row NaN.

    Raises:
        As :func:`permutahedron_rank`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[3.0, -1.0, 0.5]])
        >>> pyloss.functional.permutahedron_sort(x, regularization_strength=0.1)
        tensor([[-1.0000,  0.5000,  3.0000]])
        >>> pyloss.functional.permutahedron_sort(x, regularization_strength=1.0)
        tensor([[-0.1667,  0.8333,  1.8333]])

    Reference:
        Blondel, Teboul, Berthet, Djolonga. Fast Differentiable Sorting and Ranking. arXiv
        2002.08871.
    """
    rows, restore, kl = _rows(values, regularization, regularization_strength, dim)
    strength = float(regularization_strength)
    if descending:
        return restore(-permutahedron(-rows, False, kl, strength))
    return restore(permutahedron(rows, False, kl, strength))


def _rows(values, regularization, strength, dim):
    """(rows (b, n) in float32 or float64, the way back, kl) of checked arguments."""
    checks.check_floating("values", values)
    checks.check_has_dimension("values", values, "a 0-d Tensor")
    if regularization not in _REGULARIZATIONS:
        raise ValueError(f"regularization must be 'l2' or 'kl', got {regularization!r}")
    checks.check_range("regularization_strength", strength, 0.0, open_low=True)
    checks.check_along("values", values, dim)
    dtype = accumulator_dtype(values.dtype)
    result = checks.result_dtype(values.dtype, values)
    last = dim in (-1, values.dim() - 1)
    moved = values if last else values.movedim(dim, -1)
    rows = (moved if moved.dim() == 2 else moved.reshape(-1, moved.shape[-1])).to(dtype)

    def restore(y: Tensor) -> Tensor:
        y = y.to(result)
        y = y if moved.dim() == 2 else y.view(moved.shape)
        return y if last else y.movedim(-1, dim)

    return rows, restore, regularization == "kl"
