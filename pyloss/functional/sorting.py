"""Sorting, ranking and selecting with a gradient, and the losses made of it."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional.permutahedron import permutahedron_rank, permutahedron_sort
from pyloss.ops import sorting_network as op

SORTERS = ("auto", "bitonic", "odd_even", "batcher")
SELECTORS = (*SORTERS, "splitter_selection")  # the last one selects, and does not sort
STEEPEST = 1e30  # times the slopes of the relaxations, still finite in float32
_METHODS = ("network", "permutahedron")
_TARGETS = ("values", "ranks", "permutation")
_TIES = ("stable", "share")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class UnknownNetworkError(ValueError, NotImplementedError):
    """An unknown network or distribution: a ValueError as torch's, and what diffsort raises."""


# --------------------------------------------------------------------------------------------------
# Arguments


class _Rows(NamedTuple):
    """x as rows of the op, and how to go back."""

    x: Tensor  # (b, n), float32 or float64, contiguous; -x if descending
    settings: op.Settings
    lead: tuple[int, ...]  # the shape without the sorted dimension
    dim: int
    dtype: torch.dtype  # of the results
    sign: int

    @property
    def n(self) -> int:
        return self.x.shape[1]

    def unfolded(self, y: Tensor) -> Tensor:
        """(b, n) back to the shape of the input."""
        return y.view(*self.lead, self.n).movedim(-1, self.dim).to(self.dtype)

    def matrices(self, p: Tensor) -> Tensor:
        """(b, n, d) to (*lead, n, d)."""
        return p.view(*self.lead, *p.shape[1:]).to(self.dtype)

    def order(self) -> Tensor:
        """Which element has each rank, (b, n)."""
        return torch.argsort(self.x.detach(), dim=1, stable=True)

    def ranks(self) -> Tensor:
        """Which rank each element has, (b, n)."""
        return op.inverse(self.order())


def _one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")


def _check_floating(name: str, x) -> None:
    _check_tensor(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype} of shape "
            f"{list(x.shape)}"
        )


def _check_number(name: str, value) -> None:
    # The common types first: asking an abstract class is slow. While compiling, a changing number
    # is a symbol, of no Python type.
    if type(value) in (float, int) or torch.compiler.is_compiling():
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def checked_settings(network, distribution, steepness, art_lambda, k=0, networks=SORTERS):
    """op.Settings of checked arguments; a tensor as steepness is only looked at for its dtype."""
    for name, value, allowed in (
        ("network", network, networks),
        ("distribution", distribution, op.DISTRIBUTIONS),
    ):
        if value not in allowed:
            raise UnknownNetworkError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if isinstance(steepness, Tensor):
        _check_floating("steepness", steepness)
    else:
        _check_number("steepness", steepness)
        if not 0 < steepness <= STEEPEST:
            raise ValueError(
                f"steepness must be positive and at most {STEEPEST:g}, got {steepness}"
            )
    _check_number("art_lambda", art_lambda)
    if not 0 <= art_lambda < 1:
        raise ValueError(f"art_lambda must be in [0, 1), got {art_lambda}")
    if network != "splitter_selection":
        k = 0
    return op.Settings(network, distribution, steepness, art_lambda, k)


def _rows(name, x, dim, descending, settings) -> _Rows:
    """Checks x, and folds it."""
    _check_floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a 0-d tensor")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-x.dim()}, {x.dim() - 1}], "
            f"but got {dim})"
        )
    n = x.shape[dim]
    if n == 0:
        raise ValueError(
            f"{name} has nothing to sort along dim {dim}: its shape is {list(x.shape)}"
        )
    dim %= x.dim()
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and _autocast(x) else x.dtype
    rows, lead = _folded(x, dim)
    if half:
        rows = rows.float()
    if descending:
        rows = -rows
    steepness = settings.steepness
    if isinstance(steepness, Tensor):
        settings = settings._replace(steepness=_rowwise(steepness, lead, rows))
    return _Rows(rows.contiguous(), settings, lead, dim, dtype, -1 if descending else 1)


