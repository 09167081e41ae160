"""Sorting networks: the reference against closed forms, the ops against the reference."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys

import mpmath
import pytest
import torch

import pyloss
from pyloss.ops import sorting_network as op
from pyloss.reference import sorting_network as reference

F32, F64 = torch.float32, torch.float64
DISTRIBUTIONS, SORTERS = op.DISTRIBUTIONS, op.NETWORKS[:3]
MONOTONIC = ("cauchy", "reciprocal", "optimal")
COUNTS = {  # n -> layers and comparators, by hand and from the papers' tables
    "bitonic": {10: (10, 42), 12: (10, 54), 16: (10, 80), 100: (28, 1334), 128: (28, 1792)},
    "odd_even": {10: (10, 45), 16: (16, 120), 32: (32, 496), 128: (128, 8128)},
    "batcher": {10: (10, 31), 12: (10, 41), 16: (10, 63), 100: (28, 1077), 128: (28, 1471)},
}
SELECTORS = {(16, 1): (4, 32), (16, 5): (10, 50), (50, 5): (15, 181), (100, 5): (17, 385)}


def draw(*shape: int, dtype=F64, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=F64) * scale).to(dtype)


def ranks(b: int, n: int) -> torch.Tensor:
    return torch.stack([torch.randperm(n) for _ in range(b)]).int()


def gradients(outputs, sources, seed: int = 3):
    """Gradients for cotangents that depend on nothing but the shapes."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    g = [torch.randn(o.shape, generator=generator, dtype=F64).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, sources, g, retain_graph=True)


# --- networks ------------------------------------------------------------------------------------


