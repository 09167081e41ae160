"""The row-softmax op: registration, the call into the kernels, and autograd around it.

Formulas and the meaning of every packed value stand in csrc/common/row_softmax.h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype, address
from pyloss.ops._reference import gradients
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)

INDEX, MIX, DENSE = 0, 1, 2
COMP_SUM, FOCAL = 0, 1
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# Dtypes whose gradient may be written in the forward and scaled afterwards. Not float16, whose
# range needs the upstream factor (a loss scale) before rounding; not float64, where a second
# backward must give the same bits for gradcheck.
_EARLY_DTYPES = (torch.float32, torch.bfloat16)
# Bytes of a row (as float32) up to which the gradient is written in the forward: the row must still
# be in cache, or on chip, when its statistics are known.
_CACHED_ROW_BYTES = {"cpu": 512 * 1024, "cuda": 128 * 1024}


class Options(NamedTuple):
    """The numbers of a call, in the order of the C++ decoder."""

    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    tau: float = 1.0
    max_nll: float = math.inf  # -log(truncate)
    gamma: float = 0.0
    z_loss: float = 0.0
    smoothing: float = 0.0
    num_items: float = 0.0  # 0: count the rows


class Codes(NamedTuple):
    """The discrete choices of a call."""

    kind: int
    ignore_index: int
    loss: int
    reduction: int
    zero_if_empty: int


PLAIN = Options()
# Bits of what a forward returns besides (loss, saved).
WANT_EXTRAS, WANT_INDEX, WANT_GRAD = 1, 2, 4
EXTRA_ROWS = 4
LABEL_STATS = ("logprob", "rank")  # statistics that probabilities do not have


def is_soft(kind: int, options) -> bool:
    """Whether the gradient needs a sum over all classes of r_c p_c^(tau-1)."""
    smoothing, tau = options[7], options[3]
    return kind == DENSE or (smoothing > 0 and tau != 1)


# --------------------------------------------------------------------------------------------------
# Layout


def _merged_inner(x: Tensor) -> int | None:
    """The stride of dimensions 2.. taken as one, or None when they do not lie evenly."""
    stride, expected = 0, None
    for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride if expected is not None else 1


def _layout(x: Tensor) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """x, copied only when its trailing dimensions do not lie evenly, as (outer, classes, inner)."""
    if x.dim() == 2:
        (rows, classes), (row_step, class_step) = x.shape, x.stride()
        return x, (1, classes, rows), (0, class_step, row_step)
    if x.dim() == 1:
        return x, (1, x.shape[0], 1), (0, x.stride(0), 0)
    inner = _merged_inner(x)
    if inner is None:
        x = x.contiguous()
        inner = 1
    return x, (x.shape[0], x.shape[1], math.prod(x.shape[2:])), (x.stride(0), x.stride(1), inner)


_NO_TENSORS = (None,) * 4


def _problem(input, target, target2, mix, weight, token_weight, codes):
    """The integers that describe a call to C++; and the tensors that must outlive it."""
    x, sizes, strides = _layout(input)
    target_strides = (0, 0, 0)
    if codes[0] == DENSE:
        target, _, target_strides = _layout(target)
    else:
        target = target.contiguous()
    small = (target2, mix, weight, token_weight)
    if target2 is mix is weight is token_weight is None:
        small = _NO_TENSORS
    else:
        small = tuple(t if t is None else t.contiguous() for t in small)
    problem = (
        *sizes,
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        *strides,
        codes[0],
        target.data_ptr(),
        DTYPE_CODES[target.dtype],
        *target_strides,
        *((0, 0, 0, 0) if small is _NO_TENSORS else map(address, small)),
        *codes[1:],
    )
    return problem, (x, target, *small)


def _gradient_buffer(input: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """The result tensor, and the tensor and strides that the kernel writes (often the same)."""
    result = torch.empty_like(input)
    buffer, _, strides = _layout(result)
    if buffer is not result:
        buffer = torch.empty_like(buffer)
    return result, buffer, strides


def _row_count(input: Tensor) -> int:
    if input.dim() == 2:
        return input.shape[0]
    return 1 if input.dim() == 1 else input.shape[0] * math.prod(input.shape[2:])


def _row_shape(input: Tensor) -> tuple[int, ...]:
    return () if input.dim() == 1 else (input.shape[0], *input.shape[2:])


# `saved`, one buffer of a forward: 3 elements for norm, then the rows of stats, then of extras.
# One allocation instead of three: they cost as much as a small call's arithmetic.
_NORM = 3


def _stat_rows(codes, options) -> int:
    return 6 if codes[0] == MIX or is_soft(codes[0], options) else 4


def _outputs(input, options, codes, loss_dtype, wants):
    """Empty (loss, saved, index) of the forward; shared by the kernels and the fake."""
    rows = _row_count(input)
    height = _stat_rows(codes, options) + (EXTRA_ROWS if wants & WANT_EXTRAS else 0)
    loss_shape = _row_shape(input) if codes[3] == REDUCTIONS["none"] else ()
    return (
        input.new_empty(loss_shape, dtype=loss_dtype),
        input.new_empty(_NORM + height * rows, dtype=accumulator_dtype(input.dtype)),
        input.new_empty((2, rows), dtype=torch.int64) if wants & WANT_INDEX else None,
    )


def _listed(loss, saved, index, grad):
    """The op's result: a list of what was asked for, in this order."""
    return [t for t in (loss, saved, index, grad) if t is not None]


