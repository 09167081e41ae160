"""The options that every row_softmax test file runs through, and the calls to make with them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import pyloss
from pyloss.reference import row_softmax as reference
from pyloss.testing import check_loss, make_target

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# name -> (kind of target, options).  "weight", "token_weight" and "num_items" are filled in for
# the shape by make_options; the numbers are chosen so that no option is a no-op.
_OPTIONS: dict[str, tuple[str, dict]] = {
    "plain": ("index", {}),
    "tau0": ("index", {"tau": 0.0}),
    "tau0.3": ("index", {"tau": 0.3}),
    "tau0.5": ("index", {"tau": 0.5}),
    "tau1.5": ("index", {"tau": 1.5}),
    "tau1.7": ("index", {"tau": 1.7}),
    "tau2": ("index", {"tau": 2.0}),
    "tau3": ("index", {"tau": 3.0}),
    "ignore": ("ignore", {}),
    "weight": ("ignore", {"weight": True}),
    "weight_tau": ("ignore", {"weight": True, "tau": 1.7}),
    "smoothing": ("ignore", {"label_smoothing": 0.1}),
    "smoothing_one": ("index", {"label_smoothing": 1.0}),
    "smoothing_weight": ("ignore", {"label_smoothing": 0.1, "weight": True}),
    "smoothing_tau": ("ignore", {"label_smoothing": 0.1, "tau": 1.5}),
    "smoothing_tau_low": ("index", {"label_smoothing": 0.1, "tau": 0.5, "weight": True}),
    "smoothing_tau2": ("index", {"label_smoothing": 0.2, "tau": 2.0}),
    "z_loss": ("ignore", {"z_loss": 0.05}),
    "softcap": ("index", {"softcap": 4.0}),
    "logit_scale": ("index", {"logit_scale": 0.4}),
    "temperature": ("index", {"temperature": 1.7}),
    "token_weight": ("ignore", {"token_weight": True}),
    "token_weight_z": ("ignore", {"token_weight": True, "z_loss": 0.05, "weight": True}),
    "truncate": ("index", {"truncate": 0.1}),
    "truncate_tau": ("ignore", {"truncate": 0.05, "tau": 1.7}),
    "num_items": ("ignore", {"num_items": "number", "z_loss": 0.05}),
    "num_items_tensor": ("ignore", {"num_items": "tensor"}),
    "mixup": ("mixup", {}),
    "mixup_all": ("mixup", {"weight": True, "tau": 1.5, "token_weight": True, "z_loss": 0.02}),
    "mixup_smoothing": ("mixup", {"label_smoothing": 0.1, "weight": True}),
    "prob": ("prob", {}),
    "prob_smoothing": ("prob", {"label_smoothing": 0.1, "weight": True}),
    "prob_tau": ("prob", {"tau": 1.5, "weight": True}),
    "prob_all": (
        "prob",
        {"tau": 0.5, "token_weight": True, "z_loss": 0.02, "softcap": 6.0, "temperature": 1.3},
    ),
    "everything": (
        "ignore",
        {
            "tau": 1.5,
            "weight": True,
            "z_loss": 0.02,
            "softcap": 6.0,
            "logit_scale": 0.7,
            "temperature": 1.3,
            "token_weight": True,
            "num_items": "number",
        },
    ),
    "everything_smoothed": (
        "ignore",
        {
            "label_smoothing": 0.1,
            "weight": True,
            "z_loss": 0.02,
            "softcap": 6.0,
            "logit_scale": 0.7,
            "temperature": 1.3,
            "token_weight": True,
        },
    ),
}

OPTION_NAMES = tuple(_OPTIONS)


def make_options(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[object, dict]:
    """The target and the keyword arguments of the case ``name`` for logits of ``shape``."""
    kind, options = _OPTIONS[name]
    kwargs = dict(options)
    classes = shape[0] if len(shape) == 1 else shape[1]
    rows = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    generator = torch.Generator().manual_seed(3)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if kwargs.pop("weight", False):
        weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.25
        kwargs["weight"] = weight.to(real)
    if kwargs.pop("token_weight", False):
        k = torch.rand(rows, generator=generator, dtype=torch.float64) * 2
        kwargs["token_weight"] = k.to(real)
    if "num_items" in kwargs:
        number = 11.5
        kwargs["num_items"] = (
            number if kwargs["num_items"] == "number" else torch.tensor(number, dtype=real)
        )
    if kind == "ignore":
        return make_target(shape, ignore_fraction=0.3), kwargs
    target = make_target(shape, kind=kind)
    if kind == "prob":
        target = target.to(dtype)
    if kind == "mixup":
        target = (target[0], target[1], target[2].to(real))
    return target, kwargs


def exact(value):
    """``value`` with every floating tensor in float64: the arguments for the reference."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(exact(v) for v in value)
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    return value


def check(x: Tensor, target, *, run: dict | None = None, **kwargs) -> None:
    """``check_loss`` of fused_cross_entropy; ``run`` holds the options of check_loss itself."""
    op = partial(pyloss.fused_cross_entropy, target=target, **kwargs)
    kwargs.pop("loss_dtype", None)
    ref = partial(reference, target=exact(target), **exact(kwargs))
    check_loss(op, ref, x, **(run or {}))
