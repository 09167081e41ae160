"""fused_linear_cross_entropy: options, shapes, ignored rows, shift, memory, module, errors.

Two judges: ``pyloss.reference.linear_cross_entropy`` in float64, and the stored logits given to
``pyloss.fused_cross_entropy``, which the op must equal whatever the chunk and the strategy.
"""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import multiplications
from linear_cross_entropy_cases import (
    ROW_WAYS,
    SCALAR_WAYS,
    Layer,
    Memory,
    assert_close,
    fresh,
    fused,
    gradients,
    labels_with_ignored,
    make_layer,
    make_options,
    referenced,
    run,
    unfused,
    upstream_of,
)
from row_softmax_cases import DTYPES, OPTION_NAMES, exact
from torch._subclasses.fake_tensor import FakeTensorMode

import pyloss
from pyloss.functional import _checks as checks
from pyloss.reference import linear_cross_entropy as reference
from pyloss.reference import token_logprobs as logprobs_reference
from pyloss.testing import make_logits, make_target

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
ALL_STATS = ("lse", "logprob", "entropy", "argmax", "correct", "rank", "z_loss")
FLOAT_STATS = ("lse", "logprob", "entropy", "z_loss")
N, D, V = 10, 6, 13


def _target(ignore_index=-100):
    """Labels of N rows, two of them ignored."""
    return labels_with_ignored(N, V, ignore_index)


# --- the reference itself --------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_reference_is_linear_and_cross_entropy(kind, reduction, smoothing):
    layer = make_layer()
    target = _target() if kind == "index" else make_target((N, V), kind="prob")
    for weight in (None, torch.linspace(0.3, 2.0, V, dtype=F64)):
        options = dict(weight=weight, reduction=reduction, label_smoothing=smoothing)
        ours = reference(*layer[:2], target, layer.bias, **options)
        theirs = F.cross_entropy(F.linear(*layer), target, **options)
        assert_close(ours, theirs, "loss")
        assert_close(gradients(ours, layer), gradients(theirs, layer), "gradient")


def test_reference_of_half_arguments_is_float32_inside():
    layer = make_layer(dtype=BF16)
    y = _target()
    exact_value = reference(*(t.double() for t in layer[:2]), y, layer.bias.double())
    value = reference(*layer[:2], y, layer.bias, loss_dtype=F32)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=0)
    assert reference(*layer[:2], y, layer.bias).dtype == BF16


@pytest.mark.parametrize("k", [1, 2])
def test_reference_shift_is_slicing(k):
    layer = make_layer((2, 5))
    y = _target().view(2, 5)
    cut = Layer(layer.input[:, :-k], *layer[1:])
    for reduction in ("none", "mean"):
        a = referenced(layer, y, shift=k, reduction=reduction)
        b = referenced(cut, y[:, k:], reduction=reduction)
        assert torch.equal(a, b)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", SCALAR_WAYS)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_options(name, way):
    """Every option of fused_cross_entropy, with chunks that divide the rows and that do not."""
    layer = make_layer(N, D, V)
    target, options = make_options(name, (N, V), F64)
    for reduction in ("mean", "sum"):
        options["reduction"] = reduction
        ours = run(fused, layer, target, **options, **SCALAR_WAYS[way])
        assert_close(ours, run(unfused, layer, target, **options), "unfused")
        assert_close(ours, run(referenced, layer, target, **options), "reference")


@pytest.mark.parametrize("way", ROW_WAYS)
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_options_per_row(name, way):
    layer = make_layer(N, D, V)
    target, options = make_options(name, (N, V), F64)
    options["reduction"] = "none"
    ours = run(fused, layer, target, **options, **ROW_WAYS[way])
    assert ours[0].shape == (N,)
    assert_close(ours, run(unfused, layer, target, **options), "unfused")
    assert_close(ours, run(referenced, layer, target, **options), "reference")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTION_NAMES)
def test_options_in_float32(name, reduction):
    layer = make_layer(23, 16, 37, F32)
    target, options = make_options(name, (23, 37), F32)
    options["reduction"] = reduction
    want = run(referenced, fresh(layer, F64), target, **options)
    for way in ROW_WAYS if reduction == "none" else SCALAR_WAYS:
        ours = run(fused, layer, target, **options, **SCALAR_WAYS[way])
        assert ours[0].dtype == F32 and all(g.dtype == F32 for g in ours[1])
        assert_close(ours, want, way)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    "rows, features, classes",
    [
        (1, 1, 1),
        (5, 1, 7),  # one feature
        (5, 3, 1),  # one class: loss and gradients are 0
        (3, 4, 2),
        (289, 5, 33),
        (33, 64, 1000),
        (2, 3, 4099),
        (700, 8, 3),  # more rows than an automatic chunk may have for few classes
    ],
)
def test_sizes(rows, features, classes, dtype, bias):
    layer = make_layer(rows, features, classes, dtype, bias=bias)
    y = make_target((rows, classes), ignore_fraction=0.3 if rows > 3 else 0.0)
    want = run(referenced, fresh(layer, F64) if bias else _no_bias_copy(layer), y)
    for way in SCALAR_WAYS:
        ours = run(fused, layer, y, **SCALAR_WAYS[way])
        if classes == 1:
            assert ours[0] == 0 and all((g == 0).all() for g in ours[1])
        else:
            assert_close(ours, want, way)


def _no_bias_copy(layer):
    return Layer(*(t.detach().double().requires_grad_() for t in layer[:2]), None)


def test_one_class_with_other_losses():
    layer = make_layer(4, 3, 1)
    for options in ({"tau": 0.0}, {"tau": 2.0}, {"z_loss": 0.1}, {"label_smoothing": 0.1}):
        y = torch.zeros(4, dtype=torch.long)
        assert_close(run(fused, layer, y, **options), run(unfused, layer, y, **options))


def test_no_features():
    """The logits are the bias, or zero."""
    h, w = torch.zeros(4, 0, requires_grad=True), torch.zeros(5, 0, requires_grad=True)
    b = torch.randn(5, requires_grad=True)
    y = torch.tensor([0, 1, 4, -100])
    torch.testing.assert_close(pyloss.fused_linear_cross_entropy(h, w, y), torch.tensor(5.0).log())
    loss = pyloss.fused_linear_cross_entropy(h, w, y, b)
    want = F.cross_entropy(b.expand(4, 5), y)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, (h, w, b))
    assert got[0].shape == (4, 0) and got[1].shape == (5, 0)
    torch.testing.assert_close(got[2], torch.autograd.grad(want, b)[0])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9, 10, 11, 1000])
