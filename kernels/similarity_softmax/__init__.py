"""TODO"""

from __future__ import annotations

from .counts import pair_counts
from .gradient import BOTH, KEYS, QUERIES, pair_gradient_block, pair_sweep
from .launch import MOST_WHOLE, Config
from .pairs import Coeffs, Kind, Pairs
from .statistics import PairStats, pair_softplus_sums, pair_statistics

__all__ = [
    "BOTH",
    "KEYS",
    "MOST_WHOLE",
    "QUERIES",
    "Coeffs",
    "Config",
    "Kind",
    "PairStats",
    "Pairs",
    "pair_counts",
    "pair_gradient_block",
    "pair_softplus_sums",
    "pair_statistics",
    "pair_sweep",
]
