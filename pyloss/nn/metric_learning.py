"""Modules of metric learning: losses of labelled embeddings, of episodes, of class directions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import metric_learning as F
from pyloss.functional import metric_learning_episodes as episodes
from pyloss.functional import metric_learning_margins as margins
from pyloss.functional._checks import checked_integer
from pyloss.functional._options import (
    ContrastivePairOptions,
    ICNNOptions,
    MarginSoftmaxOptions,
    MultiSimilarityOptions,
    TCMOptions,
    TripletMarginOptions,
    options_of,
)
from pyloss.nn._module import LossModule, WeightedLoss

_REFERENCE = ("ref_emb", "ref_labels")
_LAST = {"device": "reduction", "dtype": "device"}  # of the arguments that are shown


class _PairLoss(LossModule):
    """A loss of labelled embeddings as a module: the call that all of them have."""

    _loss: Callable[..., Tensor]

    def __init__(self, **options) -> None:
        F.check_pair_options(**options)
        super().__init__(**options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        return self._loss(
            embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, **self.options
        )


class ThresholdConsistentMarginLoss(_PairLoss):
    r"""Module of :func:`pyloss.functional.tcm_loss`: a regulariser beside another loss.

    .. math:: \ell = \lambda^+ \operatorname*{mean}_{P:\; s \le m^+} (m^+ - s)
              + \lambda^- \operatorname*{mean}_{N:\; s \ge m^-} (s - m^-)

    Args:
        m_pos, m_neg, lam_pos, lam_neg: as for the function.

    Shape:
        - embeddings: ``(N, D)``; labels: ``(N,)``
        - ref_emb: ``(M, D)``; ref_labels: ``(M,)``: optional, what they are compared with
        - output: scalar

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ThresholdConsistentMarginLoss()
        >>> criterion(torch.randn(8, 4), torch.arange(8) // 2).shape
        torch.Size([])

    Reference:
        Zhang et al. arXiv 2307.04047.
    """

    _loss = staticmethod(F.tcm_loss)

    @options_of(F.tcm_loss, without=_REFERENCE)
    def __init__(self, **options: Unpack[TCMOptions]) -> None:
        super().__init__(**options)


class ContrastivePairLoss(_PairLoss):
    r"""Module of :func:`pyloss.functional.contrastive_pair_loss`.

    .. math:: \ell = \operatorname*{mean}_{P} (d - m^+)_+ + \operatorname*{mean}_{N} (m^- - d)_+

    Args:
        pos_margin, neg_margin, distance, normalize, average, reduction: as for the function.

    Shape:
        - embeddings: ``(N, D)``; labels: ``(N,)``
        - ref_emb: ``(M, D)``; ref_labels: ``(M,)``: optional, what they are compared with
        - output: scalar, or ``(N,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ContrastivePairLoss()
        >>> criterion(torch.randn(8, 4), torch.arange(8) // 2).shape
        torch.Size([])

    Reference:
        Hadsell, Chopra, LeCun. 2006.
    """

    _loss = staticmethod(F.contrastive_pair_loss)

    @options_of(F.contrastive_pair_loss, without=_REFERENCE)
    def __init__(self, **options: Unpack[ContrastivePairOptions]) -> None:
        super().__init__(**options)


class TripletMarginLoss(_PairLoss):
    r"""Module of :func:`pyloss.functional.triplet_margin_loss`.

    Of a labelled batch, unlike :class:`torch.nn.TripletMarginLoss`, which is given the triplets.

    .. math:: \ell = \operatorname*{mean}_{(a, p, n)} (d_{ap} - d_{an} + m)_+

    Args:
        margin, mining, distance, normalize, average, reduction: as for the function.

    Shape:
        - embeddings: ``(N, D)``; labels: ``(N,)``
        - ref_emb: ``(M, D)``; ref_labels: ``(M,)``: optional, what they are compared with
        - output: scalar, or ``(N,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.TripletMarginLoss()
        >>> criterion(torch.randn(8, 4), torch.arange(8) // 2).shape
        torch.Size([])

    Reference:
        Schroff et al. arXiv 1503.03832; Hermans et al. arXiv 1703.07737.
    """

    _loss = staticmethod(F.triplet_margin_loss)

    @options_of(F.triplet_margin_loss, without=_REFERENCE)
    def __init__(self, **options: Unpack[TripletMarginOptions]) -> None:
        super().__init__(**options)


class MultiSimilarityLoss(_PairLoss):
    r"""Module of :func:`pyloss.functional.multi_similarity_loss`.

    .. math:: \ell_i = \frac1\alpha \log\Big(1 + \sum_{p} e^{-\alpha (s_{ip} - b)}\Big)
              + \frac1\beta \log\Big(1 + \sum_{n} e^{\beta (s_{in} - b)}\Big)

    Args:
        alpha, beta, base, epsilon, reduction: as for the function.

    Shape:
        - embeddings: ``(N, D)``; labels: ``(N,)``
        - ref_emb: ``(M, D)``; ref_labels: ``(M,)``: optional, what they are compared with
        - output: scalar, or ``(N,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.MultiSimilarityLoss()
        >>> criterion(torch.randn(8, 4), torch.arange(8) // 2).shape
        torch.Size([])

    Reference:
        Wang et al. arXiv 1904.06627.
    """

    _loss = staticmethod(F.multi_similarity_loss)

    @options_of(F.multi_similarity_loss, without=_REFERENCE)
    def __init__(self, **options: Unpack[MultiSimilarityOptions]) -> None:
        super().__init__(**options)


class ProtoTripletLoss(LossModule):
    r"""Module of :func:`pyloss.functional.proto_triplet_loss`.

    .. math:: \ell_q = \Big(d(q, p_y) - \min_{c \ne y} d(q, p_c) + m\Big)_+

    Args:
        margin, reduction: as for the function.

    Shape:
        - queries: ``(Q, D)``; query_labels: ``(Q,)``; prototypes: ``(C, D)``
        - output: scalar, or ``(Q,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ProtoTripletLoss(margin=0.5)
        >>> criterion(torch.randn(6, 4), torch.arange(6) % 3, torch.randn(3, 4)).shape
        torch.Size([])

    Reference:
        Mendez-Ruiz et al. arXiv 2305.09062.
    """

    def __init__(self, margin: float = 0.5, *, reduction: str = "mean") -> None:
        episodes.check_proto_options(margin=margin, reduction=reduction)
        super().__init__(margin=margin, reduction=reduction)

    def forward(self, queries: Tensor, query_labels: Tensor, prototypes: Tensor) -> Tensor:
        return episodes.proto_triplet_loss(queries, query_labels, prototypes, **self.options)


class ICNNLoss(LossModule):
    r"""Module of :func:`pyloss.functional.icnn_loss`.

    .. math:: \ell = -\log \mathrm{score}

    Args:
        k, neighbours, use_omega: as for :func:`pyloss.functional.icnn_score`.

    Shape:
        - embeddings: ``(N, D)``; labels: ``(N,)``
        - targets: ``(M, D)``; target_labels: ``(M,)``: optional, what neighbours are taken from
        - output: scalar

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ICNNLoss(k=3)
        >>> criterion(torch.randn(10, 4), torch.arange(10) % 2).shape
        torch.Size([])

    Reference:
        Mendez-Ruiz et al. arXiv 2305.09062.
    """

    @options_of(episodes.icnn_loss, without=("targets", "target_labels"))
    def __init__(self, **options: Unpack[ICNNOptions]) -> None:
        episodes.check_icnn_options(**options)
        super().__init__(**options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        target_labels: Tensor | None = None,
    ) -> Tensor:
        return episodes.icnn_loss(embeddings, labels, targets, target_labels, **self.options)


class _MarginSoftmax(WeightedLoss):
    """A direction for each class, and the loss of the cosines with them."""

    _loss: Callable[..., Tensor]
    _most = math.inf  # of the margin

    def __init__(self, num_classes, embedding_size, device, dtype, *, weight, **options) -> None:
        margins.check_margin_options(most=self._most, **options)
        super().__init__(weight, **options)
        for name, value in (("num_classes", num_classes), ("embedding_size", embedding_size)):
            if checked_integer(name, value) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_classes, self.embedding_size = int(num_classes), int(embedding_size)
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"weight must have the shape {[num_classes]}, got {list(weight.shape)}"
            )
        size = (self.num_classes, self.embedding_size)
        self.linear_weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions at random; their lengths have no part."""
        nn.init.normal_(self.linear_weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self._loss(input, self.linear_weight, target, weight=self.weight, **self.options)

    def extra_repr(self) -> str:
        return f"{self.num_classes}, {self.embedding_size}, {super().extra_repr()}"


class ArcFaceLoss(_MarginSoftmax):
    r"""Module of :func:`pyloss.functional.arcface_loss`, with the directions of the classes.

    .. math:: \ell = -\log \frac{e^{s \cos(\theta_y + m)}}{e^{s \cos(\theta_y + m)}
              + \sum_{c \ne y} e^{s \cos \theta_c}}

    Args:
        num_classes, embedding_size: C and D.
        margin, scale, weight, ignore_index, label_smoothing, reduction: as for the function;
            the margin is in radians.
        device, dtype: of the parameter ``linear_weight``, ``(C, D)``, drawn from a normal
            distribution.

    Shape:
        - input: ``(N, D)``; target: ``(N,)``
        - output: scalar, or ``(N,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ArcFaceLoss(10, 16, margin=0.5, scale=30.0)
        >>> criterion(torch.randn(8, 16), torch.arange(8)).shape
        torch.Size([])

    Reference:
        Deng et al. arXiv 1801.07698.
    """

    _loss = staticmethod(margins.arcface_loss)
    _most = math.pi

    @options_of(margins.arcface_loss, positional=2, after=_LAST)
    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MarginSoftmaxOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, device, dtype, **options)


class CosFaceLoss(_MarginSoftmax):
    r"""Module of :func:`pyloss.functional.cosface_loss`, with the directions of the classes.

    .. math:: \ell = -\log \frac{e^{s (\cos \theta_y - m)}}{e^{s (\cos \theta_y - m)}
              + \sum_{c \ne y} e^{s \cos \theta_c}}

    Args:
        num_classes, embedding_size: C and D.
        margin, scale, weight, ignore_index, label_smoothing, reduction: as for the function;
            the margin is that of a cosine.
        device, dtype: of the parameter ``linear_weight``, ``(C, D)``, drawn from a normal
            distribution.

    Shape:
        - input: ``(N, D)``; target: ``(N,)``
        - output: scalar, or ``(N,)`` with ``reduction="none"``

    Raises:
        As the function; of an option when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.CosFaceLoss(10, 16, margin=0.35, scale=30.0)
        >>> criterion(torch.randn(8, 16), torch.arange(8)).shape
        torch.Size([])

    Reference:
        Wang et al. arXiv 1801.09414.
    """

    _loss = staticmethod(margins.cosface_loss)

    @options_of(margins.cosface_loss, positional=2, after=_LAST)
    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MarginSoftmaxOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, device, dtype, **options)
