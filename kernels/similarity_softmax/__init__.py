"""Softmax statistics and gradients of all pairs of queries and keys by tiles; logits never stored.

With z_ij = scale_i q_i . k_j (all sums and statistics in float32):

  statistics   m_i = max_j z_ij, sum_j exp(z_ij - m_i), sum of the positive z_ij, and for the mean
               sum_j exp(z_ij - m_i) (z_ij - m_i); columns: the first three, over i
  sigmoid      sum_j softplus(-+ (z_ij + bias)) in their place
  gradient     G_ij, pairs.Coeffs has its formula
  products     dQ_i = scale_i sum_j G_ij k_j,  dK_j = sum_i G_ij scale_i q_i
               scale: sum_j G_ij q_i . k_j of each row,  bias: sum_j G_ij

Kinds of pairs follow from indices. A tile asks first, by a few comparisons of whole numbers,
whether it reaches over an end or holds an own key, a target or ids; only then are there masks.
With targets in a band, as of two views of a batch, that is one tile of a row of tiles.

Who owns what. Statistics: one program per (tile of rows, part of the keys); it walks the part, and
its rows' values stay in registers. A second kernel merges parts in index order. Columns come from
the same tiles: each program writes those of its rows, and they are merged as parts are. That costs
a second exponential, and 8 or 12 bytes for each column and tile of rows; a second sweep would cost
all products again. Where these parts are more than COLUMN_BYTES, rows come in several launches.

Gradient, D up to MOST_WHOLE: one program per (tile of rows, part of the other side) holds the sums
of its rows over all of D; one sweep for the queries and one for the keys. Wider rows do not fit
beside their sums, and forming logits again for each part of D would cost more products than G costs
bytes: a block of rows of G is stored, in the inputs' type, and multiplied with keys and queries by
the products of linear_cross_entropy. One tensor with itself: tiles hold G_ij + G_ji, and one sweep
or one product gives the gradient. Nothing is atomic, so the same inputs give the same bits.

Memory traffic, N queries, M keys, b bytes a number, tiles of R rows: statistics and sweeps read
both sides through L2, (N M D b / R) each, DRAM sees them a few times; statistics write 8 to 16
bytes a row and part. A block is written once and read once for each product.

Numerics: logits are taken in powers of 2, so that exp is one instruction after the subtraction. An
lse of -inf, of a row without a pair, comes as +inf: all exp are 0. In float16 the caller multiplies
coefficients by a power of 2 and divides results by it, as G would be below its smallest numbers.

Paper: online softmax, Milakov and Gimelshein, arXiv 1805.02867; recomputed tiles, Dao, Fu, Ermon,
Rudra, Re, arXiv 2205.14135.
"""

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
