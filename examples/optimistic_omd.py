"""Between chance and adversary: the regret of optimistic mirror descent by noise and by drift.

f_t(x) = |x - c_t|^2 / 2 in the unit ball of five dimensions, the c_t with noise around a point
that stays (static regret), or around one that runs in a circle (dynamic regret);
beside online gradient descent with the same rule for its steps, that has no guess.
Run: python examples/optimistic_omd.py [--rounds 8000] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.research.online import (
    OptimisticOMD,
    dynamic_regret,
    path_length,
    project_ball,
    regret_exponent,
)

DIMENSIONS, D, G, L = 5, 2.0, 4.0, 1.0
DRIFT_NOISE = (0.0, 0.1)
METHODS = {
    "OOMD": dict(L=L),
    "OGD": None,
    "OOMD, strongly convex": dict(geometry="strongly_convex", mu=1.0),
    "OOMD, exp-concave": dict(geometry="exp_concave", alpha=1 / G**2),
}


def noisy(rounds: int, sigma: float, seed: int) -> Tensor:
    """Centres around a point within the ball: (T, d)."""
    generator = torch.Generator().manual_seed(seed)
    c = sigma * torch.randn(rounds, DIMENSIONS, generator=generator, dtype=torch.float64)
    c[:, 0] += 0.5
    return c


def circling(rounds: int, laps: float, sigma: float, seed: int) -> Tensor:
    """Centres of another point in each round: (T, d)."""
    angle = 2 * math.pi * laps * torch.linspace(0, 1, rounds, dtype=torch.float64)
    c = noisy(rounds, sigma, seed)
    c[:, 0] += 0.5 * angle.cos() - 0.5
    c[:, 1] += 0.5 * angle.sin()
    return c


def played(c: Tensor, options: dict | None, progress: Progress) -> Tensor:
    """The points that a method plays, (T, d); None: gradient descent without a guess."""
    x = torch.zeros(DIMENSIONS, dtype=torch.float64, requires_grad=True)
    optimizer = None if options is None else OptimisticOMD([x], D=D, G=G, **options)
    squares, points = 10 * (D * L) ** 2 + 4 * G**2, []
    for t, center in enumerate(c, 1):
        points.append(x.detach().clone())
        x.grad = points[-1] - center
        if optimizer is None:
            squares += float(x.grad.square().sum())
            x.data = project_ball(x.data - D / math.sqrt(squares) * x.grad)
        else:
            optimizer.step()
        progress.update(t)
    return torch.stack(points)


def to_the_best(points: Tensor, c: Tensor) -> Tensor:
    """Static regret to the point that is the best after each round; of squares it is known."""
    count = torch.arange(1, len(c) + 1)
    best = project_ball(c.cumsum(0) / count[:, None])
    least = c.square().sum(1).cumsum(0) / 2 - (best * c.cumsum(0)).sum(1)
    least += count * best.square().sum(1) / 2
    return (points - c).square().sum(1).cumsum(0) / 2 - least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=8000)
    add("--noise", type=float, nargs="+", default=[0.0, 1.0])
    add("--laps", type=float, nargs="+", default=[1.0, 4.0, 16.0], help="of the drift, in all")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/optimistic_omd.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.noise, args.laps, args.seeds = 32, [1.0], [1.0], 2
    torch.set_num_threads(args.threads)
    marks = torch.tensor([args.rounds // 16, args.rounds // 4, args.rounds])

    rows: list[list[str]] = []
    curves: dict[str, list[list[float]]] = {}
    at = torch.linspace(1, args.rounds, 33).long() - 1
    for sigma in args.noise:
        for name, options in METHODS.items():
            found = []
            for seed in range(args.seeds):
                c = noisy(args.rounds, sigma, seed)
                progress = Progress(f"{name}, noise {sigma:g}, seed {seed}", args.rounds)
                found.append(to_the_best(played(c, options, progress), c))
            regret = torch.stack(found)
            if sigma == max(args.noise):
                curves[name] = regret[:, at].tolist()
            powers = regret_exponent(marks, regret[:, marks - 1])
            rows.append([f"{name}, noise {sigma:g}",
                         *(spread(column.tolist(), 2) for column in regret[:, marks - 1].T),
                         spread(powers.tolist(), 2)])  # fmt: skip

    drift_rows: list[list[str]] = []
    drift: dict[str, list[list[float]]] = {}
    for sigma, name in itertools.product(DRIFT_NOISE, ("OOMD", "OGD")):
        runs = drift[f"{name}, noise {sigma:g}"] = [[] for _ in range(args.seeds)]
        for laps in args.laps:
            u = circling(args.rounds, laps, 0.0, 0)  # where the expected loss of each round is 0
            for seed in range(args.seeds):
                c = circling(args.rounds, laps, sigma, seed)
                progress = Progress(f"{name}, {laps:g} laps, seed {seed}", args.rounds)
                points = played(c, METHODS[name], progress)
                losses, least = ((x - c).square().sum(1) / 2 for x in (points, u))
                runs[seed].append(float(dynamic_regret(losses, least)[-1]))
            drift_rows.append([f"{name}, {laps:g} laps, noise {sigma:g}",
                               f"{float(path_length(u)[-1]):.1f}",
                               spread([run[-1] for run in runs], 2)])  # fmt: skip

    print(f"\nStatic regret, f_t = |x - c_t|^2 / 2, noise a coordinate, {args.seeds} seeds")
    header = ["method", *(f"T = {int(t)}" for t in marks), "power of T"]
    print(table(header, rows))
    print(f"\nDynamic regret after {args.rounds} rounds to a point that runs in a circle")
    print(table(["method", "path length", "regret"], drift_rows))
    panels = [
        Panel(f"noise {max(args.noise):g}", "rounds", "static regret", (at + 1).tolist(), curves),
        Panel("drift", "laps", "dynamic regret", args.laps, drift),
    ]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
