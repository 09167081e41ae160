"""A learning rate schedule out of an earlier run's gradient norms, beside the usual ones.

Digits (scikit-learn) that are turned and moved anew in each batch, a small perceptron with layer
norms, SGD with momentum. Each schedule is tried with several peak rates, and shown with the one of
the lowest training loss. The run with linear decay at its best rate is watched by GradNormRecorder;
the norms of the first seed make the refined schedules of all of them. The second picture shows
those norms, and what becomes of them.
Run: python examples/refined_schedule.py [--steps 600] [--optimizer adam] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from pyloss.demo.digits import moved
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits
from pyloss.optim.lr_scheduler import GradNormRecorder, LinearDecay, RefinedSchedule

CONSTANT, COSINE, LINEAR = "constant", "cosine", "linear"
REFINED, OPTIMAL = "refined", "refined, mode=optimal"


class Result(NamedTuple):
    train: float  # loss of training images, moved in a fixed way
    test: float  # and of others
    accuracy: float
    curve: list[float]  # `train` at every measurement
    norms: Tensor


def schedule_of(name: str, optimizer, steps: int, norms: Tensor | None, norm: str) -> LRScheduler:
    if name == CONSTANT:
        return ConstantLR(optimizer, 1.0)
    if name == COSINE:
        return CosineAnnealingLR(optimizer, steps)
    if name == LINEAR:
        return LinearDecay(optimizer, steps)
    mode = "optimal" if name == OPTIMAL else "closed"
    return RefinedSchedule(optimizer, norms, steps, norm=norm, mode=mode)


def norm_of(args: argparse.Namespace) -> nn.Module:
    return nn.Identity() if args.no_layer_norm else nn.LayerNorm(args.width)


class Task:
    """Images for a seed: those of the batches, and some of both kinds to be judged on."""

    def __init__(self, seed: int, args: argparse.Namespace) -> None:
        self.seed, self.args = seed, args
        generator = torch.Generator().manual_seed(1000 + seed)
        self.parts = load_digits()
        self.judged = [(moved(p.images, generator), p.labels) for p in self.parts]

    def run(self, name: str, rate: float, norms: Tensor | None = None) -> Result:
        args, (train, _) = self.args, self.parts
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, args.width), norm_of(args), nn.ReLU(),
            nn.Linear(args.width, args.width), norm_of(args), nn.ReLU(), nn.Linear(args.width, 10),
        )  # fmt: skip
        if args.optimizer == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        norm = "l2" if args.optimizer == "sgd" else "l1"
        recorder = GradNormRecorder(optimizer, norm)
        schedule = schedule_of(name, optimizer, args.steps, norms, norm)
        curve = []
        for step in range(args.steps):
            index = torch.randint(len(train.images), (args.batch,), generator=generator)
            images = moved(train.images[index], generator)
            loss = F.cross_entropy(model(images), train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % args.every == 0:
                curve.append(self.judge(model)[0])
        return Result(*self.judge(model), curve, recorder.norms)

    @torch.no_grad()
    def judge(self, model: nn.Module) -> tuple[float, float, float]:
        (x, y), (test, truth) = self.judged
        logits = model(test)
        right = (logits.argmax(1) == truth).float().mean().item()
        return (
            F.cross_entropy(model(x), y).item(),
            F.cross_entropy(logits, truth).item(),
            100 * right,
        )


def best(name: str, tasks: list[Task], rates: list[float], norms: Tensor | None = None) -> tuple:
    """(the rate of the lowest mean training loss, what every seed got with it)."""
    progress, found = Progress(name, len(rates)), {}
    for number, rate in enumerate(rates):
        found[rate] = [task.run(name, rate, norms) for task in tasks]
        mean = statistics.fmean(result.train for result in found[rate])
        progress.update(number + 1, f"rate {rate:g}: training loss {mean:.4f}")

    def loss(rate: float) -> float:  # of a run that has diverged: none
        mean = statistics.fmean(result.train for result in found[rate])
        return mean if mean == mean else float("inf")

    rate = min(found, key=loss)
    return rate, found[rate]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=("sgd", "adam"), default="sgd")
    add("--steps", type=int, default=600)
    add("--batch", type=int, default=16)
    add("--width", type=int, default=64)
    add("--no-layer-norm", action="store_true", help="norms that rise: the refined schedule fails")
    add("--rates", type=float, nargs="+", help="peaks; default 0.02 to 0.32, Adam 0.001 to 0.016")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--every", type=int, default=50, help="steps between measurements")
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/refined_schedule.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.every, args.seeds, args.width = 12, 4, 2, 8
    first = 0.02 if args.optimizer == "sgd" else 1e-3
    rates = args.rates or [first * 2**i for i in range(2 if args.quick else 5)]
    torch.set_num_threads(args.threads)

    tasks = [Task(seed, args) for seed in range(args.first_seed, args.first_seed + args.seeds)]
    found = {name: best(name, tasks, rates) for name in (CONSTANT, COSINE, LINEAR)}
    norms = found[LINEAR][1][0].norms
    for name in (REFINED, OPTIMAL):
        found[name] = best(name, tasks, rates, norms)

    rows = [
        [
            name,
            f"{rate:g}",
            spread([r.train for r in results], 3),
            spread([r.test for r in results], 3),
            spread([r.accuracy for r in results], 1, " %"),
        ]
        for name, (rate, results) in found.items()
    ]
    print(f"\nlast iterate, mean +- standard deviation over {args.seeds} seeds")
    print(table(["schedule", "peak rate", "training loss", "test loss", "test accuracy"], rows))

    x = [(i + 1) * args.every for i in range(len(found[LINEAR][1][0].curve))]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    shapes = {}
    for name in (COSINE, LINEAR, REFINED, OPTIMAL):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = 1.0
        norm = "l2" if args.optimizer == "sgd" else "l1"
        schedule = schedule_of(name, optimizer, args.steps, norms, norm)
        shapes[name] = [[]]
        for _ in range(args.steps):
            shapes[name][0].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    shapes = {"norm / largest": [(norms / norms.max()).tolist()]} | shapes
    print(draw(args.plot, [
        Panel("Digits in motion", "step", "training loss", x,
              {name: [r.curve for r in results] for name, (_, results) in found.items()}),
        Panel("Gradient norms and schedules", "step", "multiplier", range(args.steps), shapes),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
