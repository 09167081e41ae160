"""Activations and where deep networks of them are critical: what pyloss.analysis.critical and
pyloss.nn.init share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _gaussian

# What is said of the kinds is in the docstring of pyloss.analysis.criticality.
SCALE_INVARIANT, ZERO, HALF_STABLE = "scale_invariant", "zero", "half_stable"

_LOW, _HIGH, _STARTS = 0.01, 100.0, 241  # of K, where half-stable points are looked for
_HALVINGS = 80
_FAR = 10.0  # standard deviations, beyond which there must be next to nothing
_FLAT = 1e-9  # of a function that is 0 but for rounding, beside its parts


class Activation(NamedTuple):
    """s, its derivative, and where they have kinks."""

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = (0.0,)
    slopes: tuple[float, float] | None = None  #: of z < 0 and z > 0, if it is made of two rays


class Point(NamedTuple):
    """The critical point of an activation; K_star is NaN if any K is fixed."""

    kind: str
    C_b: float
    C_W: float
    K_star: float
    nu: float


def _gelu_slope(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def two_rays(below: float, above: float, name: str) -> Activation:
    """below z for z < 0, above z for z > 0."""

    def slope(z: Tensor) -> Tensor:
        return torch.where(z > 0, above, torch.full_like(z, below))

    return Activation(name, lambda z: z * slope(z), slope, slopes=(below, above))


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        two_rays(1.0, 1.0, "linear"),
        two_rays(0.0, 1.0, "relu"),
        Activation("tanh", torch.tanh, lambda z: 1 - torch.tanh(z).square()),
        Activation("sin", torch.sin, torch.cos),
        Activation("erf", torch.erf, lambda z: 2 / math.sqrt(math.pi) * torch.exp(-z.square())),
        Activation("gelu", torch.nn.functional.gelu, _gelu_slope),
        Activation("silu", torch.nn.functional.silu, _silu_slope),
        Activation("sigmoid", torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
        Activation("softplus", torch.nn.functional.softplus, torch.sigmoid),
    )
}


def checked_activation(
    activation: str | Callable[[Tensor], Tensor],
    dactivation: Callable[[Tensor], Tensor] | None = None,
    kinks: Sequence[float] = (0.0,),
) -> Activation:
    """Of a name or a function."""
    if dactivation is not None and not callable(dactivation):
        raise TypeError(f"dactivation must be callable, got {type(dactivation).__name__}")
    if isinstance(activation, str):
        checks.check_one_of("activation", activation, ACTIVATIONS, then=", or a function; ")
        if dactivation is not None:
            raise ValueError(f"dactivation goes with a function, not with {activation!r}")
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(f"activation must be a name or callable, got {type(activation).__name__}")
    kinks = _checked_kinks(kinks)
    name = getattr(activation, "__name__", type(activation).__name__)
    value = _same_shape(activation, "activation")
    if dactivation is None:
        slope = functools.partial(_derivative, value)
    else:
        slope = _same_shape(dactivation, "dactivation")
    found = Activation(name, value, slope, kinks)
    rays = _rays(found)
    return found if rays is None else found._replace(slopes=rays)


def _checked_kinks(kinks: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(kinks)
    except TypeError:
        raise TypeError(f"kinks must be a list of numbers, got {type(kinks).__name__}") from None
    for kink in found:
        checks.check_number("kinks", kink)
        if not math.isfinite(kink):
            raise ValueError(f"kinks must be finite, got {kink}")
    return tuple(float(kink) for kink in found)


def _same_shape(f: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def checked(z: Tensor) -> Tensor:
        y = f(z)
        if not isinstance(y, Tensor) or y.shape != z.shape:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{name} must return a tensor of the shape {list(z.shape)} that it gets, got {got}"
            )
        return y.double()

    return checked


def _derivative(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        y = f(z)
        if not y.requires_grad:
            return torch.zeros_like(z)
        return torch.autograd.grad(y.sum(), z)[0].detach()


def _rays(a: Activation) -> tuple[float, float] | None:
    """The two slopes of a function that is homogeneous, s(t z) = t s(z) for t > 0."""
    z = torch.logspace(-3, 3, 25, dtype=torch.float64)
    with torch.no_grad():
        below, above = a.value(-z) / -z, a.value(z) / z
    for slope in (below, above):
        if not bool(((slope - slope[12]).abs() <= 1e-12 * slope[12].abs()).all()):
            return None
    return float(below[12]), float(above[12])


# --------------------------------------------------------------------------------------------------
# Brackets: means over a preactivation z ~ N(0, K), K (B,)


class Brackets(NamedTuple):
    """<s^2>, <s'^2>, <s^4>, d<s^2>/dK, d^2<s^2>/dK^2, (B,) each."""

    square: Tensor
    slope_square: Tensor
    fourth: Tensor
    grows: Tensor
    bends: Tensor


