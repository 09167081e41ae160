"""How fused_cross_entropy behaves inside autograd's rarer modes; F.cross_entropy is the judge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import needs_torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss.ops._reference import gradients
from pyloss.testing import make_logits, make_target

F64 = torch.float64


def _problem(dtype=F64, rows=4, classes=7):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(rows, classes, generator=gen, dtype=F64).to(dtype)
    return x, torch.randint(classes, (rows,), generator=gen)


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}])
def test_functional_hvp(kwargs):
    """It differentiates the backward with respect to its cotangent (the double-backward trick)."""
    x, y = _problem()
    v = torch.randn_like(x)
    hvp = torch.autograd.functional.hvp
    got = hvp(lambda t: pyloss.fused_cross_entropy(t, y, **kwargs), x, v)[1]
    want = hvp(lambda t: F.cross_entropy(t, y, **kwargs), x, v)[1]
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want)


def test_the_graph_of_a_second_derivative():
    """The loss enters nonlinearly, so that its cotangent depends on the logits too."""
    x, y = _problem()

    def second(loss):
        t = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(t, y, reduction="none").square().sum(), t,
                                   create_graph=True)  # fmt: skip
        return torch.autograd.grad(g.sin().sum(), t, create_graph=True)[0]

    torch.testing.assert_close(second(pyloss.fused_cross_entropy), second(F.cross_entropy))


def test_partial_gradients_of_sources_that_depend_on_each_other() -> None:
    """What every op's create_graph=True stands on: the graph outside adds the other paths."""
    x = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    for a, b in ((x, x.sin()), (x, x)):
        found = gradients(lambda a, b: a.exp() * b, (a, b), [torch.ones(2)], create_graph=True)
        torch.testing.assert_close(found, [a.exp() * b, a.exp()])


def test_third_derivative():
    x, y = _problem()

    def third(loss):
        t = x.clone().requires_grad_()
        g = loss(t)
        for _ in range(3):
            (g,) = torch.autograd.grad((g * torch.arange(g.numel()).view(g.shape)).sum(), t,
                                       create_graph=True)  # fmt: skip
        return g.detach()

    got = third(lambda t: pyloss.fused_cross_entropy(t, y, reduction="none"))
    want = third(lambda t: F.cross_entropy(t, y, reduction="none"))
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_over_reverse(reduction):
    x, y = _problem()
    v = torch.randn_like(x)

    def tangent(loss):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
            (g,) = torch.autograd.grad(loss(dual, y, reduction=reduction).sum(), dual)
            return forward_ad.unpack_dual(g).tangent

    got = tangent(pyloss.fused_cross_entropy)
    assert got is not None
    torch.testing.assert_close(got, tangent(F.cross_entropy))


def test_inplace_keeps_the_gradient_of_the_probabilities():
    x, _ = _problem()
    q = torch.rand_like(x).softmax(1)
    grads = []
    for loss, scale, kwargs in (
        (pyloss.fused_cross_entropy, 1.0, {"inplace": True}),
        (F.cross_entropy, 1.0, {}),
    ):
        a, b = x.clone().requires_grad_(), q.clone().requires_grad_()
        loss(a * scale, b, **kwargs).backward()
        grads.append((a.grad, b.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_create_graph_for_the_probabilities_alone():
    x, _ = _problem()
    q = torch.rand_like(x).softmax(1).requires_grad_()
    (got,) = torch.autograd.grad(pyloss.fused_cross_entropy(x, q), q, create_graph=True)
    (want,) = torch.autograd.grad(F.cross_entropy(x, q), q)
    torch.testing.assert_close(got, want)


def test_batched_cotangents():
    """float32 and mean: the path whose gradient was written in the forward."""
    x, y = _problem(torch.float32)
    x.requires_grad_()
    g = torch.tensor([1.0, 2.0, -3.0])
    (got,) = torch.autograd.grad(pyloss.fused_cross_entropy(x, y), x, g, is_grads_batched=True)
    (want,) = torch.autograd.grad(F.cross_entropy(x, y), x, g, is_grads_batched=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_numbers_that_change(dynamic):
    x, y = _problem(torch.float32)
    torch._dynamo.reset()

    def loss(x, tau, z_loss, num_items):
        return pyloss.fused_cross_entropy(x, y, tau=tau, z_loss=z_loss, num_items=num_items)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tau, z_loss, num_items in ((1.0, 1e-4, 4), (0.9, 1e-3, 5), (0.8, 1e-2, 6), (0.7, 0.1, 7.5)):
        torch.testing.assert_close(
            compiled(x, tau, z_loss, num_items), loss(x, tau, z_loss, num_items)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_num_items_as_tensor_and_as_number_agree(dtype):
    x, y = _problem(dtype, 8192, 50)  # the sum overflows float16
    grads, losses = [], []
    for items in (1029, torch.tensor(1029), torch.tensor(1029.0)):
        t = x.clone().requires_grad_()
        loss = pyloss.fused_cross_entropy(t, y, num_items=items)
        loss.backward()
        losses.append(loss.detach())
        grads.append(t.grad)
    assert losses[0].isfinite()
    for loss, grad in zip(losses[1:], grads[1:]):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(grad, grads[0])
    zero = torch.tensor(0.0)
    assert pyloss.fused_cross_entropy(x, y, num_items=zero, empty="zero") == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    h = torch.randn(64, 8, requires_grad=True)
    w = torch.randn(500, 8)
    y = torch.randint(500, (64,))
    loss = checkpoint(
        lambda t: pyloss.fused_cross_entropy(t @ w.t(), y), h, use_reentrant=use_reentrant
    )
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(h @ w.t(), y), h)[0]
    torch.testing.assert_close(h.grad, want)


@needs_torch((2, 8), "hooks on saved tensors cannot be seen before")
def test_hooks_on_saved_tensors_see_all_that_is_kept():
    """A gradient written in the forward would be kept behind the back of offloading."""
    x = torch.randn(64, 500, requires_grad=True)
    y = torch.randint(500, (64,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = pyloss.fused_cross_entropy(x, y)
    plain = pyloss.fused_cross_entropy(x, y)
    assert hooked.grad_fn.early_grad is None
    assert plain.grad_fn.early_grad is not None  # the case exists
    hooked.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, y), x)[0])


def test_many_strided_classes_do_not_drift():
    x = torch.full((128256, 70), -1.3).t()
    x[:, 5] = 0.0
    x.requires_grad_()
    y = torch.full((70,), 5)
    pyloss.fused_cross_entropy(x, y).backward()
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact, y).backward()
    error = (x.grad.double() - exact.grad).abs() / exact.grad.abs()
    bound = (8 + exact.grad.abs().log().abs()) * 2.0**-23
    assert (error <= bound).all()


def test_token_weight_of_zero_hides_an_infinite_loss():
    x = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]], requires_grad=True)
    k = torch.tensor([0.0, 1.0])
    loss = pyloss.fused_cross_entropy(x, torch.tensor([1, 0]), token_weight=k)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(x[1:], torch.tensor([0])))
    assert torch.equal(x.grad[0], torch.zeros(2))


