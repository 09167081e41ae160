"""Cases, providers and targets of ``tensor_attention``: attention over pairs of keys.

The yardstick is "torch.mm": products of 1024 x 1024 matrices with as many floating-point operations
as the case has useful ones, in one call after the other. Useful are 4 d per valid triple (i, j, k)
forward and 10 d backward; what a kernel computes beyond them (masked columns, further products)
counts against it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench._core import Case, Context, Probe, Provider, Run, Skip
from bench._targets import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Errors over the largest entry: out, gradients.
TOLERANCES = {torch.float32: (2e-5, 1e-4), torch.bfloat16: (2e-2, 4e-2)}

PRODUCTS = "torch.mm"
NAIVE = "torch"  # einsum, the scores stored
BLOCKED = "torch blocked"
WINDOWS = "torch windows"

Window = tuple[int, int] | None

# Name -> (heads, n, d, window); a window is causal.
FULL = (1, 256, 64, None)
WIDE = (1, 2048, 64, (32, 128))
LONG = (1, 1024, 64, None)
GPU_WINDOW = (8, 8192, 128, (512, 32))
GPU_FULL = (16, 1024, 64, None)

TARGETS = [
    Target(
        "fwd n = 256, d = 64 fp32, one thread: rate over that of torch.mm",
        "pct_products",
        "fwd 256x64 fp32",
        at_least=65,
        unit="%",
    ),
    Target(
        "bwd n = 256, d = 64 fp32, one thread: rate over that of torch.mm",
        "pct_products",
        "bwd 256x64 fp32",
        at_least=65,
        unit="%",
    ),
    Target(
        "fwd n = 256, d = 64 fp32, speed-up over blocked PyTorch",
        "speedup_over_blocked",
        "fwd 256x64 fp32",
        at_least=1.5,
    ),
    Target(
        "bwd n = 256, d = 64 fp32, speed-up over blocked PyTorch",
        "speedup_over_blocked",
        "bwd 256x64 fp32",
        at_least=1.5,
    ),
    Target(
        "fwd n = 256, d = 64 fp32, speed-up over einsum",
        "speedup",
        "fwd 256x64 fp32",
        at_least=2.3,
    ),
    Target(
        "bwd n = 256, d = 64 fp32, speed-up over einsum",
        "speedup",
        "bwd 256x64 fp32",
        at_least=2.3,
    ),
    Target(
        "windows 32 x 128, n = 2048: useful rate over that of full attention, forward",
        "value",
        "rate of windows fwd",
        at_least=85,
        unit="%",
    ),
    Target(
        "windows 32 x 128, n = 2048: useful rate over that of full attention, backward",
        "value",
        "rate of windows bwd",
        at_least=85,
        unit="%",
    ),
    Target(
        "fwd+bwd n = 1024, d = 64 fp32, memory beyond inputs and results",
        "extra_mb",
        "fwd\\+bwd 1024x64 fp32",
        at_most=32,
        unit="MB",
    ),
    Target(
        "GPU fwd, windows 512 x 32, d = 128 bf16, useful TFLOP/s",
        "tflops",
        "fwd 8192x128 512x32 bf16",
        at_least=400,
        device="cuda",
        unit="",
    ),
    Target(
        "GPU windows 512 x 32, d = 128 bf16: time of bwd over that of fwd",
        "value",
        "bwd over fwd",
        at_most=3.5,
        device="cuda",
    ),
    Target(
        "GPU fwd+bwd n = 1024, d = 64 bf16, 16 heads",
        "median_ms",
        "fwd\\+bwd 1024x64 bf16",
        at_most=16 * 2.3,
        device="cuda",
        unit="ms",
    ),
]


def triples(heads: int, n: int, window: Window) -> int:
    """Valid (i, j, k) of a call."""
    if window is None:
        return heads * n**3
    return heads * sum(min(i + 1, window[0]) * min(i + 1, window[1]) for i in range(n))


def useful_flop(mode: str, heads: int, n: int, d: int, window: Window) -> int:
    return {"fwd": 4, "bwd": 10, "fwd+bwd": 14}[mode] * d * triples(heads, n, window)


# --- what the providers compute -----------------------------------------------------------------


Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Problem:
    """q, k1, k2, v1, v2 of (1, heads, n, d), an upstream gradient, and the answer in float64."""

    def __init__(self, heads: int, n: int, d: int, window: Window, dtype: str, device: str):
        generator = torch.Generator(device=device).manual_seed(0)
        kind = DTYPES[dtype]
        shape = (1, heads, n, d)
        self.tensors = [
            torch.randn(shape, generator=generator, device=device).to(kind) for _ in range(5)
        ]
        self.upstream = torch.randn(shape, generator=generator, device=device).to(kind)
        self.window = window
        self._answer: tuple[Tensor, list[Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def answer(self) -> tuple[Tensor, list[Tensor]]:
        """Output and five gradients of the first head, from float64 arithmetic by blocks."""
        if self._answer is None:
            q, k1, k2, v1, v2 = (t[0, 0].double() for t in self.tensors)
            if self.window is not None:
                leaves = [t.requires_grad_() for t in (q, k1, k2, v1, v2)]
                out = attend_windows(*(t[None, None] for t in leaves), self.window)
                grads = torch.autograd.grad(out, leaves, self.upstream[:1, :1].double())
                self._answer = out[0, 0].detach(), list(grads)
            else:
                out, lse = blocked_forward(q, k1, k2, v1, v2)
                dout = self.upstream[0, 0].double()
                self._answer = out, blocked_backward(q, k1, k2, v1, v2, out, lse, dout)
        return self._answer

    def error(self, out: Tensor | None, grads: list[Tensor] | None) -> float:
        """Largest deviation from the answer in units of the tolerance, first head."""
        want, want_grads = self.answer()
        out_limit, grad_limit = TOLERANCES[self.dtype]
        errors = []
        if out is not None:
            errors.append(_relative(out[0, 0], want) / out_limit)
        if grads is not None:
            pairs = zip(grads, want_grads, strict=True)
            errors += [_relative(g[0, 0], w) / grad_limit for g, w in pairs]
        return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want).abs().max() / want.abs().max()).item()


def naive(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    """The formula as three einsums; stores the scores."""
    scores = torch.einsum("bhid,bhjd,bhkd->bhijk", q * q.shape[-1] ** -0.5, k1, k2)
    p = torch.softmax(scores.flatten(3), -1).view_as(scores)
    return torch.einsum("bhijk,bhjc,bhkc->bhic", p, v1, v2)


def blocked_forward(q, k1, k2, v1, v2, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Pairs as queries, some queries at a time: (out, lse) of one head."""
    n, d = q.shape
    out, lse = torch.empty_like(v1[:1].expand(n, -1)), q.new_empty(n)
    for at in range(0, n, rows):
        part = slice(at, min(at + rows, n))
        pairs = (q[part, None] * (k1 * d**-0.5)).reshape(-1, d)
        scores = (pairs @ k2.t()).view(part.stop - at, -1)
        lse[part] = torch.logsumexp(scores, 1)
        p = scores.sub_(lse[part, None]).exp_().view(-1, k2.shape[0])
        out[part] = ((p @ v2).view(part.stop - at, k1.shape[0], -1) * v1).sum(1)
    return out, lse


