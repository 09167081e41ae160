"""The CUDA half of the ops on CPU tensors: the same Python, the same boundary, kernels as fibers.

``PYLOSS_SHIM_MODULE=build/.../shim_module/_C... python -m pytest ...`` runs any tests so: this
module puts the stand-in (tests/cpp/cuda_shim) in place of pyloss._C before pyloss is imported, lets
each op that has a CUDA implementation take it, and gives CPU tensors a device number and a stream.
What differs from a GPU is what differs between devices in torch itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch

DEVICE, STREAM = 1, 1 + 1 * 16 + 3  # a second device, and a stream of it: shim::stream(1, 3)


class Shim:
    """Settings and observations of tests/cpp/cuda_shim/shim_module.cpp."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(str(Path(path).with_name("libshim_kernels.so")))
        self.configure(order=0, seed=0)

    def configure(self, *, order: int, seed: int, devices: int = 2, poison: int = 0xFF) -> None:
        """In which order (forward, reverse, random) blocks and threads run."""
        self._library.shim_configure(order, seed, devices, poison)

    def fail_after(self, calls: int) -> None:
        self._library.shim_fail_after(calls)

    def launches(self) -> int:
        """Since the last question; raises if one was on another device or stream."""
        count = self._library.shim_launches(DEVICE, ctypes.c_int64(STREAM))
        if count < 0:
            raise AssertionError("a kernel was launched on another device or stream")
        return count


def install(path: str) -> Shim:
    """Before anything imports pyloss."""
    if "pyloss._C" in sys.modules:
        raise RuntimeError("pyloss was imported before its stand-in")
    path = str(Path(path).resolve())
    spec = importlib.util.spec_from_file_location("pyloss._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pyloss._C"] = module
    torch.Tensor.get_device = lambda self: DEVICE

    from pyloss import backends
    from pyloss.ops import _launch

    _launch.queue = lambda x: (DEVICE, STREAM)
    automatic = backends.choose

    def choose(op, device_type, available):
        if backends.forced() is None and device_type == "cpu" and "cuda" in available:
            return "cuda"
        return automatic(op, device_type, available)

    backends.choose = choose
    return Shim(path)
