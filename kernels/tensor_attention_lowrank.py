"""Near-linear tensor attention without causality or windows: features of a tile, used and dropped.

Causal calls: tensor_attention_lowrank_causal.py. Windows run on the reference.

With Ux[j, a] = prod_l k_x[j, l]^a_l over the r = C(d + g, g) exponent vectors |a| <= g and the
weights w_a of the polynomial (reference/tensor_attention_lowrank.py has the algebra):

  state     [A_x | z_x] = Ux^T [v_x | 1]                           one per key axis x
  query     [N | y] = U0 C,  C = w * [A_1 | z_1] * ... * [A_m | z_m],  out = N / y,  lse = log y + c
  state     [E | e] = U0^T [dN | dy]                               the same kernel, of q and dsums
  gradient  dU = [dN | dy] C^T and [v | 1] D^T,  dv = U D,  dx from dU

Features. A tile of BLOCK_F features is g columns of indices (d stands for the factor 1): a thread
gathers x[j, index_1] * ... * x[j, index_g] from rows that lie in the first-level cache. Within a
tile the last index runs through neighbours and the others hardly change, so a warp reads one line.
That takes g loads per feature against 2 dv operations of the product. The outer product of
registers (x_a times all x_b, for one a at a time) needs no gather, but forms d^2 features instead
of d (d + 1) / 2 for g = 2: 1.9 times the products at d = 64, which are what bounds the kernel.

dx. With others_t = prod_{s != t} x[j, index_s]: dx[j, l] = sum_t sum_f dU[j, f] others_t[j, f]
[index_t(f) = l], a product with a matrix of zeros and ones: exact in tf32, no atomics.

Who owns what. state: a program owns BLOCK_F features times BLOCK_C value columns and a range of
tokens; partial sums go to scratch and are added up in order. query, gradient: a program owns
BLOCK_T tokens and walks all features. Every sum has a fixed order: the same inputs give the same
bits. No program waits for the host; `lse` is NaN where y is not positive.

FLOP per head, m axes, r features, n tokens: forward 2 (m + 1) n r (dv + 1). Backward the same for
E, dU and dv, and 2 g n r d per tensor for dx. For m = g = 2, n = 65536, d = dv = 64 (r = 2145):
55 GFLOP forward, 220 backward; three tf32 products for one.
Traffic: rows of x and v once per feature tile of the state kernel (34 times 34 MB, from L2 where a
head fits it), states r (dv + 1) 4 bytes per axis and head. Nothing of size n r is written.

Numerics: float32; products as three tf32 products (`tf32x3`, relative error about 2^-21 of the sum
of the terms' sizes), never plain tf32, whose 2^-11 would exceed the stated bound. 256 tokens are
summed before they join the running sum: the chain is 256 + n / 256.

Prediction (H200, 380 TFLOP/s dense tf32 assumed; no device was at hand, nothing here is measured):
the case above forward 165 TFLOP of tf32 products: 0.43 ms at the peak, 0.7 to 1.0 ms at the 45 to
60 % that such kernels reach; backward 660: 1.7 ms at the peak, 3 to 4 ms. Asked: 1 and 4 for both.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _tensor_attention_lowrank_plan as plan
from ._launch import FULL_GRID, cdiv, device_guard

SUMMED = tl.constexpr(plan.SUMMED)
PRECISION = "tf32x3"


class Config(NamedTuple):
    block_t: int
    block_f: int
    num_warps: int
    num_stages: int = 2


# Estimated by registers, not tuned: no device was at hand.
STATE = Config(64, 64, 4)
QUERY = Config(64, 64, 4)
GRADIENT = Config(64, 64, 8)
GRADIENT_WIDE = Config(32, 64, 8)  # more than 64 features: shared memory

# --------------------------------------------------------------------------------------- kernels


@triton.jit
def _column(index_ptr, f, rank, d, T: tl.constexpr, DEGREE: tl.constexpr):
    """Factor T of the features f; d, the factor 1, beyond the last one."""
    return tl.load(index_ptr + f * DEGREE + T, mask=f < rank, other=d)


@triton.jit
def _factor(row_ptrs, kept, column, d):
    at = row_ptrs[:, None] + column[None, :]
    return tl.load(at, mask=kept[:, None] & (column < d)[None, :], other=1.0)


@triton.jit
def _features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE: tl.constexpr):
    """A tile [tokens, features]; 0 for tokens that are not kept, which are never read."""
    u = tl.where(kept[:, None] & (f < rank)[None, :], 1.0, 0.0)
    for t in tl.static_range(DEGREE):
        u *= _factor(row_ptrs, kept, _column(index_ptr, f, rank, d, t, DEGREE), d)
    return u


@triton.jit
def _kept(mask_ptr, rows, n, stride_mask_batch, stride_mask_head, b, h):
    kept = rows < n
    if mask_ptr is not None:
        at = mask_ptr + b * stride_mask_batch + h * stride_mask_head + rows
        kept = kept & (tl.load(at, mask=kept, other=0) != 0)
    return kept


@triton.jit
def tensor_attention_lowrank_state_kernel(
    x_ptr,  # [batch, head, n, d]
    v_ptr,  # [batch, head, n, dv]
    extra_ptr,  # [batch, head, n] contiguous, the column beside v; None: ones
    mask_ptr,  # [batch, head, n] of bytes or None
    index_ptr,  # [rank, DEGREE]
    out_ptr,  # [split, batch, head, rank, dv + 1]
    n,
    d,
    dv,
    rank,
    heads,
    per_split,
    stride_x_batch,
    stride_x_head,
    stride_x_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_mask_batch,
    stride_mask_head,
    DEGREE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_c = tl.cdiv(dv, BLOCK_C)
    tile_c = tl.program_id(0) % tiles_c
    f = tl.program_id(0) // tiles_c * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    b, h = head // heads, head % heads
    x_ptr += b * stride_x_batch + h * stride_x_head
    v_ptr += b * stride_v_batch + h * stride_v_head
    total = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    total_z = tl.zeros((BLOCK_F,), tl.float32)
    end = tl.minimum((split + 1) * per_split, n)
    for start in range(split * per_split, end, SUMMED):
        part = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
        part_z = tl.zeros((BLOCK_F,), tl.float32)
        for step in range(0, SUMMED, BLOCK_T):
            rows = (start + step + tl.arange(0, BLOCK_T)).to(tl.int64)
            kept = _kept(mask_ptr, rows, end, stride_mask_batch, stride_mask_head, b, h)
            u = _features(x_ptr + rows * stride_x_row, kept, index_ptr, f, rank, d, DEGREE)
            at = v_ptr + rows[:, None] * stride_v_row + c[None, :]
            v = tl.load(at, mask=kept[:, None] & (c < dv)[None, :], other=0.0)
            part = tl.dot(tl.trans(u), v, part, input_precision=PRECISION)
            if extra_ptr is not None:
                extra = tl.load(extra_ptr + head * n + rows, mask=kept, other=0.0)
                part_z += tl.sum(u * extra[:, None], 0)
            else:
                part_z += tl.sum(u, 0)
        total += part
        total_z += part_z
    slab = (split * tl.num_programs(2) + head) * rank
    at = out_ptr + (slab + f) * (dv + 1)
    tl.store(at[:, None] + c[None, :], total, mask=(f < rank)[:, None] & (c < dv)[None, :])
    if tile_c == 0:
        tl.store(at + dv, total_z, mask=f < rank)


@triton.jit
def tensor_attention_lowrank_query_kernel(
    q_ptr,  # [batch, head, n, d]
    state_ptr,  # [batch, key head, rank, dv + 1]: C
    dead_ptr,  # [batch, key head] of bytes, whose queries see nothing; or None
    index_ptr,  # [rank, DEGREE]
    out_ptr,  # [batch, head, n, dv]
    lse_ptr,  # [batch, head, n]
    y_ptr,  # [batch, head, n]
    n,
    d,
    dv,
    rank,
    heads,
    group,
    centre,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    DEGREE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    tile_c = tl.program_id(1)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    head = tl.program_id(2).to(tl.int64)
    b, h = head // heads, head % heads
    kept = rows < n
    row_ptrs = q_ptr + b * stride_q_batch + h * stride_q_head + rows * stride_q_row
    key_head = b * (heads // group) + h // group
    state_ptr += key_head * rank * (dv + 1)
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    y = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, rank, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        u = _features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE)
        s_ptrs = state_ptr + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        s = tl.load(s_ptrs[:, None] + c[None, :], mask=inside, other=0.0)
        sums = tl.dot(u, s, sums, input_precision=PRECISION)
        y += tl.sum(u * tl.load(s_ptrs + dv, mask=f < rank, other=0.0)[None, :], 1)
    if dead_ptr is not None:
        alive = kept & (tl.load(dead_ptr + key_head) == 0)
    else:
        alive = kept
    y = tl.where(alive, y, 0.0)
    divisor = tl.where(alive, y, 1.0)
    lse = tl.where(alive, tl.log(divisor) + centre, float("-inf"))
    out = tl.where(alive[:, None], sums / divisor[:, None], 0.0)
    at = out_ptr + (head * n + rows) * dv
    tl.store(at[:, None] + c[None, :], out, mask=kept[:, None] & (c < dv)[None, :])
    if tile_c == 0:
        tl.store(lse_ptr + head * n + rows, lse, mask=kept)
        tl.store(y_ptr + head * n + rows, y, mask=kept)


@triton.jit
def tensor_attention_lowrank_gradient_kernel(
    x_ptr,  # [batch, head, n, d]
    v_ptr,  # [batch, head, n, dv]
    extra_ptr,  # [batch, head, n] contiguous, the column beside v; None: ones
    mask_ptr,  # [batch, head, n] of bytes or None
    state_ptr,  # [batch, head / group, rank, dv + 1]
    index_ptr,  # [rank, DEGREE]
    dx_ptr,  # [batch, head, n, d] contiguous
    dv_ptr,  # [batch, head, n, dv] contiguous, or None
    n,
    d,
    dv,
    rank,
    heads,
    group,
    stride_x_batch,
    stride_x_head,
    stride_x_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_mask_batch,
    stride_mask_head,
    DEGREE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    kept = _kept(mask_ptr, rows, n, stride_mask_batch, stride_mask_head, b, h)
    row_ptrs = x_ptr + b * stride_x_batch + h * stride_x_head + rows * stride_x_row
    v_ptr += b * stride_v_batch + h * stride_v_head
    state_ptr += (b * (heads // group) + h // group) * rank * (dv + 1)
    c = tl.arange(0, DV)
    at = v_ptr + rows[:, None] * stride_v_row + c[None, :]
    v = tl.load(at, mask=kept[:, None] & (c < dv)[None, :], other=0.0)
    if extra_ptr is not None:
        extra = tl.load(extra_ptr + head * n + rows, mask=kept, other=0.0)
    else:
        extra = tl.where(kept, 1.0, 0.0)
    dx = tl.zeros((BLOCK_T, D), tl.float32)
    dvalue = tl.zeros((BLOCK_T, DV), tl.float32)
    for first in range(0, rank, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        s_ptrs = state_ptr + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        s = tl.load(s_ptrs[:, None] + c[None, :], mask=inside, other=0.0)
        z = tl.load(s_ptrs + dv, mask=f < rank, other=0.0)
        du = tl.dot(v, tl.trans(s), extra[:, None] * z[None, :], input_precision=PRECISION)
        if dv_ptr is not None:
            u = _features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE)
            dvalue = tl.dot(u, s, dvalue, input_precision=PRECISION)
        for t in tl.static_range(DEGREE):
            others = du
            for o in tl.static_range(DEGREE):
                if o != t:
                    others *= _factor(row_ptrs, kept, _column(index_ptr, f, rank, d, o, DEGREE), d)
            column = _column(index_ptr, f, rank, d, t, DEGREE)
            hit = (column[:, None] == tl.arange(0, D)[None, :]).to(tl.float32)
            dx = tl.dot(others, hit, dx, input_precision=PRECISION)
    l = tl.arange(0, D)
    at = dx_ptr + (head * n + rows) * d
    tl.store(at[:, None] + l[None, :], dx, mask=(rows < n)[:, None] & (l < d)[None, :])
    if dv_ptr is not None:
        at = dv_ptr + (head * n + rows) * dv
        tl.store(at[:, None] + c[None, :], dvalue, mask=(rows < n)[:, None] & (c < dv)[None, :])


# ------------------------------------------------------------------------------------- launchers


def _options(config: Config) -> dict[str, Any]:
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def takes(q: torch.Tensor, values: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels know the case."""
    width = values[0].shape[3]
    fits = q.shape[3] <= plan.WIDEST and 0 < width <= plan.WIDEST
    heads = q.shape[0] * q.shape[1] * len(values)
    return q.dtype == torch.float32 and fits and heads <= plan.MOST_HEADS


