"""Learnable commutative monoids: an operator of two elements, in a tree over each segment."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._gru_tree import gru_tree
from pyloss.ops._launch import accumulator_dtype, without_autocast


def segment_gru_reduce(
    x: Tensor,
    offsets: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    identity: Tensor | None = None,
    symmetric: bool = True,
    max_length: int | None = None,
) -> Tensor:
    r"""Each segment reduced by a GRU cell in a balanced binary tree.

    .. math:: a \circ b = \tfrac12 \left( \mathrm{GRU}(a, b) + \mathrm{GRU}(b, a) \right), \qquad
              \mathrm{GRU}(x, h) = (1 - z)\, n + z\, h

    with the gates r, z, n of :class:`torch.nn.GRUCell` for the input x and the state h. On each
    level the nodes 2j and 2j + 1 of a segment are a pair, and an odd last one moves up unchanged:
    ceil(log2 n) levels, and n - 1 pairs for a segment of n elements, whatever else is in the batch.
    Both products of a row, W_ih x and W_hh x, are computed once for the two orders.

    Args:
        x: ``(N, D)``, floating, one segment behind the other.
        offsets: ``(S + 1,)``, int32 or int64: segment s is ``x[offsets[s]:offsets[s + 1]]``.
        w_ih, w_hh: ``(3 D, D)``, the weights of a ``torch.nn.GRUCell(D, D)``.
        b_ih, b_hh: ``(3 D,)``; None: 0.
        identity: ``(D,)``, what an empty segment gives; None: 0.
        symmetric: False: GRU(a, b) alone, a before b in the segment.
        max_length: that no segment exceeds. Saves levels on a GPU and in compiled graphs, where no
            length is read: None stands there for N.

    Returns:
        ``(S, D)``, of the dtype of ``x``, float32 for half types under autocast; products too are
        then of float32. Differentiable in all floating arguments, as often as you like. Where the
        offsets cannot be looked at (on a GPU, in compiled graphs) there are ceil(log2 max_length)
        levels, with up to 0.3 N pairs that count nowhere, and nothing waits for the device.

    Raises:
        TypeError, RuntimeError, ValueError: tensors of a wrong dtype, device or shape; offsets
            that do not cut x into segments.

    Example:
        >>> import torch, pyloss
        >>> cell = torch.nn.GRUCell(8, 8)
        >>> offsets = torch.tensor([0, 3, 3, 5])
        >>> weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        >>> pyloss.functional.segment_gru_reduce(torch.randn(5, 8), offsets, *weights).shape
        torch.Size([3, 8])

    Reference:
        Ong, Veličković. Learnable Commutative Monoids for Graph Neural Networks. arXiv 2212.08541.
    """
    checks.check_floating("x", x)
    checks.check_supported("segment_gru_reduce", x)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {list(x.shape)}")
    if not x.shape[1]:
        raise ValueError(f"x must have a feature, got {list(x.shape)}")
    segment.check_offsets(offsets, x.shape[0])
    checks.check_device("offsets", offsets, x, "x")
    checks.checked_flag("symmetric", symmetric)
    if max_length is not None:
        max_length = checks.checked_count("max_length", max_length)
        segment.check_longest(offsets, max_length)
    d = x.shape[1]
    for name, t, shape in (
        ("w_ih", w_ih, (3 * d, d)),
        ("w_hh", w_hh, (3 * d, d)),
        ("b_ih", b_ih, (3 * d,)),
        ("b_hh", b_hh, (3 * d,)),
        ("identity", identity, (d,)),
    ):
        if t is None and name[0] != "w":
            continue
        checks.check_floating(name, t)
        checks.check_device(name, t, x, "x")
        if t.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(t.shape)}")
    dtype = checks.result_dtype(x.dtype, x)
    work = accumulator_dtype(x.dtype)
    zeros = x.new_zeros(3 * d, dtype=work)
    with without_autocast(x):
        weight = torch.cat([w_ih.to(work), w_hh.to(work)])
        bias = torch.cat([zeros if b is None else b.to(work) for b in (b_ih, b_hh)])
        found = gru_tree(x.to(work), weight, bias, symmetric, offsets, max_length)
    return fill_empty(found, offsets, identity).to(dtype)


def fill_empty(found: Tensor, offsets: Tensor, identity: Tensor | None) -> Tensor:
    """Results (S, D) with the identity (D,), or 0, for empty segments."""
    some = (offsets.diff() > 0).unsqueeze(1)
    return torch.where(some, found, 0.0 if identity is None else identity.to(found.dtype))


def shuffled(offsets: Tensor, total: int, generator: torch.Generator | None) -> Tensor:
    """The elements (total,) in random order within their segments."""
    order = torch.empty(total, dtype=checks.widest(offsets.device), device=offsets.device)
    order = (
        order.uniform_() if generator is None else order.uniform_(generator=generator)
    ).argsort()
    return order[segment.segment_ids(offsets, total)[order].argsort(stable=True)]
