"""Every line of the list of what fused_cross_entropy shares with F.cross_entropy.

``F.cross_entropy = pyloss.fused_cross_entropy`` must be safe: the same results, result dtypes and
shapes, and the same errors.  The deliberate differences are in the last section.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import TORCH

import pyloss
from pyloss.testing import make_logits, make_target

F_CE = F.cross_entropy


def _both(x, target, *args, **kwargs):
    """Compare value, dtype, shape and gradient of the two functions."""
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    ours = pyloss.fused_cross_entropy(a, target, *args, **kwargs)
    theirs = F_CE(b, target, *args, **kwargs)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    half = x.dtype in (torch.bfloat16, torch.float16)
    # PyTorch rounds to half several times on the way.
    tolerance = dict(rtol=4 * torch.finfo(x.dtype).eps, atol=1e-2) if half else {}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
    upstream = torch.ones_like(theirs)
    (g,) = torch.autograd.grad(ours, a, upstream)
    (h,) = torch.autograd.grad(theirs, b, upstream)
    torch.testing.assert_close(g, h, equal_nan=True, **tolerance)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "shape", [(5,), (4, 5), (1, 1), (4, 5, 1), (4, 5, 3), (2, 5, 3, 4), (2, 3, 2, 1, 2), (0, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_reductions(shape, smoothing, reduction, dtype):
    x = make_logits(shape, dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    weight = torch.linspace(0.5, 2.0, classes).to(dtype)
    targets = [make_target(shape), make_target(shape, kind="prob").to(dtype)]
    if len(shape) > 1:
        targets.append(make_target(shape, ignore_fraction=0.5))
    for target in targets:
        for w in (None, weight):
            _both(x, target, weight=w, reduction=reduction, label_smoothing=smoothing)


# Indices of maps are left out: F.cross_entropy itself has no such call.
NO_CLASSES = [
    ((5, 0), torch.full((5,), -100)),
    ((0, 0), torch.zeros(0, dtype=torch.int64)),
    ((0,), torch.tensor(-100)),
    *((shape, torch.zeros(shape)) for shape in [(5, 0), (0, 0), (0,), (2, 0, 3), (0, 0, 3)]),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape, target", NO_CLASSES)
def test_no_classes(shape, target, reduction):
    """NaN for a mean of any number of rows, 0 for the rest; at 6750e06 an IndexError."""
    options = [{}, dict(weight=torch.zeros(0))]
    if target.is_floating_point():  # smoothed labels are NaN there, even of ignored rows
        options.append(dict(label_smoothing=0.1))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(shape, dtype=dtype)
        y = target.to(dtype) if target.is_floating_point() else target
        for o in options:
            o = {name: v.to(dtype) if name == "weight" else v for name, v in o.items()}
            _both(x, y, reduction=reduction, **o)
            with pyloss.backend("reference"):
                _both(x, y, reduction=reduction, **o)
    torch._dynamo.reset()
    compiled = torch.compile(pyloss.fused_cross_entropy, fullgraph=True, backend="aot_eager")
    x = torch.zeros(shape, requires_grad=True)
    loss = compiled(x, target, reduction=reduction)
    want = F_CE(x, target, reduction=reduction)
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert torch.autograd.grad(loss.sum(), x)[0].shape == shape


def test_no_classes_elsewhere():
    x, y, p = torch.zeros(3, 0), torch.full((3,), -100), torch.zeros(3, 0)
    ce = pyloss.fused_cross_entropy
    for call in (ce, F_CE):
        with pytest.raises(IndexError, match="Target 0 is out of bounds"):
            call(x, torch.zeros(3, dtype=torch.int64))
    assert ce(x, y, empty="zero") == ce(x, p, empty="zero") == 0
    assert ce(x, y, num_items=4) == ce(x, p, num_items=torch.tensor(4.0)) == 0
    assert pyloss.focal_loss(x, y).isnan() and pyloss.focal_loss(x, y, reduction="sum") == 0
    assert pyloss.nn.CompSumLoss(0.0, reduction="none")(x, (y, y, 0.5)).tolist() == [0.0] * 3
    assert torch.vmap(ce)(torch.zeros(2, 3, 0), y.expand(2, 3)).isnan().all()
    with pytest.raises(IndexError, match="no classes"):
        ce(x, y, return_stats=("lse",))
    layer = torch.zeros(3, 2), torch.zeros(0, 2)
    assert pyloss.fused_linear_cross_entropy(*layer, y).isnan()
    assert pyloss.fused_linear_cross_entropy(*layer, p, reduction="sum") == 0


def test_signature():
    ours = list(inspect.signature(pyloss.fused_cross_entropy).parameters.values())
    theirs = list(inspect.signature(F_CE).parameters.values())
    for a, b in zip(ours, theirs):
        assert a.name == b.name and a.default == b.default and a.kind == b.kind
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_types_in_float32(dtype):
    """As flash-attention and cut-cross-entropy return it; rounded, it is that of torch."""
    x, y = make_logits((64, 100), dtype).requires_grad_(), make_target((64, 100))
    rounded = pyloss.fused_cross_entropy(x, y)
    loss = pyloss.fused_cross_entropy(x, y, loss_dtype=torch.float32)
    assert rounded.dtype == dtype and loss.dtype == torch.float32
    torch.testing.assert_close(loss, F_CE(x.float(), y))
    assert rounded == loss.to(dtype) != loss
    grads = [torch.autograd.grad(out, x)[0] for out in (loss, rounded)]
    assert grads[0].dtype == dtype and torch.equal(*grads)


def test_positional_arguments():
    x, y = make_logits((4, 5)), torch.tensor([0, 2, 2, 4])
    w = torch.rand(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _both(x, y, w, None, 2, None, "sum", 0.1)
        _both(x, y, w, None, -100, None, "none")


def test_by_assignment(monkeypatch):
    x, y = make_logits((4, 5)), make_target((4, 5))
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(x, y)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return pyloss.fused_cross_entropy(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", counted)
    torch.testing.assert_close(torch.nn.CrossEntropyLoss(label_smoothing=0.1)(x, y), expected)
    assert calls


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_script_by_assignment(monkeypatch):
    """torch.jit.script finds torch's own function; at 6750e06 it tried to compile ours."""
    monkeypatch.setattr(F, "cross_entropy", pyloss.fused_cross_entropy)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)
            self.criterion = torch.nn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1)

        def forward(self, x, y):
            return self.criterion(self.layer(x), y)

    def functional(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y, reduction="sum")

    model, y = Model(), torch.tensor([0, 4, -100])
    loss = torch.jit.script(model)(torch.eye(3), y)
    want = model(torch.eye(3), y)
    torch.testing.assert_close(loss, want)
    weight = model.layer.weight
    grads = [torch.autograd.grad(out, weight)[0] for out in (loss, want)]
    torch.testing.assert_close(*grads)
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.jit.script(torch.nn.CrossEntropyLoss())(x, y), F_CE(x, y))
    torch.testing.assert_close(torch.jit.script(functional)(x, y), F_CE(x, y, reduction="sum"))