@pytest.mark.parametrize("strategy", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_chunk_and_strategy_do_not_matter(dtype, strategy, chunk):
    layer = make_layer(N, D, V, dtype)
    y = _target()
    options = dict(tau=1.5, z_loss=0.1, loss_dtype=F64 if dtype == F64 else F32)
    ours = run(fused, layer, y, strategy=strategy, chunk=chunk, **options)
    want = run(fused, layer, y, strategy="recompute", chunk=N, **options)
    if dtype == F64:
        assert_close(ours, want)
    else:  # the same sums in another order, rounded once: two units of the last place
        torch.testing.assert_close(ours, want, rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_dtypes(dtype, reduction):
    layer = make_layer(N, D, V, dtype)
    y = _target()
    ours = run(fused, layer, y, reduction=reduction)
    assert ours[0].dtype == dtype and [g.dtype for g in ours[1]] == [dtype] * 3
    for loss_dtype in (F64, F32, BF16):
        ours = fused(layer, y, reduction=reduction, loss_dtype=loss_dtype)
        assert ours.dtype == loss_dtype
        if loss_dtype == F32 and dtype in (BF16, torch.float16):
            want = run(unfused, layer, y, reduction=reduction, loss_dtype=F32)
            torch.testing.assert_close(ours, want[0], rtol=1e-6, atol=1e-6)
    for grad in gradients(ours, layer):
        assert grad.dtype == dtype


@pytest.mark.parametrize("accumulate_dtype", [None, F32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_dtype_changes_rounding_only(dtype, accumulate_dtype):
    layer = make_layer(N, D, V, dtype)
    y = _target()
    want = run(referenced, fresh(layer, F64), y)
    for way in SCALAR_WAYS.values():
        ours = run(fused, layer, y, accumulate_dtype=accumulate_dtype, **way)
        eps = torch.finfo(dtype).eps
        for a, b in zip(ours[1], want[1]):
            torch.testing.assert_close(a.double(), b, rtol=16 * eps, atol=8 * eps)


@pytest.mark.parametrize("items", [7, 7.5, torch.tensor(7), torch.tensor(7.5)])
@pytest.mark.parametrize("way", SCALAR_WAYS)
def test_num_items_adds_up_to_the_full_batch(way, items):
    layer = make_layer(N, D, V)
    y = _target()
    total = [0.0, [torch.zeros_like(t) for t in layer]]
    for rows in (slice(0, 4), slice(4, 10)):
        part = Layer(layer.input[rows], *layer[1:])
        loss = fused(part, y[rows], num_items=items, z_loss=0.1, **SCALAR_WAYS[way])
        total[0] += loss.detach()
        for sums, g in zip(total[1], torch.autograd.grad(loss, layer)):
            sums += g
    want = unfused(layer, y, reduction="sum", z_loss=0.1) / items
    assert_close(total[0], want.detach())
    assert_close(total[1], list(torch.autograd.grad(want, layer)))


def test_num_items_is_for_the_mean_only():
    layer, y = make_layer(), _target()
    for reduction in ("sum", "none"):
        a = fused(layer, y, reduction=reduction, num_items=3)
        assert torch.equal(a, fused(layer, y, reduction=reduction))


@pytest.mark.parametrize("name", ["prob", "prob_smoothing", "prob_tau", "prob_all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_the_probabilities(name, reduction):
    layer = make_layer(N, D, V)
    q, options = make_options(name, (N, V), F64)
    q.requires_grad_()
    ours = fused(layer, q, reduction=reduction, chunk=3, **options)
    want = unfused(layer, q, reduction=reduction, **options)
    assert_close(ours, want)
    up = upstream_of(ours)
    both = [torch.autograd.grad(v, (q, *layer), up) for v in (ours, want)]
    assert_close(list(both[0]), list(both[1]))
    frozen = Layer(*(t.detach() for t in layer))
    (g,) = torch.autograd.grad(fused(frozen, q, reduction=reduction, **options), q, up)
    assert_close(g, both[1][0])


def test_probabilities_of_another_dtype():
    layer = make_layer(N, D, V, F32)
    q = make_target((N, V), kind="prob")
    ours = run(fused, layer, q, chunk=3)
    assert ours[0].dtype == F64 and all(g.dtype == F32 for g in ours[1])
    want = run(referenced, fresh(layer, F64), q)
    assert_close(ours[0], want[0])
    assert_close(ours[1], want[1])


@pytest.mark.parametrize("way", SCALAR_WAYS)
@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_weights_that_sum_to_zero(way, empty):
    layer, y = make_layer(N, D, V), _target()
    zero_class = torch.ones(V, dtype=F64)
    zero_class[y[y >= 0]] = 0.0
    for options in (
        {"weight": zero_class},
        {"token_weight": torch.zeros(N, dtype=F64)},
        {"weight": zero_class, "z_loss": 0.1},
        {"token_weight": torch.zeros(N, dtype=F64), "z_loss": 0.1},
    ):
        ours = run(fused, layer, y, empty=empty, **options, **SCALAR_WAYS[way])
        want = run(unfused, layer, y, empty=empty, **options)
        assert_close(ours, want, str(list(options)))


# --- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ROW_WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("stat", ALL_STATS)
def test_each_statistic(stat, reduction, way):
    layer, y = make_layer(N, D, V), _target()
    options = dict(z_loss=0.05, softcap=8.0, temperature=0.9, reduction=reduction)
    loss, stats = fused(layer, y, return_stats=(stat,), **options, **ROW_WAYS[way])
    want_loss, want = unfused(layer, y, return_stats=(stat,), **options)
    assert_close(loss, want_loss)
    assert isinstance(stats, pyloss.RowStats)
    value = getattr(stats, stat)
    assert value.shape == y.shape and value.dtype == getattr(want, stat).dtype
    if value.is_floating_point():
        assert_close(value, getattr(want, stat))
    else:
        assert torch.equal(value, getattr(want, stat))
    assert all(getattr(stats, other) is None for other in ALL_STATS if other != stat)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_all_statistics(dtype):
    layer, y = make_layer(N, D, V, dtype), _target()
    loss, stats = fused(layer, y, return_stats=ALL_STATS, z_loss=0.05, chunk=3)
    logits = F.linear(*layer)
    want = pyloss.reference.row_softmax(logits.double(), y, return_stats=ALL_STATS, z_loss=0.05)[1]
    ignored = y == -100
    assert ignored.any()
    for name in ALL_STATS:
        value = getattr(stats, name)
        if name in FLOAT_STATS:
            assert value.dtype == (F64 if dtype == F64 else F32)
            # In half dtypes the two products may round a logit differently.
            tolerance = dict(rtol=0.02, atol=0.05) if dtype == BF16 else dict(rtol=2e-5, atol=1e-5)
            torch.testing.assert_close(value.double(), want[name], **tolerance)
        elif dtype != BF16:
            assert torch.equal(value.to(want[name].dtype), want[name]), name
        assert (value[ignored] == (-1 if name == "argmax" else 0)).all(), name


@pytest.mark.parametrize("strategy", ["auto", "forward", "recompute"])
def test_counting_statistics_with_every_strategy(strategy):
    """argmax, correct and rank have no gradient, so they do not hinder the gradient in forward."""
    layer, y = make_layer(N, D, V), _target()
    names = ("argmax", "correct", "rank")
    loss, stats = fused(layer, y, return_stats=names, strategy=strategy, chunk=3)
    want_loss, want = unfused(layer, y, return_stats=names)
    for name in names:
        assert torch.equal(getattr(stats, name), getattr(want, name)), name
        assert not getattr(stats, name).requires_grad
    assert_close(gradients(loss, layer), gradients(want_loss, layer))


@pytest.mark.parametrize("kind", ["mixup", "prob"])
def test_statistics_of_other_targets(kind):
    layer = make_layer(N, D, V)
    target = make_target((N, V), kind=kind)
    names = ("lse", "entropy", "argmax") if kind == "prob" else ALL_STATS
    _, stats = fused(layer, target, return_stats=names, chunk=3)
    _, want = unfused(layer, target, return_stats=names)
    for name in names:
        torch.testing.assert_close(getattr(stats, name), getattr(want, name))


# --- shapes and layouts ----------------------------------------------------------------------

LEADS = [(), (10,), (2, 5), (1, 1), (2, 1, 5), (2, 3, 2, 4)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "prob", "mixup"])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_leading_shapes(lead, kind, reduction):
    rows = math.prod(lead)
    layer = make_layer(lead, D, V)
    flat_target = make_target((rows, V), kind=kind, ignore_fraction=0.2 if rows > 1 else 0.0)
    if kind == "mixup":
        target = tuple(t.view(lead) for t in flat_target)
    else:
        target = flat_target.view(lead if kind == "index" else (*lead, V))
    k = torch.linspace(0.5, 2.0, rows, dtype=F64)
    flat = Layer(layer.input.reshape(rows, D), *layer[1:])
    ways = [{"chunk": 3}, {}] if reduction == "none" else SCALAR_WAYS.values()
    want = unfused(flat, flat_target, reduction=reduction, token_weight=k)
    want_grads = gradients(want, layer)
    for way in ways:
        loss = fused(layer, target, reduction=reduction, token_weight=k.view(lead), **way)
        assert loss.shape == (lead if reduction == "none" else ())
        assert_close(loss.flatten(), want.flatten())
        up = upstream_of(want).view(loss.shape)
        assert_close(gradients(loss, layer, up), want_grads)
    names = ("lse", "argmax", "entropy")
    _, stats = fused(layer, target, return_stats=names)
    _, want_stats = unfused(flat, flat_target, return_stats=names)
    for name in names:
        value = getattr(stats, name)
        assert value.shape == lead
        torch.testing.assert_close(value.flatten(), getattr(want_stats, name))


def _padded(x, before=2, after=3):
    wide = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), math.nan)
    wide[..., before : before + x.shape[-1]] = x.detach()
    return wide


# name -> function of a matrix to (leaf that holds it, view of the leaf with the same values).
# What lies between the values is NaN, so that a read outside is seen.
MATRIX_LAYOUTS = {
    "transposed": lambda x: (leaf := x.detach().t().contiguous().requires_grad_(), leaf.t()),
    "sliced_columns": lambda x: (
        leaf := _padded(x).requires_grad_(),
        leaf[:, 2 : 2 + x.shape[1]],
    ),
    "sliced_rows": lambda x: (
        leaf := torch.cat([x.detach(), torch.full_like(x, math.nan)]).requires_grad_(),
        leaf[: x.shape[0]],
    ),
    "every_second_row": lambda x: (
        leaf := torch.stack([x.detach(), torch.full_like(x, math.nan)], 1).requires_grad_(),
        leaf[:, 0],
    ),
    "column_stride_2": lambda x: (
        leaf := torch.stack([x.detach(), torch.full_like(x, math.nan)], 2).requires_grad_(),
        leaf[..., 0],
    ),
    "shifted": lambda x: (  # not aligned to 16 bytes
        leaf := torch.cat([x.new_full((1,), math.nan), x.detach().flatten()]).requires_grad_(),
        leaf[1:].view(x.shape),
    ),
}


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight"])
def test_layouts(which, layout, dtype):
    layer, y = make_layer(N, D, V, dtype), _target()
    _, view = MATRIX_LAYOUTS[layout](getattr(layer, which))
    strided = layer._replace(**{which: view})
    for options in ({}, {"reduction": "none"}, {"strategy": "recompute", "chunk": 3}):
        ours = run(fused, strided, y, **options)
        want = run(fused, layer, y, **options)
        if dtype == BF16:
            torch.testing.assert_close(ours, want, rtol=2.0**-6, atol=1e-3)
        else:
            assert_close(ours, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expanded_arguments(reduction):
    """Rows, classes and bias of stride 0."""
    base = make_layer(1, D, 1)
    b = torch.tensor(0.3, dtype=F64, requires_grad=True)
    y = _target()
    for layer, leaves in (
        (Layer(base.input.expand(N, D), make_layer(N, D, V).weight, None), base[:1]),
        (Layer(make_layer(N, D, V).input, base.weight.expand(V, D), None), base[1:2]),
        (make_layer(N, D, V)._replace(bias=b.expand(V)), (b,)),
    ):
        for way in ({}, {"strategy": "recompute", "chunk": 3}):
            ours, want = fused(layer, y, reduction=reduction, **way), unfused(
                layer, y, reduction=reduction
            )  # fmt: skip
            assert_close(ours, want)
            up = upstream_of(want)
            (g,) = torch.autograd.grad(ours, leaves, up)
            (h,) = torch.autograd.grad(want, leaves, up)
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-11)


def test_strided_batch_of_sequences():
    """(T, B, D) hidden states seen as (B, T, D)."""
    layer = make_layer((5, 2), D, V)
    y = _target().view(2, 5)
    seen = layer._replace(input=layer.input.transpose(0, 1))
    for options in ({}, {"shift": 1}, {"shift": 1, "reduction": "none"}):
        ours, want = fused(seen, y, **options), referenced(seen, y, **options)
        assert_close(ours, want)
        assert_close(gradients(ours, layer), gradients(want, layer))


@pytest.mark.parametrize("upstream", ["expanded", "strided", "reversed", "zero"])
def test_upstream_of_per_row_losses(upstream):
    layer, y = make_layer(N, D, V), _target()
    g = make_logits((N, 3), F64, seed=9)
    g = {
        "expanded": g[:1, 0].expand(N),
        "strided": g[:, 1],
        "reversed": g[:, 0].flip(0),
        "zero": torch.zeros(N, dtype=F64),
    }[upstream]
    ours, want = fused(layer, y, reduction="none", chunk=3), unfused(layer, y, reduction="none")
    assert_close(gradients(ours, layer, g), gradients(want, layer, g))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_dtypes_and_strides(dtype):
    """labels[..., 1:] of a next-token loss starts off a 16-byte boundary."""
    layer = make_layer(31, D, V)
    labels = make_target((33, V)).to(dtype)
    wide = make_target((62, V)).to(dtype)
    options = {} if dtype != torch.uint8 else {"ignore_index": 3}
    for y in (labels[1:32], labels[2:33], wide[::2], labels[:1].expand(31), wide.flip(0)[:31]):
        for way in ({}, {"chunk": 4, "strategy": "recompute"}):
            ours = run(fused, layer, y, **options, **way)
            assert_close(ours, run(referenced, layer, y.long(), **options))
    both = labels.view(3, 11)[:, 1:]
    three = layer._replace(input=layer.input[:30].view(3, 10, D))
    assert_close(
        fused(three, both, reduction="none", **options),
        referenced(three, both.long(), reduction="none", **options),
    )


def test_all_values_of_uint8_are_classes():
    layer = make_layer(N, D, 256)
    y = torch.full((N,), 255, dtype=torch.uint8)
    assert_close(run(fused, layer, y), run(referenced, layer, y.long()))
    y[3] = 156  # what -100 would wrap to
    assert_close(run(fused, layer, y), run(referenced, layer, y.long()))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("classes", [256, 257, 300, 512])
def test_class_weights_of_more_classes_than_a_byte_counts(classes, mixed):
    """As uint8, 257 classes are one, and every other label would be none of them."""
    layer = make_layer(40, D, classes)
    y = make_target((40, 256))
    w = torch.linspace(0.1, 2.0, classes, dtype=F64)
    found = fused(layer, (y.byte(), y.byte().flip(0), 0.3) if mixed else y.byte(), weight=w)
    logits = F.linear(*layer)
    if not mixed:
        assert_close(found, F.cross_entropy(logits, y, w))
    else:
        first, second = F.one_hot(y, classes).double(), F.one_hot(y.flip(0), classes).double()
        share = 0.3 * first + 0.7 * second
        rows = -(share * w * logits.log_softmax(1)).sum(1)
        assert_close(found, rows.sum() / (share * w).sum())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ignore_index_that_the_labels_cannot_hold(dtype, linear):
    """In the dtype of the labels it would wrap, and be a class."""
    layer = make_layer(6, D, V)
    y = torch.tensor([0, 1, 2, 1, 4, 1])
    call = fused if linear else unfused
    assert_close(
        call(layer, y.to(dtype), ignore_index=2**32 + 1, reduction="none"),
        call(layer, y, reduction="none"),
    )
    three = layer._replace(input=layer.input.view(2, 3, D))
    for shift in (0, 1) if linear else ():
        found = fused(three, y.view(2, 3).to(dtype), ignore_index=2**32 + 1, shift=shift)
        assert_close(found, fused(three, y.view(2, 3), shift=shift))


def test_check_of_label_values_counts_past_a_byte():
    """What PYLOSS_CHECK looks at."""
    y = torch.tensor([0, 3, 255], dtype=torch.uint8)
    checks.check_index_values(y, 257, -100)
    with pytest.raises(IndexError, match="Target 255 is out of bounds"):
        checks.check_index_values(y, 255, -1)  # -1 is 255 as uint8


def test_strided_options():
    layer, y = make_layer(N, D, V), _target()
    w = (torch.rand(2 * V, dtype=F64) + 0.1)[::2]
    k = torch.rand(N, 3, dtype=F64)[:, 1]
    b = torch.randn(V, 2, dtype=F64)[:, 1].requires_grad_()
    layer = layer._replace(bias=b)
    for target in (y, (y, y.flip(0), k), (y, y.flip(0), torch.tensor(0.3, dtype=F64).expand(N))):
        for way in SCALAR_WAYS.values():
            options = dict(weight=w, token_weight=k)
            ours = run(fused, layer, target, **options, **way)
            assert_close(ours, run(referenced, layer, target, **options))


# --- ignored rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "name", ["plain", "smoothing", "tau1.5", "everything", "token_weight", "mixup_all", "softcap"]
)
def test_ignored_rows_are_never_read(name, reduction, bad):
    target, options = make_options(name, (N, V), F64)
    if isinstance(target, tuple):
        ignored = (target[0] == -100) | (target[1] == -100)
    else:
        ignored = target == -100
    assert ignored.sum() == 2
    clean = make_layer(N, D, V)
    dirty = fresh(clean)
    with torch.no_grad():
        dirty.input[ignored] = bad
    kept = ~ignored
    cut = clean._replace(input=clean.input.detach()[kept].requires_grad_())
    cut_target = tuple(t[kept] for t in target) if isinstance(target, tuple) else target[kept]
    cut_options = dict(options)
    if "token_weight" in options:
        cut_options["token_weight"] = options["token_weight"][kept]
    up = upstream_of(target[0] if isinstance(target, tuple) else target).new_tensor
    up = torch.linspace(0.5, 1.5, N, dtype=F64) if reduction == "none" else up(1.3, dtype=F64)
    want = unfused(cut, cut_target, reduction=reduction, **cut_options)
    want_grads = gradients(want, cut, up[kept] if reduction == "none" else up)
    for way in ROW_WAYS if reduction == "none" else SCALAR_WAYS:
        loss = fused(dirty, target, reduction=reduction, **options, **SCALAR_WAYS[way])
        grads = gradients(loss, dirty, up)
        assert (grads[0][ignored] == 0).all()
        if reduction == "none":
            assert (loss[ignored] == 0).all()
            loss = loss[kept]
        assert_close(loss, want, way)
        assert_close([grads[0][kept], *grads[1:]], want_grads, way)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_of_statistics_are_never_read(dtype):
    layer, y = make_layer(N, D, V, dtype), _target()
    with torch.no_grad():
        layer.input[y == -100] = math.nan
    loss, stats = fused(layer, y, return_stats=ALL_STATS, z_loss=0.1, chunk=3)
    assert loss.isfinite()
    for name in ALL_STATS:
        value = getattr(stats, name)
        assert (value[y == -100] == (-1 if name == "argmax" else 0)).all(), name
        assert value.isfinite().all(), name
    total = loss + stats.entropy.sum() + stats.lse.sum() + stats.logprob.sum()
    grads = gradients(total, layer)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][y == -100] == 0).all()