def blocked_backward(q, k1, k2, v1, v2, out, lse, dout, columns: int = 64) -> list[Tensor]:
    """The five-product backward in PyTorch, one key of the second axis at a time."""
    scale = q.shape[1] ** -0.5
    dq, dk1, dk2, dv1, dv2 = (torch.zeros_like(t) for t in (q, k1, k2, v1, v2))
    delta = (dout * out).sum(1)
    for k in range(k2.shape[0]):
        key, value = k2[k] * scale, v2[k]
        x = torch.zeros_like(q)
        for at in range(0, k1.shape[0], columns):
            part = slice(at, min(at + columns, k1.shape[0]))
            p = ((k1[part] * key) @ q.t()).sub_(lse).exp_()
            ds = ((v1[part] * value) @ dout.t()).sub_(delta).mul_(p)
            w, g = p @ dout, ds @ q
            x += ds.t() @ k1[part]
            dv1[part] += w * value
            dv2[k] += (w * v1[part]).sum(0)
            dk1[part] += g * key
            dk2[k] += (g * k1[part]).sum(0) * scale
        dq += x * key
    return [dq, dk1, dk2, dv1, dv2]


def attend_windows(q, k1, k2, v1, v2, window: tuple[int, int]) -> Tensor:
    """Causal windows by gathering each query's keys: batched products of w1 x w2."""
    n, d = q.shape[2:]
    position = torch.arange(n, device=q.device).unsqueeze(1)
    seen, scores_bias = [], []
    for w in window:
        index = position - torch.arange(w, device=q.device)
        seen.append(index.clamp(min=0))
        scores_bias.append(torch.where(index < 0, -math.inf, 0.0).to(q.dtype))
    a = q.unsqueeze(3) * k1[:, :, seen[0]] * d**-0.5
    scores = a @ k2[:, :, seen[1]].transpose(-1, -2)
    scores = scores + scores_bias[0].unsqueeze(2) + scores_bias[1].unsqueeze(1)
    p = scores.flatten(3).softmax(-1).view_as(scores)
    return ((p @ v2[:, :, seen[1]]) * v1[:, :, seen[0]]).sum(3)


