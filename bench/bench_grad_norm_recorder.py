"""What GradNormRecorder adds to a training step of the demo's language model.

"torch" is the step without it: forward, backward and AdamW; "pyloss" is what the recorder does in
it, measured by itself, since a hundredth of a step would drown in the noise of two steps.
"get_total_norm" is torch's function of that name, kept in a list. So "times torch" says how many
times as long as its own work the step takes: 50 is 2 %.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench._core import Case, Context, Provider, Run
from bench._targets import Target
from pyloss.demo.language_model import FULL, QUICK
from pyloss.demo.model import GPT
from pyloss.optim.lr_scheduler import GradNormRecorder

TARGETS = [
    Target("A training step over the recorder's share of it", "speedup", ".*", at_least=50),
]


class Problem:
    """A model, its optimizer, and gradients that are there."""

    def __init__(self, quick: bool, device: str) -> None:
        size = QUICK if quick else FULL
        torch.manual_seed(0)
        self.model = GPT(size.vocabulary, size.context, size.width, size.layers, size.heads)
        self.model.to(device)
        shape = size.batch, size.context + 1
        self.tokens = torch.randint(size.vocabulary, shape, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.step()

    def step(self) -> None:
        logits = self.model(self.tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters()]

    def numbers(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def providers(problem: Problem, norm: str) -> list[Provider]:
    def recorder() -> Run:
        watched = torch.optim.SGD(problem.model.parameters(), lr=0.0)
        found = GradNormRecorder(watched, norm)

        def check() -> float:
            found(watched)
            exact = torch.cat([g.double().flatten() for g in problem.gradients]).norm(int(norm[1]))
            return ((found.norms[-1] - exact) / exact).abs().item() / 1e-5

        return Run(call=lambda: found(watched), check=check)

    def total() -> Run:
        kept: list[torch.Tensor] = []

        def call() -> None:
            kept[:] = kept[-1000:]
            kept.append(torch.nn.utils.get_total_norm(problem.gradients, float(norm[1])))

        return Run(call=call)

    return [
        Provider("pyloss", recorder),
        Provider("get_total_norm", total),
        Provider("torch", lambda: Run(call=problem.step)),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    problem = Problem(ctx.quick, ctx.device)
    numbers = problem.numbers()
    for norm in ("l2", "l1"):
        yield Case(
            name=f"{norm} norm of {numbers / 1e6:.2g} million gradients",
            group=norm,
            mode="step",
            shape=(numbers,),
            dtype="fp32",
            useful_bytes=4 * numbers,
            tensor_bytes=4 * numbers,
            open=lambda norm=norm: providers(problem, norm),
            result_bytes=0,
        )
