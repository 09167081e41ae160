"""The ops of sorting_network on the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._reference import gradients
from pyloss.ops.sorting_network.records import DISTRIBUTIONS, KINDS, NETWORKS, ORDERS, REDUCTIONS


def formulas():
    """The reference, imported with its first use."""
    from pyloss.reference import sorting_network

    return sorting_network


def named(net: list[int], options: list[float]) -> tuple:
    """The reference's arguments of an op's."""
    network, distribution, k = net
    return NETWORKS[network], DISTRIBUTIONS[distribution], *options, k


def _rowwise(gx: Tensor, x: Tensor) -> Tensor:
    """NaN in all of a row that holds one, also where no comparator has spread it."""
    return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, gx).contiguous()


def sort(x, net, options):
    return formulas().sorting_network_sort(x, *named(net, options)).contiguous()


def sort_bwd(gy, x, net, options):
    def function(x):
        return formulas().sorting_network_sort(x, *named(net, options))

    return _rowwise(gradients(function, [x], [gy])[0], x)


def apply(x, f, transpose, net, options):
    return formulas().sorting_network_apply(x, f, transpose, *named(net, options)).contiguous()


def apply_bwd(g, x, f, transpose, net, options, need_f):
    def function(x, f):
        return formulas().sorting_network_apply(x, f, transpose, *named(net, options))

    gx, gf = gradients(function, [x, f], [g], [True, need_f])
    return _rowwise(gx, x), gf.contiguous() if need_f else f.new_empty((0,))


def permutation(x, net, options):
    y, p = formulas().sorting_network_permutation(x, *named(net, options))
    return y.contiguous(), p.contiguous()


def permutation_bwd(gy, gp, x, net, options):
    def function(x):
        return formulas().sorting_network_permutation(x, *named(net, options))

    return _rowwise(gradients(function, [x], [gy, gp])[0], x)


def composed_loss(x, target, count, codes, *network_args):
    order, kind, reduction = codes
    each = formulas().sorting_network_loss(
        x, target, count, ORDERS[order], KINDS[kind], *network_args
    )
    return formulas().reduced(each, REDUCTIONS[reduction])


def loss(x, target, count, codes, net, options, need_grad):
    def function(x):
        return composed_loss(x, target, count, codes, *named(net, options))

    found = function(x).contiguous()
    if not need_grad:
        return found, x.new_empty((0,))
    return found, _rowwise(gradients(function, [x], [torch.ones_like(found)])[0], x)
