"""What the launchers of several kernels share; no kernel lives here, nor an import of Triton."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

# A grid of about this many programs fills every GPU at hand several times over. Fixed, so that
# the way in which a reduction is split, and with it every bit of the result, depends on the shape
# of the problem only.
FULL_GRID = 512

# Whether Triton's interpreter runs the kernels, on CPU tensors. Triton looks at this once too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device. Interpreted kernels run on CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def refuse_capture(device: torch.device, what: str) -> None:
    """For a table that is made on the device once and kept.

    Raises:
        RuntimeError: a CUDA graph is being captured: the table's memory would be the graph's, and
            hold nothing before the first replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} makes a table on the device with its first call: call it once before "
            "capturing a CUDA graph"
        )


def allows_tf32() -> bool:
    """Whether PyTorch may round the factors of float32 products on CUDA to tf32.

    From torch 2.9 on the older questions raise once the newer setting has been used.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


# Of these a block has 99 KiB of shared memory, not 163 or more.
_LITTLE_SHARED = {(8, 6), (8, 9), (12, 0), (12, 1)}


def little_shared(device: torch.device) -> bool:
    return device_capability(device) in _LITTLE_SHARED


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot that follows PyTorch's setting for float32 products."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def widens(dtype: torch.dtype) -> bool:
    """Whether products need float32 factors: the interpreter multiplies the bits of bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def check_rows(**tensors: torch.Tensor | None) -> None:
    """The kernels step through the last dimension with stride 1."""
    for name, t in tensors.items():
        if t is not None and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"{name} needs a last stride of 1, got strides {t.stride()}")
