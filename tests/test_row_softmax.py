"""fused_cross_entropy against the float64 reference: shapes, dtypes, layouts, options."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from row_softmax_cases import DTYPES, OPTION_NAMES, check, exact, make_options

import pyloss
from pyloss.reference import row_softmax as reference
from pyloss.testing import (
    KDIM_LAYOUTS,
    LAYOUTS,
    assert_matches_reference,
    make_logits,
    make_target,
    row_shapes,
    to_layout,
)

TAUS = (0.0, 0.3, 0.5, 1.0, 1.5, 1.7, 2.0, 3.0)


# --- the reference itself --------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 7), (4, 1), (3, 5, 6), (2, 5, 3, 4), (0, 5)])
@pytest.mark.parametrize("kind", ["index", "ignore", "prob"])
def test_reference_is_cross_entropy(shape, reduction, smoothing, kind):
    x = make_logits(shape, torch.float64, requires_grad=True)
    classes = shape[0] if len(shape) == 1 else shape[1]
    if kind == "ignore":
        target = make_target(shape, ignore_fraction=0.3)
    else:
        target = make_target(shape, kind=kind)
    for weight in (None, torch.linspace(0.3, 2.0, classes, dtype=torch.float64)):
        options = dict(weight=weight, reduction=reduction, label_smoothing=smoothing)
        ours, theirs = reference(x, target, **options), F.cross_entropy(x, target, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, equal_nan=True)
        upstream = torch.ones_like(ours)
        (g,) = torch.autograd.grad(ours, x, upstream)
        (h,) = torch.autograd.grad(theirs, x, upstream)
        torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tau", TAUS)
def test_reference_definition(tau):
    """Phi^tau of the sum of exp(z_j - z_y), as in the paper."""
    x = make_logits((6, 9), torch.float64)
    y = make_target((6, 9))
    zy = x.gather(1, y[:, None])
    u = (x - zy).exp().sum(1) - 1.0
    phi = torch.log1p(u) if tau == 1.0 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
    torch.testing.assert_close(
        reference(x, y, tau=tau, reduction="none"), phi, rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("tau", TAUS)
def test_reference_soft_target_is_a_sum_over_classes(tau):
    x = make_logits((6, 5), torch.float64)
    q = make_target((6, 5), kind="prob")
    w = torch.linspace(0.2, 2.0, 5, dtype=torch.float64)
    per_class = torch.stack(
        [
            reference(x, torch.full((6,), c), tau=tau, reduction="none", truncate=0.05)
            for c in range(5)
        ],
        1,
    )
    soft = reference(x, q, w, tau=tau, reduction="none", label_smoothing=0.2, truncate=0.05)
    torch.testing.assert_close(soft, (w * (0.8 * q + 0.2 / 5) * per_class).sum(1))


# --- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("nll", [1e-9, 0.01, 0.5, math.log(2), 3.0, 20.0])
@pytest.mark.parametrize("tau", TAUS)
def test_closed_form_of_two_classes(tau, nll):
    x = torch.tensor([[-math.log(math.expm1(nll)), 0.0]], dtype=torch.float64, requires_grad=True)
    loss = pyloss.fused_cross_entropy(x, torch.tensor([0]), tau=tau)
    a = 1.0 - tau
    value = nll if a == 0 else math.expm1(a * nll) / a
    assert loss.item() == pytest.approx(value, rel=1e-12)
    (g,) = torch.autograd.grad(loss, x)
    slope = math.exp(a * nll) * -math.expm1(-nll)
    assert g.tolist()[0] == pytest.approx([-slope, slope], rel=1e-12)


def test_named_members_of_the_family():
    x, y = make_logits((7, 5), torch.float64), make_target((7, 5))
    p = F.softmax(x, 1).gather(1, y[:, None]).squeeze(1)
    f = pyloss.fused_cross_entropy
    torch.testing.assert_close(f(x, y, tau=0.0, reduction="none"), 1 / p - 1)
    torch.testing.assert_close(f(x, y, tau=2.0, reduction="none"), 1 - p)
    torch.testing.assert_close(f(x, y, tau=1.7, reduction="none"), (1 - p**0.7) / 0.7)
    q, k = 0.7, 0.3
    truncated = torch.where(p <= k, (1 - k**q) / q, (1 - p**q) / q)
    torch.testing.assert_close(f(x, y, tau=1 + q, truncate=k, reduction="none"), truncated)
    assert (p <= k).any() and (p > k).any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_focal_loss(gamma, dtype):
    x = make_logits((33, 17), dtype, requires_grad=True)
    y = make_target((33, 17), ignore_fraction=0.3)
    weight = torch.linspace(0.5, 2.0, 17, dtype=torch.float64)
    weight = weight if dtype == torch.float64 else weight.float()
    for target in (y, (y, y.flip(0), 0.3)):
        loss = pyloss.focal_loss(x, target, gamma, weight=weight)
        z = x.detach().double().requires_grad_()
        expected = reference(z, target, weight.double(), gamma=gamma)
        assert_matches_reference(loss, expected, what="loss")
        (g,) = torch.autograd.grad(loss, x)
        assert_matches_reference(g, torch.autograd.grad(expected, z)[0], what="gradient")


def test_focal_loss_of_volumes():
    x = make_logits((2, 5, 4, 3), torch.float64, requires_grad=True)
    y = make_target((2, 5, 4, 3), ignore_fraction=0.3)
    loss = pyloss.focal_loss(x, y, 1.5, reduction="none")
    expected = reference(x, y, gamma=1.5, reduction="none")
    torch.testing.assert_close(loss, expected)
    (g,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(g, torch.autograd.grad(expected.sum(), x)[0])


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c", list(row_shapes()))
def test_sizes(n, c, dtype):
    x = make_logits((n, c), dtype)
    y = make_target((n, c), ignore_fraction=0.3 if n > 3 else 0.0)
    check(x, y, run={"repeat": n * c < 100_000})
    check(x, y, reduction="none", tau=1.7, run={"repeat": False})


@pytest.mark.parametrize("n, c", list(row_shapes(max_elements=170_000)))
@pytest.mark.parametrize("name", ["smoothing", "prob", "smoothing_tau", "mixup"])
def test_sizes_of_other_targets(n, c, name):
    target, kwargs = make_options(name, (n, c), torch.float32)
    check(make_logits((n, c)), target, **kwargs, run={"repeat": False})


@pytest.mark.parametrize("c", [50257, 262144])
@pytest.mark.parametrize("name", ["smoothing", "prob_smoothing", "smoothing_tau", "everything"])
def test_large_vocabularies_with_options(c, name):
    shape = (2, c)
    target, kwargs = make_options(name, shape, torch.float32)
    if kwargs.get("label_smoothing") or name == "everything":
        target = torch.tensor([0, c - 1])
    check(make_logits(shape), target, **kwargs, run={"repeat": False})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [1, 2, 31, 32, 33, 1000, 4097])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_ignored_fraction(dtype, c, fraction):
    shape = (29 if c < 4000 else 7, c)
    y = make_target(shape, ignore_fraction=fraction)
    for reduction in ("mean", "sum", "none"):
        check(make_logits(shape, dtype), y, reduction=reduction, run={"repeat": False})


@pytest.mark.parametrize("c", [2, 33, 1000])
def test_targets_at_both_ends(c):
    x = make_logits((2, c), torch.float64)
    check(x, torch.tensor([0, c - 1]), reduction="none")
    check(x, torch.tensor([c - 1, 0]), reduction="none", tau=0.5)


@pytest.mark.parametrize(
    "shape", [(5,), (1,), (3, 5, 1), (2, 3, 7), (2, 21, 8, 9), (2, 4, 2, 3, 5)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "smoothing", "prob", "mixup", "tau1.5", "token_weight_z"]
)
def test_input_shapes(shape, dtype, name):
    target, kwargs = make_options(name, shape, dtype)
    for reduction in ("none", "mean"):
        check(make_logits(shape, dtype), target, reduction=reduction, **kwargs)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (3, 5, 0)])
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_empty(shape, kind):
    x = make_logits(shape, requires_grad=True)
    target = make_target(shape, kind=kind, dtype=torch.float32 if kind == "prob" else None)
    f = pyloss.fused_cross_entropy
    for smoothing in (0.0, 0.1):
        mean = f(x, target, label_smoothing=smoothing)
        assert mean.isnan()
        (g,) = torch.autograd.grad(mean, x)
        assert g.shape == x.shape
        assert f(x, target, reduction="sum", label_smoothing=smoothing).item() == 0.0
        none = f(x, target, reduction="none", label_smoothing=smoothing)
        assert none.shape == shape[:1] + shape[2:]
        assert f(x, target, label_smoothing=smoothing, empty="zero").item() == 0.0


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 33), (3, 1128)], ids=str)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_options(name, shape, dtype):
    target, kwargs = make_options(name, shape, dtype)
    x = make_logits(shape, dtype)
    for reduction in ("mean", "none", "sum"):
        check(x, target, reduction=reduction, **kwargs, run={"repeat": reduction == "mean"})


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_options_of_strided_kernel(name):
    shape = (2, 7, 5, 3)
    target, kwargs = make_options(name, shape, torch.float32)
    check(make_logits(shape), target, **kwargs)


@pytest.mark.parametrize("tau", [1.0, 0.0, 2.0, 1.7])
def test_continuity_in_tau(tau):
    """No jump at the values of tau that have a formula of their own."""
    x, y = make_logits((50, 33), torch.float64, scale=2.0), make_target((50, 33))
    for smoothing in (0.0, 0.1):
        losses, grads = [], []
        for t in (tau, tau + 1e-6, max(tau - 1e-6, 0.0)):
            z = x.clone().requires_grad_()
            loss = pyloss.fused_cross_entropy(
                z, y, tau=t, label_smoothing=smoothing, reduction="none"
            )
            losses.append(loss.detach())
            grads.append(torch.autograd.grad(loss.sum(), z)[0])
        for other in (1, 2):
            scale = 1e-5 * (1 + losses[0].abs()) * x.abs().max() ** 2
            assert ((losses[other] - losses[0]).abs() <= scale).all()
            scale = 1e-5 * (1 + grads[0].abs().amax(1, keepdim=True)) * x.abs().max() ** 2
            assert ((grads[other] - grads[0]).abs() <= scale).all()


@pytest.mark.parametrize("tau", [1 - 1e-6, 1 + 1e-6, 1 + 1e-7])
def test_tau_next_to_one_in_float32(tau):
    """(1 - p^(tau-1)) / (tau-1) written out would lose every digit here."""
    shape = (50, 33)
    for smoothing in (0.0, 0.1):
        check(make_logits(shape), make_target(shape), tau=tau, label_smoothing=smoothing)


@pytest.mark.parametrize("truncate", [0.5, 0.01])
def test_truncated_rows_have_no_gradient(truncate):
    x = make_logits((40, 5), torch.float64, requires_grad=True)
    y = make_target((40, 5))
    loss = pyloss.fused_cross_entropy(x, y, tau=1.7, truncate=truncate, reduction="none")
    (g,) = torch.autograd.grad(loss.sum(), x)
    p = F.softmax(x.detach(), 1).gather(1, y[:, None]).squeeze(1)
    cut = p <= truncate
    assert cut.any() and not cut.all()
    assert (g[cut] == 0).all() and (g[~cut] != 0).all()
    torch.testing.assert_close(
        loss[cut], torch.full_like(loss[cut], (1 - truncate**0.7) / 0.7), rtol=1e-12, atol=0
    )


def test_num_items_accumulates_the_full_batch():
    x = make_logits((24, 11), torch.float64, requires_grad=True)
    y = make_target((24, 11), ignore_fraction=0.3)
    full = pyloss.fused_cross_entropy(x, y, z_loss=0.1)
    (expected,) = torch.autograd.grad(full, x)
    count = (y != -100).sum()
    for num_items in (count, count.item(), count.double()):
        total, grad = 0.0, torch.zeros_like(x)
        for part in range(0, 24, 5):
            rows = slice(part, part + 5)
            loss = pyloss.fused_cross_entropy(x[rows], y[rows], z_loss=0.1, num_items=num_items)
            total += loss.item()
            grad += torch.autograd.grad(loss, x)[0]
        assert total == pytest.approx(full.item(), rel=1e-12)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


def test_token_weight_zero_drops_a_row():
    x = make_logits((6, 5), torch.float64, requires_grad=True)
    y = make_target((6, 5))
    k = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    keep = k.bool()
    for options in ({}, {"z_loss": 0.1}, {"tau": 0.5}):
        loss = pyloss.fused_cross_entropy(x, y, token_weight=k, **options)
        kept = pyloss.fused_cross_entropy(x[keep], y[keep], **options)
        torch.testing.assert_close(loss, kept, rtol=1e-13, atol=0)
        (g,) = torch.autograd.grad(loss, x)
        assert (g[~keep] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 1.0, 0.25])
def test_mixup_is_the_mix_of_two_losses(lam):
    x = make_logits((12, 7), torch.float64, requires_grad=True)
    y, y2, _ = make_target((12, 7), kind="mixup")
    y2[3] = y[3]
    for options in ({}, {"tau": 1.5}, {"z_loss": 0.1}, {"label_smoothing": 0.1}):
        f = pyloss.fused_cross_entropy
        mixed = f(x, (y, y2, lam), reduction="none", **options)
        both = lam * f(x, y, reduction="none", **options)
        both = both + (1 - lam) * f(x, y2, reduction="none", **options)
        torch.testing.assert_close(mixed, both, rtol=1e-12, atol=1e-14)
        upstream = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
        (g,) = torch.autograd.grad(mixed, x, upstream)
        (h,) = torch.autograd.grad(both, x, upstream)
        torch.testing.assert_close(g, h, rtol=1e-11, atol=1e-13)


def test_mixup_equals_mixed_probabilities():
    x = make_logits((12, 7), torch.float64)
    y, y2, lam = make_target((12, 7), kind="mixup")
    q = lam[:, None] * F.one_hot(y, 7) + (1 - lam[:, None]) * F.one_hot(y2, 7)
    torch.testing.assert_close(
        pyloss.fused_cross_entropy(x, (y, y2, lam)), pyloss.fused_cross_entropy(x, q)
    )


def test_mixup_ignored_in_either_target():
    x = make_logits((4, 7), requires_grad=True)
    y, y2 = torch.tensor([1, -100, 3, 2]), torch.tensor([-100, 2, 3, 1])
    loss = pyloss.fused_cross_entropy(x, (y, y2, 0.3), reduction="none")
    assert (loss[:2] == 0).all() and (loss[2:] > 0).all()
    (g,) = torch.autograd.grad(loss.sum(), x)
    assert (g[:2] == 0).all() and (g[2:] != 0).all()


@pytest.mark.parametrize("name", ["plain", "prob", "smoothing", "tau1.5"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_dtype(name, reduction):
    shape = (9, 33)
    for dtype in (torch.bfloat16, torch.float16):
        target, kwargs = make_options(name, shape, dtype)
        x = make_logits(shape, dtype)
        check(
            x,
            target,
            reduction=reduction,
            loss_dtype=torch.float32,
            **kwargs,
            run={"expected_dtype": torch.float32},
        )
    target, kwargs = make_options(name, shape, torch.float32)
    x = make_logits(shape)
    check(
        x,
        target,
        reduction=reduction,
        loss_dtype=torch.float64,
        **kwargs,
        run={"expected_dtype": torch.float64, "rtol": 1e-5, "atol": 1e-6},
    )


# --- memory layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 37), (3, 5003), (1, 9)], ids=str)
def test_layouts(layout, dtype, shape):
    x = to_layout(make_logits(shape, dtype), layout)
    for name in ("plain", "smoothing", "tau1.5", "prob"):
        target, kwargs = make_options(name, shape, dtype)
        if name == "prob":
            target = to_layout(target, layout)
        check(x, target, reduction="none", **kwargs, run={"repeat": False})
        check(x, target, **kwargs, run={"repeat": False})


@pytest.mark.parametrize("layout", KDIM_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 21, 5, 6), (2, 3, 17, 16)], ids=str)
def test_kdim_layouts(layout, dtype, shape):
    x = to_layout(make_logits(shape, dtype), layout)
    for name in ("plain", "smoothing", "tau1.5", "prob", "prob_tau", "softcap"):
        target, kwargs = make_options(name, shape, dtype)
        if name.startswith("prob"):
            target = to_layout(target, layout)
        check(x, target, reduction="none", **kwargs, run={"repeat": False})
        check(x, target, **kwargs, run={"repeat": False})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradient_layouts(layout):
    """The upstream gradient of 'none' can have any stride, also 0 (from a .sum())."""
    x = make_logits((8, 5), torch.float64, requires_grad=True)
    y = make_target((8, 5))
    upstream = to_layout(make_logits((8, 5), torch.float64), layout)[:, 1]
    (g,) = torch.autograd.grad(pyloss.fused_cross_entropy(x, y, reduction="none"), x, upstream)
    (h,) = torch.autograd.grad(F.cross_entropy(x, y, reduction="none"), x, upstream)
    torch.testing.assert_close(g, h)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_misaligned_and_strided_labels(dtype):
    """labels[1:] of a next-token loss starts off a 16-byte boundary."""
    x = make_logits((31, 40), torch.float64)
    labels = make_target((33, 40)).to(dtype)
    wide = make_target((62, 40)).to(dtype)
    options = {} if dtype != torch.uint8 else {"ignore_index": 255}
    for y in (labels[1:32], labels[2:33], wide[::2], labels[:1].expand(31), wide.flip(0)[:31]):
        check(x, y, reduction="none", **options)


def test_strided_options():
    """weight, token_weight and lam may be views."""
    x, y = make_logits((10, 6), torch.float64), make_target((10, 6))
    weight = torch.rand(12, dtype=torch.float64)[::2]
    k = torch.rand(10, 3, dtype=torch.float64)[:, 1]
    check(x, y, weight=weight, token_weight=k)
    check(x, (y, y.flip(0), k), weight=weight)
    check(x, (y, y.flip(0), torch.tensor(0.3, dtype=torch.float64).expand(10)))


def test_kdim_with_strided_labels_and_token_weight():
    shape = (2, 5, 4, 3)
    x = make_logits(shape, torch.float64)
    y = make_target((2, 5, 3, 4)).transpose(1, 2)
    k = torch.rand(2, 3, 4, dtype=torch.float64).transpose(1, 2)
    check(x, y, token_weight=k, reduction="none")
    check(x, y, token_weight=k)


# --- row statistics --------------------------------------------------------------------------

ALL_STATS = ("lse", "logprob", "entropy", "argmax", "correct", "rank", "z_loss")


@pytest.mark.parametrize("shape", [(5,), (23, 33), (3, 1128), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_values(shape, dtype):
    x = make_logits(shape, dtype)
    y = make_target(shape, ignore_fraction=0.3 if len(shape) > 1 else 0.0)
    options = dict(z_loss=0.05, softcap=8.0, temperature=0.9)
    loss, stats = pyloss.fused_cross_entropy(x, y, return_stats=ALL_STATS, **options)
    expected_loss, expected = reference(x.double(), y, return_stats=ALL_STATS, **options)
    assert_matches_reference(loss, expected_loss)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ALL_STATS:
        value = getattr(stats, name)
        assert value.shape == y.shape, name
        if name in ("lse", "logprob", "entropy", "z_loss"):
            assert value.dtype == real, name
            assert_matches_reference(value, expected[name], atol=1e-6, what=name)
        else:
            assert torch.equal(value.to(expected[name].dtype), expected[name]), name


def test_stats_are_only_what_was_asked():
    x, y = make_logits((4, 5)), make_target((4, 5))
    loss, stats = pyloss.fused_cross_entropy(x, y, return_stats=("lse", "rank"))
    assert stats.lse is not None and stats.rank is not None
    for name in ("logprob", "entropy", "argmax", "correct", "z_loss"):
        assert getattr(stats, name) is None
    assert torch.equal(loss, pyloss.fused_cross_entropy(x, y))
    with pytest.raises(ValueError):
        pyloss.fused_cross_entropy(x, y, return_stats=("lsa",))


def test_argmax_of_ties_is_the_first():
    x = torch.zeros(4, 40)
    x[1, 7] = x[1, 30] = x[1, 39] = 2.0
    x[2, 39] = 1.0
    x[3] = -torch.inf
    x[3, 20] = x[3, 21] = 0.0
    _, stats = pyloss.fused_cross_entropy(
        x, torch.tensor([0, 30, 39, 21]), return_stats=("argmax", "correct", "rank")
    )
    assert stats.argmax.tolist() == [0, 7, 39, 20]
    assert stats.correct.tolist() == [True, False, True, False]
    assert stats.rank.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("c", [7, 65, 4099])
def test_rank_gives_topk_accuracy(c):
    x, y = make_logits((50, c)), make_target((50, c))
    _, stats = pyloss.fused_cross_entropy(x, y, return_stats=("rank",))
    for k in (1, 5):
        hit = (x.topk(k, 1).indices == y[:, None]).any(1)
        assert torch.equal(stats.rank < k, hit)


def test_ignored_rows_of_stats():
    x = make_logits((3, 5))
    x[1] = torch.nan
    y = torch.tensor([2, -100, 4])
    _, stats = pyloss.fused_cross_entropy(x, y, return_stats=ALL_STATS, z_loss=0.1)
    for name in ALL_STATS:
        assert getattr(stats, name)[1].item() == (-1 if name == "argmax" else 0), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("cotangents", [("lse",), ("logprob",), ("entropy",), None])
@pytest.mark.parametrize("shape", [(13, 33), (2, 5, 3, 4)], ids=str)
def test_stats_gradients(dtype, reduction, cotangents, shape):
    names = cotangents or ("lse", "logprob", "entropy")
    y = make_target(shape, ignore_fraction=0.3)
    options = dict(tau=1.5, z_loss=0.02, softcap=9.0, reduction=reduction)

    def total(loss, stats):
        terms = [loss.double().sum()]
        for i, name in enumerate(names):
            value = stats[name] if isinstance(stats, dict) else getattr(stats, name)
            c = make_logits(y.shape, torch.float64, seed=10 + i)
            terms.append((c * value.double()).sum())
        return sum(terms)

    x = make_logits(shape, dtype, requires_grad=True)
    ours = total(*pyloss.fused_cross_entropy(x, y, return_stats=names, **options))
    z = x.detach().double().requires_grad_()
    theirs = total(*reference(z, y, return_stats=names, **options))
    (g,) = torch.autograd.grad(ours, x)
    (h,) = torch.autograd.grad(theirs, z)
    atol = 3e-3 if dtype == torch.bfloat16 and reduction == "none" else None
    assert_matches_reference(g, h, atol=atol, what="gradient")


def test_gradient_through_a_stat_alone():
    x = make_logits((6, 9), torch.float64, requires_grad=True)
    y = make_target((6, 9), ignore_fraction=0.3)
    _, stats = pyloss.fused_cross_entropy(x, y, return_stats=("lse", "entropy", "logprob"))
    keep = (y != -100).double()
    log_p = F.log_softmax(x, 1)
    expected = {
        "lse": keep * x.logsumexp(1),
        "entropy": keep * -(log_p.exp() * log_p).sum(1),
        "logprob": keep * log_p.gather(1, y.clamp(min=0)[:, None]).squeeze(1),
    }
    for name, value in expected.items():
        (g,) = torch.autograd.grad(getattr(stats, name).sum(), x, retain_graph=True)
        (h,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        torch.testing.assert_close(g, h, rtol=1e-11, atol=1e-13)


def test_counting_stats_have_no_gradient():
    x, y = make_logits((6, 9), requires_grad=True), make_target((6, 9))
    _, stats = pyloss.fused_cross_entropy(x, y, return_stats=ALL_STATS)
    assert not stats.argmax.requires_grad
    assert not stats.correct.requires_grad
    assert not stats.rank.requires_grad


# --- extreme values --------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e8, -1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "tau0", "tau1.7", "smoothing", "prob", "z_loss"])
def test_offset_logits(offset, dtype, name):
    """A large common offset: exp(z - lse) and lse - z_y would lose all digits."""
    shape = (40, 33)
    x = make_logits(shape, dtype, scale=3.0, offset=offset)
    target, kwargs = make_options(name, shape, dtype)
    kwargs.pop("z_loss", None)
    atol = 1e-4 if name in ("smoothing", "prob") else None
    check(x, target, **kwargs, run={"atol": atol if dtype == torch.float32 else None})


def test_equal_huge_logits():
    x = torch.full((1, 2), 1e8)
    assert pyloss.fused_cross_entropy(x, torch.tensor([0])).item() == pytest.approx(
        0.6931472, rel=1e-7
    )
    x = torch.full((1, 2), 3e38, requires_grad=True)
    loss = pyloss.fused_cross_entropy(x, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.6931472, rel=1e-7)
    assert torch.autograd.grad(loss, x)[0].tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [4, 40, 3001])
@pytest.mark.parametrize("tau", [1.0, 1.5, 2.0])
def test_masked_classes(dtype, c, tau):
    """-inf logits of other classes: finite loss, zero gradient there."""
    x = make_logits((6, c), dtype)
    x[:, 2:-1] = torch.where(torch.rand(6, c - 3) < 0.5, -torch.inf, x[:, 2:-1].double()).to(dtype)
    x[4, 1:] = -torch.inf  # only the target is left
    y = torch.tensor([0, 1, c - 1, 0, 0, 1])
    check(x, y, reduction="none", tau=tau)
    z = x.clone().requires_grad_()
    loss = pyloss.fused_cross_entropy(z, y, tau=tau)
    (g,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and g.isfinite().all() and (g[x.isinf()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 5, 39])
def test_infinite_and_nan_rows(dtype, where):
    clean = make_logits((6, 40), dtype)
    x = clean.clone()
    x[1, where] = torch.inf
    x[2] = -torch.inf
    x[3, where] = torch.nan
    x[4, 3] = -torch.inf
    y = torch.tensor([0, 3, 3, 3, 3, 39])
    z = x.clone().requires_grad_()
    loss = pyloss.fused_cross_entropy(z, y, reduction="none")
    assert loss[1:4].isnan().all()
    assert loss[4].item() == math.inf
    (g,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
    theirs = F.cross_entropy(x.double(), y, reduction="none")
    assert_matches_reference(loss, theirs)
    assert g[1:4].isnan().any(1).all()
    # A bad row stays alone.
    good = clean.clone().requires_grad_()
    expected = pyloss.fused_cross_entropy(good, y, reduction="none")
    (h,) = torch.autograd.grad(expected, good, torch.ones_like(expected))
    for row in (0, 5):
        assert torch.equal(loss[row], expected[row]) and torch.equal(g[row], h[row])
    assert pyloss.fused_cross_entropy(x, y).isnan()


@pytest.mark.parametrize("name", ["plain", "smoothing", "tau1.5", "softcap", "smoothing_tau"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_never_read(name, reduction):
    """NaN and inf in ignored rows change nothing (F.cross_entropy returns a NaN gradient)."""
    x = make_logits((8, 19), torch.float64)
    y = make_target((8, 19))
    y[2] = y[5] = y[6] = -100
    _, kwargs = make_options(name, (8, 19), torch.float64)
    dirty = x.clone()
    dirty[2], dirty[5], dirty[6, 3] = torch.nan, torch.inf, -torch.inf
    results = []
    for z in (x.requires_grad_(), dirty.requires_grad_()):
        loss = pyloss.fused_cross_entropy(z, y, reduction=reduction, **kwargs)
        (g,) = torch.autograd.grad(loss.sum(), z)
        assert (g[y == -100] == 0).all()
        results.append((loss, g))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "smoothing", "tau1.5", "everything"])
def test_bad_positions_of_a_volume_stay_alone(dtype, name):
    """Neighbouring positions share the vectors of the strided kernel."""
    shape = (2, 5, 4, 9)
    y = make_target(shape)
    _, kwargs = make_options(name, shape, dtype)
    y[0, 1, 3] = y[1, 0, 0] = y[1, 3, 8] = -100
    clean = make_logits(shape, dtype)
    dirty = clean.clone()
    dirty[0, 2, 1, 3], dirty[1, :, 0, 0], dirty[1, 1, 3, 8] = torch.nan, torch.inf, -torch.inf
    dirty[0, 2, 0, 5] = torch.nan  # not ignored
    dirty[0, :, 2, 2] = -torch.inf
    bad = torch.zeros(y.shape, dtype=torch.bool)
    bad[0, 0, 5] = bad[0, 2, 2] = True
    if name == "everything":
        bad[0, 2, 2] = False  # a soft cap makes a row of -inf finite
    results = []
    for x in (clean.requires_grad_(), dirty.requires_grad_()):
        loss = pyloss.fused_cross_entropy(x, y, reduction="none", **kwargs)
        (g,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert (g.movedim(1, -1)[y == -100] == 0).all() and (loss[y == -100] == 0).all()
        results.append((loss, g.movedim(1, -1)))
    (a, g), (b, h) = results
    assert b[bad].isnan().all() and h[bad].isnan().any(-1).all()
    same = ~bad
    same[0, 2, 2] = False
    assert torch.equal(a[same], b[same]) and torch.equal(g[same], h[same])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_all_rows_ignored(reduction, smoothing, tau):
    x = make_logits((5, 7), requires_grad=True)
    y = torch.full((5,), -100)
    options = dict(label_smoothing=smoothing, tau=tau, z_loss=0.1)
    loss = pyloss.fused_cross_entropy(x, y, reduction=reduction, **options)
    if reduction == "mean":
        assert loss.isnan()
        zero = pyloss.fused_cross_entropy(x, y, empty="zero", **options)
        assert zero.item() == 0.0
        assert (torch.autograd.grad(zero, x)[0] == 0).all()
    else:
        assert (loss == 0).all()
    (g,) = torch.autograd.grad(loss.sum(), x)
    assert (g == 0).all()


def test_empty_zero_changes_nothing_else():
    x, y = make_logits((5, 7)), make_target((5, 7), ignore_fraction=0.3)
    f = pyloss.fused_cross_entropy
    assert torch.equal(f(x, y, empty="zero"), f(x, y))
    with pytest.raises(ValueError):
        f(x, y, empty="one")


def test_zero_probability_hides_an_infinite_loss():
    x = torch.tensor([[0.5, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    for tau in (1.0, 0.5, 1.5, 2.0):
        loss = pyloss.fused_cross_entropy(x, q, tau=tau)
        small = x.detach()[:, ::2].contiguous().requires_grad_()
        expected = pyloss.fused_cross_entropy(small, q[:, ::2].contiguous(), tau=tau)
        torch.testing.assert_close(loss, expected)
        (g,) = torch.autograd.grad(loss, x)
        (h,) = torch.autograd.grad(expected, small)
        torch.testing.assert_close(g[:, ::2], h)
        assert g[0, 1] == 0


def test_smoothing_with_a_masked_class_is_infinite():
    x = torch.tensor([[0.5, -torch.inf, 1.0]])
    y = torch.tensor([0])
    assert pyloss.fused_cross_entropy(x, y, label_smoothing=0.1).item() == math.inf
    assert F.cross_entropy(x, y, label_smoothing=0.1).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits_do_not_overflow_inside(dtype):
    """tau < 1: exp((1-tau) L) passes 65504 long before float32 ends."""
    x = torch.tensor([[0.0, 14.0, 2.0], [0.0, -10.0, 3.0]], dtype=dtype)
    y = torch.tensor([0, 1])
    check(
        x,
        y,
        tau=0.0,
        reduction="none",
        loss_dtype=torch.float32,
        run={"expected_dtype": torch.float32, "gradient": False},
    )


# --- autograd behaviour ----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_accumulates(reduction):
    x = make_logits((7, 11), torch.float64, requires_grad=True)
    y = make_target((7, 11))
    loss = pyloss.fused_cross_entropy(x, y, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 2 * first, rtol=1e-14, atol=0)
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 1024.0])
def test_upstream_scalar(scale):
    """A gradient written in the forward must still follow the upstream gradient (loss scaling)."""
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = make_logits((7, 11), dtype, requires_grad=True)
        y = make_target((7, 11))
        (g,) = torch.autograd.grad(scale * pyloss.fused_cross_entropy(x, y), x)
        z = x.detach().double().requires_grad_()
        (h,) = torch.autograd.grad(scale * reference(z, y), z)
        assert_matches_reference(g, h, rtol=2**-9 if dtype == torch.float16 else None)


def test_loss_scaling_of_float16():
    """torch.amp scales the loss by 65536 so that small float16 gradients do not vanish.

    A gradient that is rounded to float16 before the upstream factor is 0 here; and one that is
    above 65504 before a small upstream factor is infinite.
    """
    shape = (64, 2000)
    y = make_target(shape)
    for scale, tau in ((65536.0, 1.0), (2.0**-10, 0.0)):
        for reduction in ("mean", "sum"):
            x = make_logits(shape, torch.float16, requires_grad=True)
            loss = pyloss.fused_cross_entropy(
                x, y, tau=tau, reduction=reduction, loss_dtype=torch.float32
            )
            (g,) = torch.autograd.grad(scale * loss, x)
            z = x.detach().double().requires_grad_()
            (h,) = torch.autograd.grad(scale * reference(z, y, tau=tau, reduction=reduction), z)
            assert_matches_reference(g, h)


def test_two_losses_on_one_tensor():
    x = make_logits((7, 11), torch.float64, requires_grad=True)
    y, y2 = make_target((7, 11)), make_target((7, 11), seed=5)
    z = x * 2
    total = pyloss.fused_cross_entropy(z, y) + 0.5 * pyloss.fused_cross_entropy(z, y2, tau=1.5)
    total = total + z.square().mean()
    (g,) = torch.autograd.grad(total, x)
    w = x.detach().requires_grad_()
    v = w * 2
    expected = reference(v, y) + 0.5 * reference(v, y2, tau=1.5) + v.square().mean()
    torch.testing.assert_close(g, torch.autograd.grad(expected, w)[0], rtol=1e-12, atol=1e-14)


def test_no_grad_and_detached():
    x, y = make_logits((7, 11), requires_grad=True), make_target((7, 11))
    loss = pyloss.fused_cross_entropy(x, y)
    with torch.no_grad():
        quiet = pyloss.fused_cross_entropy(x, y)
    assert not quiet.requires_grad and torch.equal(quiet, loss)
    with torch.inference_mode():
        assert torch.equal(pyloss.fused_cross_entropy(x, y), loss)
    assert not pyloss.fused_cross_entropy(x.detach(), y).requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_probability_targets(smoothing, tau, reduction):
    x = make_logits((6, 7), torch.float64, requires_grad=True)
    q = make_target((6, 7), kind="prob").requires_grad_()
    w = torch.linspace(0.2, 2.0, 7, dtype=torch.float64)
    options = dict(weight=w, label_smoothing=smoothing, tau=tau, reduction=reduction)
    ours = pyloss.fused_cross_entropy(x, q, **options).sum()
    theirs = reference(x, q, **options).sum()
    for a, b in zip(torch.autograd.grad(ours, (x, q)), torch.autograd.grad(theirs, (x, q))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    frozen = x.detach()
    ours = pyloss.fused_cross_entropy(frozen, q, **options).sum()
    theirs = reference(frozen, q, **options).sum()
    (a,), (b,) = torch.autograd.grad(ours, q), torch.autograd.grad(theirs, q)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_hooks_and_grad_mode_of_a_leaf():
    x, y = make_logits((3, 4), requires_grad=True), make_target((3, 4))
    seen = []
    x.register_hook(lambda g: seen.append(g.shape))
    pyloss.fused_cross_entropy(x, y).backward()
    assert seen == [x.shape] and x.grad.dtype == x.dtype


# --- in place --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "tau1.5", "smoothing", "everything", "prob"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_gradient_lies_over_the_logits(dtype, name, reduction):
    shape = (9, 33)
    target, kwargs = make_options(name, shape, dtype)
    leaf = make_logits(shape, dtype, requires_grad=True)
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = pyloss.fused_cross_entropy(logits, target, reduction=reduction, inplace=True, **kwargs)
    assert torch.equal(logits, leaf)  # intact until the backward
    loss.sum().backward()
    assert seen == [logits.data_ptr()]
    assert torch.equal(logits.detach(), leaf.grad)
    z = leaf.detach().double().requires_grad_()
    expected = reference(z, exact(target), reduction=reduction, **exact(kwargs)).sum()
    assert_matches_reference(leaf.grad, torch.autograd.grad(expected, z)[0])


@pytest.mark.parametrize("layout", ["row_padded", "transposed", "shifted"])
def test_inplace_keeps_the_layout(layout):
    leaf = make_logits((6, 9), torch.float64, requires_grad=True)
    logits = to_layout(leaf, layout).requires_grad_() * 1
    y = make_target((6, 9))
    pyloss.fused_cross_entropy(logits, y, inplace=True).backward()
    z = leaf.detach().requires_grad_()
    (g,) = torch.autograd.grad(reference(z, y), z)
    torch.testing.assert_close(logits.detach(), g)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "swapped_hw"])
def test_inplace_volumes(layout):
    shape = (2, 5, 4, 3)
    values = make_logits(shape, torch.float64)
    logits = to_layout(values, layout).requires_grad_() * 1
    y = make_target(shape, ignore_fraction=0.3)
    pyloss.fused_cross_entropy(logits, y, inplace=True).backward()
    z = values.requires_grad_()
    (g,) = torch.autograd.grad(reference(z, y), z)
    torch.testing.assert_close(logits.detach(), g)


def test_inplace_ignored_rows_become_zero():
    leaf = make_logits((4, 5), requires_grad=True)
    logits = leaf * 1
    y = torch.tensor([1, -100, 2, -100])
    pyloss.fused_cross_entropy(logits, y, inplace=True).backward()
    assert (leaf.grad[1::2] == 0).all() and (leaf.grad[::2] != 0).all()


def test_inplace_refuses_a_leaf():
    x, y = make_logits((4, 5), requires_grad=True), make_target((4, 5))
    with pytest.raises(RuntimeError):
        pyloss.fused_cross_entropy(x, y, inplace=True).backward()


def test_inplace_without_grad_changes_nothing():
    x, y = make_logits((4, 5)), make_target((4, 5))
    before = x.clone()
    assert torch.equal(
        pyloss.fused_cross_entropy(x, y, inplace=True), pyloss.fused_cross_entropy(x, y)
    )
    assert torch.equal(x, before)


def test_inplace_second_backward_raises():
    logits = make_logits((4, 5), requires_grad=True) * 1
    loss = pyloss.fused_cross_entropy(logits, make_target((4, 5)), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_inplace_create_graph_raises():
    logits = make_logits((4, 5), requires_grad=True) * 1
    loss = pyloss.fused_cross_entropy(logits, make_target((4, 5)), inplace=True)
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(loss, logits, create_graph=True)
        g.sum().backward()


def test_inplace_is_seen_by_other_readers():
    leaf = make_logits((4, 5), requires_grad=True)
    y = make_target((4, 5))
    # The square saves the logits and runs its backward after the loss has overwritten them.
    logits = leaf * 1
    total = (logits * logits).sum() + pyloss.fused_cross_entropy(logits, y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    # In the other order its backward runs first, and all is well.
    leaf.grad = None
    logits = leaf * 1
    loss = pyloss.fused_cross_entropy(logits, y, inplace=True)
    (loss + (logits * logits).sum()).backward()
    z = leaf.detach().requires_grad_()
    (g,) = torch.autograd.grad(reference(z, y) + (z * z).sum(), z)
    torch.testing.assert_close(leaf.grad, g)


def test_inplace_sees_a_change_of_the_logits():
    logits = make_logits((4, 5), requires_grad=True) * 1
    loss = pyloss.fused_cross_entropy(logits, make_target((4, 5)), inplace=True)
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_change_of_saved_logits_is_seen():
    logits = make_logits((4, 5), requires_grad=True) * 1
    loss = pyloss.fused_cross_entropy(logits, make_target((4, 5)), reduction="none")
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# --- determinism, size, devices --------------------------------------------------------------


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 200_003), (3, 40_001), (257, 1000), (4096, 33), (2, 21, 96, 97)], ids=str
)
def test_bitwise_equal_for_any_thread_count(shape, dtype, restore_threads):
    for name in ("plain", "smoothing", "prob_tau"):
        target, kwargs = make_options(name, shape, dtype)
        if name == "smoothing":
            target = make_target(shape)
        x = make_logits(shape, dtype, requires_grad=True)
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for reduction in ("mean", "none"):
                loss = pyloss.fused_cross_entropy(x, target, reduction=reduction, **kwargs)
                (g,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
                results.append((loss.detach(), g))
        for i in (2, 4):
            for a, b in zip(results[0] + results[1], results[i] + results[i + 1]):
                assert torch.equal(a, b), (name, i)


def test_deterministic_algorithms_mode():
    x, y = make_logits((64, 1000), requires_grad=True), make_target((64, 1000))
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(pyloss.fused_cross_entropy(x, y), x)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1])


def _sparse_rows(shape, strides, dtype):
    """A view with far-apart rows over memory of which only a few pages are touched."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    try:
        store = torch.empty(size, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    return store.as_strided(shape, strides)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_offsets_beyond_int32(reduction):
    far = 2**30 + 16
    x = _sparse_rows((4, 9), (far, 1), torch.bfloat16)
    values = make_logits((4, 9), torch.bfloat16)
    x.copy_(values)
    y = make_target((4, 9))
    x.requires_grad_()
    loss = pyloss.fused_cross_entropy(x, y, reduction=reduction)
    (g,) = torch.autograd.grad(loss.sum(), x)
    z = values.clone().requires_grad_()
    expected = pyloss.fused_cross_entropy(z, y, reduction=reduction)
    assert torch.equal(loss, expected)
    assert torch.equal(g, torch.autograd.grad(expected.sum(), z)[0])


def test_class_offsets_beyond_int32():
    far = 2**30 + 16
    x = _sparse_rows((9, 4), (1, far), torch.bfloat16)
    values = make_logits((9, 4), torch.bfloat16)
    x.copy_(values)
    y = make_target((9, 4))
    x.requires_grad_()
    loss = pyloss.fused_cross_entropy(x, y)
    (g,) = torch.autograd.grad(loss, x)
    z = values.clone().requires_grad_()
    expected = pyloss.fused_cross_entropy(z, y)
    assert_matches_reference(loss, expected.double())
    assert_matches_reference(g, torch.autograd.grad(expected, z)[0].double())


def test_more_than_two_to_the_31_elements():
    rows, classes = 2**16 + 3, 2**15 + 8
    assert rows * classes > 2**31
    row = make_logits((1, classes), torch.bfloat16)
    y = torch.full((rows,), 17)
    loss = pyloss.fused_cross_entropy(
        row.expand(rows, classes), y, reduction="none", loss_dtype=torch.float32
    )
    one = pyloss.fused_cross_entropy(row, y[:1], reduction="none", loss_dtype=torch.float32)
    assert (loss == one).all()


def test_meta_device():
    for shape in ((4, 5), (2, 5, 3)):
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(shape[:1] + shape[2:], device="meta", dtype=torch.int64)
        loss = pyloss.fused_cross_entropy(x, y)
        assert loss.is_meta and loss.shape == () and loss.dtype == torch.bfloat16
        none = pyloss.fused_cross_entropy(x, y, reduction="none", loss_dtype=torch.float32)
        assert none.shape == y.shape and none.dtype == torch.float32
        (g,) = torch.autograd.grad(loss, x)
        assert g.is_meta and g.shape == x.shape and g.dtype == x.dtype
        _, stats = pyloss.fused_cross_entropy(x, y, return_stats=ALL_STATS)
        assert all(s.is_meta and s.shape == y.shape for s in stats)


@pytest.mark.parametrize("name", OPTION_NAMES)
@pytest.mark.parametrize("shape", [(12, 33), (2, 5, 3)], ids=str)
def test_backend_reference_agrees(name, shape):
    target, kwargs = make_options(name, shape, torch.float32)
    x = make_logits(shape, requires_grad=True)
    for reduction in ("mean", "none"):
        results = []
        for backend in ("cpu", "reference"):
            with pyloss.backend(backend):
                loss = pyloss.fused_cross_entropy(x, target, reduction=reduction, **kwargs)
                (g,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
            results.append((loss, g))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_backend_reference_stats():
    shape = (12, 33)
    x, y = make_logits(shape), make_target(shape, ignore_fraction=0.3)
    _, ours = pyloss.fused_cross_entropy(x, y, return_stats=ALL_STATS, z_loss=0.1)
    with pyloss.backend("reference"):
        _, theirs = pyloss.fused_cross_entropy(x, y, return_stats=ALL_STATS, z_loss=0.1)
    for name, a, b in zip(ours._fields, ours, theirs):
        torch.testing.assert_close(a, b, msg=name)


def test_correct_is_false_where_the_ignored_label_is_minus_one():
    x, y = torch.randn(3, 5), torch.tensor([-1, 2, -1])
    _, stats = pyloss.fused_cross_entropy(x, y, ignore_index=-1, return_stats=("correct",))
    assert not stats.correct[0] and not stats.correct[2]


def test_truncation_holds_at_the_threshold_itself():
    # Two equal logits give p_y = 1/2 exactly.
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    pyloss.fused_cross_entropy(x, torch.tensor([0]), tau=1.7, truncate=0.5).backward()
    assert torch.equal(x.grad, torch.zeros(1, 2, dtype=torch.float64))


def test_an_infinite_loss_is_not_taken_for_truncated():
    x = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    loss = pyloss.fused_cross_entropy(x, torch.tensor([1]))
    loss.backward()
    assert loss == torch.inf and torch.equal(x.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [5, 140_000])  # early gradient, and late
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_an_infinite_upstream_does_not_reach_ignored_rows(dtype, classes, reduction, factor):
    """A step without labels: the mean over none of them must not spoil the weights."""
    x = torch.randn(3, classes).to(dtype)
    for target in ([-100, -100, -100], [2, -100, -100]):
        leaf = x.clone().requires_grad_()
        loss = pyloss.fused_cross_entropy(leaf, torch.tensor(target), reduction=reduction)
        (loss * factor).backward()
        assert torch.equal(leaf.grad[1:], torch.zeros_like(x[1:]))
        if target[0] == -100:
            assert torch.equal(leaf.grad[0], torch.zeros_like(x[0]))
