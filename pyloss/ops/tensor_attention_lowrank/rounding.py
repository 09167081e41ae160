"""How far rounding takes the sums of low-rank tensor attention from those of exact arithmetic.

A sum of t terms, added up in any order in which no term meets more than c additions, is off by at
most c units times the sum of the sizes of its terms. So what counts is the longest chain of
additions of the code that runs, and what its products lose.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from pyloss.reference.tensor_attention_lowrank import _BLOCK_ELEMENTS

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_TF32X3 = 3 * 2.0**-20  # both factors split in two tf32, the product of the small parts left out
_TF32 = 2.0**-9  # two factors of 11 bits, cut off or rounded


def sum_error(
    device: str,
    dtype: torch.dtype,
    queries: int,
    lengths: Sequence[int],
    windows: Sequence[int],
    causal: bool,
    heads: int,
    d: int,
    dv: int,
    rank: int,
    degree: int,
) -> float:
    """Error of [N | y] over the sum of the sizes of its terms, at most; to first order.

    Args:
        device: type of the device, which decides what runs.
        dtype: float32 or float64.
        queries: how many there are.
        lengths, windows: of the key axes; a window of 0 is none.
        heads: times the batch.
    """
    banded = causal or any(windows)
    eps = torch.finfo(dtype).eps
    products = (len(lengths) + 1) * (degree + 2) + 4  # the monomials, their weights, the division
    if device == "cpu":
        return (_cpu(lengths, windows, banded, rank) + products) * eps / 2
    from pyloss.kernels import _tensor_attention_lowrank_plan as plan

    matrix_products = len(lengths) + 1
    single = device == "cuda" and dtype == torch.float32
    if single and _HAS_TRITON and max(d, dv) <= plan.WIDEST and dv > 0:
        chain = _triton(lengths, plan.SUMMED)
        if banded:
            shifts = [plan.shift(n, queries, causal, w, 0) for n, w in zip(lengths, windows)]
            size = 4 * len(lengths) * heads * rank * (dv + 1)
            length = plan.chunk_length(queries, size, max(s.span for s in shifts))
            # In a chunk a key comes, and with a window one goes; without, chunks are added up.
            for n, s in zip(lengths, shifts):
                chain += min(n, length) + (-(-queries // length) if s.leaves is None else length)
        # The sums of tensor cores are cut off, not rounded: a unit of eps.
        return (chain + rank + products) * eps + matrix_products * _TF32X3
    per_row = max(1, heads * rank * ((dv + 1) if banded else 1))
    found = (_blocks(lengths, windows, per_row) + rank + products) * eps / 2
    return 2.0 * found + matrix_products * _TF32 if single and allows_tf32() else found


def allows_tf32() -> bool:
    """Whether PyTorch may round the factors of float32 products on CUDA to tf32."""
    from pyloss.kernels import _launch  # with its first use

    return _launch.allows_tf32()


def _cpu(lengths, windows, banded: bool, rank: int) -> int:
    """Chains of csrc/cpu/tensor_attention_lowrank.cpp."""
    if banded:
        # Keys of a window are added up in two parts, whose sizes are those of whole blocks.
        tokens = sum((3 if w else 1) * (128 + -(-n // 64)) for n, w in zip(lengths, windows))
        return tokens + 16 + -(-rank // 16)
    tokens = sum(min(n, 208 + -(-n // 8192)) for n in lengths)
    return tokens + min(rank, 84 + -(-rank // 84))


def _triton(lengths, part: int) -> int:
    """Chains of the states: in sums of `part` tokens, over those, over ranges of tokens."""
    return sum(min(n, part + -(-n // part)) + 1 + n // (4 * part) for n in lengths)


def _blocks(lengths, windows, per_row: int) -> int:
    """Chains of the reference: within a block of tokens, then over the blocks.

    What leaves a window is subtracted: its terms count once more each way.
    """
    step = max(1, _BLOCK_ELEMENTS // per_row)
    return sum(
        (3 if w else 1) * min(n, min(n, step) + -(-n // step)) for n, w in zip(lengths, windows)
    )
