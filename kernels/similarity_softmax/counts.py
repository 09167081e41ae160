"""How many pairs of a query, or of a key, count: from indices and sorted ids alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import cdiv, device_guard
from ..linear_cross_entropy.launch import OPTIONS
from .pairs import Kind, Pairs, target_of


@triton.jit
def pair_counts_kernel(
    p,  # Pairs
    same_ptr,  # int64: keys of each query's id, or queries of each key's; None without ids
    hits_ptr,  # int64 or None; rows: 1 for a target that is no own key, and 1 for one of equal ids,
    equals_ptr,  # written; columns: sums of these over the queries, read
    count_ptr,  # float32
    positives_ptr,  # float32
    K: tl.constexpr,  # Kind
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = p.n_keys if COLUMNS else p.n_queries
    n_other = p.n_queries if COLUMNS else p.n_keys
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    partner = at - p.first if COLUMNS else at + p.first
    own = inside & (partner >= 0) & (partner < n_other) & K.own
    hits = tl.zeros((BLOCK,), tl.int64)
    equals = tl.zeros((BLOCK,), tl.int64)
    same = tl.zeros((BLOCK,), tl.int64)
    if K.same != 0:
        ids, others = (p.key_ids, p.query_ids) if COLUMNS else (p.query_ids, p.key_ids)
        mine = tl.load(ids + at, mask=inside, other=0)
        same = tl.load(same_ptr + at, mask=inside, other=0)
        same -= (own & (mine == tl.load(others + partner, mask=own, other=-2))).to(tl.int64)
    if COLUMNS:
        if hits_ptr is not None:
            hits = tl.load(hits_ptr + at, mask=inside, other=0)
            if K.same != 0:
                equals = tl.load(equals_ptr + at, mask=inside, other=0)
    elif p.target is not None:
        target = target_of(at, p)
        hit = inside & (target >= 0) & ((own & (target == partner)) == 0)
        hits = hit.to(tl.int64)
        if K.same != 0:
            theirs = tl.load(p.key_ids + target, mask=hit, other=-2)
            equals = (hit & (mine == theirs)).to(tl.int64)
        if hits_ptr is not None:
            tl.store(hits_ptr + at, hits, mask=inside)
            if K.same != 0:
                tl.store(equals_ptr + at, equals, mask=inside)
    same -= equals
    positives = hits + same if K.same == 1 else hits
    count = n_other - own.to(tl.int64)
    if K.same == 2:
        count -= same
    if K.negatives:
        count -= positives
    tl.store(count_ptr + at, count.to(tl.float32), mask=inside)
    tl.store(positives_ptr + at, positives.to(tl.float32), mask=inside)


def _equal(of: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """How many of the second are equal to each of the first."""
    known = among.sort().values
    return torch.searchsorted(known, of, right=True) - torch.searchsorted(known, of)


def pair_counts(
    p: Pairs, kind: Kind, like: torch.Tensor, columns: bool
) -> tuple[torch.Tensor, ...]:
    """(entries of the denominator, positives) of the queries, and where `columns` of the keys.

    Args:
        p, kind: as of pair_statistics.
        like: of the device.
    """
    found, hits, equals = [], None, None
    for of_keys in (False, True)[: 1 + columns]:
        ids, others = (p.key_ids, p.query_ids) if of_keys else (p.query_ids, p.key_ids)
        same = _equal(ids, others) if kind.same else None
        if columns and p.target is not None:
            if not of_keys:
                hits, equals = like.new_empty((2, p.n_queries), dtype=torch.int64)
            else:
                keys = p.target.clamp(0, p.n_keys - 1)
                sums = like.new_zeros((2, p.n_keys), dtype=torch.int64)
                hits = sums[0].index_add_(0, keys, hits)
                equals = sums[1].index_add_(0, keys, equals) if kind.same else None
        n = p.n_keys if of_keys else p.n_queries
        count, positives = (like.new_empty(n, dtype=torch.float32) for _ in range(2))
        with device_guard(like):
            pair_counts_kernel[(cdiv(n, 256),)](
                p,
                same,
                hits,
                equals,
                count,
                positives,
                K=kind,
                COLUMNS=of_keys,
                BLOCK=256,
                num_warps=4,
                **OPTIONS,
            )
        found += [count, positives]
    return tuple(found)
