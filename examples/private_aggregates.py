"""Learning from private bags: responses are released as noisy means of bags of k.

After Learning from Aggregate Responses (2401.11081). Left, a linear model: the error of the least
squares between bag and instance loss beside the one that `aggregate_risk` foresees. Right, a small
network on curved data, trained with `aggregate_loss`. Both by the size of the bags, for a budget
epsilon: large bags have little noise, and are few.
Run: python examples/private_aggregates.py [--epsilon 1] [--rhos 0 0.2 1] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.aggregate import aggregate_risk, dp_aggregate, interpolated_least_squares
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.functional import aggregate_loss


def linear(k: int, rho: float, seed: int, args: argparse.Namespace) -> float:
    """||theta_hat - theta||^2 of one data set."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(args.n, args.d, generator=g, dtype=torch.float64)
    theta = torch.randn(args.d, generator=g, dtype=torch.float64)
    theta /= theta.norm()
    y = x @ theta + args.noise**0.5 * torch.randn(args.n, generator=g, dtype=torch.float64)
    released = dp_aggregate(y, None, args.epsilon, args.bound, g, bag_size=k)
    found = interpolated_least_squares(x, released, bag_size=k, rho=rho)
    return (found - theta).square().sum().item()


def curve(x: Tensor) -> Tensor:
    """In [-1, 1]."""
    return torch.sin(3 * x[:, 0]) * torch.cos(2 * x[:, 1])


def network(k: int, rho: float, seed: int, args: argparse.Namespace) -> float:
    """Mean squared error on held-out inputs of a network that has seen the released means."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, x_test = (torch.rand(n, 2, generator=g) * 2 - 1 for n in (args.samples, 1000))
    y = curve(x) + 0.1 * torch.randn(args.samples, generator=g)
    released = dp_aggregate(y, None, args.epsilon, 1.0, g, bag_size=k)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bags, size = args.samples // k, max(1, args.batch // k)
    rows = x.view(bags, k, 2)
    for _ in range(args.steps):
        at = torch.randint(bags, (size,), generator=g)
        loss = aggregate_loss(model(rows[at].view(-1, 2))[:, 0], released[at], bag_size=k, rho=rho)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (model(x_test)[:, 0] - curve(x_test)).square().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epsilon", type=float, default=1.0, help="privacy of a response")
    add("--rhos", type=float, nargs="+", default=[0.0, 0.2, 1.0])
    add("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24], help="of the bags")
    add("--n", type=int, default=960, help="responses of the linear model")
    add("--d", type=int, default=20, help="its features")
    add("--noise", type=float, default=0.25, help="variance of its responses")
    add("--bound", type=float, default=3.0, help="its responses are clipped to")
    add("--samples", type=int, default=4800, help="responses of the network")
    add("--batch", type=int, default=480, help="instances in a step")
    add("--steps", type=int, default=300)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/private_aggregates.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rhos, args.seeds = [1, 4], [0.0, 1.0], 2
        args.n, args.d, args.samples, args.steps, args.batch = 40, 3, 40, 2, 8
    torch.set_num_threads(args.threads)

    private, rows, left, right = dict(epsilon=args.epsilon, bound=args.bound), [], {}, {}
    progress = Progress("sizes and rhos", len(args.sizes) * len(args.rhos))
    for rho in args.rhos:
        errors, squares, foreseen = [], [], []
        for k in args.sizes:
            g = torch.Generator().manual_seed(0)
            risk = aggregate_risk(args.n, args.d, k, rho, args.noise, **private, generator=g)
            foreseen.append(risk.item())
            errors.append([linear(k, rho, seed, args) for seed in range(args.seeds)])
            squares.append([network(k, rho, seed, args) for seed in range(args.seeds)])
            cells = [spread(errors[-1], 2), f"{risk:.2f}", spread(squares[-1], 3)]
            rows.append([f"rho {rho:g}, bags of {k}", *cells])
            progress.update(len(rows))
        left[f"rho {rho:g}"] = list(zip(*errors, strict=True))
        left[f"rho {rho:g}, foreseen"] = [foreseen]
        right[f"rho {rho:g}"] = list(zip(*squares, strict=True))
    print(f"\nepsilon {args.epsilon:g}; mean +- standard deviation over {args.seeds} seeds")
    print(table(["", "linear: error", "foreseen", "network: test MSE"], rows))
    panels = [
        Panel("Linear model", "size of a bag", "squared error", args.sizes, left),
        Panel("Network", "size of a bag", "test MSE", args.sizes, right),
    ]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
