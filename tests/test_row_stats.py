"""row_softmax_stats: sizes, dtypes, infinities, memory. What every function promises:
tests/specs/row_stats.py."""

from __future__ import annotations

import math

import pytest
import torch
from specs.row_stats import reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyloss
from pyloss.functional import row_softmax_stats
from pyloss.ops.row_softmax import stats as op_stats
from pyloss.testing import make_logits

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SIZES = [(3, 1), (5, 2), (4, 7), (40, 1000), (3, 50257)]
SIZES += [pytest.param((2, 131072), marks=pytest.mark.exhaustive)]


def options(rows: int, classes: int) -> dict:
    mask = make_logits((rows, classes), F32, seed=3) > -1
    scale = make_logits((rows,), F32, scale=0.3, seed=4).exp()
    return dict(scale=scale, margin=0.2, mask=mask)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "blocks"])
def test_sizes_and_dtypes(shape, dtype, plain, monkeypatch) -> None:
    """With -inf among the logits, in several blocks, against float64."""
    monkeypatch.setitem(op_stats._BLOCK, "cpu", 2 * shape[1])
    rows, classes = shape
    x = make_logits(shape, F64, scale=3.0).to(dtype)
    x[torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.1] = -math.inf
    y = torch.arange(rows) % classes
    x[torch.arange(rows), y] = 1.0
    given = {} if plain else options(rows, classes)
    x.requires_grad_()
    found = row_softmax_stats(x, y, **given)
    exact_x = x.detach().double().requires_grad_()
    exact = reference(torch.where(exact_x == -math.inf, -1e30, exact_x), y, **given)
    rtol, atol = (1e-12, 1e-12) if dtype == F64 else (1e-6, 2e-6)
    for a, b, name in zip(found[:5], exact, found._fields):
        assert a.dtype == (F64 if dtype == F64 else F32)
        b = torch.where(b < -1e20, -math.inf, b)
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)
    assert torch.equal(found.count, exact[-1])
    # The mean and the entropy are finite with masked labels too, whose nll is not.
    (got,) = torch.autograd.grad((found.lse + found.mean - 2 * found.entropy).nansum(), x)
    (expected,) = torch.autograd.grad((exact[0] + exact[1] - 2 * exact[2]).nansum(), exact_x)
    rtol, atol = {F64: (1e-10, 1e-12), F32: (1e-5, 1e-6)}.get(dtype, (2e-2, 1e-3))
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_of_nothing(backend, masked: bool) -> None:
    x = make_logits((3, 4), F32)
    mask = None
    if masked:
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[1] = False
        x[1] = math.nan  # what is masked is not looked at
    else:
        x[1] = -math.inf
    x.requires_grad_()
    with pyloss.backend(backend):
        found = row_softmax_stats(x, torch.tensor([0, 1, 2]), mask=mask)
        row = [t[1].item() for t in found]
        assert row == [-math.inf, -math.inf, 0.0, -math.inf, math.inf, 0 if masked else 4]
        for t in found[:5]:
            (grad,) = torch.autograd.grad(t.sum(), x, retain_graph=True)
            assert not grad[1].any() and not grad.isnan().any()
            assert t[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_target_alone_has_no_softmax(backend) -> None:
    x, y = make_logits((2, 3), F32), torch.tensor([0, 2])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    x.requires_grad_()
    with pyloss.backend(backend):
        found = row_softmax_stats(x, y, mask=mask, without_target=True)
        row = [t[0].item() for t in found]
        assert row == [-math.inf, -math.inf, 0.0, x[0, 0].item(), -math.inf, 0]
        assert found.count[1] == 2
        torch.testing.assert_close(found.nll[1], x[1, :2].logsumexp(0) - x[1, 2])
        (grad,) = torch.autograd.grad(found.nll[1] + 3 * found.target[0] + found.lse[0], x)
    expected = torch.tensor([[3.0, 0, 0], [0, 0, -1]])
    expected[1, :2] = x[1, :2].detach().softmax(0)
    torch.testing.assert_close(grad, expected)


def test_layouts_and_ignored_rows() -> None:
    wide = make_logits((6, 5, 8), F64)
    y = torch.arange(6).expand(5, 6) % 4
    for x in (wide.permute(1, 0, 2)[..., ::2], wide.permute(1, 0, 2)[..., 1:5]):
        found = row_softmax_stats(x, y, ignore_index=3, scale=2.0)
        expected = reference(x, y, ignore_index=3, scale=2.0)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
        assert not any(t[y == 3].any() for t in found)
    assert row_softmax_stats(wide[:0, 0], y[0, :0]).lse.shape == (0,)
    assert row_softmax_stats(wide[0, 0]).lse.dim() == 0


class LargestResult(TorchDispatchMode):
    """Numbers in the results of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        bases = {t._base.data_ptr() if t._base is not None else t.data_ptr() for t in leaves}
        given = {t.data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        if bases - given:
            self.sizes += [t.numel() for t in leaves if t.data_ptr() not in given]
        return found


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "blocks"])
def test_nothing_of_the_size_of_the_logits_but_their_gradient(plain: bool, monkeypatch) -> None:
    rows, classes = 64, 100
    monkeypatch.setitem(op_stats._BLOCK, "cpu", 8 * classes)
    x = make_logits((rows, classes), F32).requires_grad_()
    given = {} if plain else options(rows, classes)
    y = torch.arange(rows)
    with LargestResult() as seen:
        found = row_softmax_stats(x, y, **given)
    assert max(seen.sizes) <= 8 * classes + 10 * rows
    total = found.entropy.sum() + found.lse.sum()
    with LargestResult() as seen:
        total.backward()
    assert sum(n > 8 * classes + 10 * rows for n in set(seen.sizes)) == 1  # rows * classes itself


@pytest.mark.parametrize("without_target", [False, True])
def test_a_target_that_is_masked_has_no_gradient(without_target) -> None:
    x = make_logits((2, 5), F64).requires_grad_()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3] = False
    y = torch.tensor([3, 3])
    found = row_softmax_stats(x, y, mask=mask, without_target=without_target).target
    assert found[0] == -math.inf
    (grad,) = torch.autograd.grad(found.sum(), x)
    expected = torch.zeros_like(x)
    expected[1, 3] = 1
    torch.testing.assert_close(grad, expected)


def test_entropy_of_large_logits_is_exact() -> None:
    """lse - mean has lost it there."""
    x = (make_logits((50, 30), F64, scale=0.01) + 3e4).float()
    exact = reference(x.double())[2]
    found = row_softmax_stats(x)
    torch.testing.assert_close(found.entropy.double(), exact, rtol=1e-6, atol=0)
    assert (found.lse - found.mean - exact).abs().max() > 1e-4


def test_losses_of_other_names() -> None:
    """tau (InfoNCE - log n) is LDR-KL; focal loss and cross entropy of pyloss come out."""
    x, y = make_logits((8, 12), F64, scale=2.0), torch.arange(8)
    found = row_softmax_stats(x, y)
    torch.testing.assert_close(found.nll.mean(), pyloss.fused_cross_entropy(x, y))
    p = torch.exp(-found.nll)
    torch.testing.assert_close(((1 - p) ** 2 * found.nll).mean(), pyloss.focal_loss(x, y))
    lam, margin = 0.5, 0.1
    found = row_softmax_stats(x, y, scale=1 / lam, margin=margin)
    delta = x - x.gather(1, y[:, None]) + margin * (torch.arange(12) != y[:, None])
    torch.testing.assert_close(lam * found.nll, lam * (delta / lam).logsumexp(1))
    # d/dtau tau log mean exp(s / tau) = -KL(p || uniform), by the statistics and by autograd.
    tau = torch.tensor(0.7, dtype=F64, requires_grad=True)
    found = row_softmax_stats(x, scale=1 / tau)
    (slope,) = torch.autograd.grad((tau * (found.lse - math.log(12))).sum(), tau)
    torch.testing.assert_close(slope, (found.entropy - math.log(12)).sum())
