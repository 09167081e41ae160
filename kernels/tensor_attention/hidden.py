"""What is hidden from a query must not reach it, NaN and infinity included.

The passes multiply probabilities of 0 with what is hidden. Where something is hidden they are given
keys and values cleared of NaN and infinity (`cleared`, one pass over them, which counts what it
takes away), and afterwards a kernel looks which queries see such an entry and gives them NaN. It
returns at once where the count is 0: nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import cdiv
from .problem import UNLIMITED, Problem
from .tiles import NEG_INF, POS_INF, head_queries

_BLOCK = 1024


@triton.jit
def tensor_attention_clear_kernel(
    from_ptr,
    to_ptr,  # like from_ptr: 0 for NaN and infinity
    count_ptr,  # int32 [1]: not 0 once anything was
    numel,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    t = tl.load(from_ptr + at, mask=inside, other=0.0)
    finite = tl.abs(t.to(tl.float32)) < POS_INF
    tl.store(to_ptr + at, tl.where(finite, t, 0.0).to(t.dtype), mask=inside)
    bad = tl.sum((~finite).to(tl.int32), axis=0)
    if bad > 0:
        tl.store(count_ptr, 1)


@triton.jit
def _look(
    k_ptr, v_ptr, n, key_head, mask_ptr, mask_at, i, p, left, right, d, dv, D: tl.constexpr,
    DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one query and axis: whether it sees a key, one that is not finite, and which features."""
    any_key = tl.zeros((BLOCK,), tl.int32)
    by_key = tl.zeros((BLOCK,), tl.int32)
    by_value = tl.zeros((DV,), tl.int32)
    lo = tl.maximum(p - left, 0)
    hi = tl.minimum(p + right + 1, n)
    for start in range(lo, hi, BLOCK):
        j = start + tl.arange(0, BLOCK)
        seen = j < hi
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + mask_at + j, mask=seen, other=NEG_INF) != NEG_INF)
        row = key_head * n + j
        cols = tl.arange(0, D)[None, :]
        k = tl.load(k_ptr + row[:, None] * d + cols, mask=seen[:, None] & (cols < d), other=0.0).to(
            tl.float32
        )
        cols = tl.arange(0, DV)[None, :]
        v = tl.load(
            v_ptr + row[:, None] * dv + cols, mask=seen[:, None] & (cols < dv), other=0.0
        ).to(tl.float32)
        any_key = tl.maximum(any_key, seen.to(tl.int32))
        bad = tl.where(tl.abs(k) < POS_INF, 0, 1)
        by_key = tl.maximum(by_key, tl.max(bad, axis=1))
        bad = tl.where(tl.abs(v) < POS_INF, 0, 1)
        by_value = tl.maximum(by_value, tl.max(bad, axis=0))
    return tl.max(any_key, axis=0), tl.max(by_key, axis=0), by_value


@triton.jit
def tensor_attention_spoil_kernel(
    x,  # Inputs, as given
    out_ptr,  # [B, H, n_q, dv]
    lse_ptr,  # float32 [B, H, n_q]
    count_ptr,  # of the clearing
    C: tl.constexpr,  # Constants
):
    """One query: NaN where it sees NaN or infinity."""
    if tl.load(count_ptr) != 0:
        pid = tl.program_id(0)
        i = pid % x.n_q
        slab = pid // x.n_q
        p = i + x.q_offset
        queries = head_queries(x, slab // x.n_heads, slab % x.n_heads, i, p, p, C)
        key_head = queries.key_head
        mask1_at = queries.mask1_at + i.to(tl.int64) * x.stride_mask1_row
        any1, key1, value1 = _look(
            x.k1, x.v1, x.n_1, key_head, x.mask1, mask1_at, i, p, x.left1, x.right1, x.d, x.dv,
            C.D, C.DV, C.BLOCK_N,
        )  # fmt: skip
        any2, key2, value2 = _look(
            x.k2, x.v2, x.n_2, key_head, x.mask2, queries.mask2_at, i, p, x.left2, x.right2, x.d,
            x.dv, C.D, C.DV, C.BLOCK_N,
        )  # fmt: skip
        by_key = key1 * any2 + key2 * any1
        cols = tl.arange(0, C.DV)
        spoilt = by_key + value1 * any2 + value2 * any1 > 0
        nan = tl.full((C.DV,), float("nan"), tl.float32)
        ptrs = out_ptr + queries.flat * x.dv + cols
        tl.store(ptrs, nan.to(out_ptr.dtype.element_ty), mask=spoilt & (cols < x.dv))
        if by_key > 0:
            tl.store(lse_ptr + queries.flat, float("nan"))


def hides(p: Problem) -> bool:
    """Whether any key may be hidden from any query."""
    return p.mask1 is not None or p.mask2 is not None or min(p.limits) < UNLIMITED


def cleared(p: Problem) -> tuple[Problem, torch.Tensor]:
    """With keys and values free of NaN and infinity, and a count of 0 where they were before."""
    count = torch.zeros(1, dtype=torch.int32, device=p.q.device)
    found = {}
    for name in ("k1", "k2", "v1", "v2"):
        t = getattr(p, name)
        found[name] = torch.empty_like(t)
        tensor_attention_clear_kernel[(cdiv(t.numel(), _BLOCK),)](
            t, found[name], count, t.numel(), BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return p._replace(**found), count
