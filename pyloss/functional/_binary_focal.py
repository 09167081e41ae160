"""Focal terms of independent channels, with a gradient of few passes.

With z = -x where t = 1 and x where t = 0, s = sigmoid(z) is 1 - p_t, and

    f = a s^gamma softplus(z),    df/dz = a s^gamma (s + gamma (1 - s) softplus(z))

which has no quotient. Autograd would keep seven tensors of the size of the input; here it keeps the
input, the target and softplus(z), which takes the longest to compute. Inside of torch.compile and
the transforms of torch.func the same terms are left to autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional._regions import as_bytes
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched

_EXACT = 40.0  # from here on softplus(z) is z, in float64 too


def binary_focal(x: Tensor, t: Tensor, gamma: float, alpha: float | Tensor | None) -> Tensor:
    """Focal term of each entry, no less than float32; shapes broadcast against x.

    t: bool, or floating in [0, 1]. alpha: balance a t + (1 - a)(1 - t), or a tensor of factors of
    the entries with t = 1.
    """
    x = x.to(accumulator_dtype(x.dtype))
    if t.dtype != torch.bool:
        t = t.to(x.dtype)
    if torch.compiler.is_compiling() or functorch_active() or forward_ad_active():
        return _terms(x, t, gamma, alpha)
    return _BinaryFocal.apply(x, t, gamma, alpha)


class _BinaryFocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t, gamma, alpha):
        several = isinstance(alpha, Tensor)
        ce = _cross_entropy(x, t)
        ctx.save_for_backward(x, t, ce, *([alpha] if several else []))
        ctx.gamma, ctx.alpha = gamma, None if several else alpha
        value = ce * _miss(x, t).pow_(gamma) if gamma != 0 else ce.clone()
        balance = _balance(x, t, alpha)
        return value if balance is None else value.mul_(balance)

    @staticmethod
    def backward(ctx, grad):
        x, t, ce, *factors = ctx.saved_tensors
        alpha = factors[0] if factors else ctx.alpha
        if torch.is_grad_enabled() or is_batched(grad):
            return (*_by_autograd(ctx, x, t, alpha, grad), None, None)
        # With s = sigmoid(z): s^gamma and gamma (1 - s) ce
        s = _miss(x, t)
        power = s.pow(ctx.gamma)
        inner = torch.rsub(s, 1).mul_(ce).mul_(ctx.gamma)
        balance = _balance(x, t, alpha)
        by_x = by_t = None
        if ctx.needs_input_grad[1]:
            by_t = -x * power * (1 + 2 * inner)
            if balance is not None:
                by_t = by_t * balance
                if not isinstance(alpha, Tensor):
                    by_t = by_t + power * ce * (2 * alpha - 1)
            by_t = by_t * grad
        if ctx.needs_input_grad[0]:
            if t.dtype == torch.bool:
                by_x = inner.add_(s).mul_(_sign(x, t))
            else:
                by_x = torch.sigmoid(x).sub_(t).addcmul_(inner, _sign(x, t))
            by_x = by_x.mul_(power).mul_(grad)
            by_x = by_x if balance is None else by_x.mul_(balance)
        return by_x, by_t, None, None


def _by_autograd(ctx, x, t, alpha, grad):
    """What can be differentiated again, and mapped over gradients."""
    needed = ctx.needs_input_grad[:2]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A fresh node: the graph behind x is not walked.
        pair = [
            v if not n else v.view_as(v) if again else v.detach().requires_grad_()
            for v, n in zip((x, t), needed)
        ]
        value = _terms(*pair, ctx.gamma, alpha)
        wanted = [v for v, n in zip(pair, needed) if n]
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=again))
    return [next(found) if n else None for n in needed]


def _terms(x, t, gamma, alpha) -> Tensor:
    """As autograd takes it."""
    value = _cross_entropy(x, t)
    if gamma != 0:
        # s^gamma, whose derivative is finite where s is 0.
        z = x * _sign(x, t)
        value = value * torch.exp(-gamma * F.softplus(-z, threshold=_EXACT))
    balance = _balance(x, t, alpha)
    return value if balance is None else value * balance


def _numbers(x, t) -> Tensor:
    return as_bytes(t).to(x.dtype) if t.dtype == torch.bool else t


def _sign(x, t) -> Tensor:
    """1 - 2t, of which x is multiplied to z."""
    return torch.rsub(_numbers(x, t), 1, alpha=2)


def _miss(x, t) -> Tensor:
    """s, which is 1 - p_t for t of 0 and 1."""
    return torch.sigmoid(x * _sign(x, t))


def _cross_entropy(x, t) -> Tensor:
    if t.dtype == torch.bool:
        return F.softplus(x * _sign(x, t), threshold=_EXACT)
    return F.softplus(-x, threshold=_EXACT) + x * (1 - t)


def _balance(x, t, alpha) -> Tensor | None:
    if alpha is None:
        return None
    if isinstance(alpha, Tensor):
        return torch.where(t if t.dtype == torch.bool else t == 1, alpha, 1.0)
    return (1 - alpha) + (2 * alpha - 1) * _numbers(x, t)
