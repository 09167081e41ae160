"""Spherical losses: functions of three numbers of a row: o_t, the sum of o and that of o^2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _spherical as spherical
from pyloss.functional._rows import prepare, without_batch
from pyloss.functional._spherical import Moments
from pyloss.functional._sums import summed
from pyloss.ops._labels import equals, outside, wide
from pyloss.ops.row_moments import row_moments


def spherical_z_loss(
    input: Tensor,
    target: Tensor,
    a: float = 1.0,
    b: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Z-loss: the softplus of the target's z-score among the scores of its row.

    .. math::
        \ell = \frac{w_y}{a} \log\left(1 + e^{a (b - z_y)}\right), \qquad
        z_y = \frac{o_y - \mu}{\sigma}, \qquad \mu = \frac{1}{C} \sum_j o_j, \qquad
        \sigma^2 = \frac{1}{C} \sum_j (o_j - \mu)^2

    Adding a constant to the scores, or multiplying them by a positive number, changes nothing; the
    gradient is orthogonal to both. Nothing holds the size of the scores, therefore: use weight
    decay. Where all scores are equal z is 0: :math:`\sigma` is no less than 1e-6 (float64: 1e-12).
    The squared log-normaliser that language models call z-loss is the option ``z_loss`` of
    :func:`pyloss.fused_cross_entropy`.

    Args:
        input: scores, ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating, C >= 2. Half types
            are summed in float32.
        target: class indices, ``()``, ``(N)`` or ``(N, d1, ..., dk)``, int64, int32 or uint8.
        a: > 0, the sharpness: 1/a is the width of the bend.
        b: the z-score from which the loss decreases. z is at most :math:`\sqrt{C - 1}`.
        weight: weight of each class, ``(C)``.
        ignore_index: rows with this target add nothing.
        reduction: ``"none" | "mean" | "sum"``; the mean divides by the sum of the weights used.

    Returns:
        A scalar, or the shape of ``target`` with ``reduction="none"``; of the dtype of ``input``,
        float32 for half types under autocast. The mean of no rows is NaN.

    Raises:
        TypeError: ``input`` or ``target`` is no tensor, an option no number.
        ValueError: fewer than two classes; batch sizes that differ; ``a`` or ``b`` out of range.
        IndexError: a label out of range (CPU; on a GPU its row is NaN).
        RuntimeError: a target of the wrong shape, dtype or device, or a weight.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 1000, requires_grad=True), torch.randint(1000, (8,))
        >>> loss = pyloss.functional.spherical_z_loss(x, y, a=0.5, b=3.0)
        >>> loss.backward()
        >>> more = pyloss.functional.spherical_z_loss(7 * x + 3, y, a=0.5, b=3.0)
        >>> torch.testing.assert_close(more, loss)

    Reference:
        de Brebisson, Vincent. The Z-loss: a shift and scale invariant classification loss belonging
        to the Spherical Family. arXiv 1604.08859.
    """
    spherical.check_slope(a, b)
    return _loss(
        partial(spherical.z_loss, a=float(a), b=float(b)), input, target, weight, ignore_index,
        reduction, least_classes="spherical_z_loss",
    )  # fmt: skip


def one_hot_mse_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The squared distance of the scores from the one-hot target, without making the latter.

    .. math:: \ell = w_y \sum_j (o_j - [j = y])^2 = w_y \left(q - 2 o_y + 1\right), \qquad
              q = \sum_j o_j^2

    Args:
        input: scores, as in :func:`spherical_z_loss`; one class is enough.
        target: class indices, as there.
        weight, ignore_index, reduction: as there. The sum over classes is not divided by C.

    Returns:
        As :func:`spherical_z_loss`.

    Raises:
        As :func:`spherical_z_loss`.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10), torch.randint(10, (8,))
        >>> want = (x - torch.nn.functional.one_hot(y, 10)).square().sum(1).mean()
        >>> torch.testing.assert_close(pyloss.functional.one_hot_mse_loss(x, y), want)

    Reference:
        Vincent, de Brebisson, Bouthillier. Efficient Exact Gradient Update for training Deep
        Networks with Very Large Sparse Targets. arXiv 1412.7091.
    """
    return _loss(spherical.one_hot_mse, input, target, weight, ignore_index, reduction)


def taylor_softmax_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy of the Taylor softmax, which has exp to second order.

    .. math:: \ell = -w_y \log \frac{1 + o_y + \tfrac12 o_y^2}
              {\sum_j \left(1 + o_j + \tfrac12 o_j^2\right)}

    Args:
        input: scores, as in :func:`spherical_z_loss`; one class is enough.
        target: class indices, as there.
        weight, ignore_index, reduction: as there.

    Returns:
        As :func:`spherical_z_loss`.

    Raises:
        As :func:`spherical_z_loss`.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10), torch.randint(10, (8,))
        >>> p = 1 + x + x.square() / 2
        >>> want = -(p[range(8), y] / p.sum(1)).log().mean()
        >>> torch.testing.assert_close(pyloss.functional.taylor_softmax_loss(x, y), want)

    Reference:
        de Brebisson, Vincent. An Exploration of Softmax Alternatives Belonging to the Spherical
        Loss Family. arXiv 1511.05042.
    """
    return _loss(spherical.taylor_softmax, input, target, weight, ignore_index, reduction)


