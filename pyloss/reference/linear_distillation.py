"""Distillation through two linear heads written with ordinary PyTorch operations.

All logits are formed, in float64 or float32. With P and Q the softmax of the teacher's and the
student's logits over the temperature, the row is ``soft`` times the divergence of Q from P, plus
``hard`` times the cross entropy of the student's logits at temperature 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    soft: float = 1.0,
    hard: float = 0.0,
) -> Tensor:
    """The value of every row; see ``pyloss.functional.linear_distillation_loss``.

    A row whose target is ``ignore_index`` is 0 and may hold anything; one whose label does not
    exist is NaN where the cross entropy counts.

    Args:
        student_hidden: ``(N, D)``; student_weight ``(V, D)``, teacher_hidden ``(N, E)``,
            teacher_weight ``(V, E)``.
        target: labels ``(N)``, or None: every row counts.
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``, whose mixture has ``beta`` of P.
    """
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    ignored = torch.zeros(student_hidden.shape[:1], dtype=torch.bool, device=student_hidden.device)
    if target is not None:
        ignored = target == ignore_index

    def logits(hidden, weight, bias):
        hidden = torch.where(ignored.unsqueeze(-1), 0.0, hidden.to(dtype))
        return F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))

    x = logits(student_hidden, student_weight, student_bias)
    t = logits(teacher_hidden, teacher_weight, teacher_bias)
    log_q = torch.log_softmax(x / temperature, -1)
    log_p = torch.log_softmax(t / temperature, -1)
    if direction == "forward":
        divergence = _relative_entropy(log_p, log_q)
    elif direction == "reverse":
        divergence = _relative_entropy(log_q, log_p)
    elif direction == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_teacher, of_student = _relative_entropy(log_p, log_m), _relative_entropy(log_q, log_m)
        divergence = beta * of_teacher + (1 - beta) * of_student
    else:
        raise ValueError(f"{direction!r} is not a direction")
    row = soft * divergence
    if hard:
        inside = (target >= 0) & (target < x.shape[-1])
        label = torch.where(inside, target, 0).long().unsqueeze(-1)
        nll = -torch.log_softmax(x, -1).gather(-1, label).squeeze(-1)
        row = row + hard * torch.where(inside, nll, math.nan)
    return torch.where(ignored, 0.0, row)


def _relative_entropy(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``sum a (log a - log b)``, where classes that a excludes add nothing."""
    a = log_a.exp()
    none = a == 0
    ratio = torch.where(none, 0.0, log_a) - torch.where(none, 0.0, log_b)
    return (a * ratio).sum(-1)
