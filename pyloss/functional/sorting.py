"""Sorting, ranking and selecting with a gradient, and the losses made of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_number
from pyloss.functional._sorting_rows import (
    SELECTORS,
    TARGETS,
    TIES,
    applied,
    check_choice,
    check_ordered,
    checked_settings,
    expanded,
    for_op,
    one_hot,
    ordered_target,
    permutation,
    places,
    poisoned,
    rows_of,
    sorted_values,
    straight_through,
    straight_through_values,
)
from pyloss.functional._sorting_rows import UnknownNetworkError as UnknownNetworkError
from pyloss.functional.permutahedron import permutahedron_rank, permutahedron_sort
from pyloss.ops import sorting_network as op
from pyloss.ops._launch import accumulator_dtype

_METHODS = ("network", "permutahedron")


# --------------------------------------------------------------------------------------------------
# Soft sorting


def soft_sort(
    x: Tensor,
    dim: int = -1,
    descending: bool = False,
    *,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    hard: bool = False,
    return_permutation: bool = False,
    method: str = "network",
    regularization: str = "l2",
    regularization_strength: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Sorts with a gradient: a sorting network whose comparators mix their two inputs.

    .. math:: x_{lo} = \alpha\, a + (1-\alpha)\, b, \quad x_{hi} = (1-\alpha)\, a + \alpha\, b,
              \quad \alpha = f(s (b - a)), \qquad y = P^\top x

    Args:
        x: ``(..., n, ...)``, floating; +-inf marks entries that end at the top or the bottom
            without touching the others.
        dim: the dimension to sort.
        descending: the largest first. Runs on -x; P is not that of the ascending order mirrored.
        network: ``"auto"``: bitonic where n is a power of two, Batcher's elsewhere; or
            ``"bitonic"``, ``"odd_even"``, ``"batcher"``. For other n, ``"bitonic"`` is that of the
            diffsort package, which leaves some inputs unsorted (from n = 22 on).
        distribution: f: ``"cauchy"``, ``"reciprocal"`` and ``"optimal"`` (monotonic),
            ``"logistic"``, ``"logistic_phi"``, ``"gaussian"``.
        steepness: 0 < s <= 1e30; the larger, the closer to sorting. A tensor of the shape of x
            without ``dim``, or one that broadcasts to it, is differentiable and not checked.
        art_lambda: exponent of ``"logistic_phi"``, in [0, 1).
        hard: the exactly sorted values, with the gradient of the soft ones.
        return_permutation: also P, ``(..., n, n)``, the sorted dimension moved to the end.
        method: ``"permutahedron"``: the projection of Blondel et al. instead of a network; of the
            other options then only the next two count.
        regularization, regularization_strength: ``"l2"`` or ``"kl"``, and its weight.

    Returns:
        The shape and dtype of x, float32 for half types under autocast; or (y, P). A row with a NaN
        is all NaN.

    Raises:
        TypeError: x is no floating tensor; an option of the wrong type.
        ValueError: nothing to sort; an unknown name or an option out of range.
        IndexError: ``dim`` out of range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
        >>> y = pyloss.soft_sort(x, steepness=100.0)
        >>> y.detach().round(decimals=1)
        tensor([1., 2., 3.])
        >>> y[0].backward()  # the smallest: x[1]
        >>> x.grad.round(decimals=1)
        tensor([0., 1., 0.])

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019, 2203.09630.
    """
    check_choice("method", method, _METHODS)
    if method == "permutahedron":
        if return_permutation or hard:
            raise ValueError("method='permutahedron' has no permutation matrix and no hard=True")
        return _permutahedron(
            permutahedron_sort, x, dim, descending, regularization, regularization_strength
        )
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings)
    p = None
    if return_permutation:
        y, p = permutation(rows)
    else:
        y = sorted_values(rows)
    if hard:
        y = straight_through_values(y, rows.x.detach().sort(1).values)
        p = p if p is None else straight_through(p, one_hot(rows))
    y = rows.unfolded(y * rows.sign if rows.sign < 0 else y)
    return y if p is None else (y, rows.matrices(p))


