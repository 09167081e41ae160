"""Generalised Dice, Tversky, focal losses and clDice: MONAI, ignored voxels, extremes, memory.

`specs/segmentation_family.py` has what is true of every loss: values, derivatives, dtypes, modules,
errors.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from specs.segmentation import one_hot
from specs.segmentation_family import heights, skeleton_reference

import pyloss
from pyloss.functional import (
    cldice_loss,
    dice_focal_loss,
    generalized_dice_loss,
    segmentation_focal_loss,
    sigmoid_focal_loss,
    soft_skeleton,
    tversky_loss,
)
from pyloss.functional._ranges import bounds, outside
from pyloss.functional._skeleton import mask_skeleton

F64 = torch.float64
ACTIVATIONS = [dict(softmax=True), dict(sigmoid=True), dict(other_act=torch.sigmoid)]


def problem(channels=3, spatial=(5, 6), items=2):
    """Logits (N, C, *), class indices (N, 1, *), soft targets (N, C, *)."""
    x = torch.randn(items, channels, *spatial, dtype=F64)
    y = torch.randint(max(channels, 2), (items, 1, *spatial))
    return x, y, torch.rand_like(x)


# --- MONAI -----------------------------------------------------------------------------------


def overlap_cases():
    """Options of every overlap loss, logits, target; to_onehot_y where it is class indices."""
    x, y, soft = problem(spatial=(4, 5, 3))
    hot = one_hot(y[:, 0], 3).double()
    for reduction, batch in itertools.product(("mean", "sum", "none"), (False, True)):
        common = dict(reduction=reduction, batch=batch)
        yield dict(softmax=True, to_onehot_y=True, **common), x, y
        yield dict(softmax=True, include_background=False, **common), x, hot
        yield dict(sigmoid=True, smooth_nr=0.5, smooth_dr=2.0, **common), x[:, :1], hot[:, :1]
    for batch, act in itertools.product((False, True), ACTIVATIONS):
        yield dict(batch=batch, soft_label=True, **act), x, soft
        yield dict(batch=batch, include_background=False, **act), x, soft
    missing = y.clamp(max=1)  # the last class is in no item
    yield dict(softmax=True, to_onehot_y=True), x, missing
    yield dict(softmax=True, to_onehot_y=True, batch=True), x, 0 * missing


def assert_equals_monai(ours, theirs, options, x, target):
    """Value and gradient. MONAI's weights, alphas and logits of a focal loss are float32."""
    x = x.detach().requires_grad_()
    a, b = (make(**options)(x, target) for make in (ours, theirs))
    grads = (torch.autograd.grad(value.sum(), x)[0] for value in (a, b))
    close = dict(rtol=2e-5, atol=1e-6)
    b = b.double().reshape(a.shape)
    torch.testing.assert_close(a, b, **close, msg=lambda m: f"{options}\n{m}")
    torch.testing.assert_close(*grads, **close, msg=lambda m: f"gradient, {options}\n{m}")


def test_generalized_dice_equals_monai():
    losses = pytest.importorskip("monai.losses")
    for kind in ("square", "simple", "uniform"):
        for options, x, y in overlap_cases():
            both = pyloss.nn.GeneralizedDiceLoss, losses.GeneralizedDiceLoss
            assert_equals_monai(*both, dict(options, w_type=kind), x, y)


def test_tversky_equals_monai():
    losses = pytest.importorskip("monai.losses")
    for options, x, y in overlap_cases():
        for factors in (dict(alpha=0.3, beta=0.7), dict(alpha=1.0, beta=0.0)):
            both = pyloss.nn.TverskyLoss, losses.TverskyLoss
            assert_equals_monai(*both, {**options, **factors}, x, y)
    x, y, _ = problem()
    y[0, :, :2] = 255
    marked = dict(softmax=True, to_onehot_y=True, ignore_index=255)
    assert_equals_monai(pyloss.nn.TverskyLoss, losses.TverskyLoss, marked, x, y)


FOCAL = [
    dict(),
    dict(gamma=0.0, alpha=0.75),
    dict(gamma=1.5, alpha=[0.2, 0.4, 0.9]),
    dict(gamma=0.5, weight=[0.5, 1.0, 2.0]),
    dict(weight=3.0, alpha=0.1),
]


@pytest.mark.parametrize("use_softmax", [False, True])
def test_focal_equals_monai(use_softmax):
    losses = pytest.importorskip("monai.losses")
    x, y, soft = problem()
    both = pyloss.nn.SegmentationFocalLoss, losses.FocalLoss
    for options, reduction in itertools.product(FOCAL, ("mean", "sum", "none")):
        options = dict(options, reduction=reduction, use_softmax=use_softmax)
        assert_equals_monai(*both, dict(options, to_onehot_y=True), x, y)
        assert_equals_monai(*both, options, x, soft)
    front = dict(include_background=False, weight=[1.0, 2.0], use_softmax=use_softmax)
    assert_equals_monai(*both, dict(front, to_onehot_y=True), x, y)
    assert_equals_monai(*both, dict(front, alpha=[0.3, 0.4]), x, one_hot(y[:, 0], 3).double())
    if not use_softmax:
        assert_equals_monai(*both, dict(alpha=0.3), x[:, :1], (soft[:, :1] > 0.5).double())


