"""fused_linear_cross_entropy inside autograd: derivatives of any order, frozen arguments,
torch.func, checkpointing, autocast, opcheck, torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import TORCH, needs_torch
from linear_cross_entropy_cases import (
    ROW_WAYS,
    SCALAR_WAYS,
    Layer,
    Memory,
    Recorder,
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
from row_softmax_cases import OPTION_NAMES
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss.testing import make_logits, make_target

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
DIFFERENTIABLE = ("lse", "logprob", "entropy")
N, D, V = 10, 6, 13


def _target():
    return labels_with_ignored(N, V)


def _function(target, **options):
    """A function of input, weight and bias to a tuple of tensors, as gradcheck wants it."""

    def f(*layer):
        out = fused(Layer(*layer), target, **options)
        if isinstance(out, torch.Tensor):
            return out
        return out[0], *(s for s in out[1] if s is not None and s.requires_grad)

    return f


# --- numerical derivatives -------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_gradcheck(name):
    """Every option; forward and recomputed gradients, and the derivatives behind them."""
    layer = make_layer(7, 2, 4, scale=1.5)
    target, options = make_options(name, (7, 4), F64)
    for way in ({"strategy": "forward", "chunk": 3}, {"reduction": "none", "chunk": 3}):
        f = _function(target, **options, **way)
        # The second of two backwards after "forward" recomputes: equal up to rounding.
        again = 1e-12 if way.get("strategy") == "forward" else 0.0
        assert gradcheck(f, tuple(layer), fast_mode=True, nondet_tol=again)
    assert gradgradcheck(f, tuple(layer), fast_mode=True)
    assert gradcheck(
        f, tuple(layer), check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck_of_every_entry(smoothing, tau):
    layer = make_layer(7, 2, 3, scale=1.5)
    target = labels_with_ignored(7, 3)
    options = dict(tau=tau, label_smoothing=smoothing, z_loss=0.1, softcap=5.0, chunk=3)
    assert gradcheck(_function(target, strategy="forward", **options), tuple(layer))
    assert gradcheck(_function(target, strategy="recompute", **options), tuple(layer))
    f = _function(target, reduction="none", return_stats=DIFFERENTIABLE, **options)
    assert gradcheck(f, tuple(layer))


@pytest.mark.parametrize("k", [1, 2])
def test_gradcheck_with_shift_and_statistics(k):
    layer = make_layer((2, 4), 2, 3, scale=1.5)
    target = labels_with_ignored(8, 3).view(2, 4)
    for reduction in ("mean", "none"):
        f = _function(target, shift=k, reduction=reduction, return_stats=DIFFERENTIABLE, chunk=3)
        assert gradcheck(f, tuple(layer))
        assert gradgradcheck(f, tuple(layer), fast_mode=True)


def test_gradcheck_of_token_logprobs():
    layer = make_layer((2, 4), 2, 3, scale=1.5)
    tokens = labels_with_ignored(8, 3).view(2, 4)

    def f(h, w, b):
        return pyloss.token_logprobs(h, w, tokens, b, 0.8, True, softcap=4.0, shift=1, chunk=3)

    assert gradcheck(f, tuple(layer))
    assert gradgradcheck(f, tuple(layer), fast_mode=True)
    assert gradcheck(f, tuple(layer), check_forward_ad=True, check_backward_ad=False)


def test_gradcheck_of_probabilities():
    layer = make_layer(4, 2, 3)
    q = make_target((4, 3), kind="prob").requires_grad_()

    def f(h, w, b, q):
        return pyloss.fused_linear_cross_entropy(h, w, q, b, tau=1.5, label_smoothing=0.1, chunk=3)

    assert gradcheck(f, (*layer, q))
    assert gradgradcheck(f, (*layer, q), fast_mode=True)


# --- the upstream gradient -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 1024.0])
@pytest.mark.parametrize("way", SCALAR_WAYS)
def test_upstream_scalar(way, scale):
    """Gradients formed in the forward must still follow the upstream gradient."""
    for dtype in (F64, F32):
        layer, y = make_layer(N, D, V, dtype), _target()
        got = torch.autograd.grad(scale * fused(layer, y, **SCALAR_WAYS[way]), layer)
        want = torch.autograd.grad(scale * unfused(layer, y), layer)
        assert_close(list(got), list(want))


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("scale", [65536.0, 2.0**-10])
def test_loss_scaling_of_half_dtypes(scale, dtype):
    """float16 gradients that vanish without the scale of torch.amp must be there with it."""
    layer = make_layer(64, 8, 2000, dtype, scale=5.0)  # with improbable classes
    y = make_target((64, 2000))
    got = torch.autograd.grad(scale * fused(layer, y, chunk=16, loss_dtype=F32), layer)
    copies = fresh(layer, F64)
    want = torch.autograd.grad(scale * referenced(copies, y), copies)
    unscaled = torch.autograd.grad(fused(layer, y, loss_dtype=F32), layer)
    if dtype == torch.float16 and scale > 1:
        assert (unscaled[2] == 0).any() and not (got[2] == 0).any()
    for a, b in zip(got, want):
        error = (a.double() - b).norm() / b.norm()
        assert error < (0.02 if scale > 1 or dtype == BF16 else 0.5)


@pytest.mark.parametrize("way", SCALAR_WAYS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_repeated_backward_accumulates(dtype, way):
    layer, y = make_layer(N, D, V, dtype), _target()
    loss = 3 * fused(layer, y, **SCALAR_WAYS[way])
    first = torch.autograd.grad(loss, layer, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, layer, retain_graph=True)
    for a, b, c in zip(first, second, kept):
        assert torch.equal(a, c), "the second backward changed the first one's gradient"
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=4 * eps)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    for t, g in zip(layer, first):
        torch.testing.assert_close(t.grad, g, rtol=8 * eps, atol=4 * eps)


@pytest.mark.parametrize("way", ROW_WAYS)
def test_repeated_backward_of_rows_and_statistics(way):
    layer, y = make_layer(N, D, V), _target()
    loss, stats = fused(layer, y, reduction="none", return_stats=DIFFERENTIABLE, **ROW_WAYS[way])
    total = loss.square().sum() + stats.entropy.sum() + stats.lse.exp().mean()
    first = gradients(total, layer, retain_graph=True)
    assert_close(gradients(total, layer), first)


def test_gradient_that_autograd_adopts_is_not_shared():
    """Gradients handed over by the forward become .grad; optimisers change that in place."""
    layer, y = make_layer(N, D, V, F32), _target()
    loss = fused(layer, y, strategy="forward")
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in layer]
    for t in layer:
        t.grad.zero_()
        t.grad = None
    loss.backward()
    assert_close([t.grad for t in layer], first)
    pointers = {t.grad.data_ptr() for t in layer} | {t.data_ptr() for t in layer}
    assert len(pointers) == 6


def test_batched_cotangents():
    for reduction in ("mean", "none"):
        layer, y = make_layer(N, D, V, F32), _target()
        ours = fused(layer, y, reduction=reduction, chunk=3)
        want = unfused(layer, y, reduction=reduction)
        up = make_logits((4, *want.shape))
        a = torch.autograd.grad(ours, layer, up, is_grads_batched=True)
        b = torch.autograd.grad(want, layer, up, is_grads_batched=True)
        assert_close(list(a), list(b), factor=2.0)


# --- several outputs, several losses ---------------------------------------------------------


@pytest.mark.parametrize("way", ROW_WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("names", [("lse",), ("logprob",), ("entropy",), DIFFERENTIABLE])
def test_gradient_through_loss_and_statistics(names, reduction, way):
    layer, y = make_layer(N, D, V), _target()
    options = dict(tau=1.5, z_loss=0.02, softcap=9.0, reduction=reduction, return_stats=names)

    def total(loss, stats):
        parts = [(loss * upstream_of(loss)).sum()]
        for i, name in enumerate(names):
            c = make_logits((N,), F64, seed=10 + i)
            value = stats[name] if isinstance(stats, dict) else getattr(stats, name)
            parts.append((c * value).sum())
        return sum(parts)

    ours = total(*fused(layer, y, **options, **ROW_WAYS[way]))
    want = total(*referenced(layer, y, **options))
    assert_close(gradients(ours, layer), gradients(want, layer))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_through_a_statistic_alone(reduction, name):
    layer, y = make_layer(N, D, V), _target()
    _, stats = fused(layer, y, reduction=reduction, return_stats=DIFFERENTIABLE, chunk=3)
    _, want = referenced(layer, y, return_stats=DIFFERENTIABLE)
    c = make_logits((N,), F64, seed=11)
    assert_close(gradients(getattr(stats, name), layer, c), gradients(want[name], layer, c))


def test_loss_alone_when_statistics_are_there():
    layer, y = make_layer(N, D, V), _target()
    loss, _ = fused(layer, y, return_stats=DIFFERENTIABLE, chunk=3)
    assert_close(gradients(loss, layer), gradients(unfused(layer, y), layer))


def test_statistics_that_have_no_gradient():
    layer, y = make_layer(N, D, V), _target()
    _, stats = fused(
        layer, y, return_stats=("lse", "z_loss", "argmax", "correct", "rank"), z_loss=0.1
    )
    assert stats.lse.requires_grad
    assert not any(s.requires_grad for s in (stats.z_loss, stats.argmax, stats.correct, stats.rank))


@pytest.mark.parametrize("way", SCALAR_WAYS)
def test_two_losses_on_one_hidden(way):
    layer = make_layer(N, D, V)
    y, y2 = _target(), make_target((N, V), seed=5)

    def total(loss, h, **options):
        inner = layer._replace(input=h)
        value = loss(inner, y, **options) + 0.5 * loss(inner, y2, tau=1.5, **options)
        return value + h.square().mean()

    ours = total(fused, layer.input * 2, **SCALAR_WAYS[way])
    want = total(unfused, layer.input * 2)
    assert_close(gradients(ours, layer), gradients(want, layer))


def test_one_weight_in_two_roles():
    """A tied embedding receives the gradient of both uses."""
    w = make_logits((V, D), F64, requires_grad=True)
    tokens = _target().clamp(min=0)
    for strategy in ("forward", "recompute"):
        h = F.embedding(tokens, w)
        loss = pyloss.fused_linear_cross_entropy(h, w, tokens, strategy=strategy, chunk=3)
        (g,) = torch.autograd.grad(loss, w)
        (want,) = torch.autograd.grad(F.cross_entropy(F.embedding(tokens, w) @ w.t(), tokens), w)
        assert_close(g, want)
    x = make_logits((N, N), F64, requires_grad=True)  # input and weight are the same tensor
    y = labels_with_ignored(N, N)
    (g,) = torch.autograd.grad(pyloss.fused_linear_cross_entropy(x, x, y, chunk=3), x)
    (want,) = torch.autograd.grad(F.cross_entropy(x @ x.t(), y), x)
    assert_close(g, want)


# --- what wants no gradient ------------------------------------------------------------------

WANTS = [(a, b, c) for a in (1, 0) for b in (1, 0) for c in (1, 0) if a or b or c]


@pytest.mark.parametrize("way", [*SCALAR_WAYS, "rows", "stats"])
@pytest.mark.parametrize("wants", WANTS, ids=str)
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_frozen_arguments(dtype, wants, way):
    """Gradient None where frozen, and the others as if nothing were."""
    options = {
        "rows": {"reduction": "none", "chunk": 3},
        "stats": {"return_stats": ("lse",), "chunk": 3},
        **SCALAR_WAYS,
    }[way]
    y = _target()
    full = make_layer(N, D, V, dtype)
    _, want = run(fused, full, y, **options)
    part = fresh(full)
    for t, wanted in zip(part, wants):
        t.requires_grad_(bool(wanted))
    loss = fused(part, y, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward(upstream_of(loss))
    for t, wanted, expected in zip(part, wants, want):
        assert (t.grad is not None) == bool(wanted)
        if wanted:
            assert torch.equal(t.grad, expected)
    # With create_graph too.
    loss = fused(part, y, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    asked = [t for t, wanted in zip(part, wants) if wanted]
    again = torch.autograd.grad(loss, asked, upstream_of(loss), create_graph=True)
    eps = torch.finfo(dtype).eps
    for a, b in zip(again, [g for g, wanted in zip(want, wants) if wanted]):
        torch.testing.assert_close(a.detach(), b, rtol=16 * eps, atol=8 * eps)


def test_gradient_of_some_leaves_only():
    layer, y = make_layer(N, D, V), _target()
    for way in SCALAR_WAYS.values():
        want = gradients(unfused(layer, y), layer)
        for i in range(3):
            loss = fused(layer, y, **way)
            (g,) = torch.autograd.grad(loss, layer[i], upstream_of(loss))
            assert_close(g, want[i])


def test_without_grad_mode():
    layer, y = make_layer(N, D, V), _target()
    for way in SCALAR_WAYS.values():
        loss = fused(layer, y, **way)
        with torch.no_grad():
            quiet = fused(layer, y, **way)
        assert not quiet.requires_grad and torch.equal(quiet, loss)
        with torch.inference_mode():
            assert torch.equal(fused(layer, y, **way), loss)
        frozen = Layer(*(t.detach() for t in layer))
        assert not fused(frozen, y, **way).requires_grad
    _, stats = fused(frozen, y, return_stats=DIFFERENTIABLE)
    assert not any(s.requires_grad for s in stats if s is not None)


def test_change_of_saved_arguments_is_seen():
    """In-place changes between forward and a backward that still needs the values raise."""
    y = _target()
    for which in range(2):
        layer = make_layer(N, D, V)
        layer = Layer(*(t * 1 for t in layer))
        loss = fused(layer, y, reduction="none")
        with torch.no_grad():
            layer[which].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_hooks_see_every_gradient():
    layer, y = make_layer(N, D, V, F32), _target()
    seen = {}
    for name, t in layer._asdict().items():
        t.register_hook(partial(lambda name, g: seen.setdefault(name, g.clone()), name))
    loss = fused(layer, y)
    loss.backward()
    for name, t in layer._asdict().items():
        assert torch.equal(seen[name], t.grad)


# --- create_graph ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", SCALAR_WAYS)
@pytest.mark.parametrize("name", ["plain", "smoothing", "tau1.5", "everything", "mixup_all"])
def test_second_derivative(name, way):
    target, options = make_options(name, (N, V), F64)
    results = []
    for f, extra in ((fused, SCALAR_WAYS[way]), (referenced, {})):
        layer = make_layer(N, D, V)
        upstream = torch.tensor(1.3, dtype=F64, requires_grad=True)
        loss = upstream * f(layer, target, **options, **extra)
        first = torch.autograd.grad(loss, layer, create_graph=True)
        total = sum((g * make_logits(g.shape, F64, seed=8)).sum() for g in first)
        results.append((list(first), list(torch.autograd.grad(total, (*layer, upstream)))))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_second_derivative_of_small_dtypes(dtype):
    layer, y = make_layer(N, D, V, dtype), _target()
    exact = fresh(layer, F64)
    found = []
    for f, args in ((fused, layer), (referenced, exact)):
        first = torch.autograd.grad(f(args, y), args, create_graph=True)
        total = sum((g.double() * make_logits(g.shape, F64, seed=8)).sum() for g in first)
        found.append(torch.autograd.grad(total, args))
    for a, b in zip(*found):
        assert a.dtype == dtype
        error = (a.double() - b).norm() / b.norm()
        assert error < (1e-5 if dtype == F32 else 0.03)


def test_gradient_penalty():
    y = _target()
    grads = []
    for f in (fused, unfused):
        layer = make_layer(N, D, V)
        loss = f(layer, y)
        (g,) = torch.autograd.grad(loss, layer.input, create_graph=True)
        (loss + g.square().sum()).backward()
        grads.append([t.grad for t in layer])
    assert_close(*grads)


def test_third_derivative():
    y = _target()
    found = []
    for f in (fused, unfused):
        layer = make_layer(N, D, V)
        g = f(layer, y, reduction="none")
        for _ in range(3):
            ramp = torch.linspace(0, 1, g.numel(), dtype=F64).view(g.shape)
            (g,) = torch.autograd.grad((g * ramp).sum(), layer.weight, create_graph=True)
        found.append(g.detach())
    assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_over_reverse(reduction):
    layer, y = make_layer(N, D, V), _target()
    v = make_logits((N, D), F64, seed=4)
    found = []
    for f in (fused, unfused):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(layer.input.detach().requires_grad_(), v)
            loss = f(layer._replace(input=dual), y, reduction=reduction).sum()
            (g,) = torch.autograd.grad(loss, dual)
            found.append(forward_ad.unpack_dual(g).tangent)
    assert_close(found[0], found[1])


# --- checkpointing, offloading, autocast -----------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", [*SCALAR_WAYS, "rows"])
def test_checkpoint(way, use_reentrant):
    layer, y = make_layer(N, D, V), _target()
    options = {"reduction": "none", "chunk": 3} if way == "rows" else SCALAR_WAYS[way]

    def f(h):
        return fused(layer._replace(input=h * 2), y, **options).sum()

    f(layer.input).backward()
    want = [t.grad.clone() for t in layer]
    for t in layer:
        t.grad = None
    checkpoint(f, layer.input, use_reentrant=use_reentrant).backward()
    assert_close([t.grad for t in layer], want)


@needs_torch((2, 8), "hooks on saved tensors cannot be seen before")
def test_hooks_on_saved_tensors_see_all_that_is_kept():
    """Gradients formed in the forward would be kept behind the back of offloading."""
    layer, y = make_layer(N, D, V, F32), _target()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.shape) or t, lambda t: t
    ):
        hooked = fused(layer, y)
    assert packed
    kept = getattr(hooked.grad_fn, "grads", None) or []
    assert all(g is None for g in kept)
    assert_close(gradients(hooked, layer), gradients(unfused(layer, y), layer))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": ("lse",)}])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast(dtype, options):
    """float32 parameters, bfloat16 products, float32 loss, gradients of the parameters' dtype."""
    layer = make_layer(N, D, V, F32)
    layer = layer._replace(input=layer.input.detach().to(dtype).requires_grad_())
    y = _target()
    exact = fresh(layer, F64)
    with torch.autocast("cpu", dtype=BF16):
        ours = fused(layer, y, chunk=3, **options)
        theirs = F.cross_entropy(F.linear(*layer), y, reduction=options.get("reduction", "mean"))
    if isinstance(ours, tuple):
        assert ours[1].lse.dtype == F32
        ours = ours[0]
    assert ours.dtype == theirs.dtype == F32
    want = referenced(exact, y, reduction=options.get("reduction", "mean"))
    torch.testing.assert_close(ours.double(), want, rtol=0.02, atol=0.05)
    found = [gradients(v, t) for v, t in ((ours, layer), (theirs, layer), (want, exact))]
    for a, b, c, t in zip(*found, layer):
        assert a.dtype == t.dtype
        error, theirs = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= 1.1 * theirs + 1e-3 * c.norm()


