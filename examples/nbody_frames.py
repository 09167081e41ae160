"""Five charged bodies in space: where they will be, by a network with frames and without.

The network sees all pairs of bodies and knows no symmetry. Plain; with the data turned anew in each
step; under nn.FrameAverage, whose answers move with the bodies exactly; the same with one drawn
frame for each cloud in a step.
Run: python examples/nbody_frames.py [--samples 200] [--seeds 3] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.demo.progress import table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.nn import FrameAverage

BODIES, TIME = 5, 1.0
NAMES = ("plain", "turned in each step", "FrameAverage", "FrameAverage, stochastic")


def acceleration(x: Tensor, charge: Tensor) -> Tensor:
    apart = x.unsqueeze(2) - x.unsqueeze(1)
    force = charge.unsqueeze(2) * charge.unsqueeze(1) / (apart.square().sum(3) + 0.1) ** 1.5
    return (force.unsqueeze(3) * apart).sum(2)


def trajectories(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions, velocities, charges, positions after TIME), by leapfrog."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, BODIES, 3, generator=generator)
    v = 0.5 * torch.randn(n, BODIES, 3, generator=generator)
    charge = 2.0 * torch.randint(2, (n, BODIES), generator=generator) - 1
    start, speed, step = x, v, 0.01
    for _ in range(round(TIME / step)):
        v = v + 0.5 * step * acceleration(x, charge)
        x = x + step * v
        v = v + 0.5 * step * acceleration(x, charge)
    return start, speed, charge, x


def turns(n: int) -> Tensor:
    """Orthogonal matrices, Haar, by torch's generator."""
    q, r = torch.linalg.qr(torch.randn(n, 3, 3))
    return q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


class Pairs(nn.Module):
    """Displacements of all bodies from messages between all pairs, coordinates as they are."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.message = nn.Sequential(
            nn.Linear(14, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.update = nn.Sequential(nn.Linear(hidden + 7, hidden), nn.SiLU(), nn.Linear(hidden, 3))

    def forward(self, x: Tensor, charge: Tensor, vectors: Tensor) -> Tensor:
        own = torch.cat([x, vectors, charge.unsqueeze(2)], 2)
        n = own.shape[1]
        pairs = torch.cat(
            [own.unsqueeze(2).expand(-1, -1, n, -1), own.unsqueeze(1).expand(-1, n, -1, -1)], 3
        )
        heard = self.message(pairs).sum(2)
        return x + TIME * vectors + self.update(torch.cat([own, heard], 2))


def error(model: nn.Module, data: tuple[Tensor, ...], moved: bool) -> float:
    """Mean squared error of a coordinate; `moved`: with the bodies elsewhere."""
    x, v, charge, end = data
    if moved:
        generator = torch.Generator().manual_seed(9)
        shift = 2 * torch.randn(len(x), 1, 3, generator=generator)
        x, end = x + shift, end + shift
    model.eval()
    with torch.no_grad():
        found = (model(x, charge, vectors=v) - end).square().mean().item()
    model.train()
    return found


def train(name: str, data: tuple[Tensor, ...], test: tuple[Tensor, ...], args, seed: int):
    """Curve of the error on new bodies, the error where they are moved, seconds of training."""
    torch.manual_seed(seed)
    net = Pairs()
    framed = name.startswith("Frame")
    model = (
        FrameAverage(net, "E", out_type="position", stochastic="stoch" in name) if framed else net
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    curve, seconds = [], 0.0
    for step in range(args.steps):
        start = time.perf_counter()
        pick = torch.randint(len(data[0]), (args.batch,))
        x, v, charge, end = (t[pick] for t in data)
        if name == NAMES[1]:
            g = turns(len(x))
            x, v, end = x @ g, v @ g, end @ g
        loss = (model(x, charge, vectors=v) - end).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if (step + 1) % args.every == 0:
            curve.append(error(model, test, moved=False))
    return curve, error(model, test, moved=True), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=int, default=200, help="trajectories to train on")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=50)
    add("--every", type=int, default=50, help="steps between two tests")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/nbody_frames.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.every, args.seeds = 4, 2, 2
    torch.set_num_threads(args.threads)

    test = trajectories(500, seed=1000)
    still = (test[0] + TIME * test[1] - test[3]).square().mean().item()
    print(f"{args.samples} trajectories, mean squared error; without forces {still:.3f}")
    runs = {
        name: [train(name, trajectories(args.samples, s), test, args, s) for s in range(args.seeds)]
        for name in NAMES
    }
    rows = [
        [name, spread([c[-1] for c, _, _ in all_], 4), spread([m for _, m, _ in all_], 4),
         spread([t for _, _, t in all_], 1)]
        for name, all_ in runs.items()
    ]  # fmt: skip
    print(table(["", "new bodies", "the same, moved", "seconds"], rows))
    steps = range(args.every, args.steps + 1, args.every)
    curves = {name: [c for c, _, _ in all_] for name, all_ in runs.items()}
    panel = Panel("five bodies", "steps", "mean squared error", [float(s) for s in steps], curves)
    print(draw(args.plot, [panel]))


if __name__ == "__main__":
    main()
