"""What each GPU kernel should take on an H200 in a case of bench/_gpu_times.py: by hand, no run.

Bytes and operations are those of _kernel_table.py. Standard library only. _gpu_times.py measures
the same kernels by torch's profiler; one that takes 1.5 times its time is where to look first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from bench import _betti_predictions
from bench._models import (
    AFTER,
    BACKWARD,
    CLOCK,
    COPY,
    FORWARD,
    L2,
    L2_LATENCY,
    LATENCY,
    LAUNCH,
    MATRIX,
    MULTIPROCESSORS,
    WINDOWS_BACKWARD,
    pair_seconds,
    rows_seconds,
    soft_max,
    useful_rate,
)

LANES = 128 * CLOCK * MULTIPROCESSORS  # instructions of a lane a second
BARRIER = 40  # cycles from the last warp's arrival to the first one's next instruction
SHARED_LATENCY = 30  # cycles of a load from it


class Work(NamedTuple):
    """What all launches of one kernel do in one call of a case."""

    kernel: str
    case: str
    launches: int = 1
    bytes: float = 0  # to and from memory
    instructions: float = 0  # of lanes
    flop: float = 0  # of products of matrices: at half the rate of bare ones
    cached: float = 0  # bytes from L2
    alone: float = 2 * LATENCY  # one after the other, or what a model of its own says

    def parts(self) -> dict[str, float]:
        """Seconds of each of the things that bound it."""
        return {
            "bytes": self.bytes / COPY,
            "instructions": self.instructions / LANES,
            "products": self.flop / (MATRIX / 2),
            "L2": self.cached / L2,
            "alone": self.alone,
        }

    @property
    def seconds(self) -> float:
        """As the device sees it: what lies between two kernels is not in it."""
        return soft_max(*self.parts().values())

    @property
    def bound(self) -> str:
        parts = self.parts()
        return max(parts, key=parts.__getitem__)


def _rows() -> list[Work]:
    case, n, classes = "32768", 2**29 // 32768, 32768
    few, ranges = "rows fwd few 8x2097152", 33  # 264 blocks for two a multiprocessor
    size = 2.0 * 64 * 5000 * 128
    strided = size / (64 * 128 / 32 * 8 * 8 * 64 / LATENCY)
    second = 2048 * 32000.0
    return [
        Work("row_softmax_fwd_kernel", f"rows fwd {case}", alone=rows_seconds(FORWARD, n, classes)),
        Work(
            "row_softmax_bwd_kernel",
            f"rows fwd+bwd {case}",
            alone=rows_seconds(BACKWARD, n, classes),
        ),
        Work("row_softmax_loss_kernel", f"rows fwd {case}", 2, 4 * n, alone=4 * LATENCY),
        Work("row_softmax_norm_kernel", f"rows fwd {case}", 1, 8 * n),
        Work("row_softmax_norm_finish_kernel", f"rows fwd {case}", 1, 24 * 132),
        # The upstream gradient is 1: it is read, and that is all.
        Work("row_softmax_scale_kernel", f"rows fwd with gradient {case}", alone=LATENCY),
        Work("row_softmax_split_kernel", few, 1, 8 * ranges * 32, alone=3 * LATENCY),
        Work("row_softmax_alone_fwd_kernel", "rows fwd strided", 1, size, alone=strided),
        Work(
            "row_softmax_alone_bwd_kernel", "rows fwd+bwd strided", 1, 2 * size, alone=2 * strided
        ),
        Work("row_softmax_hvp_kernel", "rows second 2048x32000", 1, 10 * second, 26 * second),
        # Not launched unless PYLOSS_CUDA_CLUSTER=1.
        Work(
            "row_softmax_cluster_kernel",
            f"rows fwd with gradient {case}",
            bytes=4.0 * n * classes,
            instructions=18.1 * n * classes,
        ),
    ]


def _labelled() -> list[Work]:
    """Instructions of a lane: two for an operation, with the conversions, and four for an exp."""
    rows, images = "2048x32000", "8x21x512x512"
    n, m = 2048 * 32000.0, 8 * 21 * 512 * 512.0
    search = 5  # passes of ALDR's Newton steps over a row in shared memory
    spread = LATENCY * 21 / 4  # 21 classes of a position, 4 loads under way
    return [
        Work("row_moments_fwd_kernel", f"spherical z fwd+bwd {rows}", 1, 2 * n, 10 * n),
        Work("row_moments_bwd_kernel", f"spherical z fwd+bwd {rows}", 1, 4 * n, 6 * n),
        Work(
            "row_moments_tile_fwd_kernel", f"spherical z fwd+bwd {images}", 1, 2 * m, 14 * m,
            alone=spread,
        ),
        Work("row_moments_tile_bwd_kernel", f"spherical z fwd+bwd {images}", 1, 4 * m, 10 * m),
        Work("margin_shift_fwd_kernel", f"margin shift fwd+bwd {rows}", 1, 4 * n, 14 * n),
        Work("margin_shift_bwd_kernel", f"margin shift fwd+bwd {rows}", 1, 8 * n, 12 * n),
        Work(
            "margin_shift_alone_fwd_kernel", f"margin shift fwd+bwd {images}", 1, 4 * m, 14 * m,
            alone=spread,
        ),
        Work(
            "margin_shift_alone_bwd_kernel", f"margin shift fwd+bwd {images}", 1, 8 * m, 12 * m,
            alone=spread,
        ),
        Work("aldr_fwd_kernel", f"aldr fwd+bwd {rows}", 1, 4 * n, (search * 24 + 20) * n),
        Work("aldr_bwd_kernel", f"aldr fwd+bwd {rows}", 1, 4 * n, 4 * n),
    ]  # fmt: skip


def _others() -> list[Work]:
    n, tensors = 64e6, 1e8
    points = 65536 * 192.0
    clouds = 65536 / 32 * 2500  # instructions of a warp's lanes for its eigenproblems, one a lane
    short, stats, long = (
        f"{what} 10^6x64"
        for what in ("segment sum fwd+bwd", "segment stats fwd", "segment sum fwd+bwd long")
    )
    chain = 1024 * 200 / CLOCK  # a lane pools a row in shared memory
    rows = 32768 * 256.0
    return [
        # The points again from L2 for the frame; 8 frames of 36 bytes.
        Work(
            "frame_pca_fwd_kernel", "frames fwd+bwd 65536x64x3", 1, 4 * points + 65536 * 320,
            14 * points + 32 * clouds,
        ),
        Work(
            "frame_pca_bwd_kernel", "frames fwd+bwd 65536x64x3", 1, 8 * points + 65536 * 320,
            26 * points,
        ),
        Work("segment_fold_kernel", short, 1, 4.4 * n, 3 * n),
        Work("segment_map_kernel", short, 1, 4.4 * n, 4 * n),
        Work("segment_argmax_kernel", stats, 1, 4.8 * n, 3 * n),
        Work("segment_parts_kernel", long, 1, 4 * n, 3 * n),
        Work("segment_merge_kernel", long, 1, 12 * n / 256, 4 * n / 256, alone=62500 / 256 * 4e-8),
        Work("lion_k_kernel", "lion_k step 10^8", 4, 20 * tensors, 14 * tensors),
        Work(
            "permutahedron_warp_fwd_kernel", "permutahedron fwd+bwd 64x1024", 1, 20 * 65536,
            alone=chain,
        ),
        Work(
            "permutahedron_warp_bwd_kernel", "permutahedron fwd+bwd 64x1024", 1, 16 * 65536,
            alone=0.75 * chain,
        ),
        # A thread a row, whose stack is in memory: a store and a load an element, from L2.
        Work(
            "permutahedron_fwd_kernel", "permutahedron fwd+bwd 32768x256", 1, 60 * rows,
            alone=256 * 2 * LATENCY,
        ),
        Work(
            "permutahedron_bwd_kernel", "permutahedron fwd+bwd 32768x256", 1, 20 * rows,
            alone=256 * LATENCY,
        ),
    ]  # fmt: skip


class TileStep(NamedTuple):
    """A layer of sorting_tile_kernel between two barriers, 4 rows: counted in the machine code."""

    every: float  # instructions of each of the 16 warps
    active: float  # more, of those that have a comparator: a third, by the light cone
    chain: float  # cycles from the barrier to the last store, memory apart
    waits: float  # latencies of L2 that nothing of the layer hides


# Bitonic, n = 1024, t in shared memory. Before: weights one layer ahead, dL/dalpha not, and rows of
# which each waits for the store of the one before. Now: both two layers ahead, 4 loads under way.
_ROW, _START = SHARED_LATENCY + 12, BARRIER + 60
TILE_BEFORE = (
    TileStep(100, 105, _START + 4 * _ROW, 1),
    TileStep(100, 115, _START + 4 * _ROW, 1.15),
)
TILE_NOW = (
    TileStep(55, 125, _START + _ROW + 12, 0.5),
    TileStep(60, 130, _START + _ROW + 20, 0.5),
)


def tile_seconds(steps: tuple[TileStep, TileStep]) -> float:
    """sorting_tile_kernel on (64, 1024), forward and reverse: layers one after the other."""
    tiles, layers, warps = 64 * 1024 / 4, 55, 16
    cycles = sum(
        soft_max(warps * (k.every + k.active / 3) / 4, k.chain, k.waits * L2_LATENCY * CLOCK)
        for k in steps
    )
    return tiles / MULTIPROCESSORS * layers * cycles / CLOCK


def _sorting() -> list[Work]:
    case, tiny, large = (f"sorting fwd+bwd {n}" for n in ("64x1024", "4096x32", "1x1048576"))
    shared = "sorting features fwd+bwd 64x256x8"
    comparators = 64 * 55 * 512.0
    layer = (BARRIER + SHARED_LATENCY + 120) / CLOCK  # with the relaxation's 12 operations
    n = 2.0**20
    return [
        Work("sorting_values_kernel", case, 1, 8 * comparators, 40 * comparators, alone=55 * layer),
        Work(
            "sorting_values_backward_kernel", case, 1, 8 * comparators, 44 * comparators,
            alone=55 * (layer + LATENCY / 4),
        ),
        Work("sorting_tile_kernel", case, 1, 16 * 4 * comparators, alone=tile_seconds(TILE_NOW)),
        Work("sorting_mean_loss_kernel", case, 1, 8 * 64 * 4),
        Work("sorting_sum_groups_kernel", case, 1, 4 * 5 * comparators),
        Work("sorting_sum_items_kernel", shared, 1, 4 * 64 * 256 * 8, alone=64 / 4 * LATENCY),
        # 240 comparators of 32 rows: 9 + 12 instructions each; 7 warps a multiprocessor.
        Work(
            "sorting_tiny_kernel", tiny, 1, 12 * 4096 * 32, 4096 * 32 * 240 * 21.0,
            alone=4096 / (7 * MULTIPROCESSORS) * 240 * 2 * (SHARED_LATENCY + 8) / CLOCK,
        ),
        # Values twice, their gradient once: 9 fused passes each, 36 single layers.
        Work("sorting_window_kernel", large, 27, 3 * 12 * n * 4 * 14, alone=27 * 20 * layer),
        Work("sorting_layer_kernel", large, 108, 108 * 2 * n, cached=108 * 8 * n, alone=108 * 2e-6),
        Work("sorting_fill_kernel", large, 2, 8, alone=4 * LATENCY),
        Work("sorting_find_nan_kernel", large, 2, 8 * n, alone=4 * LATENCY),
        Work("sorting_copy_kernel", large, 5, 5 * 8 * n, alone=10 * LATENCY),
    ]  # fmt: skip


def _betti() -> list[Work]:
    """Images of noise; volumes for what only they need; bars and double by themselves."""
    found = []
    for case, batch in (
        ("8x512x512", _betti_predictions.IMAGES["noise"]),
        ("4x96x96x96", _betti_predictions.VOLUMES["noise"]),
    ):
        known = {w.kernel for w in found}
        for r in _betti_predictions.rows(batch):
            if r.kernel not in known:
                found.append(
                    Work(
                        r.kernel, f"betti fwd+bwd {case} noise", r.launches, r.traffic,
                        alone=r.launches * 2 * LATENCY,
                    )
                )  # fmt: skip
    images, double = "betti bars 8x512x512", "betti fwd+bwd double 1x512x512"
    n, one, bars = 8 * 512 * 512.0, 2 * 512 * 512.0, 0.3 * 8 * 512 * 512
    return [
        *found,
        Work("betti_start_kernel", "betti fwd+bwd 8x512x512 noise"),
        Work("betti_key_kernel", double, 1, 12 * one),
        Work("betti_number_kernel", double, 1, 4 * one + 32 * one),
        Work("betti_min_rank_kernel", double, 1, 12 * one / 2),
        # Of few numbers: those of one item of 128 x 128.
        Work("betti_sort_few_kernel", "betti fwd+bwd small 1x128x128", 7, 7e5),
        Work("betti_no_rows_kernel", images),
        Work("betti_list_kernel", images, 1, 40 * n + 4 * bars),
        Work("betti_rows_kernel", images, 3, 3 * 96 * bars, alone=6 * LATENCY),
        Work("betti_no_columns_kernel", "betti fwd+bwd 4x96x96x96 noise"),
    ]


def _linear() -> list[Work]:
    """4096 x 128256 x 4096, a filter that leaves a twentieth of the gradient's tiles."""
    case, n, classes, d = "linear fwd+bwd filter", 4096.0, 128256.0, 4096.0
    biased = "linear fwd+bwd tiles bias 2048x32000x2048"
    product, kept = 2 * n * classes * d, 0.05
    parts = classes / 128
    return [
        Work("linear_softmax_stats_kernel", case, 1, 2 * classes * d, 0, product / 1.2),
        Work("merge_softmax_stats_kernel", case, 1, 16 * n * parts, 40 * n * parts),
        Work(
            "linear_softmax_grad_kernel",
            case,
            1,
            2 * classes * d + 2 * n * classes,
            0,
            product / 1.2,
        ),
        Work("active_tiles_kernel", case, 2, 4 * n / 128 * parts, alone=2 * 8 * LATENCY),
        Work("masked_matmul_nn_kernel", case, 1, 2 * kept * n * classes, 0, kept * product),
        Work("masked_matmul_tn_kernel", case, 1, 4 * classes * d, 0, kept * product),
        Work("column_sums_kernel", biased, 1, 2.0 * 2048 * 32000, 4.0 * 2048 * 32000),
        Work("merge_column_sums_kernel", biased, 1, 4.0 * 16 * 32000, alone=4 * LATENCY),
    ]