def test_dice_focal_equals_monai():
    losses = pytest.importorskip("monai.losses")
    x, y, soft = problem(spatial=(4, 5, 3))
    factors = dict(lambda_dice=0.3, lambda_focal=0.8, gamma=1.5)
    both = pyloss.nn.DiceFocalLoss, losses.DiceFocalLoss
    for reduction, batch in itertools.product(("mean", "sum", "none"), (False, True)):
        options = dict(reduction=reduction, batch=batch, alpha=0.3, **factors)
        assert_equals_monai(*both, dict(softmax=True, to_onehot_y=True, **options), x, y)
        assert_equals_monai(*both, dict(sigmoid=True, jaccard=True, **options), x, soft)
        front = dict(softmax=True, include_background=False, weight=[1.0, 2.0], **options)
        assert_equals_monai(*both, front, x, one_hot(y[:, 0], 3).double())
        assert_equals_monai(*both, dict(sigmoid=True, squared_pred=True, **options), x[:, :1],
                            soft[:, :1])  # fmt: skip
    both = pyloss.nn.GeneralizedDiceFocalLoss, losses.GeneralizedDiceFocalLoss
    for reduction, kind in itertools.product(("mean", "sum", "none"), ("square", "uniform")):
        options = dict(reduction=reduction, w_type=kind, lambda_gdl=0.3, weight=[0.5, 1.0, 2.0])
        assert_equals_monai(*both, dict(softmax=True, to_onehot_y=True, **options), x, y)


@pytest.mark.parametrize("spatial", [(9, 8), (5, 6, 7)])
def test_cldice_equals_monai(spatial):
    losses = pytest.importorskip("monai.losses")
    x, y, soft = problem(spatial=spatial)
    both = pyloss.nn.SoftclDiceLoss, losses.SoftclDiceLoss
    pair = pyloss.nn.SoftDiceclDiceLoss, losses.SoftDiceclDiceLoss
    for reduction, steps in (("mean", 0), ("sum", 3), ("none", 10)):
        for act, front in itertools.product(ACTIVATIONS, (True, False)):
            options = dict(iter_=steps, reduction=reduction, include_background=front, **act)
            assert_equals_monai(*both, dict(options, to_onehot_y=True), x, y)
            assert_equals_monai(*both, dict(options, smooth_nr=0.1, smooth=0.01), x, soft)
            if reduction != "none":
                assert_equals_monai(*pair, dict(options, to_onehot_y=True, alpha=0.3), x, y)


# --- skeletons -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1, 9, 12), (1, 2, 6, 5, 7)])
def test_the_skeleton_of_a_mask_is_that_of_its_numbers(shape):
    mask = torch.rand(shape) > 0.15
    for steps in (0, 2):
        found = soft_skeleton(mask, steps)
        assert found.dtype == torch.bool
        assert torch.equal(found, soft_skeleton(mask.float(), steps) > 0)
        mapped = torch.func.vmap(functools.partial(soft_skeleton, iter_=steps))(mask[None])
        assert torch.equal(found, mapped[0])
    assert torch.equal(mask_skeleton(mask), soft_skeleton(mask, 9))


def test_a_full_mask_ends_and_is_no_empty_one():
    full = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    empty = ~full
    values = [pyloss.metrics.cl_dice(*pair).item() for pair in
              ((full, full), (full, empty), (empty, full), (empty, empty))]  # fmt: skip
    assert values == [1.0, 0.0, 0.0, 1.0]


def test_the_gradient_of_a_skeleton_is_shared_out_once_where_values_are_equal():
    """A plateau: which of the equal voxels gets it is open, how much is not."""
    x = heights(1, 1, 6, 7).mul(4).floor().div(4).requires_grad_()
    weight = torch.rand_like(x)
    (ours,) = torch.autograd.grad((soft_skeleton(x, 1) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((skeleton_reference(x, 1) * weight).sum(), x)
    torch.testing.assert_close(ours.sum(), theirs.sum())


def kept_bytes(call) -> int:
    """Of the tensors that autograd keeps, each once."""
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # noqa: F841  alive, so that no address is used again
    return sum(kept.values())


def test_what_the_backward_keeps():
    x = torch.rand(1, 1, 32, 32, requires_grad=True)
    steps, size = 5, 4 * x.numel()
    assert kept_bytes(lambda: soft_skeleton(x, steps)) == (3 * (steps + 1)) * size
    assert kept_bytes(lambda: sigmoid_focal_loss(x, x.detach() > 0.5, alpha=None)) == 2.25 * size


# --- focal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_extreme_logits(gamma):
    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], requires_grad=True)
    for target in (torch.zeros(5, dtype=torch.bool), torch.ones(5)):
        loss = sigmoid_focal_loss(x, target, alpha=None, gamma=gamma)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        wrong = x > 0 if target.dtype == torch.bool else x < 0
        torch.testing.assert_close(loss[wrong], x[wrong].abs())
        assert (loss[~wrong & (x != 0)] < 1e-30).all()
        torch.testing.assert_close(grad[wrong].abs(), torch.ones(2))
        assert (grad[~wrong & (x != 0)].abs() < 1e-19).all()


