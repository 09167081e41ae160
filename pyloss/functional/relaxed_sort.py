"""NeuralSort and SoftSort: row-stochastic relaxations of the permutation matrix of a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_range
from pyloss.functional._sorting_padding import by_length
from pyloss.ops._launch import accumulator_dtype


def neural_sort(
    scores: Tensor,
    tau: float = 1.0,
    *,
    dim: int = -1,
    descending: bool = True,
    hard: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""NeuralSort: row r of the result is a distribution over the elements for rank r.

    For ranks r = 1, ..., n, largest first:

    .. math:: P_{r} = \mathrm{softmax}_j\Big(\frac{(n + 1 - 2 r)\, s_j - \sum_k |s_j - s_k|}
                                                  {\tau}\Big)

    Args:
        scores: any shape, floating; n elements along ``dim``.
        tau: temperature, > 0; towards 0 the rows become one-hot (at distinct scores).
        dim: the dimension that is sorted.
        descending: False: smallest first, that is the result of ``-scores``.
        hard: straight-through: one-hot rows at the largest entry forward, the gradient of the soft
            ones. Rows may choose the same element.
        mask, lengths: as in :func:`pyloss.soft_sort`: each row as if it held these elements alone;
            0 elsewhere.

    Returns:
        ``(..., n, n)`` with the other dimensions of ``scores`` in front, rows summing to 1, of the
        dtype of ``scores`` (float32 for half types under autocast). ``P @ scores`` is the relaxed
        sort. A NaN or an infinity makes the whole matrix of its row NaN: the sum over k has them
        all. O(n^2) memory.

    Raises:
        TypeError: ``scores`` not a floating Tensor, or ``tau`` not a number.
        ValueError: no dimension; ``tau`` not positive and finite.
        IndexError: ``dim`` out of range.

    Example:
        >>> import torch, pyloss
        >>> P = pyloss.functional.neural_sort(torch.tensor([[1.0, 3.0, 2.0]]), tau=0.1)
        >>> P.round(decimals=3)[0]
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])

    Reference:
        Grover, Wang, Zweig, Ermon. Stochastic Optimization of Sorting Networks via Continuous
        Relaxations. ICLR 2019, arXiv 1903.08850.
    """
    if mask is not None or lengths is not None:
        return by_length(
            neural_sort,
            ("rank", "element"),
            scores,
            dim,
            mask,
            lengths,
            tau=tau,
            descending=descending,
            hard=hard,
        )
    s, result = _checked(scores, tau, dim)
    if s.shape[-1] == 0:
        return (s.unsqueeze(-1) * s.unsqueeze(-2)).to(result)
    s = s if descending else -s
    n = s.shape[-1]
    # A shift of all scores changes nothing, but the products of a large one would be rounded.
    low, high = s.detach().amin(-1, keepdim=True), s.detach().amax(-1, keepdim=True)
    s = s - (low / 2 + high / 2)
    # Sums of n huge scores would overflow.
    reach = high / 2 - low / 2
    unit = torch.where(reach > torch.finfo(s.dtype).max / (4 * n), reach, 1.0)
    s = s / unit
    # By the sorted order, sum_k |s_j - s_k| would need no n x n temporary; but P is one anyway.
    spread = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs().sum(-1)
    factor = n - 1 - 2 * torch.arange(n, dtype=s.dtype, device=s.device)
    logits = factor.unsqueeze(-1) * s.unsqueeze(-2) - spread.unsqueeze(-2)
    # Largest 0, so that a small tau makes the others -inf and not all of them infinite.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    return _rows(logits / tau * unit.unsqueeze(-1), hard).to(result)


