"""Section "language-model": a small GPT on the library's documentation, one loss after the other.

Two trainings that differ in nothing but the loss function, `F.cross_entropy` and
`pyloss.fused_cross_entropy`, must stay together; then the comp-sum losses with tau = 0.7, 1 and 1.7
learn from targets of which 20 % are wrong, and are judged on right ones.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.nn.functional as F

import pyloss
from pyloss.demo import curves
from pyloss.demo.memory import PeakMemory
from pyloss.demo.model import GPT, generate
from pyloss.demo.progress import Progress, table
from pyloss.demo.sections import Options, section
from pyloss.demo.text import END, UNKNOWN, Corpus, load_corpus

PYTORCH, PYLOSS = "F.cross_entropy", "pyloss.fused_cross_entropy"
WRONG_SHARE = 0.2
FIRST_STEPS, FIRST_TOLERANCE = 20, 1e-4
LAST_STEPS, LAST_TOLERANCE = 10, 0.02


@dataclass(frozen=True)
class Size:
    """Shape of the model and length of the training."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    batch: int  # windows of `context` tokens per step
    steps: int
    rate: float = 1e-2
    embedding_rate: float = 3e-2
    evaluations: int = 12  # points of the validation curve
    sample: int = 80  # tokens of generated text


FULL = Size(vocabulary=8192, width=64, layers=2, heads=4, context=128, batch=16, steps=100)
# 24 steps: the check on the first 20 needs them.
QUICK = Size(8192, width=16, layers=1, heads=2, context=32, batch=2, steps=24, sample=20)


@dataclass(frozen=True)
class Run:
    """One training. `tau` None is F.cross_entropy."""

    name: str
    tau: float | None = None
    wrong_targets: bool = False
    sample: bool = False


RUNS = (
    Run(PYTORCH),
    Run(PYLOSS, tau=1.0, sample=True),
    Run("tau = 0.7", tau=0.7, wrong_targets=True),
    Run("tau = 1", tau=1.0, wrong_targets=True),
    Run("tau = 1.7", tau=1.7, wrong_targets=True),
)


@dataclass(frozen=True)
class Data:
    """Targets are one token ahead of inputs: inputs[i] predicts targets[i]."""

    inputs: np.ndarray
    targets: np.ndarray
    wrong_targets: np.ndarray  # `targets` with WRONG_SHARE of them replaced
    validation_inputs: np.ndarray
    validation_targets: np.ndarray


@dataclass
class Result:
    name: str
    losses: list[float]  # training loss of each step
    validation_steps: list[int]
    curve_accuracies: list[float]  # on one batch of right targets, at validation_steps
    validation_loss: float  # cross-entropy on right targets, whatever the training loss
    validation_accuracy: float
    step_ms: float  # median
    loss_ms: float  # median; forward and backward of the loss alone
    peak_mib: float | None  # largest size of the process in a training step
    loss_mib: float | None  # growth of the process during the loss, median
    memory_method: str
    sample: list[int] | None


