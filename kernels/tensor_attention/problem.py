"""The problem as the launchers see it: checked tensors, exchanged axes, and which tiles it gets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from .._launch import cdiv, device_capability, dot_precision, little_shared, widens
from .arguments import Constants, Inputs
from .table import MASKED, TABLE, TENSOR_MEMORY, Config

UNLIMITED = 2**29  # left or right of a window without bound
_MAX_LENGTH = 2**28  # sums of a few lengths and UNLIMITED stay below 2^31


class Problem(NamedTuple):
    """The tensors after checks, bias and exchange of the axes (see the package)."""

    q: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor
    mask1: torch.Tensor | None
    mask2: torch.Tensor | None
    scale: float
    q_offset: int
    limits: tuple[int, int, int, int]  # left1, right1, left2, right2
    swapped: bool

    @property
    def group(self) -> int:
        return self.q.shape[1] // max(1, self.k1.shape[1])

    @property
    def spans(self) -> tuple[int, int]:
        """Most keys of either axis that one query meets."""
        left1, right1, left2, right2 = self.limits
        n_1, n_2 = self.k1.shape[2], self.k2.shape[2]
        return min(n_1, left1 + right1 + 1), min(n_2, left2 + right2 + 1)

    @property
    def width(self) -> int:
        """The larger of d and dv, padded."""
        return padded(max(self.q.shape[3], self.v1.shape[3]))

    @property
    def masks_rows(self) -> bool:
        """Whether the queries of a head have masks of axis 2 of their own."""
        return _mask_strides(self.mask2)[2] != 0

    @property
    def empty(self) -> bool:
        """No triple at all."""
        return 0 in (self.q.numel(), self.k1.numel(), self.k2.numel())

    def exchanged(self) -> Problem:
        left1, right1, left2, right2 = self.limits
        return self._replace(
            k1=self.k2,
            k2=self.k1,
            v1=self.v2,
            v2=self.v1,
            mask1=self.mask2,
            mask2=self.mask1,
            limits=(left2, right2, left1, right1),
            swapped=not self.swapped,
        )

    def inputs(self) -> Inputs:
        q, k1, k2, v1, v2 = self[:5]
        (_, h, n_q, d), dv = q.shape, v1.shape[3]
        return Inputs(
            q, k1, k2, v1, v2, self.mask1, self.mask2, n_q, k1.shape[2], k2.shape[2], d, dv, h,
            *_mask_strides(self.mask1), *_mask_strides(self.mask2), self.q_offset, *self.limits,
            self.scale * math.log2(math.e),
        )  # fmt: skip

    def constants(self, c: Config, block_of_2: int | None, pack: int = 1) -> Constants:
        """Of tiles c with `pack` query heads side by side.

        block_of_2: keys of axis 2 at a time; None: the kernel does not ask whether they divide it.
        """
        q, d, dv = self.q, self.q.shape[3], self.v1.shape[3]
        _, stride_h, stride_row = _mask_strides(self.mask2)
        return Constants(
            GROUP=self.group,
            PACK=pack,
            LIMITED=min(self.limits) < UNLIMITED,
            EVEN_N=block_of_2 is not None and self.k2.shape[2] % block_of_2 == 0,
            EVEN_D=padded(d) == d,
            EVEN_DV=padded(dv) == dv,
            # Heads side by side may have rows of their own.
            MASK2_ROWS=stride_row != 0 or (pack > 1 and stride_h != 0),
            WIDE=widens(q.dtype),
            PRECISION=dot_precision(q.dtype),
            LIFT=15 if q.dtype == torch.float16 else 0,
            D=padded(d),
            DV=padded(dv),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
        )


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and row, 0 where the mask is repeated."""
    if mask is None:
        return 0, 0, 0
    b, h, row = (mask.stride(k) if mask.shape[k] > 1 else 0 for k in range(3))
    return b, h, row


def _window(w: int | None, causal: bool) -> tuple[int, int]:
    if w is not None and w != -1 and w < 1:
        raise ValueError(f"windows must be positive, got {w}")
    left = UNLIMITED if w is None or w == -1 or w > UNLIMITED else w - 1
    return left, 0 if causal else left


