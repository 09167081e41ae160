"""What a call costs beside its arithmetic: every public op on a handful of numbers.

Forward without gradients, and forward with backward, beside the nearest call of PyTorch where there
is one. Times here are microseconds of Python, dispatch, autograd and buffers, so they say how the
frame does, not the kernels. ``--compare old.json --shared`` holds them against an earlier run as
ratios to PyTorch's own call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyloss
from bench._core import Case, Context, Provider, Run

TARGETS: list[Any] = []

Call = Callable[..., Tensor]


class Operation:
    """One op: tensors that get a gradient, its call, and the nearest call of PyTorch."""

    def __init__(self, ours: Call, theirs: Call | None, *sources: Tensor) -> None:
        self.calls = {"pyloss": ours, "torch": theirs}
        self.sources = sources

    def run(self, name: str, mode: str, device: str) -> Run:
        call = self.calls[name]
        assert call is not None
        sources = [s.to(device) for s in self.sources]
        if mode == "fwd":
            return Run(call=lambda: call(*sources))
        leaves = [s.requires_grad_() for s in sources]

        def step() -> None:
            out = call(*leaves)
            out = out if out.dim() == 0 else out.sum()
            torch.autograd.grad(out, leaves, allow_unused=True)

        return Run(call=step)


def operations(device: str) -> dict[str, Operation]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    y = torch.tensor([0, 1, 2, 3], device=device)
    mask = (randn(1, 1, 8, 8) > 0).float()
    q, heads = 0.3 * randn(1, 1, 4, 8), [0.3 * randn(1, 1, 4, 8) for _ in range(4)]

    modules = pyloss.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()

    def linear_ce(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    def attention(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        return pyloss.tensor_attention(q, k1, k2, v1, v2)

    def lowrank(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        return pyloss.tensor_attention(q, k1, k2, v1, v2, method="lowrank", degree=2)

    def sdpa(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k1, v1)

    def bce(s: Tensor) -> Tensor:
        return pyloss.sorting_cross_entropy(s, y.expand(4, 4).float())

    return {
        "fused_cross_entropy": Operation(
            lambda x: pyloss.fused_cross_entropy(x, y), lambda x: F.cross_entropy(x, y), randn(4, 4)
        ),
        "fused_cross_entropy options": Operation(
            lambda x: pyloss.fused_cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-4, tau=1.5),
            lambda x: F.cross_entropy(x, y, label_smoothing=0.1),
            randn(4, 4),
        ),
        "nn.CrossEntropyLoss": Operation(
            lambda x: modules[0](x, y), lambda x: modules[1](x, y), randn(4, 4)
        ),
        "fused_linear_cross_entropy": Operation(
            lambda h, w: pyloss.fused_linear_cross_entropy(h, w, y),
            linear_ce,
            randn(4, 4),
            randn(4, 4),
        ),  # fmt: skip
        "soft_sort": Operation(pyloss.soft_sort, lambda x: x.sort().values, randn(4, 4)),
        "soft_rank": Operation(pyloss.soft_rank, None, randn(4, 4)),
        "sorting_cross_entropy": Operation(bce, None, randn(4, 4)),
        "permutahedron_rank": Operation(
            pyloss.functional.permutahedron_rank, lambda x: x.sort().values, randn(4, 4)
        ),
        "tensor_attention": Operation(attention, sdpa, q, *heads),
        "tensor_attention lowrank": Operation(lowrank, sdpa, q, *heads),
        "betti_matching_loss": Operation(
            lambda x: pyloss.betti_matching_loss(x, mask),
            lambda x: F.binary_cross_entropy_with_logits(x, mask),
            randn(1, 1, 8, 8),
        ),
    }


def cases(ctx: Context) -> Iterator[Case]:
    for name, op in operations(ctx.device).items():
        for mode in ("fwd", "fwd+bwd"):
            yield _case(name, mode, op, ctx)


def _case(name: str, mode: str, op: Operation, ctx: Context) -> Case:
    def providers() -> list[Provider]:
        return [
            Provider(provider, lambda p=provider: op.run(p, mode, ctx.device))
            for provider, call in op.calls.items()
            if call is not None
        ]

    return Case(
        name=f"{name} {mode}",
        group="overhead",
        mode=mode,
        shape=tuple(op.sources[0].shape),
        dtype="fp32",
        useful_bytes=0,
        tensor_bytes=4 * op.sources[0].numel(),
        open=providers,
        inner=20 if ctx.quick else 100,
    )
