"""Formulas of the losses of DPO, by the names that TRL has for them; docs/preference.md."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Of the margin between the two answers alone; these take label smoothing (but discopop) and other
# divergences.
_OF_MARGIN = ("sigmoid", "ipo", "hinge", "robust", "exo_pair")
_OF_QUANTILES = ("aot", "aot_unpaired")
SMOOTHED = (*_OF_MARGIN, *_OF_QUANTILES)
WITH_DIVERGENCE = (*_OF_MARGIN, "discopop")
LOSSES = (
    *_OF_MARGIN, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    *_OF_QUANTILES,
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_DISCOPOP_TAU = 0.05
# Beyond it the exponential of a log-ratio is a constant: finite, and with no gradient.
_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


class LogRatios(NamedTuple):
    """Of each pair: policy to reference, of both answers; and chosen to rejected, of both models.

    The former are subtracted first: answers of very different lengths have log-probabilities of
    very different sizes, and the small ratios would be lost in their difference.
    """

    chosen: Tensor
    rejected: Tensor
    policy: Tensor
    reference: Tensor | float


def score(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(u) of the divergence, u the ratio of policy to reference; log u for the reverse KL.

    With f'(1) = 0, on which a difference of two does not depend.
    """
    if divergence == "js_divergence":
        return logsigmoid(log_ratio) + math.log(2)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(divergence, alpha - 1.0)
    if power == 0:
        return log_ratio
    exponent = (power * log_ratio).clamp(max=_LARGEST_EXPONENT[log_ratio.dtype])
    return torch.expm1(exponent) / power


def loss_of_pairs(
    loss_type: str, r: LogRatios, beta: float, smoothing: float, divergence: str, alpha: float
) -> Tensor:
    """The loss of each pair; of a quantile, in ascending order, for the losses of quantiles."""
    if loss_type in _OF_QUANTILES:
        return _smoothed(
            lambda h: -logsigmoid(beta * h), _between_quantiles(loss_type, r), smoothing
        )
    if loss_type in WITH_DIVERGENCE:
        h = r.chosen - r.rejected
        if divergence != "reverse_kl":
            h = score(r.chosen, divergence, alpha) - score(r.rejected, divergence, alpha)
        return _of_margin(loss_type, h, beta, smoothing)
    if loss_type == "sppo_hard":
        return (r.chosen - 0.5 / beta).square() + (r.rejected + 0.5 / beta).square()
    a, b = beta * r.chosen, beta * r.rejected
    if loss_type == "nca_pair":
        return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)
    if loss_type == "bco_pair":
        return -logsigmoid(a) - logsigmoid(-b)
    if loss_type == "apo_zero":
        return torch.sigmoid(-a) + torch.sigmoid(b)
    return torch.sigmoid(a) + torch.sigmoid(beta * (r.rejected - r.chosen))  # apo_down


def _smoothed(f, h: Tensor, smoothing: float) -> Tensor:
    # Without smoothing there is no second term: 0 * inf where the policy excludes an answer.
    loss = f(h)
    return loss if smoothing == 0 else (1 - smoothing) * loss + smoothing * f(-h)


def _of_margin(loss_type: str, h: Tensor, beta: float, smoothing: float) -> Tensor:
    if loss_type == "sigmoid":
        return _smoothed(lambda h: -logsigmoid(beta * h), h, smoothing)
    if loss_type == "ipo":
        return _smoothed(lambda h: (h - 1 / (2 * beta)).square(), h, smoothing)
    if loss_type == "hinge":
        return _smoothed(lambda h: torch.relu(1 - beta * h), h, smoothing)
    if loss_type == "robust":
        loss = -logsigmoid(beta * h)
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * logsigmoid(-beta * h)
        return loss / (1 - 2 * smoothing)
    if loss_type == "exo_pair":
        win, lose = logsigmoid(beta * h), logsigmoid(-beta * h)
        return win.exp() * (win - math.log1p(-smoothing)) + lose.exp() * (
            lose - math.log(smoothing)
        )
    x = beta * h  # discopop: (1 - gate) * -log sigmoid(x) + gate * exp(-x), which may be 0 * inf
    gate = x / _DISCOPOP_TAU
    return (logsigmoid(gate) - x).exp() - torch.sigmoid(-gate) * logsigmoid(x)


def _between_quantiles(loss_type: str, r: LogRatios) -> Tensor:
    """Differences of the order statistics of two samples over the batch."""
    high, low = (r.policy, r.reference) if loss_type == "aot" else (r.chosen, r.rejected)
    shape = high.shape
    high = high.reshape(-1).sort().values
    if isinstance(low, Tensor):
        low = low.reshape(-1).sort().values
    return (high - low).view(shape)
