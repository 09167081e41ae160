"""Losses of rows of logits: cross entropy and all its options, and the named members of the family.

Cross entropy is compared with `pyloss.reference`, the others with their closed form. What the
kernels do at sizes, layouts and edges is in `test_row_softmax*.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from row_softmax_cases import make_options
from torch import Tensor

import pyloss
from pyloss.functional import (
    RowStats,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
    label_relaxation_loss,
    poly1_loss,
)
from pyloss.reference import row_softmax
from pyloss.testing import make_logits, make_target
from specs._spec import F64, Bad, Empty, Sample, Spec

SHAPE = (4, 5)
PER_CALL = ("token_weight", "num_items", "return_stats")  # a module gets these when called


def case(name: str, shape: tuple[int, ...] = SHAPE, **options) -> Sample:
    """A case of `row_softmax_cases`."""
    target, kwargs = make_options(name, shape, F64)
    kwargs |= options
    inputs = dict(input=make_logits(shape, F64, scale=1.5), target=target)
    inputs |= {k: kwargs.pop(k) for k in PER_CALL if k in kwargs}
    return Sample(inputs, kwargs)


def plain(rows: int = 4, classes: int = 5, ignored: float = 0.0, **options) -> Sample:
    shape = (rows, classes)
    y = make_target(shape, ignore_fraction=ignored)
    return Sample(dict(input=make_logits(shape, F64, scale=1.5), target=y), options)


def mixup(**options) -> Sample:
    y = make_target(SHAPE)
    inputs = dict(input=make_logits(SHAPE, F64, scale=1.5), target=(y, y.flip(0), 0.3))
    return Sample(inputs, options)


def class_weight() -> Tensor:
    return torch.linspace(0.5, 2.0, 5, dtype=F64)


def cross_entropy_reference(input, target, weight=None, entropy_weight=0.0, **options):
    result = row_softmax(input, target, weight, **options)
    if entropy_weight:
        return result + entropy_weight * mean_entropy(input, target, **options)
    if not options.get("return_stats"):
        return result
    loss, stats = result
    return loss, RowStats(**stats | dict(z_loss=stats["z_loss"].detach()))


def mean_entropy(input, target, token_weight=None, reduction="mean", num_items=None, **options):
    log_p = (input / options.get("temperature", 1.0)).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    kept = target != options.get("ignore_index", -100)
    k = torch.where(kept, 1.0 if token_weight is None else token_weight, 0.0).to(F64)
    if reduction != "mean":
        return entropy * k if reduction == "none" else (entropy * k).sum()
    return (entropy * k).sum() / (k.sum() if num_items is None else num_items)


def closed_form(f: Callable[..., Tensor]):
    """The reference of the loss f(p_y, the loss's own options)."""

    def reference(input, target, *args, weight=None, reduction="mean", ignore_index=-100, **own):
        y, y2, lam = target if isinstance(target, tuple) else (target, target, 1.0)
        kept = (y != ignore_index) & (y2 != ignore_index)
        w = torch.ones(input.shape[1], dtype=input.dtype) if weight is None else weight
        p = input.softmax(1)
        value = mass = 0.0
        for labels, share in ((y, lam), (y2, 1.0 - lam)):
            labels = labels.clamp(min=0)
            value = value + share * w[labels] * f(p.gather(1, labels[:, None])[:, 0], *args, **own)
            mass = mass + share * w[labels]
        value = torch.where(kept, value, 0.0)
        if reduction == "mean":
            return value.sum() / torch.where(kept, mass, 0.0).sum()
        return value if reduction == "none" else value.sum()

    return reference


def comp_sum(p: Tensor, tau: float = 1.0) -> Tensor:
    return -p.log() if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau)


def generalized(p: Tensor, q: float = 0.7, k: float | None = None) -> Tensor:
    value = (1 - p**q) / q
    return value if k is None else torch.where(p <= k, (1 - k**q) / q, value)


def focal(p: Tensor, gamma: float = 2.0) -> Tensor:
    return -((1 - p) ** gamma) * p.log()


def poly1(p: Tensor, epsilon: float = 1.0) -> Tensor:
    return -p.log() + epsilon * (1 - p)


def relaxed(p: Tensor, alpha: float = 0.1) -> Tensor:
    if alpha == 0:
        return -p.log()
    value = (1 - alpha) * ((1 - alpha) / p).log() + alpha * (alpha / (1 - p)).log()
    return torch.where(p >= 1 - alpha, 0.0, value)


