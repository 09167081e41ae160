"""Cases and providers of ``row_softmax_stats``: a loss on statistics of rows, fwd + bwd.

Cross entropy with a penalty on confidence, nll - 0.1 entropy, against the same in PyTorch's own
operations: of logits as they are, with a temperature of each row, and with that and a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

SIZES = ((4096, 1000), (512, 32000))
KINDS = ("plain", "scale", "scale, mask")
RTOL = 1e-4

TARGETS = [
    Target(
        f"{kind} {n}x{c} fwd+bwd, speed-up over PyTorch", "speedup", f"{kind} {n}x{c}", at_least=2.0
    )
    for n, c in SIZES
    for kind in KINDS
]

Loss = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


class Problem:
    def __init__(self, n: int, c: int, kind: str, device: str):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, c, generator=generator).to(device)
        self.y = torch.randint(c, (n,), generator=generator).to(device)
        scale = torch.rand(n, generator=generator) + 0.5
        mask = torch.rand(n, c, generator=generator) > 0.1
        mask[torch.arange(n), self.y.cpu()] = True
        self.scale = scale.to(device) if "scale" in kind else None
        self.mask = mask.to(device) if "mask" in kind else None

    def step(self, fn: Loss, dtype: torch.dtype) -> list[Tensor]:
        x = self.x.to(dtype).requires_grad_()
        scale = self.scale if self.scale is None else self.scale.to(dtype)
        loss = fn(x, self.y, scale, self.mask)
        return [loss.detach(), *torch.autograd.grad(loss, x)]


def by_pytorch(x: Tensor, y: Tensor, scale: Tensor | None, mask: Tensor | None) -> Tensor:
    z = x if scale is None else x * scale.unsqueeze(1)
    if mask is not None:
        z = z.masked_fill(~mask, -torch.inf)
    logp = z.log_softmax(1)
    product = logp.exp() * logp
    entropy = -(product if mask is None else torch.where(mask, product, 0.0)).sum(1)
    return (-logp.gather(1, y.unsqueeze(1)).squeeze(1) - 0.1 * entropy).mean()


def by_pyloss(x: Tensor, y: Tensor, scale: Tensor | None, mask: Tensor | None) -> Tensor:
    from pyloss.functional import row_softmax_stats

    stats = row_softmax_stats(x, y, scale=scale, mask=mask)
    return (stats.nll - 0.1 * stats.entropy).mean()


def make_run(problem: Problem, fn: Loss) -> Run:
    def check() -> float:
        want = problem.step(by_pytorch, torch.float64)
        found = problem.step(fn, torch.float32)
        errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, want)]
        return max(errors).item() / RTOL

    return Run(call=lambda: problem.step(fn, torch.float32), check=check)


def cases(ctx: Context) -> Iterator[Case]:
    for n, c in SIZES:
        for kind in KINDS:
            yield _case(n, c, kind, ctx)


def _case(n: int, c: int, kind: str, ctx: Context) -> Case:
    name = f"{kind} {n}x{c}"
    if ctx.quick:
        n, c = 8, 64

    def providers() -> list[Provider]:
        problem = Problem(n, c, kind, ctx.device)
        return [
            Provider("pyloss", lambda: make_run(problem, by_pyloss)),
            Provider("torch", lambda: make_run(problem, by_pytorch)),
        ]

    return Case(
        name=name,
        group="fwd+bwd",
        mode="fwd+bwd",
        shape=(n, c),
        dtype="fp32",
        useful_bytes=3 * 4 * n * c,  # two reads of the logits, one write of their gradient
        tensor_bytes=(4 + ("mask" in kind)) * n * c,
        open=providers,
        baseline="torch",
    )
