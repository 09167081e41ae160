"""What a query does not see must not reach it, NaN and infinity included.

A probability of 0 times NaN is NaN, so zeros alone do not hide anything. Attention over keys and
values cleared of what is not finite, plus a look at which queries see such an entry, does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cleared(t: Tensor) -> Tensor:
    """With 0 in the place of NaN and infinity, and a gradient of 0 there."""
    return torch.where(t.isfinite(), t, 0.0)


def band(n_q, n, causal, window, q_offset, device) -> Tensor | None:
    """Which keys a query sees, ``(n_q, n)``; None: all."""
    if not causal and not window:
        return None
    position = torch.arange(n_q, device=device).unsqueeze(1) + q_offset
    key = torch.arange(n, device=device)
    seen = key <= position if causal else torch.ones(n_q, n, dtype=torch.bool, device=device)
    if window:
        near = position - key < window
        seen = seen & (near if causal else near & (key - position < window))
    return seen


def spoiled(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    causal: bool,
    windows: Sequence[int | None],
    q_offset: int,
) -> tuple[Tensor, Tensor]:
    """Which outputs are NaN because of keys, ``(B, H, n_q)``, and of values, ``(B, H, n_q, dv)``.

    A query that sees NaN or infinity in a key has nothing but NaN; in a value, NaN in its feature.
    It sees an entry together with any keys of the other axes, so one of each must be in sight.
    """
    heads, n_q = q.shape[1:3]
    seen = []
    for k, mask, window in zip(keys, masks, windows):
        n = k.shape[2]
        found = band(n_q, n, causal, window, q_offset, q.device)
        if mask is not None:
            kept = mask if mask.dtype == torch.bool else mask != -math.inf
            found = kept if found is None else kept & found
        if found is None:
            found = torch.ones(1, dtype=torch.bool, device=q.device)
        seen.append(found.expand(*q.shape[:3], n))
    any_seen = [s.any(-1) for s in seen]
    by_key = torch.zeros_like(any_seen[0])
    by_value = torch.zeros(1, dtype=torch.bool, device=q.device)
    for x, (k, v) in enumerate(zip(keys, values)):
        with_others = torch.ones_like(by_key)
        for y, other in enumerate(any_seen):
            with_others = with_others & other if y != x else with_others
        bad_k = (~k.isfinite()).any(-1).repeat_interleave(heads // k.shape[1], 1)
        by_key = by_key | (seen[x] & bad_k.unsqueeze(2)).any(-1) & with_others
        bad_v = (~v.isfinite()).float().repeat_interleave(heads // v.shape[1], 1)
        count = seen[x].float() @ bad_v
        by_value = by_value | (count > 0) & with_others.unsqueeze(-1)
    return by_key, by_value
