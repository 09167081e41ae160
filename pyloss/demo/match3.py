"""Section "match3": is there, for a token, a pair of others with which it sums to 0?

Tokens are numbers modulo M. The answer for token i needs pairs (j, k), which one layer of tensor
attention sees at once and a layer of plain attention does not. First by construction: features for
which the logsumexp alone answers. Then trained: the same small model with tensor attention, with
plain attention of the same width, and with wider plain attention that has more parameters.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyloss
from pyloss.demo.progress import Progress, table
from pyloss.demo.sections import Options, section

MODULUS, TOKENS = 19, 6
BATCH, RATE, HIDDEN, TEST_SIZE = 128, 4e-3, 64, 4000
TEMPERATURE = 0.5  # of the construction: sharpness of the scores
# What the full run must show; far from both sides of what was measured.
TENSOR_AT_LEAST, PLAIN_AT_MOST, AHEAD_BY = 0.92, 0.85, 0.08


@dataclass(frozen=True)
class Size:
    steps: int
    points: int  # of the accuracy curves
    construction: tuple[tuple[int, int], ...]  # modulus and number of tokens


FULL = Size(steps=1800, points=12, construction=((19, 6), (31, 8), (37, 64), (61, 128)))
QUICK = Size(steps=24, points=3, construction=((19, 6), (37, 64)))


@dataclass(frozen=True)
class Run:
    name: str
    tensor: bool
    width: int


RUNS = (
    Run("tensor attention, width 32", tensor=True, width=32),
    Run("plain attention, width 32", tensor=False, width=32),
    Run("plain attention, width 48", tensor=False, width=48),
)


@dataclass
class Result:
    name: str
    parameters: int
    seconds: float
    steps: list[int]
    losses: list[float]
    accuracies: list[float]


# --- the task -----------------------------------------------------------------------------------


def answers(x: Tensor, modulus: int) -> Tensor:
    """True where a token of ``x`` (batch, tokens) has any j, k with a sum of 0 (mod modulus)."""
    pairs = (x[:, :, None] + x[:, None, :]).flatten(1) % modulus
    return ((x[:, :, None] + pairs[:, None, :]) % modulus == 0).any(-1)


def waves(x: Tensor, modulus: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi f x / M for all frequencies f = 1, ..., (M - 1) / 2."""
    frequencies = torch.arange(1, (modulus + 1) // 2)
    angle = 2 * math.pi * x.unsqueeze(-1) * frequencies / modulus
    return angle.cos(), angle.sin()


def constructed(x: Tensor, modulus: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The answers from one call of tensor attention without any learned number.

    With q = [C, -C, -S, -S], k1 = [C, S, C, S], k2 = [C, S, S, C] the score is the sum over f of
    cos(2 pi f (x_i + x_j + x_k) / M) = M/2 - 1/2 where the three sum to 0, and -1/2 elsewhere. One
    match lifts the logsumexp over all pairs by more than a threshold.
    """
    c, s = waves(x, modulus)
    q, k1, k2 = (
        torch.cat(parts, -1).unsqueeze(1).to(dtype)
        for parts in ([c, -c, -s, -s], [c, s, c, s], [c, s, s, c])
    )
    one = torch.ones_like(q[..., :1])
    _, lse = pyloss.tensor_attention(q, k1, k2, one, one, scale=TEMPERATURE, return_lse=True)
    threshold = TEMPERATURE * modulus / 4 + math.log(x.shape[1]) - TEMPERATURE / 4
    return lse.squeeze(1) > threshold


def check_construction(size: Size, seed: int) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and what failed."""
    generator = torch.Generator().manual_seed(seed)
    rows, failures = [], []
    for modulus, tokens in size.construction:
        x = torch.randint(modulus, (20, tokens), generator=generator)
        if tokens**2 > modulus:  # of few different numbers, or every token would have a match
            few = torch.randint(modulus, (20, 5), generator=generator)
            x = few.gather(1, torch.randint(5, (20, tokens), generator=generator))
        wanted = answers(x, modulus)
        for dtype in (torch.float32, torch.bfloat16):
            right = (constructed(x, modulus, dtype) == wanted).float().mean().item()
            kind = str(dtype).removeprefix("torch.")
            features = 2 * (modulus - 1)
            share = wanted.float().mean().item()
            rows.append([str(modulus), str(tokens), str(features), kind, f"{share:.0%}"])
            rows[-1].append(f"{right:.2%}")
            if right < 1.0:
                failures.append(
                    f"construction, M = {modulus}, n = {tokens}, {kind}: {right:.2%} right"
                )
    return rows, failures


# --- the models ---------------------------------------------------------------------------------


class Model(nn.Module):
    """One head of attention over the waves of the tokens, then a small network per token."""

    def __init__(self, tensor: bool, width: int) -> None:
        super().__init__()
        features = MODULUS - 1
        self.query = nn.Linear(features, width)
        sets = 2 if tensor else 1
        self.keys = nn.ModuleList(nn.Linear(features, width) for _ in range(sets))
        self.values = nn.ModuleList(nn.Linear(features, width) for _ in range(sets))
        self.head = nn.Sequential(
            nn.Linear(features + width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(waves(x, MODULUS), -1)
        q = self.query(x).unsqueeze(1)
        keys = [layer(x).unsqueeze(1) for layer in self.keys]
        values = [layer(x).unsqueeze(1) for layer in self.values]
        if len(keys) == 2:
            seen = pyloss.tensor_attention(q, *keys, *values)
        else:
            seen = F.scaled_dot_product_attention(q, *keys, *values)
        return self.head(torch.cat([x, seen.squeeze(1)], -1)).squeeze(-1)


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randint(MODULUS, (count, TOKENS), generator=generator)
    return x, answers(x, MODULUS)


def accuracy(model: Model, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return ((model(x) > 0) == y).float().mean().item()


def train(run: Run, size: Size, seed: int) -> Result:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 100)  # the same data for every run
    test = sample(TEST_SIZE, torch.Generator().manual_seed(seed + 999))
    model = Model(run.tensor, run.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps)
    progress = Progress(run.name, size.steps)
    every = max(1, size.steps // size.points)
    result = Result(run.name, sum(p.numel() for p in model.parameters()), 0.0, [], [], [])
    start = time.perf_counter()
    for step in range(1, size.steps + 1):
        x, y = sample(BATCH, generator)
        loss = F.binary_cross_entropy_with_logits(model(x), y.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == size.steps:
            result.steps.append(step)
            result.losses.append(loss.item())
            result.accuracies.append(accuracy(model, *test))
        note = f"accuracy {result.accuracies[-1]:.1%}" if result.steps else ""
        progress.update(step, note)
    result.seconds = time.perf_counter() - start
    return result


# --- the section --------------------------------------------------------------------------------


def check_training(results: list[Result]) -> list[str]:
    """What the trainings fail to show."""
    tensor, same_width, *_ = results
    failures = []
    if not tensor.accuracies[-1] >= TENSOR_AT_LEAST:
        failures.append(
            f"{tensor.name}: {tensor.accuracies[-1]:.1%} right, less than {TENSOR_AT_LEAST:.0%}"
        )
    if not same_width.accuracies[-1] <= PLAIN_AT_MOST:
        failures.append(
            f"{same_width.name}: {same_width.accuracies[-1]:.1%} right, more than "
            f"{PLAIN_AT_MOST:.0%}: the task is too easy to show anything"
        )
    best = max(r.accuracies[-1] for r in results[1:])
    if not tensor.accuracies[-1] >= best + AHEAD_BY:
        failures.append(f"tensor attention is not {AHEAD_BY:.0%} ahead of the best plain attention")
    return failures


def draw(path: Path, results: list[Result], majority: float) -> str:
    """Accuracy over the steps; a sentence on what was written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"No picture: {path.name} needs matplotlib, which is not installed."
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for result in results:
        label = f"{result.name} ({result.parameters} parameters)"
        axes.plot(result.steps, [100 * a for a in result.accuracies], marker=".", label=label)
    axes.axhline(100 * majority, color="gray", linewidth=0.8, linestyle="--", label="majority")
    axes.set(title=f"Match3: {TOKENS} tokens modulo {MODULUS}", xlabel="step", ylabel="accuracy, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return f"Curves: {path}"


@section("match3", "pairs that sum to zero: tensor attention against plain attention")
def match3(options: Options) -> list[str]:
    size = QUICK if options.quick else FULL
    print(
        "A token matches if two others (or itself again) sum with it to 0 modulo M. By "
        "construction,\nwithout training, from the logsumexp of one call:"
    )
    rows, failures = check_construction(size, options.seed)
    print(table(["M", "tokens", "features", "dtype", "matches", "right"], rows))

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are far too small for more
    try:
        print(f"\nTrained, M = {MODULUS}, {TOKENS} tokens, {size.steps} steps of {BATCH}:")
        results = [train(run, size, options.seed) for run in RUNS]
    finally:
        torch.set_num_threads(before)
    _, y = sample(TEST_SIZE, torch.Generator().manual_seed(options.seed + 999))
    majority = max(y.float().mean().item(), 1 - y.float().mean().item())
    if not options.quick:
        failures += check_training(results)
    rows = [
        [r.name, str(r.parameters), f"{r.losses[-1]:.3f}", f"{r.accuracies[-1]:.1%}"]
        + [f"{r.seconds:.0f} s"]
        for r in results
    ]
    rows.append(["always the same answer", "0", "-", f"{majority:.1%}", "-"])
    print(table(["model", "parameters", "loss", "right", "time"], rows))

    report = {
        "size": asdict(size),
        "seed": options.seed,
        "torch": torch.__version__,
        "majority": majority,
        "failures": failures,
        "runs": [asdict(r) for r in results],
    }
    path = options.out / "match3.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(draw(options.out / "match3.png", results, majority))
    print(f"Figures: {path}")
    return failures
