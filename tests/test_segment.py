"""The segment ops: the kernels against the reference at the lengths, widths and layouts that they
are written around, torch's counterpart, the tree."""

from __future__ import annotations

import math

import pytest
import torch

import pyloss
from pyloss.functional import (
    segment_moments,
    segment_reduce,
    segment_softmax,
    segment_softmax_stats,
    segment_tree_reduce,
)
from pyloss.ops.segment import kinds
from pyloss.segment import TreeLevel, offsets_from_index, offsets_from_lengths, tree_levels

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {F64: 1e-12, F32: 2e-6, BF16: 1e-2, F16: 2e-3}
REDUCES = tuple(kinds.REDUCES)

# Around a vector and two of each instruction set; parts of long segments, which begin anywhere;
# nothing at both ends.
SHORT = [0, 0, *range(1, 35), 0, 63, 64, 65, 0]
LONG = [3, 4096, 0, 4097, 1, 9000, 2, 0, 0]


def draw(lengths: list[int], shape: tuple[int, ...] = (), dtype=F64) -> tuple:
    g = torch.Generator().manual_seed(len(lengths))
    x = 1 + torch.randn((sum(lengths), *shape), generator=g, dtype=F64) / 8
    x[torch.rand(x.shape, generator=g) < 1e-3] = 0.0
    return x.to(dtype), offsets_from_lengths(torch.tensor(lengths))


FUNCTIONS = {
    **{r: lambda x, o, r=r: (segment_reduce(x, o, r),) for r in REDUCES},
    "moments": lambda x, o: segment_moments(x, o)[1:],
    "stats": segment_softmax_stats,
    "softmax": lambda x, o: (segment_softmax(x, o),),
}


def step(function, x: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    """Results, and the gradient of a sum of them."""
    leaf = x.detach().requires_grad_()
    found = function(leaf, offsets)
    live = [t for t in found if t.requires_grad]
    g = [torch.linspace(0.5, 1.5, max(t.numel(), 1)).to(t)[: t.numel()].view_as(t) for t in live]
    return [t.detach() for t in found] + list(torch.autograd.grad(live, leaf, g))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "lengths, shape", [(SHORT, ()), (LONG, ()), (SHORT, (3,)), ([70, 0, 64, 1, 129], (2, 35))],
    ids=["short", "long", "narrow", "wide"],
)  # fmt: skip
def test_kernels_against_the_reference(name, lengths, shape) -> None:
    function = FUNCTIONS[name]
    for dtype in TOLERANCES:
        x, offsets = draw(lengths, shape, dtype)
        if name == "prod":  # of thousands of values, in float16
            x = torch.where(x == 0, x, 1 + (x - 1) / 64)
        if dtype == F32:
            offsets = offsets.int()
        found = step(function, x, offsets)
        with pyloss.backend("reference"):
            expected = step(function, x.double(), offsets)
        for a, b in zip(found, expected):
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(
                a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True
            )


@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_strides(layout) -> None:
    x, offsets = draw(LONG[:4], (3,), F32)
    offsets = torch.stack([offsets] * 2, 1)[:, 0]
    there = {
        "rows": lambda: torch.cat([x, x], 1)[:, :3],
        "columns": lambda: x.t().contiguous().t(),
        "apart": lambda: torch.stack([x, x], 2)[..., 0],
    }[layout]()
    for name in ("sum", "logsumexp", "moments", "softmax"):
        for t, dense in ((there, x), (there[:, 1], x[:, 1].clone())):
            for a, b in zip(*(step(FUNCTIONS[name], u, offsets) for u in (t, dense))):
                torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "lengths, shape",
    [([200, *LONG, *SHORT, 20000], ()), ([300, 65, 0, 64, 9, 800], (64,))],
    ids=str,
)
def test_bits_depend_on_neither_threads_nor_neighbours(lengths, shape) -> None:
    x, offsets = draw(lengths, shape, F32)
    before = torch.get_num_threads()
    try:
        for name, function in FUNCTIONS.items():
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(step(function, x, offsets))
            for other in results[1:]:
                for a, b in zip(results[0], other):
                    assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)), name
    finally:
        torch.set_num_threads(before)
    # A long one alone.
    begin, end = offsets[5:7].tolist()
    alone = segment_reduce(x[begin:end].clone(), torch.tensor([0, end - begin]))
    assert torch.equal(alone[0], segment_reduce(x, offsets)[5])