def test_autocast_sums_into_the_float32_gradient():
    """Its gradient is float32 anyway: no rounding of the sum, and no reason for one large chunk."""
    layer, y = make_layer(384, 256, 40000, F32, bias=False), make_target((384, 40000))
    exact = fresh(layer, F64)
    (want,) = torch.autograd.grad(referenced(exact, y), exact.weight)
    with Memory() as memory:
        with torch.autocast("cpu", dtype=BF16):
            loss = fused(layer, y, chunk="auto")
        (found,) = torch.autograd.grad(loss, layer.weight)
    assert memory.peak <= 4 * found.numel() + 2 * layer.weight.numel() + (36 << 20)
    with torch.autocast("cpu", dtype=BF16):
        (plain,) = torch.autograd.grad(unfused(layer, y), layer.weight)
    errors = [(g.double() - want).norm() for g in (found, plain)]
    assert errors[0] <= 0.9 * errors[1]


def test_autocast_of_other_dtypes():
    y = _target()
    with torch.autocast("cpu", dtype=BF16):
        double = make_layer(N, D, V, F64)
        assert fused(double, y).dtype == F64
        assert_close(run(fused, double, y), run(unfused, double, y))
        module = pyloss.nn.LinearCrossEntropyLoss(D, V)
        hidden = torch.nn.Linear(D, D)(make_logits((N, D)))
        assert hidden.dtype == BF16
        loss = module(hidden, y)
        assert loss.dtype == F32
        loss.backward()
        assert module.linear.weight.grad.dtype == F32
        assert pyloss.token_logprobs(hidden, module.linear.weight, y).dtype == F32
    with torch.autocast("cpu", dtype=torch.float16):
        assert fused(make_layer(N, D, V, F32), y).dtype == F32


