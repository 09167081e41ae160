"""The largest entry of a tensor, which decides what a polynomial of the scores promises."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES


def largest_entry(t: Tensor) -> float:
    """max |t| of a tensor, NaN where one is; on the CPU in one pass."""
    ours = t.dtype in (torch.float32, torch.float64) and t.device.type == "cpu"
    if ours and type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous():
        return _C.tensor_attention_lowrank_largest(
            t.data_ptr(), DTYPE_CODES[t.dtype], t.numel(), torch.get_num_threads()
        )
    t = t.detach()
    # Two passes of amax and amin are faster than aminmax; both are NaN where one is.
    return max(t.amax().item(), -t.amin().item())
