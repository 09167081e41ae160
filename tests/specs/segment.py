"""Reductions over segments, compared with loops over them in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import (
    SegmentMoments,
    SegmentSoftmaxStats,
    segment_moments,
    segment_reduce,
    segment_softmax,
    segment_softmax_stats,
    segment_tree_reduce,
)
from specs._spec import BF16, F16, F32, F64, Bad, Empty, Sample, Spec

OFFSETS = torch.tensor([0, 3, 4, 9, 11])
GAPS = torch.tensor([0, 0, 3, 3, 9, 11, 11], dtype=torch.int32)


def sample(offsets: Tensor = OFFSETS, shape: tuple[int, ...] = (2,), **options) -> Sample:
    g = torch.Generator().manual_seed(3)
    x = torch.randn((int(offsets[-1]), *shape), generator=g, dtype=F64)
    return Sample(dict(x=x), dict(offsets=offsets, **options))


def large(**options) -> Sample:
    lengths = torch.tensor([0, 70000, 1, *[9] * 3000, 5000])
    return sample(torch.cat([lengths[:1], lengths.cumsum(0)]), (), **options)


def nothing(**options) -> Sample:
    return sample(torch.tensor([0, 0, 0]), **options)


def parts(x: Tensor, offsets: Tensor) -> list[Tensor]:
    return list(x.split(offsets.diff().tolist())) if offsets.shape[0] > 1 else []


def stacked(x: Tensor, rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else x.new_zeros((0, *x.shape[1:]))


EMPTY = dict(sum=0.0, mean=math.nan, min=math.inf, max=-math.inf, prod=1.0, logsumexp=-math.inf)
OF_ROWS = dict(
    sum=lambda t: t.sum(0),
    mean=lambda t: t.mean(0),
    min=lambda t: t.amin(0),
    max=lambda t: t.amax(0),
    prod=lambda t: t.prod(0),
    logsumexp=lambda t: t.logsumexp(0),
)


def reduce_reference(x, offsets, reduce="sum") -> Tensor:
    # The sum of an empty segment keeps its place in the graph.
    rows = [
        OF_ROWS[reduce](t) if t.shape[0] else t.sum(0) + EMPTY[reduce] for t in parts(x, offsets)
    ]
    return stacked(x, rows)


def moments_reference(x, offsets, *, covariance=False) -> SegmentMoments:
    means = reduce_reference(x, offsets, "mean")
    seconds = []
    for t, mean in zip(parts(x, offsets), means):
        d = t - mean
        square = d.mT @ d if covariance else d.square().sum(0)
        seconds.append(square / t.shape[0])
    seconds = torch.stack(seconds) if seconds else means
    return SegmentMoments(offsets.diff().long(), means, seconds)


def stats_reference(x, offsets) -> SegmentSoftmaxStats:
    most = reduce_reference(x, offsets, "max")
    sums, places = [], []
    for t, m, begin in zip(parts(x, offsets), most, offsets.tolist()):
        sums.append((t - m).exp().sum(0))
        none = torch.full(x.shape[1:], -1)
        places.append(begin + t.argmax(0) if t.shape[0] else none)
    return SegmentSoftmaxStats(most, torch.stack(sums), torch.stack(places))


def softmax_reference(x, offsets) -> Tensor:
    return torch.cat([t.softmax(0) for t in parts(x, offsets)])


def smooth(a: Tensor, b: Tensor) -> Tensor:
    return a + b + 0.1 * (a * b).sin()


def tree_reference(x, offsets, op, *, identity=None, max_length=None) -> Tensor:
    if isinstance(op, str):
        found = reduce_reference(x, offsets, op)
    else:
        rows = []
        for t in parts(x, offsets):
            level = list(t)
            while len(level) > 1:
                pairs = [op(a, b) for a, b in zip(level[::2], level[1::2])]
                level = pairs + level[len(pairs) * 2 :]
            rows.append(level[0] if level else torch.zeros_like(x.sum(0)))
        found = stacked(x, rows)
    if identity is None:
        return found
    empty = (offsets.diff() == 0).view(-1, *[1] * (x.dim() - 1))
    return torch.where(empty, torch.as_tensor(identity, dtype=x.dtype), found)


X = torch.zeros(11, 2)
BAD_OFFSETS = (
    Bad(TypeError, "offsets must be a Tensor, got list", dict(offsets=[0, 11])),
    Bad(RuntimeError, "offsets must be int32 or int64", dict(offsets=OFFSETS.float())),
    Bad(ValueError, "offsets must have one dimension", dict(offsets=OFFSETS[None])),
    Bad(ValueError, "offsets must hold at least one number", dict(offsets=OFFSETS[:0])),
    Bad(ValueError, "start at 0 and end at the number of values, 11", dict(offsets=OFFSETS + 1)),
    Bad(ValueError, "start at 0 and end at the number of values, 11", dict(offsets=OFFSETS[:-1])),
    Bad(ValueError, "offsets must not decrease", dict(offsets=OFFSETS[[0, 2, 1, 3, 4]])),
    Bad(ValueError, "offsets must not decrease", dict(offsets=torch.tensor([0, 12, 11]))),
    Bad(RuntimeError, "offsets is on meta and x on cpu", dict(offsets=OFFSETS.to("meta"))),
)  # fmt: skip
ERRORS = (
    Bad(TypeError, "x must be a Tensor, got list", dict(x=[1.0])),
    Bad(NotImplementedError, "not implemented for 'Long'", dict(x=X.long())),
    Bad(ValueError, "x must have at least one dimension", dict(x=X[0, 0])),
    *BAD_OFFSETS,
)


def row_nan(found: Tensor, without: Tensor) -> bool:
    """The first column of the first segment alone."""
    changed = found.isnan()
    return bool(changed[0, 0]) and torch.equal(found[~changed], without[~changed])


COMMON = dict(gradients=("x",), vmap=("x",), errors=ERRORS)

SPECS = (
    Spec(
        function=segment_reduce,
        samples={
            "plain": sample,
            "max": lambda: sample(GAPS, reduce="max"),
            "prod": lambda: sample(shape=(), reduce="prod"),
            "logsumexp": lambda: sample(shape=(2, 3), reduce="logsumexp"),
            "mean": lambda: sample(reduce="mean"),
            "min": lambda: sample(reduce="min"),
        },
        derivative_samples=("plain", "prod", "logsumexp", "mean", "min"),
        reference=reduce_reference,
        empty={
            "no values": Empty(nothing, 0.0, (2, 2)),
            "no segments": Empty(lambda: sample(torch.tensor([0])), 0.0, (0, 2)),
            "mean": Empty(lambda: nothing(reduce="mean"), math.nan, (2, 2)),
        },
        nan={"x": row_nan},
        large=large,
        **COMMON
        | dict(
            errors=(
                *ERRORS,
                Bad(ValueError, "reduce must be one of sum, mean, .*got 'avg'", dict(reduce="avg")),
            )
        ),
    ),
    Spec(
        function=segment_moments,
        covers=(SegmentMoments,),
        samples={
            "plain": sample,
            "one column": lambda: sample(shape=()),
            "covariance": lambda: sample(covariance=True),
        },
        reference=moments_reference,
        result="wide",
        tensors=lambda found: (found.mean, found.moment, found.count),
        empty={"no values": Empty(nothing, math.nan, (2, 2))},
        nan={"x": row_nan},
        large=large,
        rounded=False,
        **COMMON
        | dict(
            errors=(
                *ERRORS,
                Bad(ValueError, r"x must be \(N, d\) with covariance=True, got \[11\]",
                    dict(x=X[:, 0], covariance=True)),
                Bad(TypeError, "covariance must be a bool", dict(covariance="yes")),
            )
        ),
    ),
    Spec(
        function=segment_softmax_stats,
        covers=(SegmentSoftmaxStats,),
        samples={"plain": sample, "gaps": lambda: sample(GAPS, ())},
        derivative_samples=("plain",),
        reference=stats_reference,
        result="wide",
        rounded=False,
        empty={"no values": Empty(nothing, -math.inf, (2, 2))},
        nan={"x": row_nan},
        large=large,
        **COMMON,
    ),
    Spec(
        function=segment_softmax,
        samples={"plain": sample, "gaps": lambda: sample(GAPS, ())},
        reference=softmax_reference,
        empty={"no values": Empty(nothing, 0.0, (0, 2))},
        nan={"x": lambda found, without: bool(found[:3, 0].isnan().all())},
        large=large,
        **COMMON,
    ),
    Spec(
        function=segment_tree_reduce,
        samples={
            "plain": lambda: sample(op=smooth),
            "identity": lambda: sample(GAPS, op=smooth, identity=0.5),
            "named": lambda: sample(GAPS, op="logsumexp", identity=0.25),
            "length": lambda: sample(op=smooth, max_length=5),
        },
        reference=tree_reference,
        rounded=False,  # a callable computes in what it is given
        autocast={BF16: BF16, F32: F32, F64: F64},
        tolerances={BF16: (5e-2, 5e-2), F16: (5e-3, 5e-3)},
        empty={"no values": Empty(lambda: nothing(op=smooth, identity=0.5), 0.5, (2, 2))},
        nan={"x": row_nan},
        gradients=("x",),
        vmap=("x",),
        errors=(
            *BAD_OFFSETS,
            Bad(TypeError, "x must be a Tensor", dict(x=None)),
            Bad(TypeError, "op must be callable or a string, got int", dict(op=1)),
            Bad(ValueError, "op must be callable or one of sum, max, .*got 'min'", dict(op="min")),
            Bad(ValueError, r"op must return a tensor of shape \[4, 2\], got \[4\]",
                dict(op=lambda a, b: a[:, 0])),
            Bad(ValueError, "identity must be given where a segment is empty",
                dict(offsets=torch.tensor([0, 0, 11]))),
            Bad(ValueError, r"identity must broadcast to \[2\], got \[3\]",
                dict(identity=torch.zeros(3))),
            Bad(TypeError, "identity must be a number, got str", dict(identity="0")),
            Bad(ValueError, "longer than max_length, 4", dict(max_length=4)),
            Bad(TypeError, "max_length must be an integer", dict(max_length=2.5)),
        ),
    ),
)  # fmt: skip
