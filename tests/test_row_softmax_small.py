"""Plain calls of few logits, which pass the op by: the same values, gradients and errors."""

from __future__ import annotations

import pytest
import torch
from helpers import needs_torch

import pyloss
from pyloss.ops.row_softmax import small

N, C = 8, 50
BY_THE_OP = {"empty": "zero"}  # an option that the short way leaves to the op


@pytest.fixture
def count(monkeypatch) -> list[bool]:
    """The calls that went the short way: whether each wrote a gradient."""
    calls, run = [], small._run

    def counted(*args):
        calls.append(args[-1] is not None)
        return run(*args)

    monkeypatch.setattr(small, "_run", counted)
    return calls


def _logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(N, C, requires_grad=True)


def _target(dtype=torch.int64) -> torch.Tensor:
    return torch.randint(C, (N,), generator=torch.Generator().manual_seed(1)).to(dtype)


loss_of = pyloss.fused_cross_entropy


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_the_bits_of_the_op(count, ignored, reduction, dtype) -> None:
    x, y = _logits(), _target(dtype)
    options = {"reduction": reduction, "ignore_index": 2 if dtype == torch.uint8 else -100}
    y[:ignored] = options["ignore_index"]
    with torch.no_grad():
        x[:ignored] = torch.nan  # what is ignored is not looked at
        evaluated = loss_of(x, y, **options)
    for factor in (1.0, 2.5, torch.inf):
        ours, theirs = loss_of(x, y, **options), loss_of(x, y, **options, **BY_THE_OP)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(evaluated, ours, rtol=0, atol=0)
        upstream = torch.tensor(factor)
        g, h = (torch.autograd.grad(f, x, upstream)[0] for f in (ours, theirs))
        torch.testing.assert_close(g, h, rtol=0, atol=0, equal_nan=True)
    assert len(count) == 4


def test_a_mean_over_nothing(count) -> None:
    x, y = _logits(), torch.full((N,), -100)
    loss = loss_of(x, y)
    assert loss.isnan() and not torch.autograd.grad(loss, x)[0].any()
    assert len(count) == 1


def test_gradients_again_and_of_gradients(count) -> None:
    y, found = _target(), []
    for options in ({}, BY_THE_OP):
        x = _logits()
        loss = loss_of(x, y, **options)
        first = torch.autograd.grad(loss, x, retain_graph=True)
        again = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(again, first)
        (once,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad((once * once).sum(), x))
        batch = torch.eye(2)[:, 0]
        loss = loss_of(x, y, **options)
        found[-1] += torch.autograd.grad(loss, x, batch, is_grads_batched=True)
    torch.testing.assert_close(*found)
    assert len(count) == 2


def test_a_label_out_of_range(count) -> None:
    x, y = _logits(), _target()
    y[3] = C
    messages = []
    for options in ({}, BY_THE_OP):
        with pytest.raises(IndexError) as error:
            loss_of(x, y, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and len(count) == 1


def test_no_gradient_where_none_is_asked_for(count) -> None:
    loss_of(_logits().detach(), _target())
    with torch.no_grad():
        loss_of(_logits(), _target())
    assert count == [False, False]


def test_a_module(count) -> None:
    pyloss.nn.CrossEntropyLoss()(_logits(), _target()).backward()
    assert len(count) == 1


def _under_vmap(x, y):
    torch.func.vmap(lambda x: loss_of(x, y))(x[None])


def _under_forward_mode(x, y):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(N, C))
        assert torch.autograd.forward_ad.unpack_dual(loss_of(dual, y)).tangent is not None


def _under_a_mode(x, y):
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watch():
        loss_of(x, y)


def _under_a_function_mode(x, y):
    with torch.device("cpu"):
        loss_of(x, y)


def _traced(x, y):
    graph = torch.jit.trace(lambda x: loss_of(x, y), x.detach(), check_trace=False)
    torch.testing.assert_close(graph(2 * x.detach()), loss_of(2 * x.detach(), y, **BY_THE_OP))


def _of_a_subclass(x, y):
    class Tagged(torch.Tensor):
        pass

    loss_of(x.detach().as_subclass(Tagged), y)
    loss_of(x, y.as_subclass(Tagged))


NEEDS_HOOKS = needs_torch((2, 8), "hooks on saved tensors cannot be seen before")


def _under_hooks(x, y):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss_of(x, y)


def _on_the_reference(x, y):
    with pyloss.backend("reference"):
        loss_of(x, y)


def _sparse(x, y):
    with pytest.raises(TypeError, match="dense"):
        loss_of(x.detach().to_sparse(), y)


@pytest.mark.parametrize(
    "call",
    [
        _under_vmap,
        _under_forward_mode,
        _under_a_mode,
        _under_a_function_mode,
        _traced,
        _of_a_subclass,
        pytest.param(_under_hooks, marks=NEEDS_HOOKS),
        _on_the_reference,
        _sparse,
        lambda x, y: loss_of(torch.zeros(N, 5000), y),
        lambda x, y: loss_of(x.double(), y),
        lambda x, y: loss_of(x.t().contiguous().t(), y),
        lambda x, y: loss_of(torch._neg_view(x.detach()), y),
        lambda x, y: loss_of(torch._efficientzerotensor(N, C), y),
        lambda x, y: loss_of(x * 1, y, inplace=True),
        lambda x, y: loss_of(x.view(N, C, 1), y[:, None]),
        lambda x, y: loss_of(x[0], y[0]),
        lambda x, y: loss_of(x, y.repeat(2).view(2, N).t().contiguous()[:, 0]),
        lambda x, y: loss_of(x, y, tau=1.5),
        lambda x, y: loss_of(x, y, weight=torch.ones(C)),
        lambda x, y: loss_of(x, y, reduction="none"),
        lambda x, y: loss_of(x, y, return_stats=["lse"]),
        lambda x, y: loss_of(x, x.detach().softmax(1)),
    ],
)
def test_what_is_left_to_the_op(count, call) -> None:
    call(_logits(), _target())
    assert not count


@pytest.mark.parametrize(
    "options, error",
    [
        ({"tau": torch.ones(2)}, TypeError),
        ({"reduction": "all"}, ValueError),
        ({"ignore_index": 1.5}, TypeError),
        ({"ignore_index": True}, TypeError),
        ({"empty": "no"}, ValueError),
        ({"label_smoothing": 2.0}, RuntimeError),
    ],
)
def test_wrong_options_are_refused(options, error) -> None:
    with pytest.raises(error):
        loss_of(_logits(), _target(), **options)
