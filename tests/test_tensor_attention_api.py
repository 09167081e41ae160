"""Tensor attention inside torch: errors, compile, opcheck, transforms, autocast, backends, cost."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tensor_attention_cases import F32, F64, Problem, largest_error, with_gradients
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss import backends
from pyloss.functional import tensor_attention_cost, tensor_attention_n
from pyloss.reference import tensor_attention as reference

N, D = 6, 4


def _draw(heads=2, n=N, d=D, dtype=F32, **kw):
    return [torch.randn(2, heads, n, d, dtype=dtype, **kw) for _ in range(5)]


T = _draw()
Q, K1, K2, V1, V2 = T


def test_bad_input_of_any_order():
    with pytest.raises(ValueError, match="as many, and at least one, got 0 and 0"):
        tensor_attention_n(Q, [], [])
    with pytest.raises(ValueError, match="as many, and at least one, got 2 and 1"):
        tensor_attention_n(Q, [K1, K2], [V1])
    with pytest.raises(ValueError, match="masks must be 3, one per axis, got 1"):
        tensor_attention_n(Q, [K1, K2, K1], [V1, V2, V1], masks=[None])
    with pytest.raises(ValueError, match=r"keys\[0\] and keys\[2\] must have as many heads"):
        tensor_attention_n(Q, [K1, K2, K1[:, :1]], [V1, V2, V1])
    with pytest.raises(NotImplementedError, match="order 1 or 2, got order 3"):
        bias = torch.zeros(N, N, requires_grad=True)
        tensor_attention_n(Q, [K1, K2, K1], [V1, V2, V1], attn_mask=bias)


def test_inputs_without_a_gradient():
    out = pyloss.tensor_attention(*T)
    assert not out.requires_grad
    with torch.no_grad():
        assert torch.equal(pyloss.tensor_attention(*(t.clone().requires_grad_() for t in T)), out)
    q = Q.clone().requires_grad_()
    out, lse = pyloss.tensor_attention(q, *T[1:], return_lse=True)
    (only_lse,) = torch.autograd.grad(lse.sum(), q)  # no gradient for out
    exact = Q.double().requires_grad_()
    _, want = reference(exact, [K1.double(), K2.double()], [V1.double(), V2.double()])
    (expected,) = torch.autograd.grad(want.sum(), exact)
    assert largest_error(only_lse, expected) < 1e-5


def test_gradients_twice_and_in_place():
    tensors = [t.clone().requires_grad_() for t in T]
    out = pyloss.tensor_attention(*tensors)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    tensors = [t.clone().requires_grad_() for t in T]
    work = tensors[1] * 1
    out = pyloss.tensor_attention(tensors[0], work, *tensors[2:])
    work.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpointing():
    tensors = [t.clone().requires_grad_() for t in T]
    want = torch.autograd.grad(pyloss.tensor_attention(*tensors).sum(), tensors)
    out = checkpoint(pyloss.tensor_attention, *tensors, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), want):
        assert torch.equal(a, b)


def test_transforms():
    def loss(q, k1):
        return pyloss.tensor_attention(q, k1, *rest, window=(3, 4)).square().sum()

    tensors = _draw(dtype=F64)
    q, k1, rest = tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2:]
    want = torch.autograd.grad(loss(q, k1), (q, k1))
    q, k1 = q.detach(), k1.detach()
    for a, b in zip(torch.func.grad(loss, (0, 1))(q, k1), want):
        torch.testing.assert_close(a, b)
    direction = torch.randn_like(q)
    _, slope = torch.func.jvp(lambda x: loss(x, k1), (q,), (direction,))
    torch.testing.assert_close(slope, (want[0] * direction).sum())
    many = torch.randn(3, *q.shape, dtype=F64)
    got = torch.func.vmap(lambda x: pyloss.tensor_attention(x, k1, *rest))(many)
    for a, x in zip(got, many):
        torch.testing.assert_close(a, pyloss.tensor_attention(x, k1, *rest))


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = pyloss.tensor_attention(*T, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == F32
    want = pyloss.tensor_attention(*(t.bfloat16() for t in T))
    assert torch.equal(out, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert pyloss.tensor_attention(*(t.double() for t in T)).dtype == F64


def test_float_mask_of_another_dtype():
    bias = torch.randn(N, N, requires_grad=True)
    half = bias.detach().bfloat16().requires_grad_()
    out = pyloss.tensor_attention(*T, mask1=half)
    want = pyloss.tensor_attention(*T, mask1=half.float())
    assert torch.equal(out, want)
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.shape == (N, N)


def test_meta_tensors():
    out, lse = pyloss.tensor_attention(*(t.to("meta") for t in T), return_lse=True)
    assert out.is_meta and out.shape == Q.shape and lse.shape == Q.shape[:3]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backends(name):
    problem = Problem(9, 8, 7, masks=("float full", "bool padding"), kv_bias=(0.5, 1.0))
    tensors, masks = problem.tensors(F64), problem.drawn_masks(F64)
    want = with_gradients(problem.expected, tensors, masks)
    with pyloss.backend(name):
        got = with_gradients(problem.call, tensors, masks)
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2])):
        assert largest_error(a, b) < 1e-12


def test_triton_backend_needs_a_gpu():
    with pyloss.backend("triton"), pytest.raises(RuntimeError, match="triton"):
        pyloss.tensor_attention(*T)
    with pyloss.backend("cuda"), pytest.raises(RuntimeError, match="no cuda implementation"):
        pyloss.tensor_attention(*T)


# --- opcheck, compile ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [(0.5, False, 0, 0, 0, 0.0, 0.0, 0.0), (0.5, True, 3, 4, 1, 0.25, 1.0, 2.5)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(settings, masked):
    masks = [None, None]
    if masked:
        masks = [torch.randn(1, 2, N, N), torch.randn(2, 1, 1, N)]
    args = (*T, *masks, *settings)
    out, lse = torch.ops.pyloss.tensor_attention_fwd(*args)
    torch.library.opcheck(torch.ops.pyloss.tensor_attention_fwd.default, args)
    for dlse, want in ((None, 31), (torch.randn_like(lse), 127 if masked else 1)):
        backward = (torch.randn_like(out), dlse, *T, *masks, out, lse, *settings, want)
        torch.library.opcheck(torch.ops.pyloss.tensor_attention_bwd.default, backward)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("order", [2, 3])
def test_compile(order, fresh_dynamo):
    def run(q, keys, values, bias):
        out, lse = tensor_attention_n(
            q, keys, values, masks=[bias, *[None] * (order - 1)], window=4, return_lse=True
        )
        return (out * 2).sum() + lse.sin().sum()

    for n in (N, N + 3):
        q, *others = [torch.randn(1, 2, n, D).requires_grad_() for _ in range(2 * order + 1)]
        bias = torch.randn(n, n, requires_grad=order == 2)
        sources = [q, *others, *([bias] if order == 2 else [])]
        arguments = (q, others[:order], others[order:], bias)
        want = run(*arguments)
        grads = torch.autograd.grad(want, sources)
        # Order 3 walks over the keys in Python: one graph per length.
        compiled = torch.compile(
            run, fullgraph=True, backend="aot_eager", dynamic=None if order == 2 else False
        )
        got = compiled(*arguments)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, sources), grads):
            torch.testing.assert_close(a, b)


def _n(q, keys, values, **options):
    return lambda *t: tensor_attention_n(
        t[q], [t[k] for k in keys], [t[v] for v in values], **options
    )


@pytest.mark.parametrize(
    "function",
    [
        _n(0, (1, 1), (2, 2)),
        _n(0, (0, 0), (0, 0)),
        _n(0, (1, 1), (1, 1), window=3),
        _n(0, (0,), (0,), window=3),
        _n(0, (1, 1, 1), (2, 2, 2)),
        _n(0, (1, 1), (2, 2), method="lowrank", degree=2, check="none"),
        lambda q, k, v: pyloss.tensor_attention(
            q, k, k, v, v, mask1=q[0, 0] @ k[0, 0].mT, mask2=None
        ),
        lambda q, k, v: pyloss.tensor_attention(
            q, k, k, v, v, mask1=v[..., :1].mT, mask2=v[..., :1].mT
        ),
    ],
)
def test_compile_with_one_tensor_twice(function, fresh_dynamo):
    """Dynamo takes no tensor twice into an autograd.Function."""
    tensors = [t.clone().requires_grad_() for t in T[:3]]
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    want = function(*tensors)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        *(torch.autograd.grad(o.square().sum(), tensors, allow_unused=True) for o in (got, want))
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_compile_dynamic_offset(fresh_dynamo):
    """Decoding: a longer cache at every step."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(q, k1, k2, v1, v2):
        return pyloss.tensor_attention(
            q, k1, k2, v1, v2, window=(4, 5), q_offset=k1.shape[2] - q.shape[2]
        )

    for n in (7, 8, 9):
        tensors = _draw(n=n)
        want = pyloss.tensor_attention(*tensors, window=(4, 5))[:, :, -1:]
        torch.testing.assert_close(step(tensors[0][:, :, -1:], *tensors[1:]), want)


