"""Figures and the tables by steepness of docs/sorting_network.md.

    python -m bench.figures_sorting_network            # prints the tables
    python -m bench.figures_sorting_network --write    # updates docs/ and docs/img/

The first: how far a relaxed comparator lies above the minimum at worst, and how far `soft_sort` is
from `sort` in all, on normal numbers. The second: how much the rank of an element moves with the
order in which the elements come. Measured in float64, on inputs from a fixed generator.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import pyloss.functional as PF
from bench import plot

BLOCK = "sorting_network_steepness"
PLACES = "sorting_network_places"
DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
NETWORKS = ("bitonic", "odd_even")
STEEPNESS = (1.0, 3.0, 10.0, 30.0, 100.0)
LENGTHS = (8, 32, 128)
ROWS = 64
ORDERS = 16


def largest_gap(distribution: str, steepness: float) -> float:
    """max of softmin(0, d) - min(0, d) over d = 1e-5 to 1e6, in steps of 0.1 %."""
    d = torch.logspace(-5, 6, 25001, dtype=torch.float64)
    pair = torch.stack([torch.zeros_like(d), d], -1)
    low = PF.soft_sort(pair, distribution=distribution, steepness=steepness)[:, 0]
    return low.max().item()


def total_error(distribution: str, steepness: float, network: str, n: int) -> float:
    """Mean over rows of normal numbers of the sum over ranks of |soft_sort - sort|."""
    x = torch.randn(ROWS, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = PF.soft_sort(x, network=network, distribution=distribution, steepness=steepness)
    return (y - x.sort(-1).values).abs().sum(-1).mean().item()


def steepness_table() -> str:
    head = ["distribution", "steepness", "softmin - min, at most"]
    head += [f"{network}, n = {n}" for network in NETWORKS for n in LENGTHS]
    rows = []
    for distribution in DISTRIBUTIONS:
        for steepness in STEEPNESS:
            gap = largest_gap(distribution, steepness)
            row = [f"`{distribution}`", f"{steepness:g}", f"{gap:.3g}"]
            for network in NETWORKS:
                for n in LENGTHS:
                    row.append(f"{total_error(distribution, steepness, network, n):.3g}")
            rows.append(row)
    return plot.markdown_table(head, rows)


def move_of_ranks(
    distribution: str, steepness: float, network: str, n: int, both_ways: bool = False
) -> float:
    """Mean over the elements of the range of their soft rank, over orders of the row.

    `both_ways`: of the mean of the ranks of the row and of the row read from its end.
    """
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(ROWS, n, generator=generator, dtype=torch.float64)
    options = dict(network=network, distribution=distribution, steepness=steepness)
    found = []
    for _ in range(ORDERS):
        order = torch.randperm(n, generator=generator)
        ranks = PF.soft_rank(x[:, order], **options)
        if both_ways:
            ranks = (ranks + PF.soft_rank(x[:, order.flip(0)], **options).flip(1)) / 2
        found.append(ranks[:, order.argsort()])
    ranks = torch.stack(found)
    return (ranks.amax(0) - ranks.amin(0)).mean().item()


def places_table() -> str:
    networks = ("bitonic", "batcher", "odd_even")
    lengths = LENGTHS[:2]
    head = ["distribution", "steepness"]
    head += [f"{network}, n = {n}" for network in networks for n in lengths]
    rows = []
    for distribution in DISTRIBUTIONS:
        for steepness in STEEPNESS:
            row = [f"`{distribution}`", f"{steepness:g}"]
            for network in networks:
                for n in lengths:
                    setting = (distribution, steepness, network, n)
                    one, both = (move_of_ranks(*setting, both_ways=b) for b in (False, True))
                    row.append(f"{one:.2g}; {both:.2g}")
            rows.append(row)
    return plot.markdown_table(head, rows)


def relaxations(folder: Path) -> Path:
    """The weight of the first wire as the minimum, and softmin - min, over the difference."""
    figure, (left, right) = _figure(2, (8.4, 3.2))
    d = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    for distribution in DISTRIBUTIONS:
        pair = torch.stack([torch.zeros_like(d), d], -1)
        options = dict(distribution=distribution, steepness=2.0)
        weight = PF.soft_permutation(pair, **options)[:, 0, 0]
        low = PF.soft_sort(pair, **options)[:, 0]
        left.plot(d.numpy(), weight.numpy(), linewidth=1.2, label=distribution)
        right.plot(d.numpy(), (low - pair.min(-1).values).numpy(), linewidth=1.2)
    left.set(xlabel="b - a", title="weight of a as the minimum of a and b")
    right.set(xlabel="b - a", title="softmin(a, b) - min(a, b)")
    left.legend(fontsize=7)
    return plot._save(figure, folder / "sorting_network_relaxations.png")


def permutation(folder: Path) -> Path:
    """One soft permutation at growing steepness, for rows in order of their rank."""
    x = torch.randn(16, generator=torch.Generator().manual_seed(3)).sort().values
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    shown = (1.0, 3.0, 10.0, 100.0)
    figure, axes = _figure(len(shown), (9.0, 2.6))
    for axis, steepness in zip(axes, shown):
        matrix = PF.soft_permutation(x[order], network="odd_even", steepness=steepness)
        axis.imshow(matrix[order.argsort()].numpy(), cmap="viridis", vmin=0, vmax=1)
        axis.set(title=f"steepness {steepness:g}", xticks=[], yticks=[], xlabel="rank")
    axes[0].set_ylabel("element")
    return plot._save(figure, folder / "sorting_network_permutation.png")


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    pyplot = plot._pyplot()
    return pyplot.subplots(1, columns, figsize=size, layout="constrained")


def write(root: Path) -> list[Path]:
    page = root / "docs" / "sorting_network.md"
    text = plot.replace_block(page.read_text(), steepness_table(), BLOCK)
    page.write_text(plot.replace_block(text, places_table(), PLACES))
    folder = root / "docs" / "img"
    return [page, relaxations(folder), permutation(folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update docs/ and docs/img/")
    parser.add_argument("--root", type=Path, default=plot.ROOT, help="tree to write to")
    args = parser.parse_args()
    if args.write:
        for path in write(args.root):
            print("wrote", path)
    else:
        print(steepness_table(), places_table(), sep="\n\n")


if __name__ == "__main__":
    main()
