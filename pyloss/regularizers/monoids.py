"""What makes an operator of two elements the sum of a commutative monoid, as penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._sums import reduced, summed
from pyloss.functional._tree import tree_of, with_spare_row

Operator = Callable[[Tensor, Tensor], Tensor]


def associativity_loss(
    op: Operator,
    x: Tensor,
    offsets: Tensor,
    *,
    samples: int = 1024,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""How far an operator is from associative, on triples that a tree reduction may meet.

    .. math:: \left\| (a \circ b) \circ c - a \circ (b \circ c) \right\|^2

    a, b, c are three nodes of one level of the tree over one segment, the elements themselves being
    the lowest. The larger a segment, the more triples it gives; one of fewer than three elements
    gives none. With :attr:`pyloss.nn.LCMAggregation.combine`, and a weight of about 0.01, this
    makes the result depend less on the order of the elements.

    Args:
        op: of ``(P, D)`` and ``(P, D)`` to ``(P, D)``; its parameters get gradients.
        x: ``(N, D)``, floating: what ``op`` combines, one segment behind the other.
        offsets: ``(S + 1,)``, int32 or int64.
        samples: number of triples. The tree is computed once for all of them.
        generator: of the random choice, on the device of ``x``; default: torch's own.
        reduction: ``"mean"`` or ``"sum"`` over the triples, or ``"none"``.

    Returns:
        0-d, or ``(samples,)``; no less than float32. 0 where no segment has three elements.

    Raises:
        TypeError, RuntimeError, ValueError: tensors of a wrong dtype or shape, offsets that do not
            cut x into segments, an option out of range, a result of ``op`` of another shape.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.randn(10, 4), torch.tensor([0, 6, 10])
        >>> pyloss.regularizers.associativity_loss(torch.maximum, x, offsets)
        tensor(0.)

    Reference:
        Ong, Veličković. Learnable Commutative Monoids for Graph Neural Networks. arXiv 2212.08541.
    """
    nodes, valid = _sampled_nodes(op, x, offsets, 3, samples, generator, reduction)
    a, b, c = nodes.unbind(1)
    ab, bc = _combined(op, torch.cat([a, b]), torch.cat([b, c])).chunk(2)
    left, right = _combined(op, torch.cat([ab, a]), torch.cat([c, bc])).chunk(2)
    return _of_samples(left, right, valid, reduction)


