"""What every benchmark shares: cases, checks before timing, timing, peak memory, bandwidth.

A ``Case`` is one row of a table: tensors of one shape and dtype and several ways (``Provider``) to
do the same work on them.  ``run_case`` first checks each provider against the reference, then
measures its peak memory in a call of its own, then times all of them interleaved in random order,
so that a slow phase of the machine hits every provider alike.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 1

# Between two timed GPU calls this many bytes are written, so that no call finds its input in L2.
_L2_FLUSH_BYTES = 256 << 20
_SHORT_CALL_SECONDS = 0.02
# A peer's call that takes longer is not repeated: the one that shows its memory is its time too.
_LONG_CALL_SECONDS = 12.0


class Skip(Exception):
    """Raised by a provider that cannot run here; the text becomes the reason in the record."""


@dataclass
class Context:
    """What the command line asked for, handed to the benchmark of an op."""

    device: str = "cpu"
    quick: bool = False
    compile: bool = True
    rounds: int = 20
    seconds: float = 20.0  # per provider and thread count
    providers: str = ""  # regular expression; empty means all


@dataclass
class Run:
    """A provider that is ready to be measured."""

    call: Callable[[], Any]  # timed; its result is dropped inside the timed region
    check: Callable[[], float] | None = None  # worst error / tolerance, from a call of its own
    setup: Callable[[], None] | None = None  # before every call, not timed


@dataclass
class Provider:
    name: str
    build: Callable[[], Run]  # raises Skip where it cannot run
    once: bool = False  # measure only at the largest thread count (torch.compile: cost)
    approximate: bool = False  # leaves work out on purpose: no peer of those that do all of it


@dataclass
class Case:
    """One group of providers that do the same work on the same tensors."""

    name: str
    group: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    # Each input read once per pass, each output written once; 0 where bytes are no measure of it.
    useful_bytes: int
    tensor_bytes: int  # the unit in which peak memory is reported
    open: Callable[[], list[Provider]]  # makes the tensors; they live as long as the list
    inner: int = 1  # calls per sample; above 1 for calls of a few microseconds
    baseline: str = "torch"
    products: str = ""  # provider with nothing but the matrix products: a yardstick, not a peer
    against: dict[str, str] = field(
        default_factory=dict
    )  # key of a speed-up -> over which provider
    result_bytes: int | None = None  # gradients, which are not memory beyond the result
    rounds: int | None = None  # fewer than the command line says, for calls of a second
    once: bool = False  # only at the largest thread count
    flop: int = 0  # useful floating-point operations, where a rate says more than a time


@dataclass
class Probe:
    """A measurement that is not a timing of calls: accuracy, import time."""

    name: str
    group: str
    measure: Callable[[], list[dict[str, Any]]]


@dataclass
class Timing:
    samples: list[float] = field(default_factory=list)  # seconds per call

    def summary(self) -> dict[str, float | int]:
        ms = sorted(1e3 * s for s in self.samples)
        return {
            "rounds": len(ms),
            "min_ms": ms[0],
            "median_ms": statistics.median(ms),
            "p20_ms": _quantile(ms, 0.2),
            "p80_ms": _quantile(ms, 0.8),
        }


def _quantile(ordered: list[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


# --- timing -----------------------------------------------------------------------------------


def _host_sample(run: Run, inner: int, device: str) -> float:
    if run.setup:
        run.setup()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        run.call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / inner


def _event_samples(run: Run, milliseconds: float) -> list[float]:
    """Times of GPU work by CUDA events, with untimed work before each call."""
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    # One call tells how many fit; it includes setup and launch cost, so the estimate is cautious.
    count = max(5, min(100, int(milliseconds / 1e3 / max(_host_sample(run, 1, "cuda"), 1e-5))))
    events = []
    for _ in range(count):
        if run.setup:
            run.setup()
        # The flush also keeps the GPU busy while the host queues the call: launch cost stays out.
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run.call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _do_bench_samples(run: Run, milliseconds: float) -> list[float]:
    from triton.testing import do_bench

    times = do_bench(run.call, warmup=10, rep=milliseconds, return_mode="all")
    return [t / 1e3 for t in times]


def _gpu_sampler(runs: list[Run]) -> tuple[str, Callable[[Run, float], list[float]]]:
    """One timer for all providers of a case; do_bench has no room for untimed work."""
    if any(run.setup for run in runs):
        return "events", _event_samples
    try:
        import triton.testing  # noqa: F401
    except ImportError:
        return "events", _event_samples
    return "do_bench", _do_bench_samples


def time_interleaved(
    runs: dict[str, Run], inner: int, ctx: Context, seed: int = 0, most_rounds: int | None = None
) -> tuple[dict[str, Timing], str]:
    """Times all runs, one after the other in a new random order each round.

    Returns the samples per name, and the name of the timer.
    """
    shuffle = random.Random(seed)
    timings = {name: Timing() for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    on_gpu = ctx.device == "cuda" and inner == 1
    if on_gpu:
        timer, sampler = _gpu_sampler(list(runs.values()))
        rounds = 2 if ctx.quick else 4  # every round takes many samples
    else:
        timer, rounds = "perf_counter", min(ctx.rounds, most_rounds or ctx.rounds)
    first = {name: _host_sample(run, inner, ctx.device) for name, run in runs.items()}
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            order = list(runs)
            shuffle.shuffle(order)
            for name in order:
                if done >= 2 and spent[name] > ctx.seconds:
                    continue
                start = time.perf_counter()
                if on_gpu:
                    timings[name].samples += sampler(runs[name], 10.0 if ctx.quick else 40.0)
                else:
                    # The worker threads of the provider before may still spin for a moment; a
                    # call of a few milliseconds would pay for that.
                    if first[name] < _SHORT_CALL_SECONDS:
                        _host_sample(runs[name], 1, ctx.device)
                    timings[name].samples.append(_host_sample(runs[name], inner, ctx.device))
                spent[name] += time.perf_counter() - start
    finally:
        gc.enable()
    return timings, timer


# --- memory -----------------------------------------------------------------------------------


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _trim_heap() -> None:
    """Gives freed heap pages back, so that they cannot serve the next call unseen."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


