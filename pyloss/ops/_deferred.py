"""Looking at a number on a GPU later, when it has come by itself: no wait for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_pending: list[tuple[torch.cuda.Event, Tensor, Callable[[float], None]]] = []
_lock = threading.Lock()  # of the list; what looks at a number may call again


def when_known(number: Tensor, look: Callable[[float], None]) -> None:
    """Calls look(number) at one of the next calls of this function or of :func:`settle`.

    Args:
        number: a scalar on a CUDA device; dropped unseen while a CUDA graph is captured.
        look: may warn or raise.
    """
    with torch.cuda.device_of(number):  # whose stream is asked, and waited for
        if torch.cuda.is_current_stream_capturing():
            return
        settle()
        there = torch.empty((), dtype=number.dtype, pin_memory=True)
        there.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    with _lock:
        _pending.append((event, there, look))


def settle() -> None:
    """Looks at all numbers that have arrived."""
    waiting, arrived = [], []
    with _lock:
        for entry in _pending:
            (arrived if entry[0].query() else waiting).append(entry)
        _pending[:] = waiting
    for _, number, look in arrived:
        look(number.item())
