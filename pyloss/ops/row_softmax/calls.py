"""Calls of the kernels: buffers, records, results. What a device has of its own comes as `launch`.

A launch of a forward takes (input, problem, forward), of a backward (input, problem, backward), of
a second derivative also its own record last; they are those of cpu.py and cuda.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype, address
from pyloss.ops.row_softmax.layout import gradient_buffer, layout, row_count, row_shape
from pyloss.ops.row_softmax.records import (
    NO_STRIDES,
    Backward,
    Codes,
    Forward,
    Hvp,
    Options,
    new,
    problem,
    unpacked,
    unpacked_saved,
)
from pyloss.ops.row_softmax.statistics import RowStatistics, stat_rows

# Bits of what a forward returns besides (loss, saved).
WANT_EXTRAS, WANT_INDEX, WANT_GRAD = 1, 2, 4


def outputs(input, options: Options, codes: Codes, loss_dtype, wants):
    """Empty (loss, statistics, index) of a forward; shared by the kernels and the fake."""
    rows = row_count(input)
    loss_shape = () if codes.scalar else row_shape(input)
    return (
        input.new_empty(loss_shape, dtype=loss_dtype),
        RowStatistics.empty(input, rows, codes, options, wants & WANT_EXTRAS),
        input.new_empty((2, rows), dtype=torch.int64) if wants & WANT_INDEX else None,
    )


def listed(loss, saved, index, grad):
    """The op's result: a list of what was asked for, in this order."""
    return [t for t in (loss, saved, index, grad) if t is not None]


def unlisted(found, wants):
    # By place: Dynamo of torch 2.6 cannot trace a pop.
    index = found[2] if wants & WANT_INDEX else None
    return found[0], found[1], index, found[-1] if wants & WANT_GRAD else None


def run_forward(
    launch, tensors, options: Options, codes: Codes, loss: Tensor, statistics: RowStatistics,
    index: Tensor | None = None, grad: Tensor | None = None, strides=NO_STRIDES,
) -> None:  # fmt: skip
    """Runs the kernel on checked tensors into the given buffers.

    Args:
        tensors: (input, target, target2, mix, weight, token_weight).
        statistics: for as many rows as `tensors` have.
        grad, strides: where the gradient for an upstream 1 goes; may be the input, whose rows are
            read before they are overwritten.
    """
    record, alive = problem(tensors, options, codes)
    stats, norm, extras = statistics.addresses()
    fields = (
        loss.data_ptr(), DTYPE_CODES[loss.dtype], stats, norm, extras, address(index),
        address(grad), strides,
    )  # fmt: skip
    launch(tensors[0], record, new(Forward, fields))
    del alive


def forward(
    launch, input, target, target2, mix, weight, token_weight, options, codes, loss_dtype, wants,
    numbers=None,
):  # fmt: skip
    options, codes = unpacked(options, codes, numbers)
    loss, statistics, index = outputs(input, options, codes, loss_dtype, wants)
    result, buffer, strides = None, None, NO_STRIDES
    if wants & WANT_GRAD:
        result, buffer, strides = gradient_buffer(input)
    tensors = (input, target, target2, mix, weight, token_weight)
    run_forward(launch, tensors, options, codes, loss, statistics, index, buffer, strides)
    if buffer is not result:
        result.copy_(buffer)
    return listed(loss, statistics.saved, index, result)


def _backward_records(
    grad_loss, grad_extras, tensors, statistics: RowStatistics, options, codes, grad, strides
):
    """The records of a backward; and the tensors that must outlive the call."""
    record, alive = problem(tensors, options, codes)
    grad_loss = grad_loss.contiguous()
    grad_extras = None if grad_extras is None else grad_extras.contiguous()
    stats, norm, extras = statistics.addresses()
    fields = (
        grad_loss.data_ptr(), address(grad_extras), stats, norm, extras, grad.data_ptr(), strides
    )  # fmt: skip
    return record, new(Backward, fields), (alive, grad_loss, grad_extras)


def run_backward(launch, grad_loss, grad_extras, tensors, *rest) -> None:
    """Runs the kernel; the arguments are those of _backward_records."""
    record, backward, alive = _backward_records(grad_loss, grad_extras, tensors, *rest)
    launch(tensors[0], record, backward)
    del alive


def _statistics_of(saved, input, options, codes, grad_extras) -> RowStatistics:
    """Those that a forward has saved; its extras are looked at with cotangents of them only."""
    rows, height = row_count(input), stat_rows(codes, options)
    return RowStatistics(saved, rows, height, grad_extras is not None)


def backward(launch, grad_loss, grad_extras, input, *rest):
    others, saved, options, codes = unpacked_saved(rest)
    result, buffer, strides = gradient_buffer(input)
    statistics = _statistics_of(saved, input, options, codes, grad_extras)
    run_backward(
        launch, grad_loss, grad_extras, (input, *others), statistics, options, codes, buffer,
        strides,
    )  # fmt: skip
    if buffer is not result:
        result.copy_(buffer)
    return result


def backward_(launch, grad_loss, grad_extras, input, *rest):
    others, saved, options, codes = unpacked_saved(rest)
    buffer, _, strides = layout(input)
    statistics = _statistics_of(saved, input, options, codes, grad_extras)
    run_backward(
        launch, grad_loss, grad_extras, (input, *others), statistics, options, codes, buffer,
        strides,
    )  # fmt: skip
    if buffer is not input:
        input.copy_(buffer)


def hvp_outputs(input, grad_extras):
    """Empty derivatives with respect to each row's upstream gradient, and to the cotangents."""
    rows, acc = row_count(input), accumulator_dtype(input.dtype)
    return (
        input.new_empty((rows,), dtype=acc),
        input.new_empty((3, rows) if grad_extras is not None else (0,), dtype=acc),
    )


def hvp(launch, v, grad_loss, grad_extras, input, *rest):
    others, saved, options, codes = unpacked_saved(rest)
    grad_rows, grad_grad_extras = hvp_outputs(input, grad_extras)
    result, buffer, strides = gradient_buffer(input)
    statistics = _statistics_of(saved, input, options, codes, grad_extras)
    record, backward, alive = _backward_records(
        grad_loss, grad_extras, (input, *others), statistics, options, codes, buffer, strides
    )
    v, _, v_strides = layout(v)
    second = None if grad_extras is None else grad_grad_extras
    launch(
        input, record, backward, Hvp(v.data_ptr(), v_strides, grad_rows.data_ptr(), address(second))
    )
    del alive
    if buffer is not result:
        result.copy_(buffer)
    return result, grad_rows, grad_grad_extras