def sorts(name, rows):
    """Whether the hard network sorts every row; its comparators are disjoint."""
    rows = rows.clone()
    for layer in reference.network(name, rows.shape[1]):
        used = (*layer.lo, *layer.hi)
        assert len(set(used)) == len(used)
        lo, hi = list(layer.lo), list(layer.hi)
        a, b = torch.minimum(rows[:, lo], rows[:, hi]), torch.maximum(rows[:, lo], rows[:, hi])
        rows[:, lo], rows[:, hi] = a, b
    return bool((rows.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("name", [*SORTERS, "auto"])
def test_networks_sort(name):
    """By the 0-1 principle: every sequence of zeros and ones."""
    for n in range(1, 12):
        assert sorts(name, torch.tensor(list(itertools.product([0, 1], repeat=n)))), n


def test_long_networks_sort():
    """Permutations; and the lengths at which bitonic networks with absent wires do not."""
    unsorted = {name: set() for name in (*SORTERS, "auto")}
    for n in [*range(12, 66), 100, 127, 128, 129, 300]:
        rows = torch.rand(500, n).argsort(1)
        for name, found in unsorted.items():
            if not sorts(name, rows):
                found.add(n)
    bitonic = unsorted.pop("bitonic")
    assert not any(unsorted.values()), unsorted
    assert min(bitonic) == 22 and {44, 300} < bitonic and not bitonic & {16, 32, 64, 128}


def test_auto_is_bitonic_or_batcher():
    for n, name in ((8, "bitonic"), (9, "batcher"), (1, "bitonic"), (22, "batcher")):
        x = draw(2, n)
        truth = torch.rand(2, n)
        for f in (
            pyloss.soft_sort,
            pyloss.soft_rank,
            pyloss.soft_permutation,
            functools.partial(pyloss.sorting_cross_entropy, target=truth),
        ):
            assert torch.equal(f(x), f(x, network=name))
    x = torch.randperm(44).double()
    found = pyloss.soft_sort(x, steepness=1e9, distribution="logistic")
    assert torch.equal(found, torch.arange(44.0).double())


def test_sizes_of_networks():
    def size(layers):
        return len(layers), sum(len(layer.lo) for layer in layers)

    for name, table in COUNTS.items():
        assert {n: size(reference.network(name, n)) for n in table} == table
    found = {key: size(reference.network("splitter_selection", *key)) for key in SELECTORS}
    assert found == SELECTORS


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
def test_splitter_selection_selects(n):
    for k in range(1, n + 1):
        bits = torch.tensor(list(itertools.product([0, 1], repeat=n)))
        count = bits.sum(1, keepdim=True)
        for layer in reference.network("splitter_selection", n, k):
            lo, hi = list(layer.lo), list(layer.hi)
            a, b = torch.minimum(bits[:, lo], bits[:, hi]), torch.maximum(bits[:, lo], bits[:, hi])
            bits[:, lo], bits[:, hi] = a, b
        # The last k wires, in order: ones from the top down.
        want = (torch.arange(n - k, n) >= n - count).int()
        assert torch.equal(bits[:, n - k :].int(), want)


# --- the comparator ------------------------------------------------------------------------------

POINTS = (0.0, 1e-12, 1e-3, 0.25, 0.2500001, 1.0, 1.0000001, 3.7, 50.0, 1e6, math.inf)


def exact_tau(u: float, distribution: str) -> mpmath.mpf:
    with mpmath.workdps(60):
        v = mpmath.mpf(u)
        if v == mpmath.inf:
            return mpmath.mpf(0)
        if distribution.startswith("logistic"):
            return mpmath.exp(-v) / (1 + mpmath.exp(-v))
        if distribution == "gaussian":
            return mpmath.erfc(v / mpmath.sqrt(2)) / 2
        if distribution == "cauchy":
            return mpmath.mpf(1) / 2 - mpmath.atan(v) / mpmath.pi
        if distribution == "reciprocal":
            return 1 / (2 + v)
        return mpmath.mpf(1) / 2 - v if v <= 0.25 else 1 / (16 * v)


def ulps(found: float, exact: mpmath.mpf, dtype: torch.dtype) -> float:
    """Error in units of the last place of a normal number."""
    info = torch.finfo(dtype)
    with mpmath.workdps(60):
        size = max(abs(exact), mpmath.mpf(info.tiny))
        return float(abs(mpmath.mpf(found) - exact) / size / info.eps)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_weight_of_the_wrong_side(distribution, dtype):
    """tau and both orders of the inputs, of the op and of the reference, to 4 ulp."""
    u = torch.tensor(POINTS, dtype=dtype)
    options = dict(distribution=distribution, steepness=1.0, art_lambda=0.0)
    zero = torch.zeros_like(u)
    p = pyloss.soft_permutation(torch.stack([zero, u], 1), **options)
    q = pyloss.soft_permutation(torch.stack([u, zero], 1), **options)
    from_reference = reference.wrong_side(u, distribution)
    for i, value in enumerate(u.tolist()):
        exact = exact_tau(value, distribution)
        for found in (p[i, 0, 1], p[i, 1, 0], q[i, 0, 0], q[i, 1, 1]):
            assert ulps(found.item(), exact, dtype) <= 4, (value, found.item(), float(exact))
        # torch's erfc, which the reference takes, has more ulp in the tail.
        bound = 4 if distribution != "gaussian" else 4 + value**2 / 2
        assert ulps(from_reference[i].item(), exact, dtype) <= bound, value
        assert p[i, 0, 0].item() == pytest.approx(float(1 - exact), rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_derivative_of_a_comparator(distribution):
    """The column alpha' of the table, also at a tie, through P and through the values."""
    s, lam = 10.0, 0.25
    d = torch.tensor([0.0, 1e-3, -1e-3, 0.01, 0.025, 0.03, -0.1, 0.7, -3.0, 1e5], dtype=F64)
    x = torch.stack([torch.zeros_like(d), d], 1).requires_grad_()
    options = dict(distribution=distribution, steepness=s, art_lambda=lam)
    p = pyloss.soft_permutation(x, **options)
    (slope,) = torch.autograd.grad(p[:, 0, 0].sum(), x)
    u, factor = s * d.abs(), s * torch.ones_like(d)
    if distribution == "logistic_phi":
        w = d.abs() + 1e-10
        u, factor = u * w**-lam, s * w**-lam * (1 - lam * d.abs() / w)
    tau = reference.wrong_side(u, distribution)
    want = (
        factor
        * {
            "logistic": tau * (1 - tau),
            "logistic_phi": tau * (1 - tau),
            "gaussian": torch.exp(-u * u / 2) / math.sqrt(2 * math.pi),
            "cauchy": 1 / (math.pi * (1 + u * u)),
            "reciprocal": 1 / (2 + u) ** 2,
            "optimal": torch.where(u <= 0.25, 1.0, 1 / (16 * u.clamp_min(0.1) ** 2)),
        }[distribution]
    )
    torch.testing.assert_close(slope[:, 1], want, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(slope[:, 0], -want, rtol=1e-12, atol=1e-300)
    at_tie = {"logistic": 2.5, "logistic_phi": 790.5694, "gaussian": 3.98942, "cauchy": 3.18310}
    at_tie |= {"reciprocal": 2.5, "optimal": 10.0}
    assert slope[0, 1].item() == pytest.approx(at_tie[distribution], rel=1e-5)

    y = pyloss.soft_sort(x, **options)
    (g,) = torch.autograd.grad(y[:, 0].sum(), x)
    low = torch.where(d < 0, tau, 1 - tau)
    torch.testing.assert_close(g[:, 1], 1 - low - want * d, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "distribution, error",
    [
        ("logistic", 0.27846),
        ("gaussian", 0.16997),
        ("cauchy", 0.31831),
        ("reciprocal", 1.0),
        ("optimal", 0.0625),
    ],
)
def test_largest_error_of_the_soft_minimum(distribution, error):
    d = torch.logspace(-4, 5, 20001, dtype=F64)
    x = torch.stack([torch.zeros_like(d), d], 1)
    for s in (1.0, 10.0):
        y = pyloss.soft_sort(x, distribution=distribution, steepness=s)
        assert y[:, 0].max().item() * s == pytest.approx(error, rel=2e-4)


# --- the definition, written again ---------------------------------------------------------------


def dense(x, name, distribution, s, lam, k=0):
    """(y, P) as products of matrices, one item at a time, with alpha in its plain form."""
    formula = {
        "logistic": torch.sigmoid,
        "logistic_phi": torch.sigmoid,
        "gaussian": lambda v: torch.special.ndtr(v),
        "cauchy": lambda v: 0.5 + torch.atan(v) / math.pi,
        "reciprocal": lambda v: 0.5 + v / (2 * (2 + v.abs())),
        "optimal": lambda v: torch.where(
            v.abs() <= 0.25,
            0.5 + v,
            torch.where(v > 0, 1 - 1 / (16 * v.abs()), 1 / (16 * v.abs())),
        ),
    }[distribution]
    ys, ps = [], []
    for row in x:
        n = len(row)
        p = torch.eye(n, dtype=x.dtype)
        y = row
        for layer in reference.network(name, n, k):
            m = torch.eye(n, dtype=x.dtype)
            for a, b in zip(layer.lo, layer.hi):
                d = y[b] - y[a]
                v = s * d
                if distribution == "logistic_phi":
                    v = v * (d.abs() + 1e-10) ** -lam
                alpha = formula(v)
                place = torch.zeros_like(m)
                place[a, a] = place[b, b] = 1
                swap = torch.zeros_like(m)
                swap[a, b] = swap[b, a] = 1
                m = m - place + alpha * place + (1 - alpha) * swap
            p = p @ m
            y = y @ m
        ys.append(y)
        ps.append(p)
    return torch.stack(ys), torch.stack(ps)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", [*SORTERS, "splitter_selection"])
def test_reference_is_the_product_of_its_layers(name, distribution):
    for n, s in ((1, 10.0), (2, 1.0), (3, 10.0), (6, 10.0), (9, 2.0)):
        k = 2 if name == "splitter_selection" and n > 1 else int(name == "splitter_selection")
        x = draw(2, n).requires_grad_()
        args = (name, distribution, s, 0.3, k)
        want = dense(x, *args)
        found = reference.sorting_network_permutation(x, *args)
        for a, b in zip(found, want):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        if n > 1:
            for a, b in zip(gradients(found, [x]), gradients(want, [x])):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        f = draw(2, n, 3)
        _, p = want
        for transpose in (True, False):
            found = reference.sorting_network_apply(x, f, transpose, *args)
            torch.testing.assert_close(found, (p.mT if transpose else p) @ f, rtol=1e-9, atol=1e-12)


# --- the ops against the reference ---------------------------------------------------------------


def cases():
    """Every n up to 33 with each network; every combination at two of them."""
    sizes = (*range(1, 34), 64, 100, 128)
    for i, n in enumerate(sizes):
        for j, name in enumerate(SORTERS):
            yield n, name, DISTRIBUTIONS[(i + 2 * j) % 6], (1.0, 10.0)[(i + j) % 2]
    for n, name, distribution in itertools.product((5, 16), SORTERS, DISTRIBUTIONS):
        yield n, name, distribution, 4.0


def pairs(f, shared, first, count, settings):
    """(name, op, reference, sources beside x) of everything that an op computes."""
    named = tuple(settings)
    yield (
        "sort",
        lambda x: op.sort(x, settings),
        lambda x: reference.sorting_network_sort(x, *named),
        [],
    )
    yield (
        "permutation",
        lambda x: op.permutation(x, settings),
        lambda x: reference.sorting_network_permutation(x, *named),
        [],
    )
    for transpose, feats in itertools.product((True, False), (f, shared)):
        yield (
            f"apply {transpose} {tuple(feats.shape)}",
            lambda x, f, t=transpose: op.apply(x, f, t, settings),
            lambda x, f, t=transpose: reference.sorting_network_apply(x, f, t, *named),
            [feats],
        )
    for kind, c in (("bce", None), ("bce", count), ("row_ce", None), ("col_ce", count)):
        yield (
            f"{kind} {c is not None}",
            lambda x, kind=kind, c=c: op.loss(
                x, first, c, settings, order="ranks", kind=kind, reduction="none"
            ),
            lambda x, kind=kind, c=c: reference.sorting_network_loss(
                x, first, c, "ranks", kind, *named
            ),
            [],
        )


EXACT = ("sort", "permutation")


def compare(x, *rest, rtol, part=None):
    """Values and gradients; x may be float32, the reference runs in float64.

    Args:
        part: 0 .. 3: one of the four products and one of the four losses, not all.
    """
    for i, (what, ours, theirs, more) in enumerate(pairs(*rest)):
        if part is not None and i >= 2 and (i - 2) % 4 != part:
            continue
        sources = [s.detach().requires_grad_() for s in (x, *more)]
        exact = [s.detach().double().requires_grad_() for s in (x, *more)]
        found, want = ours(*sources), theirs(*exact)
        found = found if isinstance(found, tuple) else (found,)
        want = want if isinstance(want, tuple) else (want,)
        values = len(found)
        found += gradients(found, sources)
        if x.shape[1] > 1:  # else the reference's results do not depend on x
            want += gradients(want, exact)
        for j, (a, b) in enumerate(zip(found, want)):
            # Values agree to 1e-12 in float64; gradients add up slopes of up to 800.
            at_most = 1e-12 if j < values and x.dtype == F64 and what in EXACT else rtol
            atol = at_most * max(1.0, b.abs().max().item())
            torch.testing.assert_close(
                a.double(), b, rtol=at_most, atol=atol, msg=lambda m, at=(what, j): f"{at}: {m}"
            )


def problem(n, name, distribution, s, dtype, b=2):
    x, f, shared = draw(b, n, dtype=dtype), draw(b, n, 3, dtype=dtype), draw(1, n, 2, dtype=dtype)
    # Targets near the order of x: where P is tiny, torch's cross entropy has a slope of 1e12.
    first = (x + 0.3 * torch.randn_like(x)).argsort(1).argsort(1).int()
    count = torch.randint(1, 3, (b, n), dtype=torch.int32)
    settings = op.Settings(name, distribution, s)
    return x, f, shared, first, torch.minimum(count, n - first), settings


@pytest.mark.parametrize("chunk", range(6))
def test_ops_equal_the_reference(chunk):
    """float64, all n and combinations; float32 follows."""
    for i, (n, name, distribution, s) in enumerate(list(cases())[chunk::6]):
        if n > 40 and name == "odd_even":
            continue  # the reference takes seconds; see the next test
        # A small P times a slope of up to 1e12 is known to fewer digits.
        s = min(s, 4.0) if n > 8 else s
        compare(*problem(n, name, distribution, s, F64), rtol=2e-9, part=i % 4)


def test_ops_equal_the_reference_at_larger_sizes():
    for i, (n, distribution) in enumerate(((64, "cauchy"), (100, "optimal"))):
        compare(*problem(n, "odd_even", distribution, 2.0, F64, b=1), rtol=1e-9, part=i)


def test_gradient_of_ranks_of_a_long_row():
    """A layer's differences do not fit into the cache: segments of many layers."""
    x, w = draw(1, 9001).requires_grad_(), draw(1, 9001)
    (found,) = torch.autograd.grad((pyloss.soft_rank(x) * w).sum(), x)
    with pyloss.backend("reference"):
        (want,) = torch.autograd.grad((pyloss.soft_rank(x) * w).sum(), x)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_float32(distribution):
    """A slope of logistic_phi near a tie is 300 times the others. Nothing is saturated: where P
    rounds to 1 off its target, its cross entropy is torch's of that, 100."""
    rtol = 2e-3 if distribution == "logistic_phi" else 1e-4
    compare(*problem(13, "odd_even", distribution, 1.0, F32), rtol=rtol)
    for i, (n, name) in enumerate(
        ((1, "bitonic"), (2, "odd_even"), (7, "bitonic"), (16, "batcher"), (19, "odd_even"),
         (33, "bitonic"), (64, "batcher"))
    ):  # fmt: skip
        compare(*problem(n, name, distribution, 1.0, F32), rtol=rtol, part=i % 4)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_selection_equals_the_reference(k):
    for dtype, rtol in ((F64, 1e-10), (F32, 1e-4)):
        x = draw(3, 9, dtype=dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()
        p = pyloss.soft_topk(x, k, network="splitter_selection", steepness=3.0)
        args = ("splitter_selection", "cauchy", 3.0, 0.25, k)
        _, full = reference.sorting_network_permutation(exact, *args)
        want = full[:, :, -k:].flip(-1)
        for a, b in zip((p, *gradients(p, [x])), (want, *gradients(want, [exact]))):
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)


def test_small_entries_of_the_permutation():
    """P down to 1e-30 with a relative accuracy, which 1 - alpha would not leave."""
    x = torch.linspace(-3, 3, 7, dtype=F64).flip(0)[None].repeat(2, 1)
    x[1] = x[1, [3, 1, 5, 0, 6, 2, 4]]
    for dtype, rtol in ((F64, 1e-12), (F32, 3e-5)):
        small = 0
        for name, distribution in itertools.product(SORTERS, ("logistic", "gaussian", "cauchy")):
            s = {"logistic": 12.0, "gaussian": 3.0, "cauchy": 1e5}[distribution]
            found = pyloss.soft_permutation(
                x.to(dtype), network=name, distribution=distribution, steepness=s
            )
            with mpmath.workdps(50):
                want = exact_permutation(x, name, distribution, s)
            seen = want > 1e-30
            small += int((seen & (want < 1e-20)).sum())
            torch.testing.assert_close(found.double()[seen], want[seen], rtol=rtol * 100, atol=0)
            assert bool((found >= 0).all())
        assert small > 20  # of what this is about


def exact_permutation(x, name, distribution, s):
    """P at 50 digits."""
    found = torch.empty(*x.shape, x.shape[1], dtype=F64)
    for item, row in enumerate(x.tolist()):
        n = len(row)
        y = [mpmath.mpf(v) for v in row]
        p = [[mpmath.mpf(int(i == j)) for j in range(n)] for i in range(n)]
        for layer in reference.network(name, n):
            for a, b in zip(layer.lo, layer.hi):
                d = y[b] - y[a]
                tau = _tau_of(abs(d) * s, distribution)
                alpha, beta = (1 - tau, tau) if d >= 0 else (tau, 1 - tau)
                y[a], y[b] = alpha * y[a] + beta * y[b], beta * y[a] + alpha * y[b]
                for r in p:
                    r[a], r[b] = alpha * r[a] + beta * r[b], beta * r[a] + alpha * r[b]
        found[item] = torch.tensor([[float(v) for v in r] for r in p], dtype=F64)
    return found


def _tau_of(u, distribution):
    if distribution == "logistic":
        return mpmath.exp(-u) / (1 + mpmath.exp(-u))
    if distribution == "gaussian":
        return mpmath.erfc(u / mpmath.sqrt(2)) / 2
    return mpmath.mpf(1) / 2 - mpmath.atan(u) / mpmath.pi


# --- invariants ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_invariants(distribution, dtype):
    close = functools.partial(torch.testing.assert_close, rtol=0)
    tiny = {F64: 1e-11, F32: 2e-4}[dtype]
    for name, n in (("bitonic", 11), ("odd_even", 16), ("batcher", 24)):
        options = dict(network=name, distribution=distribution)
        x = draw(4, n, dtype=dtype).requires_grad_()
        y, p = pyloss.soft_sort(x, return_permutation=True, **options)
        close(y.sum(1), x.sum(1), atol=tiny)
        close(p.sum(1), torch.ones_like(x), atol=tiny)
        close(p.sum(2), torch.ones_like(x), atol=tiny)
        close((p.mT @ x.unsqueeze(-1)).squeeze(-1), y, atol=tiny)
        (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        # One comparator of two nearly equal values has a slope of 800 with logistic_phi.
        slack = 30 if distribution == "logistic_phi" else 1
        close(g, torch.ones_like(x), atol=tiny * slack)
        shifted, q = pyloss.soft_sort(x + 4, return_permutation=True, **options)
        close(shifted, y + 4, atol=tiny * slack)
        close(q, p, atol=tiny * slack)
        if distribution != "logistic_phi":
            scaled = pyloss.soft_permutation(x * 5, steepness=2.0, **options)
            close(scaled, p, atol=tiny)
        steep, q = pyloss.soft_sort(x, return_permutation=True, steepness=1e9, **options)
        close(steep, x.sort(1).values, atol=1e-4)
        ranks = x.argsort(1).argsort(1)
        close(q, torch.nn.functional.one_hot(ranks, n).to(dtype), atol=1e-3)
        r, a = pyloss.soft_rank(x, **options), pyloss.soft_argsort(x, **options)
        place = torch.arange(n, dtype=dtype)
        close(r, p @ place + 1, atol=20 * tiny)
        close(a, p.mT @ place, atol=20 * tiny)


@pytest.mark.parametrize("name", SORTERS)
@pytest.mark.parametrize("distribution", MONOTONIC)
def test_monotonic(name, distribution):
    """No output falls when an input rises: 200 draws, every entry of the Jacobian."""
    x = draw(200, 5).requires_grad_()
    y = pyloss.soft_sort(x, network=name, distribution=distribution)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(5)]
    assert torch.stack(rows).min().item() >= -1e-14


@pytest.mark.parametrize("distribution", ["logistic", "logistic_phi", "gaussian"])
def test_the_others_are_not_monotonic(distribution):
    """The property above is one of the distribution, and the test can fail."""
    x = draw(200, 5).requires_grad_()
    y = pyloss.soft_sort(x, network="odd_even", distribution=distribution)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(5)]
    assert torch.stack(rows).min().item() < -0.05


# --- ties, infinities, NaN -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_ties(distribution, dtype):
    """All equal: nothing moves, P is uniform over what the comparators connect, slopes finite."""
    x = torch.full((2, 8), 0.3, dtype=dtype).requires_grad_()
    y, p = pyloss.soft_sort(x, distribution=distribution, return_permutation=True)
    assert torch.equal(y, x)
    torch.testing.assert_close(p, torch.full_like(p, 0.125))
    g = gradients((y, p), [x])[0]
    named = ("bitonic", distribution)
    exact = x.detach().double().requires_grad_()
    want = gradients(reference.sorting_network_permutation(exact, *named), [exact])[0]
    torch.testing.assert_close(g.double(), want, rtol=1e-4, atol=1e-3)
    assert bool(g.isfinite().all())


def test_ties_of_the_target():
    x, y = draw(3, 6), torch.tensor([[2.0, 1, 2, 0, 1, 1]]).repeat(3, 1)
    p = pyloss.soft_permutation(x)
    q = torch.zeros(6, 6, dtype=F64)
    q[3, 0] = 1
    q[[1, 4, 5], 1:4] = 1 / 3
    q[[0, 2], 4:] = 0.5
    shared = pyloss.sorting_cross_entropy(x, y, ties="share", reduction="none")
    want = torch.nn.functional.binary_cross_entropy(p, q.expand_as(p), reduction="none")
    torch.testing.assert_close(shared, want.mean((1, 2)))
    row = pyloss.sorting_cross_entropy(x, y, "row_ce", ties="share", reduction="none")
    torch.testing.assert_close(row, -(q * p.log()).sum((1, 2)) / 6)
    stable = pyloss.sorting_cross_entropy(x, y, reduction="none")
    ranks = torch.tensor([4, 1, 5, 0, 2, 3]).expand(3, 6)
    same = pyloss.sorting_cross_entropy(x, ranks, target_is="ranks", reduction="none")
    assert torch.equal(stable, same)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", SORTERS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_infinite_entries_are_masks(name, distribution, dtype):
    inf = math.inf
    x = torch.tensor([[0.5, inf, -1, 2, -inf, 0.1, 0.2, 3, -2]], dtype=dtype).requires_grad_()
    options = dict(network=name, distribution=distribution)
    y, p = pyloss.soft_sort(x, return_permutation=True, **options)
    assert y[0, 0] == -inf and y[0, -1] == inf and bool(y[0, 1:-1].isfinite().all())
    unit = torch.eye(9, dtype=dtype)
    assert torch.equal(p[0, 1], unit[8]) and torch.equal(p[0, 4], unit[0])  # exact, no leak
    assert torch.equal(p[0, :, 8], unit[1]) and torch.equal(p[0, :, 0], unit[4])
    torch.testing.assert_close(p.sum(2), torch.ones(1, 9, dtype=dtype))
    (g,) = torch.autograd.grad((y[0, 1:-1] ** 2).sum() + (p**2).sum(), x)
    assert bool(g.isfinite().all()) and g[0, 1] == 0 and g[0, 4] == 0
    assert int((g != 0).sum()) == 7
    (g,) = torch.autograd.grad(pyloss.soft_rank(x, **options)[0, 0], x)
    assert bool(g.isfinite().all()) and g[0, 1] == 0
    target = torch.tensor([[4, 8, 2, 6, 0, 3, 5, 7, 1]])
    loss = pyloss.sorting_cross_entropy(x, target, target_is="ranks", **options)
    (g,) = torch.autograd.grad(loss, x)
    assert bool(loss.isfinite()) and bool(g.isfinite().all()) and g[0, 1] == 0


def test_several_masks_share_their_places():
    x = torch.tensor([[math.inf, 1.0, math.inf, 0.0, math.inf]], dtype=F64).requires_grad_()
    for name in SORTERS:
        y, p = pyloss.soft_sort(x, network=name, return_permutation=True)
        assert bool((y[0, 2:] == math.inf).all())
        # What the masks share stays among them: no weight on the ranks of the others.
        assert bool((p[0, [0, 2, 4]][:, :2] == 0).all())
        assert bool((p[0, [1, 3]][:, 2:] == 0).all())
        (g,) = torch.autograd.grad(y[0, 0] + (p**2).sum(), x)
        assert bool(g.isfinite().all()) and bool((g[0, [0, 2, 4]] == 0).all())


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 19])
def test_nan_stays_in_its_row(n, dtype):
    x = draw(3, n, dtype=dtype)
    clean = x.clone().requires_grad_()
    x[1, n // 2] = math.nan
    x.requires_grad_()
    f = draw(3, n, 2, dtype=dtype)
    for name, distribution in zip(SORTERS, ("cauchy", "gaussian", "optimal")):
        options = dict(network=name, distribution=distribution)

        def everything(x, options=options):
            y, p = pyloss.soft_sort(x, return_permutation=True, **options)
            values = pyloss.soft_sort(x, **options), pyloss.soft_rank(x, **options)
            permuted = pyloss.soft_permute(x, f, **options)
            loss = pyloss.sorting_cross_entropy(
                x, x.detach().nan_to_num(), reduction="none", **options
            )
            hard = pyloss.soft_sort(x, hard=True, **options)
            return y, p, *values, permuted, loss, hard

        found, want = everything(x), everything(clean)
        for a, b in zip(found, want):
            assert bool(a[1].isnan().all()), a[1]
            assert torch.equal(a[[0, 2]], b[[0, 2]])
        for a, b in zip(found, want):
            (g,) = torch.autograd.grad(a.sum(), x, retain_graph=True)
            (h,) = torch.autograd.grad(b.sum(), clean, retain_graph=True)
            assert bool(g[1].isnan().all())
            assert torch.equal(g[[0, 2]], h[[0, 2]])


def test_huge_values():
    """Differences that overflow compare hard; what is merely large does not."""
    for dtype in (F32, F64):
        big = torch.finfo(dtype).max
        x = torch.tensor([[big, -big, 1.0, big / 100, -2.0]], dtype=dtype).requires_grad_()
        for distribution in DISTRIBUTIONS:
            y, p = pyloss.soft_sort(x, distribution=distribution, return_permutation=True)
            assert y.isfinite().all() and p.isfinite().all()
            torch.testing.assert_close(y[0, [0, 4]], x[0, [1, 0]].detach(), rtol=1e-3, atol=0)
            assert gradients((y, p), [x])[0].isfinite().all()


# --- dtypes and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("descending", [False, True])
def test_dim_and_layout(dim, descending):
    base = draw(3, 4, 5)
    for x in (base, base.transpose(0, 2), base[:, ::2], base.expand(2, 3, 4, 5)[1]):
        moved = x.movedim(dim, -1).contiguous()
        y, p = pyloss.soft_sort(x, dim, descending, return_permutation=True)
        flat = moved.view(-1, moved.shape[-1])
        sign = -1 if descending else 1
        want, matrix = reference.sorting_network_permutation(sign * flat, "auto", "cauchy")
        want = (sign * want).view_as(moved).movedim(-1, dim)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(p, matrix.view(*moved.shape, -1))
        r = pyloss.soft_rank(x, dim, descending, base=0)
        place = torch.arange(moved.shape[-1], dtype=F64)
        torch.testing.assert_close(r.movedim(dim, -1), (p @ place))
        hard = pyloss.soft_sort(x, dim, descending, hard=True)
        assert torch.equal(hard, x.sort(dim, descending).values)
        a = pyloss.soft_argsort(x, dim, descending, hard=True)
        assert torch.equal(a.long(), x.argsort(dim, descending))
        loss = pyloss.sorting_cross_entropy(x, x, dim=dim, descending=descending, reduction="none")
        assert loss.shape == moved.shape[:-1]
        again = pyloss.sorting_cross_entropy(moved, moved, descending=descending, reduction="none")
        assert torch.equal(loss, again)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 1)])
