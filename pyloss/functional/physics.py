"""Physics-informed networks: residuals weighted in the order of time, and on moving points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sums import summed
from pyloss.ops._launch import accumulator_dtype

#: Points and networks of a Lagrangian model: (labels, times) -> (values, positions).
FlowModel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def check_causal_options(*, eps, ic_weight, include_ic=True) -> None:
    """Those of causal_residual_loss, also for its module."""
    checks.check_range("eps", eps, 0.0, open_low=True)
    checks.check_range("ic_weight", ic_weight, 0.0)
    checks.checked_flag("include_ic", include_ic)


def causal_weights(
    losses: Tensor, eps: float, ic_loss: Tensor | None = None, *, ic_weight: float = 1.0
) -> Tensor:
    r"""Weights of time slices that open a slice once those before it are solved.

    .. math:: w_i = \exp\Big(-\varepsilon \Big(\sum_{k < i} L_k
              + \lambda_\mathrm{ic} L_\mathrm{ic}\Big)\Big)

    They have no gradient.

    Args:
        losses: L, mean squared residual of each slice in the order of time, ``(*, N)``, >= 0,
            floating.
        eps: how strict the order is, > 0; with eps towards 0 all weights are 1.
        ic_loss: loss of the initial condition, 0-d or ``(*)``; without it the first weight is 1.
        ic_weight: its factor, >= 0.

    Returns:
        The weights, in [0, 1] and never increasing, ``(*, N)``, of the dtype of ``losses``; float32
        for half types under autocast.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no dimension; an initial loss of another shape; a number out of range; a
            negative loss (CPU, outside of compiled code and transforms).
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> pyloss.functional.causal_weights(torch.tensor([0.0, 1.0, 2.0, 3.0]), eps=1.0)
        tensor([1.0000, 1.0000, 0.3679, 0.0498])

    Note:
        The authors' repository claims a patent on causal training and terms that are
        non-commercial: see the page on physics in the documentation.

    Reference:
        Wang, Sankaran, Perdikaris. Respecting causality is all you need for training
        physics-informed neural networks. arXiv 2203.07404.
    """
    check_causal_options(eps=eps, ic_weight=ic_weight)
    losses, ic, dtype = _checked_losses(losses, ic_loss)
    return _causal_weights(losses, ic, eps, ic_weight).to(dtype)


def causal_residual_loss(
    losses: Tensor,
    eps: float,
    ic_loss: Tensor | None = None,
    *,
    ic_weight: float = 100.0,
    include_ic: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Residual loss of a time-dependent problem that is solved in the order of time.

    .. math:: \ell = \frac{1}{N} \sum_i w_i L_i + \lambda_\mathrm{ic} L_\mathrm{ic}

    with the weights w of :func:`pyloss.functional.causal_weights`, which count as constants.

    Args:
        losses: L, mean squared residual of each slice in the order of time, ``(*, N)``, >= 0,
            floating.
        eps: how strict the order is, > 0.
        ic_loss: loss of the initial condition, 0-d or ``(*)``.
        ic_weight: its factor, >= 0, in the loss and in the exponents of the weights.
        include_ic: False: the weights do not wait for the initial condition.

    Returns:
        ``(loss, weights)``: ``(*)`` and ``(*, N)``, of the dtype of ``losses``; float32 for half
        types under autocast. The weights have no gradient. The loss of no slices is NaN.

    Raises:
        As :func:`pyloss.functional.causal_weights`.

    Example:
        >>> import torch, pyloss
        >>> residual = torch.randn(32, 100, requires_grad=True)  # 32 slices of 100 points
        >>> slices = residual.square().mean(1)
        >>> loss, weights = pyloss.functional.causal_residual_loss(slices, eps=0.1)
        >>> loss.backward()

    Note:
        The authors' repository claims a patent on causal training and terms that are
        non-commercial: see the page on physics in the documentation.

    Reference:
        Wang, Sankaran, Perdikaris. arXiv 2203.07404.
    """
    check_causal_options(eps=eps, ic_weight=ic_weight, include_ic=include_ic)
    losses, ic, dtype = _checked_losses(losses, ic_loss)
    weights = _causal_weights(losses, ic if include_ic else None, eps, ic_weight)
    loss = (weights * losses).mean(-1)
    if ic is not None:
        loss = loss + ic_weight * ic
    return loss.to(dtype), weights.to(dtype)


