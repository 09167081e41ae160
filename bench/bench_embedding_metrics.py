"""Cases and providers of the metrics of embeddings: uniformity and OPIS over all pairs.

The yardstick is "bare products": each pair multiplied once by the packed products of
csrc/cpu/gemm.h, into a buffer made before. The plain uniformity is that of its authors, on the
vector of all distances, where that fits into memory. Run it with ``--threads 1``, as the issue's
numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Provider, Run
from bench._targets import Target

PRODUCTS = "bare products"
BLOCK = 1024
SIZES = {  # name: embeddings, width, classes
    "8192x128": (8192, 128, 256),
    "50000x128": (50000, 128, 1000),
}
CHECKED = 1500  # embeddings of which a dense float64 version says what is right

TARGETS = [
    *(Target(f"{metric} of 50,000 x 128, share of the rate of the bare products", "pct_products",
             f"{metric} 50000x128", at_least=60, unit="%")
      for metric in ("uniformity", "opis")),
    *(Target(f"{metric} of 50,000 x 128, peak memory", "extra_mb", f"{metric} 50000x128",
             at_most=100, unit="MB")
      for metric in ("uniformity", "opis")),
]  # fmt: skip


class Problem:
    """Classes that overlap, of unit length."""

    def __init__(self, n: int, width: int, classes: int, device: str):
        g = torch.Generator().manual_seed(0)
        self.labels = torch.randint(classes, (n,), generator=g)
        centre = torch.randn(classes, width, generator=g)
        x = torch.randn(n, width, generator=g) + 0.7 * centre[self.labels]
        self.x, self.labels = F.normalize(x, dim=1).to(device), self.labels.to(device)


def plain_uniformity(x: Tensor) -> Tensor:
    return torch.pdist(x).pow(2).mul(-2).exp().mean().log()


def plain_opis(x: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    near = torch.cdist(x, x).unsqueeze(2) <= thresholds
    utilities = []
    for c in labels.unique():
        mine = labels == c
        size = int(mine.sum())
        if size < 2:
            continue
        within = near[mine][:, mine].sum((0, 1)) - size  # each with itself
        sensitivity = within / (size * (size - 1))
        specificity = 1 - near[mine][:, ~mine].double().mean((0, 1))
        utilities.append(2 * sensitivity * specificity / (sensitivity + specificity))
    return torch.stack(utilities).nan_to_num().var(0, correction=0).mean()


def products(x: Tensor) -> Run:
    from pyloss import _C

    (n, d), threads = x.shape, torch.get_num_threads()
    buffer = x.new_empty(BLOCK, n)

    def call() -> None:
        for i in range(0, n, BLOCK):
            rows = x[i : i + BLOCK]
            # Float32; the rows times what stands behind them, transposed.
            _C.gemm(
                1, rows.shape[0], n - i, d, rows.data_ptr(), d, 1, rows.data_ptr(), 1, d,
                buffer.data_ptr(), n, 0, False, threads,
            )  # fmt: skip

    return Run(call=call)


def uniformity_providers(problem: Problem, plain: bool) -> list[Provider]:
    from pyloss.metrics import uniformity

    some = problem.x[:CHECKED]

    def run(metric: Callable[[Tensor], Tensor]) -> Run:
        def check() -> float:
            want = plain_uniformity(some.double())
            return ((metric(some).double() - want) / want).abs().item() / 1e-5

        return Run(call=lambda: metric(problem.x), check=check)

    found = [
        Provider("pyloss", lambda: run(uniformity)),
        Provider(PRODUCTS, lambda: products(problem.x)),
    ]
    return [*found, Provider("plain", lambda: run(plain_uniformity))] if plain else found


def opis_providers(problem: Problem) -> list[Provider]:
    from pyloss.metrics import opis

    def run() -> Run:
        def check() -> float:
            x, labels = problem.x[:CHECKED].double(), problem.labels[:CHECKED] % 20
            t = torch.linspace(0.8, 1.3, 7, dtype=torch.float64)
            want = plain_opis(x, labels, t)
            return ((opis(x.float(), labels, thresholds=t) - want) / want).abs().item() / 1e-3

        return Run(call=lambda: opis(problem.x, problem.labels), check=check)

    return [Provider("pyloss", run), Provider(PRODUCTS, lambda: products(problem.x))]


def cases(ctx: Context) -> Iterator[Case]:
    for name, sizes in SIZES.items():
        n, width, classes = (300, 16, 10) if ctx.quick else sizes
        plain = n <= 8192

        def problem(n=n, width=width, classes=classes) -> Problem:
            return Problem(n, width, classes, ctx.device)

        def uniformity(problem=problem, plain=plain) -> list[Provider]:
            return uniformity_providers(problem(), plain)

        def opis(problem=problem) -> list[Provider]:
            return opis_providers(problem())

        for metric, open in (("uniformity", uniformity), ("opis", opis)):
            yield Case(
                name=f"{metric} {name}",
                group=metric,
                mode="fwd",
                shape=(n, width),
                dtype="fp32",
                useful_bytes=0,  # arithmetic, not a stream
                tensor_bytes=4 * n * width,
                open=open,
                baseline="plain",
                products=PRODUCTS,
                result_bytes=0,
                rounds=None if plain else 5,
                flop=n * n * width,  # each pair once
            )
