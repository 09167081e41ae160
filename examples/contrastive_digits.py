"""Frequent and rare digits without labels: InfoNCE, SogCLR and iSogCLR in small batches.

scikit-learn's digits, of which each class has fewer images than the one before, the most frequent
20 times as many as the rarest; which digit is how frequent, the seed says. Every step shows two
views of a few images. An encoder and a head are trained by InfoNCE (nt_xent), by SogCLR, whose
moving averages stand in for large batches, or by iSogCLR, which also learns a temperature for each
image. Then the head is left out, and the encoder's features of all images, frequent or not, are
classified. The second picture shows the temperatures that iSogCLR found.
Run: python examples/contrastive_digits.py [--batch 32] [--imbalance 20] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import pyloss
from pyloss.demo.digits import Encoder, Judge, moved
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits

UNTRAINED, LOSSES = "untrained encoder", ("InfoNCE", "SogCLR", "iSogCLR")


class LongTail:
    """Training images of which the class at place r has imbalance^(-r/9) times as many as the
    first; ``order`` are the digits from frequent to rare."""

    def __init__(self, seed: int, imbalance: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        digits = load_digits()[0]
        self.order = torch.randperm(10, generator=generator)
        most = int(digits.labels.bincount().min())
        kept = []
        for place, digit in enumerate(self.order):
            count = max(2, round(most * imbalance ** (-place / 9)))
            kept.append((digits.labels == digit).nonzero().squeeze(1)[:count])
        self.counts = [len(index) for index in kept]
        self.place = torch.repeat_interleave(torch.arange(10), torch.tensor(self.counts))
        self.images = digits.images[torch.cat(kept)]


def loss_of(name: str, samples: int, args: argparse.Namespace) -> nn.Module:
    if name == "InfoNCE":
        return pyloss.nn.NTXentLoss(args.temperature)
    if name == "SogCLR":
        return pyloss.nn.SogCLRLoss(samples, args.temperature, gamma=args.gamma)
    return pyloss.nn.ISogCLRLoss(
        samples, args.temperature, rho=args.rho, eta=args.eta, gamma=args.gamma
    )


def train(name: str, seed: int, data: LongTail, judge: Judge, args: argparse.Namespace) -> tuple:
    """(the encoder's body, k-NN accuracy at every measurement, the loss)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model, criterion = Encoder(), loss_of(name, len(data.images), args)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps))
    progress, found = Progress(f"{name}, seed {seed}", args.steps), []
    queue = torch.empty(0, dtype=torch.int64)
    for step in range(args.steps):
        if len(queue) < args.batch:  # each epoch shows each image once
            queue = torch.randperm(len(data.images), generator=generator)
        index, queue = queue[: args.batch], queue[args.batch :]
        shown = torch.cat([moved(data.images[index], generator) for _ in range(2)])
        views = model.head(model(shown)).chunk(2)
        loss = criterion(*views) if name == "InfoNCE" else criterion(*views, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            found.append(judge.knn(model.body))
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return model.body, found, criterion


def temperatures_of(criterion: nn.Module, data: LongTail) -> list[float]:
    """The mean of each class, from frequent to rare."""
    each = criterion.temperature_of(torch.arange(len(data.images)))
    return [each[data.place == place].mean().item() for place in range(10)]


def scores_of(body: nn.Module, judge: Judge, order: Tensor) -> tuple[float, float, float]:
    return judge.knn(body), judge.knn(body, order[5:]), judge.linear(body)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--imbalance", type=float, default=20.0, help="images of the first class over the last's")
    add("--temperature", type=float, default=0.2, help="of iSogCLR: at the beginning")
    add("--gamma", type=float, default=0.9, help="weight of a batch in the averages")
    add("--rho", type=float, default=0.3, help="of iSogCLR")
    add("--eta", type=float, default=0.01, help="step of iSogCLR's temperatures")
    add("--steps", type=int, default=900)
    add("--batch", type=int, default=32, help="images, two views each")
    add("--rate", type=float, default=2e-3)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--every", type=int, default=150, help="steps between measurements")
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/contrastive_digits.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.seeds = 2, 8, 2
    torch.set_num_threads(args.threads)

    scores: dict[str, list] = {name: [] for name in (UNTRAINED, *LOSSES)}
    curves: dict = {name: [] for name in LOSSES}
    temperatures = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        data, judge = LongTail(seed, args.imbalance), Judge(seed, 40 if args.quick else None)
        torch.manual_seed(seed)
        scores[UNTRAINED].append(scores_of(Encoder().body, judge, data.order))
        for name in LOSSES:
            body, curve, criterion = train(name, seed, data, judge, args)
            curves[name].append(curve)
            scores[name].append(scores_of(body, judge, data.order))
        temperatures.append(temperatures_of(criterion, data))
    rows = [
        [name, *(spread([one[i] for one in found], 1, " %") for i in range(3))]
        for name, found in scores.items()
    ]
    print(f"\nheld-out digits, mean +- standard deviation over {args.seeds} seeds")
    print(table(["features", "k-NN", "k-NN of the rarer five", "linear"], rows))
    rows = [
        [str(count), spread([one[place] for one in temperatures], 3)]
        for place, count in enumerate(data.counts)
    ]
    print("\ntemperatures of iSogCLR by images of the class, mean +- standard deviation over seeds")
    print(table(["images", "temperature"], rows))
    x = [min(args.steps, (i + 1) * args.every) for i in range(len(curves["InfoNCE"][0]))]
    curves[UNTRAINED] = sum(one[0] for one in scores[UNTRAINED]) / args.seeds
    print(draw(args.plot, [
        Panel("Long-tailed digits without labels", "step", "k-NN accuracy, %", x, curves),
        Panel("Temperatures", "images of the class", "temperature", data.counts,
              {"iSogCLR": temperatures, "at the beginning": args.temperature}),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
