"""The layer's products, and the sums of its gradients over the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._gemm import product
from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype
from pyloss.ops.linear_cross_entropy.call import Tensors
from pyloss.ops.linear_cross_entropy.chunks import Chunks
from pyloss.ops.row_softmax.records import DENSE

# Columns of the weight's gradient that are formed at a time in half dtypes, before they are added
# in float32: the part then never leaves the cache.
_PART_COLUMNS = 4096
# torch's products of half matrices with a float32 result exist on CUDA, from some version on.
_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()


def _advised(x: Tensor) -> Tensor:
    """A fresh large buffer, whose first write would otherwise be slowed by its page faults."""
    if x.is_cpu and x.numel():
        _C.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


class Linear:
    """The layer: its logits, and the sums of its gradients over the chunks."""

    def __init__(self, t: Tensors, chunks: Chunks, grads: tuple[bool, ...], exact: bool):
        x = t.input
        self.chunks, self.exact = chunks, exact
        self.weight = t.linear_weight.to(x.dtype)
        self.bias = None if t.linear_bias is None else t.linear_bias.to(x.dtype).contiguous()
        classes, features = self.weight.shape
        self.buffer = _advised(x.new_empty((chunks.step, classes)))
        acc = accumulator_dtype(x.dtype)
        self.results = [None, None, None]
        if grads[0]:
            fresh = torch.zeros_like if chunks.kept is not None else torch.empty_like
            self.results[0] = fresh(x, memory_format=torch.contiguous_format)
        # Where one chunk is all, its product is the result and needs no wider sum.
        narrow = t.linear_weight.dtype == x.dtype
        self.whole = chunks.rows <= chunks.step and narrow and not exact
        if grads[1]:
            dtype = x.dtype if self.whole else acc
            self.results[1] = _advised(x.new_empty((classes, features), dtype=dtype))
        if grads[2]:
            self.results[2] = x.new_empty(classes, dtype=acc)
        self.dtypes = (x.dtype, t.linear_weight.dtype, getattr(t.linear_bias, "dtype", None))
        self.first = True

    def logits(self, x: Tensor) -> Tensor:
        out = self.buffer[: x.shape[0]]
        product(x, self.weight.t(), out, bias=self.bias)
        return out

    def add(self, dz: Tensor, x: Tensor, part: slice) -> None:
        """Adds what a chunk's gradient of the logits gives."""
        self.add_input(dz, part)
        self.add_weight(dz, x, part)

    def add_input(self, dz: Tensor, part: slice) -> Tensor | None:
        """The chunk's rows of the input's gradient, which go into the result."""
        dx = self.results[0]
        if dx is None:
            return None
        if self.chunks.kept is None:
            rows = dx[part]
            product(dz, self.weight, rows)
        else:
            rows = dx.new_empty((dz.shape[0], dx.shape[1]))
            product(dz, self.weight, rows)
            self.chunks.put(dx, part, rows)
        return rows

    def add_weight(self, dz: Tensor, x: Tensor, part: slice) -> None:
        """Adds the chunk's gradients of weight and bias; dz may be written over."""
        _, dw, db = self.results
        if dw is not None and self._by_parts(dw, dz):
            labels = [] if self.exact else self._without_labels(dz, part)
            x = x.to(dw.dtype) if self.exact else x
            for at in range(0, dw.shape[0], _PART_COLUMNS):
                columns = slice(at, at + _PART_COLUMNS)
                if db is not None:  # here the product finds the part in cache
                    self._add_columns(db[columns], dz[:, columns])
                self._add_part(dw[columns], dz[:, columns], x)
            for y, value in labels:
                dw.index_add_(0, y, value.unsqueeze(1) * x)
                if db is not None:
                    db.index_add_(0, y, value)
        else:
            if db is not None:
                self._add_columns(db, dz)
            if dw is not None:
                self._add_product(dw, dz, x)
        self.first = False

    def _by_parts(self, dw, dz) -> bool:
        """Whether the weight's gradient is wider than the products that torch has."""
        return dw.dtype != dz.dtype and (self.exact or dz.is_cpu or not _WIDE_PRODUCTS)

    def _without_labels(self, dz, part) -> list[tuple[Tensor, Tensor]]:
        """Takes the labels' entries out of dz: (label, entry in float32) of each row.

        They are most of a class's gradient. Added on their own they are not rounded to the half
        type with their chunk's product.
        """
        t, call = self.chunks.t, self.chunks.call
        if not dz.is_cpu or call.codes.kind == DENSE:  # index_add_ on CUDA has no fixed order
            return []
        found = []
        at = torch.arange(dz.shape[0], device=dz.device)
        for y in (t.target, t.target2):
            if y is not None:
                y = self.chunks.take(y, part).long()
                found.append((y, dz[at, y].float()))
                dz[at, y] = 0.0  # scatter_ would go through a float32 copy of dz
        return found

    def _add_columns(self, db, dz):
        if dz.is_cpu:
            code, threads = DTYPE_CODES[dz.dtype], torch.get_num_threads()
            args = (db.data_ptr(), dz.data_ptr(), code, *dz.shape, dz.stride(0), self.first)
            _C.column_sums(*args, threads)
        else:
            sums = dz.sum(0, dtype=db.dtype)
            db.copy_(sums) if self.first else db.add_(sums)

    def _add_product(self, dw, dz, x):
        if dw.dtype == dz.dtype:
            product(dz.t(), x, dw, add=not self.first)
        elif self.first:
            torch.ops.aten.mm.dtype_out(dz.t(), x, dw.dtype, out=dw)
        else:
            torch.ops.aten.addmm.dtype_out(dw, dz.t(), x, dw.dtype, out=dw)

    def _add_part(self, dw, dz, x):
        if self.exact:
            product(dz.to(dw.dtype).t(), x, dw, add=not self.first)
            return
        part = torch.mm(dz.t(), x)
        if part.is_cpu:
            code, threads = DTYPE_CODES[part.dtype], torch.get_num_threads()
            args = (dw.data_ptr(), part.data_ptr(), code, part.numel(), self.first)
            _C.accumulate(*args, threads)
        else:
            dw.copy_(part) if self.first else dw.add_(part)

    def gradients(self) -> list[Tensor | None]:
        if self.first:  # no row counted
            for result in self.results:
                if result is not None:
                    result.zero_()
        return [r if r is None else r.to(d) for r, d in zip(self.results, self.dtypes)]
