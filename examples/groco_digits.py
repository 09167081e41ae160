"""Digits without labels: GroCo beside InfoNCE, judged by k-NN and linear classifiers.

scikit-learn's digits, of which every step shows two views, turned, moved, scaled and with noise. An
encoder and a head are trained by the group ordering loss of pyloss or by InfoNCE with the same
views, first weights and steps; then the head is left out and the encoder's features are classified.
All images, those with labels and the held-out ones, are moved once like a view, without which a
pixel by itself says nearly all; the pixels and the encoder as it was made stand beside.
Run: python examples/groco_digits.py [--topk-neg 10] [--steepness 10] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits

PIXELS, UNTRAINED, LOSSES = "pixels", "untrained encoder", ("InfoNCE", "GroCo")


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, 8, 8), each turned by up to 25 degrees, moved by a pixel, scaled, with noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, scale = uniform(-0.45, 0.45), uniform(0.85, 1.15)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [cos, -sin, uniform(-0.25, 0.25), sin, cos, uniform(-0.25, 0.25)]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, 8, 8], align_corners=False
    )
    shown = F.grid_sample(images.unsqueeze(1), grid, align_corners=False)
    return shown + 0.1 * torch.randn(shown.shape, generator=generator)


def info_nce(views: list[Tensor], temperature: float) -> Tensor:
    """NT-Xent: of a view, the other one of its image among all other views of the batch."""
    z = F.normalize(torch.cat(views), dim=1)
    scores = (z @ z.t() / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z) // 2))


class Encoder(nn.Module):
    """Features (N, 128) of images; `head` is for the training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 128),
        )  # fmt: skip
        # As the paper has it; without the normalisation GroCo lets all features become one.
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


class Judge:
    """Accuracies of features, per cent, on images that are moved once and for all."""

    def __init__(self, seed: int, images: int | None) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.parts = [
            (moved(part.images[:images], generator), part.labels[:images]) for part in load_digits()
        ]

    @torch.no_grad()
    def knn(self, features: nn.Module) -> float:
        """Five nearest by cosine."""
        (x, y), (test, truth) = [
            (F.normalize(features(images), dim=1), labels) for images, labels in self.parts
        ]
        votes = F.one_hot(y[(test @ x.t()).topk(min(5, len(x)), 1).indices], 10).sum(1)
        return 100 * (votes.argmax(1) == truth).float().mean().item()

    @torch.no_grad()
    def linear(self, features: nn.Module) -> float:
        """Logistic regression on features of mean 0 and variance 1."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        (x, y), (test, truth) = [(features(a).numpy(), labels.numpy()) for a, labels in self.parts]
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        return 100 * float(classifier.fit(x, y).score(test, truth))


def train(name: str, seed: int, judge: Judge, args: argparse.Namespace) -> tuple:
    """(the encoder's body, k-NN accuracy at every measurement)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    images, model = load_digits()[0].images, Encoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps))
    progress, found = Progress(f"{name}, seed {seed}", args.steps), []
    for step in range(args.steps):
        batch = images[torch.randint(len(images), (args.batch,), generator=generator)]
        shown = torch.cat([moved(batch, generator) for _ in range(2)])
        views = list(model.head(model(shown)).chunk(2))
        if name == "GroCo":
            loss = pyloss.groco_loss(views, topk_neg=args.topk_neg, steepness=args.steepness)
        else:
            loss = info_nce(views, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            found.append(judge.knn(model.body))
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return model.body, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--topk-neg", type=int, default=10, help="nearest negatives of GroCo")
    add("--steepness", type=float, default=10.0, help="of GroCo's sorting network")
    add("--temperature", type=float, default=0.2, help="of InfoNCE")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=256, help="images, two views each")
    add("--rate", type=float, default=2e-3)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--every", type=int, default=50, help="steps between measurements")
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/groco_digits.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.seeds, args.topk_neg = 2, 8, 2, 3
    torch.set_num_threads(args.threads)

    scores: dict[str, list[tuple[float, float]]] = {
        name: [] for name in (PIXELS, UNTRAINED, *LOSSES)
    }
    curves: dict = {name: [] for name in LOSSES}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        judge = Judge(seed, 40 if args.quick else None)
        torch.manual_seed(seed)
        bodies = {PIXELS: nn.Flatten(), UNTRAINED: Encoder().body}
        for name in LOSSES:
            bodies[name], curve = train(name, seed, judge, args)
            curves[name].append(curve)
        for name, body in bodies.items():
            scores[name].append((judge.knn(body), judge.linear(body)))
    rows = [
        [name, *(spread([pair[i] for pair in found], 1, " %") for i in (0, 1))]
        for name, found in scores.items()
    ]
    print(f"\nheld-out digits, mean +- standard deviation over {args.seeds} seeds")
    print(table(["features", "k-NN", "linear"], rows))
    x = [min(args.steps, (i + 1) * args.every) for i in range(len(curves["GroCo"][0]))]
    for name in (PIXELS, UNTRAINED):
        curves[name] = sum(pair[0] for pair in scores[name]) / args.seeds
    print(draw(args.plot, [Panel("Digits without labels", "step", "k-NN accuracy, %", x, curves)]))


if __name__ == "__main__":
    main()
