"""Draws the figure of docs/betti_matching.md: features of a prediction matched with its target's.

python examples/betti_matching_figure.py [PATH]  # default: betti_matching_features.png, here
"""

from __future__ import annotations

import sys

import matplotlib
import torch
import torch.nn.functional as F

import pyloss
import pyloss.visualize

matplotlib.use("Agg")


def make_pair(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth random mask with holes, and a noisy, blurred prediction of it."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(1, 1, size + 16, size + 16, generator=generator)
    field = F.avg_pool2d(F.avg_pool2d(noise, 9, 1), 9, 1)[0, 0]
    target = (field > field.median()).float()
    blurred = F.avg_pool2d(target[None, None], 5, 1, padding=2)[0, 0]
    grain = torch.randn(1, 1, size + 4, size + 4, generator=generator)
    grain = F.avg_pool2d(grain, 5, 1)[0, 0]
    return (6 * (blurred - 0.5) + 8 * grain).sigmoid(), target


def main(path: str) -> None:
    import matplotlib.pyplot as plt

    prediction, target = make_pair()
    matching = pyloss.betti_matching(prediction[None], target[None], 2)
    figure, axes = plt.subplots(1, 2, figsize=(8, 5.2), layout="constrained")
    pyloss.visualize.draw_matching(prediction, target, matching, axes, min_persistence=0.3)
    for axis, title in zip(axes, ("prediction", "target")):
        axis.set_title(title)
    figure.savefig(path, dpi=80)
    print(path, matching.counts.tolist())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "betti_matching_features.png")
