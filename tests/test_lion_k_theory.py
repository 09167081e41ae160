"""Lion-K: what it solves, and the function that its steps bring down."""

from __future__ import annotations

import pytest
import torch
from lion_k_samples import ARGS, parameters
from torch import Tensor, nn

from pyloss.optim import Lion, LionK, LyapunovMonitor, lion_k_lyapunov

F64 = torch.float64

# --------------------------------------------------------------------------------------------------
# What it solves

D, LAM = 8, 1.0
_G = torch.Generator().manual_seed(0)
_A = torch.randn(D, D, generator=_G, dtype=F64)
A = _A @ _A.T / D + 0.5 * torch.eye(D, dtype=F64)
B = 3 * torch.randn(D, generator=_G, dtype=F64)
SOLVED = {"l1": {}, "lp": dict(p=2.0), "soft": dict(e=0.5), "huber": dict(e=0.5), "topk": dict(k=3)}


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x @ A @ x - B @ x


def best(kappa: str) -> Tensor:
    """By proximal gradient steps."""
    x, rate = torch.zeros(D, dtype=F64), 1 / torch.linalg.matrix_norm(A, 2)
    for _ in range(600):
        x = x - rate * (A @ x - B)
        if kappa == "lp":
            x = x / x.norm().clamp_min(1)
        elif kappa == "topk":
            x = project_topk(x)
        else:
            if kappa == "soft":
                x = x.sign() * (x.abs() - 0.5 * rate).clamp_min(0)
            if kappa == "huber":
                x = x / (1 + 0.5 * LAM * rate)
            x = x.clamp(-1, 1)
    return x


def project_topk(x: Tensor) -> Tensor:
    """Onto the box and the l1 ball of size 3: a threshold, by bisection."""
    if x.abs().clamp(max=1).sum() <= 3:
        return x.clamp(-1, 1)
    low, high = 0.0, x.abs().amax().item()
    for _ in range(60):
        middle = (low + high) / 2
        if (x.abs() - middle).clamp(0, 1).sum() > 3:
            low = middle
        else:
            high = middle
    return x.sign() * (x.abs() - high).clamp(0, 1)


def solve(steps: int, first: float, last: float, geometric: bool) -> dict[str, Tensor]:
    params = {k: nn.Parameter(torch.zeros(D, dtype=F64)) for k in SOLVED}
    groups = [dict(params=[params[k]], kappa=k, kappa_args=a) for k, a in SOLVED.items()]
    optimizer = LionK(groups, lr=first, weight_decay=LAM)
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            lr = first * (last / first) ** done if geometric else first + (last - first) * done
            group["lr"] = lr
        for p in params.values():
            p.grad = A @ p.detach() - B
        optimizer.step()
    return {k: p.detach() for k, p in params.items()}


def check_solution(found: dict[str, Tensor], tolerance: float) -> None:
    for kappa, x in found.items():
        common = dict(kappa=kappa, kappa_args=SOLVED[kappa], betas=(0.9, 0.99), lr=1e-3,
                      weight_decay=LAM)  # fmt: skip
        zero, solution = torch.zeros(D), best(kappa)
        at, least = (lion_k_lyapunov(quadratic(y), [y], [zero], **common) for y in (x, solution))
        assert at.violation <= 1e-6, kappa
        assert at.composite - least.composite <= tolerance, (kappa, at.composite - least.composite)
        # The constraint matters: the free minimum is outside.
        assert lion_k_lyapunov(0.0, [torch.linalg.solve(A, B)], [zero], **common).violation > 0.1
    torch.testing.assert_close(found["topk"].abs().sum(), torch.tensor(3.0, dtype=F64),
                               rtol=0, atol=1e-5)  # fmt: skip


def test_constrained_optimum() -> None:
    check_solution(solve(700, 0.5, 1e-5, True), 1e-6)


@pytest.mark.exhaustive
def test_constrained_optimum_by_linear_decay() -> None:
    check_solution(solve(40_000, 1e-3, 0.0, False), 1e-6)


def test_outside_of_the_constraint_the_distance_shrinks() -> None:
    p = nn.Parameter(torch.full((4,), 5.0, dtype=F64))
    optimizer = Lion([p], lr=0.01, weight_decay=1.0)
    for step in range(1, 101):
        p.grad = torch.randn(4, dtype=F64)
        optimizer.step()
        assert p.detach().abs().amax() - 1 <= (1 - 0.01) ** step * 4 + 1e-12


