"""Models of what GPU kernels take on an H200: rows that stream, attention, pairs, and the rest.

Standard library only. _predictions.py has the cases, _kernel_times.py a row for each kernel.

The model of a streaming kernel: a multiprocessor moves bytes at its share of the copy rate, starts
4 instructions of a warp a cycle, and has a number of bytes under way for the latency of a load. The
three times are joined by a soft maximum, because none of them overlaps the others wholly.

That of attention (Products) is alike: products, instructions, exponentials, bytes of L2, and one
program after the other where few share a multiprocessor. For the plain softmax attention of
Triton at d = 128 it gives 420 TFLOP/s with the power OVERLAP; others have measured 395 to 480.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from bench._kernel_table import blocks_per_multiprocessor

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
WINDOWS_BACKWARD_BEFORE = (
    Products("queries", "tensor_attention_bwd_q_pairs_kernel", 64, 16, 128, 4, 255, 65536, 163,
             4600, 3, 33, QUERIES_FLOP, 4, False, 3700),
    Products("keys", "tensor_attention_bwd_kv_pairs_kernel", 128, 32, 128, 8, 239, 114944, 428,
             900, 2, 639, 2 * KEYS_FLOP, 4, False),
)  # fmt: skip
WINDOWS_BACKWARD = (
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
