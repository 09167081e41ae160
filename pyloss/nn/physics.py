"""Modules of physics-informed networks: the annealed causal loss, and networks of moving points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.functional import physics as F
from pyloss.nn._module import OptionsModule


class CausalResidualLoss(OptionsModule):
    r"""Residual loss in the order of time, whose strictness goes up as slices are solved.

    .. math:: \ell = \frac{1}{N} \sum_i w_i L_i + \lambda_\mathrm{ic} L_\mathrm{ic}, \qquad
              w_i = \exp\Big(-\varepsilon \Big(\sum_{k < i} L_k
              + \lambda_\mathrm{ic} L_\mathrm{ic}\Big)\Big)

    A call is :func:`pyloss.functional.causal_residual_loss` with the present ``eps``;
    :meth:`step` goes on to the next one once all weights are above ``threshold``.

    Args:
        eps: one number, or those to go through, each > 0.
        threshold: in (0, 1).
        ic_weight, include_ic: as for the function.

    Shape:
        - losses: ``(*, N)``; ic_loss, optional: 0-d or ``(*)``
        - output: ``(*)``

    Attributes:
        eps: the present one.
        converged: whether the weights were above ``threshold`` with the last one: training may end.
        last_weights: of the last call, ``(*, N)``, without a gradient; None before the first.

    Raises:
        As the function; of the options when it is made.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.CausalResidualLoss(eps=[0.01, 0.1, 1.0])
        >>> slices = torch.rand(32, requires_grad=True)  # mean squared residual of each time slice
        >>> criterion(slices, ic_loss=torch.tensor(0.0)).backward()
        >>> criterion.step(), criterion.eps
        (False, 0.01)

    Note:
        The authors' repository claims a patent on causal training and terms that are
        non-commercial: see the page on physics in the documentation.

    Reference:
        Wang, Sankaran, Perdikaris. arXiv 2203.07404.
    """

    def __init__(
        self,
        eps: float | Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
        threshold: float = 0.99,
        *,
        ic_weight: float = 100.0,
        include_ic: bool = True,
    ) -> None:
        self._schedule = tuple(eps) if isinstance(eps, Sequence) else (eps,)
        if not self._schedule:
            raise ValueError("eps must hold one number at least, got none")
        for value in self._schedule:
            F.check_causal_options(eps=value, ic_weight=ic_weight, include_ic=include_ic)
        checks.check_range("threshold", threshold, 0.0, open_low=True)
        if not threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        super().__init__(threshold=threshold, ic_weight=ic_weight, include_ic=include_ic)
        self._stage = 0
        self.converged = False
        self.last_weights: Tensor | None = None

    @property
    def eps(self) -> float:
        return self._schedule[self._stage]

    def step(self, min_weight: float | Tensor | None = None) -> bool:
        """Goes on to the next eps if the smallest weight is above the threshold.

        Args:
            min_weight: default: that of the last call. Reading it waits for the device, so on a GPU
                call this every hundred steps or so.

        Returns:
            Whether eps has changed.
        """
        if min_weight is None:
            if self.last_weights is None:
                raise RuntimeError("step() needs a call of the loss before it, or min_weight")
            min_weight = self.last_weights.min() if self.last_weights.numel() else 0.0
        if not float(min_weight) > self.threshold:
            return False
        if self._stage + 1 < len(self._schedule):
            self._stage += 1
            return True
        self.converged = True
        return False

    def get_extra_state(self) -> dict[str, Any]:
        return {"stage": self._stage, "converged": self.converged}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if not 0 <= state["stage"] < len(self._schedule):
            raise ValueError(
                f"the state is at eps number {state['stage'] + 1}, and there are "
                f"{len(self._schedule)}"
            )
        self._stage, self.converged = state["stage"], state["converged"]

    def extra_repr(self) -> str:
        eps = self._schedule if len(self._schedule) > 1 else self.eps
        return f"eps={eps!r}, {super().extra_repr()}"

    def forward(self, losses: Tensor, ic_loss: Tensor | None = None) -> Tensor:
        loss, weights = F.causal_residual_loss(
            losses, self.eps, ic_loss, ic_weight=self.ic_weight, include_ic=self.include_ic
        )
        self.last_weights = weights
        return loss


class LagrangianPINN(nn.Module):
    r"""Two networks that follow points: their values u(X, t) and positions x(X, t).

    .. math:: x = X + v\, t\, f_x(X, t), \qquad u = f_u(X, t) \quad\text{or}\quad
              u = u_0(X) + t\, f_u(X, t)

    The positions start at X by construction, and so do the values with ``initial``; without that,
    fast flows are not learned in a reasonable time. Train it with
    :func:`pyloss.functional.lagrangian_residual_loss`.

    Args:
        u_net, x_net: networks of ``(*, 3)`` with ``period``, else ``(*, 2)``, that give ``(*, 1)``.
            Smooth ones: the loss takes their derivatives.
        velocity_scale: v > 0, of the order of the velocities.
        period: of X, > 0: the networks see :math:`\cos \omega X, \sin \omega X, t` with
            :math:`\omega = 2 \pi` / period, else X and t.
        initial: u_0, a function of X: the initial condition by construction.

    Shape:
        - labels, times: of shapes that broadcast to ``(*)``
        - output: ``(u, x)``, each ``(*)``

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; a network that does
            not give one number for each point.

    Example:
        >>> import torch, pyloss
        >>> net = lambda: torch.nn.Sequential(
        ...     torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> model = pyloss.nn.LagrangianPINN(net(), net(), velocity_scale=30.0)
        >>> u, x = model(torch.linspace(0, 1, 5), torch.zeros(5))
        >>> x
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], grad_fn=...)

    Reference:
        Mojgani, Balajewicz, Hassanzadeh. arXiv 2205.02902.
    """

    def __init__(
        self,
        u_net: nn.Module,
        x_net: nn.Module,
        velocity_scale: float = 1.0,
        period: float | None = None,
        *,
        initial: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, given in (("u_net", u_net), ("x_net", x_net)):
            if not isinstance(given, nn.Module):
                raise TypeError(f"{name} must be a Module, got {type(given).__name__}")
        checks.check_range("velocity_scale", velocity_scale, 0.0, open_low=True)
        if period is not None:
            checks.check_range("period", period, 0.0, open_low=True)
        if initial is not None and not callable(initial):
            raise TypeError(f"initial must be callable, got {type(initial).__name__}")
        self.u_net, self.x_net = u_net, x_net
        self.velocity_scale, self.period, self.initial = velocity_scale, period, initial

    def extra_repr(self) -> str:
        return f"velocity_scale={self.velocity_scale!r}, period={self.period!r}"

    def forward(self, labels: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        labels, times = torch.broadcast_tensors(labels, times)
        if self.period is None:
            where = [labels]
        else:
            angle = (2 * math.pi / self.period) * labels
            where = [angle.cos(), angle.sin()]
        inputs = torch.stack([*where, times], -1)
        u = _one_number("u_net", self.u_net(inputs), labels)
        x = labels + self.velocity_scale * times * _one_number("x_net", self.x_net(inputs), labels)
        if self.initial is not None:
            u = self.initial(labels) + times * u
        return u, x


def _one_number(name: str, found: Tensor, labels: Tensor) -> Tensor:
    if found.shape != (*labels.shape, 1):
        raise ValueError(
            f"{name} must give the shape {[*labels.shape, 1]}, one number a point, got "
            f"{list(found.shape)}"
        )
    return found.squeeze(-1)
