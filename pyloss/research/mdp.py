"""Adversarial Markov decision processes with linear Q functions: policies by log-barrier FTRL, or
by Hedge on estimates of reduced magnitude (Dai, Luo, Wei, Zimmert, arXiv 2301.12942)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks

__all__ = [
    "AdversarialLinearMDP",
    "LinearQMDP",
    "MDPRun",
    "log_barrier_ftrl",
    "magnitude_reduced_estimator",
]

ALGORITHMS = ("log_barrier", "hedge_mr", "hedge")
F64 = torch.float64
_NEWTON = 12  # steps to a multiplier; of 1000 actions and costs of any size six are enough


def log_barrier_ftrl(cost: Tensor, eta: float) -> Tensor:
    r"""Follow the regularised leader over distributions, the log barrier as regulariser.

    .. math::
        p = \arg\min_{p \in \Delta} \; \eta \langle p, c \rangle + \sum_a \log \frac1{p_a},
        \qquad p_a = \frac{1}{\lambda + \eta c_a}

    No entry is too negative for it: shifts of c change nothing, and :math:`p_a > 0` always. The
    multiplier is found by Newton's method on the inverse of :math:`\sum_a p_a`, which is concave in
    :math:`\lambda`, so that the steps rise to the root and none is too long.

    Args:
        cost: summed costs c, ``(*, A)``, floating.
        eta: > 0.

    Returns:
        p, ``(*, A)``, float64, with first and second derivatives in ``cost``. NaN in a row makes
        NaN of the row.

    Raises:
        TypeError: cost that is no floating tensor. ValueError: eta out of range, cost without
            entries.

    Example:
        >>> import torch
        >>> from pyloss.research.mdp import log_barrier_ftrl
        >>> log_barrier_ftrl(torch.tensor([0.0, 1.5]), eta=1.0)
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    checks.check_floating("cost", cost)
    checks.check_has_dimension("cost", cost)
    checks.check_along("cost", cost, -1)
    checks.check_range("eta", eta, 0.0, open_low=True)
    c = cost.double()
    c = eta * (c - c.detach().amin(-1, keepdim=True))

    def newton(level: Tensor) -> Tensor:
        p = 1 / (level + c)
        total = p.sum(-1, keepdim=True)
        return level + total * (total - 1) / p.square().sum(-1, keepdim=True)

    with torch.no_grad():
        level = torch.ones_like(c[..., :1])  # left of the root, which is in [1, A]
        for _ in range(_NEWTON):
            level = newton(level)
    # At the root a step is the identity, and its derivatives are those of the root: of two steps
    # the second ones, too.
    p = 1 / (newton(newton(level)) + c)
    return p / p.sum(-1, keepdim=True)


def magnitude_reduced_estimator(w: Tensor, L: float | Tensor, w_samples: Tensor, H: int) -> Tensor:
    r"""An unbiased estimate of Q that is never as negative as the usual one, :math:`w L`.

    .. math::
        \hat Q(s, a) = w L - H \min(w, 0) + \frac{H}{M} \sum_m \min(w_m, 0), \qquad
        w = \phi(s, a)^T \Sigma^{-1} \phi(s_h, a_h)

    Of losses in [0, H] the first two terms are >= 0, and the third, of fresh rollouts, has the
    mean that the second takes away. So :math:`\hat Q \ge -H \lVert \phi(s, a) \rVert_{\Sigma^{-1}}`
    up to the error of the mean.

    Args:
        w: at the state and action that were visited, any shape, floating.
        L: losses from there to the end of the episode, in [0, H]: a number, or a tensor that
            broadcasts to w.
        w_samples: w_m, at those that M > 0 fresh rollouts visited, of the shape of w and M.
        H: the horizon, >= 1.

    Returns:
        As w.

    Raises:
        TypeError: w or w_samples that are no floating tensors. ValueError: shapes that do not fit,
            L out of range (of a tensor, on the CPU), H < 1.

    Example:
        >>> import torch
        >>> from pyloss.research.mdp import magnitude_reduced_estimator
        >>> w, w_samples = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, -1.0], [0.0, -1.0]])
        >>> magnitude_reduced_estimator(w, 0.5, w_samples, H=3)
        tensor([-0.5000,  1.0000])
    """
    checks.check_floating("w", w)
    checks.check_floating("w_samples", w_samples)
    checks.checked_count("H", H, 1)
    if w_samples.shape[:-1] != w.shape or w_samples.dim() == 0 or w_samples.shape[-1] == 0:
        raise ValueError(
            f"w_samples must have the shape of w and M > 0, {[*w.shape, 'M']}, got "
            f"{list(w_samples.shape)}"
        )
    if not isinstance(L, Tensor) or checks.can_look_at(L):
        values = torch.as_tensor(L)
        outside = values[(values < 0) | (values > H)]
        if outside.numel():
            raise ValueError(f"L must be in [0, H] = [0, {H}], got {float(outside[0])}")
    return w * L - H * w.clamp(max=0) + H * w_samples.clamp(max=0).mean(-1)


