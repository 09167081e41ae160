"""Linear decay, the refined schedule and the norms that it is made from."""

from __future__ import annotations

import numpy as np
import torch

from pyloss.optim.lr_scheduler import (
    GradNormRecorder,
    LinearDecay,
    RefinedSchedule,
    refine_schedule,
)
from pyloss.testing import make_logits
from specs._spec import BF16, F16, F32, F64, Bad, Empty, Sample, Spec


def of_runs(grad_norms, *, weights=None, **options):
    """The schedules of several runs, (R, T) norms each."""
    weights = [None] * len(grad_norms) if weights is None else weights
    found = [refine_schedule(n, weights=w, **options) for n, w in zip(grad_norms, weights)]
    return torch.stack(found) if found else grad_norms.new_zeros(grad_norms.shape, dtype=F64)


def of_runs_reference(grad_norms, *, norm="l2", smoothing=0.1, weights=None, mode="closed"):
    return torch.from_numpy(
        np.stack([
            schedule(g[np.isfinite(g)], norm, smoothing, None if weights is None else w, mode)
            for g, w in zip(grad_norms.numpy(), grad_norms if weights is None else weights.numpy())
        ])
    )  # fmt: skip


def schedule(norms, norm, smoothing, weights, mode):
    steps = len(norms)
    if weights is None:
        half = int(smoothing * steps // 2)
        near = [norms[0]] * half + list(norms) + list(norms[::-1][:half])
        smooth = np.array([np.median(near[i : i + 2 * half + 1]) for i in range(steps)])
        weights = smooth**-2 if norm == "l2" else 1 / smooth
    rates = np.array([weights[t] * weights[t + 1 :].sum() for t in range(steps)])
    if mode == "optimal":
        rates = by_newton(np.append(rates[:-1], rates[-2]), weights)
    return rates / rates.max()


def by_newton(rates, weights):
    """The minimiser of the bound, by Newton's method."""

    def bound(logs):
        rate = logs.exp()
        noise = rate.square() / torch.from_numpy(weights)
        total = 0.5 / rate.sum() + 0.5 * noise.sum() / rate.sum()
        for k in range(len(rate) - 1):
            rest = rate[k:].sum()
            total = total + 0.5 * rate[k] / (rest * (rest - rate[k])) * noise[k:].sum()
        return total

    logs = torch.from_numpy(np.log(rates / rates.sum())).clone()
    for _ in range(12):
        slope = torch.func.grad(bound)(logs)
        curve = torch.func.hessian(bound)(logs)
        value, vectors = torch.linalg.eigh(curve)
        logs = logs - (vectors / value.abs().clamp_min(1e-9)) @ (vectors.t() @ slope)
    return logs.exp().numpy()


def runs(steps: int = 12, count: int = 2, **options) -> Sample:
    norms = 0.5 + make_logits((count, steps), F64, scale=1.0, seed=3).abs()
    norms[:, :3] += torch.tensor([8.0, 4.0, 1.0], dtype=F64)
    return Sample(dict(grad_norms=norms), options)


def trained(weight, gradients, *, kind="linear", **options):
    """SGD of fixed gradients, (steps, n), under a schedule: weight, rates, recorded norms."""
    weight = weight.detach().clone().requires_grad_()
    other = torch.zeros_like(weight, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [other], "lr": 0.5}], lr=0.25)
    recorder = GradNormRecorder(optimizer, options.pop("recorded", "l2"))
    make = LinearDecay if kind == "linear" else RefinedSchedule
    scheduler = make(optimizer, **options)
    rates = []
    for gradient in gradients:
        rates.append(scheduler.get_last_lr())
        weight.grad, other.grad = gradient.clone(), gradient.abs()
        optimizer.step()
        scheduler.step()
    rates = torch.tensor(rates, dtype=F64)
    return weight.detach(), other.detach(), rates, recorder.norms.to(weight.dtype)


def trained_reference(weight, gradients, *, kind="linear", recorded="l2", **options):
    steps, total = len(gradients), options["total_steps"]
    if kind == "linear":
        warm, final = options.get("warmup_steps", 0), options.get("final", 0.0)
        points = {-1: 0.0, warm: 1.0, total: final, 10**6: final}
        if not warm:
            del points[-1]
        factors = np.interp(range(steps), list(points), list(points.values()))
    else:
        table = schedule(options["grad_norms"].double().numpy(), "l2", 0.1, None, "closed")
        factors = np.interp([min(t / total, 1.0) for t in range(steps)],
                            np.linspace(0, 1, len(table)), table)  # fmt: skip
    rates = torch.from_numpy(np.stack([0.25 * factors, 0.5 * factors], 1))
    moved = weight - (rates[:, :1] * gradients).sum(0)
    both = torch.cat([gradients, gradients.abs()], 1)
    norms = both.norm(dim=1) if recorded == "l2" else both.abs().sum(1)
    return moved, -(rates[:, 1:] * gradients.abs()).sum(0), rates, norms


