"""Cases, providers and targets of ``betti_matching``: loss, gradient and barcodes of images.

Superlevel sets of a prediction against a binary target, in three kinds of prediction:

    smooth   a blurred target plus smooth noise
    natural  a blurred target, from a photograph (scikit-image's, resampled), plus white noise
    noise    independent uniform values: the most bars that an image can have

"Betti-Matching-3D" does the matching alone, without loss and gradient; it counts where its module
can be imported (put the folder of its build on PYTHONPATH). Its results are compared bar by bar.

Barcodes stand beside gudhi's fast route for two dimensions, which gives values and no places; its
own padding and negation of the image are not timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Probe, Provider, Run, Skip
from bench._targets import Target

BM3D = "Betti-Matching-3D"
SIZES = (64, 256, 512)
GROWTH = (256, 512, 1024, 2048)
KINDS = ("smooth", "natural", "noise")
BATCH = 8

TARGETS = [
    *(
        Target(
            f"matching + loss + gradient 512^2 {kind}, speed-up over {BM3D}'s matching alone",
            "speedup_over_bm3d",
            f"fwd\\+bwd 1x512x512 {kind}",
            at_least=least,
        )
        for kind, least in (("smooth", 20.0), ("natural", 12.0), ("noise", 12.0))
    ),
    Target(
        f"the same at 64^2 and 256^2 (worst), speed-up over {BM3D}'s matching alone",
        "speedup_over_bm3d",
        "fwd\\+bwd 1x(64x64|256x256) .*",
        at_least=5.0,
    ),
    Target(
        "the same, batch 8 of 512^2 (worst), speed-up over topolosses",
        "speedup",
        "fwd\\+bwd 8x512x512 .*",
        at_least=7.0,
    ),
    Target(
        "batch 8 of 512^2: time of one thread over 8 single images",
        "value",
        "batch",
        provider="pyloss batch",
        at_most=1.0,
    ),
    Target(
        "batch 8 of 512^2: speed-up by the second thread (on idle cores)",
        "value",
        "batch",
        provider="pyloss threads",
        at_least=1.7,
    ),
    *(
        Target(
            f"loss and gradient of noise, side {n}: time per n log n over that of side {n // 2}",
            "value",
            "growth",
            provider=f"pyloss {n}",
            at_most=1.15,
        )
        for n in GROWTH[1:]
    ),
    Target(
        "barcode 512^2 (worst), speed-up over gudhi's fast route",
        "speedup_over_gudhi",
        "barcode 512x512 .*",
        at_least=1.5,
    ),
    Target(
        "barcode 512^2 (worst), speed-up over cripser",
        "speedup_over_cripser",
        "barcode 512x512 .*",
        at_least=1.0,
    ),
    Target(
        "peak memory of loss and gradient, 512^2 (worst), beyond the gradient",
        "extra_mb",
        "fwd\\+bwd 1x512x512 .*",
        at_most=24.0,
        unit="MB",
    ),
    Target(
        "GPU, loss and gradient of a batch of 8 of 512^2 (worst)",
        "median_ms",
        "fwd\\+bwd 8x512x512 .*",
        at_most=5.0,
        unit="ms",
        device="cuda",
    ),
]


# --- images -------------------------------------------------------------------------------------


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of an image or a volume of n in each dimension, repeating at the borders."""
    reach = min(int(4 * sigma + 0.5), x.shape[0])
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).to(x.dtype)
    weight = weight / weight.sum()
    y = F.pad(x[None, None], [reach] * 2 * x.dim(), mode="circular")
    conv = F.conv2d if x.dim() == 2 else F.conv3d
    for axis in range(x.dim()):
        y = conv(y, weight.view([-1 if a == axis + 2 else 1 for a in range(x.dim() + 2)]))
    return y[0, 0]


