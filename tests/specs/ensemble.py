"""EnsLoss: the reference goes sample by sample, from the definition of the transform."""

from __future__ import annotations

import math

import torch

import pyloss
from pyloss.functional import ens_loss, ens_loss_derivatives
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Sample, Spec


def derivatives(z, *, noise, bc_lambda=0.0, tail=True):
    lam = float(bc_lambda)
    found = torch.empty_like(z)
    magnitudes = []
    for e in noise.flatten().tolist():
        base = 1 + lam * e
        if lam == 0:
            t = math.exp(e)
        elif base <= 0:
            t = math.inf if lam < 0 else 0.0
        else:
            t = base ** (1 / lam)
        magnitudes.append(min(t, 1.0))
    values = z.detach().flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: values[i])
    for i, size in zip(order, sorted(magnitudes, reverse=True)):
        decay = values[i] if tail and values[i] > 1 else 1.0
        found.view(-1)[i] = -size / decay - 1e-6
    return found


def reference(input, target, *, noise, bc_lambda=0.0, tail=True, reduction="mean"):
    z = torch.where(target.reshape(input.shape) > 0, input, -input)
    each = derivatives(z, noise=noise, bc_lambda=bc_lambda, tail=tail) * z
    return each if reduction == "none" else getattr(each, reduction)()


def sample(*shape: int, labels=torch.int64, **options) -> Sample:
    shape = shape or (7,)
    input, noise = (make_logits(shape, F64, scale=1.5, seed=s) for s in (0, 1))
    target = (make_logits(shape, F64, seed=2) > 0).reshape(shape[0], *[1] * (len(shape) - 1))
    return Sample(dict(input=input, target=target.to(labels), noise=noise), options)


def margins(**options) -> Sample:
    given = sample(**options).inputs
    return Sample(dict(z=given["input"], noise=given["noise"]), options)


S = sample().inputs
# A half type rounds margins so that they tie, and which of two gets what is then another matter.
SPECS = (
    Spec(
        function=ens_loss,
        covers=(pyloss.nn.EnsLoss,),
        samples={
            "no tail": lambda: sample(tail=False),
            "tail": lambda: sample(7, 1, reduction="none"),
            "0.5": lambda: sample(bc_lambda=0.5, tail=False, labels=torch.bool, reduction="sum"),
            "-0.9": lambda: sample(bc_lambda=-0.9, labels=F64),
            "a tensor": lambda: sample(bc_lambda=torch.tensor(-0.5, dtype=F64)),
            "a tensor of 0": lambda: sample(bc_lambda=torch.zeros(1, dtype=F64)),
        },
        # Beyond margin 1 the derivative is no more than what is taken for it.
        derivative_samples=("no tail", "0.5"),
        compile_samples=("tail", "a tensor"),
        reference=reference,
        gradients=("input",),
        refused=("target",),
        wide=("noise", "bc_lambda"),
        vmap=("input", "noise"),
        nan={"input": "all"},
        large=lambda: sample(20000),
        tolerances={F32: (1e-5, 1e-6)},
        errors=(
            Bad(TypeError, "input must be a Tensor, got list", dict(input=[1.0])),
            Bad(ValueError, r"input must be \(N,\) or \(N, 1\), got \[7, 2\]",
                dict(input=torch.ones(7, 2))),
            Bad(TypeError, "input must be floating, got torch.int64", dict(input=S["target"])),
            Bad(ValueError, r"target must have the shape of input, \[7\], got \[6\]",
                dict(target=S["target"][:6])),
            Bad(ValueError, "target must hold 0 and 1, got -1", dict(target=2 * S["target"] - 1)),
            Bad(ValueError, "target must hold 0 and 1, got 0.5",
                dict(target=torch.full((7,), 0.5))),
            Bad(ValueError, "bc_lambda must be finite, got inf", dict(bc_lambda=math.inf)),
            Bad(TypeError, "bc_lambda must be a number, got str", dict(bc_lambda="0")),
            Bad(ValueError, r"bc_lambda must be one number, got shape \[2\]",
                dict(bc_lambda=torch.zeros(2))),
            Bad(TypeError, "tail must be a bool, got int", dict(tail=1)),
            Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
            Bad(TypeError, "generator must be a torch.Generator, got int", dict(generator=3)),
            Bad(ValueError, r"noise must have the shape of the scores, \[7\], got \[6\]",
                dict(noise=S["noise"][:6])),
            Bad(TypeError, "noise must be floating", dict(noise=S["target"])),
        ),
    ),
    Spec(
        function=ens_loss_derivatives,
        samples={
            "tail": margins,
            "no tail": lambda: margins(tail=False, bc_lambda=0.5),
            "-0.9": lambda: margins(bc_lambda=-0.9),
        },
        reference=derivatives,
        result="wide",
        wide=("noise",),
        vmap=("z", "noise"),
        nan={"z": "any"},
        tolerances={F32: (1e-5, 1e-6)},
        errors=(
            Bad(TypeError, "z must be a Tensor, got float", dict(z=1.0)),
            Bad(ValueError, r"z must be \(N,\) or \(N, 1\), got \[2, 3\]",
                dict(z=torch.ones(2, 3))),
        ),
    ),
)  # fmt: skip
