"""What crosses to csrc/bind/betti_matching.cpp, and the options of the op of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, address

TERMS = 3  # the last axis of the loss: csrc/common/betti_matching.h
WIDTHS = (12, 6, 6)  # of the rows of each term


class Options(NamedTuple):
    """The numbers that cross into the op of the loss as one list of floats."""

    superlevel: bool
    dims: int  # bit d: dimension d is wanted
    extreme: bool
    essential: bool
    want_grad: bool
    min_persistence: float
    matched_weight: float
    unmatched_weight: float
    dim_weight0: float
    dim_weight1: float = 1.0  # of dimensions that an image does not have: unused
    dim_weight2: float = 1.0


def dim_weights(o: Options) -> tuple[float, float, float]:
    return o.dim_weight0, o.dim_weight1, o.dim_weight2


class Problem(NamedTuple):
    items: int
    shape: tuple[int, ...]  # of an item
    want: int  # bit d: dimension d is wanted
    superlevel: bool
    input: int
    input_dtype: int
    target: int
    target_dtype: int


class Loss(NamedTuple):
    extreme: bool
    essential: bool
    min_persistence: float
    matched_weight: float
    unmatched_weight: float
    dim_weight: tuple[float, float, float]


class Rows(NamedTuple):
    """Matched bars, those of the input alone, those of the target alone, on a device."""

    counts: tuple[int, int, int]
    addresses: tuple[int, int, int]


class Residue(NamedTuple):
    """What csrc/cpu/betti_volume_residue.h takes, in host memory."""

    rank: int
    tree: int
    names: int
    count: int


RECORDS = (Problem, Loss, Rows, Residue)


def voxels(p: Problem) -> int:
    """Of an item."""
    return math.prod(p.shape)


def raise_nan(place: int, items: int, first: int) -> None:
    """As the CPU does, of a place that the kernels told for a NaN; 0: none."""
    if place:
        item, image = divmod(2 * items - place, 2)
        name = ("input", "target")[image]
        raise ValueError(f"{name} must not contain NaN; item {first + item} does")


def common_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """float32 or float64, whichever holds every value of either."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    return torch.float64 if dtype == torch.float64 else torch.float32


def pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and of one dtype."""
    dtype = common_dtype(input, target)
    return input.to(dtype).contiguous(), target.to(dtype).contiguous()


def wanted(mask: int) -> list[int]:
    """The dimensions of a mask."""
    return [d for d in range(3) if mask >> d & 1]


def weighty_dims(o: Options, spatial: int) -> list[int]:
    """The dimensions that are wanted and have a weight."""
    return [d for d in wanted(int(o.dims)) if d < spatial and dim_weights(o)[d] != 0]


def weighty(o: Options, target_weight: float, tables: Sequence[Tensor]) -> list[Tensor]:
    """Tables of rows without those of weight 0: 0 times an infinite slope would be NaN."""
    weights = (o.matched_weight, o.unmatched_weight, target_weight)
    return [t if w != 0 else t[..., :0, :] for t, w in zip(tables, weights)]


def mask_of(dims: list[int]) -> int:
    return sum(1 << d for d in dims)


def problem(
    input: Tensor, target: Tensor | None, lead: int, superlevel: bool, want: int
) -> Problem:
    """Of a pair; the first `lead` dimensions count images."""
    shape = tuple(input.shape[lead:])
    items, dtype = math.prod(input.shape[:lead]), DTYPE_CODES[input.dtype]
    return Problem(items, shape, want, superlevel, input.data_ptr(), dtype, address(target), dtype)


def loss(o: Options) -> Loss:
    return Loss(
        bool(o.extreme), bool(o.essential), o.min_persistence, o.matched_weight,
        o.unmatched_weight, dim_weights(o),
    )  # fmt: skip