@functools.lru_cache(maxsize=64)
def _table(d: int, degree: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices [r, degree], d for no factor; |a|! / prod a_l! [r]) of the monomials by degree."""
    level: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    rows, counts = [(d,) * degree], [1.0]
    for t in range(1, degree + 1):
        following = []
        for index, count in level:
            for v in range(index[-1] if index else 0, d):
                exponent = index.count(v) + 1
                following.append(((*index, v), count * t / exponent))
        level = following
        rows += [(*(d,) * (degree - t), *index) for index, _ in level]
        counts += [count for _, count in level]
    indices = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), degree)
    return indices.to(device), torch.tensor(counts, dtype=torch.float32).to(device)


def _weights(coefficients: Sequence[float], d: int, device: torch.device) -> torch.Tensor:
    """w_a without a copy from the host: the coefficients come in as numbers of small kernels."""
    degree = len(coefficients) - 1
    counts = _table(d, degree, device)[1]
    sizes = [math.comb(d + t - 1, t) for t in range(degree + 1)]
    return torch.cat([part * c for part, c in zip(counts.split(sizes), coefficients)])


def _block_c(dv: int) -> int:
    return min(64, max(16, triton.next_power_of_2(dv)))


def _mask_arguments(mask: torch.Tensor | None, heads: int):
    if mask is None:
        return None, 0, 0
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask if mask.stride(-1) == 1 or mask.shape[-1] <= 1 else mask.contiguous()
    return mask, mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def state_parts(
    x: torch.Tensor,
    v: torch.Tensor,
    extra: torch.Tensor | None,
    mask: torch.Tensor | None,
    degree: int,
    splits: int,
    per_split: int,
    config: Config = STATE,
    precision: str = PRECISION,
) -> torch.Tensor:
    """U^T [v | extra or 1] of `per_split` tokens each: ``(splits, batch, heads, r, dv + 1)``."""
    batch, heads, n, d = x.shape
    dv = v.shape[3]
    rank = math.comb(d + degree, degree)
    parts = x.new_empty((splits, batch, heads, rank, dv + 1))
    if parts.numel() == 0:
        return parts
    block_c = _block_c(dv)
    grid = (cdiv(rank, config.block_f) * max(1, cdiv(dv, block_c)), splits, batch * heads)
    x, v = _rows(x), _rows(v)
    mask, stride_batch, stride_head = _mask_arguments(mask, heads)
    with device_guard(x):
        tensor_attention_lowrank_state_kernel[grid](
            x, v, extra, mask, _table(d, degree, x.device)[0], parts, n, d, dv, rank, heads,
            per_split, *x.stride()[:3], *v.stride()[:3], stride_batch, stride_head,
            DEGREE=degree, BLOCK_T=config.block_t, BLOCK_F=config.block_f, BLOCK_C=block_c,
            PRECISION=precision, **_options(config),
        )  # fmt: skip
    return parts


def state(
    x: torch.Tensor,
    v: torch.Tensor,
    extra: torch.Tensor | None,
    mask: torch.Tensor | None,
    degree: int,
    config: Config = STATE,
    precision: str = PRECISION,
) -> torch.Tensor:
    """U^T [v | extra or 1]: ``(batch, heads, r, dv + 1)``."""
    batch, heads, n, d = x.shape
    dv = v.shape[3]
    tiles = cdiv(math.comb(d + degree, degree), config.block_f) * max(1, cdiv(dv, _block_c(dv)))
    splits = min(cdiv(FULL_GRID, max(1, tiles * batch * heads)), max(1, n // (4 * SUMMED.value)))
    per_split = cdiv(cdiv(max(n, 1), splits), SUMMED.value) * SUMMED.value
    parts = state_parts(x, v, extra, mask, degree, splits, per_split, config, precision)
    return parts[0] if splits == 1 else parts.sum(0)


def _product(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.mul, tensors)


def tensor_attention_lowrank_fwd(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor | None],
    coefficients: Sequence[float],
    centre: float,
    config: Config = QUERY,
    state_config: Config = STATE,
    precision: str = PRECISION,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(out, lse, y, states) of the op without causality and windows, all float32."""
    batch, heads, n, d = q.shape
    dv, degree = values[0].shape[3], len(coefficients) - 1
    states = [
        state(k, v, None, mask, degree, state_config, precision)
        for k, v, mask in zip(keys, values, key_masks)
    ]
    out, lse = q.new_empty((batch, heads, n, dv)), q.new_empty((batch, heads, n))
    y = torch.empty_like(lse)
    if lse.numel() == 0:
        return out, lse, y, states
    if any(k.shape[2] == 0 for k in keys):
        return out.zero_(), lse.fill_(-math.inf), y.zero_(), states
    rank = states[0].shape[2]
    groups = keys[0].shape[1]
    index, weights = _table(d, degree, q.device)[0], _weights(coefficients, d, q.device)
    combined = _product(states) * weights[:, None]
    dead = None
    for mask in key_masks:
        if mask is not None:
            none = ~mask.any(-1)
            dead = none if dead is None else dead | none
    if dead is not None:
        dead = dead.expand(batch, groups).contiguous().view(torch.uint8)
    block_c = _block_c(dv)
    q = _rows(q)
    grid = (cdiv(n, config.block_t), max(1, cdiv(dv, block_c)), batch * heads)
    with device_guard(q):
        tensor_attention_lowrank_query_kernel[grid](
            q, combined, dead, index, out, lse, y, n, d, dv, rank, heads, heads // groups, centre,
            *q.stride()[:3],
            DEGREE=degree, BLOCK_T=config.block_t, BLOCK_F=config.block_f, BLOCK_C=block_c,
            PRECISION=precision, **_options(config),
        )  # fmt: skip
    return out, lse, y, states


