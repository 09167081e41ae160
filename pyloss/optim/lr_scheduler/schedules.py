"""Linear decay, and the schedule that an earlier run's gradient norms ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyloss.functional import _checks as checks
from pyloss.optim.lr_scheduler.refinement import check_options, refine_schedule


class MultipliedLR(LRScheduler):
    """Rates that are a multiplier of the step times those at the beginning.

    Each step multiplies by the ratio of two multipliers, as torch's own schedules do, so that
    others may act on the same groups.
    """

    _resumed = False

    def __init__(self, optimizer: Optimizer, last_epoch: int) -> None:
        last_epoch = checks.checked_integer("last_epoch", last_epoch)
        # A schedule that is made in the middle finds the rates that belong there.
        self._resumed = last_epoch >= 0
        super().__init__(optimizer, last_epoch)
        self._resumed = False

    def multiplier(self, step: int) -> float:
        """Of the rates after `step` calls of step()."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the present step from those of the one before."""
        step, groups = self.last_epoch, self.optimizer.param_groups
        now = self.multiplier(step)
        if step == 0:
            return [group["lr"] * now for group in groups]
        before = now if self._resumed else self.multiplier(step - 1)
        if before == now:
            return [_copy(group["lr"]) for group in groups]
        if before == 0:  # no ratio leads away from 0
            return [group.get("initial_lr", group["lr"]) * now for group in groups]
        return [group["lr"] * (now / before) for group in groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        now = self.multiplier(self.last_epoch)
        return [base * now for base in self.base_lrs]


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _checked_steps(total_steps) -> int:
    total_steps = checks.checked_integer("total_steps", total_steps)
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    return total_steps


class LinearDecay(MultipliedLR):
    r"""Learning rates that fall on a line to ``final`` times themselves, after a linear warm-up.

    .. math::
        \eta_t = \eta \cdot \begin{cases}
        (t + 1) / (W + 1) & t < W \\
        1 - (1 - f) (t - W) / (T - W) & W \le t \le T
        \end{cases}

    t counts the calls of ``step()``; from T on the rates stay at :math:`f \eta`. The decay to 0 is
    what theory says of the last iterate when nothing is known of the gradients.

    Args:
        optimizer: whose groups' rates are changed; each keeps its own :math:`\eta`.
        total_steps: T, of the optimizer.
        warmup_steps: W < T. No rate of the warm-up is 0, so that no step is wasted.
        final: f in [0, 1].
        last_epoch: of a run that is resumed, as for torch's schedules; -1 begins.

    Raises:
        TypeError: a number of the wrong type; no optimizer.
        ValueError: an option out of range.

    Example:
        >>> import torch
        >>> from pyloss.optim.lr_scheduler import LinearDecay
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
        >>> schedule = LinearDecay(optimizer, total_steps=4, warmup_steps=1)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 3) for rate in rates]
        [0.25, 0.5, 0.333, 0.167, 0.0]

    Reference:
        Defazio et al. arXiv 2310.07831.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.total_steps = _checked_steps(total_steps)
        self.warmup_steps = checks.checked_integer("warmup_steps", warmup_steps)
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps must be in [0, total_steps), total_steps {self.total_steps}, got "
                f"{self.warmup_steps}"
            )
        checks.check_range("final", final, 0.0)
        if final > 1:
            raise ValueError(f"final must be in [0, 1], got {final}")
        self.final = float(final)
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        """What the rates at the beginning are multiplied by after ``step`` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = max(0, self.total_steps - step) / (self.total_steps - self.warmup_steps)
        return self.final + (1 - self.final) * left


class RefinedSchedule(MultipliedLR):
    r"""Learning rates that follow the gradient norms of an earlier run.

    The multipliers of :func:`refine_schedule`, from the beginning of the run to its end, are read
    at :math:`t / T` by linear interpolation; t counts the calls of ``step()``. Where the norms are
    constant this is :class:`LinearDecay`. The optimizer's rates are the peak: what was the best of
    another schedule is a good first guess. From T on they stay at 0 (with ``mode="optimal"`` at a
    small number).

    Args:
        optimizer: whose groups' rates are changed; each keeps its own peak.
        grad_norms: of the earlier run, such as ``norms`` of :class:`GradNormRecorder`; that may
            have had more steps or fewer.
        total_steps: T, of the run to come.
        norm: ``"l2"`` for SGD, ``"l1"`` for Adam and its like; that of ``grad_norms``.
        smoothing, mode: as for :func:`refine_schedule`.
        last_epoch: of a run that is resumed, as for torch's schedules; -1 begins.

    Attributes:
        multipliers: ``(T + 1,)``, float64, on the CPU; part of the ``state_dict``.

    Raises:
        As :func:`refine_schedule` and :class:`LinearDecay`.

    Example:
        >>> import torch
        >>> from pyloss.optim.lr_scheduler import RefinedSchedule
        >>> optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
        >>> norms = [8.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        >>> schedule = RefinedSchedule(optimizer, norms, total_steps=3, smoothing=0)
        >>> schedule.multipliers
        tensor([0.0205, 1.0000, 0.5000, 0.0000], dtype=torch.float64)

    Reference:
        Defazio et al. arXiv 2310.07831.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        grad_norms: Tensor | Sequence[float],
        total_steps: int,
        *,
        norm: str = "l2",
        smoothing: float = 0.1,
        mode: str = "closed",
        last_epoch: int = -1,
    ) -> None:
        self.total_steps = _checked_steps(total_steps)
        check_options(norm, smoothing, mode)
        table = refine_schedule(grad_norms, norm=norm, smoothing=smoothing, mode=mode)
        self.multipliers = _resampled(table, self.total_steps + 1)
        super().__init__(optimizer, last_epoch)

    def multiplier(self, step: int) -> float:
        """What the peak is multiplied by after ``step`` steps."""
        return self.multipliers[min(step, self.total_steps)].item()


def _resampled(table: Tensor, count: int) -> Tensor:
    """At `count` points from its beginning to its end, by linear interpolation."""
    place = torch.arange(count, dtype=table.dtype) * ((len(table) - 1) / (count - 1))
    before = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[before], table[before + 1], place - before)
