"""A MONAI training loop with the loss swapped: branching vessels, judged by overlap and topology.

Each loss of the table goes into the same loop, in the place where monai.losses.DiceLoss stands
otherwise, with the same arguments. The network is MONAI's UNet where MONAI is installed, else a
small one of plain torch; "monai.losses.DiceLoss" is a row of the table then, and must repeat the
row of pyloss' own. All losses share each seed's warm-up with soft Dice alone and see the same
images afterwards.
Run: python examples/monai_training.py [--seeds 3] [--plain] [--plot made.png] [--quick] [--help]
Needs nothing but torch and pyloss; matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.seeds import Panel, draw, spread

try:
    import monai.losses
    import monai.networks.nets
except ImportError:
    monai = None

DICE, PEER = "soft Dice", "monai.losses.DiceLoss"
THRESHOLD = 0.5


def losses(with_monai: bool) -> dict[str, nn.Module]:
    """What the loop is given; the arguments are MONAI's."""
    nets = pyloss.nn
    found = {
        DICE: nets.SoftDiceLoss(sigmoid=True),
        "Dice + cross entropy": nets.DiceCELoss(sigmoid=True),
        "Dice + focal": nets.DiceFocalLoss(sigmoid=True, gamma=2.0),
        "Tversky, beta 0.7": nets.TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7),
        "Dice + clDice": nets.SoftDiceclDiceLoss(sigmoid=True, iter_=4, alpha=0.5),
        "Dice + 0.02 Betti matching": nets.BettiMatchingLoss(
            base_loss=nets.SoftDiceLoss(sigmoid=True), activation="sigmoid", alpha=0.02
        ),
    }
    if with_monai:
        found[PEER] = monai.losses.DiceLoss(sigmoid=True)
    return found