def pairs_as_queries(attend: Callable[..., tuple[Tensor, Tensor]]) -> Attention:
    """Tensor attention from a kernel of plain attention that returns the logsumexp."""

    def run(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        n, d = q.shape[2:]
        rows = (q.unsqueeze(3) * k1.unsqueeze(2)).flatten(2, 3)
        out, lse = attend(rows, k2, v2, d**-0.5)
        share = lse.unflatten(2, (n, -1)).softmax(-1).to(v1.dtype)
        return (out.unflatten(2, (n, -1)) * v1.unsqueeze(2) * share.unsqueeze(-1)).sum(3)

    return run


def make_run(problem: Problem, attend: Attention, mode: str) -> Run:
    """How one call is timed and checked; "bwd" times the backward of one forward."""

    def fwd() -> Tensor:
        with torch.no_grad():
            return attend(*problem.tensors)

    def both() -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in problem.tensors]
        out = attend(*leaves)
        return out, list(torch.autograd.grad(out, leaves, problem.upstream))

    if mode == "fwd":
        return Run(call=fwd, check=lambda: problem.error(fwd(), None))
    if mode == "fwd+bwd":
        return Run(call=both, check=lambda: problem.error(*both()))
    leaves = [t.detach().requires_grad_() for t in problem.tensors]
    out = attend(*leaves)

    def bwd() -> list[Tensor]:
        return list(torch.autograd.grad(out, leaves, problem.upstream, retain_graph=True))

    return Run(call=bwd, check=lambda: problem.error(None, bwd()))


# --- providers ----------------------------------------------------------------------------------


def products_provider(problem: Problem, flop: int) -> Provider:
    def build() -> Run:
        side = 1024
        a, b = (
            torch.randn(side, side, device=problem.upstream.device).to(problem.dtype)
            for _ in range(2)
        )
        c = torch.empty_like(a)
        whole, rest = divmod(flop, 2 * side**3)
        rows = round(rest / (2 * side**2))

        def call() -> None:
            for _ in range(whole):
                torch.mm(a, b, out=c)
            if rows:
                torch.mm(a[:rows], b, out=c[:rows])

        return Run(call=call)

    return Provider(PRODUCTS, build)


def pyloss_provider(problem: Problem, mode: str) -> Provider:
    def build() -> Run:
        import pyloss

        def attend(*tensors: Tensor) -> Tensor:
            return pyloss.tensor_attention(*tensors, window=problem.window)

        return make_run(problem, attend, mode)

    return Provider("pyloss", build)