@pytest.mark.parametrize("use_softmax", [False, True])
def test_ignored_voxels_are_as_if_cut_out(use_softmax):
    x, y = torch.randn(1, 3, 40, dtype=F64), torch.randint(3, (1, 40))
    y[0, :11] = 255
    for reduction in ("mean", "sum"):
        options = dict(use_softmax=use_softmax, reduction=reduction)
        for back in (True, False):
            ours = segmentation_focal_loss(
                x, y, ignore_index=255, include_background=back, **options
            )
            cut = segmentation_focal_loss(
                x[..., 11:], y[:, 11:], include_background=back, **options
            )
            torch.testing.assert_close(ours, cut)
    for function in (generalized_dice_loss, tversky_loss, dice_focal_loss):
        ours = function(x, y, softmax=True, ignore_index=255)
        torch.testing.assert_close(ours, function(x[..., 11:], y[:, 11:], softmax=True))


def test_softmax_of_class_indices_is_the_focal_loss_of_pyloss():
    x, y, _ = problem()
    ours = segmentation_focal_loss(x, y, use_softmax=True, gamma=1.5)
    torch.testing.assert_close(3 * ours, pyloss.focal_loss(x, y[:, 0], 1.5))


def test_infinite_logits_of_the_background_do_not_reach_the_foreground():
    x = torch.tensor([[[0.0, 1.0], [-math.inf, 0.5], [2.0, 0.0]]], requires_grad=True)
    options = dict(use_softmax=True, include_background=False)
    loss = segmentation_focal_loss(x, torch.tensor([[0, 1]]), **options)
    assert loss.isfinite()


def test_alpha_that_weighs_nothing_warns():
    x, y, _ = problem()
    options = dict(use_softmax=True, include_background=False)
    with pytest.warns(UserWarning, match="alpha has no effect"):
        found = segmentation_focal_loss(x, y, alpha=0.3, **options)
    assert torch.equal(found, segmentation_focal_loss(x, y, **options))


@pytest.mark.parametrize("function", [cldice_loss, dice_focal_loss, generalized_dice_loss])
def test_wrong_class_in_compiled_code_poisons_its_item_only(function):
    x, y, _ = problem()
    y[1, 0, 0, 0] = 3

    def run(x, y):
        return function(x, y, softmax=True, reduction="none")

    # What a graph does, without making one: a transform cannot look at the numbers either.
    loss = torch.func.vmap(lambda x, y: run(x[None], y[None])[0])(x, y)
    assert loss[0].isfinite().all() and loss[1].isnan().all()


def test_tversky_with_its_defaults_is_dice():
    x, y, _ = problem()
    dice = pyloss.functional.soft_dice_loss(x, y, softmax=True, smooth_nr=0.0, smooth_dr=0.0)
    ours = tversky_loss(x, y, softmax=True, smooth_nr=0.0, smooth_dr=0.0)
    torch.testing.assert_close(ours, dice)
    # Where the loss is 0 the root has no slope; the gradient is not NaN.
    p = one_hot(y[:, 0], 3).double().requires_grad_()
    (grad,) = torch.autograd.grad(tversky_loss(p, y, gamma=0.75), p)
    assert not grad.any()


# --- range -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64, torch.int16])
@pytest.mark.parametrize("values", [[0, 1, 1], [1, -2, 3], [-3, -2, -1], [5]])
def test_bounds_of_every_dtype_and_sign(values, dtype):
    x = torch.tensor(values, dtype=dtype)
    for seen in (x, x.repeat(3, 2).t()[::2]):
        assert bounds(seen) == (min(values), max(values))


def test_bounds_of_what_is_no_common_number():
    inf, nan = math.inf, math.nan
    assert bounds(torch.tensor([-0.0, 1e-45, inf])) == (0.0, inf)
    assert bounds(torch.tensor([-inf, 1.0])) == (-inf, 1.0)
    for value in (nan, -nan):
        for other in (0.0, -5.0, 5.0):
            assert not outside(bounds(torch.tensor([other, value])))
