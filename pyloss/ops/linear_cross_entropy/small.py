"""A whole call in one, for plain losses of few rows on the CPU.

There the arithmetic takes a microsecond, and what surrounds it a hundred: checks, buffers, the
dispatcher. So this looks at a call once, passes the op by, and leaves everything that is not plain
to it: other options, modes that watch or rewrite operations, transforms, saved-tensor hooks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from pyloss import _C, backends
from pyloss.ops import _gemm
from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)
from pyloss.ops.linear_cross_entropy import composed
from pyloss.ops.linear_cross_entropy.call import Tensors
from pyloss.ops.linear_cross_entropy.reference import gradients_of
from pyloss.ops.row_softmax import known
from pyloss.ops.row_softmax.records import INDEX, REDUCTIONS, Codes

# Logits and multiplications up to which the call above costs more than its arithmetic.
_MOST_LOGITS, _MOST_PRODUCTS = 1 << 14, 1 << 20
_PLAIN = (Tensor, Parameter)
_LABELS = (torch.int64, torch.int32, torch.uint8)

# Private in torch: without one of them nothing is small.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_is_tracing = getattr(torch._C, "_is_tracing", lambda: True)


def is_small(input, weight, target, bias) -> bool:
    """Whether these arguments are right, and few and plain enough; asks nothing of options.
    Not for compiled graphs."""
    if type(input) not in _PLAIN or type(weight) not in _PLAIN:
        return False
    if type(target) is not Tensor or target.dtype not in _LABELS:
        return False
    sizes, classes = input.shape, weight.shape
    return (
        len(sizes) == 2
        and len(classes) == 2
        and sizes[1] == classes[1]
        and target.shape == sizes[:1]
        and 0 < sizes[0] * classes[0] <= _MOST_LOGITS
        and 0 < sizes[0] * classes[0] * sizes[1] <= _MOST_PRODUCTS
        and input.dtype is weight.dtype is torch.float32
        and (bias is None or _fits(bias, classes[0]))
        and input.device.type == weight.device.type == target.device.type == "cpu"
        and input.is_contiguous()
        and weight.is_contiguous()
        and target.is_contiguous()
        and _gemm.is_own(input)
        and not (_dispatch_modes() or _function_modes() or _is_tracing())
        and not (functorch_active() or forward_ad_active() or saved_tensor_hooks_active())
        and not torch.is_autocast_enabled("cpu")
        and backends.forced() in (None, "cpu")
    )


def _fits(bias, classes: int) -> bool:
    return (
        type(bias) in _PLAIN
        and bias.shape == (classes,)
        and bias.dtype is torch.float32
        and bias.device.type == "cpu"
        and bias.is_contiguous()
    )


def _run(input, weight, bias, target, ignore_index, mean, needed):
    """(loss, the gradients that are needed)"""
    (rows, features), classes = input.shape, weight.shape[0]
    loss = input.new_empty(())
    dx = torch.empty_like(input) if needed[0] else None
    dw = torch.empty_like(weight) if needed[1] else None
    db = torch.empty_like(bias) if needed[2] else None
    _C.small_linear_cross_entropy(
        rows, classes, features, input.data_ptr(), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), target.data_ptr(), DTYPE_CODES[target.dtype],
        ignore_index, mean, loss.data_ptr(), 0 if dx is None else dx.data_ptr(),
        0 if dw is None else dw.data_ptr(), 0 if db is None else db.data_ptr(),
    )  # fmt: skip
    return loss, (dx, dw, db)


class _SmallLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, target, ignore_index, mean):
        needed = ctx.needs_input_grad[:3]
        loss, ctx.grads = _run(input, weight, bias, target, ignore_index, mean, needed)
        ctx.save_for_backward(input, weight, bias, target)
        ctx.ignore_index, ctx.mean = ignore_index, mean
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grads, ctx.grads = ctx.grads, None
        kept = ctx.saved_tensors  # also where they are not needed: changed ones must be an error
        create_graph = torch.is_grad_enabled()
        if grads is not None and not (create_graph or is_batched(grad_loss)):
            factor = known(grad_loss)
            if factor is not None and math.isfinite(factor):
                # Handed over, not kept: autograd may adopt them.
                for g in grads if factor != 1.0 else ():
                    if g is not None:
                        g.mul_(factor)
                return *grads, None, None, None
        found = _composed(ctx, kept, grad_loss, create_graph)
        return *found, None, None, None


def _composed(ctx, kept, grad_loss, create_graph):
    """The gradients as torch operations: what the forward has formed is handed over, or is not
    what is asked for."""
    reduction = REDUCTIONS["mean" if ctx.mean else "sum"]
    codes = Codes(INDEX, ctx.ignore_index, 0, reduction, 0)
    input, weight, bias, target = kept
    tensors = Tensors(input, weight, bias, target, None, None, None, None)

    def function(t, wants):
        return composed(t, None, codes, torch.float32, wants)

    needed = ctx.needs_input_grad[:3]
    return gradients_of(function, tensors, grad_loss, None, needed, create_graph=create_graph)


def small_linear_cross_entropy(
    input, weight, target, bias, ignore_index: int, mean: bool
) -> Tensor:
    """Mean or sum of the cross entropy; for arguments that are small."""
    if not torch.is_grad_enabled():
        return _run(input, weight, bias, target, ignore_index, mean, (False, False, False))[0]
    return _SmallLinearCrossEntropy.apply(input, weight, bias, target, ignore_index, mean)
