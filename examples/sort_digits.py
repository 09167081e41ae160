"""Numbers of four digits learned from their order: the demo section "sorting" at full length.

The training of `pyloss.demo.sorting`, with pyloss or with diffsort (`pip install diffsort
--no-deps`), over several seeds. For every n: exact match, element-wise accuracy and the sorter's
processor time per step, forward and backward from the scores to the loss (median).
Run: python examples/sort_digits.py [--n 5 9] [--impl diffsort] [--distribution logistic] [--help]
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.demo import sorting
from pyloss.demo.progress import Progress, table


def with_pyloss(sorter: sorting.Sorter, last_steepness: float, n: int) -> Callable:
    """The steepness goes from its first to its last value by equal factors."""

    def criterion(scores: Tensor, numbers: Tensor, done: float) -> Tensor:
        steepness = sorter.steepness * (last_steepness / sorter.steepness) ** done
        return dataclasses.replace(sorter, steepness=steepness)(scores, numbers)

    return criterion


def with_diffsort(sorter: sorting.Sorter, last_steepness: float, n: int) -> Callable:
    """The same losses from the matrix that diffsort returns."""
    import diffsort

    if last_steepness != sorter.steepness:
        raise SystemExit("diffsort's steepness is fixed")
    network = diffsort.DiffSortNet(
        sorter.network, n, steepness=sorter.steepness, distribution=sorter.distribution
    )

    def criterion(scores: Tensor, numbers: Tensor, done: float) -> Tensor:
        _, matrix = network(scores)
        true = F.one_hot(numbers.argsort(-1), n).mT.float()
        if sorter.kind == "bce":
            return F.binary_cross_entropy(matrix.clamp(0, 1), true)
        return -(true * matrix.clamp(min=1e-7).log()).sum((-2, -1)).mean() / n

    return criterion


def part_of(digits: sorting.Digits, rows: slice) -> sorting.Digits:
    return sorting.Digits(digits.images[rows], digits.labels[rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--impl", default="pyloss", choices=["pyloss", "diffsort"])
    add("--n", type=int, nargs="+", default=[5, 9], help="images per set; one training each")
    add("--network", default="odd_even", help="odd_even, bitonic, batcher")
    add("--distribution", default="cauchy")
    add("--steepness", type=float, default=10.0)
    add("--last-steepness", type=float, help="None: the same; else it gets there by equal factors")
    add("--kind", default="bce", choices=["bce", "row_ce", "col_ce"])
    add("--steps", type=int, default=1000)
    add("--images", type=int, default=250, help="per step, in sets of n")
    add("--rate", type=float, default=3e-3)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--test-sets", type=int, default=2000)
    add("--validation", type=int, default=0, metavar="K", help="judge on K of the training digits")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=Path("demo_out/sort_digits.json"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    sorter = sorting.Sorter(args.network, args.distribution, args.steepness, args.kind)
    size = sorting.Size(tuple(args.n), args.steps, args.images, args.rate, args.test_sets)
    last = args.steepness if args.last_steepness is None else args.last_steepness
    make = {"pyloss": with_pyloss, "diffsort": with_diffsort}[args.impl]
    train, test = sorting.load_digits()
    if args.validation:
        test = part_of(train, slice(args.validation))
        train = part_of(train, slice(args.validation, None))

    runs = []
    for n in args.n:
        criterion = make(sorter, last, n)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            progress = Progress(f"{args.impl}, sets of {n}, seed {seed}", size.steps)
            model, run = sorting.train(train, n, size, seed, criterion, progress)
            sorting.judge(model, test, run, size.test_sets)
            runs.append(run)

    rows = []
    for n in args.n:
        mine = [run for run in runs if run.n == n]
        cells = []
        for name in ("exact", "element", "exact_5"):
            values = [100 * getattr(run, name) for run in mine]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} +- {deviation:.1f} %")
        sorter_ms, step_ms = (
            statistics.fmean(getattr(run, name) for run in mine)
            for name in ("sorter_ms", "step_ms")
        )
        rows.append([str(n), *cells, f"{sorter_ms:.2f} ms", f"{step_ms:.1f} ms"])
    header = ["n", "exact match", "element-wise", "exact match of 5", "sorter", "step"]
    print(f"mean +- standard deviation over {args.seeds} seeds; processor time, median")
    print(table(header, rows))
    options = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    report = {"options": options, "torch": torch.__version__}
    report["runs"] = [dataclasses.asdict(run) for run in runs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Figures: {args.out}")


if __name__ == "__main__":
    main()
