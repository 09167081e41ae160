"""The tests run with poisoned memory (conftest.py): what a kernel leaves unwritten is NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pyloss
from pyloss import _C


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_fresh_floats_are_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype)
    for fresh in (
        torch.empty(5, dtype=dtype),
        torch.empty_like(x),
        x.new_empty(2, 4),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
    ):
        assert fresh.isnan().all()


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8))
def test_fresh_integers_are_large(dtype: torch.dtype) -> None:
    assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()


def cross_entropy() -> torch.Tensor:
    target = torch.tensor([0, 2, 1])
    return pyloss.fused_cross_entropy(torch.randn(3, 5), target, reduction="none")


def attention() -> torch.Tensor:
    q = torch.randn(1, 2, 4, 8)
    return pyloss.tensor_attention(q, q, q, q, q)


def attention_gradient() -> torch.Tensor:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    pyloss.tensor_attention(q, q, q, q, q).sum().backward()
    return q.grad


# Function of the compiled module that a fault makes write nothing -> a call that uses it.
KERNELS: dict[str, Callable[[], torch.Tensor]] = {
    "row_softmax_fwd": cross_entropy,
    "row_moments_fwd": lambda: pyloss.functional.one_hot_mse_loss(
        torch.randn(2, 6), torch.tensor([1, 5])
    ),
    "margin_shift_fwd": lambda: pyloss.functional.margin_shift(
        *torch.randn(2, 2, 6), torch.arange(2)
    ),
    "permutahedron_fwd": lambda: pyloss.soft_rank(torch.randn(2, 6), method="permutahedron"),
    "segment_fold": lambda: pyloss.functional.segment_reduce(
        torch.randn(6), torch.tensor([0, 2, 6])
    ),
    "segment_map": lambda: pyloss.functional.segment_softmax(
        torch.randn(6), torch.tensor([0, 2, 6])
    ),
    "sorting_network_permutation": lambda: pyloss.DiffSortNet("bitonic", 6)(torch.randn(2, 6))[1],
    "tensor_attention_fwd": attention,
    "tensor_attention_bwd": attention_gradient,
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_writes_nothing_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KERNELS[name]().isfinite().all()
    monkeypatch.setattr(_C, name, lambda *args: None)
    assert KERNELS[name]().isnan().any()