def make_pair(kind: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(prediction, target) of n x n in float32."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "natural":
        try:
            from skimage import data
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error
        photo = torch.from_numpy(data.camera()).float()[None, None] / 255
        photo = F.interpolate(photo, (n, n), mode="area")[0, 0].rot90(seed % 4)
        target = (photo > photo.mean()).float()
    else:
        field = blur(torch.randn(n, n, generator=generator), 3.0)
        target = (field > field.median()).float()
    if kind == "noise":
        return torch.rand(n, n, generator=generator), target
    noise = 0.08 * torch.randn(n, n, generator=generator)
    if kind == "smooth":
        noise = 6 * blur(noise, 1.5)
    prediction = (6 * (blur(target, 1.5) - 0.5)).sigmoid() + noise
    return prediction.clamp(0, 1).contiguous(), target.contiguous()


class Problem:
    def __init__(self, kind: str, batch: int, n: int, device: str, make: Any = make_pair):
        pairs = [make(kind, n, seed) for seed in range(batch)]
        self.input, self.target = (torch.stack(t)[:, None].to(device) for t in zip(*pairs))

    @functools.cached_property
    def expected(self) -> tuple[float, Tensor]:
        """Mean loss and gradient, from the rows of the matching and torch operations, in float64.

        The rows themselves are compared with other programs: see bm3d_provider, barcode_error.
        """
        import pyloss

        x, y = (t.cpu().double() for t in (self.input, self.target))
        x.requires_grad_()
        loss = pyloss.betti_matching(x, y).loss().mean()
        (grad,) = torch.autograd.grad(loss, x)
        return loss.item(), grad


# --- providers of the loss ----------------------------------------------------------------------


def loss_run(problem: Problem, loss_fn: Callable[[Tensor, Tensor], Tensor], scale: float) -> Run:
    def call() -> tuple[Tensor, Tensor]:
        x = problem.input.detach().requires_grad_()
        loss = loss_fn(x, problem.target)
        loss.backward()
        return loss.detach(), x.grad

    def check() -> float:
        loss, grad = call()
        exact, exact_grad = problem.expected
        loss_error = abs(loss.item() * scale - exact) / abs(exact)
        grad_error = (grad.cpu().double() * scale - exact_grad).norm() / exact_grad.norm()
        return max(loss_error, grad_error.item()) / 1e-5

    return Run(call=call, check=check)


def pyloss_provider(problem: Problem) -> Provider:
    def build() -> Run:
        import pyloss

        return loss_run(problem, pyloss.betti_matching_loss, 1.0)

    return Provider("pyloss", build)


def topolosses_provider(problem: Problem) -> Provider:
    def build() -> Run:
        if problem.input.is_cuda:
            raise Skip("topolosses computes on the CPU")
        try:
            from topolosses.losses import BettiMatchingLoss
        except Exception as error:  # torchvision, which it imports, may not fit torch
            raise Skip(f"cannot be imported: {type(error).__name__}: {error}") from error

        module = BettiMatchingLoss(
            use_base_loss=False, alpha=1.0, include_background=True,
            num_processes=torch.get_num_threads(),
        )  # fmt: skip
        # Its filtration is 1 - p, rounded, which ties values that differ here: no exact check.
        run = loss_run(problem, module, 1.0)
        return Run(call=run.call)

    return Provider("topolosses", build)


def bm3d_provider(problem: Problem) -> Provider:
    def build() -> Run:
        if problem.input.is_cuda:
            raise Skip(f"{BM3D} computes on the CPU")
        try:
            import betti_matching
        except ImportError as error:
            raise Skip(f"not importable: {error}") from error
        # Superlevel sets by exact negation, as pyloss does.
        x = [(-t[0]).double().numpy() for t in problem.input]
        y = [(-t[0]).double().numpy() for t in problem.target]

        def call() -> Any:
            return betti_matching.compute_matching(x, y)

        return Run(call=call, check=lambda: _rows_differ(problem, call()))

    return Provider(BM3D, build)


def _rows_differ(problem: Problem, theirs: Any) -> float:
    """0 if all coordinates are the same, inf if any is not."""
    import pyloss

    ours = pyloss.betti_matching(problem.input, problem.target)
    for item, found in enumerate(theirs):
        sides = (
            ("matched", "input1_matched_birth_coordinates", "input1_matched_death_coordinates"),
            ("unmatched_input", "input1_unmatched_birth_coordinates",
             "input1_unmatched_death_coordinates"),
        )  # fmt: skip
        for kind, births, deaths in sides:
            for dim in range(problem.input.dim() - 2):
                mine = ours.coordinates(kind, item, dim)[:, :2].flatten(1).tolist()
                pairs = zip(getattr(found, births)[dim], getattr(found, deaths)[dim])
                if sorted(mine) != sorted([*map(int, b), *map(int, d)] for b, d in pairs):
                    return math.inf
    return 0.0


# --- providers of barcodes ----------------------------------------------------------------------


def multiset(dims: Any, births: Any, deaths: Any) -> Tensor:
    rows = torch.stack([torch.as_tensor(t).double() for t in (dims, births, deaths)], 1)
    rows = rows[(rows[:, 1] != rows[:, 2]) & rows.isfinite().all(1)]
    order = rows[:, 2].sort(stable=True).indices
    for column in (1, 0):
        rows = rows[order]
        order = rows[:, column].sort(stable=True).indices
    return rows[order]


def barcode_error(problem: Problem, theirs: Tensor) -> float:
    """Bars as values, which do not depend on how ties are broken."""
    import pyloss

    pairs = pyloss.persistence_pairs(problem.input)
    ours = multiset(pairs.index[:, 1], *pairs.values.unbind(1))
    if ours.shape != theirs.shape:
        return math.inf
    return (ours - theirs).abs().max().item() / 1e-7


def _gudhi_rectangle() -> Callable[[Any], Any]:
    """gudhi's function for two dimensions, or the estimator around it, which wants scikit-learn."""
    try:
        from gudhi._pers_cub_low_dim_ext import _persistence_on_rectangle_from_top_cells
    except ImportError:
        from gudhi.sklearn.cubical_persistence import CubicalPersistence

        estimator = CubicalPersistence([0, 1])
        return lambda array: estimator.fit_transform([array])[0]
    return lambda array: _persistence_on_rectangle_from_top_cells(array, 0.0)


def barcode_providers(problem: Problem) -> list[Provider]:
    image = problem.input[0, 0]

    def ours() -> Run:
        import pyloss

        return Run(call=lambda: pyloss.persistence_pairs(problem.input))

    def gudhi_run() -> Run:
        try:
            diagrams = _gudhi_rectangle()
        except ImportError as error:
            raise Skip(f"not importable: {error}") from error
        # The V-construction is the T-construction of the negated image in a frame that enters
        # first: dimensions and signs change places.
        array = F.pad(-image.double(), (1, 1, 1, 1), value=-math.inf).numpy()

        def check() -> float:
            rows = []
            for dim, found in enumerate(diagrams(array)):
                negated = -torch.as_tensor(found).double().view(-1, 2).flip(1)
                rows.append(torch.cat([torch.full((len(negated), 1), 1.0 - dim), negated], 1))
            return barcode_error(problem, multiset(*torch.cat(rows).unbind(1)))

        return Run(call=lambda: diagrams(array), check=check)

    def cripser_run() -> Run:
        try:
            import cripser
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error
        array = image.double().numpy()

        def check() -> float:
            rows = torch.from_numpy(cripser.computePH(array, maxdim=1))
            rows = rows[rows[:, 2] < 1e30]  # its infinity
            return barcode_error(problem, multiset(rows[:, 0], rows[:, 1], rows[:, 2]))

        return Run(call=lambda: cripser.computePH(array, maxdim=1), check=check)

    return [
        Provider("pyloss", ours),
        Provider("gudhi", gudhi_run),
        Provider("cripser", cripser_run),
    ]


# --- cases --------------------------------------------------------------------------------------


def _loss_case(kind: str, batch: int, n: int, ctx: Context) -> Case:
    name = f"fwd+bwd {batch}x{n}x{n} {kind}"
    n = min(n, 32) if ctx.quick else n

    def providers() -> list[Provider]:
        p = Problem(kind, batch, n, ctx.device)
        return [pyloss_provider(p), bm3d_provider(p), topolosses_provider(p)]

    return Case(
        name=name,
        group="fwd+bwd",
        mode="fwd+bwd",
        shape=(batch, 1, n, n),
        dtype="fp32",
        useful_bytes=0,  # random access to a few arrays, not a stream
        tensor_bytes=4 * batch * n * n,
        open=providers,
        baseline="topolosses",
        against={"speedup_over_bm3d": BM3D},
        result_bytes=4 * batch * n * n,
        rounds=7 if batch == 1 else 3,
        once=batch > 1,  # peers take seconds
    )


def _barcode_case(kind: str, n: int, ctx: Context) -> Case:
    name = f"barcode {n}x{n} {kind}"
    n = min(n, 32) if ctx.quick else n
    return Case(
        name=name,
        group="barcode",
        mode="fwd",
        shape=(1, 1, n, n),
        dtype="fp32",
        useful_bytes=0,
        tensor_bytes=4 * n * n,
        open=lambda: barcode_providers(Problem(kind, 1, n, ctx.device)),
        baseline="cripser",
        against={"speedup_over_gudhi": "gudhi", "speedup_over_cripser": "cripser"},
        rounds=5,
        once=True,
    )


def measure_batch(ctx: Context) -> list[dict[str, Any]]:
    """What a batch costs against its images one by one, and what a second thread gains.

    In a process of its own: topolosses brings a second OpenMP along, and once it is loaded
    PyTorch's threads gain nothing any more, ours neither.
    """
    if ctx.quick:
        return _measure_batch(ctx.device, 32, 2)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_batch, ctx.device, 512, 5).result()


