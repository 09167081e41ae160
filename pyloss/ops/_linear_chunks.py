"""The parts of a linear cross entropy that a chunk of rows passes through.

Call      what holds for all rows: options, weights with the denominator of 'mean' multiplied in
Chunks    which rows a chunk has
Linear    the layer's products, and the sums of its gradients over the chunks
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops import row_softmax as rows
from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype
from pyloss.ops.row_softmax import DENSE, EXTRA_ROWS, MIX, PLAIN, REDUCTIONS, Codes, Options

# Bytes of logits that exist at a time. On the CPU large enough that the products run at their full
# rate (512 rows of 32000 bfloat16), on CUDA also that adding to the weight's float32 gradient hides
# behind the product that it belongs to.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 224 << 20}
_CHUNK_ROWS = (256, 4096)  # fewer rows make products slow, more bring nothing
# Columns of the weight's gradient that are formed at a time in half dtypes, before they are added
# in float32: the part then never leaves the cache.
_PART_COLUMNS = 4096


# A chunk's length, where no number is given: by chunk_rows; or, where the weight's gradient is
# wanted and its product comes in its own dtype, all rows if that takes less memory.
AUTO, AUTO_FOR_WEIGHT = 0, -1


def chunk_rows(classes: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows per chunk that `chunk="auto"` otherwise stands for."""
    budget = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cpu"])
    wanted = budget // (max(classes, 1) * dtype.itemsize) // 64 * 64
    return max(_CHUNK_ROWS[0], min(_CHUNK_ROWS[1], wanted))