def test_backward_outside_of_autocast():
    layer, y = make_layer(N, D, V, F32), _target()
    with torch.autocast("cpu", dtype=BF16):
        losses = [fused(layer, y, **way) for way in SCALAR_WAYS.values()]
    grads = [gradients(loss, layer) for loss in losses]
    for other in grads[1:]:
        for a, b in zip(other, grads[0]):
            torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


# --- torch.func ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "tau1.5", "smoothing", "everything", "mixup", "prob"])
def test_func_grad(name):
    target, options = make_options(name, (N, V), F64)
    layer = make_layer(N, D, V, requires_grad=False)
    f = partial(_tensor_function(fused), target=target, **options)
    g = partial(_tensor_function(unfused), target=target, **options)
    got = grad(f, argnums=(0, 1, 2))(*layer)
    want = grad(g, argnums=(0, 1, 2))(*layer)
    assert_close(list(got), list(want))
    value, pull = vjp(f, *layer)
    assert_close(list(pull(torch.ones_like(value))), list(want))


def _tensor_function(loss):
    def f(h, w, b=None, target=None, **options):
        return loss(Layer(h, w, b), target, **options)

    return f


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_jvp(name):
    target, options = make_options(name, (N, V), F64)
    layer = make_layer(N, D, V, requires_grad=False)
    tangents = tuple(make_layer(N, D, V, seed=20, requires_grad=False))
    for reduction in ("mean", "none"):
        both = [
            jvp(
                partial(_tensor_function(f), target=target, reduction=reduction, **options),
                tuple(layer),
                tangents,
            )
            for f in (fused, unfused)
        ]
        assert_close(list(both[0]), list(both[1]))