def generalized_cross_entropy(input, target, q=0.7, k=None, **options) -> Tensor:
    """What the module stands for; there is no function of this name."""
    return fused_cross_entropy(input, target, tau=q + 1.0, truncate=k, **options)


X, Y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)

ERRORS = (
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
    Bad(ValueError, r"batch_size \(4\) to match target batch_size \(3\)", dict(target=Y[:3])),
    Bad(RuntimeError, "labels of a MixUp target must agree", dict(target=(Y, Y[:2], 0.5))),
    Bad(RuntimeError, r"Expected target size \[4\], got \[4, 1\]", dict(target=Y[:, None])),
    Bad(RuntimeError, "Long or Byte, but got Short", dict(target=Y.short())),
    Bad(IndexError, "Target 5 is out of bounds", dict(target=Y + 5)),
    Bad(IndexError, "Target -1 is out of bounds", dict(target=Y - 1)),
    Bad(NotImplementedError, "'Long'", dict(input=X.long())),
    Bad(ValueError, "average is not a valid value for reduction", dict(reduction="average")),
    Bad(RuntimeError, "either for all 5 classes", dict(weight=torch.ones(4))),
    Bad(RuntimeError, "Float for weight but found Double", dict(weight=torch.ones(5, dtype=F64))),
    Bad(RuntimeError, r"token_weight must have the targets' shape \[4\], got \[5\]",
        dict(token_weight=torch.ones(5))),
    Bad(RuntimeError, "not differentiable with respect to token_weight",
        dict(token_weight=torch.ones(4, requires_grad=True))),
    Bad(RuntimeError, "not differentiable with respect to weight",
        dict(weight=torch.ones(5, requires_grad=True))),
    Bad(ValueError, "z_loss", dict(z_loss=math.nan)),
    Bad(ValueError, "softcap", dict(softcap=0.0)),
    Bad(ValueError, "softcap", dict(softcap=-1.0)),
    Bad(ValueError, "temperature", dict(temperature=0.0)),
    Bad(ValueError, "temperature", dict(temperature=-1.0)),
    Bad(ValueError, "num_items", dict(num_items=-1)),
    Bad(ValueError, "unknown statistic 'loss'", dict(return_stats=("loss",))),
    Bad(TypeError, "got one string", dict(return_stats="lse")),
    Bad(ValueError, "empty must be 'nan' or 'zero'", dict(empty="one")),
    Bad(ValueError, "loss_dtype must be a floating dtype", dict(loss_dtype=torch.int64)),
    Bad(RuntimeError, "input is a leaf", dict(input=X.clone().requires_grad_(), inplace=True)),
    Bad(RuntimeError, "same device, but target is on meta", dict(target=Y.to("meta"))),
)  # fmt: skip

OF_THE_FAMILY = (
    Bad(ValueError, "tau", dict(tau=-0.1)),
    Bad(ValueError, "tau", dict(tau=math.nan)),
)

EMPTY = {
    "mean": Empty(lambda: plain(0), math.nan),
    "mean, zero": Empty(lambda: plain(0, empty="zero"), 0.0),
    "sum": Empty(lambda: plain(0, reduction="sum"), 0.0),
    "none": Empty(lambda: plain(0, reduction="none"), 0.0, (0,)),
    "all ignored": Empty(lambda: plain(ignored=1.0), math.nan),
}


def large() -> Sample:
    return plain(300, 500)


def row_loss(**fields) -> Spec:
    return Spec(
        **dict(
            gradients=("input", "target"),
            refused=("token_weight",),
            wide=("weight", "token_weight", "num_items"),
            empty=EMPTY,
            vmap=("input", "target"),
            nan={"input": "all"},
            large=large,
        )
        | fields
    )


