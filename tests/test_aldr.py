"""What is peculiar to the label distributionally robust losses: limits, identities, the search for
lambda, the state of a data set. Formulas and derivatives are in specs/ldr.py."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyloss
from pyloss.ops import aldr as op
from pyloss.reference import aldr as reference

F64 = torch.float64


def scores(n: int = 40, classes: int = 7, scale: float = 2.0, dtype=F64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + classes)
    x = scale * torch.randn(n, classes, generator=g, dtype=F64)
    return x.to(dtype), torch.randint(classes, (n,), generator=g)


def deltas(x: Tensor, y: Tensor, c: float) -> Tensor:
    column = y[:, None]
    return (x - x.gather(1, column) + c).scatter(1, column, 0.0)


def close(a, b, rtol=1e-10, atol=1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


NORMALIZED = [
    (pyloss.ldr_loss, dict(normalize="l1")),
    (pyloss.ldr_loss, dict(normalize="softplus")),
    (pyloss.ldr_loss, dict(normalize="l1", topk=2)),
    (pyloss.aldr_loss, dict(normalize="l1")),
    (pyloss.aldr_loss, dict(normalize="softplus")),
    (pyloss.aldr_loss, dict(normalize="l1", margin=torch.ones(7, 7))),
]


def gradient_of(function, x: Tensor, y: Tensor, options: dict) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x, y, **options), x)[0]


@pytest.mark.parametrize("function, options", NORMALIZED)
def test_what_is_ignored_is_not_normalized(function, options) -> None:
    x, y = scores(4)
    want = gradient_of(function, x[1:], y[1:], options)
    x[0], y[0] = math.nan, -100
    grad = gradient_of(function, x, y, options)
    close(grad[1:], want)
    assert not grad[0].any()
    row = pyloss.ldr_loss(x[0], y[0], normalize="l1", reduction="none")
    assert row.shape == () and row == 0


@pytest.mark.parametrize("function, options", NORMALIZED)
def test_rows_without_a_size(function, options) -> None:
    value = -1000.0 if options["normalize"] == "softplus" else 0.0
    x, y = torch.full((2, 7), value, dtype=F64), torch.tensor([0, 3])
    assert function(x, y, **options).isfinite()
    assert not gradient_of(function, x, y, options).any()


def test_a_label_far_behind() -> None:
    x, y = torch.zeros(1, 5, dtype=F64), torch.tensor([0])
    for ahead in (1e3, 1e6, 1e30):
        x[0, 1] = ahead
        for lam in (None, torch.ones(1, dtype=F64)):
            for dtype in (F64, torch.float32):
                loss = pyloss.aldr_loss(x.to(dtype), y, 0.01, lam=lam, normalize=None)
                assert loss.item() == pytest.approx(ahead - 0.01 * 0.75 * math.log(5), rel=1e-6)
    assert pyloss.aldr_loss(-x.new_tensor([[math.inf, 0, 0]]), y, normalize=None) == math.inf


# --------------------------------------------------------------------------------------------------
# Identities


def test_lam_1_is_cross_entropy() -> None:
    x, y = scores()
    close(pyloss.ldr_loss(x, y) + math.log(7), F.cross_entropy(x, y))


def test_limits_of_lam() -> None:
    x, y = scores()
    delta = deltas(x, y, 0.3)
    hinge = delta.amax(1)
    close(pyloss.ldr_loss(x, y, 1e-7, 0.3, reduction="none"), hinge, atol=1e-6)
    close(pyloss.ldr_loss(x, y, 1e7, 0.3, reduction="none"), delta.mean(1), rtol=1e-5, atol=1e-5)


def test_info_nce_is_ldr() -> None:
    x, y = scores()
    tau = 0.3
    close(tau * (F.cross_entropy(x / tau, y) - math.log(7)), pyloss.ldr_loss(x, y, tau))


def test_topk_1_is_the_hinge_and_topk_all_the_mean() -> None:
    x, y = scores()
    delta = deltas(x, y, 0.5)
    close(pyloss.ldr_loss(x, y, 0.0, 0.5, topk=1, reduction="none"), delta.amax(1))
    for lam in (0.0, 0.7):
        found = pyloss.ldr_loss(x, y, lam, 0.5, topk=7, reduction="none")
        close(found, delta.mean(1))


def test_topk_1_with_lam_is_ldr() -> None:
    x, y = scores()
    options = dict(lam=0.7, margin=0.5, reduction="none")
    close(pyloss.ldr_loss(x, y, topk=1, **options), pyloss.ldr_loss(x, y, **options))


@pytest.mark.parametrize("k", [2, 5])
def test_kkt_of_topk(k: int) -> None:
    """The gradient is p - onehot. p is in the capped simplex; what is below the cap is a softmax of
    the deltas, what is at the cap has a larger delta than that softmax would give it."""
    lam = 0.4
    x, y = scores(scale=0.7)
    x.requires_grad_()
    pyloss.ldr_loss(x, y, lam, 0.2, topk=k, reduction="sum").backward()
    p = x.grad + F.one_hot(y, 7)
    close(p.sum(1), torch.ones(40, dtype=F64))
    assert (p > 0).all() and (p <= 1 / k + 1e-12).all()
    score = deltas(x.detach(), y, 0.2) - lam * p.log()  # constant where p < 1/k, else larger
    free = p < 1 / k - 1e-9
    assert free.any(1).all() and (~free).any()
    level = torch.where(free, score, 0).sum(1) / free.sum(1)
    residual = torch.where(free, (score - level[:, None]).abs(), (level[:, None] - score).clamp(0))
    assert residual.max() < 1e-10


def test_a_table_of_one_margin_is_that_margin() -> None:
    x, y = scores()
    table = torch.full((7, 7), 0.3, dtype=F64)
    for loss, options in ((pyloss.ldr_loss, dict(lam=0.5)), (pyloss.aldr_loss, {})):
        close(loss(x, y, margin=table, **options), loss(x, y, margin=0.3, **options))


def test_a_margin_far_ahead_keeps_its_digits() -> None:
    """The label leads by more than float32's exponentials reach, with and without its margin."""
    x = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    loss = pyloss.ldr_loss(x, torch.tensor([0]), lam=1.0, margin=290.0)
    want = math.log1p(2 * math.exp(-10)) - math.log(3)
    assert abs(loss.item() - want) < 1e-6
    loss.backward()
    close(x.grad[0, 1].item(), math.exp(-10) / (1 + 2 * math.exp(-10)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (3, 4, 5)])
