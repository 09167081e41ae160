r"""Differentiable sorting networks in plain PyTorch.

A comparator of the wires ``(lo, hi)`` mixes what stands on them:

    x_lo' = alpha x_lo + beta x_hi        d = x_hi - x_lo, alpha = f(s d), beta = 1 - alpha
    x_hi' = beta x_lo + alpha x_hi

The weight of the wrong side, tau = f(-|s d|), has a formula of its own for every f; alpha and beta
are tau and 1 - tau, so that small entries of P are accurate. ``P[i, r]`` is the weight of input i
at rank r: y = P^T x.

Networks: bitonic and odd-even (Petersen et al., arXiv 2105.04019), Batcher's odd-even mergesort
(Knuth, volume 3, 5.2.2 M), splitter selection (arXiv 2206.07290). Relaxations: arXiv 2203.09630.

Of n wires that are no power of two, the bitonic network is what is left of the next power's without
the first wires, as in the diffsort package. In a block that sorts downwards an absent smallest wire
would have moved, so that for many n (the least is 22) some inputs are not sorted.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_P = 1e-30  # below it, -log P of row_ce and col_ce is constant

# --------------------------------------------------------------------------------------------------
# Networks


class Layer(NamedTuple):
    """Disjoint comparators, and how to put the wires together again after them."""

    lo: tuple[int, ...]
    hi: tuple[int, ...]
    rest: tuple[int, ...]
    # Where in (lo, hi, rest) each wire stands.
    order: tuple[int, ...]


def _layer(n: int, pairs: list[tuple[int, int]]) -> Layer:
    lo = tuple(p[0] for p in pairs)
    hi = tuple(p[1] for p in pairs)
    used = {*lo, *hi}
    rest = tuple(i for i in range(n) if i not in used)
    order = [0] * n
    for place, wire in enumerate((*lo, *hi, *rest)):
        order[wire] = place
    return Layer(lo, hi, rest, tuple(order))


def _bitonic(n: int) -> list[Layer]:
    # The last n of 2^k wires; comparators that touch one of the others are left out.
    k = (n - 1).bit_length()
    absent = 2**k - n
    layers = []
    for block in range(k):
        for step in range(block + 1):
            m = 1 << (block - step)
            pairs = []
            for i in range(absent, 2**k):
                if i & m == 0:
                    a, b = i - absent, i + m - absent
                    pairs.append((b, a) if i & (2 << block) else (a, b))
            layers.append(_layer(n, pairs))
    return layers


def _odd_even(n: int) -> list[Layer]:
    two = [_layer(n, [(i, i + 1) for i in range(odd, n - 1, 2)]) for odd in (0, 1)]
    return [two[step % 2] for step in range(n if n > 1 else 0)]


def _batcher(n: int) -> list[Layer]:
    t = (n - 1).bit_length()
    layers = []
    p = 1 << t >> 1
    while p > 0:
        q, r, d = 1 << (t - 1), 0, p
        while True:
            layers.append(_layer(n, [(i, i + d) for i in range(n - d) if i & p == r]))
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return layers


def _splitter_selection(n: int, k: int) -> list[Layer]:
    """Cascades on the wires of equal minimum rank, until that of the first k is known."""
    minimum = [0] * n  # a lower bound of the rank of what stands on a wire
    next_layer = [0] * n
    layers: list[list[tuple[int, int]]] = []
    floor, grew = -1, True
    while grew:
        grew = False
        for rank in range(k - 1, floor, -1):
            wires = [i for i in range(n) if minimum[i] == rank]
            if len(wires) < 2:
                continue
            depth = (len(wires) - 1).bit_length()
            start = max(next_layer[i] for i in wires)
            for j in range(depth):
                h = 1 << (depth - 1 - j)
                if len(layers) <= start + j:
                    layers.append([])
                for offset in range(0, len(wires), 2 * h):
                    for i in range(offset, min(offset + h, len(wires) - h)):
                        layers[start + j].append((wires[i], wires[i + h]))
            for j, wire in enumerate(wires):
                minimum[wire] += (1 << j.bit_count()) - 1
                next_layer[wire] = start + depth
            grew = True
        floor += 1
    # Mirrored: the largest on the last wires.
    return [_layer(n, [(n - 1 - b, n - 1 - a) for a, b in pairs]) for pairs in layers]


def resolved(name: str, n: int) -> str:
    """What ``"auto"`` stands for: the bitonic network where it sorts, else Batcher's."""
    if name != "auto":
        return name
    return "batcher" if n & (n - 1) else "bitonic"


