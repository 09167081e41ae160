"""A pass over the rows by chunks, for every device: torch operations, and the products of _gemm."""

from __future__ import annotations

import math

import torch

from pyloss.ops._gemm import product
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.linear_distillation.call import (
    DIRECTIONS,
    GRAD_BIAS,
    GRAD_HIDDEN,
    GRAD_WEIGHT,
    Codes,
    Options,
    outputs,
)

# Elements of a block between the products: its handful of temporaries should stay in cache on a
# CPU, and only be small beside the chunks elsewhere.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_ELSEWHERE = 2**25


def auto_chunk(device_type: str, classes: int) -> int:
    """Rows of logits that exist at a time."""
    # CPU: products of 256 to 512 rows run at nearly full speed. GPU: they need more.
    budget, low, high = (2**23, 256, 512) if device_type == "cpu" else (2**27, 512, 4096)
    return min(max(budget // max(classes, 1) // 16 * 16, low), high)


def forward(
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
            return forward(
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

    bias, teacher_bias = (b if b is None else b.contiguous() for b in (bias, teacher_bias))
    chunk = min(c.chunk, max(count, 1))
    student_logits = student.new_empty((chunk, classes))
    teacher_logits = teacher.new_empty((chunk, classes))
    values, grad_hidden, grad_weight, grad_bias = outputs(student, weight, wants)
    narrow = None
    if grad_weight is not None and acc != student.dtype:
        narrow = torch.empty_like(weight)
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
                product(x, weight, grad_hidden[part])
            else:
                of_rows = grad_hidden.new_empty((stop - start, grad_hidden.shape[1]))
                product(x, weight, of_rows)
                grad_hidden[part] = of_rows
        if grad_weight is not None:
            if narrow is None:
                product(x.t(), h, grad_weight, add=True)
            else:
                grad_weight.add_(torch.mm(x.t(), h, out=narrow))
        if grad_bias is not None:
            grad_bias.add_(x.sum(0, dtype=acc))
    return [t for t in (values, grad_hidden, grad_weight, grad_bias) if t is not None]


def _linear(h, weight, bias, out):
    product(h, weight.t(), out, bias=bias)
    return out


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
