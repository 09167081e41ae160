"""What crosses to csrc/bind/tensor_attention.cpp."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, address
from pyloss.ops.tensor_attention.plan import Settings

# Addresses are 0 where there is nothing; strides are those of all dimensions.
Strides = tuple[int, ...]


class Axis(NamedTuple):
    n: int
    window: int  # 0: none
    k: int
    k_strides: Strides
    v: int
    v_strides: Strides
    bias_k: float
    bias_v: float
    mask: int
    mask_strides: Strides


class Problem(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    n_q: int
    d: int
    dv: int
    dtype: int
    scale: float
    softcap: float  # 0: none
    causal: bool
    q_offset: int
    q: int
    q_strides: Strides
    axis1: Axis
    axis2: Axis


class Backward(NamedTuple):
    dout: int
    dout_strides: Strides
    dlse: int
    out: int
    lse: int
    dq: int
    dk1: int
    dk2: int
    dv1: int
    dv2: int
    dmask1: int
    dmask2: int


RECORDS = (Problem, Axis, Backward)


def _axis(
    k: Tensor, v: Tensor, mask: Tensor | None, window: int, bias_k: float, bias_v: float
) -> Axis:
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    return Axis(
        k.shape[2], window, k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), bias_k, bias_v,
        address(mask), strides,
    )  # fmt: skip


def problem(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    settings: Settings,
) -> Problem:
    """Of tensors whose features, and of masks whose keys, are contiguous."""
    scale, causal, w1, w2, q_offset, bias_k, bias_v, softcap = settings
    batch, heads, n_q, d = q.shape
    return Problem(
        batch, heads, k1.shape[1], n_q, d, v1.shape[3], DTYPE_CODES[q.dtype], scale, softcap,
        causal, q_offset, q.data_ptr(), q.stride(), _axis(k1, v1, mask1, w1, 0.0, 0.0),
        _axis(k2, v2, mask2, w2, bias_k, bias_v),
    )  # fmt: skip


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, grads: list[Tensor | None]
) -> Backward:
    """grads: of q, k1, k2, v1, v2 and the masks, None where not wanted."""
    return Backward(
        dout.data_ptr(), dout.stride(), address(dlse), out.data_ptr(), lse.data_ptr(),
        *(address(g) for g in grads),
    )  # fmt: skip
