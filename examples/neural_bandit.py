"""Which of five arms: a neural bandit that explores by the gaps of its predictions.

Losses of 0 and 1 whose mean is no linear function of eight features. Where the best arms lose
little, NeuFastCB explores less than NeuSquareCB; beside chance, and beside the network's best guess
without any exploration.
Run: python examples/neural_bandit.py [--rounds 1500] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.research.bandits import NeuralBandit

ARMS, FEATURES, WIDTH = 5, 8, 64
LOSSES = {"small": (0.0, 1.0), "large": (0.35, 0.65)}  # means between these


def growing(t: int) -> float:
    return 10 * t**0.5


BANDITS = {
    "uniform": ("square", 0.0),
    "NeuSquareCB": ("square", growing),
    "NeuFastCB": ("fast", growing),
    "greedy": ("square", float("inf")),
}


def made(rounds: int, seed: int, low: float, high: float, generator) -> tuple[Tensor, Tensor]:
    """Features of the arms (T, K, D), and their mean losses (T, K)."""
    w, v = torch.randn(2, FEATURES, generator=generator)
    x = torch.randn(rounds, ARMS, FEATURES, generator=generator)
    mean = torch.sigmoid(4 * (x @ w / w.norm() + (x @ v / FEATURES**0.5).abs()))
    return x, low + (high - low) * mean


def regret(name: str, losses: str, rounds: int, seed: int) -> Tensor:
    """After each round, (T,)."""
    generator = torch.Generator().manual_seed(seed)
    x, means = made(rounds, seed, *LOSSES[losses], generator)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    bandit = NeuralBandit(net, *BANDITS[name], lr=0.05, generator=generator)
    progress = Progress(f"{losses} losses, {name}, seed {seed}", rounds)
    lost = []
    for t, (contexts, mean) in enumerate(zip(x, means), 1):
        arm = bandit.act(contexts)
        bandit.update(contexts, arm, torch.bernoulli(mean[arm], generator=generator))
        lost.append(mean[arm] - mean.min())
        progress.update(t)
    return torch.stack(lost).cumsum(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=1500)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/neural_bandit.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seeds = 24, 2
    torch.set_num_threads(args.threads)

    quarter = args.rounds // 4
    at = torch.linspace(1, args.rounds, min(args.rounds, 41)).long() - 1
    rows: list[list[str]] = []
    panels = []
    for losses, (low, high) in LOSSES.items():
        curves: dict[str, list[list[float]]] = {}
        for name in BANDITS:
            found = torch.stack(
                [regret(name, losses, args.rounds, seed) for seed in range(args.seeds)]
            )
            curves[name] = found[:, at].tolist()
            growth = found[:, -1] / found[:, quarter - 1].clamp(min=0.01)  # few rounds may lose 0
            rows.append([f"{losses} losses, {name}", spread(found[:, quarter - 1].tolist()),
                         spread(found[:, -1].tolist()), spread(growth.tolist(), 2)])  # fmt: skip
        title = f"losses of {low:g} to {high:g}"
        panels.append(Panel(title, "rounds", "regret", (at + 1).tolist(), curves))
    print(f"\nRegret, {ARMS} arms, {args.seeds} seeds")
    header = ["", f"T = {quarter}", f"T = {args.rounds}", "growth"]
    print(table(header, rows))
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
