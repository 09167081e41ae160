"""Sums over pairs that are no softmax: the sigmoid loss, and pairs beyond a margin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._flops import count_by
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active, is_batched
from pyloss.ops.similarity_softmax import by_tiles, cpu, reference, triton
from pyloss.ops.similarity_softmax.call import (
    MARGINS,
    SCHEMA,
    SIGMOID,
    SOURCES,
    WANTS,
    WHOLE,
    Pairs,
    checked,
    flops,
    gradients,
    otherwise,
    sums_outputs,
)


class Margins(NamedTuple):
    """By how much pairs are on the wrong side, (N,), and how many; a tie counts, with 0."""

    above: Tensor  # sum over negatives of max(0, z_ij - above)
    above_count: Tensor
    below: Tensor  # sum over positives of max(0, below - z_ij)
    below_count: Tensor


_SUMS = f"{SCHEMA}, Tensor? bias, float[] numbers, int kind"


def _forward_fake(queries, *rest):
    return sums_outputs(queries, rest[-1])


def _backward_fake(*args):
    return [g for g in gradients(Pairs(*args[:9]), args[12], args[9]) if g is not None]


define_op(
    f"similarity_sums_fwd({_SUMS}) -> Tensor[]",
    fake=_forward_fake,
    impls={
        "cpu": cpu.sums_forward,
        "triton": triton.sums_forward,
        "reference": otherwise(reference.sums_forward, by_tiles.sums_forward),
    },
    shards=WHOLE,
    plain=reference.sums_forward,
)
define_op(
    f"similarity_sums_bwd({_SUMS}, int want, Tensor? g, Tensor? g_below) -> Tensor[]",
    fake=_backward_fake,
    impls={
        "cpu": cpu.sums_backward,
        "triton": triton.sums_backward,
        "reference": otherwise(reference.sums_backward, by_tiles.sums_backward),
    },
    shards=WHOLE,
    plain=reference.sums_backward,
)
count_by("similarity_sums_fwd", lambda *args, out_shape=None: flops(*args[:2]))
count_by("similarity_sums_bwd", lambda *args, out_shape=None: flops(*args[:2], args[12]))

_ops = torch.ops.pyloss


class _SimilaritySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        found = tuple(_ops.similarity_sums_fwd(*args))
        ctx.save_for_backward(*args[:2], *args[3:7], args[9])
        ctx.rest = args[2], args[7], args[8], args[10], args[11]
        ctx.mark_non_differentiable(*found[1::2])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, *grads):
        queries, keys, scales, target, query_ids, key_ids, bias = ctx.saved_tensors
        scale, first, flags, numbers, kind = ctx.rest
        args = (queries, keys, scale, scales, target, query_ids, key_ids, first, flags)
        needed = [ctx.needs_input_grad[at] for at in (*SOURCES, 9)]
        given = (grads[0], grads[2] if kind == MARGINS else None)
        found = [None] * 4
        if all(g is None for g in given):
            pass
        elif torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in given):
            found = reference.gradients_of_sums(
                Pairs(*args), bias, numbers, kind, grads, needed,
                create_graph=torch.is_grad_enabled(),
            )  # fmt: skip
        else:
            want = sum(bit for bit, yes in zip(WANTS, needed) if yes)
            found = iter(_ops.similarity_sums_bwd(*args, bias, numbers, kind, want, *given))
            found = [next(found) if yes else None for yes in needed]
        of_queries, of_keys, of_scales, of_bias = found
        return of_queries, of_keys, None, of_scales, *(None,) * 5, of_bias, None, None


def _sums(args: tuple, bias, numbers, kind: int) -> tuple:
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return reference.sums(Pairs(*args), bias, numbers, kind)
    sources = (*(args[at] for at in SOURCES), bias)
    if torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources):
        return _SimilaritySums.apply(*distinct((*args, bias)), numbers, kind)
    return tuple(_ops.similarity_sums_fwd(*args, bias, numbers, kind))


def pair_sums(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    first: int = -1,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "ignore",
) -> Tensor:
    """sum_j softplus(-y_ij (z_ij + bias)), (N,); y = 1 for positive pairs, -1 for negative ones.

    Args: as of similarity_softmax; `bias` a number or a tensor of shape (), which gets a gradient.
    """
    args = checked(queries, keys, scale, first, target, query_ids, key_ids, same, 0)
    numbers = (0.0,)
    if isinstance(bias, Tensor):
        bias = bias.to(accumulator_dtype(queries.dtype))
    else:
        bias, numbers = None, (float(bias),)
    return _sums(args, bias, numbers, SIGMOID)[0]


def margin_sums(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    above: float = 0.0,
    below: float = 0.0,
    *,
    first: int = -1,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "ignore",
) -> Margins:
    """Negatives with z >= above and positives with z <= below, from one sweep: see Margins.

    Args: as of similarity_softmax; `above` and `below` are numbers. The counts have no gradient.
    """
    args = checked(queries, keys, scale, first, target, query_ids, key_ids, same, 0)
    return Margins(*_sums(args, None, (float(above), float(below)), MARGINS))
