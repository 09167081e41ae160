"""What the tests of Lion-K draw: arguments of each kappa, parameters with gradients."""

from __future__ import annotations

import torch
from torch import nn

F32 = torch.float32
ARGS = {"l1": {}, "lp": dict(p=3.0), "soft": dict(e=0.5), "huber": dict(e=0.5), "topk": dict(k=3),
        "smooth": dict(e=0.5)}  # fmt: skip


def parameters(*shapes: tuple[int, ...], dtype=F32, seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    for p in found:
        p.grad = torch.randn(p.shape, generator=g).to(dtype)
    return found