def corrupt(targets: np.ndarray, classes: int, share: float, seed: int) -> np.ndarray:
    """Replaces `share` of the targets, drawn at random, by other classes drawn uniformly."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(targets.shape) < share
    shift = rng.integers(1, classes, targets.shape)
    return np.where(wrong, (targets + shift) % classes, targets)


def prepare(corpus: Corpus, seed: int) -> Data:
    """Splits the corpus into inputs and targets, and draws the wrong targets."""
    targets = corpus.train[1:]
    return Data(
        inputs=corpus.train[:-1],
        targets=targets,
        wrong_targets=corrupt(targets, len(corpus.words), WRONG_SHARE, seed),
        validation_inputs=corpus.validation[:-1],
        validation_targets=corpus.validation[1:],
    )


def loss_function(run: Run) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if run.tau is None:
        return F.cross_entropy
    if run.tau == 1.0:
        return pyloss.fused_cross_entropy  # by assignment: the call below is the same
    return lambda logits, target: pyloss.fused_cross_entropy(logits, target, tau=run.tau)


def train(
    run: Run,
    size: Size,
    data: Data,
    options: Options,
    prompt: list[int],
    banned: tuple[int, ...],
    report: Callable[[int, float], None],
) -> Result:
    """Trains one model from scratch; everything but the loss depends on the seed alone."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = GPT(size.vocabulary, size.context, size.width, size.layers, size.heads)
    groups = model.parameter_groups(size.embedding_rate, size.rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    loss_fn = loss_function(run)
    inputs = torch.from_numpy(data.inputs)
    targets = torch.from_numpy(data.wrong_targets if run.wrong_targets else data.targets)
    rng = np.random.default_rng(options.seed)
    window = torch.arange(size.context)
    evaluate_at = {round(size.steps * k / size.evaluations) for k in range(size.evaluations + 1)}

    losses, step_seconds, loss_seconds, loss_growth = [], [], [], []
    validation_steps, curve_accuracies = [], []
    memory = PeakMemory()
    peak: float | None = None
    for step in range(size.steps + 1):
        if step in evaluate_at:
            validation_steps.append(step)
            curve_accuracies.append(evaluate(model, size, data, size.batch)[1])
        if step == size.steps:
            break
        starts = torch.from_numpy(rng.integers(0, len(inputs) - size.context, size.batch))
        where = starts[:, None] + window
        batch, wanted = inputs[where], targets[where].flatten()
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * schedule(step, size.steps)

        memory.reset()
        begin = time.perf_counter()
        logits = model(batch).flatten(0, 1)
        # The graph is cut at the logits, so that the clock and the memory reading see the loss
        # alone; the gradient that it leaves there is then sent through the model. The numbers are
        # the same as without the cut.
        leaf = logits.detach().requires_grad_()
        peak = _larger(peak, memory.peak())
        memory.reset()
        before = memory.peak()
        loss_begin = time.perf_counter()
        loss = loss_fn(leaf, wanted)
        loss.backward()
        loss_end = time.perf_counter()
        after = memory.peak()
        logits.backward(leaf.grad)
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        peak = _larger(peak, memory.peak())
        losses.append(loss.item())
        del logits, leaf, loss  # `loss` leads to the logits and their gradient
        step_seconds.append(end - begin)
        loss_seconds.append(loss_end - loss_begin)
        if memory.can_reset and before is not None and after is not None:
            loss_growth.append(after - before)
        report(step + 1, losses[-1])

    validation_loss, validation_accuracy = evaluate(model, size, data, 8 * size.batch)
    sample = None
    if run.sample:
        generator = torch.Generator().manual_seed(options.seed)
        sample = generate(model, prompt, size.sample, generator=generator, banned=banned)
    return Result(
        name=run.name,
        losses=losses,
        validation_steps=validation_steps,
        curve_accuracies=curve_accuracies,
        validation_loss=validation_loss,
        validation_accuracy=validation_accuracy,
        step_ms=1e3 * statistics.median(step_seconds),
        loss_ms=1e3 * statistics.median(loss_seconds),
        peak_mib=peak,
        loss_mib=statistics.median(loss_growth) if loss_growth else None,
        memory_method=memory.method,
        sample=sample,
    )


def _larger(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else max(a, b)


def schedule(step: int, steps: int) -> float:
    """Share of the full rate: linear warm-up over a tenth of the training, then half a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


@torch.no_grad()
def evaluate(model: GPT, size: Size, data: Data, windows: int) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the first `windows` windows of the validation text."""
    rows = min(windows, len(data.validation_inputs) // size.context)
    shape = (rows, size.context)
    inputs = torch.from_numpy(data.validation_inputs[: rows * size.context]).view(shape)
    targets = torch.from_numpy(data.validation_targets[: rows * size.context]).view(shape)
    loss = right = 0.0
    for x, y in zip(inputs.split(size.batch), targets.split(size.batch), strict=True):
        logits = model(x).flatten(0, 1)
        # The judge is PyTorch's own loss for every run.
        loss += float(F.cross_entropy(logits, y.flatten(), reduction="sum"))
        right += float((logits.argmax(1) == y.flatten()).sum())
    return loss / targets.numel(), right / targets.numel()


def _worker(connection: Connection, *args) -> None:
    try:
        result = train(*args, report=lambda step, loss: connection.send((step, loss)))
        connection.send(result)
    except Exception:
        connection.send(traceback.format_exc())


def in_own_process(run: Run, size: Size, *args) -> Result:
    """Trains in a fresh process, so that no run inherits the allocator's caches of another.

    Where there is a fork server it is used: it imports torch once, and each run starts from it in
    a tenth of a second with nothing else done yet. Elsewhere each run imports torch again.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(theirs, run, size, *args), daemon=True)
    process.start()
    theirs.close()
    progress = Progress(run.name.ljust(len(PYLOSS)), size.steps)
    try:
        while True:
            message = ours.recv()
            if isinstance(message, Result):
                return message
            if isinstance(message, str):
                raise RuntimeError(f"the training with {run.name} failed:\n{message}")
            step, loss = message
            progress.update(step, f"loss {loss:.3f}")
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the training with {run.name} ended with exit code {process.exitcode}"
        ) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()


def compare_curves(
    expected: list[float],
    actual: list[float],
    *,
    first: int = FIRST_STEPS,
    first_tolerance: float = FIRST_TOLERANCE,
    last: int = LAST_STEPS,
    last_tolerance: float = LAST_TOLERANCE,
) -> list[str]:
    """What is wrong between two loss curves that should be one; empty where they agree.

    Rounding differs between two correct losses, and training multiplies such differences, so the
    first steps must agree closely and the last ones roughly.
    """
    if len(expected) != len(actual) or len(expected) < first:
        return [f"curves of {len(expected)} and {len(actual)} steps, at least {first} needed"]
    gaps = [abs(a - b) for a, b in zip(expected, actual, strict=True)]
    failures = []
    for what, part, tolerance in (
        (f"first {first}", gaps[:first], first_tolerance),
        (f"last {last}", gaps[-last:], last_tolerance),
    ):
        # `not (gap <= tolerance)` also catches NaN.
        if not all(gap <= tolerance for gap in part):
            worst = max(part, key=lambda gap: math.inf if math.isnan(gap) else gap)
            failures.append(
                f"losses differ by {worst:.2g} in the {what} steps, {tolerance:g} allowed"
            )
    return failures


def check_learning(result: Result) -> list[str]:
    """A training must stay finite and beat the untrained model's accuracy on right targets."""
    failures = []
    if not all(math.isfinite(loss) for loss in [*result.losses, result.validation_loss]):
        failures.append(f"{result.name}: a loss is not finite")
    # Not the validation loss: tau > 1 gives up on unlikely targets, so its cross-entropy may grow.
    first, last = result.curve_accuracies[0], result.validation_accuracy
    if not last > first:
        failures.append(f"{result.name}: accuracy went from {first:.1%} to {last:.1%}")
    return failures


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} MiB"


def cost_table(results: list[Result]) -> str:
    rows = [
        [
            r.name,
            f"{r.loss_ms:.1f} ms",
            f"{r.step_ms:.0f} ms",
            f"{r.loss_ms / r.step_ms:.0%}",
            _mib(r.loss_mib),
            _mib(r.peak_mib),
        ]
        for r in results
    ]
    header = ["loss", "loss time", "step", "share", "memory of the loss", "peak of the process"]
    return table(header, rows)


def quality_table(results: list[Result]) -> str:
    rows = [[r.name, f"{r.validation_loss:.3f}", f"{r.validation_accuracy:.1%}"] for r in results]
    return table(["loss", "validation loss", "accuracy"], rows)


@section("language-model", "a small GPT on Python's documentation, F.cross_entropy against pyloss")
def language_model(options: Options) -> list[str]:
    size = QUICK if options.quick else FULL
    corpus = load_corpus(size.vocabulary)
    tokens = size.batch * size.context
    print(
        f"text: {len(corpus.train)} tokens to train, {len(corpus.validation)} to validate, "
        f"vocabulary {size.vocabulary}; {size.steps} steps of {tokens} tokens"
    )
    data = prepare(corpus, options.seed)
    prompt = corpus.encode("The function returns")
    banned = tuple(corpus.words.index(word) for word in (UNKNOWN, END))
    results = [in_own_process(run, size, data, options, prompt, banned) for run in RUNS]

    clean = [r for r, run in zip(results, RUNS, strict=True) if not run.wrong_targets]
    wrong = [r for r, run in zip(results, RUNS, strict=True) if run.wrong_targets]
    failures = compare_curves(clean[0].losses, clean[1].losses)
    for result in results:
        failures += check_learning(result)

    print("\nMedians per step; loss time and memory: forward and backward of the loss alone")
    print(cost_table(results))
    print(f"Peak memory: {results[0].memory_method}.")
    print("\nRight targets: validation loss (cross-entropy) and accuracy after training")
    print(quality_table(clean))
    gaps = [abs(a - b) for a, b in zip(clean[0].losses, clean[1].losses, strict=True)]
    print(
        f"Largest difference of the two training losses: {max(gaps[:FIRST_STEPS]):.1e} in the "
        f"first {FIRST_STEPS} steps ({FIRST_TOLERANCE:g} allowed), {max(gaps[-LAST_STEPS:]):.1e} "
        f"in the last {LAST_STEPS} ({LAST_TOLERANCE:g} allowed)."
    )
    print(f"\n{WRONG_SHARE:.0%} wrong targets in training; judged on right targets")
    print(quality_table(wrong))
    print(
        "The gradient of a word is p^(tau-1) times that of cross-entropy, p its probability: "
        "tau > 1\ngives up on targets that look unlikely, the wrong ones and rare words alike, so "
        "read its accuracy\nand not its cross-entropy; tau < 1 chases them."
    )
    for result in results:
        if result.sample is not None:
            print(f"\nText of the model trained with {result.name}:")
            print("\n".join(f"  {line}" for line in corpus.decode(result.sample).splitlines()))

    report = {
        "size": asdict(size),
        "text_crc32": zlib.crc32(corpus.train.tobytes()),
        "seed": options.seed,
        "torch": torch.__version__,
        "threads": options.threads or torch.get_num_threads(),
        "failures": failures,
        "runs": [asdict(result) for result in results],
    }
    (options.out / "language_model.json").write_text(json.dumps(report, indent=1) + "\n")
    picture = options.out / "language_model.png"
    print("\n" + curves.draw(picture, clean, wrong))
    return failures
