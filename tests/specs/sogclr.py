"""SogCLR: the reference goes anchor by anchor, and exponentiates as it stands."""

from __future__ import annotations

import math

import torch

import pyloss
from pyloss.functional import sogclr_loss
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def sogclr_reference(
    z1, z2, log_u, *, temperature=0.1, gamma=0.9, rho=0.0, bimodal=False, center_positive=True,
    normalize=True, reduction="mean",
):  # fmt: skip
    """(loss, new log u, gradient of the temperature, value of the batch)."""
    if normalize:
        z1, z2 = (z / z.norm(dim=1, keepdim=True) for z in (z1, z2))
    count = len(z1)
    tau = torch.as_tensor(temperature, dtype=z1.dtype).expand(log_u.shape)
    tau, u = (t if bimodal else t.expand(2, count) for t in (tau, log_u.exp()))
    losses, values, new, slopes = (torch.zeros(2, count, dtype=z1.dtype) for _ in range(4))
    for view, (own, other) in enumerate(((z1, z2), (z2, z1))):
        for i in range(count):
            rest = [j for j in range(count) if j != i]
            negatives = other[rest] if bimodal else torch.cat([own[rest], other[rest]])
            positive = own[i] @ other[i]
            h = negatives @ own[i] - positive
            t = tau[view, i]
            values[view, i] = (t * h.div(t).exp().mean().log() + rho * t).detach()
            inner = h if center_positive else negatives @ own[i]
            g = inner.detach().div(t).exp()
            moved = (1 - gamma) * u[view, i] + gamma * g.mean() if u[view, i] > 0 else g.mean()
            weights = g / len(g) / moved
            losses[view, i] = (weights * inner).sum() - (0 if center_positive else positive)
            new[view, i] = moved
            slopes[view, i] = moved.log() + rho - (weights * inner.detach() / t).sum()
    each = losses.sum(0)
    if reduction != "none":
        each = each.sum() / (max(1, count) if reduction == "mean" else 1)
    new = new.log() if bimodal else new.mean(0).log()
    return each, new, slopes if bimodal else slopes.mean(0), values.sum() / max(1, count)


def step(z1, z2, log_u, **options):
    """The value of the batch with the gradient of the loss: with gamma 1 that is its derivative."""
    loss, stats = sogclr_loss(z1, z2, log_u, **options)
    value = (stats.value.to(loss.dtype) + (loss - loss.detach())).to(loss.dtype)
    return value, stats.log_u, stats.temperature_grad


def step_reference(z1, z2, log_u, **options):
    loss, log_u, slope, value = sogclr_reference(z1, z2, log_u, **options)
    return value + (loss - loss.detach()), log_u, slope


def sample(rows: int = 4, seen: bool = True, **options) -> Sample:
    z1, z2 = (make_logits((rows, 3), F64, scale=1.0, seed=s) for s in (0, 1))
    shape = (2, rows) if options.get("bimodal") else (rows,)
    log_u = make_logits(shape, F64, scale=1.0, seed=2)
    if not seen:
        log_u[..., ::2] = -math.inf
    return Sample(dict(z1=z1, z2=z2, log_u=log_u), dict(temperature=0.5) | options)


S = sample().inputs
SPECS = (
    Spec(
        function=step,
        name="sogclr_loss",
        covers=(sogclr_loss, pyloss.nn.SogCLRLoss, pyloss.nn.ISogCLRLoss),
        samples={
            "exact": lambda: sample(gamma=1.0),
            "exact, bimodal": lambda: sample(
                3, gamma=1.0, bimodal=True, temperature=torch.full((2, 3), 0.4, dtype=F64)
            ),
            "average": sample,
            "first visits": lambda: sample(
                5, seen=False, gamma=0.7, rho=0.3,
                temperature=torch.linspace(0.2, 0.6, 5, dtype=F64),
            ),
            "bimodal": lambda: sample(3, seen=False, bimodal=True, gamma=0.4, rho=1.0),
            "positive outside": lambda: sample(center_positive=False, gamma=0.6),
            "bimodal, outside": lambda: sample(3, center_positive=False, gamma=0.6, bimodal=True),
            "products": lambda: sample(normalize=False, temperature=2.0, reduction="sum"),
            "gamma on the device": lambda: sample(gamma=torch.tensor(0.3, dtype=F64)),
        },
        # Averages of other batches are no function of this one.
        derivative_samples=("exact", "exact, bimodal"),
        compile_samples=("first visits", "bimodal"),
        reference=step_reference,
        gradients=("z1", "z2"),
        wide=("log_u", "temperature"),
        empty={"no samples": Empty(lambda: sample(0), 0.0)},
        vmap=("z1", "z2", "log_u"),
        nan={"z1": "all", "z2": "all", "log_u": "all"},
        large=lambda: sample(300),
        tolerances={F32: (1e-4, 1e-5)},
        errors=(
            Bad(TypeError, "z1 must be a Tensor, got list", dict(z1=[1.0])),
            Bad(ValueError, r"z1 must be \(N, D\), got \[3\]", dict(z1=S["z1"][0])),
            Bad(ValueError, "z2 must have as many rows as z1, 4, got 3", dict(z2=S["z2"][:3])),
            Bad(ValueError, "one sample, which has no negatives",
                dict(z1=S["z1"][:1], z2=S["z2"][:1], log_u=S["log_u"][:1])),
            Bad(ValueError, r"log_u must have the shape \[4\], got \[3\]",
                dict(log_u=S["log_u"][:3])),
            Bad(ValueError, r"log_u must have the shape \[2, 4\], got \[4\]", dict(bimodal=True)),
            Bad(TypeError, "log_u must be floating", dict(log_u=torch.arange(4))),
            Bad(ValueError, "temperature must be finite and > 0, got 0", dict(temperature=0)),
            Bad(ValueError, r"temperature must hold one number, got shape \[3\]",
                dict(temperature=torch.ones(3))),
            Bad(RuntimeError, "not differentiable with respect to temperature",
                dict(temperature=torch.ones(4, requires_grad=True))),
            Bad(ValueError, r"gamma must be in \(0, 1\], got 1.5", dict(gamma=1.5)),
            Bad(ValueError, "gamma must be finite and > 0, got 0.0", dict(gamma=0.0)),
            Bad(ValueError, "rho must be finite and >= 0, got -1", dict(rho=-1)),
            Bad(ValueError, "ring needs a group", dict(ring=True)),
            Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
        ),
    ),
)  # fmt: skip
