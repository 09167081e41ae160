"""A temperature of each row in the losses of a linear layer, against logits that are divided by it.

`specs/linear.py` has the reference, derivatives of any order, torch.compile and torch.func.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss import fused_linear_cross_entropy, token_logprobs

N, D, V = 29, 12, 17
F64 = torch.float64


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads) -> None:
    torch.set_num_threads(1)


def make(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels, temperatures); a third of the rows is ignored."""
    h, w, b = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    y, t = torch.randint(V, (N,)), torch.rand(N) * 1.5 + 0.5
    y[::3] = -100
    layer = [x.to(dtype).requires_grad_() for x in (h, w, b)]
    return *layer, y, t.to(torch.float64 if dtype == F64 else torch.float32).requires_grad_()


def logits_of(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> Tensor:
    return F.linear(h, w, b) / t.unsqueeze(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "forward", "recompute"])
@pytest.mark.parametrize("chunk", [1, 8, "auto"])
def test_strategies_and_chunks(chunk, strategy, bias) -> None:
    h, w, b, y, t = make()
    b = b if bias else None
    leaves = [x for x in (h, w, b, t) if x is not None]
    options = dict(label_smoothing=0.1, weight=torch.rand(V, dtype=F64))
    loss = fused_linear_cross_entropy(
        h, w, y, b, temperature=t, strategy=strategy, chunk=chunk, **options
    )
    want = F.cross_entropy(logits_of(h, w, b, t), y, **options)
    torch.testing.assert_close(loss, want)
    found = torch.autograd.grad(2.5 * loss, leaves)
    for a, e in zip(found, torch.autograd.grad(2.5 * want, leaves)):
        torch.testing.assert_close(a, e)


