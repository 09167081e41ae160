"""Generalised Dice, Tversky, focal and clDice; the references pool, and loop over the sums."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import pyloss
from pyloss.functional import (
    cldice_loss,
    dice_cldice_loss,
    dice_focal_loss,
    generalized_dice_focal_loss,
    generalized_dice_loss,
    segmentation_focal_loss,
    sigmoid_focal_loss,
    soft_skeleton,
    tversky_loss,
)
from pyloss.metrics import cl_dice
from pyloss.testing import make_logits, make_target
from specs._spec import BF16, F64, Bad, Empty, Sample, Spec
from specs.segmentation import (
    X,
    Y,
    all_ignored,
    dice_reference,
    index_sample,
    nothing,
    one_hot,
    one_ignored,
    soft_sample,
)

NO_COMPILE = ("compiled",)  # what it is made of is compiled by another Spec


def channels_of(input, target, softmax=False, sigmoid=False, ignore_index=None, first=0):
    """Probabilities, targets and what counts, (N, C, *), in float64."""
    p = input.softmax(1) if softmax else input.sigmoid() if sigmoid else input
    keep = torch.ones_like(input[:, :1])
    if target.dim() < input.dim():
        if ignore_index is not None:
            keep = (target != ignore_index).unsqueeze(1).double()
        t = one_hot(target.clamp(0, input.shape[1] - 1), input.shape[1])
    else:
        t = target
    return (p * keep)[:, first:], (t * keep)[:, first:].double(), keep


def reduced(each: Tensor, reduction: str) -> Tensor:
    return each if reduction == "none" else getattr(each, reduction)()


def generalized_reference(
    input, target, *, w_type="square", reduction="mean", smooth_nr=1e-5, smooth_dr=1e-5,
    batch=False, soft_label=False, include_background=True, empty="nan", **options,
) -> Tensor:  # fmt: skip
    p, t, keep = channels_of(input, target, first=not include_background, **options)
    rows = [(p.transpose(0, 1), t.transpose(0, 1))] if batch else list(zip(p, t))
    values = []
    for a, b in rows:
        a, b = a.flatten(1), b.flatten(1)
        inside = (torch.minimum(a, b) if soft_label else a * b).sum(1)
        volume = b.sum(1)
        weight = {"square": volume**-2, "simple": 1 / volume, "uniform": volume**0}[w_type]
        most = weight[weight.isfinite()].max() if weight.isfinite().any() else 0.0
        weight = torch.where(weight.isfinite(), weight, most)
        over = 2 * (weight * inside).sum() + smooth_nr
        values.append(1 - over / ((weight * (a.sum(1) + volume)).sum() + smooth_dr))
    value = torch.stack(values)
    if empty == "zero":
        value = torch.where(keep.flatten(1).any(1), value, 0.0)
    return reduced(value[0] if batch else value, reduction)


def tversky_reference(
    input, target, *, alpha=0.5, beta=0.5, gamma=1.0, reduction="mean", smooth_nr=1e-5,
    smooth_dr=1e-5, soft_label=False, **options,
) -> Tensor:  # fmt: skip
    p, t, _ = channels_of(input, target, **options)
    p, t = p.flatten(2), t.flatten(2)
    hit, extra, missed = p * t, p * (1 - t), (1 - p) * t
    if soft_label:
        hit, extra, missed = torch.minimum(p, t), (p - t).relu(), (t - p).relu()
    hit, extra, missed = hit.sum(2), extra.sum(2), missed.sum(2)
    each = 1 - (hit + smooth_nr) / (hit + alpha * extra + beta * missed + smooth_dr)
    return reduced(each**gamma, reduction)


def binary(input, target, alpha, gamma):
    t = target.double()
    ce = F.binary_cross_entropy_with_logits(input, t, reduction="none")
    each = (input * (1 - 2 * t)).sigmoid() ** gamma * ce
    if isinstance(alpha, list):
        alpha = torch.tensor(alpha, dtype=F64)
        return each * torch.where(t == 1, alpha.view(-1, *[1] * (t.dim() - 2)), 1.0)
    return each if alpha is None else each * (alpha * t + (1 - alpha) * (1 - t))


def sigmoid_focal_reference(input, target, alpha=0.25, gamma=2.0, reduction="none"):
    return reduced(binary(input, target, alpha, gamma), reduction)


def focal_reference(
    input, target, *, gamma=2.0, alpha=None, weight=None, reduction="mean", use_softmax=False,
    ignore_index=None, include_background=True, empty="nan",
) -> Tensor:  # fmt: skip
    first = not include_background
    _, t, keep = channels_of(input, target, ignore_index=ignore_index, first=first)
    if use_softmax:
        logp = input[:, first:].log_softmax(1)
        if isinstance(alpha, float):
            alpha = torch.tensor([1 - alpha, *[alpha] * (t.shape[1] - 1)], dtype=F64)
        each = -((1 - logp.exp()) ** gamma) * logp * t
        if alpha is not None:
            each = each * alpha.view(-1, *[1] * (t.dim() - 2))
    else:
        each = binary(input[:, first:], t, alpha, gamma)
    each = each * keep
    if weight is not None:
        each = each * weight.view(-1, *[1] * (t.dim() - 2))
    if reduction == "none":
        return each
    kept = keep.flatten(1).sum(1, keepdim=True)
    if reduction == "mean":
        return each.sum() / (kept.sum() * t.shape[1])
    return (each.flatten(2).sum(2) / kept).sum()


def dice_focal_reference(
    input, target, *, gamma=2.0, alpha=None, use_softmax=False, lambda_dice=1.0, lambda_focal=1.0,
    **options,
) -> Tensor:  # fmt: skip
    shared = ("weight", "reduction", "ignore_index", "include_background", "empty")
    both = {k: v for k, v in options.items() if k in shared}
    focal = focal_reference(
        input, target, gamma=gamma, alpha=alpha, use_softmax=use_softmax, **both
    )
    dice = dice_reference(input, target, **options)
    if dice.dim():
        dice = dice.view(*dice.shape, *[1] * (focal.dim() - 2))
    return lambda_dice * dice + lambda_focal * focal


def generalized_focal_reference(
    input, target, *, gamma=2.0, alpha=None, weight=None, lambda_gdl=1.0, lambda_focal=1.0,
    **options,
) -> Tensor:  # fmt: skip
    shared = ("reduction", "ignore_index", "include_background", "empty")
    both = {k: v for k, v in options.items() if k in shared}
    focal = focal_reference(input, target, gamma=gamma, alpha=alpha, weight=weight, **both)
    return lambda_gdl * generalized_reference(input, target, **options) + lambda_focal * focal


def skeleton_reference(input: Tensor, iter_: int = 3) -> Tensor:
    """As the paper's pseudocode, by pooling."""
    pool = F.max_pool3d if input.dim() == 5 else F.max_pool2d
    axes = input.dim() - 2

    def erode(x):
        each = []
        for axis in range(axes):
            size = [3 if a == axis else 1 for a in range(axes)]
            each.append(-pool(-x, size, 1, [s // 2 for s in size]))
        return torch.stack(each).amin(0)

    x = input.double()
    found = (x - pool(erode(x), 3, 1, 1)).relu()
    for _ in range(iter_):
        x = erode(x)
        ridge = (x - pool(erode(x), 3, 1, 1)).relu()
        found = found + (ridge - found * ridge).relu()
    return found > 0.5 if input.dtype == torch.bool else found


def cldice_reference(
    input, target, *, iter_=3, smooth_nr=1.0, smooth_dr=1.0, smooth=1e-4, reduction="mean",
    include_background=True, empty="nan", **options,
) -> Tensor:  # fmt: skip
    p, t, keep = channels_of(input, target, first=not include_background, **options)
    of_p, of_t = skeleton_reference(p, iter_).flatten(1), skeleton_reference(t, iter_).flatten(1)
    p, t = p.flatten(1), t.flatten(1)
    u = ((of_p * t).sum(1) + smooth_nr) / (of_p.sum(1) + smooth_dr)
    v = ((of_t * p).sum(1) + smooth_nr) / (of_t.sum(1) + smooth_dr)
    each = 1 - 2 * u * v / (u + v + smooth)
    if empty == "zero":
        each = torch.where(keep.flatten(1).any(1), each, 0.0)
    return reduced(each, reduction)


def dice_cldice_reference(
    input, target, *, alpha=0.5, smooth_nr=1.0, smooth_dr=1.0, iter_=3, smooth=1e-4, **options
) -> Tensor:
    both = dict(smooth_nr=smooth_nr, smooth_dr=smooth_dr, **options)
    skeletons = cldice_reference(input, target, iter_=iter_, smooth=smooth, **both)
    return (1 - alpha) * dice_reference(input, target, **both) + alpha * skeletons


def cl_dice_reference(input, target, threshold=0.5, *, include_background=True, reduction="mean"):
    p, (_, t, _) = (input >= threshold).double(), channels_of(input, target)
    first = 0 if include_background else 1
    rows = []
    for a, b in zip(p[:, first:].flatten(0, 1), t[:, first:].flatten(0, 1)):
        a, b = a[None, None], b[None, None]
        of_a, of_b = skeleton_reference(a, 9), skeleton_reference(b, 9)
        if not a.any() or not b.any():
            rows.append(torch.tensor(float(a.any() == b.any())))
            continue
        u, v = (of_a * b).sum() / of_a.sum(), (of_b * a).sum() / of_b.sum()
        rows.append(2 * u * v / (u + v) if u + v > 0 else torch.tensor(0.0))
    each = torch.stack(rows).view(len(p), -1)
    return reduced(each, reduction).float()


def logits_sample(**options) -> Sample:
    """For what has no activation to choose."""
    return Sample(index_sample().inputs, options)


def binary_sample(soft: bool = False, **options) -> Sample:
    x, t = make_logits((3, 4), F64), make_logits((3, 4), F64, seed=2)
    return Sample(dict(input=x, target=t.sigmoid() if soft else t > 0), options)


def levels(shape, seed: int = 3) -> Tensor:
    """Logits of which no two are equal in bfloat16: at ties the gradient of a minimum is open."""
    size = math.prod(shape)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return ((order - size // 2).double() / 16).view(shape)


def image_sample(shape=(2, 1, 4, 5), **options) -> Sample:
    x = levels(shape)
    y = torch.randint(2, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(4))
    return Sample(dict(input=torch.cat([x, 0 * x], 1), target=y), dict(softmax=True, **options))


def heights(*shape: int) -> Tensor:
    return (levels(shape) * 16 + math.prod(shape) // 2 + 1) / 128


def ignored_image(**options) -> Sample:
    sample = image_sample(ignore_index=255, **options)
    sample.inputs["target"][0, :3] = 255
    return sample


def ignored_logits(**options) -> Sample:
    y = make_target((2, 3, 1, 3), ignore_fraction=0.4, ignore_index=255)
    y[1] = 255 if options.get("empty") else y[1]
    return Sample(
        dict(input=make_logits((2, 3, 1, 3), F64), target=y), dict(ignore_index=255, **options)
    )


def logits_of_nothing(items: int, **options) -> Sample:
    return Sample(nothing(items, 3, 4).inputs, options)


def large_image() -> Sample:
    return image_sample((1, 1, 96, 97))


SHARED_ERRORS = (
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
    Bad(ValueError, r"\[2, 3, 4, 5\] and target \[2, 4, 4\]", dict(input=X, target=Y[..., :4])),
    Bad(IndexError, "Target 3 is out of bounds", dict(input=X, target=Y + 3)),
    Bad(ValueError, "needs class indices", dict(input=X, target=X, ignore_index=1)),
    Bad(ValueError, "median is not a valid value", dict(reduction="median")),
    Bad(ValueError, "empty must be", dict(empty="one")),
)
ACTIVATION_ERRORS = (
    Bad(ValueError, "at most one of", dict(sigmoid=True, softmax=True)),
    Bad(ValueError, "smooth_nr", dict(smooth_nr=-1.0)),
)
FOCAL_ERRORS = (
    Bad(ValueError, "gamma must be finite and >= 0", dict(gamma=-1.0)),
    Bad(ValueError, r"alpha must be in \[0, 1\], got 1.5", dict(alpha=1.5)),
    Bad(ValueError, "alpha must be one number or one for each of the 3", dict(alpha=[0.5, 1.0])),
    Bad(ValueError, "weight must be one number or one for each", dict(weight=[0.5, 1.0])),
)
IMAGE_ERRORS = (
    Bad(ValueError, r"\(N, C, H, W\) or \(N, C, D, H, W\), got \[2, 3, 4\]",
        dict(input=X[..., 0], target=Y[..., 0])),
    Bad(ValueError, "iter_ must be >= 0", dict(iter_=-1)),
    Bad(TypeError, "iter_ must be an integer", dict(iter_=1.5)),
    Bad(ValueError, "smooth must be finite and > 0", dict(smooth=0.0)),
)  # fmt: skip

WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=F64)

SPECS = (
    Spec(
        function=generalized_dice_loss,
        module=pyloss.nn.GeneralizedDiceLoss,
        same_signature=True,
        samples={
            "index": index_sample,
            "soft": lambda: soft_sample(w_type="simple", batch=True),
            "ignored": lambda: one_ignored(smooth_nr=0.3, empty="zero", reduction="none"),
        },
        exhaustive=NO_COMPILE,
        reference=generalized_reference,
        gradients=("input", "target"),
        wide=("target",),
        vmap=("input", "target"),
        empty={
            "no items": Empty(lambda: nothing(0, 3, 4, reduction="none"), 0.0, (0,)),
            "no voxels": Empty(lambda: nothing(2, 3, 0), 0.0),
            "all ignored": Empty(lambda: all_ignored(3, smooth_nr=0.0, empty="zero"), 0.0),
        },
        nan={"input": "all"},
        large=large_image,
        errors=(
            *SHARED_ERRORS,
            *ACTIVATION_ERRORS,
            Bad(ValueError, "w_type must be one of square, simple, uniform", dict(w_type="cube")),
        ),
    ),
    Spec(
        function=tversky_loss,
        module=pyloss.nn.TverskyLoss,
        same_signature=True,
        samples={
            "index": lambda: index_sample(alpha=0.3, beta=0.7),
            "exponent": lambda: soft_sample(gamma=0.75, soft_label=True, reduction="none"),
        },
        reference=tversky_reference,
        gradients=("input", "target"),
        wide=("target",),
        vmap=("input", "target"),
        empty={
            "no items": Empty(lambda: nothing(0, 3, 4), math.nan),
            "no voxels": Empty(lambda: nothing(2, 3, 0, gamma=0.5), 0.0),
            "all ignored": Empty(lambda: all_ignored(3, smooth_nr=0.0, empty="zero"), 0.0),
        },
        nan={"input": "all"},
        large=large_image,
        errors=(
            *SHARED_ERRORS,
            *ACTIVATION_ERRORS,
            Bad(ValueError, "alpha must be finite and >= 0", dict(alpha=-0.1)),
            Bad(ValueError, "beta must be finite and >= 0", dict(beta=-0.1)),
            Bad(ValueError, "gamma must be finite and > 0", dict(gamma=0.0)),
        ),
    ),
    Spec(
        function=sigmoid_focal_loss,
        samples={
            "mask": binary_sample,
            "soft": lambda: binary_sample(True, alpha=0.4, gamma=1.5, reduction="mean"),
            "cross entropy": lambda: binary_sample(alpha=None, gamma=0.0, reduction="sum"),
        },
        exhaustive=NO_COMPILE,
        reference=sigmoid_focal_reference,
        gradients=("input", "target"),
        vmap=("input", "target"),
        empty={
            "nothing": Empty(
                lambda: Sample(dict(input=torch.rand(0, 3), target=torch.rand(0, 3))), 0.0, (0, 3)
            ),
        },
        nan={"input": "any"},
        errors=(
            Bad(TypeError, "target must be a Tensor", dict(target=[1])),
            Bad(ValueError, r"input \[2, 3, 4, 5\] and target \[2, 4, 5\]",
                dict(input=X, target=Y)),
            Bad(NotImplementedError, "'Long'", dict(input=Y, target=Y)),
            Bad(ValueError, r"alpha must be in \[0, 1\]", dict(alpha=1.5)),
            Bad(ValueError, "gamma must be finite and >= 0", dict(gamma=math.nan)),
            Bad(ValueError, "median is not a valid value", dict(reduction="median")),
        ),
    ),
    Spec(
        function=segmentation_focal_loss,
        module=pyloss.nn.SegmentationFocalLoss,
        same_signature=True,
        samples={
            "sigmoid": lambda: logits_sample(alpha=0.25),
            "softmax": lambda: logits_sample(use_softmax=True, alpha=0.25, weight=WEIGHT),
            "softmax, each": lambda: logits_sample(use_softmax=True, gamma=1.5, reduction="none"),
            "foreground": lambda: logits_sample(
                use_softmax=True, include_background=False, reduction="sum"
            ),
            "ignored": lambda: ignored_logits(alpha=[0.2, 0.4, 0.9], reduction="sum"),
        },
        reference=focal_reference,
        gradients=("input",),
        wide=("weight",),
        compile_samples=("sigmoid",),
        vmap=("input", "target"),
        empty={
            "no items": Empty(lambda: logits_of_nothing(0), math.nan),
            "zero for no items": Empty(lambda: logits_of_nothing(0, empty="zero"), 0.0),
            "all ignored": Empty(
                lambda: Sample(
                    all_ignored(3).inputs, dict(ignore_index=255, empty="zero", reduction="sum")
                ), 0.0,
            ),
        },
        nan={"input": "all"},
        errors=(
            *SHARED_ERRORS,
            *FOCAL_ERRORS,
            Bad(ValueError, "softmax over one channel",
                dict(input=X[:, :1], target=Y, use_softmax=True)),
        ),
    ),
    Spec(
        function=dice_focal_loss,
        module=pyloss.nn.DiceFocalLoss,
        same_signature=True,
        samples={
            "index": lambda: index_sample(lambda_dice=0.7, lambda_focal=0.2, weight=WEIGHT),
            "each": lambda: index_sample(True, squared_pred=True, reduction="none"),
        },
        reference=dice_focal_reference,
        gradients=("input",),
        wide=("weight",),
        tolerances={BF16: (2.0**-7, 2.0**-8)},  # the gradients of the parts meet in bfloat16
        exhaustive=NO_COMPILE,
        vmap=("input", "target"),
        empty={
            "no items": Empty(lambda: nothing(0, 3, 4, softmax=True), math.nan),
            "all ignored": Empty(lambda: all_ignored(3, empty="zero"), 0.0),
        },
        nan={"input": "all"},
        large=large_image,
        errors=(
            *SHARED_ERRORS,
            *ACTIVATION_ERRORS,
            *FOCAL_ERRORS,
            Bad(ValueError, "lambda_focal must be finite and >= 0", dict(lambda_focal=-1.0)),
        ),
    ),
    Spec(
        function=generalized_dice_focal_loss,
        module=pyloss.nn.GeneralizedDiceFocalLoss,
        same_signature=True,
        samples={
            "index": lambda: index_sample(lambda_gdl=0.7, lambda_focal=0.2, weight=WEIGHT),
        },
        reference=generalized_focal_reference,
        gradients=("input",),
        wide=("weight",),
        tolerances={BF16: (2.0**-7, 2.0**-8)},
        exhaustive=NO_COMPILE,
        vmap=("input", "target"),
        empty={"all ignored": Empty(lambda: all_ignored(3, empty="zero"), 0.0)},
        nan={"input": "all"},
        large=large_image,
        errors=(
            *SHARED_ERRORS,
            *FOCAL_ERRORS,
            Bad(ValueError, "lambda_gdl must be finite and >= 0", dict(lambda_gdl=-1.0)),
            Bad(ValueError, "w_type must be one of", dict(w_type="cube")),
        ),
    ),
    Spec(
        function=soft_skeleton,
        samples={
            "image": lambda: Sample(dict(input=heights(2, 1, 4, 5)), dict(iter_=2)),
            "volume": lambda: Sample(dict(input=heights(1, 1, 3, 3, 4)), dict(iter_=1)),
            "one row": lambda: Sample(dict(input=heights(1, 1, 1, 6))),
        },
        reference=skeleton_reference,
        gradients=("input",),
        derivative_samples=("image", "volume"),
        compile_samples=("volume",),
        vmap=("input",),
        empty={"no items": Empty(lambda: Sample(dict(input=torch.rand(0, 1, 3, 3))), 0.0,
                                 (0, 1, 3, 3))},
        nan={"input": "any"},
        errors=(
            Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
            Bad(ValueError, r"\(N, C, H, W\)", dict(input=X[0])),
            Bad(NotImplementedError, "'Long'", dict(input=X.long())),
            Bad(ValueError, "iter_ must be >= 0", dict(iter_=-1)),
        ),
    ),
    Spec(
        function=cldice_loss,
        module=pyloss.nn.SoftclDiceLoss,
        same_signature=True,
        samples={
            "index": lambda: image_sample(iter_=2),
            "ignored": lambda: ignored_image(iter_=1, reduction="none", include_background=False),
        },
        reference=cldice_reference,
        gradients=("input",),
        exhaustive=NO_COMPILE,
        vmap=("input", "target"),
        empty={
            "no items": Empty(lambda: nothing(0, 3, 4, reduction="none"), 0.0, (0,)),
            "all ignored": Empty(lambda: all_ignored(3, empty="zero"), 0.0),
        },
        nan={"input": "all"},
        large=large_image,
        errors=(*SHARED_ERRORS, *ACTIVATION_ERRORS, *IMAGE_ERRORS),
    ),
    Spec(
        function=dice_cldice_loss,
        module=pyloss.nn.SoftDiceclDiceLoss,
        same_signature=True,
        samples={"index": lambda: image_sample(alpha=0.3, iter_=1, include_background=False)},
        reference=dice_cldice_reference,
        gradients=("input",),
        exhaustive=NO_COMPILE,
        vmap=("input", "target"),
        empty={"all ignored": Empty(lambda: all_ignored(3, empty="zero"), 0.0)},
        nan={"input": "all"},
        large=large_image,
        errors=(
            *SHARED_ERRORS,
            *IMAGE_ERRORS,
            Bad(ValueError, r"alpha must be in \[0, 1\]", dict(alpha=1.5)),
            Bad(ValueError, "'mean' or 'sum', got 'none'", dict(reduction="none")),
        ),
    ),
    Spec(
        function=cl_dice,
        samples={
            "index": lambda: Sample(
                dict(input=image_sample((2, 1, 9, 9)).inputs["input"].softmax(1),
                     target=image_sample((2, 1, 9, 9)).inputs["target"]),
                dict(reduction="none"),
            ),
            "volume": lambda: Sample(
                dict(input=make_logits((1, 1, 6, 6, 6), F64).sigmoid(),
                     target=make_logits((1, 1, 6, 6, 6), F64, seed=2) > -1)
            ),
        },
        exhaustive=NO_COMPILE,
        reference=cl_dice_reference,
        result=torch.float32,
        autocast={},
        compile="(?i)data-dependent",
        empty={"both": Empty(lambda: Sample(dict(input=X[:, :1] * 0, target=Y)), 1.0)},
        nan={"input": "any"},
        errors=(
            Bad(ValueError, r"\(N, C, H, W\)", dict(input=X[0])),
            Bad(ValueError, "median is not a valid value", dict(reduction="median")),
            Bad(TypeError, "threshold must be a number", dict(threshold="half")),
        ),
    ),
)  # fmt: skip