def test_a_margin_of_either_backend(shape: tuple[int, ...]) -> None:
    """Value and gradient, also of a forward of the reference that the kernel goes on with."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=F64).requires_grad_()
    y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    want = pyloss.ldr_loss(x, y, 0.5, 1.5)
    with pyloss.backend("reference"):
        found = pyloss.ldr_loss(x, y, 0.5, 1.5)
    close(found, want)
    close(torch.autograd.grad(found, x)[0], torch.autograd.grad(want, x)[0])


# --------------------------------------------------------------------------------------------------
# ALDR


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("lam0", "alpha"), [(1.0, 2.0), (10.0, 1.5)])
def test_lam_is_stationary(dtype, lam0: float, alpha: float) -> None:
    for classes, normalize in itertools.product((7, 3000), ("l1", None)):
        x, y = scores(30, classes, 4.0, dtype)
        _, lam = pyloss.aldr_loss(
            x, y, lam0, alpha, 0.1, normalize=normalize, return_lambda=True, reduction="none"
        )
        v, _ = reference.scores(x.double(), y, 0.1, normalize == "l1")
        kl, _ = reference.divergence(v, lam.double())
        residual = lam.double() - (lam0 - kl * lam0 / (alpha * math.log(classes)))
        assert residual.abs().max() <= 3e-6 * lam0
        assert (lam >= lam0 * (1 - 1 / alpha) * (1 - 1e-6)).all() and (lam <= lam0).all()


def test_the_solution_is_the_one_from_lam0() -> None:
    """One score far ahead of many: three solutions. The plain iteration stays at the first."""
    x = torch.zeros(60, 3000, dtype=F64)
    x[:, 0] = torch.linspace(1.0, 12.0, 60)
    y = torch.ones(60, dtype=torch.int64)
    _, lam = pyloss.aldr_loss(x, y, normalize=None, return_lambda=True)
    plain = torch.ones(60, dtype=F64)
    for _ in range(500):
        plain = reference.plain_step(reference.divergence(x, plain)[0], 1.0, 2.0, 3000)
    close(lam, plain, rtol=1e-6)
    assert lam.max() > 0.9 and lam.min() < 0.6  # both branches are there


@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (5, 33), (4, 2049), (2, 70000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_against_reference(shape: tuple[int, int], dtype) -> None:
    x, y = scores(*shape, 3.0, dtype)
    x[0] = 0  # no size, no gradient
    y[-1] = -100
    found, want = x.clone().requires_grad_(), x.double().requires_grad_()
    options = dict(lam0=2.0, margin=0.2, return_lambda=True)
    loss, lam = pyloss.aldr_loss(found, y, **options)
    with pyloss.backend("reference"):
        exact, exact_lam = pyloss.aldr_loss(want, y, **options)
    tolerance = dict(rtol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), exact, **tolerance | dict(atol=1e-2))
    torch.testing.assert_close(lam.double(), exact_lam, rtol=1e-5, atol=1e-5)
    loss.backward()
    exact.backward()
    scale = want.grad.abs().max().item()
    torch.testing.assert_close(
        found.grad.double(), want.grad, rtol=tolerance["rtol"], atol=1e-5 * scale + 1e-12
    )
    assert not found.grad[-1].any() and (shape[0] == 1 or not found.grad[0].any())


def test_a_forward_of_the_reference_serves_the_kernel() -> None:
    x, y = scores(6, 9)
    y[2] = -100
    rest = (1.5, 2.0, 0.3, -100, True)
    factor = torch.linspace(0.5, 1.0, 6, dtype=F64)
    for start in (None, torch.linspace(0.8, 1.5, 6, dtype=F64)):
        kernel, early = op.cpu.forward(x, y, factor, start, *rest)
        written, composed = op.reference.forward(x, y, factor, start, *rest)
        close(written, kernel, rtol=1e-8, atol=1e-9)
        close(composed, early, rtol=1e-8, atol=1e-9)
        close(op.cpu.backward(x, y, written, factor, *rest), early, rtol=1e-8, atol=1e-9)
        close(op.reference.backward(x, y, kernel, factor, *rest), early, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("start", [False, True])
def test_opcheck(start: bool) -> None:
    x, y = scores(4, 6)
    lam = torch.ones(4, dtype=F64) if start else None
    rest = (1.0, 2.0, 0.1, -100, True)
    factor = torch.ones(4, dtype=F64)
    ops = torch.ops.pyloss
    torch.library.opcheck(ops.aldr_fwd.default, (x, y, factor, lam, *rest))
    stats = ops.aldr_fwd(x, y, None, lam, *rest)[0]
    torch.library.opcheck(ops.aldr_bwd.default, (x, y, stats, factor, *rest))


def test_a_scaled_and_a_second_backward() -> None:
    x, y = scores(6, 9, dtype=torch.float32)
    x.requires_grad_()
    loss = pyloss.aldr_loss(x, y)
    (once,) = torch.autograd.grad(loss, x, torch.tensor(2.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, torch.tensor(1.0))
    close(once, 2 * again, rtol=1e-5, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# The state of a data set


def test_online_converges_to_exact() -> None:
    x, y = scores(20, 9)
    index = torch.arange(20)
    online = pyloss.nn.ALDRLoss(2.0, 2.0, 0.1, num_samples=20, reduction="none").double()
    exact = pyloss.aldr_loss(x, y, 2.0, 2.0, 0.1, reduction="none")
    first = online(x, y, index)
    for _ in range(40):
        last = online(x, y, index)
    close(last, exact, rtol=1e-9)
    assert (first - exact).abs().max() > 1e-4


def test_one_step_is_the_papers() -> None:
    """lam moves by the stored one; the loss has the new one, which gets no gradient."""
    x, y = scores(5, 6)
    before = torch.linspace(0.6, 1.4, 5, dtype=F64)
    options = dict(lam=before, normalize=None, return_lambda=True, reduction="sum")
    x.requires_grad_()
    loss, lam = pyloss.aldr_loss(x, y, 1.0, 2.0, 0.3, **options)
    delta = deltas(x, y, 0.3)
    p = torch.softmax(delta / before[:, None], 1).detach()
    kappa = 2 * math.log(6)
    after = 1.0 - (p * (6 * p).log()).sum(1) / kappa
    close(lam, after)
    value = after * (torch.logsumexp(delta / after[:, None], 1) - math.log(6))
    want = (value - kappa / 2 * (after - 1.0) ** 2).sum()
    close(loss, want)
    close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(want, x)[0])


def test_the_authors_code_differs_in_what_it_says() -> None:
    """Without a margin only the 1e-5 is left between the two."""
    x, y = scores(5, 6)
    before = torch.ones(5, dtype=F64)
    ours = pyloss.aldr_loss(x, y, lam=before, normalize=None, return_lambda=True, reduction="none")
    legacy = reference.legacy_step(x, y, before, lam0=1.0, alpha=2.0, margin=0.0)
    for a, b in zip(ours, legacy):
        close(a, b, rtol=2e-4, atol=2e-4)


def test_duplicates_are_averaged_and_evaluation_stores_nothing() -> None:
    x, y = scores(3, 6, dtype=torch.float32)
    criterion = pyloss.nn.ALDRLoss(num_samples=4)
    _, each = pyloss.aldr_loss(x, y, lam=torch.ones(3), return_lambda=True)
    criterion(x, y, torch.tensor([2, 0, 2]))
    close(criterion.lam, torch.stack([each[1], torch.ones(()), (each[0] + each[2]) / 2,
                                      torch.ones(())]), rtol=1e-6)  # fmt: skip
    before = criterion.lam.clone()
    criterion.eval()
    criterion(x, y, torch.tensor([1, 2, 3]))
    close(criterion(x, y), pyloss.aldr_loss(x, y))
    assert torch.equal(criterion.lam, before)
    x[0, 0] = math.nan
    criterion.train()(x, y, torch.tensor([1, 2, 3]))
    assert criterion.lam.isfinite().all()


def test_state_of_the_module() -> None:
    criterion = pyloss.nn.ALDRLoss(3.0, num_samples=4, margin=torch.zeros(6, 6))
    assert set(criterion.state_dict()) == {"weight", "lam", "margin"} - {"weight"}
    assert criterion.half().lam.dtype == torch.float32
    x, y = scores(2, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match="index must say which samples"):
        criterion(x, y)
    with pytest.raises(IndexError, match="index 4 is out of range for 4 samples"):
        criterion(x, y, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="has num_samples"):
        pyloss.nn.ALDRLoss()(x, y, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs num_samples"):
        pyloss.nn.ALDRLoss(group=object())


@pytest.mark.exhaustive
def test_the_trend_under_label_noise() -> None:
    """The example's numbers of one seed."""
    pytest.importorskip("sklearn")
    found = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "label_noise.py"))
    data = found["Digits"](0)
    clean, noisy = data.noisy(0.0), data.noisy(0.6)

    def accuracy(name: str, labels: Tensor) -> float:
        return found["train"](name, data, labels, 0)

    assert accuracy("ALDR, lam0 = 10", noisy) >= accuracy("cross entropy", noisy) + 15
    assert accuracy("ALDR, lam0 = 1", clean) >= accuracy("cross entropy", clean) - 2
