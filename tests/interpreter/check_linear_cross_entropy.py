"""The tile kernels of the fused linear cross entropy under Triton's interpreter.

Everything is compared with float64 PyTorch on the same (rounded) inputs. Tiles are 16 wide unless
said otherwise, so that small problems have many of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from pyloss.kernels import linear_cross_entropy as K

SMALL = K.Config(16, 16, 16, num_warps=4, num_stages=2, group=2)
NAN, INF = math.nan, math.inf
# Half products are exact in float32; what remains is the rounding of dz to the input's type.
TOL = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


class Problem(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor


def problem(n: int, v: int, d: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Rows are slices of wider ones; the bias is of order 1; labels include both ends."""
    x = torch.randn(n, d + 3)[:, :d].to(dtype) if n % 2 else torch.randn(n, d).to(dtype)
    wide = torch.randn(v, d + 5).to(dtype)
    target = torch.randint(v, (n,))
    target[0], target[-1] = v - 1, 0
    return Problem(x, wide[:, 2 : d + 2], torch.randn(v).to(dtype), target)


def logits(p: Problem, pre: float = 1.0, post: float = 1.0, cap: bool = False) -> torch.Tensor:
    t = p.x.double() @ p.weight.double().T
    if p.bias is not None:
        t = t + p.bias.double()
    return post * torch.tanh(pre * t) if cap else pre * t


