"""similarity_softmax and pair_sums by the Triton kernels, from the functions down, interpreted.

Tiles are 16 wide unless said otherwise, so that small problems have many of them. Expected values
are those of the reference in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import pyloss
from pyloss.kernels import similarity_softmax as K
from pyloss.kernels.similarity_softmax import launch, statistics
from pyloss.ops.similarity_softmax import margin_sums, pair_sums, similarity_softmax
from pyloss.ops.similarity_softmax import triton as by_kernels
from pyloss.reference.similarity_softmax import pair_sums as exact_sums
from pyloss.reference.similarity_softmax import similarity_softmax as exact_stats

SUMS = ("lse", "positive", "column_lse", "column_positive")
# Of results, and of gradients: those of half types are rounded, as are the logits' in them.
TOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


CHOOSE, BLOCK_ROWS = launch.choose_config, by_kernels.block_rows


def small(d: int) -> K.Config:
    """All of a row at a time as sweeps have it, else 16 numbers."""
    block_k = max(16, 1 << (d - 1).bit_length()) if d <= launch.MOST_WHOLE else 16
    return K.Config(16, 16, block_k, num_warps=4, num_stages=2, group=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_config", lambda kernel, dtype, d, *_: small(d))
    monkeypatch.setattr(by_kernels, "block_rows", lambda *_: 32)


@pytest.fixture(params=["sweeps", "blocks", pytest.param("chunks", marks=pytest.mark.exhaustive)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sweeps, of rows that a program holds whole or by chunks; blocks of the logits' gradient."""
    if request.param == "chunks":
        monkeypatch.setattr(launch, "choose_config", lambda *_: small(16))
    if request.param == "blocks":
        for module in (K, launch):
            monkeypatch.setattr(module, "MOST_WHOLE", 0)
    return request.param


@pytest.fixture(autouse=True)
def triton_is_chosen():
    with pyloss.backend("triton"):
        yield


