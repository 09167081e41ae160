"""Losses of logits at an input and at a moved one."""

from __future__ import annotations

import math

import torch

from pyloss.functional import margin_shift, smooth_adversarial_comp_sum
from pyloss.testing import make_logits
from specs._spec import BF16, F16, F64, Bad, Empty, Sample, Spec


def reduced(each, target, reduction, ignore_index):
    if reduction == "none":
        return each
    total = each.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def shift_of_rows(logits, logits_adv, target, *, squared=False, ignore_index=-100,
                  reduction="none"):  # fmt: skip
    """Row by row, pair by pair."""
    if logits.dim() == 1:
        logits, logits_adv, target = logits[None], logits_adv[None], target.reshape(1)
        shape = ()
    else:
        shape = target.shape
    classes = logits.shape[1]
    x, a = (t.movedim(1, -1).reshape(-1, classes) for t in (logits, logits_adv))
    rows = []
    for i, y in enumerate(target.flatten().tolist()):
        if y == ignore_index:
            rows.append(x.new_zeros(()))
            continue
        others = [j for j in range(classes) if j != y]
        moved = (a[i, y] - a[i, others]) - (x[i, y] - x[i, others])
        rows.append((moved**2).sum() if squared else moved.norm())
    each = torch.stack(rows).view(shape) if rows else x.new_zeros(shape)
    return reduced(each, target, reduction, ignore_index)


def smooth_reference(logits, logits_adv, target, tau=1.0, rho=1.0, nu=1.0, *, ignore_index=-100,
                     reduction="mean"):  # fmt: skip
    first = []
    for i, y in enumerate(target.tolist()):
        if y == ignore_index:
            first.append(logits.new_zeros(()))
            continue
        z = logits[i] / rho
        u = sum(((z[j] - z[y]).exp() for j in range(len(z)) if j != y), z.new_zeros(()))
        first.append((1 + u).log() if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau))
    first = torch.stack(first) if first else logits.new_zeros(0)
    shift = shift_of_rows(logits, logits_adv, target, ignore_index=ignore_index)
    return reduced(first + nu * shift, target, reduction, ignore_index)


def sample(shape=(4, 5), target=None, **options) -> Sample:
    logits, logits_adv = (make_logits(shape, F64, scale=1.0, seed=s) for s in (0, 1))
    if target is None:
        rows = (shape[0], *shape[2:])
        target = (torch.arange(math.prod(rows)) * 3 % shape[1]).view(rows)
    return Sample(dict(logits=logits, logits_adv=logits_adv, target=target), options)


S = sample().inputs
COMMON = dict(
    gradients=("logits", "logits_adv"),
    vmap=("logits", "logits_adv", "target"),
)
ERRORS = (
    Bad(TypeError, "logits must be a Tensor, got list", dict(logits=[1.0])),
    Bad(TypeError, "logits_adv must be floating, got torch.int64",
        dict(logits_adv=torch.ones(4, 5).long())),
    Bad(ValueError, r"logits_adv must have the shape of logits, \[4, 5\], got \[4, 4\]",
        dict(logits_adv=S["logits_adv"][:, 1:])),
    Bad(RuntimeError, "expected target dtype to be Long or Byte, but got Float",
        dict(target=torch.ones(4))),
    Bad(ValueError, r"Expected input batch_size \(4\) to match target batch_size \(3\)",
        dict(target=torch.zeros(3).long())),
    Bad(IndexError, "Target 5 is out of bounds", dict(target=torch.tensor([0, 1, 5, 2]))),
    Bad(TypeError, "ignore_index must be an integer, got float", dict(ignore_index=1.5)),
    Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
)  # fmt: skip

SPECS = (
    Spec(
        function=margin_shift,
        samples={
            "plain": sample,
            "squared": lambda: sample(squared=True, reduction="sum"),
            "positions": lambda: sample((2, 4, 3), reduction="mean"),
            "ignored": lambda: sample(
                target=torch.tensor([0, -1, 4, -1]), ignore_index=-1, reduction="mean"
            ),
            "one row": lambda: sample((6,), target=torch.tensor(2)),
        },
        compile_samples=("positions",),
        reference=shift_of_rows,
        empty={
            "no rows": Empty(lambda: sample((0, 3)), 0.0, (0,)),
            "no rows, mean": Empty(lambda: sample((0, 3), reduction="mean"), math.nan),
        },
        nan={"logits": "row", "logits_adv": "row"},
        large=lambda: sample((300, 400)),
        errors=(
            *ERRORS,
            Bad(TypeError, "squared must be a bool, got int", dict(squared=2)),
        ),
        **COMMON,
    ),
    Spec(
        function=smooth_adversarial_comp_sum,
        samples={
            "plain": sample,
            "tau": lambda: sample(tau=1.7, rho=2.0, nu=3.0, reduction="none"),
            "sum": lambda: sample(tau=0.0, rho=0.5, nu=0.0, reduction="sum"),
            "ignored": lambda: sample(target=torch.tensor([0, -1, 4, -1]), ignore_index=-1),
        },
        reference=smooth_reference,
        empty={"no rows": Empty(lambda: sample((0, 3)), math.nan)},
        nan={"logits": "all", "logits_adv": "all"},
        large=lambda: sample((300, 400)),
        # The gradients of the two terms are rounded before they are added.
        tolerances={BF16: (2e-2, 2e-3), F16: (2e-3, 2e-4)},
        errors=(
            *ERRORS,
            Bad(ValueError, "tau must be finite and >= 0, got -1", dict(tau=-1)),
            Bad(ValueError, "rho must be finite and > 0, got 0", dict(rho=0)),
            Bad(ValueError, "nu must be finite and >= 0, got -1", dict(nu=-1)),
        ),
        **COMMON,
    ),
)
