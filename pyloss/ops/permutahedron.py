"""Soft rank and soft sort by projection onto the permutahedron, as ops on rows (b, n).

    permutahedron_fwd    y and `packed`: one int32 per sorted position, its element and two flags
    permutahedron_bwd    gradient from `packed` and, with kl, x

Formulas: pyloss/reference/permutahedron.py. Kernels: csrc/common/permutahedron.h.

Paper: arXiv 2002.08871.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._registry import (
    DTYPE_CODES,
    address,
    define_op,
    forward_ad_active,
    functorch_active,
    is_batched,
    lib,
)

# The flags of csrc/common/permutahedron.h.
_START = -(2**31)
_FIXED = 2**30
_ELEMENT = _FIXED - 1  # mask; as an element: the row holds a NaN


def _reference():
    """The reference, imported with its first use."""
    from pyloss.reference import permutahedron

    return permutahedron


def _packed(blocks) -> Tensor:
    element = torch.where(blocks.nan, _ELEMENT, blocks.order)
    starts = blocks.starts | blocks.nan
    fixed = blocks.fixed & ~blocks.nan
    return (element + fixed * _FIXED + starts * _START).to(torch.int32)


def _blocks(packed: Tensor):
    element = packed & _ELEMENT
    nan = element[:, :1] == _ELEMENT
    order = torch.where(nan, torch.arange(packed.shape[1], device=packed.device), element.long())
    return _reference().Blocks(order, packed < 0, (packed & _FIXED) != 0, nan)


def _problem(x: Tensor, rank: bool, kl: bool) -> tuple[int, ...]:
    return *x.shape, DTYPE_CODES[x.dtype], int(rank), int(kl)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


# --------------------------------------------------------------------------------------------------
# Forward


def _forward_fake(x, rank, kl, strength):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)


def _forward_cpu(x, rank, kl, strength):
    y, packed = _forward_fake(x, rank, kl, strength)
    x = x.contiguous()
    _C.permutahedron_fwd(
        _problem(x, rank, kl), strength, x.data_ptr(), y.data_ptr(), packed.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, packed


def _forward_cuda(x, rank, kl, strength):
    y, packed = _forward_fake(x, rank, kl, strength)
    if x.numel() == 0:
        return y, packed
    values, order = x.sort(dim=1, descending=rank, stable=True)
    values, order = values.contiguous(), order.contiguous()
    problem = _problem(x, rank, kl)
    with torch.cuda.device_of(x):
        size = _C.cuda_permutahedron_scratch_bytes(problem, strength)
        scratch = x.new_empty((size,), dtype=torch.uint8)
        _C.cuda_permutahedron_fwd(
            problem, strength, values.data_ptr(), order.data_ptr(), y.data_ptr(),
            packed.data_ptr(), scratch.data_ptr(), size, _stream(x),
        )  # fmt: skip
    return y, packed


def _forward_reference(x, rank, kl, strength):
    options = dict(rank=rank, kl=kl, strength=strength)
    blocks = _reference().find_blocks(x, **options)
    return _reference().from_blocks(x, blocks, **options).contiguous(), _packed(blocks)


define_op(
    "permutahedron_fwd(Tensor x, bool rank, bool kl, float strength) -> (Tensor, Tensor)",
    fake=_forward_fake,
    impls={"cpu": _forward_cpu, "cuda": _forward_cuda, "reference": _forward_reference},
)


def _forward_vmap(info, in_dims, x, rank, kl, strength):
    """Rows are independent: one more dimension is more rows."""
    x = x.movedim(in_dims[0], 0)
    found = _ops.permutahedron_fwd(x.flatten(0, 1), rank, kl, strength)
    return tuple(t.view(x.shape) for t in found), (0, 0)


torch.library.register_vmap("pyloss::permutahedron_fwd", _forward_vmap, lib=lib)

# --------------------------------------------------------------------------------------------------
# Backward


def _backward_fake(g, x, packed, rank, kl, strength):
    return g.new_empty(g.shape)


def _backward_cpu(g, x, packed, rank, kl, strength):
    g, packed = g.contiguous(), packed.contiguous()
    x = None if x is None else x.contiguous()
    dx = torch.empty_like(g)
    _C.permutahedron_bwd(
        _problem(g, rank, kl), strength, g.data_ptr(), address(x), packed.data_ptr(),
        dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx


def _backward_cuda(g, x, packed, rank, kl, strength):
    g, packed = g.contiguous(), packed.contiguous()
    x = None if x is None else x.contiguous()
    dx = torch.empty_like(g)
    with torch.cuda.device_of(g):
        _C.cuda_permutahedron_bwd(
            _problem(g, rank, kl), strength, g.data_ptr(), address(x), packed.data_ptr(),
            dx.data_ptr(), _stream(g),
        )  # fmt: skip
    return dx


def _backward_reference(g, x, packed, rank, kl, strength):
    return _composed_gradient(g, x, packed, rank, kl, strength).detach().contiguous()


def _composed_gradient(g, x, packed, rank, kl, strength):
    """The same in torch operations, with gradients of its own to g and, with kl, x."""
    with torch.enable_grad():
        # Given the blocks, l2 is linear: any point has the same gradient.
        at = torch.zeros(packed.shape, dtype=g.dtype, device=g.device) if x is None else x
        at = at if at.requires_grad else at.detach().requires_grad_()
        y = _reference().from_blocks(at, _blocks(packed), rank=rank, kl=kl, strength=strength)
        (dx,) = torch.autograd.grad(y, at, g, create_graph=True)
    return dx


define_op(
    "permutahedron_bwd(Tensor g, Tensor? x, Tensor packed, bool rank, bool kl, float strength) "
    "-> Tensor",
    fake=_backward_fake,
    impls={"cpu": _backward_cpu, "cuda": _backward_cuda, "reference": _backward_reference},
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _Permutahedron(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rank, kl, strength):
        y, packed = _ops.permutahedron_fwd(x, rank, kl, strength)
        ctx.save_for_backward(packed, x if kl else None)
        ctx.options = (rank, kl, strength)
        return y

    @staticmethod
    def backward(ctx, g):
        packed, x = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(g):  # create_graph, is_grads_batched
            return _composed_gradient(g, x, packed, *ctx.options), None, None, None
        return _ops.permutahedron_bwd(g, x, packed, *ctx.options), None, None, None


def permutahedron(x: Tensor, rank: bool, kl: bool, strength: float) -> Tensor:
    """Soft ranks, else softly sorted values, of checked float32 or float64 rows (b, n)."""
    if functorch_active() or forward_ad_active():
        # Transforms see torch operations; only the blocks, without gradient, come from the op.
        packed = _ops.permutahedron_fwd(x.detach(), rank, kl, strength)[1]
        return _reference().from_blocks(x, _blocks(packed), rank=rank, kl=kl, strength=strength)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permutahedron.apply(x, rank, kl, strength)
    return _ops.permutahedron_fwd(x, rank, kl, strength)[0]
