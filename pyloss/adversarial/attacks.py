"""Projected gradient attacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyloss.adversarial._checks import (
    STARTS,
    Search,
    check_batch,
    check_objective,
    checked_column,
    checked_search,
)
from pyloss.adversarial._search import Objective, attacking, clean_logits, maximise
from pyloss.functional import _checks as checks
from pyloss.functional.adversarial import divergence, margin_shift
from pyloss.functional.classification import fused_cross_entropy

_MAXIMA = ("margin_shift", "kl", "cross_entropy")  # what pgd_maximise knows by name
_LOSSES = ("cross_entropy", "margin")


def pgd_maximise(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    step: float | None = None,
    *,
    objective: str | Objective = "margin_shift",
    start: str = "near",
    clip: tuple[float, float] | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Looks for the point of a ball around each input where an objective is largest.

    .. math:: x' \leftarrow \Pi_{\|x' - x\| \le \epsilon}(x' + \eta\, d), \qquad
              d = \operatorname{sign} g \ (\ell_\infty), \quad g / \|g\|_2 \ (\ell_2), \qquad
              g = \nabla_{x'} J(h(x'), y)

    The model is in eval mode meanwhile and as before afterwards: statistics of batch norms, the
    ``training`` flag of each module, ``grad`` of the parameters and the state of the global random
    numbers stay as they are. A compiled model may be given, and one under DDP. Works under
    ``no_grad``, in inference mode and under autocast.

    Args:
        model: gives logits ``(N, C)`` or ``(N, C, d1, ...)`` of inputs.
        x: ``(N, ...)``, floating; inside of ``clip``.
        y: labels, ``(N)`` or ``(N, d1, ...)``; None with ``objective="kl"``.
        eps: radius of the ball, >= 0.
        norm: ``"linf"`` or ``"l2"``, of each input as a whole.
        steps: number of steps.
        step: length of one, :math:`\eta`; default 2.5 eps / steps.
        objective: J: ``"margin_shift"``, the square of
            :func:`pyloss.functional.margin_shift` against the logits of ``x``; ``"kl"``, the
            divergence of the prediction from that of ``x``; ``"cross_entropy"``; or a callable that
            gives a value of each input, from ``(logits, y)``.
        start: ``"near"``: x + 0.001 times normal numbers, since the first two have gradient 0 at x
            itself; ``"uniform"`` in the ball; ``"clean"``: x.
        clip: (low, high) that the values of an input keep to.
        restarts: that many searches; the one with the largest J of each input is taken.
        generator: of the start; default: a copy of the global generator of the CPU. Give one that
            lives as long as a training to get other starts at each step.

    Returns:
        Points like ``x``, without a gradient.

    Raises:
        RuntimeError: the model returned NaN, or has a gradient of NaN: the message names the step;
            an objective that does not depend on x.
        TypeError: x that is not floating, a model that returns no tensor; an option of the wrong
            type. ValueError: an option out of range, shapes that do not fit.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(8, 3)
        >>> x, y = torch.rand(4, 8), torch.randint(3, (4,))
        >>> moved = pyloss.adversarial.pgd_maximise(model, x, y, eps=0.1)
        >>> bool((moved - x).abs().max() <= 0.1 + 1e-6)
        True

    Reference:
        Madry et al. arXiv 1706.06083. Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    search = checked_search(eps, norm, steps, step, clip, restarts)
    check_objective("objective", objective, _MAXIMA)
    checks.check_one_of("start", start, STARTS)
    if start == "clean" and objective in ("margin_shift", "kl"):
        raise ValueError(f"start='clean' with objective={objective!r}: its gradient is 0 there")
    check_batch(model, x, y, y_needed=objective != "kl")
    return searched(model, x, y, objective, search, start, generator)


def searched(model, x, y, objective, search: Search, start: str, generator) -> Tensor:
    """pgd_maximise of checked arguments."""
    if x.shape[0] == 0:
        return x.detach().clone()
    with attacking(model, x) as attacked:
        x = x.detach().clone()
        return maximise(attacked, x, y, _maximum(objective, attacked, x), search, start, generator)


def _maximum(objective: str | Objective, model: Callable, x: Tensor) -> Objective:
    if not isinstance(objective, str):
        return objective
    if objective == "cross_entropy":
        return _cross_entropy
    clean = clean_logits(model, x)
    if objective == "kl":
        return lambda z, y: divergence(clean, z)
    return lambda z, y: margin_shift(clean, z, y, squared=True)


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return fused_cross_entropy(z, y, reduction="none")


def _margin(z: Tensor, y: Tensor) -> Tensor:
    """Largest logit of another class less that of the label; 0 where there is no label."""
    column, counts = checked_column(z, y)
    others = z.scatter(1, column, -torch.inf)
    return torch.where(counts, others.amax(1) - z.gather(1, column).squeeze(1), 0.0)


def pgd_attack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    step: float | None = None,
    *,
    targeted: bool = False,
    loss: str | Objective = "cross_entropy",
    random_start: bool = True,
    clip: tuple[float, float] | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Projected gradient attack: inputs that a model gets wrong, in a ball around given ones.

    .. math:: x' \leftarrow \Pi_{\|x' - x\| \le \epsilon}(x' + \eta\, d), \qquad
              g = \nabla_{x'} \ell(h(x'), y)

    with d as in :func:`pgd_maximise`, which also says what stays untouched.

    Args:
        model, x, y, eps, norm, steps, step: as for :func:`pgd_maximise`.
        targeted: y are the classes that the model shall predict; the loss is made small.
        loss: ``"cross_entropy"``; ``"margin"``, the largest logit of another class less that of
            the label; both 0 where the label is -100; or a callable of (logits, y) that gives a
            value of each input.
        random_start: uniform in the ball; else at ``x``.
        clip: (low, high) that the values of an input keep to.
        restarts: that many attacks, of which for each input one that succeeds is taken, and among
            those the one with the largest loss. Several need ``random_start``.
        generator: of the start, as for :func:`pgd_maximise`.

    Returns:
        Inputs like ``x``, without a gradient.

    Raises:
        As :func:`pgd_maximise`.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(8, 3)
        >>> x, y = torch.rand(64, 8), torch.randint(3, (64,))
        >>> moved = pyloss.adversarial.pgd_attack(model, x, y, eps=0.1, clip=(0.0, 1.0))
        >>> right = [(model(z).argmax(1) == y).sum() for z in (x, moved)]
        >>> bool(right[1] <= right[0])
        True

    Reference:
        Madry et al. Towards Deep Learning Models Resistant to Adversarial Attacks. arXiv
        1706.06083.
    """
    search = checked_search(eps, norm, steps, step, clip, restarts)
    checks.check_flag("targeted", targeted)
    checks.check_flag("random_start", random_start)
    check_objective("loss", loss, _LOSSES)
    if search.restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} without random_start would all be the same")
    check_batch(model, x, y)
    if x.shape[0] == 0:
        return x.detach().clone()
    named = {"cross_entropy": _cross_entropy, "margin": _margin}
    value = named[loss] if isinstance(loss, str) else loss
    with attacking(model, x) as attacked:
        return maximise(
            attacked,
            x.detach().clone(),
            y,
            (lambda z, y: -value(z, y)) if targeted else value,
            search,
            "uniform" if random_start else "clean",
            generator,
            won=lambda z, y: (z.argmax(1) == y) == bool(targeted),
        )
