"""The row-softmax losses written with ordinary PyTorch operations.

This file is the specification in code.  It asks for readability and exactness and for nothing else:
several N x V temporaries are made.  It has no data-dependent branch in Python, so that it works
under ``torch.func`` transforms, and autograd can differentiate it any number of times.

For one row of transformed logits ``z`` and a class ``c``::

    L_c = -log softmax(z)_c
    f(L) = L                      for tau = 1
         = expm1((1-tau) L) / (1-tau)   otherwise
    row loss = k * (sum_c r_c f(L_c) + z_loss * lse(z)^2)

where ``r_c >= 0`` are the coefficients that the target, the class weights and the label smoothing
give (``docs/row_softmax.md``), and ``k`` is the token weight.

Two details keep small values exact.  ``L`` of the largest logit is ``log1p`` of the sum over the
*other* classes, so a loss of 1e-30 is still right; and the shift of the exponentials is a constant
of the differentiation except in that case, so the gradient entry of the target is minus the sum of
the other probabilities and not ``p - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Target = Tensor | tuple[Tensor, Tensor, float | Tensor]

_DIFFERENTIABLE_STATS = ("lse", "logprob", "entropy", "z_loss")
_COUNT_STATS = ("argmax", "correct", "rank")
STATS = _DIFFERENTIABLE_STATS + _COUNT_STATS

# exp(-700) is still a normal float64; beyond it 1 - p is 1 to the last bit.
_FOCAL_CLAMP = 700.0


def row_softmax(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    tau: float = 1.0,
    truncate: float | None = None,
    gamma: float | None = None,
    poly1: float | None = None,
    relaxation: float | None = None,
    affine: tuple[float, float] | None = None,
    margin: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    empty: str = "nan",
    loss_dtype: torch.dtype | None = None,
    return_stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Loss (and statistics) of every softmax row; see ``pyloss.fused_cross_entropy``.

    The arithmetic is float64 when an argument is float64 and float32 otherwise.  Class indices
    out of range give a row of NaN; callers that can look at the values check the range before.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``.
        target: class indices ``()``, ``(N)`` or ``(N, d1, ..., dk)``; or class probabilities of the
            shape of ``input``; or ``(y, y2, lam)`` with two index tensors and the share of ``y``.
        weight: weight of each class, ``(C)``.
        temperature: a number, or one of each row, ``(..., 1)``, the classes last.
        gamma: focal exponent; the row loss is then ``(1 - p_y)^gamma * L`` and ``tau`` must be 1.
        poly1: coefficient e of Poly-1, ``L + e (1 - p_y)``.
        relaxation: share a that label relaxation leaves to the other classes: the divergence of
            ``p`` from the nearest distribution that gives the label at least ``1 - a``.
        affine: (scale, offset); the row loss is then ``scale (L - offset)``.
        margin: taken from the label's ``z`` (one label only).

        At most one of ``gamma``, ``poly1``, ``relaxation`` and ``affine``, with the conditions of
        ``gamma``.

    Returns:
        The loss, or the pair of the loss and a dict of the statistics named in ``return_stats``.
    """
    y, y2, lam, prob = _split_target(target)
    shape = dict(gamma=gamma, poly1=poly1, relaxation=relaxation, affine=affine)
    shape = {name: x for name, x in shape.items() if x is not None}
    if shape and (tau != 1.0 or label_smoothing != 0.0 or prob is not None):
        raise ValueError(f"{next(iter(shape))} needs class indices, tau=1 and no label smoothing")

    dtype = _compute_dtype(input, prob)
    if lam is not None:
        lam = torch.as_tensor(lam, dtype=dtype, device=input.device)
    class_dim = 0 if input.dim() == 1 else 1
    x = input.movedim(class_dim, -1).to(dtype)
    n_classes = x.shape[-1]
    w = torch.ones(n_classes, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)

    # Rows to skip, and rows whose class does not exist.  Their inputs are replaced, not only their
    # outputs: the gradient of torch.where in an untaken branch is 0 times whatever stands there.
    if prob is None:
        indices = [i.long() for i in (y, y2) if i is not None]
        ignored = torch.stack([i == ignore_index for i in indices]).any(0)
        outside = torch.stack([(i < 0) | (i >= n_classes) for i in indices]).any(0) & ~ignored
        indices = [torch.where(ignored | outside, 0, i) for i in indices]
    else:
        ignored = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        outside = ignored
        indices = []
    x = torch.where(ignored.unsqueeze(-1), 0.0, x)

    z = _transform(x, logit_scale, softcap, temperature)
    if margin != 0.0:
        z = z - margin * _one_hot(indices[0], n_classes).to(dtype)
    peak = z.detach().amax(-1)
    # A row without a finite maximum (+inf, NaN, or nothing but -inf) has no softmax.
    sick = outside | ~torch.isfinite(peak)
    z = z * torch.where(sick, math.nan, 1.0).to(dtype).unsqueeze(-1)

    if prob is None:
        one = torch.ones((), dtype=dtype, device=x.device)
        shares = [one] if lam is None else [lam, 1.0 - lam]
        # gather and not w[i]: a 0-d index makes the latter read a value, which vmap cannot.
        weights = [s * w.gather(0, i.flatten()).view(i.shape) for s, i in zip(shares, indices)]
        row_weight = sum(weights)
    else:
        # Probability targets: 'mean' divides by the number of rows whatever the class weights.
        row_weight = torch.ones_like(peak)
    formula = dict(tau=tau, truncate=truncate, **shape)
    if prob is None and label_smoothing == 0.0:
        row = sum(
            _weighted(r, _neg_log_prob(z, peak, i), **formula) for r, i in zip(weights, indices)
        )
    else:
        if prob is None:
            hot = sum(s.unsqueeze(-1) * _one_hot(i, n_classes) for s, i in zip(shares, indices))
        else:
            hot = prob.movedim(class_dim, -1).to(dtype)
        r = w * ((1.0 - label_smoothing) * hot + label_smoothing / n_classes)
        row = _weighted(r, _neg_log_prob_all(z, peak), **formula).sum(-1)

    lse = _logsumexp(z, peak)
    # The square may overflow, and 0 times infinity is not 0.
    z_row = z_loss * lse.square() if z_loss != 0.0 else torch.zeros_like(lse)

    k = torch.ones_like(peak) if token_weight is None else token_weight.to(dtype)
    row = torch.where(ignored | ((k == 0) & ~torch.isnan(row)), 0.0, k * row)
    z_stat = torch.where(ignored, 0.0, z_row)
    z_row = torch.where((k == 0) & ~torch.isnan(z_stat), 0.0, k * z_stat)
    if reduction == "none":
        loss = row + z_row
    elif reduction == "sum":
        loss = row.sum() + z_row.sum()
    elif reduction == "mean":
        if num_items is None:
            mass = torch.where(ignored, 0.0, k * row_weight).sum()
            loss = _divided(row.sum(), mass, empty)
            if z_loss != 0.0:
                mass = torch.where(ignored, 0.0, k).sum()
                loss = loss + _divided(z_row.sum(), mass, empty)
        else:
            loss = (row.sum() + z_row.sum()) / num_items
    else:
        raise ValueError(f"{reduction} is not a valid value for reduction")

    if loss_dtype is None:
        loss_dtype = input.dtype if prob is None else torch.promote_types(input.dtype, prob.dtype)
    loss = loss.to(loss_dtype)
    if not return_stats:
        return loss

    stats: dict[str, Tensor] = {}
    first = torch.argmax(z.detach(), -1)
    for name in return_stats:
        if name == "lse":
            value = lse
        elif name == "z_loss":
            value = z_stat
        elif name == "entropy":
            value = _entropy(z, peak)
        elif name == "argmax":
            value = first
        elif name not in STATS:
            raise ValueError(f"{name!r} is not one of the statistics {STATS}")
        elif prob is not None:
            raise ValueError(f"the statistic {name!r} needs class indices")
        elif name == "logprob":
            value = -_neg_log_prob(z, peak, indices[0])
        elif name == "correct":
            value = first == indices[0]
        else:
            zy = z.detach().gather(-1, indices[0].unsqueeze(-1))
            value = (z.detach() > zy).sum(-1)
        fill = -1 if name == "argmax" else torch.zeros((), dtype=value.dtype, device=value.device)
        stats[name] = torch.where(ignored, fill, value)
    return loss, stats


