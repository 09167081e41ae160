"""Frames: what makes any function of points, or of a graph, symmetric by an average over few copies
of its input."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._frames import (
    axes_of,
    check_cloud_options,
    check_clouds,
    clouds_of,
    signs_of,
)


class Frames(NamedTuple):
    """What :func:`pyloss.functional.pca_frames` returns. Float32, or float64; differentiable.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(2, 9, 3)
        >>> frames = pyloss.functional.pca_frames(x, group="SE")
        >>> inside = (x - frames.t.unsqueeze(1)).unsqueeze(1) @ frames.R  # F copies of each cloud
        >>> inside.shape
        torch.Size([2, 4, 9, 3])
    """

    R: Tensor  #: ``(B, F, d, d)``, orthogonal, the axes as columns
    t: Tensor  #: ``(B, d)``, centre of the cloud for E and SE, 0 for O and SO
    gap: Tensor  #: ``(B)``, smallest gap of neighbouring eigenvalues, relative to the largest


def pca_frames(
    x: Tensor,
    *,
    group: str = "SE",
    offsets: Tensor | None = None,
    weight: Tensor | None = None,
    gap_tol: float | None = None,
    degenerate: str = "warn",
    detach: bool = False,
    generator: torch.Generator | None = None,
) -> Frames:
    r"""Frames of clouds of points, from their principal axes.

    .. math:: t = \frac{\sum_i w_i x_i}{\sum_i w_i}, \qquad
              C = \sum_i w_i (x_i - t)(x_i - t)^\top = V \operatorname{diag}(\lambda) V^\top, \qquad
              \mathcal F(x) = \{ (V \operatorname{diag}(s), t) : s \in \{\pm 1\}^d \}

    A move g of the cloud moves its frames: :math:`\mathcal F(g x) = g \mathcal F(x)`. So the
    average of :math:`f((x - t) R)` over them is invariant, whatever f is
    (:class:`pyloss.nn.FrameAverage`). The eigenvalues ascend; the first frame of O and E has the
    largest entry of every axis positive.

    Args:
        x: ``(B, N, d)``, or ``(P, d)`` with ``offsets``; d from 1 to 8; floating, half types are
            computed in float32.
        group: ``'O'``, ``'SO'``: rotations about 0, with and without reflections, and t = 0;
            ``'E'``, ``'SE'``: with translations. O and E have :math:`2^d` frames, SO and SE the
            half of them whose determinant is 1.
        offsets: ``(B + 1)``, int32 or int64: cloud b is ``x[offsets[b] : offsets[b + 1]]``.
        weight: w >= 0 of each point, ``(B, N)`` or ``(P)``; 0 for padding, which may hold anything.
        gap_tol: eigenvalues closer than that, relative to the largest, count as equal; None: 1e-4,
            1e-8 in float64.
        degenerate: what becomes of clouds with equal eigenvalues, whose axes are not unique (a
            square, points on a line in space). ``'raise'``: ValueError. ``'warn'``: UserWarning.
            ``'random'``: axes drawn uniformly among the possible ones, equivariant in expectation.
            On a GPU, in compiled graphs and under torch.func nobody waits for the answer: 'warn'
            says nothing there (look at ``gap``), 'raise' is an assertion on the device, and nothing
            under torch.func.
        detach: frames are constants for the gradient.
        generator: of ``'random'``.

    Returns:
        :class:`Frames`. Where eigenvalues count as equal, the gradient leaves out their gap, by
        which it would divide. A cloud with a NaN or an infinity has R of NaN. A cloud without
        weight has t = 0, R of signs and gap 0.

    Raises:
        TypeError, NotImplementedError: x or weight not floating; ``detach`` or ``generator`` that
            is none.
        ValueError: shapes that do not fit; d not from 1 to 8; an unknown group or policy;
            ``gap_tol`` negative; a cloud without points, unless ``degenerate='random'``; what
            ``degenerate='raise'`` finds; offsets that do not rise from 0 to P.
        RuntimeError: offsets of another dtype; tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(4, 10, 3)
        >>> R, t, gap = pyloss.functional.pca_frames(x, group="E")
        >>> R.shape, t.shape
        (torch.Size([4, 8, 3, 3]), torch.Size([4, 3]))

    Reference:
        Puny et al. Frame averaging for invariant and equivariant network design. arXiv 2110.03336.
    """
    check_cloud_options(group, degenerate)
    detach = checks.checked_flag("detach", detach)
    checks.check_generator(generator)
    if gap_tol is not None:
        checks.check_range("gap_tol", gap_tol, 0)
    check_clouds(x, weight, offsets, degenerate)
    axes, t = axes_of(
        clouds_of(x, weight, offsets),
        group=group,
        gap_tol=gap_tol,
        degenerate=degenerate,
        detach=detach,
        generator=generator,
    )
    signs = signs_of(axes, group).transpose(0, 1)
    return Frames(axes.basis.unsqueeze(1) * signs.unsqueeze(2), t, axes.gap)


# --------------------------------------------------------------------------------------------------
# Graphs


def laplacian_sort_frame(
    edge_index: Tensor,
    num_nodes: int,
    *,
    decimals: int = 2,
    max_frames: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Orders of the nodes of a graph that do not depend on how they are numbered.

    With :math:`L = D - A = \sum_k \lambda_k P_k`, :math:`P_k` the projector on an eigenspace, node
    i has the row :math:`(\sqrt{(P_k)_{ii}})_k`, which no choice of eigenvectors changes; for a
    simple eigenvalue it is the size of the eigenvector's entry. The rows, rounded, are sorted;
    nodes with equal ones may stand in any order, and the frame is all orders that sort them.

    Args:
        edge_index: ``(2, E)``, integers: an edge between the nodes of each column, in both
            directions. Loops and repeated edges change nothing.
        num_nodes: n.
        decimals: that the rows are rounded to; fewer make more nodes equal.
        max_frames: all orders of the frame where they are no more, else so many drawn at random,
            with repetition.
        generator: of these.

    Returns:
        ``(F, n)``, int64, on the device of the edges: ``x[perm[f]]`` are the nodes in the f-th
        order. The numbers are worked out on the CPU, which waits for a GPU.

    Raises:
        TypeError: edges that are no integers; ``num_nodes``, ``decimals`` or ``max_frames`` that
            are none.
        ValueError: ``edge_index`` not of shape (2, E); a node outside of [0, n); numbers too small.

    Example:
        >>> import torch, pyloss
        >>> path = torch.tensor([[0, 2], [2, 1]])  # 0 - 2 - 1
        >>> pyloss.functional.laplacian_sort_frame(path, 3)
        tensor([[2, 0, 1],
                [2, 1, 0]])

    Reference:
        Puny et al. arXiv 2110.03336, section 3.3.
    """
    checks.check_tensor("edge_index", edge_index)
    if edge_index.dtype not in checks.INTEGERS:
        raise TypeError(f"edge_index must be of integers, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must be (2, E), got shape {list(edge_index.shape)}")
    n = checks.checked_count("num_nodes", num_nodes)
    decimals = checks.checked_count("decimals", decimals)
    max_frames = checks.checked_count("max_frames", max_frames, 1)
    checks.check_generator(generator)
    edges = edge_index.detach().cpu().long()
    if edges.numel() and not (0 <= int(edges.min()) and int(edges.max()) < n):
        raise ValueError(
            f"edge_index must name nodes from 0 to num_nodes - 1 = {n - 1}, got "
            f"{int(edges.min())} to {int(edges.max())}"
        )
    rank = _ranks(_node_rows(edges, n), decimals)
    return _orders(rank, max_frames, generator).to(edge_index.device)


