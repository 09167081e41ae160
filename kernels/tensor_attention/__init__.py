"""Tensor attention by tiles: pairs of keys against queries, exact, O(n d) memory.

With s the scale, p = i + q_offset the position of query i, and valid pairs (per axis x = 1, 2)
p - left_x <= j_x <= p + right_x:

  S_ijk = s sum_l q_il k1_jl k2_kl + mask1_ij + mask2_ik     lse_i = log sum_jk exp S_ijk
  P_ijk = exp(S_ijk - lse_i)                                 out_i = sum_jk P_ijk v1_j * v2_k
  dP_ijk = sum_c dout_ic v1_jc v2_kc   dS = P (dP - delta_i)   delta_i = <dout_i, out_i> - dlse_i
  dq_i = s sum_jk dS k1_j * k2_k    dk1_j = s sum_ik dS q_i * k2_k    dv1_j = sum_ik P dout_i * v2_k
  (k2 and v2 the same with 1 and 2 exchanged)      dmask1_ij = sum_k dS      dmask2_ik = sum_j dS

The op is symmetric in its two key axes. The launchers exchange them so that axis 1, the one that
kernels take one key at a time or unroll into rows, is that with the smaller window; below, 1 and 2
are the axes after that. Axis 2 is walked in blocks: S = A K2^T with A = q_i * k1_j is an ordinary
product, and multiplications by k1_j, v1_j, ... wait until after the products where they can.

Who owns what. Forward:
  rows (T1; T2 with the query heads of a key head side by side in the rows): one program per tile of
    queries. It walks j one by one; for each it builds A = q * k1_j, runs softmax attention over K2,
    V2 and adds the result times v1_j to its own.
  pairs (T3): one program per few queries and all (or up to BLOCK_M) of their keys j; a row is a
    pair (i, j). Softmax attention without any extra work in its loop; v1_j and the sum over j come
    once, after it.
  choose_tiling() picks by the share of computed triples that are valid.
  Either may cut its range of j in `splits` parts for want of programs; merge adds them up in order.
Backward, two passes, nothing atomic, all sums in a fixed order, so the same inputs give the same
bits:
  rows: "kv", one program per block of axis 2, which keeps K2, V2, dK2, dV2 and walks j one by one
    and all queries for each: W = P^T dout and G = dS^T q give v1_j W -> dV2, k1_j G -> dK2, and
    their column sums with V2, K2 are this block's part of dv1_j, dk1_j, written to scratch and
    added up by a small kernel. "q", one program per tile of queries: X = dS K2, k1_j X -> dq.
    7 products.
  pairs: "kv" with rows (i, j) built in the loop: dS^T A -> dK2, P^T (dout v1_j) -> dV2. "q" as the
    forward: X = dS K2 -> dq, dk1 and Y = P V2 -> dv1; a key j stands in row j % BLOCK_J of each of
    the program's few queries, so that sums over i are sums of rows (with more queries than rows of
    each, one product with a matrix of zeros and ones). 8 products, but none of the per-key work of
    the form above, which narrow windows would not hide: it comes once per 32 queries there.
  masks: a kernel of 2 products per mask that wants a gradient; it owns [query tile, range of j].

Blocks without a valid triple are skipped: loops run over the union of the tile's windows. Only
blocks at the rim of a window, or the last of a length that BLOCK_N does not divide, are masked.
Validity and mask of (i, j) are one number per row, folded into the row's shift of the exponent.

FLOP, T valid triples per head: forward 4 T d; backward 14 T d (rows), 16 T d (pairs).
Memory per head: inputs, outputs, lse, delta; a splitted forward splits n_q (dv + 1) float32;
backward scratch n_2 / BLOCK_N times (n_1, or the window's span) (d + dv) float32 (rows), or
n_q / BI (span + BI - 1) (d + dv) (pairs), for as many heads at a time as fit SCRATCH_BYTES.
Traffic: a tile of M rows reads K2 and V2 once per j (rows) or once (pairs), from L2: M FLOP per
byte for 16-bit numbers, so 128 rows at 790 TFLOP/s would want 6.2 TB/s; DRAM sees little.

Numerics: products in the input's type, sums and softmax in float32; A is built in float32 and
rounded once, with s log2(e) in it, so exp is exp2 of a difference. lse is a natural logarithm.
The forward shifts the exponent by the maximum over a few keys, which are those next to the query;
with rows also by what sums have grown to. Where sums leave the range or float16 overflows, the
program begins again with the maxima of all keys.

Prediction (H200 at 790 TFLOP/s dense bf16; no device was at hand, nothing here is measured):
  windows 512 x 32, d = 128, bf16: 4 w1 w2 d = 8.4 MFLOP per query. Valid share of T3 tiles with 4
    queries and blocks of 32: 512 / 544 = 94 %. Two programs a multiprocessor: 430 to 530 useful
    TFLOP/s (docs/gpu.md, bench/_predictions.py).
    Backward: 16/4 of the FLOP, so 4 times the forward at its rate; 3.9 by the same model, two
    programs a multiprocessor.
  full, n = 1024, d = 64: 275 GFLOP forward and 962 backward per head: 490 to 620 TFLOP/s forward;
    backward 1.22 ms of products, 1.6e9 exp2 twice.

Papers: arXiv 2310.04064 and 2405.16411 (tensor attention), 1909.00668 (2-simplicial attention);
head packing after 2507.02754. The tilings and the product counts are derived in the docs page.
"""

from __future__ import annotations

from .launch import tensor_attention_bwd, tensor_attention_fwd

__all__ = ["tensor_attention_bwd", "tensor_attention_fwd"]
