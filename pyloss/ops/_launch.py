"""What every launch of a kernel needs: codes, addresses, streams, scratch memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.uint8: 6,
}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics are kept in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Devices that have no float64: there float32 stands in for it.
WITHOUT_FLOAT64 = {"mps"}


def widest(device: torch.device) -> torch.dtype:
    """What sums are kept in that are to be exact: float64 where the device has it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widened(x: Tensor) -> Tensor:
    return x.to(widest(x.device))


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """For products whose operands must not be rounded. Meta tensors know no autocast, and torch
    refuses it to devices whose backend says nothing of it, to switch it off too."""
    device = x.device.type
    if x.is_meta or (device not in ("cpu", "cuda") and not torch.is_autocast_enabled(device)):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few Python numbers as a vector on a device, without a copy from the host.

    torch.tensor(list, device="cuda") waits for the device, and fails inside a CUDA graph.
    """
    if device.type == "cpu" or len(values) == 0:
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def queue(x: Tensor) -> tuple[int, int]:
    """A CUDA tensor's device and the handle of its current stream.

    pyloss has a CUDA runtime of its own, whose current device is set by each call.
    """
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def scratch(like: Tensor, size: int, align: int = 64) -> tuple[Tensor, int]:
    """(buffer, address of `size` bytes inside it); the buffer must outlive the call."""
    buffer = like.new_empty((size + align,), dtype=torch.uint8)
    start = buffer.data_ptr()
    return buffer, start + -start % align