def commutativity_loss(
    op: Operator,
    x: Tensor,
    offsets: Tensor,
    *,
    samples: int = 1024,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""How far an operator is from commutative, on pairs that a tree reduction may meet.

    .. math:: \left\| a \circ b - b \circ a \right\|^2

    of two nodes of one level of the tree over one segment. It is 0 for every operator of
    :class:`pyloss.nn.LCMAggregation`, and meant for one of your own.

    Args:
        op, x, offsets, samples, generator, reduction: as for :func:`associativity_loss`.

    Returns:
        As :func:`associativity_loss`; 0 where no segment has two elements.

    Raises:
        As :func:`associativity_loss`.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.randn(10, 4), torch.tensor([0, 6, 10])
        >>> bool(pyloss.regularizers.commutativity_loss(torch.sub, x, offsets) > 0)
        True
    """
    nodes, valid = _sampled_nodes(op, x, offsets, 2, samples, generator, reduction)
    a, b = nodes.unbind(1)
    left, right = _combined(op, torch.cat([a, b]), torch.cat([b, a])).chunk(2)
    return _of_samples(left, right, valid, reduction)


def identity_loss(op: Operator, e: Tensor, x: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""How far e is from the identity of an operator.

    .. math:: \left\| e \circ x_i - x_i \right\|^2

    Args:
        op: of ``(N, D)`` and ``(N, D)`` to ``(N, D)``; its parameters get gradients.
        e: ``(D,)``, floating, such as ``identity`` of
            :class:`pyloss.nn.LCMAggregation`.
        x: ``(N, D)``, floating.
        reduction: ``"mean"`` or ``"sum"`` over the rows of x, or ``"none"``.

    Returns:
        0-d, or ``(N,)``; no less than float32. NaN for the mean of no rows.

    Raises:
        TypeError, RuntimeError, ValueError: tensors of a wrong dtype, device or shape, an unknown
            reduction.

    Example:
        >>> import torch, pyloss
        >>> pyloss.regularizers.identity_loss(torch.add, torch.zeros(4), torch.randn(10, 4))
        tensor(0.)

    Reference:
        Ong, Veličković. Learnable Commutative Monoids for Graph Neural Networks. arXiv 2212.08541.
    """
    _check_operands(op, x, reduction)
    checks.check_floating("e", e)
    checks.check_device("e", e, x, "x")
    if e.shape != x.shape[1:]:
        raise ValueError(f"e must have the shape {list(x.shape[1:])}, got {list(e.shape)}")
    found = _combined(op, e.to(x.dtype).expand_as(x), x)
    return reduced(_squared_distance(found, x), reduction)


# --------------------------------------------------------------------------------------------------


def _check_operands(op: Any, x: Tensor, reduction: str) -> None:
    if not callable(op):
        raise TypeError(f"op must be callable, got {type(op).__name__}")
    checks.check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {list(x.shape)}")
    checks.check_reduction(reduction)


def _combined(op: Operator, a: Tensor, b: Tensor) -> Tensor:
    found = op(a, b)
    checks.check_tensor("the result of op", found)
    if found.shape != a.shape:
        raise ValueError(
            f"op must keep the shape of its arguments, {list(a.shape)}, got {list(found.shape)}"
        )
    return found


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    work = torch.promote_types(a.dtype, torch.float32)
    return (a.to(work) - b.to(work)).square().sum(1)


def _of_samples(left: Tensor, right: Tensor, valid: Tensor, reduction: str) -> Tensor:
    each = torch.where(valid, _squared_distance(left, right), 0.0)
    if reduction == "none":
        return each
    total = summed(each)
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total


def _sampled_nodes(
    op: Operator,
    x: Tensor,
    offsets: Tensor,
    least: int,
    samples: int,
    generator: torch.Generator | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Nodes (samples, least, D) of a level and segment each, and which of the samples there are."""
    _check_operands(op, x, reduction)
    segment.check_offsets(offsets, x.shape[0])
    checks.check_device("offsets", offsets, x, "x")
    samples = checks.checked_count("samples", samples, 1)
    checks.check_generator(generator)
    shape = (samples, 2 + least)
    # float64: float32 does not reach all of more than 2^24 elements.
    u = torch.empty(shape, dtype=checks.widest(x.device), device=x.device)
    u = u.uniform_() if generator is None else u.uniform_(generator=generator)
    level, rows, valid = _places(offsets.detach(), least, u)
    buffer = with_spare_row(x)
    nodes = buffer[rows]
    for at, pairs in enumerate(tree_of(offsets, x.shape[0]).levels, 1):
        left, right = pairs.unbind(1)
        buffer = buffer.index_copy(0, left, _combined(op, buffer[left], buffer[right]))
        nodes = torch.where((level == at).view(-1, 1, 1), buffer[rows], nodes)
    return nodes, valid


def _places(offsets: Tensor, least: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(level, rows of the buffer (samples, least), whether there is such a sample)."""

    def below(u: Tensor, bound: Tensor) -> Tensor:
        return (u * bound).long().minimum(bound - 1).clamp(min=0)

    lengths = offsets.diff().long()
    if lengths.shape[0] == 0:
        rows = torch.zeros((u.shape[0], least), dtype=torch.int64, device=u.device)
        return rows[:, 0], rows, rows[:, 0] > 0
    ends = torch.where(lengths >= least, lengths, 0).cumsum(0)
    own = torch.searchsorted(ends, below(u[:, 0], ends[-1]), right=True)
    own = own.clamp(max=lengths.shape[0] - 1)
    n = lengths[own]
    # At level l there are ceil(n / 2^l) nodes: enough while 2^l <= (n - 1) / (least - 1).
    bound = ((n - 1).clamp(min=0)).div(least - 1, rounding_mode="floor")
    level = below(u[:, 1], torch.frexp(checks.widened(bound))[1].long())
    step = torch.ones_like(level).bitwise_left_shift(level)
    nodes = (n + step - 1).div(step, rounding_mode="floor")
    picks: list[Tensor] = []
    for i in range(least):
        pick = below(u[:, 2 + i], nodes - i)
        for taken in torch.stack(picks).sort(0).values if picks else ():
            pick = pick + (pick >= taken)
        picks.append(pick)
    rows = offsets[:-1].long()[own].unsqueeze(1) + torch.stack(picks, 1) * step.unsqueeze(1)
    valid = n >= least
    return level, torch.where(valid.unsqueeze(1), rows, 0), valid
