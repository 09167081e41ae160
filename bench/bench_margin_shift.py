"""Cases, providers and targets of ``margin_shift``: the second term of the smooth adversarial
comp-sum loss, and the whole loss, forward and backward, beside their plain PyTorch forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

SHAPES = ((4096, 1000), (16384, 100), (65536, 10), (2048, 32000))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RTOL = {"fp32": 1e-4, "bf16": 2e-2}

TARGETS = [
    Target(
        f"{what}, fwd+bwd {rows}x{classes} {dtype}, speed-up over plain PyTorch",
        "speedup",
        f"{what} {rows}x{classes} {dtype}",
        at_least=3.0,
    )
    for what in ("shift", "smooth")
    for rows, classes in SHAPES[:1] + SHAPES[3:]
    for dtype in DTYPES
]


class Problem:
    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator)
        moved = x + 0.3 * torch.randn(shape, generator=generator)
        self.logits = [t.to(device, dtype) for t in (x, moved)]
        self.target = torch.randint(shape[1], shape[:1], generator=generator).to(device)

    def step(self, fn: Callable, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """(mean of fn, gradients)"""
        given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.logits]
        value = fn(*given, self.target)
        return value.detach(), *torch.autograd.grad(value, given)


def plain_shift(x: Tensor, moved: Tensor, y: Tensor) -> Tensor:
    e = moved - x
    return torch.linalg.vector_norm(e.gather(1, y.unsqueeze(1)) - e, dim=1).mean()


def plain_smooth(x: Tensor, moved: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(x, y) + plain_shift(x, moved, y)


def providers(problem: Problem, smooth: bool, rtol: float) -> list[Provider]:
    plain = plain_smooth if smooth else plain_shift

    def run_of(fn: Callable) -> Run:
        def check() -> float:
            exact = problem.step(plain, torch.float64)
            found = problem.step(fn)
            errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact)]
            return max(errors).item() / rtol

        return Run(call=lambda: problem.step(fn), check=check)

    def ours() -> Run:
        from pyloss import functional

        if smooth:
            return run_of(functional.smooth_adversarial_comp_sum)
        return run_of(lambda x, moved, y: functional.margin_shift(x, moved, y, reduction="mean"))

    return [Provider("pyloss", ours), Provider("torch", lambda: run_of(plain))]


def cases(ctx: Context) -> Iterator[Case]:
    for what in ("shift", "smooth"):
        for rows, classes in SHAPES:
            for name in DTYPES:
                yield _case(what, rows, classes, name, ctx)


def _case(what: str, rows: int, classes: int, dtype: str, ctx: Context) -> Case:
    name = f"{what} {rows}x{classes} {dtype}"
    shape = (min(rows, 6), min(classes, 40)) if ctx.quick else (rows, classes)
    bytes_of_one = shape[0] * shape[1] * DTYPES[dtype].itemsize
    return Case(
        name=name,
        group=what,
        mode="fwd+bwd",
        shape=shape,
        dtype=dtype,
        useful_bytes=6 * bytes_of_one,  # both read twice, both gradients written
        tensor_bytes=2 * bytes_of_one,
        open=lambda: providers(
            Problem(shape, DTYPES[dtype], ctx.device), what == "smooth", RTOL[dtype]
        ),
        baseline="torch",
    )
