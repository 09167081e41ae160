"""Features that are tied to given ones: how far they collapse, and along which path.

From features of given variability within classes, the central path (the classifier is the best one
all the time) and the minima of the perturbed model for looser and looser ties, of equal classes and
of unequal ones.
Run: python examples/perturbed_collapse.py [--dim 20] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from pyloss import metrics
from pyloss.analysis import CentralPath, PerturbedUFM, central_path, perturbed_ufm
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread

CASES = {"equal": (40, 40, 40, 40), "unequal": (90, 45, 20, 5)}
BETAS = (10.0, 1.0, 0.1, 0.01, 0.001)


def given(sizes: tuple[int, ...], dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features as an early layer has them: class means of length 1, and as much noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    means = torch.randn(len(sizes), dim, generator=g, dtype=torch.float64) / math.sqrt(dim)
    noise = torch.randn(len(y), dim, generator=g, dtype=torch.float64) / math.sqrt(dim)
    return means[y] + noise, y


def logs(values: Tensor) -> list[float]:
    return values.log10().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dim", type=int, default=20)
    add("--decay", type=float, default=0.02, help="lam_W")
    add("--steps", type=int, default=400)
    add("--step-size", type=float, default=2.0)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/perturbed_collapse.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.dim, args.steps, args.seeds = 6, 20, 2
    torch.set_num_threads(args.threads)

    paths: dict[str, list[CentralPath]] = {}
    minima: dict[str, list[list[PerturbedUFM]]] = {}
    nc1: dict[str, list[Tensor]] = {}
    trace: dict[str, list[Tensor]] = {}
    for name, sizes in CASES.items():
        progress = Progress(f"{name} classes", args.seeds)
        paths[name], minima[name], nc1[name], trace[name] = [], [], [], []
        for seed in range(args.seeds):
            h0, y = given(sizes, args.dim, seed)
            paths[name].append(central_path(h0, y, args.decay, args.steps, args.step_size))
            minima[name].append([perturbed_ufm(h0, y, args.decay, beta) for beta in BETAS])
            for kind, found in (("pinv", nc1), ("trace", trace)):
                each = [metrics.nc1(m.features, y, kind=kind) for m in minima[name][-1]]
                found[name].append(torch.stack(each))
            progress.update(seed + 1)

    rows = []
    for name, runs in paths.items():
        for at in (0, args.steps // 4, args.steps):
            cells = [spread([float(getattr(p, f)[at].log10()) for p in runs], 2)
                     for f in ("nc1", "nc1_trace")]  # fmt: skip
            cells.append(spread([float(p.value[at]) for p in runs], 4))
            rows.append([f"{name}, path, t = {at * args.step_size:g}", *cells])
        variability = nc1[name], trace[name]
        for i, beta in enumerate(BETAS):
            rows.append(
                [
                    f"{name}, beta = {beta:g}",
                    *(spread([float(v[i].log10()) for v in runs], 2) for runs in variability),
                    spread([float(m[i].value) for m in minima[name]], 4),
                ]
            )
    print(table(["classes", "log10 NC1", "log10 tr S_W / tr S_B", "value"], rows))
    falls = all(bool((p.nc1.diff() < 0).all()) for runs in paths.values() for p in runs)
    print(f"NC1 falls at every step of every path: {'yes' if falls else 'no'}")
    time = [args.step_size * i for i in range(args.steps + 1)]
    panels = [
        Panel("central path", "time", "log10 NC1", time,
              {name: [logs(p.nc1) for p in runs] for name, runs in paths.items()}),
        Panel("central path", "time", "log10 tr S_W / tr S_B", time,
              {name: [logs(p.nc1_trace) for p in runs] for name, runs in paths.items()}),
        Panel("minima", "-log10 beta", "log10 NC1", [-math.log10(b) for b in BETAS],
              {name: [logs(v) for v in runs] for name, runs in nc1.items()}),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
