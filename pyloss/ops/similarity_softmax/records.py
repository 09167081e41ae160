"""What crosses to csrc/bind/similarity_softmax.cpp."""

from __future__ import annotations

from typing import NamedTuple

from pyloss.ops._launch import DTYPE_CODES, address
from pyloss.ops.similarity_softmax.call import Pairs

# Addresses are 0 where there is nothing.


class Problem(NamedTuple):
    n: int
    m: int
    d: int
    dtype: int
    itself: bool
    queries: int
    keys: int
    scale: float
    scales: int
    scale_of_each: bool
    target: int
    query_ids: int
    key_ids: int
    first: int
    flags: int


class Forward(NamedTuple):
    lse: int
    positive: int
    count: int
    positives: int
    mean: int
    column_lse: int
    column_positive: int
    column_count: int
    column_positives: int


class Backward(NamedTuple):
    lse: int
    column_lse: int
    g: int
    g_positive: int
    column_g: int
    column_g_positive: int
    dq: int
    dk: int
    dscale: int


class Counts(NamedTuple):
    n: int
    d: int
    classes: int
    steps: int
    dtype: int
    x: int
    half: int
    labels: int
    edges: int


class PairSums(NamedTuple):
    kind: int
    bias: int
    number1: float
    number2: float


class PairSumResults(NamedTuple):
    sum1: int
    count1: int
    sum2: int
    count2: int


class PairSumGradients(NamedTuple):
    g1: int
    g2: int
    dq: int
    dk: int
    dscale: int
    dbias: int


class Loss(NamedTuple):
    rows: int
    d: int
    dtype: int
    views: bool
    columns: bool
    sigmoid: bool
    sum: bool
    scale: float
    scales: int
    bias: float
    biases: int
    labels: int
    unit: int
    stats: int


class LossGradients(NamedTuple):
    g: int
    dx1: int
    dx2: int
    dscale: int
    dbias: int


RECORDS = (
    Problem, Forward, Backward, Counts, PairSums, PairSumResults, PairSumGradients, Loss,
    LossGradients,
)  # fmt: skip


def problem(p: Pairs) -> Problem:
    """Of contiguous tensors."""
    keys = p.queries if p.keys is None else p.keys
    scales = p.scales
    return Problem(
        *p.queries.shape[:1], *keys.shape, DTYPE_CODES[p.queries.dtype], p.keys is None,
        p.queries.data_ptr(), keys.data_ptr(), p.scale, address(scales),
        scales is not None and scales.dim() > 0, address(p.target), address(p.query_ids),
        address(p.key_ids), p.first, p.flags,
    )  # fmt: skip
