"""Sorting networks inside torch: derivatives, transforms, compile, opcheck, autocast, processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss.ops import sorting_network as op
from pyloss.reference import sorting_network as reference

F64 = torch.float64
DISTRIBUTIONS, SORTERS = op.DISTRIBUTIONS, op.NETWORKS[:3]


def draw(*shape: int, dtype=F64) -> torch.Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


def functions(**options):
    """name -> a function of scores (2, n)."""
    feats = torch.arange(2 * 5 * 3, dtype=F64).view(2, 5, 3) / 8 - 1
    target = torch.tensor([[0.1, 0.3, 0.2, 0.9, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0]])
    return {
        "sort": lambda x: pyloss.soft_sort(x, **options),
        "rank": lambda x: pyloss.soft_rank(x, **options),
        "argsort": lambda x: pyloss.soft_argsort(x, **options),
        "both": lambda x: pyloss.soft_sort(x, return_permutation=True, **options),
        "permute": lambda x: pyloss.soft_permute(x, feats.to(x.dtype), **options),
        "topk": lambda x: pyloss.soft_topk(x, 2, **options),
        "bce": lambda x: pyloss.sorting_cross_entropy(x, target, reduction="none", **options),
        "row_ce": lambda x: pyloss.sorting_cross_entropy(x, target, "row_ce", **options),
        "share": lambda x: pyloss.sorting_cross_entropy(
            x, target.round(), "col_ce", ties="share", **options
        ),
        "spearman": lambda x: pyloss.spearman_loss(x, target, **options),
    }


def gradcheck(f, x, second=False):
    """By random projections, which is as strict and takes a tenth of the time."""
    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    return check(f, x, fast_mode=True)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gradcheck(distribution):
    """First and second derivatives, no comparator at a kink."""
    for i, name in enumerate(SORTERS):
        x = (0.3 * draw(2, 5)).requires_grad_()
        f = functions(network=name, distribution=distribution, steepness=(1.0, 3.0)[i % 2])
        for j, key in enumerate(f):
            assert gradcheck(f[key], x), key
            if (i + j) % 3 == 0:
                assert gradcheck(f[key], x, second=True), key


def test_gradcheck_of_features_and_steepness():
    x, f = (0.3 * draw(2, 5)).requires_grad_(), draw(2, 5, 3).requires_grad_()
    one = draw(5, 2).requires_grad_()
    for name in SORTERS:
        assert gradcheck(lambda x, f, name=name: pyloss.soft_permute(x, f, network=name), (x, f))
        assert gradcheck(lambda x, f, name=name: pyloss.soft_permute(x, f, network=name), (x, one))
    assert gradcheck(pyloss.soft_permute, (x, one), second=True)
    s = torch.tensor([2.0, 0.7], dtype=F64, requires_grad=True)
    for distribution in DISTRIBUTIONS:
        for key in ("sort", "rank", "both", "permute", "bce"):

            def call(x, s, key=key, distribution=distribution):
                return functions(distribution=distribution, steepness=s)[key](x)

            assert gradcheck(call, (x, s)), (key, distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_tensor_as_steepness(distribution):
    """One for all, one per row, and the same numbers as the float."""
    x = draw(3, 2, 5)
    for s in (torch.tensor(3.0), torch.full((3, 2), 3.0), torch.full((2,), 3.0, dtype=F64)):
        for a, b in zip(
            pyloss.soft_sort(x, return_permutation=True, distribution=distribution, steepness=s),
            pyloss.soft_sort(x, return_permutation=True, distribution=distribution, steepness=3.0),
        ):
            torch.testing.assert_close(a, b)
    each = torch.tensor([1.0, 20.0], dtype=F64)
    y = pyloss.soft_rank(x, distribution=distribution, steepness=each)
    for i, s in enumerate(each.tolist()):
        want = pyloss.soft_rank(x[:, i], distribution=distribution, steepness=s)
        torch.testing.assert_close(y[:, i], want)
    masked = torch.tensor([[0.0, torch.inf, 1.0, -torch.inf]], requires_grad=True)
    s = torch.tensor(2.0, requires_grad=True)
    y = pyloss.soft_sort(masked, distribution=distribution, steepness=s)
    g = torch.autograd.grad(y[0, 1:3].square().sum(), (masked, s))
    assert all(t.isfinite().all() for t in g)


def test_learning_a_steepness():
    """Ranks of well separated scores get exact as the steepness grows, and it does."""
    log_s = torch.zeros((), requires_grad=True)
    x = torch.linspace(-1, 1, 8).flip(0)[None]
    optimiser = torch.optim.Adam([log_s], lr=0.3)
    for _ in range(20):
        loss = pyloss.sorting_cross_entropy(x, x, steepness=log_s.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert log_s.item() > 3


def test_straight_through():
    """The value of the hard operation, the gradient of the soft one."""
    x = draw(3, 6).requires_grad_()
    feats = draw(3, 6, 2).requires_grad_()
    ranks = x.argsort(1).argsort(1)
    q = torch.nn.functional.one_hot(ranks, 6).to(F64)
    for f, hard in (
        (pyloss.soft_sort, x.sort(1).values),
        (pyloss.soft_rank, ranks + 1.0),
        (pyloss.soft_argsort, x.argsort(1)),
        (pyloss.soft_permutation, q),
        (lambda x, **o: pyloss.soft_permute(x, feats, **o), q.mT @ feats),
        (lambda x, **o: pyloss.soft_topk(x, 2, **o), q[:, :, [5, 4]]),
        (lambda x, **o: pyloss.soft_topk(x, 2, largest=False, **o), q[:, :, :2]),
    ):
        found, soft = f(x, hard=True), f(x)
        torch.testing.assert_close(found.detach(), hard.to(F64).detach(), rtol=0, atol=1e-15)
        assert not torch.allclose(soft, found)
        g = torch.randn_like(soft)
        sources = [x, feats] if "feats" in f.__code__.co_freevars else [x]
        for a, b in zip(
            torch.autograd.grad(found, sources, g), torch.autograd.grad(soft, sources, g)
        ):
            assert torch.equal(a, b)
    y, p = pyloss.soft_sort(x, hard=True, return_permutation=True)
    assert torch.equal(p, q) and torch.equal(y, x.sort(1).values)
    masked = torch.tensor([[1.0, torch.inf, -torch.inf, 0.0]], requires_grad=True)
    y = pyloss.soft_sort(masked, hard=True)
    assert torch.equal(y, masked.sort(1).values)
    assert torch.autograd.grad(y[0, 1:3].sum(), masked)[0].isfinite().all()


def test_backward_twice_and_scaled():
    """The gradient found in the forward is handed over; a second backward finds it again."""
    x, target = draw(3, 7).requires_grad_(), torch.rand(3, 7)
    loss = pyloss.sorting_cross_entropy(x, target, reduction="none")
    g = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    first = torch.autograd.grad(loss, x, g, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, x, g, retain_graph=True)[0]
    assert torch.equal(first, second)
    one = torch.autograd.grad(loss[1], x)[0]
    torch.testing.assert_close(one[1], -0.5 * first[1])
    assert torch.equal(one[[0, 2]], torch.zeros(2, 7, dtype=F64))


def test_several_cotangents_at_once():
    x = draw(2, 5).requires_grad_()
    for key, f in functions().items():
        if key == "both":
            continue
        y = f(x)
        n = y.numel()
        unit = torch.eye(n, dtype=F64).view(n, *y.shape)
        (batched,) = torch.autograd.grad(y, x, unit, retain_graph=True, is_grads_batched=True)
        one = [torch.autograd.grad(y, x, u, retain_graph=True)[0] for u in unit]
        torch.testing.assert_close(batched, torch.stack(one))


def test_checkpoint():
    x, target = draw(3, 7).requires_grad_(), torch.rand(3, 7)

    def f(x):
        return pyloss.sorting_cross_entropy(x, target) + pyloss.soft_sort(x).square().sum()

    want = torch.autograd.grad(f(x), x)[0]
    for reentrant in (False, True):
        found = checkpoint(f, x, use_reentrant=reentrant)
        x.grad = None
        found.backward()
        assert torch.equal(x.grad, want)


# --- transforms ----------------------------------------------------------------------------------


def test_torch_func():
    x = draw(2, 5)
    for key, f in functions().items():
        if key in ("both", "permute", "bce", "row_ce", "share", "spearman"):
            continue
        torch.testing.assert_close(torch.func.vmap(f)(x), f(x))
        tangent = draw(2, 5)
        value, along = torch.func.jvp(f, (x,), (tangent,))
        torch.testing.assert_close(value, f(x))
        jacobian = torch.func.jacrev(f)(x)
        want = (jacobian * tangent).sum((-2, -1))
        torch.testing.assert_close(along, want)
    target = torch.rand(5)

    def loss(x):
        return pyloss.sorting_cross_entropy(x, target)

    each = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.clone().requires_grad_()
    total = sum(loss(row) for row in leaf)
    torch.testing.assert_close(each, torch.autograd.grad(total, leaf)[0])
    h = torch.func.hessian(loss)(x[0])
    torch.testing.assert_close(h, h.mT)


# --- opcheck, compile ----------------------------------------------------------------------------


def test_opcheck():
    ops = torch.ops.pyloss
    x = draw(3, 6, dtype=torch.float32)
    f, one = torch.randn(3, 6, 2), torch.randn(1, 6, 2)
    first, count = torch.arange(6, dtype=torch.int32).repeat(3, 1), torch.ones(3, 6).int()
    net, options = [0, 3, 0], [10.0, 0.25]
    check = torch.library.opcheck
    check(ops.sorting_network_sort, (x, net, options))
    check(ops.sorting_network_sort_bwd, (x, x, [1, 0, 0], options))
    for transpose, g in itertools.product((True, False), (f, one)):
        check(ops.sorting_network_apply, (x, g, transpose, net, options))
        for need in (True, False):
            check(ops.sorting_network_apply_bwd, (f, x, g, transpose, net, options, need))
    check(ops.sorting_network_permutation, (x, [2, 2, 0], options))
    p = torch.randn(3, 6, 6)
    check(ops.sorting_network_permutation_bwd, (x, p, x, net, options))
    check(ops.sorting_network_permutation_bwd, (None, p, x, [3, 1, 2], options))
    for kind, c, need in ((0, None, True), (1, count, False), (2, count, True)):
        check(ops.sorting_network_loss, (x, first, c, [0, kind, kind], net, options, need))
    for order in range(1, 5):
        check(ops.sorting_network_loss, (x, draw(3, 6), None, [order, 0, 1], net, options, True))


def test_compile_with_hard_and_changing_numbers():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x, s):
        y = pyloss.soft_sort(x, steepness=s, hard=True)
        return y.sum() + pyloss.soft_topk(x, 2, steepness=s, hard=True)[..., 0].square().sum()

    for n, s in ((5, 1.0), (6, 2.5), (7, 4.0)):
        x = draw(3, n).requires_grad_()
        torch.testing.assert_close(step(x, s), x.sum() + 3)
    torch._dynamo.reset()
    net = pyloss.DiffSortNet("bitonic", 5)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = draw(3, 5, dtype=torch.float32)
    for a, b in zip(compiled(x), net(x)):
        torch.testing.assert_close(a, b)


# --- backends, processes -------------------------------------------------------------------------


def test_backend_override():
    x = draw(2, 6)
    with pyloss.backend("reference"):
        found = pyloss.soft_sort(x, return_permutation=True)
    for a, b in zip(found, pyloss.soft_sort(x, return_permutation=True)):
        torch.testing.assert_close(a, b)
    named = ("auto", "cauchy", 10.0, 0.25, 0)
    torch.testing.assert_close(found[0], reference.sorting_network_sort(x, *named))


RANK = """
import os, sys, torch, torch.distributed as dist, pyloss
from datetime import timedelta
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
rank, path = int(sys.argv[1]), sys.argv[2]
store = dist.FileStore(path, 2)
limit = timedelta(seconds=120)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
torch.manual_seed(0)
x, target = torch.randn(8, 5, 3), torch.randn(8, 5)
def loss_of(model, part):
    scores, truth = model(x[part]).squeeze(-1), target[part]
    return pyloss.sorting_cross_entropy(scores, truth) + pyloss.spearman_loss(scores, truth)
