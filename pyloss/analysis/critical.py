"""Critical initialisation: the variances of weights and biases with which a signal neither dies
nor explodes in a deep network, and how deep a network of a given width may be (arXiv 2106.10165).

Weights of a layer are N(0, C_W / fan_in), biases N(0, C_b). Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _critical

__all__ = ["Criticality", "criticality", "optimal_aspect_ratio", "optimal_depth"]

Activation = str | Callable[[Tensor], Tensor]


class Criticality(NamedTuple):
    """What :func:`pyloss.analysis.criticality` finds; numbers are 0-d float64 tensors.

    Example:
        >>> import pyloss
        >>> found = pyloss.analysis.criticality("tanh")
        >>> found.kind, found.C_W.item(), found.K_star.item()
        ('zero', 1.0, 0.0)
    """

    kind: str  #: ``"scale_invariant"``, ``"zero"`` or ``"half_stable"``
    C_b: Tensor  #: variance of biases
    C_W: Tensor  #: variance of weights, times fan_in
    K_star: Tensor  #: fixed point of the kernel; NaN if any is one
    nu: Tensor  #: growth of fluctuations, V / K^2 ~ nu depth


def criticality(
    activation: Activation,
    dactivation: Callable[[Tensor], Tensor] | None = None,
    *,
    residual: float = 0.0,
    kinks: Sequence[float] = (0.0,),
) -> Criticality:
    r"""The critical initialisation of an activation: where both susceptibilities are 1.

    .. math::
        \chi_\parallel = \frac{C_W}{2 K^2} \langle s^2 (z^2 - K) \rangle_K, \qquad
        \chi_\perp = C_W \langle s'(z)^2 \rangle_K, \qquad
        K = C_b + C_W \langle s^2 \rangle_K

    Three kinds have it. ``"scale_invariant"``, lines with a kink at 0: every K is fixed,
    :math:`C_W = 2 / (a_+^2 + a_-^2)`. ``"zero"``, such as tanh: s(0) = 0, and K falls to 0 like
    one over the depth, :math:`C_W = 1 / s'(0)^2`. ``"half_stable"``, such as GELU and SiLU: a
    fixed point K > 0 with :math:`C_b > 0`, reached from one side.

    Args:
        activation: ``"linear"``, ``"relu"``, ``"tanh"``, ``"sin"``, ``"erf"``, ``"gelu"``,
            ``"silu"``; or a function of a float64 tensor that keeps its shape, such as
            ``nn.LeakyReLU(0.2)``, which is classified and solved by quadrature.
        dactivation: derivative of a function; default: torch's.
        residual: g in [0, 1), of layers :math:`g z + W s(z) + b`.
        kinks: where a function has kinks, so that the quadrature is exact.

    Returns:
        :class:`pyloss.analysis.Criticality`. For half-stable kinds nu is
        :math:`C_W^2 (\langle s^4 \rangle - \langle s^2 \rangle^2) / K^2` at the fixed point.

    Raises:
        ValueError: no critical point, as for ``"sigmoid"`` and ``"softplus"``; an unknown name.
        TypeError: something that is no function.

    Example:
        >>> import torch, pyloss
        >>> pyloss.analysis.criticality("gelu").C_b
        tensor(0.1729, dtype=torch.float64)
        >>> pyloss.analysis.criticality(torch.nn.LeakyReLU(0.5)).C_W
        tensor(1.6000, dtype=torch.float64)

    Reference:
        Roberts, Yaida, Hanin. The Principles of Deep Learning Theory. arXiv 2106.10165.
    """
    a = _critical.checked_activation(activation, dactivation, kinks)
    g = _critical.checked_residual(residual)
    point = _critical.with_residual(_critical.solve(a), g)
    return Criticality(point.kind, *(torch.tensor(v, dtype=torch.float64) for v in point[1:]))


def optimal_aspect_ratio(
    activation: Activation, n_out: int = 1, *, residual: float = 0.0
) -> Tensor:
    r"""Depth over width at which a critical network is best, by mutual information.

    .. math:: r^* = \frac{4}{(20 + 3\, n_{out})\, \nu}

    Args:
        activation: as for :func:`pyloss.analysis.criticality`.
        n_out: number of outputs, >= 1.
        residual: g in [0, 1), of layers :math:`g z + W s(z) + b`.

    Returns:
        0-d, float64.

    Raises:
        TypeError, ValueError: as :func:`pyloss.analysis.criticality`; ``n_out`` below 1.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.optimal_aspect_ratio("relu", n_out=10)
        tensor(0.0160, dtype=torch.float64)

    Reference:
        Roberts, Yaida, Hanin. The Principles of Deep Learning Theory. arXiv 2106.10165.
    """
    n_out = checks.checked_count("n_out", n_out, 1)
    return 4 / ((20 + 3 * n_out) * criticality(activation, residual=residual).nu)


def optimal_depth(
    activation: Activation, width: int, n_out: int = 1, *, residual: float = 0.0
) -> int:
    r"""The best number of layers of a critical network.

    .. math:: L \approx r^* n

    rounded, and at least 1. See :func:`pyloss.analysis.optimal_aspect_ratio`.

    Args:
        activation, n_out, residual: as for :func:`pyloss.analysis.optimal_aspect_ratio`.
        width: n >= 1, of the hidden layers.

    Returns:
        An int.

    Raises:
        As :func:`pyloss.analysis.optimal_aspect_ratio`; ``width`` below 1.

    Example:
        >>> import pyloss
        >>> [pyloss.analysis.optimal_depth(name, width=500) for name in ("relu", "tanh")]
        [17, 130]

    Reference:
        Roberts, Yaida, Hanin. The Principles of Deep Learning Theory. arXiv 2106.10165.
    """
    width = checks.checked_count("width", width, 1)
    return max(1, round(width * float(optimal_aspect_ratio(activation, n_out, residual=residual))))