@functools.lru_cache(maxsize=64)
def network(name: str, n: int, k: int = 0) -> tuple[Layer, ...]:
    """The layers of a network of n wires; ``k``: of splitter selection, how many of the largest."""
    name = resolved(name, n)
    if name == "bitonic":
        return tuple(_bitonic(n))
    if name == "odd_even":
        return tuple(_odd_even(n))
    if name == "batcher":
        return tuple(_batcher(n))
    if name == "splitter_selection":
        return tuple(_splitter_selection(n, k))
    raise ValueError(f"unknown network {name!r}")


# --------------------------------------------------------------------------------------------------
# The relaxed comparator


def wrong_side(u: Tensor, distribution: str) -> Tensor:
    """tau = f(-u) for u >= 0: the weight of the wrong side."""
    if distribution in ("logistic", "logistic_phi"):
        e = torch.exp(-u)
        return e / (1 + e)
    if distribution == "gaussian":
        return torch.special.erfc(u * math.sqrt(0.5)) / 2
    if distribution == "cauchy":
        far = u > 1
        near = 0.5 - torch.atan(torch.where(far, 0.0, u)) / math.pi
        return torch.where(far, torch.atan(1 / torch.where(far, u, 1.0)) / math.pi, near)
    if distribution == "reciprocal":
        return 1 / (2 + u)
    if distribution == "optimal":
        far = u > 0.25
        return torch.where(far, 1 / (16 * torch.where(far, u, 1.0)), 0.5 - u)
    raise ValueError(f"unknown distribution {distribution!r}")


class Mix(NamedTuple):
    """One layer of relaxed comparators, ready to mix wires."""

    layer: Layer
    alpha: Tensor  # (..., C)
    beta: Tensor


def _compare(lo, hi, steepness, distribution, art_lambda):
    """(alpha, beta, soft minimum, soft maximum) of wires ``(..., C)``."""
    d = hi - lo
    # A factor, not abs(): its derivative at a tie is that of f, not 0.
    sign = torch.where(d < 0, -1.0, 1.0).to(d.dtype)
    # Without infinities, NaN kept: what is not finite compares hard and passes no gradient.
    hard = lo.isinf() | hi.isinf() | (steepness * d).isinf()
    gap = torch.where(hard, 0.0, d) * sign
    u = steepness * gap
    if distribution == "logistic_phi":
        u = u * (gap + 1e-10) ** -art_lambda
    tau = torch.where(
        hard, torch.where(lo == hi, 0.5, 0.0).to(d.dtype), wrong_side(u, distribution)
    )
    ordered = ~(lo > hi)
    low, high = torch.where(ordered, lo, hi), torch.where(ordered, hi, lo)
    shift = tau * gap
    alpha = torch.where(ordered, 1 - tau, tau)
    beta = torch.where(ordered, tau, 1 - tau)
    return alpha, beta, low + shift, high - shift


