"""Volumes with vessels: soft Dice with and without Betti matching in three dimensions.

Trees of tubes are grown at random, some of their tips joined to loops; a small 3D U-Net has to
find them under noise, blur and gaps. The losses share each seed's start with soft Dice alone, then
see the same volumes. Judged on other trees: Dice, and wrong pieces, loops and cavities.
Run: python examples/segment_volumes.py [--alphas 0.05 0.2] [--seeds 3] [--quick] [--help]
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import spread

DICE = "soft Dice"
NOISE, GAPS, GAP_RADIUS = 0.7, 6, 2
BATCH, RATE, WIDTH = 2, 5e-3, 6


# --------------------------------------------------------------------------------------------------
# Volumes


def paint(volume: np.ndarray, center: np.ndarray, radius: float, value: float) -> None:
    """A ball of a value."""
    low = np.maximum(np.floor(center - radius).astype(int), 0)
    high = np.minimum(np.ceil(center + radius).astype(int) + 1, volume.shape)
    window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    grid = np.ogrid[window]
    near = sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2
    volume[window][near] = value


def grow_tree(side: int, rng: np.random.Generator) -> np.ndarray:
    """A tree of tubes from the first face on; pairs of its tips are joined, which makes loops."""
    volume = np.zeros((side,) * 3, dtype=np.float32)
    start = np.array([0.0, *rng.uniform(0.3, 0.7, 2)]) * side
    growing = [(start, np.array([1.0, 0.0, 0.0]), 2.6)]
    tips = []
    while growing:
        place, heading, radius = growing.pop()
        for _ in range(int(rng.uniform(0.2, 0.35) * side)):
            paint(volume, place, radius, 1.0)
            heading = heading + 0.2 * rng.standard_normal(3)
            heading /= np.linalg.norm(heading)
            place = place + heading
        if radius < 1.5 or np.any(place < 0) or np.any(place >= side):
            tips.append(np.clip(place, 1, side - 2))
            continue
        away = np.cross(heading, rng.standard_normal(3))
        away /= np.linalg.norm(away)
        for sign in (-0.8, 0.8):
            growing.append((place, heading + sign * away, 0.84 * radius))
    for a, b in zip(tips[::3], tips[1::3], strict=False):
        for share in np.linspace(0, 1, 2 * side):
            paint(volume, (1 - share) * a + share * b, 1.3, 1.0)
    return volume


def corrupt(tree: np.ndarray, rng: np.random.Generator) -> Tensor:
    """What the model gets to see: gaps, blur, noise."""
    image = tree.copy()
    vessel = np.argwhere(tree > 0)
    for center in vessel[rng.integers(0, len(vessel), GAPS)]:
        paint(image, center, GAP_RADIUS, 0.0)
    blurred = F.avg_pool3d(torch.from_numpy(image)[None, None], 3, 1, 1)[0]
    noise = rng.standard_normal(tree.shape, dtype=np.float32)
    return blurred + NOISE * torch.from_numpy(noise)


def batch_of(trees: list[np.ndarray], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets (N, 1, side, side, side)."""
    inputs = torch.stack([corrupt(tree, rng) for tree in trees])
    return inputs, torch.from_numpy(np.stack(trees) > 0)[:, None]


# --------------------------------------------------------------------------------------------------
# Model and training