def naive_provider(problem: Problem, mode: str) -> Provider:
    return Provider(NAIVE, lambda: make_run(problem, naive, mode))


def compile_provider(problem: Problem, mode: str, ctx: Context) -> Provider:
    def build() -> Run:
        if not ctx.compile:
            raise Skip("torch.compile is off in this run")
        torch._dynamo.reset()
        return make_run(problem, torch.compile(naive, dynamic=False), mode)

    return Provider("torch.compile", build, once=True)


def blocked_provider(problem: Problem, mode: str) -> Provider:
    """What one would write in PyTorch to save memory, with the backward by hand."""

    def build() -> Run:
        tensors = [t[0, 0] for t in problem.tensors]
        dout = problem.upstream[0, 0]
        state = blocked_forward(*tensors)

        def fwd() -> Tensor:
            return blocked_forward(*tensors)[0]

        def bwd() -> list[Tensor]:
            return blocked_backward(*tensors, *state, dout)

        def both() -> tuple[Tensor, list[Tensor]]:
            found = blocked_forward(*tensors)
            return found[0], blocked_backward(*tensors, *found, dout)

        def check() -> float:
            out = None if mode == "bwd" else fwd()
            grads = None if mode == "fwd" else bwd()
            lift = lambda t: None if t is None else t[None, None]  # noqa: E731
            return problem.error(lift(out), None if grads is None else [lift(g) for g in grads])

        return Run(call={"fwd": fwd, "bwd": bwd, "fwd+bwd": both}[mode], check=check)

    return Provider(BLOCKED, build)


def windows_provider(problem: Problem, mode: str) -> Provider:
    def attend(*tensors: Tensor) -> Tensor:
        return attend_windows(*tensors, problem.window)

    return Provider(WINDOWS, lambda: make_run(problem, attend, mode))


def flash_provider(problem: Problem, mode: str) -> Provider:
    """PyTorch's flash attention, called as an operator for its logsumexp."""

    def build() -> Run:
        if mode != "fwd":
            raise Skip("PyTorch's flash attention has no gradient for its logsumexp")
        if problem.upstream.is_cuda:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention
        else:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            return kernel(q, k, v, scale=scale)[:2]

        return make_run(problem, pairs_as_queries(attend), mode)

    return Provider("flash over pairs", build)


def flex_provider(problem: Problem, mode: str, ctx: Context) -> Provider:
    def build() -> Run:
        if not ctx.compile:
            raise Skip("torch.compile is off in this run, and FlexAttention needs it")
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            return compiled(q, k, v, scale=scale, return_lse=True)

        return make_run(problem, pairs_as_queries(attend), mode)

    return Provider("flex over pairs", build, once=True)


# --- cases --------------------------------------------------------------------------------------


def _providers(
    mode: str, ctx: Context, flop: int, few: bool
) -> Callable[[Problem], list[Provider]]:
    def providers(p: Problem) -> list[Provider]:
        found = [products_provider(p, flop), pyloss_provider(p, mode)]
        if p.window is not None:
            return [*found, windows_provider(p, mode)]
        if few:
            return found
        found += [naive_provider(p, mode), blocked_provider(p, mode)]
        if mode != "bwd":
            found += [compile_provider(p, mode, ctx), flex_provider(p, mode, ctx)]
        return [*found, flash_provider(p, mode)]

    return providers


