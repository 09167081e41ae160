"""Top-k loss beside cross entropy under label noise, by top-1 and top-5 accuracy.

Nothing of scikit-learn that comes with its wheel has more than ten classes, so two of its digits
side by side are an image of one of 100 numbers. Some labels of the training set are replaced by any
of the 100; held-out images are of digits that are in no training image, and have their labels.
Run: python examples/topk_loss.py [--noise 0 0.3 0.6] [--m 16] [--steps 400] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import Digits, load_digits

CLASSES = 100


def pairs(digits: Digits, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 128) of two digits and their numbers."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(digits.labels), (count, 2), generator=generator)
    labels = digits.labels[index]
    return digits.images[index].flatten(1), 10 * labels[:, 0] + labels[:, 1]


def losses(m: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    topk = pyloss.topk_cross_entropy
    both = [0.5, 0, 0, 0, 0.5]
    return {
        "cross entropy": F.cross_entropy,
        "k = 1 and 5": functools.partial(topk, p_k=both),
        "k = 5": functools.partial(topk, p_k=5),
        f"k = 1 and 5, m = {m}": functools.partial(topk, p_k=both, m=m),
        f"k = 5, m = {m}": functools.partial(topk, p_k=5, m=m),
    }


def train(
    loss_of: Callable, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], noise: float,
    seed: int, args: argparse.Namespace, progress: Progress,
) -> tuple[float, float]:  # fmt: skip
    """(top-1, top-5), per cent."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = data
    wrong = torch.rand(len(y), generator=generator) < noise
    y = torch.where(wrong, torch.randint(CLASSES, y.shape, generator=generator), y)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(args.steps):
        batch = torch.randint(len(x), (args.batch,), generator=generator)
        loss = loss_of(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    with torch.no_grad():
        right = model(test[0]).topk(5, 1).indices == test[1].unsqueeze(1)
    return tuple(100 * right[:, :k].any(1).float().mean().item() for k in (1, 5))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--noise", type=float, nargs="+", default=[0.0, 0.3, 0.6], help="share of labels replaced")
    add("--m", type=int, default=16, help="classes that take part in two of the top-k losses")
    add("--images", type=int, default=4000, help="of the training set")
    add("--test-images", type=int, default=2000)
    add("--steps", type=int, default=400)
    add("--batch", type=int, default=128)
    add("--rate", type=float, default=2e-3)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/topk_loss.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.noise, args.images, args.test_images, args.steps, args.batch = [0.0, 0.5], 40, 20, 2, 8
        args.seeds = 2
    torch.set_num_threads(args.threads)

    train_digits, test_digits = load_digits()
    data, test = pairs(train_digits, args.images, 0), pairs(test_digits, args.test_images, 1)
    rows = []
    top: list[dict[str, list[list[float]]]] = [{}, {}]  # top-1, top-5: by loss, seed and noise
    for name, loss_of in losses(args.m).items():
        found = [
            [
                train(loss_of, data, test, noise, seed, args,
                      Progress(f"{name}, noise {noise:g}, seed {seed}", args.steps))
                for noise in args.noise
            ]
            for seed in range(args.seeds)
        ]  # fmt: skip
        for i, lines in enumerate(top):
            lines[name] = [[point[i] for point in run] for run in found]
    for at, noise in enumerate(args.noise):
        for name in top[0]:
            cells = [spread([run[at] for run in lines[name]], 1, " %") for lines in top]
            rows.append([f"{noise:.0%} wrong, {name}", *cells])
    print(f"\n{args.test_images} held-out images, mean +- standard deviation of {args.seeds} seeds")
    print(table(["labels, loss", "top-1", "top-5"], rows))
    x = [100 * noise for noise in args.noise]
    panels = [
        Panel(title, "wrong labels, %", "held-out accuracy, %", x, lines)
        for title, lines in zip(("Top-1", "Top-5"), top, strict=True)
    ]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
