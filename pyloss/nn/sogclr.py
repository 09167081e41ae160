"""Modules of the global contrastive losses: they hold a moving average for each sample."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import sogclr as F
from pyloss.nn._module import AveragesModule


class SogCLRLoss(AveragesModule):
    r"""SogCLR: a contrastive loss that needs no large batches, as each sample keeps a moving
    average of its normaliser.

    .. math:: F = \frac{1}{N} \sum_i \sum_a T \log \mathbb{E}_b\, e^{(s_{ab} - s_{a p(a)}) / T}

    a runs over the two views of sample i, b over the views of all other samples of the data set. A
    call is one step of :func:`pyloss.functional.sogclr_loss` and, in training mode, moves the
    averages. Its value is not F but has an estimate of the gradient of F; ``last_value`` is F of
    the last batch.

    Args:
        num_samples: N of the data set; ``index`` lies in [0, N).
        temperature: T > 0; default 0.1, ``bimodal`` 0.01.
        gamma: in (0, 1]: weight of the batch in the averages.
        gamma_schedule: ``"constant"``, or ``"cosine"`` from 1 to ``gamma`` over ``decay_epochs``;
            call :meth:`step_epoch` for it.
        decay_epochs: > 0, with ``"cosine"``.
        bimodal: z1 and z2 are two modalities, such as image and text, with averages of their own.
        center_positive, normalize, reduction: as for :func:`pyloss.functional.sogclr_loss`.
        group, ring: as there. All ranks hold the same averages after each step.

    Shape:
        - z1, z2: ``(B, D)``
        - index: ``(B,)``, integer, of the samples in the data set; one that is there several times
          gets the mean of its u.
        - output: scalar, or ``(B,)`` with ``reduction="none"``

    Attributes:
        logu: log u of each sample, ``(N,)``, ``bimodal`` ``(2, N)``; -inf before the first visit. A
            buffer, float32 whatever half type the module is cast to.
        epoch: as set by :meth:`step_epoch`, a buffer.
        last_value: F of the last batch, 0-d, without a gradient; of all ranks' with ``group``.

    Raises:
        As :func:`pyloss.functional.sogclr_loss`; IndexError: an index out of range (CPU). A batch
        with NaN gives NaN, and leaves the averages of the samples that it concerns as they were.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SogCLRLoss(1000, temperature=0.2)
        >>> z1, z2 = torch.randn(2, 32, 16, requires_grad=True)
        >>> criterion(z1, z2, index=torch.arange(32)).backward()
        >>> criterion.logu.isfinite().sum()
        tensor(32)

    Reference:
        Yuan et al. arXiv 2202.12387.
    """

    logu: Tensor
    epoch: Tensor
    last_value: Tensor | None
    rho = 0.0  # an option of iSogCLR

    def __init__(
        self,
        num_samples: int,
        temperature: float | None = None,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        decay_epochs: int | None = None,
        bimodal: bool = False,
        *,
        center_positive: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        group: Any = None,
        ring: bool = False,
    ) -> None:
        self._begin(
            num_samples, temperature, gamma, gamma_schedule, decay_epochs, bimodal,
            center_positive=center_positive, normalize=normalize, reduction=reduction, group=group,
            ring=ring,
        )  # fmt: skip

    def _begin(
        self, num_samples, temperature, gamma, gamma_schedule, decay_epochs, bimodal, **options
    ) -> None:
        num_samples = checks.checked_integer("num_samples", num_samples)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        bimodal = checks.checked_flag("bimodal", bimodal)
        if temperature is None:
            temperature = 0.01 if bimodal else 0.1
        checks.check_number("temperature", temperature)
        F.check_options(
            temperature=temperature, gamma=gamma, bimodal=bimodal,
            **{name: value for name, value in options.items() if name in _SHARED},
        )  # fmt: skip
        checks.check_one_of("gamma_schedule", gamma_schedule, ("constant", "cosine"))
        if decay_epochs is not None:
            checks.check_range("decay_epochs", decay_epochs, 0, open_low=True)
        if (decay_epochs is None) != (gamma_schedule == "constant"):
            raise ValueError(
                "decay_epochs is for gamma_schedule='cosine', which needs it, got "
                f"{decay_epochs} and {gamma_schedule!r}"
            )
        super().__init__(
            num_samples=num_samples, temperature=temperature, gamma=gamma,
            gamma_schedule=gamma_schedule, decay_epochs=decay_epochs, bimodal=bimodal, **options,
        )  # fmt: skip
        shape = (2, num_samples) if bimodal else (num_samples,)
        self.register_buffer("logu", torch.full(shape, -math.inf))
        self.register_buffer("epoch", torch.zeros(()))
        self.last_value = None

    def step_epoch(self, epoch: float | None = None) -> None:
        """Says which epoch begins, from 0 on; without a number: the next one."""
        if epoch is None:
            self.epoch += 1
            return
        checks.check_range("epoch", epoch, 0)
        self.epoch.fill_(epoch)

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
        checks.check_tensor("z1", z1)
        index = F.checked_index(index, len(z1) if z1.dim() else 0, self.num_samples, self.logu)
        log_u = self.logu.index_select(-1, index)
        loss, found = F.sogclr_loss(
            z1, z2, log_u.to(z1.device),
            temperature=self._temperatures(index, z1.device), gamma=self._gamma(z1.device),
            bimodal=self.bimodal,
            **{name: getattr(self, name) for name in _SHARED},
        )  # fmt: skip
        self.last_value = found.value
        if self.training:
            with torch.no_grad():
                moved = F.over_all_samples(
                    index.to(z1.device), found.log_u, found.temperature_grad, self.group
                )
                self._store(*(t.to(self.logu.device) for t in moved))
        return loss

    def _temperatures(self, index: Tensor, device: torch.device) -> float | Tensor:
        return self.temperature

    def _gamma(self, device: torch.device) -> float | Tensor:
        """At this epoch. Where it changes, from a buffer: a number would be a graph for each."""
        if self.gamma_schedule == "constant":
            return self.gamma
        done = (self.epoch / self.decay_epochs).clamp(max=1).to(device)
        return self.gamma + (1 - self.gamma) / 2 * (1 + torch.cos(math.pi * done))

    def _store(self, index: Tensor, log_u: Tensor, grad: Tensor) -> None:
        self._put(self.logu, index, log_u)

    @staticmethod
    def _put(state: Tensor, index: Tensor, values: Tensor) -> None:
        """A NaN would stay in an average for ever."""
        before = state.index_select(-1, index)
        state[..., index] = torch.where(values.isfinite(), values.to(state.dtype), before)


_SHARED = ("rho", "center_positive", "normalize", "reduction", "group", "ring")


class ISogCLRLoss(SogCLRLoss):
    r"""iSogCLR: SogCLR with a temperature for each sample, learned with the loss.

    .. math:: F = \frac{1}{N} \sum_i \min_{T_i \in [T_{\min}, T_{\max}]} \sum_a
              T_i \log \mathbb{E}_b\, e^{(s_{ab} - s_{a p(a)}) / T_i} + T_i \rho

    the loss under the worst distribution of negatives within a KL divergence of rho from uniform.
    Samples with many similar ones, of frequent classes, get large temperatures, rare ones small. A
    call in training mode moves, with g the gradient of a sample's temperature, from the averages u,

    .. math:: v_i \leftarrow (1 - \beta) v_i + \beta\, \text{clip}(g_i, \pm c), \qquad
              T_i \leftarrow \text{clip}(T_i - \eta v_i, T_{\min}, T_{\max})

    Args:
        num_samples: as for :class:`SogCLRLoss`.
        temperature: at the beginning; default 0.1, ``bimodal`` 0.01.
        tau_min, tau_max: bounds; default 0.05 and 0.7, ``bimodal`` 0.005 and 0.05.
        rho: >= 0; default 0.3, ``bimodal`` 6.0. Above log N nothing but ``tau_min`` is a solution,
            and there is a warning.
        eta: > 0, the step of the temperatures.
        beta: in (0, 1], the weight of a gradient in v.
        grad_clip: c > 0, or None.
        gamma, gamma_schedule, decay_epochs, bimodal: as for :class:`SogCLRLoss`.
        center_positive, normalize, reduction, group, ring: as there.

    Shape:
        As :class:`SogCLRLoss`.

    Attributes:
        logu, epoch, last_value: as there.
        tau: the temperatures, ``(N,)``, ``bimodal`` ``(2, N)``; a buffer.
        v: the averages of their gradients, likewise.

    Raises:
        As :class:`SogCLRLoss`.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.ISogCLRLoss(1000)
        >>> z1, z2 = torch.randn(2, 32, 16, requires_grad=True)
        >>> criterion(z1, z2, index=torch.arange(32)).backward()
        >>> criterion.temperature_of(torch.tensor([0, 999])).shape
        torch.Size([2])

    Reference:
        Qiu et al. Not All Semantics are Created Equal. arXiv 2305.11965.
    """

    tau: Tensor
    v: Tensor

    def __init__(
        self,
        num_samples: int,
        temperature: float | None = None,
        tau_min: float | None = None,
        tau_max: float | None = None,
        rho: float | None = None,
        eta: float = 0.01,
        beta: float = 0.9,
        grad_clip: float | None = 3.0,
        gamma: float = 0.9,
        gamma_schedule: str = "constant",
        decay_epochs: int | None = None,
        bimodal: bool = False,
        *,
        center_positive: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        group: Any = None,
        ring: bool = False,
    ) -> None:
        defaults = (0.005, 0.05, 6.0) if bimodal else (0.05, 0.7, 0.3)
        given = (tau_min, tau_max, rho)
        tau_min, tau_max, rho = (d if x is None else x for d, x in zip(defaults, given))
        checks.check_range("tau_min", tau_min, 0.0, open_low=True)
        checks.check_range("tau_max", tau_max, tau_min)
        checks.check_range("eta", eta, 0.0, open_low=True)
        checks.check_range("beta", beta, 0.0, open_low=True)
        if not beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta}")
        if grad_clip is not None:
            checks.check_range("grad_clip", grad_clip, 0.0, open_low=True)
        self._begin(
            num_samples, temperature, gamma, gamma_schedule, decay_epochs, bimodal,
            tau_min=tau_min, tau_max=tau_max, rho=rho, eta=eta, beta=beta, grad_clip=grad_clip,
            center_positive=center_positive, normalize=normalize, reduction=reduction, group=group,
            ring=ring,
        )  # fmt: skip
        if not tau_min <= self.temperature <= tau_max:
            raise ValueError(
                f"temperature must be in [tau_min, tau_max] = [{tau_min}, {tau_max}], got "
                f"{self.temperature}"
            )
        if rho > math.log(num_samples):
            warnings.warn(
                f"rho = {rho} is above log(num_samples) = {math.log(num_samples):.3g}, which no KL "
                "divergence reaches: every temperature will go to tau_min",
                UserWarning,
                stacklevel=2,
            )
        self.register_buffer("tau", torch.full_like(self.logu, self.temperature))
        self.register_buffer("v", torch.zeros_like(self.logu))

    def temperature_of(self, index: Tensor) -> Tensor:
        """The temperatures of samples, a copy: of the shape of ``index``; ``bimodal`` with a first
        dimension of 2."""
        checks.check_tensor("index", index)
        flat = F.checked_index(index.reshape(-1), index.numel(), self.num_samples, self.tau)
        return self.tau.index_select(-1, flat).view(self.tau.shape[:-1] + index.shape)

    def _temperatures(self, index: Tensor, device: torch.device) -> Tensor:
        return self.tau.index_select(-1, index).to(device)

    def _store(self, index: Tensor, log_u: Tensor, grad: Tensor) -> None:
        super()._store(index, log_u, grad)
        if self.grad_clip is not None:
            grad = grad.clamp(-self.grad_clip, self.grad_clip)
        v = (1 - self.beta) * self.v.index_select(-1, index) + self.beta * grad
        tau = self.tau.index_select(-1, index) - self.eta * v
        self._put(self.v, index, v)
        self._put(self.tau, index, tau.clamp(self.tau_min, self.tau_max))
