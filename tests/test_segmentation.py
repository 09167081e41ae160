"""soft_dice_loss and dice_cross_entropy_loss: forms of the arguments, ignored voxels, MONAI.

`specs/segmentation.py` has what is true of every loss: values, derivatives, dtypes, modules,
errors.
"""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from specs.segmentation import dice_formula, one_hot

import pyloss
from pyloss.functional import dice_cross_entropy_loss, soft_dice_loss

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def make_sample(n=2, c=3, spatial=(5, 6), dtype=F64):
    """Logits and class indices (N, *)."""
    logits = torch.randn(n, c, *spatial, dtype=dtype)
    return logits, torch.randint(max(c, 2), (n, *spatial))


# --- values ----------------------------------------------------------------------------------


def test_forms_of_the_target():
    x, y = make_sample()
    expected = soft_dice_loss(x, one_hot(y, 3).double(), softmax=True)
    for dtype in (torch.bool, torch.uint8, torch.int64, F32, F16):
        assert torch.equal(soft_dice_loss(x, one_hot(y, 3).to(dtype), softmax=True), expected)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        for labels in (y.to(dtype), y.to(dtype)[:, None]):
            assert torch.equal(soft_dice_loss(x, labels, softmax=True), expected)
            same = soft_dice_loss(x, labels, softmax=True, to_onehot_y=True)
            assert torch.equal(same, expected)
            total = dice_cross_entropy_loss(x, labels, softmax=True)
            torch.testing.assert_close(total, expected + F.cross_entropy(x, y))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, F64])
def test_masks_of_one_channel(dtype):
    x = torch.randn(2, 1, 5, 6, dtype=F64)
    mask = (torch.rand(2, 5, 6) > 0.5).to(dtype)
    expected = dice_formula(x.sigmoid(), mask[:, None]).mean()
    for target in (mask, mask[:, None]):
        ours = soft_dice_loss(x, target, sigmoid=True)
        torch.testing.assert_close(ours, expected)


def test_a_square_mask_of_equal_shape_is_not_taken_for_indices():
    """(N, 1, H, W) labels of C = 1 inputs, and one-hot ones where C equals a spatial size."""
    p = torch.rand(2, 2, 2, dtype=F64)
    t = torch.tensor([[[0, 1], [1, 0]]]).expand(2, 2, 2)
    torch.testing.assert_close(soft_dice_loss(p, t, reduction="none"), dice_formula(p, t))


