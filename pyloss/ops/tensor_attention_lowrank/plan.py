"""What the implementations of low-rank tensor attention share: settings, sizes, results, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_DEGREE = 32
MOST_STATE_BYTES = 2 << 30


class Settings(NamedTuple):
    """What is not a tensor, in the order of the schema. A window of 0 is none."""

    coefficients: tuple[float, ...]  # p_t s^t
    centre: float
    causal: bool
    windows: tuple[int, ...]
    q_offset: int

    @property
    def banded(self) -> bool:
        """Whether queries see different keys; then there are no states."""
        return self.causal or any(self.windows)


def rank(d: int, degree: int) -> int:
    """Number of features, C(d + degree, degree); of a symbolic d too."""
    found = 1
    for t in range(1, degree + 1):
        found = found * (d + t) // t
    return found


def check_dtype(q: Tensor) -> None:
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"tensor_attention_lowrank computes its features in float32 or float64, got {q.dtype}"
        )


def check_states(d: int, degree: int, size: int) -> None:
    """ValueError where the states of all heads and axes, of `size` bytes, are too large."""
    r = rank(d, degree)
    if r >= 1 << 31 or size > MOST_STATE_BYTES:
        raise ValueError(
            f"degree {degree} with d = {d} has C({d + degree}, {degree}) = {r} features and states "
            f"of {size} bytes, more than {MOST_STATE_BYTES}; use a lower degree or fewer features"
        )


def check(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], coefficients) -> None:
    """What every forward asks for."""
    check_dtype(q)
    d, degree = q.shape[3], len(coefficients) - 1
    numbers = sum(k.shape[0] * k.shape[1] for k in keys) * (values[0].shape[3] + 1)
    check_states(d, degree, numbers * rank(d, degree) * q.element_size())


def raise_for_sums(not_positive: bool, not_finite: bool, y: Tensor) -> None:
    """RuntimeError where the sum of the polynomial over a query's keys means nothing."""
    if not (not_positive or not_finite):
        return
    found = "not finite" if not_finite else f"{y[y < torch.inf].min().item():.3g}"
    raise RuntimeError(
        "tensor_attention: with this polynomial the sum of the weights of a query's keys is "
        f"{found}; it must be positive and finite. An input is not finite, or the scores are too "
        "large for the degree: raise it, lower the scale of q and the keys, or use "
        'method="exact"'
    )


def results(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], settings: Settings
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Empty (out, lse, y, states); shared by the kernels and the fake."""
    (b, h, n, d), dv = q.shape, values[0].shape[3]
    out, lse = q.new_empty((b, h, n, dv)), q.new_empty((b, h, n))
    y = torch.empty_like(lse)
    if settings.banded:
        return out, lse, y, []
    degree = len(settings.coefficients) - 1
    state = q.new_empty((b, keys[0].shape[1], rank(d, degree), dv + 1))
    return out, lse, y, [state, *(torch.empty_like(state) for _ in keys[1:])]


def gradients(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Empty (dq, dkeys, dvalues), contiguous; shared by the kernels and the fake."""
    fmt = torch.contiguous_format
    dq, *rest = (torch.empty_like(t, memory_format=fmt) for t in (q, *keys, *values))
    return dq, rest[: len(keys)], rest[len(keys) :]


def clear_unseen(dkeys: Sequence[Tensor], dvalues: Sequence[Tensor], n_q: int, settings) -> None:
    """Writes 0 for keys outside the reach of all queries: running sums that go on to them multiply
    a gradient of 0 with what stands there, NaN perhaps.
    """
    _, _, causal, windows, offset = settings
    for window, *grads in zip(windows, dkeys, dvalues):
        if not (causal or window):
            continue
        first = offset - window + 1 if window else 0
        last = n_q + offset + (0 if causal else window - 1)
        for g in grads:
            if first > 0:
                g[:, :, :first] = 0
            if last < g.shape[2]:
                g[:, :, max(last, 0) :] = 0
