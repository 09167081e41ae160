"""The op behind GroCo's negatives: the reference, tiles, gradients, memory."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from pyloss.ops import similarity_topk as op
from pyloss.ops.similarity_topk import by_tiles, cpu
from pyloss.reference import similarity_topk as reference
from pyloss.reference.similarity_topk import similarity_hardest as reference_hardest


@pytest.fixture(autouse=True)
def threads(keep_num_threads) -> None:
    pass


def problem(b=50, m=50, d=7, dtype=torch.float64, grad=True):
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, d, generator=g, dtype=dtype) for n in (b, m))
    return queries.requires_grad_(grad), keys.requires_grad_(grad)


def test_reference_by_hand() -> None:
    queries, keys = torch.eye(3), torch.tensor([[3.0, 1.0, 2.0], [5.0, 7.0, 6.0], [0.0, 0.0, 9.0]])
    values, indices = reference(queries, keys, 2)
    assert values.tolist() == [[5, 3], [7, 1], [9, 6]]
    assert indices.tolist() == [[1, 0], [1, 0], [2, 1]]
    values, indices = reference(queries, keys, 2, 0)  # without a key's own
    assert values.tolist() == [[5, 0], [1, 0], [6, 2]]
    assert indices.tolist() == [[1, 2], [0, 2], [1, 0]]


@pytest.mark.parametrize("first", [-1, 0, 4])
@pytest.mark.parametrize("tile", [1 << 20, 60, 130, 1])
def test_tiles_are_the_reference(monkeypatch, tile, first) -> None:
    monkeypatch.setattr(by_tiles, "TILE", tile)
    monkeypatch.setattr(cpu, "takes", lambda *_: False)
    queries, keys = problem(21, 60)
    expected = reference(queries, keys, 5, first)
    found = op.similarity_topk(queries, keys, 5, first)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-14, atol=1e-14)
    weight = torch.randn_like(found[0])
    gradients = [
        torch.autograd.grad((values * weight).sum(), (queries, keys))
        for values in (found[0], expected[0])
    ]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


# Several tiles of the kernel, none of them whole; lists of less and more than a vector.
@pytest.mark.parametrize("k", [1, 10, 40])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_is_the_tiles(dtype, same, k) -> None:
    """Multiples of 1/8, whose products are exact: many ties, which the smaller index wins."""
    queries, keys = (t.detach() for t in problem(331, 300, 9, dtype))
    queries, keys = (torch.round(2 * t) / 8 for t in (queries, keys))
    if same:
        keys = queries
    for first in (-1, 0) if same else (-1, 0, 7):
        expected, _ = by_tiles.forward(queries, keys, k, first)
        scores = queries @ keys.T
        if first >= 0:
            scores.diagonal(first).fill_(-math.inf)
        indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = cpu.forward(queries, keys, k, first)
            assert torch.equal(found[0], expected)
            assert torch.equal(found[1], indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_those_of_any_thread_count_and_of_half_the_products(dtype) -> None:
    x = torch.randn(300, 77, dtype=dtype)
    torch.set_num_threads(1)
    expected = cpu.forward(x, x, 12, 0)
    for keys, threads in ((x.clone(), 1), (x, 2), (x, 5), (x.clone(), 2)):
        torch.set_num_threads(threads)
        for a, b in zip(cpu.forward(x, keys, 12, 0), expected):
            assert torch.equal(a, b)


def test_kernel_with_numbers_that_are_none() -> None:
    """NaN comes first, the smaller index before others; -inf fills up, a left out key too."""
    x = torch.zeros(140, 1)
    x[0] = 1.0
    keys = torch.full((140, 1), -math.inf)
    keys[[3, 130]] = math.nan
    keys[[5, 131]] = 2.0
    values, indices = cpu.forward(x[:1], keys, 6, 3)
    assert torch.equal(values.nan_to_num(9.0), torch.tensor([[9.0, 2.0, 2.0] + [-math.inf] * 3])
                       .nan_to_num(9.0))  # fmt: skip
    assert indices.tolist() == [[130, 5, 131, 0, 1, 2]]
    assert cpu.forward(x[:1], keys, 6, -1)[1].tolist() == [[3, 130, 5, 131, 0, 1]]
    few = torch.eye(3)
    assert cpu.forward(few, few, 3, 0)[1].tolist() == [[1, 2, 0], [0, 2, 1], [0, 1, 2]]


def test_rows_that_are_far_apart_or_transposed() -> None:
    queries, keys = (t.detach() for t in problem(50, 60, 8))
    expected = cpu.forward(queries, keys, 5, -1)
    wide = torch.cat([queries, queries], 1)[:, :8]
    for a, b in zip(cpu.forward(wide, keys.T.contiguous().T, 5, -1), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_gradient_of_one_alone(needed) -> None:
    queries, keys = problem(12, 9)
    queries, keys = queries.detach(), keys.detach()
    wanted = (queries if needed[0] else keys).requires_grad_()
    values, _ = op.similarity_topk(queries, keys, 3)
    (found,) = torch.autograd.grad(values.sum(), wanted)
    (expected,) = torch.autograd.grad(reference(queries, keys, 3)[0].sum(), wanted)
    torch.testing.assert_close(found, expected)


def test_derivatives() -> None:
    def values(queries, keys):
        return op.similarity_topk(queries, keys, 2, 1)[0]

    inputs = problem(3, 5, 2)
    torch.autograd.gradcheck(values, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(values, inputs)


def test_opcheck() -> None:
    queries, keys = problem(grad=False)
    torch.library.opcheck(torch.ops.pyloss.similarity_topk, (queries, keys, 4, 0))


def test_nan_is_found() -> None:
    queries, keys = problem(8, 8, grad=False)
    keys[3, 0] = math.nan
    values, indices = op.similarity_topk(queries, keys, 2, 0)
    mine = torch.arange(8) == 3
    assert torch.equal(values.isnan().any(1), ~mine)  # its own key is not compared
    assert (indices[~mine] == 3).any(1).all()


def test_nothing() -> None:
    queries, keys = problem(0, 5)
    values, indices = op.similarity_topk(queries, keys, 3)
    assert values.shape == indices.shape == (0, 3)
    values.sum().backward()
    assert queries.grad.shape == (0, 7)
    assert torch.equal(keys.grad, torch.zeros(5, 7, dtype=keys.dtype))


def test_what_is_kept_for_the_backward() -> None:
    """Of the products only k a row, and no copy of the chosen keys."""
    queries, keys = problem(400, 400, 32)
    kept = []

    def pack(t):
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op.similarity_topk(queries, keys, 10)
    assert sum(kept) == 400 * 32 * 8 * 2 + 400 * 10 * 8


@pytest.mark.parametrize("k", [0, 1, 7, 20])
@pytest.mark.parametrize("tile", [1 << 20, 60, 1])
def test_hardest_by_tiles_is_the_reference(monkeypatch, tile, k) -> None:
    """Features of few values, so that many products are equal."""
    monkeypatch.setattr(by_tiles, "TILE", tile)
    queries, keys = (t.detach().round().requires_grad_() for t in problem(21, 30, 3))
    scale = torch.linspace(0.5, 1.5, 21, dtype=torch.float64).requires_grad_()
    found = [
        (lse.nan_to_num(neginf=0.0), total)
        for lse, total in (
            f(queries, keys, scale, k, 4) for f in (op.similarity_hardest, reference_hardest)
        )
    ]
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)
    if k == 0:
        return
    weight = torch.randn_like(scale)
    gradients = [
        torch.autograd.grad((lse * weight + total).sum(), (queries, keys, scale))
        for lse, total in found
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_opcheck_of_the_hardest() -> None:
    queries, keys = problem(5, 6, grad=False)
    scale = torch.tensor(2.0, dtype=torch.float64)
    lse, _, least, equals = torch.ops.pyloss.similarity_hardest(queries, keys, scale, 3, 0)
    torch.library.opcheck(torch.ops.pyloss.similarity_hardest, (queries, keys, scale, 3, 0))
    given = (lse, lse, queries, keys, scale, lse, least, equals, 0)
    torch.library.opcheck(torch.ops.pyloss.similarity_hardest_bwd, given)


@pytest.mark.parametrize("pair", [lambda g, one: (g, one), lambda g, one: (one, g)])
def test_vmap_of_a_gradient_of_the_hardest(pair) -> None:
    """Of either cotangent alone, by operations that vmap knows: others are looped over."""
    queries, keys = problem(8, 9, 3)
    results = op.similarity_hardest(queries, keys, torch.tensor(1.5, dtype=torch.float64), 4)
    one, several = torch.ones(8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)

    def gradient(g):
        return torch.autograd.grad(results, (queries, keys), pair(g, one), retain_graph=True)

    expected = [torch.stack(gs) for gs in zip(*map(gradient, several))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(list(torch.func.vmap(gradient)(several)), expected)
