"""The row-softmax op: registration, and autograd around it.

Formulas and the meaning of every packed value stand in csrc/common/row_softmax.h; what crosses to
C++ in records.py, what a forward saves in statistics.py. A loss is one case of an epilogue
(epilogue.py, loss_of_nll in C++).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyloss.ops._changing import NUMBERS, split
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)
from pyloss.ops.row_softmax import cpu, cuda, reference
from pyloss.ops.row_softmax.calls import (
    WANT_EXTRAS,
    WANT_GRAD,
    WANT_INDEX,
    hvp_outputs,
    listed,
    outputs,
    unlisted,
)
from pyloss.ops.row_softmax.layout import gradient_like, row_count, row_shape
from pyloss.ops.row_softmax.records import (
    COMP_SUM,
    DENSE,
    FOCAL,
    INDEX,
    LDR,
    MIX,
    PLAIN,
    POLY1,
    REDUCTIONS,
    RELAXED,
    Codes,
    Options,
    is_soft,
    unpacked,
)
from pyloss.ops.row_softmax.reference import composed_gradient
from pyloss.ops.row_softmax.statistics import EXTRA_ROWS, extras_of

__all__ = [
    "COMP_SUM",
    "DENSE",
    "EARLY_DTYPES",
    "EXTRA_ROWS",
    "FOCAL",
    "INDEX",
    "LDR",
    "MIX",
    "PLAIN",
    "POLY1",
    "REDUCTIONS",
    "RELAXED",
    "WANT_EXTRAS",
    "WANT_INDEX",
    "Codes",
    "Options",
    "early_gradient",
    "gradients",
    "known",
    "row_softmax",
]

# Dtypes whose gradient may be written in the forward and scaled afterwards. Not float16, whose
# range needs the upstream factor (a loss scale) before rounding; not float64, where a second
# backward must give the same bits for gradcheck.
EARLY_DTYPES = (torch.float32, torch.bfloat16)
# Bytes of a row (as float32) up to which the gradient is written in the forward: the row must still
# be in cache, or on chip, when its statistics are known.
_CACHED_ROW_BYTES = {"cpu": 512 * 1024, "cuda": 128 * 1024}

# --------------------------------------------------------------------------------------------------
# Registration


def _forward_fake(
    input, target, target2, mix, weight, token_weight, options, codes, loss_dtype, wants,
    numbers=None,
):  # fmt: skip
    loss, statistics, index = outputs(input, *unpacked(options, codes), loss_dtype, wants)
    grad = gradient_like(input) if wants & WANT_GRAD else None
    return listed(loss, statistics.saved, index, grad)


def _impls(name: str) -> dict:
    modules = {"cpu": cpu, "cuda": cuda, "reference": reference}
    return {backend: getattr(module, name) for backend, module in modules.items()}


_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? target2, Tensor? mix, Tensor? weight, "
    "Tensor? token_weight"
)
_SAVED = f"Tensor saved, float[]? options, int[] codes, {NUMBERS}"

_WHOLE = "the functions hand over what each process has, and add up themselves"

define_op(
    f"row_softmax_fwd({_ARGUMENTS}, float[]? options, int[] codes, ScalarType loss_dtype, "
    f"int wants, {NUMBERS}) -> Tensor[]",
    fake=_forward_fake,
    impls=_impls("forward"),
    shards=_WHOLE,
    plain=functools.partial(reference.forward, recorded=False),
)
define_op(
    f"row_softmax_bwd(Tensor grad_loss, Tensor? grad_extras, {_ARGUMENTS}, {_SAVED}) -> Tensor",
    fake=lambda grad_loss, grad_extras, input, *rest: gradient_like(input),
    impls=_impls("backward"),
    shards=_WHOLE,
)
define_op(
    f"row_softmax_bwd_(Tensor grad_loss, Tensor? grad_extras, "
    f"{_ARGUMENTS.replace('Tensor input', 'Tensor(a!) input')}, {_SAVED}) -> ()",
    fake=lambda *args: None,
    impls=_impls("backward_"),
    shards=_WHOLE,
)
define_op(
    "scale_(Tensor(a!) data, Tensor factor) -> ()",
    fake=lambda data, factor: None,
    impls=_impls("scale_"),
    shards="*, - ->",
)
define_op(
    f"row_softmax_hvp(Tensor v, Tensor grad_loss, Tensor? grad_extras, {_ARGUMENTS}, {_SAVED}) "
    "-> (Tensor grad_input, Tensor grad_rows, Tensor grad_grad_extras)",
    fake=lambda v, grad_loss, grad_extras, input, *rest: (
        gradient_like(input),
        *hvp_outputs(input, grad_extras),
    ),
    impls=_impls("hvp"),
    shards=_WHOLE,
)


def _target_grad(grad_loss, input, target, target2, mix, weight, token_weight, *rest):
    tensors = (target, target2, mix, weight, token_weight)
    return _target_gradient(grad_loss, (input, *tensors), *unpacked(*rest)).contiguous()


# For graphs, which cannot hold a call of torch.autograd.grad.
define_op(
    f"row_softmax_target_bwd(Tensor grad_loss, {_ARGUMENTS}, float[]? options, int[] codes, "
    f"{NUMBERS}) -> Tensor",
    fake=lambda grad_loss, input, target, *rest: target.new_empty(target.shape),
    impls=dict.fromkeys(("cpu", "cuda", "reference"), _target_grad),
    shards=_WHOLE,
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _RowSoftmaxGrad(torch.autograd.Function):
    """The backward as a differentiable function of the cotangents and the logits (labels only)."""

    @staticmethod
    def forward(ctx, grad_loss, grad_extras, input, *rest):
        *tensors, options, codes = rest
        ctx.save_for_backward(grad_loss, grad_extras, input, *tensors)
        ctx.options, ctx.codes = options, codes
        return _ops.row_softmax_bwd(grad_loss, grad_extras, input, *rest)

    @staticmethod
    def backward(ctx, v):
        grad_loss, grad_extras, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _third_derivative(ctx, v)
        dx, rows, extras = _ops.row_softmax_hvp(
            v, grad_loss, grad_extras, *saved, ctx.options, ctx.codes
        )
        if grad_extras is not None:  # its last row is the z-loss, which has no gradient
            extras = torch.cat([extras, torch.zeros_like(grad_extras[3:])])
        return (
            rows.view(grad_loss.shape) if grad_loss.dim() else rows.sum(),
            extras if grad_extras is not None else None,
            dx,
            *[None] * (len(saved) + 1),
        )


def _third_derivative(ctx, v):
    """The backward of _RowSoftmaxGrad as torch operations: it will be differentiated itself, by a
    third derivative or by the double-backward trick of a Hessian-vector product."""
    *given, target, target2, mix, weight, token_weight, _ = ctx.saved_tensors
    # Views: the cotangents may depend on the logits, and the derivatives here are partial ones.
    grad_loss, grad_extras, input = (t if t is None else t.view_as(t) for t in given)
    tensors = (target, target2, mix, weight, token_weight)
    dx = composed_gradient(
        grad_loss, grad_extras, input, *tensors, ctx.options, ctx.codes, create_graph=True
    )[0]
    asked = [t for t, yes in zip((grad_loss, grad_extras, input), ctx.needs_input_grad[:3]) if yes]
    found = iter(torch.autograd.grad(dx, asked, v, create_graph=True, allow_unused=True))
    grads = [next(found) if yes else None for yes in ctx.needs_input_grad[:3]]
    return (*grads, *[None] * (len(tensors) + 3))


class _RowSoftmax(torch.autograd.Function):
    """loss, or (loss, extras, index) with what was asked for, differentiable in the logits and the
    probabilities."""

    # What is no tensor comes as one tuple `call`: autograd looks at each argument. It holds plain
    # tuples: Dynamo does not take NamedTuples here in all versions of torch. The tensor of numbers,
    # which there is under torch.compile alone, is in it too.
    @staticmethod
    def forward(ctx, input, target, target2, mix, weight, token_weight, call):
        options, codes, loss_dtype, wants, inplace, scalar, soft, numbers = call
        # An upstream scalar can be multiplied in later; a row's own upstream gradient cannot.
        if (
            not torch.compiler.is_compiling()
            and scalar
            and not wants & WANT_EXTRAS
            and not inplace
            and ctx.needs_input_grad[0]
            and input.dtype in EARLY_DTYPES
            and input.shape[0 if input.dim() == 1 else 1] * 4
            <= _CACHED_ROW_BYTES.get(input.device.type, 0)
            # Checkpointing and offloading hook what is saved, and would not see this tensor.
            and not saved_tensor_hooks_active()
            and not forward_ad_active()
        ):
            wants |= WANT_GRAD
        tensors = (input, target, target2, mix, weight, token_weight)
        found = _ops.row_softmax_fwd(*tensors, options, codes, loss_dtype, wants, numbers)
        loss, saved, index, early = unlisted(found, wants)
        ctx.save_for_backward(*tensors, saved, numbers)
        ctx.options, ctx.codes, ctx.inplace, ctx.wants = options, codes, inplace, wants
        ctx.loss_dtype, ctx.scalar, ctx.soft = loss_dtype, scalar, soft
        ctx.early_grad = early
        if index is not None:
            ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        extras = extras_of(saved, row_count(input)) if wants & WANT_EXTRAS else None
        if forward_ad_active():
            ctx.save_for_forward(*tensors, saved, numbers)
            extras = extras if extras is None else extras.clone()  # forward mode refuses the view
        present = listed(loss, extras, index, None)
        return present[0] if len(present) == 1 else tuple(present)

    @staticmethod
    def backward(ctx, grad_loss, *others):
        none = (None,) * 5
        if grad_loss is None and all(g is None for g in others):
            ctx.early_grad = None
            return None, None, *none
        early = early_gradient(ctx, grad_loss)
        if early is not None:
            return early, None, *none
        grad_extras = others[0] if ctx.wants & WANT_EXTRAS else None
        *tensors, saved, numbers = ctx.saved_tensors
        if grad_loss is None:
            shape = () if ctx.scalar else row_shape(tensors[0])
            grad_loss = torch.zeros(shape, dtype=saved.dtype, device=saved.device)
        return *gradients(ctx, grad_loss, grad_extras, tensors, saved, numbers), *none


def early_gradient(ctx, grad_loss) -> Tensor | None:
    """The gradient that the forward has written, scaled; None where it does not serve."""
    early, ctx.early_grad = ctx.early_grad, None
    if early is None or (
        torch.is_grad_enabled() or ctx.needs_input_grad[1] or is_batched(grad_loss)
    ):
        return None
    factor = known(grad_loss)
    if factor is not None and not math.isfinite(factor):
        return None
    # Handed over, not kept: a second backward computes it anew, and autograd may adopt it.
    if factor != 1.0:
        _ops.scale_(early, grad_loss.float())
    return early


def gradients(ctx, grad_loss, grad_extras, tensors, saved, numbers):
    """Those of the logits and of the target, None where they are not needed."""
    input, options, codes = tensors[0], ctx.options, ctx.codes
    acc = accumulator_dtype(input.dtype)
    if grad_loss.dtype != acc:
        grad_loss = grad_loss.to(acc)
    create_graph = torch.is_grad_enabled()
    arguments = (grad_loss, grad_extras, *tensors, saved, options, codes)
    need_input, need_target = ctx.needs_input_grad[:2]

    if ctx.inplace:
        if create_graph:
            raise RuntimeError("inplace=True cannot be used with create_graph=True")
        target_grad = None
        if need_target:  # before the logits are gone
            target_grad = _target_gradient(grad_loss, tensors, options, codes)
        return _inplace_gradient(arguments), target_grad
    # Tangents flow through torch operations only, as do second derivatives of soft targets.
    if forward_ad_active() or (create_graph and ctx.soft):
        return composed_gradient(
            grad_loss, grad_extras, *tensors, options, codes, (need_input, need_target),
            create_graph=True,
        )  # fmt: skip
    dx = target_grad = None
    if need_input and create_graph:
        dx = _RowSoftmaxGrad.apply(*arguments)
    elif need_input:
        dx = _ops.row_softmax_bwd(*arguments, numbers)
    if need_target and torch.compiler.is_compiling():
        target_grad = _ops.row_softmax_target_bwd(grad_loss, *tensors, options, codes, numbers)
    elif need_target:  # rare, so there is no kernel for it
        target_grad = _target_gradient(grad_loss, tensors, options, codes)
    return dx, target_grad


class _DualRowSoftmax(_RowSoftmax):
    """With the forward-mode rule, in a class of its own: torch.compile refuses Functions that have
    one."""

    @staticmethod
    def jvp(ctx, input_t, target_t, *rest):
        *tensors, saved, _ = ctx.saved_tensors
        input, options, codes = tensors[0], ctx.options, ctx.codes
        class_dim = 0 if input.dim() == 1 else 1
        acc, rows = saved.dtype, row_count(input)
        scalar = ctx.scalar
        one = torch.ones(() if scalar else row_shape(input), dtype=acc, device=input.device)

        def gradient(grad_loss, grad_extras):
            return _ops.row_softmax_bwd(grad_loss, grad_extras, *tensors, saved, options, codes)

        def along(grad, tangent):
            product = grad.to(acc) * tangent.to(acc)
            return product.sum() if scalar else product.sum(class_dim)

        loss_t = torch.zeros_like(one)
        if input_t is not None:
            loss_t = loss_t + along(gradient(one, None), input_t)
        if target_t is not None:
            loss_t = loss_t + along(_target_gradient(one, tensors, options, codes), target_t)
        tangents = [loss_t.to(ctx.loss_dtype)]
        if ctx.wants & WANT_EXTRAS:
            extras_t = torch.zeros((EXTRA_ROWS, rows), dtype=acc, device=input.device)
            for i in range(3 if input_t is not None else 0):
                unit = torch.zeros_like(extras_t)
                unit[i] = 1
                dx = gradient(torch.zeros_like(one), unit)
                extras_t[i] = (dx.to(acc) * input_t.to(acc)).sum(class_dim).flatten()
            tangents.append(extras_t)
        if ctx.wants & WANT_INDEX:
            tangents.append(None)
        return tangents[0] if len(tangents) == 1 else tuple(tangents)


def known(scalar: Tensor) -> float | None:
    """The value of a scalar, where that is known without waiting for a device.

    An upstream factor that is known not to be finite is no factor for an early gradient: 0 may be a
    row that is ignored, which stays 0, or one that is certain, which does not.
    """
    if type(scalar) is Tensor and scalar.is_cpu and not torch.compiler.is_compiling():
        return scalar.item()
    return None


def _inplace_gradient(arguments):
    grad_loss, grad_extras, saved_input, *rest = arguments
    input = saved_input.detach()
    _ops.row_softmax_bwd_(grad_loss, grad_extras, input, *rest)
    # Whoever else saved these logits must now raise instead of reading gradients.
    torch.autograd.graph.increment_version(saved_input)
    return input


def _target_gradient(grad_loss, tensors, options, codes):
    """Gradient for probability targets: g k w_c (1 - e) (p_c^(tau-1) - 1) / (1 - tau)."""
    return composed_gradient(grad_loss, None, *tensors, options, codes, wrt=(False, True))[1]


def row_softmax(
    input: Tensor,
    target: Tensor,
    target2: Tensor | None,
    mix: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options | None,
    codes: Codes,
    loss_dtype: torch.dtype,
    wants: int,
    inplace: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, extras, index) of checked arguments; see csrc/common/row_softmax.h for their rows.

    Args:
        options: None for the plain loss, which saves its conversion.
        wants: WANT_EXTRAS | WANT_INDEX.
    """
    tensors = (input, target, target2, mix, weight, token_weight)
    if functorch_active():
        # torch.func transforms must see into the op: the same as torch operations.
        return reference.composed(input, tensors[1:], options, codes, loss_dtype, wants)
    numbers = None
    if options is not None and torch.compiler.is_compiling():
        options, numbers = split(options)
        options = Options(*options)
    differentiable = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    dual = forward_ad_active()
    if differentiable or dual:
        run = _DualRowSoftmax if dual else _RowSoftmax
        call = (
            options if options is None else tuple(options), tuple(codes), loss_dtype, wants,
            inplace and differentiable, codes.scalar, is_soft(codes.kind, options or PLAIN),
            numbers,
        )  # fmt: skip
        found = run.apply(*tensors, call)
        found = (found,) if wants == 0 else found
        extras = found[1] if wants & WANT_EXTRAS else None
        return found[0], extras, found[-1] if wants & WANT_INDEX else None
    loss, saved, index, _ = unlisted(
        _ops.row_softmax_fwd(*tensors, options, codes, loss_dtype, wants, numbers), wants
    )
    return loss, extras_of(saved, row_count(input)) if wants & WANT_EXTRAS else None, index
