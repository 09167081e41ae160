"""The tile kernels of tensor attention under Triton's interpreter.

Everything is compared with one float64 einsum and autograd on the same (rounded) inputs. Tiles are
16 wide, so that small problems have several.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from pyloss.kernels import tensor_attention as K
from pyloss.kernels.tensor_attention import forward, launch
from pyloss.kernels.tensor_attention import problem as problems
from pyloss.kernels.tensor_attention.table import TABLE, Config

SMALL = Config(16, 16, num_warps=4, num_stages=1)
INF, NAN = math.inf, math.nan
# Against the largest element: float32 as the spec wants; halves: a few roundings of P, A and dS.
TOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TILINGS = ("rows", "packed", "pairs")
GRADIENTS = ("dq", "dk1", "dk2", "dv1", "dv2", "dmask1", "dmask2")


class Problem(NamedTuple):
    q: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor
    mask1: torch.Tensor | None = None
    mask2: torch.Tensor | None = None


def problem(
    n_q: int,
    n_1: int,
    n_2: int,
    d: int = 5,
    dv: int = 3,
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> Problem:
    """Heads next to the features, as projections give them: strided rows."""

    def tensor(h: int, n: int, width: int) -> torch.Tensor:
        return (torch.randn(batch, n, h, width) * size).to(dtype).transpose(1, 2)

    h, kv = heads
    return Problem(
        tensor(h, n_q, d),
        tensor(kv, n_1, d),
        tensor(kv, n_2, d),
        tensor(kv, n_1, dv),
        tensor(kv, n_2, dv),
    )


def keep(n_q: int, n: int, w: int | None, causal: bool, q_offset: int) -> torch.Tensor:
    ahead = torch.arange(n_q)[:, None] + q_offset - torch.arange(n)
    kept = ahead >= 0 if causal else torch.ones(n_q, n, dtype=torch.bool)
    return kept if w in (None, -1) else kept & (ahead.abs() < w)


def expected(
    p: Problem,
    scale: float,
    causal: bool = False,
    w1: int | None = None,
    w2: int | None = None,
    q_offset: int = 0,
    kv_bias: tuple[float, float] = (0.0, 0.0),
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out, lse and the leaves in float64."""
    leaves = [None if t is None else t.double().requires_grad_() for t in p]
    group = p.q.shape[1] // p.k1.shape[1]
    q, k1, k2, v1, v2 = (t if t is leaves[0] else t.repeat_interleave(group, 1) for t in leaves[:5])
    k2, v2 = k2 + kv_bias[0], v2 + kv_bias[1]
    s = scale * torch.einsum("bhil,bhjl,bhkl->bhijk", q, k1, k2)
    if leaves[5] is not None:
        s = s + leaves[5][..., :, None]
    if leaves[6] is not None:
        s = s + leaves[6][..., None, :]
    n_q, n_1, n_2 = s.shape[2:]
    kept1, kept2 = keep(n_q, n_1, w1, causal, q_offset), keep(n_q, n_2, w2, causal, q_offset)
    s = s.masked_fill(~(kept1[:, :, None] & kept2[:, None, :]), -INF)
    flat = s.flatten(3)
    top = flat.detach().amax(3, keepdim=True).clamp_min(-1e300)
    e = (flat - top).exp()
    total = e.sum(3, keepdim=True)
    dead = total == 0
    prob = (e / total.where(~dead, torch.ones_like(total))).view_as(s)
    lse = (top + total.where(~dead, torch.ones_like(total)).log())[..., 0]
    out = torch.einsum("bhijk,bhjc,bhkc->bhic", prob, v1, v2)
    return out, lse.masked_fill(dead[..., 0], -INF), leaves


def close(got: torch.Tensor, want: torch.Tensor, tol: float, name: str) -> None:
    assert got.shape == want.shape, name
    top = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=0,
        atol=tol * max(top, 1e-3),
        msg=lambda text: f"{name}: {text}",
    )


