"""Modules of the distributionally robust losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyloss.functional import dro as F
from pyloss.nn._module import AveragesModule


class KLDROLoss(AveragesModule):
    r"""KL-regularised distributionally robust loss, whose normaliser is a moving average.

    .. math:: L = r \log \mathbb{E}\, e^{\ell / r}

    the largest mean loss under weights of the samples that lie near uniform. A call is one step of
    :func:`pyloss.functional.kl_dro_loss` and, in training mode, moves the average. It returns the
    loss of the batch, with the gradient of the weights over the data set.

    Args:
        r: weight of the divergence from uniform weights, > 0.
        eta: weight of the batch in the average, in (0, 1]; 1: none is kept.
        group: as for :func:`pyloss.functional.kl_dro_loss`; all ranks hold the same average.

    Shape:
        - losses: any shape, one a sample (``reduction="none"`` of another loss)
        - output: scalar

    Attributes:
        log_u: log of the average, 0-d; -inf before the first step. A buffer, float32 whatever half
            type the module is cast to.

    Raises:
        As :func:`pyloss.functional.kl_dro_loss`. A batch with NaN or infinite losses gives NaN or
        infinity, and leaves the average as it was.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.KLDROLoss(r=0.5)
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> losses = torch.nn.functional.cross_entropy(x, y, reduction="none")
        >>> criterion(losses).backward()

    Reference:
        Sow et al. Doubly Robust Instance-Reweighted Adversarial Training. arXiv 2308.00311.
    """

    log_u: Tensor

    def __init__(self, r: float = 1.0, eta: float = 0.9, *, group: Any = None) -> None:
        F.check_options(r=r, eta=eta, group=group)
        super().__init__(r=r, eta=eta, group=group)
        self.register_buffer("log_u", torch.full((), -math.inf))

    def forward(self, losses: Tensor) -> Tensor:
        log_u = self.log_u.to(losses.device) if isinstance(losses, Tensor) else self.log_u
        loss, new = F.kl_dro_loss(losses, log_u=log_u, **self._options)
        if self.training:
            with torch.no_grad():
                new = new.to(self.log_u)
                self.log_u.copy_(torch.where(new.isfinite(), new, self.log_u))
        return loss
