"""Soft rank and soft sort by projection onto the permutahedron: definition, kernel, transforms.

`specs/permutahedron.py` has derivatives, dtypes, empty batches, torch.compile and the errors.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import pyloss
from pyloss.functional import permutahedron_rank, permutahedron_sort
from pyloss.reference import permutahedron_projection
from pyloss.testing import LAYOUTS, to_layout

RANK = (True, False)
KINDS = ("l2", "kl")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_op = pytest.mark.parametrize("rank", RANK, ids=("rank", "sort"))


def functional(rank: bool):
    return permutahedron_rank if rank else permutahedron_sort


def reference(x: Tensor, rank: bool, kind: str, strength: float) -> Tensor:
    return permutahedron_projection(x, rank=rank, regularization=kind, strength=strength)


def weights(n: int) -> Tensor:
    return torch.arange(n, 0, -1, dtype=torch.float64)


def assert_projection(point: Tensor, slope: Tensor, vertex: Tensor) -> None:
    """`point` minimises, over the permutahedron of `vertex`, what has the gradient `slope` there.

    In the hull: its largest k sum to no more than those of the vertex. Optimal: no vertex has a
    smaller product with the slope; the smallest one has both sorted in opposite orders.
    """
    excess = point.sort(descending=True).values.cumsum(-1) - vertex.sort(
        descending=True
    ).values.cumsum(-1)
    scale = vertex.abs().sum(-1)
    assert (excess.max(-1).values <= 1e-12 * scale).all()
    torch.testing.assert_close(point.sum(-1), vertex.sum(-1), rtol=1e-12, atol=1e-12)
    least = (slope.sort().values * vertex.sort(descending=True).values).sum(-1)
    gap = (slope * point).sum(-1) - least
    bound = (slope.abs() * point.abs()).sum(-1) + scale
    assert (gap <= 1e-12 * bound).all()


@pytest.mark.parametrize("strength", [0.03, 0.3, 1.0, 10.0])
@every_kind
@every_op
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_the_projection(rank, kind, strength, backend):
    x = torch.randn(20, 9, dtype=torch.float64)
    x[3, 4] = x[3, 2]
    w = weights(9).expand(20, 9)
    with pyloss.backend(backend):
        y = functional(rank)(x, kind, strength)
    if rank:
        slope = y.log() - x / strength if kind == "kl" else y - x / strength
        assert_projection(y, slope, w)
    elif kind == "l2":
        assert_projection(-y, -y - w / strength, -x)
    else:
        assert_projection((-y).exp(), -y - w / strength, (-x).exp())


def test_the_check_of_a_projection_can_fail():
    x, w = torch.randn(1, 5, dtype=torch.float64), weights(5)[None]
    y = reference(x, True, "l2", 1.0)
    for wrong in (y + 0.01, w, y.mean(1, keepdim=True).expand(1, 5), w + w - y):
        with pytest.raises(AssertionError):
            assert_projection(wrong, wrong - x, w)


def test_closed_forms():
    x = torch.tensor([[0.2, -1.0, 3.5, 0.9]], dtype=torch.float64)
    exact = torch.tensor([[2.0, 1.0, 4.0, 3.0]], dtype=torch.float64)
    assert torch.equal(permutahedron_rank(x, regularization_strength=0.6), exact)
    assert torch.equal(permutahedron_sort(x, regularization_strength=0.3), x.sort().values)
    # Pooled as a whole: the projection onto the plane through the permutahedron.
    pooled = (x - x.mean()) / 50 + 2.5
    torch.testing.assert_close(permutahedron_rank(x, regularization_strength=50), pooled)
    torch.testing.assert_close(permutahedron_rank(x, "kl", 50), 10 * (x / 50).softmax(1))
    pooled = x.mean() + (weights(4).flip(0) - 2.5) / 50
    torch.testing.assert_close(permutahedron_sort(x, regularization_strength=50), pooled[None])
    pooled = (weights(4) / 50).logsumexp(0) - (-x).logsumexp(1) - weights(4) / 50
    torch.testing.assert_close(permutahedron_sort(x, "kl", 50), pooled[None])


# --------------------------------------------------------------------------------------------------
# The kernel against the reference


def check(x: Tensor, rank: bool, kind: str, strength: float) -> None:
    exact_x = x.detach().double().contiguous().requires_grad_()
    exact = reference(exact_x, rank, kind, strength)
    x = x.detach().requires_grad_()
    y = functional(rank)(x, kind, strength)
    assert y.dtype == x.dtype
    rtol = {torch.float64: 1e-11, torch.float32: 1e-6}[x.dtype]
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=rtol, equal_nan=True)
    g = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    (dx,) = torch.autograd.grad(y, x, g)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, g.double())
    size = exact_dx.nan_to_num(0.0).abs().max().item() if x.numel() else 0.0
    torch.testing.assert_close(
        dx.double(), exact_dx, rtol=10 * rtol, atol=rtol * size, equal_nan=True
    )
    with torch.no_grad():
        assert torch.equal(functional(rank)(x, kind, strength).nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_kind
@every_op
def test_shapes(rank, kind, dtype):
    # 24 elements and fewer are sorted by insertion, the rest by digits; one, two and many ranges.
    for shape in [(1, 1), (3, 1), (0, 5), (4, 2), (2, 23), (2, 24), (2, 25), (9, 64), (3, 700)]:
        for strength in (0.01, 0.5, 20.0):
            check(torch.randn(shape, dtype=dtype), rank, kind, strength)


@every_kind
@every_op
def test_large_rows_and_ties(rank, kind):
    x = torch.randn(2, 5000)
    check(x, rank, kind, 1.0)
    check((4 * x).round(), rank, kind, 0.3)
    check(torch.zeros(2, 40), rank, kind, 1.0)
    check(torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0] * 8]), rank, kind, 2.0)


@every_kind
@every_op
def test_large_and_small_numbers(rank, kind):
    for scale in (1e-40, 1e-6, 1e3, 1e30):
        check(scale * torch.randn(3, 40), rank, kind, 1.0)
    x = 1e4 + torch.randn(3, 200)  # far from 0: means must not cancel
    check(x, rank, kind, 0.1)
    for strength in (1e-30, 1e30):
        check(torch.randn(3, 40), rank, kind, strength)


@every_kind
@every_op
def test_float32_agrees_with_float64(rank, kind):
    """As well as rounding the result allows: sums and block values are double."""
    x = torch.randn(16, 1000)
    for strength in (0.01, 0.1, 1.0, 10.0):
        y = functional(rank)(x, kind, strength).double()
        exact = functional(rank)(x.double(), kind, strength)
        assert ((y - exact).abs() <= 2**-24 * exact.abs() * (1 + 1e-6) + 1e-45).all()


@every_kind
@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rank, kind):
    x = to_layout(torch.randn(6, 33), layout)
    check(x, rank, kind, 0.5)


@every_kind
@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_infinities_and_nan(rank, kind, dtype):
    inf, nan = math.inf, math.nan
    rows = [
        [inf, 1.0, -inf, 0.3, inf, 0.2, 0.1],
        [inf] * 7,
        [-inf, inf, -inf, inf, -inf, inf, -inf],
        [1.0, nan, 2.0, 3.0, inf, -inf, 0.0],
        [nan] * 7,
        [5.0, 4.1, 3.3, 1.8, 1.1, 0.0, -1.0],
    ]
    x = torch.tensor(rows, dtype=dtype)
    for repeats in (1, 6):
        check(x.repeat(1, repeats), rank, kind, 1.0)
    y = functional(rank)(x, kind, 0.01)
    assert y[3:5].isnan().all() and not y[[0, 1, 2, 5]].isnan().any()
    if rank:
        assert y[:3].tolist() == [[6.5, 5, 1, 4, 6.5, 3, 2], [4.0] * 7, [2.5, 6] * 3 + [2.5]]
    else:
        assert torch.equal(y[:3], x[:3].sort().values)
    # Ranks: the limit of large numbers. Sorted values: those of the finite elements alone, which
    # is no limit, since a gap above 1 / strength pools its two sides.
    y = functional(rank)(x[:1], kind, 1.0)
    if rank:
        torch.testing.assert_close(y, functional(rank)(x[:1].clamp(-1e4, 1e4), kind, 1.0))
    else:
        alone = functional(rank)(x[0, x[0].isfinite()], kind, 1.0)
        torch.testing.assert_close(y[0, y[0].isfinite()], alone)


@every_op
@every_kind
def test_threads_do_not_matter(rank, kind, keep_num_threads):
    x = torch.randn(300, 60, requires_grad=True)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        y = functional(rank)(x, kind, 0.7)
        found.append((y, *torch.autograd.grad((y**2).sum(), x)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# --------------------------------------------------------------------------------------------------
# Properties


@every_kind
@every_op
def test_invariants(rank, kind):
    x = torch.randn(5, 20, dtype=torch.float64)
    f = functools.partial(functional(rank), regularization=kind, regularization_strength=0.4)
    order = torch.randperm(20)
    y = f(x)
    torch.testing.assert_close(f(x[:, order]), y[:, order] if rank else y)
    if rank:
        torch.testing.assert_close(f(x + 3), y)
        torch.testing.assert_close(y.sum(1), torch.full((5,), 210.0, dtype=torch.float64))
        assert torch.equal(y.argsort(1), x.argsort(1))
    else:
        torch.testing.assert_close(f(x + 3), y + 3)
        assert (y.diff(dim=1) >= 0).all()
        same = y.sum(1), x.sum(1)
        if kind == "kl":
            same = (-y).exp().sum(1), (-x).exp().sum(1)
        torch.testing.assert_close(*same)


@every_kind
def test_descending(kind):
    x = torch.randn(4, 12, dtype=torch.float64)
    down = permutahedron_rank(x, kind, 0.5, descending=True)
    torch.testing.assert_close(down, permutahedron_rank(-x, kind, 0.5))
    assert (down.argsort(1) == x.argsort(1, descending=True)).all()
    down = permutahedron_sort(x, kind, 0.5, descending=True)
    torch.testing.assert_close(down, -permutahedron_sort(-x, kind, 0.5))
    assert (down.diff(dim=1) <= 0).all()


@every_op
def test_dim_and_leading_shape(rank):
    x = torch.randn(3, 7, 2, 5)
    for dim in (0, 1, 2, 3, -1, -3):
        rows = x.movedim(dim, -1)
        expected = functional(rank)(rows.reshape(-1, rows.shape[-1]), "kl", 0.3)
        expected = expected.view(rows.shape).movedim(-1, dim)
        assert torch.equal(functional(rank)(x, "kl", 0.3, dim=dim), expected)
    assert torch.equal(functional(rank)(x[0, 0, 0]), functional(rank)(x[0, 0, :1])[0])
    assert functional(rank)(x[:0], dim=1).shape == (0, 7, 2, 5)


# --------------------------------------------------------------------------------------------------
# Autograd, transforms, compile


@every_kind
@every_op
def test_transforms(rank, kind):
    f = functools.partial(functional(rank), regularization=kind, regularization_strength=0.6)
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(f)(x), f(x))
    torch.testing.assert_close(torch.func.vmap(f, 1, 1)(x), f(x))

    def loss(t):
        return (f(t) ** 3).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    jac = torch.func.jacrev(f)(x[0, 0])
    torch.testing.assert_close(torch.func.jacfwd(f)(x[0, 0]), jac)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x[0, 0]), jac)


@every_kind
@every_op
def test_opcheck(rank, kind):
    x = torch.randn(3, 7)
    args = (rank, kind == "kl", 0.5)
    torch.library.opcheck(torch.ops.pyloss.permutahedron_fwd, (x, *args))
    _, packed = torch.ops.pyloss.permutahedron_fwd(x, *args)
    saved = x if kind == "kl" else None
    torch.library.opcheck(
        torch.ops.pyloss.permutahedron_bwd, (torch.randn(3, 7), saved, packed, *args)
    )


@every_kind
@every_op
def test_backends_agree(rank, kind):
    x = torch.randn(3, 30, requires_grad=True)
    x.data[1, 3] = math.nan
    x.data[2, 5] = math.inf
    found = []
    for backend in ("reference", "cpu"):
        with pyloss.backend(backend):
            y = functional(rank)(x, kind, 0.5)
            found.append((y, *torch.autograd.grad(y, x, torch.arange(90.0).view(3, 30))))
            args = rank, kind == "kl", 0.5
            found[-1] += (torch.ops.pyloss.permutahedron_fwd(x.detach(), *args)[1],)
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-5, atol=1e-4)


@every_kind
@every_op
def test_saved_bytes(rank, kind):
    """The int32 list of the blocks; x too where softmax weights need it."""
    x = torch.randn(8, 50, requires_grad=True)
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional(rank)(x, kind)
    assert sum(seen.values()) == x.nbytes * (2 if kind == "kl" else 1)


def test_a_list_that_no_forward_made_is_refused():
    g, packed = torch.ones(2, 3), torch.tensor([[0, 1, 2], [0, 7, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="out of range"):
        torch.ops.pyloss.permutahedron_bwd(g, None, packed, True, False, 1.0)


@pytest.mark.gpu
@every_kind
@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cuda_agrees_with_the_cpu(rank, kind, dtype):
    for shape in [(0, 4), (1, 1), (3, 25), (200, 100), (2, 5000)]:
        x, g = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        if shape[0] > 2:
            x[0, 0], x[1, 1], x[1, 2] = math.nan, math.inf, -math.inf
        found = []
        for device in ("cpu", "cuda"):
            leaf = x.to(device).requires_grad_()
            y = functional(rank)(leaf, kind, 0.3)
            found.append([t.cpu() for t in (y, *torch.autograd.grad(y, leaf, g.to(device)))])
        rtol = 1e-10 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(*found, rtol=rtol, atol=100 * rtol, equal_nan=True)
