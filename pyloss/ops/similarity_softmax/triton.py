"""The ops of similarity_softmax by the Triton kernels, and what these leave to torch's tiles.

    forward    statistics of rows, and of columns from the same sweep; counts from indices alone
    backward   D up to 128: a sweep over the keys gives the queries' gradient, one over the queries
               the keys', each with its logits formed once more. Wider: blocks of rows of the
               logits' gradient, formed once, and two products with each. A tensor with itself has
               one gradient, whose tiles hold the pairs (i, j) and (j, i).

Queries and keys of a width that is no multiple of 16 are copied to rows that are. Left to
by_tiles: float64, nothing to do (an empty side), pairs beyond margins.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops.similarity_softmax import by_tiles
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    DROP,
    MEAN,
    NEGATIVES,
    POSITIVE,
    SIGMOID,
    WANT_BIAS,
    WANT_KEYS,
    WANT_QUERIES,
    WANT_SCALE,
    WANTS,
    Pairs,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**31 - 2**16  # indices of rows, of 32 bits
# Bytes of a block of the logits' gradient: at least so many, and more beside large inputs, because
# each block costs a pass over the float32 gradient of the keys.
_BLOCK_BYTES = 128 << 20
_ALIGN = 128  # columns of the widest tile; also keeps the rows of a block aligned
_LOG2E = 1.4426950408889634


def _kernels():
    from pyloss.kernels import similarity_softmax  # with its first use

    return similarity_softmax


def _keys(p: Pairs) -> Tensor:
    return p.queries if p.keys is None else p.keys


def _takes(p: Pairs) -> bool:
    n, m, d = p.queries.shape[0], *_keys(p).shape
    some = n and m and d and max(n, m, n + p.first) <= _MOST
    return bool(some) and p.queries.dtype in _DTYPES


# --------------------------------------------------------------------------------------------------
# Indices


class _Ids(NamedTuple):
    """Ids as places among the sorted ids of the keys: equal numbers for equal ids, of 32 bits."""

    queries: Tensor  # -1: no key has this id
    keys: Tensor


def _ids(p: Pairs) -> _Ids | None:
    if not p.flags & (POSITIVE | DROP):
        return None
    known = p.key_ids.sort().values
    keys = torch.searchsorted(known, p.key_ids, out_int32=True)
    at = torch.searchsorted(known, p.query_ids, out_int32=True).clamp_(max=known.numel() - 1)
    return _Ids(torch.where(known.index_select(0, at) == p.query_ids, at, -1), keys)


# --------------------------------------------------------------------------------------------------
# What the kernels take


def _aligned(t: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 numbers: others are loaded a number at a time."""
    return t if t.shape[1] % 16 == 0 else F.pad(t, (0, -t.shape[1] % 16))


class _Call:
    def __init__(self, p: Pairs, bias: Tensor | None = None, sigmoid: bool = False) -> None:
        self.p, self.kernels, self.ids = p, _kernels(), _ids(p)
        self.queries = _aligned(p.queries)
        self.keys = self.queries if p.keys is None else _aligned(p.keys)
        if p.scales is None:
            self.scale = self.queries.new_full((1,), p.scale, dtype=torch.float32)
        else:
            self.scale = p.scales.detach().view(-1)
        same = 1 if p.flags & POSITIVE else 2 if p.flags & DROP else 0
        self.kind = self.kernels.Kind(p.first >= 0, same, bool(p.flags & NEGATIVES), sigmoid)
        self.pairs = self.kernels.Pairs(
            self.scale, 0 if self.scale.numel() == 1 else 1, bias, p.target,
            *(self.ids or (None, None)), p.first, self.queries.shape[0], self.keys.shape[0],
        )  # fmt: skip

    @property
    def has_positives(self) -> bool:
        return self.p.target is not None or self.kind.same == 1

    def arguments(self) -> tuple:
        return self.queries, self.keys, self.pairs, self.kind


def _bias(p: Pairs, bias: Tensor | None, numbers) -> Tensor:
    if bias is None:
        return p.queries.new_full((1,), numbers[0], dtype=torch.float32)
    return bias.detach().view(1)


# --------------------------------------------------------------------------------------------------
# Forward