def checked_problem(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None,
    mask2: torch.Tensor | None,
    scale: float,
    causal: bool,
    w1: int | None,
    w2: int | None,
    q_offset: int,
    kv_bias: tuple[float, float],
) -> Problem:
    named = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    for name, t in named.items():
        if t.dim() != 4:
            raise ValueError(f"{name} needs 4 dimensions, got shape {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"q and {name} need one dtype, got {q.dtype} and {t.dtype}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {q.dtype}")
    (b, h, n_q, d), (_, kv_heads, n_1, _), dv = q.shape, k1.shape, v1.shape[3]
    n_2 = k2.shape[2]
    for name, want in (
        ("k1", (b, kv_heads, n_1, d)),
        ("k2", (b, kv_heads, n_2, d)),
        ("v1", (b, kv_heads, n_1, dv)),
        ("v2", (b, kv_heads, n_2, dv)),
    ):
        if tuple(named[name].shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(named[name].shape)}")
    if h and (kv_heads == 0 or h % kv_heads):
        raise ValueError(f"q has {h} heads, k1 {kv_heads}, which does not divide them")
    if max(d, dv) > 256:
        raise ValueError(f"head dimensions up to 256, got d = {d}, dv = {dv}")
    if (
        max(n_q, n_1, n_2, abs(q_offset)) >= _MAX_LENGTH
        or max(n_q * max(1, h), max(n_1, n_2) * max(d, dv)) >= 2**31
    ):
        raise ValueError(f"lengths {n_q}, {n_1}, {n_2} or q_offset {q_offset} are too large")
    masks = []
    for name, mask, n in (("mask1", mask1, n_1), ("mask2", mask2, n_2)):
        if mask is not None:
            full = (b, h, n_q, n)
            if mask.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {mask.dtype}")
            if mask.dim() != 4 or any(
                m != f and (m != 1 or at == 3) for at, (m, f) in enumerate(zip(mask.shape, full))
            ):
                raise ValueError(f"{name} {tuple(mask.shape)} does not broadcast to {full}")
            if n > 1 and mask.stride(3) != 1:
                mask = mask.contiguous()
        masks.append(mask)
    bias_k, bias_v = kv_bias
    p = Problem(
        q.contiguous(),
        k1.contiguous(),
        # Rounded to the input's type, as the product's operand would be anyway.
        (k2 + bias_k if bias_k else k2).contiguous(),
        v1.contiguous(),
        (v2 + bias_v if bias_v else v2).contiguous(),
        *masks,
        float(scale),
        q_offset,
        _window(w1, causal) + _window(w2, causal),
        False,
    )
    return p.exchanged() if p.spans[1] < p.spans[0] else p


def choose_config(kernel: str, p: Problem) -> Config:
    """Tiles of `kernel`, a name of the table."""
    dtype = p.q.dtype
    kind = "half" if dtype.itemsize == 2 else dot_precision(dtype)
    which = kernel, kind, max(64, p.width)
    others = MASKED if p.masks_rows else {}
    if device_capability(p.q.device) == (10, 0):
        others = {**TENSOR_MEMORY, **others}
    config = others.get(which, TABLE[which])
    if little_shared(p.q.device):
        config = config._replace(num_stages=1, block_n=max(16, config.block_n // 2))
    return config


class Cost(NamedTuple):
    """Share of the computed triples that are valid, if windows only limit them."""

    rows: float
    packed: float
    pairs: float


def valid_share(p: Problem, rows: Config, pairs: Config) -> Cost:
    n_q, n_1, n_2 = p.q.shape[2], p.k1.shape[2], p.k2.shape[2]
    span1, span2 = p.spans

    def share(queries: float, rows: int, keys: int, c: Config) -> float:
        """Tiles of `queries` queries in c.block_m rows, `keys` keys of axis 1 one after another."""
        span = min(n_2, span2 + math.ceil(min(queries, n_q)) - 1)
        computed = cdiv(rows, c.block_m) * c.block_m * keys * cdiv(span, c.block_n) * c.block_n
        return rows * span1 * span2 / computed

    def by_rows(pack: int) -> float:
        queries = max(1.0, rows.block_m / pack)
        keys = min(n_1, span1 + math.ceil(min(queries, n_q)) - 1)
        return share(queries, n_q * pack, keys, rows)

    block_j = min(pairs.block_m, triton.next_power_of_2(span1))
    used = span1 / (cdiv(span1, block_j) * block_j)  # of the keys' rows
    by_pairs = share(pairs.block_m // block_j, n_q * block_j, span1, pairs) * used
    return Cost(by_rows(1), by_rows(p.group), by_pairs)


def choose_tiling(p: Problem, rows: Config, pairs: Config) -> str:
    """Picks "rows" (T1), "packed" (T2) or "pairs" (T3), by the share of valid triples.

    Heads that share keys are always packed: the windows of a tile's rows then differ less. Pairs
    lose half a share in ten to rows: they gather their rows and add them up at the end.
    """
    cost = valid_share(p, rows, pairs)
    by_rows = "packed" if p.group > 1 else "rows"
    return "pairs" if 0.95 * cost.pairs > getattr(cost, by_rows) else by_rows
