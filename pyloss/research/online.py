"""Optimistic online mirror descent between chance and adversary (Chen, Zhang, Tu, Zhao, Zhang,
arXiv 2302.04552), the projections that it needs, and regret."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyloss.functional import _checks as checks

__all__ = [
    "OptimisticOMD",
    "dynamic_regret",
    "metric_projection",
    "path_length",
    "project_ball",
    "project_box",
    "project_simplex",
    "regret_exponent",
    "static_regret",
]

GEOMETRIES = ("euclidean", "strongly_convex", "exp_concave")
PROJECTIONS = ("ball", "box", "simplex")
# What each geometry needs, and what it alone takes.
_NEEDS = {"strongly_convex": "mu", "exp_concave": "alpha"}
_FOR = {"L": "euclidean", "delta": "euclidean", "mu": "strongly_convex", "alpha": "exp_concave"}

Projection = Callable[[Tensor], Tensor]


# --------------------------------------------------------------------------------------------------
# Projections


def project_ball(x: Tensor, radius: float = 1.0, center: Tensor | None = None) -> Tensor:
    r"""The nearest point of a ball.

    .. math:: c + (x - c) \min(1, r / \lVert x - c \rVert_2)

    Args:
        x: ``(*, D)``, floating.
        radius: r > 0.
        center: c, ``(D,)`` or of any shape that broadcasts; 0 without it.

    Returns:
        As x.

    Raises:
        TypeError: x or center that is no floating tensor. ValueError: radius out of range, x
            without dimensions.

    Example:
        >>> import torch
        >>> from pyloss.research.online import project_ball
        >>> project_ball(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    _check_points("x", x)
    checks.check_range("radius", radius, 0.0, open_low=True)
    if center is None:
        return x * (radius / torch.linalg.vector_norm(x, dim=-1, keepdim=True)).clamp(max=1)
    checks.check_floating("center", center)
    return center + project_ball(x - center, radius)


def project_box(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The nearest point between two bounds, element by element.

    Args:
        x: any shape, floating.
        low, high: numbers, or tensors that broadcast to x.

    Returns:
        As x.

    Raises:
        TypeError: x that is no floating tensor. ValueError: numbers with low > high.

    Example:
        >>> import torch
        >>> from pyloss.research.online import project_box
        >>> project_box(torch.tensor([-2.0, 0.5]), -1.0, 1.0)
        tensor([-1.0000,  0.5000])
    """
    checks.check_floating("x", x)
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)) and not low <= high:
        raise ValueError(f"low must be <= high, got {low} and {high}")
    return torch.maximum(
        torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device)),
        torch.as_tensor(low, dtype=x.dtype, device=x.device),
    )


def project_simplex(x: Tensor, total: float = 1.0) -> Tensor:
    r"""The nearest point with entries >= 0 that sum to a total.

    .. math:: \max(x - \theta, 0), \qquad \sum_i \max(x_i - \theta, 0) = s

    Args:
        x: ``(*, D)``, floating, D > 0.
        total: s > 0.

    Returns:
        As x.

    Raises:
        TypeError: x that is no floating tensor. ValueError: total out of range, x without entries.

    Example:
        >>> import torch
        >>> from pyloss.research.online import project_simplex
        >>> project_simplex(torch.tensor([0.8, 0.6, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])
    """
    _check_points("x", x)
    checks.check_range("total", total, 0.0, open_low=True)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide - wide.detach().amax(-1, keepdim=True)  # large entries cost no digits of the sum
    ordered = wide.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device)
    level = (ordered.cumsum(-1) - total) / count
    last = (ordered > level).sum(-1, keepdim=True).clamp(min=1) - 1  # NaN is above nothing
    return (wide - level.gather(-1, last)).clamp(min=0).to(x.dtype)


def metric_projection(
    point: Tensor,
    metric: Tensor,
    projection: Projection,
    *,
    smallest: float | None = None,
    steps: int = 1000,
) -> Tensor:
    r"""The nearest point of a convex set in the norm of a matrix.

    .. math:: \arg\min_{x \in X} \; (x - y)^T H (x - y)

    by accelerated projected gradient steps, whose error shrinks by :math:`1 - 1 / \sqrt{\kappa}` in
    each, :math:`\kappa` the condition of H. On the CPU they stop where rounding does; elsewhere all
    of them are taken, since to look would be to wait for the device.

    Args:
        point: y, ``(D,)``, floating.
        metric: H, ``(D, D)``, symmetric and positive definite, of the dtype of y.
        projection: of a vector on X, in the Euclidean norm.
        smallest: > 0, a lower bound of the eigenvalues of H; computed if it is not known.
        steps: at most.

    Returns:
        ``(D,)``.

    Raises:
        TypeError: tensors that are not floating, a projection that cannot be called. ValueError:
            shapes that do not fit, an option out of range.

    Example:
        >>> import torch
        >>> from pyloss.research.online import metric_projection, project_simplex
        >>> metric = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> metric_projection(torch.tensor([1.0, 1.0]), metric, project_simplex)
        tensor([0.8000, 0.2000])
    """
    checks.check_floating("point", point)
    checks.check_floating("metric", metric)
    if point.dim() != 1 or metric.shape != (len(point), len(point)):
        raise ValueError(
            "point and metric must be (D,) and (D, D), got "
            f"{list(point.shape)} and {list(metric.shape)}"
        )
    if not callable(projection):
        raise TypeError(f"projection must be a function, got {type(projection).__name__}")
    checks.checked_count("steps", steps, 1)
    if smallest is None:
        low = torch.linalg.eigvalsh(metric)[0]
    else:
        checks.check_range("smallest", smallest, 0.0, open_low=True)
        low = smallest
    # Two upper bounds of the largest eigenvalue, each within sqrt(D) of it.
    top = torch.minimum(metric.abs().sum(1).max(), torch.linalg.matrix_norm(metric))
    root = (low / top).sqrt()
    momentum = (1 - root) / (1 + root)
    rounding = 4 * torch.finfo(point.dtype).eps
    look = checks.can_look_at(point)
    x = ahead = projection(point)
    for _ in range(steps):
        new = projection(ahead - metric @ (ahead - point) / top)
        if look and not (new - ahead).abs().max() > rounding * new.abs().max():
            return new
        ahead = new + momentum * (new - x)
        x = new
    return x


# --------------------------------------------------------------------------------------------------
# The optimizer


class OptimisticOMD(Optimizer):
    r"""Optimistic online mirror descent: each point is played with the last gradient as a guess of
    the next.

    .. math::

        x_t &= \arg\min_{x \in X} \; \langle g_{t-1}, x \rangle + D_{R_t}(x, \hat x_t) \\
        \hat x_{t+1} &= \arg\min_{x \in X} \; \langle g_t, x \rangle + D_{R_t}(x, \hat x_t)

    Where the gradients change little from round to round the guess is good: the regret grows with
    the variance :math:`\sigma^2_{1:T}` and the drift :math:`\Sigma^2_{1:T}` of the gradients, not
    with their size.

    =================== ============================================ ===========================
    ``geometry``        :math:`R_t(x)`                               regret
    =================== ============================================ ===========================
    ``euclidean``       norm(x)^2 / 2 eta_t, eta_t = D / sqrt(delta  O(sqrt(sigma^2) +
                        + 4 G^2 + sum of norm(g_s - g_{s-1})^2)      sqrt(Sigma^2))
    ``strongly_convex`` the same with eta_t = 2 / (mu t)             O((sigma_max^2 +
                                                                     Sigma_max^2) / mu
                                                                     log(sigma^2 + Sigma^2))
    ``exp_concave``     norm_H(x)^2 / 2, H_t = (1 + b G^2 / 2) I     O(d / alpha log(sigma^2 +
                        + b / 2 sum of g_s g_s^T,                    Sigma^2))
                        b = min(1 / 4GD, alpha) / 2
    =================== ============================================ ===========================

    A parameter group is one point x: its parameters, one after the other, in a set X of diameter D.
    :meth:`step` takes the gradients at the point that was played, and writes the one to play next
    into the parameters. ``exp_concave`` keeps two float64 matrices of d x d, for d to about 1000,
    and projects in the norm of H by :func:`metric_projection`.

    Args:
        params: parameters, named parameters, or groups of them; every option may differ by group.
            Those of one group must share their dtype and device, and begin in X.
        D: > 0, the diameter of X.
        G: > 0, a bound of the norm of the gradients.
        L: >= 0, smoothness of the expected losses, for ``delta``. ``euclidean`` alone.
        delta: >= 0; default 10 D^2 L^2, without L 4 G^2. ``euclidean`` alone.
        geometry: which regulariser.
        mu: > 0, strong convexity of the expected losses; ``strongly_convex`` alone, which needs it.
        alpha: > 0, exp-concavity of the losses; ``exp_concave`` alone, which needs it.
        projection: X. ``"ball"``, the default: radius D / 2 around 0; ``"box"``: a cube around 0
            of diameter D; ``"simplex"``: entries >= 0 with the sum D / sqrt(2), which for
            D = sqrt(2) is that of probabilities; or a function that projects a vector ``(d,)``.

    A parameter without a gradient counts as one whose gradient is 0; a group without any is left
    as it is. NaN in a gradient makes NaN of its group.

    Raises:
        ValueError: an option out of range, that is missing or that the geometry does not take;
            parameters of a group of several dtypes or devices; a projection that changes the shape.
        TypeError: an option of the wrong type; parameters that are not real.
        RuntimeError: sparse gradients.

    Example:
        >>> import torch
        >>> from pyloss.research.online import OptimisticOMD
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = OptimisticOMD([x], D=2.0, G=3.0, L=1.0)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     (x - torch.tensor([3.0, 4.0])).square().sum().div(2).backward()
        ...     _ = optimizer.step()
        >>> x.detach()  # the point of the unit ball that is nearest to (3, 4)
        tensor([0.6000, 0.8000])

    Reference:
        Chen, Zhang, Tu, Zhao, Zhang. Optimistic Online Mirror Descent for Bridging Stochastic and
        Adversarial Online Convex Optimization. arXiv 2302.04552.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        D: float,
        G: float,
        L: float | None = None,
        delta: float | None = None,
        geometry: str = "euclidean",
        mu: float | None = None,
        alpha: float | None = None,
        projection: str | Projection | None = None,
    ) -> None:
        defaults = dict(
            D=D, G=G, L=L, delta=delta, geometry=geometry, mu=mu, alpha=alpha, projection=projection
        )
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimizer; options that the group lacks are those of the constructor."""
        if isinstance(param_group, dict):
            _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        first, *others = self.param_groups[-1]["params"]
        try:
            checks.check_floating("parameters", first)
            for p in others:
                if (p.dtype, p.device) != (first.dtype, first.device):
                    raise ValueError(
                        "parameters of a group must share dtype and device, got "
                        f"{first.dtype} on {first.device} and {p.dtype} on {p.device}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes the gradients of this round, and writes the point of the next one.

        Args:
            closure: computes loss and gradients at the point that is played.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                self._step(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; but what is kept in more digits than the parameters have keeps them."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def _step(self, group: dict[str, Any]) -> None:
        params, exp_concave = group["params"], group["geometry"] == "exp_concave"
        wide = torch.promote_types(params[0].dtype, torch.float64 if exp_concave else torch.float32)
        grad = torch.cat([_dense_gradient(p).reshape(-1) for p in params]).to(wide)
        # What belongs to the whole group is kept with its first parameter.
        state = self.state[params[0]]
        if not state:
            point = torch.cat([p.reshape(-1) for p in params]).to(wide)
            state["step"] = 0
            state["xhat"] = _projected(group, point)
            state["grad"] = torch.zeros_like(grad)
            if exp_concave:
                state["metric"] = torch.eye(len(grad), dtype=wide, device=grad.device)
                state["metric"] *= _smallest(group)
                state["inverse"] = state["metric"] / _smallest(group) ** 2
            elif group["geometry"] == "euclidean":
                state["variation"] = torch.zeros((), dtype=torch.float64, device=grad.device)
        state["xhat"] = _moved(group, state, grad)
        state["step"] += 1
        if exp_concave:
            _add_outer(state, grad, _exp_concave_rate(group) / 2)
        elif group["geometry"] == "euclidean":
            state["variation"] += (grad - state["grad"]).double().square().sum()
        state["grad"] = grad
        played, at = _moved(group, state, grad), 0
        for p in params:
            p.copy_(played[at : at + p.numel()].view_as(p))
            at += p.numel()


def _moved(group: dict[str, Any], state: dict[str, Any], direction: Tensor) -> Tensor:
    """The argmin over X of <direction, x> + D_R(x, xhat)."""
    if group["geometry"] == "exp_concave":
        point = state["xhat"] - state["inverse"] @ direction
        return metric_projection(
            point,
            state["metric"],
            lambda x: _projected(group, x),
            smallest=_smallest(group),
            steps=300,
        )
    if group["geometry"] == "strongly_convex":
        return _projected(
            group, state["xhat"] - 2 / (group["mu"] * (state["step"] + 1)) * direction
        )
    offset = group["delta"]
    if offset is None:
        offset = 4 * group["G"] ** 2 if group["L"] is None else 10 * (group["D"] * group["L"]) ** 2
    rate = group["D"] * (state["variation"] + offset + 4 * group["G"] ** 2).rsqrt()
    return _projected(group, state["xhat"] - rate * direction)


def _projected(group: dict[str, Any], x: Tensor) -> Tensor:
    projection, diameter = group["projection"], group["D"]
    if callable(projection):
        found = projection(x)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"projection must return a vector of the shape {list(x.shape)}, got {got}"
            )
        return found
    if projection == "simplex":
        return project_simplex(x, diameter / math.sqrt(2))
    if projection == "box":
        side = diameter / (2 * math.sqrt(len(x)))
        return x.clamp(-side, side)
    return project_ball(x, diameter / 2)


def _exp_concave_rate(group: dict[str, Any]) -> float:
    return min(1 / (4 * group["G"] * group["D"]), group["alpha"]) / 2


def _smallest(group: dict[str, Any]) -> float:
    """The smallest eigenvalue that the metric of exp-concave losses can have."""
    return 1 + _exp_concave_rate(group) * group["G"] ** 2 / 2


def _add_outer(state: dict[str, Any], grad: Tensor, weight: float) -> None:
    """H + w g g^T, and its inverse by Sherman and Morrison."""
    state["metric"].addr_(grad, grad, alpha=weight)
    turned = state["inverse"] @ grad
    state["inverse"] -= torch.outer(turned, turned) * (weight / (1 + weight * (grad @ turned)))


def _dense_gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    if p.grad.layout != torch.strided:
        raise RuntimeError(f"gradients must be dense, got one of layout {p.grad.layout}")
    return p.grad


def _check_options(options: dict[str, Any]) -> None:
    geometry, projection = options["geometry"], options["projection"]
    checks.check_one_of("geometry", geometry, GEOMETRIES)
    for name in ("D", "G", "mu", "alpha", "L", "delta"):
        value = options[name]
        if value is None and name not in ("D", "G"):
            if _NEEDS.get(geometry) == name:
                raise ValueError(f"geometry={geometry!r} needs {name}")
            continue
        checks.check_range(name, value, 0.0, open_low=name not in ("L", "delta"))
        if _FOR.get(name, geometry) != geometry:
            raise ValueError(f"{name} is for geometry={_FOR[name]!r}, got {geometry!r}")
    if projection is not None and not callable(projection):
        checks.check_one_of("projection", projection, PROJECTIONS)


# --------------------------------------------------------------------------------------------------
# Regret


def static_regret(losses: Tensor, fixed: Tensor) -> Tensor:
    r"""What was lost in excess of the best of some fixed choices.

    .. math:: r_t = \sum_{s \le t} f_s(x_s) - \min_n \sum_{s \le t} f_s(u_n)

    Args:
        losses: of the points that were played, ``(T,)``.
        fixed: of a choice that stays, ``(T,)``, or of several of them, ``(T, N)``; the best is
            taken anew in each round.

    Returns:
        ``(T,)``.

    Raises:
        TypeError: what is no floating tensor. ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from pyloss.research.online import static_regret
        >>> static_regret(torch.tensor([1.0, 1.0]), torch.tensor([[0.0, 1.0], [2.0, 0.5]]))
        tensor([1.0000, 0.5000])
    """
    _check_losses(losses, fixed, "fixed", (1, 2))
    best = fixed.cumsum(0)
    return losses.cumsum(0) - (best if fixed.dim() == 1 else best.amin(1))


def dynamic_regret(losses: Tensor, comparators: Tensor) -> Tensor:
    r"""What was lost in excess of choices that change.

    .. math:: r_t = \sum_{s \le t} f_s(x_s) - f_s(u_s)

    Args:
        losses: of the points that were played, ``(T,)``.
        comparators: of the choices of each round, ``(T,)``; of the minima in each, the worst case.

    Returns:
        ``(T,)``. :func:`path_length` says how far the choices move.

    Raises:
        TypeError: what is no floating tensor. ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from pyloss.research.online import dynamic_regret
        >>> dynamic_regret(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.5]))
        tensor([1.0000, 1.5000])
    """
    _check_losses(losses, comparators, "comparators", (1,))
    return (losses - comparators).cumsum(0)


def path_length(points: Tensor) -> Tensor:
    r"""How far a sequence of points has moved.

    .. math:: P_t = \sum_{1 < s \le t} \lVert u_s - u_{s-1} \rVert_2

    Args:
        points: ``(T, D)``, floating.

    Returns:
        ``(T,)``, 0 first.

    Raises:
        TypeError: what is no floating tensor. ValueError: another shape.

    Example:
        >>> import torch
        >>> from pyloss.research.online import path_length
        >>> path_length(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))
        tensor([0., 5., 5.])
    """
    checks.check_floating("points", points)
    if points.dim() != 2:
        raise ValueError(f"points must be (T, D), got {list(points.shape)}")
    return torch.linalg.vector_norm(points.diff(dim=0, prepend=points[:1]), dim=1).cumsum(0)


def regret_exponent(rounds: Tensor, regret: Tensor) -> Tensor:
    r"""The power of the number of rounds that regret grows with: the least-squares slope of
    :math:`\log r` over :math:`\log T`.

    Args:
        rounds: numbers of rounds T > 0, ``(N,)`` with N >= 2.
        regret: r > 0 after each, ``(*, N)``.

    Returns:
        float64, ``(*)``; NaN where a regret is not positive.

    Raises:
        TypeError: what is no tensor. ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from pyloss.research.online import regret_exponent
        >>> rounds = torch.tensor([100, 400, 1600])
        >>> regret_exponent(rounds, 3 * rounds.double().sqrt())
        tensor(0.5000, dtype=torch.float64)
    """
    checks.check_tensor("rounds", rounds)
    checks.check_tensor("regret", regret)
    if rounds.dim() != 1 or len(rounds) < 2 or regret.shape[-1:] != rounds.shape:
        raise ValueError(
            "rounds and regret must be (N,) and (*, N) with N >= 2, got "
            f"{list(rounds.shape)} and {list(regret.shape)}"
        )
    x, y = rounds.double().log(), regret.double()
    y = torch.where(y > 0, y, torch.nan).log()
    x = x - x.mean()
    return (x * y).sum(-1) / x.square().sum()


def _check_points(name: str, x: Tensor) -> None:
    checks.check_floating(name, x)
    checks.check_along(name, x, -1) if x.dim() else checks.check_has_dimension(name, x)


def _check_losses(losses: Tensor, others: Tensor, name: str, dims: tuple[int, ...]) -> None:
    checks.check_floating("losses", losses)
    checks.check_floating(name, others)
    if losses.dim() != 1 or others.dim() not in dims or others.shape[0] != len(losses):
        shapes = " or ".join(("(T,)", "(T, N)")[: len(dims)])
        raise ValueError(
            f"losses and {name} must be (T,) and {shapes}, got "
            f"{list(losses.shape)} and {list(others.shape)}"
        )
