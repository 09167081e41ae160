r"""Two views as anchors of each other: cosines of each with its nearest negatives and its positive.

    u_i = z_i / |z_i|      s_i = (u_i . u_j ascending over the k nearest j, u_i . v_i)
    dz_i = (t_i - u_i (g_i . s_i)) / |z_i|,   t_i = sum_j g_ij u_j + g_iv v_i

What an anchor is compared with gets no gradient. The backward is one pass of sums over the chosen
rows and three over the result; as a chain of torch operations it is ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops._reference import gradients
from pyloss.ops._transforms import is_batched

SHORTEST = 1e-16  # squared length below which a row counts as of this length


class _AnchorScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, compose, *views):
        ctx.k, ctx.compose = k, compose
        scales = [z.square().sum(-1, keepdim=True).clamp_min(SHORTEST).rsqrt() for z in views]
        units = [z * scale for z, scale in zip(views, scales)]
        scores = units[0].new_empty((2, units[0].shape[0], k + 1))
        found = [torch.ops.pyloss.similarity_topk(unit, unit, k, 0) for unit in units]
        for a, (nearest, _) in enumerate(found):
            scores[a, :, :k] = nearest.flip(-1)
        scores[..., k] = (units[0] * units[1]).sum(-1)
        ctx.save_for_backward(*views, *units, *scales, *(at for _, at in found), scores)
        return scores

    @staticmethod
    def backward(ctx, grad):
        *pairs, scores = ctx.saved_tensors
        views, units, scales, indices = (pairs[i : i + 2] for i in (0, 2, 4, 6))
        create_graph = torch.is_grad_enabled()
        if create_graph or is_batched(grad):
            found = gradients(
                lambda *views: ctx.compose(views), views, (grad,), ctx.needs_input_grad[2:],
                create_graph=create_graph,
            )  # fmt: skip
            return None, None, *found
        k, result = ctx.k, [None, None]
        along = (grad * scores).sum(-1, keepdim=True)
        for a in (0, 1):
            if ctx.needs_input_grad[2 + a]:
                weights = grad[a, :, :k].flip(-1)
                to = F.embedding_bag(indices[a], units[a], per_sample_weights=weights, mode="sum")
                to.addcmul_(grad[a, :, k:], units[1 - a])
                short = scales[a] >= SHORTEST**-0.5  # divided by a constant
                to.addcmul_(units[a], along[a].masked_fill(short, 0.0), value=-1.0)
                result[a] = to.mul_(scales[a])
        return None, None, *result


def anchor_scores(
    views: list[Tensor], k: int, compose: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor:
    """(2, B, k + 1) of two (B, D); compose(views): the same by differentiable operations."""
    return _AnchorScores.apply(k, compose, *views)