class LinearQMDP:
    r"""A layered process of low rank: transitions and losses are linear in d features of states and
    actions, and so is the Q function of every policy.

    .. math::
        P(s' \mid s, a) = \phi(s, a)^T \mu(s'), \qquad \ell(s, a) = \phi(s, a)^T \theta, \qquad
        Q^\pi_h(s, a) = \phi(s, a)^T \Big(\theta_h + \sum_{s'} \mu(s') V^\pi_{h+1}(s')\Big)

    :math:`\phi(s, a)` mixes d distributions :math:`\mu_j` of the next state; all are drawn. Losses
    are in [0, 1] for :math:`\theta \in [0, 1]^d`.

    Args:
        S, A: numbers of states and actions, >= 1.
        H: steps of an episode, >= 1.
        d: features, from 1 to S A.
        generator: draws features, transitions and the distribution of the first state.

    Raises:
        TypeError: a number that is no integer, a generator of another type. ValueError: a number
            out of range.

    Example:
        >>> import torch
        >>> from pyloss.research.mdp import LinearQMDP
        >>> mdp = LinearQMDP(4, 3, 3, 6, torch.Generator().manual_seed(0))
        >>> uniform = torch.full((3, 4, 3), 1 / 3)
        >>> mdp.value(uniform, torch.ones(3, 6))  # a loss of 1 in each of three steps
        tensor(3.0000, dtype=torch.float64)
    """

    features: Tensor  #: phi, (S, A, d), rows of sum 1
    mixtures: Tensor  #: mu, (d, S), rows of sum 1
    transitions: Tensor  #: P, (S, A, S)
    initial: Tensor  #: (S,)

    def __init__(
        self, S: int, A: int, H: int, d: int, generator: torch.Generator | None = None
    ) -> None:
        self.S, self.A = checks.checked_count("S", S, 1), checks.checked_count("A", A, 1)
        self.H, self.d = checks.checked_count("H", H, 1), checks.checked_count("d", d, 1)
        if self.d > self.S * self.A:
            raise ValueError(f"d must be at most S * A = {self.S * self.A}, got {self.d}")
        checks.check_generator(generator)
        # Peaked features, so that what is done matters; almost surely they span all dimensions.
        # Even mixtures, so that all states are seen.
        self.features = _on_simplex((self.S, self.A, self.d), 0.2, generator)
        self.mixtures = _on_simplex((self.d, self.S), 1.0, generator)
        self.transitions = self.features @ self.mixtures
        self.initial = _on_simplex((self.S,), 1.0, generator)

    def q_values(self, policy: Tensor, theta: Tensor) -> Tensor:
        """Q of a policy, by going backwards.

        Args:
            policy: ``(*, H, S, A)``, distributions over actions.
            theta: of the losses, ``(*, H, d)``; both broadcast.

        Returns:
            ``(*, H, S, A)``, float64.

        Raises:
            ValueError: shapes that do not fit.
        """
        return self._backwards(theta, lambda h, q: (policy[..., h, :, :] * q).sum(-1), policy)

    def value(self, policy: Tensor, theta: Tensor) -> Tensor:
        """The expected loss of an episode; arguments as :meth:`q_values`, ``(*)``, float64."""
        q = self.q_values(policy, theta)[..., 0, :, :]
        return (policy[..., 0, :, :] * q).sum(-1) @ self.initial

    def optimal_value(self, theta: Tensor) -> Tensor:
        """The least expected loss of an episode: ``(*, H, d)`` to ``(*)``, float64.

        The loss of a policy over several episodes is that of their summed ``theta``: so this is
        what the best policy of hindsight loses.
        """
        return self._backwards(theta, lambda h, q: q.amin(-1))[..., 0, :, :].amin(-1) @ self.initial

    def occupancy(self, policy: Tensor) -> Tensor:
        """How probable each state and action is in each step.

        Args:
            policy: ``(*, H, S, A)``.

        Returns:
            ``(*, H, S, A)``, float64, each step of sum 1.
        """
        self._check_policy(policy)
        state, found = self.initial, []
        for h in range(self.H):
            both = state[..., None] * policy[..., h, :, :].double()
            found.append(both)
            state = both.flatten(-2) @ self.transitions.flatten(0, 1)
        return torch.stack(found, -3)

    def rollouts(
        self, policy: Tensor, count: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Simulates episodes.

        Args:
            policy: ``(*, H, S, A)``.
            count: of episodes, for each policy.
            generator: of the random numbers.

        Returns:
            int64 ``(*, count, H)``: the pair visited in each step, as ``state * A + action``.
        """
        self._check_policy(policy)
        batch = policy.shape[:-3]
        flat = policy.double().reshape(-1, self.H, self.S, self.A)
        runs = torch.arange(len(flat))[:, None]
        at = torch.rand(2 * self.H, len(flat), count, 1, generator=generator, dtype=F64)
        state = _drawn(self.initial.expand(len(flat), count, self.S), at[0])
        to_next = self.transitions.flatten(0, 1)
        pairs = []
        for h in range(self.H):
            action = _drawn(flat[runs, h, state], at[2 * h + 1])
            pairs.append(state * self.A + action)
            if h + 1 < self.H:
                state = _drawn(to_next[pairs[-1]], at[2 * h + 2])
        return torch.stack(pairs, -1).reshape(*batch, count, self.H)

    def losses(self, theta: Tensor) -> Tensor:
        """``(*, H, d)`` to the losses ``(*, H, S, A)``, float64."""
        return torch.einsum("sad,...d->...sa", self.features, theta.double())

    def _backwards(
        self,
        theta: Tensor,
        value_of: Callable[[int, Tensor], Tensor],
        policy: Tensor | None = None,
    ) -> Tensor:
        if policy is not None:
            self._check_policy(policy)
        if theta.shape[-2:] != (self.H, self.d):
            raise ValueError(f"theta must be (*, {self.H}, {self.d}), got {list(theta.shape)}")
        losses, found = self.losses(theta), []
        for h in reversed(range(self.H)):
            q = losses[..., h, :, :]
            if found:
                q = q + torch.einsum("sax,...x->...sa", self.transitions, value_of(h + 1, found[0]))
            found.insert(0, q)
        return torch.stack(torch.broadcast_tensors(*found), -3)

    def _check_policy(self, policy: Tensor) -> None:
        checks.check_floating("policy", policy)
        if policy.shape[-3:] != (self.H, self.S, self.A):
            raise ValueError(
                f"policy must be (*, {self.H}, {self.S}, {self.A}), got {list(policy.shape)}"
            )


def _on_simplex(shape: tuple[int, ...], power: float, generator: torch.Generator | None) -> Tensor:
    """Weights of sum 1; of smaller powers of the exponential draws, more even ones."""
    draws = torch.rand(shape, generator=generator, dtype=F64).clamp(min=1e-12).log().neg()
    draws = draws ** (1 / power)
    return draws / draws.sum(-1, keepdim=True)


def _drawn(p: Tensor, at: Tensor) -> Tensor:
    """Entries by inversion, of numbers in [0, 1): ``(*, N)`` and ``(*, 1)`` to ``(*)``."""
    return (p.cumsum(-1)[..., :-1] <= at).sum(-1)


class MDPRun(NamedTuple):
    """What :meth:`AdversarialLinearMDP.run` finds: float64, a row for each run.

    Example:
        >>> import torch
        >>> from pyloss.research.mdp import AdversarialLinearMDP, LinearQMDP
        >>> found = AdversarialLinearMDP(LinearQMDP(2, 2, 2, 3)).run(4)
        >>> found.policy.shape  # the last one, of one run
        torch.Size([1, 2, 2, 2])
    """

    regret: Tensor  #: (runs, K): after each episode, to the best policy of hindsight up to there
    loss: Tensor  #: (runs, K): expected, of the policy that was played
    policy: Tensor  #: (runs, H, S, A): the last one


class AdversarialLinearMDP:
    r"""Learns policies from the losses of its own episodes, while an adversary changes the losses.

    After each episode Q is estimated from what was seen, with
    :math:`\Sigma_h = \gamma I + \frac1M \sum_m \phi_m \phi_m^T` of M rollouts of a simulator, and
    explored where :math:`\Sigma_h` knows little:

    .. math::
        b_h(s, a) &= \beta \Big( \lVert \phi(s, a) \rVert^2_{\Sigma_h^{-1}} +
            \mathbb E_{a' \sim \pi} \lVert \phi(s, a') \rVert^2_{\Sigma_h^{-1}} \Big) \\
        B_h(s, a) &= b_h(s, a) + \Big(1 + \frac1H\Big) \mathbb E_{s', a' \sim \pi} B_{h+1}(s', a')

    The next policy is, in each state and step, that of the summed :math:`\hat Q - B`:

    =============== ==================================== ==========================================
    ``algorithm``   estimate                             policy
    =============== ==================================== ==========================================
    ``log_barrier`` :math:`w L`                          :func:`log_barrier_ftrl`
    ``hedge_mr``    :func:`magnitude_reduced_estimator`  Hedge, :math:`\propto \exp(-\eta \sum)`
    ``hedge``       :math:`w L`                          Hedge
    =============== ==================================== ==========================================

    Both of the paper's, the first two, have a regret of order :math:`\sqrt K`. The version without
    a simulator, of order :math:`K^{8/9}`, is not here. The expectation over s' in B is that of the
    tables.

    Args:
        mdp: what is played on.
        algorithm: of the table.
        eta: > 0, the learning rate; default: ``32 / sqrt(K)`` of the log barrier, ``8 / sqrt(K)``
            of Hedge. The powers of K are the paper's, the factors were found by trying.
        beta: >= 0, of the bonus; default ``0.05 / sqrt(K)``.
        gamma: > 0; default ``1 / sqrt(K)``.
        rollouts: M >= 1, and as many again for the magnitude-reduced estimate; None, the default:
            the expectations of the tables, a simulator that is asked without end.
        switches: the adversary has two tables of losses, theta of 0 and 1, and goes from one to
            the other so many times, after parts of equal length.
        generator: draws the losses and the episodes.

    Raises:
        TypeError: an option of the wrong type. ValueError: an option out of range.

    Example:
        >>> import torch
        >>> from pyloss.research.mdp import AdversarialLinearMDP, LinearQMDP
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = LinearQMDP(4, 3, 3, 6, generator)
        >>> found = AdversarialLinearMDP(mdp, "hedge_mr", generator=generator).run(20, runs=2)
        >>> found.regret.shape
        torch.Size([2, 20])

    Reference:
        Dai, Luo, Wei, Zimmert. Refined Regret for Adversarial MDPs with Linear Function
        Approximation. arXiv 2301.12942.
    """

    def __init__(
        self,
        mdp: LinearQMDP,
        algorithm: str = "log_barrier",
        *,
        eta: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        rollouts: int | None = None,
        switches: int = 7,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(mdp, LinearQMDP):
            raise TypeError(f"mdp must be a LinearQMDP, got {type(mdp).__name__}")
        checks.check_one_of("algorithm", algorithm, ALGORITHMS)
        for name, value in (("eta", eta), ("gamma", gamma), ("beta", beta)):
            if value is not None:
                checks.check_range(name, value, 0.0, open_low=name != "beta")
        if rollouts is not None:
            rollouts = checks.checked_count("rollouts", rollouts, 1)
        checks.check_generator(generator)
        self.mdp, self.algorithm, self.rollouts = mdp, algorithm, rollouts
        self.eta, self.beta, self.gamma = eta, beta, gamma
        self.switches = checks.checked_count("switches", switches)
        self.generator = generator

    def losses(self, K: int, runs: int = 1) -> Tensor:
        """Draws what the adversary does: theta of 0 and 1, ``(runs, K, H, d)``, float64."""
        K, runs = checks.checked_count("K", K, 1), checks.checked_count("runs", runs, 1)
        shape = (runs, 2, self.mdp.H, self.mdp.d)
        tables = torch.randint(2, shape, generator=self.generator).to(F64)
        which = torch.arange(K) * (self.switches + 1) // K % 2
        return tables[:, which]

    def run(self, K: int, runs: int = 1, theta: Tensor | None = None) -> MDPRun:
        """Plays K episodes, in several independent runs at once.

        Args:
            K: >= 1.
            runs: >= 1.
            theta: the losses of each episode, in [0, 1], ``(runs, K, H, d)``; default:
                :meth:`losses`.

        Returns:
            :class:`MDPRun`.

        Raises:
            TypeError: numbers that are no integers. ValueError: numbers out of range; theta of
                another shape or outside [0, 1].
        """
        K, runs = checks.checked_count("K", K, 1), checks.checked_count("runs", runs, 1)
        mdp, root = self.mdp, math.sqrt(K)
        theta = self.losses(K, runs) if theta is None else _checked_theta(theta, mdp, K, runs)
        barrier = self.algorithm == "log_barrier"
        eta = (32 if barrier else 8) / root if self.eta is None else self.eta
        beta = 0.05 / root if self.beta is None else self.beta
        gamma = 1 / root if self.gamma is None else self.gamma
        losses = mdp.losses(theta).flatten(-2)  # (runs, K, H, S A)
        summed = torch.zeros(runs, mdp.H, mdp.S, mdp.A, dtype=F64)
        policies = []
        for k in range(K):
            policy = log_barrier_ftrl(summed, eta) if barrier else (-eta * summed).softmax(-1)
            policies.append(policy)
            inverse = self._inverse(policy, gamma)
            estimate = self._estimate(policy, inverse, losses[:, k])
            summed += estimate - self._bonus(policy, inverse, beta)
        played = torch.stack(policies, 1)
        loss = mdp.value(played, theta)
        best = mdp.optimal_value(theta.cumsum(1))
        return MDPRun(loss.cumsum(1) - best, loss, policies[-1])

    def _visited(self, policy: Tensor) -> Tensor:
        """Weights of the pairs by fresh rollouts, or exact: ``(runs, H, S A)`` of sum 1."""
        if self.rollouts is None:
            return self.mdp.occupancy(policy).flatten(-2)
        pairs = self.mdp.rollouts(policy, self.rollouts, self.generator).transpose(-1, -2)
        counts = torch.zeros(*pairs.shape[:-1], self.mdp.S * self.mdp.A, dtype=F64)
        ones = torch.ones((), dtype=F64).expand(pairs.shape)
        return counts.scatter_add_(-1, pairs, ones) / self.rollouts

    def _inverse(self, policy: Tensor, gamma: float) -> Tensor:
        phi = self.mdp.features.flatten(0, 1)
        second = phi.T @ (self._visited(policy)[..., None] * phi)
        return torch.linalg.inv(second + gamma * torch.eye(self.mdp.d, dtype=F64))

    def _estimate(self, policy: Tensor, inverse: Tensor, losses: Tensor) -> Tensor:
        """Of Q, out of one episode: ``(runs, H, S, A)``."""
        mdp = self.mdp
        phi = mdp.features.flatten(0, 1)
        pairs = mdp.rollouts(policy, 1, self.generator)[:, 0]  # (runs, H)
        seen = losses.gather(-1, pairs[..., None])[..., 0]
        ahead = seen.flip(-1).cumsum(-1).flip(-1)[..., None]
        w = (phi @ (inverse @ phi[pairs][..., None]))[..., 0]  # (runs, H, S A)
        if self.algorithm == "hedge_mr":
            # The mean over fresh rollouts, here with the weights of the pairs that they visit.
            crossed = (phi @ inverse @ phi.T).clamp(max=0)
            mean = (crossed @ self._visited(policy)[..., None]).transpose(-1, -2)[..., 0, :]
            w = magnitude_reduced_estimator(w, ahead.clamp(max=mdp.H), mean[..., None], mdp.H)
        else:
            w = w * ahead
        return w.unflatten(-1, (mdp.S, mdp.A))

    def _bonus(self, policy: Tensor, inverse: Tensor, beta: float) -> Tensor:
        mdp = self.mdp
        phi = mdp.features.flatten(0, 1)
        spread = ((phi @ inverse) * phi).sum(-1).unflatten(-1, (mdp.S, mdp.A))
        bonus = beta * (spread + (policy * spread).sum(-1, keepdim=True))
        for h in reversed(range(mdp.H - 1)):
            ahead = (policy[:, h + 1] * bonus[:, h + 1]).sum(-1)
            bonus[:, h] += (1 + 1 / mdp.H) * (ahead @ mdp.transitions.flatten(0, 1).T).unflatten(
                -1, (mdp.S, mdp.A)
            )
        return bonus


def _checked_theta(theta: Tensor, mdp: LinearQMDP, K: int, runs: int) -> Tensor:
    checks.check_floating("theta", theta)
    shape = (runs, K, mdp.H, mdp.d)
    if theta.shape != shape:
        raise ValueError(f"theta must be {list(shape)}, got {list(theta.shape)}")
    outside = theta[~((theta >= 0) & (theta <= 1))]
    if outside.numel():
        raise ValueError(f"theta must be in [0, 1], got {float(outside[0])}")
    return theta.double()
