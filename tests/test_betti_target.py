"""BettiTarget: the results of the uncached call bit for bit, selection, errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from betti_matching_cases import rows

import pyloss

X = torch.rand(3, 2, 9, 8, generator=torch.Generator().manual_seed(0))
TARGETS = {
    "bool": X.flip(0) > 0.5,
    "float": X.flip(1),
    "half": X.flip(1).half(),
    "double": X.flip(1).double() + 1e-9,
    "int": (X.flip(0) * 4).long(),
    "large int": (X.flip(0) * 4).long() + 2**25,
}
LABELS = (X[:, 0] * 2).long()
PADDINGS = [None, "foreground", "foreground_detached", "background", 0.1]


def check(x, target, prepared, **options):
    """Loss and gradient of both calls are the same bits."""
    found = []
    for t in (target, prepared):
        leaf = x.clone().requires_grad_()
        value = pyloss.betti_matching_loss(leaf, t, reduction="none", **options)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        assert grad.any()
        found.append((value.detach(), grad))
    for a, b in zip(*found):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("filtration", ["superlevel", "sublevel", "both"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", TARGETS)
def test_same_loss_and_gradient(kind, padding, filtration):
    y = TARGETS[kind]
    options = dict(filtration=filtration, padding=padding)
    prepared = pyloss.BettiTarget.precompute(y, **options)
    for x in (X, X.double(), X.half()):
        check(x, y, prepared, **options)
    check(X, y, prepared, include_background=False, essential=True, **options)


@pytest.mark.parametrize("padding", PADDINGS)
def test_class_indices(padding):
    prepared = pyloss.BettiTarget.precompute(LABELS, num_classes=2, padding=padding)
    assert prepared.shape == X.shape and len(prepared) == 3
    check(X, LABELS, prepared, padding=padding)
    check(X, LABELS, prepared, padding=padding, activation="softmax", include_background=False)


def test_one_spatial_dimension_and_dims():
    x, y = X.flatten(2), TARGETS["bool"].flatten(2)
    check(x, y, pyloss.BettiTarget.precompute(y))
    prepared = pyloss.BettiTarget.precompute(TARGETS["bool"], dims=[1, 0])
    check(X, TARGETS["bool"], prepared, dims=[0, 1], weight=[2.0, 0.5])
    prepared = pyloss.BettiTarget.precompute(TARGETS["bool"], dims=[1])
    check(X, TARGETS["bool"], prepared, dims=[1])


def test_float64_in_advance():
    y = TARGETS["bool"]
    prepared = pyloss.BettiTarget.precompute(y, dtype=torch.float64, padding=0.1)
    x, (image,) = prepared._pair(X.double())
    assert image is prepared._images[0]  # nothing left to convert
    check(X.double(), y, prepared, padding=0.1)


@pytest.mark.parametrize("filtration", ["superlevel", "sublevel"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_matching(filtration, padding):
    options = dict(filtration=filtration, padding=padding)
    for y in TARGETS.values():
        exact = pyloss.betti_matching(X, y, **options)
        found = pyloss.betti_matching(X, pyloss.BettiTarget.precompute(y, **options), **options)
        assert rows(found) == rows(exact) and torch.equal(found.loss(), exact.loss())
    y = TARGETS["float"]
    prepared = pyloss.BettiTarget.precompute(y[0], 2, **options)
    found = pyloss.betti_matching(X[0], prepared, 2, **options)
    assert rows(found) == rows(pyloss.betti_matching(X[0], y[0], 2, **options))


@pytest.mark.parametrize("kind", ["float", "bool", "labels"])
def test_selection_transfer_and_pickle(kind):
    y, classes = (LABELS, 2) if kind == "labels" else (TARGETS[kind], None)
    options = dict(padding="foreground", filtration="both")
    prepared = pyloss.BettiTarget.precompute(y, num_classes=classes, **options)
    check(X[1:2], y[1:2], prepared[1], **options)
    check(X[2:], y[2:], prepared[-1], **options)
    check(X[:2], y[:2], prepared[:2], **options)
    for indices in ([2, 0, 2], torch.tensor([2, 0, 2])):
        check(X[[2, 0, 2]], y[[2, 0, 2]], prepared.select(indices), **options)
    assert [t.shape[0] for t in prepared] == [1, 1, 1]
    check(X, y, pickle.loads(pickle.dumps(prepared)), **options)
    check(X, y, prepared.to("cpu"), **options)
    moved = prepared.to("meta")
    assert moved.device.type == "meta" and all(t.is_meta for t in moved._images)


def test_selection_by_mask_and_from_the_end():
    y = TARGETS["float"]
    prepared = pyloss.BettiTarget.precompute(y, padding="foreground")
    options = dict(padding="foreground")
    for mask in ([True, False, True], [False] * 3, [True] * 3):
        kept = torch.tensor(mask)
        for given in (mask, kept, kept.numpy()):
            assert torch.equal(prepared.select(given).target, y[kept])
    check(X[[2, 0]], y[[2, 0]], prepared.select([-1, -3]), **options)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(prepared.select(torch.tensor([2, 1], dtype=dtype)).target, y[[2, 1]])
    assert len(prepared.select([])) == 0
    one = torch.tensor(2)
    for item in (one, one.numpy()[()], one.int().numpy()[()]):
        assert torch.equal(prepared[item].target, y[2:])


def test_plain_float_target_is_not_copied():
    prepared = pyloss.BettiTarget.precompute(TARGETS["float"].contiguous())
    assert prepared._images[0] is prepared.target
    half = prepared.select([0])
    assert half._images[0] is half.target


def test_second_derivative_and_empty_batch():
    y, weight = TARGETS["bool"], torch.rand_like(X)
    found = []
    for t in (y, pyloss.BettiTarget.precompute(y)):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(pyloss.betti_matching_loss(x, t), x, create_graph=True)
        found += torch.autograd.grad((grad * weight).sum(), x)
    assert found[0].any() and torch.equal(*found)
    assert pyloss.betti_matching_loss(X[:0], pyloss.BettiTarget.precompute(y)[:0]) == 0


def test_module_with_base_loss():
    y = TARGETS["float"]
    criterion = pyloss.BettiMatchingLoss(base_loss=torch.nn.MSELoss(), alpha=0.25)
    assert torch.equal(criterion(X, pyloss.BettiTarget.precompute(y)), criterion(X, y))


@pytest.mark.parametrize("padding", [None, "foreground"])
def test_compile(padding):
    x = X.clone().requires_grad_()
    prepared = pyloss.BettiTarget.precompute(TARGETS["bool"], padding=padding)

    def f(t):
        return pyloss.betti_matching_loss(t, prepared, padding=padding)

    value = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    exact = f(x)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(exact, x))


def test_reference_backend():
    with pyloss.backend("reference"):
        check(X, TARGETS["bool"], pyloss.BettiTarget.precompute(TARGETS["bool"]))


T = pyloss.BettiTarget.precompute(TARGETS["bool"], padding="background")
PLAIN = pyloss.BettiTarget.precompute(TARGETS["bool"])
make = pyloss.BettiTarget.precompute


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "in advance for filtration='superlevel', got 'sublevel'",
         lambda: pyloss.betti_matching_loss(X, PLAIN, filtration="sublevel")),
        (ValueError, "for filtration='superlevel', got 'both'",
         lambda: pyloss.betti_matching_loss(X, PLAIN, filtration="both")),
        (ValueError, "for padding='background', got None",
         lambda: pyloss.betti_matching_loss(X, T)),
        (ValueError, "for padding=None, got 'foreground'",
         lambda: pyloss.betti_matching(X, PLAIN, padding="foreground")),
        (ValueError, "for dims=.0, 1., got .1.",
         lambda: pyloss.betti_matching_loss(X, PLAIN, dims=[1])),
        (ValueError, "for spatial_dims=2, got 1", lambda: pyloss.betti_matching(X, PLAIN, 1)),
        (ValueError, "same shape, got .2, 2, 9, 8. and a BettiTarget for .3, 2, 9, 8.",
         lambda: pyloss.betti_matching_loss(X[:2], PLAIN)),
        (ValueError, "same shape", lambda: pyloss.betti_matching(X[..., :3], PLAIN)),
        (RuntimeError, "same device", lambda: pyloss.betti_matching_loss(X, PLAIN.to("meta"))),
        (ValueError, "target must not contain NaN",
         lambda: pyloss.betti_matching_loss(X, make(X * torch.nan))),
        (ValueError, "require a gradient", lambda: make(X.clone().requires_grad_())),
        (TypeError, "target must be a Tensor", lambda: make([1.0])),
        (ValueError, "target must be \\(N, C", lambda: make(X[0, 0])),
        (ValueError, "target has a spatial size of 0", lambda: make(X[..., :0])),
        (ValueError, "1, 2 or 3, got 4", lambda: make(X[None, None])),
        (ValueError, "'both'", lambda: make(X, filtration="up")),
        (ValueError, "dims must be", lambda: make(X, dims=[2])),
        (ValueError, "padding must be", lambda: make(X, padding="zero")),
        (ValueError, "dtype must be", lambda: make(X, dtype=torch.int32)),
        (IndexError, "Target 1 is out of bounds", lambda: make(LABELS, num_classes=1)),
        (ValueError, "must be integers", lambda: make(X[:, 0], num_classes=2)),
        (ValueError, "at least 1", lambda: make(LABELS, num_classes=0)),
        (TypeError, "num_classes", lambda: make(LABELS, num_classes=2.0)),
        (ValueError, "class indices must be", lambda: make(LABELS, 1, num_classes=2)),
        (IndexError, "item 3 of a target of 3", lambda: PLAIN[3]),
        (TypeError, "see select", lambda: PLAIN[[0, 1]]),
        (TypeError, "see select", lambda: PLAIN[torch.tensor(True)]),
        (TypeError, "see select", lambda: PLAIN[torch.tensor(True).numpy()[()]]),
        (TypeError, "integers or a bool mask, got torch.float32", lambda: PLAIN.select([0.0])),
        (ValueError, "one dimension, got shape .1, 2.", lambda: PLAIN.select([[0, 1]])),
        (ValueError, "a mask of 2 entries for a target of 3", lambda: PLAIN.select([True, False])),
        (IndexError, "item 3 of a target of 3", lambda: PLAIN.select([0, 3])),
        (IndexError, "item -4 of a target of 3", lambda: PLAIN.select(torch.tensor([-4]))),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