def soft_rank(
    x: Tensor,
    dim: int = -1,
    descending: bool = False,
    *,
    base: int = 1,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    hard: bool = False,
    method: str = "network",
    regularization: str = "l2",
    regularization_strength: float = 1.0,
) -> Tensor:
    r"""Ranks with a gradient: the expected rank of each element.

    .. math:: r = P\, (0, 1, \ldots, n-1)^\top + \text{base}

    Args:
        x: ``(..., n, ...)``, floating.
        dim, descending: as in :func:`soft_sort`; descending: the largest has the first rank.
        base: the first rank.
        network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the exact ranks (equal values in their order), with the gradient of the soft ones.
        method, regularization, regularization_strength: as in :func:`soft_sort`.

    Returns:
        The shape and dtype of x, float32 for half types under autocast.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([0.3, -1.2, 5.0])
        >>> pyloss.soft_rank(x, steepness=1e4).round(decimals=2)
        tensor([2., 1., 3.])
        >>> pyloss.soft_rank(x, descending=True, hard=True)
        tensor([2., 3., 1.])

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019; Blondel et al. arXiv 2002.08871.
    """
    check_choice("method", method, _METHODS)
    check_number("base", base)
    if method == "permutahedron":
        if hard:
            raise ValueError("method='permutahedron' has no hard=True")
        found = _permutahedron(
            permutahedron_rank, x, dim, descending, regularization, regularization_strength
        )
        return found if base == 1 else found + (base - 1)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings)
    r = applied(rows, places(rows), False).squeeze(-1)
    if hard:
        r = straight_through(r, rows.ranks())
    return rows.unfolded(r + base)


def soft_argsort(
    x: Tensor,
    dim: int = -1,
    descending: bool = False,
    *,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    hard: bool = False,
) -> Tensor:
    r"""The expected index of the element at each rank, :math:`P^\top (0, 1, \ldots, n-1)^\top`.

    Args:
        x: ``(..., n, ...)``, floating.
        dim, descending, network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the indices of ``torch.argsort(stable=True)`` as floats, with this gradient.

    Returns:
        The shape and dtype of x, float32 for half types under autocast.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`.

    Example:
        >>> import torch, pyloss
        >>> pyloss.soft_argsort(torch.tensor([3.0, 1.0, 2.0]), hard=True)
        tensor([1., 2., 0.])

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019.
    """
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings)
    index = applied(rows, places(rows), True).squeeze(-1)
    if hard:
        index = straight_through(index, rows.order())
    return rows.unfolded(index)


def soft_permutation(
    x: Tensor,
    dim: int = -1,
    descending: bool = False,
    *,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    hard: bool = False,
) -> Tensor:
    r"""The doubly stochastic matrix of a soft sort: P[i, r] is the weight of element i at rank r.

    Args:
        x: ``(..., n, ...)``, floating.
        dim, descending, network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the exact permutation matrix, with the gradient of P.

    Returns:
        ``(..., n, n)``, the sorted dimension moved to the end; ``y = P^T x``, with ``descending``
        as well.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`.

    Example:
        >>> import torch, pyloss
        >>> P = pyloss.soft_permutation(torch.randn(8, 5))
        >>> P.shape
        torch.Size([8, 5, 5])
        >>> torch.testing.assert_close(P.sum(1), torch.ones(8, 5))

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019.
    """
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings)
    _, p = permutation(rows)
    if hard:
        p = straight_through(p, one_hot(rows))
    return rows.matrices(p)


def soft_permute(
    x: Tensor,
    feats: Tensor,
    dim: int = -1,
    descending: bool = False,
    *,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    hard: bool = False,
) -> Tensor:
    r"""Features in the soft order of their keys, :math:`P^\top F`, without forming P.

    Args:
        x: keys ``(..., n, ...)``, floating.
        feats: ``(..., n, d)``, floating; leading dimensions broadcast against those of x without
            ``dim``. Differentiable.
        dim, descending, network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the features in the exact order, with the gradients of the soft ones.

    Returns:
        ``(..., n, d)``, of the promoted dtype of both; float32 for half types under autocast.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`.
        ValueError: shapes or devices that do not fit.

    Example:
        >>> import torch, pyloss
        >>> keys, feats = torch.tensor([3.0, 1.0, 2.0]), torch.eye(3)
        >>> pyloss.soft_permute(keys, feats, hard=True)
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019.
    """
    settings = checked_settings(network, distribution, steepness, art_lambda)
    check_ordered("feats", feats)
    rows = rows_of("x", x, dim, descending, settings)
    if feats.dim() < 2 or feats.shape[-2] != rows.n:
        raise ValueError(
            f"feats must be (..., n, d) with n = {rows.n}, the sorted size of x; got the shape "
            f"{list(feats.shape)}"
        )
    if feats.device != x.device:
        raise ValueError(f"feats is on {feats.device}, x on {x.device}")
    try:
        lead = tuple(torch.broadcast_shapes(rows.lead, feats.shape[:-2]))
    except RuntimeError:
        raise ValueError(
            f"the leading shape {list(feats.shape[:-2])} of feats does not broadcast with "
            f"{list(rows.lead)} of x"
        ) from None
    dtype = checks.result_dtype(torch.promote_types(x.dtype, feats.dtype), x)
    work = accumulator_dtype(dtype)
    rows = expanded(rows, lead, work, dtype)
    if math.prod(feats.shape[:-2]) == 1:
        f = feats.reshape(1, *feats.shape[-2:])
    else:
        f = feats.expand(*lead, *feats.shape[-2:]).reshape(math.prod(lead), *feats.shape[-2:])
    f = f.to(work).contiguous()
    found = applied(rows, f, True)
    if hard:
        order = rows.order().unsqueeze(-1).expand(-1, -1, f.shape[2])
        exact = f.detach().expand(order.shape[0], -1, -1).gather(1, order)
        found = straight_through_values(found, exact)
    return rows.matrices(found)