def _unlisted(found, wants):
    loss, saved, *rest = found
    index = rest.pop(0) if wants & WANT_INDEX else None
    return loss, saved, index, rest[0] if wants & WANT_GRAD else None


def _extras(saved, rows):
    """View of the extras, the last rows of `saved`."""
    return saved[saved.shape[0] - EXTRA_ROWS * rows :].view(EXTRA_ROWS, rows)


def _parts(saved, rows, codes, options, with_extras):
    """Addresses of (stats, norm, extras)."""
    base, size = saved.data_ptr(), saved.element_size()
    stats = base + _NORM * size
    extras = stats + _stat_rows(codes, options) * rows * size if with_extras else 0
    return stats, base, extras


# --------------------------------------------------------------------------------------------------
# Forward


def _forward_fake(
    input, target, target2, mix, weight, token_weight, options, codes, loss_dtype, wants
):
    outputs = _outputs(input, options or PLAIN, codes, loss_dtype, wants)
    return _listed(*outputs, torch.empty_like(input) if wants & WANT_GRAD else None)


def launch_forward(cuda, tensors, options, codes, loss, saved, index, with_extras, buffer, strides):
    """Runs the kernel on checked tensors into the given buffers.

    Args:
        tensors: (input, target, target2, mix, weight, token_weight).
        saved: laid out as described above, for as many rows as `tensors` have.
        buffer, strides: where the gradient for an upstream 1 goes, or None; may be the input, whose
            rows are read before they are overwritten.
    """
    options = options or PLAIN
    problem, alive = _problem(*tensors, codes)
    stats, norm, extras = _parts(saved, problem[0] * problem[2], codes, options, with_extras)
    args = (
        problem,
        options,
        loss.data_ptr(),
        DTYPE_CODES[loss.dtype],
        stats,
        norm,
        extras,
        address(index),
        address(buffer),
        strides,
    )
    if cuda:
        input = tensors[0]
        with torch.cuda.device_of(input):
            nbytes = _C.cuda_row_softmax_scratch_bytes(problem, options)
            scratch = input.new_empty((nbytes,), dtype=torch.uint8)
            _C.cuda_row_softmax_fwd(*args, scratch.data_ptr(), nbytes, _stream(input))
    else:
        _C.row_softmax_fwd(*args, torch.get_num_threads())
    del alive