def test_weights():
    x, y = make_sample()
    p = x.softmax(1)
    each = dice_formula(p, one_hot(y, 3))
    for weight in ([0.5, 1, 2.0], torch.tensor([0.5, 1, 2.0]), (0.5, 1, 2)):
        ours = soft_dice_loss(p, y, weight=weight)
        torch.testing.assert_close(ours, (each * torch.tensor([0.5, 1, 2.0])).mean())
    torch.testing.assert_close(soft_dice_loss(p, y, weight=3), 3 * each.mean())
    module = pyloss.nn.SoftDiceLoss(weight=[0.5, 1, 2.0]).double()
    torch.testing.assert_close(module(p, y), soft_dice_loss(p, y, weight=[0.5, 1, 2.0]))
    ours = soft_dice_loss(p, y, weight=[1.0, 2.0], include_background=False, reduction="sum")
    torch.testing.assert_close(ours, (each[:, 1:] * torch.tensor([1.0, 2.0])).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch says where it gets an array in a list
        ours = soft_dice_loss(p, y, weight=np.array([0.5, 1, 2.0]))
    torch.testing.assert_close(ours, (each * torch.tensor([0.5, 1, 2.0])).mean())


def test_other_act():
    x, y = make_sample()
    expected = dice_formula(x.exp(), one_hot(y, 3)).mean()
    torch.testing.assert_close(soft_dice_loss(x, y, other_act=torch.exp), expected)


def test_soft_label():
    """Smallest at p = t, which the plain formula is not; the same for hard targets."""
    t = torch.rand(2, 3, 5, 6, dtype=F64)
    assert soft_dice_loss(t, t, soft_label=True).abs() < 1e-12
    assert soft_dice_loss(t, t) > 0.1
    p = torch.rand(2, 3, 5, 6, dtype=F64)
    inside = 0.5 * (p + t - (p - t).abs()).sum((2, 3))
    expected = 1 - (2 * inside + 1e-5) / ((p + t).sum((2, 3)) + 1e-5)
    torch.testing.assert_close(soft_dice_loss(p, t, soft_label=True), expected.mean())
    hard = t > 0.5
    for options in ({}, dict(squared_pred=True), dict(jaccard=True)):
        torch.testing.assert_close(
            soft_dice_loss(p, hard, soft_label=True, **options), soft_dice_loss(p, hard, **options)
        )


def test_empty_target():
    """A class that nobody has and nobody predicts costs nothing with the default smoothing."""
    zero = torch.zeros(2, 1, 5, 6)
    assert soft_dice_loss(zero, zero) == 0
    assert soft_dice_loss(zero, zero, smooth_nr=0.0) == 1
    p = torch.full((2, 1, 5, 6), 0.5, requires_grad=True)
    loss = soft_dice_loss(p, zero)
    torch.testing.assert_close(loss, torch.tensor(1 - 1e-5 / (15 + 1e-5)))
    loss.backward()
    assert p.grad.isfinite().all() and (p.grad > 0).all()
    assert torch.isnan(soft_dice_loss(zero, zero, smooth_nr=0.0, smooth_dr=0.0))


def test_nan_stays():
    p = torch.rand(2, 3, 4)
    p[1, 2, 3] = math.nan
    loss = soft_dice_loss(p, torch.randint(3, (2, 4)), reduction="none")
    assert loss.isnan().nonzero().tolist() == [[1, 2]]


def test_many_voxels():
    """float32 sums of more ones than float32 can count in single steps."""
    p = torch.ones(1, 1, 1).expand(1, 1, 1 << 25)
    assert soft_dice_loss(p, p, smooth_nr=0.0, smooth_dr=0.0).item() == 0


# --- ignored voxels --------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", [-1, 255, 1])
@pytest.mark.parametrize("options", [{}, dict(batch=True), dict(squared_pred=True)], ids=str)
def test_ignored_voxels_are_as_if_cut_out(options, ignore):
    x, y = make_sample(n=1, spatial=(40,))
    y[0, :11] = ignore
    keep = y[0] != ignore
    cut = x[:, :, keep], y[:, keep]
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        ours = function(x, y, softmax=True, ignore_index=ignore, **options)
        torch.testing.assert_close(ours, function(*cut, softmax=True, **options))
    moved = x.clone()
    moved[..., ~keep] = 9.0
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        a, b = (function(v, y, softmax=True, ignore_index=ignore) for v in (x, moved))
        assert torch.equal(a, b)


def test_ignored_voxels_of_a_mask():
    x = torch.randn(1, 1, 40, dtype=F64, requires_grad=True)
    y = torch.randint(2, (1, 1, 40))
    y[..., :11] = 255
    for reduction in ("mean", "sum"):
        options = dict(sigmoid=True, reduction=reduction)
        ours = dice_cross_entropy_loss(x, y, ignore_index=255, **options)
        cut = dice_cross_entropy_loss(x[..., 11:], y[..., 11:], **options)
        torch.testing.assert_close(ours, cut)
    (grad,) = torch.autograd.grad(ours, x)
    assert not grad[..., :11].any() and grad[..., 11:].all()


def test_ignoring_nothing_changes_nothing():
    x, y = make_sample()
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        expected = function(x, y, softmax=True)
        for ignore in (-100, 255):
            ours = function(x, y, softmax=True, ignore_index=ignore)
            torch.testing.assert_close(ours, expected)


# --- with cross entropy ----------------------------------------------------------------------


def test_one_hot_target_of_cross_entropy():
    x, y = make_sample()
    expected = dice_cross_entropy_loss(x, y, softmax=True)
    for dtype in (torch.bool, torch.uint8, F64):
        ours = dice_cross_entropy_loss(x, one_hot(y, 3).to(dtype), softmax=True)
        torch.testing.assert_close(ours, expected)


# --- MONAI -----------------------------------------------------------------------------------


def monai_samples():
    """(options of the module, input, target) for DiceLoss."""
    x, y = make_sample(spatial=(4, 5, 3))
    labels = y[:, None]
    soft = torch.rand_like(x)
    flags = ("squared_pred", "jaccard", "batch")
    for values in itertools.product([False, True], repeat=3):
        options = dict(zip(flags, values))
        for reduction in ("mean", "sum", "none"):
            yield dict(softmax=True, to_onehot_y=True, reduction=reduction, **options), x, labels
        yield dict(sigmoid=True, include_background=False, **options), x, soft
        yield dict(softmax=True, soft_label=True, **options), x, soft
        mask = (soft[:, :1] > 0.5).double()
        yield dict(sigmoid=True, smooth_nr=0.5, smooth_dr=2.0, **options), x[:, :1], mask
    yield dict(softmax=True, to_onehot_y=True, weight=[0.5, 1.0, 2.0]), x, labels
    yield dict(other_act=torch.exp, include_background=False, weight=[0.5, 2.0]), x, soft


def test_dice_equals_monai():
    losses = pytest.importorskip("monai.losses")
    for options, x, y in monai_samples():
        theirs = losses.DiceLoss(**options)(x, y)
        ours = pyloss.nn.SoftDiceLoss(**options)(x, y)
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), msg=str(options))


