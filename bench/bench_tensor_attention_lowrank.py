"""Cases, providers and targets of ``tensor_attention(method="lowrank")``: linear in the length.

Entries are uniform in [-1/2, 1/2] and the scale is 1/d, where degree 2 keeps the default tolerance:
the times contain the check of that. The yardstick "torch.mm" does the operations of the products,
2 r (dv + 1) per token and axis and query, in products of 1024 x 1024 matrices; "torch tiled" is the
same algorithm as one would write it in PyTorch, "torch tiled" backward by hand.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench._core import Case, Context, Probe, Provider, Run
from bench._targets import Target

# Errors over the largest entry: out, gradients.
OUT_LIMIT, GRAD_LIMIT = 2e-5, 1e-4

PRODUCTS = "torch.mm"
TILED = "torch tiled"

# Heads, n, d, degree.
NARROW = (1, 65536, 16, 2)
WIDE = (1, 4096, 64, 2)
CUBIC = (1, 65536, 8, 3)
GPU = (8, 65536, 64, 2)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072, 262144)

TARGETS = [
    Target(
        "fwd n = 65536, d = 16, degree 2, one thread",
        "median_ms",
        "fwd 65536x16 degree 2",
        at_most=50,
        unit="ms",
    ),
    Target(
        "time per token, n = 4096 to 262144, d = 16: largest over smallest",
        "value",
        "linearity",
        at_most=1.1,
    ),
    Target(
        "fwd+bwd over fwd, n = 65536, d = 16, degree 2, one thread",
        "value",
        "fwd\\+bwd over fwd",
        at_most=4,
    ),
    Target(
        "fwd n = 4096, d = 64, degree 2, speed-up over tiled PyTorch",
        "speedup",
        "fwd 4096x64 degree 2",
        at_least=3,
    ),
    Target(
        "largest error over the stated bound, 1000 random problems",
        "value",
        "error over bound",
        at_most=1,
    ),
    Target(
        "GPU fwd n = 65536, d = 64, degree 2, 8 heads",
        "median_ms",
        "fwd 65536x64 degree 2",
        at_most=8,
        device="cuda",
        unit="ms",
    ),
    Target(
        "GPU fwd+bwd n = 65536, d = 64, degree 2, 8 heads",
        "median_ms",
        "fwd\\+bwd 65536x64 degree 2",
        at_most=32,
        device="cuda",
        unit="ms",
    ),
]


def flop(mode: str, heads: int, n: int, d: int, degree: int) -> int:
    """Operations of the products: three forward, two more and their transposes backward."""
    products = {"fwd": 3, "bwd": 6, "fwd+bwd": 9}[mode]
    return products * 2 * heads * n * math.comb(d + degree, degree) * (d + 1)


# --- the same algorithm in PyTorch ----------------------------------------------------------------


class Monomials:
    """Features up to a degree, by one multiplication each from those of the degree below."""

    def __init__(self, d: int, degree: int, scale: float, like: Tensor) -> None:
        self.levels: list[tuple[Tensor, Tensor]] = []
        level = [(0, 1.0, 0)]  # last variable, count of orders, its exponent
        weights = [1.0]
        for t in range(1, degree + 1):
            rows = [
                (at, v, count * t / (e + 1 if v == last else 1), e + 1 if v == last else 1)
                for at, (last, count, e) in enumerate(level)
                for v in range(last, d)
            ]
            parent, variable = (torch.tensor(x, device=like.device) for x in list(zip(*rows))[:2])
            self.levels.append((parent, variable))
            level = [(v, count, e) for _, v, count, e in rows]
            weights += [scale**t / math.factorial(t) * count for _, count, _ in level]
        self.weights = torch.tensor(weights, dtype=like.dtype, device=like.device).unsqueeze(1)

    def __call__(self, x: Tensor) -> Tensor:
        found = [x.new_ones(x.shape[0], 1)]
        for parent, variable in self.levels:
            found.append(found[-1][:, parent] * x[:, variable])
        return torch.cat(found, 1)

    def backward(self, dfeatures: Tensor, x: Tensor) -> Tensor:
        found = [x.new_ones(x.shape[0], 1)]
        for parent, variable in self.levels:
            found.append(found[-1][:, parent] * x[:, variable])
        parts = list(dfeatures.split([f.shape[1] for f in found], 1))
        dx = torch.zeros_like(x)
        for t in range(len(self.levels), 0, -1):
            parent, variable = self.levels[t - 1]
            dx.index_add_(1, variable, parts[t] * found[t - 1][:, parent])
            parts[t - 1] = parts[t - 1].index_add(1, parent, parts[t] * x[:, variable])
        return dx


def tiled_forward(tensors: list[Tensor], degree: int, tile: int = 256):
    """(out, state of the backward) of one head; no more than a tile of features at a time."""
    q, k1, k2, v1, v2 = tensors
    features = Monomials(q.shape[1], degree, 1.0 / q.shape[1], q)
    states = []
    for k, v in ((k1, v1), (k2, v2)):
        v = torch.cat([v, v.new_ones(v.shape[0], 1)], 1)
        state = 0
        for kt, vt in zip(k.split(tile), v.split(tile)):
            state = state + features(kt).T @ vt
        states.append(state)
    product = states[0] * states[1] * features.weights
    out, sums = torch.empty_like(v1), q.new_empty(q.shape[0], 1)
    for at, part in enumerate(q.split(tile)):
        rows = slice(at * tile, at * tile + part.shape[0])
        found = features(part) @ product
        sums[rows] = found[:, -1:]
        out[rows] = found[:, :-1] / found[:, -1:]
    return out, (features, states, product, sums)


def tiled_backward(tensors: list[Tensor], out: Tensor, kept: Any, dout: Tensor, tile: int = 256):
    """The five gradients of one head."""
    q, k1, k2, v1, v2 = tensors
    features, states, product, sums = kept
    upstream = torch.cat([dout, -(dout * out).sum(1, keepdim=True)], 1) / sums
    dq, collected = torch.empty_like(q), torch.zeros_like(product)
    for at, (part, up) in enumerate(zip(q.split(tile), upstream.split(tile))):
        rows = slice(at * tile, at * tile + part.shape[0])
        collected += features(part).T @ up
        dq[rows] = features.backward(up @ product.T, part)
    collected *= features.weights
    found = []
    for k, v, other in ((k1, v1, states[1]), (k2, v2, states[0])):
        dstate = collected * other
        v = torch.cat([v, v.new_ones(v.shape[0], 1)], 1)
        dk, dv = torch.empty_like(k), torch.empty_like(v[:, :-1])
        for at, (kt, vt) in enumerate(zip(k.split(tile), v.split(tile))):
            rows = slice(at * tile, at * tile + kt.shape[0])
            dv[rows] = features(kt) @ dstate[:, :-1]
            dk[rows] = features.backward(vt @ dstate.T, kt)
        found.append((dk, dv))
    return [dq, found[0][0], found[1][0], found[0][1], found[1][1]]


# --- problems and providers -----------------------------------------------------------------------


class Problem:
    """q, k1, k2, v1, v2 of (1, heads, n, d), an upstream gradient, the answer in float64."""

    def __init__(self, heads: int, n: int, d: int, degree: int, device: str):
        generator = torch.Generator(device=device).manual_seed(0)
        shape = (1, heads, n, d)
        draw = lambda: torch.rand(shape, generator=generator, device=device) - 0.5  # noqa: E731
        self.tensors = [draw() for _ in range(5)]
        self.upstream = draw()
        self.degree = degree
        self._answer: tuple[Tensor, list[Tensor]] | None = None

    def answer(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients of the first head, from float64 arithmetic by tiles."""
        if self._answer is None:
            tensors = [t[0, 0].double() for t in self.tensors]
            out, kept = tiled_forward(tensors, self.degree)
            dout = self.upstream[0, 0].double()
            self._answer = out, tiled_backward(tensors, out, kept, dout)
        return self._answer

    def error(self, out: Tensor | None, grads: list[Tensor] | None) -> float:
        """Largest deviation from the answer in units of the tolerance, first head."""
        want, want_grads = self.answer()
        errors = []
        if out is not None:
            errors.append(_relative(out, want) / OUT_LIMIT)
        if grads is not None:
            errors += [_relative(g, w) / GRAD_LIMIT for g, w in zip(grads, want_grads, strict=True)]
        return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want).abs().max() / want.abs().max()).item()


