"""Cases, providers and targets of ``SphericalLinear``: forward, backward and step, by the number of
classes, beside the dense layer.

The floor of a step of m rows of d features: its products, about 14 m d^2 + 6 m^2 d FLOP in float64,
and the m rows of V that are read and written; at m = 32, d = 64 that is 2.2 MFLOP and 16 KiB, some
tens of microseconds beside the 70 calls of torch that it takes. The dense layer reads W twice and
writes it once, and makes the scores and their gradient, m D each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

FEATURES, ROWS, RATE = 64, 32, 0.01
FEW, MANY = 10_000, 1_000_000

TARGETS = [
    Target(
        "SphericalLinear, a step of 32 rows with 10^6 classes over one with 10^4",
        "ratio_to_pyloss",
        "growth .*",
        provider="pyloss, 1000000 classes",
        at_most=2.0,
    ),
    Target(
        "SphericalLinear, a step with 10^6 classes, speed-up over the dense layer",
        "speedup",
        "step of 1000000 classes",
        at_least=50.0,
    ),
]


def z_loss(scores: Tensor, y: Tensor) -> Tensor:
    own = scores.gather(1, y.unsqueeze(1)).squeeze(1)
    z = (own - scores.mean(1)) / (scores.var(1, correction=0) + 1e-12).sqrt()
    return torch.nn.functional.softplus(-z).mean()


class Problem:
    def __init__(self, classes: int, device: str):
        g = torch.Generator().manual_seed(0)
        self.classes = classes
        self.h = torch.randn(ROWS, FEATURES, generator=g).to(device).requires_grad_()
        self.y = torch.randint(classes, (ROWS,), generator=g).to(device)
        self.weight = (torch.rand(classes, FEATURES, generator=g) / 4 - 0.125).to(device)

    def looked_at(self, weight: Tensor) -> Tensor:
        """Rows of a weight: some that are targets, some that are not."""
        return weight[torch.cat([self.y, torch.arange(50, device=self.y.device)])]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient of h, rows of the weight after a step, in float64."""
        h, weight = self.h.detach().double().requires_grad_(), self.weight.double().requires_grad_()
        loss = z_loss(h @ weight.T, self.y)
        dh, grad = torch.autograd.grad(loss, (h, weight))
        return loss.detach(), dh, self.looked_at((weight - RATE * grad).detach())

    def error(self, found: tuple[Tensor, ...]) -> float:
        pairs = zip(found, self.exact())
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs) / 1e-4

    def ours(self) -> Run:
        from pyloss.nn import SphericalLinear

        layer = SphericalLinear(FEATURES, self.classes, device=self.h.device)
        layer.weight = self.weight

        def step() -> tuple[Tensor, Tensor]:
            loss = layer(self.h, self.y)
            (dh,) = torch.autograd.grad(loss, self.h)
            layer.step(RATE)
            return loss.detach(), dh

        return Run(call=step, check=lambda: self.error((*step(), self.looked_at(layer.weight))))

    def dense(self) -> Run:
        weight = self.weight.clone().requires_grad_()

        def step() -> tuple[Tensor, Tensor]:
            loss = z_loss(torch.nn.functional.linear(self.h, weight), self.y)
            dh, grad = torch.autograd.grad(loss, (self.h, weight))
            with torch.no_grad():
                weight.sub_(grad, alpha=RATE)
            return loss.detach(), dh

        return Run(call=step, check=lambda: self.error((*step(), self.looked_at(weight.detach()))))


def cases(ctx: Context) -> Iterator[Case]:
    many = FEW if ctx.quick else MANY

    def growth() -> list[Provider]:
        few = Problem(FEW, ctx.device)
        return [
            Provider("pyloss", few.ours),
            Provider(f"pyloss, {MANY} classes", Problem(many, ctx.device).ours),
        ]

    def beside_dense() -> list[Provider]:
        problem = Problem(many, ctx.device)
        return [Provider("pyloss", problem.ours), Provider("torch", problem.dense)]

    for name, classes, opened in (
        (f"growth {FEW} to {MANY} classes", many, growth),
        (f"step of {MANY} classes", many, beside_dense),
    ):
        yield Case(
            name=name,
            group="step",
            mode="fwd+bwd+step",
            shape=(ROWS, FEATURES, classes),
            dtype="fp32",
            useful_bytes=0,  # small products, and calls
            tensor_bytes=4 * classes * FEATURES,
            open=opened,
            rounds=40 if opened is growth else 8,
        )