def peak_memory(run: Run, device: str) -> tuple[int | None, str]:
    """Bytes that one call holds at its peak beyond what was there before, and how it was found."""
    if run.setup:
        run.setup()
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "max_memory_allocated"
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present VmRSS
        before = _status_bytes("VmHWM")
        run.call()
        return max(0, _status_bytes("VmHWM") - before), "VmHWM"
    except (OSError, KeyError) as error:
        return None, f"not measured: {error}"


# --- bandwidth --------------------------------------------------------------------------------


def measure_bandwidth(ctx: Context, threads: int) -> dict[str, Any]:
    """Copy bandwidth in bytes read plus bytes written, GB/s: the floor's yardstick."""
    size = (16 << 20) if ctx.quick else ((512 << 20) if ctx.device == "cpu" else (2 << 30))
    source = torch.ones(size // 4, device=ctx.device)
    target = torch.ones_like(source)  # written, so its pages are mapped
    copy = Run(call=lambda: target.copy_(source))
    result: dict[str, Any] = {"device": ctx.device, "threads": threads, "bytes": 2 * size}
    if ctx.device == "cuda":
        samples = _gpu_sampler([copy])[1](copy, 10.0 if ctx.quick else 100.0)
    else:
        repeats = 3 if ctx.quick else 7
        fresh = Run(call=lambda: source.clone())
        for key, run in (("copy", copy), ("fresh_copy", fresh)):
            _host_sample(run, 1, "cpu")
            samples = [_host_sample(run, 1, "cpu") for _ in range(repeats)]
            result[f"{key}_gbs"] = 2 * size / min(samples) / 1e9
        return result
    result["copy_gbs"] = 2 * size / min(samples) / 1e9
    result["copy_median_gbs"] = 2 * size / statistics.median(samples) / 1e9
    return result


# --- one case ---------------------------------------------------------------------------------


def is_own(provider: str) -> bool:
    """Whether a provider is this project's: then a failure of it fails the whole run."""
    return provider.startswith("pyloss")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:300]


# A peer's own rounding is part of what is compared: it is shut out when it computes something else,
# not when it is less exact. (F.cross_entropy with label smoothing is off by three tolerances.)
PEER_SLACK = 10.0


