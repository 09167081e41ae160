"""What the kernels take, grouped: tuples of tensors and numbers, and one of compile-time constants.

Triton specialises the elements of a tuple as it does single arguments (None and 1 become constants,
multiples of 16 are remembered). A tuple that a kernel makes holds no None, and a constant that goes
into a shape or a static_range gets a name of its own first: Triton 3.6 refuses either otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """The problem. All tensors but the masks are contiguous."""

    q: Any  # [B, H, n_q, d]
    k1: Any  # [B, H / GROUP, n_1, d]
    k2: Any  # [B, H / GROUP, n_2, d]
    v1: Any  # [B, H / GROUP, n_1, dv]
    v2: Any  # [B, H / GROUP, n_2, dv]
    mask1: Any  # float32 [B, H, n_q, n_1] by strides, last stride 1, or None
    mask2: Any  # float32 [B, H, n_q, n_2]
    n_q: Any
    n_1: Any
    n_2: Any
    d: Any
    dv: Any
    n_heads: Any
    stride_mask1_b: Any
    stride_mask1_h: Any
    stride_mask1_row: Any
    stride_mask2_b: Any
    stride_mask2_h: Any
    stride_mask2_row: Any
    q_offset: Any
    left1: Any  # the position p of a query sees the keys p - left .. p + right
    right1: Any
    left2: Any
    right2: Any
    logit_scale: Any  # s log2(e)


class Upstream(NamedTuple):
    """What the backward kernels know of a query."""

    dout: Any  # [B, H, n_q, dv]
    shift: Any  # float32 [B, H, n_q]: lse in units of log 2; +inf for rows without a valid triple
    delta: Any  # float32 [B, H, n_q]: <dout, out> - dlse, 0 for those rows
    # With float16, else None: powers of two that bring dP - delta below 1, of a query and of all
    # queries of a key head.
    factor: Any  # float32 [B, H, n_q]
    common: Any  # float32 [B, H / GROUP]


class Constants(NamedTuple):
    """Known when a kernel is compiled."""

    GROUP: int  # query heads of a key head
    PACK: int  # query heads side by side in the rows: 1 (T1) or GROUP (T2)
    LIMITED: bool  # any of left, right may exclude a key
    EVEN_N: bool  # the blocks of axis 2 divide n_2
    EVEN_D: bool
    EVEN_DV: bool
    MASK2_ROWS: bool  # rows of mask2 differ
    WIDE: bool  # interpreted bfloat16
    PRECISION: str  # of products of float32
    LIFT: int  # P is a factor of products times 2^LIFT: 15 with float16, else 0
    D: int  # d and dv, padded
    DV: int
    BLOCK_M: int  # rows of the accumulators
    BLOCK_N: int  # what the inner loop walks