def test_empty_batch(shape):
    x = torch.zeros(shape, requires_grad=True)
    y, p = pyloss.soft_sort(x, return_permutation=True)
    assert y.shape == shape and p.shape == (*shape, shape[-1])
    losses = pyloss.sorting_cross_entropy(x, x.detach(), reduction="none")
    assert losses.shape == shape[:-1]
    assert pyloss.sorting_cross_entropy(x, x.detach()).isnan()
    assert pyloss.sorting_cross_entropy(x, x.detach(), reduction="sum") == 0
    total = y.sum() + p.sum() + losses.sum() + pyloss.soft_rank(x).sum()
    feats = torch.ones(shape[-1], 2, requires_grad=True)
    total = total + pyloss.soft_permute(x, feats).sum() + pyloss.soft_topk(x, 1).sum()
    total.backward()
    assert x.grad.shape == shape and torch.equal(feats.grad, torch.zeros_like(feats))


def test_one_element():
    x = torch.tensor([[2.0], [-1.0]], requires_grad=True)
    for name in SORTERS:
        y, p = pyloss.soft_sort(x, network=name, return_permutation=True)
        assert torch.equal(y, x) and torch.equal(p, torch.ones(2, 1, 1))
        loss = pyloss.sorting_cross_entropy(x, x.detach(), network=name)
        assert loss == 0
        g = torch.autograd.grad(y.sum() + p.sum() + loss + pyloss.soft_rank(x).sum(), x)[0]
        assert torch.equal(g, torch.ones_like(x))


