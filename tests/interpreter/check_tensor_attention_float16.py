"""Gradients of tensor attention in float16, whose numbers end at 6e-8 and at 65504.

A probability is about 1 / (n_1 n_2), and dS of the size of that times the upstream gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check_tensor_attention import GRADIENTS, Problem, expected, problem

from pyloss.kernels import tensor_attention as K
from pyloss.kernels.tensor_attention.table import TABLE, Config

# Roundings of A, B, P and dS to 11 bits, of which sums of many terms keep less.
TOLERANCE = 2.0**-9


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries against thousands of keys of axis 2 at a time."""
    for kernel, kind, width in TABLE:
        tile = Config(4096, 32, 4, 1) if " kv " in kernel else Config(32, 4096, 4, 1)
        monkeypatch.setitem(TABLE, (kernel, kind, width), tile)


def errors(p: Problem, size: float, tiling: str, **options: Any) -> dict[str, float]:
    """Relative rms error of each gradient, for upstream gradients of a size.

    Less what float16 takes from results below its normal numbers.
    """
    options["scale"] = p.q.shape[3] ** -0.5
    how = {"tiling": tiling}
    out, lse = K.tensor_attention_fwd(*p, **options, **how)
    want, _, leaves = expected(p, **options)
    dout = (torch.randn(want.shape) * size).half()
    dlse = torch.randn(lse.shape) * size
    grads = K.tensor_attention_bwd(dout, dlse, *p, out, lse, **options, **how)
    # The values' sums do not take part in what rounds P: out and lse are those of the forward.
    total = (want * dout.double()).sum() + (expected_lse(p, leaves, options) * dlse).sum()
    right = torch.autograd.grad(total, leaves[:5])
    found = {}
    for name, one, two in zip(GRADIENTS, grads, right):
        step = 2.0**-25 * two.numel() ** 0.5
        found[name] = (((one.double() - two).norm() - step) / two.norm()).item()
    return found


def expected_lse(p: Problem, leaves: list, options: dict) -> torch.Tensor:
    q, k1, k2 = leaves[:3]
    s = options["scale"] * torch.einsum("bhil,bhjl,bhkl->bhijk", q, k1, k2)
    return s.flatten(3).logsumexp(3)


# As many pairs of keys as 1024 and 2048 of either axis, most of them on the axis of wide tiles.
@pytest.mark.parametrize(
    "tiling, pairs, size",
    [
        ("rows", 2**20, 1.0),
        pytest.param("rows", 2**22, 100.0, marks=pytest.mark.exhaustive),  # 15 s
        ("pairs", 2**20, 1.0),
        pytest.param("pairs", 2**22, 100.0, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.usefixtures("wide_tiles")
def test_many_pairs_of_keys(pairs: int, size: float, tiling: str) -> None:
    p = problem(2, 16, pairs // 16, 4, 4, dtype=torch.float16, size=0.5)
    found = errors(p, size, tiling)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("tiling", ["rows", "pairs"])
def test_one_key_takes_all(tiling: str) -> None:
    """P = 1 and large gradients: nothing overflows."""
    p = problem(4, 5, 7, 4, 4, dtype=torch.float16)
    p.k1[:, :, 2], p.k2[:, :, 3] = 8.0, 8.0
    p.q[:] = 2.0
    p.v1.mul_(8.0), p.v2.mul_(8.0)
    out, lse = K.tensor_attention_fwd(*p, scale=1.0, tiling=tiling, config=Config(16, 16, 4, 1))
    grads = K.tensor_attention_bwd(
        torch.full_like(out, 100.0), None, *p, out, lse, scale=1.0, tiling=tiling,
        config=Config(16, 16, 4, 1),
    )  # fmt: skip
    assert all(g.isfinite().all() for g in grads[:5])
    p = problem(4, 5, 7, 4, 4, dtype=torch.float16)
    found = errors(p, 30.0, tiling)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("tiling", ["rows", "pairs"])
def test_queries_of_different_sizes(tiling: str) -> None:
    """A query's own gradient keeps its digits beside one 4000 times larger, and beside zeros."""
    p = problem(4, 16, 600, 4, 4, dtype=torch.float16)
    config, scale = Config(1024, 1024, 4, 1), 0.5
    how = {"tiling": tiling, "config": config, "scale": scale}
    out, lse = K.tensor_attention_fwd(*p, **how)
    dout = torch.randn(out.shape) * torch.tensor([1.0, 2.0**-12, 0.0, 1.0])[:, None]
    dq, *_ = K.tensor_attention_bwd(dout.half(), None, *p, out, lse, **how)
    want, _, leaves = expected(p, scale=scale)
    (right,) = torch.autograd.grad((want * dout.half().double()).sum(), leaves[:1])
    for i in (0, 1, 3):
        assert (dq[:, :, i] - right[:, :, i]).norm() < 4 * TOLERANCE * right[:, :, i].norm(), i
    assert not dq[:, :, 2].any()


def test_infinite_gradients_stay_with_their_query() -> None:
    p = problem(40, 40, 40, 4, 4, dtype=torch.float16)
    how = {"scale": 0.5, "causal": True, "w1": 3, "w2": 3, "config": Config(16, 16, 4, 1)}
    out, lse = K.tensor_attention_fwd(*p, **how)
    dout = torch.randn(out.shape).half()
    clean = K.tensor_attention_bwd(dout, None, *p, out, lse, **how)
    dout[:, :, 0] = float("inf")
    spoilt = K.tensor_attention_bwd(dout, None, *p, out, lse, **how)
    for one, two in zip(clean[:5], spoilt):
        assert torch.equal(one[:, :, 33:], two[:, :, 33:])
