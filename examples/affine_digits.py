"""Digits trained upright and tested under affine maps: Lie layers beside plain convolution.

The networks see scikit-learn's digits as they are, and are judged on held-out ones that are turned,
sheared, or mapped by matrices of positive determinant. One layer of kernels as large as a digit is
asked at samples of a group (`LiftConv2d`), new ones in each step; features are the maxima over the
plane and the group. Beside it: a plain convolution in its place, with and without such maps in its
training.
Run: python examples/affine_digits.py [--epochs 8] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits
from pyloss.nn import lie


class Templates(nn.Module):
    """One layer of kernels as large as a digit, their maxima over the plane (and the group), and
    two linear layers; `group` None: a plain convolution."""

    def __init__(self, group, width: int, args: argparse.Namespace) -> None:
        super().__init__()
        if group is None:
            self.first = nn.Conv2d(1, width, 15)
        else:
            self.first = lie.LiftConv2d(
                group, 1, width, 15, samples=args.samples, hidden=32, omega=5.0, mask="disc"
            )
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.first(images).flatten(2).amax(2)))


def shown(images: Tensor) -> Tensor:
    """8 x 8 digits at twice the size, with a margin."""
    return F.pad(F.interpolate(images.unsqueeze(1), scale_factor=2, mode="bilinear"), (2,) * 4)


def maps(kind: str, strength: float, count: int, generator: torch.Generator) -> Tensor:
    """Random matrices (count, 2, 2), the identity at strength 0."""

    def uniform() -> Tensor:
        return strength * (2 * torch.rand(count, generator=generator) - 1)

    if kind == "turned":
        none = torch.zeros(count, 3)
        return lie.SL(2).xi(torch.cat([none[:, :2], uniform()[:, None] * math.sqrt(2)], 1))
    if kind == "sheared":
        g = torch.eye(2).repeat(count, 1, 1)
        g[:, 0, 1] = uniform()
        return g
    # Of all four coordinates: stretched, sheared, turned, larger and smaller.
    return lie.xi(torch.stack([uniform() for _ in range(4)], 1) / math.sqrt(2))


STRENGTHS = {"turned": math.pi / 3, "sheared": 1.0, "mapped": 0.8}


class Task:
    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        self.seed, self.args = seed, args
        self.train, test = load_digits()
        self.x, self.labels = shown(self.train.images), test.labels
        images, generator = shown(test.images), torch.Generator().manual_seed(1000 + seed)
        self.tests = {"upright": images}
        for kind, strength in STRENGTHS.items():
            self.tests[kind] = lie.warp(images, maps(kind, strength, len(images), generator))
        self.levels = []
        for level in args.levels:
            g = maps("mapped", level, len(images), generator)
            self.levels.append(lie.warp(images, g))

    def run(self, kind: str) -> dict:
        args = self.args
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        group = {"SL": lie.SL, "GL": lie.GL}.get(kind)
        if group is not None:
            group = group(2, variance=args.variance, max_angle=math.pi / 3, rotations="grid")
        model = Templates(group, args.width, args)
        optimizer = torch.optim.AdamW(model.parameters(), args.rate, weight_decay=5e-3)
        steps = 6 if args.quick else args.epochs * (len(self.x) // args.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, steps)
        for _ in range(steps):
            index = torch.randint(len(self.x), (args.batch,), generator=generator)
            x = self.x[index]
            if kind == "plain, trained on maps":
                x = lie.warp(x, maps("mapped", STRENGTHS["mapped"], len(x), generator))
            if group is not None:
                lie.resample_(model, generator)
            loss = F.cross_entropy(model(x), self.train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = {name: self.judge(model, x, generator) for name, x in self.tests.items()}
        found["levels"] = [self.judge(model, x, generator) for x in self.levels]
        found["parameters"] = sum(p.numel() for p in model.parameters())
        return found

    @torch.no_grad()
    def judge(self, model: nn.Module, x: Tensor, generator: torch.Generator) -> float:
        lifts = isinstance(model.first, lie.LiftConv2d)
        model.eval()
        total = 0.0
        for _ in range(self.args.draws if lifts else 1):
            if lifts:
                lie.resample_(model, generator)
            total = total + model(x).softmax(1)
        return 100 * (total.argmax(1) == self.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--width", type=int, default=32, help="kernels")
    add("--samples", type=int, default=6, help="of the group")
    add("--variance", type=float, default=0.1, help="of the samples' coordinates")
    add("--draws", type=int, default=4, help="of samples when judged")
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=50)
    add("--rate", type=float, default=5e-3)
    add("--levels", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.9, 1.2])
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/affine_digits.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    kinds = ["plain", "plain, trained on maps", "SL", "GL"]
    if args.quick:
        args.seeds, args.width, args.samples, args.draws = 2, 2, 2, 1
        args.levels, kinds = [0.0, 0.8], ["plain", "GL"]
    torch.set_num_threads(args.threads)

    tasks = [Task(seed, args) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    progress, found = Progress("networks", len(kinds)), {}
    for kind in kinds:
        found[kind] = [task.run(kind) for task in tasks]
        progress.update(len(found), kind)

    rows = []
    for name, results in found.items():
        cells = [spread([r[key] for r in results], 1) for key in tasks[0].tests]
        rows.append([name, *cells, f"{results[0]['parameters']}"])
    print(f"\nheld-out digits, % right, mean +- standard deviation over {args.seeds} seeds")
    print(table(["network", *tasks[0].tests, "parameters"], rows))
    lines = {name: [r["levels"] for r in results] for name, results in found.items()}
    title = "Digits under affine maps"
    panel = Panel(title, "largest coordinate of the map", "right, %", args.levels, lines)
    print(draw(args.plot, [panel]))


if __name__ == "__main__":
    main()