def test_ignored_rows_stay_unread_in_the_rarer_paths():
    """create_graph, torch.func and forward mode work on stored logits."""
    clean, y = make_layer(N, D, V), _target()
    dirty = fresh(clean)
    with torch.no_grad():
        dirty.input[y == -100] = math.nan
    seconds = []
    for layer in (clean, dirty):
        first = torch.autograd.grad(fused(layer, y), layer, create_graph=True)
        total = sum(g.square().sum() for g in first)
        seconds.append(torch.autograd.grad(total, layer))
    assert_close(list(seconds[1]), list(seconds[0]))

    def f(w, h):
        return pyloss.fused_linear_cross_entropy(h, w, y, clean.bias.detach())

    w = clean.weight.detach()
    a, b = (torch.func.grad(f)(w, layer.input.detach()) for layer in (clean, dirty))
    assert_close(b, a)

    def tangent(h):
        return torch.func.jvp(lambda w: f(w, h), (w,), (w,))[1]

    a, b = (tangent(layer.input.detach()) for layer in (clean, dirty))
    assert_close(b, a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1, "tau": 0.5}])
@pytest.mark.parametrize("rows", [N, 0])
def test_nothing_to_score(rows, options, dtype):
    layer = make_layer(rows, D, V, dtype)
    y = torch.full((rows,), -100)
    with torch.no_grad():
        layer.input.fill_(math.nan)
    for way in SCALAR_WAYS.values():
        for reduction, empty, want in (
            ("mean", "nan", math.nan),
            ("mean", "zero", 0.0),
            ("sum", "nan", 0.0),
        ):
            loss = fused(layer, y, reduction=reduction, empty=empty, **options, **way)
            torch.testing.assert_close(loss.item(), want, equal_nan=True)
            for g, t in zip(gradients(loss, layer), layer):
                assert g.shape == t.shape and g.dtype == t.dtype and (g == 0).all()
    for way in ROW_WAYS.values():
        loss, stats = fused(
            layer, y, reduction="none", return_stats=ALL_STATS, **options, **way
        )  # fmt: skip
        assert loss.shape == (rows,) and (loss == 0).all()
        assert all(s.shape == (rows,) for s in stats)
        for g in gradients(loss, layer):
            assert (g == 0).all()


