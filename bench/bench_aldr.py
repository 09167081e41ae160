"""Cases, providers and targets of ``aldr`` and its neighbours: LDR-KL and ALDR-KL, forward and
backward, against plain PyTorch and against cross entropy, whose work is the floor of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

SHAPES = ((2048, 32000), (4096, 1000))
LAM, ALPHA, MARGIN = 2.0, 2.0, 0.1
# Of the plain form: as many as the paper's fixed point needs at these numbers, to 1e-6.
STEPS = 4
LOSSES = ("ldr", "aldr")

TARGETS = [
    Target(
        f"{loss}, fwd+bwd 2048x32000 fp32, speed-up over plain PyTorch",
        "speedup",
        f"{loss} 2048x32000 fp32",
        at_least=4.0,
    )
    for loss in LOSSES
]
# Time over cross entropy's in the same run: what `speedup` of the provider "cross entropy" is to
# that of "pyloss"; docs/ldr.md has it.
OVER_CROSS_ENTROPY = {"ldr": 1.3, "aldr": 2.5}


class Problem:
    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        self.x = (2 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
        self.y = torch.randint(shape[1], shape[:1], generator=generator).to(device)

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        self.x.grad = None
        value = loss(self.x, self.y)
        value.backward()
        return value.detach(), self.x.grad


def plain_ldr(x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    return _plain(x.to(_sums(x)), y, torch.full((len(x), 1), LAM, device=x.device), LAM)


def plain_aldr(x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    """As the paper's code has it: scores over their size, the fixed point, then the loss."""
    x = x.to(_sums(x))
    x = x / x.abs().mean(1, keepdim=True)
    column, classes = y[:, None], x.shape[1]
    lam = torch.full((len(x), 1), LAM, dtype=x.dtype, device=x.device)
    kappa = ALPHA * math.log(classes) / LAM
    with torch.no_grad():
        delta = (x - x.gather(1, column) + MARGIN).scatter(1, column, 0.0)
        for _ in range(steps):
            p = torch.softmax(delta / lam, 1)
            kl = torch.special.xlogy(p, p * classes).sum(1, keepdim=True)
            lam = LAM - kl / kappa
    return _plain(x, y, lam, LAM) - (kappa / 2 * (lam - LAM) ** 2).mean()


def _plain(x: Tensor, y: Tensor, lam: Tensor, lam0: float) -> Tensor:
    column, classes = y[:, None], x.shape[1]
    delta = (x - x.gather(1, column) + MARGIN).scatter(1, column, 0.0)
    lam = lam.to(x.dtype)
    return (lam * (torch.logsumexp(delta / lam, 1, True) - math.log(classes))).mean()


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def providers(problem: Problem, loss: str) -> list[Provider]:
    plain = plain_ldr if loss == "ldr" else plain_aldr

    def ours(x: Tensor, y: Tensor) -> Tensor:
        import pyloss

        if loss == "ldr":
            return pyloss.ldr_loss(x, y, LAM, MARGIN)
        return pyloss.aldr_loss(x, y, LAM, ALPHA, MARGIN)

    def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
        import pyloss

        return pyloss.fused_cross_entropy(x, y)

    answer: list[tuple[Tensor, Tensor]] = []

    def run(fn: Callable[[Tensor, Tensor], Tensor], checked: bool = True) -> Run:
        def error() -> float:
            # Some rows, so that float64 needs little memory: of each the gradient, times the rows.
            count = min(len(problem.y), 8)
            if not answer:
                x = problem.x.detach()[:count].double().requires_grad_()
                value = plain(x, problem.y[:count], 60)
                answer.append((value.detach(), torch.autograd.grad(value, x)[0]))
            value, want = answer[0]
            x = problem.x.detach()[:count].requires_grad_()
            found = fn(x, problem.y[:count])
            (grad,) = torch.autograd.grad(found, x)
            tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
            errors = [
                (found.detach().double() - value).abs() / value.abs(),
                (grad.double() - want).norm() / want.norm(),
            ]
            return max(e.item() for e in errors) / tolerance

        return Run(call=lambda: problem.step(fn), check=error if checked else None)

    return [
        Provider("pyloss", lambda: run(ours)),
        Provider("PyTorch", lambda: run(plain)),
        Provider("cross entropy", lambda: run(cross_entropy, checked=False)),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    for shape in SHAPES:
        for loss in LOSSES:
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                if dtype == torch.bfloat16 and shape[1] > 1000:
                    continue
                yield _case(shape, loss, name, dtype, ctx)


def _case(shape: tuple[int, int], loss: str, name: str, dtype: torch.dtype, ctx: Context) -> Case:
    label = f"{loss} {shape[0]}x{shape[1]} {name}"
    if ctx.quick:
        shape = (4, 40)
    size = shape[0] * shape[1] * torch.empty((), dtype=dtype).element_size()
    return Case(
        name=label,
        group="fwd+bwd",
        mode="fwd+bwd",
        shape=shape,
        dtype=name,
        useful_bytes=2 * size,
        tensor_bytes=size,
        open=lambda: providers(Problem(shape, dtype, ctx.device), loss),
        baseline="PyTorch",
    )
