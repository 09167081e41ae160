"""What crosses to csrc/bind/lion_k.cpp."""

from __future__ import annotations

from typing import NamedTuple

# The codes of csrc/common/lion_k.h.
KAPPAS = {"l1": 0, "soft": 1, "huber": 2, "smooth": 3, "given": 4}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "compensated": 2}


class Options(NamedTuple):
    kappa: int
    rounding: int
    maximize: bool
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    e: float
    seed: int
    step: int


class Problem(NamedTuple):
    """Addresses in one tuple an array, with an entry for each tensor."""

    x_dtype: int
    g_dtype: int
    m_dtype: int
    size: tuple[int, ...]
    x: tuple[int, ...]
    g: tuple[int, ...]
    m: tuple[int, ...]
    given: tuple[int, ...]
    compensation: tuple[int, ...]
    position: tuple[int, ...]
    options: Options


RECORDS = (Options, Problem)
