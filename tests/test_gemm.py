"""Matrix products on the CPU: which ones run, and that both are the same to a caller."""

from __future__ import annotations

import runpy

import pytest
import torch

import pyloss
from pyloss import _C
from pyloss.functional import linear_distillation_loss
from pyloss.ops import _gemm


@pytest.fixture(params=["own", "torch"])
def choice(request, monkeypatch) -> str:
    monkeypatch.setattr(_gemm, "_forced", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "bias", "add"])
def test_product_into_rows_of_a_larger_matrix(choice, dtype, kind) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 30, dtype=dtype).t(), torch.randn(40, 50, dtype=dtype)
    whole = torch.randn(35, 60, dtype=dtype)
    out, bias = whole[2:32, 4:54], torch.randn(50, dtype=dtype)
    expected = whole.clone()
    term = {"plain": 0.0, "bias": bias, "add": out}[kind]
    expected[2:32, 4:54] = a @ b + term
    _gemm.product(a, b, out, bias=bias if kind == "bias" else None, add=kind == "add")
    torch.testing.assert_close(whole, expected)


def test_what_the_own_product_takes(choice) -> None:
    for dtype, can in [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False)]:
        assert _gemm.is_own(torch.empty(1, dtype=dtype)) == (can and choice == "own")
    assert not _gemm.is_own(torch.empty(1, device="meta"))


def _cross_entropy(hidden, weight, bias):
    y = torch.arange(len(hidden)) % len(weight)
    return pyloss.fused_linear_cross_entropy(hidden, weight, y, bias, chunk=256)


def _distillation(hidden, weight, bias):
    teacher = hidden.detach().cos(), weight.detach().sin()
    return linear_distillation_loss(hidden, weight, *teacher, student_bias=bias, chunk=256)


@pytest.mark.parametrize("loss", [_cross_entropy, _distillation])
def test_bits_do_not_depend_on_the_threads(loss, monkeypatch, keep_num_threads) -> None:
    monkeypatch.setattr(_gemm, "_forced", "own")
    torch.manual_seed(0)
    layer = [torch.randn(shape) for shape in ((600, 40), (700, 40), (700,))]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in layer]
        value = loss(*leaves)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(b=torch.ones(4, 5)),
        dict(out=torch.ones(2, 6)),
        dict(b=torch.ones(3, 5).double()),
        dict(bias=torch.ones(4)),
        dict(bias=torch.ones(5).double()),
    ],
)
def test_factors_that_do_not_fit_are_refused(choice, wrong) -> None:
    """As torch.mm does: an op can be called without the checks of its function."""
    fitting = dict(a=torch.ones(2, 3), b=torch.ones(3, 5), out=torch.ones(2, 5))
    if choice == "torch" and "out" in wrong:  # torch resizes, with a warning
        return
    with pytest.raises(RuntimeError):
        _gemm.product(**(fitting | wrong))


def test_nan_and_infinity_reach_their_row_and_column_only() -> None:
    a, b = torch.ones(20, 20), torch.ones(20, 40)
    a[3, 4], b[5, 7] = torch.nan, torch.inf
    out = torch.empty(20, 40)
    code = 1  # float32
    _C.gemm(
        code, 20, 40, 20, a.data_ptr(), 20, 1, b.data_ptr(), 40, 1, out.data_ptr(), 40, 0, False, 1
    )
    torch.testing.assert_close(out, a @ b, equal_nan=True)


def test_environment(monkeypatch) -> None:
    for value, forced in [("", None), ("own", "own"), ("torch", "torch")]:
        monkeypatch.setenv("PYLOSS_GEMM", value)
        assert runpy.run_path(_gemm.__file__)["_forced"] == forced
    monkeypatch.setenv("PYLOSS_GEMM", "mkl")
    with pytest.raises(ValueError, match="PYLOSS_GEMM must be own or torch; got 'mkl'"):
        runpy.run_path(_gemm.__file__)