def expected_stats(z: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    m = z.amax(1)
    u = z - m[:, None]
    e = u.exp().scatter(1, y[:, None], 0)
    eu = torch.where(e == 0, 0, e * u)
    zy = z.gather(1, y[:, None])[:, 0]
    return {"m": m, "rest": e.sum(1), "zy": zy, "ez": eu.sum(1), "wz": (w * u).sum(1)}


def check_stats(got: K.SoftmaxStats, want: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    for name, value in got._asdict().items():
        if value is not None:
            assert value.dtype == torch.float32
            atol = 1e-5 * max(1.0, want[name].abs().max().item())
            torch.testing.assert_close(value.double(), want[name], rtol=rtol, atol=atol, msg=name)


def test_the_kernels_are_interpreted(watched) -> None:
    assert isinstance(K.linear_softmax_stats_kernel, InterpretedFunction)
    K.linear_softmax_stats(*problem(3, 5, 4), None, config=SMALL)
    assert watched.launches == 2  # under the access recorder


# One of everything; one row; sizes below, at and above the tile; several tiles each way.
@pytest.mark.parametrize(
    "n, v, d", [(1, 1, 1), (1, 40, 16), (5, 37, 19), (16, 16, 32), (35, 70, 8)]
)
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("splits", (1, 2, None))
def test_stats(n: int, v: int, d: int, dtype: torch.dtype, splits: int | None) -> None:
    p = problem(n, v, d, dtype)
    w = torch.rand(v) + 0.1
    got = K.linear_softmax_stats(
        *p, None, want_entropy=True, want_sum=True, class_weight=w, config=SMALL, splits=splits
    )
    check_stats(got, expected_stats(logits(p), p.target, w.double()))


def test_stats_of_default_tiles() -> None:
    for dtype in TOL:
        p = problem(20, 300, 40, dtype)
        check_stats(K.linear_softmax_stats(*p, None), expected_stats(logits(p), p.target, 1))


@pytest.mark.parametrize("pre, post, cap", [(0.3, 1.0, False), (1 / 3, 2.5, True)])
def test_stats_of_transformed_logits(pre: float, post: float, cap: bool) -> None:
    p = problem(18, 33, 20)
    options = {"pre": pre, "post": post, "cap": cap}
    got = K.linear_softmax_stats(
        *p, None, **options, want_entropy=True, want_sum=True, config=SMALL, splits=2
    )
    assert got.ez is not None and got.wz is not None
    check_stats(got, expected_stats(logits(p, **options), p.target, 1))


def test_capped_logits_are_accurate_from_tiny_to_saturated() -> None:
    t = torch.cat([torch.logspace(-8, 3, 40), -torch.logspace(-8, 3, 40)])
    zero = torch.zeros(t.numel(), 1)
    y = torch.zeros(1, dtype=torch.long)
    values = torch.stack(
        [
            K.linear_softmax_stats(
                t[i : i + 1, None], zero[:1] + 1, None, y, None, post=3.0, cap=True, config=SMALL
            ).m[0]
            for i in range(t.numel())
        ]
    )
    torch.testing.assert_close(values.double(), 3 * t.double().tanh(), rtol=3e-7, atol=0)


def test_only_what_was_asked_for_is_returned() -> None:
    p = problem(3, 5, 4)
    assert K.linear_softmax_stats(*p, None).ez is None
    assert K.linear_softmax_stats(*p, None).wz is None
    both = K.linear_softmax_stats(*p, None, want_sum=True)
    assert both.ez is None and both.wz is not None


def test_confident_rows_keep_their_relative_accuracy() -> None:
    """1 - p_y = rest / sum for p_y that rounds to 1; a shift of all logits changes nothing."""
    n = 17
    y = torch.arange(n) % 40
    for shift in (0.0, 1e4):
        x = torch.full((n, 40), shift - 25.0)
        x[torch.arange(n), y] = shift
        p = Problem(x, torch.eye(40), None, y)
        got = K.linear_softmax_stats(*p, None, config=SMALL, splits=2)
        torch.testing.assert_close(
            got.rest.double(), torch.full((n,), 39 * math.exp(-25)).double(), rtol=3e-6, atol=0
        )


def test_labels_of_another_shard_have_no_column() -> None:
    p = problem(5, 20, 8)
    target = torch.tensor([3, -1, 20, 2**32 + 3, -(2**32) + 3])
    got = K.linear_softmax_stats(p.x, p.weight, p.bias, target, None, config=SMALL)
    z = logits(p)
    full = (z - z.amax(1, keepdim=True)).exp().sum(1)
    assert got.zy[1:].eq(-INF).all()
    torch.testing.assert_close(got.rest[1:].double(), full[1:], rtol=1e-5, atol=0)
    check_stats(
        K.linear_softmax_stats(p.x, p.weight, p.bias, None, None, config=SMALL),
        {"m": z.amax(1), "rest": full, "zy": torch.full((5,), -INF).double()},
    )


@pytest.mark.parametrize("target_dtype", (torch.int64, torch.int32, torch.uint8))
def test_label_types(target_dtype: torch.dtype) -> None:
    p = problem(9, 30, 8)
    got = K.linear_softmax_stats(
        p.x, p.weight, p.bias, p.target.to(target_dtype), None, config=SMALL
    )
    check_stats(got, expected_stats(logits(p), p.target, 1))


# -inf in the first tile, in the last, everywhere but in one column
@pytest.mark.parametrize("hidden", (range(16), range(30, 37), [*range(20), *range(21, 37)]))
@pytest.mark.parametrize("splits", (1, 3))
def test_masked_classes(hidden: list[int], splits: int) -> None:
    p = problem(6, 37, 8)
    p.bias[list(hidden)] = -INF
    p.target.fill_(20)
    p.target[0] = hidden[0]  # loss +inf: rest stays finite
    got = K.linear_softmax_stats(*p, None, want_entropy=True, config=SMALL, splits=splits)
    check_stats(got, {**expected_stats(logits(p), p.target, 1)})
    assert got.zy[0] == -INF


@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("where", (0, 17, 36))
def test_infinite_and_undefined_logits_poison_their_rows(where: int, splits: int) -> None:
    for value in (INF, NAN):
        for label in (where, (where + 1) % 37):
            p = problem(3, 37, 8)
            p.bias[where] = value
            p.target.fill_(label)
            got = K.linear_softmax_stats(*p, None, config=SMALL, splits=splits)
            assert got.rest.isnan().all()
    p = problem(3, 37, 8)
    p.x[1, 2] = NAN
    got = K.linear_softmax_stats(*p, None, config=SMALL, splits=splits)
    assert got.rest.isnan().tolist() == [False, True, False]


def test_rows_of_minus_infinity_only() -> None:
    p = problem(3, 37, 8)
    p.bias.fill_(-INF)
    assert K.linear_softmax_stats(*p, None, config=SMALL).rest.isnan().all()
    part = K.linear_softmax_stats(*p, None, want_entropy=True, config=SMALL, whole_row=False)
    assert part.m.eq(-INF).all() and part.rest.eq(0).all() and part.ez.eq(0).all()


# ------------------------------------------------------------- the whole way: loss and gradients


class Terms(NamedTuple):
    """Loss of a row: g (nll + z_loss lse^2 + entropy H), with label smoothing in nll."""

    z_loss: float = 0.0
    entropy: float = 0.0
    smoothing: float = 0.0


def expected_loss(
    p: Problem, g: torch.Tensor, terms: Terms, w: torch.Tensor | None, **transform: object
) -> tuple[torch.Tensor, Problem]:
    """Row losses, and the inputs in float64 with their gradients."""
    q = Problem(*(t.double().requires_grad_() for t in p[:3]), p.target)
    z = logits(q, **transform)
    v = z.shape[1]
    w = torch.ones(v) if w is None else w.double()
    logp = z.log_softmax(1)
    nll = -logp.gather(1, q.target[:, None])[:, 0]
    nll = (1 - terms.smoothing) * nll - terms.smoothing / v * (w * logp).sum(1)
    lse = z.logsumexp(1)
    entropy = -(logp.exp() * logp).sum(1)
    loss = g.double() * (nll + terms.z_loss * lse**2 + terms.entropy * entropy)
    loss.sum().backward()
    return loss.detach(), q


def row_coeffs(
    s: K.SoftmaxStats, g: torch.Tensor, v: int, terms: Terms, w: torch.Tensor | None
) -> tuple[torch.Tensor, K.GradCoeffs, torch.Tensor]:
    """Row losses, coefficients of dz (as row_coeffs of csrc/common/row_softmax.h), 1 - p_y."""
    ey = (s.zy - s.m).exp()
    total = s.rest + ey
    log_sum = torch.where(s.zy == s.m, s.rest.log1p(), total.log())
    lse, miss = s.m + log_sum, s.rest / total
    weight_sum = float(v if w is None else w.sum())
    loss = (1 - terms.smoothing) * ((s.m - s.zy) + log_sum)
    first, other = g * (1 - terms.smoothing), g * 2 * terms.z_loss * lse
    loss = loss + terms.z_loss * lse**2
    spread = b = None
    if terms.smoothing:
        loss = loss + terms.smoothing / v * (weight_sum * log_sum - s.wz)
        spread = g * (terms.smoothing / v)
        other = other + spread * weight_sum
    if terms.entropy:
        entropy = log_sum - (s.ez + ey * (s.zy - s.m)) / total
        loss = loss + terms.entropy * entropy
        other = other - g * terms.entropy * (entropy - log_sum)
        b = -g * terms.entropy / total
    coeffs = K.GradCoeffs(s.m, (first + other) / total, other / total, first * miss, b, spread)
    return g * loss, coeffs, miss


class Result(NamedTuple):
    loss: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor
    dbias: torch.Tensor
    masks: list[K.TileMask]


def run(
    p: Problem,
    g: torch.Tensor,
    terms: Terms = Terms(),  # noqa: B008 (immutable)
    w: torch.Tensor | None = None,
    n_valid: torch.Tensor | None = None,
    block: int = 1000,
    eps: float | None = None,
    config: K.Config | None = SMALL,
    dz_dtype: torch.dtype | None = None,
    **transform: object,
) -> Result:
    """The composition that the op makes of the launchers, over blocks of the vocabulary."""
    (n, d), v = p.x.shape, p.weight.shape[0]
    stats = K.linear_softmax_stats(
        *p,
        n_valid,
        **transform,
        want_entropy=terms.entropy != 0,
        want_sum=terms.smoothing != 0,
        class_weight=w,
        config=config,
        splits=2,
    )
    loss, coeffs, miss = row_coeffs(stats, g, v, terms, w)
    threshold = None if eps is None else eps * g.abs() * miss
    # What no kernel writes must not be read either.
    buffer = torch.full((n, min(block, v) + 2), NAN, dtype=dz_dtype or p.x.dtype)
    dx, dw, dbias = torch.full((n, d), NAN), torch.full((v, d), NAN), torch.full((v,), NAN)
    masks = []
    for v0 in range(0, v, block):
        v1 = min(v, v0 + block)
        buffer.fill_(NAN)
        dz, mask = K.linear_softmax_grad(
            *p,
            n_valid,
            coeffs,
            buffer,
            v0=v0,
            v1=v1,
            class_weight=w,
            threshold=threshold,
            config=config,
            **transform,
        )
        products = {"mask": mask, "n_valid": n_valid, "config": config}
        K.masked_matmul_nn(dz, p.weight[v0:v1], out=dx, accumulate=v0 > 0, **products)
        K.masked_matmul_tn(dz, p.x, out=dw[v0:v1], **products)
        K.column_sums(dz, mask, n_valid, dbias[v0:v1])
        masks.append(mask)
    return Result(loss, dx, dw, dbias, masks)


def check_result(got: Result, loss: torch.Tensor, q: Problem, tol: float) -> None:
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-5, atol=2e-5)
    grads = {"dx": q.x.grad, "dw": q.weight.grad, "dbias": q.bias.grad}
    for name, want in grads.items():
        value = getattr(got, name)
        atol = 2 * tol * want.abs().max().item()
        torch.testing.assert_close(value.double(), want, rtol=tol, atol=atol, msg=name)


CASES = {
    "plain": (Terms(), {}),
    "z-loss": (Terms(z_loss=0.1), {"pre": 0.5}),
    "entropy": (Terms(entropy=-0.7), {}),
    "smoothing": (Terms(smoothing=0.2), {}),
    "cap": (Terms(), {"pre": 0.25, "post": 6.0, "cap": True}),
    "all": (Terms(0.05, 0.3, 0.1), {"pre": 0.4, "post": 3.0, "cap": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", (False, True))
def test_loss_and_gradients(case: str, weighted: bool) -> None:
    terms, transform = CASES[case]
    p = problem(21, 41, 19)
    g = torch.randn(21)
    w = torch.rand(41) if weighted and terms.smoothing else None
    loss, q = expected_loss(p, g, terms, w, **transform)
    for block in (1000, 16, 23):
        check_result(run(p, g, terms, w, block=block, **transform), loss, q, 1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", ("plain", "all"))
def test_half_inputs(dtype: torch.dtype, case: str) -> None:
    terms, transform = CASES[case]
    p = problem(21, 41, 19, dtype)
    g = torch.randn(21)
    loss, q = expected_loss(p, g, terms, None, **transform)
    check_result(run(p, g, terms, block=32, **transform), loss, q, TOL[dtype])
    # a float32 gradient of half inputs: products in float32
    wide = run(p, g, terms, dz_dtype=torch.float32, **transform)
    check_result(wide, loss, q, 1e-5)


def test_default_tiles() -> None:
    p = problem(40, 200, 24)
    g = torch.randn(40)
    loss, q = expected_loss(p, g, Terms(), None)
    for eps in (None, 1e-30):
        check_result(run(p, g, block=150, config=None, eps=eps), loss, q, 1e-5)


@pytest.mark.parametrize("n_valid", (0, 1, 16, 17, 32, 35))
@pytest.mark.parametrize("eps", (None, 1e-30))
def test_ignored_rows_are_not_read(n_valid: int, eps: float | None) -> None:
    p = problem(35, 37, 19)
    g = torch.randn(35)
    live = Problem(p.x[:n_valid], p.weight, p.bias, p.target[:n_valid])
    loss, q = expected_loss(live, g[:n_valid], Terms(), None)
    p.x[n_valid:] = NAN
    p.target[n_valid:] = -100
    for dtype in (torch.int32, torch.int64):
        count = torch.tensor(n_valid, dtype=dtype)
        stats = K.linear_softmax_stats(*p, count, want_entropy=True, want_sum=True, config=SMALL)
        for value in stats:
            assert value[n_valid:].eq(0).all() and value[:n_valid].isfinite().all()
        got = run(p, g, n_valid=count, block=20, eps=eps)
        assert got.dx[n_valid:].eq(0).all()
        check_rows = got._replace(loss=got.loss[:n_valid], dx=got.dx[:n_valid])
        if n_valid:
            check_result(check_rows, loss, q, 1e-5)
        else:
            assert got.dw.eq(0).all() and got.dbias.eq(0).all()


def test_no_rows_at_all() -> None:
    p = Problem(torch.empty(0, 5), torch.randn(7, 5), torch.randn(7), torch.empty(0).long())
    for eps in (None, 1e-3):
        got = run(p, torch.empty(0), eps=eps)
        assert got.loss.shape == (0,) and got.dx.shape == (0, 5)
        assert got.dw.eq(0).all() and got.dbias.eq(0).all()


def test_undefined_rows_keep_to_themselves() -> None:
    """NaN in a live row: its own gradient is NaN, also when filtered; other rows are untouched."""
    p = problem(20, 40, 8)
    p.x[3, 0] = NAN
    for eps in (None, 10.0):
        got = run(p, torch.ones(20), eps=eps)
        assert got.loss.isnan().nonzero().tolist() == [[3]]
        assert got.dx[3].isnan().all() and got.dx[[*range(3), *range(4, 20)]].isfinite().all()
        assert got.dw.isnan().all() and got.dbias.isnan().all()


def test_gradient_tiles_are_written_whole() -> None:
    """Also where rows are ignored, so that other products may read them; never beyond."""
    p = problem(35, 37, 19)
    for n_valid in (0, 5, 16, 33):
        buffer = torch.full((40, 30), NAN)
        vectors = K.GradCoeffs(*torch.rand(4, 35))
        dz, _ = K.linear_softmax_grad(
            *p, torch.tensor(n_valid), vectors, buffer, v0=9, v1=35, config=SMALL
        )
        assert dz.shape == (35, 26) and dz.data_ptr() == buffer.data_ptr()
        assert dz[n_valid:].eq(0).all() and dz[:n_valid].isfinite().all()
        assert dz[:n_valid].ne(0).all()
        assert buffer[35:].isnan().all() and buffer[:, 26:].isnan().all()


def test_undefined_entries_keep_their_tile() -> None:
    """Whether it is the entry or the threshold that is NaN."""
    p = confident()
    coeffs = K.GradCoeffs(*torch.zeros(4, 32))
    coeffs.a[20] = NAN
    for threshold in (torch.ones(32), torch.where(torch.arange(32) == 20, NAN, 1.0)):
        mask = K.linear_softmax_grad(*p, None, coeffs, threshold=threshold, config=SMALL)[1]
        assert mask.tiles[1].all() and mask.tiles[0].tolist() == [0, 0, 1, 0, 0, 1]


def test_gradient_of_the_entropy_with_masked_classes() -> None:
    p = problem(6, 37, 8)
    p.bias[[0, 20]] = -INF
    p.target.fill_(3)
    terms, g = Terms(entropy=0.5), torch.randn(6)
    got = run(p, g, terms)
    keep = torch.tensor([j for j in range(37) if j not in (0, 20)])
    sub = Problem(p.x, p.weight[keep], p.bias[keep], p.target - 1)
    loss, q = expected_loss(sub, g, terms, None)
    part = got._replace(dw=got.dw[keep], dbias=got.dbias[keep])
    check_result(part, loss, q, 1e-5)
    assert got.dw[[0, 20]].eq(0).all() and got.dbias[[0, 20]].eq(0).all()


def test_outer_products_and_factors() -> None:
    p = problem(18, 20, 9)
    dz = torch.randn(18, 20)
    for n_valid in (18, 13):
        dz[n_valid:] = 0
        p.x[n_valid:] = NAN
        count, live = torch.tensor(n_valid), torch.arange(18) < n_valid
        left, right, classes = torch.randn(18), torch.randn(9), torch.randn(20)
        out = K.masked_matmul_nn(
            dz, p.weight, None, count, torch.empty(18, 9), outer=(left, right), config=SMALL
        )
        want = (dz @ p.weight + left[:, None] * right) * live[:, None]
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        out = K.masked_matmul_tn(
            dz, p.x, None, count, torch.empty(20, 9), outer=(classes, right), config=SMALL
        )
        want = dz[live].T @ p.x[live] + classes[:, None] * right
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        out = K.column_sums(p.x, None, count, torch.empty(9), factor=left)
        torch.testing.assert_close(out, left[live] @ p.x[live], rtol=1e-5, atol=1e-5)


def test_accumulation() -> None:
    p = problem(18, 20, 9)
    dz = torch.randn(18, 20)
    for launch, other, want in (
        (K.masked_matmul_nn, p.weight, dz @ p.weight),
        (K.masked_matmul_tn, p.x, dz.T @ p.x),
    ):
        out = torch.ones(want.shape[0], want.shape[1] + 4)[:, 1:-3]  # strided rows
        launch(dz, other, None, None, out, accumulate=True, config=SMALL)
        torch.testing.assert_close(out, want + 1, rtol=1e-5, atol=1e-5)
    out = torch.ones(20)
    K.column_sums(dz, None, None, out, accumulate=True)
    torch.testing.assert_close(out, dz.sum(0) + 1, rtol=1e-5, atol=1e-5)


def test_column_sums_of_many_row_tiles() -> None:
    dz = torch.randn(1000, 3)
    out = torch.empty(3)
    K.column_sums(dz, None, torch.tensor(901), out)
    torch.testing.assert_close(out, dz[:901].sum(0), rtol=1e-5, atol=1e-5)
    tiles = torch.randint(2, (63, 1), dtype=torch.int8)
    K.column_sums(dz, K.TileMask(tiles, 16, 16), None, out)
    keep = tiles.repeat_interleave(16, 0)[:1000]
    torch.testing.assert_close(out, (dz * keep).sum(0), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- filtering


def test_filter_that_finds_nothing_small_changes_no_bit() -> None:
    p = problem(35, 50, 19)
    g = torch.randn(35)
    exact, filtered = run(p, g, block=32), run(p, g, block=32, eps=1e-30)
    assert all(m.tiles.all() for m in filtered.masks)
    for name in ("dx", "dw"):
        assert torch.equal(getattr(exact, name), getattr(filtered, name))
    torch.testing.assert_close(exact.dbias, filtered.dbias, rtol=1e-5, atol=1e-6)


def test_tile_lists() -> None:
    tiles = torch.randint(2, (5, 2100), dtype=torch.int8)
    tiles[3] = 0
    mask = K.TileMask(tiles, 16, 16)
    for by_rows in (True, False):
        lists, counts = K.active_tiles(mask, by_rows)
        want = tiles if by_rows else tiles.T
        assert torch.equal(counts.long(), want.sum(1))
        for line, row in enumerate(want):
            assert lists[line, : counts[line]].tolist() == row.nonzero()[:, 0].tolist()


def confident(n: int = 32, v: int = 96) -> Problem:
    """Logits (W is the identity): label 0, three rivals of the first tile -20, the rest -60.

    Tiles 2 and 5 hold labels of rows of the first tile of rows, tile 3 of the second.
    """
    x = torch.full((n, v), -60.0)
    x[:, 1:4] = -20.0
    y = torch.tensor([33, 90] * 8 + [50] * (n - 16))
    x[torch.arange(n), y] = 0.0
    return Problem(x, torch.eye(v), torch.zeros(v), y)


def test_filter_is_relative_to_each_row() -> None:
    """1 - p_y is about 6e-9: an absolute threshold would drop everything but the labels."""
    p = confident()
    g = torch.linspace(-2, 2, 32)
    g[5] = 0.0
    loss, q = expected_loss(p, g, Terms(), None)
    got = run(p, g, eps=1e-3)
    assert got.masks[0].tiles.tolist() == [[1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]]
    miss = 3 * math.exp(-20)
    for name, want in (("dx", q.x.grad), ("dw", q.weight.grad), ("dbias", q.bias.grad)):
        error = (getattr(got, name).double() - want).abs().max()
        # |x| <= 60, |W| <= 1, 32 rows, each entry left out below 1e-3 |g| miss, in truth e^-60
        assert error <= 2e-6 * want.abs().max() + 60 * 32 * 2 * math.exp(-60), name
    assert got.dx[0, 2].abs() > 0.1 * miss  # the rivals' share has survived

    coarse = run(p, g, eps=2.0)  # every entry is below twice the row's gradient
    assert coarse.masks[0].tiles.tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]]


def test_one_row_keeps_its_tile() -> None:
    p = confident()
    p.x[20, 70] = -15.0  # tile 4, a row of the second tile of rows
    got = run(p, torch.ones(32), eps=1e-3)
    assert got.masks[0].tiles.tolist() == [[1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]]


def test_tiles_of_zeros_are_always_left_out() -> None:
    p = confident()
    p.x[p.x == -60] = -300.0  # exp is 0 in float32
    got = run(p, torch.ones(32), eps=0.0)
    assert got.masks[0].tiles.tolist() == [[1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]]
    exact = run(p, torch.ones(32))
    assert torch.equal(got.dx, exact.dx) and torch.equal(got.dw, exact.dw)
    torch.testing.assert_close(got.dbias, exact.dbias, rtol=1e-6, atol=0)  # other order of sums


def test_spread_keeps_every_tile() -> None:
    """Label smoothing without the rank-one trick: no entry is small, so nothing may be skipped."""
    p = confident()
    g = torch.ones(32)
    loss, q = expected_loss(p, g, Terms(smoothing=0.1), None)
    got = run(p, g, Terms(smoothing=0.1), eps=1e-3)
    assert got.masks[0].tiles.all()
    check_result(got, loss, q, 1e-5)


# --------------------------------------------------------------------------------- the rest


def test_offsets_need_64_bits() -> None:
    """Two rows 2^31 + 8 elements apart; only their pages of the 8 GiB exist."""
    stride = 2**30 + 8
    p = problem(3, 20, 8, torch.float16)
    far = torch.empty(2 * stride + 8, dtype=torch.float16).as_strided((3, 8), (stride, 1))
    far.copy_(p.x)
    got = K.linear_softmax_stats(far, *p[1:], None, config=SMALL)
    check_stats(got, expected_stats(logits(p), p.target, 1))
    out = torch.empty(2 * stride + 20, dtype=torch.float16).as_strided((3, 20), (stride, 1))
    coeffs = row_coeffs(got, torch.ones(3), 20, Terms(), None)[1]
    dz, _ = K.linear_softmax_grad(far, *p[1:], None, coeffs, out, config=SMALL)
    near, _ = K.linear_softmax_grad(*p, None, coeffs, config=SMALL)
    assert torch.equal(dz, near)
    dx, dw = torch.empty(3, 8), torch.empty(20, 8)
    K.masked_matmul_nn(dz, p.weight, None, None, dx, config=SMALL)
    K.masked_matmul_tn(dz, far, None, None, dw, config=SMALL)
    torch.testing.assert_close(dx, near.float() @ p.weight.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, near.float().T @ p.x.float(), rtol=1e-5, atol=1e-5)


def test_runs_give_the_same_bits() -> None:
    p = problem(35, 50, 19)
    g = torch.randn(35)
    one, two = (run(p, g, Terms(0.1, 0.2, 0.1), block=20, eps=0.1) for _ in range(2))
    for a, b in zip(one[:4], two[:4]):
        assert torch.equal(a, b)


def test_arguments_are_checked() -> None:
    p = problem(4, 6, 8)
    with pytest.raises(TypeError, match="float64"):
        K.linear_softmax_stats(p.x.double(), p.weight.double(), None, p.target, None)
    with pytest.raises(TypeError, match="bfloat16"):
        K.linear_softmax_stats(p.x.bfloat16(), p.weight, None, p.target, None)
    with pytest.raises(ValueError, match=r"\(4, 8\) and \(6, 7\)"):
        K.linear_softmax_stats(p.x, p.weight[:, :7], None, p.target, None)
    with pytest.raises(ValueError, match="weight needs a last stride of 1"):
        K.linear_softmax_stats(p.x, torch.randn(8, 6).T, None, p.target, None)
    with pytest.raises(TypeError, match="accumulate needs a float32 out"):
        K.masked_matmul_nn(p.x, torch.randn(8, 8), None, None, p.x.half(), accumulate=True)
    with pytest.raises(ValueError, match=r"out must have shape \(8,\)"):
        K.column_sums(p.x, None, None, torch.empty(7))