def vessels(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and masks (count, 1, side, side): tubes, with gaps and noise in the image."""
    steps = 2 * side
    grid = torch.arange(side).float()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    masks, images = [], []
    for _ in range(count):
        mask, gaps = torch.zeros(side, side, dtype=torch.bool), torch.zeros(side, side)
        for _ in range(4):
            turns = 0.12 * torch.randn(steps, generator=generator)
            angle = uniform(0, 2 * math.pi, 1) + turns.cumsum(0)
            move = 0.7 * torch.stack([angle.cos(), angle.sin()])
            path = uniform(0.2, 0.8, 2, 1) * side + move.cumsum(1)
            inside = ((path > 0) & (path < side - 1)).all(0)
            # A tube that has left does not come back.
            path = path[:, inside.long().cumprod(0).bool()]
            near = (grid[:, None, None] - path[0]) ** 2 + (grid[:, None] - path[1]) ** 2
            if near.shape[-1]:
                mask |= near.amin(-1) <= uniform(0.8, 1.6, 1) ** 2
                hole = near[..., torch.randint(near.shape[-1], (2,), generator=generator)]
                gaps = torch.maximum(gaps, (hole.amin(-1) <= 4).float())
        image = mask * (1 - 0.8 * gaps)
        image = image + 0.45 * torch.randn(side, side, generator=generator)
        masks.append(mask), images.append(image)
    return torch.stack(images)[:, None], torch.stack(masks)[:, None]


class SmallUNet(nn.Module):
    """Two levels of plain torch."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for at in (inputs, outputs):
                layers += [nn.Conv2d(at, outputs, 3, padding=1), nn.GroupNorm(1, outputs)]
                layers += [nn.ReLU()]
            return nn.Sequential(*layers)

        self.first, self.second = block(1, width), block(width, 2 * width)
        self.last, self.head = block(3 * width, width), nn.Conv2d(width, 1, 1)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        deep = self.up(self.second(self.pool(first)))
        return self.head(self.last(torch.cat([first, deep], 1)))


def network(width: int, plain: bool) -> nn.Module:
    if plain:
        return SmallUNet(width)
    return monai.networks.nets.UNet(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(width, 2 * width), strides=(2,)
    )


def scores(model: nn.Module, images: Tensor, masks: Tensor) -> tuple[float, float, float]:
    """Dice, clDice, Betti number error (both dimensions), means over the images."""
    with torch.no_grad():
        p = torch.sigmoid(model(images))
    found = (p >= THRESHOLD).float()
    dice = 1 - pyloss.functional.soft_dice_loss(found, masks)
    errors = pyloss.metrics.betti_number_error(p, masks.float(), THRESHOLD, reduction="none")
    return (
        dice.item(),
        pyloss.metrics.cl_dice(p, masks, THRESHOLD).item(),
        errors.float().flatten(1).sum(1).mean().item(),
    )


def train(
    model: nn.Module, criterion: Callable, seed: int, steps: int, args: argparse.Namespace, tests=()
) -> list[tuple[float, float, float]]:
    """The loop that a user of MONAI has; the scores at each measurement."""
    generator = torch.Generator().manual_seed(seed)
    images, masks = vessels(args.images, args.side, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    found = []
    for step in range(1, steps + 1):
        batch = torch.randint(args.images, (args.batch,), generator=generator)
        optimizer.zero_grad()
        loss = criterion(model(images[batch]), masks[batch].float())
        loss.backward()
        optimizer.step()
        if tests and (step % args.every == 0 or step == steps):
            found.append(scores(model, *tests))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--plain", action="store_true", help="plain torch, also where MONAI is installed")
    add("--side", type=int, default=48, help="of an image, an even number")
    add("--images", type=int, default=48, help="to train with")
    add("--batch", type=int, default=4)
    add("--width", type=int, default=8, help="channels of the network's first level")
    add("--warmup", type=int, default=100, help="steps with soft Dice alone, shared")
    add("--steps", type=int, default=60, help="steps with each loss")
    add("--every", type=int, default=15, help="steps between measurements")
    add("--rate", type=float, default=5e-3)
    add("--tests", type=int, default=32, help="images to judge by")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--plot", type=Path, default=Path("demo_out/monai_training.png"))
    add("--quick", action="store_true", help="seconds, for a test")
    args = parser.parse_args()
    if args.quick:
        args.side, args.batch, args.width, args.tests, args.images = 16, 2, 2, 2, 2
        args.warmup, args.steps, args.seeds = 1, 1, 2
    plain = args.plain or monai is None
    torch.set_num_threads(args.threads)

    results: dict[str, list[list[tuple[float, float, float]]]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        start = network(args.width, plain)
        criteria = losses(not plain)
        train(start, criteria[DICE], seed, args.warmup, args)
        tests = vessels(args.tests, args.side, torch.Generator().manual_seed(1000 + seed))
        progress = Progress(f"seed {seed}", len(criteria))
        for at, (name, criterion) in enumerate(criteria.items()):
            model = copy.deepcopy(start)
            found = train(model, criterion, 500 + seed, args.steps, args, tests)
            results.setdefault(name, []).append(found)
            progress.update(at + 1, name)
    rows = [
        [name, *(spread([run[-1][i] for run in runs], 3 if i < 2 else 2) for i in range(3))]
        for name, runs in results.items()
    ]
    where = "plain torch" if plain else f"MONAI {monai.__version__}"
    print(f"\nheld-out images, {where}, mean +- standard deviation over {args.seeds} seeds")
    print(table(["loss", "Dice", "clDice", "Betti number error"], rows))
    x = [min(args.steps, (i + 1) * args.every) for i in range(len(results[DICE][0]))]
    panels = [
        Panel(
            "Vessels held out", "step", title, x,
            {name: [[at[i] for at in run] for run in runs] for name, runs in results.items()},
        )
        for i, title in ((1, "clDice"), (2, "Betti number error"))
    ]  # fmt: skip
    print(draw(args.plot, panels))


if __name__ == "__main__":
    main()
