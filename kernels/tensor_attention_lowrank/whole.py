"""The launchers without causality and windows; what they make of states and gradients also serves
the scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .. import _tensor_attention_lowrank_plan as plan
from .._launch import FULL_GRID, cdiv, device_guard, little_shared
from .features import dense_rows, feature_weights, monomials
from .whole_kernels import (
    SUMMED,
    tensor_attention_lowrank_gradient_kernel,
    tensor_attention_lowrank_query_kernel,
    tensor_attention_lowrank_state_kernel,
)

PRECISION = "tf32x3"


class Config(NamedTuple):
    block_t: int
    block_f: int
    num_warps: int
    num_stages: int = 2


# Chosen by what the compiler reports for sm_90 (no spilled register in a loop, instructions), not
# tuned: no device was at hand. Triton 3.6 spills 290 registers in a state of 64 x 64.
_OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
STATE = Config(32, 32, 4) if _OLD_TRITON else Config(64, 64, 4)
QUERY = Config(64, 64, 4, 1)
# No spilled register in the loop, compiled for sm_90; 64 x 64 tiles touched 2700 an iteration.
GRADIENT = Config(32, 32, 4, 1)
GRADIENT_OF_BOTH = Config(32, 32, 8, 1)  # of values too
GRADIENT_WIDE = Config(16, 16, 4, 1)  # more than 64 features or value columns


def options(config: Config, device: torch.device) -> dict[str, Any]:
    return {
        "num_warps": config.num_warps,
        "num_stages": 1 if little_shared(device) else config.num_stages,
        "enable_fp_fusion": True,
    }


def takes(q: torch.Tensor, values: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels know the case."""
    width = values[0].shape[3]
    fits = q.shape[3] <= plan.WIDEST and 0 < width <= plan.WIDEST
    return q.dtype == torch.float32 and fits


def tile_columns(dv: int) -> int:
    return min(64, max(16, triton.next_power_of_2(dv)))


def _mask_arguments(mask: torch.Tensor | None, heads: int):
    if mask is None:
        return None, 0, 0
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask if mask.stride(-1) == 1 or mask.shape[-1] <= 1 else mask.contiguous()
    return mask, mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0


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
    block_c = tile_columns(dv)
    tiles = cdiv(rank, config.block_f) * max(1, cdiv(dv, block_c))
    grid = (tiles * splits * batch * heads,)
    x, v = dense_rows(x), dense_rows(v)
    mask, stride_batch, stride_head = _mask_arguments(mask, heads)
    with device_guard(x):
        tensor_attention_lowrank_state_kernel[grid](
            x, v, extra, mask, monomials(d, degree, x.device)[0], parts, n, d, dv, rank, heads,
            batch * heads, per_split, *x.stride()[:3], *v.stride()[:3], stride_batch, stride_head,
            DEGREE=degree, BLOCK_T=config.block_t, BLOCK_F=config.block_f, BLOCK_C=block_c,
            PRECISION=precision, **options(config, x.device),
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
    tiles = cdiv(math.comb(d + degree, degree), config.block_f) * max(1, cdiv(dv, tile_columns(dv)))
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
    index, weights = monomials(d, degree, q.device)[0], feature_weights(coefficients, d, q.device)
    combined = _product(states) * weights[:, None]
    dead = None
    for mask in key_masks:
        if mask is not None:
            none = ~mask.any(-1)
            dead = none if dead is None else dead | none
    if dead is not None:
        dead = dead.expand(batch, groups).contiguous().view(torch.uint8)
    block_c = tile_columns(dv)
    q = dense_rows(q)
    grid = (cdiv(n, config.block_t) * max(1, cdiv(dv, block_c)) * batch * heads,)
    with device_guard(q):
        tensor_attention_lowrank_query_kernel[grid](
            q, combined, dead, index, out, lse, y, n, d, dv, rank, heads, heads // groups, centre,
            *q.stride()[:3],
            DEGREE=degree, BLOCK_T=config.block_t, BLOCK_F=config.block_f, BLOCK_C=block_c,
            PRECISION=precision, **options(config, q.device),
        )  # fmt: skip
    return out, lse, y, states


def gradient(x, v, extra, mask, combined, degree, want_dv, config, precision):
    """(dx, dv or None) of the gradient [v | extra] combined^T of x's features."""
    batch, heads, n, d = x.shape
    dv, rank = v.shape[3], combined.shape[2]
    if config is None:
        narrow = GRADIENT_OF_BOTH if want_dv else GRADIENT
        config = GRADIENT_WIDE if max(d, dv) > 64 else narrow
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dvalue = torch.empty_like(v, memory_format=torch.contiguous_format) if want_dv else None
    if dx.numel() == 0:
        return dx, dvalue
    x, v = dense_rows(x), dense_rows(v)
    mask, stride_batch, stride_head = _mask_arguments(mask, heads)
    with device_guard(x):
        tensor_attention_lowrank_gradient_kernel[(cdiv(n, config.block_t) * batch * heads,)](
            x, v, extra, mask, combined, monomials(d, degree, x.device)[0], dx, dvalue, n, d, dv,
            rank, heads, heads // combined.shape[1], *x.stride()[:3], *v.stride()[:3],
            stride_batch, stride_head,
            DEGREE=degree, BLOCK_T=config.block_t, BLOCK_F=config.block_f,
            D=max(16, triton.next_power_of_2(d)), DV=max(16, triton.next_power_of_2(dv)),
            PRECISION=precision, **options(config, x.device),
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
    weights = feature_weights(coefficients, q.shape[3], q.device)[:, None]
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
