"""A small Triton kernel that shows the test machinery at work; no part of the package.

A file in kernels/ has the same parts: kernels and launchers.
"""

import torch
import triton
import triton.language as tl

from pyloss.kernels._launch import device_guard


@triton.jit
def row_logsumexp_kernel(x_ptr, out_ptr, stride_x_row, n_cols, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_x_row + cols, mask=cols < n_cols, other=-float("inf"))
    x = x.to(tl.float32)
    m = tl.max(x, axis=0)
    tl.store(out_ptr + row, m + tl.log(tl.sum(tl.exp(x - m), axis=0)))


def row_logsumexp(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    with device_guard(x):
        row_logsumexp_kernel[(x.shape[0],)](
            x, out, x.stride(0), x.shape[1], BLOCK_N=block, num_warps=4, enable_fp_fusion=True
        )
    return out
