"""EnsLoss as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import ensemble as F
from pyloss.nn._module import AveragesModule


class EnsLoss(AveragesModule):
    r"""EnsLoss: an ensemble of calibrated losses for binary classification, one in each step.

    In training mode a call is :func:`pyloss.functional.ens_loss` with derivatives that are drawn
    anew. In evaluation mode it is the binary cross entropy of the scores, so that curves of
    validation mean something.

    Args:
        bc_lambda: parameter of the inverse Box-Cox transform; 0 takes the exponential.
        period: epochs after which ``bc_lambda`` is drawn anew, from U(-1, 1), in
            :meth:`step_epoch`; None: never.
        tail: lets derivatives beyond margin 1 decay.
        reduction: ``"mean" | "sum" | "none"``.

    Shape:
        - input: ``(N,)`` or ``(N, 1)``
        - target: ``(N,)``, or as ``input``; 0 and 1
        - output: scalar, or as ``input`` with ``reduction="none"``

    Attributes:
        current_lambda: the parameter in use, 0-d; a buffer.
        epoch: counted by :meth:`step_epoch`, a buffer.

    Raises:
        As :func:`pyloss.functional.ens_loss`.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.EnsLoss(period=10)
        >>> f, y = torch.randn(16, requires_grad=True), torch.randint(2, (16,))
        >>> criterion(f, y).backward()
        >>> criterion.step_epoch()

    Reference:
        Dai. EnsLoss: Stochastic Calibrated Loss Ensembles. arXiv 2409.00908.
    """

    current_lambda: Tensor
    epoch: Tensor

    def __init__(
        self,
        bc_lambda: float = 0.0,
        period: int | None = None,
        *,
        tail: bool = True,
        reduction: str = "mean",
    ) -> None:
        checks.check_number("bc_lambda", bc_lambda)
        F.check_options(bc_lambda=bc_lambda, tail=tail, reduction=reduction)
        if period is not None:
            period = checks.checked_integer("period", period)
            if period < 1:
                raise ValueError(f"period must be at least 1, got {period}")
        super().__init__(bc_lambda=bc_lambda, period=period, tail=tail, reduction=reduction)
        self.register_buffer("current_lambda", torch.full((), float(bc_lambda)))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def step_epoch(self, generator: torch.Generator | None = None) -> None:
        """Says that an epoch is over; after ``period`` of them the parameter is drawn anew."""
        self.epoch += 1
        if self.period is not None and int(self.epoch) % self.period == 0:
            self.resample_(generator)

    def resample_(self, generator: torch.Generator | None = None) -> EnsLoss:
        """Draws the parameter from U(-1, 1). Ranks that are to share it need equal generators."""
        self.current_lambda.uniform_(-1, 1, generator=generator)
        return self

    def forward(
        self, input: Tensor, target: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        if not self.training:
            return F.binary_cross_entropy(input, target, self.reduction)
        checks.check_tensor("input", input)
        return F.ens_loss(
            input, target, bc_lambda=self.current_lambda.to(input.device), tail=self.tail,
            reduction=self.reduction, generator=generator,
        )  # fmt: skip
