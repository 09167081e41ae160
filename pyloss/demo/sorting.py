"""Section "sorting": learns to read four-digit numbers from their order alone.

Four of scikit-learn's digits side by side are an image of a number from 0000 to 9999. A small CNN
gives every image a score; of a set of n images only the order of their numbers is known. The
scores go through a relaxed sorting network, and the loss compares its permutation matrix with the
true one (2105.04019, 2203.09630). No image of a digit is in both the training and the test.

`examples/sort_digits.py` runs the same training at its full length, with arguments.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.sections import Options, section

MISSING = "scikit-learn is not installed: pip install 'pyloss[demo]'"
DIGITS = 4  # per number
TEST_DIGITS = 500  # images of single digits kept for the test
# What the full run must reach (46 %, 74 % and 8 %, 57 % were measured); chance is 0.8 %, 20 % and
# 0.0003 %, 11 %.
AT_LEAST = {5: (0.30, 0.60), 9: (0.03, 0.45)}  # exact match, element-wise
LOSS_TOLERANCE = 1e-5  # of the fused loss and its gradient, relative to the explicit matrix


@dataclass(frozen=True)
class Size:
    """Length of the trainings; one for each number of images per set."""

    set_sizes: tuple[int, ...] = (5, 9)
    steps: int = 300
    images: int = 250  # per step, in sets of n
    rate: float = 3e-3
    test_sets: int = 1000
    shown: int = 4  # sets in the picture


FULL = Size()
QUICK = Size(set_sizes=(5,), steps=6, images=50, test_sets=100, shown=2)


@dataclass(frozen=True)
class Digits:
    images: Tensor  # (N, 8, 8), 0 to 1
    labels: Tensor  # (N,) 0 to 9

    def sets(self, count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, n, 1, 8, 32) and their numbers (count, n)."""
        index = torch.randint(len(self.labels), (count, n, DIGITS), generator=generator)
        images = self.images[index].permute(0, 1, 3, 2, 4).reshape(count, n, 1, 8, 8 * DIGITS)
        weights = 10.0 ** torch.arange(DIGITS - 1, -1, -1)
        return images, (self.labels[index].float() * weights).sum(-1)


def load_digits() -> tuple[Digits, Digits]:
    """Training and test part, always the same; ImportError without scikit-learn."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = torch.from_numpy(found.images).float() / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


class Scorer(nn.Module):
    """Images (sets, n, 1, 8, 32) to one score each, (sets, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 32, 3, padding=1)
        self.c2 = nn.Conv2d(32, 64, 3, padding=1)
        self.f1 = nn.Linear(64 * 2 * 2 * DIGITS, 64)
        self.f2 = nn.Linear(64, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(images.flatten(0, 1))), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(x.flatten(1)))).view(images.shape[:2])


@dataclass(frozen=True)
class Sorter:
    """How scores become a loss."""

    network: str = "odd_even"
    distribution: str = "cauchy"
    steepness: float = 10.0
    kind: str = "bce"

    def __call__(self, scores: Tensor, numbers: Tensor, done: float = 0.0) -> Tensor:
        """`done`, the share of the training that is over, is for schedules; there is none here."""
        return pyloss.sorting_cross_entropy(
            scores,
            numbers,
            kind=self.kind,
            network=self.network,
            distribution=self.distribution,
            steepness=self.steepness,
        )


@dataclass
class Run:
    n: int
    seed: int
    exact: float = math.nan  # share of sets whose whole order is right
    element: float = math.nan  # share of images at the right rank
    exact_5: float = math.nan  # exact match of sets of five, whatever n was trained
    seconds: float = 0.0
    step_ms: float = 0.0  # this and the next: processor time, median over the steps
    sorter_ms: float = 0.0  # forward and backward from the scores to the loss
    losses: list[float] = field(default_factory=list)


