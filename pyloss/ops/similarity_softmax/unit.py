"""Rows divided by their norms, with what the gradient needs and no more.

    y = x / max(|x|, 1e-12)        dx = (g - y (y . g)) / |x|

as of torch.nn.functional.normalize, whose gradient holds several copies of x at a time; here it is
formed some rows at a time, of x and the norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops._shards import is_dtensor
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched

_EPS = 1e-12
_BLOCK = 1 << 18  # elements at a time on the CPU, which stay in the cache


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parts):
        norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in parts]
        # The inputs, which are there anyway, and not the result, which others may need no longer.
        ctx.save_for_backward(*parts, *norms)
        y = parts[0].new_empty((sum(x.shape[0] for x in parts), parts[0].shape[1]))
        for to, x, norm in zip(_split(y, parts), parts, norms):
            torch.div(x, norm.clamp_min(_EPS), out=to)
        return y

    @staticmethod
    def backward(ctx, grad):
        saved, count = ctx.saved_tensors, len(ctx.needs_input_grad)  # once: checkpoints count
        parts, norms = saved[:count], saved[count:]
        grads = _split(grad, parts)
        if torch.is_grad_enabled() or is_batched(grad):
            norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in parts]
            return tuple(_gradient(*xs, None) for xs in zip(parts, norms, grads))
        return tuple(
            _by_blocks(*xs) if yes else None
            for yes, *xs in zip(ctx.needs_input_grad, parts, norms, grads)
        )


def _split(y: Tensor, parts) -> tuple[Tensor, ...]:
    return y.split([x.shape[0] for x in parts])


def _by_blocks(x: Tensor, norms: Tensor, grad: Tensor) -> Tensor:
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.is_cuda or x.numel() <= _BLOCK:
        return _gradient(x, norms, grad, found)
    step = max(1, _BLOCK // x.shape[1])
    for first in range(0, x.shape[0], step):
        rows = slice(first, first + step)
        _gradient(x[rows], norms[rows], grad[rows], found[rows])
    return found


def _gradient(x: Tensor, norms: Tensor, grad: Tensor, out: Tensor | None) -> Tensor:
    clamped = norms.clamp_min(_EPS)
    y = x / clamped
    along = (y * grad).sum(-1, keepdim=True)
    along = torch.where(norms >= _EPS, along, 0.0)  # a norm that is clamped is constant
    if out is None:
        return (grad - y * along) / clamped
    return torch.addcmul(grad, y, along, value=-1, out=out).div_(clamped)


def unit_rows(*parts: Tensor) -> Tensor:
    """The rows of all parts, (N, D) each, float32 or float64, divided by their norms."""
    # What sees into it: torch.compile, and the transforms. DTensors take no `out=`.
    seen = torch.compiler.is_compiling() or functorch_active() or forward_ad_active()
    seen = seen or any(map(is_dtensor, parts))
    if seen or not (torch.is_grad_enabled() and any(x.requires_grad for x in parts)):
        return F.normalize(parts[0] if len(parts) == 1 else torch.cat(parts), dim=1)
    return _UnitRows.apply(*parts)