def test_dice_ce_equals_monai():
    losses = pytest.importorskip("monai.losses")
    x, y = make_sample(spatial=(4, 5, 3))
    hot = one_hot(y, 3).double()
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    common = dict(lambda_dice=0.3, lambda_ce=0.8)
    cases = [
        (dict(softmax=True, to_onehot_y=True, label_smoothing=0.1), x, y[:, None]),
        (dict(softmax=True, to_onehot_y=True, weight=weight, reduction="sum"), x, y[:, None]),
        (dict(softmax=True, to_onehot_y=True, weight=weight, include_background=False), x,
         y[:, None]),
        (dict(softmax=True, batch=True, jaccard=True, squared_pred=True), x, hot),
        (dict(sigmoid=True), x, torch.rand_like(x)),
        (dict(sigmoid=True, weight=weight[2:]), x[:, :1], hot[:, :1]),
    ]  # fmt: skip
    for options, logits, target in cases:
        theirs = losses.DiceCELoss(**options, **common)(logits, target)
        ours = pyloss.nn.DiceCELoss(**options, **common)(logits, target)
        torch.testing.assert_close(ours, theirs, msg=str(options))


# --- gradients, dtypes, compile --------------------------------------------------------------


def test_float64_target_is_not_rounded():
    p = torch.rand(1, 1, 50)
    t = torch.rand(1, 1, 50, dtype=F64)
    assert soft_dice_loss(p, t).dtype == F32
    torch.testing.assert_close(soft_dice_loss(p, t).double(), dice_formula(p, t).mean())


def test_wrong_class_in_compiled_code_poisons_its_item_only():
    x, y = make_sample(dtype=F32)
    x.requires_grad_()
    y[1, 0, 0] = 3

    def run(x, y):
        return soft_dice_loss(x, y, softmax=True, reduction="none")

    loss = torch.compile(run, fullgraph=True, backend="aot_eager")(x, y)
    assert loss.isnan().tolist() == [[False] * 3, [True] * 3]
    (grad,) = torch.autograd.grad(loss[0].sum() + loss[1].sum(), x)
    assert grad[0].isfinite().all() and grad[1].isnan().all()


