"""Near-linear tensor attention without causality or windows: features of a tile, used and dropped.

Calls with either: scan.py.

With Ux[j, a] = prod_l k_x[j, l]^a_l over the r = C(d + g, g) exponent vectors |a| <= g and the
weights w_a of the polynomial (reference/tensor_attention_lowrank.py has the algebra):

  state     [A_x | z_x] = Ux^T [v_x | 1]                           one per key axis x
  query     [N | y] = U0 C,  C = w * [A_1 | z_1] * ... * [A_m | z_m],  out = N / y,  lse = log y + c
  state     [E | e] = U0^T [dN | dy]                               the same kernel, of q and dsums
  gradient  dU = [dN | dy] C^T and [v | 1] D^T,  dv = U D,  dx from dU

Features. A tile of BLOCK_F features is g columns of indices (d stands for the factor 1): a thread
gathers x[j, index_1] * ... * x[j, index_g] from rows that lie in the first-level cache. Within a
tile the last index runs through neighbours and the others hardly change, so a warp reads one line.
That takes g loads per feature against 2 dv operations of the product. The outer product of
registers (x_a times all x_b, for one a at a time) needs no gather, but forms d^2 features instead
of d (d + 1) / 2 for g = 2: 1.9 times the products at d = 64, which are what bounds the kernel.

dx. With others_t = prod_{s != t} x[j, index_s]: dx[j, l] = sum_t sum_f dU[j, f] others_t[j, f]
[index_t(f) = l], a product with a matrix of zeros and ones: exact in tf32, no atomics.

Who owns what. state: a program owns BLOCK_F features times BLOCK_C value columns and a range of
tokens; partial sums go to scratch and are added up in order. query, gradient: a program owns
BLOCK_T tokens and walks all features. Every sum has a fixed order: the same inputs give the same
bits. No program waits for the host; `lse` is NaN where y is not positive.

FLOP per head, m axes, r features, n tokens: forward 2 (m + 1) n r (dv + 1). Backward the same for
E, dU and dv, and 2 g n r d per tensor for dx. For m = g = 2, n = 65536, d = dv = 64 (r = 2145):
55 GFLOP forward, 220 backward; three tf32 products for one.
Traffic: rows of x and v once per feature tile of the state kernel (34 times 34 MB, from L2 where a
head fits it), states r (dv + 1) 4 bytes per axis and head. Nothing of size n r is written.

Numerics: float32; products as three tf32 products (`tf32x3`, relative error about 2^-21 of the sum
of the terms' sizes), never plain tf32, whose 2^-11 would exceed the stated bound. 256 tokens are
summed before they join the running sum: the chain is 256 + n / 256.

Prediction (H200, 380 TFLOP/s dense tf32 assumed; no device was at hand, nothing here is measured):
the case above forward 165 GFLOP of tf32 products: 0.43 ms at the peak, 0.7 to 1.0 ms at the 45 to
60 % that such kernels reach; backward 660: 1.7 ms at the peak, 3 to 4 ms. Asked: 1 and 4 for both.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

from .scan import tensor_attention_lowrank_scan_bwd, tensor_attention_lowrank_scan_fwd
from .whole import takes, tensor_attention_lowrank_bwd, tensor_attention_lowrank_fwd

__all__ = [
    "takes",
    "tensor_attention_lowrank_bwd",
    "tensor_attention_lowrank_fwd",
    "tensor_attention_lowrank_scan_bwd",
    "tensor_attention_lowrank_scan_fwd",
]
