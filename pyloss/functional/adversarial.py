"""Losses of logits at an input and at one that an attack has moved."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._rows import check_labels
from pyloss.functional._sums import summed
from pyloss.functional.classification import fused_cross_entropy
from pyloss.ops._labels import wide
from pyloss.ops._launch import accumulator_dtype as accumulator_dtype
from pyloss.ops.margin_shift import margin_shift as _shift_op


def margin_shift(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    *,
    squared: bool = False,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    r"""How far the margins of a row's class moved from one set of logits to another.

    .. math:: Q = \left\| \big( (x'_y - x'_j) - (x_y - x_j) \big)_{j \ne y} \right\|_2

    in one pass over both. The gradient of Q at Q = 0 is taken as 0.

    Args:
        logits: x, ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        logits_adv: x', of the same shape.
        target: y, class indices, ``()``, ``(N)`` or ``(N, d1, ..., dk)``.
        squared: Q^2, which is smooth, and what attacks maximise.
        ignore_index: rows with this target are 0.
        reduction: ``"none" | "mean" | "sum"``; the mean is over rows that are not ignored.

    Returns:
        Of the shape of ``target``, or 0-d; of the promoted dtype of the logits, float32 for half
        types under autocast.

    Raises:
        TypeError: logits that are no floating tensors. ValueError, RuntimeError: shapes, devices
            or the dtype of ``target``. IndexError: a label that is no class; on a GPU its row is
            NaN.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.zeros(1, 3), torch.tensor([0])
        >>> pyloss.functional.margin_shift(x, torch.tensor([[1.0, -2.0, -3.0]]), y)
        tensor([5.])

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    checks.checked_flag("squared", squared)
    dtype = _checked(logits, logits_adv, target, ignore_index, reduction)
    shift = _shifts(logits, logits_adv, target, bool(squared), int(ignore_index), reduction)
    return shift.to(dtype)


def smooth_adversarial_comp_sum(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Smooth adversarial comp-sum loss: a comp-sum loss of the logits, and how far an attack can
    move their margins.

    .. math:: \ell = \Phi^\tau\!\Big( \sum_{j \ne y} e^{-(x_y - x_j) / \rho} \Big) + \nu
              \left\| \big( (x'_y - x'_j) - (x_y - x_j) \big)_{j \ne y} \right\|_2

    With x' where the norm is largest in a ball, it is an upper bound of the largest adversarial
    comp-sum loss in that ball for :math:`\nu \ge \sqrt{C - 1} / \rho`, whose margin loss is
    :math:`\min(\max(0, 1 - u / \rho), 1)`. :class:`pyloss.adversarial.AdvCompSum` looks for x'.

    Args:
        logits: x at the input, ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        logits_adv: x' at the moved input, of the same shape.
        target: y, class indices, as in :func:`pyloss.comp_sum_loss`.
        tau: >= 0, the member of the family: see :func:`pyloss.comp_sum_loss`.
        rho: > 0, of the margins.
        nu: >= 0, weight of the second term.
        ignore_index: rows with this target add nothing.
        reduction: ``"none" | "mean" | "sum"``; the mean is over rows that are not ignored.

    Returns:
        0-d, or of the shape of ``target``; of the promoted dtype of the logits, float32 for half
        types under autocast.

    Raises:
        ValueError: ``tau``, ``rho`` or ``nu`` out of range; and what
            :func:`pyloss.functional.margin_shift` raises.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> moved = x + 0.1 * torch.randn(8, 10)
        >>> pyloss.functional.smooth_adversarial_comp_sum(x, moved, y, nu=3.0).backward()

    Reference:
        Mao, Mohri, Zhong. Cross-Entropy Loss Functions: Theoretical Analysis and Applications.
        arXiv 2304.07288.
    """
    check_comp_sum(tau, rho, nu)
    dtype = _checked(logits, logits_adv, target, ignore_index, reduction)
    wide_dtype = accumulator_dtype(dtype)
    first = fused_cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, tau=tau, temperature=rho,
        loss_dtype=wide_dtype,
    )  # fmt: skip
    shift = _shifts(logits, logits_adv, target, False, int(ignore_index), reduction)
    return (first + nu * shift).to(dtype)


def check_comp_sum(tau, rho, nu) -> None:
    """Also for the module."""
    checks.check_range("tau", tau, 0.0)
    checks.check_range("rho", rho, 0.0, open_low=True)
    checks.check_range("nu", nu, 0.0)


def _checked(logits, logits_adv, target, ignore_index, reduction) -> torch.dtype:
    """The dtype of the result."""
    for name, x in (("logits", logits), ("logits_adv", logits_adv)):
        checks.check_floating(name, x)
        checks.check_dense(name, x)
        checks.check_supported("margin_shift", x)
    if logits_adv.shape != logits.shape:
        raise ValueError(
            f"logits_adv must have the shape of logits, {list(logits.shape)}, got "
            f"{list(logits_adv.shape)}"
        )
    checks.check_device("logits_adv", logits_adv, logits, "logits")
    checks.check_tensor("target", target)
    checks.check_index_dtype("target", target)
    check_labels(logits, target, "target")
    checks.check_device("target", target, logits, "logits")
    checks.checked_integer("ignore_index", ignore_index)
    checks.check_reduction(reduction)
    return checks.result_dtype(torch.promote_types(logits.dtype, logits_adv.dtype), logits)


def _shifts(logits, logits_adv, target, squared, ignore_index, reduction) -> Tensor:
    """Of checked arguments, in no less than float32."""
    dtype = torch.promote_types(logits.dtype, logits_adv.dtype)
    x, x_adv, y = logits.to(dtype), logits_adv.to(dtype), target
    if x.dim() == 1:
        x, x_adv, y = x.unsqueeze(0), x_adv.unsqueeze(0), y.reshape(1)
    shift = _shift_op(x, x_adv, y, squared, ignore_index).view(target.shape)
    if reduction == "none":
        return shift
    total = summed(shift)
    if reduction == "sum":
        return total
    return total / (wide(target) != ignore_index).sum()


def divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(logits_adv)) of each row, in no less than float32."""
    sums = accumulator_dtype(torch.promote_types(logits.dtype, logits_adv.dtype))
    log_p = torch.log_softmax(logits.to(sums), 1)
    log_q = torch.log_softmax(logits_adv.to(sums), 1)
    p = log_p.exp()
    # Of a class that cannot be, 0 (-inf + inf) is 0; not "p > 0", which a NaN would not be.
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(1)