# --------------------------------------------------------------------------------------------------
# The Lyapunov function


@pytest.mark.parametrize("kappa", ARGS)
def test_the_rate_is_never_positive(kappa: str) -> None:
    """At random points inside of the constraint, as the theorem says; nor is the gap negative."""
    g = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=g).item()

    inside = 0
    for _ in range(40):
        lam, lr = uniform(0.1, 2), uniform(1e-3, 0.3)
        betas = uniform(0.0, 0.98), uniform(0.5, 0.99)
        x = (2 * torch.rand(5, generator=g, dtype=F64) - 1) * 0.7 / lam
        m, b = torch.randn(2, 5, generator=g, dtype=F64)
        a = torch.randn(5, 5, generator=g, dtype=F64)
        grad = a @ a.T @ x - b
        found = lion_k_lyapunov(
            0.0, [x], [m], [grad], kappa=kappa, kappa_args=ARGS[kappa], betas=betas, lr=lr,
            weight_decay=lam,
        )  # fmt: skip
        if found.violation == 0:
            inside += 1
            assert found.rate <= 1e-12 and found.fenchel_gap >= -1e-12
    assert inside > 10


def test_the_rate_is_the_derivative_along_the_equation() -> None:
    """By one small Euler step of the differential equation, with gamma = (1 - beta2) / lr."""
    x, m = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([0.5, 0.8], dtype=F64)
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=F64)
    common = dict(kappa="huber", kappa_args=dict(e=2.0), betas=(0.7, 0.9), lr=0.1, weight_decay=1.5)

    def at(x: Tensor, m: Tensor):
        return lion_k_lyapunov(0.5 * x @ a @ x, [x], [m], [a @ x], **common)

    h, gamma = 1e-6, (1 - 0.9) / 0.1
    c = 0.7 * m + 0.3 * (a @ x)
    x_dot, m_dot = -(c.clamp(-2, 2) / 2 + 1.5 * x), gamma * (a @ x - m)
    change = (at(x + h * x_dot, m + h * m_dot).H - at(x - h * x_dot, m - h * m_dot).H) / (2 * h)
    torch.testing.assert_close(change, at(x, m).rate, rtol=1e-6, atol=1e-8)


def test_monitor() -> None:
    """Over a run H falls; each group adds its own terms."""
    params = [nn.Parameter(torch.zeros(D, dtype=F64)) for _ in range(2)]
    optimizer = LionK(
        [dict(params=params[:1]), dict(params=params[1:], kappa="huber", kappa_args=dict(e=0.5))],
        lr=2e-3, weight_decay=LAM,
    )  # fmt: skip
    monitor = LyapunovMonitor(optimizer)
    for _ in range(150):
        for p in params:
            p.grad = A @ p.detach() - B
        monitor.record(sum(quadratic(p.detach()) for p in params))
        optimizer.step()
    H = torch.stack([r.H for r in monitor.records])
    assert (H.diff() < 1e-3).all() and H[-1] < H[0] - 5
    assert all(r.violation == 0 and r.fenchel_gap >= 0 for r in monitor.records)
    parts = [
        lion_k_lyapunov(
            quadratic(p.detach()), [p], [optimizer.state[p]["exp_avg"]], kappa=g["kappa"],
            kappa_args=g["kappa_args"], betas=(0.9, 0.99), lr=2e-3, weight_decay=LAM,
        )
        for p, g in zip(params, optimizer.param_groups)
    ]  # fmt: skip
    last = monitor.record(sum(quadratic(p.detach()) for p in params))
    torch.testing.assert_close(last.H, sum(p.H for p in parts))
    for bad, words in (
        (Lion(parameters((2,))), "weight_decay must be > 0"),
        (LionK(parameters((2,)), weight_decay=0.1, kappa=torch.tanh), "a function has no K"),
        (Lion(parameters((2,)), weight_decay=0.1, maximize=True), "maximize"),
    ):
        with pytest.raises(ValueError, match=words):
            LyapunovMonitor(bad)
    with pytest.raises(TypeError, match="must be a LionK, got SGD"):
        LyapunovMonitor(torch.optim.SGD(parameters((2,)), 0.1))
