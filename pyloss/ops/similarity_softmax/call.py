"""What the ops of similarity_softmax take and give."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops._launch import accumulator_dtype

# Bits of `flags`: how ids and denominators are read, and which results are wanted.
POSITIVE, DROP, NEGATIVES, COLUMNS, MEAN = 1, 2, 4, 8, 16

# Bits of `want` of the backwards, in the order of the results.
WANT_QUERIES, WANT_KEYS, WANT_SCALE, WANT_BIAS = WANTS = 1, 2, 4, 8

SAME = {"ignore": 0, "positive": POSITIVE, "drop": DROP}
DENOMINATORS = {"all": 0, "negatives": NEGATIVES}

# The kinds of similarity_sums; what its numbers are.
SIGMOID, MARGINS = 0, 1  # (bias,); (above, below)

# Why a mesh splits no tensor of these ops.
WHOLE = "every row meets every other; group= of the losses has each process hold its rows alone"
SCHEMA = (
    "Tensor queries, Tensor? keys, float scale, Tensor? scales, Tensor? target, "
    "Tensor? query_ids, Tensor? key_ids, SymInt first, int flags"
)


class Pairs(NamedTuple):
    """The arguments of SCHEMA."""

    queries: Tensor  # (N, D)
    keys: Tensor | None  # (M, D); None: the queries, and nothing but one scale
    scale: float  # of all, where there are no scales
    scales: Tensor | None  # () or (N,), of the accumulator's dtype
    target: Tensor | None  # (N,), int64
    query_ids: Tensor | None  # (N,), int64, with POSITIVE or DROP
    key_ids: Tensor | None  # (M,)
    first: int
    flags: int


class Stats(NamedTuple):
    """Of the logits z_ij of each query, and of each key where the columns were asked for; float64
    for float64, else float32."""

    lse: Tensor  # (N,) log sum exp z_ij over the denominator; of nothing -inf
    positive: Tensor  # (N,) sum of z_ij over the positives
    count: Tensor  # (N,) entries of the denominator
    positives: Tensor  # (N,)
    mean: Tensor | None  # (N,) of z_ij under its softmax; no gradient
    column_lse: Tensor | None  # (M,) the same over i
    column_positive: Tensor | None
    column_count: Tensor | None
    column_positives: Tensor | None


SOURCES = (0, 1, 3)  # of Pairs, those that have a gradient; WANTS has their order


def softmax_outputs(queries: Tensor, keys: Tensor | None, flags: int) -> list[Tensor]:
    """Empty results: 4 of the rows, the mean and 4 of the columns where wanted."""
    rows, columns = queries.shape[0], (queries if keys is None else keys).shape[0]
    dtype = accumulator_dtype(queries.dtype)
    found = [queries.new_empty(rows, dtype=dtype) for _ in range(5 if flags & MEAN else 4)]
    if flags & COLUMNS:
        found += [queries.new_empty(columns, dtype=dtype) for _ in range(4)]
    return found


def split_softmax(found, flags: int):
    """The results as nine, None for those not wanted."""
    found = list(found)
    mean = [found.pop(4)] if flags & MEAN else [None]
    return (*found[:4], *mean, *(found[4:] if flags & COLUMNS else (None,) * 4))


def sums_outputs(queries: Tensor, kind: int) -> list[Tensor]:
    dtype = accumulator_dtype(queries.dtype)
    count = 1 if kind == SIGMOID else 4
    return [queries.new_empty(queries.shape[0], dtype=dtype) for _ in range(count)]


def gradients(pairs: Pairs, want: int, bias: Tensor | None = None) -> list[Tensor | None]:
    """Empty gradients of queries, keys, scales and bias; None for those not wanted."""
    sources = (pairs.queries, pairs.keys, pairs.scales, bias)
    return [
        torch.empty_like(s, memory_format=torch.contiguous_format) if want & bit else None
        for s, bit in zip(sources, WANTS)
    ]


def checked(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    first: int,
    target: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same: str,
    flags: int,
) -> tuple:
    """The op's arguments: rows contiguous, ids where they matter, keys None for the same tensor."""
    flags |= SAME[same]
    scales = None
    if isinstance(scale, Tensor):
        scales, scale = scale.to(accumulator_dtype(queries.dtype)), 1.0
        scales = scales.contiguous() if scales.dim() else scales
    if flags & (POSITIVE | DROP):
        key_ids = query_ids if key_ids is None else key_ids
    else:
        query_ids = key_ids = None
    one_scale = scales is None or scales.dim() == 0
    if keys is queries and query_ids is key_ids and one_scale:
        keys = None
    else:
        keys = keys.contiguous()
    return (
        queries.contiguous(), keys, float(scale), scales, _contiguous(target),
        _contiguous(query_ids), _contiguous(key_ids), first, flags,
    )  # fmt: skip


def _contiguous(indices: Tensor | None) -> Tensor | None:
    return None if indices is None else indices.contiguous()


def otherwise(dense: Callable, tiles: Callable) -> Callable:
    """The implementation "reference": the dense one where it is asked for, and tiles where a device
    has no kernels."""

    def call(*args):
        return (dense if backends.forced() == "reference" else tiles)(*args)

    return call


def flops(queries, keys, want: int | None = None) -> int:
    """Of shapes: the logits, and the products of the gradients wanted (None: the forward). Of a
    tensor with itself each logit is needed once, and the gradient is one product."""
    n, d = queries
    if keys is None:
        return n * n * d * (1 if want is None else 3 if want else 0)
    grads = 0 if want is None else bool(want & (WANT_QUERIES | WANT_SCALE)) + bool(want & WANT_KEYS)
    return 2 * n * keys[0] * d * (1 + grads)
