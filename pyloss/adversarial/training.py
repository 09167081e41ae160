"""Modules of adversarial training: each call attacks the model and gives a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyloss.adversarial._checks import (
    Search,
    check_batch,
    check_logits,
    check_objective,
    checked_search,
)
from pyloss.adversarial._implicit import implicit_term
from pyloss.adversarial._search import Objective, per_row
from pyloss.adversarial.attacks import searched
from pyloss.functional import _checks as checks
from pyloss.functional.adversarial import (
    accumulator_dtype,
    check_comp_sum,
    smooth_adversarial_comp_sum,
)
from pyloss.functional.classification import fused_cross_entropy
from pyloss.nn._module import OptionsModule
from pyloss.nn.dro import KLDROLoss


class _AttackingLoss(OptionsModule):
    """Has the random numbers of its attacks, which start at torch's seed and go on from call to
    call, and leaves the global ones alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._search()  # finds what is wrong with an option now
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    def _search(self) -> Search:
        return checked_search(self.eps, self.norm, self.steps, self.step, self.clip)


class AdvCompSum(_AttackingLoss):
    r"""Adversarial comp-sum training: attacks the margins, then takes
    :func:`pyloss.functional.smooth_adversarial_comp_sum`.

    .. math:: \ell = \Phi^\tau\!\Big( \sum_{j \ne y} e^{-(h_y(x) - h_j(x)) / \rho} \Big) + \nu
              \max_{\|x' - x\| \le \epsilon}
              \left\| \big( h_y(x') - h_j(x') - h_y(x) + h_j(x) \big)_{j \ne y} \right\|_2

    x' is found by :func:`pyloss.adversarial.pgd_maximise`, which leaves the model as it was; then
    the model is called with x and with x', in the mode it is in, and both get gradients.

    Args:
        tau, rho, nu: as for :func:`pyloss.functional.smooth_adversarial_comp_sum`.
        eps: radius of the ball; 8/255 for images in [0, 1].
        norm, steps, step, clip: as for :func:`pyloss.adversarial.pgd_maximise`.
        reduction: ``"none" | "mean" | "sum"``.

    Shape:
        - model: called with ``(N, ...)``, gives logits ``(N, C)`` or ``(N, C, d1, ...)``
        - x: ``(N, ...)``
        - y: ``(N)`` or ``(N, d1, ...)``
        - output: scalar, or the shape of y with ``reduction="none"``

    Attributes:
        generator: the random numbers of its attacks.

    Raises:
        As :func:`pyloss.adversarial.pgd_maximise`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(8, 3)
        >>> criterion = pyloss.adversarial.AdvCompSum(tau=1.0, eps=0.1)
        >>> x, y = torch.rand(16, 8), torch.randint(3, (16,))
        >>> criterion(model, x, y).backward()

    Reference:
        Mao, Mohri, Zhong. arXiv 2304.07288.
    """

    def __init__(
        self,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        *,
        eps: float = 8 / 255,
        norm: str = "linf",
        steps: int = 10,
        step: float | None = None,
        clip: tuple[float, float] | None = None,
        reduction: str = "mean",
    ) -> None:
        check_comp_sum(tau, rho, nu)
        checks.check_reduction(reduction)
        super().__init__(
            tau=tau, rho=rho, nu=nu, eps=eps, norm=norm, steps=steps, step=step, clip=clip,
            reduction=reduction,
        )  # fmt: skip

    def forward(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        check_batch(model, x, y)
        moved = searched(model, x, y, "margin_shift", self._search(), "near", self.generator)
        return smooth_adversarial_comp_sum(
            model(x), model(moved), y, self.tau, self.rho, self.nu, reduction=self.reduction
        )


class DoublyRobustATLoss(_AttackingLoss):
    r"""Doubly robust adversarial training: the worst inputs in balls around the given ones, under
    the worst weights of the samples near uniform.

    .. math:: L = r \log \mathbb{E}_i\, e^{\ell(h(x_i'), y_i) / r}, \qquad
              x_i' \approx \arg\max_{\|x' - x_i\| \le \epsilon} \ell(h(x'), y_i)

    Samples weigh softmax(l / r), through :class:`pyloss.nn.KLDROLoss`; a large r is plain
    adversarial training. For the weights with another adversarial loss, give that loss with
    ``reduction="none"`` to :class:`pyloss.nn.KLDROLoss`.

    With ``implicit`` the gradient also has the part that comes through x', by the implicit function
    theorem at the minimum of

    .. math:: -\ell(h(x + \delta), y) - c \sum_j \big[ \log(\epsilon - \delta_j) +
              \log(\epsilon + \delta_j) \big]

    which costs a second backward pass through the model. The attack's end is taken for the minimum.

    Args:
        r: weight of the divergence from uniform weights, > 0.
        eta: weight of the batch in the average of the normaliser, in (0, 1]; 1: none is kept.
        eps: radius of the ball; 8/255 for images in [0, 1].
        norm, steps, step, clip: as for :func:`pyloss.adversarial.pgd_maximise`; the attack starts
            uniformly in the ball.
        loss: l: ``"cross_entropy"``, or a callable of (logits, y) that gives a value of each input.
        implicit: needs ``norm="linf"``.
        barrier: c > 0.
        cg_steps: 0: of the curvature that of the barrier alone, which is right for a network of
            ReLU; else so many steps of conjugate gradients with all of it.
        group: as for :func:`pyloss.functional.kl_dro_loss`.

    Shape:
        - model: called with ``(N, ...)``, gives logits ``(N, C)`` or ``(N, C, d1, ...)``
        - x: ``(N, ...)``
        - y: ``(N)`` or ``(N, d1, ...)``
        - output: scalar

    Attributes:
        dro: the :class:`pyloss.nn.KLDROLoss` of ``r``, ``eta`` and ``group``, with the average.
        generator: the random numbers of its attacks.

    Raises:
        As :func:`pyloss.adversarial.pgd_maximise`; what needs no tensor, when it is made.

    Example:
        >>> import torch, pyloss
        >>> model = torch.nn.Linear(8, 3)
        >>> criterion = pyloss.adversarial.DoublyRobustATLoss(r=0.5, eps=0.1, implicit=True)
        >>> x, y = torch.rand(16, 8), torch.randint(3, (16,))
        >>> criterion(model, x, y).backward()

    Reference:
        Sow et al. Doubly Robust Instance-Reweighted Adversarial Training. arXiv 2308.00311.
    """

    def __init__(
        self,
        r: float = 1.0,
        eta: float = 0.9,
        *,
        eps: float = 8 / 255,
        norm: str = "linf",
        steps: int = 10,
        step: float | None = None,
        clip: tuple[float, float] | None = None,
        loss: str | Objective = "cross_entropy",
        implicit: bool = False,
        barrier: float = 1.0,
        cg_steps: int = 0,
        group: Any = None,
    ) -> None:
        check_objective("loss", loss, ("cross_entropy",))
        checks.checked_flag("implicit", implicit)
        checks.check_range("barrier", barrier, 0.0, open_low=True)
        checks.check_range("cg_steps", checks.checked_integer("cg_steps", cg_steps), 0)
        if implicit and norm != "linf":
            raise ValueError(f"implicit needs norm='linf', whose barrier it has, got {norm!r}")
        super().__init__(
            eps=eps, norm=norm, steps=steps, step=step, clip=clip, loss=loss, implicit=implicit,
            barrier=barrier, cg_steps=cg_steps,
        )  # fmt: skip
        self.dro = KLDROLoss(r, eta, group=group)

    def forward(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        check_batch(model, x, y)
        moved = searched(model, x, y, self.loss, self._search(), "uniform", self.generator)
        if not (self.implicit and torch.is_grad_enabled()):
            return self.dro(self._losses(model(moved), x, y))
        delta = (moved - x.detach()).requires_grad_()
        losses = self._losses(model(x.detach() + delta), x, y)
        return self.dro(
            losses + implicit_term(losses, losses, delta, self.eps, self.barrier, self.cg_steps)
        )

    def _losses(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        check_logits(z, x)
        if self.loss == "cross_entropy":
            wide = accumulator_dtype(z.dtype)
            return per_row(fused_cross_entropy(z, y, reduction="none", loss_dtype=wide), len(x))
        return per_row(self.loss(z, y), len(x))
