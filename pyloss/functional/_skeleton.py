"""The soft skeleton: erosions and openings by minima and maxima of neighbours, and their gradient.

With E_0 = x, E_{k+1} = erode(E_k) and D_k = dilate(E_{k+1}),

    delta_k = relu(E_k - D_k),    S_k = S_{k-1} + relu(delta_k - S_{k-1} delta_k)

Erosion takes the smallest of a voxel and its neighbours along the axes, dilation the largest of the
3 x 3 (x 3) voxels around. Each is a few passes of minimum or maximum over shifted views; the
opening of an image is the dilation of what the next step erodes, so that every step erodes once.
The backward keeps E, D and S, twelve bytes a voxel and step, and finds the neighbour that a minimum
came from by comparing: pooling would keep eight bytes of indices for each of four passes, and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched


def skeleton(x: Tensor, steps: int) -> Tensor:
    """Of (N, C, *) of floats, or of a bool mask, whose skeleton is bool."""
    inside = torch.compiler.is_compiling() or functorch_active()
    if x.dtype == torch.bool:
        return _by_autograd(x.float(), steps) > 0 if inside else _of_mask(x, steps)
    if inside or forward_ad_active():
        return _by_autograd(x, steps)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Skeleton.apply(x, steps)
    return _walk(x, steps)


def mask_skeleton(mask: Tensor) -> Tensor:
    """Of a bool mask with as many steps as it takes; waits for the device."""
    eroded, found = mask.to(torch.uint8), torch.zeros_like(mask)
    while eroded.any():
        following = _erode(eroded)
        found |= eroded > _dilate(following)
        if torch.equal(following, eroded):  # images filled from end to end: nothing erodes them
            return found | eroded.bool()
        eroded = following
    return found


def _of_mask(mask: Tensor, steps: int) -> Tensor:
    eroded, found = mask.to(torch.uint8), torch.zeros_like(mask)
    for _ in range(steps + 1):
        following = _erode(eroded)
        found |= eroded > _dilate(following)
        eroded = following
    return found


def _walk(x: Tensor, steps: int, kept: list | None = None) -> Tensor:
    """The recurrence without autograd; keeps E_{k+1}, D_k and S_k."""
    found = None
    for _ in range(steps + 1):
        following = _erode(x)
        opened = _dilate(following)
        ridge = torch.sub(x, opened).relu_()
        if found is None:
            found = ridge
        else:
            more = torch.addcmul(ridge, found, ridge, value=-1).relu_()
            found = found + more if kept is not None else found.add_(more)
        if kept is not None:
            kept += [following, opened, found]
        x = following
    return found


class _Skeleton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, steps):
        kept: list[Tensor] = []
        found = _walk(x, steps, kept)
        ctx.steps = steps
        # The last one is returned, and in no step needed.
        ctx.save_for_backward(x, *kept[:-1])
        return found

    @staticmethod
    def backward(ctx, grad):
        x, *kept = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or is_batched(grad):
            with torch.enable_grad():
                fresh = x.view_as(x) if again else x.detach().requires_grad_()
                value = _by_autograd(fresh, ctx.steps)
                return torch.autograd.grad(value, fresh, grad, create_graph=again)[0], None
        eroded, opened, found = [x, *kept[::3]], kept[1::3], kept[2::3]
        by_found, by_eroded = grad, None  # with respect to S_k and E_{k+1}
        for k in range(ctx.steps, -1, -1):
            ridge = torch.sub(eroded[k], opened[k]).relu_()
            by_ridge = by_found
            if k:
                room = torch.rsub(found[k - 1], 1).relu_()  # of relu(delta (1 - S))
                by_ridge = by_found * room
                room = room.sign_().mul_(ridge)
                by_found = torch.addcmul(by_found, by_found, room, value=-1)
            by_ridge = by_ridge * ridge.sign_()
            by_next = _dilate_backward(by_ridge.neg(), eroded[k + 1], opened[k])
            if by_eroded is not None:
                by_next += by_eroded
            axes = range(2, x.dim())
            by_eroded = _backward(by_next, eroded[k], eroded[k + 1], axes).add_(by_ridge)
        return by_eroded, None


def _erode(x: Tensor) -> Tensor:
    return _extreme(torch.minimum, x, range(2, x.dim()))


def _dilate(x: Tensor) -> Tensor:
    for axis in range(2, x.dim()):
        x = _extreme(torch.maximum, x, (axis,))
    return x


def _extreme(choose: Callable[..., Tensor], x: Tensor, axes: Sequence[int]) -> Tensor:
    """Of each voxel and its two neighbours along every axis."""
    best = x.clone(memory_format=torch.contiguous_format)
    for axis in axes:
        for near, far in _shifts(x, axis):
            part = best[near]
            choose(part, x[far], out=part)
    return best


def _shifts(x: Tensor, axis: int) -> list[tuple[tuple, tuple]]:
    """Indices of the voxels that have a neighbour, and of the neighbours: before, and behind."""
    if x.shape[axis] < 2:
        return []
    front = (slice(None),) * axis
    low, high = (*front, slice(None, -1)), (*front, slice(1, None))
    return [(high, low), (low, high)]


def _dilate_backward(grad: Tensor, x: Tensor, best: Tensor) -> Tensor:
    along = [x]
    for axis in range(2, x.dim() - 1):
        along.append(_extreme(torch.maximum, along[-1], (axis,)))
    for axis in range(x.dim() - 1, 1, -1):
        x = along.pop()
        grad = _backward(grad, x, best, (axis,))
        best = x
    return grad


def _backward(grad: Tensor, x: Tensor, best: Tensor, axes: Sequence[int]) -> Tensor:
    """Of `_extreme`: the gradient of each extreme goes to the first voxel that is equal to it."""
    # Products with the sign of a distance, not masks: comparisons and selections take ten times as
    # long where their outcome is as good as random.
    rest = grad * _apart(x, best)
    result = grad - rest
    shifts = [shift for axis in axes for shift in _shifts(x, axis)]
    for at, (near, far) in enumerate(shifts):
        left = rest[near]
        if at + 1 == len(shifts):  # what is left has come from there
            result[far] += left
            break
        more = left * _apart(x[far], best[near])
        result[far] += left.sub_(more)
        left.copy_(more)
    return result


def _apart(x: Tensor, best: Tensor) -> Tensor:
    """0 where two values are equal, otherwise 1."""
    return torch.sub(x, best).sign_().abs_()


def _by_autograd(x: Tensor, steps: int) -> Tensor:
    """The same out of place, for transforms, graphs and higher derivatives."""
    found = None
    for _ in range(steps + 1):
        following = opened = _erosion(x)
        for axis in range(2, x.dim()):
            opened = _window(torch.maximum, opened, axis)
        ridge = torch.relu(x - opened)
        found = ridge if found is None else found + torch.relu(ridge - found * ridge)
        x = following
    return found


def _erosion(x: Tensor) -> Tensor:
    least = _window(torch.minimum, x, 2)
    for axis in range(3, x.dim()):
        least = torch.minimum(least, _window(torch.minimum, x, axis))
    return least


def _window(choose: Callable[..., Tensor], x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    if size < 2:
        return x
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)], axis)
    behind = torch.cat([x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)], axis)
    return choose(choose(x, before), behind)
