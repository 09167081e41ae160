"""Soft rank and soft sort as projections onto the permutahedron, in plain PyTorch.

With w = (n, ..., 1), e the regularization strength and iso the non-increasing isotonic regression:

    rank   s = sort_desc(x / e)     v = iso(s - w)        l2: y = s - v, in the order of x
                                    v = iso_kl(s, log w)  kl: y = exp(s - v), in the order of x
    sort   s = sort_desc(-x)        v = iso(w / e - s)    l2: y = v - w / e
                                    v = iso_kl(w / e, s)  kl: the same

The regression is constant on blocks of neighbours. l2: the mean of its argument; kl: the difference
of the two logsumexp. Pool adjacent violators finds the blocks (:func:`find_blocks`, no gradient);
given them, every output is a differentiable formula (:func:`from_blocks`).

Paper: Blondel, Teboul, Berthet, Djolonga. arXiv 2002.08871.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """What the values decide: everything else is smooth. All (b, n), but nan."""

    order: Tensor  # int64: element at each sorted position
    starts: Tensor  # bool: a block begins at this sorted position
    fixed: Tensor  # bool: an infinite element is there
    nan: Tensor  # bool (b, 1): the row holds a NaN


def _logaddexp(a: float, b: float) -> float:
    high, low = (a, b) if a > b else (b, a)
    return high + math.log1p(math.exp(low - high))


def _pool(y: list[float], w: list[float], merge: Callable, value: Callable) -> list[int]:
    """Sizes of the blocks of the non-increasing regression of y against w."""
    blocks: list[tuple[int, float, float]] = []
    for a, b in zip(y, w):
        blocks.append((1, a, b))
        while len(blocks) > 1 and value(*blocks[-2]) <= value(*blocks[-1]):
            last = blocks.pop()
            count, a0, b0 = blocks.pop()
            blocks.append((count + last[0], merge(a0, last[1]), merge(b0, last[2])))
    return [count for count, _, _ in blocks]


def find_blocks(x: Tensor, *, rank: bool, kl: bool, strength: float) -> Blocks:
    """The blocks of rows (b, n). Infinite elements stay apart, equal infinities in one block."""
    x = x.detach()
    b, n = x.shape
    order = x.sort(dim=1, descending=rank, stable=True).indices
    scale = 1 / strength
    starts = torch.zeros((b, n), dtype=torch.bool)
    for row, s in enumerate(x.gather(1, order).tolist()):
        s = [t * scale for t in s] if rank else [-t for t in s]
        if any(map(math.isnan, s)):
            continue
        w = [float(n - i) if rank else (n - i) * scale for i in range(n)]
        first = 0
        while first < n:
            end = first + 1
            if math.isinf(s[first]):
                while end < n and s[end] == s[first]:
                    end += 1
                starts[row, first] = True
            else:
                while end < n and math.isfinite(s[end]):
                    end += 1
                y, u = s[first:end], w[first:end]
                if kl and rank:
                    u = [math.log(t) for t in u]
                if not rank:
                    y, u = u, y
                if kl:
                    sizes = _pool(y, u, _logaddexp, lambda count, a, b: a - b)
                else:
                    sizes = _pool(
                        y, u, lambda a, b: a + b, lambda count, a, b: a / count - b / count
                    )
                at = first
                for size in sizes:
                    starts[row, at] = True
                    at += size
            first = end
    starts[:, :1] = True  # also where there is a NaN
    fixed = x.gather(1, order).mul(scale if rank else 1).isinf()
    return Blocks(order, starts.to(x.device), fixed, x.isnan().any(1, keepdim=True))


def from_blocks(
    x: Tensor, blocks: Blocks, *, rank: bool, kl: bool, strength: float, centred: bool = False
) -> Tensor:
    """(b, n) from rows x and their blocks; differentiable any number of times.

    ``centred`` ranks are less (n + 1) / 2, their mean over the row, taken off before any rounding
    can lose what is small beside it.
    """
    order, starts, fixed, nan = blocks
    b, n = x.shape
    number = starts.cumsum(1) - 1
    position = torch.arange(n, device=x.device).expand(b, n)
    first = torch.where(starts, position, 0).cummax(1).values

    def block_sum(t: Tensor) -> Tensor:
        return torch.zeros_like(t).scatter_add(1, number, t).gather(1, number)

    w = (n - position).to(x.dtype)
    count = block_sum(torch.ones_like(w))
    # A NaN reaches the value and the gradient of every element of its row.
    spoil = torch.where(nan, torch.nan, 1.0).to(x.dtype)
    v = (x * spoil).gather(1, order)
    s = torch.where(fixed, 0.0, v) / (strength if rank else -1.0)
    if kl:
        top = s.gather(1, first)
        e = (s - top).exp()
        mass = block_sum(e)
    if rank:
        mean, middle = block_sum(w) / count, (n + 1) / 2 if centred else 0.0
        apart = mean - middle
        if not kl:
            y = (s - block_sum(s) / count) + apart
        elif not centred:
            y = e / mass * block_sum(w)
        else:  # m (1 + d) / (1 + mean d) - c, with d = exp(s - top) - 1
            d = (s - top).expm1()
            mean_d = block_sum(d) / count
            y = (apart + (mean * d - middle * mean_d)) / (1 + mean_d)
        y = torch.where(fixed, apart, y)
        return torch.zeros_like(y).scatter(1, order, y) * spoil
    w = w / strength
    if kl:
        w_top = w.gather(1, first)
        y = (w_top - w) + block_sum((w - w_top).exp()).log() - (top + mass.log())
    else:
        y = (block_sum(w) / count - w) - block_sum(s) / count
    return torch.where(fixed, v.detach(), y) * spoil


def permutahedron_projection(
    x: Tensor, *, rank: bool, regularization: str = "l2", strength: float = 1.0
) -> Tensor:
    """Soft ranks (1 = smallest) or softly sorted values (ascending) of rows (b, n).

    Args:
        x: ``(b, n)``. Infinite elements keep their place at an end, without gradient; a NaN makes
            its row NaN.
        rank: ranks, else sorted values.
        regularization: ``"l2"`` or ``"kl"``.
        strength: > 0; towards 0 the result is exact.

    Example:
        >>> import torch
        >>> permutahedron_projection(torch.tensor([[0.0, 2.0, 1.9]]), rank=True).tolist()
        [[1.0, 2.549..., 2.450...]]
    """
    options = dict(rank=rank, kl=regularization == "kl", strength=strength)
    return from_blocks(x, find_blocks(x, **options), **options)