def soft_topk(
    x: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    *,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    hard: bool = False,
) -> Tensor:
    r"""Membership of each element in the top k, by place: k columns of P, without forming P.

    Args:
        x: ``(..., n, ...)``, floating.
        k: how many, 1 <= k <= n.
        dim: the dimension to select from.
        largest: False: the smallest.
        network: those of :func:`soft_sort`, or ``"splitter_selection"``, which has fewer layers.
        distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: exact one-hot columns, with this gradient.

    Returns:
        ``(..., n, k)``, the selected dimension moved to the end; column 0 belongs to the best. The
        sum over the columns is the membership in the set.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`; ValueError: ``k`` out of range.

    Example:
        >>> import torch, pyloss
        >>> top = pyloss.soft_topk(torch.tensor([3.0, 1.0, 2.0]), 2, steepness=1e4)
        >>> top.sum(-1).round(decimals=2)
        tensor([1., 0., 1.])

    Reference:
        Petersen, Kuehne, Borgelt, Deussen. arXiv 2206.07290.
    """
    checks.check_integer("k", k)
    settings = checked_settings(network, distribution, steepness, art_lambda, k, SELECTORS)
    rows = rows_of("x", x, dim, not largest, settings)  # either way the largest of the rows
    if not 1 <= k <= rows.n:
        raise ValueError(f"k must be in [1, {rows.n}], the size of x along dim; got {k}")
    last = torch.arange(rows.n - 1, rows.n - 1 - k, -1, device=x.device)
    place = torch.arange(rows.n, device=x.device).unsqueeze(1)
    columns = (place == last).to(rows.x.dtype).unsqueeze(0)
    found = applied(rows, columns, False)
    if hard:
        ranks = rows.ranks().unsqueeze(-1)
        found = straight_through(found, ranks == last)
    return rows.matrices(found)


def _permutahedron(function, x, dim, descending, regularization, strength) -> Tensor:
    check_ordered("x", x)
    return function(x, regularization, strength, dim=dim, descending=descending)


# --------------------------------------------------------------------------------------------------
# Losses


