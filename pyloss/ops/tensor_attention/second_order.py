"""Gradients that can be differentiated again, of exact and of low-rank tensor attention.

The kernels form gradients; the reference knows how these depend on what they were formed of. It
is asked only for a second derivative, some queries at a time: out and lse of a query depend on no
other one, so that the terms of blocks of queries add up and the cube of scores is never whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyloss.ops._reference import gradients
from pyloss.ops._transforms import is_batched

# (out, lse) of some queries: (rows, *sources), in torch operations.
Part = Callable[..., tuple[Tensor, Tensor]]


def batched(dout: Tensor | None, dlse: Tensor | None) -> bool:
    """Whether vmap carries a cotangent (is_grads_batched, jacobian(vectorize=True)): it cannot look
    into an op.
    """
    return any(g is not None and is_batched(g) for g in (dout, dlse))


def by_reference(
    part: Part,
    sources: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients in torch operations, for vmap; with a graph where one is recorded."""
    create_graph = torch.is_grad_enabled()
    return gradients(
        lambda *s: _finite(*part(slice(None), *s)), sources, cotangents, needed,
        create_graph=create_graph,
    )  # fmt: skip


def differentiable(
    found: Sequence[Tensor | None],
    part: Part,
    blocks: Iterable[slice],
    sources: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """`found`, gradients of the sources or None, as functions of sources and cotangents."""
    needed = [g is not None for g in found]
    given = [g for g in found if g is not None]
    linked = iter(
        _TensorAttentionGrad.apply(part, list(blocks), needed, *given, *cotangents, *sources)
    )
    return [next(linked) if yes else None for yes in needed]


class _TensorAttentionGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, blocks, needed, *tensors):
        count = sum(needed)
        ctx.part, ctx.blocks, ctx.needed = part, blocks, needed
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx, *upstream):
        asked = ctx.needs_input_grad[3 + len(upstream) :]
        create_graph = torch.is_grad_enabled()
        # Each on its own: a cotangent, or a source, may depend on another source.
        tensors = [_own(t, yes, create_graph) for t, yes in zip(ctx.saved_tensors, asked)]
        wanted = [t for t, yes in zip(tensors, asked) if yes]
        total = [None] * len(wanted)
        for rows in ctx.blocks:
            with torch.enable_grad():
                found = _gradients_of(ctx.part, rows, tensors[2:], tensors[:2], ctx.needed)
                pairs = [(g, u) for g, u in zip(found, upstream)
                         if u is not None and g is not None and g.requires_grad]  # fmt: skip
                if pairs and wanted:
                    found, given = zip(*pairs)
                    terms = torch.autograd.grad(
                        found, wanted, given, create_graph=create_graph, allow_unused=True
                    )
                    total = [_sum(a, b) for a, b in zip(total, terms)]
        result = iter(total)
        return (None,) * (3 + len(upstream)) + tuple(next(result) if yes else None for yes in asked)


def _gradients_of(part, rows, sources, cotangents, needed):
    """Those of one block of queries, with a graph."""
    cotangents = [g if g is None else g[:, :, rows] for g in cotangents]
    found = gradients(
        lambda *s: _finite(*part(rows, *s)), sources, cotangents, needed, create_graph=True
    )
    return [g for g, yes in zip(found, needed) if yes]


def _own(t: Tensor | None, asked: bool, create_graph: bool) -> Tensor | None:
    if t is None or not asked:
        return t
    return t.view_as(t) if create_graph else t.detach().requires_grad_()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _finite(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """A query that sees no pair has an lse without a gradient."""
    return out, torch.where(lse == -torch.inf, 0.0, lse)