@pytest.mark.parametrize("kind", ["prob", "mixup"])
def test_no_rows_of_other_targets(kind):
    layer = make_layer(0, D, V)
    target = make_target((0, V), kind=kind)
    loss = fused(layer, target)
    assert loss.isnan() and all((g == 0).all() for g in gradients(loss, layer))
    assert fused(layer, target, reduction="none").shape == (0,)
    empty = make_layer((2, 0), D, V)
    assert fused(empty, torch.empty(2, 0, dtype=torch.long), reduction="none").shape == (2, 0)


@pytest.mark.parametrize("ignore_index", [None, -100, -1, 0, V - 1, 250])
def test_ignore_index(ignore_index):
    layer = make_layer(40, D, V)
    value = -100 if ignore_index is None else ignore_index
    y = make_target((40, V), ignore_fraction=0.3, ignore_index=value)
    want = run(unfused, layer, y, ignore_index=value)
    for way in SCALAR_WAYS.values():
        assert_close(run(fused, layer, y, ignore_index=ignore_index, **way), want)


# --- special values --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_a_bad_row_stays_alone(dtype):
    clean, y = make_layer(N, D, V, dtype), make_target((N, V))
    dirty = fresh(clean)
    with torch.no_grad():
        dirty.input[2] = math.nan
        dirty.input[5, 1] = math.inf
    bad = torch.zeros(N, dtype=torch.bool)
    bad[[2, 5]] = True
    for chunk in (3, N):
        loss = fused(dirty, y, reduction="none", chunk=chunk)
        want = fused(clean, y, reduction="none", chunk=chunk)
        assert loss[bad].isnan().all() and torch.equal(loss[~bad], want[~bad])
        g, h = (gradients(v, layer)[0] for v, layer in ((loss, dirty), (want, clean)))
        assert g[bad].isnan().any(1).all() and torch.equal(g[~bad], h[~bad])
        assert fused(dirty, y, chunk=chunk).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_classes(dtype):
    """A bias of -inf takes a class out: finite loss, no gradient for its row of the weight."""
    layer = make_layer(N, D, V, dtype)
    y = make_target((N, V)) % 7
    with torch.no_grad():
        layer.bias[7:] = -math.inf
    short = fresh(Layer(layer.input, layer.weight[:7], layer.bias[:7]))
    for way in SCALAR_WAYS.values():
        loss, grads = run(fused, layer, y, **way)
        want, want_grads = run(fused, short, y, **way)
        assert loss.isfinite()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(loss, want, rtol=4 * eps, atol=4 * eps)
        assert (grads[1][7:] == 0).all() and (grads[2][7:] == 0).all()
        torch.testing.assert_close(grads[0], want_grads[0], rtol=16 * eps, atol=8 * eps)
        torch.testing.assert_close(grads[1][:7], want_grads[1], rtol=16 * eps, atol=8 * eps)


def test_target_of_a_masked_class():
    layer = make_layer(N, D, V)
    y = make_target((N, V))
    y[4] = 2
    with torch.no_grad():
        layer.bias[2] = -math.inf
    loss = fused(layer, y, reduction="none", chunk=3)
    assert loss[4] == math.inf
    assert_close(loss[y != 2], unfused(layer, y, reduction="none")[y != 2])


def test_large_logits():
    h = torch.tensor([[1e8], [3e4], [-1e8]], requires_grad=True)
    w = torch.ones(3, 1, requires_grad=True)
    loss = pyloss.fused_linear_cross_entropy(h, w, torch.tensor([0, 1, 2]), reduction="none")
    torch.testing.assert_close(loss, torch.full((3,), math.log(3)))


# --- shift -----------------------------------------------------------------------------------


