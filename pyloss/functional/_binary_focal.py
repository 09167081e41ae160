"""Focal terms of independent channels, of which the backward needs nothing but the logits.

With z = -x where t = 1 and x where t = 0, s = sigmoid(z) is 1 - p_t, and

    f = a s^gamma softplus(z),    df/dz = a s^gamma (s + gamma (1 - s) softplus(z))

which has no quotient. Autograd would keep five tensors of the size of the input; here it keeps the
input and the target. Inside of torch.compile and the transforms of torch.func the same terms are
left to autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    inside = torch.compiler.is_compiling() or functorch_active() or forward_ad_active()
    if inside or not torch.is_grad_enabled():
        return _terms(x, t, gamma, alpha)
    return _BinaryFocal.apply(x, t, gamma, alpha)


class _BinaryFocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t, gamma, alpha):
        several = isinstance(alpha, Tensor)
        ctx.save_for_backward(x, t, *([alpha] if several else []))
        ctx.gamma, ctx.alpha = gamma, None if several else alpha
        return _terms(x, t, gamma, alpha)

    @staticmethod
    def backward(ctx, grad):
        x, t, *factors = ctx.saved_tensors
        alpha = factors[0] if factors else ctx.alpha
        if torch.is_grad_enabled() or is_batched(grad):
            return (*_by_autograd(ctx, x, t, alpha, grad), None, None)
        s, ce = _focus(x, t).sigmoid_(), _cross_entropy(x, t)
        power = s.pow(ctx.gamma)
        # s is consumed: gamma (1 - s) ce
        inner = s.neg().add_(1).mul_(ce).mul_(ctx.gamma)
        balance = _balance(t, alpha)
        by_x = by_t = None
        if t.dtype == torch.bool:
            by_x = inner.add_(s).mul_(power).mul_(grad)
            by_x = torch.where(t, -by_x, by_x)
            return by_x if balance is None else by_x.mul_(balance), None, None, None
        if ctx.needs_input_grad[1]:
            by_t = -x * power * (1 + 2 * inner)
            if balance is not None:
                by_t = by_t * balance
                if not isinstance(alpha, Tensor):
                    by_t = by_t + power * ce * (2 * alpha - 1)
            by_t = by_t * grad
        if ctx.needs_input_grad[0]:
            by_x = torch.sigmoid(x).sub_(t).addcmul_(inner, 1 - 2 * t).mul_(power).mul_(grad)
            by_x = by_x if balance is None else by_x.mul_(balance)
        return by_x, by_t, None, None


def _by_autograd(ctx, x, t, alpha, grad):
    """What can be differentiated again, and mapped over gradients."""
    wanted = [v for v, needed in zip((x, t), ctx.needs_input_grad) if needed]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A fresh node: the graph behind x is not walked.
        fresh = [v.view_as(v) if again else v.detach().requires_grad_() for v in wanted]
        left = iter(fresh)
        pair = [next(left) if needed else v for v, needed in zip((x, t), ctx.needs_input_grad)]
        value = _terms(*pair, ctx.gamma, alpha)
        found = iter(torch.autograd.grad(value, fresh, grad, create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:2]]


def _focus(x, t) -> Tensor:
    """z of 1 - p_t = sigmoid(z)."""
    return torch.where(t, -x, x) if t.dtype == torch.bool else x * (1 - 2 * t)


def _cross_entropy(x, t) -> Tensor:
    if t.dtype == torch.bool:
        return F.softplus(_focus(x, t), threshold=_EXACT)
    return F.softplus(-x, threshold=_EXACT) + x * (1 - t)


def _balance(t, alpha) -> Tensor | None:
    if alpha is None:
        return None
    if isinstance(alpha, Tensor):
        return torch.where(t if t.dtype == torch.bool else t == 1, alpha, 1.0)
    if t.dtype == torch.bool:
        return torch.where(t, float(alpha), 1.0 - alpha)
    return (1 - alpha) + (2 * alpha - 1) * t


def _terms(x, t, gamma, alpha) -> Tensor:
    value = _cross_entropy(x, t)
    if gamma != 0:
        z = _focus(x, t)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # s^gamma whose derivative is finite where s is 0.
            power = torch.exp(-gamma * F.softplus(-z, threshold=_EXACT))
        else:
            power = torch.sigmoid(z).pow(gamma)
        value = value * power
    balance = _balance(t, alpha)
    return value if balance is None else value * balance
