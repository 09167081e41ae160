"""Dimension 1 of volumes on CUDA: the host reduces the columns that the device leaves to it.

With dimensions 0 and 2 on the device, whose trees say which columns vanish, and without apparent
pairs 5 to 10 % of the columns are left; they cross with the ranks of the voxels, and the host
reduces them, each matrix of each item on a thread, while the device works on the next group of
items. With few threads, or without one of these dimensions, the host does all of dimension 1
at the same time as the device the rest: on one thread that takes no longer (measured, 32^3 and
48^3: as long for smooth volumes, 0.6 times as long for noise).

The host waits for the device once a group: not for a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue
from pyloss.ops.betti_matching import cpu, records
from pyloss.ops.betti_matching.records import TERMS, WIDTHS, Options, raise_nan

SMALLEST = 24**3  # voxels of an item; fewer are faster on the host alone
FEW = 4  # threads of the host
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
    return _pinned(t).copy_(t).to(like.device, non_blocking=True) if like.is_cuda else t


def _pinned(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=torch.cuda.is_available())


class Loops:
    """Dimension 1 of a group of volumes (K, *spatial), whose other dimensions are `mask`."""

    def __init__(self, x: Tensor, y: Tensor | None, first: int, superlevel: bool, mask: int):
        self._images, self._first, self._superlevel = Copies(x, y), first, superlevel
        self._left = mask == DEVICE and torch.get_num_threads() > FEW

    def launched(self, problem: records.Problem, buffer: Tensor, start: int, size: int) -> None:
        """After the kernels of the other dimensions, on their scratch memory."""
        if not self._left:
            return
        self._problem, self._buffer = problem, buffer
        self._work = (start, size, *queue(buffer))
        self._counts = buffer.new_empty((2,), dtype=torch.int32)
        _C.cuda_betti_columns(problem, address(self._counts), *self._work)
        begin = start - buffer.data_ptr()
        bytes = _C.cuda_betti_prefix_bytes(problem, buffer.get_device())
        self._prefix = Copies(buffer[begin : begin + bytes])

    def loss(self, o: Options) -> tuple[Tensor, Tensor | None]:
        """Loss terms (K, 3, TERMS) and gradient, on the host."""
        x, y = self._images.get()
        o = o._replace(dims=HOST)
        if not self._left:
            terms, grad = cpu.loss(x.unsqueeze(1), y.unsqueeze(1), o)
            return terms.squeeze(1), grad.view_as(x) if o.want_grad else None
        residue, _alive = self._residue()
        terms = x.new_empty((len(x), 3, TERMS))
        grad = torch.empty_like(x) if o.want_grad else None
        _C.betti_loss_of_residue(
            self._on_host(x, y), records.loss(o), residue, address(terms), address(grad),
            torch.get_num_threads(),
        )  # fmt: skip
        return terms, grad

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """As those of the ops; without a target, all bars as the second table."""
        x, y = self._images.get()
        threads = torch.get_num_threads()
        if not self._left and y is not None:
            found = cpu.matching(x, y, self._superlevel, [1])
        elif not self._left:
            found = cpu.pairs(x, self._superlevel, [1], False)
        else:
            (residue, _alive), problem = self._residue(), self._on_host(x, y)
            if y is not None:
                found = cpu.tables(_C.betti_matching_of_residue(problem, residue, threads))
            else:
                found = cpu.table(_C.persistence_pairs_of_residue(problem, residue, threads), 6)
        if y is None:
            found = (found.new_empty((0, WIDTHS[0])), found, found[:0])
        for table in found:
            table[:, 0] += self._first
        return found

    def _on_host(self, x: Tensor, y: Tensor | None) -> records.Problem:
        return records.problem(x, y, 1, self._superlevel, HOST)

    def _residue(self) -> tuple[records.Residue, object]:
        """What is left to the host, and what must outlive its use. Waits for the device."""
        count, nan = self._counts.tolist()
        raise_nan(nan, self._problem.items, self._first)
        names, keys = self._counts.new_empty((2, count), dtype=torch.int64)
        _C.cuda_betti_column_keys(self._problem, count, address(names), address(keys), *self._work)
        names = names[keys.argsort()]
        (prefix,) = self._prefix.get()
        images, voxels = (3 if self._problem.target else 1), records.voxels(self._problem)
        matrix = names // (3 * voxels)
        names = Copies(names[matrix.argsort(stable=True)]).get()[0]
        ranks = 4 * images * self._problem.items * voxels
        tree = address(prefix) + ranks + -ranks % 256
        return records.Residue(address(prefix), tree, address(names), count), (prefix, names)


def finish(loops: Loops, o: Options, terms: Tensor, grad: Tensor | None) -> None:
    """Adds dimension 1 to the loss terms and the gradient of the others."""
    host_terms, host_grad = loops.loss(o)
    terms += to_device(host_terms, terms)
    if grad is not None:
        grad += to_device(host_grad, grad)
