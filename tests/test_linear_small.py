"""Plain calls of few rows, which pass the op by: the same values, gradients and errors as by it."""

from __future__ import annotations

import pytest
import torch
from helpers import needs_torch
from torch.utils.flop_counter import FlopCounterMode

import pyloss
from pyloss.ops import _gemm
from pyloss.ops.linear_cross_entropy import small

N, V, D = 8, 50, 16
BY_THE_OP = {"chunk": N}  # an option that the short way leaves to the op


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """How many calls went the short way."""
    monkeypatch.setattr(_gemm, "_forced", "own")
    calls, run = [], small._run

    def counted(*args):
        calls.append(1)
        return run(*args)

    monkeypatch.setattr(small, "_run", counted)
    return calls


def _layer(bias: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer = [torch.randn(N, D), torch.randn(V, D), torch.randn(V)][: 3 if bias else 2]
    return [t.requires_grad_() for t in layer]


def _target(dtype=torch.int64) -> torch.Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(1)).to(dtype)


def _loss(layer, y, **options):
    return pyloss.fused_linear_cross_entropy(layer[0], layer[1], y, *layer[2:], **options)


@pytest.mark.parametrize("ignored", [0, 3, N])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_equal_to_the_op(count, ignored, reduction, bias, dtype) -> None:
    layer, y = _layer(bias), _target(dtype)
    options = {"reduction": reduction, "ignore_index": 2 if dtype == torch.uint8 else -100}
    y[:ignored] = options["ignore_index"]
    with torch.no_grad():
        layer[0][:ignored] = torch.nan  # what is ignored is not looked at
        evaluated = _loss(layer, y, **options)
    for factor in (1.0, 2.5, torch.inf):
        ours, theirs = _loss(layer, y, **options), _loss(layer, y, **options, **BY_THE_OP)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(evaluated, ours, rtol=0, atol=0, equal_nan=True)
        upstream = torch.tensor(factor)
        for g, h in zip(
            torch.autograd.grad(ours, layer, upstream),
            torch.autograd.grad(theirs, layer, upstream),
        ):
            torch.testing.assert_close(g, h, equal_nan=True)
    assert len(count) == 4


def test_a_large_layer_of_which_no_row_counts(count) -> None:
    """The weight's gradient is then a sum over nothing, too large to be cut along that."""
    x, w = torch.randn(1, 400, requires_grad=True), torch.randn(500, 400, requires_grad=True)
    _loss([x, w], torch.tensor([-100]), reduction="sum").backward()
    assert len(count) == 1 and not w.grad.any() and not x.grad.any()


def test_gradients_again_and_of_gradients(count) -> None:
    y = _target()
    found = []
    for options in ({}, BY_THE_OP):
        layer = _layer()
        loss = _loss(layer, y, **options)
        first = torch.autograd.grad(loss, layer, retain_graph=True)
        again = torch.autograd.grad(loss, layer, retain_graph=True)
        torch.testing.assert_close(again, first)
        once = torch.autograd.grad(loss, layer, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in once), layer))
    torch.testing.assert_close(*found)
    assert len(count) == 1


def test_frozen_tensors_get_no_gradient(count) -> None:
    for at in range(3):
        layer = _layer()
        layer[at].requires_grad_(False)
        _loss(layer, _target()).backward()
        assert [t.grad is None for t in layer] == [i == at for i in range(3)]
    assert len(count) == 3


def test_a_label_out_of_range_and_a_changed_argument(count) -> None:
    layer, y = _layer(), _target()
    y[3] = V
    messages = []
    for options in ({}, BY_THE_OP):
        with pytest.raises(IndexError) as error:
            _loss(layer, y, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    loss = _loss(layer, _target())
    with torch.no_grad():
        layer[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(count) == 2


def _under_vmap(layer, y):
    torch.func.vmap(lambda x: pyloss.fused_linear_cross_entropy(x, layer[1], y))(layer[0][None])


def _under_autocast(layer, y):
    with torch.autocast("cpu"):
        _loss(layer, y)


def _under_flop_counter(layer, y):
    with FlopCounterMode(display=False) as mode:
        _loss(layer, y)
    assert mode.get_total_flops() == 3 * 2 * N * V * D


NEEDS_HOOKS = needs_torch((2, 8), "hooks on saved tensors cannot be seen before")


def _under_hooks(layer, y):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        _loss(layer, y)


def _on_the_reference(layer, y):
    with pyloss.backend("reference"):
        _loss(layer, y)


def _with_torchs_products(layer, y):
    before, _gemm._forced = _gemm._forced, "torch"
    try:
        _loss(layer, y)
    finally:
        _gemm._forced = before


@pytest.mark.parametrize(
    "call",
    [
        _under_vmap,
        _under_autocast,
        _under_flop_counter,
        pytest.param(_under_hooks, marks=NEEDS_HOOKS),
        _on_the_reference,
        _with_torchs_products,
        lambda layer, y: _loss([layer[0], layer[1], torch.zeros(()).expand(V)], y),
        lambda layer, y: _loss([t.double() for t in layer], y),
        lambda layer, y: _loss([layer[0], layer[1].t().contiguous().t()], y),
        lambda layer, y: _loss(layer, y, tau=1.5),
        lambda layer, y: _loss(layer, y, temperature=torch.tensor(1.0)),
        lambda layer, y: _loss(layer, y, reduction="none"),
        lambda layer, y: _loss(layer, torch.nn.functional.one_hot(y, V).float()),
        lambda layer, y: _loss([torch.zeros(400, D), layer[1]], torch.zeros(400, dtype=torch.long)),
    ],
)
def test_what_is_left_to_the_op(count, call) -> None:
    call(_layer(), _target())
    assert not count
