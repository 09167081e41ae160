"""Modules of the classification losses; each forward is one call of the functional."""

from __future__ import annotations

from torch import Tensor
from torch.nn import _reduction

from pyloss.functional import classification as F
from pyloss.functional._checks import check_range
from pyloss.functional._options import FormulaOptions, names_of
from pyloss.functional._rows import check_class_weight, check_options, check_probability
from pyloss.nn._module import WeightedLoss

_CHECKED = {*names_of(check_options), *FormulaOptions.__annotations__}


class _RowLoss(WeightedLoss):
    """Finds what is wrong with an option when it is made, as far as no tensor is needed."""

    def __init__(self, weight: Tensor | None, formula: FormulaOptions | None = None, **options):
        given = {**options, **(formula or {})}
        check_options(**{name: x for name, x in given.items() if name in _CHECKED})
        if weight is not None:
            check_class_weight(weight)
        super().__init__(weight, **options)


class CrossEntropyLoss(_RowLoss):
    r"""Module of :func:`pyloss.fused_cross_entropy`; stands in for ``torch.nn.CrossEntropyLoss``.

    .. math:: \ell = -w_y \log \mathrm{softmax}(x)_y

    Args:
        weight: weight of each class, ``(C)``.
        size_average: deprecated, as in torch.
        ignore_index: target value that is left out.
        reduce: deprecated, as in torch.
        reduction: ``"none" | "mean" | "sum"``.
        label_smoothing: in [0, 1].
        **options: the keyword arguments of :func:`pyloss.fused_cross_entropy` except the tensors of
            a call, ``token_weight`` and ``num_items``, which ``forward`` takes.

    Shape:
        - input: ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``
        - target: ``()``, ``(N)``, ``(N, d1, ..., dk)``, or the shape of input for probabilities
        - output: scalar, or the shape of the targets with ``reduction="none"``

    Raises:
        As :func:`pyloss.fused_cross_entropy`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options,
    ) -> None:
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        self._check_names(options, F.fused_cross_entropy)
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **options,
        )

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, F.RowStats]:
        return F.fused_cross_entropy(input, target, self.weight, **self.options, **call)


class CompSumLoss(_RowLoss):
    r"""Module of :func:`pyloss.comp_sum_loss`.

    .. math:: \ell = \frac{e^{(1-\tau) L} - 1}{1-\tau}, \qquad L = -\log \mathrm{softmax}(x)_y

    Args:
        tau: >= 0; 0 sum-exponential, 1 cross entropy, 2 mean absolute error.
        weight: weight of each class, ``(C)``.
        **options: the other keyword arguments of :func:`pyloss.fused_cross_entropy`.

    Shape:
        As :class:`CrossEntropyLoss`.

    Raises:
        As :func:`pyloss.comp_sum_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.CompSumLoss(tau=1.7)(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """

    def __init__(self, tau: float = 1.0, weight: Tensor | None = None, **options) -> None:
        self._check_names(options, F.fused_cross_entropy)
        super().__init__(weight, tau=tau, **options)

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, F.RowStats]:
        return F.fused_cross_entropy(input, target, self.weight, **self.options, **call)


class GeneralizedCrossEntropyLoss(_RowLoss):
    r"""Generalized cross entropy, robust to noisy labels: the comp-sum loss with tau = q + 1.

    .. math:: \ell = \frac{1 - p_y^q}{q}, \qquad p_y \le k:\ \ell = \frac{1 - k^q}{q}

    Args:
        q: exponent, > 0; towards 0 the loss becomes cross entropy, at 1 it is 1 - p_y.
        k: truncation probability in (0, 1], or None.
        weight: weight of each class, ``(C)``.
        **options: the other keyword arguments of :func:`pyloss.fused_cross_entropy`.

    Shape:
        As :class:`CrossEntropyLoss`.

    Raises:
        ValueError: q is not positive; and what :func:`pyloss.fused_cross_entropy` raises.

    Example:
        >>> import torch, pyloss
        >>> gce = pyloss.nn.GeneralizedCrossEntropyLoss(q=0.7, k=0.5)
        >>> gce(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Zhang, Sabuncu. Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
        Labels. arXiv 1805.07836.
    """

    def __init__(
        self, q: float = 0.7, k: float | None = None, weight: Tensor | None = None, **options
    ) -> None:
        check_range("q", q, 0.0, open_low=True)
        if k is not None:
            check_probability("k", k)
        self._check_names(options, F.fused_cross_entropy, without=("tau", "truncate"))
        super().__init__(weight, dict(tau=q + 1.0, truncate=k), q=q, k=k, **options)

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, F.RowStats]:
        options = self.options
        q, k = options.pop("q"), options.pop("k")
        return F.fused_cross_entropy(
            input, target, self.weight, tau=q + 1.0, truncate=k, **options, **call
        )


class FocalLoss(_RowLoss):
    r"""Module of :func:`pyloss.focal_loss`.

    .. math:: \ell = w_y (1 - p_y)^\gamma (-\log p_y)

    Args:
        gamma: focusing exponent, >= 0.
        weight: weight of each class, ``(C)``.
        **options: the other keyword arguments of :func:`pyloss.focal_loss`.

    Shape:
        As :class:`CrossEntropyLoss`, class indices only.

    Raises:
        As :func:`pyloss.focal_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.FocalLoss(gamma=2.0)(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Lin et al. arXiv 1708.02002.
    """

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None, **options) -> None:
        self._check_names(options, F.focal_loss)
        super().__init__(weight, gamma=gamma, **options)

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, F.RowStats]:
        return F.focal_loss(input, target, weight=self.weight, **self.options, **call)


class Poly1Loss(_RowLoss):
    r"""Module of :func:`pyloss.functional.poly1_loss`.

    .. math:: \ell = w_y\, (-\log p_y + \epsilon\, (1 - p_y))

    Args:
        epsilon: >= -1; 0 gives cross entropy.
        weight: weight of each class, ``(C)``.
        **options: the other keyword arguments of :func:`pyloss.focal_loss`.

    Shape:
        As :class:`CrossEntropyLoss`, class indices only.

    Raises:
        As :func:`pyloss.functional.poly1_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.Poly1Loss(2.0)(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Leng et al. arXiv 2204.12511.
    """

    def __init__(self, epsilon: float = 1.0, weight: Tensor | None = None, **options) -> None:
        check_range("epsilon", epsilon, -1.0)
        self._check_names(options, F.poly1_loss)
        super().__init__(weight, epsilon=epsilon, **options)

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, F.RowStats]:
        return F.poly1_loss(input, target, weight=self.weight, **self.options, **call)


class LabelRelaxationLoss(_RowLoss):
    r"""Module of :func:`pyloss.functional.label_relaxation_loss`.

    .. math:: \ell = w_y \min_{q_y \ge 1 - \alpha} \mathrm{KL}(q, p)

    Args:
        alpha: in [0, 1); 0 gives cross entropy.
        weight: weight of each class, ``(C)``.
        **options: the other keyword arguments of :func:`pyloss.focal_loss`.

    Shape:
        As :class:`CrossEntropyLoss`, class indices only.

    Raises:
        As :func:`pyloss.functional.label_relaxation_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.LabelRelaxationLoss(0.1)(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Lienen, Huellermeier. From Label Smoothing to Label Relaxation. AAAI 2021.
    """

    def __init__(self, alpha: float = 0.1, weight: Tensor | None = None, **options) -> None:
        F.check_relaxation(alpha)
        self._check_names(options, F.label_relaxation_loss)
        super().__init__(weight, alpha=alpha, **options)

    def forward(self, input: Tensor, target, **call) -> Tensor | tuple[Tensor, F.RowStats]:
        return F.label_relaxation_loss(input, target, weight=self.weight, **self.options, **call)
