"""Linear layer, softmax statistics and softmax gradient by tiles; logits are never stored.

With t = x W^T + bias and z = pre t, or z = post tanh(pre t) when capped (all per row):

  statistics   m = max_j z_j,  rest = sum_{j != y} exp(z_j - m),  zy = z_y,
               ez = sum_{j != y} exp(z_j - m) (z_j - m)  (entropy),
               wz = sum_j w_j (z_j - m)                  (label smoothing)
  gradient     u_j = z_j - m
               dz_j = exp(u_j) (a + b u_j)               - spread w_j
               dz_y = exp(u_y) (label_a + b u_y) - label - spread w_y     replaces the line above
               times dz/dt, the slope of the transform
  products     dx = dz W,  dW = dz^T x,  dbias = column sums of dz

The coefficients m, a, b, label_a, label, spread are float32 numbers of one row. They hold
everything that makes one loss differ from another (csrc/common/row_softmax.h, RowCoeffs), so these
kernels know no loss.

Who owns what. Statistics: one program per (tile of rows, part of the vocabulary). It walks the
vocabulary tiles of its part, keeps the running values of its rows in registers and writes one
partial result per row; a second kernel merges the parts in index order. Gradient: one program per
(tile of rows, tile of columns) of a block of columns, so that the caller bounds the memory by the
width of the block. Products: one program per tile of the result; it alone adds up that tile, in
index order. Nothing is atomic and nothing waits: the same inputs give the same bits.

Programs are numbered so that those in flight form a square patch of (rows, columns): each tile of
x and of W that they read then serves several of them from the L2 cache.

Memory traffic, N rows, V classes, D features, b bytes per number, P parts: statistics read x and W
(about N V D b / tile edges through L2, DRAM sees x and W a few times) and write 12 to 24 bytes per
row and part. The gradient writes N V b, the products read it once each per column patch.

Filtering: a tile of the gradient in which every entry is below its row's threshold and which holds
no label is marked 0 in a tile mask and not stored. The products and the column sums walk lists of
the tiles marked 1. The lists, made by one small kernel, replace a branch in the inner loop: a loop
with a branch around its loads would not be pipelined.

Numerics: float32 accumulators; the label is left out of `rest`, so 1 - p_y = rest / sum keeps its
relative accuracy for confident rows. exp(z - m) is exp2((z - m) log2 e): with the difference taken
first the error does not grow with the size of the logits, as it does in exp2(fma(z, log2 e, ..)),
and beside the product the extra instruction is free.

Label smoothing subtracts spread w_j everywhere, and no tile would be small. Without cap it can be
left out of dz and added to the products as a rank one term (`outer`): dx_i -= spread_i (w^T W),
dW_j -= w_j (spread^T x), dbias_j -= w_j (sum of spread), each times pre.

Rows at or beyond `n_valid`, a number in device memory, are ignored: no element of x, target or
coefficients is read for them. The caller has sorted them to the end.

Paper: the idea to recompute the logits tile by tile and to skip gradient tiles too small to matter
is that of Wijmans, Huval, Hertzberg, Koltun, Kraehenbuehl, "Cut Your Losses in Large-Vocabulary
Language Models" (arXiv 2411.09009). Different here: thresholds are relative to each row's own
gradient, label tiles are never skipped, and sums are taken in a fixed order instead of under locks.
"""

from __future__ import annotations

from .gradient import GradCoeffs, TileMask, linear_softmax_grad, linear_softmax_grad_kernel
from .launch import Config, choose_config
from .products import active_tiles, column_sums, masked_matmul_nn, masked_matmul_tn
from .statistics import SoftmaxStats, linear_softmax_stats, linear_softmax_stats_kernel

__all__ = [
    "Config",
    "GradCoeffs",
    "SoftmaxStats",
    "TileMask",
    "active_tiles",
    "choose_config",
    "column_sums",
    "linear_softmax_grad",
    "linear_softmax_grad_kernel",
    "linear_softmax_stats",
    "linear_softmax_stats_kernel",
    "masked_matmul_nn",
    "masked_matmul_tn",
]