@pytest.mark.slow
def test_compile_inductor(fresh_dynamo):
    tensors = [t.clone().requires_grad_() for t in T]
    compiled = torch.compile(lambda *t: pyloss.tensor_attention(*t).square(), fullgraph=True)
    got = compiled(*tensors)
    want = pyloss.tensor_attention(*tensors).square()
    torch.testing.assert_close(got, want)
    pairs = zip(*(torch.autograd.grad(y.sum(), tensors) for y in (got, want)))
    for a, b in pairs:
        torch.testing.assert_close(a, b)


# --- cost ----------------------------------------------------------------------------------------


def _count(n_q, n_1, n_2, causal, windows):
    zeros = [torch.zeros(1, 1, n, 1, dtype=F64) for n in (n_q, n_1, n_2)]
    ones = [torch.ones(1, 1, n, 1, dtype=F64) for n in (n_1, n_2)]
    _, lse = reference(zeros[0], zeros[1:], ones, causal=causal, windows=windows)
    return round(lse.exp().sum().item())


@pytest.mark.parametrize(
    ("lengths", "causal", "window"),
    [
        ((9, 9, 9), False, None),
        ((9, 9, 9), True, None),
        ((9, 9, 9), None, (3, 5)),
        ((9, 9, 9), False, (3, 5)),
        ((9, 7, 12), None, (4, None)),
        ((5, 7, 12), True, None),
        ((12, 7, 5), False, (2, 20)),
    ],
)
def test_cost_counts_triples(lengths, causal, window):
    cost = tensor_attention_cost((2, 3, *lengths, 4, 5), window, is_causal=causal)
    is_causal = window is not None if causal is None else causal
    assert cost.triples == 6 * _count(*lengths, is_causal, window)
    assert cost.flop == 2 * (4 + 5) * cost.triples and cost.exps == cost.triples
    assert cost.seconds is None


