"""More features and more data help once the ridge is tuned: theory beside regressions that are run.

Random-feature ridge regression on a task with power laws for spectrum and target. The lines are
analysis.rf_risk, the marks regressions with Gaussian features, mean and deviation over the seeds.
The last panel: how far the training set should be fit, by the noise.
Run: python examples/random_features.py [--samples 64] [--trials 20] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from pyloss.analysis import RFRisk, optimal_ridge, powerlaw_fit_ratio, rf_risk
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import spread

F64 = torch.float64
RIDGES = ("ridge 1e-4", "ridge 0.01", "best ridge")


def power_law(modes: int, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    i = torch.arange(1, modes + 1, dtype=F64)
    return i**-alpha, i**-beta


def regressions(task, n: int, k: int, ridges: list[float], noise: float, trials: int, seed: int):
    """Mean test and train error of each ridge, ``(ridges, 2)``."""
    generator = torch.Generator().manual_seed(1000 * seed + k)
    lam, coeffs = task
    errors = torch.zeros(len(ridges), 2, dtype=F64)
    for _ in range(trials):
        x, project, eps = (torch.randn(*shape, generator=generator, dtype=F64)
                           for shape in ((n, len(lam)), (len(lam), k), (n,)))  # fmt: skip
        v = coeffs.sqrt() * torch.randn(len(lam), generator=generator, dtype=F64).sign()
        y = x @ v + math.sqrt(noise) * eps
        back = lam.sqrt().unsqueeze(1) * project / math.sqrt(k)
        features = x @ back
        values, vectors = torch.linalg.eigh(features @ features.T)
        inside = vectors.T @ y
        for at, ridge in enumerate(ridges):
            dual = vectors @ (inside / (values.clamp(min=0) + ridge))
            test = (back @ (features.T @ dual) - v).square().sum() + noise
            errors[at] += torch.stack([test, (ridge * dual).square().mean()]) / trials
    return errors


def fitting_ratio(alpha: float, beta: float, modes: int, relative: Tensor) -> tuple[Tensor, Tensor]:
    """Train over test error at the best ridge: by rf_risk for 50 samples, and for many."""
    lam, coeffs = power_law(modes, alpha, beta)
    noise = relative * rf_risk(lam, coeffs, 50).test
    ridge = optimal_ridge(lam, coeffs, 50, noise=noise)
    found = rf_risk(lam, coeffs, 50, ridge=ridge, noise=noise)
    return found.train / found.test, powerlaw_fit_ratio(alpha, beta, relative)


def plot(path: Path, k, risk: RFRisk, simulated: Tensor, counts: list[int], samples, tuned: Tensor,
         relative: Tensor, ratios) -> str:  # fmt: skip
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    from pyloss.visualize import draw_rf_risk

    figure = Figure(figsize=(13.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    draw_rf_risk(risk, k, RIDGES, axes[:2])
    for column, ax in enumerate(axes[:2]):
        for row in range(len(RIDGES)):
            each = simulated[:, row, :, column]  # (seeds, counts)
            ax.errorbar(counts, each.mean(0), each.std(0), fmt="o", markersize=3, capsize=2,
                        color=ax.lines[row].get_color(), linestyle="none")  # fmt: skip
    axes[2].loglog(samples, tuned)
    axes[2].set(xlabel="samples n", title="test error, best ridge")
    axes[2].legend(["k = 16", "k = 64", "k = 256", "kernel"], fontsize=8)
    axes[3].plot(relative, ratios[0], "o", markersize=3, label="rf_risk, n = 50")
    axes[3].plot(relative, ratios[1], label="many samples")
    axes[3].axvline(0.5, color="black", linestyle=":", linewidth=1, label="threshold")
    axes[3].set(xlabel="relative noise", title="best train / test error")
    axes[3].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return f"Plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--samples", type=int, default=64)
    add("--modes", type=int, default=1000, help="eigenvalues of the task")
    add("--noise", type=float, default=0.1, help="variance of the noise")
    add("--trials", type=int, default=20, help="regressions of each seed")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/random_features.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    counts = [8, 16, 32, 64, 128, 256, 1024]
    if args.quick:
        args.modes, args.trials, args.seeds, counts = 100, 2, 2, [16, 64, 256]
    torch.set_num_threads(args.threads)

    task, noise, n = power_law(args.modes, 1.5, 1.8), args.noise, args.samples
    best = optimal_ridge(*task, n, torch.tensor(counts), noise=noise)
    ridges = [[1e-4, 1e-2, float(b)] for b in best]
    simulated = torch.zeros(args.seeds, len(RIDGES), len(counts), 2, dtype=F64)
    progress = Progress("regressions", args.seeds * len(counts))
    for seed in range(args.seeds):
        for at, k in enumerate(counts):
            found = regressions(task, n, k, ridges[at], noise, args.trials, seed)
            simulated[seed, :, at] = found
            progress.update(seed * len(counts) + at + 1, f"seed {seed}, {k} features")

    theory = rf_risk(*task, n, torch.tensor(counts).unsqueeze(1), ridge=torch.tensor(ridges),
                     noise=noise)  # fmt: skip
    rows = []
    for at, k in enumerate(counts):
        cells = []
        for row in range(len(RIDGES)):
            cells += [f"{theory.test[at, row]:.3f}", spread(simulated[:, row, at, 0].tolist(), 3)]
        rows.append([f"{k} features", *cells])
    print(f"\n{n} samples, noise {noise:g}: test error, foreseen and found")
    print(table(["", *(cell for name in RIDGES for cell in (name, "found"))], rows))
    off = (simulated[..., 0].mean(0).T / theory.test - 1).abs()
    print(f"foreseen and found differ by {100 * off.median():.1f} % (median), "
          f"{100 * off.max():.1f} % (most)")  # fmt: skip

    k = torch.logspace(math.log10(4), math.log10(2000), 80)
    each = torch.tensor([[1e-4], [1e-2]]).expand(2, len(k))
    each = torch.cat([each.double(), optimal_ridge(*task, n, k, noise=noise).unsqueeze(0)])
    risk = rf_risk(*task, n, k, ridge=each, noise=noise)
    samples = torch.logspace(0.5, 3, 6 if args.quick else 40).unsqueeze(1)
    features = torch.tensor([16, 64, 256, math.inf])
    tuned = optimal_ridge(*task, samples, features, noise=noise)
    tuned = rf_risk(*task, samples, features, ridge=tuned, noise=noise).test
    relative = torch.linspace(0, 2, 3 if args.quick else 21, dtype=F64)
    ratios = fitting_ratio(2.0, 3.0, 100 if args.quick else 10000, relative)
    print(plot(args.plot, k, risk, simulated, counts, samples.flatten(), tuned, relative, ratios))


if __name__ == "__main__":
    main()
