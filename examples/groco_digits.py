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
from pathlib import Path

import torch
from torch import nn

import pyloss
from pyloss.demo.digits import Encoder, Judge, moved
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits

PIXELS, UNTRAINED, LOSSES = "pixels", "untrained encoder", ("InfoNCE", "GroCo")


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
            loss = pyloss.nt_xent(*views, temperature=args.temperature)
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