SPECS = (
    row_loss(
        function=fused_cross_entropy,
        module=pyloss.nn.CrossEntropyLoss,
        samples={
            "plain": plain,
            "none": lambda: plain(reduction="none"),
            **{
                name: lambda name=name: case(name)
                for name in (
                    *("weight", "smoothing_weight", "z_loss", "softcap", "logit_scale"),
                    *("temperature", "token_weight_z", "num_items", "mixup_all", "prob_all"),
                    *("everything", "everything_smoothed"),
                )
            },
            "entropy": lambda: plain(entropy_weight=-0.3, ignored=0.3, weight=class_weight()),
            "entropy, none": lambda: case("temperature", entropy_weight=0.2, reduction="none"),
            "entropy, items": lambda: case("num_items", entropy_weight=0.2),
            "entropy, tokens": lambda: case("token_weight", entropy_weight=-0.2),
            "volume": lambda: case("smoothing_tau", (2, 3, 2), reduction="sum"),
            "statistics": lambda: case(
                "z_loss", return_stats=("lse", "logprob", "entropy", "argmax", "rank", "z_loss")
            ),
        },
        reference=cross_entropy_reference,
        errors=(
            *ERRORS,
            *OF_THE_FAMILY,
            Bad(ValueError, "truncate must be finite and > 0", dict(truncate=0.0)),
            Bad(ValueError, "truncate must be a probability", dict(truncate=1.5)),
            Bad(
                ValueError,
                "needs class indices without label smoothing",
                dict(truncate=0.5, label_smoothing=0.1),
            ),
            Bad(RuntimeError, "label_smoothing must be between", dict(label_smoothing=1.5)),
        ),
    ),
    row_loss(
        function=comp_sum_loss,
        module=pyloss.nn.CompSumLoss,
        samples={
            "plain": plain,
            "tau 0": lambda: plain(tau=0.0, reduction="sum"),
            "tau 0.5": lambda: plain(tau=0.5, ignored=0.3, weight=class_weight()),
            "tau 1.75": lambda: plain(tau=1.75, reduction="none", weight=class_weight()),
            "tau 2": lambda: mixup(tau=2.0),
        },
        reference=closed_form(comp_sum),
        errors=OF_THE_FAMILY,
    ),
    row_loss(
        function=generalized_cross_entropy,
        module=pyloss.nn.GeneralizedCrossEntropyLoss,
        samples={
            "plain": plain,
            "q": lambda: plain(q=0.375, weight=class_weight(), ignored=0.3),
            "truncated": lambda: plain(q=0.5, k=0.3, reduction="none"),
        },
        reference=closed_form(generalized),
        errors=(
            Bad(ValueError, "truncate must be a probability", dict(k=1.5), of_module="k must be"),
        ),
    ),
    row_loss(
        function=focal_loss,
        module=pyloss.nn.FocalLoss,
        samples={
            "plain": plain,
            **{
                f"gamma {gamma}": lambda gamma=gamma: plain(
                    gamma=gamma, ignored=0.3, weight=class_weight()
                )
                for gamma in (0.0, 0.625, 1.0, 5.0)
            },
            "mixup": lambda: mixup(gamma=2.0, weight=class_weight()),
            "mixup, none": lambda: mixup(gamma=0.625, reduction="none"),
        },
        reference=closed_form(focal),
        thorough=True,
        errors=(
            *ERRORS,
            Bad(ValueError, "gamma must be finite and >= 0", dict(gamma=-1.0)),
            Bad(ValueError, "class indices or a MixUp tuple", dict(target=X)),
            Bad(TypeError, "label_smoothing", dict(label_smoothing=0.1)),
        ),
    ),
    row_loss(
        function=poly1_loss,
        module=pyloss.nn.Poly1Loss,
        samples={
            "plain": plain,
            "epsilon": lambda: plain(epsilon=-0.5, ignored=0.3, weight=class_weight()),
            "mixup, none": lambda: mixup(epsilon=2.0, reduction="none"),
        },
        reference=closed_form(poly1),
        errors=(
            Bad(ValueError, "epsilon must be finite and >= -1", dict(epsilon=-1.5)),
            Bad(ValueError, "class indices or a MixUp tuple", dict(target=X)),
        ),
    ),
    row_loss(
        function=label_relaxation_loss,
        module=pyloss.nn.LabelRelaxationLoss,
        samples={
            "plain": plain,
            "alpha": lambda: plain(alpha=0.6, ignored=0.3, weight=class_weight()),
            "mixup, none": lambda: mixup(alpha=0.3, reduction="none"),
        },
        reference=closed_form(relaxed),
        errors=(
            Bad(ValueError, r"alpha must be in \[0, 1\)", dict(alpha=1.0)),
            Bad(ValueError, "class indices or a MixUp tuple", dict(target=X)),
        ),
    ),
)
