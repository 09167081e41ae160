"""Cases and providers of ``similarity_softmax``: NT-Xent, forward and backward, beside its peers.

B images are 2B views, so that the logits are 2B x 2B. The yardstick is "bare products": one product
of all views with all views and one of such a matrix with the views, by the packed products of
csrc/cpu/gemm.h into buffers made before. That is the arithmetic of ours, which forms each logit
twice and multiplies its gradient on for both of its rows, but does so for one triangle only; the
plain version has half as much again. Run it with ``--threads 1``, as the issue's numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._core import Case, Context, Provider, Run, Skip
from bench._targets import Target

PRODUCTS = "bare products"
PEERS = {"pml": "pytorch-metric-learning", "lightly": "lightly"}
RTOL = 1e-4
TEMPERATURE = 0.2
SIZES = {  # name: images, width, and whether the matrix of logits fits into memory
    "nt_xent 32x128": (32, 128, True),
    "nt_xent 512x128": (512, 128, True),
    "nt_xent 4096x128": (4096, 128, True),
    "nt_xent 16384x128": (16384, 128, False),
}

TARGETS = [
    Target("NT-Xent 4096 x 128, fwd+bwd, speed-up over plain PyTorch", "speedup",
           "nt_xent 4096x128", at_least=4),
    *(Target(f"NT-Xent {b} x 128, fwd+bwd, speed-up over {name}", f"speedup_over_{key}",
             f"nt_xent {b}x128", at_least=1)
      for b, peers in ((512, ("pml", "lightly")), (4096, ("lightly",)))
      for key, name in PEERS.items() if key in peers),
    Target("NT-Xent 4096 x 128, fwd+bwd, time over the bare products", "x_products",
           "nt_xent 4096x128", at_most=1.15),
    Target("NT-Xent 16384 x 128, peak memory beyond the gradients", "extra_mb",
           "nt_xent 16384x128", at_most=32, unit="MB"),
]  # fmt: skip


def plain(z1: Tensor, z2: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.t() / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    views = torch.arange(len(z), device=z.device)
    return F.cross_entropy(logits, views.roll(len(z1)))


class Problem:
    def __init__(self, images: int, width: int, device: str):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(2, images, width, generator=generator).to(device)
        self.views = [v.requires_grad_() for v in z]

    def step(self, loss: Callable[[Tensor, Tensor], Tensor], dtype=None) -> list[Tensor]:
        views = self.views
        if dtype is not None:
            views = [v.detach().to(dtype).requires_grad_() for v in views]
        found = loss(*views)
        return [found.detach(), *torch.autograd.grad(found, views)]


def products_provider(problem: Problem) -> Provider:
    def build() -> Run:
        from pyloss import _C

        z = F.normalize(torch.cat([v.detach() for v in problem.views]), dim=1)
        n, d = z.shape
        logits, grad = z.new_empty(n, n), torch.empty_like(z)

        def multiply(m, n, k, a, strides, b, b_strides, to) -> None:
            _C.gemm(
                1, m, n, k, a.data_ptr(), *strides, b.data_ptr(), *b_strides, to.data_ptr(), n, 0,
                False, torch.get_num_threads(),
            )  # fmt: skip

        def call() -> None:
            if z.device.type == "cpu":
                multiply(n, n, d, z, (d, 1), z, (1, d), logits)
                multiply(n, d, n, logits, (n, 1), z, (d, 1), grad)
            else:
                torch.mm(z, z.t(), out=logits)
                torch.mm(logits, z, out=grad)

        def check() -> float:
            call()
            right = z[:3].double() @ z.double().t()
            errors = [(logits[:3] - right).norm(), (grad[:3] - right @ z.double()).norm() / n]
            return max(errors).item() / RTOL

        return Run(call=call, check=check)

    return Provider(PRODUCTS, build)


def providers(problem: Problem, dense: bool) -> list[Provider]:
    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def check() -> float:
            if not dense:
                return 0.0 if all(t.isfinite().all() for t in problem.step(loss)) else 1e9
            want, found = problem.step(plain, torch.float64), problem.step(loss)
            errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, want)]
            return max(errors).item() / RTOL

        return Run(call=lambda: problem.step(loss), check=check)

    def ours(z1: Tensor, z2: Tensor) -> Tensor:
        import pyloss

        return pyloss.nt_xent(z1, z2, temperature=TEMPERATURE)

    def by_pml() -> Run:
        views = 2 * len(problem.views[0])
        if views**3 > 4 << 30:  # a mask of positives by negative pairs
            raise Skip(f"its masks would take {views**3 / 1e9:.0f} GB")
        try:
            from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error
        return run(SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE)))

    def by_lightly() -> Run:
        try:
            from lightly.loss.ntx_ent_loss import NTXentLoss
        except ImportError as error:
            raise Skip(f"not installed: {error}") from error
        return run(NTXentLoss(temperature=TEMPERATURE))

    found = [Provider("pyloss", lambda: run(ours))]
    if dense:
        found += [
            products_provider(problem),
            Provider("torch", lambda: run(plain)),
            Provider(PEERS["pml"], by_pml),
            Provider(PEERS["lightly"], by_lightly),
        ]
    return found


def cases(ctx: Context) -> Iterator[Case]:
    for name, (images, width, dense) in SIZES.items():
        if ctx.quick:
            images, width = min(images, 24), 16
        yield _case(name, images, width, dense, ctx)


def _case(name: str, images: int, width: int, dense: bool, ctx: Context) -> Case:
    return Case(
        name=name,
        group="nt_xent",
        mode="fwd+bwd",
        shape=(images, width),
        dtype="fp32",
        useful_bytes=0,  # arithmetic, not a stream
        tensor_bytes=8 * images * width,
        open=lambda: providers(Problem(images, width, ctx.device), dense),
        inner=20 if images <= 32 else 1,
        products=PRODUCTS,
        against={f"speedup_over_{key}": name for key, name in PEERS.items()},
        result_bytes=8 * images * width,
        rounds=3 if images > 8192 else None,
        flop=4 * (2 * images) ** 2 * width,
    )
