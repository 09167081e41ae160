"""SGD with rates by Lanczos."""

from __future__ import annotations

import torch

from pyloss.optim import LanczosSGD
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def optimised(weight, x, y, *, count=3, **options):
    """Logistic regression: the weight, and the losses before each step."""
    weight = weight.detach().clone().requires_grad_()
    optimizer = LanczosSGD([weight], **options)
    losses = [optimizer.step(lambda: torch.nn.functional.softplus(-y * (x @ weight)).sum())
              for _ in range(count)]  # fmt: skip
    return weight.detach(), torch.stack(losses)


def optimised_reference(
    weight, x, y, *, count=3, every=100, lr=0.5, momentum=0.0, weight_decay=0.0
):
    """With the Hessian written down; it is not negative, and so damps nothing."""
    losses, buffer = [], torch.zeros_like(weight)
    for t in range(count):
        z = y * (x @ weight)
        losses.append(-torch.nn.functional.logsigmoid(z).sum())
        p = torch.sigmoid(-z)
        if t % every == 0:
            top = torch.linalg.eigvalsh(x.T @ ((p * (1 - p) * y * y)[:, None] * x))[-1]
        buffer = momentum * buffer - x.T @ (p * y) + weight_decay * weight
        weight = weight - lr * 2 * (1 - momentum) / (top + weight_decay) * buffer
    return weight, torch.stack(losses)


def problem(rows: int = 5, **options) -> Sample:
    x = make_logits((rows, 2), F64, scale=1.0, seed=1)
    inputs = dict(weight=make_logits((2,), F64, scale=1.0, seed=0), x=x,
                  y=make_logits((rows,), F64, scale=1.0, seed=2))  # fmt: skip
    return Sample(inputs, options)


SPECS = (
    Spec(
        function=optimised,
        name="LanczosSGD",
        covers=(LanczosSGD,),
        samples={
            "plain": problem,
            "momentum": lambda: problem(momentum=0.9, weight_decay=0.1, every=2),
        },
        reference=optimised_reference,
        dtypes=(F64, F32),
        autocast={},
        compile="requires_grad|hook|graph break",
        empty={"no rows": Empty(lambda: Sample(
            dict(problem(0).inputs, weight=torch.zeros(2, dtype=F64)), {}), 0.0, (2,))},
        nan={"weight": "all", "x": "all", "y": "all"},
        errors=(
            Bad(ValueError, "lr must be finite and >= 0, got -0.1", dict(lr=-0.1)),
            Bad(ValueError, "every must be >= 1, got 0", dict(every=0)),
            Bad(TypeError, "steps must be an integer, got float", dict(steps=2.0)),
            Bad(ValueError, r"momentum must be in \[0, 1\), got 1.0", dict(momentum=1.0)),
            Bad(ValueError, "weight_decay must be finite and >= 0, got -1", dict(weight_decay=-1)),
            Bad(ValueError, "damping must be 'auto' or a number, got 'none'",
                dict(damping="none")),
            Bad(ValueError, "damping must be finite and >= 0, got -1", dict(damping=-1)),
            Bad(ValueError, "noise, batch_size and curvature_batch_size go together, got 1.0, "
                "None and None", dict(noise=1.0)),
            Bad(ValueError, "population goes with noise, got 9 and no noise", dict(population=9)),
            Bad(ValueError, "population must be at least the batch, 8, got 4",
                dict(noise=1.0, batch_size=8, curvature_batch_size=2, population=4)),
        ),
    ),
)  # fmt: skip
