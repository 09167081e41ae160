"""Cases, providers and targets of ``permutahedron``: soft rank and soft sort, forward and backward.

The same projections by torchsort, where it is installed. It is built against the installed torch,
``pip install --no-deps --no-build-isolation torchsort``, with nvcc off PATH or CUDA_HOME set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target

SIZES = ((64, 128), (64, 16), (16, 1024), (1, 100_000))
REGULARIZATIONS = ("l2", "kl")
STRENGTH = 0.1

TARGETS = [
    Target(
        f"{op}, {kind}, fwd+bwd (64, 128), speed-up over torchsort",
        "speedup",
        f"{op} {kind} 64x128",
        at_least=1.0,
    )
    for op in ("soft_rank", "soft_sort")
    for kind in REGULARIZATIONS
]


class Problem:
    def __init__(self, b: int, n: int, device: str):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(b, n, generator=generator).to(device)
        self.g = torch.randn(b, n, generator=generator).to(device)

    def step(self, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(value, gradient) of <fn(x), g>."""
        x = self.x.detach().requires_grad_()
        y = fn(x)
        (dx,) = torch.autograd.grad(y, x, self.g)
        return y.detach(), dx


def make_run(
    problem: Problem,
    fn: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], Tensor],
    rtol: float,
) -> Run:
    """``exact`` gets the rows in float64, and answers once."""

    def check() -> float:
        x = problem.x.cpu().double().requires_grad_()
        y = exact(x)
        (dx,) = torch.autograd.grad(y, x, problem.g.cpu().double())
        found = problem.step(fn)
        errors = [
            (a.cpu().double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
            for a, b in zip(found, (y.detach(), dx))
        ]
        return max(errors).item() / rtol

    return Run(call=lambda: problem.step(fn), check=check)


def providers(problem: Problem, rank: bool, kind: str) -> list[Provider]:
    """pyloss and torchsort on one problem."""

    def exact(x: Tensor) -> Tensor:
        from pyloss.reference import permutahedron_projection

        return permutahedron_projection(x, rank=rank, regularization=kind, strength=STRENGTH)

    def ours() -> Run:
        from pyloss import functional

        fn = functional.permutahedron_rank if rank else functional.permutahedron_sort
        return make_run(problem, lambda x: fn(x, kind, STRENGTH), exact, 1e-5)

    def theirs() -> Run:
        torchsort: Any = imported_torchsort()
        fn = torchsort.soft_rank if rank else torchsort.soft_sort
        # Its sums are float32: pooling a row of n adds n roundings.
        tolerance = 1e-6 * max(10, problem.x.shape[1])
        return make_run(problem, lambda x: fn(x, kind, STRENGTH), exact, tolerance)

    return [Provider("pyloss", ours), Provider("torchsort", theirs)]


def imported_torchsort() -> Any:
    try:
        import torchsort
    except Exception as error:  # an extension of another torch fails in its own ways
        raise Skip(f"cannot be imported: {type(error).__name__}: {error}") from error
    return torchsort


def cases(ctx: Context) -> Iterator[Case]:
    for b, n in SIZES:
        for rank in (True, False):
            for kind in REGULARIZATIONS:
                yield _case(b, n, rank, kind, ctx)


def _case(b: int, n: int, rank: bool, kind: str, ctx: Context) -> Case:
    name = f"{'soft_rank' if rank else 'soft_sort'} {kind} {b}x{n}"
    b, n = (min(b, 4), min(n, 40)) if ctx.quick else (b, n)
    return Case(
        name=name,
        group="fwd+bwd",
        mode="fwd+bwd",
        shape=(b, n),
        dtype="fp32",
        useful_bytes=0,  # sorting and pooling, not a stream
        tensor_bytes=4 * b * n,
        open=lambda: providers(Problem(b, n, ctx.device), rank, kind),
        baseline="torchsort",
    )
