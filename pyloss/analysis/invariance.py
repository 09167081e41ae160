r"""Approximate invariance in linear structural equation models (arXiv 2205.15196): whether one
linear head is stationary in all environments, and how many of them say so of those unseen.

With :math:`\Sigma_e = \mathbb{E}[x x^\top]` and :math:`c_e = \mathbb{E}[x y]` of environment e,

    G_e = Phi Sigma_e Phi^T w - Phi c_e

is half the gradient of the squared error at the head w of the representation Phi x. (Phi, w) is
eps-approximately invariant if the norm of each G_e is at most eps. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._environments import check_environments, gradients
from pyloss.functional.segment import segment_moments

__all__ = [
    "Intervention",
    "InvarianceTest",
    "LinearSEM",
    "exact_gap",
    "invariance_environments_needed",
    "invariance_test",
    "linear_sem",
    "sem_covariance",
]

_EXACT = 1e-12  # of a gap that is 0 but for rounding, beside what it is made of


class InvarianceTest(NamedTuple):
    """What :func:`pyloss.analysis.invariance_test` finds, float64.
    :func:`pyloss.visualize.draw_invariance` draws it.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(100, 2), torch.randn(100)
        >>> found = pyloss.analysis.invariance_test(x, y, torch.tensor([0, 40, 100]))
        >>> found.w.shape, found.gap.shape, bool(found.eps_hat == found.gap.max())
        (torch.Size([2]), torch.Size([2]), True)
    """

    w: Tensor  #: the head of the least sum of squared gaps, ``(k,)``
    gap: Tensor  #: norm of the gradient in each environment, ``(E,)``
    eps_hat: Tensor  #: the largest gap, 0-d
    stderr: Tensor  #: of the gaps, ``(E,)``
    holds: Tensor  #: whether the data allow invariance, 0-d bool


class Intervention(NamedTuple):
    """A change of one equation of a model, as :func:`pyloss.analysis.linear_sem` takes it.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.Intervention(0, variance=4.0)
        Intervention(site=0, row=None, variance=4.0)
    """

    site: int  #: the coordinate, not that of the response
    row: Sequence[float] | Tensor | None = None  #: its new row of B, ``(d,)``; None: as it is
    variance: float | None = None  #: of its noise, then independent of other noise; None: as it is


class LinearSEM(NamedTuple):
    """What :func:`pyloss.analysis.linear_sem` draws.

    Example:
        >>> import torch, pyloss
        >>> B = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> x, y, offsets = pyloss.analysis.linear_sem(B, torch.ones(2), y=1, n=[5, 7],
        ...     interventions=[(), pyloss.analysis.Intervention(0, variance=2.0)])
        >>> x.shape, offsets.tolist()
        (torch.Size([12, 1]), [0, 5, 12])
    """

    x: Tensor  #: coordinates but that of the response, in their order, ``(N, d - 1)``, float64
    y: Tensor  #: ``(N,)``
    offsets: Tensor  #: of the environments, ``(E + 1,)``, int64


Environment = Intervention | Sequence[Intervention]


# --------------------------------------------------------------------------------------------------
# Models


def linear_sem(
    B: Tensor,
    omega: Tensor,
    *,
    y: int,
    interventions: Sequence[Environment],
    n: int | Sequence[int],
    generator: torch.Generator | None = None,
) -> LinearSEM:
    r"""Draws samples of a linear structural equation model under interventions.

    .. math:: X = B X + \eta, \qquad \eta \sim \mathcal{N}(0, \Omega), \qquad
              \operatorname{Cov} X = (I - B)^{-1} \Omega (I - B)^{-\top}

    Args:
        B: ``(d, d)``, floating; row i says what X_i is made of. I - B must be invertible.
        omega: variances of the noise, ``(d,)``, or their covariance, ``(d, d)``.
        y: the coordinate of the response.
        interventions: what is changed in each environment: an
            :class:`pyloss.analysis.Intervention`, several, or ``()`` for none.
        n: samples of each environment, or a list of them.
        generator: on the device of B; default: torch's own.

    Returns:
        :class:`pyloss.analysis.LinearSEM`: ``x``, ``y``, ``offsets``.

    Raises:
        TypeError, ValueError: arguments of a wrong type, shape or range; an intervention on the
            response; I - B singular. IndexError: a coordinate that there is not.

    Example:
        >>> import torch, pyloss
        >>> B = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # 0 -> 1 -> 2
        >>> data = pyloss.analysis.linear_sem(B, torch.ones(3), y=1, n=1000, interventions=[
        ...     (), pyloss.analysis.Intervention(0, variance=4.0),
        ...     pyloss.analysis.Intervention(2, row=[0.0, -1.0, 0.0])],
        ... )
        >>> bool(pyloss.analysis.invariance_test(data.x[:, 1:], data.y, data.offsets).holds)
        False

    Reference:
        Parulekar, Shanmugam, Shakkottai. PAC Generalization via Invariant Representations. arXiv
        2205.15196.
    """
    rows, covariances = _environments(B, omega, y, interventions)
    checks.check_generator(generator)
    count = len(rows)
    given = [n] * count if checks.as_integer(n) is not None else n
    lengths = [checks.checked_count("n", m) for m in given]
    if len(lengths) != count:
        raise ValueError(f"n must be one number or {count}, one an environment, got {len(lengths)}")
    kept = [i for i in range(rows.shape[1]) if i != y % rows.shape[1]]
    values, vectors = torch.linalg.eigh(covariances)
    mix = _mixing(rows) @ (vectors * values.clamp(min=0).sqrt().unsqueeze(1))
    parts = []
    for each, length in zip(mix, lengths):
        noise = torch.empty(length, rows.shape[1], dtype=torch.float64, device=rows.device)
        parts.append(noise.normal_(generator=generator) @ each.mT)
    X = torch.cat(parts) if parts else rows.new_zeros(0, rows.shape[1])
    offsets = segment.offsets_from_lengths(
        torch.tensor(lengths, dtype=torch.int64, device=rows.device)
    )
    return LinearSEM(X[:, kept], X[:, y], offsets)


def sem_covariance(
    B: Tensor, omega: Tensor, *, y: int, interventions: Sequence[Environment]
) -> Tensor:
    r"""The covariance of a linear structural equation model in each environment, exactly.

    .. math:: (I - B_e)^{-1} \Omega_e (I - B_e)^{-\top}

    Args:
        B, omega, y, interventions: as for :func:`pyloss.analysis.linear_sem`.

    Returns:
        ``(E, d, d)``, float64.

    Raises:
        As :func:`pyloss.analysis.linear_sem`.

    Example:
        >>> import torch
        >>> from pyloss.analysis.invariance import sem_covariance
        >>> B = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> sem_covariance(B, torch.ones(2), y=1, interventions=[()])[0].tolist()
        [[1.0, 2.0], [2.0, 5.0]]

    Reference:
        Parulekar, Shanmugam, Shakkottai. arXiv 2205.15196.
    """
    rows, covariances = _environments(B, omega, y, interventions)
    mix = _mixing(rows)
    return mix @ covariances @ mix.mT


def exact_gap(
    covariance: Tensor, phi: Tensor, w: Tensor | None = None, *, y: int
) -> tuple[Tensor, Tensor]:
    r"""The gap of a representation in environments whose covariance is known.

    .. math:: \|\Phi \Sigma_e \Phi^\top w - \Phi c_e\|_2

    Args:
        covariance: of all coordinates, ``(E, d, d)``, such as
            :func:`pyloss.analysis.invariance.sem_covariance` gives.
        phi: :math:`\Phi`, ``(k, d - 1)``, of the coordinates but that of the response.
        w: ``(k,)``; default: the head of the least sum of squared gaps.
        y: the coordinate of the response.

    Returns:
        w and the gaps, ``(E,)``, float64.

    Raises:
        TypeError, ValueError, IndexError: tensors of a wrong type or shape, a wrong coordinate.

    Example:
        >>> import torch
        >>> from pyloss.analysis.invariance import exact_gap, sem_covariance
        >>> B = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> covariance = sem_covariance(B, torch.ones(2), y=1, interventions=[()])
        >>> exact_gap(covariance, torch.eye(1), y=1)
        (tensor([2.], dtype=torch.float64), tensor([0.], dtype=torch.float64))

    Reference:
        Parulekar, Shanmugam, Shakkottai. arXiv 2205.15196.
    """
    checks.check_floating("covariance", covariance)
    if covariance.dim() != 3 or covariance.shape[1] != covariance.shape[2]:
        raise ValueError(f"covariance must be (E, d, d), got {list(covariance.shape)}")
    d = covariance.shape[1]
    y = _coordinate("y", y, d)
    checks.check_floating("phi", phi)
    if phi.dim() != 2 or phi.shape[1] != d - 1:
        raise ValueError(f"phi must be (k, {d - 1}), got {list(phi.shape)}")
    kept = [i for i in range(d) if i != y]
    phi, covariance = phi.detach().double(), covariance.detach().double()
    second = phi @ covariance[:, kept][:, :, kept] @ phi.mT
    cross = covariance[:, kept, y] @ phi.mT
    if w is None:
        w = _pinv(second.flatten(0, 1)) @ cross.flatten()
    else:
        checks.check_floating("w", w)
        if w.shape != phi.shape[:1]:
            raise ValueError(f"w must be ({phi.shape[0]},), got {list(w.shape)}")
        w = w.detach().double()
    return w, torch.linalg.vector_norm(second @ w - cross, dim=1)


def _environments(B, omega, y, interventions) -> tuple[Tensor, Tensor]:
    """B and the covariance of the noise in each, (E, d, d)."""
    checks.check_floating("B", B)
    if B.dim() != 2 or B.shape[0] != B.shape[1]:
        raise ValueError(f"B must be (d, d), got {list(B.shape)}")
    d = B.shape[0]
    checks.check_floating("omega", omega)
    checks.check_device("omega", omega, B, "B")
    if omega.shape not in ((d,), (d, d)):
        raise ValueError(f"omega must be ({d},) or ({d}, {d}), got {list(omega.shape)}")
    y = _coordinate("y", y, d)
    rows, noise = B.detach().double(), omega.detach().double()
    noise = torch.diag(noise) if noise.dim() == 1 else noise
    for name, t in (("B", rows), ("omega", noise)):
        if not t.isfinite().all():
            raise ValueError(f"{name} must be finite")
    values = torch.linalg.eigvalsh(noise) if d else noise.new_zeros(1)
    if values[0] < -1e-9 * values[-1].abs() or not torch.equal(noise, noise.mT):
        raise ValueError("omega must hold variances >= 0, or be a covariance")
    given = list(interventions)
    rows, noise = rows.repeat(len(given), 1, 1), noise.repeat(len(given), 1, 1)
    for e, changes in enumerate(given):
        if not isinstance(changes, Sequence):
            raise TypeError(
                f"interventions must hold one environment each, got {type(changes).__name__} at {e}"
            )
        for change in (changes,) if isinstance(changes, Intervention) else changes:
            if not isinstance(change, Intervention):
                raise TypeError(
                    f"interventions must hold Intervention, got {type(change).__name__} in "
                    f"environment {e}"
                )
            site = _coordinate(f"the site of an intervention in environment {e}", change.site, d)
            if site == y:
                raise ValueError(f"environment {e} intervenes on the response, coordinate {y}")
            if change.row is not None:
                row = torch.as_tensor(change.row, dtype=torch.float64, device=rows.device)
                if row.shape != (d,):
                    raise ValueError(
                        f"row of an intervention must be ({d},), got {list(row.shape)} in "
                        f"environment {e}"
                    )
                if not row.isfinite().all():
                    raise ValueError(f"row of an intervention must be finite in environment {e}")
                rows[e, site] = row.detach()
            if change.variance is not None:
                checks.check_range("variance of an intervention", change.variance, 0.0)
                noise[e, site] = noise[e, :, site] = 0.0
                noise[e, site, site] = change.variance
    return rows, noise


def _mixing(rows: Tensor) -> Tensor:
    """(I - B)^-1."""
    inverse, info = torch.linalg.inv_ex(
        torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device) - rows
    )
    if bool((info != 0).any()):
        raise ValueError(f"I - B must be invertible, is not in environment {int(info.argmax())}")
    return inverse


def _coordinate(name: str, value: int, d: int) -> int:
    value = checks.checked_integer(name, value)
    if not -d <= value < d:
        raise IndexError(f"{name} must be in [{-d}, {d - 1}], got {value}")
    return value % d


def _pinv(a: Tensor) -> Tensor:
    """NaN of what is not finite, where torch raises."""
    if not a.isfinite().all():
        return a.mT * math.nan
    return torch.linalg.pinv(a)


# --------------------------------------------------------------------------------------------------
# Samples


@torch.no_grad()
def invariance_test(
    features: Tensor,
    target: Tensor,
    env_offsets: Tensor,
    *,
    eps: float | None = None,
    level: float = 0.05,
) -> InvarianceTest:
    r"""Whether features have a linear head that is the least-squares solution everywhere.

    .. math:: w = \arg\min_w \sum_e \|G_e\|^2, \qquad
              G_e = \frac{1}{n_e} \sum_{i \in e} \phi_i (\phi_i^\top w - y_i)

    Invariance, eps = 0, is refused by the chi-square test of overidentifying restrictions,
    :math:`\min_w \sum_e n_e G_e^\top \Gamma_e^{-1} G_e` with the covariance :math:`\Gamma_e` of
    what G_e is the mean of. eps-approximate invariance is refused where a gap exceeds eps by more
    than chance, with the level shared by the environments.

    Args:
        features: :math:`\phi`, ``(N, k)``, floating, one environment behind the other. They may be
            linearly dependent: w is then the smallest.
        target: ``(N,)``.
        env_offsets: ``(E + 1,)``, int32 or int64; each environment has more than k rows.
        eps: >= 0; None is 0.
        level: in (0, 1), the probability to refuse what is so.

    Returns:
        :class:`pyloss.analysis.InvarianceTest`: ``w``, ``gap``, ``eps_hat``, ``stderr``,
        ``holds``. The standard errors are those of the delta method, that w is an estimate
        counted in. NaN, and not ``holds``, with NaN in the data.

    Raises:
        TypeError, RuntimeError, ValueError: tensors of a wrong type, dtype or shape, offsets that
            do not cut the rows into environments, too few rows, an option out of range.

    Example:
        >>> import torch, pyloss
        >>> cause = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> y = cause + torch.randn(2000, generator=torch.Generator().manual_seed(1))
        >>> effect = y + torch.linspace(0.1, 2, 2000)
        >>> offsets = torch.tensor([0, 1000, 2000])
        >>> [bool(pyloss.analysis.invariance_test(x.unsqueeze(1), y, offsets).holds)
        ...  for x in (cause, effect)]
        [True, False]

    Reference:
        Parulekar, Shanmugam, Shakkottai. PAC Generalization via Invariant Representations. arXiv
        2205.15196.
    """
    check_environments(features, target, env_offsets)
    if target.dim() != 1:
        raise ValueError(f"target must be (N,), got {list(target.shape)}")
    eps = 0.0 if eps is None else eps
    checks.check_range("eps", eps, 0.0)
    checks.check_range("level", level, 0.0, open_low=True)
    if level >= 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    k, E = features.shape[1], env_offsets.shape[0] - 1
    if E == 0 or int(env_offsets.diff().min()) <= k:
        raise ValueError(f"every environment, and there must be one, must have more than {k} rows")
    phi, y = features.detach().double(), target.detach().double()
    both = segment_moments(torch.cat([phi, y.unsqueeze(1)], 1), env_offsets, covariance=True)
    second = both.moment + both.mean.unsqueeze(2) * both.mean.unsqueeze(1)
    A, c = second[:, :k, :k], second[:, :k, k]
    inverse = _pinv(A.flatten(0, 1))  # (k, E k)
    w = inverse @ c.flatten()
    G = gradients(phi, y, w, env_offsets)
    gap = torch.linalg.vector_norm(G, dim=1)
    each = segment.segment_ids(env_offsets, len(phi))
    moved = torch.cat(  # what G_e is the mean of, and what moves the other gaps through w
        [
            phi * (phi @ w - y).unsqueeze(1),
            phi * (phi * G[each]).sum(1, keepdim=True),
        ],
        1,
    )
    spread = segment_moments(moved, env_offsets, covariance=True)
    spread = spread.moment / (spread.count - 1).view(-1, 1, 1)  # of the means
    stderr = _stderr(A, inverse, G / gap.clamp(min=1e-300).unsqueeze(1), spread)
    scale = torch.linalg.matrix_norm(A) * torch.linalg.vector_norm(w)
    scale = scale + torch.linalg.vector_norm(c, dim=1)
    rounding = _EXACT * scale
    if eps > 0:
        quantile = -torch.special.ndtri(torch.tensor(level / E, dtype=torch.float64))
        holds = (gap - float(quantile) * stderr <= eps + rounding).all()
    else:
        holds = (gap <= rounding).all() | _not_refused(A, c, G, spread[:, :k, :k], level, rounding)
    return InvarianceTest(w, gap, gap.amax(), stderr, holds)


def _stderr(A: Tensor, inverse: Tensor, u: Tensor, spread: Tensor) -> Tensor:
    r"""Of |G_e| = u_e G_e, where a change of A and c moves G by
    M (dA w - dc) - A^{+T} dA^T G, M = I - A A^+.

    What the samples of f do to e is [u_e, 0] - L_f v_e for e = f and - L_f v_e else.
    """
    E, k = u.shape
    blocks = inverse.view(k, E, k).transpose(0, 1)  # A^+ (E, :, :)
    v = torch.cat([(A @ u.unsqueeze(2)).squeeze(2), -(blocks @ u.unsqueeze(2)).squeeze(2)], 1)
    L = torch.diag(torch.cat([u.new_zeros(k), -u.new_ones(k)])).repeat(E, 1, 1)
    L[:, :k, :k] = blocks.mT
    all_f = (L.mT @ spread @ L).sum(0)
    own = torch.einsum("ei,eij,ej->e", u, spread[:, :k, :k], u)
    both = torch.einsum("ei,eij,ej->e", u, spread[:, :k] @ L, v)
    return (own - 2 * both + torch.einsum("ei,ij,ej->e", v, all_f, v)).clamp(min=0).sqrt()


def _not_refused(
    A: Tensor, c: Tensor, G: Tensor, spread: Tensor, level: float, rounding: Tensor
) -> Tensor:
    """The test of overidentifying restrictions; in directions without any spread G must be 0."""
    if not (spread.isfinite().all() and A.isfinite().all()):
        return torch.zeros((), dtype=torch.bool, device=A.device)
    values, vectors = torch.linalg.eigh(spread)
    real = values > 1e-12 * values[:, -1:]
    still = torch.linalg.vector_norm((vectors.mT @ G.unsqueeze(2)).squeeze(2) * ~real, dim=1)
    root = torch.where(real, values.clamp(min=1e-300).rsqrt(), 0.0)
    white = root.unsqueeze(2) * vectors.mT
    a, b = (white @ A).flatten(0, 1), (white @ c.unsqueeze(2)).flatten()
    left = a @ (_pinv(a) @ b) - b
    freedom = real.sum() - torch.linalg.matrix_rank(a)
    # With none left the minimum is 0.
    chance = torch.special.gammaincc(freedom.clamp(min=1).double() / 2, left.square().sum() / 2)
    return (still <= rounding.clamp(min=0) * 10).all() & ((freedom <= 0) | (chance >= level))


def invariance_environments_needed(delta: float, zeta: float, p: int = 0) -> int:
    r"""How many environments, all invariant, make unseen ones so, too.

    .. math:: E \ge \max\Big(\tfrac{4}{\delta} \log_2 \tfrac{2}{\zeta},\
              \tfrac{8 v}{\delta} \log_2 \tfrac{13}{\delta}\Big), \qquad v = 2 p \log_2(48 e)

    If a representation and head, chosen by any means, are eps-approximately invariant in so many
    environments that are drawn independently, then with probability 1 - zeta the share of
    environments in which they are not is at most delta. v bounds the VC dimension of the event,
    a polynomial inequality of degree 6 in p unknowns. A representation and head that were fixed
    before, p = 0, need :math:`\ln(1 / \zeta) / \delta`.

    Args:
        delta: in (0, 1), the share of unseen environments.
        zeta: in (0, 1), the probability of being wrong.
        p: unknowns >= 0: :math:`k d + k` of a representation ``(k, d)`` and its head.

    Returns:
        An int.

    Raises:
        TypeError, ValueError: numbers of a wrong type or out of range.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.invariance_environments_needed(0.1, 0.05)
        30

    Reference:
        Parulekar, Shanmugam, Shakkottai. arXiv 2205.15196. The constants are the classical ones of
        the realisable case (Blumer et al. 1989; Goldberg, Jerrum. 1995), larger than the paper's.
    """
    for name, value in (("delta", delta), ("zeta", zeta)):
        checks.check_range(name, value, 0.0, open_low=True)
        if value >= 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}")
    p = checks.checked_count("p", p)
    if p == 0:
        return math.ceil(math.log(1 / zeta) / delta)
    v = 2 * p * math.log2(48 * math.e)
    return math.ceil(max(4 / delta * math.log2(2 / zeta), 8 * v / delta * math.log2(13 / delta)))
