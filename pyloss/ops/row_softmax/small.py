"""A whole call in one, for the plain cross entropy of few logits on the CPU.

There the arithmetic takes less than a microsecond, and what surrounds it twenty: packed arguments,
statistics, the dispatcher. So this looks at a call once, passes the op by, and leaves everything
that is not plain to it: other layouts and dtypes, modes that watch or rewrite operations,
transforms, hooks on saved tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from pyloss import _C, backends
from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    saved_tensor_hooks_active,
)
from pyloss.ops.row_softmax import COMP_SUM, INDEX, REDUCTIONS, Codes, early_gradient, gradients

# Few enough for one thread (kSerialElements of csrc/cpu/row_access.h).
_MOST_LOGITS = 1 << 15
_LABELS = (torch.int64, torch.int32, torch.uint8)

# Private in torch: without one of them nothing is small.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_is_tracing = getattr(torch._C, "_is_tracing", lambda: True)


def is_small(input, target) -> bool:
    """Whether these arguments are right, and few and plain enough; asks nothing of options. Not for
    compiled graphs."""
    if (type(input) is not Tensor and type(input) is not Parameter) or type(target) is not Tensor:
        return False
    return (
        input.dtype is torch.float32
        and input.is_cpu
        and input.layout is torch.strided
        and 0 < input.numel() <= _MOST_LOGITS
        and input.dim() == 2
        and input.is_contiguous()
        and target.dtype in _LABELS
        and target.is_cpu
        and target.layout is torch.strided
        and target.shape == input.shape[:1]
        and target.is_contiguous()
        and not (_dispatch_modes() or _function_modes() or _is_tracing())
        and not (functorch_active() or forward_ad_active() or saved_tensor_hooks_active())
        and not (input.is_neg() or input._is_zerotensor())
        and backends.forced() in (None, "cpu")
    )


def _run(input, target, ignore_index, mean, grad) -> Tensor:
    rows, classes = input.shape
    loss = input.new_empty(())
    _C.small_row_softmax(
        rows, classes, input.data_ptr(), target.data_ptr(), DTYPE_CODES[target.dtype],
        ignore_index, mean, loss.data_ptr(), 0 if grad is None else grad.data_ptr(),
    )  # fmt: skip
    return loss


class _SmallRowSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, ignore_index, mean):
        ctx.early_grad = torch.empty_like(input)
        ctx.save_for_backward(input, target)
        ctx.ignore_index, ctx.mean = ignore_index, mean
        return _run(input, target, ignore_index, mean, ctx.early_grad)

    @staticmethod
    def backward(ctx, grad_loss):
        found = early_gradient(ctx, grad_loss)
        if found is None:
            found = _by_the_op(ctx, grad_loss)
        return found, None, None, None


def _by_the_op(ctx, grad_loss) -> Tensor:
    """The gradient for those who ask again, or for a derivative of it."""
    tensors = (*ctx.saved_tensors, None, None, None, None)
    reduction = REDUCTIONS["mean" if ctx.mean else "sum"]
    ctx.options, ctx.codes = None, tuple(Codes(INDEX, ctx.ignore_index, COMP_SUM, reduction, 0))
    ctx.inplace = ctx.soft = False
    with torch.no_grad():
        saved = torch.ops.pyloss.row_softmax_fwd(*tensors, None, ctx.codes, torch.float32, 0)[1]
    return gradients(ctx, grad_loss, None, tensors, saved, None)[0]


def small_row_softmax(input, target, ignore_index: int, mean: bool) -> Tensor:
    """Mean or sum of the cross entropy; for arguments that are small."""
    if input.requires_grad and torch.is_grad_enabled():
        return _SmallRowSoftmax.apply(input, target, ignore_index, mean)
    return _run(input, target, ignore_index, mean, None)