@pytest.mark.parametrize("reduce", [r for r in REDUCES if r != "logsumexp"])
def test_as_torch_segment_reduce(reduce) -> None:
    """Values, empty segments, ties and their gradients."""
    x = torch.tensor([2.0, 5.0, 5.0, 0.0, -1.0, 3.0], dtype=F64)
    lengths = torch.tensor([3, 0, 2, 1, 0])
    theirs = lambda x: torch.segment_reduce(x, reduce, lengths=lengths)  # noqa: E731
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    found = segment_reduce(leaves[0], offsets_from_lengths(lengths), reduce)
    expected = theirs(leaves[1])
    torch.testing.assert_close(found, expected, equal_nan=True)
    kept = lengths > 0
    for y in (found, expected):
        y[kept].sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_infinite_and_nan() -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, -inf, 1.0, inf, -inf, 2.0, 3.0, nan, 4.0], dtype=F32)
    offsets = torch.tensor([0, 2, 4, 6, 9])
    for function in (FUNCTIONS["logsumexp"], FUNCTIONS["softmax"], FUNCTIONS["stats"]):
        found = step(function, x, offsets)
        with pyloss.backend("reference"):
            expected = step(function, x.double(), offsets)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a.double(), b.double(), equal_nan=True)
    assert segment_reduce(x, offsets, "logsumexp").tolist()[:3] == [-inf, inf, 2.0]
    assert segment_softmax_stats(x, offsets).argmax.tolist() == [0, 3, 5, 7]
    for r in REDUCES:
        assert segment_reduce(x, offsets, r).isnan().tolist()[3]


def test_moments_of_infinite_values() -> None:
    """The mean is infinite, as that of segment_reduce, also of a long segment; short ones go
    through the lanes together or alone."""
    x, offsets = draw([2, 3, 9000, *[2] * 20, 1], dtype=F32)
    x[[1, 3, 5000, 9011]] = math.inf
    x[[6000, 9013]] = torch.tensor([math.inf, -math.inf])
    for values in (x, x[:, None].expand(-1, 3)):
        found = step(FUNCTIONS["moments"], values, offsets)
        with pyloss.backend("reference"):
            expected = step(FUNCTIONS["moments"], values.double(), offsets)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert torch.equal(found[0].isinf(), segment_reduce(values, offsets, "mean").isinf())


def test_the_moments_are_centred() -> None:
    """Where sums of squares have no digits left; parts of a long segment among them."""
    x = 1e4 + torch.randn(10000, generator=torch.Generator().manual_seed(0), dtype=F64)
    offsets = torch.tensor([0, 100, 10000])
    found = segment_moments(x.float(), offsets).moment
    expected = torch.stack([t.float().double().var(correction=0) for t in (x[:100], x[100:])])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_the_covariance_has_the_moments_on_its_diagonal() -> None:
    x, offsets = draw([5, 9, 200], (3,))
    full, diagonal = segment_moments(x, offsets, covariance=True), segment_moments(x, offsets)
    torch.testing.assert_close(full.mean, diagonal.mean)
    torch.testing.assert_close(full.moment.diagonal(dim1=1, dim2=2), diagonal.moment)
    expected = torch.stack([t.t().cov(correction=0) for t in x.split([5, 9, 200])])
    torch.testing.assert_close(full.moment, expected)


def test_no_columns() -> None:
    offsets = torch.tensor([0, 2, 5])
    for name, function in FUNCTIONS.items():
        for rest in ((0,), (0, 2)):
            found = step(function, torch.zeros(5, *rest), offsets)
            rows = 5 if name == "softmax" else 2
            assert all(t.shape == (rows, *rest) for t in found[:-1]), name
            assert found[-1].shape == (5, *rest)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_sum_may_be_changed_in_place(reduce) -> None:
    """As torch.sum's: its gradient needs neither values nor sums."""
    x, offsets = draw([2, 3])
    expected = step(FUNCTIONS[reduce], x, offsets)[-1]
    leaf = x.clone().requires_grad_()
    y = segment_reduce(leaf, offsets, reduce)
    weights = torch.linspace(0.5, 1.5, 2, dtype=F64)
    (y.mul_(2) * weights / 2).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_opcheck() -> None:
    ops = torch.ops.pyloss
    x, offsets = draw([3, 4], (2,))
    g = torch.ones(2, 2, dtype=F64)
    for kind in (kinds.SUM, kinds.MOMENTS):
        torch.library.opcheck(ops.segment_fold.default, (x, None, offsets, [], kind))
    torch.library.opcheck(ops.segment_map.default, (x, x, offsets, [g], kinds.FROM_NORMALIZED))