class Tensors(NamedTuple):
    """The tensors of a call, in the order of the op's schema."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (V, D); its dtype may be wider than the input's
    linear_bias: Tensor | None  # (V)
    target: Tensor  # (N) or (N, V)
    target2: Tensor | None  # (N)
    mix: Tensor | None  # (N)
    weight: Tensor | None  # (V)
    token_weight: Tensor | None  # (N)


# --------------------------------------------------------------------------------------------------
# What a call is before its chunks


def ignored_rows(t: Tensors, codes) -> Tensor | None:
    """Mask of the rows to leave out; None where no row can be."""
    if codes[0] == DENSE:
        return None
    ignored = _equal(t.target, codes[1])
    return ignored | _equal(t.target2, codes[1]) if codes[0] == MIX else ignored


def _equal(labels: Tensor, value: int) -> Tensor:
    # torch compares in the labels' own dtype, where the uint8 label 156 equals -100.
    return (labels.long() if labels.dtype == torch.uint8 else labels) == value


def _mass(t: Tensors, codes, ignored) -> tuple[Tensor, Tensor]:
    """The denominators of 'mean': of the loss, and of the z-loss. float64, 0-d."""
    rows_in = t.input.shape[0]
    if t.token_weight is None:
        token = t.input.new_ones(rows_in, dtype=torch.float64)
    else:
        token = t.token_weight.double()
    if ignored is not None:
        token = torch.where(ignored, 0.0, token)
    if t.weight is None or codes[0] == DENSE:
        mass = token.sum()
        return mass, mass

    def of(labels):
        # Out of range, and not ignored: the kernel will say so.
        inside = (labels >= 0) & (labels < t.weight.shape[0])
        return t.weight.double()[torch.where(inside, labels, 0).long()]

    picked = of(t.target)
    if codes[0] == MIX:
        mix = t.mix.double()
        picked = mix * picked + (1 - mix) * of(t.target2)
    return (token * picked).sum(), token.sum()


class Call:
    """A call with its denominators multiplied into the weights, so that chunks only add up."""

    def __init__(self, t: Tensors, options, codes):
        self.options = options = Options(*(options or PLAIN))
        self.classes = t.linear_weight.shape[0]
        self.ignored = ignored_rows(t, codes)
        self.empty = None  # whether the mean is over nothing and must be NaN
        self.weight, self.token_weight = t.weight, t.token_weight
        reduction = codes[3]
        if reduction == REDUCTIONS["mean"]:
            self._fold(t, codes)
            reduction = REDUCTIONS["sum"]
        self.options = options._replace(num_items=0.0)
        self.codes = Codes(codes[0], codes[1], codes[2], reduction, 0)
        self.scalar = reduction == REDUCTIONS["sum"]

    def _fold(self, t, codes):
        acc = accumulator_dtype(t.input.dtype)
        if self.options.num_items > 0:
            factor = torch.full((), 1 / self.options.num_items, dtype=acc, device=t.input.device)
        else:
            loss_mass, z_mass = _mass(t, codes, self.ignored)
            factor = 1 / z_mass
            if t.weight is not None:
                ratio = z_mass / loss_mass
                if codes[4]:
                    ratio = torch.where(loss_mass == 0, 0.0, ratio)
                self.weight = (t.weight * ratio).to(acc)
            if codes[4]:
                factor = torch.where(z_mass == 0, 0.0, factor)
            else:
                self.empty = loss_mass == 0
        token = factor if t.token_weight is None else t.token_weight * factor
        self.token_weight = token.to(acc).expand(t.input.shape[0])


class Chunks:
    """The rows of a call, some at a time, without the ignored ones where nothing has to wait.

    On the CPU the rows that count are gathered. On a GPU their number is not known to the host:
    there ignored rows are replaced by zeros, because 0 times a NaN would reach the weight.
    """

    def __init__(self, t: Tensors, call: Call, chunk: int):
        self.t, self.call = t, call
        self.rows = t.input.shape[0]
        self.kept = None  # indices of the rows that count, when some do not
        if call.ignored is not None and t.input.is_cpu and bool(call.ignored.any()):
            self.kept = (~call.ignored).nonzero().squeeze(1)
            self.rows = self.kept.shape[0]
        wanted = chunk
        if chunk in (AUTO, AUTO_FOR_WEIGHT):
            wanted = chunk_rows(call.classes, t.input.dtype, t.input.device.type)
        if chunk == AUTO_FOR_WEIGHT and self._one_is_smaller():
            wanted = self.rows
        self.step = max(1, min(wanted, self.rows))
        self.height = rows._stat_rows(call.codes, call.options)

    def _one_is_smaller(self) -> bool:
        """Whether all logits take no more than the weight's gradient in float32, which one chunk
        does without. (A float32 weight needs it in any case.)"""
        x, acc = self.t.input, accumulator_dtype(self.t.input.dtype)
        narrow = x.dtype != acc and self.t.linear_weight.dtype == x.dtype
        return narrow and self.rows * x.dtype.itemsize <= x.shape[1] * acc.itemsize

    def __iter__(self):
        for begin in range(0, self.rows, self.step):
            yield slice(begin, min(begin + self.step, self.rows))

    def take(self, x: Tensor | None, part: slice) -> Tensor | None:
        """The rows `part` of a tensor."""
        if x is None or self.kept is None:
            return x if x is None else x[part]
        return x.index_select(0, self.kept[part])

    def take_input(self, part: slice) -> Tensor:
        x = self.take(self.t.input, part)
        if self.kept is None and self.call.ignored is not None and not x.is_cpu:
            x = torch.where(self.call.ignored[part].unsqueeze(1), 0.0, x)
        return x

    def put(self, out: Tensor, part: slice, values: Tensor) -> None:
        """Writes the rows `part` of a result."""
        if self.kept is None:
            out[part] = values
        else:
            out.index_copy_(0, self.kept[part], values)

    def row_tensors(self, logits: Tensor, part: slice) -> tuple:
        """The arguments of the row-softmax kernel."""
        t, call = self.t, self.call
        take = self.take
        return (
            logits,
            take(t.target, part),
            take(t.target2, part),
            take(t.mix, part),
            call.weight,
            take(call.token_weight, part),
        )

    def saved(self, saved: Tensor, part: slice, with_extras: bool) -> Tensor:
        """A chunk's share of the buffer of statistics, in the layout of row_softmax."""
        height = self.height + (EXTRA_ROWS if with_extras else 0)
        begin = part.start // self.step * rows._NORM + height * part.start
        return saved[begin : begin + rows._NORM + height * (part.stop - part.start)]


# --------------------------------------------------------------------------------------------------
# Products


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
        self.bias = None if t.linear_bias is None else t.linear_bias.to(x.dtype)
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
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def add(self, dz: Tensor, x: Tensor, part: slice) -> None:
        """Adds what a chunk's gradient of the logits gives."""
        dx, dw, db = self.results
        if dx is not None:
            if self.chunks.kept is None:
                torch.mm(dz, self.weight, out=dx[part])
            else:
                self.chunks.put(dx, part, torch.mm(dz, self.weight))
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
        if not dz.is_cpu or call.codes[0] == DENSE:  # index_add_ on CUDA has no fixed order
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
            if self.first:
                torch.mm(dz.t(), x, out=dw)
            else:
                dw.addmm_(dz.t(), x)
        elif self.first:
            torch.ops.aten.mm.dtype_out(dz.t(), x, dw.dtype, out=dw)
        else:
            torch.ops.aten.addmm.dtype_out(dw, dz.t(), x, dw.dtype, out=dw)

    def _add_part(self, dw, dz, x):
        if self.exact:
            dz = dz.to(dw.dtype)
            torch.mm(dz.t(), x, out=dw) if self.first else dw.addmm_(dz.t(), x)
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