# --- determinism and memory ----------------------------------------------------------------------


def test_thread_count_does_not_matter(keep_num_threads):
    runs = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        found = []
        for b, n, name in ((70, 5, "odd_even"), (33, 16, "bitonic"), (3, 70, "batcher"),
                           (1, 130, "bitonic")):  # fmt: skip
            x = torch.randn(b, n, requires_grad=True)
            f = torch.randn(b, n, 3, requires_grad=True)
            one = torch.randn(n, 2, requires_grad=True)
            options = dict(network=name)
            y, p = pyloss.soft_sort(x, return_permutation=True, **options)
            loss = pyloss.sorting_cross_entropy(x, torch.rand(b, n), **options)
            parts = [y, p, pyloss.soft_sort(x, **options), pyloss.soft_rank(x, **options)]
            parts += [pyloss.soft_permute(x, f, **options), pyloss.soft_permute(x, one, **options)]
            parts += [loss, pyloss.soft_topk(x, 2, **options)]
            found += parts
            for part in parts:
                found += gradients(part, [x])
            found += gradients(parts[4], [f], 5) + gradients(parts[5], [one], 5)
        runs.append(found)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def kept_bytes(y):
    """Of the storages that the graph of y keeps, saved in its nodes or as their attributes."""
    nodes, storages, seen = [y.grad_fn], {}, set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        kept += [*getattr(node, "__dict__", {}).values(), *getattr(node, "saved_tensors", ())]
        for t in kept:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


