"""Watches what interpreted kernels load and store, as a race detector and a bounds checker would.

Per launch, of the lanes that are not masked off:
  bounds         an address is an element of a tensor that was passed, and aligned as one
  ownership      no address is stored by two programs, or stored by one and loaded by another;
                 atomics may meet atomics only
  never written  a value that is loaded is not the pattern that fresh memory is filled with
Programs run in an order of choice, so that what depends on it shows up in the results.

`recording` patches the interpreter for tests that run kernels; `addresses` runs a few programs of a
launch on tensors without data, of sizes no test could allocate, and checks the bounds alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter

# What fresh memory holds: a NaN of floats, a large number of integers; by the size of an element.
PATTERNS = {1: 0x65, 2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FA5A5A57FA5A5A5}
MANY = -1
MOST_EXACT = 1 << 26  # bytes of a tensor up to which its gaps are known


class Fault(AssertionError):
    """What a kernel must not do."""


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "data_ptr"):
            yield value


class _Memory:
    """One storage: which bytes begin an element of a passed view, and who has touched them."""

    def __init__(self, base: int, size: int, exact: bool):
        self.base, self.size = base, size
        self.allowed = np.zeros(size, bool) if exact else None
        if exact:
            self.stored = np.zeros(size, np.int32)
            self.loaded = np.zeros(size, np.int32)
            self.atomic = np.zeros(size, np.int32)

    def allow(self, offset: int, sizes: tuple, strides: tuple, itemsize: int) -> None:
        if self.allowed is None or 0 in sizes:
            return
        at = np.full((1,), offset, np.int64)
        for n, stride in zip(sizes, strides):
            at = (at[:, None] + np.arange(n if stride else 1) * stride * itemsize).ravel()
        self.allowed[at] = True


class Recorder:
    """Of one launch."""

    def __init__(self, name: str, tensors: list[Any]):
        self.name = name
        self.program = 0
        self.memories: list[_Memory] = []
        by_base: dict[int, _Memory] = {}
        for t in tensors:
            storage = t.untyped_storage()
            base, size = storage.data_ptr(), storage.nbytes()
            if size == 0:
                continue
            memory = by_base.get(base)
            if memory is None:
                memory = by_base[base] = _Memory(base, size, size <= MOST_EXACT)
                self.memories.append(memory)
            memory.allow(t.data_ptr() - base, tuple(t.shape), t.stride(), t.dtype.itemsize)
        self.memories.sort(key=lambda m: m.base)
        self.bases = np.array([m.base for m in self.memories], np.int64)

    def fault(self, text: str) -> None:
        raise Fault(f"{self.name}, program {self.program - 1}: {text}")

    def places(self, ptrs: np.ndarray, mask: np.ndarray, itemsize: int, what: str):
        """(memory, offsets) of the addresses, all of which must lie in passed tensors."""
        ptrs, mask = np.broadcast_arrays(ptrs, mask)
        at = ptrs[mask.astype(bool)].astype(np.int64).ravel()
        if at.size == 0:
            return
        if (at % itemsize).any():
            self.fault(f"{what} of {itemsize} bytes at an odd address")
        which = np.searchsorted(self.bases, at, side="right") - 1
        for index in np.unique(which):
            some = at[which == index]
            if index < 0:
                self.fault(f"{what} below every tensor")
            memory = self.memories[index]
            offsets = some - memory.base
            if (offsets + itemsize > memory.size).any():
                beyond = int(offsets.max()) + itemsize - memory.size
                self.fault(f"{what} {beyond} bytes beyond a tensor of {memory.size}")
            if memory.allowed is not None and not memory.allowed[offsets].all():
                self.fault(f"{what} between the elements of a tensor, or before its first one")
            yield memory, offsets

    def other(self, who: np.ndarray) -> bool:
        return bool(((who != 0) & (who != self.program)).any())

    def join(self, who: np.ndarray, at: np.ndarray) -> None:
        """Several programs may be there."""
        before = who[at]
        who[at] = np.where((before == 0) | (before == self.program), self.program, MANY)

    def load(self, ptrs: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        for memory, at in self.places(ptrs, mask, itemsize, "load"):
            if memory.allowed is None:
                continue
            if self.other(memory.stored[at]) or self.other(memory.atomic[at]):
                self.fault("loads what another program stores")
            self.join(memory.loaded, at)

    def store(self, ptrs: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        for memory, at in self.places(ptrs, mask, itemsize, "store"):
            if memory.allowed is None:
                continue
            if self.other(memory.stored[at]) or self.other(memory.atomic[at]):
                self.fault("stores where another program stores")
            if self.other(memory.loaded[at]):
                self.fault("stores what another program loads")
            memory.stored[at] = self.program

    def exchange(self, ptrs: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        for memory, at in self.places(ptrs, mask, itemsize, "atomic"):
            if memory.allowed is None:
                continue
            if self.other(memory.stored[at]) or self.other(memory.loaded[at]):
                self.fault("an atomic meets a plain access of another program")
            self.join(memory.atomic, at)


class _Watched:
    """The interpreter's memory operations, with a recorder told first."""

    def __init__(self, module: Any, state: _State):
        self.module, self.state = module, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def load(self, ptrs, mask, other, dtype):
        itemsize = np.dtype(dtype).itemsize
        recorder = self.state.recorder
        recorder.load(ptrs, mask, itemsize)
        if self.state.addresses_only:
            return np.zeros(np.broadcast(ptrs, mask).shape, dtype)
        found = self.module.load(ptrs, mask, other, dtype)
        bits = found.view(f"u{itemsize}")
        if itemsize > 1 and ((bits == PATTERNS[itemsize]) & mask.astype(bool)).any():
            if recorder.name not in self.state.may_load_unwritten:
                recorder.fault("loads what nothing has written")
        return found

    def store(self, ptrs, values, mask):
        self.state.recorder.store(ptrs, mask, values.dtype.itemsize)
        if not self.state.addresses_only:
            self.module.store(ptrs, values, mask)

    def atomic_rmw(self, op, ptrs, values, mask, sem):
        self.state.recorder.exchange(ptrs, mask, values.dtype.itemsize)
        return self.module.atomic_rmw(op, ptrs, values, mask, sem)

    def atomic_cas(self, ptrs, compare, values, sem):
        self.state.recorder.exchange(ptrs, np.ones(ptrs.shape, bool), values.dtype.itemsize)
        return self.module.atomic_cas(ptrs, compare, values, sem)