def test_one_number_is_the_number() -> None:
    h, w, b, y, _ = make()
    for t in (torch.tensor(0.7, dtype=F64), torch.full((N,), 0.7, dtype=F64)):
        found = token_logprobs(h, w, y, b, t, return_entropy=True)
        torch.testing.assert_close(found, token_logprobs(h, w, y, b, 0.7, return_entropy=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_order_of_the_transforms(softcap: float | None) -> None:
    """Scale, cap, temperature: a temperature in the cap's place would be another loss."""
    h, w, b, y, t = make()
    z = F.linear(h, w, b) * 2.0
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / t.unsqueeze(-1)
    want = torch.log_softmax(z, -1).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
    want = torch.where(y == -100, 0.0, want)
    found = token_logprobs(h, w, y, b, t, softcap=softcap, logit_scale=2.0)
    torch.testing.assert_close(found, want)
    up = torch.randn(N, dtype=F64)
    grads = [torch.autograd.grad(x, (h, w, b, t), up) for x in (found, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_soft_cap_changes_neither_dtypes_nor_shapes(softcap: float | None) -> None:
    h, w, b, _, _ = make(torch.bfloat16)
    y = torch.randint(V, (2, 7))
    h, t = h[:14].reshape(2, 7, D), torch.rand(2, 7) + 0.5
    options = dict(temperature=t, softcap=softcap, shift=2, return_stats=("lse", "argmax"))
    for reduction, shape in (("none", (2, 5)), ("mean", ())):
        loss, stats = fused_linear_cross_entropy(h, w, y, b, reduction=reduction, **options)
        assert loss.shape == shape and loss.dtype == torch.bfloat16
        assert stats.lse.shape == stats.argmax.shape == (2, 5)
        assert stats.lse.dtype == torch.float32 and stats.rank is None
        with torch.autocast("cpu", torch.bfloat16):
            loss = fused_linear_cross_entropy(
                h.float(), w.float(), y, b.float(), reduction=reduction, **options
            )[0]
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_ignored_rows_may_hold_anything(softcap: float | None, bad: float) -> None:
    h, w, b, y, t = make()
    drop = y == -100
    found = []
    for fill in (bad, 1.0):
        x = [h.detach().clone(), w.detach(), b.detach(), t.detach().clone()]
        x[0][drop], x[3][drop] = fill, fill
        leaves = [p.requires_grad_() for p in x]
        loss = fused_linear_cross_entropy(
            leaves[0], leaves[1], y, leaves[2], temperature=leaves[3], softcap=softcap
        )
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, e in zip(*found):
        assert torch.equal(a, e)
    assert not found[0][1][drop].any() and not found[0][4][drop].any()


def test_nan_in_nan_out() -> None:
    h, w, b, y, t = make()
    with torch.no_grad():
        t[1] = math.nan
    rows = token_logprobs(h, w, y, b, t)
    assert rows[1].isnan() and rows.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_half_types_lose_no_more_than_with_a_number(bias, dtype) -> None:
    """The same temperature as a tensor and as a number, against float64 on the rounded inputs."""
    torch.manual_seed(3)
    n, d, v = 400, 64, 300
    h, w, b = (x.to(dtype) for x in (torch.randn(n, d), torch.randn(v, d) / 4, torch.randn(v)))
    b, y, t = b if bias else None, torch.randint(v, (n,)), 0.7
    exact = torch.log_softmax(
        F.linear(h.double(), w.double(), b if b is None else b.double()) / t, 1
    )
    exact = exact.gather(1, y.unsqueeze(1)).squeeze(1)

    def error(temperature) -> float:
        return (token_logprobs(h, w, y, b, temperature) - exact).square().mean().sqrt().item()

    assert error(torch.full((n,), t)) <= 1.5 * error(t)


def test_probabilities_mixup_and_a_shift() -> None:
    h, w, b, _, _ = make()
    h, t = h[:24].view(4, 6, D), (torch.rand(4, 6, dtype=F64) + 0.5).requires_grad_()
    y, y2 = torch.randint(V, (4, 6)), torch.randint(V, (4, 6))
    p, lam = torch.rand(4, 6, V, dtype=F64).softmax(-1), torch.rand(4, 6, dtype=F64)
    y[0], y2[1, 2:] = -100, -100
    for k in (0, 2):
        z = logits_of(h[:, : 6 - k], w, b, t[:, k:]).reshape(-1, V)
        want = F.cross_entropy(z, p[:, k:].reshape(-1, V))
        torch.testing.assert_close(
            fused_linear_cross_entropy(h, w, p, b, temperature=t, shift=k), want
        )
        # float32 states below float64 probabilities: all of it in float64
        low = fused_linear_cross_entropy(
            h.float(), w.float(), p, b.float(), temperature=t.float(), shift=k
        )
        assert low.dtype == F64 and abs(low.item() - want.item()) < 1e-6
        cut = [x[:, k:].reshape(-1) for x in (y, y2, lam)]
        want = pyloss.fused_cross_entropy(z, tuple(cut))
        mixed = fused_linear_cross_entropy(h, w, (y, y2, lam), b, temperature=t, shift=k)
        torch.testing.assert_close(mixed, want)
        grads = [torch.autograd.grad(x, (h, t), retain_graph=True) for x in (mixed, want)]
        torch.testing.assert_close(*grads)


def test_one_row_and_no_rows() -> None:
    h, w, b, y, t = make()
    one = token_logprobs(h[1], w, y[1], b, t[1])
    torch.testing.assert_close(one, token_logprobs(h, w, y, b, t)[1])
    assert token_logprobs(h[:0], w, y[:0], b, t[:0]).shape == (0,)
    assert fused_linear_cross_entropy(h[:0], w, y[:0], b, temperature=t[:0], empty="zero") == 0


def test_backends_checkpoint_and_module() -> None:
    h, w, b, y, t = make()
    leaves = (h, w, b, t)

    def loss(*x: Tensor) -> Tensor:
        return fused_linear_cross_entropy(x[0], x[1], y, x[2], temperature=x[3])

    want = torch.autograd.grad(loss(*leaves), leaves)
    with pyloss.backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(loss(*leaves), leaves), want)
    kept = checkpoint(loss, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(kept, leaves), want)
    module = pyloss.nn.LinearCrossEntropyLoss(D, V, bias=True, dtype=F64)
    with torch.no_grad():
        module.linear.weight.copy_(w), module.linear.bias.copy_(b)
    torch.testing.assert_close(module(h, y, temperature=t), loss(*leaves))


def test_a_temperature_that_changes_is_compiled_once() -> None:
    """As a tensor; a Python number is a constant of the graph."""
    h, w, b, y, _ = make(torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(token_logprobs, backend=backend, fullgraph=True)
    for i in range(10):  # more than the graphs that torch.compile keeps
        t = 0.5 + i / 10
        torch.testing.assert_close(
            compiled(h, w, y, b, torch.tensor(t)), token_logprobs(h, w, y, b, t)
        )
    assert len(graphs) == 1


def test_filter_and_tiles() -> None:
    h, w, b, y, t = make(torch.float32)
    loss = fused_linear_cross_entropy(h, w, y, b, temperature=t, filter=1e-3)
    torch.testing.assert_close(loss, fused_linear_cross_entropy(h, w, y, b, temperature=t))
    with pytest.raises(ValueError, match="filter cannot be used with a tensor temperature with"):
        fused_linear_cross_entropy(h, w, y, b, temperature=t, filter=1e-3, softcap=3.0)


def test_a_learned_temperature() -> None:
    """Calibration: the optimum over one temperature has a gradient of 0."""
    h, w, _, y, _ = make()
    log_t = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_t], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fused_linear_cross_entropy(h.detach(), w.detach(), y, temperature=log_t.exp())
        loss.backward()
        return loss

    optimizer.step(closure)
    best = closure().item()
    assert abs(log_t.grad.item()) < 1e-6
    for other in (0.9, 1.1):
        t = log_t.exp().item() * other
        assert fused_linear_cross_entropy(h, w, y, temperature=t).item() > best