def _folded(x: Tensor, dim: int) -> tuple[Tensor, tuple[int, ...]]:
    """(x as (b, n) of what stands along dim, the shape without dim)."""
    if x.dim() == 2 and dim == 1:  # small problems are bound by the number of calls
        return x, (x.shape[0],)
    moved = x.movedim(dim, -1)
    lead = tuple(moved.shape[:-1])
    return moved.reshape(math.prod(lead), moved.shape[-1]), lead


def _autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _rowwise(steepness: Tensor, lead: tuple[int, ...], rows: Tensor) -> Tensor:
    """A steepness for each row, (b, 1)."""
    try:
        each = steepness.to(rows.dtype).expand(lead)
    except RuntimeError:
        raise ValueError(
            f"steepness of shape {list(steepness.shape)} does not broadcast to the shape "
            f"{list(lead)} of x without the sorted dimension"
        ) from None
    return each.reshape(rows.shape[0], 1)


def _scaled(rows: _Rows) -> tuple[Tensor, op.Settings]:
    """(x, settings) with a tensor as steepness multiplied into x: P(x; s) = P(s x; 1)."""
    s = rows.settings.steepness
    # With logistic_phi a factor does more than that; the reference takes it as it is.
    if not isinstance(s, Tensor) or rows.settings.distribution == "logistic_phi":
        return rows.x, rows.settings
    return _times(rows.x, s), rows.settings._replace(steepness=1.0)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor for a positive factor, which gets no gradient from infinite entries."""
    infinite = x.isinf()
    return torch.where(infinite, x, torch.where(infinite, 0.0, x) * factor)


def _sorted_values(rows: _Rows) -> Tensor:
    x, settings = _scaled(rows)
    y = op.sort(x, settings)
    return y if x is rows.x else _times(y, 1 / rows.settings.steepness)


def _permutation(rows: _Rows) -> tuple[Tensor, Tensor]:
    x, settings = _scaled(rows)
    y, p = op.permutation(x, settings)
    return (y if x is rows.x else _times(y, 1 / rows.settings.steepness)), p


def _applied(rows: _Rows, f: Tensor, transpose: bool) -> Tensor:
    x, settings = _scaled(rows)
    return op.apply(x, f, transpose, settings)


def _straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`, which is finite; NaN where that is NaN."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def _straight_through_values(soft: Tensor, hard: Tensor) -> Tensor:
    """The same of values, which may be infinite. It keeps a byte for each; weights need none."""
    return torch.where(soft.isinf(), soft, _straight_through(soft, hard))


def _places(rows: _Rows) -> Tensor:
    """0, 1, ..., n - 1 as one feature that all rows share."""
    return torch.arange(rows.n, dtype=rows.x.dtype, device=rows.x.device).view(1, -1, 1)


def _one_hot(rows: _Rows) -> Tensor:
    """Q[i, rank(i)] = 1, (b, n, n)."""
    place = torch.arange(rows.n, device=rows.x.device)
    return (rows.ranks().unsqueeze(-1) == place).to(rows.x.dtype)


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
        steepness: s > 0; the larger, the closer to sorting. A tensor of the shape of x without
            ``dim``, or one that broadcasts to it, is differentiable and not checked.
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
    _one_of("method", method, _METHODS)
    if method == "permutahedron":
        if return_permutation or hard:
            raise ValueError("method='permutahedron' has no permutation matrix and no hard=True")
        return _permutahedron(
            permutahedron_sort, x, dim, descending, regularization, regularization_strength
        )
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = _rows("x", x, dim, descending, settings)
    p = None
    if return_permutation:
        y, p = _permutation(rows)
    else:
        y = _sorted_values(rows)
    if hard:
        y = _straight_through_values(y, rows.x.detach().sort(1).values)
        p = p if p is None else _straight_through(p, _one_hot(rows))
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
    _one_of("method", method, _METHODS)
    _check_number("base", base)
    if method == "permutahedron":
        if hard:
            raise ValueError("method='permutahedron' has no hard=True")
        found = _permutahedron(
            permutahedron_rank, x, dim, descending, regularization, regularization_strength
        )
        return found if base == 1 else found + (base - 1)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = _rows("x", x, dim, descending, settings)
    r = _applied(rows, _places(rows), False).squeeze(-1)
    if hard:
        r = _straight_through(r, rows.ranks())
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
    rows = _rows("x", x, dim, descending, settings)
    index = _applied(rows, _places(rows), True).squeeze(-1)
    if hard:
        index = _straight_through(index, rows.order())
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
    rows = _rows("x", x, dim, descending, settings)
    _, p = _permutation(rows)
    if hard:
        p = _straight_through(p, _one_hot(rows))
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
    _check_floating("feats", feats)
    rows = _rows("x", x, dim, descending, settings)
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
    dtype = torch.promote_types(x.dtype, feats.dtype)
    if dtype in (torch.float16, torch.bfloat16) and _autocast(x):
        dtype = torch.float32
    work = torch.float64 if dtype == torch.float64 else torch.float32
    rows = _expanded(rows, lead, work)._replace(dtype=dtype)
    if math.prod(feats.shape[:-2]) == 1:
        f = feats.reshape(1, *feats.shape[-2:])
    else:
        f = feats.expand(*lead, *feats.shape[-2:]).reshape(math.prod(lead), *feats.shape[-2:])
    f = f.to(work).contiguous()
    found = _applied(rows, f, True)
    if hard:
        order = rows.order().unsqueeze(-1).expand(-1, -1, f.shape[2])
        exact = f.detach().expand(order.shape[0], -1, -1).gather(1, order)
        found = _straight_through_values(found, exact)
    return rows.matrices(found)


def _expanded(rows: _Rows, lead: tuple[int, ...], dtype: torch.dtype) -> _Rows:
    """The rows repeated for a wider leading shape."""
    settings, count = rows.settings, math.prod(lead)

    def wide(t: Tensor) -> Tensor:
        return (
            t.to(dtype)
            .view(*rows.lead, t.shape[1])
            .expand(*lead, t.shape[1])
            .reshape(count, t.shape[1])
        )

    if isinstance(settings.steepness, Tensor):
        settings = settings._replace(steepness=wide(settings.steepness))
    return rows._replace(x=wide(rows.x).contiguous(), settings=settings, lead=lead)


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
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    settings = checked_settings(network, distribution, steepness, art_lambda, k, SELECTORS)
    rows = _rows("x", x, dim, not largest, settings)  # either way the largest of the rows
    if not 1 <= k <= rows.n:
        raise ValueError(f"k must be in [1, {rows.n}], the size of x along dim; got {k}")
    last = torch.arange(rows.n - 1, rows.n - 1 - k, -1, device=x.device)
    place = torch.arange(rows.n, device=x.device).unsqueeze(1)
    columns = (place == last).to(rows.x.dtype).unsqueeze(0)
    found = _applied(rows, columns, False)
    if hard:
        ranks = rows.ranks().unsqueeze(-1)
        found = _straight_through(found, ranks == last)
    return rows.matrices(found)


def _permutahedron(function, x, dim, descending, regularization, strength) -> Tensor:
    _check_floating("x", x)
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
    _one_of("kind", kind, op.KINDS)
    _one_of("target_is", target_is, _TARGETS)
    _one_of("reduction", reduction, op.REDUCTIONS)
    _one_of("ties", ties, _TIES)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = _rows("x", x, dim, descending, settings)
    ranked, order, nan = _target(x, rows, target, target_is, ties, validate)
    scaled, settings = _scaled(_poisoned(rows, nan))
    loss = op.loss(scaled, ranked, None, settings, order=order, kind=kind, reduction=reduction)
    return (loss.view(rows.lead) if reduction == "none" else loss).to(rows.dtype)


def _target(x, rows: _Rows, target, target_is, ties, validate):
    """(target (b, n), order, which rows hold a NaN that the op does not see or None)."""
    _check_tensor("target", target)
    n = rows.n
    if target.device != x.device:
        raise ValueError(f"target is on {target.device}, x on {x.device}")
    expected = (*rows.lead, n, n) if target_is == "permutation" else tuple(x.shape)
    if tuple(target.shape) != expected:
        raise ValueError(
            f"target must have the shape {list(expected)} with target_is={target_is!r}, got "
            f"{list(target.shape)}"
        )
    if target_is == "permutation":
        if target.is_complex():
            raise ValueError(f"target must be real, got {target.dtype}")
        target = target.detach().reshape(-1, n, n)
        if validate:
            # A device without an answer yet is waited for, which is what was asked for.
            ones = (target == 1).sum(1, dtype=torch.int64), (target == 1).sum(2, dtype=torch.int64)
            if bool(((target != 0) & (target != 1)).any() | (ones[0] != 1).any()) or bool(
                (ones[1] != 1).any()
            ):
                raise ValueError("target is not a permutation: its rows or columns are not one-hot")
        nan = target.isnan().any(-1).any(-1) if target.is_floating_point() else None
        return _ranks_of_matrix(target), "ranks", nan
    folded, _ = _folded(target.detach(), rows.dim)
    if target_is == "ranks":
        if target.dtype not in _INTS and target.dtype not in _FLOATS:
            raise ValueError(f"target must hold ranks, got {target.dtype}")
        if validate:
            _check_ranks(folded, n, ties)
        if ties == "stable":
            nan = folded.isnan().any(-1) if folded.is_floating_point() else None
            if folded.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32):
                folded = folded.clamp(-1, n)  # what is not a rank stays none, also beyond 32 bits
            return folded.to(torch.int32), "ranks", nan
        return _comparable(folded), "shared", None
    if target.dtype not in _INTS and target.dtype not in _FLOATS and target.dtype != torch.bool:
        raise ValueError(f"target must hold real values, got {target.dtype}")
    order = "shared" if ties == "share" else "values"
    return _comparable(folded), order + "_descending" * (rows.sign < 0), None


def _ranks_of_matrix(target: Tensor) -> Tensor:
    """Where each row has its 1, give or take its rounding; -1, no target, where it has none."""
    most, place = (target.to(torch.uint8) if target.dtype == torch.bool else target).max(-1)
    return torch.where(most > 0.5, place, -1).to(torch.int32)


def _poisoned(rows: _Rows, nan: Tensor | None) -> _Rows:
    """x with NaN in the rows whose target has one."""
    if nan is None:
        return rows
    poison = torch.where(nan, math.nan, 0.0).to(rows.x.dtype)
    return rows._replace(x=rows.x + poison.unsqueeze(1))  # a sum keeps nothing for its backward


def _comparable(values: Tensor) -> Tensor:
    """In a dtype that the op compares in, of the same order."""
    if values.dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        return values
    return values.to(torch.float32 if values.is_floating_point() else torch.int32)


def _check_ranks(ranks: Tensor, n: int, ties: str) -> None:
    inside = (ranks >= 0) & (ranks <= n - 1)
    if not bool(inside.all()):
        raise ValueError(f"target ranks must be in [0, {n - 1}]")
    whole = ranks.to(torch.int64)
    if not bool((whole == ranks).all()) and ties == "stable":
        raise ValueError("target ranks must be whole numbers")
    place = torch.arange(n, device=ranks.device)
    if ties == "stable" and not bool((whole.sort(-1).values == place).all()):
        raise ValueError(
            "target ranks must be one of each 0 .. n - 1; for equal ranks use ties='share'"
        )


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
    _one_of("reduction", reduction, op.REDUCTIONS)
    settings = checked_settings(network, distribution, steepness, art_lambda)
    rows = _rows("x", x, dim, False, settings)
    values, order, _ = _target(x, rows, target, "values", "share", False)
    first, count, nan = op.target_ranks(values, order)
    rows = _poisoned(rows, nan)
    t = first.to(rows.x.dtype) + 0.5 * count
    if method == "network":
        r = _applied(rows, _places(rows), False).squeeze(-1)
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