@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 0, 4, 250])
def test_ignore_index(ignore_index):
    x = make_logits((40, 5), torch.float64)
    y = make_target((40, 5), ignore_fraction=0.3, ignore_index=ignore_index)
    for smoothing in (0.0, 0.2):
        for reduction in ("mean", "sum", "none"):
            _both(x, y, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_row_and_a_label_of_one_entry(reduction):
    x = torch.randn(10, requires_grad=True)
    y = torch.tensor([3])
    ours = pyloss.fused_cross_entropy(x, y, reduction=reduction)
    want = F.cross_entropy(x, y if TORCH >= (2, 11) else y[0], reduction=reduction)
    assert ours.shape == want.shape == ()
    torch.testing.assert_close(ours, want)
    # torch's own backward refuses this target.
    (got,) = torch.autograd.grad(ours, x)
    torch.testing.assert_close(got, torch.autograd.grad(F.cross_entropy(x, y[0]), x)[0])
    h, w = torch.randn(4), torch.randn(10, 4)
    linear = pyloss.fused_linear_cross_entropy(h, w, y, reduction=reduction)
    torch.testing.assert_close(linear, F.cross_entropy(w @ h, y[0]))


@pytest.mark.parametrize(
    "labels, options, error",
    [([1, 2, 3], {}, ValueError), ([1, 2, 3], dict(label_smoothing=1.2), RuntimeError)],
)
def test_exceptions_are_those_of_torch(labels, options, error):
    as_torch = options or TORCH >= (2, 11)
    for function in (pyloss.fused_cross_entropy, *([F.cross_entropy] if as_torch else [])):
        with pytest.raises(error, match="label_smoothing must be" if options else "size 1"):
            function(torch.randn(10), torch.tensor(labels), **options)


def test_ignore_index_is_an_integer():
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for value in (None, -100.0):
        with pytest.raises(TypeError, match="ignore_index must be an integer, got"):
            pyloss.fused_cross_entropy(x, y, ignore_index=value)
    found = pyloss.fused_cross_entropy(x, y, ignore_index=numpy.int64(1))
    torch.testing.assert_close(found, F.cross_entropy(x, y, ignore_index=1))


def test_labels_as_floats_are_told_what_they_are():
    with pytest.raises(RuntimeError, match="class labels must be integers"):
        pyloss.fused_cross_entropy(torch.randn(3, 5), torch.tensor([0.0, 1.0, 2.0]))


def test_uint8_targets():
    x, y = make_logits((40, 5), torch.float64), make_target((40, 5)).to(torch.uint8)
    _both(x, y)
    _both(x, y, ignore_index=3)
    wide = make_logits((40, 256))
    _both(wide, torch.full((40,), 255, dtype=torch.uint8))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_ignored_and_empty(reduction, smoothing):
    x = make_logits((4, 5))
    _both(x, torch.full((4,), -100), reduction=reduction, label_smoothing=smoothing)
    _both(x[:0], make_target((0, 5)), reduction=reduction, label_smoothing=smoothing)
    q = torch.softmax(x, 1)
    _both(x[:0], q[:0], reduction=reduction, label_smoothing=smoothing)


def test_probabilities_and_ignore_index():
    x = make_logits((4, 5))
    q = torch.softmax(x, 1)
    _both(x, q, ignore_index=-7)
    for f in (F_CE, pyloss.fused_cross_entropy):
        with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point"):
            f(x, q, ignore_index=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float64])
