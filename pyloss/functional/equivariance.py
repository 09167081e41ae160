"""How far a function is from being equivariant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sums import reduced


def equivariance_error(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    rho_in: Tensor,
    rho_out: Tensor,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""By how much f of a transformed input differs from the transformed output.

    .. math::
        \frac{\|f(\rho_{in} x) - \rho_{out} f(x)\|}
             {\|f(\rho_{in} x)\| + \|\rho_{out} f(x)\|} \in [0, 1]

    Args:
        f: of rows, ``(N, in)`` to ``(N, out)``; it is called twice.
        x: ``(B, in)``, floating.
        rho_in, rho_out: the same n transformations of inputs and of outputs, ``(n, in, in)`` and
            ``(n, out, out)``: :meth:`pyloss.regularizers.SymmetryType.sample` draws them. They are
            rounded to the dtype of ``x`` and of the output.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over transformations and samples.

    Returns:
        0-d, or ``(n, B)``, of the dtype of the output, no less than float32. Where both norms are 0
        it is 0; the mean of nothing is NaN.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch, pyloss
        >>> from pyloss.regularizers import SymmetryType
        >>> rho, = SymmetryType.SO(3).sample([(1, "vector")])
        >>> f = lambda v: v * v.square().sum(1, keepdim=True)
        >>> error = pyloss.functional.equivariance_error(f, torch.randn(32, 3), rho, rho)
        >>> error.item() < 1e-5
        True

    Reference:
        Kim, Lee, Yang, Lee. arXiv 2306.00356.
    """
    checks.check_floating("x", x)
    checks.check_reduction(reduction)
    if x.dim() != 2:
        raise ValueError(f"x must be (B, in), got {list(x.shape)}")
    _check_matrices("rho_in", rho_in, x.shape[1])
    with checks.without_autocast(x):
        moved = torch.einsum("nij,bj->nbi", rho_in.to(x), x).flatten(0, 1)
    first, second = f(moved), f(x)
    if second.dim() != 2 or len(second) != len(x):
        raise ValueError(f"f must return ({len(x)}, out), and returned {list(second.shape)}")
    _check_matrices("rho_out", rho_out, second.shape[1])
    if len(rho_out) != len(rho_in):
        raise ValueError(
            f"rho_out must have as many matrices as rho_in, {len(rho_in)}, got {len(rho_out)}"
        )
    wide = torch.promote_types(second.dtype, torch.float32)
    with checks.without_autocast(x):
        rho = rho_out.to(second.device, wide)
        second = torch.einsum("nij,bj->nbi", rho, second.to(wide))
        first = first.to(wide).view(second.shape)
        # Squares of large numbers are infinite, of small ones 0: the ratio is of no unit.
        size = torch.maximum(_size(first), _size(second))
        size = torch.where(size > 0, size, 1.0)
        first, second = first / size, second / size
        off, norm = _norm(first - second), _norm(first) + _norm(second)
        each = torch.where(norm == 0, 0.0, off / torch.where(norm == 0, 1.0, norm))
    return each if reduction == "none" else reduced(each.flatten(), reduction)


def _size(x: Tensor) -> Tensor:
    return x.detach().abs().sum(-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _check_matrices(name: str, rho, size: int) -> None:
    checks.check_floating(name, rho)
    if rho.dim() != 3 or rho.shape[1:] != (size, size):
        raise ValueError(f"{name} must be (n, {size}, {size}), got {list(rho.shape)}")
