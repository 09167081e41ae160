"""Cases, providers and targets of ``betti_matching`` in three dimensions.

Superlevel sets of a prediction against a binary target, in two kinds of prediction:

    smooth   a blurred target plus smooth noise
    noise    independent uniform values: the most bars that a volume can have

"Betti-Matching-3D" does the matching alone, without loss and gradient, as in two dimensions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench._core import Case, Context, Probe, Provider, Run, Skip
from bench._targets import Target
from bench.bench_betti_matching import (
    BM3D,
    Problem,
    barcode_error,
    blur,
    bm3d_provider,
    multiset,
    pyloss_provider,
)

BATCH = 8
KINDS = ("smooth", "noise")

TARGETS = [
    *(
        Target(
            f"matching + loss + gradient {n}^3 {kind}, speed-up over {BM3D}'s matching alone",
            "speedup_over_bm3d",
            f"fwd\\+bwd 1x{n}\\^3 {kind}",
            at_least=least,
        )
        for n, kind, least in (
            (64, "smooth", 7.0),
            (64, "noise", 5.0),
            (48, "smooth", 6.0),
            (48, "noise", 6.0),
            (32, "smooth", 6.0),
            (32, "noise", 6.0),
        )
    ),
    Target(
        "barcode 64^3 (worst), speed-up over cripser",
        "speedup_over_cripser",
        "barcode 64\\^3 .*",
        at_least=1.0,
    ),
    Target(
        "peak memory of loss and gradient, 64^3 (worst), beyond the gradient",
        "extra_mb",
        "fwd\\+bwd 1x64\\^3 .*",
        at_most=40.0,
        unit="MB",
    ),
    Target(
        "matching + loss + gradient 128^3 smooth",
        "median_ms",
        "fwd\\+bwd 1x128\\^3 smooth",
        at_most=2500.0,
        unit="ms",
    ),
    Target(
        "growth from 64^3 to 128^3 smooth, over that of n log n",
        "value",
        "growth",
        provider="pyloss growth",
        at_most=1.1,
    ),
    Target(
        "batch 8 of 32^3: time of one thread over 8 single volumes",
        "value",
        "batch",
        provider="pyloss batch",
        at_most=1.0,
    ),
    Target(
        "GPU, loss and gradient of a batch of 4 of 96^3 (worst)",
        "median_ms",
        "fwd\\+bwd 4x96\\^3 .*",
        at_most=500.0,
        unit="ms",
        device="cuda",
    ),
]


# --- volumes ------------------------------------------------------------------------------------


def make_pair(kind: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(prediction, target) of n x n x n in float32."""
    generator = torch.Generator().manual_seed(seed)
    field = blur(torch.randn(n, n, n, generator=generator), 3.0)
    target = (field > field.median()).float()
    if kind == "noise":
        return torch.rand(n, n, n, generator=generator), target
    noise = 1.5 * blur(torch.randn(n, n, n, generator=generator), 1.5)
    prediction = (6 * (blur(target, 1.5) - 0.5)).sigmoid() + noise
    return prediction.clamp(0, 1).contiguous(), target.contiguous()


def _problem(kind: str, batch: int, n: int, device: str) -> Problem:
    return Problem(kind, batch, n, device, make_pair)


# --- providers of barcodes ----------------------------------------------------------------------


def _barcode_providers(problem: Problem) -> list[Provider]:
    array = problem.input[0, 0].double().numpy()

    def ours() -> Run:
        import pyloss

        return Run(call=lambda: pyloss.persistence_pairs(problem.input))

    def cripser_run() -> Run:
        try:
            import cripser
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error

        def check() -> float:
            rows = torch.from_numpy(cripser.computePH(array, maxdim=2))
            rows = rows[rows[:, 2] < 1e30]  # its infinity
            return barcode_error(problem, multiset(rows[:, 0], rows[:, 1], rows[:, 2]))

        return Run(call=lambda: cripser.computePH(array, maxdim=2), check=check)

    def gudhi_run() -> Run:
        try:
            import gudhi
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error

        def call() -> Any:
            found = gudhi.CubicalComplex(vertices=array)
            found.compute_persistence(homology_coeff_field=2, min_persistence=0.0)
            return found

        def check() -> float:
            found, rows = call(), []
            for dim in range(3):
                bars = torch.from_numpy(found.persistence_intervals_in_dimension(dim)).view(-1, 2)
                rows.append(torch.cat([bars.new_full((len(bars), 1), dim), bars], 1))
            return barcode_error(problem, multiset(*torch.cat(rows).unbind(1)))

        return Run(call=call, check=check)

    return [
        Provider("pyloss", ours),
        Provider("cripser", cripser_run),
        Provider("gudhi", gudhi_run),
    ]


