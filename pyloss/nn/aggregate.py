"""Losses on instances of which aggregates are known."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyloss.functional import aggregate as F
from pyloss.nn._module import LossModule


class AggregateLoss(LossModule):
    r"""Module of :func:`pyloss.functional.aggregate_loss`.

    .. math:: \ell_a = (1 - \rho)\, \ell\left(\bar y_a, \tfrac1{k_a} \textstyle\sum_{i \in a} f_i
              \right) + \rho\, \tfrac1{k_a} \textstyle\sum_{i \in a} \ell(\bar y_a, f_i)

    Args:
        rho, loss, bag_weight, reduction: as for :func:`pyloss.functional.aggregate_loss`.

    Shape:
        - pred: ``(n,)`` or ``(n, *)``
        - bag_response: ``(m,)`` or ``(m, *)``
        - bag_index, bag_size, offsets: one of them, as for the function
        - output: scalar, or ``(m,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.AggregateLoss(rho=0.2)
        >>> pred = torch.randn(12, requires_grad=True)
        >>> criterion(pred, torch.randn(3), bag_size=4).backward()

    Reference:
        Javanmard, Chen, Mirrokni, Badanidiyuru, Fu. Learning from Aggregate responses. arXiv
        2401.11081.
    """

    def __init__(
        self,
        *,
        rho: float = 0.5,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "mse",
        bag_weight: str = "equal",
        reduction: str = "mean",
    ) -> None:
        options = dict(rho=rho, loss=loss, bag_weight=bag_weight, reduction=reduction)
        F.check_options(**options)
        super().__init__(**options)

    def forward(
        self,
        pred: Tensor,
        bag_response: Tensor,
        bag_index: Tensor | None = None,
        *,
        bag_size: int | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        return F.aggregate_loss(
            pred, bag_response, bag_index, bag_size=bag_size, offsets=offsets, **self._options
        )
