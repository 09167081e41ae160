"""The CPU implementations of the ops of sorting_network: allocate the results, call the kernels.

x is a contiguous ``(b, n)``, float32 or float64; see pyloss/ops/sorting_network.py for the schemas.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, address

# A name's place is its code in the ops and the kernels.
NETWORKS = ("bitonic", "odd_even", "batcher", "splitter_selection", "auto")
DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
KINDS = ("bce", "row_ce", "col_ce")
# What a loss's target holds: the ranks, or values whose equal ones keep their order or share ranks.
ORDERS = ("ranks", "values", "values_descending", "shared", "shared_descending")
REDUCTIONS = ("none", "mean", "sum")

_SPLITTER = 3


def network_code(code: int, n: int) -> int:
    """The code of a network that the kernels know."""
    from pyloss.reference.sorting_network import resolved  # with its first use

    return NETWORKS.index(resolved(NETWORKS[code], n))


@functools.cache  # never dropped: kernels read the tables by address
def splitter_table(n: int, k: int) -> tuple[Tensor, Tensor]:
    """(pairs (C, 2), offsets of the layers (L + 1)), int32, of splitter selection."""
    from pyloss.reference.sorting_network import network

    layers = network("splitter_selection", n, k)
    pairs = [pair for layer in layers for pair in zip(layer.lo, layer.hi)]
    offsets = [0]
    for layer in layers:
        offsets.append(offsets[-1] + len(layer.lo))
    table = torch.tensor(pairs, dtype=torch.int32, device="cpu").reshape(-1, 2)
    return table, torch.tensor(offsets, dtype=torch.int32, device="cpu")


def _problem(x: Tensor, net: list[int]) -> tuple[int, ...]:
    network, distribution, k = net
    b, n = x.shape
    network = network_code(network, n)
    head = (b, n, DTYPE_CODES[x.dtype], network, distribution, x.data_ptr())
    if network != _SPLITTER:
        return (*head, 0, 0, 0, 0)
    table, offsets = splitter_table(n, k)
    return (*head, table.data_ptr(), len(table), offsets.data_ptr(), len(offsets) - 1)


def sort(x: Tensor, net: list[int], options: list[float]) -> Tensor:
    y = torch.empty_like(x)
    _C.sorting_network_sort(_problem(x, net), options, y.data_ptr(), torch.get_num_threads())
    return y


def sort_bwd(gy: Tensor, x: Tensor, net: list[int], options: list[float]) -> Tensor:
    gy, gx = gy.contiguous(), torch.empty_like(x)
    _C.sorting_network_sort_bwd(
        _problem(x, net), options, gy.data_ptr(), gx.data_ptr(), torch.get_num_threads()
    )
    return gx


def _features(x: Tensor, f: Tensor, transpose: bool) -> tuple[int, ...]:
    return f.data_ptr(), int(f.shape[0] != x.shape[0]), int(transpose), f.shape[2]


def apply(x: Tensor, f: Tensor, transpose: bool, net: list[int], options: list[float]) -> Tensor:
    f = f.contiguous()
    out = x.new_empty((*x.shape, f.shape[2]))
    _C.sorting_network_apply(
        _problem(x, net), options, _features(x, f, transpose), out.data_ptr(),
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
        _problem(x, net), options, _features(x, f, transpose), g.data_ptr(), gx.data_ptr(),
        address(gf) if need_f else 0, torch.get_num_threads(),
    )  # fmt: skip
    return gx, gf


def permutation(x: Tensor, net: list[int], options: list[float]) -> tuple[Tensor, Tensor]:
    b, n = x.shape
    y, p = torch.empty_like(x), x.new_empty((b, n, n))
    _C.sorting_network_permutation(
        _problem(x, net), options, y.data_ptr(), p.data_ptr(), torch.get_num_threads()
    )
    return y, p


def permutation_bwd(
    gy: Tensor | None, gp: Tensor, x: Tensor, net: list[int], options: list[float]
) -> Tensor:
    gp, gx = gp.contiguous(), torch.empty_like(x)
    gy = gy if gy is None else gy.contiguous()
    _C.sorting_network_permutation_bwd(
        _problem(x, net), options, address(gy), gp.data_ptr(), gx.data_ptr(),
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
    order, *others = codes
    targets = (order, target.data_ptr(), DTYPE_CODES[target.dtype], address(count), *others)
    loss = x.new_empty(() if codes[2] else (x.shape[0],))
    gx = torch.empty_like(x) if need_grad else x.new_empty((0,))
    _C.sorting_network_loss(
        _problem(x, net), options, targets, loss.data_ptr(), address(gx) if need_grad else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, gx