def _checked_losses(losses, ic_loss) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """Both in float32 at least, and the dtype of the result."""
    checks.check_floating("losses", losses)
    checks.check_has_dimension("losses", losses)
    _check_not_negative("losses", losses)
    wide = accumulator_dtype(losses.dtype)
    dtype = checks.result_dtype(losses.dtype, losses)
    if ic_loss is None:
        return losses.to(wide), None, dtype
    checks.check_floating("ic_loss", ic_loss)
    shape = losses.shape[:-1]
    if ic_loss.dim() and ic_loss.shape != shape:
        raise ValueError(
            f"ic_loss must be 0-d or have the shape {list(shape)}, got {list(ic_loss.shape)}"
        )
    checks.check_device("ic_loss", ic_loss, losses, "losses")
    _check_not_negative("ic_loss", ic_loss)
    return losses.to(wide), ic_loss.to(wide), dtype


def _check_not_negative(name: str, x: Tensor) -> None:
    if checks.can_look_at(x) and bool((x < 0).any()):
        raise ValueError(f"{name} must be >= 0, got {x.min().item():g}")


def _causal_weights(losses: Tensor, ic: Tensor | None, eps: float, ic_weight: float) -> Tensor:
    before = losses.detach()
    # Not the whole sum less the own loss: that loses digits, and is NaN at infinity.
    before = torch.cat([torch.zeros_like(before[..., :1]), before[..., :-1]], -1).cumsum(-1)
    if ic is not None:
        before = before + ic_weight * ic.detach().unsqueeze(-1)
    return torch.exp(-eps * before)


def periodic_embedding(t: Tensor, x: Tensor, period: float, modes: int) -> Tensor:
    r"""Inputs for a network that shall be periodic in x: harmonics in the place of x.

    .. math:: \big(t,\ 1,\ \cos k\omega x,\ \sin k\omega x\big)_{k = 1, \dots, M}, \qquad
              \omega = 2 \pi / L

    Args:
        t, x: times and places, of shapes that broadcast, floating.
        period: L > 0.
        modes: M >= 0.

    Returns:
        ``(*, 2 + 2 M)``: t, 1, the cosines, the sines; of the promoted dtype, float32 for half
        types under autocast.

    Raises:
        TypeError: t or x is no floating tensor; an option of the wrong type.
        ValueError: an option out of range.
        RuntimeError: tensors on several devices, or of shapes that do not broadcast.

    Example:
        >>> import torch, pyloss
        >>> t, x = torch.rand(2, 64)
        >>> pyloss.functional.periodic_embedding(t, x, period=2.0, modes=5).shape
        torch.Size([64, 12])

    Reference:
        Dong, Ni. A method for representing periodic functions and enforcing exactly periodic
        boundary conditions with deep neural networks. arXiv 2007.07442.
    """
    checks.check_floating("t", t)
    checks.check_floating("x", x)
    checks.check_device("x", x, t, "t")
    checks.check_range("period", period, 0.0, open_low=True)
    modes = checks.checked_count("modes", modes)
    dtype = torch.promote_types(t.dtype, x.dtype)
    t, x = (v.to(accumulator_dtype(dtype)) for v in torch.broadcast_tensors(t, x))
    k = torch.arange(1, modes + 1, device=x.device, dtype=x.dtype)
    angle = (2 * math.pi / period) * x.unsqueeze(-1) * k
    parts = [t.unsqueeze(-1), torch.ones_like(x).unsqueeze(-1), angle.cos(), angle.sin()]
    return torch.cat(parts, -1).to(checks.result_dtype(dtype, x))


