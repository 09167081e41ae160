"""What happens inside one tile: its place, its product, its transform, its label."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@triton.jit
def patch(pid, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: columns advance after GROUP row tiles."""
    per_group = GROUP * n_col_tiles
    first = pid // per_group * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    local = pid % per_group
    return first + local % height, local // height


@triton.jit
def live_rows(n_valid_ptr, n_rows):
    if n_valid_ptr is None:
        return n_rows
    else:
        # Of 32 bits like n_rows: a number of steps made of it types what loops carry.
        return tl.minimum(tl.load(n_valid_ptr), n_rows).to(tl.int32)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    if WIDE:  # Triton's interpreter multiplies the bit patterns of bfloat16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _parts(a, b):
    """float32 a as a high and a low part that tensor cores multiply with half b; and b for them.

    Parts of bfloat16 keep 2^-17 of each number of a. float16 would lack the range: its b, which is
    exact in tf32, meets parts of that type, which keep 2^-21.
    """
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        return high, (a - high.to(tl.float32)).to(tl.bfloat16), b
    else:
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return high, a - high, b.to(tl.float32)


@triton.jit
def gradient_dot(
    dz, other, acc, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + dz other, or dz^T other; the gradient may be float32 where `other` is half."""
    if dz.dtype == other.dtype:
        return dot(tl.trans(dz) if TRANSPOSED else dz, other, acc, WIDE, PRECISION)
    else:
        dz = tl.trans(dz) if TRANSPOSED else dz
        return tl.dot(dz, other.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def tile_product(
    x_rows,  # [BLOCK_M, 1] pointers to rows of x
    w_rows,  # [BLOCK_N, 1] pointers to rows of W
    n_inner,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    inner = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_rows + inner
    w_ptrs = w_rows + inner
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, n_inner, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=inner < n_inner - k, other=0.0)
            w = tl.load(w_ptrs, mask=inner < n_inner - k, other=0.0)
        acc = dot(x, tl.trans(w), acc, WIDE, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def _tanh(x):
    """The ratio of csrc/common/math.h (tanh_ratio): relative error 2.1e-8."""
    # Not clamped by minimum and maximum, which may lose a NaN.
    x = tl.where(x > 9.02, 9.02, tl.where(x < -9.02, -9.02, x))
    s = x * x
    p = 2.05834817204312e-05 + s * 1.3319069092140122e-08
    p = 0.9999999790134189 + s * (0.13379718117941633 + s * (0.003494034715939948 + s * p))
    q = 0.025871073938015986 + s * (0.000328309300082503 + s * 7.762018985640709e-07)
    q = 1.0 + s * (0.46713033358670913 + s * q)
    return x * p / q


@triton.jit
def transform(t, pre, post, CAP: tl.constexpr):
    """z and tanh(pre t) (z again without cap, where it is not used)."""
    if CAP:
        th = _tanh(t * pre)
        return th * post, th
    else:
        z = t * pre
        return z, z


@triton.jit
def label_in_tile(target, col0, BLOCK_N: tl.constexpr):
    """Column of the label inside the tile that starts at col0, -1 where it is elsewhere.

    In 64 bits up to here: a label that does not fit 32 bits must not look like a small one.
    """
    local = target.to(tl.int64) - col0
    return tl.where((local >= 0) & (local < BLOCK_N), local, -1).to(tl.int32)


@triton.jit
def finite_floor(m):
    # -inf - -inf is NaN: entries that are all -inf are measured from 0.
    return tl.where(m == NEG_INF, 0.0, m)
