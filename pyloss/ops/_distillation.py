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

One op does a pass over the rows and returns any of values and gradients. It is torch operations
only and therefore serves every device; being an op, torch.compile takes it whole.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._registry import lib, register_fake
from pyloss.ops._transforms import is_batched, saved_tensor_hooks_active

DIRECTIONS = {"forward": 0, "reverse": 1, "jsd": 2}
REDUCTIONS = ("none", "mean", "sum", "batchmean")
# Bits of what a pass returns, in this order.
VALUE, GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4, 8

# Dtypes whose gradient may be formed in the forward. Not float16: its range needs the upstream
# factor (a loss scale) before rounding.
_EARLY_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Elements of a block between the products: its handful of temporaries should stay in cache on a
# CPU, and only be small beside the chunks elsewhere.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_ELSEWHERE = 2**25


class Options(NamedTuple):
    """The numbers of a call."""

    temperature: float
    beta: float  # weight of the teacher in the mixture of "jsd"
    soft: float  # factor of the divergence
    hard: float  # factor of the cross entropy


class Codes(NamedTuple):
    """The integers of a call."""

    direction: int
    ignore_index: int
    chunk: int


def auto_chunk(device_type: str, classes: int) -> int:
    """Rows of logits that exist at a time."""
    # CPU: products of 256 to 512 rows run at nearly full speed. GPU: they need more.
    budget, low, high = (2**23, 256, 512) if device_type == "cpu" else (2**27, 512, 4096)
    return min(max(budget // max(classes, 1) // 16 * 16, low), high)


def _pass(
    student,
    weight,
    bias,
    teacher,
    teacher_weight,
    teacher_bias,
    target,
    scale,
    options,
    codes,
    wants,
):
    """Values and gradients of all rows.

    `scale`, 0-d or one per row, multiplies the gradients before they are rounded, not the values.
    The gradients of weight and bias come in the accumulator's dtype.
    """
    if torch.is_autocast_enabled(student.device.type):
        # The caller has cast; a backward may run under another setting than its forward.
        with torch.autocast(student.device.type, enabled=False):
            return _pass(
                student, weight, bias, teacher, teacher_weight, teacher_bias, target, scale,
                options, codes, wants,
            )  # fmt: skip
    o, c = Options(*options), Codes(*codes)
    rows, classes = student.shape[0], weight.shape[0]
    acc = accumulator_dtype(student.dtype)
    want_grad = wants & (GRAD_HIDDEN | GRAD_WEIGHT | GRAD_BIAS)

    # Ignored rows are skipped where finding them costs no synchronisation; elsewhere they are
    # replaced by zeros, so that they are computed but nothing in them matters.
    index = valid = None
    if target is not None:
        valid = target != c.ignore_index
        if student.is_cpu:
            index, valid = valid.nonzero().squeeze(1), None
            index = None if index.shape[0] == rows else index
    count = rows if index is None else index.shape[0]

    chunk = min(c.chunk, max(count, 1))
    student_logits = student.new_empty((chunk, classes))
    teacher_logits = teacher.new_empty((chunk, classes))
    values, grad_hidden, grad_weight, grad_bias = _outputs(student, weight, wants)
    product = None
    if grad_weight is not None and acc != student.dtype:
        product = torch.empty_like(weight)
    block = max(1, _BLOCK_ELEMENTS.get(student.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // classes)

    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        part = slice(start, stop) if index is None else index[start:stop]
        h, g, y = student[part], teacher[part], None if target is None else target[part]
        s = scale if scale is None or scale.dim() == 0 else scale[part, None]
        keep = None
        if valid is not None:
            keep = valid[part, None]
            h, g = torch.where(keep, h, 0), torch.where(keep, g, 0)
        x = _linear(h, weight, bias, student_logits[: stop - start])
        t = _linear(g, teacher_weight, teacher_bias, teacher_logits[: stop - start])
        found = []
        for a in range(0, stop - start, block):
            sub = slice(a, a + block)
            value, grad = _rows(x[sub], t[sub], None if y is None else y[sub], acc, o, c, want_grad)
            found.append(value)
            if want_grad:
                grad = grad.mul_(s if s.dim() == 0 else s[sub])
                if keep is not None:
                    grad = grad.masked_fill_(~keep[sub], 0)
                x[sub] = grad
        if values is not None:
            value = torch.cat(found)
            values[part] = value if keep is None else torch.where(keep.squeeze(1), value, 0)
        if grad_hidden is not None:
            if index is None:
                torch.mm(x, weight, out=grad_hidden[part])
            else:
                grad_hidden[part] = torch.mm(x, weight)
        if grad_weight is not None:
            if product is None:
                grad_weight.addmm_(x.t(), h)
            else:
                grad_weight.add_(torch.mm(x.t(), h, out=product))
        if grad_bias is not None:
            grad_bias.add_(x.sum(0, dtype=acc))
    return [t for t in (values, grad_hidden, grad_weight, grad_bias) if t is not None]


def _linear(h, weight, bias, out):
    if bias is None:
        return torch.mm(h, weight.t(), out=out)
    return torch.addmm(bias, h, weight.t(), out=out)


def _rows(x, t, y, acc, o, c, want_grad):
    """(values, gradients with respect to the student's logits or None) of a block of rows.

    x, t: logits of student and teacher; y: labels or None. Zero times infinity is 0 here: a class
    that both exclude, or to which the distribution that weighs it gives nothing, adds nothing.
    """
    x, t = x.to(acc), t.to(acc)
    warm = o.temperature != 1
    log_q = torch.log_softmax(x / o.temperature if warm else x, -1)
    log_p = torch.log_softmax(t / o.temperature if warm else t, -1)
    grad = None
    if c.direction == DIRECTIONS["forward"]:
        p = log_p.exp()
        value = log_p.sub_(log_q).masked_fill_(p == 0, 0).mul_(p).sum(-1)
        if want_grad:
            grad = log_q.exp().sub_(p)
    elif c.direction == DIRECTIONS["reverse"]:
        q = log_q.exp()
        ratio = torch.sub(log_q, log_p, out=log_p).masked_fill_(q == 0, 0)
        value = (q * ratio).sum(-1)
        if want_grad:
            grad = ratio.sub_(value[:, None]).mul_(q)
    else:
        p, q = log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(log_p + math.log(o.beta), log_q + math.log1p(-o.beta))
        of_teacher = log_p.sub_(log_m).masked_fill_(p == 0, 0).mul_(p).sum(-1)
        ratio = torch.sub(log_q, log_m, out=log_m).masked_fill_(q == 0, 0)
        of_student = (q * ratio).sum(-1)
        value = o.beta * of_teacher + (1 - o.beta) * of_student
        if want_grad:
            grad = ratio.sub_(of_student[:, None]).mul_(q).mul_(1 - o.beta)
    value = value * o.soft
    if want_grad:
        grad.mul_(o.soft / o.temperature)

    if o.hard:
        log_hot = torch.log_softmax(x, -1) if warm else log_q
        classes = x.shape[1]
        inside = (y >= 0) & (y < classes)
        label = torch.where(inside, y, 0)[:, None].long()
        # Outside: NaN where nothing could be raised without a synchronisation. (The value of an
        # ignored row is dropped by the caller.)
        nll = torch.where(inside, -log_hot.gather(1, label).squeeze(1), math.nan)
        value = value + o.hard * nll
        if want_grad:
            hot = log_hot.exp()
            hot.scatter_add_(1, label, hot.new_full((), -1.0).expand(label.shape))
            grad.add_(hot, alpha=o.hard).masked_fill_(~inside[:, None], math.nan)
    return value, grad


def _outputs(student, weight, wants):
    acc = accumulator_dtype(student.dtype)
    # Zeros: ignored rows are never written, and the rest is added up.
    return (
        student.new_zeros(student.shape[0], dtype=acc) if wants & VALUE else None,
        student.new_zeros(student.shape) if wants & GRAD_HIDDEN else None,
        student.new_zeros(weight.shape, dtype=acc) if wants & GRAD_WEIGHT else None,
        student.new_zeros(weight.shape[0], dtype=acc) if wants & GRAD_BIAS else None,
    )


def _pass_fake(student, weight, bias, *rest):
    return [t for t in _outputs(student, weight, rest[-1]) if t is not None]


# Not by define_op: there is one implementation, and no backend to choose.
lib.define(
    "linear_distillation(Tensor student, Tensor weight, Tensor? bias, Tensor teacher, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, Tensor? scale, float[] options, "
    "int[] codes, int wants) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.impl("linear_distillation", _pass, "CompositeExplicitAutograd")
register_fake("linear_distillation", _pass_fake)


class _Distillation(torch.autograd.Function):
    """Sum of the rows over `divisor`, or the rows themselves when that is None."""

    @staticmethod
    def forward(ctx, student, weight, bias, teacher, teacher_weight, teacher_bias, target, divisor,
                call):  # fmt: skip
        options, codes = call
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
            *tensors, scale, options, codes, VALUE | early
        )
        ctx.options, ctx.codes, ctx.dtype = options, codes, student.dtype
        # Not among the saved ones: they are handed over, and a second backward starts anew.
        ctx.early = grads if early else None
        ctx.save_for_backward(*map(_normal, tensors), divisor)
        return rows if divisor is None else rows.sum() / divisor

    @staticmethod
    def backward(ctx, grad):
        early, ctx.early = ctx.early, None
        create_graph = torch.is_grad_enabled()
        tensors = divisor = None
        if early is None or create_graph or is_batched(grad):
            *tensors, divisor = ctx.saved_tensors  # once: checkpointing allows no more
        with torch.no_grad():
            if early is not None and not is_batched(grad):
                found = [g.mul_(grad) for g in early]
            else:
                scale = grad if divisor is None else grad * _inverse(divisor)
                found = torch.ops.pyloss.linear_distillation(
                    *tensors, scale, ctx.options, ctx.codes, _wanted(ctx)
                )
            found = iter(found)
            grads = [next(found).to(ctx.dtype) if yes else None for yes in ctx.needs_input_grad[:3]]
        if create_graph:
            grads = [g if g is None else _NoSecond.apply(g, grad, *tensors[:3]) for g in grads]
        return (*grads, *[None] * 6)


class _NoSecond(torch.autograd.Function):
    """A gradient that says no to being differentiated: as a constant it would be silently wrong."""

    @staticmethod
    def forward(ctx, grad, *depends_on):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "linear_distillation_loss has no second derivative (its gradient was asked for with "
            "create_graph=True)"
        )


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
    Differentiable once, in the first three.
    """
    tensors = (student, weight, bias, teacher, teacher_weight, teacher_bias, target)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3]):
        return _Distillation.apply(*tensors, divisor, (options, codes))
    (rows,) = torch.ops.pyloss.linear_distillation(*tensors, None, options, codes, VALUE)
    return rows if divisor is None else rows.sum() / divisor