def _case(ctx: Context, mode: str, size: Any, dtype: str, few: bool = False, **fields: Any) -> Case:
    heads, n, d, window = size
    name = f"{mode} {n}x{d}" + (f" {window[0]}x{window[1]}" if window else "") + f" {dtype}"
    if ctx.quick:
        heads, n = 1, max(24, n // 16)
        window = window and (max(2, window[0] // 16), max(3, window[1] // 16))
    flop = useful_flop(mode, heads, n, d, window)
    item = DTYPES[dtype].itemsize
    fields.setdefault("baseline", WINDOWS if window else NAIVE)
    return Case(
        name=name,
        group=mode,
        mode=mode,
        shape=(heads, n, d),
        dtype=dtype,
        useful_bytes=0,
        tensor_bytes=heads * n * d * item,
        open=lambda: _providers(mode, ctx, flop, few)(
            Problem(heads, n, d, window, dtype, ctx.device)
        ),
        products=PRODUCTS,
        against={"speedup_over_blocked": BLOCKED},
        result_bytes=heads * n * d * item * {"fwd": 1, "bwd": 5, "fwd+bwd": 6}[mode],
        flop=flop,
        **fields,
    )


def cpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    """What matters first, for short budgets."""
    for mode in ("fwd", "bwd"):
        yield _case(ctx, mode, FULL, "fp32", rounds=12)
    for direction in ("fwd", "bwd"):
        yield Probe(
            f"rate of windows {direction}", "windows", lambda m=direction: measure_windows(ctx, m)
        )
    yield _case(ctx, "fwd+bwd", LONG, "fp32", few=True, rounds=2, once=True)
    for mode in ("fwd", "bwd"):
        yield _case(ctx, mode, WIDE, "fp32", rounds=10)
        yield _case(ctx, mode, FULL, "bf16", few=True, rounds=10)
    yield _case(ctx, "fwd+bwd", FULL, "fp32", rounds=6, once=True)


def gpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    yield _case(ctx, "fwd", GPU_WINDOW, "bf16", few=True)
    yield Probe("bwd over fwd", "windows", lambda: measure_backward(ctx))
    for mode in ("fwd+bwd", "fwd"):
        yield _case(ctx, mode, GPU_FULL, "bf16", few=True)
    yield _case(ctx, "bwd", GPU_WINDOW, "bf16", few=True)
    for mode in ("fwd", "bwd", "fwd+bwd"):
        yield _case(ctx, mode, (8, 256, 64, None), "bf16")


def cases(ctx: Context) -> Iterator[Case | Probe]:
    return gpu_cases(ctx) if ctx.device == "cuda" else cpu_cases(ctx)


# --- ratios of two cases ------------------------------------------------------------------------


def _median_seconds(runs: list[Run], rounds: int, device: str) -> list[float]:
    """Interleaved medians of several runs."""
    samples: list[list[float]] = [[] for _ in runs]
    for done in range(rounds + 1):
        for run, found in zip(runs, samples):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run.call()
            if device == "cuda":
                torch.cuda.synchronize()
            if done:  # the first warms up
                found.append(time.perf_counter() - start)
    return [statistics.median(s) for s in samples]


def _own_run(ctx: Context, size: Any, mode: str, dtype: str) -> tuple[Run, int]:
    """A run of pyloss and its useful operations."""
    heads, n, d, window = size
    if ctx.quick:
        n = max(24, n // 16)
    run = pyloss_provider(Problem(heads, n, d, window, dtype, ctx.device), mode).build()
    return run, useful_flop(mode, heads, n, d, window)


def measure_windows(ctx: Context, mode: str) -> list[dict[str, Any]]:
    """The useful rate with windows over that of full attention, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [_own_run(ctx, size, mode, "fp32") for size in (FULL, WIDE)]
        times = _median_seconds([run for run, _ in runs], 3 if ctx.quick else 12, ctx.device)
    finally:
        torch.set_num_threads(threads)
    full, wide = (flop / t for (_, flop), t in zip(runs, times))
    what = f"{mode}, {WIDE[3][0]} x {WIDE[3][1]}, n = {WIDE[1]}, d = {WIDE[2]}, 1 thread"
    return [{"provider": "pyloss", "what": what, "value": 100 * wide / full, "unit": "% of full"}]


def measure_backward(ctx: Context) -> list[dict[str, Any]]:
    runs = [_own_run(ctx, GPU_WINDOW, mode, "bf16")[0] for mode in ("fwd", "bwd")]
    forward, backward = _median_seconds(runs, 3 if ctx.quick else 20, ctx.device)
    what = "windows 512 x 32, n = 8192, d = 128"
    return [{"provider": "pyloss", "what": what, "value": backward / forward, "unit": "x fwd"}]
