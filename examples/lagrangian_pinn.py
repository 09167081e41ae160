"""Fast convection by a network of fixed points and by one whose points move with the flow.

u_t + c u_x = 0 with u(x, 0) = sin x, periodic: the wave moves, and after t = 1 has gone c / 2 pi
times around. A plain network looks for u(x, t); a Lagrangian one for u(X, t) along the
characteristics x(X, t), where nothing changes. Both have the same budget of steps.
Run: python examples/lagrangian_pinn.py [--speed 30] [--steps 1000] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import lagrangian_residual_loss
from pyloss.nn import LagrangianPINN

PERIOD = 2 * math.pi


def network(width: int, layers: int) -> nn.Sequential:
    sizes = [3, *[width] * layers, 1]
    parts: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        parts += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


class Eulerian(nn.Module):
    """u(x, t) at points that do not move: the plain network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.stack([x.cos(), x.sin(), t], -1)).squeeze(-1)


def plain_loss(model: Eulerian, x: Tensor, t: Tensor, speed: float) -> Tensor:
    u, pull = torch.func.vjp(model, x, t)
    by_x, by_t = pull(torch.ones_like(u))
    start = model(x, torch.zeros_like(t)) - torch.sin(x)
    return (by_t + speed * by_x).square().mean() + 1000 * start.square().mean()


def error(model: nn.Module, speed: float) -> float:
    """Relative L2 error at t = 1, at the points that the model itself has there."""
    x = torch.linspace(0, PERIOD, 257)[:-1]
    t = torch.ones_like(x)
    with torch.no_grad():
        found = model(x, t)
    u, x = found if isinstance(found, tuple) else (found, x)
    exact = torch.sin(x - speed * t)
    return ((u - exact).norm() / exact.norm()).item()


def train(
    name: str, seed: int, args: argparse.Namespace, progress: Progress
) -> tuple[list[float], float]:
    """(error at each mark, final loss)."""
    torch.manual_seed(seed)
    speed = args.speed
    if name == "plain":
        model: nn.Module = Eulerian(network(args.width, args.layers))
    else:
        u_net, x_net = network(args.width, args.layers), network(args.width, 1)
        model = LagrangianPINN(u_net, x_net, velocity_scale=speed, period=PERIOD)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.steps)
    found = []
    for step in range(args.steps + 1):
        if step % (args.steps // args.marks) == 0:
            found.append(error(model, speed))
        x, t = PERIOD * torch.rand(args.points), torch.rand(args.points)
        if name == "plain":
            loss = plain_loss(model, x, t, speed)
        else:
            loss = lagrangian_residual_loss(model, x, t, velocity=speed, u0=torch.sin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(min(step + 1, args.steps), f"loss {loss.item():.1e}")
    return found, loss.item()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--speed", type=float, default=30.0)
    add("--points", type=int, default=256, help="new ones in each step")
    add("--width", type=int, default=32)
    add("--layers", type=int, default=3)
    add("--steps", type=int, default=1000)
    add("--rate", type=float, default=5e-3)
    add("--marks", type=int, default=10, help="points of the plot")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/lagrangian_pinn.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.points, args.width, args.steps, args.marks, args.seeds = 8, 4, 4, 2, 2
    torch.set_num_threads(args.threads)
    rows, lines = [], {}
    for name in ("plain", "Lagrangian"):
        runs = [
            train(name, seed, args, Progress(f"{name}, seed {seed}", args.steps))
            for seed in range(args.seeds)
        ]
        lines[name] = [errors for errors, _ in runs]
        last = [errors[-1] for errors, _ in runs]
        rows.append([name, spread(last, 3), f"{max(last):.3f}"])
    print(f"\nspeed {args.speed:g}, t = 1, mean +- standard deviation of {args.seeds} seeds")
    print(table(["network", "relative L2 error", "worst"], rows))
    x = [args.steps // args.marks * k for k in range(args.marks + 1)]
    print(draw(args.plot, [Panel("u_t + c u_x = 0", "steps", "relative L2 error", x, lines)]))


if __name__ == "__main__":
    main()