def _forward_kernel(cuda: bool):
    def forward(
        input, target, target2, mix, weight, token_weight, options, codes, loss_dtype, wants
    ):
        loss, saved, index = _outputs(input, options or PLAIN, codes, loss_dtype, wants)
        result, buffer, strides = None, None, (0, 0, 0)
        if wants & WANT_GRAD:
            result, buffer, strides = _gradient_buffer(input)
        tensors = (input, target, target2, mix, weight, token_weight)
        launch_forward(
            cuda, tensors, options, codes, loss, saved, index, wants & WANT_EXTRAS, buffer, strides
        )
        if buffer is not result:
            result.copy_(buffer)
        return _listed(loss, saved, index, result)

    return forward


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _reference_kwargs(target, target2, mix, weight, token_weight, options, codes):
    """The arguments of a call in the words of the reference."""
    o, c = Options(*(options or PLAIN)), Codes(*codes)
    return dict(
        target=(target, target2, mix) if c.kind == MIX else target,
        weight=weight,
        ignore_index=c.ignore_index,
        reduction=next(k for k, v in REDUCTIONS.items() if v == c.reduction),
        label_smoothing=o.smoothing,
        tau=o.tau,
        truncate=None if o.max_nll == math.inf else math.exp(-o.max_nll),
        gamma=o.gamma if c.loss == FOCAL else None,
        z_loss=o.z_loss,
        softcap=o.softcap or None,
        logit_scale=o.logit_scale,
        temperature=o.temperature,
        token_weight=token_weight,
        num_items=o.num_items or None,
        empty="zero" if c.zero_if_empty else "nan",
    )


def _reference(input, kwargs, wants, labels):
    """(loss, extras, index) of the reference; what was not asked for is None."""
    extra_names = ("lse", "logprob", "entropy", "z_loss") if wants & WANT_EXTRAS else ()
    index_names = ("argmax", "rank") if wants & WANT_INDEX else ()
    names = [n for n in (*extra_names, *index_names) if labels or n not in LABEL_STATS]
    from pyloss.reference.row_softmax import row_softmax  # with its first use

    found = row_softmax(input, **kwargs, return_stats=names)
    if not names:  # then it returns the loss alone
        return found, None, None
    loss, stats = found

    def rows(wanted):
        if not wanted:
            return None
        zero = torch.zeros_like(stats[wanted[0]])
        return torch.stack([stats.get(n, zero).flatten() for n in wanted])

    return loss, rows(extra_names), rows(index_names)


def _forward_reference(
    input, target, target2, mix, weight, token_weight, options, codes, loss_dtype, wants
):
    tensors = (target, target2, mix, weight, token_weight)
    kwargs = _reference_kwargs(*tensors, options, codes)
    loss, saved, index = _outputs(input, options or PLAIN, codes, loss_dtype, wants)
    with torch.no_grad():
        found = _reference(input, kwargs, wants, codes[0] != DENSE)
        loss.copy_(found[0])
        saved.zero_()  # the reference's backward starts from the logits again
        if found[1] is not None:
            _extras(saved, found[1].shape[1]).copy_(found[1])
        if index is not None:
            index.copy_(found[2])
    grad = None
    if wants & WANT_GRAD:
        one = torch.ones((), dtype=saved.dtype, device=input.device)
        grad = _reference_gradient(one, None, input, *tensors, options, codes)[0]
    return _listed(loss, saved, index, grad)


def _reference_gradient(
    grad_loss, grad_extras, input, target, target2, mix, weight, token_weight, options, codes,
    wrt=(True, False), create_graph=False,
):  # fmt: skip
    """Gradients of the reference with respect to (logits, probabilities), None where not wanted.

    With `create_graph` they are functions of the given tensors, to any order.
    """
    rest = (target2, mix, weight, token_weight, options, codes)
    wants = WANT_EXTRAS if grad_extras is not None else 0

    def found(input, target):
        kwargs = _reference_kwargs(target, *rest)
        kwargs["loss_dtype"] = accumulator_dtype(input.dtype)
        loss, extras, _ = _reference(input, kwargs, wants, codes[0] != DENSE)
        return loss, None if extras is None else extras[:3]

    cotangents = (grad_loss, None if grad_extras is None else grad_extras[:3])
    return gradients(found, (input, target), cotangents, wrt, create_graph=create_graph)


