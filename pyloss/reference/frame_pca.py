"""Principal axes of weighted clouds of points, in plain PyTorch, in any dimension.

    W = sum_i w_i,   t = sum_i w_i x_i / W,   C = sum_i w_i (x_i - t) (x_i - t)^T
    C = V diag(lambda) V^T,   lambda ascending, the largest entry of each axis positive

The derivative of the axes divides by gaps of eigenvalues; between two that are equal, up to a
tolerance, it is 0 in its place.

Paper: Puny et al. arXiv 2110.03336.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import segment


def frame_pca(
    x: Tensor,
    weight: Tensor | None = None,
    offsets: Tensor | None = None,
    clouds: int | None = None,
    *,
    centred: bool = True,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Axes, centre, eigenvalues and total weight of each cloud.

    Args:
        x: points of all clouds, ``(P, d)``, floating; half types are summed in float32.
        weight: ``(P)``; None: ones. What is not finite at weight 0 counts as 0.
        offsets: ``(S + 1)``, cloud s is ``x[offsets[s] : offsets[s + 1]]``; None: ``clouds`` of
            equal size.
        clouds: S; None: one, or as the offsets say.
        centred: around t; else t = 0.
        tolerance: of equal eigenvalues, relative to the largest.

    Returns:
        V ``(S, d, d)`` with the axes as columns, t ``(S, d)``, lambda ``(S, d)``, W ``(S)``. A
        cloud without weight has t = 0 and V = I; one that is not finite has V of NaN.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 4.0], [2.0, -4.0]])
        >>> axes, centre, values, total = pyloss.reference.frame_pca(x)
        >>> centre, values
        (tensor([[2., 0.]]), tensor([[ 2., 32.]]))
    """
    if clouds is None:
        clouds = 1 if offsets is None else offsets.shape[0] - 1
    x = x if x.dtype == torch.float64 else x.float()
    w = torch.ones_like(x[:, 0]) if weight is None else weight.to(x.dtype)
    x = torch.where((w == 0).unsqueeze(-1) & ~x.isfinite(), 0.0, x)
    ids = None if offsets is None else segment.segment_ids(offsets, x.shape[0])

    def sums(v: Tensor) -> Tensor:
        if ids is None:
            size = v.shape[0] // clouds if clouds else 0
            return v.reshape(clouds, size, *v.shape[1:]).sum(1)
        return v.new_zeros((clouds, *v.shape[1:])).index_add(0, ids, v)

    def spread(v: Tensor) -> Tensor:
        if ids is None:
            return v.repeat_interleave(x.shape[0] // clouds if clouds else 0, 0)
        return v[ids]

    total = sums(w)
    if centred:
        some = (total != 0).unsqueeze(-1)
        centre = sums(w.unsqueeze(-1) * x) / torch.where(some, total.unsqueeze(-1), 1.0)
        centre = torch.where(some, centre, 0.0)
        x = x - spread(centre)
    else:
        centre = sums(torch.zeros_like(x))
    products = sums((w.unsqueeze(-1) * x).unsqueeze(-1) * x.unsqueeze(-2))
    value, axes = _eigh(products, tolerance)
    return axes, centre, value, total


def _eigh(c: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    # Dynamo knows no Function with its own jvp.
    function = _Eigh if torch.compiler.is_compiling() else _EighAnywhere
    return function.apply(c, tolerance)


class _Eigh(torch.autograd.Function):
    """Eigenvalues and axes of symmetric matrices; NaN for those that are not finite, at which
    LAPACK raises."""

    @staticmethod
    def forward(c, tolerance):
        finite = c.isfinite().all(-1).all(-1)[..., None, None]
        eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
        value, axes = torch.linalg.eigh(torch.where(finite, c, eye))
        top = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
        axes = torch.where(top < 0, -axes, axes)
        # Nothing to rotate: LAPACK would give any basis.
        axes = torch.where((c == 0).all(-1).all(-1)[..., None, None], eye, axes)
        nan = torch.where(finite, 0.0, torch.nan).to(c.dtype)
        return value + nan[..., 0], axes + nan

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.tolerance = inputs[1]
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx, g_value, g_axes):
        value, axes = ctx.saved_tensors
        inner = _reciprocal_gaps(value, ctx.tolerance) * (axes.mT @ g_axes)
        inner = inner + torch.diag_embed(g_value)
        return axes @ ((inner + inner.mT) / 2) @ axes.mT, None


class _EighAnywhere(_Eigh):
    """In forward mode and under the transforms of torch.func, too."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, c, _):
        value, axes = ctx.saved_tensors
        inner = axes.mT @ c @ axes
        g_value = inner.diagonal(dim1=-2, dim2=-1)
        return g_value, axes @ (_reciprocal_gaps(value, ctx.tolerance) * inner)


def _reciprocal_gaps(value: Tensor, tolerance: float) -> Tensor:
    """1 / (lambda_j - lambda_i); 0 where the two are equal up to the tolerance."""
    gap = value.unsqueeze(-2) - value.unsqueeze(-1)
    close = gap.abs() <= tolerance * value.abs().amax(-1)[..., None, None]
    return torch.where(close, 0.0, 1 / torch.where(close, 1.0, gap))
