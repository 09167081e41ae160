"""Digits with wrong labels: robust losses beside cross entropy.

A share of the training labels of scikit-learn's digits is replaced by labels drawn evenly from all
classes. A small network is trained on them by cross entropy, two more of the comp-sum family
(generalized cross entropy, mean absolute error), LDR-KL and ALDR-KL, and judged on clean digits.
Run: python examples/label_noise.py [--epochs 40] [--seeds 3] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread

# name: (loss, learning rate)
LOSSES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "cross entropy": (pyloss.CrossEntropyLoss, 0.1),
    "GCE, q = 0.7": (lambda: pyloss.GeneralizedCrossEntropyLoss(0.7), 0.1),
    "MAE": (lambda: pyloss.CompSumLoss(2.0), 0.1),
    "LDR, lam = 10": (lambda: pyloss.LDRLoss(10.0, 0.1), 0.1),
    "ALDR, lam0 = 1": (lambda: pyloss.ALDRLoss(1.0, margin=0.1), 0.1),
    "ALDR, lam0 = 10": (lambda: pyloss.ALDRLoss(10.0, margin=0.1), 0.5),
}
NOISE = (0.0, 0.2, 0.4, 0.6)


class Digits:
    """Standardised images, split by the seed; the training labels of one share are wrong."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.data).float()
        images = (images - images.mean(0)) / (images.std(0) + 1e-3)
        labels = torch.from_numpy(data.target).long()
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=self.generator)
        train, test = order[360:], order[:360]
        self.images, self.labels = images[train], labels[train]
        self.test_images, self.test_labels = images[test], labels[test]

    def noisy(self, share: float) -> Tensor:
        wrong = torch.rand(len(self.labels), generator=self.generator) < share
        drawn = torch.randint(10, self.labels.shape, generator=self.generator)
        return torch.where(wrong, drawn, self.labels)


def train(name: str, data: Digits, labels: Tensor, seed: int, epochs: int = 40) -> float:
    """The accuracy on clean digits, in percent."""
    torch.manual_seed(seed)
    make, rate = LOSSES[name]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    criterion = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            criterion(model(data.images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        found = model(data.test_images).argmax(1)
    return 100 * (found == data.test_labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=40)
    add("--seeds", type=int, default=3)
    add("--quick", action="store_true", help="seconds, and no result to speak of")
    add("--plot", type=Path, default=Path("demo_out/label_noise.png"))
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds = 1, 2
    shares = NOISE[::3] if args.quick else NOISE
    found: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    progress = Progress("training", args.seeds * len(LOSSES))
    for seed in range(args.seeds):
        data = Digits(seed)
        noisy = [data.noisy(share) for share in shares]
        for name in LOSSES:
            found[name].append([train(name, data, y, seed, args.epochs) for y in noisy])
            progress.update(sum(map(len, found.values())), name)
    columns = {name: list(zip(*runs, strict=True)) for name, runs in found.items()}
    print(f"\n360 held-out images, accuracy in %, mean +- deviation of {args.seeds} seeds")
    print(table(
        ["loss", *(f"{100 * share:.0f} % drawn" for share in shares)],
        [[name, *(spread(list(c), 1) for c in columns[name])] for name in LOSSES],
    ))  # fmt: skip
    x = [100 * share for share in shares]
    print(draw(args.plot, [
        Panel("Digits with wrong labels", "labels drawn at random, %", "accuracy, %", x, found)
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
