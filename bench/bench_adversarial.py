"""Attacks of ``pyloss.adversarial`` beside those of torchattacks, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench._core import Case, Context, Provider, Run, Skip

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
TARGETS: list[Any] = []  # none was asked for


class Problem:
    """A small network on images; attacks from the images themselves, so that all find the same."""

    def __init__(self, rows: int, device: str):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten()
        self.model = nn.Sequential(*layers, nn.LazyLinear(10)).to(device).eval()
        self.x = torch.rand(rows, 3, 16, 16, device=device)
        self.y = torch.randint(10, (rows,), device=device)
        self.model(self.x)

    def plain(self) -> Tensor:
        moved = self.x.clone()
        for _ in range(STEPS):
            moved.requires_grad_()
            loss = nn.functional.cross_entropy(self.model(moved), self.y, reduction="sum")
            (g,) = torch.autograd.grad(loss, moved)
            moved = (moved.detach() + STEP * g.sign() - self.x).clamp(-EPS, EPS)
            moved = (self.x + moved).clamp(0, 1)
        return moved


def providers(problem: Problem) -> list[Provider]:
    def run_of(attack: Callable[[], Tensor]) -> Run:
        def check() -> float:
            return float((attack() - problem.plain()).abs().max()) / 1e-5

        return Run(call=attack, check=check)

    def ours() -> Run:
        from pyloss.adversarial import pgd_attack

        return run_of(
            lambda: pgd_attack(
                problem.model, problem.x, problem.y, EPS, steps=STEPS, step=STEP,
                random_start=False, clip=(0.0, 1.0),
            )
        )  # fmt: skip

    def theirs() -> Run:
        try:
            import torchattacks
        except Exception as error:  # it fails in ways of its own
            raise Skip(f"cannot be imported: {type(error).__name__}: {error}") from error
        attack = torchattacks.PGD(
            problem.model, eps=EPS, alpha=STEP, steps=STEPS, random_start=False
        )
        return run_of(lambda: attack(problem.x, problem.y))

    return [
        Provider("pyloss", ours),
        Provider("plain loop", lambda: run_of(problem.plain)),
        Provider("torchattacks", theirs),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    rows = 4 if ctx.quick else 128
    yield Case(
        name=f"pgd_attack linf {STEPS} steps",
        group="attack",
        mode="attack",
        shape=(rows, 3, 16, 16),
        dtype="fp32",
        useful_bytes=0,
        tensor_bytes=4 * rows * 3 * 256,
        open=lambda: providers(Problem(rows, ctx.device)),
        baseline="plain loop",
    )