def _split_target(
    target: Target,
) -> tuple[Tensor | None, Tensor | None, float | Tensor | None, Tensor | None]:
    """The three kinds of target as ``(y, y2, lam, probabilities)``."""
    if isinstance(target, tuple):
        y, y2, lam = target
        return y, y2, lam, None
    if target.is_floating_point():
        return None, None, None, target
    return target, None, None, None


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _divided(total: Tensor, mass: Tensor, empty: str) -> Tensor:
    """The quotient, or 0 with a gradient of 0 for a mass of 0."""
    if empty != "zero":
        return total / mass
    return torch.where(mass == 0, 0.0, total / torch.where(mass == 0, 1.0, mass))


def _transform(
    x: Tensor, logit_scale: float, softcap: float | None, temperature: float | Tensor
) -> Tensor:
    """Scale, then soft cap, then temperature, always in this order."""
    z = x if logit_scale == 1.0 else x * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if not isinstance(temperature, Tensor) and temperature == 1.0:
        return z
    return z / temperature


def _one_hot(index: Tensor, n_classes: int) -> Tensor:
    return index.unsqueeze(-1) == torch.arange(n_classes, device=index.device)


def _logsumexp(z: Tensor, peak: Tensor) -> Tensor:
    """``log sum exp`` with a constant shift, whose gradient is exactly the softmax."""
    return peak + torch.log(torch.exp(z - peak.unsqueeze(-1)).sum(-1))