def _index(wires: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(wires, dtype=torch.int64, device=like.device)


def _rejoined(layer: Layer, x: Tensor, lo: Tensor, hi: Tensor, dim: int) -> Tensor:
    rest = x.index_select(dim, _index(layer.rest, x))
    return torch.cat([lo, hi, rest], dim).index_select(dim, _index(layer.order, x))


def relax(
    x: Tensor,
    name: str,
    distribution: str,
    steepness: float | Tensor = 10.0,
    art_lambda: float = 0.25,
    k: int = 0,
) -> tuple[Tensor, list[Mix]]:
    """(soft sort, the mixes of each layer) of ``(..., n)``.

    Args:
        steepness: a number, or a tensor that broadcasts with ``(..., C)``.
    """
    infinite = x.isinf()
    x = torch.where(infinite, x.detach(), x)
    x = x * _poison(x)
    mixes = []
    for layer in network(name, x.shape[-1], k):
        lo = x.index_select(-1, _index(layer.lo, x))
        hi = x.index_select(-1, _index(layer.hi, x))
        alpha, beta, low, high = _compare(lo, hi, steepness, distribution, art_lambda)
        mixes.append(Mix(layer, alpha, beta))
        x = _rejoined(layer, x, low, high, -1)
    return x, mixes


def _poison(x: Tensor) -> Tensor:
    """``(..., 1)``: NaN for a row that has one, else 1."""
    return torch.where(x.detach().isnan().any(-1, keepdim=True), math.nan, 1.0).to(x.dtype)


def apply(mixes: list[Mix], f: Tensor, transpose: bool) -> Tensor:
    """P^T f, or P f without ``transpose``, of features ``(..., n, d)``."""
    for layer, alpha, beta in mixes if transpose else mixes[::-1]:
        alpha, beta = alpha.unsqueeze(-1), beta.unsqueeze(-1)
        # The matrix of a layer is symmetric.
        lo = f.index_select(-2, _index(layer.lo, f))
        hi = f.index_select(-2, _index(layer.hi, f))
        f = _rejoined_features(layer, f, alpha * lo + beta * hi, beta * lo + alpha * hi)
    return f


def _rejoined_features(layer: Layer, f: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    if f.shape[:-2] != lo.shape[:-2]:  # the same features for every item, until the first mix
        f = f.expand(*lo.shape[:-2], *f.shape[-2:])
    return _rejoined(layer, f, lo, hi, -2)


# --------------------------------------------------------------------------------------------------
# The quantities


def sorting_network_sort(x: Tensor, *network_args) -> Tensor:
    """Soft sort of ``(..., n)``; the other arguments are those of :func:`relax`."""
    return relax(x, *network_args)[0]


def sorting_network_apply(x: Tensor, f: Tensor, transpose: bool, *network_args) -> Tensor:
    """P^T f or P f, ``(..., n, d)``; f's leading shape broadcasts to that of x."""
    _, mixes = relax(x, *network_args)
    f = f.expand(*torch.broadcast_shapes(x.shape[:-1], f.shape[:-2]), *f.shape[-2:])
    return apply(mixes, f, transpose) * _poison(x).unsqueeze(-1)


def sorting_network_permutation(x: Tensor, *network_args) -> tuple[Tensor, Tensor]:
    """(soft sort ``(..., n)``, P ``(..., n, n)``)."""
    y, mixes = relax(x, *network_args)
    n = x.shape[-1]
    eye = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape, n)
    return y, apply(mixes, eye, True).mT * _poison(x).unsqueeze(-1)


def sorting_network_loss(
    x: Tensor, target: Tensor, count: Tensor | None, order: str, kind: str, *network_args
) -> Tensor:
    """Cross entropy of P against the uniform distribution over ``first <= r < first + count``.

    Args:
        target, count: of ``order="ranks"`` first and count, None for one rank each; else values,
            see :func:`target_ranks`.

    Returns:
        ``(...)``: the mean over the n^2 terms of ``"bce"``, over the n rows of the others.
    """
    first, count, nan = target_ranks(target, order, count)
    _, p = sorting_network_permutation(x, *network_args)
    loss = permutation_loss(p, first, count, kind)
    return loss if nan is None else loss * torch.where(nan, torch.nan, 1.0).to(loss.dtype)


def reduced(each: Tensor, reduction: str) -> Tensor:
    """The losses of the items as one."""
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def target_ranks(
    target: Tensor, order: str, count: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(first, count, int32, which rows hold a NaN and so have no order, or None).

    A count of None is one rank each.
    """
    if order == "ranks":
        return target, count, None
    values, descending = target.contiguous(), order.endswith("descending")
    nan = values.isnan().any(-1) if values.is_floating_point() else None
    if order.startswith("shared"):
        ordered = values.sort(-1).values
        below = torch.searchsorted(ordered, values, out_int32=True)
        up_to = torch.searchsorted(ordered, values, right=True, out_int32=True)
        return values.shape[-1] - up_to if descending else below, up_to - below, nan
    places = values.argsort(dim=-1, descending=descending, stable=True)
    return inverse(places).to(torch.int32), None, nan


def inverse(order: Tensor) -> Tensor:
    """The inverse of permutations along the last dimension."""
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, place)


def permutation_loss(p: Tensor, first: Tensor, count: Tensor | None, kind: str) -> Tensor:
    """The loss of :func:`sorting_network_loss` of a P that is there already."""
    n = p.shape[-1]
    count = torch.ones_like(first) if count is None else count
    rank = torch.arange(n, device=p.device)
    first, count = first.unsqueeze(-1), count.unsqueeze(-1)
    inside = (rank >= first) & (rank < first + count)
    q = torch.where(inside, 1 / count.clamp_min(1).to(p.dtype), 0.0)
    if kind == "bce":
        return _binary_cross_entropy(p, q).mean((-2, -1))
    return -(q * p.clamp_min(SMALLEST_P).log()).sum((-2, -1)) / n


def _binary_cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    """torch's: logarithms of at least -100, derivative (p - q) / max(p (1 - p), 1e-12).

    As plain operations, so that every further derivative is that of this derivative; rounding may
    take p above 1.
    """
    p = p - (p - p.clamp(0, 1)).detach()
    saturated = p * (1 - p) < 1e-12
    inner = torch.where(saturated, 0.5, p)
    terms = -(q * inner.log() + (1 - q) * torch.log1p(-inner))
    with torch.no_grad():
        outer = -(q * p.log().clamp_min(-100) + (1 - q) * torch.log1p(-p).clamp_min(-100))
    bowl = (p - q) ** 2 / 2e-12
    return torch.where(saturated, outer + (bowl - bowl.detach()), terms)