class _State:
    def __init__(self, order: str, may_load_unwritten: dict[str, str]):
        self.recorder: Recorder | None = None
        self.order = order
        self.may_load_unwritten = may_load_unwritten  # kernel -> why
        self.addresses_only = False
        self.launches = 0
        self.indices: Iterator[tuple[int, int, int]] = iter(())

    def ordered(self, grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        programs = list(itertools.product(*map(range, grid)))
        if self.order == "reverse":
            programs.reverse()
        elif self.order == "random":
            random.Random(len(programs)).shuffle(programs)
        return programs


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    return (*grid, *(1,) * (3 - len(grid)))


@contextlib.contextmanager
def _watching(state: _State, programs_of: Callable[[Any], list]) -> Iterator[None]:
    """Patches the interpreter; programs_of(grid): which programs run, in which order."""
    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    call = interpreter.GridExecutor.__call__

    def watched_call(executor, *args, **kwargs):
        grid = _three(executor.grid)
        programs = programs_of(grid)
        state.indices = iter(programs)
        state.recorder = Recorder(executor.fn.__name__, list(_tensors((*args, *kwargs.values()))))
        state.launches += 1
        executor.grid = (len(programs), 1, 1)
        with (
            patch.object(builder, "set_grid_dim", lambda *_: set_dim(*grid)),
            patch.object(builder, "set_grid_idx", set_index),
        ):
            try:
                return call(executor, *args, **kwargs)
            except interpreter.InterpreterError as error:
                raise (error.__cause__ if isinstance(error.__cause__, Fault) else error) from None

    def set_index(*_):
        index = next(state.indices)
        state.recorder.program += 1
        set_idx(*index)

    watched = _Watched(interpreter._interpreter, state)
    with (
        patch.object(interpreter, "_interpreter", watched),
        patch.object(interpreter.GridExecutor, "__call__", watched_call),
    ):
        yield


def _fresh(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An allocation whose memory shows that nothing has written it."""

    def filled(*args, **kwargs):
        t = make(*args, **kwargs)
        if t.numel() and t.device.type == "cpu" and not t.is_complex() and t.dtype != torch.bool:
            size = t.dtype.itemsize
            kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
            with torch.no_grad():
                t.detach().view(kind).fill_(PATTERNS[size])
        return t

    # What Dynamo traces may allocate too: it takes this as one call instead of looking inside.
    return torch.compiler.allow_in_graph(filled)


@contextlib.contextmanager
def recording(
    order: str = "forward", may_load_unwritten: dict[str, str] | None = None
) -> Iterator[_State]:
    """Every launch inside is watched.

    Args:
        order: of the programs of a launch: "forward", "reverse" or "random".
        may_load_unwritten: kernels that load memory which nothing has written, and why.
    """
    state = _State(order, may_load_unwritten or {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(_watching(state, state.ordered))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, _fresh(getattr(owner, name))))
        yield state


# -------------------------------------------------------------------------------------- addresses


class _NoStorage:
    def __init__(self, base: int, size: int):
        self.base, self.size = base, size

    def data_ptr(self) -> int:
        return self.base

    def nbytes(self) -> int:
        return self.size


class _NoData:
    """Stands for a meta tensor: an address, but nothing there."""

    def __init__(self, t: torch.Tensor, base: int):
        self.dtype, self.shape, self.stride = t.dtype, t.shape, t.stride
        self.storage = _NoStorage(base, t.untyped_storage().nbytes())
        self.offset = t.storage_offset() * t.dtype.itemsize

    def data_ptr(self) -> int:
        return self.storage.base + self.offset

    def untyped_storage(self) -> _NoStorage:
        return self.storage


@contextlib.contextmanager
def addresses(most: int = 3) -> Iterator[_State]:
    """Launches inside run the first and last programs only, on meta tensors, and check bounds."""
    state = _State("forward", {})
    state.addresses_only = True
    bases: dict[int, int] = {}
    following = itertools.count(1)

    def stand_in(value: Any) -> Any:
        if isinstance(value, tuple):
            found = [stand_in(v) for v in value]
            return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
        if not isinstance(value, torch.Tensor):
            return value
        assert value.is_meta, "addresses() is for tensors without data"
        key = value.untyped_storage()._cdata
        if key not in bases:
            bases[key] = next(following) << 48
        return _NoData(value, bases[key])

    def ends(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        count = math.prod(grid)
        which = sorted({*range(min(most, count)), *range(max(0, count - most), count)})
        _, y, z = grid
        return [(i // (y * z), i // z % y, i % z) for i in which]

    def no_copies(executor, args, kwargs):
        return list(args), dict(kwargs)

    with (
        patch.object(interpreter.GridExecutor, "_init_args_hst", no_copies),
        patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None),
        _watching(state, ends),
    ):
        watched = interpreter.GridExecutor.__call__

        def with_stand_ins(executor, *args, **kwargs):
            kwargs = {k: stand_in(v) for k, v in kwargs.items()}
            return watched(executor, *map(stand_in, args), **kwargs)

        with patch.object(interpreter.GridExecutor, "__call__", with_stand_ins):
            yield state
