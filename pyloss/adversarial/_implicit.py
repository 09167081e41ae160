"""What an optimal attack adds to the gradient of a loss, because it moves with the parameters.

The attack is the minimum over delta of b(theta, delta) = -a(theta, delta) - c sum_j [log(eps -
delta_j) + log(eps + delta_j)], a the objective of the attack and the rest a barrier at the box. By
the implicit function theorem

    d/dtheta l(theta, delta(theta)) = d_theta l + d_theta <d_delta a, v>

with v of (d2 b / d delta2) v = d_delta l.
"""

from __future__ import annotations

import torch
from torch import Tensor


def implicit_term(
    losses: Tensor, attacked: Tensor, delta: Tensor, eps: float, barrier: float, cg_steps: int = 0
) -> Tensor:
    """Zeros, (N,), whose gradient is the second part above.

    Args:
        losses: l of each row, (N,), a function of `delta` and of the parameters.
        attacked: a of each row, (N,), likewise; twice differentiable.
        delta: (N, ...), inside of the box; requires a gradient. Rows do not depend on each other.
        eps: half the width of the box.
        barrier: c > 0.
        cg_steps: 0: of the second derivative of b the diagonal of the barrier alone, which is all
            there is for a network of ReLU; else so many steps of conjugate gradients on the whole.
    """
    (slope,) = torch.autograd.grad(losses.sum(), delta, retain_graph=True)
    (pull,) = torch.autograd.grad(attacked.sum(), delta, create_graph=True)
    # Half a power of the inverse of the barrier's diagonal: at the walls 0, where nothing moves.
    room = (eps**2 - delta.detach() ** 2).clamp(min=0)
    scale = room / torch.sqrt(2 * barrier * (eps**2 + delta.detach() ** 2))

    def curved(w: Tensor) -> Tensor:
        """The second derivative of b in coordinates in which that of the barrier is 1."""
        if not pull.requires_grad:
            return w
        (bent,) = torch.autograd.grad(pull, delta, scale * w, retain_graph=True, allow_unused=True)
        return w if bent is None else w - scale * bent

    v = scale * _solved(curved, scale * slope, cg_steps)
    term = (pull * v).flatten(1).sum(1)
    return term - term.detach()


def _solved(matrix, b: Tensor, steps: int) -> Tensor:
    """x with matrix(x) = b, each row by itself; b itself without steps."""
    if steps == 0:
        return b

    def dot(s: Tensor, t: Tensor) -> Tensor:
        return (s * t).flatten(1).sum(1).view(-1, *(1,) * (b.dim() - 1))

    x, r = torch.zeros_like(b), b
    p, rr = r, dot(r, r)
    for _ in range(steps):
        ap = matrix(p)
        bend = dot(p, ap)
        # A row ends where it is solved, or where b is not convex.
        going = (rr > 0) & (bend > 0)
        alpha = torch.where(going, rr / torch.where(going, bend, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * ap
        new = dot(r, r)
        p = r + torch.where(going, new / torch.where(going, rr, 1.0), 0.0) * p
        rr = torch.where(going, new, 0.0)
    return x