# --------------------------------------------------------------------------------------------------
# Lagrangian


class _Flow(NamedTuple):
    """A model at some points, with derivatives by label and by time."""

    u: Tensor
    x: Tensor
    u_label: Tensor
    u_time: Tensor
    x_label: Tensor
    x_time: Tensor


def lagrangian_residual_loss(
    model: FlowModel,
    labels: Tensor,
    times: Tensor,
    *,
    velocity: float | Tensor | Callable[[Tensor], Tensor],
    nu: float = 0.0,
    source: Callable[[Tensor], Tensor] | None = None,
    u0: Callable[[Tensor], Tensor] | None = None,
    weights: Sequence[float] = (10.0, 1.0, 1000.0),
    crossing_weight: float = 1.0,
    jacobian_correction: bool = True,
    squared: bool = True,
) -> Tensor:
    r"""Residual loss of :math:`u_t + a(u) u_x = \nu u_{xx} + s(u)` along its characteristics.

    A model gives, for a point that starts at X, its value u(X, t) and its position x(X, t). Then

    .. math::
        R_x &= \partial_t x - a(u), \qquad
        R_u = \partial_t u - s(u) - \nu \frac{1}{J} \partial_X \Big(\frac{1}{J} \partial_X u\Big),
        \qquad J = \partial_X x \\
        \ell &= \gamma_x \|R_x\|^2 + \gamma_u \|R_u\|^2
              + \gamma_0 \big(\|x(X, 0) - X\|^2 + \|u(X, 0) - u_0(X)\|^2\big)
              + \gamma_c \|\max(-J, 0)\|^2

    with mean squares as norms. Convection has no derivative in space left, which makes large
    velocities easy. The last term is for characteristics that cross: no solution has them.

    Args:
        model: ``(labels, times) -> (u, x)``, pointwise, of the shape of ``labels``:
            :class:`pyloss.nn.LagrangianPINN` or any function of torch operations.
        labels, times: X and t of the points, of the same shape, floating.
        velocity: a: a number, a tensor that broadcasts, or a function of u (``lambda u: u`` for
            Burgers' equation).
        nu: viscosity, >= 0.
        source: s, a function of u; default 0.
        u0: the initial condition, a function of X; without it ``x(X, 0) = X`` is asked for alone.
        weights: gamma of R_x, of R_u and of the initial condition, >= 0; 0 leaves the last one
            out, for a model that has it by construction.
        crossing_weight: gamma_c >= 0.
        jacobian_correction: False: :math:`\partial_X^2 u` in the place of :math:`u_{xx}`, as in
            the authors' code; the same only where J = 1.
        squared: False: root mean squares.

    Returns:
        The loss, 0-d, of the dtype of what the model gives. Of no points it is NaN.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that differ; weights that are not three; a number out of range.
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> net = lambda: torch.nn.Sequential(
        ...     torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> model = pyloss.nn.LagrangianPINN(net(), net(), velocity_scale=30.0, period=6.2832)
        >>> labels, times = 6.2832 * torch.rand(64), torch.rand(64)
        >>> loss = pyloss.functional.lagrangian_residual_loss(
        ...     model, labels, times, velocity=30.0, u0=torch.sin)
        >>> loss.backward()

    Reference:
        Mojgani, Balajewicz, Hassanzadeh. Lagrangian PINNs: A causality-conforming solution to
        failure modes of physics-informed neural networks. arXiv 2205.02902.
    """
    for name, given in (("model", model), ("source", source), ("u0", u0)):
        if not callable(given) and (name == "model" or given is not None):
            raise TypeError(f"{name} must be callable, got {type(given).__name__}")
    if not (callable(velocity) or isinstance(velocity, Tensor)):
        checks.check_number("velocity", velocity)
    checks.check_range("nu", nu, 0.0)
    of_x, of_u, of_start = _checked_weights(weights)
    checks.check_range("crossing_weight", crossing_weight, 0.0)
    checks.checked_flag("jacobian_correction", jacobian_correction)
    checks.checked_flag("squared", squared)
    checks.check_floating("labels", labels)
    checks.check_floating("times", times)
    checks.check_device("times", times, labels, "labels")
    if times.shape != labels.shape:
        raise ValueError(
            f"times must have the shape of labels, {list(labels.shape)}, got {list(times.shape)}"
        )

    def norm(residual: Tensor) -> Tensor:
        wide = residual.to(accumulator_dtype(residual.dtype))
        mean = summed(wide.square()) / wide.new_full((), wide.numel())
        return mean if squared else _root(mean)

    if nu:
        flow, u_xx = _with_second_derivative(model, labels, times, jacobian_correction)
    else:
        flow, u_xx = _flow(model, labels, times), 0.0
    speed = _at_points("velocity", velocity(flow.u) if callable(velocity) else velocity, labels)
    change = flow.u_time - nu * u_xx
    if source is not None:
        change = change - _at_points("source", source(flow.u), labels)
    loss = of_x * norm(flow.x_time - speed) + of_u * norm(change)
    if of_start:
        u, x = _values(model, labels, torch.zeros_like(times))
        start = norm(x - labels)
        if u0 is not None:
            start = start + norm(u - _at_points("u0", u0(labels), labels))
        loss = loss + of_start * start
    if crossing_weight:
        loss = loss + crossing_weight * norm(torch.relu(-flow.x_label))
    return loss.to(torch.promote_types(flow.u.dtype, flow.x.dtype))