def products_provider(problem: Problem, operations: int) -> Provider:
    def build() -> Run:
        side = 1024
        a, b = (torch.randn(side, side, device=problem.upstream.device) for _ in range(2))
        c = torch.empty_like(a)
        whole, rest = divmod(operations, 2 * side**3)
        rows = round(rest / (2 * side**2))

        def call() -> None:
            for _ in range(whole):
                torch.mm(a, b, out=c)
            if rows:
                torch.mm(a[:rows], b, out=c[:rows])

        return Run(call=call)

    return Provider(PRODUCTS, build)


def own_run(problem: Problem, mode: str, **options: Any) -> Run:
    import pyloss

    def attend(*tensors: Tensor) -> Tensor:
        return pyloss.tensor_attention(
            *tensors, scale="kronecker", method="lowrank", degree=problem.degree, **options
        )

    def fwd() -> Tensor:
        with torch.no_grad():
            return attend(*problem.tensors)

    def both() -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in problem.tensors]
        out = attend(*leaves)
        return out, list(torch.autograd.grad(out, leaves, problem.upstream))

    def check() -> float:
        if mode == "fwd":
            return problem.error(fwd()[0, 0], None)
        out, grads = both()
        return problem.error(out[0, 0], [g[0, 0] for g in grads])

    return Run(call=fwd if mode == "fwd" else both, check=check)