_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? target2, Tensor? mix, Tensor? weight, "
    "Tensor? token_weight"
)

define_op(
    f"row_softmax_fwd({_ARGUMENTS}, float[]? options, int[] codes, ScalarType loss_dtype, "
    "int wants) -> Tensor[]",
    fake=_forward_fake,
    impls={
        "cpu": _forward_kernel(cuda=False),
        "cuda": _forward_kernel(cuda=True),
        "reference": _forward_reference,
    },
)

# --------------------------------------------------------------------------------------------------
# Backward


def _backward_arguments(
    grad_loss, grad_extras, input, target, target2, mix, weight, token_weight, saved, options,
    codes, buffer, strides,
):  # fmt: skip
    """The common arguments of the backward kernels; and the tensors that must outlive the call."""
    options = options or PLAIN
    problem, alive = _problem(input, target, target2, mix, weight, token_weight, codes)
    grad_loss = grad_loss.contiguous()
    grad_extras = None if grad_extras is None else grad_extras.contiguous()
    stats, norm, extras = _parts(
        saved, problem[0] * problem[2], codes, options, grad_extras is not None
    )
    args = (
        problem,
        options,
        grad_loss.data_ptr(),
        address(grad_extras),
        stats,
        norm,
        extras,
        buffer.data_ptr(),
        strides,
    )
    return args, (alive, grad_loss, grad_extras)


def launch_backward(cuda, *arguments):
    """Runs the kernel; the arguments are those of _backward_arguments."""
    args, alive = _backward_arguments(*arguments)
    if cuda:
        input = arguments[2]
        with torch.cuda.device_of(input):
            _C.cuda_row_softmax_bwd(*args, _stream(input))
    else:
        _C.row_softmax_bwd(*args, torch.get_num_threads())
    del alive


def _backward_kernel(cuda: bool):
    def backward(grad_loss, grad_extras, input, *rest):
        result, buffer, strides = _gradient_buffer(input)
        launch_backward(cuda, grad_loss, grad_extras, input, *rest, buffer, strides)
        if buffer is not result:
            result.copy_(buffer)
        return result

    return backward


def _backward_reference(grad_loss, grad_extras, input, *rest):
    *tensors, _, options, codes = rest
    return _reference_gradient(grad_loss, grad_extras, input, *tensors, options, codes)[0]


def _backward_inplace_kernel(cuda: bool):
    def backward(grad_loss, grad_extras, input, *rest):
        buffer, _, strides = _layout(input)
        launch_backward(cuda, grad_loss, grad_extras, input, *rest, buffer, strides)
        if buffer is not input:
            input.copy_(buffer)

    return backward


def _backward_inplace_reference(*args):
    args[2].copy_(_backward_reference(*args))


_SAVED = "Tensor saved, float[]? options, int[] codes"

define_op(
    f"row_softmax_bwd(Tensor grad_loss, Tensor? grad_extras, {_ARGUMENTS}, {_SAVED}) -> Tensor",
    fake=lambda grad_loss, grad_extras, input, *rest: torch.empty_like(input),
    impls={
        "cpu": _backward_kernel(cuda=False),
        "cuda": _backward_kernel(cuda=True),
        "reference": _backward_reference,
    },
)
define_op(
    f"row_softmax_bwd_(Tensor grad_loss, Tensor? grad_extras, "
    f"{_ARGUMENTS.replace('Tensor input', 'Tensor(a!) input')}, {_SAVED}) -> ()",
    fake=lambda *args: None,
    impls={
        "cpu": _backward_inplace_kernel(cuda=False),
        "cuda": _backward_inplace_kernel(cuda=True),
        "reference": _backward_inplace_reference,
    },
)