def _checked_weights(weights) -> tuple[float, float, float]:
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"weights must be three numbers, got {type(weights).__name__}")
    if len(weights) != 3:
        raise ValueError(f"weights must be three numbers, got {len(weights)}")
    for i, weight in enumerate(weights):
        checks.check_range(f"weights[{i}]", weight, 0.0)
    return tuple(weights)


def _at_points(name: str, found, labels: Tensor):
    """A number, or a tensor that does not make more of the points, such as (N, 1) of (N,) would."""
    if isinstance(found, Tensor):
        size, points = found.shape, labels.shape
        fits = len(size) <= len(points) and all(
            n in (1, m) for n, m in zip(reversed(size), reversed(points))
        )
        if not fits:
            raise ValueError(
                f"{name} must broadcast to the shape of labels, {list(points)}, got {list(size)}"
            )
    return found


def _root(mean: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    zero = mean == 0
    return torch.where(zero, mean, mean.masked_fill(zero, 1).sqrt())


def _values(model: FlowModel, labels: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    found = model(labels, times)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(f"model must return (u, x), got {type(found).__name__}")
    for name, value in zip(("u", "x"), found):
        checks.check_tensor(f"{name} of model", value)
        if value.shape != labels.shape:
            raise ValueError(
                f"{name} of model must have the shape of labels, {list(labels.shape)}, got "
                f"{list(value.shape)}"
            )
    return tuple(found)


def _flow(model: FlowModel, labels: Tensor, times: Tensor) -> _Flow:
    # torch.func, whose derivatives nest in any order and compile; the points are independent, and
    # so a product with ones has the derivative of each.
    (u, x), pull = torch.func.vjp(lambda a, b: _values(model, a, b), labels, times)
    zero = torch.zeros_like(u)
    u_label, u_time = pull((torch.ones_like(u), zero))
    x_label, x_time = pull((zero, torch.ones_like(x)))
    return _Flow(u, x, u_label, u_time, x_label, x_time)


def _with_second_derivative(
    model: FlowModel, labels: Tensor, times: Tensor, corrected: bool
) -> tuple[_Flow, Tensor]:
    def slope(labels: Tensor):
        flow = _flow(model, labels, times)
        return flow.u_label / flow.x_label if corrected else flow.u_label, tuple(flow)

    at, pull, flow = torch.func.vjp(slope, labels, has_aux=True)
    (second,) = pull(torch.ones_like(at))
    flow = _Flow(*flow)
    return flow, second / flow.x_label if corrected else second
