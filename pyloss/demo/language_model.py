"""Section "language-model": a small GPT on the library's documentation, one loss after the other.

Three trainings that differ in nothing but the loss function, `F.cross_entropy`,
`pyloss.fused_cross_entropy` and `pyloss.fused_linear_cross_entropy` (the output layer and the loss
in one, without stored logits), must stay together; then the comp-sum losses with tau = 0.7, 1 and
1.7 learn from targets of which 20 % are wrong, and are judged on right ones.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
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
PYLOSS_LINEAR = "pyloss.fused_linear_cross_entropy"
WRONG_SHARE = 0.2
FIRST_STEPS, FIRST_TOLERANCE = 20, 1e-4
LAST_STEPS, LAST_TOLERANCE = 10, 0.02
# Logits smaller than this drown in what the allocator keeps anyway.
MEASURABLE_MIB = 16.0


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
    """One training. `tau` None is F.cross_entropy; `linear` takes the output layer along."""

    name: str
    tau: float | None = None
    linear: bool = False
    wrong_targets: bool = False
    sample: bool = False


RUNS = (
    Run(PYTORCH),
    Run(PYLOSS, tau=1.0, sample=True),
    Run(PYLOSS_LINEAR, tau=1.0, linear=True),
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
    step_ms: float  # median, like all times and growths of the process below
    head_ms: float  # forward and backward of the output layer and the loss
    head_mib: float | None  # growth of the process meanwhile
    loss_ms: float | None  # forward and backward of the loss alone, where it is one
    loss_mib: float | None
    peak_mib: float | None  # largest size of the process in a training step
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


@dataclass(frozen=True)
class Cost:
    """What one forward and backward took. Memory is None where it cannot be measured."""

    head_seconds: float  # the output layer and the loss
    head_growth: float | None
    loss_seconds: float | None  # the loss alone; None where it has no logits to start from
    loss_growth: float | None
    peak: float | None


def output_step(
    run: Run, hidden: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, memory: PeakMemory
) -> tuple[float, Cost]:
    """Loss of `hidden @ weight.T`, forward and backward, with its cost.

    The graph is cut at the hidden states, and again at the logits where there are any, so that the
    clock and the memory reading see one part alone; the gradient that each part leaves is then sent
    on through the part before. The numbers are the same as without the cuts.
    """
    leaf = hidden.detach().requires_grad_()
    loss_seconds = loss_growth = peak = None
    memory.reset()
    before = memory.peak()
    begin = time.perf_counter()
    if run.linear:
        loss = pyloss.fused_linear_cross_entropy(leaf, weight, wanted, tau=run.tau)
        loss.backward()
    else:
        loss_fn = loss_function(run)
        logits = leaf @ weight.t()
        logits_leaf = logits.detach().requires_grad_()
        peak = memory.peak()
        memory.reset()
        loss_before = memory.peak()
        loss_begin = time.perf_counter()
        loss = loss_fn(logits_leaf, wanted)
        loss.backward()
        loss_seconds = time.perf_counter() - loss_begin
        loss_growth = _growth(memory, loss_before)
        logits.backward(logits_leaf.grad)
    head_seconds = time.perf_counter() - begin
    peak = _larger(peak, memory.peak())
    head_growth = peak - before if memory.can_reset else None
    hidden.backward(leaf.grad)
    return loss.item(), Cost(head_seconds, head_growth, loss_seconds, loss_growth, peak)


def _growth(memory: PeakMemory, before: float | None) -> float | None:
    return memory.peak() - before if memory.can_reset else None


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
    inputs = torch.from_numpy(data.inputs)
    targets = torch.from_numpy(data.wrong_targets if run.wrong_targets else data.targets)
    rng = np.random.default_rng(options.seed)
    window = torch.arange(size.context)
    evaluate_at = {round(size.steps * k / size.evaluations) for k in range(size.evaluations + 1)}

    losses: list[float] = []
    step_seconds: list[float] = []
    costs: list[Cost] = []
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
        hidden = model.hidden(batch).flatten(0, 1)
        peak = _larger(peak, memory.peak())
        loss, cost = output_step(run, hidden, model.tokens.weight, wanted, memory)
        optimizer.step()
        optimizer.zero_grad()
        step_seconds.append(time.perf_counter() - begin)
        peak = _larger(_larger(peak, cost.peak), memory.peak())
        losses.append(loss)
        costs.append(cost)
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
        head_ms=1e3 * statistics.median(cost.head_seconds for cost in costs),
        head_mib=_median(cost.head_growth for cost in costs),
        loss_ms=_median(cost.loss_seconds and 1e3 * cost.loss_seconds for cost in costs),
        loss_mib=_median(cost.loss_growth for cost in costs),
        peak_mib=peak,
        memory_method=memory.method,
        sample=sample,
    )


def _larger(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else max(a, b)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


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
    progress = Progress(run.name.ljust(len(PYLOSS_LINEAR)), size.steps)
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


def check_memory(stored: Result, fused: Result, logits_mib: float) -> list[str]:
    """Without stored logits at least their size must be saved, where that can be measured."""
    if stored.head_mib is None or fused.head_mib is None or logits_mib < MEASURABLE_MIB:
        return []
    saved = stored.head_mib - fused.head_mib
    if saved >= logits_mib:
        return []
    return [
        f"{fused.name} needs {fused.head_mib:.0f} MiB, {stored.name} {stored.head_mib:.0f} MiB: "
        f"the {logits_mib:.0f} MiB of logits are not saved"
    ]


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def cost_table(results: list[Result]) -> str:
    rows = [
        [
            r.name,
            f"{r.head_ms:.1f} ms",
            _show(r.head_mib, "{:.0f} MiB"),
            _show(r.loss_ms, "{:.1f} ms"),
            _show(r.loss_mib, "{:.0f} MiB"),
            f"{r.step_ms:.0f} ms",
            _show(r.peak_mib, "{:.0f} MiB"),
        ]
        for r in results
    ]
    header = ["loss", "output + loss", "memory", "loss alone", "memory", "step", "process peak"]
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
    failures = []
    for other in clean[1:]:
        differences = compare_curves(clean[0].losses, other.losses)
        failures += [f"{other.name}: {difference}" for difference in differences]
    fused = next(r for r in clean if r.name == PYLOSS_LINEAR)
    failures += check_memory(clean[0], fused, tokens * size.vocabulary * 4 / (1 << 20))
    for result in results:
        failures += check_learning(result)

    print(
        "\nMedians per step, forward and backward: the output layer and the loss, the loss alone, "
        "all"
    )
    print(cost_table(results))
    print(f"Peak memory: {results[0].memory_method}.")
    print("\nRight targets: validation loss (cross-entropy) and accuracy after training")
    print(quality_table(clean))
    print(
        f"Largest difference from the training losses of {clean[0].name}, in the first "
        f"{FIRST_STEPS} steps ({FIRST_TOLERANCE:g} allowed)\nand in the last {LAST_STEPS} "
        f"({LAST_TOLERANCE:g} allowed):"
    )
    for other in clean[1:]:
        gaps = [abs(a - b) for a, b in zip(clean[0].losses, other.losses, strict=True)]
        print(f"  {other.name}: {max(gaps[:FIRST_STEPS]):.1e}, {max(gaps[-LAST_STEPS:]):.1e}")
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