def gradient(x, v, extra, mask, combined, degree, want_dv, config, precision):
    """(dx, dv or None) of the gradient [v | extra] combined^T of x's features."""
    batch, heads, n, d = x.shape
    dv, rank = v.shape[3], combined.shape[2]
    if config is None:
        config = GRADIENT_WIDE if max(d, dv) > 64 else GRADIENT
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dvalue = torch.empty_like(v, memory_format=torch.contiguous_format) if want_dv else None
    if dx.numel() == 0:
        return dx, dvalue
    x, v = _rows(x), _rows(v)
    mask, stride_batch, stride_head = _mask_arguments(mask, heads)
    with device_guard(x):
        tensor_attention_lowrank_gradient_kernel[(cdiv(n, config.block_t), batch * heads)](
            x, v, extra, mask, combined, _table(d, degree, x.device)[0], dx, dvalue, n, d, dv,
            rank, heads, heads // combined.shape[1], *x.stride()[:3], *v.stride()[:3],
            stride_batch, stride_head,
            DEGREE=degree, BLOCK_T=config.block_t, BLOCK_F=config.block_f,
            D=max(16, triton.next_power_of_2(d)), DV=max(16, triton.next_power_of_2(dv)),
            PRECISION=precision, **_options(config),
        )  # fmt: skip
    return dx, dvalue


