"""Volumes on CUDA: dimensions 0 and 2 on the device, dimension 1 on the host at the same time.

The host needs the images, so each call waits for the device once: not for a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops.betti_matching import cpu
from pyloss.ops.betti_matching.records import Options

SMALLEST = 24**3  # voxels of an item; fewer are faster on the host alone
HOST, DEVICE = 1 << 1, 1 << 0 | 1 << 2  # dimensions


def on_host(voxels: int, mask: int) -> bool:
    """Whether volumes of so many voxels are the host's alone."""
    return voxels < SMALLEST or not mask & DEVICE


class Copies:
    """Copies of tensors on the host, under way while the device works."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._copies = [None if t is None else _pinned(t) for t in tensors]
        for copy, t in zip(self._copies, tensors):
            if t is not None:
                copy.copy_(t, non_blocking=True)
        first = tensors[0]
        self._done = None
        if first.is_cuda:
            self._done = torch.cuda.current_stream(first.device).record_event()

    def get(self) -> list[Tensor | None]:
        """Waits for them, and for nothing that was launched after them."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies


def to_device(t: Tensor, like: Tensor) -> Tensor:
    """A tensor of the host's, without waiting."""
    if not like.is_cuda:
        return t
    return _pinned(t).copy_(t).to(like.device, non_blocking=True)


def _pinned(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=torch.cuda.is_available())


def loss(x: Tensor, y: Tensor, o: Options, device_loss) -> tuple[Tensor, Tensor | None]:
    """Loss terms and gradient, of `device_loss(x, y, options)` and the host's."""
    mask = int(o.dims)
    if not mask & HOST:
        return device_loss(x, y, o)
    copies = Copies(x, y)
    terms, grad = device_loss(x, y, o._replace(dims=mask & DEVICE))
    host_terms, host_grad = cpu.loss(*copies.get(), o._replace(dims=mask & HOST))
    terms += to_device(host_terms, terms)
    if grad is not None:
        grad += to_device(host_grad, grad)
    return terms, grad
