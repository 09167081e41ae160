"""Label distributionally robust losses, with their formulas written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import aldr_loss, ldr_loss
from pyloss.testing import make_logits, make_target
from specs._spec import F64, Bad, Empty, Sample, Spec


def rows(n: int = 4, classes: int = 5, ignored: float = 0.0, **options) -> Sample:
    shape = (n, classes)
    y = make_target(shape, ignore_fraction=ignored)
    return Sample(dict(input=make_logits(shape, F64, scale=1.5), target=y), options)


def weight() -> Tensor:
    return torch.linspace(0.5, 2.0, 5, dtype=F64)


def table() -> Tensor:
    return torch.linspace(0.0, 0.6, 25, dtype=F64).reshape(5, 5)


def volume(**options) -> Sample:
    shape = (2, 3, 2)
    return Sample(
        dict(input=make_logits(shape, F64, scale=1.5), target=make_target(shape)), options
    )


def normalized(x: Tensor, how: str | None) -> Tensor:
    if how is None:
        return x
    size = x.abs() if how == "l1" else torch.nn.functional.softplus(x)
    x = x if how == "l1" else size
    return x / size.mean(1, keepdim=True)


def deltas(input, target, margin, normalize, ignore_index) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of delta, label, which count)"""
    x = input.movedim(1, -1).reshape(-1, input.shape[1])
    y = target.reshape(-1)
    counts = y != ignore_index
    y = torch.where(counts, y, 0)
    x = normalized(x, normalize)
    delta = x - x.gather(1, y[:, None])
    c = margin[y] if isinstance(margin, Tensor) else torch.full_like(delta, margin)
    return delta + c.scatter(1, y[:, None], 0.0), y, counts


def reduced(each, y, counts, weight, reduction, shape) -> Tensor:
    w = torch.ones_like(each) if weight is None else weight[y]
    w = torch.where(counts, w, 0.0)
    each = torch.where(counts, w * each, 0.0)
    if reduction == "none":
        return each.reshape(shape)
    return each.sum() / w.sum() if reduction == "mean" else each.sum()


def capped(delta: Tensor, lam: float, k: int) -> Tensor:
    """The optimum by bisection for the one number that scales what is not capped: p = min(1/k,
    e^(delta / lam + t)). One differentiable evaluation follows."""
    classes = delta.shape[1]
    if lam == 0:
        return delta.sort(1, descending=True).values[:, :k].mean(1)
    z = delta.detach() / lam
    low, high = -z.amax(1, keepdim=True) - 50, -z.amin(1, keepdim=True) + 50
    for _ in range(120):
        t = (low + high) / 2
        much = torch.exp(z + t).clamp(max=1 / k).sum(1, keepdim=True) > 1
        low, high = torch.where(much, low, t), torch.where(much, t, high)
    p = torch.exp(z + low).clamp(max=1 / k)
    return (p * delta).sum(1) - lam * (p * torch.log(p * classes)).sum(1)


def ldr(input, target, lam=1.0, margin=0.0, topk=None, normalize=None, weight=None,
        ignore_index=-100, reduction="mean") -> Tensor:  # fmt: skip
    delta, y, counts = deltas(input, target, margin, normalize, ignore_index)
    if topk is None:
        each = lam * (torch.logsumexp(delta / lam, 1) - math.log(delta.shape[1]))
    else:
        each = capped(delta, lam, topk)
    return reduced(each, y, counts, weight, reduction, target.shape)


def fixed_point(delta: Tensor, lam0: float, alpha: float) -> Tensor:
    """By the plain iteration, whose last step carries the derivative of the solution."""
    classes = delta.shape[1]
    kappa = alpha * math.log(classes) / lam0

    def step(delta: Tensor, lam: Tensor) -> Tensor:
        log_p = torch.log_softmax(delta / lam[:, None], 1)
        return lam0 - (log_p.exp() * (log_p + math.log(classes))).sum(1) / kappa

    with torch.no_grad():
        lam = torch.full_like(delta[:, 0], lam0)
        for _ in range(400):
            lam = step(delta, lam)
        nearby = 1e-6
        slope = (step(delta, lam + nearby) - step(delta, lam - nearby)) / (2 * nearby)
    return lam + (step(delta, lam) - lam) / (1 - slope)