def soft_sort_matrix(
    scores: Tensor,
    tau: float = 1.0,
    pow: float = 1.0,
    *,
    dim: int = -1,
    descending: bool = True,
    hard: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""SoftSort: row r is a distribution over the elements by their distance to the r-th largest.

    .. math:: P_{r} = \mathrm{softmax}_j\Big(-\frac{|\mathrm{sort}(s)_r - s_j|^p}{\tau}\Big)

    Args:
        scores: any shape, floating; n elements along ``dim``.
        tau: temperature, > 0; towards 0 the rows become one-hot (at distinct scores).
        pow: the exponent p, > 0.
        dim: the dimension that is sorted.
        descending: False: smallest first.
        hard: straight-through: one-hot rows at the largest entry forward, the gradient of the soft
            ones.
        mask, lengths: as in :func:`pyloss.soft_sort`: each row as if it held these elements alone;
            0 elsewhere.

    Returns:
        ``(..., n, n)`` with the other dimensions of ``scores`` in front, rows summing to 1, of the
        dtype of ``scores`` (float32 for half types under autocast). Infinite scores are masks: they
        have the rows at their end, shared equally, nothing in other rows, and no gradient. A NaN
        makes the whole matrix of its row NaN. O(n^2) memory.

    Raises:
        TypeError: ``scores`` not a floating Tensor, or ``tau``, ``pow`` not numbers.
        ValueError: no dimension; ``tau`` or ``pow`` not positive and
            finite.
        IndexError: ``dim`` out of range.

    Example:
        >>> import torch, pyloss
        >>> P = pyloss.functional.soft_sort_matrix(torch.tensor([[1.0, 3.0, 2.0]]), tau=0.1)
        >>> P.round(decimals=3)[0]
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])

    Reference:
        Prillo, Eisenschlos. SoftSort: A Continuous Relaxation for the argsort Operator. ICML 2020,
        arXiv 2006.16038.
    """
    if mask is not None or lengths is not None:
        return by_length(
            soft_sort_matrix,
            ("rank", "element"),
            scores,
            dim,
            mask,
            lengths,
            tau=tau,
            pow=pow,
            descending=descending,
            hard=hard,
        )
    s, result = _checked(scores, tau, dim)
    check_range("pow", pow, 0.0, open_low=True)
    if s.shape[-1] == 0:
        return (s.unsqueeze(-1) * s.unsqueeze(-2)).to(result)
    ordered = s.sort(dim=-1, descending=bool(descending)).values.unsqueeze(-1)
    s = s.unsqueeze(-2)
    # inf - inf is no distance: 0 between equal ones, else infinite, without a gradient.
    infinite = ordered.isinf() | s.isinf()
    apart = torch.where(ordered == s, 0.0, torch.inf)
    distance = (ordered.masked_fill(ordered.isinf(), 0.0) - s.masked_fill(s.isinf(), 0.0)).abs()
    if pow != 1:
        if pow < 2:  # 0^p has a derivative without a bound, first or second
            equal = distance == 0
            distance = (distance.masked_fill(equal, 1.0) ** pow).masked_fill(equal, 0.0)
        else:
            distance = distance**pow
    logits = torch.where(infinite, -apart, distance / -tau)
    # The rows of infinite scores, too, are NaN where one score is.
    spoilt = torch.where(s.isnan().any(-1, keepdim=True), torch.nan, 0.0)
    return _rows(logits + spoilt, hard).to(result)


def _rows(logits: Tensor, hard: bool) -> Tensor:
    soft = logits.softmax(-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    one_hot = torch.where(soft.isnan(), soft.detach(), one_hot)
    return one_hot + (soft - soft.detach())


def _checked(scores, tau, dim) -> tuple[Tensor, torch.dtype]:
    """(scores with `dim` last, in float32 or float64; the dtype of the result)."""
    checks.check_floating("scores", scores)
    checks.check_dense("scores", scores)
    checks.check_has_dimension("scores", scores, "a 0-d Tensor")
    check_range("tau", tau, 0.0, open_low=True)
    checks.check_along("scores", scores, dim, empty=True)
    dtype = accumulator_dtype(scores.dtype)
    return scores.movedim(dim, -1).to(dtype), checks.result_dtype(scores.dtype, scores)
