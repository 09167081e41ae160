"""The CUDA implementations of the ops of sorting_network: allocate the results, call the kernels.

x is a contiguous ``(b, n)``, float32 or float64. Nothing here waits for the device, but for the
first use of a splitter selection's table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue
from pyloss.ops.sorting_network.records import (
    KINDS,
    ORDERS,
    REDUCTIONS,
    Call,
    call,
    features,
    problem,
)

_LONGEST_ROW = 4096  # of the kernels of P and of the losses


def _run(x: Tensor, net: list[int], options: list[float], task: Call) -> None:
    with torch.cuda.device_of(x):
        p = problem(x, net, options)
        size = _C.cuda_sorting_network_scratch_bytes(p, task, x.get_device())
        buffer = x.new_empty((size,), dtype=torch.uint8)
        _C.cuda_sorting_network(p, task, address(buffer), size, *queue(x))


def sort(x: Tensor, net: list[int], options: list[float]) -> Tensor:
    y = torch.empty_like(x)
    _run(x, net, options, call("sort", y=y))
    return y


def sort_bwd(gy: Tensor, x: Tensor, net: list[int], options: list[float]) -> Tensor:
    gy, gx = gy.contiguous(), torch.empty_like(x)
    _run(x, net, options, call("sort_bwd", gy=gy, gx=gx))
    return gx


def apply(x: Tensor, f: Tensor, transpose: bool, net: list[int], options: list[float]) -> Tensor:
    f = f.contiguous()
    out = x.new_empty((*x.shape, f.shape[2]))
    _run(x, net, options, call("apply", features=features(x, f, transpose), out=out))
    return out


def apply_bwd(
    g: Tensor,
    x: Tensor,
    f: Tensor,
    transpose: bool,
    net: list[int],
    options: list[float],
    need_f: bool,
) -> tuple[Tensor, Tensor]:
    g, f = g.contiguous(), f.contiguous()
    gx = torch.empty_like(x)
    gf = torch.empty_like(f) if need_f else f.new_empty((0,))
    if x.shape[0] == 0:
        return gx, gf.zero_()
    task = call(
        "apply_bwd", features=features(x, f, transpose), g=g, gx=gx, gf=gf if need_f else None
    )
    _run(x, net, options, task)
    return gx, gf


def _unit_matrix(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).unsqueeze(0)


def permutation(x: Tensor, net: list[int], options: list[float]) -> tuple[Tensor, Tensor]:
    b, n = x.shape
    if n > _LONGEST_ROW:
        return sort(x, net, options), apply(x, _unit_matrix(x), False, net, options)
    y, p = torch.empty_like(x), x.new_empty((b, n, n))
    _run(x, net, options, call("permutation", y=y, out=p))
    return y, p


def permutation_bwd(
    gy: Tensor | None, gp: Tensor, x: Tensor, net: list[int], options: list[float]
) -> Tensor:
    if x.shape[1] > _LONGEST_ROW:
        gx, _ = apply_bwd(gp, x, _unit_matrix(x), False, net, options, False)
        return gx if gy is None else gx.add_(sort_bwd(gy, x, net, options))
    gp, gx = gp.contiguous(), torch.empty_like(x)
    gy = gy if gy is None else gy.contiguous()
    _run(x, net, options, call("permutation_bwd", g=gp, gy=gy, gx=gx))
    return gx


def loss(
    x: Tensor,
    target: Tensor,
    count: Tensor | None,
    codes: list[int],  # order, kind, reduction
    net: list[int],
    options: list[float],
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    order, kind, reduction = codes
    from pyloss.reference.sorting_network import reduced, target_ranks  # with the first use

    first, count, nan = target_ranks(target, ORDERS[order], count)
    loss, gx = _rank_loss(x, first, count, kind, net, options, need_grad)
    if nan is not None:
        loss.masked_fill_(nan, torch.nan)
        if need_grad:
            gx.masked_fill_(nan.unsqueeze(1), torch.nan)
    reduction = REDUCTIONS[reduction]
    if need_grad and reduction == "mean":
        gx.div_(max(len(x), 1))
    return reduced(loss, reduction), gx


def _rank_loss(x, first, count, kind, net, options, need_grad) -> tuple[Tensor, Tensor]:
    if x.shape[1] > _LONGEST_ROW:
        return _long_loss(x, first, count, kind, net, options, need_grad)
    first = first.contiguous()
    count = count if count is None else count.contiguous()
    loss = x.new_empty((x.shape[0],))
    gx = torch.empty_like(x) if need_grad else x.new_empty((0,))
    asked = gx if need_grad else None
    _run(x, net, options, call("loss", kind=kind, first=first, count=count, loss=loss, gx=asked))
    return loss, gx


def _long_loss(x, first, count, kind, net, options, need_grad):
    """By way of P: where n is this large, P is at least half a hundred megabytes an item."""
    from pyloss.reference.sorting_network import permutation_loss

    _, p = permutation(x, net, options)
    with torch.enable_grad():
        p.requires_grad_(need_grad)
        loss = permutation_loss(p, first, count, KINDS[kind])
        if not need_grad:
            return loss, x.new_empty((0,))
        (gp,) = torch.autograd.grad(loss.sum(), p)
    return loss.detach(), permutation_bwd(None, gp, x, net, options)
