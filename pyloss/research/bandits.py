"""Contextual bandits by online regression with a network: NeuSquareCB and NeuFastCB (Deb, Ban, Zuo,
He, Banerjee, arXiv 2312.07145)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.functional import _checks as checks

__all__ = ["NeuralBandit", "inverse_gap_weighting"]

KINDS = ("square", "fast")

Rate = float | Callable[[int], float]


def inverse_gap_weighting(pred: Tensor, gamma: float | Tensor, kind: str = "square") -> Tensor:
    r"""How probable each arm is to be pulled: the less, the more its predicted loss exceeds the
    least one.

    .. math::
        p_a &= \frac{1}{K + \gamma (\hat y_a - \hat y_b)} & &\text{square} \\
        p_a &= \frac{\hat y_b}{K \hat y_b + \gamma (\hat y_a - \hat y_b)} & &\text{fast} \\
        p_b &= 1 - \sum_{a \ne b} p_a, \qquad b = \arg\min_a \hat y_a

    ``fast`` explores less where the least loss is small, which makes its regret depend on the loss
    of the best policy. A least prediction of 0 is pulled always.

    Args:
        pred: predicted losses, ``(*, K)``, floating, K > 0; of ``fast`` >= 0. Of equal ones the
            first is b.
        gamma: >= 0, or inf: b alone, but of ``square`` shared with what equals it; 0 is uniform. A
            tensor broadcasts to ``(*)``.
        kind: ``"square"`` or ``"fast"``.

    Returns:
        Probabilities, as pred; computed in float32 of half types. NaN in a row makes NaN of it.

    Raises:
        TypeError: pred that is no floating tensor, a gamma of the wrong type. ValueError: gamma or
            kind out of range, pred without arms or (on the CPU) negative for ``fast``.

    Example:
        >>> import torch
        >>> from pyloss.research.bandits import inverse_gap_weighting
        >>> inverse_gap_weighting(torch.tensor([0.1, 0.3, 0.5]), gamma=10.0)
        tensor([0.6571, 0.2000, 0.1429])
        >>> inverse_gap_weighting(torch.tensor([0.1, 0.3, 0.5]), gamma=10.0, kind="fast")
        tensor([0.9333, 0.0435, 0.0233])

    Reference:
        Deb, Ban, Zuo, He, Banerjee. Contextual Bandits with Online Neural Regression.
        arXiv 2312.07145.
    """
    checks.check_one_of("kind", kind, KINDS)
    checks.check_floating("pred", pred)
    checks.check_has_dimension("pred", pred)
    checks.check_along("pred", pred, -1)
    _check_gamma(gamma)
    if kind == "fast" and checks.can_look_at(pred) and bool((pred < 0).any()):
        raise ValueError(f"pred must be >= 0 for kind='fast', got {float(pred[pred < 0][0])}")
    y = pred.to(torch.promote_types(pred.dtype, torch.float32))
    if isinstance(gamma, Tensor):
        gamma = gamma.unsqueeze(-1)
    least, at = y.min(-1, keepdim=True)
    gap = y - least
    weighted = torch.where(gap == 0, gap, gamma * gap)  # inf times 0 is 0 here
    arms = y.shape[-1]
    if kind == "square":
        p = 1 / (arms + weighted)
    else:
        none = least == 0
        p = torch.where(none, torch.zeros_like(y), least) / torch.where(
            none, torch.ones_like(y), arms * least + weighted
        )
    p = p.scatter(-1, at, 0.0)
    p = p.scatter(-1, at, 1 - p.sum(-1, keepdim=True))
    return torch.where(least.isnan(), least, p).to(pred.dtype)


class NeuralBandit(nn.Module):
    r"""Pulls arms by what a network predicts of their losses, and trains it on those it sees.

    The network is perturbed by S fixed vectors of signs :math:`\epsilon_s`,

    .. math::
        \tilde f_s(\theta; x) = f(\theta; x) + \frac{c_p}{m^{1/4}} \langle \theta - \theta_0,
            \epsilon_s \rangle, \qquad
        \hat y = \frac1S \sum_s \sigma(\tilde f_s)

    which gives the loss of regression a little curvature and hardly changes the predictions; m is
    the width. With ``"square"`` :math:`\sigma` is the identity and the loss
    :math:`\frac1S \sum_s (y - \tilde f_s)^2 / 2`: NeuSquareCB. With ``"fast"`` it is the sigmoid,
    the loss :math:`\frac1S \sum_s \mathrm{KL}(y, \sigma(\tilde f_s))`: NeuFastCB, whose regret is
    small where the best arms lose little. Either takes gradient steps in a ball around
    :math:`\theta_0`.

    Args:
        net: maps features ``(N, D)`` to scores ``(N,)`` or ``(N, 1)``; its parameters are trained.
        kind: ``"square"`` or ``"fast"``.
        gamma: of :func:`inverse_gap_weighting`; or a function of the round t = 1, 2, ..., such as
            ``lambda t: 10 * t**0.5``.
        S: perturbations, >= 0; 0 is the network as it is.
        c_p: >= 0, their size.
        lr: >= 0, of the gradient steps; or a function of the round.
        radius: > 0, of the ball; None: no ball.
        width: m >= 1; default: the inputs of the last layer.
        generator: draws the signs, and the arms in :meth:`act`. Its state is not in the
            ``state_dict``, which holds parameters, :math:`\theta_0`, signs and the round.

    Raises:
        TypeError: an option of the wrong type, a net that is no module. ValueError: an option out
            of range, a net without parameters.

    Example:
        >>> import torch
        >>> from pyloss.research.bandits import NeuralBandit
        >>> layers = torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
        >>> net = torch.nn.Sequential(*layers)
        >>> bandit = NeuralBandit(net, "fast", lambda t: 10 * t**0.5, lr=0.05)
        >>> contexts = torch.randn(5, 8)  # the features of five arms
        >>> arm = bandit.act(contexts)
        >>> loss = bandit.update(contexts, arm, 0.25)

    Reference:
        Deb, Ban, Zuo, He, Banerjee. Contextual Bandits with Online Neural Regression.
        arXiv 2312.07145.
    """

    start: Tensor  #: theta_0, (P,)
    signs: Tensor  #: (S, P)

    def __init__(
        self,
        net: nn.Module,
        kind: str,
        gamma: Rate,
        S: int = 4,
        c_p: float = 0.1,
        lr: Rate = 0.05,
        radius: float | None = None,
        *,
        width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a Module, got {type(net).__name__}")
        params = _trained(net)
        if not params:
            raise ValueError("net must have parameters that require a gradient, got none")
        checks.check_one_of("kind", kind, KINDS)
        if not callable(gamma):
            _check_gamma(gamma)
        S = checks.checked_count("S", S)
        checks.check_range("c_p", c_p, 0.0)
        if not callable(lr):
            checks.check_range("lr", lr, 0.0)
        if radius is not None:
            checks.check_range("radius", radius, 0.0, open_low=True)
        checks.check_generator(generator)
        if width is None:
            width = next((p.shape[1] for p in reversed(params) if p.dim() > 1), 1)
        self.width = checks.checked_count("width", width, 1)
        self.net, self.kind, self.gamma, self.lr = net, kind, gamma, lr
        self.c_p, self.radius, self.generator = c_p, radius, generator
        self.rounds = 0  #: rounds of :meth:`update`
        start = _flat(params)
        drawn_on = start.device if generator is None else generator.device
        signs = torch.randint(2, (S, len(start)), generator=generator, device=drawn_on)
        self.register_buffer("start", start)
        self.register_buffer("signs", (2 * signs - 1).to(start))

    @torch.no_grad()
    def predict(self, contexts: Tensor) -> Tensor:
        """The predicted losses.

        Args:
            contexts: ``(*, K, D)``, floating: the features of K arms.

        Returns:
            ``(*, K)``, of the dtype of the network.
        """
        scores = self._scores(contexts)
        if not len(self.signs):
            return scores.sigmoid() if self.kind == "fast" else scores
        shifted = scores[..., None] + self._offsets()
        return (shifted.sigmoid() if self.kind == "fast" else shifted).mean(-1)

    @torch.no_grad()
    def probabilities(self, contexts: Tensor) -> Tensor:
        """Of the arms in this round: ``(*, K, D)`` to ``(*, K)``."""
        gamma = self.gamma(self.rounds + 1) if callable(self.gamma) else self.gamma
        return inverse_gap_weighting(self.predict(contexts), gamma, self.kind)

    @torch.no_grad()
    def act(self, contexts: Tensor) -> Tensor:
        """Draws an arm.

        Args:
            contexts: ``(*, K, D)``, floating: the features of K arms.

        Returns:
            int64 ``(*)``.

        Raises:
            TypeError: contexts that are no floating tensor. ValueError: a shape that does not fit.
        """
        p = self.probabilities(contexts)
        flat = p.reshape(-1, p.shape[-1])
        return torch.multinomial(flat, 1, generator=self.generator).view(p.shape[:-1])

    def update(self, context: Tensor, arm: int | Tensor, loss: float | Tensor) -> Tensor:
        """A gradient step on what was seen; with several contexts, on their mean.

        Args:
            context: what :meth:`act` had, ``(*, K, D)``.
            arm: what was pulled, ``(*)``.
            loss: what it lost, ``(*)``, in [0, 1].

        Returns:
            The loss of regression before the step, 0-d.

        Raises:
            TypeError: a context that is no floating tensor, arms that are no integers. ValueError:
                shapes that do not fit; a loss outside [0, 1]. IndexError: an arm that is not there.
                (Numbers are looked at on the CPU.)
        """
        _check_contexts(context)
        arm = torch.as_tensor(arm, device=context.device)
        y = torch.as_tensor(loss, device=self.start.device).to(self.start.dtype)
        if arm.shape != context.shape[:-2] or y.shape != arm.shape:
            raise ValueError(
                f"arm and loss must have the shape {list(context.shape[:-2])}, got "
                f"{list(arm.shape)} and {list(y.shape)}"
            )
        if arm.dtype not in checks.INTEGERS:
            raise TypeError(f"arm must hold integers, got {arm.dtype}")
        if checks.can_look_at(y):
            outside = y[(y < 0) | (y > 1)]
            if outside.numel():
                raise ValueError(f"loss must be in [0, 1], got {float(outside[0])}")
            unknown = arm[(arm < 0) | (arm >= context.shape[-2])]
            if unknown.numel():
                raise IndexError(f"arm must be in [0, {context.shape[-2]}), got {int(unknown[0])}")
        index = arm.long()[..., None, None].expand(*arm.shape, 1, context.shape[-1])
        pulled = context.gather(-2, index)
        params = _trained(self.net)
        with torch.enable_grad():
            scores = self._scores(pulled)[..., 0]
        offsets = self._offsets() if len(self.signs) else scores.new_zeros(1)
        shifted = scores.detach()[..., None] + offsets
        y = y[..., None]
        if self.kind == "fast":
            residual = shifted.sigmoid() - y
            entropy = torch.special.entr(y) + torch.special.entr(1 - y)
            value = (
                F.binary_cross_entropy_with_logits(shifted, y.expand_as(shifted)) - entropy.mean()
            )
        else:
            residual = shifted - y
            value = residual.square().mean() / 2
        # The perturbations are linear in the parameters: one gradient of the network serves all.
        weights = residual.mean(-1) / max(1, y.numel())
        with torch.enable_grad():
            grads = torch.autograd.grad((scores * weights).sum(), params)
        self._descend(params, _flat(grads), residual.reshape(-1, shifted.shape[-1]).mean(0))
        self.rounds += 1
        return value

    def extra_repr(self) -> str:
        radius = "" if self.radius is None else f", radius={self.radius}"
        return (
            f"kind={self.kind!r}, S={len(self.signs)}, c_p={self.c_p}, width={self.width}{radius}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]

    @torch.no_grad()
    def _descend(self, params: list[Tensor], grad: Tensor, residual: Tensor) -> None:
        if len(self.signs):
            grad = grad + self._scale() / len(self.signs) * (residual @ self.signs)
        lr = self.lr(self.rounds + 1) if callable(self.lr) else self.lr
        moved = _flat(params) - lr * grad - self.start
        if self.radius is not None:
            moved = moved * (self.radius / torch.linalg.vector_norm(moved)).clamp(max=1)
        moved, at = self.start + moved, 0
        for p in params:
            p.copy_(moved[at : at + p.numel()].view_as(p))
            at += p.numel()

    def _scale(self) -> float:
        return self.c_p / math.sqrt(math.sqrt(self.width))

    def _offsets(self) -> Tensor:
        """What each perturbation adds to every score: ``(S,)``."""
        return self._scale() * (self.signs @ (_flat(_trained(self.net)) - self.start))

    def _scores(self, contexts: Tensor) -> Tensor:
        _check_contexts(contexts)
        flat = contexts.reshape(-1, contexts.shape[-1])
        scores = self.net(flat)
        if scores.shape not in ((len(flat),), (len(flat), 1)):
            raise ValueError(
                f"net must return ({len(flat)},) or ({len(flat)}, 1), got {list(scores.shape)}"
            )
        return scores.reshape(contexts.shape[:-1])


def _trained(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.requires_grad]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _check_gamma(gamma: Any) -> None:
    if isinstance(gamma, Tensor):
        return
    checks.check_number("gamma", gamma)
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")


def _check_contexts(contexts: Tensor) -> None:
    checks.check_floating("contexts", contexts)
    if contexts.dim() < 2 or contexts.shape[-2] == 0:
        raise ValueError(f"contexts must be (*, K, D) with K > 0, got {list(contexts.shape)}")
