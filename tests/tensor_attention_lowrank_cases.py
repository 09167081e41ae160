"""Problems for the tests of low-rank tensor attention: exact attention with p in place of exp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyloss.functional import _polynomials as polynomials
from pyloss.ops.tensor_attention_lowrank import Settings

F64, F32 = torch.float64, torch.float32


def masked_exact(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_masks: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) from the whole cube of p(S), masked; the scale is in the coefficients."""
    heads, order = q.shape[1], len(keys)

    def repeated(t):
        return t.repeat_interleave(heads // t.shape[1], 1)

    keys, values = [repeated(k) for k in keys], [repeated(v) for v in values]
    axes = "jkmn"[:order]
    names = ",".join(f"bh{a}l" for a in axes)
    s = torch.einsum(f"bhil,{names}->bhi{axes}", q, *keys)
    p = sum(c * s**t for t, c in enumerate(settings.coefficients))
    position = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + settings.q_offset
    for x, (k, window, mask) in enumerate(zip(keys, settings.windows, key_masks)):
        key = torch.arange(k.shape[2], device=q.device)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        if settings.causal:
            seen = seen & (key <= position)
        if window:
            seen = seen & (position - key < window)
            seen = seen if settings.causal else seen & (key - position < window)
        seen = seen.expand(*q.shape[:3], -1)
        if mask is not None:
            seen = seen & repeated(mask).unsqueeze(2)
        shape = [*q.shape[:3], *([1] * order)]
        shape[3 + x] = k.shape[2]
        p = p * seen.reshape(shape)
    y = p.flatten(3).sum(-1)
    names = ",".join(f"bh{a}c" for a in axes)
    sums = torch.einsum(f"bhi{axes},{names}->bhic", p, *values)
    safe = torch.where(y == 0, 1.0, y)
    out = torch.where((y == 0).unsqueeze(-1), 0.0, sums / safe.unsqueeze(-1))
    return out, torch.where(y == 0, -math.inf, safe.log() + settings.centre)


@dataclass(frozen=True)
class Problem:
    lengths: tuple[int, ...] = (7, 6)  # of the key axes
    n_q: int = 7
    d: int = 3
    dv: int = 2
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    degree: int = 2
    causal: bool = False
    windows: tuple[int, ...] = ()
    q_offset: int = 0
    padded: bool = False
    centre: float = 0.0

    def tensors(self, dtype: torch.dtype = F64, seed: int = 0):
        """(q, keys, values), entries of q and the keys in [-1/2, 1/2]."""
        g = torch.Generator().manual_seed(seed)

        def draw(heads, n, width):
            return torch.rand(self.batch, heads, n, width, generator=g, dtype=F64) - 0.5

        q = draw(self.heads, self.n_q, self.d)
        keys = [draw(self.kv_heads, n, self.d) for n in self.lengths]
        values = [3 * draw(self.kv_heads, n, self.dv) for n in self.lengths]
        return q.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]

    def key_masks(self, seed: int = 1) -> list[Tensor | None]:
        """The first shared by the heads, the second not, the others absent."""
        if not self.padded:
            return [None] * len(self.lengths)
        g = torch.Generator().manual_seed(seed)
        heads = (1, self.kv_heads)
        return [
            torch.rand(self.batch, heads[x], n, generator=g) < 0.7 if x < 2 else None
            for x, n in enumerate(self.lengths)
        ]

    def settings(self) -> Settings:
        windows = self.windows or (0,) * len(self.lengths)
        coefficients = polynomials.taylor(self.degree).scaled(self.d**-0.5)
        return Settings(coefficients, self.centre, self.causal, windows, self.q_offset)


PROBLEMS = {
    "plain": Problem(),
    "order_1": Problem((9,)),
    "order_3": Problem((4, 5, 6), n_q=5),
    "order_4": Problem((3, 4, 3, 2), n_q=3, batch=1),
    "degree_1": Problem(degree=1),
    "degree_3": Problem(degree=3),
    "degree_6": Problem(degree=6, d=2),
    "one_feature": Problem(d=1, degree=4),
    "one_value": Problem(dv=1),
    "grouped": Problem(heads=6, kv_heads=2),
    "grouped_padded": Problem(heads=4, kv_heads=2, padded=True),
    "padded": Problem(padded=True, centre=0.5),
    "wide": Problem(d=17, dv=19, lengths=(33, 40), n_q=35, batch=1),
    "long": Problem((30, 530), n_q=70, d=5, dv=3, batch=1, heads=1, kv_heads=1),
    "causal": Problem((7, 7), causal=True),
    "causal_long": Problem((90, 90), n_q=90, d=4, batch=1, heads=1, kv_heads=1, causal=True),
    "causal_grouped": Problem((7, 7), heads=4, kv_heads=2, causal=True, padded=True),
    "causal_later": Problem((9, 8), n_q=4, causal=True, q_offset=5),
    "causal_earlier": Problem((7, 7), causal=True, q_offset=-3),  # three queries see nothing
    "causal_order_1": Problem((12,), n_q=12, causal=True),
    "causal_order_3": Problem((5, 5, 5), n_q=5, causal=True, padded=True),
    "windows": Problem((9, 9), n_q=9, causal=True, windows=(3, 2)),
    "window_of_one": Problem((7, 7), causal=True, windows=(1, 1)),
    "one_window": Problem((9, 9), n_q=9, causal=True, windows=(0, 4), padded=True),
    "wide_window": Problem((7, 7), causal=True, windows=(100, 7)),
    "windows_long": Problem(
        (80, 80), n_q=80, d=3, batch=1, heads=2, kv_heads=1, causal=True, windows=(20, 35)
    ),
    "both_sides": Problem((9, 8), n_q=7, windows=(2, 3), q_offset=1),
    "both_sides_one": Problem((9, 8), n_q=7, windows=(2, 0), padded=True),
    "both_sides_order_3": Problem((6, 6, 6), n_q=6, windows=(2, 0, 3)),
    "beyond": Problem((4, 4), n_q=9, windows=(2, 3)),  # the last queries see nothing
}
