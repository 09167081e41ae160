"""Distributionally robust losses: limits, weights, averages. What every loss promises:
tests/specs/dro.py; processes: tests/test_contrastive_distributed.py."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from pyloss.functional import kl_dro_loss
from pyloss.nn import KLDROLoss

F64 = torch.float64


def losses(count: int = 50, dtype: torch.dtype = F64) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=g, dtype=F64).abs().to(dtype).requires_grad_()


@pytest.mark.parametrize("r", [0.05, 1.0, 20.0])
def test_weights_are_the_softmax_and_the_maximum(r: float) -> None:
    x = losses()
    value, log_u = kl_dro_loss(x, r)
    (w,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(w, (x.detach() / r).softmax(0))
    # The definition: no weights give more.
    torch.testing.assert_close(value, (w * x - r * torch.xlogy(w, 50 * w)).sum())
    others = torch.rand(100, 50, dtype=F64, generator=torch.Generator().manual_seed(1))
    others = others / others.sum(1, keepdim=True)
    assert ((others * x - r * torch.xlogy(others, 50 * others)).sum(1) <= value).all()
    torch.testing.assert_close(log_u, value.detach() / r)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_large_r_is_the_mean_and_small_r_the_maximum(dtype: torch.dtype) -> None:
    x = losses(1000, dtype)
    value, _ = kl_dro_loss(x, 1e4)
    # lse - log B would be exact to 1e-3 in float32
    torch.testing.assert_close(value, x.mean(), rtol=1e-3, atol=0)
    exact = 1e4 * (x.double() / 1e4).exp().mean().log()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    (w,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(w, torch.full_like(w, 1e-3), rtol=1e-3, atol=0)
    value, _ = kl_dro_loss(x, 1e-4)
    torch.testing.assert_close(value, x.max(), rtol=0, atol=1e-4 * math.log(1000) + 1e-6)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_a_constant_more_is_a_constant_more() -> None:
    x = losses()
    torch.testing.assert_close(kl_dro_loss(x + 7, 0.3)[0], kl_dro_loss(x, 0.3)[0] + 7)
    far = kl_dro_loss(x.detach() + 1e4, 0.01)[0]  # e^1000000
    torch.testing.assert_close(far, kl_dro_loss(x, 0.01)[0].detach() + 1e4)


def test_infinite_losses() -> None:
    x = losses().detach()
    assert kl_dro_loss(torch.cat([x, x.new_tensor([math.inf])]))[0] == math.inf
    few = kl_dro_loss(torch.cat([x, x.new_tensor([-math.inf])]))[0]
    torch.testing.assert_close(few, kl_dro_loss(x)[0] + math.log(50 / 51))


def test_average_converges_to_the_weights_of_the_data_set() -> None:
    """With eta -> 0 the batches' gradients add up to that of all losses."""
    x = losses(64)
    exact = (x.detach() / 0.5).softmax(0)
    module = KLDROLoss(0.5, eta=0.02).double()
    g = torch.Generator().manual_seed(2)
    for _ in range(400):
        module(x.detach()[torch.randperm(64, generator=g)[:8]])
    batches = torch.randperm(64, generator=g).view(8, 8)
    module.eval()
    module.eta = 1e-9
    total = sum(module(x[i]) for i in batches) / 8
    (found,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    # Batches of 8 by themselves are far from it.
    (alone,) = torch.autograd.grad(sum(kl_dro_loss(x[i], 0.5)[0] for i in batches) / 8, x)
    assert (alone / exact - 1).abs().max() > 0.3


def test_state_of_the_module() -> None:
    module, x = KLDROLoss(0.5, eta=0.3), losses(dtype=torch.float32).detach()
    assert module.log_u == -math.inf
    first = kl_dro_loss(x, 0.5)[1]
    module(x)
    torch.testing.assert_close(module.log_u, first)
    module(2 * x)
    second = kl_dro_loss(2 * x, 0.5, log_u=first, eta=0.3)[1]
    torch.testing.assert_close(module.log_u, second)
    for bad in (x + math.nan, x + math.inf, x[:0]):  # the loss shows it, and the average stays
        assert not module(bad).isfinite()
    module.eval()
    module(5 * x)
    torch.testing.assert_close(module.log_u, second)

    module.half()
    assert module.log_u.dtype == torch.float32
    clone = pickle.loads(pickle.dumps(module))
    fresh = KLDROLoss(0.5, eta=0.3).eval()
    fresh.load_state_dict(module.state_dict())
    for twin in (clone, fresh, copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x)) and repr(twin) == repr(module)
    assert "r=0.5, eta=0.3" in repr(module)


def test_compiled_module() -> None:
    module, x = KLDROLoss(0.5, eta=0.3), losses(dtype=torch.float32)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for factor in (1, 2):
        found, expected = compiled(factor * x), twin(factor * x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (found, expected)))
    torch.testing.assert_close(module.log_u, twin.log_u)