def test_cost_of_both_directions():
    shape = (1, 2, 64, 16)
    forward, backward, both = (
        tensor_attention_cost(shape, direction=direction, rate=1e9)
        for direction in ("forward", "backward", "both")
    )
    assert forward.flop == 2 * 4 * 64**3 * 16 and backward.flop == 2 * 10 * 64**3 * 16
    assert both.flop == forward.flop + backward.flop
    assert both.seconds == pytest.approx(both.flop / 1e9)
    assert both.extra_bytes == max(forward.extra_bytes, backward.extra_bytes)
    # q, k1, k2, v1, v2, out, and lse
    assert forward.tensor_bytes == 2 * 64 * (6 * 16 + 1) * 4
    half = tensor_attention_cost(shape, dtype=torch.bfloat16)
    assert half.tensor_bytes == 2 * 64 * (6 * 16 * 2 + 4)


def test_cost_refuses():
    with pytest.raises(ValueError, match="shape must be"):
        tensor_attention_cost((2, 3, 4))
    with pytest.raises(ValueError, match="direction must be"):
        tensor_attention_cost((1, 1, 4, 4), direction="fwd")
    with pytest.raises(ValueError, match="window must be positive"):
        tensor_attention_cost((1, 1, 4, 4), 0)


def test_scratch_is_linear_in_the_length():
    """No buffer of n^2: four times the length, at most about four times the scratch."""
    small, large = (
        tensor_attention_cost((1, 1, n, 64), direction="both").extra_bytes for n in (1024, 4096)
    )
    assert large < 4.2 * small
    assert small < 32e6 and small > 1024 * 64 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory():
    from pyloss.demo.memory import PeakMemory

    memory = PeakMemory()
    if not memory.can_reset:
        pytest.skip("this system cannot reset the peak")
    n = 512
    tensors = [torch.randn(1, 1, n, 8).requires_grad_() for _ in range(5)]
    pyloss.tensor_attention(*tensors).sum().backward()
    memory.reset()
    before = memory.peak()
    pyloss.tensor_attention(*tensors).sum().backward()
    assert memory.peak() - before < 16  # MiB; the scores alone would take 512


