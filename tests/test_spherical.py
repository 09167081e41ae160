"""Spherical losses: invariances of the Z-loss; the factored layer step by step with the dense one.
What every function promises is in specs/spherical.py."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from helpers import check_ranks
from specs.spherical import user_formula

import pyloss.functional as F
from pyloss.functional import _spherical_layer as factored
from pyloss.nn import SphericalLinear
from pyloss.testing import make_logits, make_target

F64 = torch.float64
WORKER = Path(__file__).with_name("spherical_worker.py")


# --------------------------------------------------------------------------------------------------
# Dense


def test_z_loss_is_invariant_and_its_gradient_orthogonal() -> None:
    x = make_logits((5, 40), F64, scale=1.0).requires_grad_()
    y = make_target((5, 40))
    loss = F.spherical_z_loss(x, y, 0.7, 2.0, reduction="none")
    for scale, shift in ((3.0, 0.0), (1.0, -7.0), (0.02, 5.0)):
        other = F.spherical_z_loss(scale * x + shift, y, 0.7, 2.0, reduction="none")
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    for direction in (torch.ones_like(x), x.detach()):
        assert (dx * direction).sum(1).abs().max() < 1e-14


def test_z_loss_is_bounded_by_the_number_of_classes() -> None:
    x = torch.zeros(1, 17, dtype=F64)
    x[0, 4] = 3.0
    for label, z in ((4, 4.0), (0, -0.25)):  # sqrt(C - 1), and of the others
        want = math.log1p(math.exp(-z))
        assert abs(F.spherical_z_loss(x, torch.tensor([label])).item() - want) < 1e-12


@pytest.mark.parametrize("dtype, size", ((torch.float32, 1e6), (F64, 1e12)), ids=str)
def test_equal_scores_have_a_finite_gradient(dtype: torch.dtype, size: float) -> None:
    x = torch.full((1, 4), 0.5, dtype=dtype, requires_grad=True)
    loss = F.spherical_z_loss(x, torch.tensor([1]))
    assert abs(loss.item() - math.log(2)) < 1e-6
    (dx,) = torch.autograd.grad(loss, x)
    own = torch.tensor([0.25, -0.75, 0.25, 0.25], dtype=dtype)
    torch.testing.assert_close(dx[0] / size, 0.5 * own)


def test_what_overflows_is_no_number() -> None:
    x = torch.tensor([[0.0, 3e19, -3e19]])
    assert F.spherical_z_loss(x, torch.tensor([0])).isnan()
    assert F.one_hot_mse_loss(x, torch.tensor([0])) == math.inf


def test_formula_of_the_gradient() -> None:
    """Section 3.2 of the notes: the slope times what a unit of each score changes z by."""
    x, y = make_logits((1, 6), F64, scale=1.0).requires_grad_(), torch.tensor([2])
    a, b = 0.5, 1.5
    (dx,) = torch.autograd.grad(F.spherical_z_loss(x, y, a, b), x)
    v = x.detach()[0]
    mean, sigma = v.mean(), v.std(correction=0)
    z = (v[2] - mean) / sigma
    slope = -torch.sigmoid(a * (b - z))
    own = torch.nn.functional.one_hot(y, 6)[0].to(F64)
    want = slope * ((own - 1 / 6) / sigma - z * (v - mean) / (6 * sigma**2))
    torch.testing.assert_close(dx[0], want, rtol=1e-12, atol=1e-14)


def test_threads_do_not_change_a_mean() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(70_001, 3, generator=g), torch.randint(3, (70_001,), generator=g)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(F.one_hot_mse_loss(x, y, weight=torch.tensor([0.3, 0.7, 1.1])))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


# --------------------------------------------------------------------------------------------------
# The layer against the dense one

DENSE = {
    "z": F.spherical_z_loss,
    "mse": F.one_hot_mse_loss,
    "taylor": F.taylor_softmax_loss,
    "spherical": F.spherical_softmax_loss,
    user_formula: lambda x, y: F.spherical_loss(x, y, user_formula),
}


def pair(loss="z", d: int = 6, classes: int = 40, **options):
    torch.manual_seed(0)
    layer = SphericalLinear(d, classes, loss, dtype=F64, **options)
    return layer, layer.weight.requires_grad_()


def batches(count: int, rows: int, d: int = 6, classes: int = 40):
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        h = torch.randn(rows, d, generator=g, dtype=F64, requires_grad=True)
        yield h, torch.randint(classes, (rows,), generator=g)


def assert_same(found, want, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


def check_steps(
    layer, weight, loss, steps: int, rows: int, lr: float, decay: float, sizes=1.0, tolerance=1e-9
) -> None:
    for h, y in batches(steps, rows, layer.in_features, layer.num_classes):
        h = (sizes * h).detach().requires_grad_()
        value = layer(h, y)
        (dh,) = torch.autograd.grad(value, h)
        dense = DENSE[loss](h @ weight.T, y)
        want_h, grad = torch.autograd.grad(dense, (h, weight))
        assert_same((value, dh), (dense, want_h), tolerance)
        layer.step(lr, decay)
        with torch.no_grad():
            weight -= lr * (grad + decay * weight)
    assert_same(layer.weight, weight)


def test_a_thousand_steps() -> None:
    layer, weight = pair(stabilize_every=20, refresh_every=150)
    check_steps(layer, weight, "z", 1000, 3, lr=0.3, decay=0.01)
    assert layer.steps == 1000


def test_a_factor_that_shrinks_fast_cannot_wait() -> None:
    """Each step shrinks U along the large feature: with looks at every 100th step alone the values
    are off by 1e-7 after 40 steps, and by more later."""
    layer, weight = pair("mse", d=4, classes=10, stabilize_every=1000)
    sizes = torch.tensor([1.0, 0.05, 0.05, 0.05], dtype=F64)
    check_steps(layer, weight, "mse", 40, 16, lr=0.3, decay=0.0, sizes=sizes, tolerance=1e-11)


@pytest.mark.parametrize("loss", DENSE, ids=lambda loss: getattr(loss, "__name__", loss))
@pytest.mark.parametrize("rows", (3, 11), ids=("Woodbury", "directly"))
def test_steps_of_every_loss(loss, rows: int) -> None:
    layer, weight = pair(loss, stabilize_every=5)
    check_steps(layer, weight, loss, 12, rows, lr=0.02, decay=0.05)


def test_several_backward_calls_are_one_batch() -> None:
    (one, _), (other, _) = pair(), pair()
    for h, y in batches(3, 8):
        one(h, y).backward()
        for part in (slice(0, 2), slice(2, 8)):
            (other(h[part], y[part]) * (part.stop - part.start) / 8).backward()
        for layer in (one, other):
            layer.step(0.1)
    assert_same(one.weight, other.weight)
    h, y = next(batches(1, 8))
    before = one.weight
    one(h, y).backward()
    one.zero_update()
    one.step(0.1)
    assert torch.equal(one.weight, before)  # nothing but decay is left for a step
    one.step(0.1, 0.5)
    assert_same(one.weight, 0.95 * before)


def test_features_of_several_dimensions_and_ignored_rows() -> None:
    layer, weight = pair(reduction="none", ignore_index=7)
    h, y = next(batches(1, 12))
    y[3] = 7
    found = layer(h.view(3, 4, 6), y.view(3, 4))
    want = F.spherical_z_loss(h @ weight.T, y, reduction="none", ignore_index=7)
    assert_same(found, want.detach().view(3, 4))
    found.sum().backward()
    assert not h.grad[3].any()


@pytest.mark.parametrize("loss", ("z", lambda o, s, q: 1 - o / q.sqrt()), ids=("z", "cosine"))
@pytest.mark.parametrize("value", (math.nan, 0.0))
def test_nothing_of_an_ignored_row_reaches_the_weight(loss, value: float) -> None:
    """The cosine has no slope where all features are 0, as padding may be."""
    (layer, _), (other, _) = pair(loss), pair(loss)
    h, y = next(batches(1, 5))
    kept = torch.tensor([True, False, True, True, False])
    padded = torch.where(kept.unsqueeze(1), h.detach(), value).requires_grad_()
    layer(padded, torch.where(kept, y, -100)).backward()
    other(h[kept], y[kept]).backward()
    assert torch.equal(padded.grad[~kept], torch.zeros(2, 6, dtype=F64))
    assert_same(padded.grad[kept], h.grad[kept])
    for twin in (layer, other):
        twin.step(0.1)
    assert_same(layer.weight, other.weight)


def test_autocast_does_not_round_the_weight() -> None:
    layer, twin = (SphericalLinear(6, 40, dtype=torch.float32) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    for one in (layer, twin):
        one.shared.diagonal()[0] = 3.0  # what the step brings back to 1, by products with V
        one.stabilize_every = 1
        factored.refresh(one._factors)
        with torch.autocast("cpu", torch.bfloat16, enabled=one is layer):
            one.step(0.1)
            assert one.weight.dtype == torch.float32
    assert torch.equal(layer.weight, twin.weight)
    assert torch.equal(layer.classes, twin.classes)


def test_the_norm_of_the_gradient() -> None:
    layer, weight = pair("taylor")
    h, y = next(batches(1, 8))
    layer(h, y).backward()
    (grad,) = torch.autograd.grad(F.taylor_softmax_loss(h @ weight.T, y), weight)
    assert_same(layer.gradient_norm(), grad.norm())


def test_logits_are_those_of_the_weight() -> None:
    layer, weight = pair()
    for h, y in batches(4, 5):
        layer(h, y).backward()
        layer.step(0.2)
    assert_same(layer.logits(h), h @ layer.weight.T)
    layer.weight = weight.detach()
    assert_same(layer.logits(h), h @ weight.T)


# --------------------------------------------------------------------------------------------------
# Upkeep


def test_stabilizing_changes_the_factors_and_not_the_weight() -> None:
    torch.manual_seed(0)
    for sizes in ((8.0, 1, 1, 1, 1, 0.1), (8.0, 9, 10, 1, 1, 0.1)):  # one by one; all of it
        layer, _ = pair()
        q, r = (torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0] for _ in range(2))
        layer.shared.copy_(q * torch.tensor(sizes, dtype=F64) @ r)
        layer.offset.fill_(0.3)
        factored.refresh(layer._factors)
        before, gram = layer.weight, layer.gram.clone()
        factored.stabilize(layer._factors)
        assert_same(layer.weight, before)
        assert_same(layer.inverse.T @ layer.shared, torch.eye(6, dtype=F64))
        left = torch.linalg.svdvals(layer.shared)
        assert ((left > 0.49) & (left < 2.01)).all()
        factored.refresh(layer._factors)
        assert_same(layer.gram, gram)


def test_a_step_that_would_make_the_factor_singular_is_dense() -> None:
    """One row h of the squared error: U (1 - 2 lr h h^T) is singular at lr = 1 / (2 h.h)."""
    layer, weight = pair("mse", d=2)
    h, y = torch.tensor([[1.0, 1.0]], dtype=F64), torch.tensor([3])
    for count in range(2):
        dense = F.one_hot_mse_loss(h @ weight.T, y)
        (grad,) = torch.autograd.grad(dense, weight)
        layer(h, y).backward()
        if count == 0:
            with pytest.warns(UserWarning, match="U would be singular"):
                layer.step(0.25)
        else:  # once
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                layer.step(0.25)
        weight = (weight - 0.25 * grad).detach().requires_grad_()
        assert_same(layer.weight, weight)
    assert_same(layer.gram, weight.T @ weight)


def test_float32_stays_near_float64() -> None:
    torch.manual_seed(0)
    layer = SphericalLinear(6, 40, dtype=torch.float32, refresh_every=20, stabilize_every=10)
    weight = layer.weight.double().requires_grad_()
    for h, y in batches(60, 4):
        layer(h.detach().float(), y).backward()
        (grad,) = torch.autograd.grad(F.spherical_z_loss(h @ weight.T, y), weight)
        layer.step(0.2)
        with torch.no_grad():
            weight -= 0.2 * grad
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-4, atol=1e-5)


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    layer, _ = pair()
    (h, y), (h2, y2) = batches(2, 4)
    late = layer(h, y)
    layer(h2, y2).backward()
    layer.step(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_nan_is_seen() -> None:
    layer, _ = pair(stabilize_every=1)
    (h, y), (h2, y2) = batches(2, 4)
    layer(h.detach() * math.nan, y).backward()
    layer.step(0.1)
    assert layer(h2, y2).isnan()


# --------------------------------------------------------------------------------------------------
# The module


def test_a_checkpoint_a_copy_and_a_pickle_go_on_where_it_was() -> None:
    layer, _ = pair()
    todo = list(batches(6, 4))
    for h, y in todo[:3]:
        layer(h, y).backward()
        layer.step(0.1)
    other, _ = pair()
    other(*todo[0]).backward()  # a gradient of the weight that is replaced
    other.load_state_dict(layer.state_dict())
    twins = [layer, other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in twins:
        for h, y in todo[3:]:
            twin(h, y).backward()
            twin.step(0.1)
    for twin in twins[1:]:
        assert torch.equal(twin.weight, layer.weight) and twin.steps == 6


def test_no_optimizer_sees_the_weight() -> None:
    assert list(pair()[0].parameters()) == []


def test_casting_keeps_the_factors_exact() -> None:
    layer, weight = pair()
    half = copy.deepcopy(layer).half()
    assert half.classes.dtype == F64 and half.gram.dtype == F64
    single = copy.deepcopy(layer).float()
    assert single.classes.dtype == torch.float32 and single.shared.dtype == F64
    assert_same(single.gram, single.weight.double().T @ single.weight.double(), 1e-6)
    h, y = next(batches(1, 4))
    assert_same(single(h, y), F.spherical_z_loss(h @ weight.T, y), 1e-5)
    meta = SphericalLinear(6, 40, device="meta")
    assert meta.to(F64).classes.dtype == F64


def test_wrong_steps() -> None:
    layer, _ = pair()
    for options, words in (
        (dict(lr=-1.0), "lr must be finite and >= 0, got -1"),
        (dict(lr=math.nan), "lr must be finite"),
        (dict(lr=0.1, weight_decay=-1), "weight_decay must be finite and >= 0"),
        (dict(lr=0.1, weight_decay=10.0), "weight_decay must be < 1, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.step(**options)
    with pytest.raises(ValueError, match=r"weight must have the shape \[40, 6\], got \[6, 40\]"):
        layer.weight = torch.ones(6, 40)
    with pytest.raises(TypeError, match="weight must be a Tensor"):
        layer.weight = [1.0]
    with pytest.raises(ValueError, match="dtype must be torch.float32 or torch.float64"):
        SphericalLinear(6, 40, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the z-loss needs at least 2 classes, got 1"):
        SphericalLinear(6, 1)


def test_without_a_gradient_nothing_is_kept() -> None:
    layer, _ = pair()
    h, y = next(batches(1, 4))
    with torch.no_grad():
        layer(h, y)
    assert layer._pending == []


def test_processes_are_one_batch(tmp_path) -> None:
    check_ranks(tmp_path, 2, str(WORKER))
