"""An oscillator solved by a physics-informed network, in the order of time and all at once.

u'' + w^2 u = 0 with u(0) = 0, u'(0) = w. The residual of all times at once is small for many wrong
functions, such as those that fade to 0; causal weights open a time once those before it are solved.
The initial condition goes in as slice 0, as in the paper. The networks of all seeds train together.
Run: python examples/causal_pinn.py [--frequency 8] [--steps 4500] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.nn import CausalResidualLoss

END = 2.0
ERROR_POINTS = 401


class Networks(nn.Module):
    """One small network of t for each seed: all of them in one product."""

    def __init__(self, seeds: list[int], width: int, layers: int) -> None:
        super().__init__()
        sizes = [1, *[width] * layers, 1]
        made = []
        for seed in seeds:
            torch.manual_seed(seed)
            made.append([nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])])
        self.weights, self.biases = (
            nn.ParameterList(torch.stack(list(part)).detach() for part in parts)
            for parts in (
                zip(*([m.weight.T for m in net] for net in made)),
                zip(*([m.bias.unsqueeze(0) for m in net] for net in made)),
            )
        )

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, u' and u'' at the times t, each (seeds, N): derivatives go along with the values."""
        shape = (self.weights[0].shape[0], len(t), 1)
        u, first, second = (
            x.expand(shape) for x in (t.view(1, -1, 1), t.new_ones(1), t.new_zeros(1))
        )
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            u, first, second = torch.baddbmm(bias, u, weight), first @ weight, second @ weight
            if i + 1 < len(self.weights):
                u = torch.tanh(u)
                slope = 1 - u * u
                first, second = slope * first, slope * (second - 2 * u * first * first)
        return u.squeeze(-1), first.squeeze(-1), second.squeeze(-1)


def slices(networks: Networks, t: Tensor, frequency: float, ic_weight: float) -> Tensor:
    """Slice 0: the initial condition; then the squared residual at each time. (seeds, 1 + N)."""
    u, first, second = networks(torch.cat([t.new_zeros(1), t]))
    start = u[:, :1].square() + (first[:, :1] / frequency - 1).square()
    residual = second[:, 1:] / frequency**2 + u[:, 1:]
    return torch.cat([ic_weight * start, residual.square()], 1)


def errors(networks: Networks, frequency: float) -> list[float]:
    """Relative L2 error of each network."""
    t = torch.linspace(0, END, ERROR_POINTS)
    exact = torch.sin(frequency * t)
    with torch.no_grad():
        off = networks(t)[0] - exact
    return (off.norm(dim=1) / exact.norm()).tolist()


def train(
    causal: bool, seeds: list[int], args: argparse.Namespace, progress: Progress
) -> tuple[list[list[float]], list[float]]:
    """(error at each mark, last eps), of each seed."""
    networks = Networks(seeds, args.width, args.layers)
    criteria = [CausalResidualLoss(eps=args.eps, threshold=args.threshold) for _ in seeds]
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.decay)
    t = torch.linspace(0, END, args.slices)
    found = []
    for step in range(args.steps + 1):
        if step % (args.steps // args.marks) == 0:
            found.append(errors(networks, args.frequency))
        losses = slices(networks, t, args.frequency, args.ic_weight)
        if causal:
            loss = sum(criterion(row) for criterion, row in zip(criteria, losses))
            if step % 10 == 0:
                for criterion in criteria:
                    criterion.step()
        else:
            loss = losses.mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(min(step + 1, args.steps), f"loss {loss.item() / len(seeds):.1e}")
    return [list(runs) for runs in zip(*found)], [criterion.eps for criterion in criteria]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--frequency", type=float, default=8.0, help="w, on t in [0, 2]")
    add("--slices", type=int, default=96)
    add("--width", type=int, default=32)
    add("--layers", type=int, default=3)
    add("--steps", type=int, default=4500)
    add("--rate", type=float, default=5e-3)
    add("--decay", type=float, default=0.9997, help="of the rate, a step")
    add("--eps", type=float, nargs="+", default=[0.1, 1.0, 10.0, 100.0])
    add("--threshold", type=float, default=0.99, help="smallest weight for the next eps")
    add("--ic-weight", type=float, default=100.0)
    add("--marks", type=int, default=15, help="points of the plot")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/causal_pinn.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.slices, args.width, args.steps, args.marks, args.seeds = 8, 4, 4, 2, 2
    torch.set_num_threads(args.threads)
    seeds = list(range(args.seeds))
    rows, lines = [], {}
    for name in ("plain", "causal"):
        runs, eps = train(name == "causal", seeds, args, Progress(name, args.steps))
        lines[name] = runs
        last = [run[-1] for run in runs]
        at = ", ".join(f"{e:g}" for e in eps) if name == "causal" else "-"
        rows.append([name, spread(last, 3), f"{max(last):.3f}", at])
    print(f"\nw = {args.frequency:g}, mean +- standard deviation of {args.seeds} seeds")
    print(table(["loss", "relative L2 error", "worst", "eps reached"], rows))
    x = [args.steps // args.marks * k for k in range(args.marks + 1)]
    print(draw(args.plot, [Panel("u'' + w^2 u = 0", "steps", "relative L2 error", x, lines)]))


if __name__ == "__main__":
    main()
