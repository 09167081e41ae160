"""Modules of the topological losses; each forward is one call of the functional."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyloss.functional import topology as F


class BettiMatchingLoss(nn.Module):
    r"""Module of :func:`pyloss.betti_matching_loss`, alone or on top of another loss.

    .. math:: \ell = \mathrm{base}(x, y) + \alpha\, L_{\text{Betti}}(x, y)

    Args:
        filtration, dims, weight, matched_weight, unmatched_weight, target_weight,
            include_target_unmatched, unmatched, min_persistence, essential, padding,
            include_background, activation, reduction: as for :func:`pyloss.betti_matching_loss`.
        base_loss: called with ``(input, target)`` as the module gets them; None: the Betti matching
            loss alone, without ``alpha``.
        alpha: weight of the Betti matching loss beside ``base_loss``.

    Shape:
        - input: ``(N, C, *spatial)``, 1 or 2 spatial dimensions
        - target: the same, or class indices ``(N, *spatial)``; or a :class:`pyloss.BettiTarget`,
          of which ``base_loss`` gets the tensor that it was made of
        - output: scalar, or ``(N, C)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.betti_matching_loss`, when called; ValueError: ``alpha`` negative.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.BettiMatchingLoss(base_loss=torch.nn.BCELoss(), alpha=0.1)
        >>> x, y = torch.rand(2, 1, 16, 16), (torch.rand(2, 1, 16, 16) > 0.5).float()
        >>> criterion(x, y).shape
        torch.Size([])

    Reference:
        Stucki, Paetzold, Shit, Menze, Bauer. arXiv 2211.15272.
    """

    def __init__(
        self,
        *,
        filtration: str = "superlevel",
        dims: Sequence[int] | None = None,
        weight: Sequence[float] | None = None,
        matched_weight: float = 1.0,
        unmatched_weight: float = 1.0,
        target_weight: float = 1.0,
        include_target_unmatched: bool = True,
        unmatched: str = "diagonal",
        min_persistence: float = 0.0,
        essential: bool = False,
        padding: str | float | None = None,
        include_background: bool = True,
        activation: str | None = None,
        reduction: str = "mean",
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        alpha: float = 0.5,
    ) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.options = dict(
            filtration=filtration,
            dims=None if dims is None else tuple(dims),
            weight=None if weight is None else tuple(weight),
            matched_weight=matched_weight,
            unmatched_weight=unmatched_weight,
            target_weight=target_weight,
            include_target_unmatched=include_target_unmatched,
            unmatched=unmatched,
            min_persistence=min_persistence,
            essential=essential,
            padding=padding,
            include_background=include_background,
            activation=activation,
            reduction=reduction,
        )
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
        shown = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{shown}, alpha={self.alpha!r}"
