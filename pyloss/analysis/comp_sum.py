"""H-consistency bounds and minimizability gaps of the comp-sum losses (arXiv 2304.07288).

For a hypothesis set H that is symmetric and complete,

    R_01(h) - R*_01(H) + M_01(H) <= Gamma_tau(R_tau(h) - R*_tau(H) + M_tau(H)),   Gamma = T^-1

M is the minimizability gap: the risk of the best h in H less the mean of the least risks at each
input. Everything is float64, of tensors or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.analysis._numbers import as_constants
from pyloss.functional import _checks as checks

__all__ = [
    "CompSumAnalysis",
    "analyze",
    "conditional_minimizer",
    "conditional_minimum",
    "conditional_risk",
    "gamma",
    "gamma_bound",
    "h_consistency_bound",
    "minimizability_gap",
    "t_function",
]

LOSSES = {"logistic": 1.0, "cross_entropy": 1.0, "sum_exponential": 0.0, "mae": 2.0}
_HALVINGS = 80  # of an interval: below the rounding of anything in it


class CompSumAnalysis(NamedTuple):
    """What :func:`pyloss.analysis.comp_sum.analyze` finds: float64, one entry for each tau where
    nothing else is said. :func:`pyloss.visualize.draw_comp_sum` draws it.

    Example:
        >>> import torch
        >>> from pyloss.analysis.comp_sum import analyze
        >>> found = analyze(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]), [1.0, 2.0])
        >>> found.surrogate_risk
        tensor([0.2395, 0.2130], dtype=torch.float64)
    """

    tau: Tensor
    surrogate_risk: Tensor  #: R_tau(h)
    conditional_minimum: Tensor  #: mean of the least risks at each input
    gap: Tensor  #: M_tau: of the best risk in the class that was given, else 0
    bound: Tensor  #: Gamma_tau(R_tau(h) - R*_tau + M_tau) - M_01, of R_01(h) - R*_01
    bound_closed_form: Tensor  #: the same by the closed form, which is above it
    zero_one_risk: Tensor  #: R_01(h), 0-d
    zero_one_minimum: Tensor  #: mean of 1 - max p, 0-d
    zero_one_gap: Tensor  #: M_01: of the best risk that was given, else 0; 0-d


# --------------------------------------------------------------------------------------------------
# The transformation of regrets


def t_function(b: float | Tensor, tau: float, classes: int = 2) -> Tensor:
    r"""The least regret of a comp-sum loss where that of the zero-one loss is b.

    .. math::
        T(b) &= \frac{2^{1 - \tau}}{1 - \tau} \big(1 - A^{2 - \tau}\big) & \tau &\in [0, 1) \\
        &= \tfrac{1 + b}{2} \log(1 + b) + \tfrac{1 - b}{2} \log(1 - b) & \tau &= 1 \\
        &= \frac{A^{2 - \tau} - 1}{(\tau - 1)\, n^{\tau - 1}} & \tau &\in (1, 2) \\
        &= \frac{b}{(\tau - 1)\, n^{\tau - 1}} & \tau &\ge 2

    with :math:`A = \frac12 \big((1 + b)^{1 / (2 - \tau)} + (1 - b)^{1 / (2 - \tau)}\big)`.

    Args:
        b: in [0, 1], any shape.
        tau: >= 0.
        classes: n >= 2; counts for tau > 1 alone.

    Returns:
        float64, of the shape of ``b``; increasing in b.

    Raises:
        ValueError: b, tau or classes out of range.

    Example:
        >>> from pyloss.analysis.comp_sum import t_function
        >>> t_function(0.5, tau=2.0, classes=4)
        tensor(0.1250, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    _check_tau(tau)
    classes = _checked_classes(classes)
    b = as_constants("b", b)
    if bool(((b < 0) | (b > 1)).any()):
        raise ValueError(f"b must be in [0, 1], got {float(b[(b < 0) | (b > 1)][0])}")
    return _t(b, tau, classes)


def _t(b: Tensor, tau: float, classes: int) -> Tensor:
    if tau == 1:
        return (torch.special.xlog1py(1 + b, b) + torch.special.xlog1py(1 - b, -b)) / 2
    if tau >= 2:
        return b / ((tau - 1) * classes ** (tau - 1))
    # A^(2 - tau) - 1
    power = 1 / (2 - tau)
    up, down = power * torch.log1p(b), power * torch.log1p(-b)
    if power <= 64:
        log_a = torch.log1p((torch.expm1(up) + torch.expm1(down)) / 2)
    else:
        log_a = torch.logaddexp(up, down) - math.log(2)
    grown = torch.expm1((2 - tau) * log_a)
    if tau < 1:
        return -grown * 2 ** (1 - tau) / (1 - tau)
    return grown / ((tau - 1) * classes ** (tau - 1))


def gamma(t: float | Tensor, tau: float, classes: int = 2) -> Tensor:
    r"""The largest regret of the zero-one loss where that of a comp-sum loss is t.

    .. math:: \Gamma_\tau(t) = T_\tau^{-1}(\min(t, T_\tau(1)))

    found by bisection.

    Args:
        t: >= 0, any shape; what rounding has made negative counts as 0.
        tau, classes: as for :func:`pyloss.analysis.comp_sum.t_function`.

    Returns:
        float64, of the shape of ``t``, in [0, 1].

    Raises:
        As :func:`pyloss.analysis.comp_sum.t_function`.

    Example:
        >>> from pyloss.analysis.comp_sum import gamma, t_function
        >>> gamma(t_function(0.25, tau=1.0), tau=1.0)
        tensor(0.2500, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    _check_tau(tau)
    classes = _checked_classes(classes)
    t = as_constants("t", t)
    if tau >= 2:
        return (t * ((tau - 1) * classes ** (tau - 1))).clamp(0, 1)
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = _t(middle, tau, classes) > t
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    found = torch.where(t >= _t(torch.ones_like(t), tau, classes), 1.0, high)
    return torch.where(t.isnan(), t, torch.where(t <= 0, 0.0, found))


def gamma_bound(t: float | Tensor, tau: float, classes: int = 2) -> Tensor:
    r"""A closed form that is above :func:`pyloss.analysis.comp_sum.gamma`.

    .. math:: \sqrt{2^\tau (2 - \tau)\, t}, \quad \sqrt{2 t}, \quad \sqrt{2 n^{\tau - 1} t},
              \quad (\tau - 1)\, n^{\tau - 1} t

    for tau in [0, 1), 1, (1, 2), and from 2 on.

    Args:
        t, tau, classes: as for :func:`pyloss.analysis.comp_sum.gamma`.

    Returns:
        float64, of the shape of ``t``.

    Raises:
        As :func:`pyloss.analysis.comp_sum.t_function`.

    Example:
        >>> from pyloss.analysis.comp_sum import gamma_bound
        >>> gamma_bound(0.02, tau=1.0)
        tensor(0.2000, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    _check_tau(tau)
    classes = _checked_classes(classes)
    t = as_constants("t", t).clamp(min=0)
    if tau >= 2:
        return (tau - 1) * classes ** (tau - 1) * t
    factor = 2**tau * (2 - tau) if tau < 1 else 2 * classes ** (tau - 1)
    return torch.sqrt(factor * t)


def h_consistency_bound(
    excess: float | Tensor,
    loss: str | float = "logistic",
    *,
    classes: int = 2,
    closed_form: bool = False,
) -> Tensor:
    r"""Bounds the excess of the zero-one risk by that of a surrogate loss.

    .. math:: R_{01}(h) - R^*_{01}(\mathcal H) + M_{01}(\mathcal H) \le \Gamma_\tau\big(R_\tau(h) -
              R^*_\tau(\mathcal H) + M_\tau(\mathcal H)\big)

    For the logistic loss it is :math:`T^{-1}(t) \le \sqrt{2 t}`, for any number of classes.

    Args:
        excess: of the surrogate risk, with the minimizability gap: the argument of Gamma; any
            shape.
        loss: ``"logistic"`` or ``"cross_entropy"``, ``"sum_exponential"``, ``"mae"``; or tau, the
            number of the comp-sum loss (1 + q for generalized cross entropy).
        classes: n >= 2; counts for tau > 1 alone.
        closed_form: the bound that has one, which is above the other.

    Returns:
        float64, of the shape of ``excess``.

    Raises:
        ValueError: an unknown loss; as :func:`pyloss.analysis.comp_sum.t_function`.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.h_consistency_bound(0.02)
        tensor(0.1993, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288. Zheng et al. Revisiting Discriminative vs. Generative
        Classifiers. arXiv 2302.02334.
    """
    if isinstance(loss, str):
        checks.check_one_of("loss", loss, LOSSES)
        loss = LOSSES[loss]
    checks.check_flag("closed_form", closed_form)
    return (gamma_bound if closed_form else gamma)(excess, loss, classes)


# --------------------------------------------------------------------------------------------------
# Risks at one input


def conditional_risk(scores: Tensor, prob: Tensor, tau: float) -> Tensor:
    r"""The risk of scores where classes have given probabilities.

    .. math:: \sum_y p_y\, \Phi^\tau\Big(\sum_{j \ne y} e^{h_j - h_y}\Big)

    Args:
        scores: h, ``(..., n)``.
        prob: p, likewise; adds up to 1.
        tau: >= 0.

    Returns:
        ``(...)``, float64.

    Raises:
        TypeError: no floating tensors. ValueError: tau out of range, shapes that do not fit.

    Example:
        >>> import torch
        >>> from pyloss.analysis.comp_sum import conditional_risk
        >>> conditional_risk(torch.zeros(2), torch.tensor([0.7, 0.3]), tau=2.0)
        tensor(0.5000, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    _check_tau(tau)
    checks.check_floating("scores", scores)
    prob = _checked_prob(prob)
    if scores.shape[-1:] != prob.shape[-1:]:
        raise ValueError(
            f"scores and prob must have as many classes, got {list(scores.shape)} and "
            f"{list(prob.shape)}"
        )
    return _risk(scores.double(), prob, tau)


def _risk(scores: Tensor, prob: Tensor, tau: float) -> Tensor:
    each = _phi(-torch.log_softmax(scores, -1), tau)
    # What cannot happen costs nothing, also at an infinite score.
    return torch.where(prob == 0, 0.0, prob * each).sum(-1)


def _phi(nll: Tensor, tau: float) -> Tensor:
    """Of -log of the label's probability."""
    return nll if tau == 1 else torch.expm1((1 - tau) * nll) / (1 - tau)


def conditional_minimum(prob: Tensor, tau: float, score_bound: float | None = None) -> Tensor:
    r"""The least conditional risk over all scores, or over bounded ones.

    .. math:: \frac{\big(\sum_y p_y^{1 / (2 - \tau)}\big)^{2 - \tau} - 1}{1 - \tau}, \quad
              -\sum_y p_y \log p_y, \quad \frac{1 - \max_y p_y}{\tau - 1}

    for tau < 2, tau = 1 and from 2 on. With scores in [-L, L] it is the risk of
    :func:`pyloss.analysis.comp_sum.conditional_minimizer`; where one class is certain,
    :math:`\Phi^\tau((n - 1) e^{-2 L})`.

    Args:
        prob: ``(..., n)``, adds up to 1.
        tau: >= 0.
        score_bound: L > 0; None: no bound.

    Returns:
        ``(...)``, float64.

    Raises:
        TypeError, ValueError: probabilities that are none, an option out of range.

    Example:
        >>> import torch
        >>> from pyloss.analysis.comp_sum import conditional_minimum
        >>> conditional_minimum(torch.tensor([0.75, 0.25]), tau=2.0)
        tensor(0.2500, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    _check_tau(tau)
    prob = _checked_prob(prob)
    if score_bound is not None:
        return _risk(conditional_minimizer(prob, tau, score_bound), prob, tau)
    if tau == 1:
        return torch.special.entr(prob).sum(-1)
    if tau >= 2:
        return (1 - prob.amax(-1)) / (tau - 1)
    log_sum = torch.logsumexp(prob.log() / (2 - tau), -1)
    return torch.expm1((2 - tau) * log_sum) / (1 - tau)


def conditional_minimizer(prob: Tensor, tau: float, score_bound: float | None = None) -> Tensor:
    r"""Scores of the least conditional risk.

    .. math:: h_c = \log p_c / (2 - \tau), \qquad h_c = \operatorname{clip}(\log p_c / (2 - \tau) +
              \mu, -L, L)

    the second with scores in [-L, L], mu found by a search. From tau = 2 on, where no scores
    without a bound attain it, the classes of the k largest probabilities get L and the others -L,
    with the best k.

    Args:
        prob: ``(..., n)``, adds up to 1.
        tau: >= 0; < 2 without a bound.
        score_bound: L > 0; None: no bound.

    Returns:
        ``(..., n)``, float64; -inf for what cannot happen, without a bound.

    Raises:
        TypeError, ValueError: as :func:`pyloss.analysis.comp_sum.conditional_minimum`; tau >= 2
            without a bound.

    Example:
        >>> import torch
        >>> from pyloss.analysis.comp_sum import conditional_minimizer
        >>> conditional_minimizer(torch.tensor([0.75, 0.25]), tau=1.0).softmax(0)
        tensor([0.7500, 0.2500], dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    _check_tau(tau)
    prob = _checked_prob(prob)
    if score_bound is None:
        if tau >= 2:
            raise ValueError(f"tau = {tau} >= 2: no scores without a bound have the least risk")
        return prob.log() / (2 - tau)
    checks.check_range("score_bound", score_bound, 0.0, open_low=True)
    if tau >= 2:
        return _best_of_two_values(prob, tau, score_bound)
    return _clipped(prob, tau, score_bound)


def _best_of_two_values(prob: Tensor, tau: float, bound: float) -> Tensor:
    """Probabilities whose ratios are bounded form a polytope, and the risk is concave in them: a
    corner is best, where all have one of two values."""
    classes = prob.shape[-1]
    rank = prob.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    size = torch.arange(1, classes + 1, device=prob.device).view(-1, *(1,) * prob.dim())
    scores = bound * torch.where(rank < size, 1.0, -1.0).double()  # (k, ..., n)
    best = _risk(scores, prob, tau).argmin(0)
    return bound * torch.where(rank <= best.unsqueeze(-1), 1.0, -1.0).double()


def _clipped(prob: Tensor, tau: float, bound: float) -> Tensor:
    free = prob.log() / (2 - tau)
    # As functions of mu the scores have corners where one meets a bound; a search between each two.
    some = torch.where(prob > 0, free, free.amax(-1, keepdim=True))
    corners = torch.cat([-bound - some, bound - some], -1).sort(dim=-1).values  # (..., 2n)
    low, high = corners[..., :-1], corners[..., 1:]

    def scores(mu: Tensor) -> Tensor:
        return (free.unsqueeze(-2) + mu.unsqueeze(-1)).clamp(-bound, bound)

    def risk(mu: Tensor) -> Tensor:
        return _risk(scores(mu), prob.unsqueeze(-2), tau)

    for _ in range(_HALVINGS):
        third = (high - low) / 3
        left, right = low + third, high - third
        falls = risk(left) > risk(right)
        low, high = torch.where(falls, left, low), torch.where(falls, high, right)
    mu = (low + high) / 2
    return scores(mu.gather(-1, risk(mu).argmin(-1, keepdim=True))).squeeze(-2)


# --------------------------------------------------------------------------------------------------
# Risks of a model


def minimizability_gap(
    prob: Tensor, tau: float, best_risk: float | Tensor, score_bound: float | None = None
) -> Tensor:
    r"""What the best of a hypothesis set loses because it must serve all inputs.

    .. math:: M_\tau(\mathcal H) = R^*_\tau(\mathcal H) - \mathbb{E}_x\big[\inf_{h \in \mathcal H}
              \mathbb{E}[\ell_\tau(h, x, y) \mid x]\big] \ge 0

    Args:
        prob: class probabilities at N inputs, ``(N, n)``; one-hot where labels are certain.
        tau: >= 0.
        best_risk: the least risk in the set, or an estimate.
        score_bound: L, where scores of the set lie in [-L, L] and reach all of it; None: complete.

    Returns:
        Of the shape of ``best_risk``, float64.

    Raises:
        As :func:`pyloss.analysis.comp_sum.conditional_minimum`.

    Example:
        >>> import torch, pyloss
        >>> prob = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> pyloss.analysis.minimizability_gap(prob, tau=2.0, best_risk=0.4)
        tensor(0.0250, dtype=torch.float64)

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    least = conditional_minimum(prob, tau, score_bound).mean()
    return as_constants("best_risk", best_risk) - least


def analyze(
    logits: Tensor,
    target: Tensor,
    tau: float | Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    *,
    score_bound: float | None = None,
    best_risk: Sequence[float] | Tensor | None = None,
    best_zero_one: float | None = None,
) -> CompSumAnalysis:
    r"""Risks of a classifier under comp-sum losses, and what they say of its zero-one risk.

    .. math:: R_{01}(h) - R^*_{01} \le \Gamma_\tau\big(R_\tau(h) - R^*_\tau + M_\tau\big) - M_{01}

    With growing tau the gap M falls, and the constant of Gamma, from tau = 1 on, grows with the
    number of classes. The bounds are of the risks on the given inputs.

    Args:
        logits: ``(N, n)``.
        target: class indices, ``(N)``, which makes labels certain; or their probabilities,
            ``(N, n)``.
        tau: one or several.
        score_bound: L: the hypothesis set has scores in [-L, L]; None: all scores. Logits are not
            checked against it.
        best_risk: R* in the hypothesis set, of each tau, as far as known; default: the conditional
            minimum, with which the gap is 0 and the bound one of the excess.
        best_zero_one: R*_01 likewise; default: its conditional minimum.

    Returns:
        :class:`pyloss.analysis.CompSumAnalysis`.

    Raises:
        TypeError, ValueError: tensors or options that do not fit. IndexError: a label that is no
            class.

    Example:
        >>> import torch
        >>> from pyloss.analysis.comp_sum import analyze
        >>> found = analyze(torch.randn(50, 3), torch.randint(3, (50,)), tau=[0.0, 1.0, 2.0])
        >>> bool((found.bound >= found.zero_one_risk - found.zero_one_minimum).all())
        True

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """
    checks.check_floating("logits", logits)
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be (N, n) with rows and classes, got {list(logits.shape)}")
    scores = logits.detach().double()
    prob = _probabilities(target, scores)
    classes = _checked_classes(scores.shape[1])
    taus = _checked_taus(tau)
    risk = torch.stack([_risk(scores, prob, t).mean() for t in taus])
    # Certain labels have the same least risk, whichever they are.
    different = prob if target.is_floating_point() else prob[:1]
    least = torch.stack([conditional_minimum(different, t, score_bound).mean() for t in taus])
    gap = torch.zeros_like(least)
    if best_risk is not None:
        best = torch.as_tensor(best_risk, dtype=torch.float64, device=least.device).reshape(-1)
        if best.shape != least.shape:
            raise ValueError(f"best_risk must hold {len(taus)} risks, got {best.numel()}")
        gap = best - least
    zero_one = 1 - prob.gather(1, scores.argmax(1, keepdim=True)).mean()
    zero_one_least = (1 - prob.amax(1)).mean()
    zero_one_gap = torch.zeros_like(zero_one)
    if best_zero_one is not None:
        zero_one_gap = zero_one_gap + best_zero_one - zero_one_least
    excess = risk - least  # R - R* + M
    pairs = list(zip(excess, taus))
    return CompSumAnalysis(
        tau=torch.tensor(taus, dtype=torch.float64),
        surrogate_risk=risk,
        conditional_minimum=least,
        gap=gap,
        bound=torch.stack([gamma(e, t, classes) for e, t in pairs]) - zero_one_gap,
        bound_closed_form=torch.stack([gamma_bound(e, t, classes) for e, t in pairs])
        - zero_one_gap,
        zero_one_risk=zero_one,
        zero_one_minimum=zero_one_least,
        zero_one_gap=zero_one_gap,
    )


def _probabilities(target, scores: Tensor) -> Tensor:
    checks.check_tensor("target", target)
    rows, classes = scores.shape
    if target.is_floating_point():
        if target.shape != scores.shape:
            raise ValueError(
                f"probabilities must have the shape of logits, {list(scores.shape)}, got "
                f"{list(target.shape)}"
            )
        return _checked_prob(target, "target")
    checks.check_index_dtype("target", target)
    if target.shape != (rows,):
        raise ValueError(f"target must have the shape {[rows]}, got {list(target.shape)}")
    checks.check_index_values(target, classes, -1 - classes)
    return torch.nn.functional.one_hot(target.long(), classes).double()


def _checked_prob(prob, name: str = "prob") -> Tensor:
    checks.check_floating(name, prob)
    checks.check_has_dimension(name, prob)
    prob = prob.detach().double()
    off = (prob.sum(-1) - 1).abs()
    if bool((prob < 0).any()) or bool((off > 1e-5).any()):
        raise ValueError(
            f"{name} must hold probabilities that add up to 1 along the last dimension"
        )
    return prob


def _check_tau(tau) -> None:
    checks.check_range("tau", tau, 0.0)


def _checked_taus(tau) -> list[float]:
    """Of one number or several, in a tensor or an array too."""
    given = tau.tolist() if isinstance(tau, Tensor) else tau
    try:
        taus = list(given)
    except TypeError:
        taus = [given]
    if not taus:
        raise ValueError("tau must be a number or several, got none")
    for t in taus:
        _check_tau(t)
    return [float(t) for t in taus]


def _checked_classes(classes) -> int:
    classes = checks.checked_integer("classes", classes)
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    return classes
