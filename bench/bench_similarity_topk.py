"""Cases and providers of ``similarity_topk``: GroCo and the top-k loss, fwd + bwd, beside theirs.

The authors' GroCo is rebuilt from the paper's steps on the sorting network of diffsort, which forms
the matrix of every row; the top-k loss stands beside difftopk's. Run it with ``--threads 1``, as
the issue's numbers are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target

RTOL = 1e-2
SIZES = {  # name: views, images, width, negatives, and those of the published form beside it
    "groco 1024x128, K 10": (2, 1024, 128, 10, 10),
    "groco 256x128, K 64": (2, 256, 128, 64, 10),
    "groco 8192x128, K 10": (2, 8192, 128, 10, None),
}

TOPK = {  # name: difftopk's method, ours
    "top-k loss bitonic 256x1000, m 50": ("bitonic__non_sparse", "bitonic"),
    "top-k loss odd_even 256x1000, m 50": ("odd_even", "odd_even"),
}
P_K = (0.5, 0.0, 0.0, 0.0, 0.5)

TARGETS = [
    Target("GroCo 1024 x 128, K 10, fwd+bwd, speed-up over the published form", "speedup",
           "groco 1024x128, K 10", at_least=20),
    Target("GroCo 256 x 128, K 64, fwd+bwd, over the published form at K = 10", "speedup",
           "groco 256x128, K 64", at_least=1),
    Target("peak memory, 8192 x 128, K 10, beyond the gradient", "extra_mb",
           "groco 8192x128, K 10", at_most=64, unit="MB"),
    *(Target(f"{name}, fwd+bwd, speed-up over difftopk", "speedup", name, at_least=20)
      for name in TOPK),
]  # fmt: skip


def published(views: list[Tensor], topk_neg: int, network: Callable) -> Tensor:
    """Two cross entropies of the block masses of P, for each view as the anchor."""
    total = 0.0
    units = [F.normalize(z, dim=1, eps=1e-8) for z in views]
    for a, anchor in enumerate(units):
        pos = torch.stack([(anchor * p.detach()).sum(1) for k, p in enumerate(units) if k != a], 1)
        near = anchor @ anchor.detach().t()
        near = near.masked_fill(torch.eye(len(anchor), dtype=torch.bool), -math.inf)
        neg = near.topk(topk_neg, 1).values.flip(1)
        scores = torch.cat([neg, pos.sort(1).values], 1)
        _, matrix = network(scores)
        truth = torch.zeros_like(scores)
        truth[:, topk_neg:] = 1
        high = matrix[:, :, topk_neg:].sum(2).clamp(0, 1)
        low = matrix[:, :, :topk_neg].sum(2).clamp(0, 1)
        total = total + F.binary_cross_entropy(high, truth) / 2
        total = total + F.binary_cross_entropy(low, 1 - truth) / 2
    return total / len(views)


class Problem:
    def __init__(self, views: int, images: int, width: int, device: str):
        generator = torch.Generator().manual_seed(0)
        shape = (images, width)
        self.views = [torch.randn(shape, generator=generator).to(device) for _ in range(views)]

    def step(self, loss: Callable[[list[Tensor]], Tensor], dtype=torch.float32) -> list[Tensor]:
        views = [z.to(dtype).requires_grad_() for z in (z.detach() for z in self.views)]
        found = loss(views)
        return [found.detach(), *torch.autograd.grad(found, views)]


def providers(problem: Problem, topk_neg: int, theirs: int | None) -> list[Provider]:
    import pyloss

    def run(loss: Callable, exact: Callable) -> Run:
        def check() -> float:
            want, found = problem.step(exact, torch.float64), problem.step(loss)
            # Of the whole: one pair of keys that change places in float32 is no error.
            errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, want)]
            return max(errors).item() / RTOL

        return Run(call=lambda: problem.step(loss), check=check)

    def ours(views: list[Tensor]) -> Tensor:
        return pyloss.groco_loss(views, topk_neg=topk_neg)

    def by_diffsort() -> Run:
        try:
            from diffsort import DiffSortNet
        except ImportError as error:
            raise Skip("diffsort is not installed") from error
        network = DiffSortNet("odd_even", theirs + 1, steepness=1.0)
        exact = functools.partial(_exact, topk_neg=theirs)
        return run(lambda views: published(views, theirs, network), exact)

    exact = functools.partial(_exact, topk_neg=topk_neg)
    found = [Provider("pyloss", lambda: run(ours, exact))]
    if theirs is not None:
        found.append(Provider("diffsort", by_diffsort))
    return found


def _exact(views: list[Tensor], topk_neg: int) -> Tensor:
    """Of float64 views, with the matrix of the package's reference."""
    import pyloss
    from pyloss.reference import sorting_network_permutation

    if views[0].shape[0] > 2048:  # its matrices would be too large
        return pyloss.groco_loss(views, topk_neg=topk_neg)
    return published(
        views, topk_neg, lambda s: sorting_network_permutation(s, "odd_even", "cauchy", 1.0)
    )


