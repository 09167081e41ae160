"""Batch size, largest eigenvalue, rate: a small network on scikit-learn's digits.

The largest eigenvalue of the Hessian of a batch, by size, beside what the spike law foresees from
two of the sizes; the largest stable rate of SGD on a noisy quadratic, by bisection, beside its law;
the accuracy of SGD at several rates, and of LanczosSGD, which gets none.
Run: python examples/batch_learning_rate.py [--steps 300] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.analysis import SpectralDensity, hessian_noise, hvp, slq_density, top_eigenvalues
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import spread

TRAINING = 1400
FITTED = 16, 256  # the sizes that the law is fitted to
LAM, NOISE = 2.0, 400.0  # of the quadratic


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float() / 16, torch.from_numpy(y).long()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def trained(
    make, seed: int, batch_size: int, steps: int, x: Tensor, y: Tensor
) -> tuple[nn.Module, float]:
    """(network, accuracy on held-out digits in per cent); `make` makes an optimiser."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    optimizer = make(model.parameters())
    for _ in range(steps):
        batch = torch.randint(TRAINING, (batch_size,), generator=generator)

        def loss(batch=batch) -> Tensor:
            return F.cross_entropy(model(x[batch]), y[batch])

        if isinstance(optimizer, pyloss.optim.LanczosSGD):
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    with torch.no_grad():
        right = model(x[TRAINING:]).argmax(1) == y[TRAINING:]
    return model, 100 * right.float().mean().item()