def test_probabilities_of_another_dtype(dtype, target_dtype):
    x = make_logits((4, 5), dtype)
    q = make_target((4, 5), kind="prob").to(target_dtype)
    theirs = F_CE(x, q)
    ours = pyloss.fused_cross_entropy(x, q)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    z = x.requires_grad_()
    (g,) = torch.autograd.grad(pyloss.fused_cross_entropy(z, q), z)
    assert g.dtype == dtype


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_zero(reduction):
    x, y = make_logits((12, 4), torch.float64), make_target((12, 4))
    w = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        _both(x, y, weight=w, reduction=reduction, label_smoothing=smoothing)
        _both(x, torch.softmax(x, 1), weight=w, reduction=reduction, label_smoothing=smoothing)
    if reduction != "mean":
        _both(x, y, weight=torch.zeros(4, dtype=torch.float64), reduction=reduction)
    else:
        zero = torch.zeros(4, dtype=torch.float64)
        assert pyloss.fused_cross_entropy(x, y, weight=zero).isnan()


def test_probability_target_gradient():
    x = make_logits((4, 5), torch.float64)
    q = torch.softmax(make_logits((4, 5), torch.float64, seed=4), 1)
    w = torch.rand(5, dtype=torch.float64)
    grads = []
    for f in (pyloss.fused_cross_entropy, F_CE):
        p = q.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(x, p, weight=w, label_smoothing=0.2), p)[0])
    torch.testing.assert_close(*grads)


def test_probabilities_need_not_be_normalised():
    x = make_logits((4, 5), torch.float64)
    _both(x, make_logits((4, 5), torch.float64, seed=9).abs())


