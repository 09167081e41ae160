"""Sorting, ranking and selecting with a gradient, and the losses made of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_number
from pyloss.functional._sorting_padding import Padding, by_length, loss_by_length
from pyloss.functional._sorting_rows import (
    SELECTORS,
    TARGETS,
    TIES,
    applied,
    broadcast_steepness,
    check_choice,
    check_ordered,
    checked_settings,
    expanded,
    for_op,
    nothing,
    one_hot,
    ordered_target,
    permutation,
    places,
    poisoned,
    rows_of,
    shared,
    sorted_values,
    straight_through,
    straight_through_values,
)
from pyloss.functional._sorting_rows import UnknownNetworkError as UnknownNetworkError
from pyloss.functional.permutahedron import (
    centred_ranks,
    check_projection,
    permutahedron_rank,
    permutahedron_sort,
)
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
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
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
        method: ``"permutahedron"``: the projection of Blondel et al. instead of a network. What
            is an option of the other method raises.
        regularization, regularization_strength: ``"l2"`` or ``"kl"``, and its weight.
        mask: of the shape of x, bool, True at what counts: each row is sorted as if it held these
            elements alone. y has them in front, P at their places, and both have 0 elsewhere.
        lengths: the same for the first so many of each row: integers of the shape of x without
            ``dim``. Both are read on the host: not for graphs of ``fullgraph=True``.

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
    if mask is not None or lengths is not None:
        axes = (("rank",), ("element", "rank")) if return_permutation else ("rank",)
        return by_length(
            soft_sort,
            axes,
            x,
            dim,
            mask,
            lengths,
            descending=descending,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            hard=hard,
            return_permutation=return_permutation,
            method=method,
            regularization=regularization,
            regularization_strength=regularization_strength,
        )
    _check_method(
        method, network, distribution, steepness, art_lambda, regularization,
        regularization_strength,
    )  # fmt: skip
    if method == "permutahedron":
        if return_permutation or hard:
            raise ValueError("method='permutahedron' has no permutation matrix and no hard=True")
        return _permutahedron(
            permutahedron_sort, x, dim, descending, regularization, regularization_strength
        )
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings, empty=True)
    if rows.n == 0:
        y = rows.unfolded(rows.x)
        return (y, rows.matrices(nothing(rows))) if return_permutation else y
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
    ties: str = "stable",
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Ranks with a gradient: the expected rank of each element.

    .. math:: r = P\, (0, 1, \ldots, n-1)^\top + \text{base}

    Args:
        x: ``(..., n, ...)``, floating.
        dim, descending: as in :func:`soft_sort`; descending: the largest has the first rank.
        base: the first rank: 1, where :func:`sorting_cross_entropy` counts from 0.
        network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the exact ranks (equal values in their order), with the gradient of the soft ones.
        method, regularization, regularization_strength: as in :func:`soft_sort`.
        ties: of equal values: ``"stable"``: as the network has them, which depends on their places;
            ``"share"``: the mean of those, as the projection has them anyway.
        mask, lengths: as in :func:`soft_sort`; 0 where the mask is False.

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
    if mask is not None or lengths is not None:
        return by_length(
            soft_rank,
            ("element",),
            x,
            dim,
            mask,
            lengths,
            descending=descending,
            base=base,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            hard=hard,
            method=method,
            regularization=regularization,
            regularization_strength=regularization_strength,
            ties=ties,
        )
    _check_method(
        method, network, distribution, steepness, art_lambda, regularization,
        regularization_strength,
    )  # fmt: skip
    check_number("base", base)
    check_choice("ties", ties, TIES)
    if method == "permutahedron":
        if hard:
            raise ValueError("method='permutahedron' has no hard=True")
        found = _permutahedron(
            permutahedron_rank, x, dim, descending, regularization, regularization_strength
        )
        return found if base == 1 else found + (base - 1)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings, empty=True)
    if rows.n == 0:
        return rows.unfolded(rows.x)
    r = applied(rows, places(rows), False).squeeze(-1)
    if hard:
        r = straight_through(r, rows.ranks())
    if ties == "share":
        r = shared(r, rows.x)
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
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""The expected index of the element at each rank, :math:`P^\top (0, 1, \ldots, n-1)^\top`.

    Args:
        x: ``(..., n, ...)``, floating.
        dim, descending, network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the indices of ``torch.argsort(stable=True)`` as floats, with this gradient.
        mask, lengths: as in :func:`soft_sort`; indices are those of x.

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
    if mask is not None or lengths is not None:
        padding = Padding(x, dim, mask, lengths)
        place = torch.arange(padding.n, dtype=accumulator_dtype(x.dtype), device=x.device)
        place = place.view(1, -1, 1).expand(padding.b, -1, -1)
        index = by_length(
            soft_permute,
            ("rank", 1),
            x,
            dim,
            mask,
            lengths,
            place,
            padding=padding,
            dtype=place.dtype,
            descending=descending,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            hard=hard,
        )
        return index.squeeze(-1).movedim(-1, dim).to(checks.result_dtype(x.dtype, x))
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings, empty=True)
    if rows.n == 0:
        return rows.unfolded(rows.x)
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
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""The doubly stochastic matrix of a soft sort: P[i, r] is the weight of element i at rank r.

    Args:
        x: ``(..., n, ...)``, floating.
        dim, descending, network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the exact permutation matrix, with the gradient of P.
        mask, lengths: as in :func:`soft_sort`.

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
    if mask is not None or lengths is not None:
        return by_length(
            soft_permutation,
            ("element", "rank"),
            x,
            dim,
            mask,
            lengths,
            descending=descending,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            hard=hard,
        )
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings, empty=True)
    if rows.n == 0:
        return rows.matrices(nothing(rows))
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
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Features in the soft order of their keys, :math:`P^\top F`, without forming P.

    Args:
        x: keys ``(..., n, ...)``, floating.
        feats: ``(..., n, d)``, floating; leading dimensions broadcast against those of x without
            ``dim``. Differentiable.
        dim, descending, network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        hard: the features in the exact order, with the gradients of the soft ones.
        mask, lengths: as in :func:`soft_sort`; features go with their keys.

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
    rows = rows_of("x", x, dim, descending, settings, empty=True)
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
    if mask is not None or lengths is not None:
        padding = Padding(x, dim, mask, lengths)

        def wide(t: Tensor, *last: int) -> Tensor:
            return t.expand(*lead, *last)

        return by_length(
            soft_permute,
            ("rank", feats.shape[-1]),
            wide(x.movedim(dim, -1), rows.n),
            -1,
            None if mask is None else wide(mask.movedim(dim, -1), rows.n),
            None if lengths is None else wide(lengths),
            wide(feats, *feats.shape[-2:]).reshape(-1, *feats.shape[-2:]),
            dtype=dtype,
            descending=descending,
            network=network,
            distribution=distribution,
            steepness=steepness
            if not isinstance(steepness, Tensor)
            else broadcast_steepness(steepness, padding.lead),
            art_lambda=art_lambda,
            hard=hard,
        )
    work = accumulator_dtype(dtype)
    rows = expanded(rows, lead, work, dtype)
    if math.prod(feats.shape[:-2]) == 1:
        f = feats.reshape(1, *feats.shape[-2:])
    else:
        f = feats.expand(*lead, *feats.shape[-2:]).reshape(math.prod(lead), *feats.shape[-2:])
    f = f.to(work).contiguous()
    if rows.n == 0:
        return rows.matrices(rows.x.unsqueeze(-1) * f)
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
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
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
        mask, lengths: as in :func:`soft_sort`; every row needs k elements.

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
    if mask is not None or lengths is not None:
        k = checks.checked_integer("k", k)
        return by_length(
            lambda rows, **options: soft_topk(rows, k, **options),
            ("element", k),
            x,
            dim,
            mask,
            lengths,
            largest=largest,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            hard=hard,
        )
    k = checks.checked_integer("k", k)
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


def _check_method(
    method, network, distribution, steepness, art_lambda, regularization, regularization_strength,
) -> None:  # fmt: skip
    """A known method, and no option of the other one."""
    check_choice("method", method, _METHODS)
    of_the_other = dict(
        regularization=(regularization, "l2"),
        regularization_strength=(regularization_strength, 1.0),
    )
    if method == "permutahedron":
        of_the_other = dict(
            network=(network, "auto"), distribution=(distribution, "cauchy"),
            steepness=(steepness, 10.0), art_lambda=(art_lambda, 0.25),
        )  # fmt: skip
    for name, (value, default) in of_the_other.items():
        if isinstance(value, Tensor) or value != default:
            (other,) = set(_METHODS) - {method}
            raise ValueError(
                f"{name} is an option of method={other!r}, and has no effect with {method!r}"
            )


def _permutahedron(function, x, dim, descending, regularization, strength) -> Tensor:
    check_ordered("x", x)
    return function(x, regularization, strength, dim=dim, descending=descending)


def _correlation(r: Tensor, t: Tensor) -> Tensor:
    """Of rows of r with those of t, of mean 0; where one is flat 0, without a gradient."""
    low, high = r.detach().aminmax(dim=1, keepdim=True)
    size_of_t = (t * t).sum(1, keepdim=True)
    flat = (low == high) | (size_of_t == 0)
    a = (r - r.mean(1, keepdim=True)).masked_fill(flat, 0.0)
    # Of order 1, whose squares neither vanish nor overflow; a factor has no part in the result.
    largest = a.detach().abs().amax(1, keepdim=True)
    a = a / largest.masked_fill(flat, 1.0)
    size = ((a * a).sum(1, keepdim=True) * size_of_t).masked_fill(flat, 1.0)
    return ((a * t).sum(1, keepdim=True) / size.sqrt()).squeeze(1)


# --------------------------------------------------------------------------------------------------
# Losses


def check_loss_options(
    *, kind, target_is, reduction, ties, base, network="auto", distribution="cauchy",
    steepness=10.0, art_lambda=0.25, **_,
) -> None:  # fmt: skip
    """Those of sorting_cross_entropy, also for its module, which finds a typo when it is made."""
    check_choice("kind", kind, op.KINDS)
    check_choice("target_is", target_is, TARGETS)
    check_choice("reduction", reduction, op.REDUCTIONS)
    check_choice("ties", ties, TIES)
    if target_is == "permutation" and ties != "stable":
        raise ValueError(
            "ties='share' has no effect with target_is='permutation', which has no ties"
        )
    checks.checked_integer("base", base)
    if base and target_is != "ranks":
        raise ValueError(f"base has no effect with target_is={target_is!r}")
    checked_settings(network, distribution, steepness, art_lambda)


def check_spearman_options(
    reduction, network, distribution, steepness, art_lambda, method, regularization,
    regularization_strength, ties, dim=-1,
) -> None:  # fmt: skip
    """Those of spearman_loss, also for its module."""
    check_choice("reduction", reduction, op.REDUCTIONS)
    check_choice("ties", ties, TIES)
    _check_method(
        method, network, distribution, steepness, art_lambda, regularization,
        regularization_strength,
    )  # fmt: skip
    if method == "permutahedron" and ties != "share":
        raise ValueError(
            "method='permutahedron' has no ties='stable': equal scores share their rank"
        )
    if method == "permutahedron":
        check_projection(regularization, regularization_strength)
    checked_settings(network, distribution, steepness, art_lambda)


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
    validate: bool | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    base: int = 0,
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
            ``"ranks"``: of the shape of x, integers 0 .. n-1, such as ``v.argsort().argsort()``, or
            from ``base`` on.
            ``"permutation"``: ``(..., n, n)``, one-hot, Q[i, rank of i] = 1; a row without an
            entry above 1/2 is like no target.
        reduction: ``"mean"`` or ``"sum"`` over the items, each the mean over its n^2 or n terms;
            ``"none"``: one loss per item.
        dim, descending: as in :func:`soft_sort`; rank 0 is then that of the largest.
        ties: of equal values: ``"stable"``: ranks in their order; ``"share"``: each gets the mean
            of their columns. A permutation has none.
        network, distribution, steepness, art_lambda: as in :func:`soft_sort`.
        validate: True: check that ranks are one of each and that a permutation is one, for which
            a GPU is waited for. None: ranks alone, and on the CPU alone, outside of compiled graphs
            and transforms. False: nothing; a rank that does not exist is like no target at all.
        mask, lengths: as in :func:`soft_sort`. Ranks and permutations are those of the
            elements that count: 0 .. m - 1 for m of them. An item without any is none: its loss is
            0, and the mean does not count it.
        base: the rank of the first with ``target_is="ranks"``; :func:`soft_rank` counts from 1.

    Returns:
        0-d, or the shape of x without ``dim``; of the dtype of x, float32 for half types under
        autocast. A row of x with a NaN, or of NaN target values, gives NaN. Twice differentiable.

    Raises:
        TypeError, ValueError, IndexError: as :func:`soft_sort`.
        ValueError: a target of the wrong shape, dtype or device, or of wrong values where
            validated.

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
    if mask is not None or lengths is not None:
        check_loss_options(
            kind=kind, target_is=target_is, reduction=reduction, ties=ties, base=base
        )
        return loss_by_length(
            sorting_cross_entropy,
            x,
            target,
            dim,
            mask,
            lengths,
            target_is=target_is,
            reduction=reduction,
            kind=kind,
            descending=descending,
            ties=ties,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            validate=validate,
            base=base,
        )
    check_loss_options(kind=kind, target_is=target_is, reduction=reduction, ties=ties, base=base)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, descending, settings)
    ranked, order, nan = ordered_target(x, rows, target, target_is, ties, validate, base)
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
    ties: str = "share",
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
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
        ties: of equal scores: ``"share"``: their ranks are averaged; ``"stable"``: they are what
            the network makes of them, which depends on their places.
        mask, lengths: as in :func:`soft_sort`. An item without elements is none: its loss is 0,
            and the mean does not count it.

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
    if mask is not None or lengths is not None:
        check_spearman_options(
            reduction, network, distribution, steepness, art_lambda, method, regularization,
        regularization_strength, ties,
        )  # fmt: skip
        return loss_by_length(
            spearman_loss,
            x,
            target,
            dim,
            mask,
            lengths,
            reduction=reduction,
            network=network,
            distribution=distribution,
            steepness=steepness,
            art_lambda=art_lambda,
            method=method,
            regularization=regularization,
            regularization_strength=regularization_strength,
            ties=ties,
        )
    check_spearman_options(
        reduction, network, distribution, steepness, art_lambda, method, regularization,
        regularization_strength, ties,
    )  # fmt: skip
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = rows_of("x", x, dim, False, settings)
    values, order, _ = ordered_target(x, rows, target, "values", "share", False)
    first, count, nan = op.target_ranks(values, order)
    rows = poisoned(rows, nan)
    if method == "network":
        r = applied(rows, places(rows) - (rows.n - 1) / 2, False).squeeze(-1)
        r = shared(r, rows.x) if ties == "share" else r
    else:
        r = centred_ranks(rows.x, regularization, regularization_strength)
    # Both less their mean from the start, since nearly equal ranks differ in digits that the mean
    # would take; of exact ranks it is known.
    t = torch.add(count - rows.n, first, alpha=2).to(rows.x.dtype) / rows.n
    each = (1 - _correlation(r, t)).view(rows.lead)
    return op.reduced(each, reduction).to(rows.dtype)