def prepare(provider: Provider) -> tuple[Run | None, dict[str, Any]]:
    """Builds a provider and checks its result; the dict is the start of its record."""
    try:
        run = provider.build()
        if run.check is None:
            return run, {"status": "ok"}
        error = run.check()
    except Skip as skip:
        return None, {"status": "skipped", "reason": str(skip)}
    except Exception as failure:  # a peer may fail in any way; that must not end the run
        status = "failed" if is_own(provider.name) else "skipped"
        return None, {"status": status, "reason": _reason(failure)}
    # `not <=` so that NaN counts as wrong.
    if not error <= (1.0 if is_own(provider.name) else PEER_SLACK):
        reason = f"differs from the reference by {error:.3g} times the tolerance"
        return None, {"status": "wrong", "reason": reason}
    return run, {"status": "ok", "check_error": error}


def run_case(
    case: Case,
    providers: list[Provider],
    ctx: Context,
    threads: int,
    copy_gbs: float,
    largest: bool = True,
) -> list[dict[str, Any]]:
    """Checks, measures and times every provider of a case; one record each.

    Providers marked ``once`` take part only where ``largest`` says so.
    """
    records: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for provider in providers:
        record: dict[str, Any] = {
            "case": case.name,
            "group": case.group,
            "mode": case.mode,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "device": ctx.device,
            "threads": threads,
            "provider": provider.name,
        }
        records[provider.name] = record
        if provider.approximate:
            record["approximate"] = True
        if provider.once and not largest:
            record |= {"status": "skipped", "reason": "measured at the largest thread count only"}
            continue
        run, outcome = prepare(provider)
        record |= outcome
        if run is not None:
            runs[provider.name] = run
    timings, timer = {}, ""
    for name, run in list(runs.items()):
        if case.inner == 1:
            start = time.perf_counter()
            peak, how = peak_memory(run, ctx.device)
            seconds = time.perf_counter() - start
            records[name] |= {"peak_bytes": peak, "memory_method": how}
            if seconds > _LONG_CALL_SECONDS and not is_own(name):
                timings[name] = Timing([seconds])
                timer = "perf_counter"
                del runs[name]
    if runs:
        found, timer = time_interleaved(runs, case.inner, ctx, most_rounds=case.rounds)
        timings |= found
    for name, timing in timings.items():
        records[name] |= {"timer": timer, "inner": case.inner, **timing.summary()}
    derive(list(records.values()), case, copy_gbs)
    return list(records.values())


def derive(records: list[dict[str, Any]], case: Case, copy_gbs: float) -> None:
    """Adds to the records of one case the columns that follow from the measured ones."""
    median = {r["provider"]: r["median_ms"] for r in records if "median_ms" in r}
    approximate = {r["provider"] for r in records if r.get("approximate")}
    peers = {n: ms for n, ms in median.items() if not is_own(n) and n != case.products}
    floor_ms = case.useful_bytes / copy_gbs / 1e6
    for record in records:
        if "median_ms" not in record:
            continue
        name, ms = record["provider"], record["median_ms"]
        if case.inner > 1:
            record["median_us"] = 1e3 * ms
        elif case.useful_bytes:
            record["useful_bytes"] = case.useful_bytes
            record["gbs"] = case.useful_bytes / ms / 1e6
            record["pct_copy"] = 100.0 * floor_ms / ms
            record["x_floor"] = ms / floor_ms
        if case.flop:
            record["gflops"] = case.flop / ms / 1e6
            record["tflops"] = record["gflops"] / 1e3
        if case.products in median:
            record["x_products"] = ms / median[case.products]
            if case.flop:
                record["pct_products"] = 100.0 / record["x_products"]
        if case.baseline in median:
            record["speedup"] = median[case.baseline] / ms
        if is_own(name):
            if "pyloss" in median:
                record["ratio_to_pyloss"] = ms / median["pyloss"]
            like = [t for n, t in peers.items() if name in approximate or n not in approximate]
            if like:
                record["speedup_over_best_peer"] = min(like) / ms
            for key, other in case.against.items():
                if other in median:
                    record[key] = median[other] / ms
        if record.get("peak_bytes") is not None:
            record["peak_tensors"] = record["peak_bytes"] / case.tensor_bytes
            # The yardstick's results are there before the call.
            if case.result_bytes is not None and name != case.products:
                record["extra_mb"] = max(0, record["peak_bytes"] - case.result_bytes) / 1e6
