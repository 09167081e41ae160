"""What the launchers share: tile sizes, checks of the arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .._launch import device_capability, dot_precision, little_shared, widens
from ..linear_cross_entropy.launch import Config, check_problem, for_few_rows
from .pairs import Kind, Pairs

# Up to this width rows of queries or keys, and of their gradients, stand in a program whole.
MOST_WHOLE = 128

# As in linear_cross_entropy: by what the compiler reports, not yet tuned on a device. Columns, ids,
# the mean and what else wants vectors along a tile leave no room for 256 columns.
TABLE = {
    ("stats", "half"): Config(128, 256, 64, 8, 3),
    ("stats with more", "half"): Config(128, 128, 64, 8, 4),
    ("block", "half"): Config(128, 256, 64, 8, 3),
    ("block with more", "half"): Config(128, 128, 64, 8, 4),
    ("stats", "tf32"): Config(128, 128, 32, 8, 4),
    ("stats with more", "tf32"): Config(128, 128, 32, 8, 4),
    ("block", "tf32"): Config(128, 128, 32, 8, 4),
    ("block with more", "tf32"): Config(128, 128, 32, 8, 4),
    ("stats", "ieee"): Config(64, 64, 32, 4, 3),
    ("stats with more", "ieee"): Config(64, 64, 32, 4, 3),
    ("block", "ieee"): Config(64, 64, 32, 4, 3),
    ("block with more", "ieee"): Config(64, 64, 32, 4, 3),
}
# Up to MOST_WHOLE. block_k 0: all of D. Full precision multiplies numbers that stand in registers.
WHOLE = {
    ("stats", "half"): Config(128, 64, 0, 8, 2),
    ("sweep", "half"): Config(64, 64, 0, 4, 2),
    ("stats", "tf32"): Config(128, 64, 0, 8, 2),
    ("sweep", "tf32"): Config(64, 64, 0, 8, 2),
    ("stats", "ieee"): Config(64, 64, 32, 4, 3),
    ("sweep", "ieee"): Config(64, 64, 16, 8, 2),
}


class Tile(NamedTuple):
    """Of a program, for the compiler."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int  # of D at a time
    GROUP: int
    WHOLE: bool  # BLOCK_K numbers hold all of D
    EVEN: bool  # D is a multiple of BLOCK_K
    WIDE: bool
    TF32: bool  # of float32 products; a string would not do here


def choose_config(
    kernel: str, dtype: torch.dtype, d: int, rows: int, device: torch.device
) -> Config:
    """Tiles of `kernel`, a name of the tables, for `rows` rows of the result."""
    kind = "half" if dtype.itemsize == 2 else dot_precision(dtype)
    if d <= MOST_WHOLE:
        config = WHOLE[kernel.split()[0], kind]
        config = config._replace(block_k=config.block_k or max(16, triton.next_power_of_2(d)))
        if little_shared(device):
            config = config._replace(num_stages=2, block_m=64)
        if kernel == "sweep" and kind == "half" and not _products_from_shared(device):
            config = config._replace(block_n=32)
    else:
        config = TABLE[kernel, kind]
        if little_shared(device):
            config = config._replace(block_n=min(config.block_n, 128), num_stages=2)
    block_m = max(16, triton.next_power_of_2(rows))
    return config if block_m >= config.block_m else for_few_rows(config, block_m)


def _products_from_shared(device: torch.device) -> bool:
    """Whether tensor cores read factors from shared memory, which leaves registers to sums."""
    capability = device_capability(device)
    return capability is None or capability[0] in (9, 10)


def tile_of(c: Config, x: torch.Tensor) -> Tile:
    d = x.shape[1]
    return Tile(
        c.block_m, c.block_n, c.block_k, c.group, d <= c.block_k, d % c.block_k == 0,
        widens(x.dtype), dot_precision(x.dtype) == "tf32",
    )  # fmt: skip


def check_pairs(queries: torch.Tensor, keys: torch.Tensor, p: Pairs, kind: Kind) -> None:
    check_problem(queries, keys)
    n, m = queries.shape[0], keys.shape[0]
    if (p.n_queries, p.n_keys) != (n, m):
        raise ValueError(f"pairs of {p.n_queries} and {p.n_keys}, tensors of {n} and {m} rows")
    most = max(n, m, n + p.first if kind.own else 0)
    if most > 2**31 - 2**16:
        raise ValueError(f"indices of queries and keys must stay below 2^31 - 2^16, got {most}")
    for name, t in (("target", p.target), ("query_ids", p.query_ids), ("key_ids", p.key_ids)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
