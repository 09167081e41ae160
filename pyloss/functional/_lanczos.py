"""The Lanczos recursion of a symmetric operator, which keeps all its vectors orthogonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A in the basis Q of the Krylov space of `start`: tridiagonal.

    Args:
        matvec: v -> A v for a batch of one vector, (1, *S).
        start: (1, *S), not 0.
        steps: of the recursion; it ends sooner where the space is exhausted.

    Returns:
        (diagonal (m,), off-diagonal (m - 1,), Q (m, numel of S)), m <= steps.
    """
    basis = [(start / start.norm()).reshape(-1)]
    diagonal, beside = [], []
    scale = 0.0
    for step in range(steps):
        q = basis[-1]
        w = matvec(q.view(start.shape)).reshape(-1)
        diagonal.append(q @ w)
        scale = max(scale, w.norm().item())
        whole = torch.stack(basis)
        for _ in range(2):  # once leaves what cancellation has brought in
            w = w - (whole @ w) @ whole
        size = w.norm()
        # Too small is rounding alone: its direction would be noise.
        if step + 1 == steps or size.item() <= 1000 * torch.finfo(w.dtype).eps * scale:
            break
        beside.append(size)
        basis.append(w / size)
    off = torch.stack(beside) if beside else start.new_zeros(0)
    return torch.stack(diagonal), off, torch.stack(basis)


def ritz(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, (m,), and their vectors of length 1, (m, numel of S)."""
    diagonal, off, basis = lanczos(matvec, start, steps)
    small = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(small)
    return values, vectors.T @ basis
