"""Derivatives of higher order, forward mode, torch.func, opcheck and torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from row_softmax_cases import DTYPES, OPTION_NAMES, exact, make_options
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import pyloss
from pyloss.reference import row_softmax as reference
from pyloss.testing import assert_matches_reference, check_loss, make_logits, make_target

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)
F64 = torch.float64
DIFFERENTIABLE = ("lse", "logprob", "entropy")


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def _loss_and_stats(x, *, target, **kwargs):
    """A function of tensors to a tuple of tensors, as gradcheck wants it."""
    out = pyloss.fused_cross_entropy(x, target, **kwargs)
    if isinstance(out, torch.Tensor):
        return out
    return out[0], *(s for s in out[1] if s is not None and s.requires_grad)


# --- gradcheck -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    "name", ["plain", "ignore", "weight", "smoothing", "mixup", "prob", "token_weight_z"]
)
def test_gradcheck_over_tau(name, tau, reduction):
    shape = (4, 5)
    target, kwargs = make_options(name, shape, F64)
    kwargs["tau"] = tau
    x = make_logits(shape, F64, scale=1.5, requires_grad=True)
    f = partial(_loss_and_stats, target=target, reduction=reduction, **kwargs)
    assert gradcheck(f, (x,), check_forward_ad=True)
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("name", OPTION_NAMES)
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 3)], ids=str)
def test_gradcheck_of_options(name, shape):
    target, kwargs = make_options(name, shape, F64)
    x = make_logits(shape, F64, scale=1.5, requires_grad=True)
    f = partial(_loss_and_stats, target=target, **kwargs)
    assert gradcheck(f, (x,))
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck_with_stats(tau, smoothing):
    x = make_logits((4, 5), F64, scale=1.5, requires_grad=True)
    f = partial(
        _loss_and_stats,
        target=make_target((4, 5), ignore_fraction=0.3),
        tau=tau,
        label_smoothing=smoothing,
        z_loss=0.1,
        softcap=5.0,
        reduction="none",
        return_stats=DIFFERENTIABLE,
    )
    assert gradcheck(f, (x,))
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
def test_gradcheck_of_probability_targets(tau):
    x = make_logits((3, 4), F64, requires_grad=True)
    q = make_target((3, 4), kind="prob").requires_grad_()
    w = torch.linspace(0.5, 1.5, 4, dtype=F64)

    def f(x, q):
        return pyloss.fused_cross_entropy(x, q, w, tau=tau, label_smoothing=0.1)

    assert gradcheck(f, (x, q))
    assert gradgradcheck(f, (x, q))


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_second_derivative_is_that_of_the_reference(name):
    shape = (9, 33)
    target, kwargs = make_options(name, shape, F64)
    v = make_logits(shape, F64, seed=8)
    results = []
    for f, t, k in (
        (pyloss.fused_cross_entropy, target, kwargs),
        (reference, exact(target), exact(kwargs)),
    ):
        x = make_logits(shape, F64, requires_grad=True)
        upstream = torch.tensor(1.3, dtype=F64, requires_grad=True)
        (g,) = torch.autograd.grad(upstream * f(x, t, **k), x, create_graph=True)
        results.append(torch.autograd.grad((g * v).sum(), (x, upstream)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["plain", "tau1.5", "weight", "smoothing", "everything"])
def test_second_derivative_of_small_dtypes(name, dtype):
    shape = (9, 33)
    target, kwargs = make_options(name, shape, dtype)
    x = make_logits(shape, dtype, requires_grad=True)
    loss = pyloss.fused_cross_entropy(x, target, reduction="sum", **kwargs)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    v = make_logits(shape, dtype, seed=8)
    (h,) = torch.autograd.grad(g, x, v)
    assert h.dtype == dtype
    z = x.detach().double().requires_grad_()
    (g,) = torch.autograd.grad(
        reference(z, exact(target), reduction="sum", **exact(kwargs)), z, create_graph=True
    )
    (expected,) = torch.autograd.grad(g, z, v.double())
    half = dtype != torch.float32
    assert_matches_reference(h, expected, atol=torch.finfo(dtype).eps if half else None)


@pytest.mark.parametrize("layout", ["transposed", "row_padded", "volume"])
def test_second_derivative_of_layouts(layout):
    y = make_target((6, 5), ignore_fraction=0.3)
    x = make_logits((6, 5), F64)
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "row_padded":
        x = torch.cat([x, x], 1)[:, :5]
    else:
        x, y = x.view(2, 3, 5).transpose(1, 2), y.view(2, 3)
    x.requires_grad_()
    f = partial(pyloss.fused_cross_entropy, target=y, tau=1.5, reduction="none", z_loss=0.1)
    assert gradcheck(f, (x,))
    assert gradgradcheck(f, (x,))


def test_gradient_penalty():
    """The ordinary use of create_graph: a loss on the norm of the gradient."""
    y = make_target((6, 5))
    grads = []
    for f in (pyloss.fused_cross_entropy, reference):
        x = make_logits((6, 5), F64, requires_grad=True)
        loss = f(x, y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + g.square().sum()).backward()
        grads.append(x.grad)
    _close(*grads)


# --- forward mode and torch.func -------------------------------------------------------------


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_forward_mode(name):
    shape = (6, 7)
    target, kwargs = make_options(name, shape, F64)
    x, tangent = make_logits(shape, F64), make_logits(shape, F64, seed=9)
    for reduction in ("mean", "none"):
        f = partial(pyloss.fused_cross_entropy, target=target, reduction=reduction, **kwargs)
        ref = partial(reference, target=exact(target), reduction=reduction, **exact(kwargs))
        value, expected = jvp(ref, (x,), (tangent,))
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent)))
            _close(out.primal, value)
            _close(out.tangent, expected)
        a, b = jvp(f, (x,), (tangent,))
        _close(a, value)
        _close(b, expected)


def test_forward_mode_of_stats():
    x, tangent = make_logits((6, 7), F64), make_logits((6, 7), F64, seed=9)
    y = make_target((6, 7), ignore_fraction=0.3)
    for name in DIFFERENTIABLE:
        _, expected = jvp(
            lambda x, n=name: reference(x, y, return_stats=(n,))[1][n], (x,), (tangent,)
        )
        with forward_ad.dual_level():
            _, stats = pyloss.fused_cross_entropy(
                forward_ad.make_dual(x, tangent), y, return_stats=(name,)
            )
            _close(forward_ad.unpack_dual(getattr(stats, name)).tangent, expected)


def test_vmap():
    x = make_logits((4, 6, 7), F64)
    y = torch.stack([make_target((6, 7), seed=i) for i in range(4)])
    for name in ("plain", "tau1.5", "smoothing", "softcap", "z_loss"):
        _, kwargs = make_options(name, (6, 7), F64)
        for reduction in ("mean", "none", "sum"):
            f = partial(pyloss.fused_cross_entropy, reduction=reduction, **kwargs)
            _close(vmap(f)(x, y), torch.stack([f(a, b) for a, b in zip(x, y)]))
            _close(vmap(f, (0, None))(x, y[0]), torch.stack([f(a, y[0]) for a in x]))
            _close(vmap(f, (None, 0))(x[0], y), torch.stack([f(x[0], b) for b in y]))
            _close(
                vmap(f, (2, 0))(x.movedim(0, 2), y), torch.stack([f(a, b) for a, b in zip(x, y)])
            )


def test_vmap_of_single_rows():
    """The classes of a row are then a 0-d tensor inside."""
    x, y = make_logits((6, 7), F64), make_target((6, 7))
    w = torch.linspace(0.5, 2.0, 7, dtype=F64)
    for options in ({}, {"weight": w}, {"weight": w, "label_smoothing": 0.1, "tau": 1.5}):
        f = partial(pyloss.fused_cross_entropy, **options)
        rows = vmap(partial(f, reduction="sum"))(x, y)
        _close(rows, f(x, y, reduction="none"))


def test_vmap_of_probabilities():
    x = make_logits((4, 6, 7), F64)
    q = torch.stack([make_target((6, 7), kind="prob", seed=i) for i in range(4)])
    f = pyloss.fused_cross_entropy
    _close(vmap(f)(x, q), torch.stack([f(a, b) for a, b in zip(x, q)]))


def test_func_grad():
    x, y = make_logits((6, 7), F64), make_target((6, 7), ignore_fraction=0.3)
    for name in ("plain", "tau1.5", "smoothing", "everything"):
        _, kwargs = make_options(name, (6, 7), F64)
        f = partial(pyloss.fused_cross_entropy, target=y, **kwargs)
        ref = partial(reference, target=y, **exact(kwargs))
        _close(grad(f)(x), grad(ref)(x))
        value, pull = vjp(f, x)
        _close(pull(torch.ones_like(value))[0], grad(ref)(x))


def test_per_sample_gradients():
    model = torch.nn.Linear(5, 7, dtype=F64)
    params = {k: v.detach() for k, v in model.named_parameters()}
    inputs, y = make_logits((6, 5), F64), make_target((6, 7))

    def loss(params, x, y, f):
        return f(functional_call(model, params, (x[None],)), y[None], tau=1.5)

    ours = vmap(grad(loss), (None, 0, 0, None))(params, inputs, y, pyloss.fused_cross_entropy)
    theirs = vmap(grad(loss), (None, 0, 0, None))(params, inputs, y, reference)
    for name in params:
        _close(ours[name], theirs[name])


@pytest.mark.parametrize("tau", TAUS)
def test_hessian(tau):
    x, y = make_logits((3, 4), F64), make_target((3, 4))
    f = partial(pyloss.fused_cross_entropy, target=y, tau=tau)
    ref = partial(reference, target=y, tau=tau)
    expected = hessian(ref)(x)
    _close(hessian(f)(x), expected)
    _close(jacrev(jacrev(f))(x), expected)
    _close(torch.autograd.functional.hessian(f, x), expected)


# --- opcheck ---------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op of this library."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyloss":
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _recorded_calls(name, shape, dtype, reduction):
    target, kwargs = make_options(name, shape, dtype)
    with _Recorder() as recorder:
        x = make_logits(shape, dtype, requires_grad=True)
        loss = pyloss.fused_cross_entropy(x, target, reduction=reduction, **kwargs).sum()
        (g,) = torch.autograd.grad(2 * loss, x, create_graph=True)
        if g.requires_grad:
            torch.autograd.grad(g.sum(), x)
        loss = pyloss.fused_cross_entropy(x, target, reduction=reduction, **kwargs).sum()
        (2 * loss).backward()
        logits = x * 1
        pyloss.fused_cross_entropy(
            logits, target, reduction=reduction, inplace=True, **kwargs
        ).sum().backward()
    return recorder.calls


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("plain", (5, 7), F64),
        ("plain", (2, 5, 3), torch.float32),
        ("plain", (4, 33), torch.bfloat16),
        ("smoothing_weight", (5, 7), F64),
        ("smoothing_tau", (5, 7), F64),
        ("prob", (5, 7), F64),
        ("mixup_all", (5, 7), F64),
        ("everything", (5, 7), F64),
    ],
)
def test_opcheck(name, shape, dtype, reduction):
    calls = {str(call[0]): call for call in _recorded_calls(name, shape, dtype, reduction)}
    assert "pyloss.row_softmax_fwd.default" in calls
    assert "pyloss.row_softmax_bwd.default" in calls or reduction == "mean"
    assert "pyloss.row_softmax_bwd_.default" in calls
    for func, args, kwargs in calls.values():
        torch.library.opcheck(func, tuple(args), kwargs)


def test_opcheck_of_the_second_derivative_and_stats():
    with _Recorder() as recorder:
        x = make_logits((5, 7), F64, requires_grad=True)
        loss, stats = pyloss.fused_cross_entropy(
            x,
            make_target((5, 7), ignore_fraction=0.3),
            tau=1.5,
            return_stats=("lse", "entropy", "logprob", "argmax", "rank"),
        )
        total = loss + stats.entropy.sum() + stats.lse.square().sum()
        (g,) = torch.autograd.grad(total, x, create_graph=True)
        torch.autograd.grad(g.square().sum(), x)
    assert any("row_softmax_hvp" in str(func) for func, _, _ in recorder.calls)
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, tuple(args), kwargs)


# --- torch.compile ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(name, shape, dtype, backend, reduction="mean"):
    target, kwargs = make_options(name, shape, dtype)
    ref_kwargs = exact(kwargs)
    check_loss(
        lambda x: pyloss.fused_cross_entropy(x, target, reduction=reduction, **kwargs),
        lambda x: reference(x, exact(target), reduction=reduction, **ref_kwargs),
        make_logits(shape, dtype),
        compile_backend=backend,
        repeat=False,
    )


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_compile_fullgraph(name):
    _compiled(name, (9, 33), torch.float32, "aot_eager")


@pytest.mark.parametrize("shape", [(7,), (2, 5, 3)], ids=str)
def test_compile_shapes(shape):
    _compiled("plain", shape, torch.bfloat16, "aot_eager", "none")


def test_compile_with_stats_and_dynamic_rows():
    @partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x, y):
        loss, stats = pyloss.fused_cross_entropy(x, y, return_stats=("lse", "argmax", "entropy"))
        return loss + 0.1 * stats.entropy.mean(), stats.lse, stats.argmax

    for rows in (9, 14, 3):
        x = make_logits((rows, 33), requires_grad=True)
        y = make_target((rows, 33), ignore_fraction=0.3)
        loss, lse, argmax = step(x, y)
        (g,) = torch.autograd.grad(loss, x)
        other, stats = pyloss.fused_cross_entropy(x, y, return_stats=("lse", "argmax", "entropy"))
        other = other + 0.1 * stats.entropy.mean()
        torch.testing.assert_close(loss, other)
        torch.testing.assert_close(lse, stats.lse)
        assert torch.equal(argmax, stats.argmax)
        torch.testing.assert_close(g, torch.autograd.grad(other, x)[0])


def test_compile_without_grad():
    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def f(x, y):
        return pyloss.fused_cross_entropy(x, y, label_smoothing=0.1)

    x, y = make_logits((9, 33)), make_target((9, 33))
    torch.testing.assert_close(f(x, y), pyloss.fused_cross_entropy(x, y, label_smoothing=0.1))


def test_compiled_module():
    module = torch.compile(pyloss.nn.CompSumLoss(1.5), fullgraph=True, backend="aot_eager")
    x, y = make_logits((9, 33)), make_target((9, 33))
    torch.testing.assert_close(module(x, y), pyloss.comp_sum_loss(x, y, 1.5))


@pytest.mark.slow
def test_compile_with_inductor():
    _compiled("everything", (9, 33), torch.float32, "inductor")


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return pyloss.fused_cross_entropy(x * 2, y)

    x, y = make_logits((9, 33)), make_target((9, 33))
    program = torch.export.export(Model(), (x, y))
    torch.testing.assert_close(program.module()(x, y), pyloss.fused_cross_entropy(x * 2, y))
