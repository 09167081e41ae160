"""Persistence, Betti matching, its loss and metrics; the reference reduces boundary matrices.

Random images by the hundred, voxels, cycles, padding and peers: `test_betti_*.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import betti_matching, betti_matching_loss, persistence_pairs
from pyloss.metrics import betti_matching_error, betti_number_error, betti_numbers
from pyloss.reference import betti_matching as reference
from pyloss.testing import make_logits
from specs._spec import BF16, F16, F32, F64, HALF, Bad, Empty, Sample, Spec

SHAPE = (2, 2, 4, 3)
VOLUME = (1, 2, 2, 3, 3)


def image(*shape: int, seed: int = 0) -> Tensor:
    """All values different, 1/32 apart or more: no tie in bfloat16 either, at 32 voxels or less."""
    voxels = math.prod(shape[2:])
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(voxels, generator=generator) for _ in range(math.prod(shape[:2]))]
    if not rows:
        return torch.zeros(shape, dtype=F64)
    return ((torch.stack(rows) + 1).double() / (voxels + 1)).view(shape)


def two(*shape: int, mask: bool = False, **options) -> Sample:
    shape = shape or SHAPE
    # Between the values of the input: a tie would be a kink.
    target = image(*shape, seed=1) - 0.5 / (math.prod(shape[2:]) + 1)
    target = target > 0.5 if mask else target
    return Sample(dict(input=image(*shape), target=target), options)


def labels(ignored: bool = False, **options) -> Sample:
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(3, (2, 4, 3), generator=generator)
    if ignored:
        y[:, 1, 1:], options["ignore_index"] = 255, 255
    return Sample(dict(input=image(2, 3, 4, 3), target=y), options)


def without_channel(**options) -> Sample:
    sample = two(2, 1, 4, 3, **options)
    return Sample({k: t[:, 0] for k, t in sample.inputs.items()}, sample.options)


# --------------------------------------------------------------------------------------------------
# References


def _flat(x: Tensor) -> Tensor:
    """(N, C, *spatial) as a batch of images."""
    return x.flatten(0, 1)


def _channels(input, target, include_background=True):
    """(input, target) of one shape, the background left out if asked."""
    if input.dim() == 3:  # (N, H, W)
        input, target = input[:, None], target[:, None]
    if target.dim() < input.dim():
        target = torch.nn.functional.one_hot(target, input.shape[1]).movedim(-1, 1)
    target = target.to(input.dtype)
    first = 0 if include_background or input.shape[1] == 1 else 1
    return input[:, first:], target[:, first:]


def _reduced(each: Tensor, reduction: str) -> Tensor:
    return each if reduction == "none" else getattr(each, reduction)((0, 1))


def pairs_reference(input, spatial_dims=None, *, filtration="sublevel", dims=None, essential=False,
                    min_persistence=0.0):  # fmt: skip
    x, superlevel = _flat(input), filtration == "superlevel"
    dims = range(x.dim() - 1) if dims is None else dims
    index = reference.persistence_pairs(x.detach(), superlevel, dims, essential)[:, :4]
    none = torch.full_like(x.flatten(1)[:1, 0], -math.inf if superlevel else math.inf)
    values = torch.stack([
        torch.cat([x.flatten(1)[i, v : v + 1] if v >= 0 else none for i, v in zip(index[:, 0], at)])
        for at in (index[:, 2], index[:, 3])
    ], 1)  # fmt: skip
    keep = (values[:, 0] - values[:, 1]).abs() > min_persistence
    return values[keep], index[keep]


def matching_reference(input, target, spatial_dims=None, *, filtration="superlevel", dims=None):
    x, y, superlevel = _flat(input), _flat(target.double()), filtration == "superlevel"
    every = list(range(x.dim() - 1))
    tables = reference.betti_matching(x.detach(), y.detach(), superlevel, dims or every)
    terms = reference.betti_matching_loss(x, y, superlevel=superlevel, dims=dims)
    return (terms.sum((1, 2)), *(t[:, :w] for t, w in zip(tables, (6, 4, 4))))


def _in_foreground(x: Tensor, superlevel: bool) -> Tensor:
    """Framed by the largest value of each image, or the smallest; column by column."""
    extreme = (torch.max if superlevel else torch.min)(x.flatten(2), 2).values[..., None, None]
    column = extreme.expand(*x.shape[:3], 1)
    wide = torch.cat([column, x, column], 3)
    row = extreme.expand(*x.shape[:2], 1, wide.shape[3])
    return torch.cat([row, wide, row], 2)


def loss_reference(
    input, target, *, filtration="superlevel", dims=None, weight=None, matched_weight=1.0,
    unmatched_weight=1.0, target_weight=1.0, unmatched="diagonal", min_persistence=0.0,
    essential=False, include_background=True, activation=None, reduction="mean", padding=None,
    ignore_index=None, spatial_dims=None,
):  # fmt: skip
    x = {None: input, "sigmoid": input.sigmoid(), "softmax": input.softmax(1)}[activation]
    ignored = torch.zeros(1, dtype=torch.bool)
    if ignore_index is not None:  # class indices, probabilities
        ignored = (target == ignore_index)[:, None]
        target = torch.where(target == ignore_index, 0, target)
    x, y = _channels(x, target, include_background)
    total = 0.0
    for superlevel in {"both": (True, False)}.get(filtration, (filtration == "superlevel",)):
        x, y = (torch.where(ignored, 0.0 if superlevel else 1.0, t) for t in (x, y))
        a, b = (t if padding is None else _in_foreground(t, superlevel) for t in (x, y))
        terms = reference.betti_matching_loss(
            _flat(a), _flat(b), superlevel=superlevel, dims=dims, essential=essential,
            unmatched=unmatched, min_persistence=min_persistence,
        )  # fmt: skip
        factors = terms.new_tensor([matched_weight, unmatched_weight, target_weight])
        by_dim = terms.new_tensor(weight or [1.0] * terms.shape[1])[:, None]
        total = total + (terms * factors * by_dim).sum((1, 2))
    return _reduced(total.view(x.shape[:2]), reduction)


def numbers_reference(mask, spatial_dims=None):
    found = [reference.betti_numbers(m) for m in _flat(mask != 0)]
    return torch.tensor(found).view(*mask.shape[:2], -1)


def number_error_reference(input, target, threshold=0.5, *, include_background=True,
                           spatial_dims=None, reduction="mean"):  # fmt: skip
    x, y = (numbers_reference(t >= threshold) for t in _channels(input, target, include_background))
    return _reduced((x - y).abs().double(), reduction)


def matching_error_reference(input, target, threshold=0.5, *, normalize=False, binarize=True,
                             include_background=True, spatial_dims=None, reduction="mean",
                             ):  # fmt: skip
    if not binarize:
        options = dict(include_background=include_background, reduction="none")
        spatial = range(input.dim() - 2)
        each = [loss_reference(input, target, dims=[d], **options) for d in spatial]
        return _reduced(torch.stack(each, -1), reduction)
    x, y = ((t >= threshold).double() for t in _channels(input, target, include_background))
    spatial = x.dim() - 2
    tables = reference.betti_matching(_flat(x), _flat(y), True, list(range(spatial)))
    error = torch.zeros(x.shape[0] * x.shape[1], spatial, dtype=F64)
    for rows in tables[1:]:
        error.index_put_((rows[:, 0], rows[:, 1]), torch.ones(len(rows), dtype=F64), True)
    error = error.view(*x.shape[:2], spatial)
    if not normalize:
        return _reduced(error, reduction)
    features, error = numbers_reference(y).sum(-1), error.sum(-1)
    share = (error / features).clamp(max=1.0)
    return _reduced(torch.where(features == 0, (error > 0).double(), share), reduction)


# --------------------------------------------------------------------------------------------------
# Specs

X = image(1, 1, 4, 4)
FLOAT32 = dict.fromkeys((*HALF, F32, F64), F32)
# What depends on the numbers of an image is a list of Python's.
NOT_COMPILED = "(?i)data.dependent|not supported|unsupported|could not|failed|builtin: bool"


SPECS = (
    Spec(
        function=persistence_pairs,
        nan={"input": "raises"},
        samples={
            "plain": lambda: Sample(dict(input=image(*SHAPE))),
            "superlevel": lambda: Sample(
                dict(input=image(*SHAPE)), dict(filtration="superlevel", essential=True)
            ),
            "dims": lambda: Sample(
                dict(input=image(*SHAPE)), dict(dims=[0], min_persistence=0.2, spatial_dims=2)
            ),
            "volume": lambda: Sample(dict(input=image(*VOLUME)), dict(filtration="superlevel")),
        },
        reference=pairs_reference,
        tensors=lambda pairs: pairs if isinstance(pairs, tuple) else (pairs.values, pairs.index),
        gradients=("input",),
        derivative_samples=("plain", "dims"),  # the death of the oldest is infinite
        transforms={"vmap": "dynamic shape"},  # as many pairs as the image has
        autocast={},
        empty={"no items": Empty(lambda: Sample(dict(input=image(0, 1, 4, 3))), 0.0, (0, 2))},
        large=lambda: Sample(dict(input=image(8, 2, 60, 60))),
        errors=(
            Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
            Bad(ValueError, "spatial_dims", dict(input=X, spatial_dims=4)),
            Bad(ValueError, "at least 2 dim", dict(input=X[0, 0, 0], spatial_dims=2)),
            Bad(ValueError, "construction", dict(construction="W")),
            Bad(ValueError, "'sublevel', 'superlevel'", dict(filtration="up")),
            Bad(ValueError, "real", dict(input=X.to(torch.complex64))),
        ),
    ),
    Spec(
        function=betti_matching,
        nan=dict.fromkeys(("input", "target"), "raises"),
        samples={
            "plain": two,
            "sublevel": lambda: two(filtration="sublevel", dims=[1]),
            "mask": lambda: two(mask=True, spatial_dims=2),
            "volume": lambda: two(*VOLUME),
        },
        reference=matching_reference,
        tensors=lambda m: (
            m
            if isinstance(m, tuple)
            else (m.loss(), m.matched, m.unmatched_input, m.unmatched_target)
        ),
        gradients=("input", "target"),
        result="wide",
        autocast={},
        empty={"no items": Empty(lambda: two(0, 1, 4, 3), 0.0, (0,))},
        large=lambda: two(8, 2, 60, 60),
        errors=(
            Bad(ValueError, "same shape", dict(input=X, target=X[..., :3])),
            Bad(ValueError, "dims must be integers in 0..1", dict(dims=[2])),
            Bad(ValueError, "repeat", dict(dims=[0, 0])),
            Bad(TypeError, "dims must be a sequence", dict(dims=0)),
        ),
    ),
    Spec(
        function=betti_matching_loss,
        nan=dict.fromkeys(("input", "target"), "raises"),
        module=pyloss.nn.BettiMatchingLoss,
        samples={
            "plain": two,
            "mask": lambda: two(mask=True, filtration="both", reduction="none"),
            "weights": lambda: two(
                weight=(0.5, 2.0),
                matched_weight=1.5,
                unmatched_weight=0.75,
                target_weight=0.375,
                min_persistence=0.25,
                reduction="sum",
            ),
            "extreme": lambda: two(unmatched="extreme", filtration="sublevel", essential=True),
            "labels": lambda: labels(include_background=False),
            "ignored": lambda: labels(True, filtration="both", essential=True),
            "one channel": lambda: without_channel(spatial_dims=2, reduction="none"),
            "frame": lambda: two(padding="foreground"),
            "frame, both": lambda: two(padding="foreground", filtration="both"),
            "volume": lambda: two(*VOLUME, weight=(0.5, 2.0, 1.5), essential=True),
        },
        reference=loss_reference,
        gradients=("input", "target"),
        vmap=("input", "target"),
        empty={
            "no items": Empty(lambda: two(0, 1, 4, 3), 0.0),
            "none": Empty(lambda: two(0, 2, 4, 3, reduction="none"), 0.0, (0, 2)),
        },
        large=lambda: two(8, 2, 60, 60),
        errors=(
            Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
            Bad(TypeError, "target must be a Tensor", dict(target=None)),
            Bad(ValueError, "same shape", dict(input=X, target=X[..., :3])),
            Bad(ValueError, "spatial size of 0", dict(input=X[..., :0], target=X[..., :0])),
            Bad(ValueError, r"must be \(N, C", dict(input=X[0, 0], target=X[0, 0])),
            Bad(ValueError, "1, 2 or 3, got 4", dict(input=X[None, None], target=X[None, None])),
            Bad(IndexError, "Target 2 is out of bounds",
                dict(target=torch.full((2, 4, 3), 2))),
            Bad(ValueError, "'sublevel', 'superlevel', 'both'", dict(filtration="up")),
            Bad(ValueError, "'diagonal', 'extreme'", dict(unmatched="x")),
            Bad(ValueError, "'none', 'mean', 'sum'", dict(reduction="x")),
            Bad(ValueError, "'sigmoid', 'softmax'", dict(activation="relu")),
            Bad(ValueError, "softmax over one channel.*'sigmoid'",
                dict(input=X, target=X, activation="softmax")),
            Bad(ValueError, "ignore_index needs class indices", dict(ignore_index=1)),
            Bad(TypeError, "ignore_index must be an integer", dict(ignore_index=1.5)),
            Bad(TypeError, "spatial_dims must be an integer", dict(spatial_dims="2")),
            Bad(ValueError, "with spatial_dims", dict(spatial_dims=1)),
            Bad(ValueError, "padding", dict(padding="zero")),
            Bad(TypeError, "padding must be", dict(padding=[1])),
            Bad(ValueError, "padding must not be NaN", dict(padding=math.nan)),
            Bad(ValueError, "at least 0", dict(matched_weight=-1.0)),
            Bad(ValueError, "one entry", dict(weight=[1.0])),
            Bad(TypeError, "weight must be a seq", dict(weight=2.0)),
        ),
    ),
    Spec(
        function=betti_matching_loss,
        nan=dict.fromkeys(("input", "target"), "raises"),
        name="betti_matching_loss of logits",
        module=pyloss.nn.BettiMatchingLoss,
        samples={
            "sigmoid": lambda: two(activation="sigmoid", dims=(0,)),
            "softmax": lambda: labels(activation="softmax").replace(
                dict(input=make_logits((2, 3, 4, 3), F64, scale=1.0))
            ),
        },
        reference=loss_reference,
        gradients=("input", "target"),
        empty={"no items": Empty(lambda: two(0, 1, 4, 3, activation="sigmoid"), 0.0)},
        rounded=False,  # the probabilities are in the dtype of the logits
        tolerances={BF16: (2.0**-6, 2.0**-4), F16: (2.0**-9, 2.0**-7)},
    ),
    Spec(
        function=betti_numbers,
        nan={"mask": "raises"},
        samples={
            "plain": lambda: Sample(dict(mask=(image(*SHAPE) > 0.4).double())),
            "bool": lambda: Sample(dict(mask=image(1, 3, 5, 5) > 0.3), dict(spatial_dims=2)),
            "volume": lambda: Sample(dict(mask=(image(1, 2, 3, 3, 3) > 0.2).double())),
        },
        reference=numbers_reference,
        result=torch.int64,
        autocast={},
        empty={"no items": Empty(lambda: Sample(dict(mask=image(0, 1, 4, 3))), 0, (0, 1, 2))},
        compile=NOT_COMPILED,
        errors=(
            Bad(TypeError, "mask must be a Tensor", dict(mask=[1.0])),
            Bad(ValueError, "at least 3 dim", dict(mask=X[0, 0], spatial_dims=3)),
        ),
    ),
    Spec(
        function=betti_number_error,
        nan=dict.fromkeys(("input", "target"), "raises"),
        samples={
            "plain": two,
            "labels": lambda: labels(include_background=False, threshold=0.25, reduction="none"),
            "sum": lambda: two(reduction="sum", threshold=0.7),
            "volume": lambda: two(*VOLUME, reduction="none"),
            "one channel": lambda: without_channel(spatial_dims=2),
        },
        reference=number_error_reference,
        result=F32,
        autocast=FLOAT32,
        empty={"no items": Empty(lambda: two(0, 1, 4, 3), 0.0, (2,))},
        compile=NOT_COMPILED,
        errors=(
            Bad(ValueError, "threshold", dict(threshold=math.nan)),
            Bad(TypeError, "threshold must be a number, got NoneType", dict(threshold=None)),
            Bad(ValueError, "'none', 'mean', 'sum'", dict(reduction="x")),
        ),
    ),
    Spec(
        function=betti_matching_error,
        nan=dict.fromkeys(("input", "target"), "raises"),
        samples={
            "plain": two,
            "normalised": lambda: two(normalize=True, reduction="none"),
            "one channel": lambda: without_channel(spatial_dims=2, reduction="none"),
            "loss": lambda: two(binarize=False),
            "volume": lambda: two(*VOLUME, reduction="none"),
            "labels": lambda: labels(include_background=False, threshold=0.25, reduction="sum"),
        },
        reference=matching_error_reference,
        result=F32,
        rounded=False,  # the loss of half inputs is rounded on its way
        tolerances=dict.fromkeys(HALF, (2.0**-7, 2.0**-7)),
        autocast=FLOAT32,
        empty={
            "no items": Empty(lambda: two(0, 2, 4, 4), 0.0, (2,)),
            "normalised": Empty(lambda: two(0, 2, 4, 4, normalize=True), 0.0),
        },
        compile=NOT_COMPILED,
        errors=(
            Bad(ValueError, "binarize", dict(normalize=True, binarize=False)),
            Bad(TypeError, "threshold must be a number, got NoneType", dict(threshold=None)),
            Bad(TypeError, "threshold must be a number", dict(threshold=None, binarize=False)),
        ),
    ),
)  # fmt: skip
