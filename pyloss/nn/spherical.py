"""Modules of the spherical losses; each forward is one call of the functional."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyloss.functional import _spherical as checks
from pyloss.functional import spherical as F
from pyloss.functional._rows import check_class_weight, check_options
from pyloss.nn._module import WeightedLoss


class _SphericalLoss(WeightedLoss):
    """Finds what is wrong with an option when it is made, as far as no tensor is needed."""

    _function: Callable[..., Tensor]

    def __init__(self, weight: Tensor | None, ignore_index: int, reduction: str, **own) -> None:
        check_options(ignore_index=ignore_index, reduction=reduction)
        if weight is not None:
            check_class_weight(weight)
        super().__init__(weight, **own, ignore_index=ignore_index, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self._function(input, target, weight=self.weight, **self._options)


class _PlainLoss(_SphericalLoss):
    """One without options of its own."""

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(weight, ignore_index, reduction)


class SphericalZLoss(_SphericalLoss):
    r"""Module of :func:`pyloss.functional.spherical_z_loss`, the Z-loss.

    .. math:: \ell = \frac{w_y}{a} \log\left(1 + e^{a (b - z_y)}\right), \qquad
              z_y = \frac{o_y - \mu}{\sigma}

    Args:
        a: > 0, the sharpness.
        b: the z-score from which the loss decreases.
        weight: weight of each class, ``(C)``.
        ignore_index: target value that is left out.
        reduction: ``"none" | "mean" | "sum"``.

    Shape:
        - input: ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``
        - target: ``()``, ``(N)`` or ``(N, d1, ..., dk)``
        - output: scalar, or the shape of the targets with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.spherical_z_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SphericalZLoss(a=0.5, b=3.0)
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        de Brebisson, Vincent. arXiv 1604.08859.
    """

    _function = staticmethod(F.spherical_z_loss)

    def __init__(
        self,
        a: float = 1.0,
        b: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        checks.check_slope(a, b)
        super().__init__(weight, ignore_index, reduction, a=a, b=b)


class OneHotMSELoss(_PlainLoss):
    r"""Module of :func:`pyloss.functional.one_hot_mse_loss`.

    .. math:: \ell = w_y \sum_j (o_j - [j = y])^2

    Args:
        weight: weight of each class, ``(C)``.
        ignore_index: target value that is left out.
        reduction: ``"none" | "mean" | "sum"``.

    Shape:
        As :class:`SphericalZLoss`.

    Raises:
        As :func:`pyloss.functional.one_hot_mse_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.OneHotMSELoss()
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Vincent, de Brebisson, Bouthillier. arXiv 1412.7091.
    """

    _function = staticmethod(F.one_hot_mse_loss)


class TaylorSoftmaxLoss(_PlainLoss):
    r"""Module of :func:`pyloss.functional.taylor_softmax_loss`.

    .. math:: \ell = -w_y \log \frac{1 + o_y + \tfrac12 o_y^2}
              {\sum_j \left(1 + o_j + \tfrac12 o_j^2\right)}

    Args:
        weight: weight of each class, ``(C)``.
        ignore_index: target value that is left out.
        reduction: ``"none" | "mean" | "sum"``.

    Shape:
        As :class:`SphericalZLoss`.

    Raises:
        As :func:`pyloss.functional.taylor_softmax_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.TaylorSoftmaxLoss()
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        de Brebisson, Vincent. arXiv 1511.05042.
    """

    _function = staticmethod(F.taylor_softmax_loss)


class SphericalSoftmaxLoss(_SphericalLoss):
    r"""Module of :func:`pyloss.functional.spherical_softmax_loss`.

    .. math:: \ell = -w_y \log \frac{o_y^2 + \epsilon}{\sum_j \left(o_j^2 + \epsilon\right)}

    Args:
        eps: > 0.
        weight: weight of each class, ``(C)``.
        ignore_index: target value that is left out.
        reduction: ``"none" | "mean" | "sum"``.

    Shape:
        As :class:`SphericalZLoss`.

    Raises:
        As :func:`pyloss.functional.spherical_softmax_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SphericalSoftmaxLoss()
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        de Brebisson, Vincent. arXiv 1511.05042.
    """

    _function = staticmethod(F.spherical_softmax_loss)

    def __init__(
        self,
        eps: float = 1e-3,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        checks.check_eps(eps)
        super().__init__(weight, ignore_index, reduction, eps=eps)


class SphericalLoss(_SphericalLoss):
    r"""Module of :func:`pyloss.functional.spherical_loss`: a spherical loss of one's own.

    .. math:: \ell = w_y\, f(o_y, s, q), \qquad s = \sum_j o_j, \qquad q = \sum_j o_j^2

    Args:
        fn: of three tensors of one shape; returns the loss of each row.
        weight: weight of each class, ``(C)``.
        ignore_index: target value that is left out.
        reduction: ``"none" | "mean" | "sum"``.

    Shape:
        As :class:`SphericalZLoss`.

    Raises:
        As :func:`pyloss.functional.spherical_loss`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SphericalLoss(lambda o, s, q: q.log() - 2 * o.abs().log())
        >>> criterion(torch.randn(4, 10), torch.randint(10, (4,))).shape
        torch.Size([])

    Reference:
        Vincent, de Brebisson, Bouthillier. arXiv 1412.7091.
    """

    _function = staticmethod(F.spherical_loss)

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor, Tensor], Tensor],
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        checks.check_function(fn)
        super().__init__(weight, ignore_index, reduction, fn=fn)
