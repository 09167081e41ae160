r"""Softmax statistics and sums over all pairs of queries and keys, without the matrix of them.

    z_ij = scale_i q_i . k_j
    lse_i = log sum_{j in D_i} exp z_ij        positive_i = sum_{j in P_i} z_ij

and the same over i for each key j, from the same sweep. With G_ij the gradient of z_ij,

    G_ij = exp(z_ij - lse_i) [j in D_i] g_i + [j in P_i] h_i  (and of the columns likewise)
    dQ = scale G K        dK = G^T (scale Q)        dscale_i = q_i . (G K)_i

Which pairs are left out, positive or of the denominator D follows from indices. Logits come in
tiles, which the backward forms once more: memory O(N + M) beside the gradients. The sums of
sums.py are other functions of the same tiles. Second derivatives, forward mode and torch.func
transforms go through the reference. Formulas, cost and memory: docs/similarity_softmax.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._flops import count_by
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active, is_batched
from pyloss.ops.similarity_softmax import by_tiles, cpu, loss, reference, triton
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    DENOMINATORS,
    MEAN,
    SCHEMA,
    SOURCES,
    WANTS,
    WHOLE,
    Pairs,
    Stats,
    checked,
    flops,
    gradients,
    otherwise,
    softmax_outputs,
    split_softmax,
)
from pyloss.ops.similarity_softmax.counts import similarity_counts
from pyloss.ops.similarity_softmax.sums import Margins, margin_sums, pair_sums
from pyloss.ops.similarity_softmax.unit import unit_rows

__all__ = [
    "Margins", "Stats", "loss", "margin_sums", "pair_sums", "similarity_counts",
    "similarity_softmax", "unit_rows",
]  # fmt: skip

_OF_ROWS = "Tensor? g, Tensor? g_positive, Tensor? column_g, Tensor? column_g_positive"


def _forward_fake(queries, keys, *rest):
    return softmax_outputs(queries, keys, rest[-1])


def _backward_fake(*args):
    return [g for g in gradients(Pairs(*args[:9]), args[9]) if g is not None]


define_op(
    f"similarity_softmax_fwd({SCHEMA}) -> Tensor[]",
    fake=_forward_fake,
    impls={
        "cpu": cpu.forward,
        "triton": triton.forward,
        "reference": otherwise(reference.forward, by_tiles.forward),
    },
    shards=WHOLE,
    plain=reference.forward,
)
define_op(
    f"similarity_softmax_bwd({SCHEMA}, int want, Tensor lse, Tensor? column_lse, {_OF_ROWS}) "
    "-> Tensor[]",
    fake=_backward_fake,
    impls={
        "cpu": cpu.backward,
        "triton": triton.backward,
        "reference": otherwise(reference.backward, by_tiles.backward),
    },
    shards=WHOLE,
    plain=reference.backward,
)
count_by("similarity_softmax_fwd", lambda *args, out_shape=None: flops(*args[:2]))
count_by("similarity_softmax_bwd", lambda *args, out_shape=None: flops(*args[:2], args[9]))

_ops = torch.ops.pyloss


class _SimilaritySoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        made = tuple(_ops.similarity_softmax_fwd(*args))
        found = split_softmax(made, args[-1])
        ctx.save_for_backward(*args[:2], *args[3:7], found[0], found[5])
        ctx.numbers = args[2], args[7], args[8]
        ctx.mark_non_differentiable(*(found[i] for i in (2, 3, 4, 7, 8) if found[i] is not None))
        ctx.set_materialize_grads(False)
        return made  # no None among them, which Dynamo of torch 2.6 does not take

    @staticmethod
    def backward(ctx, *grads):
        queries, keys, scales, target, query_ids, key_ids, lse, column_lse = ctx.saved_tensors
        scale, first, flags = ctx.numbers
        grads = split_softmax(grads, flags)
        args = (queries, keys, scale, scales, target, query_ids, key_ids, first, flags)
        needed = [ctx.needs_input_grad[at] for at in SOURCES]
        given = (grads[0], grads[1], grads[5], grads[6])
        found = [None] * 3
        if all(g is None for g in given):
            pass
        elif torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in given):
            found = reference.gradients_of_stats(
                Pairs(*args), grads, needed, create_graph=torch.is_grad_enabled()
            )
        else:
            want = sum(bit for bit, yes in zip(WANTS, needed) if yes)
            found = iter(_ops.similarity_softmax_bwd(*args, want, lse, column_lse, *given))
            found = [next(found) if yes else None for yes in needed]
        of_queries, of_keys, of_scales = found
        return of_queries, of_keys, None, of_scales, None, None, None, None, None


def similarity_softmax(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    *,
    first: int = -1,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "ignore",
    denominator: str = "all",
    columns: bool = False,
    mean: bool = False,
) -> Stats:
    """See the reference. Differentiable in lse, positive, column_lse and column_positive.

    Args:
        queries: (N, D), floating.
        keys: (M, D), the same dtype. The same tensor as the queries, where every query has one
            scale and the ids are the same too: each pair of rows is multiplied once.
        scale: a number, or a tensor of shape () or (N,), which gets a gradient too.
        key_ids: None: the query ids.
    """
    flags = DENOMINATORS[denominator] | (COLUMNS if columns else 0) | (MEAN if mean else 0)
    args = checked(queries, keys, scale, first, target, query_ids, key_ids, same, flags)
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return Stats(*reference.stats(Pairs(*args)))
    if torch.is_grad_enabled() and any(
        args[at] is not None and args[at].requires_grad for at in SOURCES
    ):
        return Stats(*split_softmax(_SimilaritySoftmax.apply(*distinct(args)), flags))
    return Stats(*split_softmax(_ops.similarity_softmax_fwd(*args), flags))
