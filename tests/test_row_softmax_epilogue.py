"""The two epilogues of the row losses agree.

They stand in C++ (csrc/common/row_softmax.h) for the row-softmax kernels, and in torch operations
(ops/row_softmax/epilogue.py) for the tiles and the vocabulary shards.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from pyloss.ops import row_softmax as op
from pyloss.ops.row_softmax.epilogue import LOSSES, differentiable_epilogue, epilogue, transform

CODES = {loss: op.Codes(op.INDEX, -100, loss, op.REDUCTIONS["none"], 0) for loss in LOSSES}


def random_options(seed: int) -> tuple[op.Options, int]:
    r = random.Random(seed)
    loss = r.choice(list(LOSSES))
    taus = (0.0, 1.0, 2.0, 1.0 + 1e-9, r.uniform(0.0, 3.0))
    return op.Options(
        logit_scale=r.choice((1.0, r.uniform(-2.0, 2.0))),
        softcap=r.choice((0.0, r.uniform(1.0, 20.0))),
        temperature=r.choice((1.0, r.uniform(0.3, 3.0))),
        tau=1.0 if loss != op.COMP_SUM else r.choice(taus),
        max_nll=r.choice((math.inf, r.uniform(0.05, 3.0))),
        poly1=r.uniform(-1.0, 3.0),
        relaxation=r.uniform(0.05, 0.9),
        offset=r.uniform(0.0, 2.0),
        gamma=0.0 if loss != op.FOCAL else r.choice((1.0, 2.0, r.uniform(0.3, 4.0))),
    ), loss


@pytest.mark.parametrize("seed", range(60))
def test_both_epilogues_agree(seed: int) -> None:
    o, loss = random_options(seed)
    # Two classes: every nll from nearly 0 to large.
    gap = torch.linspace(-25.0, 25.0, 41, dtype=torch.float64)
    x = torch.stack([gap, torch.zeros_like(gap)], 1).requires_grad_()
    y = torch.zeros(len(gap), dtype=torch.int64)
    rows, extras, _ = op.row_softmax(
        x, y, None, None, None, None, o, CODES[loss], x.dtype, op.WANT_EXTRAS, False
    )
    lse, nll = extras[0], -extras[1]
    zy = (lse - nll).detach()
    by = transform(o)
    torch.testing.assert_close(by.value(x.detach()[:, 0]), zy, rtol=1e-12, atol=1e-12)

    f = epilogue(o, loss, nll.detach())
    torch.testing.assert_close(f.value, rows.detach(), rtol=1e-12, atol=0)
    (dx,) = torch.autograd.grad(rows.sum(), x)
    # dnll/dz_y = -(1 - p_y)
    want = -f.slope * -torch.expm1(-nll.detach()) * by.slope(zy)
    torch.testing.assert_close(dx[:, 0], want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("loss", CODES)
def test_a_certain_and_an_impossible_label(loss: int) -> None:
    o = op.Options(gamma=2.0) if loss == op.FOCAL else op.Options(tau=1.5, relaxation=0.2)
    x = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.int64)
    rows, *_ = op.row_softmax(x, y, *[None] * 4, o, CODES[loss], x.dtype, 0, False)
    found = epilogue(o, loss, torch.tensor([0.0, math.inf], dtype=torch.float64)).value
    assert torch.equal(found, rows)


@pytest.mark.parametrize("seed", range(10))
def test_the_differentiable_form(seed: int) -> None:
    o, loss = random_options(seed)
    nll = torch.linspace(0.01, 30.0, 50, dtype=torch.float64).requires_grad_()
    value = differentiable_epilogue(o, loss, nll)
    f = epilogue(o, loss, nll.detach())
    assert torch.equal(value, f.value)
    assert torch.equal(torch.autograd.grad(value.sum(), nll)[0], f.slope)


def test_a_coefficient_of_zero_hides_an_infinite_slope() -> None:
    nll = torch.tensor([1.0, math.inf]).requires_grad_()
    value = differentiable_epilogue(op.Options(tau=0.0), op.COMP_SUM, nll)
    (g,) = torch.autograd.grad(value, nll, torch.tensor([1.0, 0.0]))
    assert g.isfinite().all() and g[1] == 0