SAVING = {
    "sort": pyloss.soft_sort,
    "descending": lambda x: pyloss.soft_sort(x, descending=True),
    "hard sort": lambda x: pyloss.soft_sort(x, hard=True),
    "rank": pyloss.soft_rank,
    "hard rank": lambda x: pyloss.soft_rank(x, hard=True),
    "argsort": pyloss.soft_argsort,
    "permutation": pyloss.soft_permutation,
    "hard permutation": lambda x: pyloss.soft_permutation(x, hard=True),
    "both": lambda x: pyloss.soft_sort(x, return_permutation=True)[1],
    "topk": lambda x: pyloss.soft_topk(x, 3),
    "hard topk": lambda x: pyloss.soft_topk(x, 3, hard=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, F32, F64])
def test_saved_bytes(dtype):
    """At most twice the input, of P too; the permutation itself is not kept."""
    x = draw(8, 64, dtype=dtype).requires_grad_()
    size = x.untyped_storage().nbytes()
    for name, f in SAVING.items():
        y = f(x)
        shared = 64 * 4 * 4  # features that the whole batch shares: places, columns
        if name == "hard sort" and dtype == torch.float16:
            shared += size // 2  # the masks of infinite values
        assert 0 < kept_bytes(y) <= 2 * size + shared, name
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("target_dtype", [F32, F64, torch.int64])
def test_saved_bytes_of_the_losses(target_dtype):
    """At most twice the inputs: the inputs themselves, and dL/dx."""
    x = draw(8, 64, dtype=F32).requires_grad_()
    target = (100 * torch.rand(8, 64)).to(target_dtype)
    inputs = x.untyped_storage().nbytes() + target.untyped_storage().nbytes()
    for options in ({}, {"kind": "row_ce"}, {"ties": "share"}, {"descending": True}):
        loss = pyloss.sorting_cross_entropy(x, target, **options)
        assert 0 < kept_bytes(loss) <= inputs + x.untyped_storage().nbytes()
    loss = pyloss.spearman_loss(x, target)
    assert 0 < kept_bytes(loss) <= 2 * inputs + 64 * 4
    feats = draw(8, 64, 3, dtype=F32).requires_grad_()
    inputs = x.untyped_storage().nbytes() + feats.untyped_storage().nbytes()
    for hard in (False, True):
        assert 0 < kept_bytes(pyloss.soft_permute(x, feats, hard=hard)) <= 2 * inputs


LONG_PEAK = """
import resource, torch, pyloss
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(n):
    x = torch.randn(1, n, requires_grad=True)
    pyloss.soft_rank(x).square().sum().backward()
step(8)
before = peak()
step(BATCH)
print(peak() - before)
"""
PEAK = """
import resource, torch, pyloss
torch.set_num_threads(2)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(b, n):
    x = torch.randn(b, n, requires_grad=True)
    pyloss.sorting_cross_entropy(x, torch.rand(b, n)).backward()
    return x.grad.norm().item()
step(2, 8)
before = peak()
assert step(BATCH, 1024) > 0
print(peak() - before)
"""


def peak_megabytes(batch: int, program: str = PEAK) -> float:
    out = subprocess.run(
        [sys.executable, "-c", program.replace("BATCH", str(batch))],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return float(out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of ru_maxrss")
def test_peak_memory_of_the_fused_loss():
    """n = 1024, a batch of 64: no permutation of 4 MB per item."""
    assert peak_megabytes(64) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of ru_maxrss")
def test_peak_memory_of_the_ranks_of_a_long_row():
    """155 MB measured for n = 65536; a copy of the row for every layer took 634."""
    assert peak_megabytes(65536, LONG_PEAK) < 250
