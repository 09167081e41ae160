"""The Lanczos recursion of a symmetric operator, which keeps all its vectors orthogonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import widest

# What remains of a vector after a projection is accurate if the projection took away little of it.
_KEPT = 0.7


class Recursion(NamedTuple):
    """A in the basis of a Krylov space, where it is tridiagonal; m <= steps."""

    diagonal: Tensor  # (m,), float64
    beside: Tensor  # (m - 1,), float64
    basis: Tensor  # (m, n), orthonormal rows
    rest: Tensor  # 0-d: the next entry beside; 0 where the space is exhausted


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Recursion:
    """A in the basis of the Krylov space of `start`.

    It ends sooner where the space is exhausted, and waits for the device in each step to see that.

    Args:
        matvec: v -> A v, of (n,).
        start: (n,), not 0; the vectors have its dtype.
        steps: of the recursion; n at most count.
    """
    steps = min(steps, start.numel())
    basis = start.new_empty(steps, start.numel())
    start = start / start.abs().amax()  # its square is a number
    basis[0] = start / start.norm()
    numbers = start.new_empty(2, steps, dtype=widest(start.device))
    # Less is rounding alone: its direction would be noise.
    least = max(1e-10, 10 * torch.finfo(start.dtype).eps)
    scale = 0.0
    for step in range(steps):
        q, whole = basis[step], basis[: step + 1]
        w = matvec(q).to(start.dtype)
        scale = max(scale, _length(w).item())
        along = q @ w
        w = w - along * q
        if step:
            w -= numbers[1, step - 1].to(w.dtype) * basis[step - 1]
        before = _length(w)
        w -= (whole @ w) @ whole
        size = _length(w)
        if not size.item() > _KEPT * before.item():
            w -= (whole @ w) @ whole  # once leaves what cancellation has brought in
            size = _length(w)
        numbers[0, step], numbers[1, step] = along, size
        if size.item() <= least * scale:
            steps, numbers[1, step] = step + 1, 0.0
            break
        if step + 1 < steps:
            torch.div(w, size, out=basis[step + 1])
    return Recursion(
        numbers[0, :steps], numbers[1, : steps - 1], basis[:steps], numbers[1, steps - 1]
    )


def _length(v: Tensor) -> Tensor:
    """The norm, where squares would be no numbers of the dtype, too: the Hessian of a loss in small
    units."""
    most = v.abs().amax()
    most = torch.where(most.isfinite() & (most > 0), most, 1.0)
    return most * (v / most).norm()


def eigen(recursion: Recursion) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the tridiagonal matrix, ascending, (m,), and its eigenvectors as columns; NaN
    where A gave some."""
    small = torch.diag(recursion.diagonal)
    small = small + torch.diag(recursion.beside, 1) + torch.diag(recursion.beside, -1)
    if not bool(small.isfinite().all()):
        return torch.full_like(recursion.diagonal, torch.nan), torch.full_like(small, torch.nan)
    return torch.linalg.eigh(small)


def ritz(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, (m,), and their vectors of length 1, (m, n).

    Args:
        matvec: v -> A v for a batch of one vector, (1, *S), of n numbers.
        start: (1, *S), not 0.
        steps: of the recursion; it ends sooner where the space is exhausted.
    """
    found = lanczos(lambda v: matvec(v.view(start.shape)).reshape(-1), start.reshape(-1), steps)
    values, vectors = eigen(found)
    return values, vectors.T.to(found.basis.dtype) @ found.basis
