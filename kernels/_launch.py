"""What the launchers of several Triton kernels share; no kernel lives here."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# A grid of about this many programs fills every GPU at hand several times over. Fixed, so that
# the way in which a reduction is split, and with it every bit of the result, depends on the shape
# of the problem only.
FULL_GRID = 512


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device. Interpreted kernels run on CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot that follows PyTorch's setting for float32 products."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def check_rows(**tensors: torch.Tensor | None) -> None:
    """The kernels step through the last dimension with stride 1."""
    for name, t in tensors.items():
        if t is not None and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"{name} needs a last stride of 1, got strides {t.stride()}")
