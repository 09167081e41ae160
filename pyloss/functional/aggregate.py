"""Learning from aggregate responses: instances in bags, of which the mean response is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._bags import Bags, bags_of
from pyloss.functional._sums import summed
from pyloss.functional.segment import segment_reduce
from pyloss.ops._launch import accumulator_dtype

LOSSES = ("mse", "ce", "bce")
WEIGHTS = ("equal", "size")


def check_options(*, rho=0.5, loss="mse", bag_weight="equal", reduction="mean") -> None:
    """Those of aggregate_loss, also for its module."""
    checks.check_range("rho", rho, 0.0)
    if not rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")
    if not callable(loss):
        checks.check_one_of("loss", loss, LOSSES, then=", or a function; ")
    checks.check_one_of("bag_weight", bag_weight, WEIGHTS)
    checks.check_reduction(reduction)


def aggregate_loss(
    pred: Tensor,
    bag_response: Tensor,
    bag_index: Tensor | None = None,
    *,
    bag_size: int | None = None,
    offsets: Tensor | None = None,
    rho: float = 0.5,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "mse",
    bag_weight: str = "equal",
    reduction: str = "mean",
) -> Tensor:
    r"""Between the loss of a bag's mean prediction and the mean loss of its predictions.

    .. math:: \ell_a = (1 - \rho)\, \ell\left(\bar y_a, \tfrac1{k_a} \textstyle\sum_{i \in a} f_i
              \right) + \rho\, \tfrac1{k_a} \textstyle\sum_{i \in a} \ell(\bar y_a, f_i)

    The bag level (:math:`\rho = 0`) is all that the data say; the instance level is never below it
    for a convex loss, and for the squared error exactly :math:`\ell_a = (\bar y_a - \bar f_a)^2 +
    \rho \operatorname{var}_{i \in a} f_i`: it is a regulariser, which pays where responses are
    noisy, as those of :func:`pyloss.aggregate.dp_aggregate`.

    Args:
        pred: f, ``(n,)`` or ``(n, *)``, floating: predictions; logits with ``"bce"``, and
            ``(n, C)`` with ``"ce"``.
        bag_response: the mean response of each bag, ``(m,)`` or ``(m, *)``; shares of the classes,
            ``(m, C)``, with ``"ce"``, and in [0, 1] with ``"bce"``.
        bag_index: ``(n,)``, int32 or int64, the bag of each instance, in any order.
        bag_size: in its place, where the instances of a bag follow each other: their number;
        offsets: or ``(m + 1,)``, int32 or int64, where each bag begins. No bag may be empty.
        rho: in [0, 1].
        loss: ``"mse"``; ``"ce"``, ``"bce"``: at the bag level of the mean probability, in
            logarithms; or a function of predictions ``(rows, *)`` and responses ``(rows, *)`` that
            gives ``(rows,)``. Of further dimensions ``"mse"`` and ``"bce"`` take the mean.
        bag_weight: of a bag in the sum and the mean: ``"equal"``, 1, or ``"size"``, k_a.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: ``(m,)``, each times its weight.

    Returns:
        0-d, or ``(m,)``; of the dtype of ``pred``, float32 for half types under autocast.
        Differentiable in both; the mean of no bags is NaN.

    Raises:
        TypeError, RuntimeError, ValueError: tensors of a wrong dtype, device or shape, bags that do
            not fit, an empty bag, an option out of range.

    Example:
        >>> import torch, pyloss
        >>> pred, bag_index = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([0, 0, 1])
        >>> response = torch.tensor([1.0, 4.0])
        >>> pyloss.functional.aggregate_loss(pred, response, bag_index, rho=0.5, reduction="none")
        tensor([0.5000, 0.0000])

    Reference:
        Javanmard, Chen, Mirrokni, Badanidiyuru, Fu. Learning from Aggregate responses. arXiv
        2401.11081.
    """
    check_options(rho=rho, loss=loss, bag_weight=bag_weight, reduction=reduction)
    checks.check_floating("pred", pred)
    checks.check_supported("aggregate_loss", pred)
    checks.check_has_dimension("pred", pred)
    checks.check_floating("bag_response", bag_response)
    checks.check_device("bag_response", bag_response, pred, "pred")
    if bag_response.shape[1:] != pred.shape[1:] or not bag_response.dim():
        raise ValueError(
            f"bag_response must have a row like those of pred, {list(pred.shape[1:])}, for each "
            f"bag, got {list(bag_response.shape)}"
        )
    if loss == "ce" and pred.dim() != 2:
        raise ValueError(f"pred must be (n, C) with loss='ce', got {list(pred.shape)}")
    bags = bags_of(pred, bag_index, bag_size, offsets, count=bag_response.shape[0])
    work = accumulator_dtype(pred.dtype)
    f, y = bags.rows(pred.to(work)), bag_response.to(work)
    levels = _of_function(f, y, bags, loss) if callable(loss) else _LEVELS[loss](f, y, bags)
    # One that does not count is not looked at: infinity times 0 is no loss.
    parts = [w * level() for w, level in zip((1 - rho, rho), levels) if w > 0]
    each = sum(parts[1:], parts[0])
    weight = bags.sizes().to(work) if bag_weight == "size" else torch.ones_like(each)
    each = each * weight
    if reduction != "none":
        each = summed(each) / (summed(weight) if reduction == "mean" else 1)
    return each.to(checks.result_dtype(pred.dtype, pred))


# --------------------------------------------------------------------------------------------------
# The two levels, (m,) each, of f (n, *) bag by bag and y (m, *)


def _mean(rows: Tensor, bags: Bags) -> Tensor:
    return segment_reduce(rows, bags.offsets, "mean")


def _log_mean_exp(rows: Tensor, bags: Bags) -> Tensor:
    sizes = bags.sizes().to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
    return segment_reduce(rows, bags.offsets, "logsumexp") - sizes.log()


def _flat(each: Tensor) -> Tensor:
    """The mean over all dimensions but the first."""
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def _of_rows(y: Tensor, f: Tensor, bags: Bags) -> Tensor:
    """The response of each instance's bag."""
    return y.index_select(0, segment.segment_ids(bags.offsets, f.shape[0]))


def _mse(f: Tensor, y: Tensor, bags: Bags):
    return (
        lambda: _flat((_mean(f, bags) - y).square()),
        lambda: _mean(_flat((f - _of_rows(y, f, bags)).square()), bags),
    )


def _ce(f: Tensor, y: Tensor, bags: Bags):
    log_p = F.log_softmax(f, 1)
    return (
        lambda: -(y * _log_mean_exp(log_p, bags)).sum(1),
        lambda: -(y * _mean(log_p, bags)).sum(1),
    )


def _bce(f: Tensor, y: Tensor, bags: Bags):
    yes, no = F.logsigmoid(f), F.logsigmoid(-f)

    def level(of):
        return lambda: _flat(-(y * of(yes, bags) + (1 - y) * of(no, bags)))

    return level(_log_mean_exp), level(_mean)


_LEVELS = {"mse": _mse, "ce": _ce, "bce": _bce}


def _of_function(f: Tensor, y: Tensor, bags: Bags, loss: Callable[[Tensor, Tensor], Tensor]):
    def called(pred: Tensor, response: Tensor) -> Tensor:
        each = loss(pred, response)
        checks.check_tensor("the result of loss", each)
        if each.shape != pred.shape[:1]:
            raise ValueError(
                f"loss must give one number a row, {list(pred.shape[:1])}, got {list(each.shape)}"
            )
        return each

    return (
        lambda: called(_mean(f, bags), y),
        lambda: _mean(called(f, _of_rows(y, f, bags)), bags),
    )