def test_dual_numbers_of_statistics():
    layer, y = make_layer(N, D, V, requires_grad=False), _target()
    w_tangent = make_logits((V, D), F64, seed=21)
    found = []
    for f in (fused, unfused):
        with forward_ad.dual_level():
            dual = layer._replace(weight=forward_ad.make_dual(layer.weight, w_tangent))
            _, stats = f(dual, y, return_stats=DIFFERENTIABLE)
            values = [getattr(stats, n) for n in DIFFERENTIABLE]
            found.append([forward_ad.unpack_dual(v).tangent for v in values])
    assert_close(found[0], found[1])


def test_vmap():
    h = make_logits((3, N, D), F64)
    w = make_logits((3, V, D), F64, seed=1)
    y = torch.stack([labels_with_ignored(N, V).roll(i) for i in range(3)])
    for options in ({}, {"tau": 1.5}, {"label_smoothing": 0.1}, {"softcap": 4.0}, {"shift": 1}):
        for reduction in ("mean", "sum", "none"):
            f = partial(pyloss.fused_linear_cross_entropy, reduction=reduction, **options)
            want = torch.stack([f(h[i], w[0], y[i]) for i in range(3)])
            assert_close(vmap(f, (0, None, 0))(h, w[0], y), want)
            want = torch.stack([f(h[i], w[i], y[0]) for i in range(3)])
            assert_close(vmap(f, (0, 0, None))(h, w, y[0]), want)
            want = torch.stack([f(h[0], w[0], y[i]) for i in range(3)])
            assert_close(vmap(f, (None, None, 0))(h[0], w[0], y), want)
    want = torch.stack([pyloss.token_logprobs(h[i], w[0], y[i]) for i in range(3)])
    assert_close(vmap(pyloss.token_logprobs, (0, None, 0))(h, w[0], y), want)