@torch.no_grad()
def brackets(a: Activation, K: Tensor) -> Brackets:
    z, w = _gaussian.line(K, a.kinks)
    s = a.value(z)
    square = s.square()
    u = z.square() / K.unsqueeze(1)  # NaN at K = 0
    far = (u > _FAR**2).double()

    def mean(f: Tensor) -> Tensor:
        each = w * f
        size = each.abs()
        # A function that grows so fast has its mean beyond the nodes.
        return torch.where((size * far).sum(1) > _FLAT * size.sum(1), math.nan, each.sum(1))

    return Brackets(
        square=mean(square),
        slope_square=mean(a.slope(z).square()),
        fourth=mean(square.square()),
        grows=mean(square * (u - 1)) / (2 * K),
        bends=mean(square * (u.square() - 6 * u + 3)) / (4 * K.square()),
    )


# --------------------------------------------------------------------------------------------------
# The critical point


def solve(a: Activation) -> Point:
    """Raises ValueError where there is none."""
    return _of_name(a.name) if ACTIVATIONS.get(a.name) is a else _solve(a)


@functools.lru_cache
def _of_name(name: str) -> Point:
    return _solve(ACTIVATIONS[name])


def _solve(a: Activation) -> Point:
    if a.slopes is not None:
        return _of_rays(*a.slopes, a.name)
    return _slope_at_zero(a) or _half_stable(a)


def _of_rays(below: float, above: float, name: str) -> Point:
    second, fourth = (below**2 + above**2) / 2, (below**4 + above**4) / 2
    if second == 0:
        raise ValueError(f"{name} has no critical point: it is 0")
    return Point(SCALE_INVARIANT, 0.0, 1 / second, math.nan, 3 * fourth / second**2 - 1)


def _slope_at_zero(a: Activation) -> Point | None:
    """K* = 0: s is 0 and has a derivative there, and K falls to it."""
    near = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    with torch.no_grad():
        value, slope = a.value(near), a.slope(near)
    s1 = float(slope[1])
    if value[1] != 0 or s1 == 0 or bool(((slope - s1).abs() > 1e-6 * abs(s1)).any()):
        return None
    K = torch.tensor([1e-4, 1e-2, 1e-1], dtype=torch.float64)
    kept = brackets(a, K).square / (s1**2 * K)
    if not (bool((kept < 1 + 1e-12).all()) and float(kept[2]) < 1 - 1e-12):
        return None
    return Point(ZERO, 0.0, 1 / s1**2, 0.0, 2 / 3)


def _excess(a: Activation, K: Tensor) -> Tensor:
    """d<s^2>/dK over <s'^2>, less 1: both susceptibilities are 1 together where it is 0."""
    b = brackets(a, K)
    return b.grows / b.slope_square - 1


def _half_stable(a: Activation) -> Point:
    K = torch.logspace(math.log10(_LOW), math.log10(_HIGH), _STARTS, dtype=torch.float64)
    e = _excess(a, K)
    clear = (e[:-1].abs() > _FLAT) & (e[1:].abs() > _FLAT)
    for i in ((e[:-1] * e[1:] < 0) & clear).nonzero().flatten().tolist():
        low, high, sign = K[i], K[i + 1], e[i].sign()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            same = _excess(a, middle.reshape(1))[0].sign() == sign
            low, high = (middle, high) if same else (low, middle)
        b = brackets(a, low.reshape(1))
        C_W = 1 / float(b.slope_square)
        C_b = float(low) - C_W * float(b.square)
        if C_b >= 0:
            nu = C_W**2 * float(b.fourth - b.square.square()) / float(low) ** 2
            return Point(HALF_STABLE, C_b, C_W, float(low), nu)
    raise ValueError(
        f"{a.name} has no critical point: no K in [{_LOW:g}, {_HIGH:g}] has both susceptibilities 1"
    )


def checked_residual(residual: float) -> float:
    checks.check_range("residual", residual, 0.0)
    if residual >= 1:
        raise ValueError(f"residual must be in [0, 1), got {residual}")
    return float(residual)


def with_residual(point: Point, g: float) -> Point:
    """Of layers g z + W s(z) + b."""
    kept = 1 - g**2
    if point.kind == ZERO:
        nu = point.nu * (1 - g**4)
    else:
        nu = kept * (kept * point.nu + 4 * g**2)
    return point._replace(C_b=kept * point.C_b, C_W=kept * point.C_W, nu=nu)
