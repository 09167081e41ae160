"""What several test files need and is no part of pyloss.testing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest.mock
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TORCH = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
ROOT = Path(__file__).resolve().parents[1]
WRONG_NUMBERS = 3  # exit status of a worker whose results differ: never tried again


def needs_torch(version: tuple[int, int], why: str) -> pytest.MarkDecorator:
    """Skips a test of what earlier versions of torch cannot do, as the documentation says."""
    text = ".".join(map(str, version))
    return pytest.mark.skipif(TORCH < version, reason=f"{why}: needs torch {text}")


def run_ranks(folder: Path, attempt: int, world: int, *command: str) -> list[tuple[int, str]]:
    """(exit status, output) of each rank; a fresh rendezvous file for each attempt."""
    rendezvous = str(folder / f"rendezvous{attempt}")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    logs = [open(folder / f"rank{rank}-{attempt}", "w+") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, str(rank), str(world), rendezvous],
            stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        for process in ranks:
            process.wait(timeout=150)
    except subprocess.TimeoutExpired:
        pass  # shown below as a status that is not 0
    finally:
        for process in ranks:
            process.kill()
    found = []
    for process, log in zip(ranks, logs):
        log.seek(0)
        found.append((process.wait(), log.read()))
        log.close()
    return found


def check_ranks(folder: Path, world: int, *command: str) -> list[str]:
    """The output of each rank; a crash of the transport is tried once more."""
    found = run_ranks(folder, 0, world, *command)
    statuses = [status for status, _ in found]
    if any(statuses) and WRONG_NUMBERS not in statuses:
        found = run_ranks(folder, 1, world, *command)
    assert not any(status for status, _ in found), "\n".join(text[-3000:] for _, text in found)
    return [text for _, text in found]


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul", "aten::bmm")


def multiplications(function: Callable[[], object]) -> int:
    """Multiply-adds of all matrix products that a call makes; torch's, which its profiler sees."""
    from pyloss.ops import _gemm

    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        unittest.mock.patch.object(_gemm, "_forced", "torch"),
        torch.profiler.profile(activities=activities, record_shapes=True) as profile,
    ):
        function()
    total = 0
    for event in profile.events():
        parent = event.cpu_parent
        if event.name in _PRODUCTS and (parent is None or parent.name not in _PRODUCTS):
            a, b = event.input_shapes[:2] if "add" not in event.name else event.input_shapes[1:3]
            total += a[0] * a[1] * b[1]
    return total


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes that tensors made within have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.known:
                    self._hold(t, key, storage.nbytes())
        return found

    def _hold(self, t: torch.Tensor, key: int, size: int) -> None:
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(t.untyped_storage(), self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