def sorting_cross_entropy(
    x: Tensor,
    target: Tensor,
    kind: str = "bce",
    target_is: str = "values",
    reduction: str = "mean",
    *,
    dim: int = -1,
    descending: bool = False,
    ties: str = "stable",
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    validate: bool = False,
) -> Tensor:
    r"""Cross entropy of the soft permutation against the true one, fused: P is never in memory.

    .. math:: \text{bce} = -\frac{1}{n^2} \sum_{i,r} Q_{ir} \log P_{ir}
                  + (1 - Q_{ir}) \log (1 - P_{ir}), \qquad
              \text{row\_ce} = -\frac{1}{n} \sum_{i,r} Q_{ir} \log P_{ir}

    Args:
        x: scores ``(..., n, ...)``, floating.
        target: what x should be ordered like, see ``target_is``; same device.
        kind: ``"bce"`` (logarithms at least -100, as torch's binary cross entropy), ``"row_ce"`` or
            ``"col_ce"`` (P at least 1e-30). The rows and the columns of P both sum to 1, so that
            the last two are the same number.
        target_is: ``"values"``: of the shape of x, any real dtype, ordered by a stable sort.
            ``"ranks"``: of the shape of x, integers 0 .. n-1, such as ``v.argsort().argsort()``.
            ``"permutation"``: ``(..., n, n)``, one-hot, Q[i, rank of i] = 1; a row without an
            entry above 1/2 is like no target.
        reduction: ``"mean"`` or ``"sum"`` over the items, each the mean over its n^2 or n terms;
            ``"none"``: one loss per item.
        dim, descending: as in :func:`soft_sort`; rank 0 is then that of the largest.
        ties: of equal values: ``"stable"``: ranks in their order; ``"share"``: each gets the mean
            of their columns.
        network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        validate: check that ranks are one of each and that a permutation is one, which a GPU has to
            wait for. Without it, a rank that does not exist is like no target at all.

    Returns:
        0-d, or the shape of x without ``dim``; of the dtype of x, float32 for half types under
        autocast. A row of x with a NaN, or of NaN target values, gives NaN. Twice differentiable.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`.
        ValueError: a target of the wrong shape, dtype or device, or of wrong values if validated.

    Example:
        >>> import torch, pyloss
        >>> scores = torch.randn(64, 32, requires_grad=True)
        >>> truth = torch.rand(64, 32)
        >>> pyloss.sorting_cross_entropy(scores, truth).backward()
        >>> ordered = truth.sort().values  # better by far
        >>> bool(pyloss.sorting_cross_entropy(10 * ordered, ordered) < 0.1)
        True

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019.
    """
    check_choice("kind", kind, op.KINDS)
    check_choice("target_is", target_is, TARGETS)
    check_choice("reduction", reduction, op.REDUCTIONS)
    check_choice("ties", ties, TIES)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings)
    ranked, order, nan = ordered_target(x, rows, target, target_is, ties, validate)
    scaled, settings = for_op(poisoned(rows, nan))
    loss = op.loss(scaled, ranked, None, settings, order=order, kind=kind, reduction=reduction)
    return (loss.view(rows.lead) if reduction == "none" else loss).to(rows.dtype)


def spearman_loss(
    x: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    dim: int = -1,
    network: str = "auto",
    distribution: str = "cauchy",
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    method: str = "network",
    regularization: str = "l2",
    regularization_strength: float = 1.0,
) -> Tensor:
    r"""One minus Spearman's rank correlation, with soft ranks of the scores.

    .. math:: \ell = 1 - \frac{\sum_i (r_i - \bar r)(t_i - \bar t)}
              {\sqrt{\sum_i (r_i - \bar r)^2 \sum_i (t_i - \bar t)^2}}

    Args:
        x: scores ``(..., n, ...)``, floating; r are their soft ranks.
        target: values to be ordered like, same shape, any real dtype; t are their exact ranks, the
            mean rank where equal. No gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the items.
        dim: the dimension of an item.
        network, distribution, steepness, art_lambda, method, regularization,
            regularization_strength: as in :func:`soft_rank`.

    Returns:
        In [0, 2]: 0-d, or the shape of x without ``dim``; of the dtype of x, float32 for half types
        under autocast. 1, without a gradient, where all ranks are equal.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_rank`; ValueError: another shape or device
        of target.

    Example:
        >>> import torch, pyloss
        >>> truth = torch.tensor([10.0, 30.0, 20.0])
        >>> pyloss.spearman_loss(truth, truth, steepness=1e3).round(decimals=3)
        tensor(0.)

    Reference:
        Blondel, Teboul, Berthet, Djolonga. arXiv 2002.08871.
    """
    check_choice("reduction", reduction, op.REDUCTIONS)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, False, settings)
    values, order, _ = ordered_target(x, rows, target, "values", "share", False)
    first, count, nan = op.target_ranks(values, order)
    rows = poisoned(rows, nan)
    t = first.to(rows.x.dtype) + 0.5 * count
    if method == "network":
        r = applied(rows, places(rows), False).squeeze(-1)
    else:
        r = soft_rank(
            rows.x,
            method=method,
            regularization=regularization,
            regularization_strength=regularization_strength,
        )
    a, b = r - r.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    size = (a * a).sum(1) * (b * b).sum(1)
    flat = size == 0
    correlation = torch.where(flat, 0.0, (a * b).sum(1) / torch.where(flat, 1.0, size).sqrt())
    each = (1 - correlation).view(rows.lead)
    return op.reduced(each, reduction).to(rows.dtype)