def problem(n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple:
    return tuple(torch.randn(r, d).to(dtype).requires_grad_() for r in (n, m))


def masks(n: int, m: int, firsts=(-1, 0, 3)) -> list[dict]:
    """All combinations of what can be left out or positive."""
    g = torch.Generator().manual_seed(2)
    target = torch.randint(m, (n,), generator=g)
    target[::7], target[1::11] = -1, m + 3
    ids = [torch.randint(6, (r,), generator=g) * 2**33 - 2**34 for r in (n, m)]
    found = []
    for first, at, same, denominator in itertools.product(
        firsts, (None, target), ("ignore", "positive", "drop"), ("all", "negatives")
    ):
        given = {} if same == "ignore" else {"query_ids": ids[0], "key_ids": ids[1]}
        found.append(dict(first=first, target=at, same=same, denominator=denominator, **given))
    return found


def total(stats) -> torch.Tensor:
    """A function of all sums that is finite where a denominator is empty."""
    sums = [t for t in (getattr(stats, name) for name in SUMS) if t is not None]
    weights = [torch.linspace(-1, 0.5 + i, len(t), dtype=t.dtype) for i, t in enumerate(sums)]
    return sum((torch.where(t.isinf(), 0.0, t) * w).sum() for t, w in zip(sums, weights))


def widened(t):
    wide = isinstance(t, torch.Tensor) and t.is_floating_point()
    return t.detach().double().requires_grad_(t.requires_grad) if wide else t


def check(name: str, got: torch.Tensor, want: torch.Tensor, tol: float) -> None:
    finite = want[want.isfinite()]
    atol = tol * max(1e-3, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        got.double(), want, rtol=tol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


STATS, SOFTPLUS = (similarity_softmax, exact_stats, total), (pair_sums, exact_sums, torch.sum)


def compare(*given, what=STATS, **options) -> None:
    """Results, and gradients of a function of them."""
    *functions, value = what
    wide = {id(t): widened(t) for t in given}
    ways = []
    for function, args in zip(functions, (given, [wide[id(t)] for t in given])):
        sources = {id(t): t for t in args if isinstance(t, torch.Tensor) and t.requires_grad}
        found = function(*args, **options)
        ways.append((found, torch.autograd.grad(value(found), list(sources.values()))))
    (found, grads), (expected, exact_grads) = ways
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for at, (a, b) in enumerate(zip(found, expected)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == torch.float32
            check(f"result {at}", a, b, 1e-5)
    for at, (a, b) in enumerate(zip(grads, exact_grads)):
        check(f"gradient {at}", a, b, TOL[given[0].dtype])


def everything(options: dict) -> dict:
    return {**options, "columns": True, "mean": True}


# ------------------------------------------------------------------------------------- kinds


def scale_of(n: int) -> torch.Tensor:
    return torch.linspace(0.2, 1.5, n).requires_grad_()


def with_itself(options: dict) -> dict:
    return {**options, "key_ids": options["query_ids"]} if "key_ids" in options else options


def temperature(value: float = 0.7) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


# Of 36: ids, or tiles that need masks beside others that do not.
@pytest.mark.parametrize("at", (9, 31))
def test_kinds(at: int, way: str) -> None:
    compare(*problem(21, 35, 19), scale_of(21), **everything(masks(21, 35)[at]))


@pytest.mark.parametrize("at", (13, 18, 28))
def test_kinds_with_itself(at: int, way: str) -> None:
    """Without columns tiles serve (i, j) and (j, i)."""
    x = problem(35, 1, 19)[0]
    compare(x, x, temperature(), **with_itself(masks(35, 35)[at]))


def test_two_views(way: str) -> None:
    """Targets in a band, which most tiles do not meet."""
    x = problem(64, 1, 19)[0]
    compare(x, x, temperature(), first=0, target=torch.arange(64).roll(32))


@pytest.mark.exhaustive
@pytest.mark.parametrize("at", range(36))
def test_every_kind(at: int, way: str) -> None:
    compare(*problem(21, 35, 12), scale_of(21), **everything(masks(21, 35)[at]))
    compare(*problem(21, 35, 12), temperature(), **masks(21, 35)[at])
    x = problem(35, 1, 12)[0]
    options = with_itself(masks(35, 35)[at])
    compare(x, x, temperature(), **options)
    compare(x, x, temperature(), **everything(options))


@pytest.mark.parametrize("at", (27, pytest.param(2, marks=pytest.mark.exhaustive)))
def test_softplus(at: int, way: str) -> None:
    options = masks(21, 35)[at]
    del options["denominator"]
    if options["target"] is not None:
        options["target"] = torch.arange(21)
    compare(*problem(21, 35, 19), scale_of(21), temperature(-1.5), what=SOFTPLUS, **options)
    x = problem(35, 1, 19)[0]
    if "query_ids" in options:
        options["query_ids"] = masks(35, 35)[at]["query_ids"]
    options["target"] = torch.arange(35).flip(0)
    compare(x, x, 0.5, temperature(0.5), what=SOFTPLUS, **with_itself(options))


# ------------------------------------------------------------------------------ shapes and types


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_types(dtype: torch.dtype, way: str) -> None:
    target = (torch.arange(33) * 3) % 40
    size = 1e-4 if dtype == torch.float16 else 1.0  # its small numbers would not do
    compare(
        *problem(33, 40, 35, dtype), temperature(35**-0.5), target=target,
        what=(similarity_softmax, exact_stats, lambda stats: size * total(stats)),
    )  # fmt: skip


# One of everything; sizes below, at and above the tile; several tiles each way.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 40, 16), (33, 5, 3), (16, 16, 32), (40, 70, 130)], ids=str
)
@pytest.mark.parametrize("dtype", TOL, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, way: str) -> None:
    n, m, d = shape
    target = (torch.arange(n) * 3) % m
    compare(*problem(n, m, d, dtype), temperature(d**-0.5), target=target, columns=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("d", (24, 130))
def test_default_tiles(dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose_config", CHOOSE)
    monkeypatch.setattr(by_kernels, "block_rows", BLOCK_ROWS)
    x, y = problem(70, 140, d, dtype)
    ids = torch.arange(70) // 3
    options = {"target": torch.arange(70).roll(1), "same": "drop", "query_ids": ids}
    compare(x, x, temperature(d**-0.5), first=0, key_ids=ids, **options)
    compare(x, y, scale_of(70), columns=True, key_ids=torch.arange(140) // 5, **options)


@pytest.mark.parametrize("splits", (1, 3))
def test_parts_of_the_keys(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a few rows come in parts, those of many rows whole; statistics in 21 parts."""
    swept = K.pair_sweep
    monkeypatch.setattr(K, "pair_sweep", lambda *a, **o: swept(*a, splits=splits, **o))
    compare(*problem(3, 330, 8), temperature(2.0), target=torch.arange(3), mean=True)


def test_columns_in_several_launches(monkeypatch: pytest.MonkeyPatch, watched) -> None:
    monkeypatch.setattr(statistics, "COLUMN_BYTES", 4 * 3 * 33 * 3)
    q, k = problem(70, 33, 8)
    compare(q, k, temperature(), target=torch.arange(70) % 40, columns=True, mean=True)
    # Five tiles of rows by twos, each launch with one that merges; rows; counts; the gradients.
    assert watched.launches == 2 * 3 + 1 + 2 + 3


# ------------------------------------------------------------------------------ numbers


@pytest.mark.exhaustive
def test_small_and_large_cotangents_of_float16(way: str) -> None:
    """float16 would not hold the gradients of the logits themselves."""
    q, k = problem(40, 50, 8, torch.float16)
    for size, scale in ((1e-6, 50.0), (1e4, 0.01)):

        def value(stats, size=size):
            return size * (stats.lse - stats.positive).sum()

        compare(
            q, k, temperature(scale), what=(similarity_softmax, exact_stats, value),
            target=torch.arange(40),
        )  # fmt: skip


@pytest.mark.exhaustive
def test_numbers_beyond(way: str) -> None:
    """Large logits, a scale of 0 and below."""
    q, k = problem(20, 40, 8)
    target = torch.arange(20)
    for scale in (10.0, -3.0, 0.0):
        compare(q, k, temperature(scale), target=target, columns=True, mean=True)
    for scale, bias in ((10.0, 0.0), (-0.01, -30.0), (0.01, 30.0), (0.0, 0.0)):
        compare(q, k, temperature(scale), temperature(bias), what=SOFTPLUS, target=target)


@pytest.mark.parametrize("options", ({"first": 0}, {"columns": True}), ids=("itself", "columns"))
def test_parts_of_huge_logits_are_at_most_one(options: dict, way: str) -> None:
    """An lse that was rounded is far below its logits; of one tensor z_ij serves as z_ji, too."""
    x = torch.nn.functional.normalize(problem(20, 1, 24)[0].detach(), dim=1).requires_grad_()
    found = similarity_softmax(x, x, 1e12, **options)
    of = found.lse if found.column_lse is None else found.column_lse
    (grad,) = torch.autograd.grad(of.sum(), x)
    assert (grad.abs() <= 1e12 * 2 * len(x)).all()


def test_nan_stays_in_its_row_and_column() -> None:
    q, k = problem(20, 40, 8)
    with torch.no_grad():
        q[3, 2], k[17, 1] = math.nan, math.nan
    found = similarity_softmax(q, k, 0.5, target=torch.arange(20), columns=True, mean=True)
    assert found.lse.isnan().all() and found.column_lse.isnan().all()  # every row meets key 17
    assert found.positive.isnan().nonzero().ravel().tolist() == [3, 17]
    ids = torch.zeros(20).long(), (torch.arange(40) != 17).long()
    found = similarity_softmax(
        q, k, 0.5, target=torch.arange(20), query_ids=ids[0], key_ids=ids[1], same="drop"
    )
    assert found.lse.isnan().nonzero().ravel().tolist() == [3, 17]  # the target is not dropped


def test_infinite_logits() -> None:
    """An lse of inf in their rows and columns, in whichever tile of them and part of the keys."""
    q, k = (t.detach().abs() for t in problem(20, 340, 8))
    q[3, 2], q[5, 1], k[330, 0] = math.inf, -math.inf, math.inf
    found = similarity_softmax(q, k, 0.5, columns=True)
    exact = exact_stats(q.double(), k.double(), 0.5, columns=True)
    assert exact.lse.isinf().sum() == 19 and exact.column_lse.isinf().sum() == 339  # one NaN each
    check("lse", found.lse, exact.lse, 0.0)
    check("column_lse", found.column_lse, exact.column_lse, 0.0)


def test_nothing_counts() -> None:
    """Rows without a pair: -inf, and no gradient."""
    x = problem(20, 1, 8)[0]
    ids = torch.zeros(20, dtype=torch.int64)
    options = dict(first=0, query_ids=ids, key_ids=ids, same="positive", denominator="negatives")
    compare(x, x, 0.5, **options)
    assert similarity_softmax(x, x, 0.5, **options).lse.eq(-math.inf).all()
    compare(x, x.detach().clone(), 0.5, columns=True, mean=True, **options)


# ------------------------------------------------------------------------------ what runs


def test_the_op_runs_the_kernels(watched) -> None:
    assert isinstance(K.gradient.pair_sweep_kernel, InterpretedFunction)
    q, k = problem(20, 40, 8)
    for options, fwd, bwd in (({}, 3, 2), ({"target": torch.arange(20)}, 3, 3)):
        before = watched.launches
        lse = similarity_softmax(q, k, 0.5, **options).lse
        assert watched.launches - before == fwd
        torch.autograd.grad(lse.sum(), (q, k))
        assert watched.launches - before == fwd + bwd
    before = watched.launches
    lse = similarity_softmax(q, q, 0.5, first=0).lse
    torch.autograd.grad(lse.sum(), q)
    assert watched.launches - before == 3 + 1  # one gradient, of both sides


def test_left_to_tiles_of_torch(watched) -> None:
    q, k = problem(20, 40, 8)
    margin_sums(q, k, 0.5, 0.1, 0.2, target=torch.arange(20))
    similarity_softmax(q.double(), k.double(), 0.5)
    for some, others in ((q[:0], k), (q, k[:0]), (q[:, :0], k[:, :0])):
        found = similarity_softmax(some, others, 0.5, columns=True)
        assert len(found.lse) == len(some) and len(found.column_lse) == len(others)
    assert watched.launches == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("wanted", ["queries", "keys", "scale"])
def test_one_gradient_alone(wanted: str, way: str) -> None:
    q, k = (t.detach() for t in problem(20, 40, 8))
    given = {"queries": q, "keys": k, "scale": torch.tensor(0.5)}
    given[wanted].requires_grad_()
    compare(*given.values(), target=torch.arange(20))


def test_arguments_of_the_kernels_are_checked() -> None:
    q, k = (t.detach() for t in problem(4, 6, 8))
    none = (None, None, None)
    pairs = K.Pairs(torch.ones(1), 0, None, *none, -1, 4, 6)
    kind = K.Kind(False, 0, False, False)
    with pytest.raises(TypeError, match="float64"):
        K.pair_statistics(q.double(), k.double(), pairs, kind)
    with pytest.raises(ValueError, match="pairs of 4 and 6, tensors of 3 and 6 rows"):
        K.pair_statistics(q[:3], k, pairs, kind)
    far = pairs._replace(first=2**31 - 2**16)
    with pytest.raises(ValueError, match="below 2"):
        K.pair_statistics(q, k, far, kind._replace(own=True))
    with pytest.raises(ValueError, match="target must be contiguous"):
        K.pair_statistics(q, k, pairs._replace(target=torch.arange(8)[::2]), kind)
    coeffs = K.Coeffs(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="multiple of 16, got 8"):
        K.pair_gradient_block(q, k, pairs, kind, coeffs, K.QUERIES, torch.empty(4, 6), 8)