# --- GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(130, 130, 130, 64, 64, batch=2),
        Problem(200, 200, 200, 64, 64, causal=True),
        Problem(200, 200, 200, 64, 64, window=(17, 64), causal=True, heads=4, kv_heads=1),
        Problem(65, 70, 75, 32, 32, masks=("float full", "bool padding"), kv_bias=(0.1, 1.0)),
    ],
    ids=str,
)
def test_gpu_equals_reference(problem, dtype):
    tensors = [t.cuda() for t in problem.tensors(dtype)]
    masks = [m if m is None else m.cuda() for m in problem.drawn_masks(F32)]
    exact = [t.double() for t in tensors]
    exact_masks = [m.double() if m is not None and m.is_floating_point() else m for m in masks]
    out, lse, grads = with_gradients(problem.call, tensors, masks)
    want_out, want_lse, want = with_gradients(problem.expected, exact, exact_masks)
    limit = 1e-3 if dtype == F32 else 3e-2
    assert largest_error(out, want_out) < limit
    assert (lse - want_lse).abs().max() < 1e-2
    for a, b in zip(grads, want):
        assert largest_error(a, b) < 2 * limit
    again = with_gradients(problem.call, tensors, masks)
    for a, b in zip((out, lse, *grads), (*again[:2], *again[2])):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_graph_capture():
    """No synchronisation with the host: a CUDA graph can hold forward and backward."""
    tensors = [t.cuda().requires_grad_() for t in Problem(64, 64, 64, 32, 32).tensors(F32)]

    def step():
        out = pyloss.tensor_attention(*tensors, window=(16, 32))
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_infinite_lse_of_a_query_outside(keep_num_threads):
    """Queries before the first key: 0 and -inf, whatever their values."""
    tensors = _draw()
    out, lse = pyloss.tensor_attention(*tensors, is_causal=True, q_offset=-2, return_lse=True)
    assert bool((lse[:, :, :2] == -math.inf).all()) and bool((out[:, :, :2] == 0).all())
    assert lse[:, :, 2:].isfinite().all()


def test_autocast_of_mixed_inputs():
    q, *rest = torch.randn(5, 1, 2, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = pyloss.tensor_attention(q.bfloat16(), *rest)
        same = pyloss.tensor_attention(q, *rest)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, same)


def test_window_of_a_wrong_type():
    with pytest.raises(TypeError, match="window must be an integer or a sequence.*1.5"):
        pyloss.tensor_attention(*torch.randn(5, 1, 1, 3, 2), window=1.5)


def test_transforms_of_order_three():
    q, *rest = torch.randn(7, 1, 1, 4, 3, dtype=F64)
    keys, values = rest[:3], rest[3:]

    def f(q):
        return tensor_attention_n(q, keys, values, is_causal=True)

    direction = torch.randn_like(q)
    out, tangent = torch.func.jvp(f, (q,), (direction,))
    torch.testing.assert_close(out, f(q))
    q.requires_grad_()
    (grad,) = torch.autograd.grad(f(q).square().sum(), q)
    (want,) = torch.func.vmap(torch.func.grad(lambda q: f(q).square().sum()))(q.detach()[None])
    torch.testing.assert_close(grad, want)
    torch.testing.assert_close((2 * out * tangent).sum(), (grad * direction).sum())


def test_a_triton_that_is_too_old_is_named(monkeypatch):
    pytest.importorskip("triton")
    backends._old_triton.cache_clear()
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda name: "3.3.1")
    try:
        with (
            pyloss.backend("triton"),
            pytest.raises(RuntimeError, match="need Triton 3.4 or newer .*, 3.3.1 is installed"),
        ):
            pyloss.tensor_attention(*(torch.randn(1, 1, 4, 8) for _ in range(5)))
        tiles = backends.why_not("triton", "linear_cross_entropy_tiles_fwd", "cuda", ["triton"])
        assert "need Triton 3.4 or newer" in tiles
    finally:
        backends._old_triton.cache_clear()
