"""Cases, providers and targets of ``row_moments``: the spherical losses of given scores.

The floor of forward and backward: the scores are read twice and their gradient is written once. The
yardsticks are the loss in plain PyTorch, and ``fused_cross_entropy``, which reads once less where a
row stays in the cache, but takes exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Loss; gradient as a whole, relative. bf16: PyTorch rounds each intermediate result.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}

SHAPES = (
    ((2048, 32000), "fp32", "z"),
    ((2048, 32000), "bf16", "z"),
    ((4096, 1000), "fp32", "z"),
    ((16, 21, 64, 64), "fp32", "z"),
    ((2048, 32000), "fp32", "taylor"),
)
CROSS_ENTROPY = "pyloss fused_cross_entropy"

TARGETS = [
    Target(
        "spherical_z_loss, fwd+bwd 2048 x 32000 fp32, speed-up over plain PyTorch",
        "speedup",
        "z fwd\\+bwd 2048x32000 fp32",
        at_least=4.0,
    ),
    Target(
        "spherical_z_loss, fwd+bwd 2048 x 32000 fp32, time of fused_cross_entropy over it "
        "(1.3 times as long: 0.77)",
        "speedup_over_cross_entropy",
        "z fwd\\+bwd 2048x32000 fp32",
        at_least=0.77,
    ),
    Target(
        "spherical_z_loss, extra memory fwd+bwd 2048 x 32000, in tensors of the scores",
        "peak_tensors",
        "z fwd\\+bwd 2048x32000 .*",
        at_most=1.02,
        unit="",
    ),
]


def z_loss(x: Tensor, y: Tensor) -> Tensor:
    """In plain PyTorch, as one writes it."""
    own = x.gather(1, y.unsqueeze(1)).squeeze(1)
    z = (own - x.mean(1)) / (x.var(1, correction=0) + 1e-12).sqrt()
    return torch.nn.functional.softplus(-z).mean()


def taylor_loss(x: Tensor, y: Tensor) -> Tensor:
    p = 1 + x + 0.5 * x.square()
    return -(p.gather(1, y.unsqueeze(1)).squeeze(1) / p.sum(1)).log().mean()


PLAIN = {"z": z_loss, "taylor": taylor_loss}


class Problem:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=g).to(device, dtype).requires_grad_()
        rows = (shape[0], *shape[2:])
        self.y = torch.randint(shape[1], rows, generator=g).to(device)

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        value = loss(self.x, self.y)
        (dx,) = torch.autograd.grad(value, self.x)
        return value.detach(), dx

    def run(self, loss, exact) -> Run:
        value_tolerance, gradient_tolerance = TOLERANCES[self.x.dtype]

        def check() -> float:
            value, dx = self.step(loss)
            worst = squares = size = 0.0
            total = torch.zeros((), dtype=torch.float64)
            # Some rows at a time: in float64 all of them would not fit beside the rest.
            parts = max(1, self.x.numel() // (1 << 24))
            chunks = zip(self.x.detach().chunk(parts), self.y.chunk(parts), dx.chunk(parts))
            for x, y, found in chunks:
                leaf = x.double().requires_grad_()
                share = y.numel() / self.y.numel()
                part = exact(leaf, y) * share
                (want,) = torch.autograd.grad(part, leaf)
                total += part.detach().cpu()
                squares += (found.double() - want).square().sum().item()
                size += want.square().sum().item()
            worst = abs(value.double().item() - total.item()) / abs(total.item())
            return max(worst / value_tolerance, (squares / size) ** 0.5 / gradient_tolerance)

        return Run(call=lambda: self.step(loss), check=check)


def providers(problem: Problem, name: str) -> list[Provider]:
    def ours() -> Run:
        from pyloss import functional

        fn = {"z": functional.spherical_z_loss, "taylor": functional.taylor_softmax_loss}[name]
        return problem.run(fn, PLAIN[name])

    def cross_entropy() -> Run:
        import pyloss

        return problem.run(pyloss.fused_cross_entropy, torch.nn.functional.cross_entropy)

    return [
        Provider("pyloss", ours),
        Provider("torch", lambda: problem.run(PLAIN[name], PLAIN[name])),
        Provider(CROSS_ENTROPY, cross_entropy),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    for shape, dtype, name in SHAPES:
        title = f"{name} fwd+bwd {'x'.join(map(str, shape))} {dtype}"
        if ctx.quick:
            shape = (4, min(shape[1], 50), *shape[2:])
        count = torch.Size(shape).numel()
        each = DTYPES[dtype].itemsize
        yield Case(
            name=title,
            group="fwd+bwd",
            mode="fwd+bwd",
            shape=shape,
            dtype=dtype,
            useful_bytes=3 * count * each,
            tensor_bytes=count * each,
            open=lambda shape=shape, dtype=dtype, name=name: providers(
                Problem(shape, DTYPES[dtype], ctx.device), name
            ),
            against={"speedup_over_cross_entropy": CROSS_ENTROPY},
            rounds=8,
        )