def test_per_sample_gradients():
    head = torch.nn.Linear(D, V, dtype=F64)
    params = {k: v.detach() for k, v in head.named_parameters()}
    h, y = make_logits((N, D), F64), make_target((N, V))

    def ours(p, h, y):
        return pyloss.fused_linear_cross_entropy(h[None], p["weight"], y[None], p["bias"], tau=1.5)

    def theirs(p, h, y):
        return pyloss.comp_sum_loss(functional_call(head, p, (h[None],)), y[None], 1.5)

    got = vmap(grad(ours), (None, 0, 0))(params, h, y)
    want = vmap(grad(theirs), (None, 0, 0))(params, h, y)
    for name in params:
        assert_close(got[name], want[name])


def test_hessian():
    layer = make_layer(5, 2, 3, requires_grad=False)
    y = make_target((5, 3))
    f = partial(_tensor_function(fused), target=y)
    g = partial(_tensor_function(unfused), target=y)
    assert_close(hessian(f, argnums=1)(*layer), hessian(g, argnums=1)(*layer))
    got = torch.autograd.functional.hessian(lambda w: f(layer[0], w, layer[2]), layer[1])
    assert_close(got, hessian(g, argnums=1)(*layer))


def test_functional_hvp():
    layer, y = make_layer(N, D, V, requires_grad=False), _target()
    v = make_logits((V, D), F64, seed=3)
    found = [
        torch.autograd.functional.hvp(
            lambda w, f=f: f(layer._replace(weight=w), y), layer.weight, v
        )[1]
        for f in (fused, unfused)
    ]
    assert_close(*found)