@pytest.mark.parametrize(
    "row",
    [
        [math.inf, 0.0, 1.0],
        [math.inf, math.inf, 1.0],
        [-math.inf, -math.inf, -math.inf],
        [-math.inf, 0.0, 1.0],
        [0.0, -math.inf, 1.0],
        [math.nan, 0.0, 1.0],
        [0.0, 1.0, math.nan],
        [1e8, 1e8, 0.0],
        [1e4, 1e4 - 1, 1e4 - 2],
        [3e38, 3e38, -1e38],
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_values(row, smoothing):
    x = torch.tensor([row, [0.5, 0.0, -1.0]])
    for y in (0, 1, 2):
        target = torch.tensor([y, 1])
        for reduction in ("none", "mean"):
            ours = pyloss.fused_cross_entropy(
                x, target, reduction=reduction, label_smoothing=smoothing
            )
            theirs = F_CE(x, target, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_autocast(dtype, reduction):
    x, y = make_logits((4, 5), dtype, requires_grad=True), make_target((4, 5))
    q = make_target((4, 5), kind="prob").to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for target in (y, q):
            ours = pyloss.fused_cross_entropy(x, target, reduction=reduction)
            theirs = F_CE(x, target, reduction=reduction)
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs)
            (g,) = torch.autograd.grad(ours.sum(), x)
            assert g.dtype == dtype
        linear = torch.nn.Linear(5, 5)
        hidden = linear(x.float())
        assert hidden.dtype == torch.bfloat16
        assert pyloss.fused_cross_entropy(hidden, y).dtype == torch.float32


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_reduction(size_average, reduce):
    x, y = make_logits((4, 5)), make_target((4, 5))
    options = dict(size_average=size_average, reduce=reduce)
    with warnings.catch_warnings(record=True) as theirs_warned:
        warnings.simplefilter("always")
        theirs = F_CE(x, y, **options)
    with warnings.catch_warnings(record=True) as ours_warned:
        warnings.simplefilter("always")
        ours = pyloss.fused_cross_entropy(x, y, **options)
    torch.testing.assert_close(ours, theirs)
    assert [w.category for w in ours_warned] == [w.category for w in theirs_warned]
    assert [str(w.message) for w in ours_warned] == [str(w.message) for w in theirs_warned]


# --- errors ----------------------------------------------------------------------------------

X = torch.randn(4, 5)
Y = torch.tensor([0, 1, 2, 3])

# name -> (arguments, options).  The first words of the message must agree too.
ERRORS = {
    "batch": ((X, Y[:3]), {}),
    "batch_of_volume": ((torch.randn(2, 5, 3), torch.zeros(3, 3, dtype=torch.long)), {}),
    "target_size": ((torch.randn(2, 5, 3), torch.zeros(2, 4, dtype=torch.long)), {}),
    "out_of_range": ((X, torch.tensor([0, 7, 1, 2])), {}),
    "out_of_range_smoothed": ((X, torch.tensor([0, 1, 2, 5])), {"label_smoothing": 0.1}),
    "negative": ((X, torch.tensor([0, -1, 1, 2])), {}),
    "out_of_range_volume": ((torch.randn(2, 5, 3), torch.full((2, 3), 9)), {}),
    "bool_target": ((X, Y > 1), {}),
    "int16_target": ((X, Y.to(torch.int16)), {}),
    "integer_probabilities": ((X, torch.ones(4, 5, dtype=torch.long)), {}),
    "weight_length": ((X, Y), {"weight": torch.ones(4)}),
    "weight_two_dimensional": ((X, Y), {"weight": torch.ones(5, 1)}),
    "weight_double": ((X, Y), {"weight": torch.ones(5, dtype=torch.float64)}),
    "weight_requires_grad": (
        (X.clone().requires_grad_(), Y),
        {"weight": torch.ones(5, requires_grad=True)},
    ),
    "smoothing_above_one": ((X, Y), {"label_smoothing": 1.5}),
    "reduction": ((X, Y), {"reduction": "foo"}),
    "integer_logits": ((torch.ones(4, 5, dtype=torch.long), Y), {}),
    "no_classes": ((torch.randn(4, 0), Y), {}),
    "scalar_logits": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "ignore_index_of_probabilities": ((X, torch.softmax(X, 1)), {"ignore_index": 2}),
    "not_a_tensor": (([[1.0, 2.0]], Y[:1]), {}),
    "target_is_a_list": ((X, [0, 1, 2, 3]), {}),
    "target_is_none": ((X, None), {}),
}


def _error(function, args, options):
    try:
        function(*args, **options)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", ERRORS)
def test_same_errors(name):
    args, options = ERRORS[name]
    theirs = _error(F_CE, args, options)
    ours = _error(pyloss.fused_cross_entropy, args, options)
    assert theirs is not None, "the example must be an error in PyTorch"
    earlier = name == "integer_logits" and TORCH < (2, 8)
    assert type(ours) is (NotImplementedError if earlier else type(theirs)), f"{ours!r}, {theirs!r}"


@pytest.mark.parametrize(
    "name, message",
    [
        ("batch", "Expected input batch_size (4) to match target batch_size (3)."),
        ("target_size", "Expected target size [2, 3], got [2, 4]"),
        ("out_of_range", "Target 7 is out of bounds."),
        ("out_of_range_smoothed", "Target 5 is out of bounds."),
        ("negative", "Target -1 is out of bounds."),
        ("out_of_range_volume", "Target 9 is out of bounds."),
        ("bool_target", "expected target dtype to be Long or Byte, but got Bool"),
        (
            "integer_probabilities",
            "Expected floating point type for target with class probabilities, got Long",
        ),
        (
            "weight_length",
            "weight tensor should be defined either for all 5 classes or no classes but got "
            "weight tensor of shape: [4]",
        ),
        ("smoothing_above_one", "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
        ("reduction", "foo is not a valid value for reduction"),
        (
            "ignore_index_of_probabilities",
            "ignore_index is not supported for floating point target",
        ),
    ],
)
def test_error_messages(name, message):
    args, options = ERRORS[name]
    as_torch = name != "bool_target" or TORCH >= (2, 13)
    for function in (pyloss.fused_cross_entropy, *([F_CE] if as_torch else [])):
        error = _error(function, args, options)
        assert re.search(re.escape(message), str(error)), f"{function.__name__}: {error}"


def test_probability_shape_mismatch():
    q = torch.softmax(torch.randn(4, 6), 1)
    for f in (F_CE, pyloss.fused_cross_entropy):
        assert isinstance(_error(f, (X, q), {}), (RuntimeError, ValueError))


# --- deliberate differences ------------------------------------------------------------------


def test_int32_targets_are_accepted():
    assert isinstance(_error(F_CE, (X, Y.int()), {}), RuntimeError)
    assert torch.equal(pyloss.fused_cross_entropy(X, Y.int()), pyloss.fused_cross_entropy(X, Y))


@pytest.mark.parametrize("smoothing", [-0.1, math.nan])
def test_negative_smoothing_is_an_error(smoothing):
    """PyTorch takes it for 0 without a word."""
    with pytest.raises(RuntimeError, match="label_smoothing must be between 0.0 and 1.0"):
        pyloss.fused_cross_entropy(X, Y, label_smoothing=smoothing)


def test_float32_weight_with_half_logits():
    weight = torch.linspace(0.5, 1.5, 5)
    for dtype in (torch.bfloat16, torch.float16):
        x = X.to(dtype)
        assert isinstance(_error(F_CE, (x, Y, weight), {}), RuntimeError)
        ours = pyloss.fused_cross_entropy(x, Y, weight)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), F_CE(x.float(), Y, weight), rtol=1e-2, atol=0)


def test_gradient_of_ignored_nan_rows_is_zero():
    x = X.clone()
    x[1] = torch.nan
    y = torch.tensor([0, -100, 2, 3])
    z = x.requires_grad_()
    (g,) = torch.autograd.grad(pyloss.fused_cross_entropy(z, y), z)
    assert g.isfinite().all() and (g[1] == 0).all()


def test_confident_rows_keep_their_loss():
    x = torch.tensor([[30.0, 0.0]])
    y = torch.tensor([0])
    assert F_CE(x, y).item() == 0.0
    assert pyloss.fused_cross_entropy(x, y).item() == pytest.approx(math.exp(-30), rel=1e-6)


@pytest.mark.parametrize("which", ["target", "weight", "token_weight"])
def test_tensors_on_two_devices_raise(which):
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    kwargs = {which: {"target": y, "weight": torch.ones(5), "token_weight": torch.ones(3)}[which]}
    kwargs = {k: v.to("meta") for k, v in kwargs.items()}
    with pytest.raises(RuntimeError, match=f"same device, but {which} is on meta"):
        pyloss.fused_cross_entropy(x, **{"target": y, **kwargs})
