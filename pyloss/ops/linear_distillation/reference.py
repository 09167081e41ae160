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


def forward(
    student, weight, bias, teacher, teacher_weight, teacher_bias, target, scale, options, codes,
    wants,
):  # fmt: skip
    from pyloss.reference.linear_distillation import linear_distillation  # with its first use

    o, c = Options(*options), Codes(*codes)
    found = outputs(student, weight, wants)
    direction = next(k for k, v in DIRECTIONS.items() if v == c.direction)

    def rows(student, weight, bias):
        return linear_distillation(
            student, weight, teacher, teacher_weight, student_bias=bias, teacher_bias=teacher_bias,
            target=target, ignore_index=c.ignore_index, temperature=o.temperature, beta=o.beta,
            soft=o.soft, hard=o.hard, direction=direction,
        )  # fmt: skip

    layer = (student, weight, bias)
    if wants & VALUE:
        with torch.no_grad():
            found[0].copy_(rows(*layer))
    needed = [bool(wants & bit) for bit in (GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS)]
    if any(needed):
        upstream = scale.expand(student.shape[0])
        for to, grad in zip(found[1:], gradients(rows, layer, [upstream], needed)):
            if to is not None:
                to.copy_(grad)
    return [t for t in found if t is not None]
