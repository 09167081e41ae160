"""A step in which nothing counts: the weights must not learn NaN from it.

Every way of the gradient (written in the forward, computed in the backward, compiled, as torch
operations, on the reference) against what the formula gives: a row that is ignored, or whose token
weight is 0, has the gradient 0, whatever comes from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyloss
from pyloss.functional import linear_distillation_loss

N, D, V = 4, 3, 5
Y, IGNORED = torch.tensor([0, 1, 2, 3]), torch.full((N,), -100)
NOTHING, NO_ITEMS = torch.zeros(N), torch.tensor(0.0)
F16, F32, F64 = torch.float16, torch.float32, torch.float64

# (options, target, factor of the loss, the loss)
CASES = {
    "no labels, no items": (dict(num_items=NO_ITEMS), IGNORED, 1.0, math.nan),
    "no labels, no items, zero": (dict(num_items=NO_ITEMS, empty="zero"), IGNORED, 1.0, 0.0),
    "no labels, sum": (dict(reduction="sum"), IGNORED, math.inf, 0.0),
    "no labels, mean": (dict(), IGNORED, math.inf, math.nan),
    "labels, no items, zero": (dict(num_items=NO_ITEMS, empty="zero"), Y, 1.0, 0.0),
    "no weight": (dict(token_weight=NOTHING), Y, 1.0, math.nan),
    "no weight, zero": (dict(token_weight=NOTHING, empty="zero", z_loss=0.1), Y, 1.0, 0.0),
    "no weight, no items": (dict(token_weight=NOTHING, num_items=NO_ITEMS), Y, 1.0, math.nan),
    "no weight, no items, zero": (
        dict(token_weight=NOTHING, num_items=NO_ITEMS, empty="zero"), Y, 1.0, 0.0
    ),
    "no weight, sum": (dict(token_weight=NOTHING, reduction="sum"), Y, math.inf, 0.0),
    "no weight, smoothed": (
        dict(token_weight=NOTHING, label_smoothing=0.1, weight=torch.rand(V)), Y, 1.0, math.nan
    ),
}  # fmt: skip


def row(dtype: torch.dtype, **call) -> tuple[Tensor, Callable]:
    return torch.randn(N, V).to(dtype), pyloss.fused_cross_entropy


def linear(dtype: torch.dtype) -> tuple[Tensor, Callable]:
    weight = torch.randn(V, D).to(dtype)

    def call(x, target, **options):
        return pyloss.fused_linear_cross_entropy(x, weight, target, **options)

    return torch.randn(N, D).to(dtype), call


def of_weight(dtype: torch.dtype) -> tuple[Tensor, Callable]:
    hidden = torch.randn(N, D).to(dtype)

    def call(w, target, **options):
        return pyloss.fused_linear_cross_entropy(hidden, w, target, **options)

    return torch.randn(V, D).to(dtype), call


def distillation(dtype: torch.dtype) -> tuple[Tensor, Callable]:
    weight, teacher = torch.randn(V, D).to(dtype), torch.randn(N, D).to(dtype)

    def call(x, target, **options):
        return linear_distillation_loss(x, weight, teacher, weight, target=target, **options)

    return torch.randn(N, D).to(dtype), call


FUNCTIONS = {f.__name__: f for f in (row, linear, of_weight, distillation)}


def check(function: str, case: str, dtype=F32, compiled=False, graph=False, **more) -> None:
    options, target, factor, value = CASES[case]
    if function == "distillation" and {"token_weight", "weight"} & set(options):
        pytest.skip("has no weights")
    x, call = FUNCTIONS[function](dtype)
    x.requires_grad_()
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager")
    loss = call(x, target, **options, **more)
    torch.testing.assert_close(loss.item(), value, equal_nan=True)
    (grad,) = torch.autograd.grad(loss * factor, x, create_graph=graph)
    assert torch.equal(grad, torch.zeros_like(x)), grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_counts(function: str, dtype: torch.dtype, case: str) -> None:
    check(function, case, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["compiled", "graph", "reference", "recompute"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_ways(function: str, way: str, case: str) -> None:
    if way == "reference":
        with pyloss.backend("reference"):
            check(function, case)
    elif way == "recompute":
        if "linear" not in function and function != "of_weight":
            pytest.skip("one strategy")
        check(function, case, strategy="recompute")
    else:
        check(function, case, **{way: True})


@pytest.mark.parametrize("kind", ["probabilities", "mixup", "focal"])
def test_other_targets(kind: str) -> None:
    x = torch.randn(N, V, requires_grad=True)
    options = dict(token_weight=NOTHING)
    if kind == "focal":
        loss = pyloss.focal_loss(x, Y, **options)
    else:
        target = torch.rand(N, V) if kind == "probabilities" else (Y, Y.flip(0), 0.3)
        loss = pyloss.fused_cross_entropy(x, target, **options)
    assert loss.isnan()
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_class_weights_of_zero_are_nan_as_in_torch() -> None:
    """Rows count there, and the mean divides by their weights."""
    x = torch.randn(N, V, requires_grad=True)
    for call in (F.cross_entropy, pyloss.fused_cross_entropy):
        loss = call(x, Y, weight=torch.zeros(V))
        assert loss.isnan() and torch.autograd.grad(loss, x)[0].isnan().any()
    loss = pyloss.fused_cross_entropy(x, Y, weight=torch.zeros(V), empty="zero")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(x))


def test_rows_of_weight_zero_beside_others() -> None:
    """A NaN from above reaches the rows that count, and no other."""
    x = torch.randn(N, V, requires_grad=True)
    k = torch.tensor([0.0, 2.0, 0.0, 1.0])
    for dtype in (F32, F64):
        loss = pyloss.fused_cross_entropy(x.to(dtype), Y, token_weight=k)
        (grad,) = torch.autograd.grad(loss * math.inf, x)
        assert torch.equal(grad[::2], torch.zeros(2, V)) and not grad[1::2].isfinite().any()


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("function", ["row", "linear", "distillation"])
def test_certain_rows_are_not_hidden(function: str, factor: float) -> None:
    """A row whose gradient is 0 because it is certain learns what comes from above, as in torch;
    an ignored one does not."""
    y = torch.tensor([0, -100, 2, 1])
    certain = 200.0 * F.one_hot(y.clamp(min=0), 3).float()
    eye = torch.eye(3)
    calls = {
        "row": lambda x: pyloss.fused_cross_entropy(x, y),
        "linear": lambda x: pyloss.fused_linear_cross_entropy(x, eye, y),
        "distillation": lambda x: linear_distillation_loss(x, eye, certain, eye, target=y),
    }
    x = certain.clone().requires_grad_()
    (plain,) = torch.autograd.grad(calls[function](x), x)
    assert not plain.any()
    (grad,) = torch.autograd.grad(calls[function](x) * factor, x)
    assert torch.equal(grad[1], torch.zeros(3))
    assert not grad[[0, 2, 3]].isfinite().any()


# --------------------------------------------------------------------------------------------------
# Losses whose forward finds the gradient: elsewhere 0 times what comes from above was NaN


def betti(x: Tensor) -> Tensor:
    return pyloss.betti_matching_loss(x.view(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), reduction="sum")


def sorting(x: Tensor) -> Tensor:
    return pyloss.sorting_cross_entropy(x, torch.zeros_like(x), reduction="sum", ties="share")


RING = torch.tensor([[0.9, 0.8, 0.7, 0.0], [0.9, 0.1, 0.7, 0.0], [0.9, 0.8, 0.7, 0.0], [0.0] * 4])
EARLY = {
    "no bar": (betti, torch.full((16,), 0.5)),
    "a hole": (betti, RING.flatten()),
    "rows of one element": (sorting, torch.randn(3, 1)),
}


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("way", ["early", "again", "hooked", "compiled", "graph", "reference"])
@pytest.mark.parametrize("case", EARLY)
def test_what_takes_no_part_stays_zero(case: str, way: str, factor: float) -> None:
    f, values = EARLY[case]
    x = values.clone().requires_grad_()
    (plain,) = torch.autograd.grad(f(x), x)
    assert plain.any() == (case == "a hole")
    if way == "compiled":
        torch._dynamo.reset()
        f = torch.compile(f, backend="aot_eager")
    hooks = torch.autograd.graph.saved_tensors_hooks
    with pyloss.backend("reference" if way == "reference" else None):
        with hooks(lambda t: t, lambda t: t) if way == "hooked" else nullcontext():
            loss = f(x) * factor
        if way == "again":
            torch.autograd.grad(loss, x, retain_graph=True)
        (grad,) = torch.autograd.grad(loss, x, create_graph=way == "graph")
    assert torch.equal(grad.detach()[plain == 0], plain[plain == 0])
    assert not grad[plain != 0].isfinite().any()
