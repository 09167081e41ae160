"""What one block of each GPU kernel takes: bytes and FLOP of an element, registers, shared memory.

    python -m bench._predictions     prints the table, and what follows from it

Standard library only. tests/compile holds registers and shared memory against what the compilers
have made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SHARED_BYTES = 228 * 1024  # of a multiprocessor


class Kernel(NamedTuple):
    """A row of the table. An element is a logit, a voxel, a wire: what the traffic is counted in;
    of Triton a logit, a pair, a valid triple, a feature of a token, where nothing else stands.

    Registers and static shared memory are those of sm_90, the most over all variants but double; in
    the latter the 1 KiB that the runtime adds to a block which has any. Of Triton they are those of
    the first call in tests/compile/triton_scenarios.py that needs the kernel, with all of its
    shared memory, and bytes count from L2: rows, columns, keys, features, tokens are of a tile.

    FLOP are those of plain cross entropy, the logistic relaxation, l2. Sums, products, quotients,
    exponentials, comparisons of numbers count one each; products of matrices two for each pair of
    factors, once where they are made of three in tf32. 0: whole numbers, or nothing but copies.
    """

    name: str
    threads: int  # of a block, the usual one
    registers: int
    shared: int
    traffic: str  # bytes of an element of b bytes, read + written
    flop: str  # of an element, by the formula at the head of the file


# fmt: off
KERNELS = (
    Kernel("row_softmax_fwd_kernel", 256, 128, 1872,
           "b + 0; with the gradient b + b", "4; with the gradient 7"),
    Kernel("row_softmax_bwd_kernel", 256, 128, 7168, "b + b", "3"),
    Kernel("row_softmax_split_kernel", 32, 45, 1024,
           "32 a range of columns + 16 a row", "8 a range of columns"),
    Kernel("row_softmax_loss_kernel", 512, 30, 1280, "4 a row + 0", "1 a row"),
    Kernel("row_softmax_norm_kernel", 512, 32, 1792, "8 a row + 0", "2 a row"),
    Kernel("row_softmax_norm_finish_kernel", 512, 22, 1792, "24 a block + 0", "2 a block"),
    Kernel("row_softmax_scale_kernel", 256, 32, 0, "b + b, or nothing for a factor of 1", "1"),
    Kernel("row_softmax_alone_fwd_kernel", 128, 96, 1040, "b + 0", "4; with the gradient 7"),
    Kernel("row_softmax_alone_bwd_kernel", 128, 80, 1024, "b + b", "3"),
    Kernel("row_softmax_hvp_kernel", 256, 56, 1408, "4 b + b", "10"),
    Kernel("row_softmax_cluster_kernel", 256, 59, 1280, "b + b", "7"),
    Kernel("frame_pca_fwd_kernel", 256, 40, 3456, "b + 0", "7"),
    Kernel("frame_pca_bwd_kernel", 256, 44, 0, "b + b", "13"),
    Kernel("row_moments_fwd_kernel", 512, 40, 1408, "b + 0", "5"),
    Kernel("row_moments_bwd_kernel", 512, 40, 0, "b + b", "3"),
    Kernel("row_moments_tile_fwd_kernel", 256, 32, 4096, "b + 0", "7"),
    Kernel("row_moments_tile_bwd_kernel", 256, 32, 0, "b + b", "3"),
    Kernel("segment_fold_kernel", 128, 68, 0, "b + 4 a segment", "1"),
    Kernel("segment_argmax_kernel", 128, 31, 0, "b + 8 a segment", "1"),
    Kernel("segment_parts_kernel", 128, 80, 2048, "b + 12 a part", "1"),
    Kernel("segment_merge_kernel", 128, 40, 0, "12 a part + 4 a segment", "4 a part"),
    Kernel("segment_map_kernel", 128, 38, 1040, "b + b", "2"),
    Kernel("margin_shift_fwd_kernel", 256, 48, 1280, "2 b + 0", "5"),
    Kernel("margin_shift_bwd_kernel", 256, 54, 0, "2 b + 2 b", "4"),
    Kernel("margin_shift_alone_fwd_kernel", 256, 32, 0, "2 b + 0", "5"),
    Kernel("margin_shift_alone_bwd_kernel", 256, 38, 0, "2 b + 2 b", "4"),
    Kernel("betti_key_kernel", 512, 30, 0, "4 + 8", "0"),
    Kernel("betti_rank_kernel", 512, 28, 0, "8 + 4", "0"),
    Kernel("betti_number_kernel", 512, 14, 0, "4 + 4", "0"),
    Kernel("betti_min_rank_kernel", 512, 15, 0, "8 + 4", "0"),
    Kernel("betti_clear_kernel", 512, 8, 0, "0 + 4", "0"),
    Kernel("betti_sort_count_kernel", 256, 15, 2048, "4 + 0", "0"),
    Kernel("betti_sort_few_kernel", 256, 26, 0, "4 a digit and tile + 4", "0"),
    Kernel("betti_sort_many_kernel", 256, 32, 1056, "4 a digit and tile + 4", "0"),
    Kernel("betti_sort_move_kernel", 256, 61, 10240, "8 + 8", "0"),
    Kernel("betti_first_edges_kernel", 512, 32, 0, "16 + 8; of volumes 28 + 8", "0"),
    Kernel("betti_link_kernel", 512, 20, 0, "8 + 4 a root", "0"),
    Kernel("betti_root_kernel", 512, 32, 1152, "4 a root + 4", "0"),
    Kernel("betti_jump_kernel", 512, 17, 0, "8 a hop + 4", "0"),
    Kernel("betti_edges_kernel", 512, 32, 1152, "12 an edge + 8", "0"),
    Kernel("betti_fill_kernel", 512, 10, 0, "0 + 4", "0"),
    Kernel("betti_start_kernel", 512, 20, 0, "8 + 8", "0"),
    Kernel("betti_chain_kernel", 512, 20, 0, "8 a hop + 4", "0"),
    Kernel("betti_bounds_kernel", 512, 12, 0, "4 + 4", "0"),
    Kernel("betti_elder_kernel", 512, 48, 0, "16 a bar and level + 8", "0"),
    Kernel("betti_elder_long_kernel", 512, 64, 2560, "16 a bar and level + 8", "0"),
    Kernel("betti_match_kernel", 512, 22, 0, "4 + 24 a bar", "0"),
    Kernel("betti_loss_kernel", 256, 64, 1792, "24 a bar + 0", "12 a bar"),
    Kernel("betti_loss_sum_kernel", 512, 31, 0, "8 a block + 4", "1 a block"),
    Kernel("betti_gradient_kernel", 512, 48, 0, "24 + 4; of volumes 80 + 4", "8; of volumes 27"),
    Kernel("betti_no_rows_kernel", 64, 10, 0, "0 + 4", "0"),
    Kernel("betti_list_kernel", 512, 30, 1152, "20 + 4 a bar", "0"),
    Kernel("betti_rows_kernel", 512, 40, 0, "24 a bar + 48, 96 if matched", "0"),
    Kernel("betti_no_columns_kernel", 64, 10, 0, "0 + 4", "0"),
    Kernel("betti_columns_kernel", 512, 32, 1152,
           "20 a square and matrix + 4 a column that is left", "0"),
    Kernel("betti_column_keys_kernel", 512, 30, 0, "8 a column that is left + 16", "0"),
    Kernel("sorting_values_kernel", 512, 40, 3392, "4 + 4", "12 a comparator"),
    Kernel("sorting_values_backward_kernel", 512, 50, 3264, "8 + 4", "13 a comparator"),
    Kernel("sorting_tiny_kernel", 32, 77, 1024, "4 n an item + 4 n", "7 a mix + 9 back"),
    Kernel("sorting_tile_kernel", 512, 128, 4432,
           "8 an entry of P and segment of layers + 8", "7 a mix + 9 back"),
    Kernel("sorting_sum_groups_kernel", 256, 32, 0, "4 a group + 4", "1 a group"),
    Kernel("sorting_sum_items_kernel", 256, 32, 0, "4 an item + 4", "1 an item"),
    Kernel("sorting_mean_loss_kernel", 256, 30, 0, "8 a group + 4", "1 a group"),
    Kernel("sorting_window_kernel", 512, 56, 19648, "4 a pass + 4", "12 a comparator + 13 back"),
    Kernel("sorting_layer_kernel", 256, 42, 1052, "8 a layer + 8", "12 a comparator + 13 back"),
    Kernel("sorting_fill_kernel", 256, 26, 0, "0 + 4", "0"),
    Kernel("sorting_find_nan_kernel", 256, 24, 0, "4 + 0", "0"),
    Kernel("sorting_copy_kernel", 256, 32, 0, "4 + 4", "0"),
    Kernel("lion_k_kernel", 256, 48, 0, "12 + 8", "6"),
    Kernel("aldr_fwd_kernel", 256, 56, 2048, "b + 0; with the gradient b + b", "10 a pass + 8"),
    Kernel("aldr_bwd_kernel", 256, 32, 1024, "b + b", "6"),
    Kernel("permutahedron_warp_fwd_kernel", 32, 58, 1024, "12 + 8", "17"),
    Kernel("permutahedron_warp_bwd_kernel", 32, 49, 1024, "12 + 4", "4"),
    Kernel("permutahedron_fwd_kernel", 64, 62, 1024, "8 a pool and step + 8", "17"),
    Kernel("permutahedron_bwd_kernel", 64, 48, 1024, "12 + 4", "4"),
)

TRITON = "3.9."  # by which these are compiled
TRITON_KERNELS = (
    Kernel("active_tiles_kernel", 128, 59, 128, "1 a tile + 4", "0"),
    Kernel("column_sums_kernel", 128, 80, 1024, "b + 0", "1"),
    Kernel("linear_softmax_grad_kernel", 256, 150, 131072,
           "D b (1/rows + 1/columns) + b", "2 D + 3"),
    Kernel("linear_softmax_stats_kernel", 256, 255, 147456,
           "D b (1/rows + 1/columns) + 12 a row and part", "2 D + 4"),
    Kernel("masked_matmul_nn_kernel", 256, 210, 147456, "b a patch of columns + D b / rows", "2 D"),
    Kernel("masked_matmul_tn_kernel", 256, 166, 147456,
           "b a patch of columns + D b / columns", "2 D"),
    Kernel("merge_column_sums_kernel", 128, 28, 0, "4 a part + 4", "1 a part"),
    Kernel("merge_pair_statistics_kernel", 128, 63, 1024,
           "8 to 16 a part + 4 to 12 a row", "8 a part"),
    Kernel("merge_softmax_stats_kernel", 128, 32, 0,
           "12 to 20 a part + 12 to 20 a row", "8 a part"),
    Kernel("pair_counts_kernel", 128, 16, 0, "8 to 24 an index + 8", "0"),
    Kernel("pair_gradient_kernel", 256, 255, 131072, "D b (1/rows + 1/columns) + b", "2 D + 3"),
    Kernel("pair_statistics_kernel", 256, 111, 65536,
           "D b / rows + 8 to 16 a row and part", "2 D + 4; columns 3 more"),
    Kernel("pair_sweep_kernel", 128, 225, 49684, "D b / rows + 4 D a row and part", "4 D + 3"),
    Kernel("target_ranges_kernel", 32, 12, 0, "8 a query + 8 a tile", "0"),
    Kernel("tensor_attention_bwd_kv_pairs_kernel", 128, 246, 66048, "2 d b / rows + 0", "8 d"),
    Kernel("tensor_attention_bwd_kv_rows_kernel", 256, 255, 66048,
           "2 d b / rows + 8 d / keys", "8 d"),
    Kernel("tensor_attention_bwd_mask_kernel", 256, 255, 131072,
           "2 d b / rows + 4 a pair (i, j)", "4 d"),
    Kernel("tensor_attention_bwd_q_pairs_kernel", 128, 255, 65536,
           "2 d b / rows + 8 d / keys", "8 d"),
    Kernel("tensor_attention_bwd_q_rows_kernel", 256, 242, 65536, "2 d b / rows + 0", "6 d"),
    Kernel("tensor_attention_bwd_rows_stats_kernel", 128, 32, 256,
           "2 dv b a query + 8", "2 dv a query"),
    Kernel("tensor_attention_clear_kernel", 128, 28, 16, "b + b a number", "0"),
    Kernel("tensor_attention_fwd_pairs_kernel", 128, 255, 81920, "2 d b / rows + 0", "4 d"),
    Kernel("tensor_attention_fwd_rows_kernel", 128, 255, 65536, "2 d b / rows + 0", "4 d"),
    Kernel("tensor_attention_lowrank_gradient_kernel", 128, 209, 32768,
           "4 (d + dv) / features + 0", "2 (2 dv + 1) + 2 g d"),
    Kernel("tensor_attention_lowrank_prefix_kernel", 128, 30, 0,
           "4 + 4 a number of a state", "1 a number of a state"),
    Kernel("tensor_attention_lowrank_query_kernel", 128, 255, 65536,
           "4 (dv + 1) / tokens + 0", "2 (dv + 1)"),
    Kernel("tensor_attention_lowrank_scan_kernel", 32, 226, 0,
           "4 d / features + 0", "up to 4 m (dv + 1)"),
    Kernel("tensor_attention_lowrank_scan_key_gradient_kernel", 128, 252, 4096,
           "4 (d + dv) / features + 4 (d + dv) / features", "up to (10 m + 2) (dv + 1)"),
    Kernel("tensor_attention_lowrank_scan_query_gradient_kernel", 64, 242, 4096,
           "4 (d + dv) / features + 4 d / features", "up to (6 m + 2) (dv + 1)"),
    Kernel("tensor_attention_lowrank_state_kernel", 128, 255, 114688,
           "4 (d + dv) / features + 0", "2 (dv + 1)"),
    Kernel("tensor_attention_merge_kernel", 128, 71, 256,
           "4 dv a split + dv b a query", "3 dv a split"),
    Kernel("tensor_attention_parts_kernel", 128, 48, 0, "4 a part + b a number", "1 a part"),
    Kernel("tensor_attention_spoil_kernel", 128, 96, 1024,
           "4 + 0; the keys of a query where any was cleared", "0"),
)
# fmt: on


def blocks_per_multiprocessor(threads: int, registers: int, shared: int) -> int:
    """The occupancy rule: registers come in units of 256 a warp."""
    warps = math.ceil(threads / 32)
    by_registers = 65536 // (warps * math.ceil(registers * 32 / 256) * 256)
    by_shared = SHARED_BYTES // max(shared, 1024)
    return min(64 // warps, by_registers, by_shared, 32)


def lines() -> list[str]:
    """The table, a head above it."""
    form = "{:<52} {:>7} {:>9} {:>7} {:>6}  {:<25}  {}"
    found = [form.format("kernel", "threads", "registers", "shared", "blocks", "FLOP", "bytes")]
    for k in KERNELS + TRITON_KERNELS:
        blocks = blocks_per_multiprocessor(k.threads, k.registers, k.shared)
        found.append(form.format(*k[:4], blocks, k.flop, k.traffic))
    return found
