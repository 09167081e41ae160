"""Modules of the label distributionally robust losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import ldr as F
from pyloss.functional._rows import check_class_weight
from pyloss.functional._samples import checked_index, over_all_samples
from pyloss.nn._module import WeightedLoss


class _MarginLoss(WeightedLoss):
    """A margin that is a table is a buffer, as the weights are."""

    def __init__(self, weight: Tensor | None, margin: float | Tensor, **options: Any) -> None:
        if weight is not None:
            check_class_weight(weight)
        super().__init__(weight, margin=margin, **options)
        if isinstance(margin, Tensor):
            del self.margin
            self.register_buffer("margin", margin)

    def extra_repr(self) -> str:
        shown = {**self._options}
        if isinstance(self.margin, Tensor):
            shown["margin"] = f"table {tuple(self.margin.shape)}"
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class LDRLoss(_MarginLoss):
    r"""Module of :func:`pyloss.ldr_loss`, cross entropy's neighbour under the worst distribution of
    labels near the uniform one.

    .. math:: \ell = w_y\, \lambda \log \frac1C \sum_k e^{\delta_k / \lambda}, \qquad
              \delta_k = x_k - x_y + c\, [k \ne y]

    Args:
        lam: > 0; with ``topk`` also 0.
        margin: c >= 0, or a table ``(C, C)``, which becomes a buffer.
        topk, normalize: as for :func:`pyloss.ldr_loss`.
        weight: weight of each class, ``(C)``.
        ignore_index, reduction: as there.

    Shape:
        - input: ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``
        - target: ``()``, ``(N)`` or ``(N, d1, ..., dk)``
        - output: scalar, or the shape of the targets with ``reduction="none"``

    Raises:
        As :func:`pyloss.ldr_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.LDRLoss(lam=10.0, margin=0.1)
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Zhu, Ying, Yang. arXiv 2112.14869.
    """

    def __init__(
        self,
        lam: float = 1.0,
        margin: float | Tensor = 0.0,
        *,
        topk: int | None = None,
        normalize: str | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        options = dict(
            lam=lam, margin=margin, topk=topk, normalize=normalize, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
        F.check_ldr_options(**options)
        super().__init__(weight, **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.ldr_loss(input, target, weight=self.weight, **self.options)


class ALDRLoss(_MarginLoss):
    r"""Module of :func:`pyloss.aldr_loss`: LDR-KL with a lam of each sample's own.

    .. math:: \ell = w_y \max_{\lambda > 0,\, p \in \Delta} \sum_k p_k \delta_k
              - \lambda\, \mathrm{KL}(p, 1/C) - \frac{\alpha \log C}{2 \lambda_0}
              (\lambda - \lambda_0)^2

    Without ``num_samples`` each call finds the maximum. With it the module is the paper's
    algorithm: it keeps a lam for each sample of the data set, a call takes one step from it, uses
    the new one and, in training mode, stores it. Samples of which ``index`` is not given, in
    evaluation mode alone, get the maximum.

    Args:
        lam0: > 0.
        alpha: > 1.
        margin: c >= 0, or a table ``(C, C)``, which becomes a buffer.
        num_samples: of the data set; ``index`` lies in [0, num_samples).
        normalize: as for :func:`pyloss.aldr_loss`.
        weight: weight of each class, ``(C)``.
        ignore_index, reduction: as there.
        group: a process group whose ranks keep the same lam, with ``num_samples``.
        sync: ``"step"``: the ranks exchange what they have stored at every call; ``"manual"``: in
            :meth:`synchronize`, to be called before a checkpoint and between epochs.

    Shape:
        - input: ``(N, C)``; without ``index`` also ``(C)`` and ``(N, C, d1, ..., dk)``
        - target: ``(N)``, or ``()`` and ``(N, d1, ..., dk)``
        - index: ``(N,)``, integer; a sample that is there several times gets the mean of its lam
        - output: scalar, or the shape of the targets with ``reduction="none"``

    Attributes:
        lam: of each sample, ``(num_samples,)``, float32; a buffer.

    Raises:
        As :func:`pyloss.aldr_loss`; what needs no tensor, when it is made. ValueError: ``index``
        missing in training mode, or without ``num_samples``. IndexError: an index out of range
        (CPU).

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ALDRLoss(lam0=10.0, num_samples=1000)
        >>> x, y = torch.randn(4, 10, requires_grad=True), torch.randint(10, (4,))
        >>> criterion(x, y, index=torch.tensor([7, 0, 3, 999])).backward()
        >>> int((criterion.lam < 10).sum())
        4

    Reference:
        Zhu, Ying, Yang. arXiv 2112.14869.
    """

    lam: Tensor | None

    def __init__(
        self,
        lam0: float = 1.0,
        alpha: float = 2.0,
        margin: float | Tensor = 0.0,
        *,
        num_samples: int | None = None,
        normalize: str | None = "l1",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group: Any = None,
        sync: str = "step",
    ) -> None:
        options = dict(
            lam0=lam0, alpha=alpha, margin=margin, normalize=normalize, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
        F.check_aldr_options(**options)
        checks.check_one_of("sync", sync, ("step", "manual"))
        if num_samples is not None:
            num_samples = checks.checked_integer("num_samples", num_samples)
            if num_samples < 1:
                raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        elif group is not None:
            raise ValueError("group is for the lam of a data set, and needs num_samples")
        super().__init__(weight, **options, num_samples=num_samples, group=group, sync=sync)
        state = None if num_samples is None else torch.full((num_samples,), float(lam0))
        self.register_buffer("lam", state)
        moved = None if num_samples is None else torch.zeros(num_samples, dtype=torch.bool)
        self.register_buffer("_moved", moved, persistent=False)

    def forward(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        options = {name: getattr(self, name) for name in _OF_FUNCTION}
        if index is None and (self.lam is None or not self.training):
            return F.aldr_loss(input, target, weight=self.weight, **options)
        if self.lam is None:
            raise ValueError("index is for a module that has num_samples")
        if index is None:
            raise ValueError("index must say which samples these are, in training with num_samples")
        checks.check_tensor("target", target)
        index = checked_index(
            index, target.shape[0] if target.dim() else 0, len(self.lam), self.lam
        )
        before = self.lam.index_select(0, index)
        loss, lam = F.aldr_loss(
            input, target, lam=before.to(input.device), return_lambda=True, weight=self.weight,
            **options,
        )  # fmt: skip
        if self.training:
            with torch.no_grad():
                self._store(index, lam.to(self.lam))
        return loss

    def _store(self, index: Tensor, lam: Tensor) -> None:
        group = self.group if self.sync == "step" else None
        # The mean of what is said of a sample twice; what is not finite would stay for ever.
        index, _, lam = over_all_samples(index, torch.zeros_like(lam), lam, group)
        before = self.lam.index_select(0, index)
        self.lam[index] = torch.where(lam.isfinite(), lam, before)
        self._moved[index] = True

    @torch.no_grad()
    def synchronize(self) -> None:
        """Gives all ranks of ``group`` the lam that any of them has stored since the last time."""
        if self.lam is None or self.group is None:
            return
        import torch.distributed as dist

        moved = self._moved.to(self.lam.dtype)
        sums = torch.stack([self.lam * moved, moved])
        dist.all_reduce(sums, group=self.group)
        self.lam.copy_(torch.where(sums[1] > 0, sums[0] / sums[1], self.lam))
        self._moved.zero_()

    def _apply(self, fn, recurse: bool = True) -> ALDRLoss:
        """lam is no parameter of a model in half precision: it stays float32 at least."""
        before = self.lam
        super()._apply(fn, recurse)
        if self.lam is not None and self.lam.dtype in (torch.bfloat16, torch.float16):
            self._buffers["lam"] = before.to(self.lam.device)
        return self


_OF_FUNCTION = ("lam0", "alpha", "margin", "normalize", "ignore_index", "reduction")
