"""What the temperature of a contrastive loss decides: uniformity against tolerance.

An encoder learns scikit-learn's digits without their labels by InfoNCE (nt_xent) at several
temperatures. Of the features of held-out digits we measure how evenly they lie on the sphere
(uniformity, the more negative the more even), how near digits of one class are to each other
(tolerance), how near two views of one image are (alignment), and how many of the other images share
the gradient (e to the power of the penalties' entropy); k-NN by the encoder's features says what
the features are worth.
Run: python examples/uniformity_tolerance.py [--temperatures 0.05 0.2 1] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pyloss
from pyloss.demo.digits import Encoder, Judge, moved
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits

COLUMNS = ("uniformity", "tolerance", "alignment", "negatives", "k-NN")
FORM = {"negatives": (0,), "k-NN": (1, " %")}  # digits and unit, where not two digits


def train(temperature: float, seed: int, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    images, model = load_digits()[0].images, Encoder()
    criterion = pyloss.nn.NTXentLoss(temperature)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps))
    progress = Progress(f"temperature {temperature:g}, seed {seed}", args.steps)
    for step in range(args.steps):
        batch = images[torch.randint(len(images), (args.batch,), generator=generator)]
        shown = torch.cat([moved(batch, generator) for _ in range(2)])
        loss = criterion(*model.head(model(shown)).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, temperature: float, seed: int, images: int | None) -> list[float]:
    """The numbers of COLUMNS, of held-out digits."""
    held = load_digits()[1]
    generator = torch.Generator().manual_seed(2000 + seed)
    views = [
        F.normalize(model.head(model(moved(held.images[:images], generator))), dim=1)
        for _ in range(2)
    ]
    labels = held.labels[:images]
    entropy = pyloss.metrics.penalty_entropy(*views, temperature=temperature)
    numbers = [
        pyloss.metrics.uniformity(views[0]),
        pyloss.metrics.tolerance(views[0], labels),
        pyloss.metrics.alignment(*views),
        entropy.exp(),
    ]
    return [float(number) for number in numbers] + [Judge(seed, images).knn(model.body)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--temperatures", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
    add("--steps", type=int, default=250)
    add("--batch", type=int, default=128, help="images, two views each")
    add("--rate", type=float, default=2e-3)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/uniformity_tolerance.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.seeds, args.temperatures = 2, 8, 2, [0.1, 1.0]
    torch.set_num_threads(args.threads)

    found: dict[str, list[list[float]]] = {name: [] for name in COLUMNS}  # by seed
    images = 40 if args.quick else None
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        runs = [measured(train(t, seed, args), t, seed, images) for t in args.temperatures]
        for name, values in zip(COLUMNS, zip(*runs)):
            found[name].append(list(values))
    rows = []
    for at, temperature in enumerate(args.temperatures):
        cells = [
            spread([one[at] for one in found[name]], *FORM.get(name, (2,))) for name in COLUMNS
        ]
        rows.append([f"{temperature:g}", *cells])
    print(f"\nheld-out digits, mean +- standard deviation over {args.seeds} seeds")
    print(table(["temperature", *COLUMNS], rows))
    x = args.temperatures
    print(draw(args.plot, [
        Panel("Uniformity", "temperature", "uniformity", x, {"InfoNCE": found["uniformity"]}),
        Panel("Tolerance", "temperature", "tolerance", x, {"InfoNCE": found["tolerance"]}),
        Panel("Worth", "temperature", "k-NN accuracy, %", x, {"InfoNCE": found["k-NN"]}),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
