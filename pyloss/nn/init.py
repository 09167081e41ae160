"""Initial values of weights, in place, as ``torch.nn.init``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyloss.functional import _checks as checks
from pyloss.functional import _critical

__all__ = ["critical_"]

Target = TypeVar("Target", bound=Tensor | nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@torch.no_grad()
def critical_(
    module_or_tensor: Target,
    activation: str | Callable[[Tensor], Tensor] = "relu",
    *,
    residual: float = 0.0,
    leaky_slope: float = 0.0,
    generator: torch.Generator | None = None,
) -> Target:
    r"""Draws weights and biases with which a signal neither dies nor explodes in a deep network.

    .. math:: W \sim \mathcal{N}(0, C_W / \text{fan-in}), \qquad b \sim \mathcal{N}(0, C_b)

    with the variances of :func:`pyloss.analysis.criticality`. Biases are 0 but for activations
    such as GELU and SiLU.

    Args:
        module_or_tensor: a weight ``(out, in, ...)``, floating; or a module, in which every
            ``nn.Linear``, convolution and transposed convolution is drawn anew and all else,
            norms and embeddings among it, stays as it is. Parametrized weights are assigned, so
            that they must be of a parametrization that takes that. Meta tensors stay untouched.
        activation: of the network: a name or a function as for
            :func:`pyloss.analysis.criticality`, or ``"leaky_relu"``.
        residual: g in [0, 1), of layers :math:`g z + W s(z) + b`.
        leaky_slope: of ``"leaky_relu"``, at z < 0.
        generator: of the random numbers, on the device of the weights; default: torch's own.

    Returns:
        What was given. Half types are drawn in float32 and rounded.

    Raises:
        ValueError: an activation without a critical point, such as ``"sigmoid"``; an option out
            of range; a weight of fewer than two dimensions; a lazy layer that has seen no input.
        TypeError: neither a floating tensor nor a module.

    Example:
        >>> import torch, pyloss
        >>> net = torch.nn.Sequential(
        ...     *(m for _ in range(50) for m in (torch.nn.Linear(300, 300), torch.nn.ReLU()))
        ... )
        >>> net = pyloss.nn.init.critical_(net, "relu")
        >>> 0.1 < net(torch.randn(50, 300)).square().mean().item() < 3
        True
        >>> w = pyloss.nn.init.critical_(torch.empty(200, 100), "tanh")
        >>> round(w.std().item(), 2)
        0.1

    Reference:
        Roberts, Yaida, Hanin. The Principles of Deep Learning Theory. arXiv 2106.10165.
    """
    residual = _critical.checked_residual(residual)
    checks.check_range("leaky_slope", leaky_slope, 0.0)
    checks.check_generator(generator)
    point = _point(activation, float(leaky_slope))
    point = _critical.with_residual(point, residual)
    if isinstance(module_or_tensor, nn.Module):
        seen: set[int] = set()
        for name, layer in module_or_tensor.named_modules():
            if isinstance(layer, _LAYERS):
                _check_has_shape(name, layer)
                # Layers that share a weight draw it once; a parametrized one is made at each look.
                if parametrize.is_parametrized(layer, "weight") or id(layer.weight) not in seen:
                    seen.add(id(layer.weight))
                    _draw_layer(layer, point, generator)
        return module_or_tensor
    if not isinstance(module_or_tensor, Tensor):
        raise TypeError(
            f"module_or_tensor must be a Tensor or a Module, got {type(module_or_tensor).__name__}"
        )
    weight = module_or_tensor
    checks.check_floating("module_or_tensor", weight)
    if weight.dim() < 2:
        raise ValueError(
            f"a weight must have at least 2 dimensions for its fan-in, got {list(weight.shape)}"
        )
    if not weight.is_meta:
        weight.copy_(_drawn(weight, point.C_W, math.prod(weight.shape[1:]), generator))
    return weight


def _point(activation: str | Callable[[Tensor], Tensor], leaky_slope: float) -> _critical.Point:
    if activation == "leaky_relu":
        return _critical.solve(_critical.two_rays(leaky_slope, 1.0, "leaky_relu"))
    if leaky_slope:
        raise ValueError(f"leaky_slope goes with 'leaky_relu', not with {activation!r}")
    if isinstance(activation, str):
        known = ("leaky_relu", *_critical.ACTIVATIONS)
        checks.check_one_of("activation", activation, known, then=", or a function; ")
    return _critical.solve(_critical.checked_activation(activation))


def _check_has_shape(name: str, layer: nn.Module) -> None:
    for own in ("weight", "bias"):
        if isinstance(getattr(layer, own), nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f"{own} of the layer {name!r} has no shape yet: call the module once before"
            )


def _draw_layer(
    layer: nn.Module, point: _critical.Point, generator: torch.Generator | None
) -> None:
    weight = layer.weight
    if weight.is_meta:
        return
    fan_in = math.prod(weight.shape[1:])
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...), a stride between its inputs
        taps = math.prod(weight.shape[2:]) / math.prod(layer.stride)
        fan_in = layer.in_channels / layer.groups * taps
    _assign(layer, "weight", _drawn(weight, point.C_W, fan_in, generator))
    if layer.bias is not None:
        _assign(layer, "bias", _drawn(layer.bias, point.C_b, 1, generator))


def _drawn(
    like: Tensor, variance: float, fan_in: float, generator: torch.Generator | None
) -> Tensor:
    if variance == 0 or fan_in == 0:
        return torch.zeros_like(like)
    wide = torch.promote_types(like.dtype, torch.float32)
    new = torch.empty_like(like, dtype=wide)
    return new.normal_(0.0, math.sqrt(variance / fan_in), generator=generator)


def _assign(layer: nn.Module, name: str, value: Tensor) -> None:
    if parametrize.is_parametrized(layer, name):
        setattr(layer, name, value.to(getattr(layer, name).dtype))
    else:
        getattr(layer, name).copy_(value)
