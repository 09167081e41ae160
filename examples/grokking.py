"""Grokking: the lazier a model is, the later it generalises after it has fitted.

Two layers of which one learns regress y = (b . x)^2 / 2. alpha scales the output, less that at the
start, and divides the gradient, so that all models move as fast as functions. For each alpha the
table has the steps to a tenth of the training and of the test loss, and how well the tangent kernel
agrees with the labels, before and after;
last, how well the features agree with b.
Run: python examples/grokking.py [--alpha 0.25 1 4] [--steps 1000] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyloss.analysis import LazyScale, empirical_ntk, kernel_alignment, scaled_mse
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread


class Committee(nn.Module):
    """The mean of phi(w . x) over units, phi(h) = h + eps h^2 / 2."""

    def __init__(self, dim: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight.T
        return (h + self.eps / 2 * h.square()).mean(1)


class Run(NamedTuple):
    """Losses are in units of those of the answer 0."""

    train: list[float]
    test: list[float]
    alignment: list[float]  # of the tangent kernel and the labels, before and after
    features: float  # cosine of the weights' second moments and b b^T
    fitted: float  # steps to a tenth of the training loss; inf: never
    generalised: float


def run(alpha: float, seed: int, args: argparse.Namespace) -> Run:
    torch.manual_seed(seed)
    b = torch.randn(args.dim)
    b *= math.sqrt(args.dim) / b.norm()
    x, held = (torch.randn(n, args.dim) / math.sqrt(args.dim) for n in (args.samples, args.held))
    y, expected = ((t @ b).square() / 2 for t in (x, held))
    units = y.square().mean().item(), expected.square().mean().item()
    model = LazyScale(Committee(args.dim, args.width, args.eps), alpha)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=args.rate * args.width / 2)

    def alignment() -> float:
        some = slice(0, 200)
        return float(kernel_alignment(empirical_ntk(model, x[some]), torch.outer(y[some], y[some])))

    train, test, aligned = [], [], [alignment()]
    for _ in range(args.steps):
        output = model(x)
        loss = scaled_mse(output, y, alpha)
        optimizer.zero_grad()
        loss.backward()
        train.append(loss.item() * alpha**2 / units[0])
        with torch.no_grad():
            test.append((model(held) - expected).square().mean().item() / units[1])
        optimizer.step()
    aligned.append(alignment())
    with torch.no_grad():
        moments = model.module.weight.T @ model.module.weight
    features = float(b @ moments @ b / (moments.norm() * args.dim))
    return Run(train, test, aligned, features, first_below(train), first_below(test))


def first_below(losses: list[float], level: float = 0.1) -> float:
    return next((step for step, loss in enumerate(losses) if loss < level), math.inf)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--alpha", type=float, nargs="+", default=[0.25, 1.0, 4.0])
    add("--dim", type=int, default=50)
    add("--samples", type=int, default=450)
    add("--held", type=int, default=1000, help="test samples")
    add("--width", type=int, default=300)
    add("--eps", type=float, default=0.25, help="of the quadratic part: how well it can align")
    add("--rate", type=float, default=12.5)
    add("--steps", type=int, default=1000)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/grokking.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    return made


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.dim, args.samples, args.held, args.width, args.rate = 10, 30, 50, 20, 2.0
        args.steps, args.seeds = 30, 2
    torch.set_num_threads(args.threads)

    rows, panels = [], []
    for alpha in args.alpha:
        progress = Progress(f"alpha {alpha:g}", args.seeds)
        runs = []
        for seed in range(args.seeds):
            runs.append(run(alpha, seed, args))
            progress.update(seed + 1)
        cells = [[min(r.fitted, args.steps) for r in runs]]
        cells.append([min(r.generalised, args.steps) for r in runs])
        cells.append([b / max(a, 1) for a, b in zip(*cells)])
        before, after = ([r.alignment[at] for r in runs] for at in (0, -1))
        last = [before, after, [r.features for r in runs]]
        texts = [spread(c, d) for c, d in zip([*cells, *last], (0, 0, 1, 2, 2, 3))]
        rows.append([f"alpha {alpha:g}", *texts])
        steps = list(range(1, args.steps + 1))
        lines = {"train": [r.train for r in runs], "test": [r.test for r in runs]}
        panels.append(Panel(f"alpha = {alpha:g}", "steps", "loss", steps, lines, log=True))
    print(f"\nmean +- standard deviation over {args.seeds} seeds; {args.steps} steps at most")
    head = ["", "fitted after", "generalised", "ratio", "kernel before", "after", "features"]
    print(table(head, rows))
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