def eigenvalues(model: nn.Module, seed: int, x: Tensor, y: Tensor, args) -> list[float]:
    """The largest of a batch's Hessian, for each size: means over some batches."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in args.sizes:
        values = []
        for _ in range(args.batches):
            batch = torch.randperm(TRAINING, generator=generator)[:size]
            hessian = hvp(lambda b=batch: F.cross_entropy(model(x[b]), y[b]), model)
            values.append(top_eigenvalues(hessian, steps=15, generator=generator).values[0])
        found.append(float(torch.stack(values).mean()))
    return found


def foreseen(found: list[float], sizes: list[int]) -> list[float]:
    small, large = FITTED
    at = dict(zip(sizes, found))
    lam, noise = hessian_noise(at[small], small, at[large], large, population=TRAINING)
    return pyloss.analysis.batch_extremal_eigenvalue(
        lam, 1, torch.tensor(sizes), noise.sqrt(), population=TRAINING
    ).tolist()


def spectra(model: nn.Module, seed: int, x: Tensor, y: Tensor, args) -> dict[str, SpectralDensity]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for size in FITTED:
        batch = torch.randperm(TRAINING, generator=generator)[:size]
        hessian = hvp(lambda b=batch: F.cross_entropy(model(x[b]), y[b]), model)
        found[f"B = {size}"] = slq_density(
            hessian, probes=args.probes, steps=40, generator=generator
        )
    return found


def largest_stable(batch: int, seed: int, steps: int) -> float:
    """By bisection: the rate from which on the error of SGD grows, a new Hessian in each step."""
    size = 100
    sigma = (NOISE / size / batch) ** 0.5
    generator = torch.Generator().manual_seed(seed)
    pushes = sigma * torch.randn(steps, size, generator=generator, dtype=torch.float64)

    def grows(rate: float) -> bool:
        x, total = torch.full((size,), size**-0.5, dtype=torch.float64), 0.0
        for push in pushes:  # noise times a vector of length 1
            x = x - rate * (LAM * x + push)
            length = x.norm()
            total, x = total + length.log().item(), x / length
        return total > 0

    low, high = 0.0, 4 / LAM
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


def draw(path: Path, sizes, seen, laws, spectrum, batches, rates) -> str:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    figure = Figure(figsize=(13.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    edges = {f"B = {size}": laws[0][sizes.index(size)] for size in FITTED}
    pyloss.visualize.draw_spectrum(spectrum, left, edges=edges)
    left.set(title="Hessian of a batch, digits")
    for runs, label, style in ((seen, "measured", "o"), (laws, "spike law", "-")):
        values = torch.tensor(runs)
        off = values.std(0) if len(runs) > 1 else 0 * values[0]
        middle.errorbar(sizes, values.mean(0), off, fmt=style, capsize=2, label=label)
    middle.set(title="Largest eigenvalue", xlabel="batch size", xscale="log")
    values = torch.tensor(rates)
    off = values.std(0) if len(rates) > 1 else 0 * values[0]
    right.errorbar(batches, values.mean(0), off, fmt="o", capsize=2, label="by bisection")
    law = pyloss.analysis.max_learning_rate(LAM, torch.tensor(batches), NOISE)
    right.plot(batches, law, label="law")
    right.set(title="Largest stable rate, quadratic", xlabel="batch size")
    right.set(xscale="log", yscale="log")
    for axes in (middle, right):
        axes.legend(fontsize=8)
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
    add("--steps", type=int, default=300, help="of training")
    add("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    add("--batches", type=int, default=20, help="of each size")
    add("--probes", type=int, default=8)
    add("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/batch_learning_rate.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    doublings, length = 12, 150
    if args.quick:
        args.steps, args.sizes, args.batches, args.seeds = 3, list(FITTED), 1, 2
        args.rates, args.probes, doublings, length = [0.1], 1, 3, 5
    torch.set_num_threads(args.threads)
    if not set(FITTED) <= set(args.sizes):
        parser.error(f"--sizes must hold {FITTED[0]} and {FITTED[1]}")

    x, y = digits()
    seen, laws, rates = [], [], []
    batches = [2**k for k in range(doublings)]
    progress = Progress("spectra", args.seeds)
    for seed in range(args.seeds):
        model, _ = trained(lambda p: torch.optim.SGD(p, lr=0.1), seed, 64, args.steps // 3, x, y)
        if seed == 0:
            spectrum = spectra(model, seed, x, y, args)
        seen.append(eigenvalues(model, seed, x, y, args))
        laws.append(foreseen(seen[-1], args.sizes))
        rates.append([largest_stable(batch, seed, length) for batch in batches])
        progress.update(seed + 1)
    print(f"\nlargest eigenvalue, mean +- standard deviation over {args.seeds} seeds")
    rows = [[f"B = {size}", spread([s[at] for s in seen], 2), spread([w[at] for w in laws], 2)]
            for at, size in enumerate(args.sizes)]  # fmt: skip
    print(table(["batches of", "measured", f"foreseen from {FITTED[0]} and {FITTED[1]}"], rows))

    print("\nlargest stable rate on a quadratic, and how much it grows with twice the batch")
    rows = []
    for at, batch in enumerate(batches[:-1]):
        law = pyloss.analysis.max_learning_rate(LAM, batch, NOISE)
        growth = [r[at + 1] / max(r[at], 1e-9) for r in rates]
        rows.append([f"b = {batch}", spread([r[at] for r in rates], 4), f"{law:.4f}",
                     spread(growth, 2)])  # fmt: skip
    print(table(["", "by bisection", "law", "growth"], rows))

    makes = {
        f"SGD, rate {rate:g}": lambda p, rate=rate: torch.optim.SGD(p, lr=rate)
        for rate in args.rates
    }
    makes["LanczosSGD"] = lambda p: pyloss.optim.LanczosSGD(p, every=30)
    rows = []
    for name, make in makes.items():
        cells = [
            spread([trained(make, seed, size, args.steps, x, y)[1] for seed in range(args.seeds)])
            for size in FITTED
        ]
        rows.append([name, *cells])
    print("\nheld-out digits, %, by size of the batch")
    print(table(["", *(f"B = {size}" for size in FITTED)], rows))
    print(draw(args.plot, args.sizes, seen, laws, spectrum, batches, rates))


if __name__ == "__main__":
    main()
