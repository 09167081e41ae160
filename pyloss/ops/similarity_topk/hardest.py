r"""Statistics over the k largest products of each query, of which none is kept.

    z_ij = scale_i q_i . k_j       lse_i = log sum_j e^{z_ij}       total_i = sum_j z_ij

over the k largest z_ij of row i (but j = first + i; of equal ones the first count). With many of
them a row, `similarity_topk` would hold as many numbers as the matrix has; here a row keeps its
k-th largest product and how many of its equals count, and the backward makes the tiles again:

    G_ij = e^{z_ij - lse_i} g^lse_i + g^total_i      dQ = scale G K      dK = G^T (scale Q)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops import _shards
from pyloss.ops._flops import count_by
from pyloss.ops._gemm import product
from pyloss.ops._launch import without_autocast
from pyloss.ops._reference import gradients
from pyloss.ops._registry import lib, plain_forms, register_fake
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active, is_batched
from pyloss.ops.similarity_topk import by_tiles


def _formulas(queries, keys, scale, k, first) -> tuple[Tensor, Tensor]:
    """The reference, imported with its first use; autocast would round its products."""
    from pyloss.reference.similarity_topk import similarity_hardest as reference

    with without_autocast(queries):
        return reference(queries, keys, scale, k, first)


def _tiles(queries, keys, scale, first) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their z), one behind the other in one buffer."""
    count, others = queries.shape[0], keys.t()
    height = min(count, by_tiles.tile_rows(keys.shape[0], queries.device))
    buffer = queries.new_empty((height, keys.shape[0]))
    scale = scale.expand(count).unsqueeze(1)
    for begin in range(0, count, max(1, height)):
        rows = slice(begin, min(begin + height, count))
        z = buffer[: rows.stop - begin]
        product(queries[rows], others, z)
        z.mul_(scale[rows])
        if first >= 0:
            z.diagonal(first + begin).fill_(-math.inf)
        yield rows, z


def _forward(queries, keys, scale, k, first):
    lse, total, least = (queries.new_empty(queries.shape[0]) for _ in range(3))
    equals = torch.empty_like(lse, dtype=torch.int32)
    with without_autocast(queries):
        for rows, z in _tiles(queries, keys, scale, first):
            kept = z.topk(k, dim=1, sorted=False).values  # to sort many takes most of the time
            least[rows] = kept.amin(1) if k else math.inf
            equals[rows] = k - (kept > least[rows].unsqueeze(1)).sum(1)
            lse[rows], total[rows] = kept.logsumexp(1), kept.sum(1)
    if backends.forced() == "reference":
        lse, total = _formulas(queries, keys, scale, k, first)
    return lse, total, least, equals


def _backward(g_lse, g_total, queries, keys, scale, lse, least, equals, first):
    g_queries, g_keys = queries.new_empty(queries.shape), keys.new_zeros(keys.shape)
    with without_autocast(queries):
        scaled = queries * scale.expand(queries.shape[0]).unsqueeze(1)
        for rows, z in _tiles(queries, keys, scale, first):
            bar, level = least[rows].unsqueeze(1), lse[rows].unsqueeze(1)
            same = z == bar
            same &= same.cumsum(1, dtype=torch.int32) <= equals[rows].unsqueeze(1)
            left_out = ~(same | (z > bar) | level.isnan())
            g = z.sub_(level).exp_().mul_(g_lse[rows].unsqueeze(1))
            g = g.add_(g_total[rows].unsqueeze(1)).masked_fill_(left_out, 0.0)
            product(g, keys, g_queries[rows])
            product(g.t(), scaled[rows], g_keys, add=True)
    g_scale = (g_queries * queries).sum(1)
    return g_queries.mul_(scale.expand(queries.shape[0]).unsqueeze(1)), g_keys, g_scale


lib.define(
    "similarity_hardest(Tensor queries, Tensor keys, Tensor scale, SymInt k, SymInt first) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.define(
    "similarity_hardest_bwd(Tensor g_lse, Tensor g_total, Tensor queries, Tensor keys, "
    "Tensor scale, Tensor lse, Tensor least, Tensor equals, SymInt first) "
    "-> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.impl("similarity_hardest", _forward, "CompositeExplicitAutograd")
lib.impl("similarity_hardest_bwd", _backward, "CompositeExplicitAutograd")


def _plain(queries, keys, scale, k, first):
    lse, total = _formulas(queries, keys, scale, k, first)
    return lse, total, torch.zeros_like(lse), torch.zeros_like(lse, dtype=torch.int32)


def own_shards(rule: str):
    """The rule where no query is a key, whose number `first` tells."""

    def find(*args):
        return rule if args[-1] < 0 else "a query is found among the keys by its place"

    return find


_shards.add(lib, "similarity_hardest", own_shards("Bd, nd, B -> B, B, B, B"))
_shards.add(lib, "similarity_hardest_bwd", own_shards("B, B, Bd, nd, B, B, B, B -> Bd, nd, B"))
plain_forms["similarity_hardest"] = _plain
plain_forms["similarity_hardest_bwd"] = "it starts from what the forward has kept of each row"


def _product_flops(q, k) -> int:
    return 2 * q[0] * q[1] * k[0]


count_by("similarity_hardest", lambda q, k, *rest, out_shape=None: _product_flops(q, k))
# The products again, and those of both gradients.
count_by("similarity_hardest_bwd", lambda *args, out_shape=None: 3 * _product_flops(*args[2:4]))


def _fake(queries, keys, scale, k, first):
    count = queries.shape[0]
    numbers = [queries.new_empty((count,)) for _ in range(3)]
    return (*numbers, queries.new_empty((count,), dtype=torch.int32))


register_fake("similarity_hardest", _fake)
register_fake(
    "similarity_hardest_bwd",
    lambda g_lse, g_total, queries, keys, *rest: (
        queries.new_empty(queries.shape),
        keys.new_empty(keys.shape),
        queries.new_empty((queries.shape[0],)),
    ),
)


class _SimilarityHardest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, scale, k, first):
        lse, total, least, equals = torch.ops.pyloss.similarity_hardest(
            queries, keys, scale, k, first
        )
        ctx.save_for_backward(queries, keys, scale, lse, least, equals)
        ctx.k, ctx.first = k, first
        return lse, total

    @staticmethod
    def backward(ctx, g_lse, g_total):
        queries, keys, scale, lse, least, equals = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if create_graph or is_batched(g_lse) or is_batched(g_total):

            def formula(*sources):
                return _formulas(*sources, ctx.k, ctx.first)

            found = gradients(
                formula, (queries, keys, scale), (g_lse, g_total), ctx.needs_input_grad[:3],
                create_graph=create_graph,
            )  # fmt: skip
            return *found, None, None
        g_queries, g_keys, g_scale = torch.ops.pyloss.similarity_hardest_bwd(
            g_lse, g_total, queries, keys, scale, lse, least, equals, ctx.first
        )
        return g_queries, g_keys, g_scale.sum() if scale.dim() == 0 else g_scale, None, None


def similarity_hardest(
    queries: Tensor, keys: Tensor, scale: Tensor, k: int, first: int = -1
) -> tuple[Tensor, Tensor]:
    """(log-sum-exp (B,), sum (B,)): see the reference. float32 or float64, dense."""
    if functorch_active() or forward_ad_active():
        return _formulas(queries, keys, scale, k, first)
    sources = (queries, keys, scale)
    if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
        return _SimilarityHardest.apply(*distinct(sources), k, first)
    return torch.ops.pyloss.similarity_hardest(queries, keys, scale, k, first)[:2]
