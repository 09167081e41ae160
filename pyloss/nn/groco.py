"""Module of the group ordering loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import groco as F
from pyloss.functional._options import GroCoOptions, options_of
from pyloss.nn._module import LossModule


class GroCoLoss(LossModule):
    r"""Module of :func:`pyloss.groco_loss`.

    .. math:: \ell = -\frac{1}{n} \sum_i \log \sum_{r \in \text{block of } i} P_{ir}

    Args:
        n_pos, topk_neg, steepness, network, distribution, art_lambda, stop_grad, reduction, group:
            as for :func:`pyloss.groco_loss`.

    Shape:
        - views: ``(V, B, D)``, or a sequence of V ``(B, D)``
        - output: scalar, or ``(V, B)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.groco_loss`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.GroCoLoss(topk_neg=5)
        >>> criterion([torch.randn(32, 16), torch.randn(32, 16)]).shape
        torch.Size([])

    Reference:
        Shvetsova, Petersen, Kukleva, Schiele, Kuehne. arXiv 2301.02009.
    """

    @options_of(F.groco_loss)
    def __init__(self, **options: Unpack[GroCoOptions]) -> None:
        F.check_options(**{k: v for k, v in options.items() if k != "group"})
        super().__init__(**options)

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        return F.groco_loss(views, **self.options)
