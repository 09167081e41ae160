"""Draws the figure of volumes in docs/betti_matching.md: features that two volumes share, or not.

python examples/betti_matching_volume.py [PATH]  # default: betti_matching_volume.png, here
"""

from __future__ import annotations

import sys

import matplotlib
import torch
import torch.nn.functional as F

import pyloss

matplotlib.use("Agg")

PERSISTENCE = 0.3
UNMATCHED = "#ff2020"
MATCHED = ("#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
NAMES = ("component", "loop", "cavity")
SIZE = (14, 24, 24)

Polyline = list[tuple[float, float, float]]


def distance(lines: list[Polyline]) -> torch.Tensor:
    """Of each voxel to the nearest line."""
    axes = [torch.arange(s, dtype=torch.float32) for s in SIZE]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    points = []
    for line in lines:
        ends = torch.tensor(line)
        steps = torch.linspace(0, 1, 40)[:, None]
        points += [a + steps * (b - a) for a, b in zip(ends, ends[1:])]
    return torch.cdist(voxels, torch.cat(points)).amin(1).view(SIZE)


def make_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """(prediction, target): vessels with a loop, and a hollow ball; in one of them noise, a bridge
    between two vessels and a blob."""
    trunk = [(7.0, 2.0, 1.0), (7.0, 8.0, 6.0), (6.0, 13.0, 7.0)]
    loop = [
        (6.0, 13.0, 7.0), (4.0, 19.0, 8.0), (4.0, 21.0, 13.0), (6.0, 16.0, 16.0),
        (8.0, 12.0, 13.0), (6.0, 13.0, 7.0),
    ]  # fmt: skip
    branch = [(7.0, 8.0, 6.0), (9.0, 4.0, 12.0), (9.0, 3.0, 15.0)]
    target = (distance([trunk, loop, branch]) < 1.3).float()
    ball = distance([[(7.0, 18.5, 19.5)] * 2])
    target[(ball < 3.6) & (ball > 1.8)] = 1

    generator = torch.Generator().manual_seed(3)
    noise = F.avg_pool3d(torch.randn(1, 1, *(s + 2 for s in SIZE), generator=generator), 3, 1)[0, 0]
    prediction = 0.15 + 0.75 * target + 0.35 * noise
    bridge = distance([[(9.0, 3.0, 15.0), (8.0, 9.0, 16.0), (6.0, 16.0, 16.0)]]) < 1.1
    prediction[bridge] += 0.6
    blob = distance([[(3.0, 5.0, 4.0)] * 2]) < 1.6
    prediction[blob] += 0.6
    return prediction.clamp(0, 1), target


def colors_of(matching: pyloss.functional.BettiMatching, which: str, images) -> tuple:
    """(voxel -> colour, {name of a feature: count of matched and unmatched ones})."""
    found, counts = {}, {}
    for dim, name in enumerate(NAMES):
        for kind in ("unmatched", "matched"):  # the matched stay on top
            table = kind if kind == "matched" else f"unmatched_{which}"
            rows = matching.coordinates(table, 0, dim)
            sides = (0, 1) if kind == "matched" else (("input", "target").index(which),)
            number = 0
            for index, row in enumerate(rows):
                ends = row.view(-1, 2, 3)
                lengths = [
                    abs(images[side][tuple(birth)] - images[side][tuple(death)])
                    for side, (birth, death) in zip(sides, ends)
                ]
                if max(lengths) <= PERSISTENCE:
                    continue
                color = MATCHED[(2 * dim + number) % len(MATCHED)]
                color = color if kind == "matched" else UNMATCHED
                number += 1
                (cycle,) = matching.representative_cycles(0, which, dim, kind, index)
                found.update({tuple(voxel): color for voxel in cycle[:-1].tolist()})
            counts[name, kind] = number
    return found, counts


def draw(axis, mask: torch.Tensor, colors: dict, title: str) -> None:
    import numpy as np
    from matplotlib.colors import to_rgba

    filled = mask.numpy().copy()
    shades = np.empty((*mask.shape, 4))
    shades[:] = to_rgba("0.6", 0.12)
    for voxel, color in colors.items():
        filled[voxel], shades[voxel] = True, to_rgba(color, 0.85)
    # Depth goes up.
    axis.voxels(filled.transpose(2, 1, 0), facecolors=shades.transpose(2, 1, 0, 3))
    axis.set_box_aspect([SIZE[2], SIZE[1], SIZE[0]])
    axis.set(xticks=[], yticks=[], zticks=[])
    axis.set_title(title, fontsize=9)
    axis.view_init(elev=46, azim=-68)


def main(path: str) -> None:
    import matplotlib.pyplot as plt

    images = make_pair()
    matching = pyloss.betti_matching(*(t[None] for t in images), 3)
    figure = plt.figure(figsize=(9, 4.4), layout="constrained")
    for number, (which, image) in enumerate(zip(("input", "target"), images)):
        colors, counts = colors_of(matching, which, images)
        parts = [
            f"{name}: {counts[name, 'matched']} matched, {counts[name, 'unmatched']} unmatched"
            for name in NAMES
        ]
        axis = figure.add_subplot(1, 2, number + 1, projection="3d")
        title = f"{('prediction', 'target')[number]}\n" + "\n".join(parts)
        draw(axis, image > 0.5, colors, title)
    figure.savefig(path, dpi=80)
    print(path, matching.counts.tolist(), pyloss.betti_numbers(images[1], 3).tolist())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "betti_matching_volume.png")
