"""Lion-K: which ball each K ends in, the Lyapunov function on the way, and digits beside AdamW.

First, points of the plane are drawn towards targets that lie far outside: weight decay 1 stops each
at the edge of a ball whose shape is that of K. Second, a quadratic in eight dimensions: H falls in
every step, the loss need not. Third, a classifier of scikit-learn's digits by AdamW and by members
of the family, each at the best of its rates.
Run: python examples/lion_k.py [--steps 300] [--seeds 3] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import spread
from pyloss.demo.sorting import load_digits
from pyloss.optim import Lion, LionK, LyapunovMonitor

# name: (kappa, its arguments, norm of x that the constraint bounds by 1)
BALLS = {
    "l1 (Lion)": ("l1", {}, math.inf),
    "lp, p = 2": ("lp", dict(p=2.0), 2.0),
    "lp, p = 1.5": ("lp", dict(p=1.5), 3.0),
    "lp, p = 4": ("lp", dict(p=4.0), 4 / 3),
    "topk, k = 1": ("topk", dict(k=1), 1.0),
}
Make = Callable[[Any, float], torch.optim.Optimizer]
OPTIMISERS: dict[str, tuple[Make, list[float]]] = {
    "AdamW": (
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1, fused=True),
        [3e-3, 1e-2, 3e-2],
    ),
    "Lion": (lambda p, lr: Lion(p, lr, weight_decay=1.0), [1e-3, 3e-3, 1e-2]),
    "Lion-K, smooth": (
        lambda p, lr: LionK(p, lr, weight_decay=1.0, kappa="smooth", kappa_args=dict(e=1e-3)),
        [1e-3, 3e-3, 1e-2],
    ),
    "Lion-K, lp 2, rows": (
        lambda p, lr: LionK(p, lr, weight_decay=0.1, kappa="lp", kappa_args=dict(p=2), group="row"),
        [1e-2, 3e-2, 1e-1],
    ),
}


def ends(kappa: str, kappa_args: dict, targets: Tensor, steps: int) -> Tensor:
    """Where the points stop: each row is a problem of its own."""
    x = nn.Parameter(torch.zeros_like(targets))
    optimizer = LionK([x], weight_decay=1.0, kappa=kappa, kappa_args=kappa_args, group="row")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 * 1e-5 ** (step / steps)
        x.grad = x.detach() - targets  # of half the squared distance
        optimizer.step()
    return x.detach()


def constraints(steps: int) -> tuple[dict[str, Tensor], str]:
    """(end points by K, table)."""
    angle = torch.linspace(0, 2 * math.pi, 121, dtype=torch.float64)
    targets = 3 * torch.stack([angle.cos(), angle.sin()], 1)
    found, rows = {}, []
    for name, (kappa, args, norm) in BALLS.items():
        found[name] = ends(kappa, args, targets, steps)
        sizes = torch.linalg.vector_norm(found[name], norm, dim=1)
        rows.append([name, f"{norm:.3g}", f"{sizes.amin():.5f}", f"{sizes.amax():.5f}"])
    head = ["K", "norm", "smallest at the end", "largest"]
    return found, table(head, rows)


def lyapunov(steps: int) -> list[pyloss.optim.LionKLyapunov]:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(8, 8, generator=g, dtype=torch.float64)
    a, b = 20 * a @ a.T / 8, 3 * torch.randn(8, generator=g, dtype=torch.float64)
    x = nn.Parameter(2 * torch.rand(8, generator=g, dtype=torch.float64) - 1)  # inside
    optimizer = Lion([x], lr=0.003, weight_decay=1.0, betas=(0.95, 0.99))
    monitor = LyapunovMonitor(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * x @ a @ x - b @ x
        loss.backward()
        monitor.record(loss)
        optimizer.step()
    return monitor.records


def train(make: Make, rate: float, seed: int, args: argparse.Namespace) -> float:
    """Accuracy on held-out digits, per cent."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    part, held = load_digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = make(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    for _ in range(args.steps):
        batch = torch.randint(len(part.labels), (args.batch,), generator=generator)
        loss = F.cross_entropy(model(part.images[batch].flatten(1)), part.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = model(held.images.flatten(1)).argmax(1) == held.labels
    return 100 * right.float().mean().item()


def draw(path: Path, points: dict[str, Tensor], records: list, accuracies: dict) -> str:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    figure = Figure(figsize=(13.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name, x in points.items():
        left.plot(*x.T.tolist(), ".-", markersize=3, linewidth=0.8, label=name)
    left.set(title="Where the points stop, weight decay 1", aspect="equal")
    left.legend(fontsize=7, loc="center")
    pyloss.visualize.draw_lyapunov(records, middle)
    middle.set(title="Lyapunov function of Lion, inside of the box")
    for name, (rates, means, _) in accuracies.items():
        right.plot(rates, means, "o-", linewidth=1.4, label=name)
    right.set(title="Digits", xlabel="rate", xscale="log", ylabel="held-out accuracy, %")
    right.legend(fontsize=7)
    for axes in (left, middle, right):
        axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return f"Plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of the classifier")
    add("--batch", type=int, default=64)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/lion_k.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.seeds = 3, 16, 2
    torch.set_num_threads(args.threads)

    points, text = constraints(60 if args.quick else 1000)
    print(text)
    records = lyapunov(20 if args.quick else 400)
    pairs = list(zip(records, records[1:]))
    rises = [sum(bool(getattr(b, k) > getattr(a, k) + 1e-9) for a, b in pairs)
             for k in ("H", "composite")]  # fmt: skip
    print(f"\nH from {records[0].H:.3f} to {records[-1].H:.3f}: it rose in {rises[0]} of "
          f"{len(pairs)} steps, the loss in {rises[1]}")  # fmt: skip
    accuracies, rows = {}, []
    for name, (make, rates) in OPTIMISERS.items():
        progress = Progress(name, len(rates) * args.seeds)
        runs = []
        for at, rate in enumerate(rates):
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            runs.append([train(make, rate, seed, args) for seed in seeds])
            progress.update((at + 1) * args.seeds, f"rate {rate:g}")
        means = [sum(run) / len(run) for run in runs]
        best = max(range(len(rates)), key=means.__getitem__)
        accuracies[name] = rates, means, runs
        buffers = "2" if name == "AdamW" else "1"
        rows.append([name, f"{rates[best]:g}", spread(runs[best], 2, " %"), buffers])
    print(f"\nheld-out digits at the best rate, mean +- standard deviation over {args.seeds} seeds")
    print(table(["optimiser", "rate", "accuracy", "buffers"], rows))
    print(draw(args.plot, points, records, accuracies))


if __name__ == "__main__":
    main()
