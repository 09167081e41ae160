"""Normalized logistic loss: the reference writes the gradient down."""

from __future__ import annotations

import torch

import pyloss
from pyloss.functional import normalized_logistic_loss
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Sample, Spec


def behind(input, target):
    """(h, which rows count): by how much the target is behind the others."""
    if target.shape == input.shape or input.shape[1:] == (1,):
        return torch.where(target.reshape(input.shape) > 0, -input, input).reshape(-1), None
    hot = torch.nn.functional.one_hot(target.clamp(min=0), input.shape[1]).bool()
    x = input.movedim(1, -1)
    others = x.masked_fill(hot, -torch.inf).logsumexp(-1)
    own = torch.where(hot, x, 0.0).sum(-1)
    return (others - own).reshape(-1), (target != -100).reshape(-1)


def reference(input, target, ignore_index=-100):
    h, counted = behind(input, target)
    if counted is not None:
        h = h[counted]
    wrong = torch.sigmoid(h).detach()
    pull = (wrong * h).sum() / wrong.sum()
    return torch.nn.functional.softplus(h).mean().detach() + pull - pull.detach()


def step(input, target, **options):
    """The loss; and a number with its gradient, which of one row is the derivative of h."""
    loss = normalized_logistic_loss(input, target, **options)
    h = behind(input.detach().to(torch.promote_types(input.dtype, F32)), target)[0].sum()
    return loss.detach(), (h + (loss - loss.detach())).to(loss.dtype)


def step_reference(input, target, **options):
    loss = reference(input, target, **options)
    return loss.detach(), behind(input, target)[0].sum().detach() + (loss - loss.detach())


def sample(*shape: int) -> Sample:
    shape = shape or (4,)
    input = make_logits(shape, F64, scale=2.0)
    g = torch.Generator().manual_seed(1)
    if len(shape) == 1 or shape[1] == 1:
        target = torch.randint(2, shape, generator=g)
    else:
        target = torch.randint(shape[1], shape[:1] + shape[2:], generator=g)
    return Sample(dict(input=input, target=target))


def ignoring() -> Sample:
    found = sample(5, 3)
    found.inputs["target"][1] = -100
    return found


S = sample(4, 3).inputs
SPECS = (
    Spec(
        function=step,
        name="normalized_logistic_loss",
        covers=(normalized_logistic_loss, pyloss.nn.NormalizedLogisticLoss),
        samples={
            "classes": lambda: sample(4, 3),
            "binary": sample,
            "column": lambda: sample(5, 1),
            "pixels": lambda: sample(2, 3, 2, 2),
            "ignored": ignoring,
            "one row": lambda: sample(1, 3),
            "one number": lambda: sample(1),
        },
        # Of several rows the gradient is that of no function.
        derivative_samples=("one row", "one number"),
        compile_samples=("classes", "binary"),
        reference=step_reference,
        gradients=("input",),
        nan={"input": "all"},
        large=lambda: sample(300, 40),
        errors=(
            Bad(TypeError, "input must be a Tensor, got list", dict(input=[1.0])),
            Bad(TypeError, "input must be floating", dict(input=torch.ones(4, 3).long())),
            Bad(ValueError, r"target must have the shape \[4\], got \[3\]",
                dict(target=S["target"][:3])),
            Bad(IndexError, "Target 3 is out of bounds", dict(target=torch.full((4,), 3))),
            Bad(RuntimeError, "expected target dtype to be Long or Byte, but got Float",
                dict(target=torch.ones(4))),
            Bad(ValueError, "target must hold 0 and 1, got 2",
                dict(input=torch.ones(4), target=torch.full((4,), 2))),
            Bad(ValueError, r"target must have the shape of input, \[4, 1\], got \[3\]",
                dict(input=torch.ones(4, 1), target=torch.ones(3))),
            Bad(TypeError, "ignore_index must be an integer", dict(ignore_index="none")),
        ),
    ),
)  # fmt: skip