def test_wrong_class_in_compiled_code_raises_where_the_cross_entropy_looks():
    x, y = make_sample(dtype=F32)
    y[1] = 7
    compiled = torch.compile(dice_cross_entropy_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        compiled(x, y, softmax=True)


@pytest.mark.slow
def test_inductor():
    x, y = make_sample(dtype=F32)
    ours = torch.compile(soft_dice_loss, fullgraph=True)(x, y, softmax=True)
    torch.testing.assert_close(ours, soft_dice_loss(x, y, softmax=True))


def test_func_transforms():
    x, y = make_sample(n=3)
    each = torch.func.vmap(lambda x, t: soft_dice_loss(x[None], t[None], sigmoid=True))
    t = one_hot(y, 3)
    expected = soft_dice_loss(x, t, sigmoid=True, reduction="none").mean(1)
    torch.testing.assert_close(each(x, t), expected)


# --- labels of narrow dtypes -------------------------------------------------------------------


def compiled_anew(function):
    torch.compiler.reset()  # one graph a dtype is soon one too many
    return torch.compile(function, backend="eager", fullgraph=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("classes", [100, 200, 300, 70_000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_more_classes_than_the_label_dtype_holds(dtype, classes, compiled):
    x = torch.randn(1, classes, 6, dtype=F64)
    labels = torch.tensor([[0, 4, 99, 1, 2, 3]])
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        call = compiled_anew(function) if compiled else function
        for ignored in (None, 255) if compiled else (None, -1, 3, 255, 2**40):
            options = dict(softmax=True, ignore_index=ignored)
            expected = function(x, labels, **options)
            assert torch.equal(call(x, labels.to(dtype), **options), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_ignored_class_is_not_wrapped(compiled):
    """255 is no -1 of uint8, and -1 no 255 of int8."""
    x = torch.randn(1, 256, 4, dtype=F64)
    high = torch.tensor([[0, 255, 1, 2]], dtype=torch.uint8)
    low = torch.tensor([[0, -1, 1, 2]], dtype=torch.int8)
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        call = compiled_anew(function) if compiled else function
        found = call(x, high, softmax=True, ignore_index=-1)
        assert torch.equal(found, function(x, high.long(), softmax=True))
        if compiled and function is soft_dice_loss:  # in torch operations: NaN, not an error
            assert call(x, low, softmax=True, ignore_index=255).isnan()
        else:
            with pytest.raises(IndexError, match="Target -1"):
                call(x, low, softmax=True, ignore_index=255)


def test_an_ignored_value_of_a_mask_is_not_wrapped():
    x = torch.randn(2, 1, 3, dtype=F64)
    mask = torch.tensor([[0, 1, 255], [1, 0, 0]], dtype=torch.uint8)
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        found = function(x, mask, sigmoid=True, ignore_index=-1, validate=False)
        assert torch.equal(found, function(x, mask.double(), sigmoid=True, validate=False))


@pytest.mark.parametrize("channels", [1, 3])
def test_all_voxels_ignored(channels):
    """As F.cross_entropy: the mean of nothing is NaN, and its gradient 0."""
    x = torch.randn(2, channels, 4, 5, requires_grad=True)
    y = torch.full((2, 4, 5), 255)
    options = dict(sigmoid=True) if channels == 1 else dict(softmax=True)
    loss = dice_cross_entropy_loss(x, y, ignore_index=255, **options)
    assert loss.isnan()
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    total = dice_cross_entropy_loss(x, y, ignore_index=255, reduction="sum", **options)
    assert total == 0 and not torch.autograd.grad(total, x)[0].any()
    dice = soft_dice_loss(x, y, ignore_index=255, **options)
    assert dice == 0 and not torch.autograd.grad(dice, x)[0].any()


def test_one_channel_without_background_warns():
    x, y = torch.randn(1, 1, 4), torch.ones(1, 4)
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        with pytest.warns(UserWarning, match="include_background=False has no effect"):
            found = function(x, y, sigmoid=True, include_background=False)
        assert torch.equal(found, function(x, y, sigmoid=True))


# --- ranges, empty, modules --------------------------------------------------------------------

ALWAYS = dict(validate=True)


def test_masks_of_bytes_gave_a_negative_loss():
    """The number of the report, and that nothing else has changed it."""
    p, mask = torch.full((1, 1, 4), 0.6), torch.tensor([[[0, 255, 0, 255]]])
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values from 0 to 255"):
        soft_dice_loss(p, mask)
    loss = soft_dice_loss(p, mask, validate=False)
    torch.testing.assert_close(loss.item(), 1 - 2 * 1.2 * 255 / (2.4 + 510))


def test_what_is_in_range_is_not_reported():
    x, y = make_sample()
    hot = one_hot(y, 3)
    p = x.softmax(1)
    marked = y.clone()
    marked[:, 0] = 255
    mask = (marked == 1).long()
    mask[:, 0] = 255
    for options in (dict(), ALWAYS):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            soft_dice_loss(p, y, **options)
            soft_dice_loss(p * 1.0002, hot, **options)  # rounding, or a resize
            soft_dice_loss(x, hot, softmax=True, **options)
            soft_dice_loss(x, y, other_act=torch.exp, **options)
            soft_dice_loss(p, marked, ignore_index=255, **options)
            soft_dice_loss(p[:, :1], mask, ignore_index=255, **options)
            dice_cross_entropy_loss(x[:, :1], mask, sigmoid=True, ignore_index=255, **options)
            soft_dice_loss(p[:0], hot[:0], **options)
            soft_dice_loss(x, y, validate=False)
    assert soft_dice_loss(p, hot.double() * math.nan).isnan()


def test_graphs_and_transforms_are_not_looked_into():
    x, y = make_sample(dtype=F32)
    bad = one_hot(y, 3) * 255.0
    expected = soft_dice_loss(x, bad, validate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for options in (dict(), ALWAYS):
            call = torch.compile(soft_dice_loss, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(call(x, bad, **options), expected)
        found = torch.func.vmap(lambda a, b: soft_dice_loss(a[None], b[None]))(x, bad)
        torch.testing.assert_close(found.mean(), expected)


@pytest.mark.parametrize("smooth_nr", [1e-5, 0.0])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_empty_zero(channels, compiled, smooth_nr):
    """Loss and gradient 0 where nothing is left, whatever comes from above; else no change."""
    x = torch.randn(2, channels, 4, 5, requires_grad=True)
    labels = torch.randint(max(channels, 2), (2, 4, 5))
    nothing, half = torch.full_like(labels, 255), labels.clone()
    half[1] = 255
    options = dict(sigmoid=True) if channels == 1 else dict(softmax=True)
    options |= dict(ignore_index=255, smooth_nr=smooth_nr)
    for function in (soft_dice_loss, dice_cross_entropy_loss):
        call = compiled_anew(function) if compiled else function
        loss = call(x, nothing, empty="zero", **options)
        assert loss == 0
        for factor in (1.0, math.inf):
            (grad,) = torch.autograd.grad(loss * factor, x, retain_graph=True)
            assert torch.equal(grad, torch.zeros_like(x))
        zero = call(x, labels, empty="zero", **options)
        torch.testing.assert_close(zero, function(x, labels, **options))
        # Of two items one is left: the Dice loss of the other is 0, the cross entropy has no row.
        found = call(x, half, empty="zero", **options)
        whole = call(x, half, empty="zero", batch=True, **options)
        torch.testing.assert_close(whole, function(x, half, batch=True, **options))
        dice = soft_dice_loss(x[:1], half[:1], **options) / 2
        if function is soft_dice_loss:
            torch.testing.assert_close(found, dice)
        else:
            ce = dice_cross_entropy_loss(x[:1], half[:1], lambda_dice=0.0, **options)
            torch.testing.assert_close(found, dice + ce)
        assert call(x[:0], labels[:0], empty="zero", **options) == 0
