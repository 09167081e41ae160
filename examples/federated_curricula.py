"""Federated averaging with ordered samples: easy ones first, hard ones first, a random order.

Clients with shares of the classes from a Dirichlet distribution, on Gaussian classes that overlap.
A pacing lets each client use 20 % of its samples at first and all of them after 80 % of the rounds;
with a pacing of clients, the server likewise begins with half of the clients, in the same order.
Run: python examples/federated_curricula.py [--clients 20] [--rounds 30] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.research.curriculum import Pacing
from pyloss.research.federated import FederatedRun, dirichlet_split, simulate

ORDERS = ("curriculum", "anti", "random", "all samples")


def mixture(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ten Gaussian classes in 20 dimensions."""
    centers = torch.randn(10, 20, generator=generator)
    y = torch.randint(10, (n,), generator=generator)
    return centers[y] + 1.5 * torch.randn(n, 20, generator=generator), y


class Setting(NamedTuple):
    alpha: float
    select: bool = False  # whether clients are paced
    wrong: float = 0.0  # share of the clients' labels


def run(order: str, setting: Setting, seed: int, args, label: str) -> FederatedRun:
    alpha, select, wrong = setting
    generator = torch.Generator().manual_seed(seed)
    x, y = mixture(args.samples + 2000, generator)
    test = x[args.samples :], y[args.samples :]
    noisy = torch.rand(len(y), generator=generator) < wrong
    y = torch.where(noisy, torch.randint(10, y.shape, generator=generator), y)
    parts = dirichlet_split(
        y[: args.samples], args.clients, alpha, min_size=10, generator=generator
    )
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    progress = Progress(f"{label}, {order}, seed {seed}", args.rounds)
    return simulate(
        model, [(x[part], y[part]) for part in parts], test, rounds=args.rounds,
        clients_per_round=args.per_round, score=args.score, generator=generator,
        order="random" if order == "all samples" else order,
        pacing=None if order == "all samples" else Pacing("linear", 0.8, 0.2, args.rounds),
        client_pacing=Pacing("linear", 0.8, 0.5, args.rounds) if select else None,
        progress=lambda at, accuracy: progress.update(at, f"{100 * accuracy:.1f} %"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--clients", type=int, default=20)
    add("--per-round", type=int, default=4, help="clients that train in a round")
    add("--samples", type=int, default=4000, help="of all clients together")
    add("--rounds", type=int, default=30)
    add("--alpha", type=float, default=0.2, help="of the Dirichlet distribution")
    add("--wrong", type=float, default=0.3, help="share of wrong labels, in one column")
    add("--score", choices=("G", "L", "LG"), default="G", help="which model ranks the samples")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/federated_curricula.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.per_round, args.samples, args.rounds, args.seeds = 4, 2, 100, 2, 2
    torch.set_num_threads(args.threads)

    alpha = args.alpha
    settings = {
        f"alpha {alpha:g}": Setting(alpha),
        f"alpha {alpha:g}, clients paced": Setting(alpha, select=True),
        f"alpha {alpha:g}, {args.wrong:.0%} wrong labels": Setting(alpha, wrong=args.wrong),
        "alpha 100": Setting(100.0),
    }
    rows, panels = [[order] for order in ORDERS], []
    for label, setting in settings.items():
        curves: dict[str, list[list[float]]] = {}
        for row, order in zip(rows, ORDERS):
            runs = [run(order, setting, seed, args, label) for seed in range(args.seeds)]
            curves[order] = [(100 * found.accuracy).tolist() for found in runs]
            row.append(spread([sum(curve[-5:]) / len(curve[-5:]) for curve in curves[order]]))
        panels.append(
            Panel(label, "round", "accuracy of the global model, %",
                  range(1, args.rounds + 1), curves)
        )  # fmt: skip
    print(f"\nAccuracy in the last 5 of {args.rounds} rounds, %: {args.clients} clients, "
          f"{args.per_round} a round, score {args.score}")  # fmt: skip
    print(table(["", *settings], rows))
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
