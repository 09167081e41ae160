"""What Betti matching loss and metrics take: ignored voxels, (N, H, W), ranges, warnings."""

from __future__ import annotations

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyloss
from pyloss.functional._images import one_hot
from pyloss.reference import betti_matching as reference

F64 = torch.float64
MARGIN = 2
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(2, 1, 9, 8, dtype=F64, generator=GENERATOR)
MASK = torch.rand(2, 9, 8, generator=GENERATOR) > 0.5
LABELS = torch.randint(3, (2, 9, 8), generator=GENERATOR)
PROBABILITIES = torch.rand(2, 3, 9, 8, dtype=F64, generator=GENERATOR)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def loss_and_gradient(x: Tensor, target, **options) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = pyloss.betti_matching_loss(leaf, target, reduction="none", **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert value.dtype == x.dtype
    return value.detach(), grad


# --------------------------------------------------------------------------------------------------
# ignore_index


@pytest.mark.parametrize("essential", [False, True])
@pytest.mark.parametrize("filtration", ["superlevel", "sublevel", "both"])
@pytest.mark.parametrize("kind", ["mask", "labels"])
def test_an_ignored_margin_is_as_if_cut_off(kind, filtration, essential):
    """Whatever stands there, NaN too: that of the voxels that count, and no gradient outside."""
    x, y = (X, MASK.long()) if kind == "mask" else (PROBABILITIES, LABELS)
    inner = (..., slice(MARGIN, -1), slice(1, -MARGIN))
    marked = torch.full_like(y, 255)
    marked[inner] = y[inner]
    spoiled = torch.full_like(x, math.nan)
    spoiled[inner] = x[inner]
    options = dict(filtration=filtration, essential=essential)
    expected, grad = loss_and_gradient(x[inner].contiguous(), y[inner], **options)
    found, wide = loss_and_gradient(spoiled, marked, ignore_index=255, **options)
    assert torch.equal(found, expected) and found.any()
    assert torch.equal(wide[inner], grad)
    wide[inner] = 0
    assert not wide.any()


def filled(t: Tensor, ignored: Tensor, value: Tensor | float) -> Tensor:
    return torch.where(ignored, value, t)


@pytest.mark.parametrize("superlevel", [True, False])
@pytest.mark.parametrize("shift", [0.0, -3.0, 5.0])
def test_value_of_ignored_voxels(superlevel, shift):
    """0 (sublevel sets: 1), or the last value of the voxels that count, and a constant."""
    y = (MASK.double() + shift)[:, None]
    x = X + shift
    ignored = torch.rand(2, 1, 9, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    last = []
    for a, b, k in zip(x, y, ignored):
        counted = torch.cat([a[~k], b[~k]])
        last.append(min(0.0, counted.min()) if superlevel else max(1.0, counted.max()))
    last = torch.tensor(last, dtype=F64).view(-1, 1, 1, 1)
    leaf = x.clone().requires_grad_()
    images = [filled(t, ignored, last)[:, 0] for t in (leaf, y)]
    expected = reference.betti_matching_loss(*images, superlevel=superlevel).sum((1, 2))
    (grad,) = torch.autograd.grad(expected.sum(), leaf)
    marked = filled(y, ignored, 99.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = loss_and_gradient(
            x, marked, filtration="superlevel" if superlevel else "sublevel", ignore_index=99
        )
    torch.testing.assert_close(found[0][:, 0], expected.detach())
    torch.testing.assert_close(found[1], grad)
    assert not found[1][ignored].any() and grad.any()


def test_what_ignored_voxels_divide_stays_divided(silent):
    """Two bars of 1 with a gap that is not labelled: two components in both, whatever is there."""
    target = torch.ones(1, 1, 1, 5, dtype=torch.long)
    target[..., 2] = 255
    for gap in (0.0, 1.0):
        x = torch.tensor([0.9, 0.9, gap, 0.7, 0.7], dtype=F64).view(1, 1, 1, 5)
        loss, grad = loss_and_gradient(x, target, ignore_index=255)
        # The younger bar (0.7, 0) matches (1, 0).
        torch.testing.assert_close(loss, torch.tensor([[2 * 0.3**2]], dtype=F64))
        assert grad[..., 3:].sum() == pytest.approx(-4 * 0.3) and not grad[..., :3].any()


@pytest.mark.parametrize("padding", [None, "foreground", "background", 0.25])
@pytest.mark.parametrize("filtration", ["superlevel", "both"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_prepared_targets_ignore_too(dtype, filtration, padding):
    labels = LABELS.clone()
    labels[:, 3:5, 2:6] = 255
    labels = labels.to(dtype)
    options = dict(filtration=filtration, padding=padding, ignore_index=255)
    prepared = pyloss.BettiTarget.precompute(labels, num_classes=3, **options)
    prepared = pickle.loads(pickle.dumps(prepared))
    assert "ignore_index=255" in repr(prepared)
    for choice in (slice(None), slice(1, 2)):
        for more in (dict(), dict(activation="softmax", include_background=False)):
            expected = loss_and_gradient(PROBABILITIES[choice], labels[choice], **options, **more)
            found = loss_and_gradient(PROBABILITIES[choice], prepared[choice], **options, **more)
            assert all(map(torch.equal, found, expected))
    with pytest.raises(ValueError, match="in advance for ignore_index=255, got None"):
        pyloss.betti_matching_loss(PROBABILITIES, prepared, filtration=filtration, padding=padding)


def test_ignored_labels_in_graphs_and_transforms():
    labels = LABELS.clone()
    labels[:, :2] = -1
    options = dict(ignore_index=-1, activation="softmax")

    def f(x, y):
        return pyloss.betti_matching_loss(x, y, **options)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    found = []
    for g in (f, compiled):
        x = PROBABILITIES.clone().requires_grad_()
        value = g(x, labels)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    assert all(map(torch.equal, *found))
    each = torch.func.vmap(torch.func.grad(f))(PROBABILITIES[:, None], labels[:, None])
    torch.testing.assert_close(each[:, 0] / 2, found[0][1])


@pytest.mark.parametrize("wrong", [3, -1, 256])
def test_a_wrong_class_where_nothing_can_raise(wrong):
    """NaN for its item: a channel without it would be a plausible number."""
    y = LABELS.clone()
    y[1, 4, 4] = wrong
    for labels in (y, y.to(torch.int16)):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            pyloss.betti_matching_loss(PROBABILITIES, labels)
        torch._dynamo.reset()
        compiled = torch.compile(pyloss.betti_matching_loss, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match="must not contain NaN"):
            compiled(PROBABILITIES, labels)
        hot = torch.func.vmap(lambda t: one_hot(t[None], 3))(labels)[:, 0]
        assert not hot[0].isnan().any() and hot[1].isnan().all()


def test_class_indices_under_vmap():
    each = [pyloss.betti_matching_loss(p[None], y[None]) for p, y in zip(PROBABILITIES, LABELS)]
    found = torch.func.vmap(pyloss.betti_matching_loss)(PROBABILITIES[:, None], LABELS[:, None])
    torch.testing.assert_close(found, torch.stack(each))
    large = (PROBABILITIES * 2**26).long()  # as float64 under vmap, where nothing can be looked at
    found = torch.func.vmap(pyloss.betti_matching_loss)(large[:, None], large.flip(-1)[:, None])
    each = [pyloss.betti_matching_loss(a[None], a.flip(-1)[None]) for a in large]
    torch.testing.assert_close(found, torch.stack(each))


def test_everything_ignored():
    for labels, x in ((torch.full_like(LABELS, 255), PROBABILITIES), (MASK.long() * 0 + 255, X)):
        loss, grad = loss_and_gradient(x, labels, ignore_index=255)
        assert not loss.any() and not grad.any()


# --------------------------------------------------------------------------------------------------
# spatial_dims


@pytest.mark.parametrize("target", ["mask", "prepared", "with a channel"])
def test_images_without_channels(target, silent):
    y = {
        "mask": MASK,
        "prepared": pyloss.BettiTarget.precompute(MASK, 2),
        "with a channel": MASK[:, None],
    }[target]
    expected, grad = loss_and_gradient(X, MASK[:, None])
    found = loss_and_gradient(X[:, 0], y, spatial_dims=2)
    assert torch.equal(found[0], expected) and torch.equal(found[1], grad[:, 0])
    if target != "prepared":
        for metric in (pyloss.betti_number_error, pyloss.betti_matching_error):
            got = metric(X[:, 0], y, spatial_dims=np.int64(2))
            assert torch.equal(got, metric(X, MASK[:, None]))
        got = pyloss.betti_matching_error(X[:, 0], y, binarize=False, spatial_dims=2)
        assert torch.equal(got, pyloss.betti_matching_error(X, MASK[:, None], binarize=False))


def test_signals_that_look_like_images():
    x, y = X[:, 0], MASK
    loss = pyloss.betti_matching_loss
    words = r"input of shape \(2, 9, 8\) is taken for \(N, C, length\).*spatial_dims=2"
    for call in (
        lambda **o: loss(x, y, **o),
        lambda **o: pyloss.BettiMatchingLoss(**o)(x, y),
        lambda **o: pyloss.betti_number_error(x, y, **o),
        lambda **o: pyloss.betti_matching_error(x, y, **o),
        lambda **o: pyloss.betti_matching(x, y, **o).loss().view(2, 9).mean(),
        lambda **o: pyloss.persistence_pairs(x, **o).values,
        lambda **o: pyloss.metrics.BettiNumberError(**o)(x, y),
    ):
        with pytest.warns(UserWarning, match=words) as found:
            value = call()
        assert found[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(value, call(spatial_dims=1))
    with pytest.warns(UserWarning, match=r"target of shape \(2, 9, 8\) is taken"):
        pyloss.BettiTarget.precompute(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(x[:, :1], y[:, :1])  # no image has one row
    with pytest.raises(
        ValueError, match=r"with spatial_dims, \(N, \*spatial\); got shape \(9, 8\)"
    ):
        loss(x[0], y[0], spatial_dims=2)


# --------------------------------------------------------------------------------------------------
# Ranges


def test_logits_and_bytes_warn():
    loss, bytes_ = pyloss.betti_matching_loss, MASK[:, None].to(torch.uint8) * 255
    logits, mask = 8 * X - 4, MASK[:, None]
    of_logits = "input has values outside.*logits give activation='sigmoid'"
    of_bytes = "target has values outside.*mask of 0 and 255"
    for x, y, words in (
        (logits, mask, [of_logits]),
        (logits, mask.double(), [of_logits]),
        (X, bytes_, [of_bytes]),
        (X, bytes_.double(), [of_bytes]),
        (logits, bytes_, [of_logits, of_bytes]),
        (logits, pyloss.BettiTarget.precompute(mask), [of_logits]),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            for _ in range(3):  # one line, one warning of each text
                loss(x, y)
        assert len(found) == len(words)
        for w in words:
            with pytest.warns(UserWarning, match=w):
                loss(x, y)
    with pytest.warns(UserWarning, match=of_bytes):
        loss(logits, bytes_, activation="sigmoid")


def test_what_does_not_warn(silent):
    loss, mask = pyloss.betti_matching_loss, MASK[:, None]
    loss(8 * X - 4, mask, activation="sigmoid")
    loss(X * 100, X.flip(-1) * 100 - 5)  # heights
    loss((X * 255).to(torch.uint8), (X.flip(-1) * 255).to(torch.uint8))
    loss(PROBABILITIES, LABELS)
    loss(X * 1.0005, mask)
    marked = MASK.long()
    marked[:, 0] = 255
    loss(X, marked, ignore_index=255)
    pyloss.BettiTarget.precompute(marked, 2, ignore_index=255)
    pyloss.BettiTarget.precompute(X * 255)
    pyloss.BettiTarget.precompute(torch.zeros(0, 1, 4, 4))


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_either_side_of_the_range_warns(shift):
    x = torch.linspace(0, 1, 16).view(1, 1, 4, 4) + shift
    for loss in (pyloss.betti_matching_loss, pyloss.functional.soft_dice_loss):
        with pytest.warns(UserWarning, match=r"input has values outside \[0, 1\]"):
            loss(x, (x > 0.5).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float16])
def test_a_prepared_mask_of_bytes_warns(dtype):
    with pytest.warns(UserWarning, match="target is a mask of 0 and 255"):
        pyloss.BettiTarget.precompute((MASK[:, None] * 255).to(dtype))


def test_no_look_at_the_numbers_in_graphs():
    """A look would break the graph."""
    torch._dynamo.reset()
    f = torch.compile(pyloss.betti_matching_loss, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        f(8 * X - 4, MASK[:, None])


def test_fake_tensors_have_no_numbers_to_look_at():
    dice, ce = pyloss.functional.soft_dice_loss, pyloss.functional.dice_cross_entropy_loss
    with FakeTensorMode():
        p, t, labels = torch.rand(2, 3, 6, 6), torch.rand(2, 3, 6, 6), torch.randint(3, (2, 6, 6))
        for loss in (pyloss.betti_matching_loss, dice, ce):
            for target in (t, t > 0.5, labels):
                assert loss(p, target).shape == ()
        weight = torch.rand(3)
        assert dice(p, t, weight=weight).shape == ()


# --------------------------------------------------------------------------------------------------
# Metrics as objects, representations


@pytest.mark.parametrize("name", ["BettiNumberError", "BettiMatchingError"])
def test_a_call_of_a_metric_is_its_batch(name):
    cls = getattr(pyloss.metrics, name)
    function = {
        "BettiNumberError": pyloss.betti_number_error,
        "BettiMatchingError": pyloss.betti_matching_error,
    }[name]
    batches = [(X, MASK[:, None]), (1 - X[:1], MASK[:1, None]), (X[:, :, ::2], MASK[:, None, ::2])]
    called, updated = cls(0.4), cls(0.4)
    for x, y in batches:
        found = called(x, y)
        torch.testing.assert_close(found, function(x, y, 0.4), rtol=0, atol=0)
        updated.update(x, y)
    assert torch.equal(called.aggregate(), updated.compute())
    assert torch.equal(called.compute(), called.aggregate())
    called.reset()
    with pytest.raises(RuntimeError, match=r"compute\(\) before update"):
        called.aggregate()


def test_essential_is_of_the_dimensions_that_were_asked_for():
    """dims=[1] leaves dimension 0 out, its oldest component too."""
    y = MASK[:, None].double()
    for dims in ([0], [1], [0, 1]):
        found = pyloss.betti_matching(X, y, dims=dims).loss(include_essential=True)
        expected = pyloss.betti_matching_loss(X, y, dims=dims, essential=True, reduction="none")
        torch.testing.assert_close(found, expected[:, 0])


def test_voxels_of_the_essential_components():
    matching = pyloss.betti_matching(X, X.flip(-1))
    for item in range(2):
        best = divmod(int(X[item, 0].argmax()), 8)
        mirrored = (best[0], 7 - best[1])
        assert matching.essential(item).tolist() == [list(best), list(mirrored)]
    framed = pyloss.betti_matching(X, X, padding="foreground")
    assert framed.essential(0).tolist() == [[-1, -1]] * 2  # the frame is as old, and comes first
    with pytest.raises(IndexError, match=r"item must be in 0\.\.1, got 2"):
        matching.essential(2)


def test_representations():
    pairs = pyloss.persistence_pairs(torch.tensor([[0.0, 2.0, 1.0, 3.0]]), 1)
    assert repr(pairs) == "PersistencePairs(1 of dimension 0; 1 image 4, sublevel sets)"
    matching = pyloss.betti_matching(X * 0, X * 0)
    assert repr(matching) == (
        "BettiMatching(0 matched, 0 of the input alone, 0 of the target alone; "
        "2 pairs 9x8, superlevel sets)"
    )
    assert repr(pyloss.BettiTarget.precompute(MASK[:, None], padding="background")) == (
        "BettiTarget(shape=(2, 1, 9, 8), filtration='superlevel', dims=[0, 1], "
        "padding='background', num_classes=None, ignore_index=None, device='cpu')"
    )


def test_nothing_waits_for_a_device():
    """Meta tensors have no number to give; as on CUDA, nothing may ask."""
    dice, ce = pyloss.functional.soft_dice_loss, pyloss.functional.dice_cross_entropy_loss
    like = dict(device="meta", requires_grad=True)
    logits, one = torch.rand(2, 3, 6, 6, **like), torch.rand(2, 1, 6, 6, **like)
    labels = torch.randint(3, (2, 6, 6), device="meta")
    for loss in (
        pyloss.betti_matching_loss(logits, labels, ignore_index=255, padding="foreground"),
        pyloss.betti_matching_loss(one[:, 0], labels, spatial_dims=2, filtration="both"),
        dice(logits, labels, ignore_index=255, empty="zero"),
        dice(logits, logits.detach(), weight=logits[0, :, 0, 0].detach()),
        ce(logits, labels, softmax=True, ignore_index=255, empty="zero"),
        ce(one, labels, sigmoid=True, ignore_index=255, empty="zero"),
    ):
        assert loss.shape == () and loss.is_meta
        loss.backward()
    for waits in (  # as is documented
        lambda: dice(logits, logits.detach(), validate=True),
        lambda: pyloss.BettiTarget.precompute(labels.unsqueeze(1)),
    ):
        with pytest.raises(RuntimeError, match="meta tensor"):
            waits()