def steps(size: int = 3, count: int = 5, **options) -> Sample:
    weight = make_logits((size,), F64, scale=1.0, seed=0)
    gradients = make_logits((count, size), F64, scale=1.0, seed=1)
    return Sample(dict(weight=weight, gradients=gradients), dict(total_steps=4) | options)


N = runs().inputs["grad_norms"]
NORMS = (8.0, 2.0, 1.0, 1.5, 1.0, 1.0, 1.0)
SPECS = (
    Spec(
        function=of_runs,
        name="refine_schedule",
        covers=(refine_schedule,),
        samples={
            "plain": runs,
            "l1, smooth": lambda: runs(20, norm="l1", smoothing=0.4),
            "weights": lambda: runs(5, weights=runs(5, 2).inputs["grad_norms"].square()),
            "optimal": lambda: runs(5, 1, mode="optimal", smoothing=0.0),
        },
        reference=of_runs_reference,
        result=F64,
        tolerances=dict.fromkeys((F64, F32, BF16, F16), (1e-6, 1e-7)),  # of the minimiser
        autocast={},
        empty={"no runs": Empty(lambda: runs(count=0), 0.0, (0, 12))},
        compile="data-dependent|Data dependent|Data-dependent",
        nan={"grad_norms": "raises"},
        errors=(
            Bad(ValueError, "must have one dimension", dict(grad_norms=N[None])),
            Bad(ValueError, "grad_norms must be >= 0, got -", dict(grad_norms=-N)),
            Bad(ValueError, "grad_norms must not all be 0", dict(grad_norms=0 * N)),
            Bad(ValueError, "two finite numbers or more, got 1", dict(grad_norms=N[:, :1])),
            Bad(ValueError, "two finite numbers or more, got 0", dict(grad_norms=N / 0)),
            Bad(TypeError, "grad_norms must be floating", dict(grad_norms=N.long())),
            Bad(ValueError, r"weights must have the shape of grad_norms, \[12\], got \[11\]",
                dict(weights=N[:, 1:])),
            Bad(ValueError, "weights must be finite and > 0", dict(weights=0 * N)),
            Bad(ValueError, "weights must not contain NaN", dict(weights=N * torch.nan)),
            Bad(ValueError, "norm must be one of l1, l2, got 'inf'", dict(norm="inf")),
            Bad(ValueError, "mode must be one of closed, optimal, got 'x'", dict(mode="x")),
            Bad(ValueError, r"smoothing must be in \[0, 1\], got 2", dict(smoothing=2)),
            Bad(ValueError, "smoothing must be finite and >= 0, got -1", dict(smoothing=-1)),
        ),
    ),
    Spec(
        function=trained,
        name="lr_schedulers",
        covers=(GradNormRecorder, LinearDecay, RefinedSchedule),
        samples={
            "linear": steps,
            "warm-up": lambda: steps(warmup_steps=2, final=0.25, recorded="l1"),
            "refined": lambda: steps(kind="refined", grad_norms=torch.tensor(NORMS)),
        },
        reference=trained_reference,
        dtypes=(F64, F32),
        autocast={},
        empty={"no weights": Empty(lambda: steps(0), 0.0, (0,))},
        compile="requires_grad|hook|graph break",
        nan={"weight": "any", "gradients": "any"},
        errors=(
            Bad(ValueError, "total_steps must be at least 1, got 0", dict(total_steps=0)),
            Bad(TypeError, "total_steps must be an integer, got float", dict(total_steps=2.5)),
            Bad(ValueError, r"warmup_steps must be in \[0, total_steps\), total_steps 4, got 4",
                dict(warmup_steps=4)),
            Bad(ValueError, r"final must be in \[0, 1\], got 1.5", dict(final=1.5)),
            Bad(TypeError, "last_epoch must be an integer, got str", dict(last_epoch="1")),
            Bad(ValueError, "norm must be one of l1, l2, got 'l3'", dict(recorded="l3")),
        ),
    ),
)  # fmt: skip
