"""Spherical losses, compared with their formulas on all scores, and the factored layer with the
dense one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    one_hot_mse_loss,
    spherical_loss,
    spherical_softmax_loss,
    spherical_z_loss,
    taylor_softmax_loss,
)
from pyloss.testing import make_logits, make_target
from specs._spec import BF16, F16, F32, F64, Bad, Empty, Sample, Spec

SHAPE = (4, 5)


def sample(shape: tuple[int, ...] = SHAPE, ignored: float = 0.0, **options) -> Sample:
    x, y = make_logits(shape, F64, scale=1.5), make_target(shape, ignore_fraction=ignored)
    return Sample(dict(input=x, target=y), options)


def class_weight() -> Tensor:
    return torch.linspace(0.5, 2.0, 5, dtype=F64)


def of_all_scores(f: Callable[..., Tensor]):
    """The reference of the loss f(scores with the classes last, own one-hot, options)."""

    def reference(input, target, *args, weight=None, ignore_index=-100, reduction="mean", **own):
        x = input.movedim(1, -1) if input.dim() > 1 else input
        kept = target != ignore_index
        y = torch.nn.functional.one_hot(target.clamp(min=0), x.shape[-1]).to(x.dtype)
        w = kept * (1.0 if weight is None else weight[target.clamp(min=0)])
        value = torch.where(kept, w * f(x, y, *args, **own), 0.0)
        if reduction == "mean":
            return value.sum() / (w * torch.ones_like(value)).sum()
        return value if reduction == "none" else value.sum()

    return reference


def z_formula(x: Tensor, y: Tensor, a: float = 1.0, b: float = 0.0) -> Tensor:
    z = ((x - x.mean(-1, keepdim=True)) * y).sum(-1) / x.std(-1, correction=0)
    return torch.nn.functional.softplus(a * (b - z), threshold=1e3) / a


def taylor_formula(x: Tensor, y: Tensor) -> Tensor:
    p = 1 + x + x**2 / 2
    return -((p * y).sum(-1) / p.sum(-1)).log()


def spherical_formula(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    p = x**2 + eps
    return -((p * y).sum(-1) / p.sum(-1)).log()


def user_formula(o: Tensor, s: Tensor, q: Tensor) -> Tensor:
    return 1 - o / (q + 0.1).sqrt() + 0.1 * s.square()


def user_on_scores(x: Tensor, y: Tensor, fn: Callable) -> Tensor:
    return fn((x * y).sum(-1), x.sum(-1), x.square().sum(-1))


X, Y = torch.zeros(SHAPE), torch.zeros(4, dtype=torch.int64)

ERRORS = (
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
    Bad(TypeError, "target must be a Tensor, got tuple", dict(target=(Y, Y, 0.5))),
    Bad(RuntimeError, "Long or Byte, but got Double", dict(target=X.double())),
    Bad(RuntimeError, "Long or Byte, but got Short", dict(target=Y.short())),
    Bad(ValueError, r"batch_size \(4\) to match target batch_size \(3\)", dict(target=Y[:3])),
    Bad(RuntimeError, r"Expected target size \[4\], got \[4, 1\]", dict(target=Y[:, None])),
    Bad(IndexError, "Target 5 is out of bounds", dict(target=Y + 5)),
    Bad(IndexError, "Target -1 is out of bounds", dict(target=Y - 1)),
    Bad(NotImplementedError, "'Long'", dict(input=X.long())),
    Bad(IndexError, "no classes", dict(input=X[:, :0])),
    Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
    Bad(TypeError, "ignore_index must be an integer", dict(ignore_index=0.5)),
    Bad(RuntimeError, "either for all 5 classes", dict(weight=torch.ones(4))),
    Bad(RuntimeError, "not differentiable with respect to weight",
        dict(weight=torch.ones(5, requires_grad=True))),
    Bad(RuntimeError, "same device, but target is on meta", dict(target=Y.to("meta"))),
)  # fmt: skip


def row_loss(errors: tuple[Bad, ...] = (), samples: dict | None = None, **fields) -> Spec:
    return Spec(
        **dict(
            samples={
                "plain": sample,
                "weight": lambda: sample(ignored=0.3, weight=class_weight(), reduction="sum"),
                "volume": lambda: sample((2, 3, 2), ignored=0.3, reduction="none"),
                **(samples or {}),
            },
            gradients=("input",),
            wide=("weight",),
            empty={
                "mean": Empty(lambda: sample((0, 5)), math.nan),
                "sum": Empty(lambda: sample((0, 5), reduction="sum"), 0.0),
                "none": Empty(lambda: sample((0, 5), reduction="none"), 0.0, (0,)),
                "all ignored": Empty(lambda: sample(ignored=1.0), math.nan),
            },
            vmap=("input", "target"),
            nan={"input": "all"},
            large=lambda: sample((300, 500)),
            same_signature=True,
            errors=(*ERRORS, *errors),
        )
        | fields
    )


def user_loss(input, target, **options) -> Tensor:
    return spherical_loss(input, target, user_formula, **options)


class UserLoss(pyloss.nn.SphericalLoss):
    def __init__(self, **options) -> None:
        super().__init__(user_formula, **options)


# --------------------------------------------------------------------------------------------------
# The factored layer


def layer_sample(rows: int = 4, **options) -> Sample:
    """As of a function of features and weight; targets of one class are among them."""
    g = torch.Generator().manual_seed(1)
    h = torch.randn(rows, 3, generator=g, dtype=F64)
    weight = torch.randn(7, 3, generator=g, dtype=F64)
    return Sample(dict(h=h, target=torch.arange(rows) ** 2 % 5, weight=weight), options)


@lru_cache  # so that no transform sees random numbers
def new_layer(*args, **options) -> pyloss.nn.SphericalLinear:
    with torch.random.fork_rng(devices=[]):
        return pyloss.nn.SphericalLinear(*args, **options)


_LAYER = new_layer(3, 7)


def layer_loss(h, target, weight, **options) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    classes, features = weight.shape
    if torch.compiler.is_compiling():  # to build a layer is for eager mode; so is what it does
        return _LAYER(h, target)
    made = new_layer(features, classes, device=weight.device, dtype=weight.dtype, **options)
    layer = copy.deepcopy(made)
    layer.weight = weight
    return layer(h, target)


LOSSES = {
    "z": of_all_scores(z_formula),
    "mse": of_all_scores(lambda x, y: (x - y).square().sum(-1)),
    "taylor": of_all_scores(taylor_formula),
    "spherical": of_all_scores(spherical_formula),
    user_formula: of_all_scores(partial(user_on_scores, fn=user_formula)),
}


def dense_reference(h, target, weight, loss="z", **options) -> Tensor:
    return LOSSES[loss](h @ weight.detach().T, target, **options)


_FUNCTORCH = "must override the setup_context"

SPECS = (
    row_loss(
        function=spherical_z_loss,
        module=pyloss.nn.SphericalZLoss,
        reference=of_all_scores(z_formula),
        samples={"a, b": lambda: sample(a=0.5, b=2.0)},
        errors=(
            Bad(ValueError, "a must be finite and > 0, got 0.0", dict(a=0.0)),
            Bad(ValueError, "b must be finite, got nan", dict(b=math.nan)),
            Bad(TypeError, "b must be a number, got str", dict(b="1")),
            Bad(ValueError, "needs at least 2 classes, got 1", dict(input=X[:, :1])),
        ),
    ),
    row_loss(
        function=one_hot_mse_loss,
        module=pyloss.nn.OneHotMSELoss,
        reference=LOSSES["mse"],
    ),
    row_loss(
        function=taylor_softmax_loss,
        module=pyloss.nn.TaylorSoftmaxLoss,
        reference=LOSSES["taylor"],
    ),
    row_loss(
        function=spherical_softmax_loss,
        module=pyloss.nn.SphericalSoftmaxLoss,
        reference=LOSSES["spherical"],
        samples={"eps": lambda: sample(eps=0.5)},
        errors=(Bad(ValueError, "eps must be finite and > 0, got 0", dict(eps=0)),),
    ),
    row_loss(
        function=user_loss,
        name="spherical_loss",
        covers=(spherical_loss, pyloss.nn.SphericalLoss),
        module=UserLoss,
        same_signature=False,
        reference=LOSSES[user_formula],
    ),
    Spec(
        function=layer_loss,
        name="SphericalLinear",
        covers=(pyloss.nn.SphericalLinear,),
        samples={
            "plain": layer_sample,
            "z": lambda: layer_sample(a=0.5, b=1.0, reduction="none", ignore_index=1),
            "mse": lambda: layer_sample(loss="mse", reduction="sum"),
            "taylor": lambda: layer_sample(loss="taylor"),
            "spherical": lambda: layer_sample(loss="spherical", eps=0.2),
            "user": lambda: layer_sample(loss=user_formula),
        },
        reference=dense_reference,
        gradients=("h",),
        wide=("weight",),
        empty={"no rows": Empty(lambda: layer_sample(0), math.nan)},
        nan={"h": "all", "weight": "all"},
        gradgrad="SphericalLinear has no second derivative",
        forward_mode="must implement the jvp function",
        transforms=dict.fromkeys(
            ("grad", "vjp", "jvp", "vmap", "jacrev", "jacfwd", "hessian"), _FUNCTORCH
        ),
        compile="disable",
        tolerances={F32: (1e-5, 1e-6), BF16: (1e-2, 1e-2), F16: (2e-3, 1e-3)},
        errors=(
            Bad(TypeError, "h must be a Tensor, got list", dict(h=[1.0])),
            Bad(ValueError, r"h must have 3 features, got \[4, 2\]", dict(h=X[:, :2])),
            Bad(ValueError, r"target must have the shape \[4\], got \[3\]", dict(target=Y[:3])),
            Bad(RuntimeError, "Long or Byte, but got Float", dict(target=Y.float())),
            Bad(IndexError, "Target 7 is out of bounds", dict(target=Y + 7)),
            Bad(ValueError, "loss must be one of 'z', 'mse'", dict(loss="ce")),
            Bad(ValueError, "a must be finite and > 0", dict(a=-1)),
            Bad(ValueError, "avg is not a valid value", dict(reduction="avg")),
            Bad(ValueError, "stabilize_every must be at least 1, got 0", dict(stabilize_every=0)),
            Bad(TypeError, "refresh_every must be an integer", dict(refresh_every=1.5)),
            Bad(ValueError, r"fn must return a loss of each row, \[4\], got \[\]",
                dict(loss=lambda o, s, q: o.sum())),
        ),
    ),
)  # fmt: skip
