"""The forward of permutahedron for graphs of torch operations, where no loop may look at a value.

The regression of y against u is, of sorted positions,

    v_i = min_{j <= i} max_{k >= i} V_jk        l2: V_jk = mean(y_j..k - u_j..k)
                                                kl: V_jk = logsumexp(y_j..k) - logsumexp(u_j..k)

so the blocks are where v falls: memory O(n^2) a row, where pooling needs O(n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.ops._launch import widened
from pyloss.ops.permutahedron.reference import packed_blocks


def _running_max(t: Tensor) -> Tensor:
    """Along the last dimension from its end, in log2(n) steps: ONNX has no cummax."""
    n, step = t.shape[-1], 1
    while step < n:
        t = torch.cat([torch.maximum(t[..., :-step], t[..., step:]), t[..., -step:]], -1)
        step *= 2
    return t


def _sums_of_exp(t: Tensor, inside: Tensor) -> Tensor:
    """logsumexp of t_j..k at [j, k]."""
    return torch.where(inside, t.unsqueeze(1), -math.inf).logcumsumexp(2)


def _find_blocks(x: Tensor, *, rank: bool, kl: bool, strength: float):
    from pyloss.reference.permutahedron import Blocks

    n, scale = x.shape[1], 1 / strength
    order = x.sort(dim=1, descending=rank).indices  # a stable one is not in ONNX, nor needed
    sorted_x = x.gather(1, order)
    fixed = sorted_x.mul(scale if rank else 1).isinf()
    s = torch.where(fixed, 0.0, widened(sorted_x)) * (scale if rank else -1.0)
    place = torch.arange(n, device=x.device)
    w = widened(n - place) * (1.0 if rank else scale)
    w = (w.log() if kl and rank else w).expand(s.shape)
    y, u = (s, w) if rank else (w, s)

    later = place >= place.unsqueeze(1)  # k >= j
    inside = later & ~fixed.unsqueeze(1) & ~fixed.unsqueeze(2)
    if kl:
        value = _sums_of_exp(y, later) - _sums_of_exp(u, later)
    else:
        total = torch.where(fixed, 0.0, y - u).cumsum(1)
        before = total - torch.where(fixed, 0.0, y - u)
        value = (total.unsqueeze(1) - before.unsqueeze(2)) / (place - place.unsqueeze(1) + 1)
    best = _running_max(torch.where(inside, value, -math.inf))
    best = torch.where(later & ~fixed.unsqueeze(2), best, math.inf).amin(1)

    was, now = fixed[:, :-1], fixed[:, 1:]
    other = now & (sorted_x[:, 1:] != sorted_x[:, :-1])
    falls = ~now & (best[:, 1:] < best[:, :-1])
    starts = (was != now) | other | falls
    starts = torch.cat([torch.ones_like(fixed[:, :1]), starts], 1)
    return Blocks(order, starts, fixed, x.isnan().any(1, keepdim=True))


def forward(
    x: Tensor, rank: bool, kl: bool, strength: float, centred: bool = False
) -> tuple[Tensor, Tensor]:
    from pyloss.reference.permutahedron import from_blocks

    if x.shape[1] == 0:
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    options = dict(rank=rank, kl=kl, strength=strength)
    blocks = _find_blocks(x.detach(), **options)
    y = from_blocks(x, blocks, **options, centred=centred)
    return y.contiguous(), packed_blocks(blocks)
