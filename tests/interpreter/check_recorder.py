"""The access recorder finds what is planted, and is silent about the repaired twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from access_recorder import Fault, Recorder, addresses, recording


@triton.jit
def copy_kernel(from_ptr, to_ptr, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(from_ptr + at + shift, mask=at < n, other=0.0)
    tl.store(to_ptr + at, x, mask=at < n)


@triton.jit
def overlapping_kernel(from_ptr, to_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def neighbour_kernel(x_ptr, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (at + shift) % n, mask=at < n)
    tl.store(x_ptr + at, x + 1.0, mask=at < n)


@triton.jit
def counting_kernel(x_ptr, count_ptr, PLAIN: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    tl.atomic_add(count_ptr, x)
    if PLAIN:
        tl.store(x_ptr, tl.load(count_ptr))


@triton.jit
def rows_kernel(x_ptr, to_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    at = row * stride + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(x_ptr + at))


@triton.jit
def last_wins_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


def copy(x: torch.Tensor, out: torch.Tensor, n: int, shift: int = 0) -> None:
    copy_kernel[(triton.cdiv(n, 8),)](x, out, n, shift, BLOCK=8)


def test_bounds() -> None:
    x, out = torch.randn(20), torch.zeros(20)
    with recording() as state:
        copy(x, out, 20)
        assert torch.equal(out, x) and state.launches == 1
        with pytest.raises(Fault, match="beyond a tensor"):
            copy(x, out, 20, 1)
        with pytest.raises(Fault, match="load"):
            copy(x, out, 20, -1)
        with pytest.raises(Fault, match="store 4 bytes beyond"):
            copy(torch.randn(21), out, 21)


def test_gaps_and_alignment() -> None:
    wide = torch.randn(4, 10)
    with recording():
        copy(wide[1:2, :6], torch.zeros(6), 6)
        with pytest.raises(Fault, match="between the elements"):
            copy(wide[:, :6], torch.zeros(7), 7)
        with pytest.raises(Fault, match="between the elements of a tensor, or before"):
            copy(wide[1:, :6], torch.zeros(6), 6, -1)
    odd = torch.zeros(41, dtype=torch.uint8)[1:]
    with pytest.raises(Fault, match="odd address"):
        Recorder("odd", [odd]).load(np.array([odd.data_ptr()]), np.array([True]), 4)
    with pytest.raises(Fault, match="below every tensor"):
        Recorder("below", [wide]).load(np.array([wide.data_ptr() - 64]), np.array([True]), 4)


def test_two_programs_store() -> None:
    x = torch.randn(16)
    with recording():
        overlapping_kernel[(2,)](x, torch.zeros(16), 16, STEP=8, BLOCK=8)
        with pytest.raises(Fault, match="stores where another program stores"):
            overlapping_kernel[(2,)](x, torch.zeros(16), 16, STEP=4, BLOCK=8)


@pytest.mark.parametrize("shift, order", [(8, "forward"), (8, "reverse"), (-8, "random")])
def test_one_loads_what_another_stores(shift: int, order: str) -> None:
    with recording(order):
        neighbour_kernel[(3,)](torch.randn(24), 24, 0, BLOCK=8)
        with pytest.raises(Fault, match="another program (loads|stores)"):
            neighbour_kernel[(3,)](torch.randn(24), 24, shift + 24, BLOCK=8)


# What the second program is told, after the first one's access to the same address.
PAIRS = {
    ("load", "load"): None,
    ("store", "load"): "loads what another program stores",
    ("exchange", "load"): "loads what another program stores",
    ("load", "store"): "stores what another program loads",
    ("store", "store"): "stores where another program stores",
    ("exchange", "store"): "stores where another program stores",
    ("load", "exchange"): "an atomic meets a plain access",
    ("store", "exchange"): "an atomic meets a plain access",
    ("exchange", "exchange"): None,
}


@pytest.mark.parametrize("first, second", PAIRS)
def test_pairs_of_accesses(first: str, second: str) -> None:
    """Each check alone: in a kernel another one may come before it."""
    x = torch.zeros(4)
    at = (np.array([x.data_ptr() + 4]), np.array([True]), 4)

    def access(*programs: tuple[int, str]) -> None:
        recorder = Recorder("pair", [x])
        for program, what in programs:
            recorder.program = program
            getattr(recorder, what)(*at)

    access((1, first), (1, second), (1, first))
    if message := PAIRS[first, second]:
        with pytest.raises(Fault, match=message):
            access((1, first), (2, second))
    else:
        access((1, first), (2, second), (1, first))
        with pytest.raises(Fault):  # who was there before is not forgotten
            access((1, first), (2, second), (2, "store"))
        with pytest.raises(Fault):
            access((1, first), (2, second), (1, first), (1, "store"))


def test_atomics_meet_atomics_only() -> None:
    with recording():
        count = torch.zeros(1)
        counting_kernel[(4,)](torch.ones(4), count, PLAIN=False)
        assert count == 4
        with pytest.raises(Fault, match="loads what another program stores|atomic"):
            counting_kernel[(4,)](torch.ones(4), count, PLAIN=True)


def test_never_written() -> None:
    with recording(may_load_unwritten={"neighbour_kernel": "a test"}):
        fresh = torch.empty(16)
        with pytest.raises(Fault, match="nothing has written"):
            copy(fresh, torch.zeros(16), 16)
        with pytest.raises(Fault, match="nothing has written"):
            copy(torch.zeros(8).new_empty(16, dtype=torch.bfloat16), torch.zeros(16), 16)
        neighbour_kernel[(2,)](fresh, 16, 0, BLOCK=8)  # named as an exception
        copy(torch.empty(16).fill_(1.0), fresh, 16)
        copy(fresh, torch.zeros(16), 16)


def test_order_shows_in_results() -> None:
    """Stores of several programs to one place, unwatched: the order decides."""
    found = []
    for order in ("forward", "reverse"):
        with recording(order) as state:
            out = torch.zeros(1)
            with pytest.raises(Fault, match="stores where another"):
                last_wins_kernel[(2,)](out, BLOCK=8)
            found.append(out.item())
            assert state.launches == 1
    assert found == [0.0, 1.0]
    with recording("random") as state:
        programs = [(i, j, 0) for i in range(5) for j in range(4)]
        shuffled = state.ordered((5, 4, 1))
        assert sorted(shuffled) == programs
        assert shuffled not in (programs, programs[::-1])


def test_addresses_beyond_32_bits() -> None:
    x, out = (torch.empty(1 << 16, 1 << 16, device="meta", dtype=torch.int8) for _ in range(2))
    with addresses() as state:
        rows_kernel[(1 << 16,)](x, out, 1 << 16, WIDE=True, BLOCK=1 << 16)
        with pytest.raises(Fault, match="tensor"):
            rows_kernel[(1 << 16,)](x, out, 1 << 16, WIDE=False, BLOCK=1 << 16)
        assert state.launches == 2
