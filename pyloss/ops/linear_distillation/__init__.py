"""Distillation through two linear heads: divergence of student and teacher, by chunks of rows.

With P and Q the softmax of the teacher's and the student's logits over the temperature, M = b P +
(1 - b) Q, and x the student's logits, the rows and their gradients with respect to x / temperature:

    forward  sum P (log P - log Q)                             Q - P
    reverse  sum Q (log Q - log P)                             Q (log Q - log P - value)
    jsd      b sum P (log P - log M) + (1-b) sum Q (log Q - log M)
                                             (1-b) Q (log Q - log M - sum Q (log Q - log M))

The products run over some hundred rows, which they need to be fast; what lies between them runs
over a few of these rows at a time, which stay in cache. So the memory is two chunks of logits, in
the inputs' dtypes, the student's of which becomes the gradient, and some small blocks in float32.

One op does a pass over the rows and returns any of values and gradients. Its products are those of
_gemm, the rest is torch operations, so that it serves every device; being an op, torch.compile
takes it whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops import _shards
from pyloss.ops._changing import NUMBERS, split
from pyloss.ops._empty import scale_
from pyloss.ops._flops import count_by
from pyloss.ops._registry import lib, plain_forms, register_fake
from pyloss.ops._transforms import (
    distinct,
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)
from pyloss.ops.linear_distillation import by_chunks, reference
from pyloss.ops.linear_distillation.by_chunks import auto_chunk
from pyloss.ops.linear_distillation.call import (
    DIRECTIONS,
    GRAD_BIAS,
    GRAD_HIDDEN,
    GRAD_WEIGHT,
    REDUCTIONS,
    VALUE,
    Codes,
    Options,
    outputs,
)
from pyloss.ops.row_softmax import known

__all__ = [
    "DIRECTIONS",
    "REDUCTIONS",
    "VALUE",
    "Codes",
    "Options",
    "auto_chunk",
    "linear_distillation",
]

# Dtypes whose gradient may be formed in the forward. Not float16: its range needs the upstream
# factor (a loss scale) before rounding.
_EARLY_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _forward(*args):
    if len(args) > 11 and args[11] is not None:  # the numbers take the options' place
        args = (*args[:8], args[11].tolist(), *args[9:])
    args = args[:11]
    if backends.forced() == "reference":
        return reference.forward(*args)
    return by_chunks.forward(*args)


def _pass_fake(student, weight, bias, *rest):
    return [t for t in outputs(student, weight, rest[7]) if t is not None]


# Not by define_op: one implementation serves every device.
lib.define(
    "linear_distillation(Tensor student, Tensor weight, Tensor? bias, Tensor teacher, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, Tensor? scale, float[] options, "
    f"int[] codes, int wants, {NUMBERS}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.impl("linear_distillation", _forward, "CompositeExplicitAutograd")
register_fake("linear_distillation", _pass_fake)
_shards.add(lib, "linear_distillation", "its sums and gradients are of all rows")
plain_forms["linear_distillation"] = lambda *args: reference.forward(*args[:11])


def _flops(student, weight, bias, teacher, *rest, out_shape=None) -> int:
    """Of both models' logits, and of the gradients that are wanted; all rows, ignored ones too."""
    wants = rest[6]
    grads = bool(wants & GRAD_HIDDEN) + bool(wants & GRAD_WEIGHT)
    return 2 * student[0] * weight[0] * (teacher[1] + student[1] * (1 + grads))


count_by("linear_distillation", _flops)


class _LinearDistillation(torch.autograd.Function):
    """Sum of the rows over `divisor`, or the rows themselves when that is None."""

    @staticmethod
    def forward(ctx, student, weight, bias, teacher, teacher_weight, teacher_bias, target, divisor,
                call):  # fmt: skip
        options, codes, numbers = call
        # An upstream scalar can be multiplied in later; a row's own upstream gradient cannot.
        # Checkpointing and offloading hook what is saved, and would not see the early gradients;
        # nor would torch.compile.
        early = 0
        if divisor is not None and student.dtype in _EARLY_DTYPES:
            if not torch.compiler.is_compiling() and not saved_tensor_hooks_active():
                early = _wanted(ctx)
        tensors = (student, weight, bias, teacher, teacher_weight, teacher_bias, target)
        scale = _inverse(divisor) if early else None
        rows, *grads = torch.ops.pyloss.linear_distillation(
            *tensors, scale, options, codes, VALUE | early, numbers
        )
        ctx.options, ctx.codes, ctx.dtype = options, codes, student.dtype
        # Not among the saved ones: they are handed over, and a second backward starts anew.
        ctx.early = grads if early else None
        ctx.save_for_backward(*map(_normal, tensors), divisor, numbers)
        return rows if divisor is None else rows.sum() / divisor

    @staticmethod
    def backward(ctx, grad):
        early, ctx.early = ctx.early, None
        create_graph = torch.is_grad_enabled()
        none = (None,) * 6
        if early is not None and not (create_graph or is_batched(grad)):
            factor = known(grad)
            if factor is None or math.isfinite(factor):
                if factor != 1.0:
                    early = [scale_(g, grad) for g in early]
                return *_narrowed(ctx, iter(early)), *none
        *tensors, divisor, numbers = ctx.saved_tensors  # once: checkpointing allows no more
        scale = grad if divisor is None else grad * _inverse(divisor)
        # Of higher order; and vmap sees into torch operations, not into an op.
        if create_graph or is_batched(grad):
            needed = ctx.needs_input_grad[:3]
            return *reference.gradients_of(
                tensors, scale, ctx.options, ctx.codes, needed, create_graph=create_graph
            ), *none  # fmt: skip
        found = torch.ops.pyloss.linear_distillation(
            *tensors, scale, ctx.options, ctx.codes, _wanted(ctx), numbers
        )
        return *_narrowed(ctx, iter(found)), *none


def _narrowed(ctx, found):
    """Gradients from the accumulator's dtype to that of the student."""
    return [next(found).to(ctx.dtype) if yes else None for yes in ctx.needs_input_grad[:3]]


def _wanted(ctx):
    bits = (GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS)
    return sum(bit for bit, needed in zip(bits, ctx.needs_input_grad) if needed)


def _inverse(divisor):
    """1 / divisor, 0 for 0: without rows there is no gradient."""
    return torch.where(divisor == 0, 0.0, 1.0 / divisor)


def _normal(t):
    """A tensor made under inference_mode, as a teacher's often is, cannot be saved."""
    return t if t is None or torch.compiler.is_compiling() or not t.is_inference() else t.clone()


def linear_distillation(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    divisor: Tensor | None,
    options: Options,
    codes: Codes,
) -> Tensor:
    """The sum of the rows' values over `divisor` (0-d, accumulator's dtype); None: all values.

    student (N, D), weight (V, D), teacher (N, E), teacher_weight (V, E), target (N,).
    Differentiable in the first three.
    """
    tensors = (student, weight, bias, teacher, teacher_weight, teacher_bias, target)
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        rows = reference.composed(*tensors, options, codes)
        return rows if divisor is None else rows.sum() / divisor
    numbers = None
    if torch.compiler.is_compiling():
        options, numbers = split(options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3]):
        call = (tuple(options), tuple(codes), numbers)
        return _LinearDistillation.apply(*distinct((*tensors, divisor)), call)
    (rows,) = torch.ops.pyloss.linear_distillation(*tensors, None, options, codes, VALUE, numbers)
    return rows if divisor is None else rows.sum() / divisor
