"""Even or odd digits: EnsLoss, which draws a loss in each step, beside cross entropy and hinge.

A small network is trained on some of scikit-learn's digits to tell even from odd ones, with the
same batches and the same initial weights for each loss. The table has the accuracy on held-out
images by the number of training images, the second picture that of the largest number by epoch.
Run: python examples/ens_loss.py [--images 50 100 300 1200] [--steps 600] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import Digits, load_digits

POINTS = 20  # of the second picture


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))


def hinge(scores: Tensor, labels: Tensor) -> Tensor:
    return (1 - (2 * labels - 1) * scores).clamp(min=0).mean()


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "cross entropy": cross_entropy,
        "hinge": hinge,
        "EnsLoss": pyloss.nn.EnsLoss(),
        "EnsLoss, lambda drawn": pyloss.nn.EnsLoss(period=1),
    }


def train(
    name: str, data: tuple[Digits, Digits], images: int, seed: int, args, progress: Progress
) -> list[float]:
    """Accuracy on held-out images in per cent, at `POINTS` steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0))
    loss_of = losses()[name]
    batches = torch.Generator().manual_seed(seed)
    train_digits, test = data
    chosen = torch.randperm(len(train_digits.labels), generator=batches)[:images]
    x, y = train_digits.images[chosen].flatten(1), train_digits.labels[chosen] % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=args.rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    found = []
    for step in range(args.steps):
        batch = torch.randint(images, (args.batch,), generator=batches)
        loss = loss_of(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if isinstance(loss_of, nn.Module) and (step + 1) % max(1, args.steps // 60) == 0:
            loss_of.step_epoch()
        if POINTS * (step + 1) // args.steps > POINTS * step // args.steps:
            with torch.no_grad():
                right = (model(test.images.flatten(1)) > 0) == (test.labels % 2 == 1)
            found += [100 * right.float().mean().item()]
        progress.update(step + 1, f"{found[-1] if found else 0:.1f} %")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[50, 100, 300, 1200], help="for training")
    add("--steps", type=int, default=1200)
    add("--batch", type=int, default=64)
    add("--rate", type=float, default=0.05)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/ens_loss.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.images, args.steps, args.seeds = [20, 40], 20, 2
    torch.set_num_threads(args.threads)

    data = load_digits()
    curves = {
        name: [
            [
                train(name, data, images, seed, args,
                      Progress(f"{name}, {images} images, seed {seed}", args.steps))
                for images in args.images
            ]
            for seed in range(args.seeds)
        ]
        for name in losses()
    }  # fmt: skip
    rows = [
        [f"{images} images", *(spread([run[at][-1] for run in runs], 1, " %")
                               for runs in curves.values())]
        for at, images in enumerate(args.images)
    ]  # fmt: skip
    print(f"\n{len(data[1].labels)} held-out images, mean +- standard deviation of "
          f"{args.seeds} seeds")  # fmt: skip
    print(table(["training set", *curves], rows))
    steps = [(i + 1) * args.steps / POINTS for i in range(POINTS)]
    panels = [
        Panel("After training", "training images", "held-out accuracy, %", args.images,
              {name: [[c[-1] for c in run] for run in runs] for name, runs in curves.items()}),
        Panel(f"{args.images[-1]} training images", "step", "held-out accuracy, %", steps,
              {name: [run[-1] for run in runs] for name, runs in curves.items()}),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
