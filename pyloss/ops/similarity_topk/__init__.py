r"""The k largest inner products of each query with the keys, without the matrix of all of them.

    values[i, :] = the k largest of q_i . k_j over j (but j = first + i), descending

    dq_i = sum_l g_il k_{j(i, l)}        dk_j = sum over (i, l) with j(i, l) = j of g_il q_i

The products come in tiles, of which k a row are kept; the gradient of the queries sums rows of the
keys by index, so that neither direction holds more than a tile, or a copy of the chosen keys. On
the CPU a kernel looks through small tiles while they are in the cache
(csrc/cpu/similarity_topk.cpp); torch operations on tiles of some rows serve the other devices, and
more than 64 a row. Being an op, torch.compile takes it whole.
Second derivatives, forward mode and torch.func transforms go through torch operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss import backends
from pyloss.ops import _shards
from pyloss.ops._flops import count_by
from pyloss.ops._launch import without_autocast
from pyloss.ops._registry import lib, plain_forms, register_fake
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.similarity_topk import by_tiles, cpu
from pyloss.ops.similarity_topk.anchors import SHORTEST, anchor_scores
from pyloss.ops.similarity_topk.hardest import own_shards, similarity_hardest

__all__ = [
    "SHORTEST",
    "anchor_scores",
    "similarity_hardest",
    "similarity_topk",
    "transforms_active",
]


def _formulas(queries, keys, k, first) -> tuple[Tensor, Tensor]:
    """The reference, imported with its first use; autocast would round its products."""
    from pyloss.reference import similarity_topk

    with without_autocast(queries):
        return similarity_topk(queries, keys, k, first)


def _forward(queries, keys, k, first):
    if backends.forced() == "reference":
        return _formulas(queries, keys, k, first)
    way = cpu if cpu.takes(queries, keys, k) else by_tiles
    return way.forward(queries, keys, k, first)


def _fake(queries, keys, k, first):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


# Not by define_op: one implementation serves every device.
lib.define(
    "similarity_topk(Tensor queries, Tensor keys, int k, int first) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.impl("similarity_topk", _forward, "CompositeExplicitAutograd")
register_fake("similarity_topk", _fake)
_shards.add(lib, "similarity_topk", own_shards("Bd, nd -> Bk, Bk"))
plain_forms["similarity_topk"] = _formulas
count_by("similarity_topk", lambda q, k, *rest, out_shape=None: 2 * q[0] * q[1] * k[0])


class _SimilarityTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, k, first):
        values, indices = torch.ops.pyloss.similarity_topk(queries, keys, k, first)
        ctx.save_for_backward(queries, keys, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        queries, keys, indices = ctx.saved_tensors
        need_q, need_k = ctx.needs_input_grad[:2]
        gq = gk = None
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled() or is_batched(grad):
            if need_q:
                gq = (grad.unsqueeze(-1) * keys[indices]).sum(-2)
            if need_k:
                terms = (grad.unsqueeze(-1) * queries.unsqueeze(-2)).reshape(-1, keys.shape[-1])
                gk = torch.zeros_like(keys).index_add(0, indices.reshape(-1), terms)
            return gq, gk, None, None
        if need_q:
            gq = F.embedding_bag(indices, keys, per_sample_weights=grad.contiguous(), mode="sum")
        if need_k:
            gk = by_tiles.key_gradient(grad, queries, indices, keys)
        return gq, gk, None, None


def transforms_active() -> bool:
    """Whether derivatives must be taken of torch operations."""
    return functorch_active() or forward_ad_active()


def similarity_topk(queries: Tensor, keys: Tensor, k: int, first: int = -1):
    """(values (B, k) descending, indices): see the reference. float32 or float64, dense."""
    if transforms_active():
        return _formulas(queries, keys, k, first)
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        return _SimilarityTopk.apply(queries, keys, k, first)
    return torch.ops.pyloss.similarity_topk(queries, keys, k, first)
