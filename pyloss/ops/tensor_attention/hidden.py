"""NaN and infinity in keys and values where something hides keys from queries.

The kernels multiply a probability of 0 with what is hidden, so that NaN would get through. Here
they are given keys and values cleared of it, and the queries that do see some get NaN afterwards
(`pyloss.reference`, which has the rule). Its backward needs no more than cleared tensors: the NaN
of such a query is in its out or lse. On the CPU, a sum over each tensor finds out whether any of
this is needed, and only where something is hidden at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.tensor_attention.plan import Settings


def of_settings(settings: Sequence) -> tuple[bool, tuple[int, int], int]:
    """(causal, windows, q_offset)."""
    found = Settings(*settings)
    return found.causal, (found.w1, found.w2), found.q_offset


def hides(masks: Sequence[Tensor | None], causal: bool, windows: Sequence[int]) -> bool:
    """Whether any key may be hidden from any query."""
    return causal or any(windows) or any(m is not None for m in masks)


def unclean(q, keys, values, masks, causal, windows, q_offset) -> bool:
    """Whether keys or values that may be hidden hold NaN or infinity; looks at the numbers."""
    if not hides(masks, causal, windows):
        return False
    # A sum that overflows takes the long way for nothing, which does no harm.
    dtype = accumulator_dtype(q.dtype)
    return not all(math.isfinite(t.sum(dtype=dtype)) for t in (*keys, *values))


def cleared(*tensors: Tensor) -> list[Tensor]:
    from pyloss.reference import _hidden  # with its first use

    return [_hidden.cleared(t) for t in tensors]


def spoil(out: Tensor, lse: Tensor, *given) -> None:
    """Writes NaN where queries see what `cleared` took away."""
    from pyloss.reference import _hidden  # with its first use

    by_key, by_value = _hidden.spoiled(*given)
    lse.masked_fill_(by_key, torch.nan)
    out.masked_fill_(by_key.unsqueeze(-1) | by_value, torch.nan)
