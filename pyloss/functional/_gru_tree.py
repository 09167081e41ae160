"""The tree of _tree.py with a GRU cell at its nodes.

The products with the weights are taken of all rows of a level at once: both of a row, which serve
(a, b) and (b, a).

The backward goes the same way from the top. It finds what the forward kept of each level, children
and gates, fewer than 2 N rows of 7 D numbers: without padding that is less than a GRU cell keeps,
and to compute the products again would be a quarter of all work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional._tree import tree_of, with_spare_row
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched

_CACHE = 1 << 20  # bytes of a block's products, for each thread

# --------------------------------------------------------------------------------------------------
# Of operations that have derivatives and transforms of every kind


def _cell(children: Tensor, weight: Tensor, bias: Tensor, symmetric: bool) -> Tensor:
    """(P, D) of children (P, 2, D): the mean over both orders, or GRU(left, right)."""
    d = children.shape[2]
    both = torch.addmm(bias, children.flatten(0, 1), weight.mT).view(-1, 2, 6 * d)
    found = []
    for i in (0, 1) if symmetric else (0,):
        u, v, state = both[:, i, : 3 * d], both[:, 1 - i, 3 * d :], children[:, 1 - i]
        r, z = (u[:, : 2 * d] + v[:, : 2 * d]).sigmoid().chunk(2, 1)
        n = (u[:, 2 * d :] + r * v[:, 2 * d :]).tanh()
        found.append(n + z * (state - n))
    return (found[0] + found[1]) / 2 if symmetric else found[0]


def _composed(x, weight, bias, symmetric, roots, *levels) -> Tensor:
    buffer = with_spare_row(x)
    for rows in levels:
        children = buffer.index_select(0, rows.flatten()).view(-1, 2, x.shape[1])
        buffer = buffer.index_copy(0, rows[:, 0], _cell(children, weight, bias, symmetric))
    return buffer.index_select(0, roots)


# --------------------------------------------------------------------------------------------------
# In place, with the backward written out


def _sides(products: Tensor, i: int):
    """Of products (P, 2, 6 D), what order i of a pair has: from its input and from its state."""
    d = products.shape[2] // 6
    return products[:, i, : 3 * d].split(d, 1), products[:, 1 - i, 3 * d :].split(d, 1)


def _cell_in_place(children: Tensor, products: Tensor, orders: tuple[int, ...]) -> Tensor:
    """The results (P, D); r, z and n replace the products of the input."""
    total = None
    for i in orders:
        (r, z, n), (of_r, of_z, of_n) = _sides(products, i)
        r.add_(of_r).sigmoid_()
        z.add_(of_z).sigmoid_()
        n.addcmul_(r, of_n).tanh_()
        found = torch.lerp(n, children[:, 1 - i], z)
        total = found if total is None else total.add_(found)
    return total if len(orders) == 1 else total.div_(2)


def _cell_backward(
    g: Tensor, children: Tensor, gates: Tensor, orders: tuple[int, ...], products: Tensor
) -> Tensor:
    """Gradients of the products, into `products`, and of the children as states."""
    direct = torch.zeros_like(children) if len(orders) == 1 else torch.empty_like(children)
    for i in orders:
        (r, z, n), (_, _, of_n) = _sides(gates, i)
        (to_r, to_z, to_n), (from_r, from_z, from_n) = _sides(products, i)
        torch.mul(g, z, out=direct[:, 1 - i])
        slope = torch.sub(g, direct[:, 1 - i])
        torch.addcmul(slope, slope * n, n, value=-1, out=to_n)
        torch.mul(to_n, r, out=from_n)
        torch.mul(from_n, of_n, out=slope)
        torch.addcmul(slope, slope, r, value=-1, out=to_r)
        torch.sub(children[:, 1 - i], n, out=slope).mul_(direct[:, 1 - i])
        torch.addcmul(slope, slope, z, value=-1, out=to_z)
        from_r.copy_(to_r)
        from_z.copy_(to_z)
    return direct


def _blocks(levels: tuple[Tensor, ...] | list[Tensor], d: int) -> list[Tensor]:
    """The pairs in the order of the tree, on a CPU in parts whose products stay in its cache."""
    if not levels or levels[0].device.type != "cpu":
        return list(levels)
    size = max(32, _CACHE * torch.get_num_threads() // (2 * 6 * d * 4))
    return [part for rows in levels for part in rows.split(size)]


class _GruTree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, keep, symmetric, roots, *levels):
        d, buffer, blocks = x.shape[1], with_spare_row(x), _blocks(levels, x.shape[1])
        # One piece of memory for all: fresh pages cost as much as the products.
        sizes = [len(rows) for rows in blocks]
        size = sum(sizes) if keep else max(sizes, default=0)
        children, products = x.new_empty((size, 2, d)), x.new_empty((size, 2, 6 * d))
        at, orders = 0, (0, 1) if symmetric else (0,)
        for rows in blocks:
            own, gates = children[at : at + len(rows)], products[at : at + len(rows)]
            torch.index_select(buffer, 0, rows.view(-1), out=own.view(-1, d))
            torch.addmm(bias, own.view(-1, d), weight.mT, out=gates.view(-1, 6 * d))
            buffer.index_copy_(0, rows[:, 0], _cell_in_place(own, gates, orders))
            at += len(rows) if keep else 0
        if keep:
            ctx.save_for_backward(x, weight, bias, children, products, roots, *levels)
            ctx.symmetric = symmetric
        return buffer.index_select(0, roots)

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, children, gates, roots, *levels = ctx.saved_tensors
        nothing = (None,) * (3 + len(levels))
        if torch.is_grad_enabled() or is_batched(g):  # create_graph, is_grads_batched
            needed = ctx.needs_input_grad[:3]
            with torch.enable_grad():
                inputs = [t.view_as(t) for t in (x, weight, bias)]
                out = _composed(*inputs, ctx.symmetric, roots, *levels)
                wanted = [t for t, yes in zip(inputs, needed) if yes]
                found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
            return *(next(found) if yes else None for yes in needed), *nothing
        d, orders, blocks = (
            x.shape[1],
            (0, 1) if ctx.symmetric else (0,),
            _blocks(levels, x.shape[1]),
        )
        of_buffer = x.new_zeros((x.shape[0] + 1, d)).index_copy_(0, roots, g)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        most = max((len(rows) for rows in blocks), default=0)
        fill = torch.empty_like if ctx.symmetric else torch.zeros_like  # the other order has none
        memory, at = fill(gates[:most]), len(gates)
        for rows in reversed(blocks):
            at, end = at - len(rows), at
            own, products = children[at:end], memory[: len(rows)]
            upstream = of_buffer.index_select(0, rows[:, 0])
            if ctx.symmetric:
                upstream.div_(2)
            direct = _cell_backward(upstream, own, gates[at:end], orders, products).view(-1, d)
            flat = products.view(-1, 6 * d)
            of_weight.addmm_(flat.mT, own.view(-1, d))
            of_bias += flat.sum(0)
            of_buffer.index_copy_(0, rows.view(-1), direct.addmm_(flat, weight))
        return of_buffer[:-1], of_weight, of_bias, *nothing


def gru_tree(x: Tensor, weight: Tensor, bias: Tensor, symmetric: bool, offsets: Tensor) -> Tensor:
    """(S, D): the result of each segment, that of an empty one of no meaning.

    weight (6 D, D) and bias (6 D,) hold those of the input before those of the hidden state.
    """
    tree = tree_of(offsets, x.shape[0])
    if torch.compiler.is_compiling() or functorch_active() or forward_ad_active():
        return _composed(x, weight, bias, symmetric, tree.roots, *tree.levels)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    return _GruTree.apply(x, weight, bias, keep, symmetric, tree.roots, *tree.levels)