def test_module_options_are_attributes():
    x, y = _problem()
    criterion = pyloss.nn.CrossEntropyLoss()
    criterion.reduction = "none"
    criterion.label_smoothing = 0.1
    want = F.cross_entropy(x, y, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(criterion(x, y), want)


def test_numpy_numbers_and_generators_are_taken():
    x, y = _problem()
    a = pyloss.fused_cross_entropy(x, y, tau=np.float32(0.5), num_items=np.int64(4))
    torch.testing.assert_close(a, pyloss.fused_cross_entropy(x, y, tau=0.5, num_items=4))
    _, stats = pyloss.fused_cross_entropy(x, y, return_stats=(n for n in ["lse"]))
    assert stats.lse is not None


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3)])
def test_class_weight_with_probabilities(shape, smoothing, reduction):
    """Its gradient is that of F.cross_entropy, for which 6750e06 had an error."""
    x, p = make_logits(shape, F64), make_target(shape, kind="prob").double()
    upstream = None

    def run(function, weight, **options):
        nonlocal upstream
        leaves = [x.clone().requires_grad_(), p.clone().requires_grad_(), weight.requires_grad_()]
        loss = function(*leaves, reduction=reduction, label_smoothing=smoothing, **options)
        upstream = torch.rand_like(loss) if upstream is None else upstream
        return loss, *torch.autograd.grad(loss, leaves, upstream)

    weight = torch.linspace(0.0, 2.0, 5, dtype=F64)
    torch.testing.assert_close(
        run(pyloss.fused_cross_entropy, weight.clone()), run(F.cross_entropy, weight.clone())
    )
    options = dict(tau=1.5, z_loss=0.1, softcap=3.0)
    torch.testing.assert_close(
        run(pyloss.fused_cross_entropy, weight.clone(), **options),
        run(pyloss.reference.row_softmax, weight.clone(), **options),
    )


def test_class_weight_with_probabilities_elsewhere():
    x, p = make_logits((4, 5), F64), make_target((4, 5), kind="prob").double()
    weight = torch.linspace(0.5, 2.0, 5, dtype=F64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: pyloss.fused_cross_entropy(x, p, w), weight)
    hidden, layer = torch.randn(4, 3), torch.randn(5, 3)
    narrow = weight.detach().float().requires_grad_()  # float32 beside bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        h, w, q = hidden.to(dtype), layer.to(dtype), p.to(dtype)
        loss = pyloss.fused_linear_cross_entropy(h, w, q, weight=narrow)
        want = F.cross_entropy((h @ w.t()).float(), q.float(), narrow)
        assert loss.dtype == dtype
        tolerance = (
            dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)
        )
        torch.testing.assert_close(loss.float(), want, **tolerance)
        grads = [torch.autograd.grad(out, narrow)[0] for out in (loss, want)]
        torch.testing.assert_close(*grads, **tolerance)
    with pytest.raises(RuntimeError, match="not differentiable with respect to weight"):
        pyloss.fused_cross_entropy(x, torch.zeros(4, dtype=torch.int64), weight)
    with torch.no_grad():
        pyloss.fused_cross_entropy(x, torch.zeros(4, dtype=torch.int64), weight)