# --- the tree -----------------------------------------------------------------------------------

TREE_LENGTHS = [7, 0, 1, 4, 17, 2, 0, 3]


def test_named_trees_are_trees_of_callables() -> None:
    x, offsets = draw(TREE_LENGTHS, (2,))
    callables = dict(sum=torch.add, prod=torch.mul, max=torch.maximum, logsumexp=torch.logaddexp)
    for name, op in callables.items():
        named = segment_tree_reduce(x, offsets, name, identity=0.5)
        tree = segment_tree_reduce(x, offsets, op, identity=0.5)
        torch.testing.assert_close(named, tree, rtol=1e-12, atol=1e-12)


def test_the_tree_evaluates_each_pair_once_and_is_balanced() -> None:
    x, offsets = draw(TREE_LENGTHS)
    calls = []

    def op(a, b):
        calls.append(a.shape[0])
        return a + b

    segment_tree_reduce(x, offsets, op, identity=0.0)
    assert sum(calls) == sum(TREE_LENGTHS) - sum(n > 0 for n in TREE_LENGTHS)
    assert len(calls) == math.ceil(math.log2(max(TREE_LENGTHS)))


def test_a_segment_of_a_tree_does_not_see_the_others() -> None:
    op = lambda a, b: a * b.cos() - b  # noqa: E731  neither associative nor commutative
    x, offsets = draw(TREE_LENGTHS, (3,))
    together = segment_tree_reduce(x, offsets, op, identity=0.0)
    for found, t in zip(together, x.split(TREE_LENGTHS)):
        if t.shape[0]:
            alone = segment_tree_reduce(t, torch.tensor([0, t.shape[0]]), op)[0]
            torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_length", [None, 17, 30])
def test_the_tree_without_reading_a_length(max_length, monkeypatch) -> None:
    """As on a GPU: sizes from the shapes alone."""
    op = lambda a, b: a * b.cos() - b  # noqa: E731
    x, offsets = draw(TREE_LENGTHS, (3,))
    expected = segment_tree_reduce(x, offsets, op, identity=0.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    levels, _ = tree_levels(offsets, x.shape[0], max_length)
    assert all(isinstance(level, TreeLevel) for level in levels)
    if max_length is not None:
        assert len(levels) == math.ceil(math.log2(max_length))
    found = segment_tree_reduce(x, offsets, op, identity=0.0, max_length=max_length)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [[2, 2], [2, 3]], ids=str)
def test_a_tree_keeps_the_dtype(lengths) -> None:
    """Under autocast, whether a row is carried or not."""
    x, offsets = draw(lengths, (2,), F32)
    w = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=BF16):
        assert segment_tree_reduce(x, offsets, lambda a, b: (a + b) @ w).dtype == F32


def test_the_identity_has_a_gradient() -> None:
    x, offsets = draw(TREE_LENGTHS, (2,))
    e = torch.zeros(2, dtype=F64, requires_grad=True)
    segment_tree_reduce(x, offsets, torch.add, identity=e).sum().backward()
    assert e.grad.tolist() == [2.0, 2.0]


def test_offsets_from_an_index_without_a_number_of_segments() -> None:
    index = torch.tensor([0, 0, 3], dtype=torch.int32)
    assert offsets_from_index(index).tolist() == [0, 2, 2, 2, 3]
    assert offsets_from_index(index[:0]).tolist() == [0]
    order = torch.tensor([3, 0, 0]).argsort(stable=True)
    assert torch.equal(
        offsets_from_index(torch.tensor([3, 0, 0])[order]), offsets_from_index(index)
    )