def _neg_log_prob(z: Tensor, peak: Tensor, index: Tensor) -> Tensor:
    """``-log softmax(z)[index]`` of every row, exact to relative rounding at any magnitude.

    The sum leaves the class ``index`` out.  Where that class is the largest, the shift is its own
    logit, with gradient, and the result ``log1p(sum of the others)``; elsewhere its probability is
    at most 1/2, and nothing cancels in ``log(sum) - (z_index - shift)``.
    """
    zy = z.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    largest = zy == peak
    shift = torch.where(largest, zy, peak)
    u = z - shift.unsqueeze(-1)
    uy = zy - shift
    others = torch.where(_one_hot(index, z.shape[-1]), 0.0, torch.exp(u)).sum(-1)
    return torch.where(largest, torch.log1p(others), torch.log(others + torch.exp(uy)) - uy)


def _neg_log_prob_all(z: Tensor, peak: Tensor) -> Tensor:
    """``-log softmax(z)`` of every class; the largest one by ``log1p`` of the other classes."""
    first = torch.argmax(z.detach(), -1)
    u = z - peak.unsqueeze(-1)
    plain = torch.log(torch.exp(u).sum(-1)).unsqueeze(-1) - u
    exact = _neg_log_prob(z, peak, first).unsqueeze(-1)
    return torch.where(_one_hot(first, z.shape[-1]), exact, plain)


def _expm1(x: Tensor) -> Tensor:
    """``expm1`` whose derivative keeps its relative accuracy where the value is close to -1.

    Autograd forms the derivative of ``torch.expm1`` as ``expm1(x) + 1``, which is 0 for x = -40.
    """
    return torch.where(x < -0.5, torch.exp(x) - 1.0, torch.expm1(x))


def _shape_loss(
    nll: Tensor,
    tau: float,
    truncate: float | None,
    gamma: float | None = None,
    poly1: float | None = None,
    relaxation: float | None = None,
    affine: tuple[float, float] | None = None,
) -> Tensor:
    """``f(L)``: the comp-sum family, truncated where ``p <= truncate``; or another form."""
    if truncate is not None:
        bound = -math.log(truncate)
        nll = torch.where(nll >= bound, bound, nll)
    if gamma is not None:
        wrong = -_expm1(-nll.clamp(max=_FOCAL_CLAMP))
        # 0 ** (gamma - 1) has no finite value for gamma < 1; the loss is 0 there in any case.
        wrong = torch.where(nll > 0.0, wrong, 1.0)
        return wrong.pow(gamma) * nll
    if poly1 is not None:
        return nll - poly1 * _expm1(-nll)
    if relaxation is not None:
        bound = -math.log1p(-relaxation)
        nll = torch.where(nll <= bound, bound, nll)  # met: the loss of the bound, which is 0
        others = torch.log(-_expm1(-nll))
        zero = (1.0 - relaxation) * bound - relaxation * math.log(relaxation)
        return (1.0 - relaxation) * nll - relaxation * others - zero
    if affine is not None:
        scale, offset = affine
        return scale * (nll - offset)
    slope = 1.0 - tau
    return nll if slope == 0.0 else _expm1(slope * nll) / slope


def _weighted(r: Tensor, nll: Tensor, **formula: float | None) -> Tensor:
    """``r f(L)``, where a coefficient of 0 makes an infinite loss 0 (a NaN stays)."""
    infinite = torch.isinf(_shape_loss(nll.detach(), **formula))
    nll = torch.where(infinite & (r == 0.0), 0.0, nll)
    return r * _shape_loss(nll, **formula)


def _entropy(z: Tensor, peak: Tensor) -> Tensor:
    """``-sum p log p``, with 0 for the classes of probability 0."""
    nll = _neg_log_prob_all(z, peak)
    p = torch.exp(-nll)
    return (p * torch.where(p == 0.0, 0.0, nll)).sum(-1)
