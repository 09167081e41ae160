"""What the GPU kernels should take on an H200, from bytes, instructions and occupancy: no run.

    python -m bench._predictions     the table of the kernels and the predicted times

Standard library only. bench/_gpu_times.py measures the same cases and prints measured over
predicted, of the kernels in them too; _models.py has the models, _kernel_table.py the kernels and
_kernel_times.py the time of each.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from bench import _betti_predictions, _kernel_table, _kernel_times
from bench._kernel_table import SHARED_BYTES
from bench._models import (
    AFTER,
    BACKWARD,
    BACKWARD_BEFORE,
    BEFORE,
    BOTH,
    CLOCK,
    COPY,
    FORWARD,
    FORWARD_BEFORE,
    LATENCY,
    LAUNCH,
    MATRIX,
    MULTIPROCESSORS,
    WINDOWS_BACKWARD,
    WINDOWS_BACKWARD_BEFORE,
    backward_share,
    matrix_cycles,
    pair_seconds,
    rows_seconds,
    share,
    soft_max,
    useful_rate,
)

# Cases that are there for a kernel which no other case launches: the sum of their kernels, and
# launches, those of torch included.
FOR_A_KERNEL = {
    "rows fwd few 8x2097152": 4,
    "rows second 2048x32000": 12,
    "spherical z fwd+bwd 8x21x512x512": 6,
    "margin shift fwd+bwd 8x21x512x512": 6,
    "segment stats fwd 10^6x64": 4,
    "segment sum fwd+bwd long 10^6x64": 5,
    "permutahedron fwd+bwd 32768x256": 10,
    "sorting fwd+bwd 4096x32": 6,
    "sorting fwd+bwd 1x1048576": 150,
    "sorting features fwd+bwd 64x256x8": 8,
    "betti bars 8x512x512": 150,
    "betti fwd+bwd double 1x512x512": 150,
    "betti fwd+bwd small 1x128x128": 130,
    "linear fwd+bwd tiles bias 2048x32000x2048": 12,
    "pairs fwd+bwd target 8192x128": 30,
    "pairs fwd+bwd supcon 8192x128": 40,
    "attention fwd+bwd masked": 16,
    "attention fwd one query": 3,
    "attention fwd+bwd causal low rank": 30,
}


def milliseconds() -> dict[str, float]:
    """Case of bench/_gpu_times.py -> predicted milliseconds."""
    return {name: 1e3 * seconds for name, seconds in _seconds().items()}


def kernel_records(case: str, measured: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """The kernels that have their prediction in a case, with what was measured of them."""
    records = []
    for kernel, ms in _kernel_times.of_case(case).items():
        found = (measured or {}).get(kernel)
        ratio = None if found is None else found / ms
        records.append({"kernel": kernel, "predicted_ms": ms, "measured_ms": found, "ratio": ratio})
    return records


def _seconds() -> dict[str, float]:
    return {
        "copy": 2.0**31 / COPY,
        "product": 2.0 * 8192**3 / MATRIX,
        **_row_seconds(),
        **_product_seconds(),
        **_pair_seconds(),
        "sorting fwd+bwd 64x1024": _kernel_times.case_seconds("sorting fwd+bwd 64x1024", 12),
        # By reading: 1,400 links walked by each block of a million, and one chain in one block; one
        # lane pools a row in shared memory, about 200 cycles an element; its gradient, and a sort.
        **_betti_predictions.cases(COPY, LAUNCH),
        "betti fwd+bwd ramp of 10^6": 1400 * LATENCY + 2000 * 2e-6 + 145 * LAUNCH,
        "permutahedron fwd+bwd 64x1024": 1024 * (200 + 150) / CLOCK + 10 * LAUNCH,
        **_later_seconds(),
        **_for_a_kernel(),
    }


def _for_a_kernel() -> dict[str, float]:
    """What the kernels with their row elsewhere add: rounds and sorts of Betti matching."""
    found = {case: _kernel_times.case_seconds(case, n) for case, n in FOR_A_KERNEL.items()}
    images = sum(_kernel_times.of_case("betti fwd+bwd 8x512x512 noise").values()) * 1e-3
    found["betti bars 8x512x512"] += images
    found["betti fwd+bwd double 1x512x512"] += images / 8
    # The logits once more, and the first derivative, which the second begins with.
    found["rows fwd few 8x2097152"] += 2.0 * 2**24 / COPY
    found["rows second 2048x32000"] += 2048 * 32000 * (2 + 4 + 12) / COPY
    # Forward and backward of the exact kernels at a third of the rate of bare products.
    found["attention fwd+bwd masked"] += 18 * 4 * 512**3 * 64.0 / (MATRIX / 3)
    found["attention fwd one query"] += 10e-6
    linear = 2 * 2048 * 32000 * 2048.0
    found["linear fwd+bwd tiles bias 2048x32000x2048"] += 4 * linear / (0.5 * MATRIX)
    sweeps = sum(_kernel_times.of_case("pairs fwd+bwd nt_xent 8192x128").values()) * 1e-3
    found["pairs fwd+bwd target 8192x128"] += 2 * sweeps
    found["pairs fwd+bwd supcon 8192x128"] += 1.3 * sweeps
    return found


def _later_seconds() -> dict[str, float]:
    """Bytes and operations of bench/_kernel_table.py, every pass over what no cache holds.

    Instructions of a lane: two for an operation, with the conversions, and four for an exponential.
    """
    n, lanes = 2048 * 32000, 128 * CLOCK * MULTIPROCESSORS

    def passes(moved: float, instructions: float) -> float:
        return soft_max(n * moved / COPY, n * instructions / lanes)

    search = 5  # passes of ALDR's Newton steps over a row that lies in shared memory
    return {
        "aldr fwd+bwd 2048x32000": passes(4, search * 24 + 20) + passes(4, 4) + 4 * LAUNCH,
        "spherical z fwd+bwd 2048x32000": passes(2, 10) + passes(4, 6) + 4 * LAUNCH,
        "margin shift fwd+bwd 2048x32000": passes(4, 14) + passes(8, 12) + 4 * LAUNCH,
        "lion_k step 10^8": 20 * 1e8 / COPY + 4 * LAUNCH,
        # A tenth for the sums; a gradient that is all ones is written by torch before.
        "segment sum fwd+bwd 10^6x64": 9.2 * 64e6 / COPY + 3 * LAUNCH,
        # The points twice forward, from L2 the second time; 8 frames of 36 bytes, their gradient.
        "frames fwd+bwd 65536x64x3": 65536 * (12 * 192 + 4 * 8 * 36) / COPY + 20 * LAUNCH,
    }


def _row_seconds() -> dict[str, float]:
    found = {}
    sums = 3 * LAUNCH  # the denominators before, the sum of the losses after
    for classes in (4096, 8192, 32768, 131072):
        rows = 2**29 // classes
        once, again = (rows_seconds(k, rows, classes) for k in (FORWARD, BACKWARD))
        found[f"rows fwd {classes}"] = sums + once
        found[f"rows fwd+bwd {classes}"] = LAUNCH + once + again
        # Up to 106 KiB of a row stay in shared memory, longer ones are read twice.
        kept = 2 * classes <= SHARED_BYTES // 2 - 8 * 1024
        reads = BOTH if kept else BOTH._replace(read=4)
        found[f"rows fwd with gradient {classes}"] = sums + rows_seconds(reads, rows, classes)
    # Narrow rows: 24 bytes of labels and statistics a row beside the logits; a row a lane.
    for classes in (10, 32):
        rows = 2**29 // 32
        moved, started = 2 * classes + 24, (15 * classes + 350) / 32
        once = soft_max(moved * rows / COPY, started * rows / (4 * CLOCK * MULTIPROCESSORS))
        found[f"rows fwd narrow {classes}"] = once
        found[f"rows fwd+bwd narrow {classes}"] = 2.3 * once
    rows, classes = 8192, 50257
    once, again = (rows_seconds(k, rows, classes) for k in (FORWARD, BACKWARD))
    found["rows fwd padded slice"] = once
    found["rows fwd+bwd padded slice"] = once + again
    # 8192 transposed rows: 8 warps share 32 of them, 8 loads of 64 bytes of a warp under way.
    size, under_way = 2.0 * 64 * 5000 * 128, 64 * 128 / 32 * 8 * 8 * 64
    found["rows fwd strided"] = soft_max(size / COPY, size / (under_way / LATENCY))
    found["rows fwd+bwd strided"] = 3 * found["rows fwd strided"]
    return found


def _product_seconds() -> dict[str, float]:
    """Operations at half the rate of bare products, of 3 tf32 products for float32.

    Attention by its model, but for the backward of full attention. Low rank: the backward forms the
    features again, 4 times the products of the forward.
    """
    attention = MATRIX / 2
    windowed, whole = (useful_rate(k) for k in AFTER)
    backward = backward_share(WINDOWS_BACKWARD)
    float32 = attention / 2 / 3  # tf32 has half the rate of bf16
    windows, full = 8 * 8192 * 512 * 32 * 128, 16 * 1024**3 * 64
    features = 2 * 8 * 65536 * math.comb(66, 2) * 65
    linear = 2 * 4096 * 128256 * 4096
    logits = 2.0 * 4096 * 128256
    return {
        "attention fwd windows": 4 * windows / windowed,
        "attention fwd+bwd windows": 4 * windows / windowed * (1 + backward),
        "attention fwd full": 4 * full / whole,
        "attention fwd+bwd full": 4 * full / whole + 10 * full / attention,
        "attention fwd low rank": 3 * features / float32,
        "attention fwd+bwd low rank": (1 + 4) * 3 * features / float32,
        "linear fwd+bwd chunks": 3 * linear / (0.85 * MATRIX) + 5 * logits / COPY,
        "linear fwd+bwd filter": 2 * linear / (0.6 * MATRIX),
    }


def _pair_seconds() -> dict[str, float]:
    """fwd+bwd of losses, with the tiles of kernels/similarity_softmax/launch.py, and with the torch
    operations around: normalised features and their gradients, losses of rows.
    """
    n, d = 8192, 128  # sweeps
    statistics = pair_seconds(d, 1, (128, 64), 1, 10, True)
    both = pair_seconds(d, 2, (64, 64), 2, 19, True)
    nt_xent = n * n * (statistics + both) + 30 * LAUNCH

    n, d = 65536, 512  # blocks of 1.5 (N + M) D numbers
    statistics = pair_seconds(d, 1, (128, 256), 1, 10, False)
    product = pair_seconds(d, 1, (128, 256), 0, 0, False)
    blocks = n * n / (3 * n * d)
    accumulated = blocks * 8 * n * d / COPY  # the keys' gradient, read and written for each block
    rows = pair_seconds(d, 1, (128, 256), 1, 13, False)
    info_nce = n * n * (statistics + rows + 2 * product) + accumulated + 200 * LAUNCH
    of_columns = pair_seconds(d, 1, (128, 128), 2, 22, False)
    rows_and_columns = pair_seconds(d, 1, (128, 128), 2, 19, False)
    clip = n * n * (of_columns + rows_and_columns + 2 * product) + accumulated + 200 * LAUNCH
    of_both = pair_seconds(d, 1, (128, 128), 2, 19, False)
    wide = n * n * (statistics + of_both + product) + 200 * LAUNCH
    return {
        "pairs fwd+bwd nt_xent 8192x128": nt_xent,
        "pairs fwd+bwd nt_xent 65536x512": wide,
        "pairs fwd+bwd info_nce 65536x512": info_nce,
        "pairs fwd+bwd clip 65536x512": clip,
    }


def planned(done: Collection[str] = ()) -> list[dict[str, Any]]:
    """Records of the cases that have not been measured: predictions alone."""
    return [
        {
            "case": name,
            "predicted_ms": ms,
            "measured_ms": None,
            "status": "not reached",
            "kernels": kernel_records(name),
        }
        for name, ms in milliseconds().items()
        if name not in done
    ]


def main() -> None:
    print("\n".join(_kernel_table.lines()))
    print("\npredicted time of each kernel")
    print("\n".join(_kernel_times.lines()))
    print("\nshare of the copy rate, bf16, before and after")
    for what, before, after in (
        ("forward", FORWARD_BEFORE, FORWARD),
        ("backward", BACKWARD_BEFORE, BACKWARD),
    ):
        for classes in (4096, 8192, 32768, 131072):
            shares = f"{share(before, classes):6.1%} {share(after, classes):6.1%}"
            print(f"{what:<9} V = {classes:>6} {shares}")
    print("\nforward of tensor attention, bf16, useful TFLOP/s with the powers 3, 4, 6")
    for when, rows in (("before", BEFORE), ("now", AFTER)):
        for k in rows:
            rates = " ".join(f"{useful_rate(k, power) / 1e12:4.0f}" for power in (3, 4, 6))
            print(
                f"{k.what:<8} {when:<7} {k.rows} x {k.keys}, {k.warps} warps, {k.registers}"
                f" registers, {k.programs} a multiprocessor, {matrix_cycles(k):4.0f} cycles of"
                f" products: {rates}"
            )
    print("\nits backward, windows: time over that of the forward with the powers 3, 4, 6")
    for when, passes in (("before", WINDOWS_BACKWARD_BEFORE), ("now", WINDOWS_BACKWARD)):
        shares = " ".join(f"{backward_share(passes, power):.2f}" for power in (3, 4, 6))
        rates = ", ".join(f"{k.what} {useful_rate(k) / 1e12:.0f} TFLOP/s" for k in passes)
        print(f"{when:<7} {shares}; {rates}")
    print("\nBetti matching, loss and gradient: ms of each kernel")
    print("\n".join(_betti_predictions.lines(COPY, LAUNCH)))
    print()
    for name, ms in milliseconds().items():
        print(f"{name:<34} {ms:10.4f} ms")


if __name__ == "__main__":
    main()
