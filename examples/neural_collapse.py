"""Neural collapse in a network, against the minimum in closed form.

A network with linear layers on top is trained on digits by squared error, without a bias and with
decay of its features, and what it reaches is measured against the minimum for free features: equal
classes, unequal ones, and such a small class that it collapses.
Run: python examples/neural_collapse.py [--steps 1500] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pyloss
from pyloss.analysis import UFMSolution, ufm_minimizer
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.metrics import NeuralCollapse, NeuralCollapseMetrics

DIM = 32  # of features and hidden linear layers


class Case(NamedTuple):
    sizes: tuple[int, ...]
    depth: int  # linear layers
    lam_w: float
    lam_h: float

    def minimum(self) -> UFMSolution:
        return ufm_minimizer(self.sizes, self.lam_w, self.lam_h, self.depth)


CASES = {
    "equal, 1 layer": Case((40, 40, 40, 40), 1, 2e-3, 2e-4),
    "unequal, 1 layer": Case((90, 45, 20, 5), 1, 2e-3, 2e-4),
    "unequal, 3 layers": Case((90, 45, 20, 5), 3, 2e-3, 2e-4),
    "one collapses, 1 layer": Case((90, 45, 20, 1), 1, 8e-3, 8e-3),
}


class Reached(NamedTuple):
    records: list[NeuralCollapse]
    loss: float
    length: float  # of the last class' row of the classifier


def digits(sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y).long()
    g = torch.Generator().manual_seed(seed)
    chosen = []
    for k, n in enumerate(sizes):
        every = (y == k).nonzero()[:, 0]
        chosen.append(every[torch.randperm(len(every), generator=g)[:n]])
    at = torch.cat(chosen)
    return x[at], y[at]


def trained(case: Case, seed: int, args, progress: Progress) -> Reached:
    x, y = digits(case.sizes, seed)
    torch.manual_seed(seed)
    classes = len(case.sizes)
    net = nn.Sequential(
        nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, DIM)
    )
    shapes = [(DIM, DIM)] * (case.depth - 1) + [(classes, DIM)]
    weights = [nn.Parameter(torch.randn(s) / math.sqrt(DIM)) for s in shapes]
    optimizer = torch.optim.Adam([*net.parameters(), *weights], lr=args.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    found = case.minimum()
    metrics = NeuralCollapseMetrics(classes, DIM, (found.w_norm2, found.h_norm2, found.logits_diag))
    records = []
    for step in range(args.steps + 1):
        features = net(x)
        loss = pyloss.functional.ufm_loss(weights, features, y, case.lam_w, case.lam_h)
        if step % args.every == 0:
            product = weights[0]
            for w in weights[1:]:
                product = w @ product
            metrics.reset()
            metrics.update(features, y)
            records.append(metrics.compute(product))
            progress.update(step, f"loss {loss.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step < args.steps:
            schedule.step()
    return Reached(records, loss.item(), float(product[-1].detach().norm()))


def log10(record: NeuralCollapse, field: str) -> float:
    return math.log10(max(float(getattr(record, field)), 1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=1500)
    add("--every", type=int, default=50, help="steps between two measurements")
    add("--rate", type=float, default=3e-3)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/neural_collapse.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.every, args.seeds = 20, 10, 2
    torch.set_num_threads(args.threads)

    runs: dict[str, list[Reached]] = {}
    for name, case in CASES.items():
        runs[name] = [
            trained(case, seed, args, Progress(f"{name}, seed {seed}", args.steps))
            for seed in range(args.seeds)
        ]
    fields = {"NC1": "nc1", "NC2 of W": "nc2_w", "NC2 of H": "nc2_h", "NC3": "nc3"}
    rows = []
    for name, reached in runs.items():
        found = CASES[name].minimum()
        rows.append(
            [
                name,
                spread([r.loss for r in reached], 5),
                f"{float(found.value):.5f}",
                *(spread([log10(r.records[-1], f) for r in reached]) for f in fields.values()),
                spread([r.length for r in reached], 3),
                f"{float(found.w_norm2[-1].sqrt()):.3f}",
            ]
        )
    head = ["classes", "loss", "minimum", *(f"log10 {title}" for title in fields)]
    print(table([*head, "|w| of the last", "minimum"], rows))

    steps = [float(args.every * i) for i in range(args.steps // args.every + 1)]
    panels = [
        Panel(title, "step", "log10", steps,
              {name: [[log10(r, field) for r in run.records] for run in reached]
               for name, reached in runs.items()})
        for title, field in fields.items()
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