def tiled_provider(problem: Problem, mode: str) -> Provider:
    def build() -> Run:
        heads = [[t[0, h] for t in problem.tensors] for h in range(problem.upstream.shape[1])]

        def call() -> list[tuple[Tensor, list[Tensor] | None]]:
            found = []
            for h, tensors in enumerate(heads):
                out, kept = tiled_forward(tensors, problem.degree)
                grads = None
                if mode != "fwd":
                    grads = tiled_backward(tensors, out, kept, problem.upstream[0, h])
                found.append((out, grads))
            return found

        return Run(call=call, check=lambda: problem.error(*call()[0]))

    return Provider(TILED, build)


# --- cases ----------------------------------------------------------------------------------------


def _case(ctx: Context, mode: str, size: tuple[int, int, int, int], **fields: Any) -> Case:
    heads, n, d, degree = size
    name = f"{mode} {n}x{d} degree {degree}"
    if ctx.quick:
        heads, n = 1, max(64, n // 64)
    operations = flop(mode, heads, n, d, degree)

    def providers() -> list[Provider]:
        problem = Problem(heads, n, d, degree, ctx.device)
        return [
            products_provider(problem, operations),
            Provider("pyloss", lambda: own_run(problem, mode)),
            tiled_provider(problem, mode),
        ]

    return Case(
        name=name,
        group=mode,
        mode=mode,
        shape=(heads, n, d),
        dtype="fp32",
        useful_bytes=0,
        tensor_bytes=heads * n * d * 4,
        open=providers,
        baseline=TILED,
        products=PRODUCTS,
        result_bytes=heads * n * d * 4 * {"fwd": 1, "fwd+bwd": 6}[mode],
        flop=operations,
        **fields,
    )


def cpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    """What matters first, for short budgets."""
    yield _case(ctx, "fwd", NARROW, rounds=12)
    yield _case(ctx, "fwd", WIDE, rounds=12)
    yield Probe("fwd+bwd over fwd", "ratios", lambda: measure_backward(ctx))
    yield Probe("linearity", "ratios", lambda: measure_linearity(ctx))
    yield Probe("without check", "ratios", lambda: measure_linearity(ctx, check="none"))
    yield Probe("error over bound", "bound", lambda: measure_bound(ctx))
    yield Probe("causal", "milliseconds", lambda: measure_banded(ctx))
    yield Probe("auto", "ratios", lambda: measure_auto(ctx))
    yield _case(ctx, "fwd+bwd", NARROW, rounds=6)
    yield _case(ctx, "fwd+bwd", WIDE, rounds=6)
    yield _case(ctx, "fwd", CUBIC, rounds=6, once=True)


def gpu_cases(ctx: Context) -> Iterator[Case | Probe]:
    for mode in ("fwd", "fwd+bwd"):
        yield _case(ctx, mode, GPU)
        yield _case(ctx, mode, NARROW)


def cases(ctx: Context) -> Iterator[Case | Probe]:
    return gpu_cases(ctx) if ctx.device == "cuda" else cpu_cases(ctx)


# --- probes ---------------------------------------------------------------------------------------


def _median_seconds(runs: list[Run], rounds: int, work: list[int]) -> list[float]:
    """Interleaved medians; short calls several times in a row."""
    samples: list[list[float]] = [[] for _ in runs]
    for done in range(rounds + 1):
        for run, found, repeat in zip(runs, samples, work, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                run.call()
            if done:  # the first warms up
                found.append((time.perf_counter() - start) / repeat)
    return [statistics.median(s) for s in samples]


def _one_thread(measure: Callable[[], Any]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure()
    finally:
        torch.set_num_threads(threads)


def measure_backward(ctx: Context) -> list[dict[str, Any]]:
    heads, n, d, degree = NARROW
    problem = Problem(heads, n // 64 if ctx.quick else n, d, degree, ctx.device)
    runs = [own_run(problem, mode) for mode in ("fwd", "fwd+bwd")]
    forward, both = _one_thread(lambda: _median_seconds(runs, 3 if ctx.quick else 12, [1, 1]))
    what = f"n = {n}, d = {d}, degree {degree}, 1 thread"
    return [{"provider": "pyloss", "what": what, "value": both / forward, "unit": "x fwd"}]


def measure_linearity(ctx: Context, **options: Any) -> list[dict[str, Any]]:
    """Time per token of every length, and how far these are apart."""
    heads, _, d, degree = NARROW
    lengths = [n // 64 for n in LENGTHS] if ctx.quick else list(LENGTHS)
    runs = [own_run(Problem(heads, n, d, degree, ctx.device), "fwd", **options) for n in lengths]
    # As many tokens in every sample: the first calls after a long one find cold caches.
    work = [lengths[-1] // n for n in lengths]
    times = _one_thread(lambda: _median_seconds(runs, 2 if ctx.quick else 25, work))
    each = [1e9 * t / n for t, n in zip(times, lengths)]
    text = ", ".join(f"{n}: {e:.0f} ns" for n, e in zip(lengths, each))
    what = f"d = {d}, degree {degree}, 1 thread; per token: {text}"
    value = max(each) / min(each)
    return [{"provider": "pyloss", "what": what, "value": value, "unit": "x"}]


def measure_banded(ctx: Context) -> list[dict[str, Any]]:
    """Times of running sums: causal, and with windows."""
    heads, n, d, degree = NARROW
    problem = Problem(heads, n // 64 if ctx.quick else n, d, degree, ctx.device)
    found = []
    for name, options in (("causal", {"is_causal": True}), ("windows 512 x 512", {"window": 512})):
        runs = [own_run(problem, mode, **options) for mode in ("fwd", "fwd+bwd")]
        times = _one_thread(lambda: _median_seconds(runs, 2 if ctx.quick else 6, [1, 1]))  # noqa: B023
        for mode, seconds in zip(("fwd", "fwd+bwd"), times):
            what = f"{name}, {mode}, n = {n}, d = {d}, degree {degree}, 1 thread"
            found.append({"provider": "pyloss", "what": what, "value": 1e3 * seconds, "unit": "ms"})
    return found


def measure_auto(ctx: Context) -> list[dict[str, Any]]:
    """How much longer than exact attention low rank takes at most where "auto" takes it, and so on.

    Of 7 pairs of d and degree, 3 lengths and 5 kinds of windows.
    """
    import pyloss

    bands = [{}, {"is_causal": True}, {"window": 32}, {"window": 128}, {"window": (256, 32)}]
    worst = {"lowrank": (0.0, ""), "exact": (0.0, "")}
    for d, degree in ((8, 2), (8, 3), (16, 1), (16, 2), (16, 3), (64, 1), (64, 2)):
        for n in (64,) if ctx.quick else (128, 256, 512):
            tensors = [0.3 * t for t in Problem(1, n, d, degree, ctx.device).tensors]
            for band in bands:
                options = dict(scale="kronecker", **band)
                approximate = dict(degree=degree, tol=1.0)

                def attend(method: str) -> Tensor:
                    more = {} if method == "exact" else approximate  # noqa: B023
                    with torch.no_grad():
                        return pyloss.tensor_attention(*tensors, method=method, **options, **more)  # noqa: B023

                taken = "exact" if torch.equal(attend("auto"), attend("exact")) else "lowrank"
                other = "lowrank" if taken == "exact" else "exact"
                runs = [Run(call=lambda m=m: attend(m)) for m in (taken, other)]
                own, rival = _one_thread(lambda: _median_seconds(runs, 5, [1, 1]))  # noqa: B023
                what = f"d = {d}, degree {degree}, n = {n}, {band or 'all keys'}"
                worst[taken] = max(worst[taken], (own / rival, what))
    return [
        {"provider": "pyloss", "what": f"takes {taken}: {what}", "value": value, "unit": "x other"}
        for taken, (value, what) in worst.items()
    ]


def measure_bound(ctx: Context) -> list[dict[str, Any]]:
    """The largest error over what tensor_attention_error promises, in float32."""
    from pyloss.functional import tensor_attention, tensor_attention_error
    from pyloss.reference import tensor_attention as reference

    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for at in range(20 if ctx.quick else 1000):
        d, degree = (2, 4, 8)[at % 3], (1, 2, 3, 4)[at % 4]
        size = 0.4 + 0.8 * torch.rand((), generator=generator).item()
        q, k1, k2, v1, v2 = 2 * torch.rand(5, 1, 1, 16, d, generator=generator) - 1
        q, k1, k2 = size * q, size * k1, size * k2
        poly = ("taylor", "chebyshev")[at % 2]
        options = dict(degree=degree, poly=poly, scale=1.0 / d)
        bound = tensor_attention_error(q, k1, k2, values=(v1, v2), samples=1, **options)
        if not math.isfinite(bound["bound_out"]):
            continue
        near = tensor_attention(
            q, k1, k2, v1, v2, method="lowrank", check="none", **options
        ).double()
        wide = [t.double() for t in (q, k1, k2, v1, v2)]
        exact, _ = reference(wide[0], wide[1:3], wide[3:], scale=1.0 / d)
        worst = max(worst, (near - exact).abs().max().item() / bound["bound_out"])
    what = "n = 16, d = 2, 4, 8, degrees 1 to 4, entries up to 0.4 to 1.2"
    return [{"provider": "pyloss", "what": what, "value": worst, "unit": "x bound"}]
