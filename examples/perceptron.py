"""Large steps on the logistic loss: how many until a separable set is separated.

Gradient descent on the plain and on the normalized logistic loss, and the batch perceptrons that
they become: on the worst case of the paper, and on drawn sets with a margin.
Run: python examples/perceptron.py [--samples 10 100 1000] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.demo.progress import table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import normalized_logistic_loss
from pyloss.research.perceptron import batch_perceptron, normalized_batch_perceptron

GAMMAS = (100.0, 10.0, 1.0, 0.1)


def worst_case(n: int) -> tuple[Tensor, Tensor]:
    """One sample against n - 1 that lie almost opposite."""
    x = torch.tensor([[-0.5, -1.0]], dtype=torch.float64).repeat(n, 1)
    x[0, 0] = 0.5
    return x, (torch.arange(n) == 0).long()


def drawn(n: int, seed: int, margin: float = 0.1) -> tuple[Tensor, Tensor]:
    """A band far from the origin, 2 % on one side of the line, at least the margin away from it."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) < max(1, n // 50)).long()
    side = (2 * y - 1) * (margin + (1 - margin) * torch.rand(n, generator=generator))
    along = 0.5 * torch.rand(n, generator=generator) - 1
    return torch.stack([side, along], 1).double(), y


def steps(x: Tensor, y: Tensor, gamma: float, normalize: bool, most: int) -> int:
    """Steps of gradient descent from 0 until all samples are on their side."""
    theta = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=gamma)
    sign = 2 * y - 1
    for count in range(most):
        scores = x @ theta
        if (sign * scores > 0).all():
            return count
        loss = (
            normalized_logistic_loss(scores, y) if normalize else F.softplus(-sign * scores).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return most


def counts(x: Tensor, y: Tensor, most: int) -> list[int]:
    z = x * (2 * y - 1)[:, None]
    return [
        *(steps(x, y, gamma, True, most) for gamma in GAMMAS),
        steps(x, y, GAMMAS[0], False, most),
        normalized_batch_perceptron(z).iterations,
        batch_perceptron(z).iterations,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=int, nargs="+", default=[10, 100, 1000])
    add("--most", type=int, default=5000, help="steps at which to give up")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/perceptron.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.most, args.seeds = [10, 100], 200, 2
    torch.set_num_threads(args.threads)

    names = [f"normalized {gamma:g}" for gamma in GAMMAS]
    names += [f"plain {GAMMAS[0]:g}", "normalized perceptron", "perceptron"]
    worst = [counts(*worst_case(n), args.most) for n in args.samples]
    made = [[counts(*drawn(n, s), args.most) for s in range(args.seeds)] for n in args.samples]
    print("Steps until all samples are on their side: the worst case")
    rows = [[f"n = {n}", *map(str, found)] for n, found in zip(args.samples, worst)]
    print(table(["", *names], rows))
    print(f"\ndrawn, margin 0.1, {args.seeds} seeds")
    rows = [
        [f"drawn, n = {n}", *(spread([float(v) for v in column], 0) for column in zip(*runs))]
        for n, runs in zip(args.samples, made)
    ]
    print(table(["", *names], rows))
    shown = (0, 2, 4)
    panels = [
        Panel("the worst case", "samples", "steps", args.samples,
              {names[i]: [[float(found[i]) for found in worst]] for i in shown}),
        Panel("drawn", "samples", "steps", args.samples,
              {names[i]: [[float(runs[s][i]) for runs in made] for s in range(args.seeds)]
               for i in shown}),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
