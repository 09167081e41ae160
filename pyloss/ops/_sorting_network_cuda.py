"""The CUDA implementations of the ops of sorting_network: allocate the results, call the kernels.

x is a contiguous ``(b, n)``, float32 or float64; see pyloss/ops/sorting_network.py for the schemas.
Nothing here waits for the device, but for the first use of a splitter selection's table.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, address
from pyloss.ops._sorting_network_cpu import KINDS, ORDERS, REDUCTIONS, network_code, splitter_table

_SPLITTER = 3
# The codes of csrc/cuda/sorting_network.h.
_SORT, _SORT_BWD, _APPLY, _APPLY_BWD, _PERMUTATION, _PERMUTATION_BWD, _LOSS = range(7)
_LONGEST_ROW = 4096  # of the kernels of P and of the losses


@functools.cache  # never dropped: kernels read the tables by address
def _table_on(device: torch.device, n: int, k: int) -> tuple[Tensor, Tensor]:
    table, offsets = splitter_table(n, k)
    return table.to(device), offsets.to(device)


def _run(
    x: Tensor,
    net: list[int],
    options: list[float],
    task: int,
    *,
    features: tuple[int, int, int] = (0, 0, 0),  # width, transpose, one f for the batch
    kind: int = 0,
    inputs: tuple[Tensor | None, ...] = (None,) * 5,  # f, g, gy, first, count
    outputs: tuple[Tensor | None, ...],  # y, out, loss, gx, gf
) -> None:
    network, distribution, k = net
    network = network_code(network, x.shape[1])
    table = offsets = None
    with torch.cuda.device_of(x):
        if network == _SPLITTER:
            table, offsets = _table_on(x.device, x.shape[1], k)
        problem = (
            *x.shape, DTYPE_CODES[x.dtype], network, distribution, address(x),
            address(table), 0 if table is None else len(table),
            address(offsets), 0 if offsets is None else len(offsets) - 1,
        )  # fmt: skip
        call = (task, *features, kind, *map(address, inputs), *map(address, outputs))
        nbytes = _C.cuda_sorting_network_scratch_bytes(problem, options, call)
        scratch = x.new_empty((nbytes,), dtype=torch.uint8)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _C.cuda_sorting_network(problem, options, call, address(scratch), nbytes, stream)


def sort(x: Tensor, net: list[int], options: list[float]) -> Tensor:
    y = torch.empty_like(x)
    _run(x, net, options, _SORT, outputs=(y, None, None, None, None))
    return y


def sort_bwd(gy: Tensor, x: Tensor, net: list[int], options: list[float]) -> Tensor:
    gy, gx = gy.contiguous(), torch.empty_like(x)
    inputs = (None, None, gy, None, None)
    _run(x, net, options, _SORT_BWD, inputs=inputs, outputs=(None, None, None, gx, None))
    return gx


def _features(x: Tensor, f: Tensor, transpose: bool) -> tuple[int, int, int]:
    return f.shape[2], int(transpose), int(f.shape[0] != x.shape[0])


def apply(x: Tensor, f: Tensor, transpose: bool, net: list[int], options: list[float]) -> Tensor:
    f = f.contiguous()
    out = x.new_empty((*x.shape, f.shape[2]))
    _run(
        x, net, options, _APPLY, features=_features(x, f, transpose),
        inputs=(f, None, None, None, None), outputs=(None, out, None, None, None),
    )  # fmt: skip
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
    _run(
        x, net, options, _APPLY_BWD, features=_features(x, f, transpose),
        inputs=(f, g, None, None, None), outputs=(None, None, None, gx, gf if need_f else None),
    )  # fmt: skip
    return gx, gf


def _unit_matrix(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).unsqueeze(0)


def permutation(x: Tensor, net: list[int], options: list[float]) -> tuple[Tensor, Tensor]:
    b, n = x.shape
    if n > _LONGEST_ROW:
        return sort(x, net, options), apply(x, _unit_matrix(x), False, net, options)
    y, p = torch.empty_like(x), x.new_empty((b, n, n))
    _run(x, net, options, _PERMUTATION, outputs=(y, p, None, None, None))
    return y, p


def permutation_bwd(
    gy: Tensor | None, gp: Tensor, x: Tensor, net: list[int], options: list[float]
) -> Tensor:
    if x.shape[1] > _LONGEST_ROW:
        gx, _ = apply_bwd(gp, x, _unit_matrix(x), False, net, options, False)
        return gx if gy is None else gx.add_(sort_bwd(gy, x, net, options))
    gp, gx = gp.contiguous(), torch.empty_like(x)
    gy = gy if gy is None else gy.contiguous()
    inputs = (None, gp, gy, None, None)
    _run(x, net, options, _PERMUTATION_BWD, inputs=inputs, outputs=(None, None, None, gx, None))
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
    _run(
        x, net, options, _LOSS, kind=kind, inputs=(None, None, None, first, count),
        outputs=(None, None, loss, gx if need_grad else None, None),
    )  # fmt: skip
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
