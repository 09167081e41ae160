"""Gaussian naive Bayes beside logistic regression, by number of samples and of features.

Two Gaussians whose means lie 1.6 / sqrt(D) from 0 in each of D coordinates, so that the best error
is the same for every D: how many samples does a classifier need? And scikit-learn's digits, whose
pixels depend on each other, as naive Bayes assumes they do not. Logistic regression is
scikit-learn's, almost without a penalty for the Gaussians.
Run: python examples/naive_bayes.py [--features 25 50 100 200] [--seeds 3] [--quick] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread
from pyloss.demo.sorting import load_digits

Samples = tuple[Tensor, Tensor]
Errors = dict[str, list[list[float]]]  # by seed and number of samples, in per cent


def gaussians(count: int, features: int, generator: torch.Generator) -> Samples:
    y = torch.arange(count) % 2
    x = torch.randn(count, features, generator=generator)
    return x + 1.6 / math.sqrt(features) * (2 * y - 1).unsqueeze(1), y


def naive_bayes(data: Samples, test: Samples, smoothing: float) -> float:
    x, y = data
    head = pyloss.nn.GaussianNaiveBayes(x.shape[1], int(test[1].max()) + 1, smoothing)
    head.partial_fit(x, y)
    return 100 * (head(test[0]).argmax(1) != test[1]).float().mean().item()


def logistic_regression(data: Samples, test: Samples, penalty: float) -> float:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of separable classes it finds no minimum
        model = LogisticRegression(C=1 / penalty, max_iter=1000)
        model.fit(data[0].numpy(), data[1].numpy())
    return 100 * (1 - model.score(test[0].numpy(), test[1].numpy()))


def errors(
    draw_data: Callable[[int, torch.Generator], Samples], test: Samples, counts: list[int],
    args: argparse.Namespace, smoothing: float, penalty: float, title: str,
) -> Errors:  # fmt: skip
    found: Errors = {"naive Bayes": [], "logistic regression": []}
    progress = Progress(title, args.seeds * len(counts))
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        largest = draw_data(max(counts), generator)
        runs: tuple[list[float], list[float]] = ([], [])
        for at, count in enumerate(counts):
            data = largest[0][:count], largest[1][:count]
            runs[0].append(naive_bayes(data, test, smoothing))
            runs[1].append(logistic_regression(data, test, penalty))
            progress.update(seed * len(counts) + at + 1)
        for lines, run in zip(found.values(), runs, strict=True):
            lines.append(run)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--features", type=int, nargs="+", default=[25, 50, 100, 200])
    add("--samples", type=int, nargs="+", default=[40, 80, 160, 320, 640, 1280])
    add("--test-samples", type=int, default=10000)
    add("--smoothing", type=float, default=1e-3, help="of the variances of pixels")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/naive_bayes.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.features, args.samples, args.test_samples, args.seeds = [5, 10], [20, 40], 100, 2
    torch.set_num_threads(args.threads)

    results: dict[str, Errors] = {}
    for features in args.features:
        test = gaussians(args.test_samples, features, torch.Generator().manual_seed(1000))
        results[f"{features} features"] = errors(
            lambda count, g, features=features: gaussians(count, features, g), test, args.samples,
            args, 1e-9, 1e-4, f"{features} features",
        )  # fmt: skip
    digits, held_out = load_digits()
    images, labels = digits.images.flatten(1), digits.labels
    counts = [min(c, len(labels)) for c in args.samples]

    def some_digits(count: int, generator: torch.Generator) -> Samples:
        order = torch.randperm(len(labels), generator=generator)
        first = torch.stack([order[labels[order] == d][0] for d in range(10)])  # of each class one
        order = torch.cat([first, order[~torch.isin(order, first)]])[:count]
        return images[order], labels[order]

    results["digits"] = errors(
        some_digits, (held_out.images.flatten(1), held_out.labels), counts, args, args.smoothing,
        1.0, "digits",
    )  # fmt: skip

    rows = [
        [f"{name}, {kind}", *(spread([run[at] for run in runs], 1) for at in range(len(counts)))]
        for name, lines in results.items()
        for kind, runs in lines.items()
    ]
    print(f"\nerror on held-out samples in per cent, mean +- standard deviation of {args.seeds} "
          "seeds, by the number of training samples")  # fmt: skip
    print(table(["data", *(str(count) for count in args.samples)], rows))
    x = [math.log2(count) for count in args.samples]
    small, large = (f"{f} features" for f in (args.features[0], args.features[-1]))
    panels = [
        Panel(name, "log2 of training samples", "error, %", x, results[name])
        for name in (small, large, "digits")
    ]
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