def aldr(input, target, lam0=1.0, alpha=2.0, margin=0.0, lam=None, normalize="l1",
         return_lambda=False, weight=None, ignore_index=-100, reduction="mean"):  # fmt: skip
    delta, y, counts = deltas(input, target, margin, normalize, ignore_index)
    classes = delta.shape[1]
    found = fixed_point(delta, lam0, alpha)
    each = found * (torch.logsumexp(delta / found[:, None], 1) - math.log(classes))
    each = each - alpha * math.log(classes) / (2 * lam0) * (found - lam0) ** 2
    loss = reduced(each, y, counts, weight, reduction, target.shape)
    found = torch.where(counts, found, lam0).detach().reshape(target.shape)
    return (loss, found) if return_lambda else loss


X, Y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)

ERRORS = (
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
    Bad(TypeError, "target must be a Tensor", dict(target=[1])),
    Bad(ValueError, "takes class indices, not probabilities", dict(target=X)),
    Bad(ValueError, r"batch_size \(4\) to match target batch_size \(3\)", dict(target=Y[:3])),
    Bad(IndexError, "Target 5 is out of bounds", dict(target=Y + 5)),
    Bad(ValueError, "margin must be finite and >= 0", dict(margin=-0.1)),
    Bad(ValueError, r"margin must be a number or a table \(C, C\)", dict(margin=torch.ones(5))),
    Bad(ValueError, "margin must be a table of the 5 classes", dict(margin=torch.ones(4, 4))),
    Bad(ValueError, "margin must be >= 0 for every pair", dict(margin=-torch.ones(5, 5))),
    Bad(ValueError, "normalize must be None, 'l1' or 'softplus'", dict(normalize="l2")),
    Bad(ValueError, "average is not a valid value for reduction", dict(reduction="average")),
    Bad(RuntimeError, "either for all 5 classes", dict(weight=torch.ones(4))),
)  # fmt: skip

EMPTY = {
    "mean": Empty(lambda: rows(0), math.nan),
    "sum": Empty(lambda: rows(0, reduction="sum"), 0.0),
    "none": Empty(lambda: rows(0, reduction="none"), 0.0, (0,)),
    "all ignored": Empty(lambda: rows(ignored=1.0), math.nan),
}

COMMON = dict(
    gradients=("input",), wide=("weight",), empty=EMPTY, nan={"input": "all"},
    vmap=("input", "target"), large=lambda: rows(300, 500),
)  # fmt: skip

SPECS = (
    Spec(
        function=ldr_loss,
        module=pyloss.nn.LDRLoss,
        same_signature=True,
        samples={
            "plain": rows,
            "lam": lambda: rows(lam=0.3, margin=0.5, ignored=0.3, weight=weight()),
            "none": lambda: rows(lam=10.0, reduction="none", normalize="l1"),
            "table": lambda: rows(lam=2.0, margin=table(), normalize="softplus"),
            "topk": lambda: rows(lam=0.7, margin=0.1, topk=2, weight=weight(), ignored=0.3),
            "volume": lambda: volume(lam=0.5, margin=0.2, reduction="sum"),
        },
        reference=ldr,
        errors=(
            *ERRORS,
            Bad(ValueError, "lam must be finite and > 0", dict(lam=0.0)),
            Bad(ValueError, "topk must be at least 1", dict(topk=0)),
            Bad(ValueError, "topk must be at most the 5 classes", dict(topk=6)),
        ),
        **COMMON,
    ),
    Spec(
        function=aldr_loss,
        module=pyloss.nn.ALDRLoss,
        samples={
            "plain": rows,
            "not normalized": lambda: rows(normalize=None, lam0=3.0, reduction="none"),
            "weighted": lambda: rows(alpha=1.5, margin=0.3, ignored=0.3, weight=weight()),
            "table": lambda: rows(lam0=2.0, margin=table(), normalize="softplus"),
            "volume": lambda: volume(margin=0.2, reduction="sum"),
        },
        reference=aldr,
        errors=(
            *ERRORS,
            Bad(ValueError, "lam0 must be finite and > 0", dict(lam0=0.0)),
            Bad(ValueError, "alpha must be finite and > 1", dict(alpha=1.0)),
        ),
        **COMMON,
    ),
)  # fmt: skip
