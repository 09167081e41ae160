"""Module of the cross entropy of the k largest scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional import topk as F
from pyloss.functional._checks import check_tensor, checked_integer
from pyloss.nn._module import OptionsModule

_SORTERS = {"bitonic__non_sparse": "bitonic"}  # names of difftopk for what is one here


class TopKCrossEntropyLoss(OptionsModule):
    r"""Module of :func:`pyloss.topk_cross_entropy`; stands in for difftopk's of this name.

    .. math:: \ell = -\log \sum_k p_k\, S_k(y)

    Args:
        diffsort_method: ``sorter`` of the function; ``"bitonic__non_sparse"`` is ``"bitonic"``.
        inverse_temperature: its ``steepness``.
        p_k: shares of k = 1, 2, ..., or one k.
        n: number of classes.
        m: only the label and the m - 1 largest others take part.
        distribution: of the networks; None is ``"cauchy"``.
        art_lambda: exponent of ``"logistic_phi"``.
        device: accepted and ignored: the module works where its input is.
        top1_mode, ignore_index, reduction: as for the function.

    Shape:
        - input: ``(N, n)``, ``(n,)`` or ``(N, n, ...)``
        - target: ``(N, ...)``, or the shape of ``input``
        - output: scalar, or the shape of ``target`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.TopKCrossEntropyLoss(
        ...     "splitter_selection", 1.0, p_k=[0.5, 0, 0, 0, 0.5], n=100, m=16
        ... )
        >>> criterion(torch.randn(8, 100), torch.randint(100, (8,))).shape
        torch.Size([])

    Reference:
        Petersen, Kuehne, Borgelt, Deussen. arXiv 2206.07290.
    """

    def __init__(
        self,
        diffsort_method: str,
        inverse_temperature: float,
        p_k: Sequence[float] | int,
        n: int,
        m: int | None = None,
        distribution: str | None = None,
        art_lambda: float = 0.25,
        device: torch.device | str = "cpu",
        top1_mode: str = "sm",
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        n = checked_integer("n", n)
        distribution = "cauchy" if distribution is None else distribution
        sorter = _SORTERS.get(diffsort_method, diffsort_method)
        checked = F.check_options(
            p_k, m, top1_mode, sorter, inverse_temperature, distribution, art_lambda, reduction,
            ignore_index,
        )  # fmt: skip
        most = len(checked.p_k) if m is None else checked.m + 1
        if n < most:
            raise ValueError(f"n must be at least {most} for these p_k and m, got {n}")
        super().__init__(
            p_k=p_k, m=m, top1_mode=top1_mode, sorter=sorter, steepness=inverse_temperature,
            distribution=distribution, art_lambda=art_lambda, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
        self.n = n

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_tensor("input", input)
        classes = input.shape[min(1, input.dim() - 1)] if input.dim() else 0
        if classes != self.n:
            raise ValueError(f"input must hold {self.n} classes, got {list(input.shape)}")
        return F.topk_cross_entropy(input, target, **self._options)

    def extra_repr(self) -> str:
        return f"n={self.n}, {super().extra_repr()}"
