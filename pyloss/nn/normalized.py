"""The normalized logistic loss as a module."""

from __future__ import annotations

from torch import Tensor

from pyloss.functional.normalized import normalized_logistic_loss
from pyloss.nn._module import LossModule


class NormalizedLogisticLoss(LossModule):
    """Logistic loss whose gradient is divided by the mean probability of being wrong.

    See :func:`pyloss.functional.normalized_logistic_loss` for the formula.

    Args:
        ignore_index: rows with this target do not count; of several classes only.

    Shape:
        - input: ``(N, C)``, ``(N, C, d1, ..)``, or, binary, ``(N,)`` or ``(N, 1)``
        - target: ``(N)``, ``(N, d1, ..)``; binary: 0 and 1, ``(N,)`` or as ``input``
        - output: scalar

    Raises:
        As :func:`pyloss.functional.normalized_logistic_loss`.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.NormalizedLogisticLoss()
        >>> x, y = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
        >>> criterion(x, y).backward()

    Reference:
        Tyurin. arXiv 2412.08424.
    """

    def __init__(self, *, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return normalized_logistic_loss(input, target, **self._options)