def spherical_softmax_loss(
    input: Tensor,
    target: Tensor,
    eps: float = 1e-3,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy of the spherical softmax, which has squares in place of exponentials.

    .. math:: \ell = -w_y \log \frac{o_y^2 + \epsilon}{\sum_j \left(o_j^2 + \epsilon\right)}

    The sign of a score does not matter.

    Args:
        input: scores, as in :func:`spherical_z_loss`; one class is enough.
        target: class indices, as there.
        eps: > 0; bounds the slope by :math:`1 / \sqrt{\epsilon}`. The default is of this package.
        weight, ignore_index, reduction: as there.

    Returns:
        As :func:`spherical_z_loss`.

    Raises:
        As :func:`spherical_z_loss`; ValueError also: ``eps`` out of range.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10), torch.randint(10, (8,))
        >>> p = x.square() + 1e-3
        >>> want = -(p[range(8), y] / p.sum(1)).log().mean()
        >>> torch.testing.assert_close(pyloss.functional.spherical_softmax_loss(x, y), want)

    Reference:
        de Brebisson, Vincent. arXiv 1511.05042.
    """
    spherical.check_eps(eps)
    return _loss(
        partial(spherical.spherical_softmax, eps=float(eps)), input, target, weight, ignore_index,
        reduction,
    )  # fmt: skip


def spherical_loss(
    input: Tensor,
    target: Tensor,
    fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""A spherical loss of one's own: any differentiable function of three numbers of a row.

    .. math:: \ell = w_y\, f(o_y, s, q), \qquad s = \sum_j o_j, \qquad q = \sum_j o_j^2

    The same function is an option of :class:`pyloss.nn.SphericalLinear`.

    Args:
        input: scores, as in :func:`spherical_z_loss`; one class is enough.
        target: class indices, as there.
        fn: of three tensors of one shape, float32 (float64 for float64 scores), a number for each
            row; returns the loss of each, of the same shape, by torch operations.
        weight, ignore_index, reduction: as there. ``fn`` sees 0, 0, 0 for an ignored row.

    Returns:
        As :func:`spherical_z_loss`.

    Raises:
        As :func:`spherical_z_loss`; TypeError also: ``fn`` cannot be called; ValueError also: it
        returns something else than a tensor of the shape of its arguments.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10), torch.randint(10, (8,))
        >>> cosine = lambda o, s, q: 1 - o / q.sqrt()
        >>> loss = pyloss.functional.spherical_loss(x, y, cosine)
        >>> want = 1 - torch.nn.functional.normalize(x)[range(8), y]
        >>> torch.testing.assert_close(loss, want.mean())

    Reference:
        Vincent, de Brebisson, Bouthillier. arXiv 1412.7091.
    """
    spherical.check_function(fn)
    return _loss(spherical.of_sums(fn), input, target, weight, ignore_index, reduction)


def _loss(
    formula: Callable[[Moments], Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    least_classes: str = "",
) -> Tensor:
    """`least_classes`: the name of a loss that needs two."""
    checks.check_tensor("input", input)
    checks.check_tensor("target", target)
    checks.check_index_dtype("target", target)
    if input.dim() == 1:
        target = without_batch(target)
    input, p = prepare(input, target, weight=weight, ignore_index=ignore_index, reduction=reduction)
    target, weight = p.labels[0], p.labels[3]
    classes = input.shape[0 if input.dim() == 1 else 1]
    if least_classes:
        spherical.check_two_classes(least_classes, classes)
    moments = row_moments(input, target, p.codes.ignore_index)
    # One by one: the gradient of unbind makes plain zeros for those that are not used.
    each = formula(Moments(moments[0], moments[1], moments[2], moments[3], classes))
    ignored = equals(target, p.codes.ignore_index)
    each = torch.where(ignored, 0.0, each)
    if weight is None:
        mass = ~ignored
    else:
        own = weight[torch.where(outside(target, classes), 0, wide(target))]
        mass = torch.where(ignored, 0.0, own)
        each = torch.where(ignored, 0.0, each * own)
    if reduction == "none":
        return each.to(p.loss_dtype)
    total = summed(each)
    return (total / summed(mass) if reduction == "mean" else total).to(p.loss_dtype)