def _measure_batch(device: str, n: int, rounds: int) -> list[dict[str, Any]]:
    import time

    import pyloss

    problem = Problem("smooth", BATCH, n, device)

    def seconds(x: Tensor, y: Tensor, threads: int) -> float:
        torch.set_num_threads(threads)
        x = x.detach().requires_grad_()
        best = math.inf
        for _ in range(rounds):
            start = time.perf_counter()
            pyloss.betti_matching_loss(x, y).backward()
            best = min(best, time.perf_counter() - start)
        return best

    before = torch.get_num_threads()
    try:
        singles = sum(
            seconds(problem.input[i : i + 1], problem.target[i : i + 1], 1) for i in range(BATCH)
        )
        one = seconds(problem.input, problem.target, 1)
        two = seconds(problem.input, problem.target, 2)
    finally:
        torch.set_num_threads(before)
    records = [("pyloss batch", one / singles, "x 8 single images")]
    if before > 1:
        records.append(("pyloss threads", one / two, "x by 2 threads"))
    return [
        {"provider": name, "what": "batch 8 of 512^2 smooth", "value": value, "unit": unit}
        for name, value, unit in records
    ]


def measure_growth(ctx: Context) -> list[dict[str, Any]]:
    """How the time grows with the side of an image of noise, the most that there can be to join."""
    import time

    import pyloss

    sides = [n // 16 for n in GROWTH] if ctx.quick else GROWTH
    problems = [Problem("noise", 1, n, ctx.device) for n in sides]
    best = [math.inf] * len(sides)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(2 if ctx.quick else 5):
            for i, p in enumerate(problems):
                x = p.input.detach().requires_grad_()
                start = time.perf_counter()
                pyloss.betti_matching_loss(x, p.target).backward()
                best[i] = min(best[i], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    unit = [t / (n * n * math.log(n * n)) for t, n in zip(best, sides)]
    return [
        {"provider": f"pyloss {n}", "what": f"noise, side {n // 2} to {n}, per n log n",
         "value": unit[i + 1] / unit[i], "unit": "x", "best_ms": 1e3 * best[i + 1]}
        for i, n in enumerate(GROWTH[1:])
    ]  # fmt: skip


def cases(ctx: Context) -> Iterator[Case | Probe]:
    """The largest first, for short budgets."""
    cuda = ctx.device == "cuda"
    for kind in KINDS:
        yield _loss_case(kind, 1, 512, ctx)
    for kind in KINDS:
        yield _loss_case(kind, BATCH, 512, ctx)
    if not cuda:
        yield Probe("batch", "batch", lambda: measure_batch(ctx))
        yield Probe("growth", "growth", lambda: measure_growth(ctx))
        for kind in KINDS:
            yield _barcode_case(kind, 512, ctx)
    for n in SIZES[:-1]:
        for kind in KINDS:
            yield _loss_case(kind, 1, n, ctx)
