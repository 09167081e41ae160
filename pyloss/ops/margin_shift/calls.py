"""Calls of the kernels: buffers, records, results. What a device has of its own comes as `launch`,
which takes the name of a kernel and its records."""

from __future__ import annotations

from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.margin_shift import reference
from pyloss.ops.margin_shift.records import Backward, problem
from pyloss.ops.row_softmax.layout import gradient_buffer

_NOTHING = (0, (0, 0, 0))


def forward(
    launch, x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 0:  # no kernel has rows of nothing
        return reference.forward(x, x_adv, target, squared, ignore_index)
    sums = accumulator_dtype(x.dtype)
    shift, total = (x.new_empty(target.shape, dtype=sums) for _ in range(2))
    record, kept = problem(x, x_adv, target, squared, ignore_index)
    launch("fwd", record, shift.data_ptr(), total.data_ptr())
    del kept  # lived until here
    return shift, total


def backward(
    launch, g: Tensor, shift: Tensor, total: Tensor, x: Tensor, x_adv: Tensor, target: Tensor,
    squared: bool, ignore_index: int, clean: bool, adv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.shape[1] == 0:
        return reference.backward(
            g, shift, total, x, x_adv, target, squared, ignore_index, clean, adv
        )
    record, kept = problem(x, x_adv, target, squared, ignore_index)
    results, written, places = [], [], []
    for t, needed in ((x, clean), (x_adv, adv)):
        if needed:
            result, buffer, strides = gradient_buffer(t)
            places += [buffer.data_ptr(), strides]
        else:
            result = buffer = t.new_empty((0,))
            places += _NOTHING
        results.append(result)
        written.append(buffer)
    rows = [t.to(shift.dtype).contiguous() for t in (g, shift, total)]
    launch("bwd", record, Backward(*(t.data_ptr() for t in rows), *places))
    del kept
    for result, buffer in zip(results, written):
        if buffer is not result:
            result.copy_(buffer)
    return tuple(results)
