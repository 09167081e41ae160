"""Addresses of problems beyond 2^31 elements, and results that no order of programs changes.

The first holds no data (access_recorder.addresses): 32-bit arithmetic would end outside a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from access_recorder import addresses, recording
from check_linear_cross_entropy import SMALL as SMALL_LINEAR
from check_linear_cross_entropy import problem as linear_problem
from check_similarity_softmax import small as small_pairs
from check_tensor_attention import SMALL
from check_tensor_attention import problem as attention_problem
from check_tensor_attention_lowrank import SMALL as SMALL_LOWRANK
from check_tensor_attention_lowrank import coefficients
from check_tensor_attention_lowrank import problem as lowrank_problem

from pyloss.kernels import linear_cross_entropy as linear
from pyloss.kernels import similarity_softmax as pairs
from pyloss.kernels import tensor_attention as attention
from pyloss.kernels.tensor_attention_lowrank import scan, whole

HALF = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_statistics() -> None:
    n, v, d = 2**20, 2**12, 2**12  # x of 2^32 elements
    linear.linear_softmax_stats(
        meta(n, d, dtype=HALF), meta(v, d, dtype=HALF), None, meta(n, dtype=torch.int64), None,
        config=linear.Config(128, 128, 2048, 8, 1), splits=32,
    )  # fmt: skip


def linear_gradient() -> None:
    n, v, d = 2**17, 2**15 + 5, 64  # dz of 2^32 elements
    x, w, dz = meta(n, d, dtype=HALF), meta(v, d, dtype=HALF), meta(n, v + 3, dtype=HALF)
    target, rows = meta(n, dtype=torch.int64), [meta(n) for _ in range(4)]
    config = linear.Config(128, 128, 64, 8, 1)
    dz, _ = linear.linear_softmax_grad(
        x, w, None, target, None, linear.GradCoeffs(*rows), dz, config=config
    )  # fmt: skip
    linear.masked_matmul_nn(
        dz, w, None, None, meta(n, d), config=linear.Config(128, 64, 2**12, 8, 1)
    )
    linear.masked_matmul_tn(
        dz, x, None, None, meta(v, d), config=linear.Config(64, 64, 2**13, 8, 1)
    )
    linear.column_sums(dz[: 2**12], None, None, meta(v))


def linear_weight() -> None:
    v, d = 2**20, 2**12  # W of 2^32 elements
    config = linear.Config(16, 128, 4096, 8, 1)
    x, w = meta(16, d, dtype=HALF), meta(v, d, dtype=HALF)
    linear.linear_softmax_stats(x, w, None, None, None, config=config, splits=2**13)
    rows = [meta(16) for _ in range(4)]
    dz = meta(16, 2**12, dtype=HALF)
    linear.linear_softmax_grad(
        x, w, None, None, None, linear.GradCoeffs(*rows), dz, v0=v - 2**12, config=config
    )  # fmt: skip
    linear.masked_matmul_tn(
        meta(16, v, dtype=HALF), x, None, None, meta(v, d), config=linear.Config(128, 128, 16, 8, 1)
    )  # fmt: skip


def attention_windows(tiling: str, masked: bool = False, **options: Any) -> Callable[[], None]:
    def call() -> None:
        b, h, n, d = 1, 33, 2**20, 64  # q of more than 2^31 elements
        tensors = [meta(b, h, n, d, dtype=HALF) for _ in range(5)]
        masks = [meta(1, h, 1, n) if masked else None for _ in range(2)]
        how = {"scale": 1.0, "causal": True, "w1": 2, "w2": 8, "tiling": tiling, "config": SMALL}
        out, lse = attention.tensor_attention_fwd(*tensors, *masks, **how)
        attention.tensor_attention_bwd(
            out, None, *tensors, *masks, out, lse, **how, want=(True,) * 5 + (False,) * 2
        )  # fmt: skip

    return call


def attention_mask() -> None:
    n = 2**16 + 16  # masks of 2^32 elements, and their gradients
    tensors = [meta(1, 1, n, 16, dtype=HALF) for _ in range(5)]
    masks = [meta(1, 1, n, n) for _ in range(2)]
    how = {"scale": 1.0, "causal": True, "w1": 2, "w2": 8, "config": SMALL}
    out, lse = attention.tensor_attention_fwd(*tensors, *masks, **how)
    attention.tensor_attention_bwd(out, lse, *tensors, *masks, out, lse, **how)


def lowrank_long() -> None:
    b, h, n, d = 2, 64, 2**20, 16  # q of 2^31 elements
    q, k = meta(b, h, n, d), meta(b, h, n, d)
    config = whole.Config(16, 256, 4)
    out, lse, y, states = whole.tensor_attention_lowrank_fwd(
        q, [k], [k], [None], [1.0, 1.0], 0.0, config, config
    )
    whole.tensor_attention_lowrank_bwd(
        out, lse, q, [k], [k], [None], out, y, states, [1.0, 1.0], config, config
    )  # fmt: skip


def lowrank_causal() -> None:
    b, h, n, d = 1, 129, 2**20, 16
    q, k = meta(b, h, n, d), meta(b, h, n, d)
    settings = ([1.0, 1.0], 0.0, True, (0,), 0)
    config = whole.Config(16, 32, 4)
    scan.tensor_attention_lowrank_scan_fwd(
        q, [k], [k], [None], *settings, scan.Config(1, 256), config
    )  # fmt: skip


def pairs_of(n: int, m: int, d: int) -> tuple:
    p = pairs.Pairs(
        meta(n), 1, None, meta(n, dtype=torch.int64), meta(n, dtype=torch.int32),
        meta(m, dtype=torch.int32), 0, n, m,
    )  # fmt: skip
    queries, keys = (meta(count, d, dtype=HALF) for count in (n, m))
    return queries, keys, p, pairs.Kind(True, 1, False, False)


def coeffs_of(n: int, m: int) -> pairs.Coeffs:
    return pairs.Coeffs(*(meta(n) for _ in range(3)), *(meta(m) for _ in range(3)))


def pairs_statistics() -> None:
    config = pairs.Config(128, 128, 2048, 8, 1)
    for n, m in ((2**20, 2**12), (2**12, 2**20)):  # queries or keys of 2^32 elements
        pairs.pair_statistics(
            *pairs_of(n, m, 2**12), columns=True, mean=True, config=config, splits=2**13
        )


def pairs_sweeps() -> None:
    config = pairs.Config(128, 128, 128, 8, 1)
    for n, m in ((2**25, 2**7), (2**7, 2**25)):
        for of in (pairs.QUERIES, pairs.KEYS):
            pairs.pair_sweep(
                *pairs_of(n, m, 128), coeffs_of(n, m), of, want_scale=of == pairs.QUERIES,
                config=config, splits=2**18,
            )  # fmt: skip


def pairs_blocks() -> None:
    n, m = 2**17, 2**15 + 5  # a gradient of 2^32 elements
    pairs.pair_gradient_block(
        *pairs_of(n, m, 64), coeffs_of(n, m), pairs.QUERIES, meta(n, m + 3, dtype=HALF), 0,
        want_scale=True, config=pairs.Config(128, 128, 64, 8, 1),
    )  # fmt: skip


CALLS = {
    "linear statistics": linear_statistics,
    "linear gradient": linear_gradient,
    "linear weight": linear_weight,
    "attention rows": attention_windows("rows"),
    "attention pairs": attention_windows("pairs", masked=True),
    "attention mask": attention_mask,
    "pairs statistics": pairs_statistics,
    "pairs sweeps": pairs_sweeps,
    "pairs blocks": pairs_blocks,
    "lowrank": lowrank_long,
    "lowrank causal": lowrank_causal,
}


@pytest.mark.parametrize("name", CALLS)
def test_addresses_of_large_problems(name: str) -> None:
    with addresses(most=1) as state:
        CALLS[name]()
    assert state.launches


# ------------------------------------------------------------------------------ orders


def linear_results() -> list[torch.Tensor]:
    p = linear_problem(37, 70, 19)
    n_valid = torch.tensor(30)
    stats = linear.linear_softmax_stats(
        *p, n_valid, want_entropy=True, want_sum=True, config=SMALL_LINEAR, splits=3
    )  # fmt: skip
    coeffs = linear.GradCoeffs(stats.m, *(torch.rand(37) for _ in range(3)))
    dz, mask = linear.linear_softmax_grad(
        *p, n_valid, coeffs, threshold=torch.full((37,), 0.3), config=SMALL_LINEAR
    )  # fmt: skip
    dx, dw, db = torch.zeros(37, 19), torch.zeros(70, 19), torch.zeros(70)
    linear.masked_matmul_nn(dz, p.weight, mask, n_valid, dx, config=SMALL_LINEAR)
    linear.masked_matmul_tn(dz, p.x, mask, n_valid, dw, config=SMALL_LINEAR)
    linear.column_sums(dz, mask, n_valid, db)
    return [*stats, dx, dw, db]


def attention_results(tiling: str) -> Callable[[], list[torch.Tensor]]:
    def call() -> list[torch.Tensor]:
        p = attention_problem(17, 17, 18, heads=(2, 1))
        p = p._replace(mask1=torch.randn(1, 1, 17, 17))
        how = {"scale": 0.5, "causal": True, "w1": 2, "w2": 9, "tiling": tiling, "config": SMALL}
        out, lse = attention.tensor_attention_fwd(*p, **how)
        return [out, lse, *attention.tensor_attention_bwd(out, lse, *p, out, lse, **how)]

    return call


def lowrank_results(causal: bool) -> Callable[[], list[torch.Tensor]]:
    def call() -> list[torch.Tensor]:
        q, keys, values, masks = lowrank_problem(21, (21, 21), 4, 3, (2, 1), 1, (1,))
        c = coefficients(2, 4)
        small = (SMALL_LOWRANK, SMALL_LOWRANK)
        if not causal:
            out, lse, y, states = whole.tensor_attention_lowrank_fwd(
                q, keys, values, masks, c, 0.0, *small
            )
            found = whole.tensor_attention_lowrank_bwd(
                out, lse, q, keys, values, masks, out, y, states, c, *small
            )
        else:
            tiles = scan.Config(1, 4)
            band = (True, (0, 5), 0)
            out, lse, y = scan.tensor_attention_lowrank_scan_fwd(
                q, keys, values, masks, c, 0.0, *band, tiles, SMALL_LOWRANK
            )
            found = scan.tensor_attention_lowrank_scan_bwd(
                out, lse, q, keys, values, masks, out, y, c, *band, tiles, tiles, *small
            )
        return [out, lse, y, found[0], *found[1], *found[2]]

    return call


def pairs_results() -> list[torch.Tensor]:
    queries, keys = torch.randn(37, 19), torch.randn(50, 19)
    numbers = torch.rand(37), torch.rand(50)
    p = pairs.Pairs(numbers[0], 1, None, torch.arange(37), None, None, 2, 37, 50)
    args = (queries, keys, p, pairs.Kind(True, 0, False, False))
    config = {"config": small_pairs(19)}
    found = pairs.pair_statistics(*args, columns=True, mean=True, splits=2, **config)
    c = pairs.Coeffs(*3 * numbers[:1], *3 * numbers[1:])
    dz = torch.empty(48, 56)
    block = pairs.pair_gradient_block(*args, c, pairs.QUERIES, dz, 0, want_scale=True, **config)
    swept = [
        pairs.pair_sweep(*args, c, of, want_scale=of == pairs.QUERIES, splits=2, **config)
        for of in (pairs.QUERIES, pairs.KEYS)
    ]
    return [*found, *block, *swept[0], *swept[1]]


RESULTS = {
    "linear": linear_results,
    "pairs": pairs_results,
    "attention rows": attention_results("rows"),
    "attention pairs": attention_results("pairs"),
    "lowrank": lowrank_results(False),
    "lowrank causal": lowrank_results(True),
}


@pytest.mark.parametrize("name", RESULTS)
def test_no_order_of_programs_changes_a_bit(name: str) -> None:
    found = []
    for order in ("forward", "reverse", "random"):
        torch.manual_seed(3)
        with recording(order) as state:
            found.append(RESULTS[name]())
        assert state.launches
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
