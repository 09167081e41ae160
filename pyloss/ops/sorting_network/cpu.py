"""The CPU implementations of the ops of sorting_network: allocate the results, call the kernels.

x is a contiguous ``(b, n)``, float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address
from pyloss.ops.sorting_network.records import features, problem, targets


def sort(x: Tensor, net: list[int], options: list[float]) -> Tensor:
    y = torch.empty_like(x)
    _C.sorting_network_sort(problem(x, net, options), y.data_ptr(), torch.get_num_threads())
    return y


def sort_bwd(gy: Tensor, x: Tensor, net: list[int], options: list[float]) -> Tensor:
    gy, gx = gy.contiguous(), torch.empty_like(x)
    _C.sorting_network_sort_bwd(
        problem(x, net, options), gy.data_ptr(), gx.data_ptr(), torch.get_num_threads()
    )
    return gx


def apply(x: Tensor, f: Tensor, transpose: bool, net: list[int], options: list[float]) -> Tensor:
    f = f.contiguous()
    out = x.new_empty((*x.shape, f.shape[2]))
    _C.sorting_network_apply(
        problem(x, net, options), features(x, f, transpose), out.data_ptr(),
        torch.get_num_threads(),
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
    _C.sorting_network_apply_bwd(
        problem(x, net, options), features(x, f, transpose), g.data_ptr(), gx.data_ptr(),
        address(gf) if need_f else 0, torch.get_num_threads(),
    )  # fmt: skip
    return gx, gf


def permutation(x: Tensor, net: list[int], options: list[float]) -> tuple[Tensor, Tensor]:
    b, n = x.shape
    y, p = torch.empty_like(x), x.new_empty((b, n, n))
    _C.sorting_network_permutation(
        problem(x, net, options), y.data_ptr(), p.data_ptr(), torch.get_num_threads()
    )
    return y, p


def permutation_bwd(
    gy: Tensor | None, gp: Tensor, x: Tensor, net: list[int], options: list[float]
) -> Tensor:
    gp, gx = gp.contiguous(), torch.empty_like(x)
    gy = gy if gy is None else gy.contiguous()
    _C.sorting_network_permutation_bwd(
        problem(x, net, options), address(gy), gp.data_ptr(), gx.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
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
    target, count = target.contiguous(), count if count is None else count.contiguous()
    loss = x.new_empty(() if codes[2] else (x.shape[0],))
    gx = torch.empty_like(x) if need_grad else x.new_empty((0,))
    _C.sorting_network_loss(
        problem(x, net, options), targets(target, count, codes), loss.data_ptr(),
        address(gx) if need_grad else 0, torch.get_num_threads(),
    )  # fmt: skip
    return loss, gx
