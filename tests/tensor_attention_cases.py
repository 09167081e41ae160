"""Problems for the tests of tensor attention, and how a result is compared with the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import pyloss
from pyloss.reference import tensor_attention as reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Problem:
    n_q: int = 7
    n_1: int = 7
    n_2: int = 7
    d: int = 4
    dv: int = 4
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    causal: bool | None = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | None = None
    scale: float | None = None
    kv_bias: tuple[float, float] = (0.0, 0.0)
    masks: tuple[str | None, str | None] = (None, None)  # "bool" or "float", with a broadcast
    std: float = 1.0

    def tensors(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[Tensor]:
        """q, k1, k2, v1, v2, drawn in float64: equal in all dtypes up to rounding."""
        g = torch.Generator().manual_seed(seed)

        def draw(heads, n, width):
            x = torch.randn(self.batch, heads, n, width, generator=g, dtype=F64)
            return (self.std * x).to(device, dtype)

        return [
            draw(self.heads, self.n_q, self.d),
            draw(self.kv_heads, self.n_1, self.d),
            draw(self.kv_heads, self.n_2, self.d),
            draw(self.kv_heads, self.n_1, self.dv),
            draw(self.kv_heads, self.n_2, self.dv),
        ]

    def drawn_masks(self, dtype: torch.dtype, seed: int = 1) -> list[Tensor | None]:
        g = torch.Generator().manual_seed(seed)
        shapes = {
            "full": (self.batch, self.heads, self.n_q),
            "padding": (self.batch, 1, 1),
            "shared": (1, self.heads, self.n_q),
            "bare": (self.n_q,),
        }
        found: list[Tensor | None] = []
        for kind, n in zip(self.masks, (self.n_1, self.n_2)):
            if kind is None:
                found.append(None)
                continue
            kind, shape = kind.split()
            if kind == "bool":
                found.append(torch.rand(*shapes[shape], n, generator=g) < 0.7)
            else:
                found.append(torch.randn(*shapes[shape], n, generator=g, dtype=F64).to(dtype))
        return found

    def call(self, tensors, masks, **more):
        """pyloss.tensor_attention: (out, lse)."""
        return pyloss.tensor_attention(
            *tensors,
            mask1=masks[0],
            mask2=masks[1],
            is_causal=self.causal,
            window=self.window,
            q_offset=self.q_offset,
            scale=self.scale,
            kv_bias=self.kv_bias,
            enable_gqa=self.heads != self.kv_heads,
            return_lse=True,
            **more,
        )

    def expected(self, tensors, masks):
        """The reference: (out, lse)."""
        causal = self.causal
        if causal is None:
            causal = self.window is not None
        return reference(
            tensors[0],
            tensors[1:3],
            tensors[3:5],
            masks=[m if m is None else m[(None,) * (4 - m.dim())] for m in masks],
            scale=self.scale,
            causal=causal,
            windows=self.window,
            q_offset=self.q_offset or 0,
            kv_bias=self.kv_bias,
        )


def with_gradients(run, tensors, masks, seed: int = 2):
    """(out, lse, gradients of all floating arguments) for random upstream gradients."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    masks = [
        m.detach().requires_grad_() if m is not None and m.is_floating_point() else m for m in masks
    ]
    out, lse = run(tensors, masks)
    g = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=g, dtype=F64).to(out.device, out.dtype)
    dlse = torch.randn(lse.shape, generator=g, dtype=F64).to(lse.device, lse.dtype)
    dlse = torch.where(lse == -torch.inf, 0.0, dlse)
    sources = [*tensors, *(m for m in masks if m is not None and m.is_floating_point())]
    grads = torch.autograd.grad((out, lse), sources, (dout, dlse), allow_unused=True)
    grads = [torch.zeros_like(s) if x is None else x for s, x in zip(sources, grads)]
    return out.detach(), lse.detach(), grads


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """Relative to the largest entry; infinite where one is NaN or infinite and not the other."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    finite = exact.isfinite()
    if not torch.equal(actual[~finite], exact[~finite]):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    error = (actual - exact).abs()[finite].max().item()
    if error == 0.0:
        return 0.0
    size = exact.abs()[finite].max().item()
    return error / size if size > 0 and error == error else float("inf")


def decibels(actual: Tensor, exact: Tensor) -> float:
    """Signal over quantisation noise."""
    noise = (actual.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


# Limits relative to the largest entry: (out, gradients); the logsumexp has an absolute one.
LIMITS = {F64: (1e-12, 1e-11), F32: (2e-5, 1e-4), BF16: (1e-2, 2e-2), F16: (2e-3, 4e-3)}
LSE_LIMITS = {F64: 1e-11, F32: 1e-4, BF16: 1e-3, F16: 1e-3}


def check(problem: Problem, dtype: torch.dtype, seed: int = 0) -> None:
    """Value, logsumexp and every gradient against the reference on the same rounded inputs."""
    tensors = problem.tensors(dtype, seed)
    masks = problem.drawn_masks(F64 if dtype == F64 else F32)
    exact = [t.double() for t in tensors]
    exact_masks = [m.double() if m is not None and m.is_floating_point() else m for m in masks]
    out, lse, grads = with_gradients(problem.call, tensors, masks)
    want_out, want_lse, want = with_gradients(problem.expected, exact, exact_masks)
    assert out.dtype == dtype and lse.dtype == (F64 if dtype == F64 else F32)
    assert largest_error(out, want_out) <= LIMITS[dtype][0]
    finite = want_lse.isfinite()
    assert torch.equal(lse.double()[~finite], want_lse[~finite])
    if finite.any():
        assert (lse.double() - want_lse)[finite].abs().max() <= LSE_LIMITS[dtype]
    sources = [*tensors, *(m for m in masks if m is not None and m.is_floating_point())]
    names = "q k1 k2 v1 v2 mask mask".split()
    for name, source, actual, expected in zip(names, sources, grads, want):
        assert actual.dtype == source.dtype and actual.shape == source.shape
        assert largest_error(actual, expected) <= LIMITS[dtype][1], name
