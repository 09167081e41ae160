"""The ops of similarity_softmax by the Triton kernels, and what these leave to torch's tiles.

    counts     of pairs, from indices: sorted ids and sums over targets; no kernel counts
    forward    statistics of rows, and of columns from the same sweep
    backward   D up to 128: a sweep over the keys gives the queries' gradient, one over the queries
               the keys', each with its logits formed once more. Wider: blocks of rows of the
               logits' gradient, formed once, and two products with each. A tensor with itself has
               one gradient, whose tiles hold the pairs (i, j) and (j, i).

Left to by_tiles: float64, nothing to do (an empty side), pairs beyond margins.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
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
    Pairs,
    gradients,
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
    return _Ids(torch.where(known[at] == p.query_ids, at, -1), keys)


def _equal(of: Tensor, among: Tensor) -> Tensor:
    """How many of the second are equal to each of the first."""
    known = among.sort().values
    return torch.searchsorted(known, of, right=True) - torch.searchsorted(known, of)


def _counts(p: Pairs, ids: _Ids | None, columns: bool) -> tuple[Tensor, Tensor]:
    """(entries of the denominator, positives) of the rows, or of the columns."""
    n, m = p.queries.shape[0], _keys(p).shape[0]
    i = torch.arange(n, device=p.queries.device)
    # Queries with a key of their own, or with a target that is another one; and these keys.
    own, own_key = ((p.first >= 0) & (i + p.first < m)), (i + p.first).clamp(0, m - 1)
    hit, target = torch.zeros_like(own), own_key
    if p.target is not None:
        target = p.target.clamp(0, m - 1)
        hit = (p.target == target) & ~(own & (target == own_key))

    def counted(queries: Tensor, keys: Tensor) -> Tensor:
        """Of one pair for each query that is marked."""
        return i.new_zeros(m).index_add_(0, keys, queries.long()) if columns else queries.long()

    left_out, positives = counted(own, own_key), counted(hit, target)
    if ids is not None:
        same = _equal(ids.keys, ids.queries) if columns else _equal(ids.queries, ids.keys)
        for marked, keys in ((own, own_key), (hit, target)):
            same = same - counted(marked & (ids.queries == ids.keys[keys]), keys)
        if p.flags & POSITIVE:
            positives = positives + same
        else:
            left_out = left_out + same
    count = (n if columns else m) - left_out
    return count - positives if p.flags & NEGATIVES else count, positives


# --------------------------------------------------------------------------------------------------
# What the kernels take


class _Call:
    def __init__(self, p: Pairs, bias: Tensor | None = None, sigmoid: bool = False) -> None:
        self.p, self.kernels, self.ids = p, _kernels(), _ids(p)
        self.queries, self.keys = p.queries, _keys(p)
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
    found = call.kernels.pair_statistics(
        *call.arguments(), columns=bool(p.flags & COLUMNS), mean=bool(p.flags & MEAN)
    )
    results = _of_side(call, found.lse, found.positive, False)
    if p.flags & MEAN:
        results.append(found.mean)
    if p.flags & COLUMNS:
        results += _of_side(call, found.column_lse, found.column_positive, True)
    return results


def _of_side(call: _Call, lse: Tensor, positive: Tensor | None, columns: bool) -> list[Tensor]:
    positive = torch.zeros_like(lse) if positive is None else positive
    return [lse, positive, *(t.float() for t in _counts(call.p, call.ids, columns))]


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
    lse, a = _side(lse, g)
    if a is None:
        lse, a = torch.full_like(lse, torch.inf), torch.zeros_like(lse)
    column_lse, column_a = (None, None) if column_g is None else _side(column_lse, column_g)
    coeffs = call.kernels.Coeffs(lse, a, g_positive, column_lse, column_a, column_g_positive)
    return _Gradients(call, want, coeffs).results()


def _side(lse: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """lse in powers of 2, +inf where nothing counts."""
    return torch.where(lse == -torch.inf, torch.inf, lse * _LOG2E), g


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
        self.given = gradients(call.p, want, bias)
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
            self._settled(value).view_as(to).to(to.dtype)
            for to, value in zip(self.given, found)
            if to is not None
        ]

    def _settled(self, t: Tensor) -> Tensor:
        return t if self.unit is None else t / self.unit

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
    room = max(_BLOCK_BYTES, 2 * (n + m) * d * itemsize)
    rows = max(_ALIGN, room // (m * itemsize) // _ALIGN * _ALIGN)
    return min(rows, -(-n // _ALIGN) * _ALIGN)