# --- opcheck ---------------------------------------------------------------------------------


def _recorded(name, dtype, rows=7, features=3, classes=5, **options):
    target, extra = make_options(name, (rows, classes), dtype)
    with Recorder() as recorder:
        layer = make_layer(rows, features, classes, dtype)
        for way in ({}, {"strategy": "recompute", "chunk": 3}):
            loss = fused(layer, target, **{**extra, **options, **way})
            loss = loss[0].sum() + loss[1].entropy.sum() if isinstance(loss, tuple) else loss.sum()
            (2 * loss).backward()
        with torch.no_grad():
            fused(layer, target, **extra)
        for frozen in range(3):
            part = fresh(layer)
            part[frozen].requires_grad_(False)
            fused(part, target, **{**extra, **options}).sum() if not options.get(
                "return_stats"
            ) else None
    return recorder.calls


@pytest.mark.parametrize(
    "name, dtype, options",
    [
        ("plain", F64, {}),
        ("plain", F32, {"reduction": "none", "chunk": 3}),
        ("plain", BF16, {"accumulate_dtype": F32, "chunk": 2}),
        ("smoothing_weight", F64, {}),
        ("prob", F64, {}),
        ("mixup_all", F64, {"chunk": 3}),
        ("everything", F64, {"reduction": "none"}),
        ("num_items_tensor", F64, {}),
        ("token_weight_z", F32, {"return_stats": ("lse", "entropy", "argmax", "rank")}),
    ],
)
def test_opcheck(name, dtype, options):
    calls = _recorded(name, dtype, **options)
    names = {str(func) for func, _, _ in calls}
    assert "pyloss.linear_cross_entropy_fwd.default" in names
    assert "pyloss.linear_cross_entropy_bwd.default" in names
    for func, args, kwargs in calls:
        torch.library.opcheck(func, tuple(args), kwargs)


