"""SSO: loss against the calls of an expensive loss, on an ill-conditioned logistic regression.

Features have scales from 1 to 0.01, so that gradient descent on the weights crawls; in the space of
outputs the problem is a good one. Every method asks the loss as often; SSO takes more or fewer
steps with the model in between. Full batches, and batches of 50 with SSO's eta falling. What is
printed are the losses over the whole data set; the second picture is the cost for it, evaluations
of the model.
Run: python examples/sso.py [--calls 40] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.optim import SSO

F64 = torch.float64


class Regression:
    """Labels by a true weight, of which some are wrong."""

    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        scales = torch.logspace(0, -2, args.features, dtype=F64)
        self.x = self.normal(args.samples, args.features) * scales
        self.y = (self.x @ (10 * self.normal(args.features)) / scales.mean()).sign()
        wrong = torch.rand(args.samples, generator=self.generator) < 0.05
        self.y[wrong] *= -1
        self.norm = torch.linalg.matrix_norm(self.x, 2).item()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def loss(self, z: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        return F.softplus(-self.y[index] * z).mean()

    def run(self, make: Callable[[list[Tensor]], Optimizer], calls: int, batch: int | None):
        """(the loss after every call, evaluations of the model)."""
        self.generator.manual_seed(1)
        weight = torch.zeros(self.x.shape[1], dtype=F64, requires_grad=True)
        optimizer, curve, used = make([weight]), [], 0
        index: Tensor | slice = slice(None)

        def closure():
            nonlocal used
            used += 1
            return self.x[index] @ weight, lambda z: self.loss(z, index)

        for _ in range(calls):
            if batch is not None:
                index = torch.randperm(len(self.x), generator=self.generator)[:batch]
            optimizer.step(closure)
            curve.append(self.loss(self.x @ weight.detach()).item())
        return curve, used


def methods(
    problem: Regression, rows: int, calls: int, stochastic: bool
) -> Iterable[tuple[str, Callable]]:
    """Rates are one over the smoothness, of the loss in the weights or in the outputs."""
    share = rows / len(problem.x)
    eta = 4.0 * rows
    inner_rate = eta / (problem.norm**2 * share)
    options = dict(eta=eta, eta_schedule="stochastic" if stochastic else "constant")
    yield "SGD" if stochastic else "GD", lambda p: SSO(p, inner_steps=1, lr=inner_rate, eta=eta)
    for steps in (5, 20, 100):
        # As eta falls, so does the rate at which the inner steps are stable.
        lr = inner_rate / (calls**0.5 if stochastic else 1)
        yield f"SSO, {steps} steps", lambda p, m=steps, lr=lr: SSO(p, "sgd", m, lr=lr, **options)
    yield "SSO, 5 Armijo", lambda p: SSO(p, "armijo", 5, **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=int, default=400)
    add("--features", type=int, default=30)
    add("--calls", type=int, default=40, help="of the loss")
    add("--batch", type=int, default=50)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/sso.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.calls, args.seeds = 4, 2
    torch.set_num_threads(args.threads)

    found: dict[str, dict[str, list]] = {"full batches": {}, f"batches of {args.batch}": {}}
    costs: dict[str, list[int]] = {}
    progress = Progress("runs", 2 * 5 * args.seeds)
    done = 0
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        problem = Regression(seed, args)
        for kind, curves in found.items():
            batch = None if kind == "full batches" else args.batch
            for name, make in methods(
                problem, batch or args.samples, args.calls, batch is not None
            ):
                curve, used = problem.run(make, args.calls, batch)
                curves.setdefault(name, []).append(curve)
                if batch is None:
                    costs.setdefault(name, []).append(used)
                done += 1
                progress.update(done, f"{name}, {kind}, seed {seed}")
    rows = []
    for (name, full), (_, half) in zip(*(curves.items() for curves in found.values())):
        rows.append([
            name,
            spread([curve[-1] for curve in full], 3),
            spread([curve[-1] for curve in half], 3),
            spread([used / args.calls for used in costs[name]], 1),
        ])  # fmt: skip
    print(
        f"\nloss after {args.calls} calls of it, mean +- standard deviation over {args.seeds} seeds"
    )
    print(table(["method", *found, "evaluations of the model a call"], rows))
    x = range(1, args.calls + 1)
    print(draw(args.plot, [Panel(kind, "calls of the loss", "loss", x, curves)
                           for kind, curves in found.items()]))  # fmt: skip


if __name__ == "__main__":
    main()