def _scale_kernel(cuda: bool):
    def scale(data, factor):
        # Only ever the gradient that the forward has just allocated: dense, in some order.
        args = (data.data_ptr(), DTYPE_CODES[data.dtype], data.numel(), factor.data_ptr())
        if cuda:
            with torch.cuda.device_of(data):
                _C.cuda_scale_inplace(*args, _stream(data))
        else:
            _C.scale_inplace(*args, torch.get_num_threads())

    return scale


def _scale_reference(data, factor):
    data.mul_(factor)


define_op(
    "scale_(Tensor(a!) data, Tensor factor) -> ()",
    fake=lambda data, factor: None,
    impls={
        "cpu": _scale_kernel(cuda=False),
        "cuda": _scale_kernel(cuda=True),
        "reference": _scale_reference,
    },
)

# --------------------------------------------------------------------------------------------------
# Second derivative


def _hvp_fake(v, grad_loss, grad_extras, input, *rest):
    rows = _row_count(input)
    acc = accumulator_dtype(input.dtype)
    return (
        torch.empty_like(input),
        input.new_empty((rows,), dtype=acc),
        input.new_empty((3, rows) if grad_extras is not None else (0,), dtype=acc),
    )


def _hvp_kernel(cuda: bool):
    def hvp(v, grad_loss, grad_extras, input, *rest):
        _, grad_rows, grad_grad_extras = _hvp_fake(v, grad_loss, grad_extras, input)
        result, buffer, strides = _gradient_buffer(input)
        args, alive = _backward_arguments(grad_loss, grad_extras, input, *rest, buffer, strides)
        v, _, v_strides = _layout(v)
        args = (
            *args,
            v.data_ptr(),
            v_strides,
            grad_rows.data_ptr(),
            grad_grad_extras.data_ptr() if grad_extras is not None else 0,
        )
        if cuda:
            with torch.cuda.device_of(input):
                _C.cuda_row_softmax_hvp(*args, _stream(input))
        else:
            _C.row_softmax_hvp(*args, torch.get_num_threads())
        del alive
        if buffer is not result:
            result.copy_(buffer)
        return result, grad_rows, grad_grad_extras

    return hvp


def _hvp_reference(v, grad_loss, grad_extras, input, *rest):
    *tensors, saved, options, codes = rest
    rows, acc = _row_count(input), saved.dtype
    with torch.enable_grad():
        x = input.detach().requires_grad_()
        g = grad_loss.detach().requires_grad_()
        c = None if grad_extras is None else grad_extras.detach().requires_grad_()
        dx = _reference_gradient(g, c, x, *tensors, options, codes, create_graph=True)[0]
        found = torch.autograd.grad(dx, [x, g] if c is None else [x, g, c], v)
    grad_rows = found[1].to(acc).flatten()
    if codes[3] != REDUCTIONS["none"]:
        # The derivative of the one scalar, as if the first row had all of it.
        grad_rows = torch.cat([grad_rows, grad_rows.new_zeros(max(rows - 1, 0))])[:rows]
    return found[0], grad_rows, x.new_empty(0, dtype=acc) if c is None else found[2][:3].to(acc)