# --- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _check_compiled(name, dtype=F32, backend="aot_eager", **options):
    target, extra = make_options(name, (N, V), dtype)
    options = {**extra, **options}
    step = torch.compile(
        lambda h, w, b: fused(Layer(h, w, b), target, **options), fullgraph=True, backend=backend
    )
    for requires_grad in (True, False):
        layer = make_layer(N, D, V, dtype, requires_grad=requires_grad)
        value = step(*layer)
        want = fused(layer, target, **options)
        assert_close(value, want)
        if requires_grad:
            assert_close(gradients(value, layer), gradients(want, layer))


@pytest.mark.parametrize(
    "name",
    ["plain", "smoothing_weight", "tau1.5", "mixup_all", "prob", "everything", "num_items_tensor"],
)
def test_compile_scalar(name, fresh_dynamo):
    _check_compiled(name, chunk=3)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"strategy": "forward"}, F32),
        ({"strategy": "recompute"}, BF16),
        ({"accumulate_dtype": F32}, BF16),
    ],
)
def test_compile_strategies(options, dtype, fresh_dynamo):
    _check_compiled("ignore", dtype, chunk=3, **options)


@pytest.mark.parametrize("name", ["plain", "everything_smoothed"])
def test_compile_per_row(name, fresh_dynamo):
    _check_compiled(name, reduction="none", chunk=3)