def _pairs() -> list[Work]:
    """`alone` is the model of bench/_models.py."""
    sweeps, blocks = "pairs fwd+bwd nt_xent 8192x128", "pairs fwd+bwd info_nce 65536x512"
    positives = "pairs fwd+bwd supcon 8192x128"
    n, m = 8192.0, 65536.0
    statistics = pair_seconds(128, 1, (128, 64), 1, 10, True)
    both = pair_seconds(128, 2, (64, 64), 2, 19, True)
    gradient = pair_seconds(512, 1, (128, 256), 1, 13, False)
    return [
        Work("pair_statistics_kernel", sweeps, 1, 4 * 128 * n, alone=n * n * statistics),
        Work("merge_pair_statistics_kernel", sweeps, 1, 16 * n * 8, alone=4 * LATENCY),
        Work("pair_sweep_kernel", sweeps, 1, 8 * 128 * n, alone=n * n * both),
        Work("pair_gradient_kernel", blocks, 43, 2 * m * m, alone=m * m * gradient),
        Work("target_ranges_kernel", "pairs fwd+bwd target 8192x128", 2, 16 * n),
        Work("pair_counts_kernel", positives, 1, 32 * n, alone=4 * LATENCY),
    ]


def _attention() -> list[Work]:
    windows, full, masked = (f"attention fwd+bwd {x}" for x in ("windows", "full", "masked"))
    forward = (f"attention fwd {x}" for x in ("windows", "full"))
    one = "attention fwd one query"
    area, square = 8 * 8192 * 512 * 32 * 128.0, 16 * 1024**3 * 64.0
    small = 4 * 512**3 * 64.0
    windowed = 4 * area / useful_rate(AFTER[0])
    to_queries, to_keys = (4 * area / useful_rate(k) for k in WINDOWS_BACKWARD)
    whole = 10 * square / (MATRIX / 2)
    numbers = 4 * 512 * 64.0
    return [
        Work("tensor_attention_fwd_pairs_kernel", next(forward), alone=windowed),
        Work(
            "tensor_attention_fwd_rows_kernel",
            next(forward),
            alone=4 * square / useful_rate(AFTER[1]),
        ),
        Work("tensor_attention_bwd_q_pairs_kernel", windows, alone=to_queries),
        Work("tensor_attention_bwd_kv_pairs_kernel", windows, alone=to_keys),
        # 6 and 8 products' worth of the 14 that are formed.
        Work("tensor_attention_bwd_q_rows_kernel", full, alone=whole * 6 / 14),
        Work("tensor_attention_bwd_kv_rows_kernel", full, alone=whole * 8 / 14),
        Work("tensor_attention_bwd_rows_stats_kernel", full, 1, 4 * 64 * 16 * 1024),
        Work("tensor_attention_parts_kernel", full, 4, 4 * 8 * 64 * 16 * 1024, alone=8 * LATENCY),
        # Masks are read again for every j, from L2.
        Work("tensor_attention_bwd_mask_kernel", masked, 2, 0, 0, 4 * small, 8 * 4 * 512.0**3 / 64),
        Work("tensor_attention_clear_kernel", masked, 4, 4 * 4 * numbers, alone=8 * LATENCY),
        Work("tensor_attention_spoil_kernel", masked, 1, 4 * 4 * 512, alone=4 * LATENCY),
        Work("tensor_attention_merge_kernel", one, 1, 8 * 132 * 66 * 4, alone=6 * LATENCY),
    ]


