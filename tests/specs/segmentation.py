"""Soft Dice, soft Jaccard, and their sums with cross entropy; the reference is loops in float64."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import pyloss
from pyloss.functional import dice_cross_entropy_loss, soft_dice_loss
from pyloss.testing import make_logits, make_target
from specs._spec import BF16, F64, Bad, Empty, Sample, Spec

SHAPE = (2, 3, 1, 3)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).movedim(-1, 1)


def dice_formula(
    p, t, *, squared=False, jaccard=False, soft_label=False, smooth_nr=1e-5, smooth_dr=1e-5
):
    """Losses (N, C) of float64 probabilities and targets."""
    rows = []
    for n, c in itertools.product(*map(range, p.shape[:2])):
        a, b = p[n, c].double(), t[n, c].double()
        inside = (a * b).sum()
        whole = (a**2 + b**2).sum() if squared else (a + b).sum()
        if soft_label:
            inside = 0.5 * (whole - (a - b).abs().sum())
        if jaccard:
            whole = 2 * (whole - inside)
        rows.append(1 - (2 * inside + smooth_nr) / (whole + smooth_dr))
    return torch.stack(rows).view(p.shape[:2])


def _reduced(each: Tensor, reduction: str) -> Tensor:
    return each if reduction == "none" else getattr(each, reduction)()


def dice_reference(
    input, target, *, softmax=False, sigmoid=False, squared_pred=False, jaccard=False, batch=False,
    include_background=True, reduction="mean", weight=None, smooth_nr=1e-5, smooth_dr=1e-5,
    ignore_index=None, soft_label=False, empty="nan",
) -> Tensor:  # fmt: skip
    p = input.softmax(1) if softmax else input.sigmoid() if sigmoid else input
    if target.dim() < input.dim():
        keep = (target != (-100 if ignore_index is None else ignore_index)).unsqueeze(1)
        t = one_hot(target.clamp(0, input.shape[1] - 1), input.shape[1]) * keep
        p = p * keep
    else:
        t = target
    if batch:
        p, t = (v.transpose(0, 1).flatten(1)[None] for v in (p, t))
    each = dice_formula(
        p, t, squared=squared_pred, jaccard=jaccard, soft_label=soft_label, smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
    )  # fmt: skip
    each = each[0] if batch else each
    if empty == "zero" and ignore_index is not None:  # class indices
        each = torch.where((target != ignore_index).flatten(1).any(1)[:, None], each, 0.0)
    each = each if include_background else each[..., 1:]
    return _reduced(each if weight is None else each * weight, reduction)


def dice_ce_reference(
    input, target, *, weight=None, lambda_dice=1.0, lambda_ce=1.0, label_smoothing=0.0,
    reduction="mean", include_background=True, ignore_index=None, **options,
) -> Tensor:  # fmt: skip
    one = input.shape[1] == 1
    dice_weight = None if one or weight is None else weight[0 if include_background else 1 :]
    dice = dice_reference(
        input, target, weight=dice_weight, reduction=reduction, ignore_index=ignore_index,
        include_background=include_background, **options,
    )  # fmt: skip
    if one:
        ce = F.binary_cross_entropy_with_logits(
            input, target.double(), pos_weight=weight, reduction=reduction
        )
    else:
        ce = F.cross_entropy(
            input, target, weight, reduction=reduction, label_smoothing=label_smoothing,
            ignore_index=-100 if ignore_index is None else ignore_index,
        )  # fmt: skip
    return lambda_dice * dice + lambda_ce * ce


def index_sample(ignored: bool = False, **options) -> Sample:
    y = make_target(SHAPE, ignore_fraction=0.4 if ignored else 0.0, ignore_index=255)
    if ignored:
        options["ignore_index"] = 255
    return Sample(dict(input=make_logits(SHAPE, F64), target=y), dict(softmax=True, **options))


def soft_sample(shape: tuple[int, ...] = SHAPE, **options) -> Sample:
    t = make_logits(shape, F64, seed=2).sigmoid()
    return Sample(dict(input=make_logits(shape, F64), target=t), dict(sigmoid=True, **options))


def mask_sample(**options) -> Sample:
    shape = (2, 1, 2, 3)
    mask = make_logits(shape, F64, seed=2) > 0
    return Sample(dict(input=make_logits(shape, F64), target=mask), dict(sigmoid=True, **options))


def one_ignored(**options) -> Sample:
    """The second item has no voxel that counts."""
    sample = index_sample(True, **options)
    sample.inputs["target"][1] = 255
    return sample


def all_ignored(channels: int, **options) -> Sample:
    x = make_logits((2, channels, 1, 3), F64)
    activation = dict(softmax=True) if channels > 1 else dict(sigmoid=True)
    y = torch.full((2, 1, 3), 255)
    return Sample(dict(input=x, target=y), dict(activation, ignore_index=255, **options))


def nothing(batch: int, channels: int, size: int, **options) -> Sample:
    x = torch.rand(batch, channels, size, 4, dtype=F64)
    return Sample(dict(input=x, target=torch.zeros_like(x)), options)


def large() -> Sample:
    shape = (2, 3, 128, 130)
    return Sample(
        dict(input=make_logits(shape, F64), target=make_target(shape)),
        dict(softmax=True, squared_pred=True),
    )


X, Y = torch.full((2, 3, 4, 5), 0.25), torch.zeros(2, 4, 5, dtype=torch.int64)

ERRORS_OF_BOTH = (
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
    Bad(TypeError, "target must be a Tensor", dict(target=[1])),
    Bad(ValueError, r"\(N, C, \*\)", dict(input=X[0, 0, 0])),
    Bad(ValueError, "no channels", dict(input=X[:, :0])),
    Bad(NotImplementedError, "'Long'", dict(input=X.long())),
    Bad(ValueError, r"\[2, 3, 4, 5\] and target \[2, 4, 4\]", dict(input=X, target=Y[..., :4])),
    Bad(ValueError, r"target \[1, 4, 5\]", dict(input=X, target=Y[:1])),
    Bad(ValueError, r"target \[2, 2, 4, 5\]", dict(input=X, target=X[:, :2])),
    Bad(ValueError, r"target \[2, 4, 5\]", dict(input=X, target=Y, to_onehot_y=False)),
    Bad(ValueError, r"target \[2, 3, 4, 5\]", dict(input=X, target=X, to_onehot_y=True)),
    Bad(ValueError, r"target \[2, 3, 4, 5\]", dict(input=X[:, :1], target=X, softmax=False)),
    Bad(RuntimeError, "integer dtype such as Long, but got Float", dict(input=X, target=Y.float())),
    Bad(RuntimeError, "but got Bool", dict(input=X, target=Y.bool())),
    Bad(IndexError, "Target 3 is out of bounds", dict(input=X, target=Y + 3)),
    Bad(IndexError, "Target -1 is out of bounds", dict(input=X, target=Y - 1)),
    Bad(IndexError, "Target -100 is out of bounds", dict(input=X, target=Y - 100)),
    Bad(ValueError, "needs class indices", dict(input=X, target=X, ignore_index=1)),
    Bad(ValueError, "at most one of", dict(sigmoid=True, softmax=True)),
    Bad(ValueError, "at most one of", dict(sigmoid=True, softmax=False, other_act=torch.exp)),
    Bad(TypeError, "other_act must be callable", dict(softmax=False, other_act="exp")),
    Bad(ValueError, "one channel", dict(input=X[:, :1], target=Y, softmax=True)),
    Bad(ValueError, "smooth_nr", dict(smooth_nr=-1.0)),
    Bad(TypeError, "smooth_dr", dict(smooth_dr="x")),
    Bad(TypeError, "ignore_index must be an integer", dict(ignore_index=1.5)),
    Bad(ValueError, "empty must be 'nan' or 'zero', got 'one'", dict(empty="one")),
    Bad(ValueError, "validate must be True, False or None", dict(validate="yes")),
    Bad(
        ValueError,
        r"target must lie in \[0, 1\], got values from 255 to 255: divide a mask",
        dict(input=X, target=255 * (X > 0)),
    ),
    Bad(ValueError, "from -1 to -1", dict(input=X[:, :1], target=-1 - Y, softmax=False)),
    Bad(
        ValueError,
        "input has values outside",
        dict(input=4 * X + 1, target=X, softmax=False, validate=True),
    ),
    Bad(RuntimeError, "same device", dict(input=X, target=Y.to("meta"))),
)

SPECS = (
    Spec(
        function=soft_dice_loss,
        module=pyloss.nn.SoftDiceLoss,
        same_signature=True,
        samples={
            "index": index_sample,
            "soft": soft_sample,
            "squared": lambda: index_sample(squared_pred=True, smooth_nr=0.3, smooth_dr=0.2),
            "soft label": lambda: soft_sample(soft_label=True),
            "jaccard": lambda: soft_sample(jaccard=True, batch=True, reduction="none"),
            "foreground": lambda: index_sample(include_background=False, reduction="sum"),
            "weight": lambda: index_sample(weight=torch.tensor([0.5, 1.0, 2.0], dtype=F64)),
            "ignored": lambda: index_sample(True, reduction="none"),
            "nothing left of one": lambda: one_ignored(smooth_nr=0.3, empty="zero"),
            "mask": mask_sample,
            "no spatial axes": lambda: soft_sample((3, 4), reduction="none"),
            "one spatial axis": lambda: soft_sample((2, 2, 5), squared_pred=True, batch=True),
            "four spatial axes": lambda: soft_sample(
                (1, 2, 1, 2, 1, 3), squared_pred=True, jaccard=True
            ),
        },
        reference=dice_reference,
        gradients=("input", "target"),
        wide=("target",),
        compile_samples=("index", "ignored", "nothing left of one"),
        vmap=("input", "target"),
        empty={
            "no voxels": Empty(lambda: nothing(2, 1, 0), 0.0),
            "no items": Empty(lambda: nothing(0, 3, 4, reduction="none"), 0.0, (0, 3)),
            "mean of no items": Empty(lambda: nothing(0, 3, 4), math.nan),
            "zero for no items": Empty(lambda: nothing(0, 3, 4, empty="zero"), 0.0),
            "zero for no voxels": Empty(lambda: nothing(2, 3, 0, smooth_nr=0, empty="zero"), 0.0),
            "zero where all are ignored": Empty(
                lambda: all_ignored(3, smooth_nr=0.0, smooth_dr=0.0, empty="zero"), 0.0
            ),
            "zero for a class": Empty(
                lambda: all_ignored(
                    3, smooth_nr=0.0, batch=True, reduction="none", empty="zero"
                ), 0.0, (3,)
            ),
            "one without": Empty(lambda: all_ignored(3, smooth_nr=0.0), 1.0),
        },
        nan={"input": "all"},
        large=large,
        errors=(
            *ERRORS_OF_BOTH,
            Bad(ValueError, "median is not a valid value", dict(reduction="median")),
            Bad(ValueError, "weight must be", dict(weight=[1.0, 2.0])),
            Bad(ValueError, "2 classes", dict(weight=[1.0] * 3, include_background=False)),
            Bad(ValueError, "weight must be finite and >= 0", dict(weight=[1.0, -1.0, 1.0])),
            Bad(ValueError, "weight must be >= 0", dict(weight=torch.tensor([1.0, -1, 1]))),
        ),
    ),
    Spec(
        function=dice_cross_entropy_loss,
        module=pyloss.nn.DiceCELoss,
        same_signature=True,
        samples={
            "index": index_sample,
            "options": lambda: index_sample(
                weight=torch.tensor([0.5, 1.0, 2.0], dtype=F64),
                lambda_dice=0.7,
                lambda_ce=0.2,
                label_smoothing=0.125,
                reduction="sum",
            ),
            "foreground": lambda: index_sample(
                include_background=False,
                jaccard=True,
                batch=True,
                weight=torch.tensor([0.5, 1.0, 2.0], dtype=F64),
            ),
            "ignored": lambda: index_sample(True, squared_pred=True),
            "nothing left of one": lambda: one_ignored(smooth_nr=0.3, empty="zero"),
            "mask": lambda: mask_sample(weight=torch.tensor([3.0], dtype=F64)),
            "mask, sum": lambda: mask_sample(reduction="sum"),
        },
        reference=dice_ce_reference,
        gradients=("input",),
        wide=("weight",),
        tolerances={BF16: (2.0**-7, 2.0**-8)},  # the gradients of the parts meet in bfloat16
        compile_samples=("index", "ignored", "nothing left of one"),
        vmap=("input", "target"),
        empty={
            "mean of no items": Empty(lambda: nothing(0, 3, 4, softmax=True), math.nan),
            "zero for no items": Empty(lambda: nothing(0, 3, 4, softmax=True, empty="zero"), 0.0),
            "zero for no mask": Empty(lambda: nothing(0, 1, 4, sigmoid=True, empty="zero"), 0.0),
            "nan where all are ignored": Empty(lambda: all_ignored(3), math.nan),
            "zero where all are ignored": Empty(
                lambda: all_ignored(3, smooth_nr=0.0, smooth_dr=0.0, empty="zero"), 0.0
            ),
            "zero of a mask": Empty(lambda: all_ignored(1, smooth_nr=0.0, empty="zero"), 0.0),
        },
        nan={"input": "all"},
        large=large,
        errors=(
            *ERRORS_OF_BOTH,
            Bad(ValueError, "'mean' or 'sum'", dict(reduction="none")),
            Bad(ValueError, "lambda_ce", dict(lambda_ce=-1.0)),
            Bad(RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5",
                dict(label_smoothing=1.5)),
            Bad(TypeError, "label_smoothing must be a number", dict(label_smoothing=None)),
            Bad(ValueError, "lambda_dice", dict(lambda_dice=math.nan)),
            Bad(TypeError, "weight must be a Tensor", dict(weight=[1.0, 1.0, 1.0])),
            Bad(ValueError, r"each of the 3 channels, background included, got shape \[2\]",
                dict(weight=torch.ones(2))),
            Bad(ValueError, r"each of the 3 channels, background included, got shape \[2\]",
                dict(weight=torch.ones(2), include_background=False)),
            Bad(ValueError, "each of the 3 channels", dict(weight=torch.tensor(1.0))),
            Bad(ValueError, "2 channels", lambda a: dict(
                input=X[:, :1], target=Y, softmax=False, label_smoothing=0.1)),
        ),
    ),
)  # fmt: skip
