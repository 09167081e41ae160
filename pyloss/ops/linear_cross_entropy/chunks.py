"""The rows of a linear cross entropy, some at a time; what a chunk of rows passes through."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.linear_cross_entropy.call import AUTO, AUTO_FOR_WEIGHT, Call, Tensors
from pyloss.ops.row_softmax.statistics import RowStatistics, stat_rows

# Bytes of logits that exist at a time. On the CPU large enough that the products run at their full
# rate (512 rows of 32000 bfloat16), on CUDA also that adding to the weight's float32 gradient hides
# behind the product that it belongs to.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 224 << 20}
_CHUNK_ROWS = (256, 4096)  # fewer rows make products slow, more bring nothing


def chunk_rows(classes: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows per chunk that `chunk="auto"` otherwise stands for."""
    budget = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cpu"])
    wanted = budget // (max(classes, 1) * dtype.itemsize) // 64 * 64
    return max(_CHUNK_ROWS[0], min(_CHUNK_ROWS[1], wanted))


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
        self.height = stat_rows(call.codes, call.options)

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

    def statistics(self, saved: Tensor, part: slice, with_extras: bool) -> RowStatistics:
        """A chunk's share of the buffer of statistics."""
        begin, count = part.start, part.stop - part.start
        number = begin // self.step
        return RowStatistics.of_part(saved, begin, count, number, self.height, with_extras)