def forward(*args) -> list[Tensor]:
    p = Pairs(*args)
    if not _takes(p):
        return by_tiles.forward(*args)
    call = _Call(p)
    columns, mean = bool(p.flags & COLUMNS), bool(p.flags & MEAN)
    found = call.kernels.pair_statistics(*call.arguments(), columns=columns, mean=mean)
    counts = call.kernels.pair_counts(call.pairs, call.kind, call.queries, columns)
    results = [found.lse, _or_zeros(found.positive, found.lse), *counts[:2]]
    if mean:
        results.append(found.mean)
    if columns:
        of_columns = found.column_lse, _or_zeros(found.column_positive, found.column_lse)
        results += [*of_columns, *counts[2:]]
    return results


def _or_zeros(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def sums_forward(*args) -> list[Tensor]:
    p, (bias, numbers, kind) = Pairs(*args[:9]), args[9:]
    if kind != SIGMOID or not _takes(p):
        return by_tiles.sums_forward(*args)
    call = _Call(p, _bias(p, bias, numbers), sigmoid=True)
    return [call.kernels.pair_softplus_sums(*call.arguments())]


# --------------------------------------------------------------------------------------------------
# Backward


def backward(*args) -> list[Tensor]:
    p, (want, lse, column_lse, g, g_positive, column_g, column_g_positive) = (
        Pairs(*args[:9]), args[9:],
    )  # fmt: skip
    if not _takes(p):
        return by_tiles.backward(*args)
    call = _Call(p)
    if not call.has_positives:
        g_positive = column_g_positive = None
    a = torch.zeros_like(lse) if g is None else g
    column_lse = None if column_g is None else _in_powers(column_lse)
    lse = torch.full_like(lse, torch.inf) if g is None else _in_powers(lse)
    coeffs = call.kernels.Coeffs(lse, a, g_positive, column_lse, column_g, column_g_positive)
    return _Gradients(call, want, coeffs).results()


def _in_powers(lse: Tensor) -> Tensor:
    """lse in powers of 2, +inf where nothing counts."""
    return lse.nan_to_num(torch.nan, torch.inf, torch.inf).mul_(_LOG2E)


def sums_backward(*args) -> list[Tensor]:
    p, (bias, numbers, kind, want, g, _) = Pairs(*args[:9]), args[9:]
    if kind != SIGMOID or not _takes(p):
        return by_tiles.sums_backward(*args)
    call = _Call(p, _bias(p, bias, numbers), sigmoid=True)
    return _Gradients(call, want, call.kernels.Coeffs(None, g), bias).results()


def _contiguous(coeffs):
    return type(coeffs)(*(None if t is None else t.contiguous() for t in coeffs))


def _unit(coeffs, scale: Tensor) -> Tensor:
    """A power of 2 that makes the logits' gradient 2^14 at most: float16 has few small numbers."""
    parts = (coeffs.a, coeffs.positive, coeffs.column_a, coeffs.column_positive)
    most = [torch.where(t.isfinite(), t.abs(), 0.0).amax() for t in parts if t is not None]
    bound = sum(most) * scale.abs().amax().clamp(min=1.0)
    exponent = torch.frexp(bound).exponent.clamp(min=-80)
    return torch.exp2((14 - exponent).float())


class _Gradients:
    """Those wanted, of one call."""

    def __init__(self, call: _Call, want: int, coeffs, bias: Tensor | None = None) -> None:
        self.call, self.want, self.kernels = call, want, call.kernels
        self.both = call.p.keys is None
        self.sources = (call.p.queries, call.p.keys, call.p.scales, bias)
        self.unit = None
        coeffs = _contiguous(coeffs)
        if call.queries.dtype == torch.float16:
            self.unit = _unit(coeffs, call.scale)
            names = [n for n, t in coeffs._asdict().items() if t is not None and "lse" not in n]
            coeffs = coeffs._replace(**{n: getattr(coeffs, n) * self.unit for n in names})
        self.coeffs = coeffs
        # Sums over both (i, j) and (j, i) know no columns apart from rows.
        self.symmetric = self.both and coeffs.column_a is None and coeffs.column_positive is None
        self.of = self.kernels.BOTH if self.symmetric else self.kernels.QUERIES
        self.sums = {"want_scale": bool(want & WANT_SCALE), "want_bias": bool(want & WANT_BIAS)}

    def results(self) -> list[Tensor]:
        whole = self.call.queries.shape[1] <= self.kernels.MOST_WHOLE
        of_queries, of_keys, scale_sums, bias_sums = self._swept() if whole else self._by_blocks()
        if self.both and of_keys is not None:
            of_queries = of_queries + of_keys
        found = (of_queries, of_keys, self._per_scale(scale_sums), self._total(bias_sums))
        return [
            self._settled(value, source)
            for value, source, bit in zip(found, self.sources, WANTS)
            if self.want & bit
        ]

    def _settled(self, t: Tensor, source: Tensor) -> Tensor:
        t = t if self.unit is None else t / self.unit
        if t.dim() == 2:
            t = t[:, : source.shape[1]]
        return t.reshape(source.shape).to(source.dtype).contiguous()

    def _total(self, sums: Tensor | None) -> Tensor | None:
        if sums is None:
            return None
        return sums.sum() / 2 if self.symmetric else sums.sum()

    def _per_scale(self, sums: Tensor | None) -> Tensor | None:
        return self._total(sums) if sums is None or self.call.p.scales.dim() == 0 else sums

    def _swept(self) -> tuple:
        """Gradients of queries and of keys, and the sums for scale and bias."""
        sweep = functools.partial(self.kernels.pair_sweep, *self.call.arguments(), self.coeffs)
        # Where more is to be added or multiplied the rounding comes last.
        dtype = torch.float32 if self.unit is not None or self.both != self.symmetric else None
        of_queries, of_keys, scale_sums, bias_sums = None, None, None, None
        if self.want & (WANT_QUERIES | WANT_SCALE | WANT_BIAS):
            of_queries, scale_sums, bias_sums = sweep(self.of, dtype=dtype, **self.sums)
        if self.want & WANT_KEYS or (self.want & WANT_QUERIES and self.both and not self.symmetric):
            of_keys = sweep(self.kernels.KEYS, dtype=dtype).out
        return of_queries, of_keys, scale_sums, bias_sums

    def _by_blocks(self) -> tuple:
        from pyloss.kernels.linear_cross_entropy import masked_matmul_nn, masked_matmul_tn

        queries, keys = self.call.queries, self.call.keys
        (n, d), m = queries.shape, keys.shape[0]
        step = block_rows(n, m, d, queries.element_size())
        dz = queries.new_empty((step, -(-m // _ALIGN) * _ALIGN))
        wants_keys = self.want & WANT_KEYS or (self.both and not self.symmetric)
        of_queries, of_keys = None, None
        if self.want & WANT_QUERIES:
            wide = self.unit is not None or self.both != self.symmetric
            of_queries = queries.new_empty((n, d), dtype=torch.float32 if wide else None)
        if wants_keys:
            wide = self.unit is not None or self.both or step < n
            of_keys = keys.new_empty((m, d), dtype=torch.float32 if wide else None)
        sums = []
        for row in range(0, n, step):
            some, *found = self.kernels.pair_gradient_block(
                *self.call.arguments(), self.coeffs, self.of, dz, row, **self.sums
            )
            sums.append(found)
            if of_queries is not None:
                masked_matmul_nn(some, keys, None, None, of_queries[row : row + step])
            if of_keys is not None:
                masked_matmul_tn(
                    some, queries[row : row + step], None, None, of_keys, accumulate=row > 0
                )
        scale_sums, bias_sums = (
            None if found[0] is None else torch.cat(found) for found in zip(*sums)
        )
        return of_queries, of_keys, scale_sums, bias_sums


def block_rows(n: int, m: int, d: int, itemsize: int) -> int:
    """Queries whose part of the logits' gradient exists at a time: whole tiles of any height."""
    room = max(_BLOCK_BYTES, 3 * (n + m) * d * itemsize // 2)
    rows = max(_ALIGN, room // (m * itemsize) // _ALIGN * _ALIGN)
    return min(rows, -(-n // _ALIGN) * _ALIGN)
