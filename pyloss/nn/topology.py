"""Modules of the topological losses; each forward is one call of the functional."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import topology as F
from pyloss.functional._checks import check_range
from pyloss.functional._options import BettiOptions, options_of
from pyloss.nn._module import LossModule


class BettiMatchingLoss(LossModule):
    r"""Module of :func:`pyloss.betti_matching_loss`, alone or on top of another loss.

    .. math:: \ell = \mathrm{base}(x, y) + \alpha\, L_{\text{Betti}}(x, y)

    Args:
        filtration, dims, weight, matched_weight, unmatched_weight, target_weight,
            include_target_unmatched, unmatched, min_persistence, essential, padding,
            include_background, activation, ignore_index, spatial_dims, reduction: as for
            :func:`pyloss.betti_matching_loss`.
        base_loss: called with ``(input, target)`` as the module gets them, ignored voxels
            included; None: the Betti matching
            loss alone, without ``alpha``.
        alpha: weight of the Betti matching loss beside ``base_loss``.

    Shape:
        - input: ``(N, C, *spatial)``, 1 to 3 spatial dimensions; with ``spatial_dims`` also
          ``(N, *spatial)``
        - target: the same, or class indices ``(N, *spatial)``; or a :class:`pyloss.BettiTarget`,
          of which ``base_loss`` gets the tensor that it was made of
        - output: scalar, or ``(N, C)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.betti_matching_loss`, when made if the options alone are wrong; TypeError,
        ValueError: ``alpha`` is no number, or negative.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.BettiMatchingLoss(base_loss=torch.nn.BCELoss(), alpha=0.1)
        >>> x, y = torch.rand(2, 1, 16, 16), (torch.rand(2, 1, 16, 16) > 0.5).float()
        >>> criterion(x, y).shape
        torch.Size([])

    Reference:
        Stucki, Paetzold, Shit, Menze, Bauer. arXiv 2211.15272.
    """

    @options_of(F.betti_matching_loss, after={"base_loss": "reduction", "alpha": "base_loss"})
    def __init__(
        self,
        *,
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        alpha: float = 0.5,
        **options: Unpack[BettiOptions],
    ) -> None:
        F.check_options(**options)
        check_range("alpha", alpha, 0.0)
        for name in ("dims", "weight"):
            options[name] = None if options[name] is None else tuple(options[name])
        F.check_dims(*(options[name] for name in ("dims", "weight", "spatial_dims")))
        super().__init__(**options)
        self.base_loss = base_loss
        self.alpha = alpha

    def forward(self, input: Tensor, target: Tensor | F.BettiTarget) -> Tensor:
        betti = F.betti_matching_loss(input, target, **self.options)
        if self.base_loss is None:
            return betti
        if isinstance(target, F.BettiTarget):
            target = target.target
        base = self.base_loss(input, target)
        if base.dim() and betti.dim() and base.shape != betti.shape:
            raise ValueError(
                f"base_loss gives the shape {list(base.shape)}, which does not go with "
                f"{list(betti.shape)} of the Betti matching loss; give both reduction='mean'"
            )
        return base + self.alpha * betti

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha!r}"