def test_compile_statistics_and_dynamic_rows(fresh_dynamo):
    names = ("lse", "entropy", "argmax", "correct", "rank")

    @partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(h, w, y):
        loss, stats = pyloss.fused_linear_cross_entropy(h, w, y, return_stats=names)
        return loss + 0.1 * stats.entropy.mean(), stats.lse, stats.argmax, stats.rank

    for rows in (10, 15, 8):
        layer, y = make_layer(rows, D, V, F32, bias=False), labels_with_ignored(rows, V)
        found = step(*layer[:2], y)
        loss, stats = fused(layer, y, return_stats=names)
        total = loss + 0.1 * stats.entropy.mean()
        assert_close(found[0], total)
        assert_close(found[1], stats.lse)
        assert torch.equal(found[2], stats.argmax) and torch.equal(found[3], stats.rank)
        assert_close(gradients(found[0], layer), gradients(total, layer))


def test_compile_shift_and_sequences(fresh_dynamo):
    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def step(h, w, y):
        loss = pyloss.fused_linear_cross_entropy(h, w, y, shift=1)
        logprob, entropy = pyloss.token_logprobs(h, w, y, return_entropy=True, shift=1)
        return loss + logprob.mean() + entropy.square().mean()

    layer, y = make_layer((2, 5), D, V, F32, bias=False), _target().view(2, 5)
    found = step(*layer[:2], y)
    logprob, entropy = pyloss.token_logprobs(*layer[:2], y, return_entropy=True, shift=1)
    want = fused(layer, y, shift=1) + logprob.mean() + entropy.square().mean()
    assert_close(found, want)
    assert_close(gradients(found, layer), gradients(want, layer))


def test_compile_frozen_weight_and_second_backward(fresh_dynamo):
    layer, y = make_layer(N, D, V, F32), _target()
    layer.weight.requires_grad_(False)
    step = torch.compile(
        lambda h, b: fused(Layer(h, layer.weight, b), y), fullgraph=True, backend="aot_eager"
    )
    loss = step(layer.input, layer.bias)
    leaves = (layer.input, layer.bias)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    want = torch.autograd.grad(fused(layer, y), leaves)
    assert_close(list(first), list(want))
    assert_close([g / 3 for g in second], list(want))


def test_compile_with_numbers_that_change(fresh_dynamo):
    layer, y = make_layer(N, D, V, F32), _target()

    def loss(layer, z_loss, num_items):
        return fused(layer, y, z_loss=z_loss, num_items=num_items)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for z_loss, num_items in ((1e-4, 4), (1e-3, 5), (0.1, 7.5)):
        assert_close(compiled(layer, z_loss, num_items), loss(layer, z_loss, num_items))


def test_compiled_module(fresh_dynamo):
    module = pyloss.nn.LinearCrossEntropyLoss(D, V, bias=True, tau=1.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    h, y = make_logits((N, D)), _target()
    assert_close(compiled(h, y), module(h, y))
    parameters = list(module.parameters())
    got = torch.autograd.grad(compiled(h, y), parameters)
    assert_close(list(got), list(torch.autograd.grad(module(h, y), parameters)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_compile_with_inductor(options, fresh_dynamo):
    _check_compiled("everything", backend="inductor", chunk=3, **options)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_export(dtype):
    """The number of rows stays open, also where it decides how many chunks there are."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(D, V, dtype=dtype)

        def forward(self, h, y):
            return pyloss.fused_linear_cross_entropy(h * 2, self.head.weight, y, self.head.bias)

    model, h, y = Model(), make_logits((N, D)).to(dtype), _target()
    rows = {0: torch.export.Dim("rows", min=2, max=1000)}
    # Export of torch 2.6 cannot have a gradient and a size that stays open, in any Function.
    with torch.set_grad_enabled(TORCH >= (2, 8)):
        program = torch.export.export(model, (h, y), dynamic_shapes=(rows, rows))
    for times in (1, 5):
        h, y = h.repeat(times, 1), y.repeat(times)
        torch.testing.assert_close(program.module()(h, y), model(h, y))
