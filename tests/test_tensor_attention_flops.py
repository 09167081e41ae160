"""What torch.utils.flop_counter counts for tensor attention, and the count of tuples behind it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import pyloss
from pyloss.functional import tensor_attention_cost, tensor_attention_n
from pyloss.ops.tensor_attention.cost import tuples

B, H, N, D, DV = 2, 3, 6, 4, 5


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def drawn(frozen: str = "", **kw) -> list[torch.Tensor]:
    widths = dict(q=D, k1=D, k2=D, v1=DV, v2=DV)
    return [torch.randn(B, H, N, w, requires_grad=k not in frozen.split(), **kw)
            for k, w in widths.items()]  # fmt: skip


def test_tuples_are_those_of_a_loop():
    draw = random.Random(0)
    for _ in range(1000):
        order, n_q, offset = draw.randint(1, 3), draw.randint(0, 8), draw.randint(-9, 11)
        lengths = [draw.randint(0, 8) for _ in range(order)]
        windows = [draw.choice([0, 1, 2, 3, 7]) for _ in range(order)]
        causal = draw.random() < 0.5

        def sees(p, j, w, causal=causal):
            return (not causal or j <= p) and (not w or p - j < w and (causal or j - p < w))

        want = sum(
            math.prod(sum(sees(p, j, w) for j in range(n)) for n, w in zip(lengths, windows))
            for p in range(offset, offset + n_q)
        )
        assert tuples(n_q, lengths, causal, windows, offset) == want


def test_tuples_of_any_length():
    n = 10**9
    assert tuples(n, (n, n), True, (0, 0), 0) == n * (n + 1) * (2 * n + 1) // 6
    assert tuples(n, (n, n), True, (32, 512), 0) == 32 * 512 * (n - 511) + sum(
        min(i, 32) * i for i in range(512)
    )


@pytest.mark.parametrize("band", [{}, dict(is_causal=True), dict(window=(2, 3)),
                                  dict(window=2, is_causal=False)])  # fmt: skip
def test_exact(band):
    tensors, sizes = drawn(), (B, H, N, N, N, D, DV)
    causal = dict(window=band.get("window"), is_causal=band.get("is_causal"))
    forward, both = (
        tensor_attention_cost(sizes, direction=step, **causal).flop for step in ("forward", "both")
    )

    def step():
        return pyloss.tensor_attention(*tensors, **band).sum()

    with torch.no_grad():
        assert counted(step) == forward
    assert counted(lambda: step().backward()) == both


def test_frozen_tensors_save_their_products():
    one = 2 * B * H * N**3

    def call(frozen):
        return counted(lambda: pyloss.tensor_attention(*drawn(frozen)).sum().backward())

    forward = one * (D + DV)
    assert call("") == forward + one * (3 * D + 2 * DV)
    assert call("q") == forward + one * (2 * D + 2 * DV)
    assert call("k1 k2") == forward + one * (2 * D + 2 * DV)
    assert call("v1") == call("")
    assert call("v1 v2") == forward + one * (3 * D + DV)
    assert call("q k1 k2") == forward + one * (D + DV)


def test_order_three_counts_its_parts():
    q, k1, k2, v1, v2 = drawn()
    found = counted(lambda: tensor_attention_n(q, [k1, k2, k1], [v1, v2, v1]))
    assert found == 2 * B * H * N**4 * (D + DV)


@pytest.mark.parametrize("causal", [False, True])
def test_low_rank(causal):
    q, *rest = (t.detach() / 8 for t in drawn())
    q.requires_grad_()
    options = dict(method="lowrank", degree=3, check="none", is_causal=causal)
    one = 2 * B * H * 3 * N * math.comb(D + 3, 3) * (DV + 1)

    def step():
        return pyloss.tensor_attention(q, *rest, **options).sum()

    with torch.no_grad():
        assert counted(step) == one
    assert counted(lambda: step().backward()) == 3 * one


def test_without_numbers():
    with FakeTensorMode():
        found = counted(lambda: pyloss.tensor_attention(*drawn(), window=2).sum().backward())
    assert found == tensor_attention_cost((B, H, N, N, N, D, DV), 2, "both").flop
