"""The launchers: which kernels run on which grid, and the scratch between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from .._launch import FULL_GRID, cdiv, device_guard
from .arguments import Upstream
from .backward_keys import (
    tensor_attention_bwd_kv_pairs_kernel,
    tensor_attention_bwd_kv_rows_kernel,
    tensor_attention_parts_kernel,
)
from .backward_queries import (
    tensor_attention_bwd_mask_kernel,
    tensor_attention_bwd_q_pairs_kernel,
    tensor_attention_bwd_q_rows_kernel,
    tensor_attention_bwd_rows_stats_kernel,
)
from .forward import (
    tensor_attention_fwd_pairs_kernel,
    tensor_attention_fwd_rows_kernel,
    tensor_attention_merge_kernel,
)
from .hidden import cleared, hides, tensor_attention_spoil_kernel
from .problem import Problem, checked_problem, choose_config, choose_tiling, padded
from .table import Config

SCRATCH_BYTES = 32 * 2**20  # of the backward, as far as one head's scratch and a full grid allow
OPTIONS = {"enable_fp_fusion": True}  # said aloud: its default changes in Triton 3.10


def _splits(programs: int, keys: int, least: int) -> int:
    """Parts of `keys` steps, of at least `least` each, that fill the device."""
    return max(1, min(cdiv(FULL_GRID, max(1, programs)), keys // least))


def launch_options(c: Config) -> dict[str, int]:
    return {"num_warps": c.num_warps, "num_stages": c.num_stages, **OPTIONS}


def _vector_rows(dv: int) -> int:
    """Rows per program of the kernels that only stream rows."""
    return max(1, 4096 // padded(dv))


def tensor_attention_fwd(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None = None,
    mask2: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    w1: int | None = None,
    w2: int | None = None,
    q_offset: int = 0,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    tiling: str | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of exact tensor attention (formula: the package).

    Args:
        q (B, H, n_q, d), k1 (B, Hkv, n_1, d), k2 (B, Hkv, n_2, d), v1 (B, Hkv, n_1, dv),
            v2 (B, Hkv, n_2, dv): one dtype of float32, bfloat16, float16; Hkv divides H;
            d, dv <= 256. Made contiguous if they are not.
        mask1 (B or 1, H or 1, n_q or 1, n_1), mask2 (.., n_2): float32, added to the logits, or
            None. -inf leaves a pair out, as does anything below about -2.3e38.
        causal, w1, w2, q_offset: with p = i + q_offset, causal keeps p - w < j <= p, a window
            alone |p - j| < w; None or -1 is no window.
        kv_bias: numbers added to k2 and to v2.
        tiling, config, splits: "rows", "packed" or "pairs", tiles, parts of axis 1 (None: by
            shape).

    Returns:
        out (B, H, n_q, dv) in the inputs' dtype and lse (B, H, n_q), float32, natural logarithm;
        0 and -inf for rows without a valid triple.
    """
    p = checked_problem(q, k1, k2, v1, v2, mask1, mask2, scale, causal, w1, w2, q_offset, kv_bias)
    (b, h, n_q, _), dv = p.q.shape, p.v1.shape[3]
    out = torch.empty((b, h, n_q, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, n_q), dtype=torch.float32, device=q.device)
    if p.empty or not out.numel():
        return out.zero_(), lse.fill_(-math.inf)
    given, count = p, None
    if hides(p):
        with device_guard(q):
            p, count = cleared(p)
    row_config = config or choose_config("fwd rows", p)
    pair_config = config or choose_config("fwd pairs", p)
    tiling = tiling or choose_tiling(p, row_config, pair_config)
    pack = p.group if tiling == "packed" else 1
    total = b * h * n_q
    if tiling == "pairs":
        c, kernel = pair_config, tensor_attention_fwd_pairs_kernel
        block_j = min(c.block_m, triton.next_power_of_2(p.spans[0]))
        programs = cdiv(n_q, c.block_m // block_j) * b * h
        splits = splits or _splits(programs, cdiv(p.spans[0], block_j), 1)
        extra = {"BLOCK_J": block_j, "CHUNKS": splits > 1 or p.spans[0] > block_j}
    else:
        c, kernel = row_config, tensor_attention_fwd_rows_kernel
        programs = cdiv(n_q * pack, c.block_m) * (b * h // pack)
        splits = splits or _splits(programs, p.spans[0], 16)
        extra = {}
    with device_guard(q):
        part, part_lse = out, lse
        if splits > 1:
            part = torch.empty((splits, total, dv), dtype=torch.float32, device=q.device)
            part_lse = torch.empty((splits, total), dtype=torch.float32, device=q.device)
        kernel[(programs, splits)](
            p.inputs(),
            part,
            part_lse,
            total,
            C=p.constants(c, c.block_n, pack),
            **extra,
            **launch_options(c),
        )
        if splits > 1:
            block_r = _vector_rows(dv)
            tensor_attention_merge_kernel[(cdiv(total, block_r),)](
                part,
                part_lse,
                out,
                lse,
                total,
                dv,
                splits,
                DV=padded(dv),
                BLOCK_R=block_r,
                num_warps=4,
                **OPTIONS,
            )
        if count is not None:
            tensor_attention_spoil_kernel[(total,)](
                given.inputs(),
                out,
                lse,
                count,
                C=given.constants(row_config, None),
                num_warps=4,
                **OPTIONS,
            )
    return out, lse


def tensor_attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None,
    mask2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    w1: int | None = None,
    w2: int | None = None,
    q_offset: int = 0,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    want: Sequence[bool] = (True,) * 7,
    tiling: str | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of tensor_attention_fwd.

    Args:
        dout (B, H, n_q, dv): in the inputs' dtype; dlse (B, H, n_q) float32, or None (0).
        out, lse: what the forward returned; the rest as given to it.
        want: which of the seven results are needed; gradients of masks that are None never are.
        tiling: "rows", "packed" (rows in the pass over queries) or "pairs".

    Returns:
        dq, dk1, dk2, dv1, dv2 in the inputs' dtype, dmask1, dmask2 float32; None if not wanted.
    """
    p = checked_problem(q, k1, k2, v1, v2, mask1, mask2, scale, causal, w1, w2, q_offset, kv_bias)
    want_m1, want_m2 = want[5] and mask1 is not None, want[6] and mask2 is not None
    shapes = (p.q, k1, k2, v1, v2)
    if p.empty or not out.numel():
        zeros = [torch.zeros(t.shape, dtype=q.dtype, device=q.device) for t in shapes]
        masks = [
            torch.zeros(m.shape, dtype=torch.float32, device=q.device) if w else None
            for m, w in ((mask1, want_m1), (mask2, want_m2))
        ]
        return (*(z if w else None for z, w in zip(zeros, want)), *masks)
    for name, t, like in (("dout", dout, out), ("dlse", dlse, lse)):
        if t is not None and t.shape != like.shape:
            raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(t.shape)}")
    if dout.dtype != q.dtype:
        raise TypeError(f"dout must be {q.dtype}, got {dout.dtype}")
    with device_guard(q):
        if hides(p):
            p, _ = cleared(p)  # NaN that a query sees is in its out or lse
        up = _upstream(p, dout.contiguous(), out, lse, dlse)
        wanted = _Wanted(*want[:5])
        if p.swapped:
            wanted = wanted.exchanged()
        backward = _backward_pairs if _take_pairs(p, tiling, config) else _backward_rows
        dq, dk1, dk2, dv1, dv2 = backward(p, up, wanted, tiling, config, splits)
        if p.swapped:
            dk1, dk2, dv1, dv2 = dk2, dk1, dv2, dv1
        here, there = (p.exchanged(), p) if p.swapped else (p, p.exchanged())
        dmask1 = _mask_gradient(here, up, config) if want_m1 else None
        dmask2 = _mask_gradient(there, up, config) if want_m2 else None
    return dq, dk1, dk2, dv1, dv2, dmask1, dmask2


class _Wanted(NamedTuple):
    """Which gradients are, of the exchanged axes."""

    q: bool
    k1: bool
    k2: bool
    v1: bool
    v2: bool

    def exchanged(self) -> _Wanted:
        return _Wanted(self.q, self.k2, self.k1, self.v2, self.v1)


def _sizes(p: Problem) -> torch.Tensor:
    """At least |v1_j v2_k|_2 of all keys j, k, per key head: float32 [B, H / GROUP]."""
    v1 = torch.linalg.vector_norm(p.v1, dim=-1, dtype=torch.float32).amax(-1)
    return v1 * torch.linalg.vector_norm(p.v2, math.inf, dim=(-2, -1), dtype=torch.float32)


def _upstream(
    p: Problem,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
) -> Upstream:
    shift, delta = torch.empty_like(lse), torch.empty_like(lse)
    sizes = factor = common = None
    if p.q.dtype == torch.float16:
        sizes, factor = _sizes(p), torch.empty_like(lse)
    dv, total = out.shape[3], lse.numel()
    block_r = _vector_rows(dv)
    tensor_attention_bwd_rows_stats_kernel[(cdiv(total, block_r),)](
        out.contiguous(),
        dout,
        lse.contiguous(),
        None if dlse is None else dlse.contiguous(),
        sizes,
        shift,
        delta,
        factor,
        total,
        p.group * lse.shape[2],
        dv,
        DV=padded(dv),
        BLOCK_R=block_r,
        num_warps=4,
        **OPTIONS,
    )
    if factor is not None:
        common = factor.unflatten(1, (-1, p.group)).amin((2, 3))
    return Upstream(dout, shift, delta, factor, common)


def _bwd_config(name: str, p: Problem, config: Config | None) -> Config:
    return config or choose_config(name, p)


def _take_pairs(p: Problem, tiling: str | None, config: Config | None) -> bool:
    """Pairs where they win in the pass over queries and one tile holds a query's window."""
    rows, pairs = (_bwd_config(f"bwd q {kind}", p, config) for kind in ("rows", "pairs"))
    tallest = min(pairs.block_m, _bwd_config("bwd kv pairs", p, config).block_n)
    if triton.next_power_of_2(p.spans[0]) > tallest:
        if tiling == "pairs":
            raise ValueError(f"a window of {p.spans[0]} does not fit tiles of {tallest} pairs")
        return False
    return (tiling or choose_tiling(p, rows, pairs)) == "pairs"


def _heads_per_launch(p: Problem, scratch: int, programs: int) -> int:
    """Key heads at a time, given the bytes and programs of one.

    As SCRATCH_BYTES allow, but enough of them for FULL_GRID / 2 programs; of these, no more than
    twice the inputs have room for.
    """
    fits = SCRATCH_BYTES // max(1, scratch)
    inputs = (p.q, p.k1, p.k2, p.v1, p.v2)
    room = max(4 * SCRATCH_BYTES, 2 * sum(t.numel() * t.element_size() for t in inputs))
    wanted = min(cdiv(FULL_GRID // 2, programs), room // max(1, scratch))
    return min(p.k1.shape[0] * p.k1.shape[1], max(1, fits, wanted))


def _sum_splits(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t[0] if t.shape[0] == 1 else t.sum(0).to(dtype)


def _sum_parts(
    p: Problem,
    part: torch.Tensor,
    out: torch.Tensor,
    first_head: int,
    heads: int,
    factor: float,
    per_head: int,
    step: int,
    n_axis: int,
    back: int,
    ahead: int,
) -> None:
    """out[first_head:] = factor times the sums of the parts of `heads` key heads."""
    n_1, width = out.shape[-2:]
    block_r = max(16, 2048 // padded(width))
    left1, right1 = p.limits[:2]
    tensor_attention_parts_kernel[(cdiv(n_1, block_r) * heads,)](
        part,
        out,
        first_head,
        cdiv(n_axis, step),
        part.shape[-2],
        n_axis,
        back,
        ahead,
        p.q.shape[2],
        n_1,
        width,
        p.q_offset,
        left1,
        right1,
        factor,
        HEADS=per_head,
        STEP=step,
        W=padded(width),
        BLOCK_R=block_r,
        num_warps=4,
        **OPTIONS,
    )


def _results_of(result: torch.Tensor, parts: int, at_once: int) -> torch.Tensor:
    """Where a launch writes: `result` itself, or splits of `at_once` heads."""
    if parts == 1:
        return result
    shape = (parts, at_once, *result.shape[2:])
    return torch.empty(shape, dtype=torch.float32, device=result.device)


def _backward_rows(
    p: Problem,
    up: Upstream,
    want: _Wanted,
    tiling: str | None,
    config: Config | None,
    splits: int | None,
) -> tuple[torch.Tensor | None, ...]:
    (b, h, n_q, d), dv = p.q.shape, p.v1.shape[3]
    dtype, device = p.q.dtype, p.q.device
    span1, span2 = p.spans
    dq = dk1 = dk2 = dv1 = dv2 = None
    if want.q:
        c = _bwd_config("bwd q rows", p, config)
        pack = 1 if tiling == "rows" else p.group
        programs = cdiv(n_q * pack, c.block_m) * (b * h // pack)
        parts = splits or _splits(programs, span1, 16)
        shape = (parts, b, h, n_q, d)
        dq = torch.empty(shape, dtype=dtype if parts == 1 else torch.float32, device=device)
        tensor_attention_bwd_q_rows_kernel[(programs, parts)](
            p.inputs(),
            up,
            dq,
            b * h * n_q,
            p.scale,
            C=p.constants(c, c.block_n, pack),
            **launch_options(c),
        )
        dq = _sum_splits(dq, dtype)
    c = _bwd_config("bwd kv rows", p, config)
    n_1, n_2, heads = p.k1.shape[2], p.k2.shape[2], p.k1.shape[1] * b
    blocks = cdiv(n_2, c.block_m)
    # Widths of both sides, bounded before they are added: see _first_axis_span.
    reach = min(n_q, c.block_m + sum(p.limits[2:])) + sum(p.limits[:2])
    span = min(n_1, reach)
    want_k, want_v = want.k1 or want.k2, want.v1 or want.v2
    # Accumulators of both do not fit the registers beyond 128 columns.
    turns = [(want_k, want_v)]
    if p.width > 128:
        turns = [(want_k, False), (False, want_v)]
    for turn_k, turn_v in turns:
        if not (turn_k or turn_v):
            continue
        width = d * turn_k + dv * turn_v
        at_once = _heads_per_launch(p, blocks * span * width * 4, blocks)
        parts = splits or _splits(blocks * at_once, span, 16)
        g_k, g_v, part_k, part_v = p.k2, p.v2, None, None
        if turn_k:
            part_k = torch.empty((at_once, blocks, span, d), dtype=torch.float32, device=device)
            dk1, dk2 = torch.empty_like(p.k1), torch.empty_like(p.k2)
            g_k = _results_of(dk2, parts, at_once)
        if turn_v:
            part_v = torch.empty((at_once, blocks, span, dv), dtype=torch.float32, device=device)
            dv1, dv2 = torch.empty_like(p.v1), torch.empty_like(p.v2)
            g_v = _results_of(dv2, parts, at_once)
        inputs, constants = p.inputs(), p.constants(c, c.block_m, p.group)
        for first in range(0, heads, at_once):
            count = min(at_once, heads - first)
            tensor_attention_bwd_kv_rows_kernel[(blocks * count, parts)](
                inputs,
                up,
                g_k,
                g_v,
                part_k,
                part_v,
                first,
                first if parts > 1 else 0,
                span,
                at_once * n_2,
                p.scale,
                C=constants,
                WANT_K=turn_k,
                WANT_V=turn_v,
                **launch_options(c),
            )
            where = (1, c.block_m, n_2, p.limits[3], p.limits[2])
            if part_k is not None:
                _sum_parts(p, part_k, dk1, first, count, p.scale, *where)
            if part_v is not None:
                _sum_parts(p, part_v, dv1, first, count, 1.0, *where)
            if parts > 1:
                for g, result in ((g_k, dk2 if turn_k else None), (g_v, dv2 if turn_v else None)):
                    if result is not None:
                        result.flatten(0, 1)[first : first + count] = g[:, :count].sum(0)
    return (
        dq,
        dk1 if want.k1 else None,
        dk2 if want.k2 else None,
        dv1 if want.v1 else None,
        dv2 if want.v2 else None,
    )


def _backward_pairs(
    p: Problem,
    up: Upstream,
    want: _Wanted,
    tiling: str | None,
    config: Config | None,
    splits: int | None,
) -> tuple[torch.Tensor | None, ...]:
    (b, _, n_q, d), dv = p.q.shape, p.v1.shape[3]
    device, half = p.q.device, p.q.dtype.itemsize == 2
    dq = dk1 = dk2 = dv1 = dv2 = None
    block_j = triton.next_power_of_2(p.spans[0])
    key_heads = p.k1.shape[1] * b
    if want.q or want.k1 or want.v1:
        c = _bwd_config("bwd q pairs", p, config)
        block_i = c.block_m // block_j
        tiles = cdiv(n_q, block_i)
        span = min(p.k1.shape[2], block_j + block_i - 1)
        scratch = tiles * span * (d * want.k1 + dv * want.v1) * 4 * p.group
        at_once = _heads_per_launch(p, scratch, tiles * p.group)
        dq = torch.empty_like(p.q)
        part_k, part_v = (
            torch.empty((at_once, p.group, tiles, span, n), dtype=torch.float32, device=device)
            if wanted
            else None
            for wanted, n in ((want.k1, d), (want.v1, dv))
        )
        dk1 = torch.empty_like(p.k1) if want.k1 else None
        dv1 = torch.empty_like(p.v1) if want.v1 else None
        inputs, constants = p.inputs(), p.constants(c, c.block_n)
        for first in range(0, key_heads, at_once):
            count = min(at_once, key_heads - first)
            tensor_attention_bwd_q_pairs_kernel[(tiles * p.group * count,)](
                inputs,
                up,
                dq,
                part_k,
                part_v,
                first * p.group,
                tiles * p.group * count,
                span,
                p.scale,
                C=constants,
                WANT_K=want.k1,
                WANT_V=want.v1,
                # Exact enough for what is rounded to 16 bits, and on tensor cores.
                SUM_PRECISION="tf32x3" if half else "ieee",
                BLOCK_J=block_j,
                SUM_ROWS=max(16, triton.next_power_of_2(block_j + block_i - 1)),
                **launch_options(c),
            )
            where = (p.group, block_i, n_q, -p.q_offset, p.q_offset)
            if dk1 is not None:
                _sum_parts(p, part_k, dk1, first, count, p.scale, *where)
            if dv1 is not None:
                _sum_parts(p, part_v, dv1, first, count, 1.0, *where)
    if want.k2 or want.v2:
        c = _bwd_config("bwd kv pairs", p, config)
        dk2 = torch.empty_like(p.k2) if want.k2 else None
        dv2 = torch.empty_like(p.v2) if want.v2 else None
        tensor_attention_bwd_kv_pairs_kernel[(cdiv(p.k2.shape[2], c.block_m) * key_heads,)](
            p.inputs(),
            up,
            dk2,
            dv2,
            C=p.constants(c, None),
            WANT_K=want.k2,
            WANT_V=want.v2,
            BLOCK_J=block_j,
            **launch_options(c),
        )
    return dq if want.q else None, dk1, dk2, dv1, dv2


def _mask_gradient(p: Problem, up: Upstream, config: Config | None) -> torch.Tensor:
    """Gradient of p.mask1."""
    b, h, n_q, _ = p.q.shape
    n_1 = p.k1.shape[2]
    shape = p.mask1.shape
    c = _bwd_config("bwd mask", p, config)
    dmask = torch.zeros((*shape[:2], n_q, n_1), dtype=torch.float32, device=p.q.device)
    keys = 32
    programs = cdiv(n_q, c.block_m) * shape[0] * shape[1] * cdiv(n_1, keys)
    tensor_attention_bwd_mask_kernel[(programs,)](
        p.inputs(),
        up,
        dmask,
        shape[1],
        shape[0] * shape[1],
        b // shape[0],
        h // shape[1],
        C=p.constants(c, c.block_n),
        KEYS=keys,
        **launch_options(c),
    )
    return dmask.sum(2, keepdim=True) if shape[2] < n_q else dmask
