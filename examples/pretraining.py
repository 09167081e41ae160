"""Excess risk by the number of labels: pretraining on unlabelled samples against labels alone.

A factor model: 50 features out of 5 latent variables, on which the response depends. PPCA on m
unlabelled samples and least squares on 5 codes, against least squares on all 50 features. And a
mixture: Gaussian clusters, one label for each of them or a few more, against naive Bayes on the
labelled samples alone.
Run: python examples/pretraining.py [--unlabeled 100 1000 10000] [--quick] [--help]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import pyloss
from pyloss.demo.progress import table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.research.pretrain import (
    PPCA,
    ComponentHead,
    GaussianMixture,
    LeastSquaresHead,
    pretrain_then_erm,
)

F64 = torch.float64
FEATURES, LATENT, CLUSTERS = 50, 5, 4


class Factors:
    """x = z B + noise, y = z beta + noise; the risk of a linear predictor has a formula."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.B, self.beta = self.normal(LATENT, FEATURES), self.normal(LATENT)
        self.covariance = self.B.mT @ self.B + torch.eye(FEATURES, dtype=F64)
        self.best = torch.linalg.solve(self.covariance, self.B.mT @ self.beta)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=self.generator)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        z = self.normal(n, LATENT)
        return z @ self.B + self.normal(n, FEATURES), z @ self.beta + 0.3 * self.normal(n)

    def excess(self, predict) -> float:
        """Expected squared error, less that of the best predictor."""
        level = predict(torch.zeros(1, FEATURES, dtype=F64))
        off = predict(torch.eye(FEATURES, dtype=F64)) - level - self.best
        return (off @ self.covariance @ off + level[0] ** 2).item()


def regression(seed: int, labels: list[int], unlabeled: list[int]) -> list[list[float]]:
    """Excess risks over n: labels alone, then pretraining for each m."""
    world = Factors(seed)
    pool, _ = world.draw(max(unlabeled))
    found: list[list[float]] = [[] for _ in range(1 + len(unlabeled))]
    for n in labels:
        x, y = world.draw(n)
        found[0].append(world.excess(LeastSquaresHead().fit(x, y)))
        for row, m in zip(found[1:], unlabeled):
            predict = pretrain_then_erm(PPCA(LATENT), LeastSquaresHead(), pool[:m], x, y)
            row.append(world.excess(predict))
    return found


def classification(seed: int, labels: list[int], m: int) -> list[list[float]]:
    """Errors over n, in percent: naive Bayes, then the mixture."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLUSTERS, 10, generator=generator)

    def draw_samples(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % CLUSTERS
        return centers[y] + 0.8 * torch.randn(n, 10, generator=generator), y

    test, truth = draw_samples(2000)
    pool, _ = draw_samples(m)
    found: list[list[float]] = [[], []]
    for n in labels:
        x, y = draw_samples(n)
        bayes = pyloss.nn.GaussianNaiveBayes(10, CLUSTERS, var_smoothing=1e-2).partial_fit(x, y)
        mixture = GaussianMixture(CLUSTERS, n_init=5, generator=generator)
        predict = pretrain_then_erm(mixture, ComponentHead(), pool, x, y)
        for row, label in zip(found, (bayes(test).argmax(1), predict(test))):
            row.append(100 * (label != truth).double().mean().item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--labels", type=int, nargs="+", default=[20, 60, 200, 1000], help="n of the factor model")
    add("--unlabeled", type=int, nargs="+", default=[100, 1000, 10_000], help="m, likewise")
    add("--class-labels", type=int, nargs="+", default=[4, 8, 16, 40, 100], help="n of the mixture")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/pretraining.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.labels, args.unlabeled, args.class_labels, args.seeds = [20, 60], [200], [4, 8], 2
    torch.set_num_threads(args.threads)

    runs = [regression(seed, args.labels, args.unlabeled) for seed in range(args.seeds)]
    names = ["labels alone", *(f"PPCA of {m} samples" for m in args.unlabeled)]
    lines = {name: [run[i] for run in runs] for i, name in enumerate(names)}
    print(f"Excess risk of a regression, {FEATURES} features, {LATENT} latent variables")
    rows = [
        [name, *(spread([run[i] for run in lines[name]], 4) for i in range(len(args.labels)))]
        for name in names
    ]
    print(table(["", *(f"n = {n}" for n in args.labels)], rows))

    most = max(args.unlabeled)
    mixed = [classification(seed, args.class_labels, most) for seed in range(args.seeds)]
    errors = {name: [run[i] for run in mixed]
              for i, name in enumerate(("naive Bayes", f"mixture of {most} samples"))}  # fmt: skip
    print(f"\nError of a classification into {CLUSTERS} clusters, %")
    rows = [
        [name, *(spread([run[i] for run in runs], 1) for i in range(len(args.class_labels)))]
        for name, runs in errors.items()
    ]
    print(table(["", *(f"n = {n}" for n in args.class_labels)], rows))

    logs = {name: [torch.tensor(run).log10().tolist() for run in runs]
            for name, runs in lines.items()}  # fmt: skip
    panels = [
        Panel("factor model", "log10 of labels n", "log10 of the excess risk",
              torch.tensor(args.labels).log10().tolist(), logs),
        Panel("clusters", "labels n", "error, %", args.class_labels, errors),
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