def check(
    p: Problem,
    tiling: str | None,
    config: Config | None = SMALL,
    splits: int | None = None,
    tol: float | None = None,
    backward: bool = True,
    grad_tol: float = 5.0,
    **options: Any,
) -> None:
    """Forward and backward against the einsum; dlse and every gradient included."""
    options.setdefault("scale", p.q.shape[3] ** -0.5)
    tol = tol or TOL[p.q.dtype]
    want, want_lse, leaves = expected(p, **options)
    how = {"tiling": tiling, "config": config, "splits": splits}
    out, lse = K.tensor_attention_fwd(*p, **options, **how)
    assert out.dtype == p.q.dtype and lse.dtype == torch.float32
    close(out, want.detach(), tol, "out")
    assert torch.equal(lse == -INF, want_lse == -INF)
    close(lse, want_lse.detach(), tol, "lse")
    if not backward:
        return
    dout = torch.randn(want.shape).to(p.q.dtype)
    dlse = torch.randn(want_lse.shape)
    live = want_lse != -INF
    loss = (want * dout.double()).sum() + (want_lse * dlse)[live].sum()
    if loss.requires_grad:
        used = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(loss, used, allow_unused=True))
        grads = [None if t is None else next(found) for t in leaves]
    got = K.tensor_attention_bwd(dout, dlse, *p, out, lse, **options, **how)
    for name, leaf, one, two in zip(GRADIENTS, leaves, got, grads):
        if leaf is None:
            assert one is None
        else:
            assert one.dtype == (torch.float32 if "mask" in name else p.q.dtype)
            close(one, torch.zeros_like(leaf) if two is None else two, grad_tol * tol, name)


def test_the_kernels_are_interpreted() -> None:
    assert isinstance(forward.tensor_attention_fwd_rows_kernel, InterpretedFunction)


# One of everything; lengths below, at and above the tile, all different.
@pytest.mark.parametrize("n", [(1, 1, 1), (2, 17, 3), (17, 2, 16), (5, 16, 33)])
@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_full(n: tuple[int, int, int], tiling: str) -> None:
    p = problem(*n)
    fits = min(n[1:]) <= 16
    check(p, tiling, backward=fits or tiling == "rows")


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_types(dtype: torch.dtype, tiling: str) -> None:
    check(problem(9, 7, 18, 16, 16, dtype=dtype, size=0.7), tiling)


# Causal, windows on either or both axes, the smaller one first and second, wider than the keys, one
# wide; the same around the diagonal; positions shifted up, down and off the keys.
WINDOWS = {
    "causal": {"causal": True},
    "causal windows": {"causal": True, "w1": 3, "w2": 20},
    "swapped": {"causal": True, "w1": 18, "w2": 4},
    "one axis": {"causal": True, "w2": 2},
    "wide": {"causal": True, "w1": 100, "w2": 1},
    "ones": {"causal": True, "w1": 1, "w2": 1},
    "around": {"w1": 5, "w2": 9},
    "around one": {"w1": -1, "w2": 2},
    "ahead": {"causal": True, "w1": 4, "w2": 7, "q_offset": 9},
    "behind": {"causal": True, "w1": 4, "q_offset": -6},
    "gone": {"w1": 3, "w2": 3, "q_offset": 25},
}


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_windows(case: str, tiling: str) -> None:
    options = WINDOWS[case]
    p = problem(19, 19, 21) if options.get("q_offset") != 25 else problem(5, 19, 21)
    fits = case != "causal" or tiling == "rows"
    check(p, tiling, backward=fits, **options)


@pytest.mark.parametrize("n", (17, 33))
@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_longer_windows_have_blocks_without_a_mask(n: int, tiling: str) -> None:
    check(problem(n, n, 60), tiling, causal=True, w1=4, w2=40, q_offset=60 - n)


@pytest.mark.parametrize("causal", (False, True))
def test_windows_of_many_rows(causal: bool) -> None:
    """A block of keys meets whole tiles of rows inside its window, and some at either rim."""
    check(problem(24, 24, 24, heads=(4, 1)), "packed", causal=causal, w1=10, w2=11)


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 2)])
@pytest.mark.parametrize("tiling", TILINGS)
def test_grouped_heads(heads: tuple[int, int], tiling: str) -> None:
    """Groups of 3 do not divide the tile: its first and last query are in two tiles."""
    check(problem(3, 4, 5, heads=heads, batch=2), tiling)
    check(problem(7, 7, 7, heads=heads), tiling, causal=True, w1=2, w2=6)