model = torch.nn.Linear(3, 1)
loss_of(model, slice(None)).backward()
want = model.weight.grad.clone()
model.zero_grad()
wrapped = torch.nn.parallel.DistributedDataParallel(model)
loss_of(wrapped, slice(4 * rank, 4 * rank + 4)).backward()
good = torch.allclose(model.weight.grad, want, rtol=1e-4, atol=1e-6)
sys.stdout.flush()
os._exit(0 if good else 3)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ddp(tmp_path):
    def run(attempt):
        path = tmp_path / f"store{attempt}"
        ranks = [
            subprocess.Popen([sys.executable, "-c", RANK, str(i), str(path)], env=os.environ.copy())
            for i in range(2)
        ]
        return [p.wait(timeout=240) for p in ranks]

    status = run(0)
    if any(s not in (0, 3) for s in status):  # the transport, not the numbers
        status = run(1)
    assert status == [0, 0]


def test_compile_with_inductor():
    torch._dynamo.reset()
    x, target = draw(4, 9, dtype=torch.float32).requires_grad_(), torch.rand(4, 9)

    def f(x):
        loss = pyloss.sorting_cross_entropy(x, target, steepness=3.0)
        return loss + (pyloss.soft_rank(x) * pyloss.soft_sort(x)).sum()

    want, found = f(x), torch.compile(f, fullgraph=True, backend="inductor")(x)
    torch.testing.assert_close(found, want)
    a, b = (torch.autograd.grad(y, x)[0] for y in (found, want))
    torch.testing.assert_close(a, b)
