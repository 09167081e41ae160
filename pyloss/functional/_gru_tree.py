"""The tree of _tree.py with a GRU cell at its nodes.

The products with the weights are taken of all rows of a level at once: both of a row, which serve
(a, b) and (b, a).

The backward goes the same way from the top. It finds what the forward kept of each level, operands
and gates, fewer than 2 N rows of 6 D numbers: less than a GRU cell keeps, and to compute the
products again would be a quarter of all work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyloss.functional._tree import tree_of, with_spare_row
from pyloss.ops._launch import without_autocast
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched

_CACHE = 2 << 20  # bytes of a block's products, for each thread

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
# In place, with the backward written out. (a, b) and (b, a) are two rows, each with its products.


def _cell_in_place(gates: Tensor, inner: Tensor, state: Tensor) -> Tensor:
    """(R, D) of all that is linear: gates (R, 3 D), which become r, z and n, and `inner` (R, D),
    that r multiplies."""
    d = state.shape[1]
    gates[:, : 2 * d].sigmoid_()
    n = gates[:, 2 * d :].addcmul_(gates[:, :d], inner).tanh_()
    return torch.lerp(n, state, gates[:, d : 2 * d])


def _cell_backward(
    g: Tensor, gates: Tensor, inner: Tensor, state: Tensor, of_gates: Tensor, of_inner: Tensor
) -> Tensor:
    """Gradients of what is linear, into the last two, and of the state beside them."""
    d, aten = state.shape[1], torch.ops.aten
    r, z, n = gates.split(d, 1)
    to_r, to_z, to_n = of_gates.split(d, 1)
    direct = g * z
    aten.tanh_backward.grad_input(g - direct, n, grad_input=to_n)
    torch.mul(to_n, r, out=of_inner)
    torch.mul(to_n, inner, out=to_r)
    torch.sub(state, n, out=to_z).mul_(g)
    both = of_gates[:, : 2 * d]
    aten.sigmoid_backward.grad_input(both, gates[:, : 2 * d], grad_input=both)
    return direct


def _blocks(levels: Sequence[Tensor], d: int) -> Iterator[Tensor]:
    """The pairs in the order of the tree, on a CPU in parts whose products stay in its cache."""
    size = max(32, _CACHE * torch.get_num_threads() // (2 * 6 * d * 4))
    for rows in levels:
        yield from rows.split(size) if rows.device.type == "cpu" else (rows,)


def _operands(rows: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Inputs and states: rows of the buffer, (R,) each."""
    if symmetric:
        return rows.reshape(-1), rows.flip(1).view(-1)
    return rows[:, 0], rows[:, 1]


class _GruTree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, keep, symmetric, roots, *levels):
        d, buffer, blocks = x.shape[1], with_spare_row(x), list(_blocks(levels, x.shape[1]))
        # One piece of memory for all: fresh pages cost as much as the products.
        sizes = [len(rows) * (2 if symmetric else 1) for rows in blocks]
        size = sum(sizes) if keep else max(sizes, default=0)
        kept = tuple(x.new_empty((size, width)) for width in (d, d, 3 * d, d))
        added = bias[: 3 * d] + torch.cat([bias[3 * d : 5 * d], bias.new_zeros(d)])
        at = 0
        for rows, count in zip(blocks, sizes):
            a, b, gates, inner = (t[at : at + count] for t in kept)
            for index, operand in zip(_operands(rows, symmetric), (a, b)):
                torch.index_select(buffer, 0, index, out=operand)
            torch.addmm(added, a, weight[: 3 * d].mT, out=gates)
            gates[:, : 2 * d].addmm_(b, weight[3 * d : 5 * d].mT)
            torch.addmm(bias[5 * d :], b, weight[5 * d :].mT, out=inner)
            found = _cell_in_place(gates, inner, b)
            found = (found[::2] + found[1::2]).div_(2) if symmetric else found
            buffer.index_copy_(0, rows[:, 0], found)
            at += count if keep else 0
        if keep:
            ctx.save_for_backward(x, weight, bias, *kept, roots, *levels)
            ctx.symmetric = symmetric
        return buffer.index_select(0, roots)

    @staticmethod
    def backward(ctx, g):
        saved, symmetric, needed = ctx.saved_tensors, ctx.symmetric, ctx.needs_input_grad[:3]
        with without_autocast(g):  # the backward may be called inside it
            if torch.is_grad_enabled() or is_batched(g):  # create_graph, is_grads_batched
                found = _composed_gradients(g, needed, symmetric, *saved[:3], *saved[7:])
            else:
                found = _gradients(g, symmetric, *saved[:3], saved[3:7], *saved[7:])
        return *found, *(None,) * (len(saved) - 5)


