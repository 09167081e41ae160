"""What crosses to csrc/bind/row_softmax.cpp. Formulas: csrc/common/row_softmax.h."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, address
from pyloss.ops.row_softmax.layout import layout

# Kinds of target, kinds of loss.
INDEX, MIX, DENSE = 0, 1, 2
COMP_SUM, FOCAL, POLY1, RELAXED, LDR = range(5)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

Three = tuple[int, int, int]


class Options(NamedTuple):
    """The numbers of a call."""

    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    tau: float = 1.0
    max_nll: float = math.inf  # -log(truncate)
    gamma: float = 0.0
    poly1: float = 0.0
    relaxation: float = 0.0
    margin: float = 0.0  # taken from the label's z: one label only
    offset: float = 0.0  # of LDR: log(classes)
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

    @property
    def scalar(self) -> bool:
        """Whether there is one loss of all rows."""
        return self.reduction != REDUCTIONS["none"]


class Problem(NamedTuple):
    """A call; what is None is the address 0, strides are in elements."""

    sizes: Three  # outer, classes, inner
    dtype: int
    x: int
    x_strides: Three
    target: int
    target_dtype: int
    target_strides: Three  # of probabilities
    target2: int
    mix: int
    weight: int
    token_weight: int
    codes: Codes
    options: Options


class Forward(NamedTuple):
    """Where a forward writes."""

    loss: int
    loss_dtype: int
    stats: int
    norm: int
    extras: int
    index: int
    grad: int  # for an upstream 1
    grad_strides: Three


class Backward(NamedTuple):
    """What a backward reads besides the problem, and where it writes."""

    grad_loss: int
    grad_extras: int
    stats: int
    norm: int
    extras: int
    grad: int
    grad_strides: Three


class Hvp(NamedTuple):
    """What a second derivative has besides its backward."""

    v: int
    v_strides: Three
    grad_rows: int
    grad_grad_extras: int


RECORDS = (Options, Codes, Problem, Forward, Backward, Hvp)
PLAIN = Options()
NO_STRIDES = (0, 0, 0)

# new(Record, fields): the constructor of a NamedTuple is a Python function, twice as slow.
new = tuple.__new__


def unpacked(options, codes, numbers: Tensor | None = None) -> tuple[Options, Codes]:
    """From the lists of an op's schema; a tensor `numbers` takes the place of the options."""
    if numbers is not None:
        options = numbers.tolist()
    return PLAIN if options is None else new(Options, options), new(Codes, codes)


def unpacked_saved(rest) -> tuple[tuple[Tensor | None, ...], Tensor, Options, Codes]:
    """(labels, saved, options, codes) from what an op gets after the logits."""
    return (rest[:5], rest[5], *unpacked(*rest[6:]))


def is_soft(kind: int, options: Options) -> bool:
    """Whether the gradient needs a sum over all classes of r_c p_c^(tau-1)."""
    return kind == DENSE or (options.smoothing > 0 and options.tau != 1)


def problem(tensors, options: Options, codes: Codes) -> tuple[Problem, tuple[Tensor | None, ...]]:
    """The record of (input, target, target2, mix, weight, token_weight); and the tensors that must
    outlive the call."""
    input, target, target2, mix, weight, token_weight = tensors
    x, sizes, strides = layout(input)
    if codes.kind == DENSE:
        target, _, target_strides = layout(target)
    else:
        target, target_strides = target.contiguous(), NO_STRIDES
    if target2 is mix is weight is token_weight is None:
        small, addresses = (), (0, 0, 0, 0)
    else:
        small = (target2, mix, weight, token_weight)
        small = tuple(t if t is None else t.contiguous() for t in small)
        addresses = map(address, small)
    fields = (
        sizes, DTYPE_CODES[x.dtype], x.data_ptr(), strides,
        target.data_ptr(), DTYPE_CODES[target.dtype], target_strides,
        *addresses, codes, options,
    )  # fmt: skip
    return new(Problem, fields), (x, target, *small)
