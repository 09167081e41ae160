"""Principal axes of clouds of points in 2 or 3 dimensions: what the frames of a cloud are made of.

    frame_pca_fwd    (clouds, d^2 + 2 d + 1): axes by rows, centre, eigenvalues, total weight
    frame_pca_bwd    [gradient of the points, gradient of the weights] from upstream gradients of
                     these rows

Points (P, d) of all clouds, one after the other; `offsets` (clouds + 1) cut them, or they are of
equal size. Formulas: csrc/common/frame_pca.h, pyloss/reference/frame_pca.py.

Paper: arXiv 2110.03336.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._registry import define_op
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.frame_pca import cpu, cuda, reference
from pyloss.ops.frame_pca.calls import empty_frames, empty_gradients

KERNEL_DIMS = (2, 3)

_WHOLE = "clouds lie one after the other, and a split of the points would cut some"

define_op(
    "frame_pca_fwd(Tensor x, Tensor? weight, Tensor? offsets, SymInt clouds, bool centred) "
    "-> Tensor",
    fake=lambda x, weight, offsets, clouds, centred: empty_frames(x, clouds),
    impls={"cpu": cpu.forward, "cuda": cuda.forward, "reference": reference.forward},
    shards=_WHOLE,
)
define_op(
    "frame_pca_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? offsets, Tensor frames, "
    "bool centred, float tolerance) -> Tensor[]",
    fake=lambda grad, x, weight, *rest: empty_gradients(x, weight),
    impls={"cpu": cpu.backward, "cuda": cuda.backward, "reference": reference.backward},
    shards=_WHOLE,
)

_ops = torch.ops.pyloss


class _FramePca(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets, clouds, centred, tolerance):
        frames = _ops.frame_pca_fwd(x, weight, offsets, clouds, centred)
        ctx.save_for_backward(x, weight, offsets, frames)
        ctx.options = clouds, centred, tolerance
        return frames

    @staticmethod
    def backward(ctx, grad):
        x, weight, offsets, frames = ctx.saved_tensors
        clouds, centred, tolerance = ctx.options
        none = (None,) * 4
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph, is_grads_batched
            return *reference.composed_gradients(grad, x, weight, offsets, *ctx.options), *none
        # detach: the frames are a result of this very node.
        dx, *dw = _ops.frame_pca_bwd(grad, x, weight, offsets, frames.detach(), centred, tolerance)
        return dx, dw[0].to(weight.dtype) if dw else None, *none


def frame_pca(
    x: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    clouds: int,
    centred: bool,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Axes (clouds, d, d), as columns, centre (clouds, d), eigenvalues (clouds, d), ascending, and
    total weight (clouds), of checked points (P, d): float32, float64 for float64 points.

    Args:
        tolerance: of equal eigenvalues, relative to the largest: nothing is divided by their gap in
            the gradient.
    """
    d = x.shape[1]
    composed = d not in KERNEL_DIMS or functorch_active() or forward_ad_active()
    if composed:
        rows = reference.composed(x, weight, offsets, clouds, centred, tolerance)
    elif torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        rows = _FramePca.apply(x, weight, offsets, clouds, centred, tolerance)
    else:
        rows = _ops.frame_pca_fwd(x, weight, offsets, clouds, centred)
    # One by one: the gradient of split makes plain zeros for those that are not used, and beside
    # DTensors there must be none.
    ends = d * d, d * d + d, d * d + 2 * d
    axes, centre, value = rows[:, : ends[0]], rows[:, ends[0] : ends[1]], rows[:, ends[1] : ends[2]]
    return axes.unflatten(1, (d, d)), centre, value, rows[:, ends[2]]