class Scores:
    def __init__(self, rows: int, classes: int, device: str):
        generator = torch.Generator().manual_seed(0)
        self.scores = torch.randn(rows, classes, generator=generator).to(device)
        self.labels = torch.randint(classes, (rows,), generator=generator).to(device)

    def step(self, loss: Callable[[Tensor, Tensor], Tensor], dtype=torch.float32) -> Tensor:
        x = self.scores.to(dtype).detach().requires_grad_()
        return torch.autograd.grad(loss(x, self.labels), x)[0]


def topk_providers(problem: Scores, m: int, theirs: str, sorter: str) -> list[Provider]:
    import pyloss

    def by_pyloss(sorter: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: pyloss.topk_cross_entropy(x, y, p_k=P_K, m=m, sorter=sorter)

    def run(loss: Callable[[Tensor, Tensor], Tensor], sorter: str) -> Run:
        def check() -> float:
            with pyloss.backend("reference"):
                want = problem.step(by_pyloss(sorter), torch.float64)
            found = problem.step(loss).double()
            return ((found - want).norm() / want.norm()).item() / 1e-4

        return Run(call=lambda: problem.step(loss), check=check)

    def by_difftopk() -> Run:
        try:
            import difftopk
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error
        loss = difftopk.TopKCrossEntropyLoss(
            theirs, 1.0, list(P_K), problem.scores.shape[1], m=m, distribution="cauchy",
            device=problem.scores.device,
        )  # fmt: skip
        return run(loss, sorter)

    default = "splitter_selection"
    return [
        Provider("pyloss", lambda: run(by_pyloss(sorter), sorter)),
        Provider(f"pyloss {default}", lambda: run(by_pyloss(default), default)),
        Provider("difftopk", by_difftopk),
    ]


def cases(ctx: Context) -> Iterator[Case]:
    for name, sizes in SIZES.items():
        yield _case(name, *((2, 16, 8, 3, 3) if ctx.quick else sizes), ctx)
    for name, (theirs, sorter) in TOPK.items():
        yield _topk_case(name, theirs, sorter, *((4, 20, 8) if ctx.quick else (256, 1000, 50)), ctx)


def _topk_case(name, theirs, sorter, rows, classes, m, ctx: Context) -> Case:
    return Case(
        name=name,
        group="top-k",
        mode="fwd+bwd",
        shape=(rows, classes),
        dtype="fp32",
        useful_bytes=0,  # arithmetic, not a stream
        tensor_bytes=4 * rows * classes,
        open=lambda: topk_providers(Scores(rows, classes, ctx.device), m, theirs, sorter),
        baseline="difftopk",
        result_bytes=4 * rows * classes,
    )


def _case(name, views, images, width, topk_neg, theirs, ctx: Context) -> Case:
    return Case(
        name=name,
        group="groco",
        mode="fwd+bwd",
        shape=(views, images, width),
        dtype="fp32",
        useful_bytes=0,  # products, not a stream
        tensor_bytes=4 * views * images * width,
        open=lambda: providers(Problem(views, images, width, ctx.device), topk_neg, theirs),
        baseline="diffsort",
        result_bytes=4 * views * images * width,
    )
