"""What the GPU kernels should take on an H200, from bytes, instructions and occupancy: no run.

    python -m bench._predictions     the table of the kernels and the predicted times

Standard library only. bench/_gpu_times.py measures the same cases and prints measured over
predicted; _kernel_table.py has the kernels.

The model of a streaming kernel: a multiprocessor moves bytes at its share of the copy rate, starts
4 instructions of a warp a cycle, and has a number of bytes under way for the latency of a load. The
three times are joined by a soft maximum, because none of them overlaps the others wholly.

That of attention (Products) is alike: products, instructions, exponentials, bytes of L2, and one
program after the other where few share a multiprocessor. For the plain softmax attention of
Triton at d = 128 it gives 420 TFLOP/s with the power OVERLAP; others have measured 395 to 480.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from bench import _betti_predictions, _kernel_table
from bench._kernel_table import SHARED_BYTES, blocks_per_multiprocessor

COPY = 4.3e12  # bytes read and written a second
MATRIX = 790e12  # operations a second, dense bf16
MULTIPROCESSORS = 132
CLOCK = 1.755e9
LATENCY = 0.8e-6  # of a load from memory that is busy
LAUNCH = 3e-6  # from the end of one kernel to the work of the next
SHARED_RATE = 128  # bytes of it a cycle
L2 = 5.5e12  # bytes from the cache to the multiprocessors a second
L2_TILES = 8e12  # the same, of tiles that neighbours share: what products of Triton reach
L2_LATENCY = 0.4e-6
TILE_SYNC = 150  # cycles of a tile that wait for barriers and for the end of products
OVERLAP = 4  # power of the soft maximum of what a tile of attention needs


class Rows(NamedTuple):
    """A row_softmax kernel that streams rows of one length."""

    registers: int
    read: float  # bytes of an element
    written: float
    instructions: float  # of a lane for an element, executed; counted in the machine code
    warp: float  # of each warp for a row: merging, addresses
    row: float  # of a row, in the warps that repeat it
    repeats: bool  # whether every warp does them for every row, or one lane of one warp
    ahead: float  # bytes of a thread under way
    serial: float  # latencies one after the other before the first element


# Before and after: the first loads wait for label and logit or not; 80 or 64 registers.
FORWARD = Rows(64, 2, 0, 9.2, 90, 550, False, 64, 1)
BACKWARD = Rows(64, 2, 2, 8.9, 50, 550, False, 64, 1)
BOTH = Rows(64, 2, 2, 18.1, 150, 550, False, 48, 2)
FORWARD_BEFORE = Rows(80, 2, 0, 8.9, 120, 400, True, 64, 3)
BACKWARD_BEFORE = Rows(80, 2, 2, 8.9, 30, 550, True, 64, 3)


def team(classes: int, size: int) -> int:
    """Threads of a row, as team_threads of csrc/cuda/row_softmax_internal.h has them."""
    vectors = math.ceil(classes * size / 16)
    return 32 if vectors <= 256 else 128 if vectors <= 1024 else 256


def soft_max(*times: float, power: float = 6) -> float:
    return sum(t**power for t in times) ** (1 / power)


def rows_seconds(k: Rows, rows: int, classes: int, size: int = 2) -> float:
    """One pass of a kernel over rows of bf16 (size 2)."""
    threads = team(classes, size)
    blocks = blocks_per_multiprocessor(max(threads, 128), k.registers, 2048)
    teams = blocks * max(threads, 128) // threads
    moved = classes * (k.read + k.written)
    by_bytes = moved / (COPY / MULTIPROCESSORS)
    per_team = max(1, min(32, math.ceil(rows / (MULTIPROCESSORS * teams))))
    warps = threads / 32
    scalar = k.row * warps if k.repeats else k.row / min(per_team, 32)
    started = classes * k.instructions / 32 + k.warp * warps + scalar
    by_instructions = started / (4 * CLOCK)
    # A team alone: its loads come in turns of what it has under way.
    under_way = min(classes * size, threads * k.ahead)
    turns = classes * size / under_way
    alone = LATENCY * (k.serial + turns - 1) + started / warps / CLOCK
    return rows / MULTIPROCESSORS * soft_max(by_bytes, by_instructions, alone / teams)


def share(k: Rows, classes: int, elements: int = 2**29) -> float:
    """Of the copy rate, for as many logits."""
    rows = elements // classes
    return rows * classes * (k.read + k.written) / COPY / rows_seconds(k, rows, classes)


class Products(NamedTuple):
    """A pass of tensor attention: tiles of scores and their products, on sm_90.

    Counted in the machine code of the pinned Triton; tests/compile/test_triton_compile.py holds
    AFTER against what it compiles.
    """

    what: str
    kernel: str
    rows: int  # of a tile: queries, or pairs of a query and a key
    keys: int
    width: int  # d
    warps: int
    registers: int
    shared: int
    loop: float  # instructions of a warp for a tile
    rest: float  # of a warp outside of the loop over tiles
    fills: int  # latencies of L2, one after the other, outside of the loop
    tiles: int  # of a turn of that loop
    useful: float  # operations of a turn that the forward needs
    products: int = 2  # of a score: half of them give scores, half sum over them
    ahead: bool = True  # whether a tile's loads are under way during the one before
    sums: float = 0  # cycles of products outside of the loop

    @property
    def programs(self) -> int:
        """Of a multiprocessor."""
        return blocks_per_multiprocessor(32 * self.warps, self.registers, self.shared + 1024)


def _turn(what: str, kernel: str, useful: float, *counts: int) -> Products:
    return Products(what, f"tensor_attention_fwd_{kernel}_kernel", *counts, useful)


# A turn: 4 queries with 32 x 512 keys each; 128 queries with one of 1024 x 1024 keys' rows.
WINDOWS_FLOP, FULL_FLOP = 4.0 * 4 * 32 * 512 * 128, 4.0 * 128 * 1024 * 64
BEFORE = (
    _turn("windows", "pairs", WINDOWS_FLOP, 128, 64, 128, 8, 255, 98304, 386, 2179, 5, 9),
    _turn("full", "rows", FULL_FLOP, 128, 64, 64, 8, 239, 65536, 302, 750, 1, 16),
)
AFTER = (
    _turn("windows", "pairs", WINDOWS_FLOP, 128, 32, 128, 4, 255, 81920, 308, 3172, 4, 17),
    _turn("full", "rows", FULL_FLOP, 128, 64, 64, 4, 255, 65536, 361, 750, 1, 16),
)


# The backward of windows. A turn: 2 queries with 32 x 512 keys each, or 64 (128) keys with the
# queries that see any of them, 575 (639), of which they count as 512 each. Before, sums over
# queries were 48 products of 64 x 128 x 8 in tf32.
QUERIES_FLOP, KEYS_FLOP = WINDOWS_FLOP / 2, 4.0 * 64 * 32 * 512 * 128
BACKWARD_BEFORE = (
    Products("queries", "tensor_attention_bwd_q_pairs_kernel", 64, 16, 128, 4, 255, 65536, 163,
             4600, 3, 33, QUERIES_FLOP, 4, False, 3700),
    Products("keys", "tensor_attention_bwd_kv_pairs_kernel", 128, 32, 128, 8, 239, 114944, 428,
             900, 2, 639, 2 * KEYS_FLOP, 4, False),
)  # fmt: skip
BACKWARD = (
    Products("queries", "tensor_attention_bwd_q_pairs_kernel", 64, 32, 128, 4, 255, 65536, 250,
             3400, 3, 17, QUERIES_FLOP, 4),
    Products("keys", "tensor_attention_bwd_kv_pairs_kernel", 64, 32, 128, 4, 246, 65536, 435,
             900, 2, 575, KEYS_FLOP, 4),
)  # fmt: skip


def matrix_cycles(k: Products) -> float:
    """Of one tile: the rate of dense products, or of the shared memory that their factors are in.

    A step multiplies 64 x 16 by 16 x n numbers; the probabilities come from registers.
    """

    def step(n: int, left_bytes: int) -> float:
        by_shared = (left_bytes + 32 * n) / SHARED_RATE
        return max(2 * 64 * 16 * n / (MATRIX / MULTIPROCESSORS / CLOCK), by_shared)

    scores = k.width // 16 * step(k.keys, 2048)
    return k.products / 2 * (k.rows // 64) * (scores + k.keys // 16 * step(k.width, 0))


def turn_cycles(k: Products, power: float = OVERLAP) -> float:
    """Of a multiprocessor for a turn of one program."""
    matrix = k.tiles * matrix_cycles(k) + k.sums
    issued = (k.tiles * k.loop + k.rest) * k.warps / 4
    exponentials = k.tiles * k.rows * k.keys / 16
    loaded = k.tiles * k.keys * k.width * 4 / (L2 / MULTIPROCESSORS / CLOCK)
    fills = k.fills + (0 if k.ahead else k.tiles)
    alone = matrix + issued + k.tiles * TILE_SYNC + fills * L2_LATENCY * CLOCK
    return soft_max(matrix, issued, exponentials, loaded, alone / k.programs, power=power)


def useful_rate(k: Products, power: float = OVERLAP) -> float:
    """Useful operations a second of the whole device."""
    return k.useful / turn_cycles(k, power) * CLOCK * MULTIPROCESSORS


def backward_share(passes: tuple[Products, ...], power: float = OVERLAP) -> float:
    """Time of a backward of windows over that of their forward."""
    return sum(useful_rate(AFTER[0], power) / useful_rate(k, power) for k in passes)


def milliseconds() -> dict[str, float]:
    """Case of bench/_gpu_times.py -> predicted milliseconds."""
    return {name: 1e3 * seconds for name, seconds in _seconds().items()}


def _seconds() -> dict[str, float]:
    return {
        "copy": 2.0**31 / COPY,
        "product": 2.0 * 8192**3 / MATRIX,
        **_row_seconds(),
        **_product_seconds(),
        **_pair_seconds(),
        # By reading: latency of one block a multiprocessor; 1,400 links walked by each block of a
        # million, and one chain in one block; one lane pools a row in shared memory, about 200
        # cycles an element; its gradient, and a sort.
        "sorting fwd+bwd 64x1024": 4.5e-3,
        **_betti_predictions.cases(COPY, LAUNCH),
        "betti fwd+bwd ramp of 10^6": 1400 * LATENCY + 2000 * 2e-6 + 145 * LAUNCH,
        "permutahedron fwd+bwd 64x1024": 1024 * (200 + 150) / CLOCK + 10 * LAUNCH,
        **_later_seconds(),
    }


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
    float32 = attention / 2 / 3  # tf32 has half the rate of bf16
    windows, full = 8 * 8192 * 512 * 32 * 128, 16 * 1024**3 * 64
    features = 2 * 8 * 65536 * math.comb(66, 2) * 65
    linear = 2 * 4096 * 128256 * 4096
    logits = 2.0 * 4096 * 128256
    return {
        "attention fwd windows": 4 * windows / windowed,
        "attention fwd+bwd windows": 4 * windows / windowed * (1 + backward_share(BACKWARD)),
        "attention fwd full": 4 * full / whole,
        "attention fwd+bwd full": 4 * full / whole + 10 * full / attention,
        "attention fwd low rank": 3 * features / float32,
        "attention fwd+bwd low rank": (1 + 4) * 3 * features / float32,
        "linear fwd+bwd chunks": 3 * linear / (0.85 * MATRIX) + 5 * logits / COPY,
        "linear fwd+bwd filter": 2 * linear / (0.6 * MATRIX),
    }


def pair_seconds(
    d: int, products: int, tile: tuple[int, int], exps: int, instructions: int, filled: bool
) -> float:
    """A pair of a kernel of similarity_softmax, bf16: its products, then its arithmetic.

    One or two programs a multiprocessor, so that little of the two overlaps. Instructions are those
    of a lane where no mask is needed, counted by hand; `exps` have a pipe of their own.

    Args:
        products: of D numbers, for a pair.
        filled: tiles begin with a pipeline of loads under way, as those of sweeps over whole rows.
    """
    rows, columns = tile
    read = 2 * d * (1 / rows if filled else 1 / rows + 1 / columns)
    multiplied = max(2 * d * products / MATRIX, read / L2_TILES)
    cycles = max(exps / 16, instructions / 128) / MULTIPROCESSORS
    fill = 0 if filled else LATENCY / (rows * columns * MULTIPROCESSORS)
    return multiplied + cycles / CLOCK + fill


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
        {"case": name, "predicted_ms": ms, "measured_ms": None, "status": "not reached"}
        for name, ms in milliseconds().items()
        if name not in done
    ]


def main() -> None:
    print("\n".join(_kernel_table.lines()))
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
    for when, passes in (("before", BACKWARD_BEFORE), ("now", BACKWARD)):
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
