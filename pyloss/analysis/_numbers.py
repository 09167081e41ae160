"""Numbers and tensors of numbers as float64."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks


def as_numbers(name: str, value, device: torch.device | None = None) -> Tensor:
    """float64 on a device, with the graph of a tensor. A 0-d tensor may come from elsewhere."""
    if not isinstance(value, Tensor):
        checks.check_number(name, value)
        return torch.tensor(float(value), dtype=torch.float64, device=device)
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    if device is not None and value.dim() and value.device != device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {value.device} and "
            f"others on {device}"
        )
    return value.to(device, torch.float64)


def as_constants(name: str, value, device: torch.device | None = None) -> Tensor:
    """Likewise, without the graph."""
    return as_numbers(name, value, device).detach()