def _node_rows(edges: Tensor, n: int) -> Tensor:
    """``(n, K)``: the size of each node in each eigenspace of the Laplacian."""
    a = torch.zeros((n, n), dtype=torch.float64)
    a[edges[0], edges[1]] = a[edges[1], edges[0]] = 1.0
    a.fill_diagonal_(0)
    value, vectors = torch.linalg.eigh(torch.diag(a.sum(1)) - a)
    top = max(1.0, float(value.abs().max())) if n else 1.0
    space = torch.nn.functional.pad((value.diff() > 1e-6 * top).cumsum(0), (1, 0))[:n]
    squares = a.new_zeros((n, int(space.max()) + 1 if n else 0))
    return squares.index_add(1, space, vectors.square()).sqrt()


def _ranks(rows: Tensor, decimals: int) -> Tensor:
    """Place of each row among the distinct ones, sorted by their columns in order."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.int64)
    # Off the middle between two decimals, where entries often lie (1/8 of 64 nodes in a ring) and
    # the last bit of each would decide.
    rows = rows + 10.0 ** -(decimals + 4)
    return torch.unique(rows.round(decimals=decimals), dim=0, return_inverse=True)[1]


def _orders(rank: Tensor, max_frames: int, generator: torch.Generator | None) -> Tensor:
    n = len(rank)
    ties = [(rank == r).nonzero().flatten() for r in range(int(rank.max()) + 1 if n else 0)]
    if math.prod(math.factorial(len(t)) for t in ties) <= max_frames:
        parts = itertools.product(*(itertools.permutations(t.tolist()) for t in ties))
        orders = [list(itertools.chain.from_iterable(p)) for p in parts]
        return torch.tensor(orders, dtype=torch.int64).reshape(len(orders), n)
    device = None if generator is None else generator.device
    keys = torch.rand((max_frames, n), generator=generator, dtype=torch.float64, device=device)
    # A random order, then a stable sort by rank: every order of equal nodes is as likely.
    drawn = keys.cpu().argsort(1)
    return drawn.gather(1, torch.argsort(rank[drawn], dim=1, stable=True))
