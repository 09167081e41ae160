"""Modules for classes of very different frequency."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyloss.functional import long_tail as F
from pyloss.functional.classification import fused_cross_entropy
from pyloss.nn.classification import _RowLoss


class LogitAdjustedCrossEntropyLoss(_RowLoss):
    r"""Cross entropy of logits that the logarithms of the classes' shares have been added to.

    See :func:`pyloss.functional.logit_adjusted_cross_entropy` for the formula. Predict with the
    logits as they are.

    Args:
        counts: samples of each class, ``(C,)``, such as ``torch.bincount(labels)``.
        adjustment_tau: strength of the adjustment, >= 0.
        weight: weight of each class, ``(C,)``.
        **options: the other keyword arguments of :func:`pyloss.fused_cross_entropy`.

    Shape:
        As :class:`CrossEntropyLoss`.

    Attributes:
        adjustment: what is added, ``(C,)``; a buffer.

    Raises:
        As the function; what needs no tensor of a call, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.LogitAdjustedCrossEntropyLoss([1000, 100, 10])
        >>> criterion(torch.randn(4, 3), torch.randint(3, (4,))).shape
        torch.Size([])

    Reference:
        Menon et al. Long-tail Learning via Logit Adjustment. arXiv 2007.07314.
    """

    adjustment: Tensor

    def __init__(
        self,
        counts: Tensor | Sequence[float],
        adjustment_tau: float = 1.0,
        weight: Tensor | None = None,
        **options,
    ) -> None:
        self._check_names(options, fused_cross_entropy, without=("inplace",))
        adjustment = F.logit_adjustment(counts, adjustment_tau)
        super().__init__(weight, **options)
        self.adjustment_tau = adjustment_tau
        self.register_buffer("adjustment", adjustment)

    def extra_repr(self) -> str:
        parts = [f"adjustment_tau={self.adjustment_tau!r}", super().extra_repr()]
        return ", ".join(part for part in parts if part)

    def forward(self, input: Tensor, target, **call):
        return F.with_adjustment(
            input, target, self.adjustment, weight=self.weight, **self.options, **call
        )