def _sequences(*lead, k, dtype=F64):
    """A layer over (*lead, D), labels, and the same cut by hand."""
    layer = make_layer(lead, D, V, dtype)
    y = make_target((math.prod(lead), V), ignore_fraction=0.2).view(lead)
    cut = layer._replace(input=layer.input[..., : lead[-1] - k, :])
    return layer, y, cut


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("lead", [(7,), (2, 7), (2, 1, 3), (2, 2, 2, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift_is_slicing(reduction, lead, k):
    layer, y, cut = _sequences(*lead, k=k)
    token_weight = torch.rand(lead, dtype=F64) + 0.1
    for options, cut_options in (
        ({}, {}),
        ({"token_weight": token_weight}, {"token_weight": token_weight[..., k:]}),
        ({"label_smoothing": 0.1, "tau": 1.5}, {"label_smoothing": 0.1, "tau": 1.5}),
        ({"num_items": 5, "z_loss": 0.1}, {"num_items": 5, "z_loss": 0.1}),
    ):
        want = referenced(cut, y[..., k:], reduction=reduction, **cut_options)
        want_grads = gradients(want, layer)
        for way in ROW_WAYS if reduction == "none" else SCALAR_WAYS:
            loss = fused(
                layer, y, shift=k, reduction=reduction, **options, **SCALAR_WAYS[way]
            )  # fmt: skip
            if reduction == "none":
                assert loss.shape == (*lead[:-1], lead[-1] - k)
            assert_close(loss, want, way)
            assert_close(gradients(loss, layer), want_grads, way)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_does_not_read_the_last_positions(reduction, bad, k):
    layer, y, cut = _sequences(2, 7, k=k)
    want = referenced(cut, y[:, k:], reduction=reduction)
    want_grads = gradients(want, layer)
    dirty = fresh(layer)
    with torch.no_grad():
        dirty.input[:, -k:] = bad
    y = y.clone()
    y[:, :k] = 10**6  # nobody's target; must not be looked at either
    for way in ROW_WAYS if reduction == "none" else SCALAR_WAYS:
        loss = fused(dirty, y, shift=k, reduction=reduction, **SCALAR_WAYS[way])
        grads = gradients(loss, dirty)
        assert (grads[0][:, -k:] == 0).all()
        assert_close(loss, want)
        assert_close(grads, want_grads)


def test_shift_of_statistics():
    layer, y, cut = _sequences(2, 7, k=2)
    names = ALL_STATS
    _, stats = fused(layer, y, shift=2, return_stats=names, chunk=3, z_loss=0.1)
    _, want = unfused(
        cut._replace(input=cut.input.reshape(-1, D)),
        y[:, 2:].reshape(-1),
        return_stats=names,
        z_loss=0.1,
    )
    for name in names:
        value = getattr(stats, name)
        assert value.shape == (2, 5), name
        torch.testing.assert_close(value.flatten(), getattr(want, name), msg=name)
    total = stats.entropy.sum() + (stats.lse * 0.3).sum() + stats.logprob.square().sum()
    expected = want.entropy.sum() + (want.lse * 0.3).sum() + want.logprob.square().sum()
    assert_close(gradients(total, layer), gradients(expected, layer))


@pytest.mark.parametrize("kind", ["mixup", "prob"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_of_other_targets(kind, reduction):
    layer, _, cut = _sequences(2, 7, k=1)
    target = make_target((14, V), kind=kind)
    if kind == "mixup":
        target = tuple(t.view(2, 7) for t in target)
        by_hand = tuple(t[:, 1:] for t in target)
    else:
        target = target.view(2, 7, V)
        by_hand = target[:, 1:]
    ours = fused(layer, target, shift=1, reduction=reduction, chunk=3)
    want = referenced(cut, by_hand, reduction=reduction)
    assert_close(ours, want)
    assert_close(gradients(ours, layer), gradients(want, layer))


@pytest.mark.parametrize("lam", [0.3, "scalar", "row", "full"])
def test_shift_of_mixup_shares(lam):
    layer, y, cut = _sequences(2, 7, k=1)
    y = y.clamp(min=0)
    full = torch.rand(2, 7, dtype=F64)
    share = {"scalar": torch.tensor(0.3, dtype=F64), "row": full[:, :1], "full": full}.get(lam, lam)
    by_hand = full[:, 1:] if lam == "full" else share
    ours = fused(layer, (y, y.flip(0), share), shift=1, reduction="none")
    want = referenced(cut, (y[:, 1:], y.flip(0)[:, 1:], by_hand), reduction="none")
    assert_close(ours, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_shift_of_small_label_dtypes(dtype):
    layer, y, cut = _sequences(2, 7, k=1)
    y = y.clamp(min=0).to(dtype)
    for ignore_index in (None, 3):
        ours = fused(layer, y, shift=1, reduction="none", ignore_index=ignore_index)
        want = referenced(cut, y[:, 1:].long(), reduction="none", ignore_index=ignore_index)
        assert_close(ours, want)


def test_shift_with_only_ignored_labels_left():
    layer, y, _ = _sequences(2, 7, k=1)
    y = torch.full_like(y, -100)
    y[:, 0] = 1  # has no position before it
    loss = fused(layer, y, shift=1)
    assert loss.isnan() and all((g == 0).all() for g in gradients(loss, layer))
    assert fused(layer, y, shift=1, empty="zero") == 0


# --- K-dimensional weights -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [(3,), (2, 3), (1, 1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_k_dimensional_weights(kind, reduction, outputs, bias):
    h = make_logits((4, D), F64, requires_grad=True)
    w = make_logits((5, *outputs, D), F64, seed=1, requires_grad=True)
    b = make_logits((5, *outputs), F64, seed=2, requires_grad=True) if bias else None
    target = make_target((4, 5, *outputs), kind=kind, ignore_fraction=0.3)
    layer = Layer(h, w, b)
    logits = F.linear(h, w.view(-1, D), None if b is None else b.view(-1))
    options = dict(reduction=reduction, weight=torch.linspace(0.5, 1.5, 5, dtype=F64))
    want = F.cross_entropy(logits.view(4, 5, *outputs), target, **options)
    for way in ROW_WAYS if reduction == "none" else SCALAR_WAYS:
        ours = fused(layer, target, **options, **SCALAR_WAYS[way])
        assert_close(ours, want)
        assert_close(gradients(ours, layer), gradients(want, layer, retain_graph=True))
    assert_close(referenced(layer, target, **options), want)


def test_k_dimensional_weights_with_other_options():
    h, w = make_logits((4, D), F64), make_logits((5, 3, D), F64, seed=1)
    y = make_target((4, 5, 3), ignore_fraction=0.3)
    options = dict(tau=1.5, z_loss=0.1, softcap=5.0, token_weight=torch.rand(4, 3, dtype=F64))
    loss, stats = pyloss.fused_linear_cross_entropy(h, w, y, return_stats=("lse",), **options)
    want, want_stats = reference(h, w, y, return_stats=("lse",), **options)
    assert_close(loss, want)
    assert_close(stats.lse, want_stats["lse"])


# --- token_logprobs --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", ["auto", 3, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("lead", [(), (10,), (2, 5)], ids=str)
def test_token_logprobs(lead, temperature, bias, chunk):
    layer = make_layer(lead, D, V, bias=bias)
    y = make_target((math.prod(lead), V)).view(lead)
    retain = dict(retain_graph=True)
    log_p = F.log_softmax(F.linear(*layer) / temperature, -1)
    want = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    args = (*layer[:2], y, layer.bias, temperature)
    ours = pyloss.token_logprobs(*args, chunk=chunk)
    assert ours.shape == lead and ours.dtype == F64
    assert_close(ours, want)
    up = upstream_of(want)
    assert_close(gradients(ours, layer, up), gradients(want, layer, up, **retain))
    ours, entropy = pyloss.token_logprobs(*args, return_entropy=True, chunk=chunk)
    want_entropy = -(log_p.exp() * log_p).sum(-1)
    assert_close(ours, want)
    assert_close(entropy, want_entropy)
    c = 0.3 * up + 0.1
    for a, b in (
        (entropy, want_entropy),
        (ours * up + entropy * c, want * up + want_entropy * c),
    ):
        assert_close(gradients(a, layer, c, **retain), gradients(b, layer, c, **retain))


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_token_logprobs_of_ignored_tokens(ignore_index):
    layer = make_layer(N, D, V)
    y = _target(ignore_index)
    ignored = y == ignore_index
    with torch.no_grad():
        layer.input[ignored] = math.nan
    ours, entropy = pyloss.token_logprobs(
        *layer[:2], y, layer.bias, return_entropy=True, ignore_index=ignore_index
    )
    assert (ours[ignored] == 0).all() and (entropy[ignored] == 0).all()
    want = logprobs_reference(
        *layer[:2], y, layer.bias, return_entropy=True, ignore_index=ignore_index
    )
    assert_close([ours, entropy], list(want))
    grads = gradients(ours + entropy.exp(), layer)
    assert (grads[0][ignored] == 0).all()
    assert_close(grads, gradients(want[0] + want[1].exp(), layer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs_dtypes(dtype):
    layer, y = make_layer(N, D, V, dtype), _target()
    found = pyloss.token_logprobs(*layer[:2], y, layer.bias, 1.3, True)
    want = logprobs_reference(*(t.detach().double() for t in layer[:2]), y, layer.bias.double(),
                              1.3, True)  # fmt: skip
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, want):
        assert a.dtype == (F64 if dtype == F64 else F32)
        torch.testing.assert_close(a.double(), b, rtol=16 * eps, atol=32 * eps)
    assert [g.dtype for g in gradients(found[0] + found[1], layer)] == [dtype] * 3


def test_token_logprobs_are_exact_for_confident_tokens():
    """In float32 lse - z_y would leave nothing of log p = -1e-9."""
    h = torch.tensor([[1.0], [2.0]], requires_grad=True)
    w = torch.tensor([[20.0], [0.0]])
    logprob = pyloss.token_logprobs(h, w, torch.tensor([0, 0]))
    want = -torch.log1p(torch.exp(-torch.tensor([20.0, 40.0], dtype=F64)))
    torch.testing.assert_close(logprob.double(), want, rtol=1e-6, atol=0)
    (g,) = torch.autograd.grad(logprob.sum(), h)
    want_grad = 20 * torch.exp(want) * torch.exp(-torch.tensor([20.0, 40.0], dtype=F64))
    torch.testing.assert_close(g[:, 0].double(), want_grad, rtol=1e-5, atol=0)


def test_token_logprobs_options():
    layer = make_layer((2, 6), D, V)
    y = make_target((12, V), ignore_fraction=0.2).view(2, 6)
    options = dict(softcap=3.0, logit_scale=0.5, shift=1)
    ours = pyloss.token_logprobs(*layer[:2], y, layer.bias, 0.8, True, chunk=4, **options)
    want = logprobs_reference(*layer[:2], y, layer.bias, 0.8, True, **options)
    assert ours[0].shape == ours[1].shape == (2, 5)
    assert_close(list(ours), list(want))
    assert_close(gradients(ours[0] + ours[1], layer), gradients(want[0] + want[1], layer))
    by_hand = F.linear(layer.input[:, :-1], *layer[1:]) * 0.5
    by_hand = F.log_softmax(3.0 * torch.tanh(by_hand / 3.0) / 0.8, -1)
    keep = y[:, 1:] != -100
    gathered = by_hand.gather(-1, y[:, 1:, None].clamp(min=0)).squeeze(-1)
    assert_close(ours[0], torch.where(keep, gathered, 0.0))


# --- memory and work -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("way", ["forward", "recompute", "none", "stats"])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_logits_are_never_stored(way, dtype, ignored):
    rows, classes, features, chunk = 1024, 2000, 16, 64
    layer = make_layer(rows, features, classes, dtype)
    y = make_target((rows, classes), ignore_fraction=ignored)
    options = {
        "forward": {"strategy": "forward"},
        "recompute": {"strategy": "recompute"},
        "none": {"reduction": "none"},
        "stats": {"return_stats": ("lse", "entropy", "rank")},
    }[way]

    def step(chunk=chunk):
        out = fused(layer, y, chunk=chunk, **options)
        total = out.sum() if torch.is_tensor(out) else out[0] + out[1].entropy.mean()
        return torch.autograd.grad(total, layer)

    step()
    with Memory() as memory:
        step()
    part = chunk * classes * dtype.itemsize
    results = sum(t.numel() * 4 for t in layer)  # the weight's gradient is summed in float32
    assert memory.largest <= 1.1 * max(part, classes * features * 4)
    assert memory.peak <= part + 2 * results + rows * 200
    with Memory() as memory:  # the yardstick sees logits where they are stored
        step(chunk=rows)
    assert memory.largest >= (1 - 1.5 * ignored) * rows * classes * dtype.itemsize


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_automatic_chunks_bound_the_memory(dtype):
    rows, classes = 1536, 32000
    layer = make_layer(rows, 2, classes, dtype, bias=False)
    y = make_target((rows, classes))
    with Memory() as memory:
        loss = fused(layer, y)
        torch.autograd.grad(loss, layer[:2])
    assert memory.peak <= 40 << 20 < rows * classes * dtype.itemsize


@pytest.mark.slow
@pytest.mark.parametrize("dtype, limit", [(F32, 64), (BF16, 96)])
def test_memory_of_the_issue(dtype, limit):
    """N 2048, V 32000, D 256: MB beyond inputs and gradients."""
    layer = make_layer(2048, 256, 32000, dtype, bias=False)
    y = make_target((2048, 32000))
    with Memory() as memory:
        grads = torch.autograd.grad(fused(layer, y), layer[:2])
    kept = sum(g.numel() * g.element_size() for g in grads)
    assert memory.peak - kept <= limit * 1_000_000


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("features, chunks", [(192, 1), (191, 2)])
def test_one_chunk_where_it_saves_the_float32_gradient(features, chunks, reduction):
    """384 rows: their bfloat16 logits take as much as 192 features of the float32 gradient."""
    rows, classes = 384, 80000
    layer = make_layer(rows, features, classes, BF16)
    y = make_target((rows, classes))
    up = torch.ones((rows,) if reduction == "none" else (), dtype=BF16)
    with Memory() as memory:
        grads = torch.autograd.grad(fused(layer, y, reduction=reduction), layer, up)
    chunk = 256 if chunks > 1 else rows
    kept = sum(g.numel() * g.element_size() for g in grads)
    wide = 4 * classes * features if chunks > 1 else 0
    expected = 2 * chunk * classes + wide
    assert abs(memory.peak - kept - expected) <= 0.1 * expected


@pytest.mark.parametrize("kind", ["index", "mixup"])
def test_chunks_cost_no_accuracy_in_bfloat16(kind):
    """Each chunk's product is rounded; the labels' part, the largest, is not."""
    rows, classes, features = 512, 4000, 64
    layer = make_layer(rows, features, classes, BF16)
    y = make_target((rows, classes))
    if kind == "mixup":
        y = (y, y.roll(1), 0.3)
        y[1][:9] = y[0][:9]  # both labels the same
    exact = fresh(layer, F64)
    want = torch.autograd.grad(referenced(exact, y), exact)

    def errors(chunk):
        got = torch.autograd.grad(fused(layer, y, chunk=chunk), layer)
        return [(g.double() - w).norm().item() for g, w in zip(got, want)]

    for several, one in zip(errors(64), errors(rows)):
        assert several <= 1.05 * one


def test_forward_without_grad_allocates_no_gradient():
    layer = make_layer(256, 512, 4000, F32, bias=False)
    y = make_target((256, 4000))
    gradient = 4000 * 512 * 4
    for requires_grad in (True, False):
        layer = fresh(layer._replace(bias=None)) if requires_grad else Layer(
            *(t.detach() for t in layer[:2]), None
        )  # fmt: skip
        for options in ({}, {"return_stats": ("lse",)}, {"reduction": "none"}):
            with torch.no_grad(), Memory() as memory:
                fused(layer, y, chunk=16, **options)
            assert memory.peak < gradient / 4
    quiet = make_layer(256, 512, 4000, F32, bias=False, requires_grad=False)
    quiet.input.requires_grad_()
    with Memory() as memory:  # frozen weight
        fused(quiet, y, chunk=16).backward()
    assert memory.peak < 4000 * 512 * 4 / 2


def test_shift_copies_nothing():
    layer = make_layer((4, 256), 512, 16, F32, bias=False, requires_grad=False)
    y = make_target((4 * 256, 16)).view(4, 256)
    with Memory() as memory:
        fused(layer, y, shift=1, chunk=64)
    assert memory.peak < layer.input.numel() * 4 / 4


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("strategy", ["forward", "recompute"])
def test_products_of_frozen_arguments_are_skipped(strategy, dtype):
    rows, features, classes = 24, 16, 40
    y = make_target((rows, classes))
    one = rows * features * classes
    again = 1 if strategy == "recompute" else 0
    for wants, products in (
        ((True, True, True), 3 + again),
        ((True, False, False), 2 + again),
        ((False, True, False), 2 + again),
        ((False, False, True), 1 + again),
    ):
        layer = make_layer(rows, features, classes, dtype, requires_grad=False)
        for t, wanted in zip(layer, wants):
            t.requires_grad_(wanted)

        def step(layer=layer):
            fused(layer, y, strategy=strategy, chunk=9).backward()

        step()
        assert multiplications(step) == products * one
    layer = make_layer(rows, features, classes, dtype, requires_grad=False)
    assert multiplications(lambda: fused(layer, y, strategy=strategy, chunk=9)) == one
    layer.input.requires_grad_()
    with torch.no_grad():
        assert multiplications(lambda: fused(layer, y, strategy=strategy, chunk=9)) == one


def test_ignored_rows_are_left_out_of_the_products():
    layer = make_layer(40, 16, 30, F32)
    y = make_target((40, 30))
    y[10:] = -100
    work = multiplications(lambda: fused(layer, y, chunk=7).backward())
    assert work == 3 * 10 * 16 * 30


# --- determinism, threads, mutation ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_arguments_are_not_changed(dtype, reduction):
    layer, y = make_layer(N, D, V, dtype), _target()
    k, w = torch.rand(N), torch.rand(V)
    tensors = [*layer, y, k, w]
    before = [(t.detach().clone(), t._version) for t in tensors]
    for way in ROW_WAYS if reduction == "none" else SCALAR_WAYS:
        loss = fused(
            layer, y, reduction=reduction, token_weight=k, weight=w, **SCALAR_WAYS[way]
        )  # fmt: skip
        up = upstream_of(loss)
        kept = up.clone()
        gradients(loss, layer, up, retain_graph=True)
        value = loss.detach().clone()
        gradients(loss, layer, up)
        assert torch.equal(up, kept) and torch.equal(loss, value)
    for t, (value, version) in zip(tensors, before):
        assert torch.equal(t.detach(), value) and t._version == version


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("way", SCALAR_WAYS)
def test_repeatable(dtype, way):
    layer, y = make_layer(150, 8, 300, dtype), make_target((150, 300), ignore_fraction=0.2)
    first = run(fused, layer, y, **SCALAR_WAYS[way])
    for _ in range(2):
        again = run(fused, layer, y, **SCALAR_WAYS[way])
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(a, b) for a, b in zip(again[1], first[1]))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("way", SCALAR_WAYS)
def test_thread_count_does_not_matter(dtype, way, keep_num_threads):
    """torch promises no bits across thread counts for its products, so the arguments are multiples
    of 1/2 whose logits are exact in any order. Then loss, statistics and the bias gradient, which
    no product enters, must agree bitwise; the other gradients are torch's products of them."""
    generator = torch.Generator().manual_seed(0)
    layer = Layer(
        *(
            (torch.randint(-3, 4, shape, generator=generator) / 2).to(dtype).requires_grad_()
            for shape in ((301, 7), (1111, 7), (1111,))
        )
    )
    y = make_target((301, 1111), ignore_fraction=0.2)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        loss, grads = run(fused, layer, y, z_loss=0.01, loss_dtype=F32, **SCALAR_WAYS[way])
        rows, stats = fused(layer, y, reduction="none", return_stats=("lse", "entropy"))
        results.append(([loss, rows, *stats[:1], stats.entropy, grads[2]], grads[:2]))
    for mine, products in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(mine, results[0][0]))
        for a, b in zip(products, results[0][1]):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * float(b.abs().max()))


def test_python_threads_at_the_same_time(keep_num_threads):
    torch.set_num_threads(2)
    y = make_target((120, 200), ignore_fraction=0.2)
    jobs = [(seed, way) for seed in range(4) for way in SCALAR_WAYS]

    def job(args):
        seed, way = args
        layer = make_layer(120, 16, 200, F32, seed=seed)
        return run(fused, layer, y, **{"chunk": 32, **SCALAR_WAYS[way]})

    want = [job(args) for args in jobs]
    with ThreadPoolExecutor(6) as pool:
        for got, expected in zip(pool.map(job, jobs), want):
            assert_close(got, expected)


def test_deterministic_algorithms_mode():
    """That mode also fills fresh memory with NaN, which shows what is read before it is written."""
    layer, y = make_layer(N, D, V, F32), _target()
    want = [run(fused, layer, y, **way) for way in SCALAR_WAYS.values()]
    _, stats = fused(layer, y, return_stats=ALL_STATS, chunk=3)
    torch.use_deterministic_algorithms(True)
    try:
        got = [run(fused, layer, y, **way) for way in SCALAR_WAYS.values()]
        _, again = fused(layer, y, return_stats=ALL_STATS, chunk=3)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, want):
        assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(again, stats))


# --- devices, backends -----------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_meta_device(lead):
    def empty(*shape):
        return torch.empty(shape, device="meta", dtype=BF16, requires_grad=True)

    layer = Layer(empty(*lead, D), empty(V, D), empty(V))
    y = torch.empty(lead, device="meta", dtype=torch.int64)
    for way in SCALAR_WAYS.values():
        loss = fused(layer, y, **way)
        assert loss.is_meta and loss.shape == () and loss.dtype == BF16
        for g, t in zip(torch.autograd.grad(loss, layer), layer):
            assert g.is_meta and g.shape == t.shape and g.dtype == t.dtype
    loss, stats = fused(layer, y, reduction="none", loss_dtype=F32, return_stats=ALL_STATS)
    assert loss.shape == lead and loss.dtype == F32
    assert all(s.is_meta and s.shape == lead for s in stats)
    for g, t in zip(torch.autograd.grad(loss.sum() + stats.lse.sum(), layer), layer):
        assert g.is_meta and g.shape == t.shape


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fake_tensors_have_the_shapes_of_real_ones(dtype):
    def step(layer, y, **options):
        out = fused(layer, y, **options)
        loss, stats = out if isinstance(out, tuple) else (out, ())
        floats = [s for s in stats if s is not None and s.requires_grad]
        grads = torch.autograd.grad([loss, *floats], layer, [torch.ones_like(t) for t in
                                                             (loss, *floats)])  # fmt: skip
        return [loss, *(s for s in stats if s is not None), *grads]

    for options in (
        {},
        {"strategy": "forward", "chunk": 3},
        {"strategy": "recompute"},
        {"reduction": "none", "loss_dtype": F32},
        {"return_stats": ALL_STATS},
        {"accumulate_dtype": F32, "shift": 1},
    ):
        real = step(make_layer((2, 5), D, V, dtype), _target().view(2, 5), **options)
        with FakeTensorMode():
            layer = Layer(
                *(torch.empty(s, dtype=dtype, requires_grad=True) for s in ((2, 5, D), (V, D), V))
            )
            fake = step(layer, torch.empty((2, 5), dtype=torch.int64), **options)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
        assert [t.stride() for t in fake] == [t.stride() for t in real]


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_backend_reference_agrees(name):
    layer = make_layer(N, D, V, F32)
    target, options = make_options(name, (N, V), F32)
    for reduction in ("mean", "none"):
        results = []
        for backend in ("cpu", "reference"):
            with pyloss.backend(backend):
                ways = ROW_WAYS if reduction == "none" else SCALAR_WAYS
                for way in ways.values():
                    results.append(run(fused, layer, target, reduction=reduction, **options, **way))
        for other in results[1:]:
            assert_close(other, results[0], factor=2.0)


def test_backend_reference_statistics():
    layer, y = make_layer(N, D, V, F32), _target()
    found = []
    for backend in ("cpu", "reference"):
        with pyloss.backend(backend):
            loss, stats = fused(layer, y, return_stats=ALL_STATS, z_loss=0.1, chunk=3)
            total = loss + stats.entropy.sum() + stats.lse.square().sum()
            found.append((stats, gradients(total, layer)))
    for a, b in zip(*(stats for stats, _ in found)):
        torch.testing.assert_close(a, b)
    assert_close(found[0][1], found[1][1], factor=2.0)


# --- torch's own function --------------------------------------------------------------------

needs_torch_function = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="F.linear_cross_entropy came with torch 2.13"
)


@needs_torch_function
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_stands_in_for_the_function_of_torch(reduction):
    layer, y = make_layer(N, D, V, F32), _target()
    w = torch.rand(V) + 0.5
    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    for options in (None, chunked, torch.nn.LinearCrossEntropyOptions()):
        kwargs = dict(linear_bias=layer.bias, weight=w, reduction=reduction, options=options)
        ours = pyloss.fused_linear_cross_entropy(*layer[:2], y, **kwargs)
        theirs = F.linear_cross_entropy(*layer[:2], y, **kwargs)
        assert_close(ours, theirs, factor=2.0)
        assert_close(gradients(ours, layer), gradients(theirs, layer), factor=2.0)


@needs_torch_function
def test_signature_takes_every_argument_of_torch():
    import inspect

    ours = inspect.signature(pyloss.fused_linear_cross_entropy).parameters
    theirs = inspect.signature(F.linear_cross_entropy).parameters
    for name, parameter in theirs.items():
        assert name in ours, name
        assert ours[name].default == parameter.default, name
    positional = [n for n, p in theirs.items() if p.kind != p.KEYWORD_ONLY]
    assert list(ours)[: len(positional)] == positional


@needs_torch_function
def test_nan_in_an_ignored_row_is_the_deliberate_difference():
    layer, y = make_layer(N, D, V, F32), _target()
    with torch.no_grad():
        layer.input[y == -100] = math.nan
    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    assert F.linear_cross_entropy(*layer[:2], y, options=chunked).isnan()
    ours = pyloss.fused_linear_cross_entropy(*layer[:2], y, options=chunked)
    assert ours.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours, layer[:2]))


