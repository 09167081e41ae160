"""The Lyapunov function of Lion-K: a number that training brings down, constraint and all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyloss.functional._checks import check_range, is_dtensor, widened, widest
from pyloss.optim import _kappas
from pyloss.optim.lion_k import LionK, check_betas


class LionKLyapunov(NamedTuple):
    """The result of :func:`lion_k_lyapunov`, 0-d float64 tensors.

    Example:
        >>> import pyloss, torch
        >>> x, m = torch.zeros(3), torch.ones(3)
        >>> found = pyloss.optim.lion_k_lyapunov(
        ...     2.0, [x], [m], betas=(0.9, 0.99), lr=1e-3, weight_decay=0.1
        ... )
        >>> found.composite, found.violation
        (tensor(2., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """

    H: Tensor
    composite: Tensor
    fenchel_gap: Tensor
    violation: Tensor
    rate: Tensor | None


def lion_k_lyapunov(
    f_value: float | Tensor,
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    *,
    kappa: str = "l1",
    kappa_args: Mapping[str, float] | None = None,
    group: str = "tensor",
    betas: tuple[float, float],
    lr: float,
    weight_decay: float,
) -> LionKLyapunov:
    r"""The Lyapunov function of Lion-K at parameters x and momenta m.

    .. math::

        H = f(x) + \frac{1}{\lambda} K^*(\lambda x)
        + \frac{\beta_1\,\eta}{(1 - \beta_2)(1 + \varepsilon\lambda)}
        \left( K^*(\lambda x) + K(m) + \lambda\, m \cdot x \right), \qquad
        \varepsilon = \frac{(1 - \beta_1)\,\eta}{1 - \beta_2}

    Along the differential equation whose Euler step of length eta is that of :class:`LionK`, H
    never rises inside of the constraint; outside of it the distance shrinks by 1 - eta lambda a
    step. The numbers are those of the paper divided by its gamma (and its m has the other sign).

    Args:
        f_value: the loss at x.
        params, momenta: x, and ``exp_avg`` of each.
        grads: of the loss, for ``rate``.
        kappa, kappa_args, group, betas, lr, weight_decay: as of :class:`LionK`; weight_decay > 0.

    Returns:
        ``H``; ``composite``, the objective f + K*(lambda x) / lambda alone; ``fenchel_gap``, the
        last bracket, which is never negative inside; ``violation``, how far lambda x is outside of
        the domain of K*, 0 inside (K* counts as if x were inside); ``rate``, dH/dt inside of the
        constraint, None without ``grads``.

    Raises:
        TypeError: a tensor in the place of a sequence of them.
        ValueError: ``weight_decay`` is 0; kappa is a function; shapes that differ; a ``f_value`` of
            several numbers; betas out of range.

    Example:
        >>> import pyloss, torch
        >>> x, m = torch.zeros(3), torch.ones(3)
        >>> pyloss.optim.lion_k_lyapunov(
        ...     0.0, [x], [m], betas=(0.9, 0.99), lr=1e-3, weight_decay=0.1
        ... ).fenchel_gap
        tensor(3., dtype=torch.float64)

    Reference:
        Chen, Liu, Liang, Liu, arXiv 2310.05898, theorem 3.1.
    """
    args = _checked(kappa, kappa_args, group, lr, weight_decay)
    check_betas(betas)
    _check_alike(params, momenta=momenta, grads=grads)
    part = _terms(params, momenta, grads, kappa, args, group, betas, lr, weight_decay)
    return _with_loss(f_value, [part])


def _check_alike(params: Sequence[Tensor], **others: Sequence[Tensor] | None) -> None:
    for name, tensors in {"params": params, **others}.items():
        if tensors is None:
            continue
        if isinstance(tensors, Tensor):
            raise TypeError(f"{name} must be a sequence of tensors, got Tensor")
        shapes = [list(t.shape) for t in tensors]
        if shapes != [list(p.shape) for p in params]:
            raise ValueError(f"{name} must have the shapes of params, got {shapes}")


def _checked(kappa, kappa_args, group, lr, weight_decay) -> Mapping[str, float]:
    if not isinstance(kappa, str):
        raise ValueError("a kappa that is a function has no K to evaluate")
    args = _kappas.checked(kappa, kappa_args, group)
    check_range("lr", lr, 0, open_low=True)
    check_range("weight_decay", weight_decay, 0)
    if weight_decay == 0:
        raise ValueError("weight_decay must be > 0: without it there is no constraint, and no H")
    return args


class _Terms(NamedTuple):
    """What one group of parameters adds."""

    conjugate: Tensor  # over lambda
    gap: Tensor
    weight: float
    violation: Tensor
    rate: Tensor | None


def _whole(t: Tensor) -> Tensor:
    t = t.detach()
    t = t.full_tensor() if is_dtensor(t) else t
    return widened(torch.view_as_real(t) if t.is_complex() else t)


def _terms(params, momenta, grads, kappa, args, group, betas, lr, weight_decay) -> _Terms:
    k = _kappas.KAPPAS[kappa]
    x, m = [_whole(t) for t in params], [_whole(t) for t in momenta]
    rows_y = _kappas.rows([weight_decay * t for t in x], group)
    rows_m = _kappas.rows(m, group)
    zero = x[0].new_zeros(()) if x else torch.zeros((), dtype=torch.float64)
    conjugate = sum((k.conjugate(y, args) for y in rows_y), zero)
    value = sum((k.value(row, args) for row in rows_m), zero)
    inner = sum(((y * row).sum() for y, row in zip(rows_y, rows_m)), zero)
    outside = [k.violation(y, args).amax() for y in rows_y if y.numel()]
    # The equation's constants: beta1 = 1 - eps gamma, beta2 = 1 - lr gamma.
    gamma = (1 - betas[1]) / lr
    eps = (1 - betas[0]) / gamma
    weight = betas[0] / (gamma * (1 + eps * weight_decay))
    rate = None
    if grads is not None:
        rows_g = _kappas.rows([_whole(t) for t in grads], group)
        rate = zero
        for y, row, g in zip(rows_y, rows_m, rows_g):
            # In the paper's sign: -row is m, and dK is odd.
            c = betas[0] * row + (1 - betas[0]) * g
            x_dot = -(k.gradient(c, args) + y)
            m_dot = gamma * (g - row)
            slope = k.conjugate_slope(y, args)
            at_x = g + slope + weight * weight_decay * (slope + row)
            rate = (
                rate
                + (at_x * x_dot).sum()
                + weight * ((k.gradient(row.clone(), args) + y) * m_dot).sum()
            )
    violation = torch.stack(outside).amax() if outside else zero
    return _Terms(conjugate / weight_decay, conjugate + value + inner, weight, violation, rate)


def _with_loss(f_value: float | Tensor, parts: Sequence[_Terms]) -> LionKLyapunov:
    device = parts[0].gap.device
    if not isinstance(f_value, Tensor):  # filled there: a copy would wait for a GPU
        f_value = torch.full((), f_value, dtype=widest(device), device=device)
    f = f_value.detach().to(device, widest(device))
    if f.numel() != 1:
        raise ValueError(f"f_value must hold one number, got shape {list(f.shape)}")
    f = f.reshape(())
    composite = f + sum(p.conjugate.to(device) for p in parts)
    gap = sum(p.gap.to(device) for p in parts)
    rates = [p.rate for p in parts]
    return LionKLyapunov(
        H=composite + sum(p.weight * p.gap.to(device) for p in parts),
        composite=composite,
        fenchel_gap=gap,
        violation=torch.stack([p.violation.to(device) for p in parts]).amax(),
        rate=None if None in rates else sum(r.to(device) for r in rates),
    )


class LyapunovMonitor:
    """Records the Lyapunov function of a :class:`LionK` while it trains.

    Each group adds the terms of its own options. Nothing waits for a device; the records are
    tensors on it. ``pyloss.visualize.draw_lyapunov(monitor.records)`` draws them.

    Args:
        optimizer: every group needs weight decay and a named kappa.

    Attributes:
        records: a list of :class:`LionKLyapunov`.

    Raises:
        TypeError: not a LionK.
        ValueError: a group without weight decay, or whose kappa is a function.

    Example:
        >>> import pyloss, torch
        >>> x = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = pyloss.optim.Lion([x], lr=0.01, weight_decay=2.0)
        >>> monitor = pyloss.optim.LyapunovMonitor(optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss = (x - 3).square().sum()
        ...     loss.backward()
        ...     _ = monitor.record(loss)  # before the step: the loss is that of these parameters
        ...     _ = optimizer.step()
        >>> bool(monitor.records[-1].H < monitor.records[0].H)
        True
    """

    def __init__(self, optimizer: LionK) -> None:
        if not isinstance(optimizer, LionK):
            raise TypeError(f"optimizer must be a LionK, got {type(optimizer).__name__}")
        for group in optimizer.param_groups:
            _checked(*(group[name] for name in ("kappa", "kappa_args", "group")),
                     float(group["lr"]), group["weight_decay"])  # fmt: skip
            if group["maximize"]:
                raise ValueError("maximize: minimise the negative loss, whose Lyapunov falls")
        self.optimizer = optimizer
        self.records: list[LionKLyapunov] = []

    @torch.no_grad()
    def record(self, f_value: float | Tensor) -> LionKLyapunov:
        """Of the parameters and momenta as they are; ``f_value`` is the loss there.

        A parameter that has had no step yet counts with a momentum of 0. ``rate`` is there where
        all parameters have a gradient.
        """
        parts = [self._group(group) for group in self.optimizer.param_groups if group["params"]]
        if not parts:
            raise ValueError("the optimizer has no parameters")
        self.records.append(_with_loss(f_value, parts))
        return self.records[-1]

    def _group(self, group: Mapping[str, Any]) -> _Terms:
        params = group["params"]
        states = [self.optimizer.state.get(p, {}) for p in params]
        momenta = [s.get("exp_avg", torch.zeros_like(p)) for s, p in zip(states, params)]
        grads = [p.grad for p in params]
        return _terms(
            params,
            momenta,
            None if any(g is None for g in grads) else grads,
            *(group[name] for name in ("kappa", "kappa_args", "group", "betas")),
            float(group["lr"]),
            group["weight_decay"],
        )
