"""The Z-loss and SphericalLinear beside cross entropy of a dense layer, by the number of classes.

Images of k of scikit-learn's digits side by side, of one of 10^k numbers; held-out images are of
digits that are in no training image. The last layer takes plain SGD, what is before it Adam. Then
the time of forward, backward and step of the last layer alone, with more classes than can be
learned here.
Run: python examples/z_loss.py [--digits 1 2 3] [--steps 400] [--classes 1000 10000] [--quick]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import Digits, load_digits

FEATURES = 64


class Dense(nn.Module):
    """What SphericalLinear stands in for: a weight, a loss of its scores, a step of SGD."""

    def __init__(self, classes: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, classes, bias=False)
        self.optimizer = torch.optim.SGD(self.linear.parameters())
        self.loss = loss

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(h), target)

    def step(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logits(self, h: Tensor) -> Tensor:
        return self.linear(h)


def heads(classes: int) -> dict[str, tuple[Callable[[], nn.Module], float]]:
    """The last layer and its rate. a and b of the second Z-loss grow with the classes: z is at most
    sqrt(classes - 1)."""
    z, layer = pyloss.functional.spherical_z_loss, pyloss.nn.SphericalLinear
    b = 3.0 if classes <= 10 else 8.0
    rate = 0.3 if classes <= 10 else 30.0
    return {
        "dense, cross entropy": (
            lambda: Dense(classes, F.cross_entropy),
            0.3 if classes <= 100 else 3.0,
        ),
        "dense, Z-loss": (lambda: Dense(classes, z), rate),
        "SphericalLinear, Z-loss": (lambda: layer(FEATURES, classes), rate),
        "SphericalLinear, Z-loss, a, b": (lambda: layer(FEATURES, classes, a=0.3, b=b), rate),
    }


def numbers(digits: Digits, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, length * 64) of that many digits, and the numbers that they are."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(digits.labels), (count, length), generator=generator)
    places = 10 ** torch.arange(length).flip(0)
    return digits.images[index].flatten(1), (digits.labels[index] * places).sum(1)


def train(
    make: Callable[[], nn.Module], lr: float, length: int, data: tuple[Digits, Digits], seed: int,
    args: argparse.Namespace, progress: Progress,
) -> float:  # fmt: skip
    """Held-out accuracy, per cent."""
    torch.manual_seed(seed)
    x, y = numbers(data[0], args.steps * args.batch, length, seed)
    test_x, test_y = numbers(data[1], args.test_images, length, 1000)
    hidden = (nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, FEATURES))
    model, head = nn.Sequential(*hidden, nn.LayerNorm(FEATURES)), make()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    for step in range(args.steps):
        left = 1 - step / args.steps
        optimizer.param_groups[0]["lr"] = args.rate * left
        batch = slice(step * args.batch, (step + 1) * args.batch)
        loss = head(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.step(lr * left)
        progress.update(step + 1, f"loss {loss.item():.3f}")
    with torch.no_grad():
        right = head.logits(model(test_x)).argmax(1) == test_y
    return 100 * right.float().mean().item()


def milliseconds(head: nn.Module, classes: int, rows: int, repeats: int) -> float:
    """Of the fastest of some steps of the last layer."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, FEATURES, generator=generator, requires_grad=True)
    y = torch.randint(classes, (rows,), generator=generator)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        head(h, y).backward()
        head.step(0.01)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--digits", type=int, nargs="+", default=[1, 2, 3], help="of a number")
    add("--classes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="of the times")
    add("--test-images", type=int, default=2000)
    add("--steps", type=int, default=400)
    add("--batch", type=int, default=128)
    add("--rows", type=int, default=32, help="of the times")
    add("--rate", type=float, default=2e-3, help="of what is before the last layer")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/z_loss.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.digits, args.classes, args.test_images = [1, 2], [100, 200], 20
        args.steps, args.batch, args.seeds = 2, 8, 2
    torch.set_num_threads(args.threads)

    data = load_digits()
    accuracy: dict[str, list[list[float]]] = {}
    for name in heads(10):
        accuracy[name] = [
            [
                train(*heads(10**length)[name], length, data, seed, args,
                      Progress(f"{name}, {10**length} classes, seed {seed}", args.steps))
                for length in args.digits
            ]
            for seed in range(args.seeds)
        ]  # fmt: skip
    rows = [
        [f"{10**length} classes, {name}", spread([run[at] for run in accuracy[name]], 1, " %")]
        for at, length in enumerate(args.digits)
        for name in accuracy
    ]
    print(f"\n{args.test_images} held-out images, mean +- standard deviation of {args.seeds} seeds")
    print(table(["classes, last layer", "accuracy"], rows))

    timed = ("dense, cross entropy", "dense, Z-loss", "SphericalLinear, Z-loss")
    times: dict[str, list[list[float]]] = {name: [[]] for name in timed}
    for classes in args.classes:
        made = heads(classes)
        for name in timed:
            repeats = 3 if classes > 10**5 else 10
            found = milliseconds(made[name][0](), classes, args.rows, repeats)
            times[name][0].append(found)
    rows = [
        [f"{classes}", *(f"{times[name][0][at]:.2f} ms" for name in timed)]
        for at, classes in enumerate(args.classes)
    ]
    print(
        f"\nforward, backward and step of the last layer, {args.rows} rows of {FEATURES} features"
    )
    print(table(["classes", *timed], rows))

    digits = [float(length) for length in args.digits]
    log_times = {
        name: [torch.tensor(run).log10().tolist() for run in runs] for name, runs in times.items()
    }
    log_classes = torch.tensor(args.classes, dtype=torch.float64).log10().tolist()
    panels = [
        Panel("Accuracy", "log10 of classes", "held-out accuracy, %", digits, accuracy),
        Panel(
            "A step of the last layer", "log10 of classes", "log10 of ms", log_classes, log_times
        ),
    ]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
