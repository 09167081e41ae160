"""Soft rank and soft sort by projection onto the permutahedron, as ops on rows (b, n).

    permutahedron_fwd    y and `packed`: one int32 per sorted position, its element and two flags
    permutahedron_bwd    gradient from `packed` and, with kl, x

Formulas: pyloss/reference/permutahedron.py. Kernels: csrc/common/permutahedron.h.

Paper: arXiv 2002.08871.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._registry import define_op, lib
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.permutahedron import cpu, cuda, plain, reference

define_op(
    "permutahedron_fwd(Tensor x, bool rank, bool kl, float strength, bool centred=False) "
    "-> (Tensor, Tensor)",
    fake=lambda x, rank, kl, strength, centred=False: (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=torch.int32),
    ),
    impls={"cpu": cpu.forward, "cuda": cuda.forward, "reference": reference.forward},
    shards="Bn -> Bn, Bn",
    plain=plain.forward,
)
define_op(
    "permutahedron_bwd(Tensor g, Tensor? x, Tensor packed, bool rank, bool kl, float strength) "
    "-> Tensor",
    fake=lambda g, x, packed, rank, kl, strength: g.new_empty(g.shape),
    impls={"cpu": cpu.backward, "cuda": cuda.backward, "reference": reference.backward},
    shards="Bn, Bn, Bn -> Bn",
)


def _forward_vmap(info, in_dims, x, rank, kl, strength, centred=False):
    """Rows are independent: one more dimension is more rows."""
    x = x.movedim(in_dims[0], 0)
    found = _ops.permutahedron_fwd(x.flatten(0, 1), rank, kl, strength, centred)
    return tuple(t.view(x.shape) for t in found), (0, 0)


torch.library.register_vmap("pyloss::permutahedron_fwd", _forward_vmap, lib=lib)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _Permutahedron(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, link, rank, kl, strength, centred):
        y, packed = _ops.permutahedron_fwd(x, rank, kl, strength, centred)
        ctx.save_for_backward(packed, x if kl else None, link)
        ctx.options = (rank, kl, strength)
        return y

    @staticmethod
    def backward(ctx, g):
        packed, x, link = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(g):  # create_graph, is_grads_batched
            dx = reference.composed_gradient(g, x, packed, *ctx.options) + link.sum()
            return dx, None, None, None, None, None
        return _ops.permutahedron_bwd(g, x, packed, *ctx.options), None, None, None, None, None


def permutahedron(
    x: Tensor, rank: bool, kl: bool, strength: float, centred: bool = False
) -> Tensor:
    """Soft ranks, else softly sorted values, of checked float32 or float64 rows (b, n).

    ``centred``: ranks less their mean over the row, with all their digits where they differ little.
    """
    if functorch_active() or forward_ad_active():
        # Transforms see torch operations; only the blocks, without gradient, come from the op.
        packed = _ops.permutahedron_fwd(x.detach(), rank, kl, strength)[1]
        return reference.composed(x, packed, rank, kl, strength, centred)
    if torch.is_grad_enabled() and x.requires_grad:
        # An empty part of x: with l2 the gradient depends on x by its blocks alone, and this makes
        # the derivative of it 0 rather than an error.
        return _Permutahedron.apply(x, x[:0].clone(), rank, kl, strength, centred)
    return _ops.permutahedron_fwd(x, rank, kl, strength, centred)[0]