def block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv3d(channels, after, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(1, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """Two levels: volumes (N, 1, *) to logits; even sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = block(1, width), block(width, 2 * width)
        self.up = block(3 * width, width)
        self.out = nn.Conv3d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = F.interpolate(self.coarse(F.max_pool3d(fine, 2)), scale_factor=2.0)
        return self.out(self.up(torch.cat([coarse, fine], 1)))


def make_losses(alphas: list[float]) -> dict[str, nn.Module]:
    dice = pyloss.nn.SoftDiceLoss(sigmoid=True)
    losses: dict[str, nn.Module] = {DICE: dice}
    for alpha in alphas:
        losses[f"{DICE} + {alpha:g} Betti matching"] = pyloss.BettiMatchingLoss(
            base_loss=dice, alpha=alpha, activation="sigmoid", padding="background"
        )
    return losses


class Training:
    """One model on its way; a copy goes on from the same state with the same volumes."""

    def __init__(self, trees: list[np.ndarray], seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.trees, self.steps, self.done = trees, steps, 0
        self.model = UNet3d(WIDTH)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-4)
        self.rng = np.random.default_rng(seed)

    def step(self, criterion: nn.Module) -> None:
        share = self.done / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(20 * share + 0.1, 0.5 + 0.5 * math.cos(math.pi * share))
        chosen = self.rng.integers(0, len(self.trees), BATCH)
        x, y = batch_of([self.trees[i] for i in chosen], self.rng)
        self.optimizer.zero_grad()
        criterion(self.model(x), y).backward()
        self.optimizer.step()
        self.done += 1


@torch.no_grad()
def scores(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Dice, Betti number error and Betti matching error, both summed over the dimensions."""
    p = torch.cat([model(part) for part in x.split(8)]).sigmoid()
    dice = 1 - pyloss.functional.soft_dice_loss((p >= 0.5).float(), y)
    numbers, matching = pyloss.betti_number_error(p, y), pyloss.betti_matching_error(p, y)
    return [float(dice), float(numbers.sum()), float(matching.sum())]


# --------------------------------------------------------------------------------------------------
# Picture


def render(path: Path, x: Tensor, y: Tensor, models: dict[str, nn.Module]) -> str:
    """The masks of two models for one volume, features without a counterpart in colour."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    names = list(models)[:2]
    with torch.no_grad():
        masks = {name: models[name](x) >= 0 for name in names}
    matching = {
        n: pyloss.betti_matching(m[:, 0], y[:, 0], spatial_dims=3) for n, m in masks.items()
    }
    worst = int(matching[names[0]].counts[:, :, 1].sum(1).argmax())
    figure = Figure(figsize=(4.2 * (1 + len(names)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    axes = figure.subplots(1, 1 + len(names), subplot_kw={"projection": "3d"})
    side = y.shape[-1]
    pictures = {"vessels": y, **masks}
    for axis, (name, mask) in zip(axes, pictures.items(), strict=True):
        axis.scatter(*mask[worst, 0].nonzero().T.numpy(), s=9, c="0.55", alpha=0.3, linewidths=0)
        wrong = [0, 0]
        for dim, color in ((0, "tab:red"), (1, "tab:blue")) if name in matching else ():
            cycles = matching[name].representative_cycles(worst, "input", dim, kind="unmatched")
            for cycle in cycles:
                axis.scatter(*cycle[:-1].T.numpy(), s=12, c=color, linewidths=0)
            wrong[dim] = len(cycles)
        title = (
            name if name == "vessels" else f"{name}\n{wrong[0]} pieces, {wrong[1]} loops too many"
        )
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(0, side), ylim=(0, side), zlim=(0, side))
        axis.set_box_aspect((1, 1, 1), zoom=1.5)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    return f"Plot: {path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--side", type=int, default=32, help="of the volumes, even")
    add("--warmup", type=int, default=120, help="steps with soft Dice alone, shared")
    add("--steps", type=int, default=80, help="steps with each loss")
    add("--alphas", type=float, nargs="+", default=[0.05, 0.2], help="of the Betti matching loss")
    add("--test-volumes", type=int, default=24)
    add("--seeds", type=int, default=3)
    add("--quick", action="store_true", help="seconds, and no result to speak of")
    add("--plot", type=Path, default=Path("demo_out/segment_volumes.png"))
    args = parser.parse_args()
    if args.quick:
        args.side, args.warmup, args.steps, args.test_volumes, args.seeds = 16, 1, 1, 2, 2
    rng = np.random.default_rng(12345)
    trees = [grow_tree(args.side, rng) for _ in range(24 if not args.quick else 2)]
    x, y = batch_of([grow_tree(args.side, rng) for _ in range(args.test_volumes)], rng)
    losses = make_losses(args.alphas)
    pieces, loops, cavities = pyloss.betti_numbers(y).double().mean((0, 1)).tolist()
    print(
        f"volumes {args.side}^3, {y.float().mean():.1%} vessels; mean pieces {pieces:.1f}, "
        f"loops {loops:.1f}, cavities {cavities:.1f}"
    )

    found: dict[str, list[list[float]]] = {name: [] for name in losses}
    models: dict[str, nn.Module] = {}
    progress = Progress("training", args.seeds * (args.warmup + len(losses) * args.steps))
    count = 0
    for seed in range(args.seeds):
        start = Training(trees, seed, args.warmup + args.steps)
        for _ in range(args.warmup):
            start.step(losses[DICE])
            progress.update(count := count + 1, DICE)
        for name, criterion in losses.items():
            training = copy.deepcopy(start)
            for _ in range(args.steps):
                training.step(criterion)
                progress.update(count := count + 1, name)
            found[name].append(scores(training.model, x, y))
            models.setdefault(name, training.model)

    print(f"\n{args.test_volumes} held-out volumes, mean +- deviation of {args.seeds} seeds")
    print(table(
        ["loss", "Dice", "Betti number error", "Betti matching error"],
        [
            [name, *(spread(column, d) for column, d in zip(zip(*runs), (3, 2, 2)))]
            for name, runs in found.items()
        ],
    ))  # fmt: skip
    print(render(args.plot, x, y, models))


if __name__ == "__main__":
    main()