def float_mask(*shape: int) -> torch.Tensor:
    """-inf in a fifth of the places and the whole row 1."""
    mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -INF)
    if shape[2] > 1:
        mask[:, :, 1] = -INF
    return mask


MASKS = {
    "full": ((2, 2, 9, 4), (2, 2, 9, 19)),
    "padding": ((2, 1, 1, 4), (2, 1, 1, 19)),
    "of heads": ((1, 2, 1, 4), (1, 2, 1, 19)),
    "shared": ((1, 1, 9, 4), (1, 1, 9, 19)),
    "first": ((2, 1, 9, 4), None),
    "second": (None, (1, 2, 9, 19)),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("tiling", TILINGS)
def test_masks(case: str, tiling: str) -> None:
    """Additive masks with gradients; row 1 without any valid triple."""
    masks = [None if shape is None else float_mask(*shape) for shape in MASKS[case]]
    p = problem(9, 4, 19, heads=(2, 1), batch=2)._replace(mask1=masks[0], mask2=masks[1])
    options = {"causal": True, "w1": 6, "w2": 8, "q_offset": 3} if case == "full" else {}
    check(p, tiling, **options)


def test_masks_of_other_strides() -> None:
    mask1 = float_mask(1, 1, 6, 12).transpose(2, 3)
    mask2 = torch.randn(1, 1, 1, 7).expand(2, 3, 12, 7)
    p = problem(12, 6, 7, heads=(3, 3), batch=2)._replace(mask1=mask1, mask2=mask2)
    check(p, "rows", backward=False)
    check(p, "pairs", backward=False)


@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_rows_without_a_valid_triple(tiling: str) -> None:
    """Output 0, lse -inf, gradients 0, never NaN, also where the mask is finite but immense."""
    for dead in (-INF, torch.finfo(torch.float32).min):
        p = problem(5, 6, 7)
        mask1 = torch.zeros(1, 1, 5, 6)
        mask1[:, :, 2] = dead
        p = p._replace(mask1=mask1, mask2=torch.zeros(1, 1, 5, 7))
        out, lse = K.tensor_attention_fwd(*p, scale=1.0, tiling=tiling, config=SMALL)
        assert out[:, :, 2].eq(0).all() and lse[:, :, 2].eq(-INF).all()
        assert out[:, :, [0, 1, 3, 4]].ne(0).all()
        got = K.tensor_attention_bwd(
            torch.ones_like(out), torch.ones_like(lse), *p, out, lse, scale=1.0, tiling=tiling,
            config=SMALL,
        )  # fmt: skip
        assert all(g.isfinite().all() for g in got)
        assert got[0][:, :, 2].eq(0).all() and got[5][:, :, 2].eq(0).all()
        rest = [0, 1, 3, 4]
        sub = p._replace(q=p.q[:, :, rest], mask1=mask1[:, :, rest], mask2=p.mask2[:, :, rest])
        one, two = K.tensor_attention_fwd(*sub, scale=1.0, tiling=tiling, config=SMALL)
        torch.testing.assert_close(one, out[:, :, rest], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(two, lse[:, :, rest], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_large_logits(tiling: str) -> None:
    """Logits to 1e4 of either sign: a float32 one is off by 1e-3, and so is its exponential."""
    p = problem(6, 7, 18, d=4)
    top = torch.einsum("bhil,bhjl,bhkl->bhijk", *p[:3]).abs().max().item()
    check(p, tiling, scale=1e4 / top, tol=2e-3, grad_tol=2.0)
    # All of them far below 0, with lengths that leave rows of padding in every tile.
    low = p._replace(q=p.q.abs(), k1=p.k1.abs(), k2=-p.k2.abs())
    check(low, tiling, scale=1e4 / top, tol=2e-3, grad_tol=2.0)


@pytest.mark.parametrize(
    "dtype, bits",
    [(torch.float32, b) for b in (50, 100, 300)] + [(torch.float16, b) for b in (10, 40)],
)
@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_a_far_key_outweighs_those_nearby(tiling: str, dtype: torch.dtype, bits: int) -> None:
    """By 2^bits: the forward looks at nearby keys first, and again at all if it must."""
    p = problem(5, 45, 45, d=4, dtype=dtype)
    for t in (p.q, p.k1):
        t.abs_().add_(0.5)
    p.k2.mul_(0.1)[:, :, 3] = bits * math.log(2) / 4
    windows = {"causal": True, "w1": 20, "w2": 44, "q_offset": 40, "scale": 1.0}
    p = p._replace(v2=p.v2.index_fill(2, torch.tensor([3]), 1e3))
    check(p, tiling, backward=False, **windows)
    # The sums fit into float32, their products with the values do not.
    if dtype == torch.float32:
        check(p._replace(v2=p.v2 * 1e27), tiling, backward=False, **windows)


@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_nearby_keys_are_hidden(tiling: str) -> None:
    """What is left of the logits is far below 0."""
    p = problem(5, 20, 45, d=4)
    p = p._replace(q=p.q.abs(), k1=p.k1.abs() + 1, k2=-p.k2.abs() - 1)
    mask = torch.zeros(1, 1, 5, 45)
    mask[..., :20] = -INF
    check(p._replace(mask2=mask), tiling, backward=False, scale=100.0, tol=1e-3)


@pytest.mark.parametrize("causal", (False, True))
def test_bias_of_keys_and_values(causal: bool) -> None:
    """On whichever axis the second key set ends up, and with unit keys plain attention."""
    for n_2 in (3, 7):
        p = problem(5, 5, n_2)
        for tiling in ("rows", "pairs"):
            check(p, tiling, kv_bias=(0.3, 1.2), causal=causal)
    p = problem(5, 5, 5)
    zero = p._replace(k2=torch.zeros_like(p.k2), v2=torch.zeros_like(p.v2))
    out, _ = K.tensor_attention_fwd(
        *zero, scale=0.5, causal=causal, kv_bias=(1.0, 1.0), config=SMALL
    )
    want = torch.nn.functional.scaled_dot_product_attention(
        p.q, p.k1, p.v1, is_causal=causal, scale=0.5
    )
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("splits", (2, 5))
@pytest.mark.parametrize("tiling", TILINGS)
def test_splits(splits: int, tiling: str) -> None:
    """Parts of axis 1, among them empty ones."""
    p = problem(3, 19, 20, heads=(2, 1))
    check(p, tiling, splits=splits, backward=tiling != "pairs")
    mask = torch.zeros(1, 1, 5, 21)
    mask[:, :, 3] = -INF
    p = problem(5, 21, 21)._replace(mask2=mask)
    check(p, tiling, splits=splits, causal=True, w1=9, w2=12, q_offset=12)


def test_one_query() -> None:
    """Decoding: chosen tiles, one query at the end of the keys."""
    p = problem(1, 40, 37, 16, 16, heads=(2, 1))
    check(p, None, config=None)
    check(p, None, config=None, causal=True, q_offset=35, w1=7)


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("d, dv", [(64, 24), (130, 65)])
def test_default_tiles(dtype: torch.dtype, d: int, dv: int) -> None:
    p = problem(12, 12, 12, d, dv, dtype=dtype, size=0.5)
    check(p, None, config=None, causal=True)
    check(p, None, config=None, causal=True, w1=2, w2=10)


def sqnr(got: torch.Tensor, want: torch.Tensor) -> float:
    return 10 * math.log10((want**2).sum() / ((got.double() - want) ** 2).sum())


@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_bfloat16_accuracy(tiling: str) -> None:
    p = problem(20, 16, 40, 64, 64, dtype=torch.bfloat16, size=0.5)
    want, want_lse, leaves = expected(p, 1 / 8)
    how = {"scale": 1 / 8, "tiling": tiling, "config": Config(32, 32, 4, 1)}
    out, lse = K.tensor_attention_fwd(*p, **how)
    assert sqnr(out, want.detach()) >= 40
    torch.testing.assert_close(lse.double(), want_lse.detach(), rtol=0, atol=1e-3)
    dout = torch.randn(want.shape).bfloat16()
    grads = torch.autograd.grad((want * dout.double()).sum(), leaves[:5])
    got = K.tensor_attention_bwd(dout, None, *p, out, lse, **how)
    for name, one, two in zip(GRADIENTS, got, grads):
        assert sqnr(one, two) >= 35, name


def test_tilings_agree() -> None:
    p = problem(9, 9, 9, heads=(2, 1))._replace(mask1=float_mask(1, 1, 9, 9))
    options = {"scale": 0.5, "causal": True, "w1": 4, "w2": 7}
    results = []
    for tiling in TILINGS:
        how = {**options, "tiling": tiling, "config": SMALL}
        out, lse = K.tensor_attention_fwd(*p, **how)
        results.append([out, lse, *K.tensor_attention_bwd(out, lse * 0, *p, out, lse, **how)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_axes_exchanged() -> None:
    p = problem(10, 10, 10)._replace(mask2=float_mask(1, 1, 10, 10))
    other = Problem(p.q, p.k2, p.k1, p.v2, p.v1, p.mask2, p.mask1)
    one = K.tensor_attention_fwd(*p, scale=1.0, causal=True, w1=3, w2=7, config=SMALL)
    two = K.tensor_attention_fwd(*other, scale=1.0, causal=True, w1=7, w2=3, config=SMALL)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_only_what_is_wanted_is_computed() -> None:
    p = problem(5, 5, 17)._replace(mask1=torch.randn(1, 1, 5, 5))
    for tiling in ("rows", "pairs"):
        how = {"scale": 1.0, "tiling": tiling, "config": SMALL, "w1": 3, "causal": True}
        out, lse = K.tensor_attention_fwd(*p, **how)
        every = K.tensor_attention_bwd(out, None, *p, out, lse, **how)
        assert every[6] is None
        for k in range(6):
            want = [k == at for at in range(7)]
            got = K.tensor_attention_bwd(out, None, *p, out, lse, want=want, **how)
            assert [g is not None for g in got] == want
            assert torch.equal(got[k], every[k])


def test_many_heads_share_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(launch, "FULL_GRID", 4)
    p = problem(9, 9, 9, heads=(3, 3))
    check(p, "rows", causal=True)
    check(p, "pairs", causal=True, w1=3, w2=5)


def test_runs_give_the_same_bits() -> None:
    p = problem(9, 10, 18, heads=(2, 1))
    for tiling, options in (("packed", {}), ("pairs", {"w1": 2, "w2": 9})):
        runs = []
        for _ in range(2):
            how = {"scale": 1.0, "tiling": tiling, "config": SMALL, **options}
            out, lse = K.tensor_attention_fwd(*p, **how)
            runs.append([out, lse, *K.tensor_attention_bwd(out, lse, *p, out, lse, **how)[:5]])
        assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("tiling", ("rows", "pairs"))
def test_undefined_queries_keep_to_themselves(tiling: str) -> None:
    p = problem(6, 7, 8)
    p.q[0, 0, 2, 1] = NAN
    out, lse = K.tensor_attention_fwd(*p, scale=1.0, tiling=tiling, config=SMALL)
    assert out.isnan().any(3).nonzero()[:, 2].tolist() == [2]
    assert lse.isnan().nonzero()[:, 2].tolist() == [2]
    got = K.tensor_attention_bwd(
        out.nan_to_num(), None, *p, out, lse, scale=1.0, tiling=tiling, config=SMALL
    )
    assert got[0].isnan().any(3).nonzero()[:, 2].tolist() == [2]
    assert all(g.isnan().any() for g in got[1:5])


@pytest.mark.parametrize("n", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing_to_attend(n: tuple[int, int, int]) -> None:
    p = problem(*n)
    out, lse = K.tensor_attention_fwd(*p, scale=1.0)
    assert out.shape == (1, 1, n[0], 3) and out.eq(0).all() and lse.eq(-INF).all()
    got = K.tensor_attention_bwd(out, lse * 0, *p, out, lse, scale=1.0)
    for g, t in zip(got, p[:5]):
        assert g.shape == t.shape and g.eq(0).all()


# ------------------------------------------------------------------------------- choices by shape


def chosen(
    n_q: int, n: int, heads: tuple[int, int] = (8, 8), d: int = 128, **options: Any
) -> tuple[str, problems.Cost]:
    """Tiling of a bfloat16 problem, from shapes alone."""
    q = torch.empty(1, heads[0], n_q, d, dtype=torch.bfloat16)
    k = torch.empty(1, heads[1], n, d, dtype=torch.bfloat16)
    settings = {"causal": False, "w1": None, "w2": None, "q_offset": 0, **options}
    p = problems.checked_problem(q, k, k, k, k, None, None, 1.0, kv_bias=(0.0, 0.0), **settings)
    rows, pairs = (problems.choose_config(f"fwd {t}", p) for t in ("rows", "pairs"))
    return problems.choose_tiling(p, rows, pairs), problems.valid_share(p, rows, pairs)


def test_tilings_follow_the_shape() -> None:
    assert chosen(1024, 1024)[0] == "rows"
    assert chosen(1024, 1024, causal=True)[0] == "rows"
    assert chosen(1024, 1024, (64, 8), causal=True)[0] == "packed"
    windows = {"causal": True, "w1": 512, "w2": 32}
    tiling, cost = chosen(4096, 4096, **windows)
    assert tiling == "pairs"
    assert cost.pairs == pytest.approx(512 / 544, rel=1e-3)
    assert chosen(4096, 4096, (128, 1), **windows)[0] == "packed"
    assert chosen(1, 4096, causal=True, q_offset=4095)[0] == "pairs"


def test_every_type_and_width_has_tiles() -> None:
    names = {name for name, _, _ in TABLE}
    assert len(TABLE) == len(names) * 3 * 3
    for c in TABLE.values():
        assert all(n & (n - 1) == 0 for n in c[:3]) and min(c.block_m, c.block_n) >= 16


def test_arguments_are_checked() -> None:
    p = problem(4, 5, 6)
    with pytest.raises(TypeError, match="float64"):
        K.tensor_attention_fwd(*(t.double() for t in p[:5]), scale=1.0)
    with pytest.raises(TypeError, match="q and k2 need one dtype"):
        K.tensor_attention_fwd(p.q, p.k1, p.k2.half(), p.v1, p.v2, scale=1.0)
    with pytest.raises(ValueError, match=r"v2 must have shape \(1, 1, 6, 3\)"):
        K.tensor_attention_fwd(p.q, p.k1, p.k2, p.v1, p.v1, scale=1.0)
    with pytest.raises(ValueError, match="windows must be positive"):
        K.tensor_attention_fwd(*p, scale=1.0, w1=0)
    with pytest.raises(ValueError, match="k1 needs 4 dimensions"):
        K.tensor_attention_fwd(p.q, p.k1[0], *p[2:], scale=1.0)
    with pytest.raises(ValueError, match="which does not divide"):
        K.tensor_attention_fwd(*problem(3, 3, 3, heads=(4, 3)), scale=1.0)
    with pytest.raises(ValueError, match="up to 256"):
        K.tensor_attention_fwd(*problem(2, 2, 2, 300, 3), scale=1.0)
    with pytest.raises(TypeError, match="mask1 must be float32"):
        K.tensor_attention_fwd(*p[:5], torch.ones(1, 1, 4, 5).bool(), scale=1.0)
    with pytest.raises(ValueError, match="mask2 .* does not broadcast"):
        K.tensor_attention_fwd(*p[:5], None, torch.ones(1, 1, 4, 5), scale=1.0)
    out, lse = K.tensor_attention_fwd(*p, scale=1.0)
    with pytest.raises(ValueError, match="dlse must have shape"):
        K.tensor_attention_bwd(out, lse[0], *p, out, lse, scale=1.0)
    with pytest.raises(ValueError, match="a window of 20 does not fit"):
        p = problem(20, 20, 20)
        out, lse = K.tensor_attention_fwd(*p, scale=1.0)
        K.tensor_attention_bwd(out, lse, *p, out, lse, scale=1.0, tiling="pairs", config=SMALL)