define_op(
    f"row_softmax_hvp(Tensor v, Tensor grad_loss, Tensor? grad_extras, {_ARGUMENTS}, {_SAVED}) "
    "-> (Tensor grad_input, Tensor grad_rows, Tensor grad_grad_extras)",
    fake=_hvp_fake,
    impls={
        "cpu": _hvp_kernel(cuda=False),
        "cuda": _hvp_kernel(cuda=True),
        "reference": _hvp_reference,
    },
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
        rowwise = ctx.codes.reduction == REDUCTIONS["none"]
        if grad_extras is not None:  # its last row is the z-loss, which has no gradient
            extras = torch.cat([extras, torch.zeros_like(grad_extras[3:])])
        return (
            rows.view(grad_loss.shape) if rowwise else rows.sum(),
            extras if grad_extras is not None else None,
            dx,
            *[None] * (len(saved) + 1),
        )


def _third_derivative(ctx, v):
    """The backward of _RowSoftmaxGrad as torch operations: it will be differentiated itself, by a
    third derivative or by the double-backward trick of a Hessian-vector product."""
    grad_loss, grad_extras, input, *tensors, _ = ctx.saved_tensors
    dx = _reference_gradient(
        grad_loss, grad_extras, input, *tensors, ctx.options, ctx.codes, create_graph=True
    )[0]
    asked = [t for t, yes in zip((grad_loss, grad_extras, input), ctx.needs_input_grad[:3]) if yes]
    found = iter(torch.autograd.grad(dx, asked, v, create_graph=True, allow_unused=True))
    grads = [next(found) if yes else None for yes in ctx.needs_input_grad[:3]]
    return (*grads, *[None] * (len(tensors) + 3))


class _RowSoftmax(torch.autograd.Function):
    """loss, or (loss, extras, index) with what was asked for, differentiable in the logits and the
    probabilities."""

    # What is no tensor comes as one tuple `call`: autograd looks at each argument.
    @staticmethod
    def forward(ctx, input, target, target2, mix, weight, token_weight, call):
        options, codes, loss_dtype, wants, inplace = call
        # An upstream scalar can be multiplied in later; a row's own upstream gradient cannot.
        if (
            not torch.compiler.is_compiling()
            and codes.reduction != REDUCTIONS["none"]
            and not wants & WANT_EXTRAS
            and not inplace
            and ctx.needs_input_grad[0]
            and input.dtype in _EARLY_DTYPES
            and input.shape[0 if input.dim() == 1 else 1] * 4
            <= _CACHED_ROW_BYTES.get(input.device.type, 0)
            # Checkpointing and offloading hook what is saved, and would not see this tensor.
            and not saved_tensor_hooks_active()
            and not forward_ad_active()
        ):
            wants |= WANT_GRAD
        tensors = (input, target, target2, mix, weight, token_weight)
        found = _ops.row_softmax_fwd(*tensors, options, codes, loss_dtype, wants)
        loss, saved, index, early = _unlisted(found, wants)
        ctx.save_for_backward(*tensors, saved)
        ctx.options, ctx.codes, ctx.inplace, ctx.wants = options, codes, inplace, wants
        ctx.loss_dtype = loss_dtype
        ctx.early_grad = early
        if index is not None:
            ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        extras = _extras(saved, _row_count(input)) if wants & WANT_EXTRAS else None
        if forward_ad_active():
            ctx.save_for_forward(*tensors, saved)
            extras = extras if extras is None else extras.clone()  # forward mode refuses the view
        present = _listed(loss, extras, index, None)
        return present[0] if len(present) == 1 else tuple(present)

    @staticmethod
    def backward(ctx, grad_loss, *others):
        none = (None,) * 5
        early, ctx.early_grad = ctx.early_grad, None
        if grad_loss is None and all(g is None for g in others):
            return None, None, *none
        if early is not None and not (
            torch.is_grad_enabled() or ctx.needs_input_grad[1] or is_batched(grad_loss)
        ):
            # Handed over, not kept: a second backward computes it anew, and autograd may adopt it.
            if not _is_one(grad_loss):
                _ops.scale_(early, grad_loss.float())
            return early, None, *none
        grad_extras = others[0] if ctx.wants & WANT_EXTRAS else None
        input, target, *rest = ctx.saved_tensors
        tensors = (input, target, *rest[:-1])
        options, codes = ctx.options, ctx.codes
        acc = accumulator_dtype(input.dtype)
        if grad_loss is None:
            shape = _row_shape(input) if codes.reduction == REDUCTIONS["none"] else ()
            grad_loss = torch.zeros(shape, dtype=acc, device=input.device)
        elif grad_loss.dtype != acc:
            grad_loss = grad_loss.to(acc)
        create_graph = torch.is_grad_enabled()
        arguments = (grad_loss, grad_extras, input, target, *rest, options, codes)
        need_input, need_target = ctx.needs_input_grad[:2]

        if ctx.inplace:
            if create_graph:
                raise RuntimeError("inplace=True cannot be used with create_graph=True")
            target_grad = None
            if need_target:  # before the logits are gone
                target_grad = _target_gradient(grad_loss, tensors, options, codes)
            return _inplace_gradient(arguments), target_grad, *none
        # Tangents flow through torch operations only, as do second derivatives of soft targets.
        if forward_ad_active() or (create_graph and is_soft(codes.kind, options or PLAIN)):
            found = _reference_gradient(
                grad_loss, grad_extras, *tensors, options, codes, (need_input, need_target),
                create_graph=True,
            )  # fmt: skip
            return *found, *none
        dx = target_grad = None
        if need_input:
            dx = (_RowSoftmaxGrad.apply if create_graph else _ops.row_softmax_bwd)(*arguments)
        if need_target:  # rare, so there is no kernel for it
            target_grad = _target_gradient(grad_loss, tensors, options, codes)
        return dx, target_grad, *none


class _DualRowSoftmax(_RowSoftmax):
    """With the forward-mode rule, in a class of its own: torch.compile refuses Functions that have
    one."""

    @staticmethod
    def jvp(ctx, input_t, target_t, *rest):
        input, target, *others = ctx.saved_tensors
        saved = others[-1]
        options, codes = ctx.options, ctx.codes
        class_dim = 0 if input.dim() == 1 else 1
        acc, rows = saved.dtype, _row_count(input)
        scalar = codes.reduction != REDUCTIONS["none"]
        one = torch.ones(() if scalar else _row_shape(input), dtype=acc, device=input.device)

        def gradient(grad_loss, grad_extras):
            return _ops.row_softmax_bwd(
                grad_loss, grad_extras, input, target, *others, options, codes
            )

        def along(grad, tangent):
            product = grad.to(acc) * tangent.to(acc)
            return product.sum() if scalar else product.sum(class_dim)

        loss_t = torch.zeros_like(one)
        if input_t is not None:
            loss_t = loss_t + along(gradient(one, None), input_t)
        if target_t is not None:
            tensors = (input, target, *others[:-1])
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


def _is_one(scalar: Tensor) -> bool:
    """Whether a scalar is known to be 1 without waiting for a device."""
    known = type(scalar) is Tensor and scalar.is_cpu and not torch.compiler.is_compiling()
    return known and scalar.item() == 1.0


def _inplace_gradient(arguments):
    grad_loss, grad_extras, saved_input, *rest = arguments
    input = saved_input.detach()
    _ops.row_softmax_bwd_(grad_loss, grad_extras, input, *rest)
    # Whoever else saved these logits must now raise instead of reading gradients.
    torch.autograd.graph.increment_version(saved_input)
    return input


def _target_gradient(grad_loss, tensors, options, codes):
    """Gradient for probability targets: g k w_c (1 - e) (p_c^(tau-1) - 1) / (1 - tau)."""
    return _reference_gradient(grad_loss, None, *tensors, options, codes, wrt=(False, True))[1]


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
        kwargs = dict(_reference_kwargs(*tensors[1:], options, codes), loss_dtype=loss_dtype)
        return _reference(input, kwargs, wants, codes.kind != DENSE)
    differentiable = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    dual = forward_ad_active()
    if differentiable or dual:
        run = _DualRowSoftmax if dual else _RowSoftmax
        call = (options, codes, loss_dtype, wants, inplace and differentiable)
        found = run.apply(*tensors, call)
        found = (found,) if wants == 0 else found
        extras = found[1] if wants & WANT_EXTRAS else None
        return found[0], extras, found[-1] if wants & WANT_INDEX else None
    loss, saved, index, _ = _unlisted(
        _ops.row_softmax_fwd(*tensors, options, codes, loss_dtype, wants), wants
    )
    return loss, _extras(saved, _row_count(input)) if wants & WANT_EXTRAS else None, index
