"""Gradients that cannot be differentiated, of exact and of low-rank tensor attention."""

from __future__ import annotations

import torch


class FirstOrderOnly(torch.autograd.Function):
    """Passes gradients on; differentiating them raises.

    torch's once_differentiable would do the same with words that name neither op nor remedy.
    """

    @staticmethod
    def forward(ctx, count, *args):
        return tuple(g if g is None else g.view_as(g) for g in args[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "tensor_attention has no second derivative; its namesakes in pyloss.reference "
            "(tensor_attention, tensor_attention_lowrank), plain PyTorch, have all of them"
        )
