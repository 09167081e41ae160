"""Forward and backward by chunks of rows, with the row-softmax kernels of one device.

`rows` is the device's module of row_softmax.
"""

from __future__ import annotations

import torch

from pyloss.ops._launch import accumulator_dtype, widened
from pyloss.ops.linear_cross_entropy.call import Call, Tensors, wanted
from pyloss.ops.linear_cross_entropy.chunks import Chunks
from pyloss.ops.linear_cross_entropy.products import Linear
from pyloss.ops.row_softmax.calls import WANT_EXTRAS, WANT_INDEX
from pyloss.ops.row_softmax.records import NO_STRIDES, Codes, Options, unpacked
from pyloss.ops.row_softmax.statistics import EXTRA_ROWS, saved_size, stat_rows


def result_buffers(input, options: Options, codes: Codes, loss_dtype, wants):
    """Empty (loss, saved, extras, index); shared by the kernels and the fake."""
    n = input.shape[0]
    acc = accumulator_dtype(input.dtype)
    # Every chunk has a norm of its own, and no more chunks than rows exist. Zeros, because
    # ignored rows leave theirs unwritten.
    size = n * saved_size(1, stat_rows(codes, options), wants & WANT_EXTRAS)
    return (
        input.new_empty(() if codes.scalar else (n,), dtype=loss_dtype),
        input.new_zeros(size, dtype=acc),
        input.new_empty((EXTRA_ROWS, n), dtype=acc) if wants & WANT_EXTRAS else None,
        input.new_empty((2, n), dtype=torch.int64) if wants & WANT_INDEX else None,
    )


def listed(loss, saved, extras, index, grads):
    return [t for t in (loss, saved, extras, index, *grads) if t is not None]


# Exported graphs call the op on parameters, which would refuse products into buffers.
@torch.no_grad()
def forward(rows, *args):
    t = Tensors(*args[:8])
    options, codes, loss_dtype, wants, chunk, exact, *numbers = args[8:]
    options, codes = unpacked(options, codes, *numbers)
    loss, saved, extras, index = result_buffers(t.input, options, codes, loss_dtype, wants)
    call = Call(t, options, codes)
    chunks = Chunks(t, call, chunk)
    grads = wanted(wants)
    linear = Linear(t, chunks, grads, exact)
    if chunks.kept is not None:
        for out, fill in ((loss, 0), (extras, 0), (index, -1)):
            if out is not None:
                out.fill_(fill)
        if index is not None:
            index[1] = 0  # the rank

    acc = saved.dtype
    losses = t.input.new_zeros(len(range(0, chunks.rows, chunks.step)), dtype=acc)
    # Whether the gradient may be written over the logits in the same pass: the CPU kernel has read
    # a row before it writes it.
    in_one = any(grads) and t.input.is_cpu
    for i, part in enumerate(chunks):
        x = chunks.take_input(part)
        logits = linear.logits(x)
        chunk_loss = losses[i] if call.scalar else losses.new_empty(x.shape[0], dtype=loss_dtype)
        chunk_index = None if index is None else index.new_empty((2, x.shape[0]))
        statistics = chunks.statistics(saved, part, extras is not None)
        tensors = chunks.row_tensors(logits, part)
        in_place = (0, 1, logits.stride(0))
        rows.run_forward(
            tensors, call.options, call.codes, chunk_loss, statistics, chunk_index,
            logits if in_one else None, in_place if in_one else NO_STRIDES,
        )  # fmt: skip
        if any(grads) and not in_one:
            rows.run_backward(
                losses.new_ones(()), None, tensors, statistics, call.options, call.codes, logits,
                in_place,
            )  # fmt: skip
        if not call.scalar:
            chunks.put(loss, part, chunk_loss)
        if extras is not None:
            chunks.put(extras.t(), part, statistics.extras.t())
        if index is not None:
            chunks.put(index.t(), part, chunk_index.t())
        if any(grads):
            linear.add(logits, x, part)
    if call.scalar:
        total = widened(losses).sum()
        if call.empty is not None:
            total = torch.where(call.empty, torch.nan, total)
        loss.copy_(total)
    return listed(loss, saved, extras, index, [g for g in linear.gradients() if g is not None])


@torch.no_grad()
def backward(rows, grad_loss, grad_extras, *args):
    t = Tensors(*args[:8])
    saved, options, codes, wants, chunk, exact, *numbers = args[8:]
    call = Call(t, *unpacked(options, codes, *numbers))
    chunks = Chunks(t, call, chunk)
    linear = Linear(t, chunks, wanted(wants), exact)
    for part in chunks:
        x = chunks.take_input(part)
        logits = linear.logits(x)
        chunk_extras = None
        if grad_extras is not None:
            chunk_extras = chunks.take(grad_extras.t(), part).t().contiguous()
        statistics = chunks.statistics(saved, part, grad_extras is not None)
        rows.run_backward(
            grad_loss if call.scalar else chunks.take(grad_loss, part), chunk_extras,
            chunks.row_tensors(logits, part), statistics, call.options, call.codes, logits,
            (0, 1, logits.stride(0)),
        )  # fmt: skip
        linear.add(logits, x, part)
    return [g for g in linear.gradients() if g is not None]
