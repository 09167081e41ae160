"""linear_distillation on the reference, the logits of both models whole."""

from __future__ import annotations

import torch

from pyloss.ops._reference import gradients
from pyloss.ops.linear_distillation.call import (
    DIRECTIONS,
    GRAD_BIAS,
    GRAD_HIDDEN,
    GRAD_WEIGHT,
    VALUE,
    Codes,
    Options,
    outputs,
)


def composed(student, weight, bias, teacher, teacher_weight, teacher_bias, target, options, codes):
    """The value of every row, in torch operations."""
    from pyloss.reference.linear_distillation import linear_distillation  # with its first use

    o, c = Options(*options), Codes(*codes)
    direction = next(k for k, v in DIRECTIONS.items() if v == c.direction)
    return linear_distillation(
        student, weight, teacher, teacher_weight, student_bias=bias, teacher_bias=teacher_bias,
        target=target, ignore_index=c.ignore_index, temperature=o.temperature, beta=o.beta,
        soft=o.soft, hard=o.hard, direction=direction,
    )  # fmt: skip


def gradients_of(tensors, upstream, options, codes, needed, create_graph=False):
    """Gradients of the student's tensors; `upstream` 0-d or one for each row."""

    def rows(*student):
        return composed(*student, *tensors[3:], options, codes)

    upstream = upstream.expand(tensors[0].shape[0])
    return gradients(rows, tensors[:3], [upstream], needed, create_graph=create_graph)


def forward(*args):
    tensors, (scale, options, codes, wants) = args[:7], args[7:]
    found = outputs(*tensors[:2], wants)
    if wants & VALUE:
        with torch.no_grad():
            found[0].copy_(composed(*tensors, options, codes))
    needed = [bool(wants & bit) for bit in (GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS)]
    if any(needed):
        for to, grad in zip(found[1:], gradients_of(tensors, scale, options, codes, needed)):
            if to is not None:
                to.copy_(grad)
    return [t for t in found if t is not None]
