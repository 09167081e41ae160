"""Modules of the differentiable sorting networks; each forward is one call of the functional."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import sorting as F
from pyloss.functional._checks import check_tensor, checked_integer
from pyloss.functional._options import SortingLossOptions, SpearmanOptions, options_of
from pyloss.functional._sorting_rows import SELECTORS, SORTERS, checked_settings
from pyloss.nn._module import LossModule, OptionsModule

PADDING = ("mask", "lengths")  # which a module gets when it is called


class _Network(OptionsModule):
    """The constructor that diffsort's and difftopk's modules share."""

    def __init__(
        self, sorting_network_type, size, steepness, art_lambda, interpolation_type, distribution,
        networks, k=0,
    ) -> None:  # fmt: skip
        if interpolation_type is not None:
            if distribution not in (None, "cauchy", interpolation_type):
                raise ValueError(
                    f"interpolation_type={interpolation_type!r} is an old name of distribution, "
                    f"which is {distribution!r}"
                )
            distribution = interpolation_type
        size = checked_integer("size", size)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if art_lambda is None and distribution != "logistic_phi":  # of which alone it is an option
            art_lambda = 0.25
        checked_settings(sorting_network_type, distribution, steepness, art_lambda, k, networks)
        super().__init__(steepness=steepness, art_lambda=art_lambda, distribution=distribution)
        self.sorting_network_type = sorting_network_type
        self.size = size

    def _checked(self, vectors) -> Tensor:
        check_tensor("vectors", vectors)
        if vectors.dim() != 2 or vectors.shape[1] != self.size:
            raise ValueError(
                f"vectors must have the shape (batch, {self.size}), got {list(vectors.shape)}"
            )
        return vectors

    def extra_repr(self) -> str:
        return f"{self.sorting_network_type!r}, {self.size}, {super().extra_repr()}"


class DiffSortNet(_Network):
    r"""Sorts vectors and returns the relaxed permutation; stands in for ``diffsort.DiffSortNet``.

    .. math:: y = P^\top x

    Args:
        sorting_network_type: ``"bitonic"``, ``"odd_even"``, ``"batcher"`` or ``"auto"``, see
            :func:`pyloss.soft_sort`.
        size: n, any number from 1.
        device: accepted and ignored: the module works where its input is.
        steepness: > 0, of the comparators.
        art_lambda: exponent of ``"logistic_phi"``, in [0, 1); None for the others.
        interpolation_type: an old name of ``distribution``.
        distribution: as in :func:`pyloss.soft_sort`.

    Shape:
        - vectors: ``(batch, size)``
        - output: the sorted ``(batch, size)``, ascending, and P ``(batch, size, size)``, where
          P[i, r] is the weight of element i at rank r

    Raises:
        ValueError: an unknown name (a NotImplementedError too), an option out of range, a
            ``distribution`` other than ``interpolation_type``, a wrong shape.
        TypeError: an option of the wrong type, vectors that are not floating.

    Example:
        >>> import torch, pyloss
        >>> sorter = pyloss.DiffSortNet("odd_even", 5, steepness=100.0)
        >>> y, P = sorter(torch.tensor([[3.0, 1.0, 5.0, 4.0, 2.0]]))
        >>> y.round(decimals=1)
        tensor([[1., 2., 3., 4., 5.]])
        >>> P.shape
        torch.Size([1, 5, 5])

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019, 2203.09630.
    """

    def __init__(
        self,
        sorting_network_type: str,
        size: int,
        device: torch.device | str = "cpu",
        steepness: float = 10.0,
        art_lambda: float | None = 0.25,
        interpolation_type: str | None = None,
        distribution: str = "cauchy",
    ) -> None:
        super().__init__(
            sorting_network_type, size, steepness, art_lambda, interpolation_type, distribution,
            SORTERS,
        )  # fmt: skip

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        vectors, network = self._checked(vectors), self.sorting_network_type
        return F.soft_sort(vectors, return_permutation=True, network=network, **self._options)


class DiffTopkNet(_Network):
    r"""Relaxed membership in the top k; stands in for ``difftopk.DiffTopkNet``.

    Args:
        sorting_network_type: as in :class:`DiffSortNet`, or ``"splitter_selection"``.
        size: n, any number from 1.
        k: how many, 1 <= k <= size.
        sparse: accepted and ignored: P is never formed.
        device: accepted and ignored: the module works where its input is.
        steepness, art_lambda, interpolation_type, distribution: as in :class:`DiffSortNet`.

    Shape:
        - vectors: ``(batch, size)``
        - output: None, and the last k columns of P, ``(batch, size, k)``: the last is that of the
          largest (:func:`pyloss.soft_topk` has it first)

    Raises:
        As :class:`DiffSortNet`; ValueError: ``k`` out of range.

    Example:
        >>> import torch, pyloss
        >>> net = pyloss.DiffTopkNet("splitter_selection", 5, 2, steepness=100.0)
        >>> _, P = net(torch.tensor([[3.0, 1.0, 5.0, 4.0, 2.0]]))
        >>> P.sum(-1).round(decimals=1)
        tensor([[0., 0., 1., 1., 0.]])

    Reference:
        Petersen, Kuehne, Borgelt, Deussen. arXiv 2206.07290.
    """

    def __init__(
        self,
        sorting_network_type: str,
        size: int,
        k: int,
        sparse: bool = False,
        device: torch.device | str = "cpu",
        steepness: float = 10.0,
        art_lambda: float | None = 0.25,
        interpolation_type: str | None = None,
        distribution: str = "cauchy",
    ) -> None:
        super().__init__(
            sorting_network_type, size, steepness, art_lambda, interpolation_type, distribution,
            SELECTORS, k,
        )  # fmt: skip
        k = checked_integer("k", k)
        if not 1 <= k <= size:
            raise ValueError(f"k must be in [1, {size}], the size; got {k}")
        self.k = k
        self.sparse = sparse

    def forward(self, vectors: Tensor) -> tuple[None, Tensor]:
        vectors, network = self._checked(vectors), self.sorting_network_type
        return None, F.soft_topk(vectors, self.k, network=network, **self._options).flip(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"


class SortingCrossEntropyLoss(LossModule):
    r"""Module of :func:`pyloss.sorting_cross_entropy`.

    .. math:: \ell = -\frac{1}{n^2} \sum_{i,r} Q_{ir} \log P_{ir} + (1 - Q_{ir}) \log (1 - P_{ir})

    Args:
        kind, target_is, reduction, dim, descending, ties, network, distribution, steepness,
            art_lambda, validate, base: as for :func:`pyloss.sorting_cross_entropy`.

    Shape:
        - x: ``(..., n, ...)``
        - target: the shape of x, or ``(..., n, n)`` with ``target_is="permutation"``
        - mask, lengths: optional, as for the function
        - output: scalar, or the shape of x without ``dim`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.sorting_cross_entropy`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SortingCrossEntropyLoss(network="odd_even", steepness=20.0)
        >>> criterion(torch.randn(8, 5), torch.randn(8, 5)).shape
        torch.Size([])

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019.
    """

    @options_of(
        F.sorting_cross_entropy, positional=3, without=PADDING, annotations={"steepness": "float"}
    )
    def __init__(self, **options: Unpack[SortingLossOptions]) -> None:
        F.check_loss_options(**options)
        super().__init__(**options)

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        return F.sorting_cross_entropy(x, target, mask=mask, lengths=lengths, **self.options)


class SpearmanLoss(LossModule):
    r"""Module of :func:`pyloss.spearman_loss`.

    .. math:: \ell = 1 - \rho(\text{soft ranks of } x, \text{ranks of the target})

    Args:
        reduction, dim, network, distribution, steepness, art_lambda, method, regularization,
            regularization_strength, ties: as for :func:`pyloss.spearman_loss`.

    Shape:
        - x, target: ``(..., n, ...)``
        - mask, lengths: optional, as for the function
        - output: scalar, or the shape of x without ``dim`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.spearman_loss`; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.SpearmanLoss(steepness=20.0)(torch.randn(8, 5), torch.randn(8, 5)).shape
        torch.Size([])

    Reference:
        Blondel, Teboul, Berthet, Djolonga. arXiv 2002.08871.
    """

    @options_of(F.spearman_loss, positional=1, without=PADDING, annotations={"steepness": "float"})
    def __init__(self, **options: Unpack[SpearmanOptions]) -> None:
        F.check_spearman_options(**options)
        super().__init__(**options)

    def forward(
        self,
        x: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        return F.spearman_loss(x, target, mask=mask, lengths=lengths, **self.options)
