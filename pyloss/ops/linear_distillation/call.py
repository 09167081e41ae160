"""What a call of linear_distillation is: its numbers, its choices, its results."""

from __future__ import annotations

from typing import NamedTuple

from pyloss.ops._launch import accumulator_dtype

DIRECTIONS = {"forward": 0, "reverse": 1, "jsd": 2}
REDUCTIONS = ("none", "mean", "sum", "batchmean")
# Bits of what a pass returns, in this order.
VALUE, GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4, 8


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


def outputs(student, weight, wants):
    """Zeros for (values, gradients of hidden states, weight, bias), None where not wanted."""
    acc = accumulator_dtype(student.dtype)
    # Zeros: ignored rows are never written, and the rest is added up.
    return (
        student.new_zeros(student.shape[0], dtype=acc) if wants & VALUE else None,
        student.new_zeros(student.shape) if wants & GRAD_HIDDEN else None,
        student.new_zeros(weight.shape, dtype=acc) if wants & GRAD_WEIGHT else None,
        student.new_zeros(weight.shape[0], dtype=acc) if wants & GRAD_BIAS else None,
    )
