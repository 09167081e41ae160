"""What the implementations of tensor attention share: settings, layouts, results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype


class Settings(NamedTuple):
    """What is not a tensor, in the order of the schema. A window of 0 is none."""

    scale: float
    causal: bool
    w1: int
    w2: int
    q_offset: int
    bk: float
    bv: float
    softcap: float = 0.0  # of the scores, before masks; 0: none


# Bits of `want`: q, k1, k2, v1, v2, mask1, mask2.
WANT = tuple(1 << bit for bit in range(7))


def wanted(want: int) -> list[bool]:
    return [bool(want & bit) for bit in WANT]


def results(q: Tensor, v1: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (out, lse); shared by the kernels and the fake."""
    batch, heads, n_q, _ = q.shape
    out = q.new_empty((batch, heads, n_q, v1.shape[-1]))
    return out, q.new_empty((batch, heads, n_q), dtype=accumulator_dtype(q.dtype))


def gradients(sources: Sequence[Tensor | None], want: int) -> list[Tensor | None]:
    """Empty gradients of what is wanted, None for the rest: contiguous, masks' in their shape."""
    fmt = torch.contiguous_format
    return [
        torch.empty_like(s, memory_format=fmt) if yes else None
        for s, yes in zip(sources, wanted(want))
    ]


def finished(grads: list[Tensor | None], masks: Sequence[Tensor | None]) -> list[Tensor]:
    """The wanted gradients; those of masks added up over what the masks were broadcast to."""
    for at, mask in ((5, masks[0]), (6, masks[1])):
        if grads[at] is not None:
            grads[at] = grads[at].sum_to_size(mask.shape).to(mask.dtype).contiguous()
    return [g for g in grads if g is not None]


def rows(t: Tensor) -> Tensor:
    """With features side by side: the kernels step through them with stride 1."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
