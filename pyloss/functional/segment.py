"""What is computed of each segment of a ragged batch: reductions, moments, softmax, binary trees.

``x`` (N, \\*) holds one segment after another and CSR ``offsets`` (S + 1,) where they begin:
segment s is ``x[offsets[s] : offsets[s + 1]]``. :mod:`pyloss.segment` makes offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.ops import segment as ops
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.segment import kinds

REDUCES = ("sum", "mean", "min", "max", "prod", "logsumexp")
TREE_OPS = ("sum", "max", "logsumexp", "prod")


class SegmentMoments(NamedTuple):
    """What :func:`pyloss.functional.segment_moments` returns.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.randn(7, 3), torch.tensor([0, 2, 7])
        >>> count, mean, moment = pyloss.functional.segment_moments(x, offsets)
        >>> squares = count[:, None] * (moment + mean.square())  # sums of x^2
    """

    count: Tensor  #: values of each segment, ``(S,)``, int64
    mean: Tensor  #: ``(S, *)``
    moment: Tensor  #: mean square around the mean, ``(S, *)``, or the covariance, ``(S, d, d)``


class SegmentSoftmaxStats(NamedTuple):
    """What :func:`pyloss.functional.segment_softmax_stats` returns, of shape ``(S, *)`` each.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.randn(7), torch.tensor([0, 2, 7])
        >>> stats = pyloss.functional.segment_softmax_stats(x, offsets)
        >>> logsumexp = stats.max + stats.sumexp.log()
    """

    max: Tensor
    sumexp: Tensor  #: sum of exp(x - max)
    argmax: Tensor  #: row of x that holds the first maximum, int64; -1 of an empty segment


def _check(function: str, x: Tensor, offsets: Tensor) -> None:
    """What can be seen without looking at a number; that is for the kernels to do."""
    checks.check_tensor("x", x)
    checks.check_dense("x", x)
    checks.check_supported(function, x)
    checks.check_has_dimension("x", x)
    segment.check_index("offsets", offsets)
    if offsets.shape[0] == 0:
        raise ValueError("offsets must hold at least one number, 0")
    checks.check_device("offsets", offsets, x, "x")


def _rows(x: Tensor) -> Tensor:
    """(N, W)."""
    return x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _like(found: Tensor, x: Tensor) -> Tensor:
    """(S, *) of results (S, W)."""
    return found.reshape(found.shape[0], *x.shape[1:])


def segment_reduce(x: Tensor, offsets: Tensor, reduce: str = "sum") -> Tensor:
    r"""Sum, mean, minimum, maximum, product or log-sum-exp of each segment.

    .. math:: y_s = \mathrm{reduce}\,\{x_i : \mathrm{offsets}_s \le i < \mathrm{offsets}_{s+1}\}

    Args:
        x: ``(N, *)``, float32, bfloat16, float16 or float64; half types are reduced in float32.
        offsets: ``(S + 1,)``, int32 or int64, from 0 to N, non-decreasing.
        reduce: ``"sum"``, ``"mean"``, ``"min"``, ``"max"``, ``"prod"`` or ``"logsumexp"``.

    Returns:
        ``(S, *)`` in the dtype of ``x``, float32 for half types under autocast. An empty segment
        gives 0, NaN, inf, -inf, 1, -inf, as ``torch.segment_reduce``. Values that share a minimum
        or maximum share its gradient in equal parts. The same bits for any number of threads.

    Raises:
        TypeError, RuntimeError, NotImplementedError: tensors of a wrong type, dtype or device.
        ValueError: unknown ``reduce``; offsets of a wrong shape, and on the CPU offsets that do
            not start at 0, end at N or decrease. On a GPU, which is not waited for, those give NaN.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 2, 2, 3])
        >>> pyloss.functional.segment_reduce(x, offsets, "mean")
        tensor([1.5000,    nan, 5.0000])
    """
    _check("segment_reduce", x, offsets)
    if reduce not in REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(REDUCES)}, got {reduce!r}")
    found = ops.fold(_rows(x), offsets, kinds.REDUCES[reduce])[0]
    return _like(found, x).to(checks.result_dtype(x.dtype, x))


def segment_moments(x: Tensor, offsets: Tensor, *, covariance: bool = False) -> SegmentMoments:
    r"""Number of values, mean, and mean square around it, of each segment.

    .. math:: \mu_s = \frac{1}{n_s} \sum_{i \in s} x_i, \qquad
              v_s = \frac{1}{n_s} \sum_{i \in s} (x_i - \mu_s)^2 \quad\text{or}\quad
              \frac{1}{n_s} \sum_{i \in s} (x_i - \mu_s)(x_i - \mu_s)^\top

    The square is centred, and parts of a segment are merged as Chan, Golub and LeVeque do: nothing
    is lost where the mean is large.

    Args:
        x: ``(N, *)``, as :func:`segment_reduce` takes it; ``(N, d)`` for covariances.
        offsets: ``(S + 1,)``, as :func:`segment_reduce` takes them.
        covariance: the d x d matrix in place of its diagonal.

    Returns:
        :class:`SegmentMoments`: ``count``, ``mean``, ``moment``; the last two float32 (float64 for
        float64 ``x``), NaN of an empty segment.

    Raises:
        TypeError, RuntimeError, NotImplementedError, ValueError: as :func:`segment_reduce`; an
            ``x`` that is not ``(N, d)`` with ``covariance``.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 2, 3])
        >>> pyloss.functional.segment_moments(x, offsets).moment
        tensor([1., 0.])

    Reference:
        Chan, Golub, LeVeque. Algorithms for Computing the Sample Variance. 1983.
    """
    _check("segment_moments", x, offsets)
    checks.check_flag("covariance", covariance)
    if covariance and x.dim() != 2:
        raise ValueError(f"x must be (N, d) with covariance=True, got {list(x.shape)}")
    count = offsets.diff().long()
    if covariance:
        return SegmentMoments(count, *ops.covariance(x, offsets))
    found = ops.fold(_rows(x), offsets, kinds.MOMENTS)
    return SegmentMoments(count, *(_like(t, x) for t in found.unbind()))


def segment_softmax_stats(x: Tensor, offsets: Tensor) -> SegmentSoftmaxStats:
    r"""What a softmax over each segment is made of: maximum, sum of exponentials, argmax.

    .. math:: m_s = \max_{i \in s} x_i, \qquad d_s = \sum_{i \in s} e^{x_i - m_s}

    The log-sum-exp is m + log d, the softmax exp(x - m) / d. Parts of a segment that lie on
    different devices merge by these numbers.

    Args:
        x: ``(N, *)``, as :func:`segment_reduce` takes it.
        offsets: ``(S + 1,)``, as :func:`segment_reduce` takes them.

    Returns:
        :class:`SegmentSoftmaxStats`: ``max`` and ``sumexp``, float32 (float64 for float64 ``x``)
        and differentiable, and ``argmax``, int64. -inf, 0 and -1 of an empty segment.

    Raises:
        TypeError, RuntimeError, NotImplementedError, ValueError: as :func:`segment_reduce`.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([0, 2, 3])
        >>> pyloss.functional.segment_softmax_stats(x, offsets).sumexp
        tensor([2., 1.])
    """
    _check("segment_softmax_stats", x, offsets)
    rows = _rows(x)
    most, sumexp = ops.fold(rows, offsets, kinds.SOFTMAX).unbind()
    found = (most, sumexp, ops.argmax(rows, offsets, most))
    return SegmentSoftmaxStats(*(_like(t, x) for t in found))


def segment_softmax(x: Tensor, offsets: Tensor) -> Tensor:
    r"""Softmax over each segment: the weights of attention pooling over sets of unequal size.

    .. math:: y_i = e^{x_i} \Big/ \sum_{j \in s(i)} e^{x_j}

    Args:
        x: ``(N, *)``, as :func:`segment_reduce` takes it.
        offsets: ``(S + 1,)``, as :func:`segment_reduce` takes them.

    Returns:
        Of the shape and dtype of ``x``, float32 for half types under autocast. NaN where a segment
        has NaN, +inf, or nothing but -inf.

    Raises:
        TypeError, RuntimeError, NotImplementedError, ValueError: as :func:`segment_reduce`.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.functional import segment_reduce, segment_softmax
        >>> scores, values = torch.randn(6), torch.randn(6, 4)
        >>> offsets = torch.tensor([0, 2, 6])
        >>> pooled = segment_reduce(segment_softmax(scores, offsets)[:, None] * values, offsets)

    Reference:
        Vinyals, Bengio, Kudlur. Order Matters: Sequence to Sequence for Sets. arXiv 1511.06391.
    """
    _check("segment_softmax", x, offsets)
    found = ops.softmax(_rows(x).to(accumulator_dtype(x.dtype)), offsets)
    return found.reshape(x.shape).to(checks.result_dtype(x.dtype, x))


def segment_tree_reduce(
    x: Tensor,
    offsets: Tensor,
    op: str | Callable[[Tensor, Tensor], Tensor],
    *,
    identity: float | Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    r"""Folds each segment by a binary operation, along a balanced tree.

    Rows 2j and 2j + 1 of a segment are a pair, an odd last row moves up unchanged, and so on up
    to one row: :math:`\lceil \log_2 n \rceil` levels. A callable is called once a level, on the
    pairs of all segments together, so that a segment's result does not depend on the others, and
    is evaluated on the CPU for exactly N pairs less one a segment.

    Args:
        x: ``(N, *)``; any dtype with a callable, else as :func:`segment_reduce` takes it.
        offsets: ``(S + 1,)``, as :func:`segment_reduce` takes them.
        op: ``op(a, b)``, both ``(pairs, *)``, to ``(pairs, *)``; in torch operations it may have
            parameters, and gradients of any order. Or one of ``"sum"``, ``"max"``,
            ``"logsumexp"``, ``"prod"``, which are :func:`segment_reduce`.
        identity: what an empty segment gives, a number or a tensor that broadcasts to ``(*)``,
            differentiable. None: that of a named op; with a callable there must be no empty ones.
        max_length: that no segment exceeds. Saves levels on a GPU and in compiled graphs, where
            no length is read: None stands there for N.

    Returns:
        ``(S, *)``, in the dtype of ``x``.

    Raises:
        TypeError: an ``op`` that is neither a string nor callable.
        ValueError: an unknown name; a result of ``op`` of another shape; empty segments without
            an identity; offsets as :func:`segment_reduce`.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.randn(7, 3), torch.tensor([0, 4, 4, 7])
        >>> def smooth(a, b):
        ...     return (a.exp() + b.exp()).log()
        >>> y = pyloss.functional.segment_tree_reduce(x, offsets, smooth, identity=-torch.inf)
        >>> torch.testing.assert_close(y, pyloss.functional.segment_reduce(x, offsets, "logsumexp"))

    Reference:
        Ong, Veličković. Learnable Commutative Monoids for Graph Neural Networks. arXiv 2212.08541.
    """
    if isinstance(op, str):
        if op not in TREE_OPS:
            raise ValueError(f"op must be callable or one of {', '.join(TREE_OPS)}, got {op!r}")
        found = segment_reduce(x, offsets, op)
    else:
        if not callable(op):
            raise TypeError(f"op must be callable or a string, got {type(op).__name__}")
        checks.check_tensor("x", x)
        checks.check_has_dimension("x", x)
        segment.check_offsets(offsets, x.shape[0])
        checks.check_device("offsets", offsets, x, "x")
        if max_length is not None:
            max_length = checks.checked_count("max_length", max_length)
            segment.check_longest(offsets, max_length)
        found = _tree(x, offsets, op, max_length)
    empty = (offsets.diff() == 0).view(-1, *[1] * (x.dim() - 1))
    if identity is None:
        if not isinstance(op, str):
            segment.require(~empty.any(), "identity must be given where a segment is empty")
        return found
    return torch.where(empty, _identity(identity, found), found)


def _tree(
    x: Tensor, offsets: Tensor, op: Callable[[Tensor, Tensor], Tensor], max_length: int | None
) -> Tensor:
    levels, top = segment.tree_levels(offsets, x.shape[0], max_length)
    for left, right, carry in levels:
        a, b = x.index_select(0, left), x.index_select(0, right)
        y = op(a, b)
        if not isinstance(y, Tensor) or y.shape != a.shape:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"op must return a tensor of shape {list(a.shape)}, got {got}")
        y = y.to(x.dtype)  # autocast's would stay where no row is carried, and only there
        x = torch.cat([y, x.index_select(0, carry)]) if carry.shape[0] else y
    if x.shape[0] == 0:
        # All are empty; the sum keeps x in the graph.
        return x.sum(0, dtype=x.dtype).expand(offsets.shape[0] - 1, *x.shape[1:])
    return x.index_select(0, top)


def _identity(identity: float | Tensor, like: Tensor) -> Tensor:
    if not isinstance(identity, Tensor):
        checks.check_number("identity", identity)
        return torch.full((), identity, dtype=like.dtype, device=like.device)
    checks.check_device("identity", identity, like, "x")
    try:
        return identity.to(like.dtype).expand(like.shape[1:])
    except RuntimeError:
        raise ValueError(
            f"identity must broadcast to {list(like.shape[1:])}, got {list(identity.shape)}"
        ) from None