def _low_rank() -> list[Work]:
    """In float32: products as three of tf32, which has half the rate of bfloat16.

    The scans work on the lanes' FMA units, a feature's row of dv + 1 numbers a token.
    """
    case, causal = "attention fwd+bwd low rank", "attention fwd+bwd causal low rank"
    features = math.comb(66, 2)
    products = 3 * 2 * (2 * 8 * 65536 * features * 65.0)  # as many as bf16's in that time
    scanned = 8 * 65536 * features * 65.0
    return [
        Work("tensor_attention_lowrank_state_kernel", case, 1, 0, 0, 2 * products),
        Work("tensor_attention_lowrank_query_kernel", case, 1, 0, 0, products),
        Work("tensor_attention_lowrank_gradient_kernel", case, 3, 0, 0, 12 * products),
        # Half of the instructions are products, the other half loads, moves and barriers.
        Work("tensor_attention_lowrank_scan_kernel", causal, 1, 0, 2 * 8 * scanned / 2),
        Work(
            "tensor_attention_lowrank_scan_query_gradient_kernel",
            causal,
            1,
            0,
            2 * 14 * scanned / 2,
        ),
        Work(
            "tensor_attention_lowrank_scan_key_gradient_kernel", causal, 1, 0, 2 * 22 * scanned / 2
        ),
        Work("tensor_attention_lowrank_prefix_kernel", causal, 4, 4 * 8 * 8 * 64 * features * 65.0),
    ]


def works() -> list[Work]:
    return [
        *_rows(),
        *_labelled(),
        *_others(),
        *_sorting(),
        *_betti(),
        *_linear(),
        *_pairs(),
        *_attention(),
        *_low_rank(),
    ]


def of_case(case: str) -> dict[str, float]:
    """Kernel -> predicted milliseconds, of the kernels that have their row in this case."""
    return {w.kernel: 1e3 * w.seconds for w in works() if w.case == case}


def case_seconds(case: str, launches: int) -> float:
    """A case that is the sum of its kernels, with so many launches, torch's included."""
    return sum(w.seconds for w in works() if w.case == case) + launches * LAUNCH


def lines() -> list[str]:
    """The time of each kernel, and what bounds it; alone: latencies, or a model of its own."""
    found = [f"{'kernel':<52} {'ms':>9}  {'launches':>8}  {'bound by':<12}  case"]
    for w in sorted(works()):
        times = f"{1e3 * w.seconds:9.4f}  {w.launches:8d}  {w.bound:<12}"
        found.append(f"{w.kernel:<52} {times}  {w.case}")
    return found
