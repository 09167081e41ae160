"""Cases and providers of ``linear_distillation``: two heads and their divergence, fwd + bwd.

Against PyTorch's own operations on the logits of both models, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

DIRECTIONS = ("forward", "reverse", "jsd")
SIZES = ((1024, 256, 512, 16384),)  # rows, width of student and teacher, classes
TEMPERATURE, BETA = 2.0, 0.5
RTOL = 1e-4

TARGETS = [
    Target(
        f"{direction} fwd+bwd, speed-up over PyTorch",
        "speedup",
        f"{direction} 1024x16384",
        at_least=1.0,
    )
    for direction in DIRECTIONS
]


class Problem:
    def __init__(self, n: int, d: int, e: int, v: int, device: str):
        generator = torch.Generator().manual_seed(0)
        shapes = ((n, d), (v, d), (n, e), (v, e))
        self.tensors = [
            (torch.randn(s, generator=generator) / s[1] ** 0.25).to(device) for s in shapes
        ]

    def step(self, fn: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The loss, and the gradients of the student's hidden states and head."""
        h, w, g, u = (t.to(dtype) for t in self.tensors)
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        loss = fn(h, w, g, u)
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]


def by_pytorch(direction: str) -> Callable[..., Tensor]:
    def loss(h: Tensor, w: Tensor, g: Tensor, u: Tensor) -> Tensor:
        log_q = torch.log_softmax(F.linear(h, w) / TEMPERATURE, -1)
        log_p = torch.log_softmax(F.linear(g, u) / TEMPERATURE, -1)

        def divergence(of: Tensor, other: Tensor) -> Tensor:
            return F.kl_div(other, of, reduction="batchmean", log_target=True)

        if direction == "forward":
            found = divergence(log_p, log_q)
        elif direction == "reverse":
            found = divergence(log_q, log_p)
        else:
            log_m = torch.log((log_p.exp() + log_q.exp()) / 2)
            found = BETA * divergence(log_p, log_m) + (1 - BETA) * divergence(log_q, log_m)
        return found * TEMPERATURE**2

    return loss


def make_run(problem: Problem, fn: Callable[..., Tensor], exact: Callable[..., Tensor]) -> Run:
    def check() -> float:
        want = problem.step(exact, torch.float64)
        found = problem.step(fn, torch.float32)
        errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, want)]
        return max(errors).item() / RTOL

    return Run(call=lambda: problem.step(fn, torch.float32), check=check)


def providers(problem: Problem, direction: str) -> list[Provider]:
    exact = by_pytorch(direction)

    def ours() -> Run:
        from pyloss.functional import linear_distillation_loss

        def fn(*tensors: Tensor) -> Tensor:
            return linear_distillation_loss(
                *tensors, direction=direction, beta=BETA, temperature=TEMPERATURE
            )

        return make_run(problem, fn, exact)

    return [
        Provider("pyloss", ours),
        Provider("torch", lambda: make_run(problem, exact, exact)),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    for sizes in SIZES:
        for direction in DIRECTIONS:
            yield _case(sizes, direction, ctx)


def _case(sizes: tuple[int, int, int, int], direction: str, ctx: Context) -> Case:
    n, d, e, v = sizes
    name = f"{direction} {n}x{v}"
    if ctx.quick:
        n, d, e, v = 8, 16, 16, 64
    return Case(
        name=name,
        group="fwd+bwd",
        mode="fwd+bwd",
        shape=(n, v),
        dtype="fp32",
        useful_bytes=0,  # products, not a stream
        tensor_bytes=4 * (2 * n * d + n * e + 2 * v * d + v * e),
        open=lambda: providers(Problem(n, d, e, v, ctx.device), direction),
        baseline="torch",
    )
