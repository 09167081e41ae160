"""A small Triton kernel that shows the test machinery at work; no part of the package.

A file in kernels/ has the same parts: kernels, launchers, COMPILE_CASES.
"""

import torch
import triton
import triton.language as tl


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
    row_logsumexp_kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK_N=block)
    return out


COMPILE_CASES = [
    {
        "kernel": row_logsumexp_kernel,
        "signature": {
            "x_ptr": f"*{dtype}",
            "out_ptr": "*fp32",
            "stride_x_row": "i64",
            "n_cols": "i32",
        },
        "constexprs": {"BLOCK_N": 1024},
        "options": {"num_warps": 4, "enable_fp_fusion": True},
    }
    for dtype in ("bf16", "fp32")
]
