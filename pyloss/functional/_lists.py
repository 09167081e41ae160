"""Lists of scored items: padded with a mask, or one behind the other with offsets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._sorting_rows import check_ordered
from pyloss.ops._launch import accumulator_dtype

GAINS = ("exponential", "linear")


class Lists:
    """Scores and relevance as rows (b, n), what counts in them, and how to reduce over lists."""

    def __init__(self, scores, relevance, mask, offsets) -> None:
        check_ordered("scores", scores)
        checks.check_has_dimension("scores", scores)
        checks.check_tensor("relevance", relevance)
        checks.check_device("relevance", relevance, scores, "scores")
        if relevance.shape != scores.shape:
            raise ValueError(
                f"relevance must have the shape {list(scores.shape)} of scores, got "
                f"{list(relevance.shape)}"
            )
        if relevance.is_complex():
            raise TypeError(f"relevance must be real, got {relevance.dtype}")
        self.result = checks.result_dtype(scores.dtype, scores)
        work = accumulator_dtype(scores.dtype)
        s, y = scores.to(work), relevance.detach().to(work)
        if offsets is not None:
            if mask is not None:
                raise ValueError("give mask or offsets, not both")
            if scores.dim() != 1:
                raise ValueError(
                    f"scores must be (P,) with offsets, one list behind the other, got "
                    f"{list(scores.shape)}"
                )
            segment.check_offsets(offsets, scores.shape[0])
            both, mask = segment.to_padded(torch.stack([s, y], 1), offsets)
            s, y = both.unbind(-1)
        elif mask is not None:
            checks.check_mask(mask, scores)
        self.lead = s.shape[:-1]
        rows = (math.prod(self.lead), s.shape[-1])
        self.s, self.y = s.reshape(rows), y.reshape(rows)
        self.mask = None if mask is None else mask.reshape(self.s.shape)
        if self.mask is not None:  # nothing that is hidden reaches a number
            self.s = torch.where(self.mask, self.s, 0.0)
            self.y = torch.where(self.mask, self.y, 0.0)

    @property
    def n(self) -> int:
        return self.s.shape[1]

    def hidden(self, values: Tensor, fill: float) -> Tensor:
        """Values (b, n) with `fill` where nothing counts."""
        return values if self.mask is None else torch.where(self.mask, values, fill)

    def pairs(self) -> Tensor | None:
        """(b, n, n): which pairs count; None: all."""
        return None if self.mask is None else self.mask.unsqueeze(2) & self.mask.unsqueeze(1)

    def lowest(self) -> float:
        """A score below all others whose differences are finite."""
        return torch.finfo(self.s.dtype).min / 4

    def order(self, values: Tensor) -> Tensor:
        """Items from the largest value to the smallest, what does not count last."""
        return self.hidden(values.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)

    def gains(self, gain: str) -> Tensor:
        """(b, n); 0 where nothing counts."""
        return self.y if gain == "linear" else self.hidden(torch.exp2(self.y) - 1, 0.0)

    def discounts(self, k: int | None) -> Tensor:
        """(n,) of the ranks 1, 2, ...: 1 / log2(1 + rank), 0 behind k."""
        rank = torch.arange(1, self.n + 1, dtype=self.s.dtype, device=self.s.device)
        found = 1 / torch.log2(1 + rank)
        return found if k is None else torch.where(rank <= k, found, 0.0)

    def ideal(self, gains: Tensor, discounts: Tensor) -> Tensor:
        """The largest discounted sum of gains, (b,)."""
        return (gains.gather(1, self.order(gains)) * discounts).sum(1)

    def reduced(self, each: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
        """Of lists (b,), of which `counted` are to learn from: the others are 0 and not counted.

        A NaN stays: it is no comparison's result.
        """
        if self.mask is not None:
            some = self.mask.any(1)
            counted = some if counted is None else counted & some
        elif self.n == 0:
            counted = torch.zeros_like(each, dtype=torch.bool)
        if counted is not None:
            each = torch.where(counted, each, 0.0)
        if reduction == "none":
            return each.view(self.lead).to(self.result)
        total = each.sum()
        if reduction == "mean":
            total = total / (each.shape[0] if counted is None else counted.sum())
        return total.to(self.result)

    def poison(self) -> Tensor:
        """(b,): NaN for a list with a NaN, which no comparison sees; 0 for the others."""
        bad = self.s.isnan().any(1) | self.y.isnan().any(1)
        return torch.where(bad, torch.nan, 0.0).to(self.s.dtype)


def checked_k(k) -> int | None:
    if k is None:
        return None
    k = checks.checked_integer("k", k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def check_gain(gain) -> None:
    checks.check_one_of("gain", gain, GAINS)
