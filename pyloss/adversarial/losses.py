"""Losses that attack the model themselves, known from the literature: TRADES and MART."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyloss.adversarial._checks import (
    IGNORED,
    check_batch,
    check_logits,
    checked_column,
    checked_search,
)
from pyloss.adversarial.attacks import searched
from pyloss.functional import _checks as checks
from pyloss.functional._sums import summed
from pyloss.functional.adversarial import accumulator_dtype, divergence
from pyloss.functional.classification import fused_cross_entropy


def trades_loss(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    step: float | None = None,
    *,
    beta: float = 6.0,
    clip: tuple[float, float] | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""TRADES: cross entropy, and how far an attack can move the prediction.

    .. math:: \ell = -\log p_y(x) + \beta\, \mathrm{KL}\big(p(x) \,\|\, p(x')\big), \qquad
              x' \approx \arg\max_{\|x' - x\| \le \epsilon} \mathrm{KL}\big(p(x) \,\|\, p(x')\big)

    x' is found by :func:`pyloss.adversarial.pgd_maximise`, which leaves the model as it was; then
    the model is called with x and with x', in the mode it is in.

    Args:
        model, x, y, eps, norm, steps, step: as for :func:`pyloss.adversarial.pgd_maximise`.
        beta: weight of the second term, >= 0.
        clip, generator: as there.
        reduction: ``"mean"`` or ``"sum"`` over the labels that are not -100, or ``"none"``.

    Returns:
        0-d, or of the shape of ``y``; float32, float64 if the logits are.

    Raises:
        As :func:`pyloss.adversarial.pgd_maximise`.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(8, 3)
        >>> x, y = torch.rand(16, 8), torch.randint(3, (16,))
        >>> pyloss.adversarial.trades_loss(model, x, y, eps=0.1).backward()

    Reference:
        Zhang et al. Theoretically Principled Trade-off between Robustness and Accuracy. arXiv
        1901.08573.
    """
    checks.check_range("beta", beta, 0.0)
    moved = _moved(model, x, y, eps, norm, steps, step, clip, reduction, generator, "kl")
    clean, adv = model(x), model(moved)
    check_logits(clean, x)
    check_logits(adv, x)
    each = _nll(clean, y) + beta * divergence(clean, adv)
    return _reduced(each, y, reduction)


def mart_loss(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    step: float | None = None,
    *,
    beta: float = 5.0,
    clip: tuple[float, float] | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""MART: a loss of the attacked inputs, and one that looks at inputs that are misclassified.

    .. math:: \ell = -\log p_y(x') - \log\big(1 - \max_{k \ne y} p_k(x')\big) + \beta\,
              \mathrm{KL}\big(p(x) \,\|\, p(x')\big)\, (1 - p_y(x))

    x' maximises the cross entropy, found by :func:`pyloss.adversarial.pgd_maximise`.

    Args:
        model, x, y, eps, norm, steps, step: as for :func:`pyloss.adversarial.pgd_maximise`.
        beta: weight of the last term, >= 0.
        clip, generator: as there.
        reduction: ``"mean"`` or ``"sum"`` over the labels that are not -100, or ``"none"``.

    Returns:
        0-d, or of the shape of ``y``; float32, float64 if the logits are.

    Raises:
        As :func:`pyloss.adversarial.pgd_maximise`.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(8, 3)
        >>> x, y = torch.rand(16, 8), torch.randint(3, (16,))
        >>> pyloss.adversarial.mart_loss(model, x, y, eps=0.1).backward()

    Reference:
        Wang et al. Improving Adversarial Robustness Requires Revisiting Misclassified Examples.
        ICLR 2020.
    """
    checks.check_range("beta", beta, 0.0)
    moved = _moved(model, x, y, eps, norm, steps, step, clip, reduction, generator, "cross_entropy")
    clean, adv = model(x), model(moved)
    check_logits(clean, x)
    check_logits(adv, x)
    missed = -torch.expm1(-_nll(clean, y))  # 1 - p_y
    each = _nll(adv, y) + _boosted(adv, y) + beta * divergence(clean, adv) * missed
    return _reduced(each, y, reduction)


def _moved(model, x, y, eps, norm, steps, step, clip, reduction, generator, objective) -> Tensor:
    search = checked_search(eps, norm, steps, step, clip)
    checks.check_reduction(reduction)
    check_batch(model, x, y)
    return searched(model, x, y, objective, search, "near", generator)


def _nll(z: Tensor, y: Tensor) -> Tensor:
    return fused_cross_entropy(z, y, reduction="none", loss_dtype=accumulator_dtype(z.dtype))


def _boosted(z: Tensor, y: Tensor) -> Tensor:
    """-log(1 - the largest probability of another class), by sums that lose no digits."""
    z = z.to(accumulator_dtype(z.dtype))
    others = z.detach().scatter(1, checked_column(z, y)[0], -torch.inf)
    rest = z.scatter(1, others.argmax(1, keepdim=True), -torch.inf)
    return torch.logsumexp(z, 1) - torch.logsumexp(rest, 1)


def _reduced(each: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Of labels that are not ignored, as cross entropy has it; probabilities all count."""
    counts = torch.ones_like(each) > 0 if y.is_floating_point() else y.long() != IGNORED
    each = torch.where(counts, each, 0.0)
    if reduction == "none":
        return each
    return summed(each) / counts.sum() if reduction == "mean" else summed(each)
