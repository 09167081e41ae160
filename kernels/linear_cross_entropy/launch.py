"""What the launchers share: tile sizes, checks of the arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .._launch import check_rows, device_capability, dot_precision, little_shared


class Config(NamedTuple):
    """Tile sizes and launch options. `group`: row tiles of a patch of programs (patch)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


# Chosen by what the compiler reports (no spill in the loop over D, shared memory below the 163 KiB
# of sm_80) and by the tile sizes that large products are known to want. Not yet tuned on a device.
TABLE = {
    # 16-bit inputs. Wide tiles read least; cap, entropy or sums need the registers for themselves.
    ("stats", "half"): Config(128, 256, 64, 8, 3),
    ("stats with more", "half"): Config(128, 128, 64, 8, 4),
    ("grad", "half"): Config(128, 128, 64, 8, 4),
    ("matmul", "half"): Config(128, 256, 64, 8, 3),
    # float32 on tensor cores (tf32)
    ("stats", "tf32"): Config(128, 128, 32, 8, 4),
    ("stats with more", "tf32"): Config(128, 128, 32, 8, 4),
    ("grad", "tf32"): Config(128, 128, 32, 8, 4),
    ("matmul", "tf32"): Config(128, 128, 32, 8, 3),
    # half inputs and a float32 gradient, in two parts (accumulate_dtype)
    ("matmul of parts", "half"): Config(128, 128, 32, 4, 3),
    # float32 in full precision: no tensor cores, smaller tiles
    ("stats", "ieee"): Config(64, 64, 32, 4, 3),
    ("stats with more", "ieee"): Config(64, 64, 32, 4, 3),
    ("grad", "ieee"): Config(64, 64, 32, 4, 3),
    ("matmul", "ieee"): Config(64, 64, 32, 4, 3),
}
# Where both factors of a product stand in registers, beside the sums.
IN_REGISTERS = {
    ("matmul", "half"): Config(128, 128, 64, 8, 3),
    ("matmul of parts", "half"): Config(128, 128, 32, 8, 3),
}
# Rows of an odd number of elements pass through registers; 64 columns of them would spill.
BLACKWELL = {("grad", "half"): Config(128, 128, 32, 8, 4)}
# By the first number of the compute capability; TABLE is Hopper's.
OTHERS = {8: IN_REGISTERS, 10: BLACKWELL, 11: BLACKWELL, 12: IN_REGISTERS}


def for_few_rows(config: Config, block_m: int) -> Config:
    """Memory bound: low tiles and more loads in flight."""
    block_n = min(config.block_n, 128)
    stages = min(4, config.num_stages + 1)
    return config._replace(block_m=block_m, block_n=block_n, num_warps=4, num_stages=stages)


def choose_config(kernel: str, dtype: torch.dtype, rows: int, device: torch.device) -> Config:
    """Tiles of `kernel`, a name of the table, for `rows` rows of the result."""
    key = kernel, "half" if dtype.itemsize == 2 else dot_precision(dtype)
    major, _ = device_capability(device) or (9, 0)
    config = OTHERS.get(major, {}).get(key, TABLE[key])
    if little_shared(device):
        config = config._replace(block_n=min(config.block_n, 128), num_stages=2)
    block_m = max(16, triton.next_power_of_2(rows))
    return config if block_m >= config.block_m else for_few_rows(config, block_m)


OPTIONS = {"enable_fp_fusion": True}  # said aloud: its default changes in Triton 3.10


def check_problem(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x (N, D) and weight (V, D) expected, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if max(x.shape[0], weight.shape[0]) >= 2**31:
        raise ValueError(
            f"x and weight need fewer than 2^31 rows, got {x.shape[0]} and {weight.shape[0]}"
        )
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "x and weight need one dtype of float32, bfloat16, float16, got "
            f"{x.dtype} and {weight.dtype}"
        )
    check_rows(x=x, weight=weight)
