"""Physics: slice by slice, and derivatives of models by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    causal_residual_loss,
    causal_weights,
    lagrangian_residual_loss,
    periodic_embedding,
)
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

# --------------------------------------------------------------------------------------------------
# Causal weights


def weights_by_hand(losses, eps, ic_loss=None, ic_weight=1.0) -> Tensor:
    losses = losses.detach()
    flat = losses.reshape(-1, losses.shape[-1])
    start = torch.zeros(()) if ic_loss is None else ic_weight * ic_loss.detach()
    start = start.to(losses).expand(losses.shape[:-1]).reshape(-1)
    found = [
        torch.stack([torch.exp(-eps * (first + sum(row[:i]))) for i in range(len(row))])
        for row, first in zip(flat, start)
    ]
    return torch.stack(found).view(losses.shape)


def residual_by_hand(losses, eps, ic_loss=None, ic_weight=100.0, include_ic=True):
    weights = weights_by_hand(losses, eps, ic_loss if include_ic else None, ic_weight)
    loss = (weights * losses).sum(-1) / losses.shape[-1]
    return (loss if ic_loss is None else loss + ic_weight * ic_loss), weights


def slices(shape=(3, 4), ic=(), eps=0.5, **options) -> Sample:
    """Multiples of 1/8 in (0, 2]."""
    count = torch.Size(shape).numel()
    losses = ((torch.arange(count, dtype=F64) * 5 % 16 + 1) / 8).view(shape)
    first = None if ic is None else torch.full(ic, 0.25, dtype=F64)
    return Sample(dict(losses=losses, ic_loss=first), dict(eps=eps, **options))


CAUSAL_ERRORS = (
    Bad(TypeError, "losses must be a Tensor, got list", dict(losses=[1.0])),
    Bad(TypeError, "losses must be floating, got torch.int64", dict(losses=torch.arange(3))),
    Bad(ValueError, "losses must have at least one dimension", dict(losses=torch.tensor(1.0))),
    Bad(ValueError, "losses must be >= 0, got -1", dict(losses=-torch.ones(3, 4))),
    Bad(TypeError, "ic_loss must be a Tensor, got float", dict(ic_loss=0.5)),
    Bad(ValueError, r"ic_loss must be 0-d or have the shape \[3\], got \[2\]",
        dict(ic_loss=torch.ones(2))),
    Bad(ValueError, "ic_loss must be >= 0, got -2", dict(ic_loss=torch.tensor(-2.0))),
    Bad(ValueError, "eps must be finite and > 0, got 0.0", dict(eps=0.0)),
    Bad(TypeError, "eps must be a number, got str", dict(eps="1")),
    Bad(ValueError, "ic_weight must be finite and >= 0, got -1", dict(ic_weight=-1)),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Periodic inputs


def embedding_by_hand(t, x, period, modes) -> Tensor:
    t, x = t + 0 * x, x + 0 * t
    columns = [t, torch.ones_like(t)]
    for part in (torch.cos, torch.sin):
        columns += [part(2 * math.pi * k * x / period) for k in range(1, modes + 1)]
    return torch.stack(columns, -1)


def places(t=(3, 1), x=(4,), period=1.5, modes=2) -> Sample:
    inputs = dict(t=make_logits(t, F64, scale=0.5), x=make_logits(x, F64, scale=0.5, seed=1))
    return Sample(inputs, dict(period=period, modes=modes))


# --------------------------------------------------------------------------------------------------
# Lagrangian models: u = tanh(U f) V and x = X + s t tanh(P f) Q of features f, or polynomials


class _Net(torch.nn.Module):
    """Of tensors that are no parameters of its own, so that they keep their gradients."""

    def __init__(self, first: Tensor, last: Tensor) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, f: Tensor) -> Tensor:
        return torch.tanh(f @ self.first) @ self.last


def network_loss(labels, times, u_first, u_last, x_first, x_last, period=None, **options):
    model = pyloss.nn.LagrangianPINN(_Net(u_first, u_last), _Net(x_first, x_last), 1.5, period)
    return lagrangian_residual_loss(model, labels, times, velocity=lambda u: 0.5 * u, **options)


def _jets(labels, times, first, last, period):
    """f and its derivatives by X, by t and twice by X, of tanh(F W) V."""
    if period is None:
        one, zero = torch.ones_like(labels), torch.zeros_like(labels)
        f, f_X, f_XX = [labels], [one], [zero]
    else:
        w = 2 * math.pi / period
        c, s = torch.cos(w * labels), torch.sin(w * labels)
        f, f_X, f_XX = [c, s], [-w * s, w * c], [-w * w * c, -w * w * s]
    zero = torch.zeros_like(times)
    z = torch.stack([*f, times], -1) @ first
    z_X = torch.stack([*f_X, zero], -1) @ first
    z_XX = torch.stack([*f_XX, zero], -1) @ first
    h = torch.tanh(z)
    d = 1 - h * h
    value = (h @ last)[..., 0]
    by_X = ((d * z_X) @ last)[..., 0]
    by_t = ((d * first[-1]) @ last)[..., 0]
    by_XX = ((d * z_XX - 2 * h * d * z_X**2) @ last)[..., 0]
    return value, by_X, by_t, by_XX


def network_by_hand(
    labels, times, u_first, u_last, x_first, x_last, period=None, nu=0.0, source=None, u0=None,
    weights=(10.0, 1.0, 1000.0), crossing_weight=1.0, jacobian_correction=True, squared=True,
):  # fmt: skip
    u, u_X, u_t, u_XX = _jets(labels, times, u_first, u_last, period)
    g, g_X, g_t, g_XX = _jets(labels, times, x_first, x_last, period)
    x_t, J, J_X = 1.5 * (g + times * g_t), 1 + 1.5 * times * g_X, 1.5 * times * g_XX
    u_xx = u_XX / J**2 - u_X * J_X / J**3 if jacobian_correction else u_XX

    def norm(r):
        return (r**2).mean() if squared else (r**2).mean() ** 0.5

    s = 0.0 if source is None else source(u)
    total = weights[0] * norm(x_t - 0.5 * u) + weights[1] * norm(u_t - nu * u_xx - s)
    if u0 is not None:
        start = _jets(labels, torch.zeros_like(times), u_first, u_last, period)[0]
        total = total + weights[2] * norm(start - u0(labels))
    return total + crossing_weight * ((-J).clamp(min=0) ** 2).mean() ** (1 if squared else 0.5)


def points(n=3, inputs=2, **options) -> Sample:
    tensors = dict(
        labels=(n,), times=(n,), u_first=(inputs, 2), u_last=(2, 1), x_first=(inputs, 2),
        x_last=(2, 1),
    )  # fmt: skip
    made = {k: make_logits(s, F64, scale=0.6, seed=i) for i, (k, s) in enumerate(tensors.items())}
    return Sample(made | dict(times=made["times"].abs()), options)


POINT = torch.ones(3)
SPECS = (
    Spec(
        function=causal_weights,
        samples={"plain": slices, "no initial loss": lambda: slices((5,), None)},
        reference=weights_by_hand,
        empty={"no slices": Empty(lambda: slices((2, 0)), 0.0, (2, 0))},
        vmap=("losses",),
        nan={"losses": lambda found, clean: bool(
            found[0, 1:].isnan().all() and torch.equal(found[1:], clean[1:]))},
        errors=CAUSAL_ERRORS,
    ),
    Spec(
        function=causal_residual_loss,
        covers=(pyloss.nn.CausalResidualLoss,),
        samples={
            "an initial loss each": lambda: slices(ic=(3,), ic_weight=0.5),
            "not in the weights": lambda: slices((5,), include_ic=False, ic_weight=2.0),
            "no initial loss": lambda: slices((2, 2, 3), None),
            "one slice": lambda: slices((3, 1), (3,), include_ic=False),
        },
        reference=residual_by_hand,
        gradients=("losses", "ic_loss"),
        # The weights are constants: the gradient is not the derivative of the value.
        derivative_samples=("one slice",),
        empty={"no slices": Empty(lambda: slices((2, 0), None), math.nan, (2,))},
        vmap=("losses",),
        nan={"losses": "row", "ic_loss": "row"},
        errors=(*CAUSAL_ERRORS, Bad(TypeError, "include_ic must be a bool", dict(include_ic=1))),
    ),
    Spec(
        function=periodic_embedding,
        samples={"plain": places, "no harmonics": lambda: places(modes=0)},
        reference=embedding_by_hand,
        gradients=("t", "x"),
        empty={"no points": Empty(lambda: places((0,), (0,)), 0.0, (0, 6))},
        vmap=("t", "x"),
        nan={"t": "any", "x": "any"},
        errors=(
            Bad(TypeError, "t must be a Tensor, got float", dict(t=0.5)),
            Bad(TypeError, "x must be floating, got torch.int64", dict(x=torch.arange(4))),
            Bad(ValueError, "period must be finite and > 0, got 0", dict(period=0)),
            Bad(ValueError, "modes must be >= 0, got -1", dict(modes=-1)),
            Bad(TypeError, "modes must be an integer, got float", dict(modes=2.0)),
        ),
    ),
    Spec(
        function=network_loss,
        name="lagrangian_residual_loss",
        covers=(lagrangian_residual_loss, pyloss.nn.LagrangianPINN),
        samples={
            "convection": lambda: points(u0=torch.sin),
            "Burgers, periodic": lambda: points(
                inputs=3, period=3.0, nu=0.3, u0=torch.cos, weights=(1.0, 2.0, 0.5)
            ),
            "by label, with a source": lambda: points(
                nu=0.2, source=torch.square, jacobian_correction=False, squared=False,
                crossing_weight=0.0,
            ),
        },
        reference=network_by_hand,
        gradients=("labels", "times", "u_first", "u_last", "x_first", "x_last"),
        dtypes=(F64, F32),
        autocast={},  # derivatives of products in half types are of no use
        tolerances={F32: (1e-4, 1e-5)},
        derivative_samples=("convection", "Burgers, periodic"),
        compile_samples=("Burgers, periodic",),
        empty={"no points": Empty(lambda: points(0), math.nan)},
        vmap=("labels", "times", "u_first"),
        nan={"labels": "all", "times": "all", "u_first": "all"},
        errors=(
            Bad(TypeError, "labels must be a Tensor, got list", dict(labels=[1.0])),
            Bad(TypeError, "times must be floating", dict(times=torch.arange(3))),
            Bad(ValueError, r"times must have the shape of labels, \[3\], got \[2\]",
                dict(times=POINT[:2])),
            Bad(ValueError, "nu must be finite and >= 0, got -1", dict(nu=-1)),
            Bad(TypeError, "u0 must be callable, got float", dict(u0=1.0)),
            Bad(TypeError, "source must be callable, got int", dict(source=1)),
            Bad(TypeError, "weights must be three numbers, got float", dict(weights=1.0)),
            Bad(ValueError, "weights must be three numbers, got 2", dict(weights=(1.0, 1.0))),
            Bad(ValueError, r"weights\[1\] must be finite and >= 0, got -1",
                dict(weights=(1, -1, 1))),
            Bad(ValueError, "crossing_weight must be finite and >= 0", dict(crossing_weight=-1)),
            Bad(TypeError, "squared must be a bool", dict(squared="yes")),
            Bad(TypeError, "jacobian_correction must be a bool", dict(jacobian_correction=1)),
        ),
    ),
)  # fmt: skip
