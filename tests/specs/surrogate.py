"""Target surrogates, and the optimizer that minimises them."""

from __future__ import annotations

import torch

from pyloss.functional import target_surrogate_loss
from pyloss.optim import SSO
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def surrogate_reference(output, output_ref, grad_ref, eta, *, divergence="l2", reduction="sum"):
    eta = float(eta)
    total = (output * grad_ref.detach()).sum()
    if divergence == "l2":
        total = total + (output - output_ref.detach()).pow(2).sum() / (2 * eta)
    else:
        before, now = output_ref.detach().log_softmax(-1), output.log_softmax(-1)
        total = total + (before.exp() * (before - now)).sum() / eta
    return total / max(1, len(output)) if reduction == "mean" else total


def sample(rows: int = 3, eta: float | torch.Tensor = 0.5, **options) -> Sample:
    z, ref, grad = (make_logits((rows, 4), F64, scale=1.0, seed=s) for s in range(3))
    return Sample(dict(output=z, output_ref=ref, grad_ref=grad), dict(eta=eta) | options)


def optimised(weight, x, y, *, steps=3, **options):
    """Least squares by SSO: the weight, and the losses before each step."""
    weight = weight.detach().clone().requires_grad_()
    optimizer = SSO([weight], **options)
    losses = [optimizer.step(lambda: (x @ weight, lambda z: (z - y).square().sum() / 2))
              for _ in range(steps)]  # fmt: skip
    return weight.detach(), torch.stack(losses)


def optimised_reference(
    weight, x, y, *, lr, steps=3, inner_steps=10, eta=1.0, eta_schedule="constant", total_steps=1
):
    losses, squares = [], 0.0
    for t in range(steps):
        residual = x @ weight - y
        losses.append(residual.square().sum() / 2)
        squares = squares + residual.square().sum()
        rate = dict(constant=1.0, stochastic=(t + 1) ** -0.5, adagrad=squares**-0.5,
                    exponential=total_steps ** (-t / total_steps))[eta_schedule] * eta  # fmt: skip
        anchor = x @ weight
        for _ in range(inner_steps):
            weight = weight - lr * x.t() @ (residual + (x @ weight - anchor) / rate)
    return weight, torch.stack(losses)


def problem(rows: int = 5, **options) -> Sample:
    x = make_logits((rows, 2), F64, scale=1.0, seed=1)
    inputs = dict(weight=make_logits((2,), F64, scale=1.0, seed=0), x=x,
                  y=make_logits((rows,), F64, scale=1.0, seed=2))  # fmt: skip
    return Sample(inputs, dict(lr=0.05) | options)


S, P = sample().inputs, problem().inputs
SPECS = (
    Spec(
        function=target_surrogate_loss,
        samples={
            "l2": sample,
            "l2, mean": lambda: sample(eta=torch.tensor([2.0], dtype=F64), reduction="mean"),
            "kl": lambda: sample(divergence="kl"),
            "kl, mean": lambda: sample(divergence="kl", reduction="mean", eta=3.0),
        },
        compile_samples=("l2, mean", "kl"),
        reference=surrogate_reference,
        gradients=("output",),
        vmap=("output", "output_ref", "grad_ref"),
        empty={
            "no samples": Empty(lambda: sample(0), 0.0),
            "no samples, mean": Empty(lambda: sample(0, reduction="mean"), 0.0),
            "no samples, kl": Empty(lambda: sample(0, divergence="kl"), 0.0),
        },
        nan={"output": "all", "output_ref": "all", "grad_ref": "all"},
        threads=False,
        errors=(
            Bad(TypeError, "output must be a Tensor, got list", dict(output=[1.0])),
            Bad(TypeError, "output_ref must be floating", dict(output_ref=torch.ones(3, 4).long())),
            Bad(ValueError, r"grad_ref must have the shape of output, \[3, 4\], got \[2, 4\]",
                dict(grad_ref=S["grad_ref"][:2])),
            Bad(ValueError, "eta must be finite and > 0, got 0", dict(eta=0)),
            Bad(ValueError, r"eta must be one number, got shape \[2\]", dict(eta=torch.ones(2))),
            Bad(TypeError, "eta must be a number, got NoneType", dict(eta=None)),
            Bad(ValueError, "divergence must be one of l2, kl, got 'js'", dict(divergence="js")),
            Bad(ValueError, "none is not a valid value for reduction", dict(reduction="none")),
            Bad(ValueError, r"output must have classes, got the shape \[3, 0\]",
                {k: v[:, :0] for k, v in S.items()} | dict(divergence="kl")),
        ),
    ),
    Spec(
        function=optimised,
        name="SSO",
        covers=(SSO,),
        samples={
            "plain": problem,
            "one step": lambda: problem(inner_steps=1, steps=5, eta=0.3),
            "stochastic": lambda: problem(inner_steps=4, eta_schedule="stochastic", eta=0.5),
            "exponential": lambda: problem(eta_schedule="exponential", total_steps=4),
            "adagrad": lambda: problem(eta_schedule="adagrad", eta=2.0),
        },
        reference=optimised_reference,
        dtypes=(F64, F32),
        autocast={},
        compile="requires_grad|hook|graph break",
        empty={"no rows": Empty(lambda: Sample(
            dict(problem(0).inputs, weight=torch.zeros(2, dtype=F64)), {}), 0.0, (2,))},
        nan={"weight": "all", "x": "all", "y": "all"},
        errors=(
            Bad(ValueError, "inner must be one of sgd, armijo, got 'adam'", dict(inner="adam")),
            Bad(ValueError, "inner_steps must be at least 1, got 0", dict(inner_steps=0)),
            Bad(TypeError, "inner_steps must be an integer, got float", dict(inner_steps=2.0)),
            Bad(ValueError, "eta must be finite and > 0, got -1", dict(eta=-1)),
            Bad(TypeError, "eta must be a number, got Tensor", dict(eta=torch.ones(()))),
            Bad(ValueError, "eta_schedule must be one of constant, stochastic",
                dict(eta_schedule="cosine")),
            Bad(ValueError, "total_steps is for eta_schedule='exponential', which needs it, got "
                "None", dict(eta_schedule="exponential")),
            Bad(ValueError, "got 5 and 'constant'", dict(total_steps=5)),
            Bad(ValueError, "divergence must be one of l2, kl, got 2", dict(divergence=2)),
            Bad(ValueError, "lr must be finite and >= 0, got -0.1", dict(lr=-0.1)),
        ),
    ),
)  # fmt: skip