# --- the module ------------------------------------------------------------------------------


def _module(**options):
    torch.manual_seed(3)
    return pyloss.nn.LinearCrossEntropyLoss(D, V, **options)


@needs_torch_function
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [(), (3,), (2, 3)])
@pytest.mark.parametrize("weight", [True, False])
def test_module_loads_the_state_of_torch(weight, outputs, bias):
    options = dict(
        out_features=outputs, bias=bias, weight=torch.linspace(0.5, 2.0, V) if weight else None
    )
    theirs = torch.nn.LinearCrossEntropyLoss(D, V, **options)
    ours = pyloss.nn.LinearCrossEntropyLoss(D, V, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    h = make_logits((N, D))
    for kind in ("index", "prob"):
        target = make_target((N, V, *outputs), kind=kind)
        target = target.float() if kind == "prob" else target
        torch.testing.assert_close(ours(h, target), theirs(h, target))
    theirs.load_state_dict(ours.state_dict())


@needs_torch_function
def test_module_signature_takes_every_argument_of_torch():
    import inspect

    theirs = inspect.signature(torch.nn.LinearCrossEntropyLoss.__init__).parameters
    ours = inspect.signature(pyloss.nn.LinearCrossEntropyLoss.__init__).parameters
    for name, parameter in theirs.items():
        assert name in ours and ours[name].default == parameter.default, name
    module = pyloss.nn.LinearCrossEntropyLoss(
        D, V, device="cpu", dtype=F64, options=torch.nn.LinearCrossEntropyOptions()
    )
    assert module.linear.weight.dtype == F64


def test_module_initialises_as_linear():
    module = _module(bias=True)
    torch.manual_seed(3)
    linear = torch.nn.Linear(D, V)
    assert torch.equal(module.linear.weight, linear.weight)
    assert torch.equal(module.linear.bias, linear.bias)


def test_module_takes_the_tensors_of_a_call():
    module = _module()
    h, y, k = make_logits((2, 5, D)), _target().view(2, 5), torch.rand(2, 5)
    got = module(h, y, token_weight=k, num_items=4, shift=1)
    want = pyloss.fused_linear_cross_entropy(
        h, module.linear.weight, y, token_weight=k, num_items=4, shift=1
    )
    assert torch.equal(got, want)
    loss, stats = _module(return_stats=("lse",))(h, y)
    assert stats.lse.shape == (2, 5)


def test_module_checks_as_torch_does():
    with pytest.raises(RuntimeError, match="weight"):
        _module(weight=torch.ones(V + 1))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        _module(label_smoothing=1.5)
    with pytest.raises((TypeError, ValueError)):
        _module(no_such_option=1)(make_logits((N, D)), _target())


def test_module_refuses_unknown_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'z_los'"):
        pyloss.nn.LinearCrossEntropyLoss(D, V, z_los=1e-4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z_los'"):
        pyloss.nn.LinearCrossEntropyLoss.borrow(torch.nn.Linear(D, V), z_los=1e-4)


@pytest.mark.parametrize(
    "error, name, value",
    [
        (ValueError, "reduction", "men"), (ValueError, "empty", "zro"), (ValueError, "tau", -1.0),
        (TypeError, "temperature", "x"), (TypeError, "ignore_index", 1.5),
        (TypeError, "chunk", 2.5),
        (ValueError, "strategy", "x"), (ValueError, "loss_dtype", "x"),
        (ValueError, "filter", -1.0), (ValueError, "accumulate_dtype", F64),
    ],
)  # fmt: skip
def test_module_checks_its_options_when_made(error, name, value):
    with pytest.raises(error, match=name):
        _module(**{name: value})
    with pytest.raises(error, match=name):
        pyloss.nn.LinearCrossEntropyLoss.borrow(torch.nn.Linear(D, V), **{name: value})


def test_module_prints_its_options():
    text = repr(_module(bias=True, tau=1.5, reduction="sum"))
    for part in ("in_features=6", "num_classes=13", "bias=True"):
        assert part in text, text
    head = torch.nn.Linear(D, V)
    assert "tau=1.5" in repr(pyloss.nn.LinearCrossEntropyLoss.borrow(head, tau=1.5))


def test_module_moves_its_weights():
    module = _module(weight=torch.linspace(0.5, 2.0, V)).to(F64)
    assert module.linear.weight.dtype == module.weight.dtype == F64
    assert module(make_logits((N, D), F64), _target()).dtype == F64
    assert module.to("meta").linear.weight.is_meta


class _Tied(torch.nn.Module):
    """A language model whose loss borrows the embedding."""

    def __init__(self, **options):
        super().__init__()
        self.embed = torch.nn.Embedding(V, D)
        self.body = torch.nn.Linear(D, D)
        self.loss = pyloss.nn.LinearCrossEntropyLoss.borrow(self.embed, **options)

    def forward(self, tokens):
        return self.loss(self.body(self.embed(tokens)), tokens)


def test_borrowed_weight_belongs_to_the_lender():
    torch.manual_seed(0)
    model = _Tied(shift=1)
    assert list(model.loss.parameters()) == [] and len(model.loss.state_dict()) == 0
    assert {n for n, _ in model.named_parameters()} == {
        "embed.weight",
        "body.weight",
        "body.bias",
    }
    assert "embed.weight" in model.state_dict()
    assert not any("loss" in name for name in model.state_dict())
    tokens = torch.randint(V, (2, 6))
    model(tokens).backward()
    h = model.body(model.embed(tokens))
    logits = F.linear(h[:, :-1], model.embed.weight).flatten(0, 1)
    want = torch.autograd.grad(
        F.cross_entropy(logits, tokens[:, 1:].flatten()), list(model.parameters())
    )
    for p, g in zip(model.parameters(), want):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to(F64), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["to", "deepcopy", "pickle"],
)
def test_borrowed_weight_follows_its_module(move):
    torch.manual_seed(0)
    tokens = torch.randint(V, (2, 6))
    model = _Tied()
    before = model(tokens).detach().double()
    moved = move(model)
    torch.testing.assert_close(moved(tokens).detach().double(), before, rtol=1e-6, atol=1e-6)
    moved(tokens).backward()
    assert moved.embed.weight.grad.dtype == moved.embed.weight.dtype
    with torch.no_grad():
        moved.embed.weight.zero_()
    torch.testing.assert_close(moved(tokens).item(), math.log(V))
    other = _Tied()
    other.load_state_dict(moved.state_dict())
    torch.testing.assert_close(other(tokens).item(), math.log(V))


def test_borrowed_parameter_may_be_replaced():
    """Some loaders put a new Parameter in the place of the old one."""
    model = _Tied()
    tokens = torch.randint(V, (2, 6))
    model.embed.weight = torch.nn.Parameter(torch.zeros(V, D))
    loss = model(tokens)
    torch.testing.assert_close(loss.item(), math.log(V))
    loss.backward()
    assert model.embed.weight.grad is not None


def test_borrowing_a_linear_layer_uses_its_bias():
    head = torch.nn.Linear(D, V)
    module = pyloss.nn.LinearCrossEntropyLoss.borrow(head, tau=1.5)
    h, y = make_logits((N, D), requires_grad=True), _target()
    loss = module(h, y)
    want = pyloss.fused_linear_cross_entropy(h, head.weight, y, head.bias, tau=1.5)
    assert torch.equal(loss, want)
    loss.backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    with pytest.raises((TypeError, AttributeError, ValueError)):
        pyloss.nn.LinearCrossEntropyLoss.borrow(torch.nn.ReLU())


# --- bad input -------------------------------------------------------------------------------


def test_filter_off_the_gpu_is_exact_or_refused():
    layer, y = make_layer(N, D, V), _target()
    try:
        loss, grads = run(fused, layer, y, filter=0.5)
    except (RuntimeError, ValueError) as error:
        assert "filter" in str(error)
    else:
        assert_close((loss, grads), run(unfused, layer, y))


def test_after_an_error_the_next_call_is_right():
    layer, y = make_layer(N, D, V), _target()
    bad = y.clone()
    bad[-1] = V
    for way in SCALAR_WAYS.values():
        with pytest.raises(IndexError):
            fused(layer, bad, **way)
        assert_close(run(fused, layer, y, **way), run(unfused, layer, y))


def test_exact_arguments_of_the_reference_are_detached():
    """The helper that the comparisons rest on: float64, no graph, same values."""
    x = torch.randn(3, requires_grad=True)
    y = exact({"a": (x, 2)})["a"][0]
    assert y.dtype == F64 and not y.requires_grad and torch.equal(y.float(), x)