def _composed_gradients(g, needed, symmetric, x, weight, bias, roots, *levels):
    with torch.enable_grad():
        inputs = [t.view_as(t) for t in (x, weight, bias)]
        out = _composed(*inputs, symmetric, roots, *levels)
        wanted = [t for t, yes in zip(inputs, needed) if yes]
        found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
    return [next(found) if yes else None for yes in needed]


def _gradients(g, symmetric, x, weight, bias, kept, roots, *levels):
    d, blocks, at = x.shape[1], list(_blocks(levels, x.shape[1])), len(kept[0])
    of_buffer = x.new_zeros((x.shape[0] + 1, d)).index_copy_(0, roots, g)
    of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    most = max((len(rows) for rows in blocks), default=0) * (2 if symmetric else 1)
    products = x.new_empty((most, 3 * d)), x.new_empty((most, d))
    for rows in reversed(blocks):
        if symmetric:
            left = rows[:, :1].expand(-1, 2).reshape(-1)
            upstream = of_buffer.index_select(0, left).div_(2)
        else:
            upstream = of_buffer.index_select(0, rows[:, 0])
        at, end = at - len(upstream), at
        a, b, gates, inner = (t[at:end] for t in kept)
        of_gates, of_inner = (t[: len(upstream)] for t in products)
        of_b = _cell_backward(upstream, gates, inner, b, of_gates, of_inner)
        # What r and z take of the input and of the state has one gradient.
        both = of_gates[:, : 2 * d]
        of_b.addmm_(both, weight[3 * d : 5 * d]).addmm_(of_inner, weight[5 * d :])
        of_a = of_gates @ weight[: 3 * d]
        of_weight[: 3 * d].addmm_(of_gates.mT, a)
        of_weight[3 * d : 5 * d].addmm_(both.mT, b)
        of_weight[5 * d :].addmm_(of_inner.mT, b)
        of_bias[: 3 * d] += of_gates.sum(0)
        of_bias[5 * d :] += of_inner.sum(0)
        if symmetric:
            of_a.view(-1, 2, d).add_(of_b.view(-1, 2, d).flip(1))
            of_buffer.index_copy_(0, rows.reshape(-1), of_a)
        else:
            of_buffer.index_copy_(0, rows[:, 0], of_a).index_copy_(0, rows[:, 1], of_b)
    of_bias[3 * d : 5 * d] = of_bias[: 2 * d]
    return of_buffer[:-1], of_weight, of_bias


def gru_tree(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    symmetric: bool,
    offsets: Tensor,
    max_length: int | None = None,
) -> Tensor:
    """(S, D): the result of each segment, that of an empty one of no meaning.

    weight (6 D, D) and bias (6 D,) hold those of the input before those of the hidden state.
    """
    tree = tree_of(offsets, x.shape[0], max_length)
    if torch.compiler.is_compiling() or functorch_active() or forward_ad_active():
        return _composed(x, weight, bias, symmetric, tree.roots, *tree.levels)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    return _GruTree.apply(x, weight, bias, keep, symmetric, tree.roots, *tree.levels)
