"""Invariance in a linear structural equation model: how many environments show it, and what the
penalty does for environments that are not seen.

The response has two causes and an effect. A representation with a little of the effect is nearly
invariant in the environments seen; the share of unseen ones where it is not falls with the number
of those. Then least squares and two penalties are trained in environments where the effect is
reliable, and tested where it is not.
Run: python examples/invariance_sem.py [--repeats 200] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from pyloss.analysis import (
    Intervention,
    invariance_environments_needed,
    invariance_test,
    linear_sem,
)
from pyloss.analysis.invariance import exact_gap, sem_covariance
from pyloss.demo.progress import table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.regularizers import invariance_penalty

Y, ZETA = 2, 0.05
# 0 -> 1, both -> the response, 2, -> 3; 0 -> 3
B = torch.tensor([[0, 0, 0, 0], [0.5, 0, 0, 0], [1.0, -0.7, 0, 0], [0.3, 0, 0.8, 0]]).double()
OMEGA = torch.tensor([1.0, 0.5, 0.3, 0.4]).double()
CAUSES = torch.eye(3).double()[:2]


def environments(count: int, generator: torch.Generator, effect: tuple[float, float] = (-1, 1)):
    """New coefficients and a new variance at each site by chance; those of the effect from a
    range."""

    def uniform(low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.empty(shape).double().uniform_(low, high, generator=generator)

    return [
        [
            Intervention(
                site,
                row=torch.where(
                    B[site] != 0, uniform(*(effect if site == 3 else (-1, 1)), (4,)), 0
                ),
                variance=float(uniform(0.2, 2.0)),
            )
            for site in (0, 1, 3)
            if uniform(0, 1) < 0.5
        ]
        for _ in range(count)
    ]


def covariances(count: int, generator: torch.Generator) -> Tensor:
    return sem_covariance(B, OMEGA, y=Y, interventions=environments(count, generator))


def unseen_share(E: int, pool: Tensor, args, generator: torch.Generator) -> tuple[float, float]:
    """Of environments in which a representation with 20 % of the effect is further from
    invariance than in any of E: with a head that was fixed before, and with one that fits the E."""
    phi = CAUSES.clone()
    phi[0] = torch.tensor([0.8, 0.0, 0.2])
    fixed = exact_gap(pool, phi, torch.tensor([1.0, -0.7]).double(), y=Y)[1]
    shares: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repeats):
        pick = torch.randint(len(pool), (E,), generator=generator)
        w, gap = exact_gap(pool[pick], phi, y=Y)
        fitted = exact_gap(pool, phi, w, y=Y)[1]
        shares[0].append(float((fixed > fixed[pick].max()).double().mean()))
        shares[1].append(float((fitted > gap.max() * (1 + 1e-12)).double().mean()))
    return sum(shares[0]) / args.repeats, sum(shares[1]) / args.repeats


def trained(kind: str | None, data, args) -> Tensor:
    """Scales of the coordinates, that is, what is predicted from each."""
    x, y, offsets = data
    scales = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0].clone().requires_grad_()
    head = torch.ones(3).double()
    optimizer = torch.optim.LBFGS([scales], max_iter=args.steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        features = x * scales
        value = (features @ head - y).square().mean()
        if kind is not None:
            value = value + args.strength * invariance_penalty(
                features, y, head, offsets, kind=kind
            )
        value.backward()
        return value

    optimizer.step(loss)
    return scales.detach()


def errors(w: Tensor, covariance: Tensor) -> Tensor:
    """Mean squared error in each environment."""
    off = torch.cat([w[:2], w.new_tensor([-1.0]), w[2:]])
    return torch.einsum("i,eij,j->e", off, covariance, off)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pool", type=int, default=3000, help="environments that stand for all")
    add("--repeats", type=int, default=200, help="draws of E of them")
    add("--samples", type=int, default=1000, help="of each environment")
    add("--strength", type=float, default=100.0, help="of the penalty")
    add("--steps", type=int, default=100)
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/invariance_sem.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.pool, args.repeats, args.samples, args.steps, args.seeds = 60, 5, 50, 5, 2
    torch.set_num_threads(args.threads)

    counts, sizes = [5, 10, 20, 50, 100, 200], [50, 200, 800, 3200]
    if args.quick:
        counts, sizes = [5, 20], [50, 200]
    shares: dict[str, list[list[float]]] = {"head fixed before": [], "head fitted to them": []}
    gaps: dict[str, list[list[float]]] = {"causes": [], "with the effect": []}
    risks: dict[str, list[list[float]]] = {}
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        pool = covariances(args.pool, generator)
        found = [unseen_share(E, pool, args, generator) for E in counts]
        for name, each in zip(shares, zip(*found)):
            shares[name].append(list(each))
        cases = environments(20, generator)
        lines: dict[str, list[float]] = {name: [] for name in gaps}
        for n in sizes:
            x, y, offsets = linear_sem(B, OMEGA, y=Y, interventions=cases, n=n, generator=generator)
            for name, columns in (("causes", x[:, :2]), ("with the effect", x)):
                gap = invariance_test(columns, y, offsets).eps_hat
                lines[name].append(math.log10(float(gap)))
        for name in gaps:
            gaps[name].append(lines[name])
        # The effect stays about as it is where the models are trained.
        cases = environments(10, generator, effect=(0.3, 1.0))
        data = linear_sem(B, OMEGA, y=Y, interventions=cases, n=args.samples, generator=generator)
        seen = sem_covariance(B, OMEGA, y=Y, interventions=cases)
        for kind, name in ((None, "least squares"), ("gap", "penalty, gap"),
                           ("irmv1", "penalty, irmv1")):  # fmt: skip
            w = trained(kind, data, args)
            there = errors(w, pool)
            risks.setdefault(name, []).append(
                [float(errors(w, seen).mean()), float(there.mean()), float(there.max()),
                 float(w[2])]
            )  # fmt: skip
    rows = [
        [f"E = {E}", f"{1 / (E + 1):.3f}", *(spread([s[i] for s in runs], 3)
                                             for runs in shares.values()),
         f"{min(1.0, math.log(1 / ZETA) / E):.3f}"]
        for i, E in enumerate(counts)
    ]  # fmt: skip
    print("share of unseen environments that violate what E seen have")
    print(table(["", "1 / (E + 1)", *shares, f"bound, zeta = {ZETA:g}"], rows))
    need = [invariance_environments_needed(0.1, ZETA, p) for p in (0, 8)]
    print(f"for a share of 0.1: {need[0]} environments for a fixed head; {need[1]} for any")
    print("\nmean squared error; 0.300 is the noise")
    header = ["", "seen", "unseen", "the worst unseen", "weight of the effect"]
    print(table(header, [
        [name, *(spread([r[i] for r in runs], 3) for i in range(4))] for name, runs in risks.items()
    ]))  # fmt: skip
    logs = [math.log10(E) for E in counts]
    panels = [
        Panel("unseen violations", "log10 of environments seen", "log10 of the share", logs, {
            **{name: [[math.log10(max(s, 1e-4)) for s in run] for run in runs]
               for name, runs in shares.items()},
            "1 / (E + 1)": [[-math.log10(E + 1) for E in counts]],
            f"bound, zeta = {ZETA:g}": [[math.log10(min(1.0, math.log(1 / ZETA) / E))
                                         for E in counts]],
        }),
        Panel("largest gap of 20", "log10 of samples", "log10 of the gap",
              [math.log10(n) for n in sizes], gaps),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
