"""soft_dice_loss and dice_cross_entropy_loss: formulas, targets, half types, MONAI, errors.

The judge is `dice_formula` below, loops in float64, and MONAI where installed.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import pyloss
from pyloss.functional import dice_cross_entropy_loss, soft_dice_loss

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SPATIAL = [(), (7,), (5, 6), (3, 4, 5), (2, 3, 2, 3)]


def make_sample(n=2, c=3, spatial=(5, 6), dtype=F64):
    """Logits and class indices (N, *)."""
    logits = torch.randn(n, c, *spatial, dtype=dtype)
    return logits, torch.randint(max(c, 2), (n, *spatial))


def one_hot(labels, classes):
    return F.one_hot(labels, classes).movedim(-1, 1)


def dice_formula(p, t, *, squared=False, jaccard=False, smooth_nr=1e-5, smooth_dr=1e-5):
    """Losses (N, C) of float64 probabilities and targets."""
    out = torch.empty(p.shape[:2], dtype=F64)
    for n, c in itertools.product(*map(range, p.shape[:2])):
        a, b = p[n, c].double(), t[n, c].double()
        inside = (a * b).sum()
        whole = (a**2 + b**2).sum() if squared else (a + b).sum()
        if jaccard:
            whole = 2 * (whole - inside)
        out[n, c] = 1 - (2 * inside + smooth_nr) / (whole + smooth_dr)
    return out


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("jaccard", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_formula(squared, jaccard, spatial):
    x, y = make_sample(spatial=spatial)
    p, t = x.softmax(1), one_hot(y, 3)
    options = dict(squared_pred=squared, jaccard=jaccard, smooth_nr=0.3, smooth_dr=0.2)
    expected = dice_formula(p, t, squared=squared, jaccard=jaccard, smooth_nr=0.3, smooth_dr=0.2)
    for reduction in ("none", "mean", "sum"):
        ours = soft_dice_loss(x, y, softmax=True, reduction=reduction, **options)
        want = expected if reduction == "none" else getattr(expected, reduction)()
        torch.testing.assert_close(ours, want)
        torch.testing.assert_close(soft_dice_loss(p, t, reduction=reduction, **options), want)
    without = soft_dice_loss(p, y, include_background=False, reduction="none", **options)
    torch.testing.assert_close(without, expected[:, 1:])


@pytest.mark.parametrize("squared", [False, True])
def test_batch_is_one_long_item(squared):
    x, y = make_sample()
    p, t = x.softmax(1), one_hot(y, 3)
    joined = [v.transpose(0, 1).flatten(1)[None] for v in (p, t)]
    expected = dice_formula(*joined, squared=squared)[0]
    options = dict(batch=True, squared_pred=squared)
    ours = soft_dice_loss(p, y, reduction="none", **options)
    assert ours.shape == (3,)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(soft_dice_loss(p, y, **options), expected.mean())


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
        ours = soft_dice_loss(x, target, sigmoid=True, include_background=False)
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
    ours = soft_dice_loss(p, y, weight=[1.0, 2.0], include_background=False, reduction="sum")
    torch.testing.assert_close(ours, (each[:, 1:] * torch.tensor([1.0, 2.0])).sum())


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


def test_empty_shapes():
    assert soft_dice_loss(torch.rand(2, 1, 0, 4), torch.rand(2, 1, 0, 4)) == 0
    none = soft_dice_loss(torch.rand(0, 3, 4), torch.rand(0, 3, 4), reduction="none")
    assert none.shape == (0, 3)
    assert torch.isnan(soft_dice_loss(torch.rand(0, 3, 4), torch.rand(0, 3, 4)))


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
def test_sum_with_cross_entropy(spatial, reduction):
    x, y = make_sample(spatial=spatial)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    options = dict(softmax=True, reduction=reduction)
    ours = dice_cross_entropy_loss(
        x, y, weight=weight, lambda_dice=0.7, lambda_ce=0.2, label_smoothing=0.1, **options
    )
    ce = F.cross_entropy(x, y, weight, label_smoothing=0.1, reduction=reduction)
    expected = 0.7 * soft_dice_loss(x, y, weight=weight, **options) + 0.2 * ce
    torch.testing.assert_close(ours, expected)
    # The background counts in the cross entropy always.
    ours = dice_cross_entropy_loss(x, y, weight=weight, include_background=False, **options)
    dice = soft_dice_loss(x, y, weight=weight[1:], include_background=False, **options)
    ce = F.cross_entropy(x, y, weight, reduction=reduction)
    torch.testing.assert_close(ours, dice + ce)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sum_with_binary_cross_entropy(reduction):
    x = torch.randn(2, 1, 5, 6, dtype=F64)
    mask = torch.rand(2, 1, 5, 6) > 0.5
    weight = torch.tensor([3.0], dtype=F64)
    ours = dice_cross_entropy_loss(x, mask, sigmoid=True, weight=weight, reduction=reduction)
    ce = F.binary_cross_entropy_with_logits(
        x, mask.double(), pos_weight=weight, reduction=reduction
    )
    dice = soft_dice_loss(x, mask, sigmoid=True, reduction=reduction)
    torch.testing.assert_close(ours, dice + ce)


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


@pytest.mark.parametrize(
    "options",
    [{}, dict(squared_pred=True), dict(jaccard=True, batch=True), dict(include_background=False)],
    ids=str,
)
def test_gradcheck(options):
    x, y = make_sample(spatial=(3,))
    x.requires_grad_()
    assert gradcheck(lambda x: soft_dice_loss(x, y, softmax=True, **options), x)
    assert gradgradcheck(lambda x: soft_dice_loss(x, y, softmax=True, **options), x, fast_mode=True)
    assert gradcheck(lambda x: dice_cross_entropy_loss(x, y, softmax=True, **options), x)
    t = torch.rand_like(x).requires_grad_()
    assert gradcheck(lambda x, t: soft_dice_loss(x, t, sigmoid=True, **options), (x, t))
    assert gradcheck(lambda x, t: soft_dice_loss(x, t, soft_label=True, **options), (x, t))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("function", [soft_dice_loss, dice_cross_entropy_loss])
def test_half_types_are_float32_inside(function, dtype):
    x, y = make_sample(spatial=(64, 64), dtype=dtype)
    x.requires_grad_()
    exact = x.detach().float().requires_grad_()
    for target in (y, one_hot(y, 3)):
        options = dict(softmax=True)
        ours, theirs = function(x, target, **options), function(exact, target, **options)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))
        a, b = (torch.autograd.grad(*pair)[0] for pair in ((ours, x), (theirs, exact)))
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=2e-2, atol=1e-6)


def test_autocast_gives_float32():
    x, y = make_sample(dtype=BF16)
    expected = soft_dice_loss(x.float(), y, softmax=True)
    with torch.autocast("cpu", dtype=BF16):
        for function in (soft_dice_loss, dice_cross_entropy_loss):
            assert function(x, y, softmax=True).dtype == F32
            assert function(x.double(), y, softmax=True).dtype == F64
        torch.testing.assert_close(soft_dice_loss(x, y, softmax=True), expected)


def test_float64_target_is_not_rounded():
    p = torch.rand(1, 1, 50)
    t = torch.rand(1, 1, 50, dtype=F64)
    assert soft_dice_loss(p, t).dtype == F32
    torch.testing.assert_close(soft_dice_loss(p, t).double(), dice_formula(p, t).mean())


def test_strides():
    x, y = make_sample(spatial=(4, 6))
    expected = soft_dice_loss(x, y, softmax=True)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(soft_dice_loss(last, y, softmax=True), expected)
    flipped = soft_dice_loss(x.mT.contiguous().mT, y.mT.contiguous().mT, softmax=True)
    torch.testing.assert_close(flipped, expected)


@pytest.mark.parametrize("function", [soft_dice_loss, dice_cross_entropy_loss])
@pytest.mark.parametrize("options", [{}, dict(ignore_index=1, squared_pred=True)], ids=str)
def test_compile(function, options):
    x, y = make_sample(dtype=F32)
    x.requires_grad_()

    def run(x, y):
        return function(x, y, softmax=True, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(x, y), run(x, y)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (ours, expected)))
    y[1] = 7
    if function is soft_dice_loss:
        assert compiled(x, y).isnan()
    else:  # the cross entropy looks at every label on the CPU
        with pytest.raises(IndexError, match="Target 7 is out of bounds"):
            compiled(x, y)


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


def test_threads_do_not_show(keep_num_threads):
    x, y = make_sample(spatial=(128, 130), dtype=F32)
    values = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values.append(soft_dice_loss(x, y, softmax=True, squared_pred=True))
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


# --- modules ---------------------------------------------------------------------------------

MODULES = {
    "dice": lambda: pyloss.nn.SoftDiceLoss(softmax=True, squared_pred=True, weight=[1, 2, 3]),
    "dice_ce": lambda: pyloss.nn.DiceCELoss(softmax=True, weight=torch.ones(3), lambda_ce=0.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    module = MODULES[name]()
    x, y = make_sample(dtype=F32)
    function = soft_dice_loss if name == "dice" else dice_cross_entropy_loss
    expected = function(x, y, weight=module.weight, **module.options)
    for clone in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x, y), expected)
        assert repr(clone) == repr(module)
    assert "softmax=True" in repr(module)
    assert list(module.state_dict()) == ["weight"]
    assert module.double()(x.double(), y).dtype == F64


def test_module_arguments_are_those_of_the_function():
    import inspect

    for module, function in (
        (pyloss.nn.SoftDiceLoss, soft_dice_loss),
        (pyloss.nn.DiceCELoss, dice_cross_entropy_loss),
    ):
        ours = dict(inspect.signature(module.__init__).parameters)
        theirs = dict(inspect.signature(function).parameters)
        del ours["self"], theirs["input"], theirs["target"]
        assert list(ours) == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].default == parameter.default, name


# --- errors ----------------------------------------------------------------------------------

X, Y = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "input must be a Tensor", ([1.0], Y), {}),
        (TypeError, "target must be a Tensor", (X, [1]), {}),
        (ValueError, r"\(N, C, \*\)", (X[0, 0, 0], Y), {}),
        (ValueError, "no channels", (X[:, :0], Y), {}),
        (NotImplementedError, "'Long'", (X.long(), Y), {}),
        (ValueError, r"\[2, 3, 4, 5\] and target \[2, 4, 4\]", (X, Y[..., :4]), {}),
        (ValueError, r"target \[1, 4, 5\]", (X, Y[:1]), {}),
        (ValueError, r"target \[2, 2, 4, 5\]", (X, X[:, :2]), {}),
        (ValueError, r"target \[2, 4, 5\]", (X, Y), dict(to_onehot_y=False)),
        (ValueError, r"target \[2, 3, 4, 5\]", (X, X), dict(to_onehot_y=True)),
        (ValueError, r"target \[2, 3, 4, 5\]", (X[:, :1], X), {}),
        (RuntimeError, "integer dtype such as Long, but got Float", (X, Y.float()), {}),
        (RuntimeError, "but got Bool", (X, Y.bool()), {}),
        (IndexError, "Target 3 is out of bounds", (X, Y + 3), {}),
        (IndexError, "Target -1 is out of bounds", (X, Y - 1), {}),
        (IndexError, "Target -100 is out of bounds", (X, Y - 100), {}),
        (ValueError, "needs class indices", (X, X), dict(ignore_index=1)),
        (ValueError, "at most one of", (X, Y), dict(sigmoid=True, softmax=True)),
        (ValueError, "at most one of", (X, Y), dict(sigmoid=True, other_act=torch.exp)),
        (TypeError, "other_act must be callable", (X, Y), dict(other_act="exp")),
        (ValueError, "one channel", (X[:, :1], Y), dict(softmax=True)),
        (ValueError, "median is not a valid value", (X, Y), dict(reduction="median")),
        (ValueError, "smooth_nr", (X, Y), dict(smooth_nr=-1.0)),
        (TypeError, "smooth_dr", (X, Y), dict(smooth_dr="x")),
        (ValueError, "weight must be", (X, Y), dict(weight=[1.0, 2.0])),
        (ValueError, "2 classes", (X, Y), dict(weight=[1.0] * 3, include_background=False)),
        (ValueError, "weight must be finite and >= 0", (X, Y), dict(weight=[1.0, -1.0, 1.0])),
        (ValueError, "weight must be >= 0", (X, Y), dict(weight=torch.tensor([1.0, -1, 1]))),
        (RuntimeError, "same device", (X, Y.to("meta")), {}),
    ],
)
def test_errors(error, match, args, options):
    with pytest.raises(error, match=match):
        soft_dice_loss(*args, **options)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, "'mean' or 'sum'", (X, Y), dict(reduction="none")),
        (ValueError, "lambda_ce", (X, Y), dict(lambda_ce=-1.0)),
        (ValueError, "lambda_dice", (X, Y), dict(lambda_dice=math.nan)),
        (TypeError, "weight must be a Tensor", (X, Y), dict(weight=[1.0, 1.0, 1.0])),
        (ValueError, "weight must be one number", (X, Y), dict(weight=torch.ones(2))),
        (ValueError, "2 channels", (X[:, :1], Y), dict(label_smoothing=0.1)),
        (ValueError, "target must have the shape", (X, Y[:1]), {}),
        (IndexError, "out of bounds", (X, Y - 100), {}),
    ],
)
def test_errors_of_the_sum(error, match, args, options):
    with pytest.raises(error, match=match):
        dice_cross_entropy_loss(*args, **options)
