"""similarity_softmax and pair_sums by the Triton kernels, from the functions down, interpreted.

Tiles are 16 wide unless said otherwise, so that small problems have many of them. Expected values
are those of the reference in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pyloss
from pyloss.kernels import similarity_softmax as K
from pyloss.kernels.similarity_softmax import launch
from pyloss.ops.similarity_softmax import call, pair_sums, similarity_softmax
from pyloss.ops.similarity_softmax import triton as by_kernels
from pyloss.reference.similarity_softmax import pair_sums as exact_sums
from pyloss.reference.similarity_softmax import similarity_softmax as exact_stats

SUMS = ("lse", "positive", "column_lse", "column_positive")
# Of results, and of gradients: those of half types are rounded, as are the logits' in them.
TOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def small(d: int) -> K.Config:
    """16 numbers of a row at a time, or all of it as up to MOST_WHOLE."""
    return K.Config(16, 16, 16 if d <= 16 else 32, num_warps=4, num_stages=2, group=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_config", lambda kernel, dtype, d, *_: small(d))
    monkeypatch.setattr(by_kernels, "block_rows", lambda *_: 32)


@pytest.fixture(params=["sweeps", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows that a program holds whole, or a block of the logits' gradient at a time."""
    if request.param == "blocks":
        monkeypatch.setattr(K, "MOST_WHOLE", 0)
    return request.param


@pytest.fixture(autouse=True)
def triton_is_chosen():
    with pyloss.backend("triton"):
        yield


def problem(n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple:
    return tuple(torch.randn(r, d).to(dtype).requires_grad_() for r in (n, m))


def masks(n: int, m: int, firsts=(-1, 0, 3)) -> list[dict]:
    """All combinations of what can be left out or positive."""
    g = torch.Generator().manual_seed(2)
    target = torch.randint(m, (n,), generator=g)
    target[::7], target[1::11] = -1, m + 3
    ids = [torch.randint(6, (r,), generator=g) * 2**33 - 2**34 for r in (n, m)]
    found = []
    for first, at, same, denominator in itertools.product(
        firsts, (None, target), ("ignore", "positive", "drop"), ("all", "negatives")
    ):
        given = {} if same == "ignore" else {"query_ids": ids[0], "key_ids": ids[1]}
        found.append(dict(first=first, target=at, same=same, denominator=denominator, **given))
    return found


def total(stats) -> torch.Tensor:
    """A function of all sums that is finite where a denominator is empty."""
    sums = [t for t in (getattr(stats, name) for name in SUMS) if t is not None]
    weights = [torch.linspace(-1, 0.5 + i, len(t), dtype=t.dtype) for i, t in enumerate(sums)]
    return sum((torch.where(t.isinf(), 0.0, t) * w).sum() for t, w in zip(sums, weights))


def widened(t):
    wide = isinstance(t, torch.Tensor) and t.is_floating_point()
    return t.detach().double().requires_grad_(t.requires_grad) if wide else t


def check(name: str, got: torch.Tensor, want: torch.Tensor, tol: float) -> None:
    finite = want[want.isfinite()]
    atol = tol * max(1e-3, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        got.double(), want, rtol=tol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


STATS, SOFTPLUS = (similarity_softmax, exact_stats, total), (pair_sums, exact_sums, torch.sum)


def compare(*given, what=STATS, **options) -> None:
    """Results, and gradients of a function of them."""
    *functions, value = what
    wide = {id(t): widened(t) for t in given}
    ways = []
    for function, args in zip(functions, (given, [wide[id(t)] for t in given])):
        sources = {id(t): t for t in args if isinstance(t, torch.Tensor) and t.requires_grad}
        found = function(*args, **options)
        ways.append((found, torch.autograd.grad(value(found), list(sources.values()))))
    (found, grads), (expected, exact_grads) = ways
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for at, (a, b) in enumerate(zip(found, expected)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == torch.float32
            check(f"result {at}", a, b, 1e-5)
    for at, (a, b) in enumerate(zip(grads, exact_grads)):
        check(f"gradient {at}", a, b, TOL[given[0].dtype])


def everything(options: dict) -> dict:
    return {**options, "columns": True, "mean": True}


# -------------------------------------------------------------------------------------- all masks


def scale_of(n: int) -> torch.Tensor:
    return torch.linspace(0.2, 1.5, n).requires_grad_()


@pytest.mark.parametrize("at", range(36))
def test_masks(at: int) -> None:
    """All 36 as sweeps; by blocks, whose tiles are the same functions, every fifth (below)."""
    compare(*problem(21, 35, 12), scale_of(21), **everything(masks(21, 35)[at]))


@pytest.mark.parametrize("at", range(36))
def test_a_tensor_with_itself(at: int) -> None:
    x = problem(35, 1, 12)[0]
    options = masks(35, 35)[at]
    if "key_ids" in options:
        options["key_ids"] = options["query_ids"]
    compare(x, x, torch.tensor(0.7, requires_grad=True), **options)
