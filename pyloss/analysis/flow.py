"""How kernels of preactivations, tangent kernels and fluctuations change from layer to layer
(arXiv 2106.10165)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _critical, _gaussian

__all__ = ["KernelFlow", "kernel_flow"]


class KernelFlow(NamedTuple):
    """What :func:`pyloss.analysis.kernel_flow` returns, float64, on the device of x.
    :func:`pyloss.visualize.draw_kernel_flow` draws it.

    Example:
        >>> import torch, pyloss
        >>> found = pyloss.analysis.kernel_flow("relu", torch.ones(1, 3), depth=3)
        >>> [t.flatten().round(decimals=6).tolist() for t in (found.K, found.V)]
        [[2.0, 2.0, 2.0], [0.0, 20.0, 40.0]]
    """

    K: Tensor  #: kernel of each layer, ``(L, B, B)``, at infinite width
    ntk: Tensor  #: neural tangent kernel, ``(L, B, B)``, likewise
    V: Tensor | None  #: four-point vertex of each input, ``(L, B)``: at width n, V / n
    G1: Tensor | None  #: of the kernel at width n, K + G1 / n, ``(L, B)``


@torch.no_grad()
def kernel_flow(
    activation: str | Callable[[Tensor], Tensor],
    x: Tensor,
    depth: int,
    *,
    C_b: float | Tensor | None = None,
    C_W: float | Tensor | None = None,
    order: int = 1,
    lam_b: float | Sequence[float] | Tensor = 1.0,
    lam_W: float | Sequence[float] | Tensor = 1.0,
    residual: float = 0.0,
    dactivation: Callable[[Tensor], Tensor] | None = None,
    kinks: Sequence[float] = (0.0,),
) -> KernelFlow:
    r"""Kernel, tangent kernel and fluctuations of a network, layer by layer.

    .. math::
        K^{(1)} &= C_b + \tfrac{C_W}{n_0} x \cdot x', &
        K^{(l + 1)} &= C_b + C_W \langle s\, s' \rangle_{K^{(l)}} \\
        T^{(1)} &= \lambda_b + \tfrac{\lambda_W}{n_0} x \cdot x', &
        T^{(l + 1)} &= \lambda_b + \lambda_W \langle s\, s' \rangle_{K^{(l)}} +
            C_W \langle \dot s\, \dot s' \rangle_{K^{(l)}} T^{(l)} \\
        V^{(1)} &= 0, &
        V^{(l + 1)} &= \chi_\parallel^2 V^{(l)} +
            C_W^2 (\langle s^4 \rangle - \langle s^2 \rangle^2)

    K is the covariance of a layer's preactivations at two inputs. At width n they are not quite
    Gaussian: :math:`\mathbb{E}[z_i^2 z_j^2] - K^2 = V / n`, and their variance is K + G1 / n, to
    leading order in depth / n. T is the tangent kernel with the rate :math:`\lambda_b` of biases
    and :math:`\lambda_W / \text{fan-in}` of weights.

    Args:
        activation, dactivation, kinks: as for :func:`pyloss.analysis.criticality`; also one
            without a critical point, if ``C_b`` and ``C_W`` are given. Kinks other than at 0 cost
            the kernel of two inputs some digits.
        x: inputs, ``(B, n0)``, floating.
        depth: number of layers L >= 1; the first acts on x, no activation follows the last.
        C_b, C_W: variances, >= 0; default: the critical ones.
        order: 1, or 0 without V and G1.
        lam_b, lam_W: rates >= 0, one or one for each layer.
        residual: g in [0, 1), of layers :math:`g z + W s(z) + b`.

    Returns:
        :class:`pyloss.analysis.KernelFlow`. NaN where x is, and where an activation grows so fast
        that it has no mean.

    Raises:
        TypeError, ValueError: arguments of a wrong type or out of range; an activation without a
            critical point.

    Example:
        >>> import torch, pyloss
        >>> found = pyloss.analysis.kernel_flow("tanh", torch.randn(4, 20), depth=50)
        >>> found.K.shape, bool(found.K[-1].diagonal().max() < 0.02)
        (torch.Size([50, 4, 4]), True)

    Reference:
        Roberts, Yaida, Hanin. The Principles of Deep Learning Theory. arXiv 2106.10165.
    """
    a = _critical.checked_activation(activation, dactivation, kinks)
    checks.check_floating("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (B, n0) with features, got {list(x.shape)}")
    depth = checks.checked_count("depth", depth, 1)
    if checks.checked_integer("order", order) not in (0, 1):
        raise ValueError(f"order must be 0 or 1, got {order}")
    g = _critical.checked_residual(residual)
    if C_b is None or C_W is None:
        point = _critical.with_residual(_critical.solve(a), g)
        C_b, C_W = (point.C_b if C_b is None else C_b), (point.C_W if C_W is None else C_W)
    C_b, C_W = _variance("C_b", C_b), _variance("C_W", C_W)
    rates = list(zip(_rates("lam_b", lam_b, depth), _rates("lam_W", lam_W, depth)))

    x = x.detach().double()
    inner = x @ x.mT / x.shape[1]
    K, T = C_b + C_W * inner, rates[0][0] + rates[0][1] * inner
    V = G1 = x.new_zeros(len(x))
    layers = [(K, T, V, G1)]
    for rate_b, rate_W in rates[1:]:
        at = _critical.brackets(a, K.diagonal())
        signal, slope = _pair_means(a, K, at)
        if order:
            # At K = 0 nothing fluctuates yet.
            live = K.diagonal() != 0
            keeps = g**2 + C_W * torch.where(live, at.grows, 0.0)
            bends = C_W * torch.where(live, at.bends, 0.0)
            G1 = keeps * G1 + bends * V / 2
            new = C_W**2 * (at.fourth - at.square.square())
            if g:  # W s(z) moves with the z that is handed on
                new = new + 4 * g**2 * (keeps - g**2) * K.diagonal().square()
            V = keeps.square() * V + new
        T = rate_b + rate_W * signal + (C_W * slope + g**2) * T
        K = C_b + C_W * signal + g**2 * K
        layers.append((K, T, V, G1))
    K, T, V, G1 = (torch.stack(each) for each in zip(*layers))
    return KernelFlow(K, T, V, G1) if order else KernelFlow(K, T, None, None)


def _pair_means(
    a: _critical.Activation, K: Tensor, at: _critical.Brackets
) -> tuple[Tensor, Tensor]:
    """<s s'> and <s. s.'> of all pairs of inputs, (B, B) each."""
    rows, columns = torch.triu_indices(*K.shape, offset=1, device=K.device).unbind()
    variance = K.diagonal()
    pairs = variance[rows], variance[columns], K[rows, columns]
    if a.slopes is None:
        above = _gaussian.plane_means((a.value, a.slope), *pairs, a.kinks)
    else:
        above = _of_rays(*a.slopes, *pairs)
    found = []
    for on, off in zip((at.square, at.slope_square), above):
        full = torch.diag(on)
        full[rows, columns] = full[columns, rows] = off
        found.append(full)
    return found[0], found[1]


def _of_rays(
    below: float, above: float, first: Tensor, second: Tensor, cross: Tensor
) -> tuple[Tensor, Tensor]:
    """The arc-cosine kernels: of both preactivations on one side of 0, and on different sides."""
    length = first.sqrt() * second.sqrt()
    cosine = torch.where(length > 0, (cross / length).clamp(-1, 1), 0.0 * cross)
    angle = cosine.acos()
    sine = torch.sqrt(1 - cosine.square())
    same, apart = below**2 + above**2, 2 * below * above
    signal = same * (sine + (math.pi - angle) * cosine) - apart * (sine - angle * cosine)
    return (
        length * signal / (2 * math.pi),
        (same * (math.pi - angle) + apart * angle) / (2 * math.pi),
    )


def _variance(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        value = float(checks.one_number(name, value))
    checks.check_range(name, value, 0.0)
    return float(value)


def _rates(name: str, value: float | Sequence[float] | Tensor, depth: int) -> list[float]:
    given = value.tolist() if isinstance(value, Tensor) else value
    try:
        rates = list(given)
    except TypeError:
        rates = [given] * depth
    if len(rates) != depth:
        raise ValueError(
            f"{name} must be one rate or {depth}, one for each layer, got {len(rates)}"
        )
    for rate in rates:
        checks.check_range(name, rate, 0.0)
    return [float(rate) for rate in rates]
