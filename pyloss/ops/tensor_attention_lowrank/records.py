"""What crosses to csrc/bind/tensor_attention_lowrank.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, address
from pyloss.ops.tensor_attention_lowrank.plan import Settings

# Addresses are 0 where there is nothing; strides are those of all dimensions.
Strides = tuple[int, ...]


class Axis(NamedTuple):
    n: int
    window: int  # 0: none
    k: int
    k_strides: Strides
    v: int
    v_strides: Strides
    mask: int  # bytes (batch, kv head, n)
    mask_strides: Strides


class Problem(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    n_q: int
    d: int
    dv: int
    dtype: int
    causal: bool
    q_offset: int
    centre: float
    coefficients: tuple[float, ...]
    q: int
    q_strides: Strides
    axes: tuple[Axis, ...]


class Forward(NamedTuple):
    out: int
    lse: int
    y: int
    states: tuple[int, ...]  # one per axis, or none where queries see different keys


class Backward(NamedTuple):
    dout: int
    dout_strides: Strides
    dlse: int
    out: int
    y: int
    states: tuple[int, ...]
    dq: int
    dk: tuple[int, ...]
    dv: tuple[int, ...]


RECORDS = (Problem, Axis, Forward, Backward)


def _axis(k: Tensor, v: Tensor, mask: Tensor | None, window: int) -> Axis:
    strides = (0, 0, 0) if mask is None else mask.stride()
    return Axis(
        k.shape[2], window, k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), address(mask),
        strides,
    )  # fmt: skip


def problem(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_masks: Sequence[Tensor | None],
    settings: Settings,
) -> Problem:
    """Of tensors whose features, and of masks whose keys, are contiguous."""
    coefficients, centre, causal, windows, q_offset = settings
    batch, heads, n_q, d = q.shape
    axes = map(_axis, keys, values, key_masks, windows or (0,) * len(keys))
    return Problem(
        batch, heads, keys[0].shape[1], n_q, d, values[0].shape[3], DTYPE_CODES[q.dtype], causal,
        q_offset, centre, tuple(coefficients), q.data_ptr(), q.stride(), tuple(axes),
    )  # fmt: skip


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def forward(out: Tensor, lse: Tensor, y: Tensor, states: Sequence[Tensor]) -> Forward:
    return Forward(out.data_ptr(), lse.data_ptr(), y.data_ptr(), addresses(states))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    y: Tensor,
    states: Sequence[Tensor],
    dq: Tensor,
    dkeys: Sequence[Tensor],
    dvalues: Sequence[Tensor],
) -> Backward:
    return Backward(
        dout.data_ptr(), dout.stride(), address(dlse), out.data_ptr(), y.data_ptr(),
        addresses(states), dq.data_ptr(), addresses(dkeys), addresses(dvalues),
    )  # fmt: skip