def train(
    data: Digits,
    n: int,
    size: Size,
    seed: int,
    criterion: Callable[[Tensor, Tensor, float], Tensor],
    progress: Progress | None = None,
) -> tuple[Scorer, Run]:
    """Adam with a cosine schedule; the seed decides on first weights and sets."""
    torch.manual_seed(seed)
    model, run = Scorer(), Run(n, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps)
    generator = torch.Generator().manual_seed(seed + 1)
    step_seconds, sorter_seconds = [], []
    start = time.perf_counter()
    for step in range(size.steps):
        step_begin = time.process_time()
        images, numbers = data.sets(max(1, size.images // n), n, generator)
        scores = model(images)
        # The graph is cut here, so that the clock sees the sorter alone; the numbers are the same.
        leaf = scores.detach().requires_grad_()
        begin = time.process_time()
        loss = criterion(leaf, numbers, step / size.steps)
        loss.backward()
        sorter_seconds.append(time.process_time() - begin)
        optimizer.zero_grad()
        scores.backward(leaf.grad)
        optimizer.step()
        schedule.step()
        step_seconds.append(time.process_time() - step_begin)
        run.losses.append(loss.item())
        if progress:
            progress.update(step + 1, f"loss {run.losses[-1]:.3f}")
    run.seconds = time.perf_counter() - start
    run.step_ms, run.sorter_ms = (
        1e3 * statistics.median(t) for t in (step_seconds, sorter_seconds)
    )
    return model, run


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits, n: int, sets: int) -> tuple[float, float]:
    """Exact match and element-wise accuracy; the sets are the same for every model."""
    generator = torch.Generator().manual_seed(1234)
    scores, true = [], []
    for count in [100] * (sets // 100) + [sets % 100] * (sets % 100 > 0):
        images, numbers = data.sets(count, n, generator)
        scores.append(model(images))
        true.append(numbers)
    found = pyloss.metrics.ranking_accuracy(torch.cat(scores), torch.cat(true))
    return found.exact_match.item(), found.element_wise.item()


def judge(model: nn.Module, data: Digits, run: Run, sets: int) -> None:
    """Enters the accuracies on held-out digits."""
    run.exact, run.element = accuracy(model, data, run.n, sets)
    run.exact_5 = run.exact if run.n == 5 else accuracy(model, data, 5, sets)[0]


# --- checks -------------------------------------------------------------------------------------


def check_loss(sorter: Sorter, scores: Tensor, numbers: Tensor) -> list[str]:
    """The fused loss and its gradient against the same from the permutation matrix."""
    results = []
    for fused in (True, False):
        x = scores.detach().requires_grad_()
        if fused:
            loss = sorter(x, numbers)
        else:
            matrix = pyloss.soft_permutation(
                x,
                network=sorter.network,
                distribution=sorter.distribution,
                steepness=sorter.steepness,
            )
            true = F.one_hot(numbers.argsort(-1), numbers.shape[-1]).mT.to(matrix.dtype)
            loss = F.binary_cross_entropy(matrix.clamp(0, 1), true)
        loss.backward()
        results.append((loss.detach(), x.grad))
    failures = []
    for what, ours, theirs in zip(("loss", "gradient"), *results):
        gap = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not gap <= LOSS_TOLERANCE:
            failures.append(f"fused {what} differs from that of the matrix by {gap:.1e}")
    return failures


def check(run: Run) -> list[str]:
    """Losses stay finite, and the order is learned far better than chance has it."""
    failures = []
    if not all(math.isfinite(loss) for loss in run.losses):
        failures.append(f"n = {run.n}: a loss is not finite")
    for what, value, least in zip(
        ("exact match", "element-wise accuracy"), (run.exact, run.element), AT_LEAST[run.n]
    ):
        if not value >= least:
            failures.append(f"n = {run.n}: {what} is {value:.1%}, less than {least:.0%}")
    return failures


# --- report -------------------------------------------------------------------------------------


@torch.no_grad()
def draw(path: Path, models: dict[int, nn.Module], data: Digits, shown: int) -> str:
    """Held-out sets in the order of their scores; numbers at a wrong rank are red.

    Returns a sentence on what was written; without matplotlib nothing is.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    widest = max(models)
    figure = Figure(figsize=(1.3 * widest, 0.75 * shown * len(models)), layout="constrained")
    FigureCanvasAgg(figure)  # no display and no global state of pyplot
    grid = figure.subplots(shown * len(models), widest, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for block, (n, model) in enumerate(models.items()):
        images, numbers = data.sets(shown, n, torch.Generator().manual_seed(4321))
        order = model(images).argsort(-1)
        for line, image, value, ranks in zip(grid[block * shown :], images, numbers, order):
            for axes, index, true in zip(line, ranks, value.sort().values):
                right = value[index] == true
                axes.imshow(image[index, 0].numpy(), cmap="gray_r", interpolation="nearest")
                axes.set_title(
                    f"{int(value[index]):04d}", fontsize=8, color="black" if right else "red"
                )
    figure.savefig(path, dpi=90)
    return f"Held-out sets, sorted by score (red: wrong rank): {path}"


@section("sorting", "four-digit numbers learned from their order: a relaxed sorting network")
def sorting(options: Options) -> list[str]:
    try:
        train_digits, test_digits = load_digits()
    except ImportError:
        return [MISSING]
    size = QUICK if options.quick else FULL
    sorter = Sorter()
    print(
        f"{len(train_digits.labels)} images of digits for training, {TEST_DIGITS} for the test; "
        f"{size.steps} steps of {size.images} numbers; {sorter.network}, {sorter.distribution}, "
        f"steepness {sorter.steepness:g}"
    )
    runs, models, failures = [], {}, []
    before = torch.get_num_threads()
    # Small operations: on a busy machine, more threads would wait for each other.
    torch.set_num_threads(options.threads or 1)
    try:
        for n in size.set_sizes:
            progress = Progress(f"sets of {n}", size.steps)
            model, run = train(train_digits, n, size, options.seed, sorter, progress)
            judge(model, test_digits, run, size.test_sets)
            images, numbers = test_digits.sets(20, n, torch.Generator().manual_seed(options.seed))
            with torch.no_grad():
                scores = model(images)
            failures += [f"n = {n}: {failure}" for failure in check_loss(sorter, scores, numbers)]
            if not options.quick:
                failures += check(run)
            runs.append(run)
            models[n] = model
    finally:
        torch.set_num_threads(before)

    rows = []
    for run in runs:
        rows.append([f"sets of {run.n}", f"{run.exact:.1%}", f"{run.element:.1%}"])
        rows[-1] += [f"{run.sorter_ms / run.step_ms:.1%}", f"{run.seconds:.0f} s"]
        chance = [100 / math.factorial(run.n), 100 / run.n]
        rows.append(["  by chance", *(f"{share:.2g}%" for share in chance), "-", "-"])
    print(f"\n{size.test_sets} held-out sets")
    print(table(["", "exact match", "element-wise", "sorter's share", "time"], rows))
    print("Exact match: the whole order is right. Element-wise: images at their right rank.")
    report = {
        "size": asdict(size),
        "sorter": asdict(sorter),
        "seed": options.seed,
        "torch": torch.__version__,
        "threads": options.threads or 1,
        "failures": failures,
        "runs": [asdict(run) for run in runs],
    }
    path = options.out / "sorting.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + draw(options.out / "sorting.png", models, test_digits, size.shown))
    print(f"Figures: {path}")
    return failures