def gradients_of_sums(dout, dlse, out, y) -> tuple[torch.Tensor, torch.Tensor]:
    """(dN, dy) of out = N / y and lse = log y + c; 0 for queries that see nothing."""
    dead = y == 0
    inverse = torch.where(dead, 0.0, 1.0 / y)
    dy = -(dout * out).sum(-1)
    if dlse is not None:
        dy = dy + torch.where(dead, 0.0, dlse)
    dsums = torch.where(dead.unsqueeze(-1), 0.0, dout * inverse.unsqueeze(-1))
    return dsums, (dy * inverse).contiguous()


def tensor_attention_lowrank_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    y: torch.Tensor,
    states: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    config: Config | None = None,
    state_config: Config = STATE,
    precision: str = PRECISION,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(dq, dkeys, dvalues); all contiguous."""
    degree = len(coefficients) - 1
    heads, groups = q.shape[1], keys[0].shape[1]
    weights = _weights(coefficients, q.shape[3], q.device)[:, None]
    dsums, dy = gradients_of_sums(dout, dlse, out, y)
    combined = _product(states) * weights
    dq, _ = gradient(q, dsums, dy, None, combined, degree, False, config, precision)
    collected = state(q, dsums, dy, None, degree, state_config, precision) * weights
    if heads != groups:
        collected = collected.unflatten(1, (groups, -1)).sum(2)
    dkeys, dvalues = [], []
    for x, (k, v, mask) in enumerate(zip(keys, values, key_masks)):
        others = [s for at, s in enumerate(states) if at != x]
        dstate = _product([collected, *others])
        dk, dv = gradient(k, v, None, mask, dstate, degree, True, config, precision)
        dkeys.append(dk)
        dvalues.append(dv)
    return dq, dkeys, dvalues


# ---------------------------------------------------------------------------------- compile cases


def _case(kernel: Any, config: Config, degree: int, d: int, plain: bool) -> dict[str, Any]:
    """One entry of COMPILE_CASES; plain: no mask, no column of its own."""
    width = max(16, triton.next_power_of_2(d))
    constexprs: dict[str, Any] = {
        "DEGREE": degree,
        "BLOCK_T": config.block_t,
        "BLOCK_F": config.block_f,
        "BLOCK_C": _block_c(d),
        "D": width,
        "DV": width,
        "PRECISION": PRECISION,
    }
    if plain:
        constexprs |= {"mask_ptr": None, "extra_ptr": None, "dead_ptr": None}
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            kinds = {"mask_ptr": "*u8", "dead_ptr": "*u8", "index_ptr": "*i32"}
            signature[argument] = kinds.get(argument, "*fp32")
        elif argument == "centre":
            signature[argument] = "fp32"
        else:
            signature[argument] = "i64" if argument.startswith("stride") else "i32"
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": _options(config),
    }


COMPILE_CASES = [
    _case(tensor_attention_lowrank_state_kernel, STATE, 2, 64, True),
    _case(tensor_attention_lowrank_state_kernel, STATE, 4, 16, False),
    _case(tensor_attention_lowrank_query_kernel, QUERY, 2, 128, False),
    _case(tensor_attention_lowrank_gradient_kernel, GRADIENT, 2, 64, True),
    _case(tensor_attention_lowrank_gradient_kernel, GRADIENT_WIDE, 2, 128, False),
]