def _reference_provider(problem: Problem) -> Provider:
    """The definition, which has no chance: that is shown once, where it ends."""

    def build() -> Run:
        from pyloss.reference import betti_matching

        x, y = (t[:, 0] for t in (problem.input, problem.target))
        return Run(call=lambda: betti_matching.betti_matching_loss(x, y))

    return Provider("reference", build)


# --- cases --------------------------------------------------------------------------------------


def _loss_case(kind: str, batch: int, n: int, ctx: Context, peers: bool = True) -> Case:
    name = f"fwd+bwd {batch}x{n}^3 {kind}"
    n = min(n, 10) if ctx.quick else n

    def providers() -> list[Provider]:
        p = _problem(kind, batch, n, ctx.device)
        found = [pyloss_provider(p)]
        if peers:
            found.append(bm3d_provider(p))
        if n <= 12:
            found.append(_reference_provider(p))
        return found

    return Case(
        name=name,
        group="fwd+bwd",
        mode="fwd+bwd",
        shape=(batch, 1, n, n, n),
        dtype="fp32",
        useful_bytes=0,  # random access to a few arrays, not a stream
        tensor_bytes=4 * batch * n**3,
        open=providers,
        baseline=BM3D,
        against={"speedup_over_bm3d": BM3D},
        result_bytes=4 * batch * n**3,
        rounds=3,  # peers take seconds
        once=True,
    )


def _barcode_case(kind: str, n: int, ctx: Context) -> Case:
    name = f"barcode {n}^3 {kind}"
    n = min(n, 10) if ctx.quick else n
    return Case(
        name=name,
        group="barcode",
        mode="fwd",
        shape=(1, 1, n, n, n),
        dtype="fp32",
        useful_bytes=0,
        tensor_bytes=4 * n**3,
        open=lambda: _barcode_providers(_problem(kind, 1, n, ctx.device)),
        baseline="cripser",
        against={"speedup_over_gudhi": "gudhi", "speedup_over_cripser": "cripser"},
        rounds=3,
        once=True,
    )


def _seconds(x: Tensor, y: Tensor, rounds: int) -> float:
    """Least time of loss and gradient."""
    import pyloss

    x = x.detach().requires_grad_()
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        pyloss.betti_matching_loss(x, y).backward()
        best = min(best, time.perf_counter() - start)
    return best


def _on_one_thread(measure: Any) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure()
    finally:
        torch.set_num_threads(before)


def measure_batch(ctx: Context) -> list[dict[str, Any]]:
    """What a batch costs against its volumes one by one."""
    n, rounds = (8, 2) if ctx.quick else (32, 3)
    p = _problem("smooth", BATCH, n, ctx.device)

    def ratio() -> float:
        one_by_one = zip(p.input.split(1), p.target.split(1))
        singles = sum(_seconds(x, y, rounds) for x, y in one_by_one)
        return _seconds(p.input, p.target, rounds) / singles

    what = f"batch {BATCH} of 32^3 smooth"
    value = _on_one_thread(ratio)
    return [{"provider": "pyloss batch", "what": what, "value": value, "unit": "x 8 singles"}]


def measure_growth(ctx: Context) -> list[dict[str, Any]]:
    """Time of eight times the voxels, over what n log n would take."""
    sizes, rounds = ((6, 12), 2) if ctx.quick else ((64, 128), 3)

    def ratio() -> float:
        problems = [_problem("smooth", 1, n, ctx.device) for n in sizes]
        # In turns, so that a slow phase of the machine hits both.
        times = [[_seconds(p.input, p.target, 1) for p in problems] for _ in range(rounds)]
        small, large = map(min, zip(*times))
        growth = math.prod(f(sizes[1] ** 3) / f(sizes[0] ** 3) for f in (float, math.log))
        return large / small / growth

    what = "64^3 to 128^3 smooth"
    value = _on_one_thread(ratio)
    return [{"provider": "pyloss growth", "what": what, "value": value, "unit": "x n log n"}]


def cases(ctx: Context) -> Iterator[Case | Probe]:
    """The largest first, for short budgets."""
    if ctx.device == "cuda":
        for kind in KINDS:
            yield _loss_case(kind, 4, 96, ctx)
        return
    for kind in KINDS:
        yield _loss_case(kind, 1, 64, ctx)
        yield _barcode_case(kind, 64, ctx)
    yield Probe("growth", "growth", lambda: measure_growth(ctx))
    yield _loss_case("smooth", 1, 128, ctx, peers=False)
    yield Probe("batch", "batch", lambda: measure_batch(ctx))
    for n in (48, 32):
        for kind in KINDS:
            yield _loss_case(kind, 1, n, ctx)
    yield _loss_case("smooth", BATCH, 32, ctx)
    yield _loss_case("noise", 1, 10, ctx)
