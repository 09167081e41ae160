"""Tile sizes of the tensor attention kernels. Committed, so that nobody waits for a search.

None of them is measured: no device was at hand. They follow from three bounds: the traffic from L2
(128 rows per tile of K2 and V2 where 16-bit types allow it), shared memory (163 KiB on sm_80), and
registers: compiled for sm_90 with bfloat16, full or windows, d <= 128, no inner loop touches
spilled registers (tests/compile has the exceptions); prologues and epilogues do.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """block_m: rows of the accumulators, block_n: what the inner loop walks."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, kind of product, padded head dimension up to): the larger of d and dv counts.
TABLE = {
    ("fwd rows", "half", 64): Config(128, 64, 4, 3),
    ("fwd rows", "half", 128): Config(128, 64, 8, 3),
    ("fwd rows", "half", 256): Config(64, 32, 8, 2),
    ("fwd pairs", "half", 64): Config(128, 64, 4, 3),
    ("fwd pairs", "half", 128): Config(128, 32, 4, 3),
    ("fwd pairs", "half", 256): Config(64, 32, 4, 2),
    ("bwd q rows", "half", 64): Config(128, 64, 8, 2),
    ("bwd q rows", "half", 128): Config(128, 32, 8, 2),
    ("bwd q rows", "half", 256): Config(64, 32, 8, 1),
    ("bwd q pairs", "half", 64): Config(64, 64, 4, 2),
    ("bwd q pairs", "half", 128): Config(64, 32, 4, 2),
    ("bwd q pairs", "half", 256): Config(64, 32, 8, 1),
    ("bwd kv rows", "half", 64): Config(128, 64, 8, 2),
    ("bwd kv rows", "half", 128): Config(64, 64, 8, 2),
    ("bwd kv rows", "half", 256): Config(64, 32, 8, 1),
    ("bwd kv pairs", "half", 64): Config(64, 64, 4, 2),
    ("bwd kv pairs", "half", 128): Config(64, 32, 4, 2),
    ("bwd kv pairs", "half", 256): Config(64, 32, 8, 1),
    ("bwd mask", "half", 64): Config(128, 64, 8, 2),
    ("bwd mask", "half", 128): Config(128, 64, 8, 2),
    ("bwd mask", "half", 256): Config(64, 32, 8, 1),
}
for _name in sorted({name for name, _, _ in TABLE}):
    # float32 on tensor cores (tf32): twice the bytes per number
    TABLE[_name, "tf32", 64] = Config(64, 32, 4, 2)
    TABLE[_name, "tf32", 128] = Config(64, 32, 8, 1)
    TABLE[_name, "tf32", 256] = Config(32, 16, 4, 1)
    # float32 in full precision: no tensor cores, operands in registers
    TABLE[_name, "ieee", 64] = Config(32, 32, 4, 2)
    TABLE[_name, "ieee", 128] = Config(32, 32, 8, 1)
    TABLE[_name, "ieee", 256] = Config(16, 16, 4, 1)
TABLE["fwd pairs", "tf32", 128] = Config(64, 32, 4, 2)
# Instead, with masks whose rows differ: tiles of them stand in registers beside the scores.
MASKED = {
    ("fwd rows", "half", 128): Config(128, 32, 8, 3),
    ("fwd pairs", "half", 128): Config(64, 32, 4, 3),
}
# Instead, on sm_100, where registers hold no accumulators during products.
TENSOR_MEMORY = {
    ("fwd rows", "half", 64): Config(128, 64, 8, 3),
    ("fwd pairs", "half", 128): Config(128, 64, 8, 2),
}
