"""Section "segmentation": vessels of a retina image, soft Dice with and without Betti matching.

The image ships in scikit-image's wheel; nothing is downloaded. A fixed filter (ridges, then a
threshold with hysteresis) draws the vessels, and a small U-Net has to find them again in patches
that were blurred, made noisy and given gaps. It is trained on the upper part of the image and
judged on patches of the lower part. All losses share each seed's warm-up with soft Dice alone and
then see the same patches, so that they differ in nothing but the factor of the added term.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.sections import Options, section

DICE = "soft Dice"
MISSING = "scikit-image is not installed: pip install 'pyloss[demo]'"

REDUCTION = 2  # voxels of the image per voxel of the demo, along an axis
RIDGE_WIDTHS = (1.5, 2.5, 3.5)  # of the filter that draws the vessels
SURE_SHARE, LIKELY_SHARE = 0.05, 0.11  # of the eye: above both thresholds, above the lower one
SMALLEST = 120  # voxels of a piece of vessel that is kept
BORDER = 12  # voxels along the edge of the eye without vessels: the filter sees the edge itself
TRAIN_ROWS, TEST_ROWS = (0.0, 0.49), (0.51, 1.0)  # shares of the height


@dataclass(frozen=True)
class Size:
    """Patches, model and length of the training."""

    patch: int = 64
    batch: int = 4
    width: int = 8  # channels of the first level of the U-Net
    warmup: int = 300  # steps with soft Dice alone, shared by all losses
    steps: int = 300  # afterwards, with each loss
    rate: float = 3e-3
    # Factors of the Betti matching loss, which is a sum over all features of a patch. The second is
    # that of the papers' configurations; the first was the best of 0.005, 0.02 and 0.08 on patches
    # of the upper part, with two other seeds.
    alphas: tuple[float, ...] = (0.02, 0.5)
    dims: tuple[int, ...] = (0, 1)
    padding: str | None = "foreground_detached"
    blur: float = 1.0  # standard deviation in voxels
    noise: float = 0.8  # standard deviation; that of the image is 1
    gaps: int = 4  # holes in the vessels of a patch
    gap_radius: int = 4
    seeds: int = 3
    test_patches: int = 48


FULL = Size()
QUICK = Size(patch=32, batch=4, width=4, warmup=8, steps=4, seeds=2, test_patches=4)


@dataclass(frozen=True)
class Retina:
    image: torch.Tensor  # (H, W), without the slow changes of brightness, deviation about 1
    vessels: torch.Tensor  # (H, W) bool


@dataclass
class Scores:
    """Means over the test patches, at threshold 0.5."""

    dice: float
    betti_number_error: float  # summed over dimensions 0 and 1
    betti_matching_error: float


@dataclass
class Run:
    seed: int
    name: str
    losses: list[float]  # after the warm-up
    scores: Scores
    step_ms: float
    loss_ms: float  # forward and backward of the loss alone, both medians


def load_retina() -> Retina:
    """Reads the image and draws the vessels; ImportError without scikit-image."""
    from skimage import data, filters, measure

    photo = data.retina()
    size = photo.shape[0] // REDUCTION * REDUCTION
    small = torch.from_numpy(photo[:size, :size].astype(np.float32) / 255).permute(2, 0, 1)
    small = F.avg_pool2d(small, REDUCTION)
    green = small[1].numpy()  # the channel with the most contrast between vessels and the rest
    outside = (small[0] < 0.15).float()[None]
    eye = F.max_pool2d(outside, 2 * BORDER + 1, stride=1, padding=BORDER)[0].numpy() == 0

    slow = filters.gaussian(green, 20)
    deviation = np.sqrt(filters.gaussian((green - slow) ** 2, 20))
    image = (green - slow) / (deviation + 0.02)

    ridges = np.where(eye, filters.sato(green, sigmas=RIDGE_WIDTHS, black_ridges=True), 0)
    high, low = np.quantile(ridges[eye], [1 - SURE_SHARE, 1 - LIKELY_SHARE])
    pieces = measure.label(filters.apply_hysteresis_threshold(ridges, low, high))
    large = np.bincount(pieces.ravel()) >= SMALLEST
    large[0] = False
    return Retina(torch.from_numpy(image), torch.from_numpy(large[pieces]))


def corrupt(
    image: torch.Tensor, vessels: torch.Tensor, size: Size, rng: np.random.Generator
) -> torch.Tensor:
    """What the model gets to see of a patch: gaps in the vessels, blur, noise."""
    image = image.clone()
    rows, cols = np.nonzero(vessels.numpy())
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    for k in rng.integers(0, len(rows), size.gaps) if len(rows) else ():
        near = (y - rows[k]) ** 2 + (x - cols[k]) ** 2 <= size.gap_radius**2
        image[torch.from_numpy(near)] = 0.0
    if size.blur:
        reach = math.ceil(3 * size.blur)
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / size.blur) ** 2)
        kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
        padded = F.pad(image[None, None], (reach,) * 4, mode="reflect")
        image = F.conv2d(F.conv2d(padded, kernel), kernel.mT)[0, 0]
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    return image + size.noise * noise


def patches(
    retina: Retina,
    rows: tuple[float, float],
    count: int,
    size: Size,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (count, 1, patch, patch), at random places that have vessels."""
    height, width = retina.image.shape
    low, high = (round(share * height) for share in rows)
    inputs, targets = [], []
    while len(inputs) < count:
        top = rng.integers(low, high - size.patch + 1)
        left = rng.integers(0, width - size.patch + 1)
        window = (slice(top, top + size.patch), slice(left, left + size.patch))
        vessels = retina.vessels[window]
        if vessels.float().mean() < 0.06:
            continue
        inputs.append(corrupt(retina.image[window], vessels, size, rng))
        targets.append(vessels)
    return torch.stack(inputs)[:, None], torch.stack(targets)[:, None]


