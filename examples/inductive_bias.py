"""How much information architectures and kernels must bring along, by the task.

Hypotheses that fit a small training set: networks trained from random weights, and draws of
Gaussian processes. How rare are those whose test error is below a tenth of the variance of the
targets? That many nats of inductive bias are missing in the model.
Run: python examples/inductive_bias.py [--starts 48] [--steps 200] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pyloss.analysis import gp_inductive_bias, inductive_bias
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import spread

F64 = torch.float64
TASKS = ("smooth", "waves", "parts")
METHODS = ("draws, counted", "saddlepoint", "draws, fitted")


def task(name: str, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y, x_test, y_test) in two dimensions, targets of mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n + 60, 2, generator=generator, dtype=F64) - 1
    a, b = x.unbind(1)
    y = {"smooth": a + a * b, "waves": (6 * a).sin(), "parts": a.sign() * b.sign()}[name]
    y = y / y.square().mean().sqrt()
    return x[:n], y[:n], x[n:], y[n:]


def losses_of(kind: str, data, args, seed: int) -> tuple[Tensor, float]:
    """Test errors of networks that were trained from different weights, all in one batch, and the
    mean of their training errors."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test = data
    layers = []
    for rows, columns in ((2, args.width), (args.width, args.width), (args.width, 1)):
        gain = math.sqrt((2 if kind == "ReLU" else 1) / rows)
        weight = torch.randn(args.starts, rows, columns, generator=generator, dtype=F64)
        bias = torch.randn(args.starts, 1, columns, generator=generator, dtype=F64)
        layers.append((nn.Parameter(gain * weight), nn.Parameter(0.5 * bias)))

    def run(h: Tensor) -> Tensor:
        for weight, bias in layers[:-1]:
            h = ACTIVATIONS[kind](h @ weight + bias)
        return (h @ layers[-1][0] + layers[-1][1]).squeeze(2)

    optimizer = torch.optim.Adam([p for layer in layers for p in layer], lr=5e-3)
    for _ in range(args.steps):
        errors = (run(x) - y).square().mean(1)
        optimizer.zero_grad()
        errors.sum().backward()  # each network has its own gradient
        optimizer.step()
    with torch.no_grad():
        return (run(x_test) - y_test).square().mean(1), float(errors.detach().mean())


def rbf(length: float):
    return lambda a, b: torch.exp(-torch.cdist(a, b).square() / (2 * length**2))


def matern(a: Tensor, b: Tensor) -> Tensor:
    far = math.sqrt(3) * torch.cdist(a, b) / 0.5
    return (1 + far) * torch.exp(-far)


def exponential(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(a, b))


KERNELS = {"RBF kernel": rbf(0.4), "Matern 3/2 kernel": matern, "exponential kernel": exponential}
ACTIVATIONS = {"ReLU": torch.relu, "tanh": torch.tanh, "sine": lambda h: (3 * h).sin()}


def tails(samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The lower tail for one Gaussian process: draws, the saddlepoint, the fit to draws."""
    data = task("waves", 20, 0)
    kernel = rbf(0.5)
    generator = torch.Generator().manual_seed(0)
    target = torch.logspace(-2, 0.5, 60, dtype=F64)
    exact = gp_inductive_bias(*data, kernel, target, jitter=1e-6).nats
    fitted, counted = (
        gp_inductive_bias(*data, kernel, target, method="ncx2", samples=samples, jitter=1e-6,
                          generator=generator).nats,
        inductive_bias(gp_draws(data, kernel, samples, generator), target, method="empirical").nats,
    )  # fmt: skip
    return target, dict(zip(METHODS, (counted, exact, fitted)))


def gp_draws(data, kernel, samples: int, generator: torch.Generator) -> Tensor:
    x, y, x_test, y_test = data
    inner = kernel(x, x) + 1e-6 * torch.eye(len(x), dtype=F64)
    cross = kernel(x_test, x)
    mean = cross @ torch.linalg.solve(inner, y)
    covariance = kernel(x_test, x_test) - cross @ torch.linalg.solve(inner, cross.T)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    z = torch.randn(samples, len(x_test), generator=generator, dtype=F64)
    return (z @ root.T + mean - y_test).square().mean(1)


def plot(path: Path, tail, curves: dict[str, dict[str, Tensor]], target: Tensor) -> str:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    from pyloss.visualize import draw_inductive_bias

    figure = Figure(figsize=(4.4 * (1 + len(curves)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, 1 + len(curves))
    draw_inductive_bias(*tail, first).set_title("tails of a Gaussian process")
    for (name, lines), ax in zip(curves.items(), others, strict=True):
        draw_inductive_bias(target, lines, ax).set(title=f"task: {name}", ylim=(-1, 60))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return f"Plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=int, default=20, help="in the training set")
    add("--target", type=float, default=0.1, help="test error that is wanted")
    add("--starts", type=int, default=48, help="networks trained of each kind")
    add("--width", type=int, default=32)
    add("--steps", type=int, default=300)
    add("--draws", type=int, default=20000, help="of the Gaussian process whose tail is drawn")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/inductive_bias.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    tasks = TASKS
    if args.quick:
        args.starts, args.steps, args.seeds, args.draws, tasks = 8, 2, 2, 500, TASKS[:1]
    torch.set_num_threads(args.threads)

    targets = torch.cat([torch.tensor([args.target], dtype=F64), torch.logspace(-2, 1, 40)])
    nats = {(kind, name): [] for kind in (*KERNELS, *ACTIVATIONS) for name in tasks}
    progress = Progress("networks", len(tasks) * len(ACTIVATIONS) * args.seeds)
    done = 0
    for name in tasks:
        for seed in range(args.seeds):
            data = task(name, args.samples, seed)
            for kind, kernel in KERNELS.items():
                found = gp_inductive_bias(*data, kernel, targets, jitter=1e-6)
                nats[kind, name].append(found.nats)
            for kind in ACTIVATIONS:
                done += 1
                losses, fit = losses_of(kind, data, args, seed)
                progress.update(done, f"{kind}, {name}, seed {seed}: train {fit:.4f}")
                nats[kind, name].append(inductive_bias(losses, targets).nats)
    rows = [
        [kind, *(spread([float(v[0]) for v in nats[kind, name]], 1) for name in tasks)]
        for kind in (*KERNELS, *ACTIVATIONS)
    ]
    print(f"\n{args.samples} samples, nats for a test error of {args.target:g}; variance 1")
    print(table(["", *tasks], rows))
    tail, shown = tails(args.draws), (0, 10, 20, 30, 35)
    print(table(["tail", *(f"error {tail[0][at]:.3f}" for at in shown)],
                [[name, *(f"{line[at]:.2f}" for at in shown)]
                 for name, line in tail[1].items()]))  # fmt: skip
    curves = {
        name: {kind: torch.stack(nats[kind, name]).mean(0)[1:] for kind in (*KERNELS, *ACTIVATIONS)}
        for name in tasks
    }
    print(plot(args.plot, tail, curves, targets[1:]))


if __name__ == "__main__":
    main()