class Block(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False)]
            layers += [nn.GroupNorm(1, after), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """Three levels: patches (N, 1, H, W) to logits (N, 1, H, W); H and W divisible by 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [Block(1, width), Block(width, 2 * width), Block(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([Block(6 * width, 2 * width), Block(3 * width, width)])
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for block, skip in zip(self.up, reversed(levels[:-1])):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skip], 1))
        return self.out(x)


def betti_name(alpha: float) -> str:
    return f"soft Dice + {alpha:g} Betti matching"


def loss_functions(size: Size) -> dict[str, nn.Module]:
    """The losses by their names; all take logits and masks (N, 1, H, W)."""
    dice = pyloss.nn.SoftDiceLoss(sigmoid=True)
    losses: dict[str, nn.Module] = {DICE: dice}
    for alpha in size.alphas:
        losses[betti_name(alpha)] = pyloss.BettiMatchingLoss(
            base_loss=dice,
            alpha=alpha,
            activation="sigmoid",
            filtration="superlevel",
            padding=size.padding,
            dims=size.dims,
        )
    return losses


class Training:
    """One model on its way. A copy goes on from the same state with the same patches."""

    def __init__(self, retina: Retina, size: Size, seed: int) -> None:
        torch.manual_seed(seed)
        self.retina, self.size = retina, size
        # channels_last: faster convolutions on the CPU
        self.model = UNet(size.width).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-4)
        self.rng = np.random.default_rng(seed)
        self.done = 0

    def copy(self) -> Training:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = torch.optim.AdamW(other.model.parameters(), weight_decay=1e-4)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.rng = copy.deepcopy(self.rng)
        return other

    def step(self, criterion: nn.Module) -> tuple[float, float]:
        """One step; the loss, and the seconds that its forward and backward took."""
        total = self.size.warmup + self.size.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.rate * schedule(self.done, total)
        x, y = patches(self.retina, TRAIN_ROWS, self.size.batch, self.size, self.rng)
        logits = self.model(x.contiguous(memory_format=torch.channels_last))
        # The graph is cut here, so that the clock sees the loss alone; the numbers are the same.
        leaf = logits.detach().requires_grad_()
        begin = time.perf_counter()
        loss = criterion(leaf, y)
        loss.backward()
        seconds = time.perf_counter() - begin
        logits.backward(leaf.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item(), seconds


def schedule(step: int, steps: int) -> float:
    """Share of the full rate: a short linear start, then half a cosine."""
    start = max(1, steps // 20)
    if step < start:
        return (step + 1) / start
    return 0.5 + 0.5 * math.cos(math.pi * (step - start) / (steps - start))


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Scores:
    p = torch.cat([model(part) for part in x.split(16)]).sigmoid()
    hard = p >= 0.5
    dice = 1 - pyloss.functional.soft_dice_loss(hard.float(), y)
    numbers = pyloss.betti_number_error(p, y)
    matching = pyloss.betti_matching_error(p, y)
    return Scores(float(dice), float(numbers.sum()), float(matching.sum()))


def train_all(
    retina: Retina,
    size: Size,
    seed: int,
    test: tuple[torch.Tensor, torch.Tensor],
    progress: Progress,
) -> tuple[list[Run], dict[str, nn.Module]]:
    """Warm-up, then one training with each loss; results and models by the name of the loss."""
    criteria = loss_functions(size)
    warm = Training(retina, size, seed)
    for step in range(size.warmup):
        loss, _ = warm.step(criteria[DICE])
        progress.update(step + 1, f"loss {loss:.3f}")
    runs, models = [], {}
    for number, (name, criterion) in enumerate(criteria.items()):
        training = warm.copy()
        losses, step_seconds, loss_seconds = [], [], []
        for step in range(size.steps):
            begin = time.perf_counter()
            loss, seconds = training.step(criterion)
            step_seconds.append(time.perf_counter() - begin)
            losses.append(loss)
            loss_seconds.append(seconds)
            done = size.warmup + number * size.steps + step + 1
            progress.update(done, f"loss {loss:.3f}")
        scores = evaluate(training.model, *test)
        step_ms, loss_ms = (1e3 * statistics.median(t) for t in (step_seconds, loss_seconds))
        runs.append(Run(seed, name, losses, scores, step_ms, loss_ms))
        models[name] = training.model
    return runs, models


def quality_table(runs: list[Run]) -> str:
    """Mean and standard deviation over the seeds of each loss."""
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        cells = [
            spread([getattr(run.scores, field) for run in mine], digits)
            for field, digits in (
                ("dice", 3),
                ("betti_number_error", 2),
                ("betti_matching_error", 2),
            )
        ]
        times = [
            f"{statistics.median(getattr(run, field) for run in mine):.1f} ms"
            for field in ("loss_ms", "step_ms")
        ]
        rows.append([name, *cells, *times])
    header = ["loss", "Dice", "Betti number error", "Betti matching error", "loss", "step"]
    return table(header, rows)


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} +- {deviation:.{digits}f}"


def check(runs: list[Run], blank: Scores) -> list[str]:
    """Every training must stay finite and find vessels better than marking everything does."""
    failures = []
    for run in runs:
        what = f"{run.name}, seed {run.seed}"
        if not all(math.isfinite(loss) for loss in run.losses):
            failures.append(f"{what}: a loss is not finite")
        if not run.scores.dice > blank.dice:
            failures.append(
                f"{what}: Dice is {run.scores.dice:.3f}, that of marking everything "
                f"{blank.dice:.3f}"
            )
    return failures


def draw(path: Path, x: torch.Tensor, y: torch.Tensor, models: dict[str, nn.Module]) -> str:
    """Matched and unmatched features of the masks that the first two models give for one patch.

    Returns a sentence on what was written; without matplotlib nothing is.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    from pyloss.visualize import draw_matching

    with torch.no_grad():
        masks = {name: model(x) >= 0 for name, model in list(models.items())[:2]}
    # The patch with the most to see: features of the first model's mask and of the target.
    counts = pyloss.betti_matching(masks[DICE][:, 0], y[:, 0], spatial_dims=2).counts
    busiest = int(counts.sum((1, 2)).argmax())
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    grid = figure.subplots(len(masks), 3, squeeze=False)
    for number, (line, (name, mask)) in enumerate(zip(grid, masks.items())):
        image, target = mask[busiest, 0].float(), y[busiest, 0].float()
        matching = pyloss.betti_matching(image[None], target[None], spatial_dims=2)
        line[0].imshow(x[busiest, 0].numpy(), cmap="gray", interpolation="nearest")
        line[0].set(title="input", ylabel=name, xticks=[], yticks=[])
        last = number == len(masks) - 1
        draw_matching(image, target, matching, line[1:], legend=last)
        # Its own names are those of the matching; "input" is the picture beside it here.
        for axis, what in zip(line[1:], ("prediction", "vessels")):
            axis.set_title(f"{what}: {axis.get_title().partition(': ')[2]}")
    figure.savefig(path, dpi=90)
    return f"Matched (coloured) and unmatched (red) features: {path}"


def run_all(options: Options, size: Size) -> list[str]:
    """The section with any sizes; examples/segment_vessels.py calls it as well."""
    try:
        retina = load_retina()
    except ImportError:
        return [MISSING]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    share = retina.vessels.float().mean()
    print(
        f"retina image {'x'.join(map(str, retina.image.shape))}, {share:.1%} vessels; U-Net of "
        f"{sum(p.numel() for p in UNet(size.width).parameters())} parameters; {size.warmup} + "
        f"{size.steps} steps of {size.batch} patches {size.patch}x{size.patch}"
    )
    # The same patches whatever the seed.
    test = patches(retina, TEST_ROWS, size.test_patches, size, np.random.default_rng(12345))
    runs: list[Run] = []
    models: dict[str, nn.Module] = {}
    for seed in range(options.seed, options.seed + size.seeds):
        progress = Progress(f"seed {seed}", size.warmup + (1 + len(size.alphas)) * size.steps)
        trained, found = train_all(retina, size, seed, test, progress)
        runs += trained
        models = models or found
    everything = 1 - float(pyloss.functional.soft_dice_loss(torch.ones(test[1].shape), test[1]))
    failures = check(runs, Scores(everything, 0.0, 0.0))

    seeds = f"{size.seeds} seeds" if size.seeds > 1 else "one seed"
    print(f"\n{size.test_patches} held-out patches, mean +- standard deviation over {seeds}")
    print(quality_table(runs))
    print(
        "Betti number error: wrong number of pieces and of holes; Betti matching error: pieces and "
        "holes of\neither mask without a counterpart in the other at the same place. Both per "
        "patch, summed over the two."
    )
    report = {
        "size": asdict(size),
        "seed": options.seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "failures": failures,
        "runs": [asdict(run) for run in runs],
    }
    (options.out / "segmentation.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + draw(options.out / "segmentation.png", *test, models))
    return failures


@section("segmentation", "vessels of a retina image, soft Dice with and without Betti matching")
def segmentation(options: Options) -> list[str]:
    return run_all(options, QUICK if options.quick else FULL)
