"""SogCLR and iSogCLR: what the averages and temperatures of a data set come to. What every loss
promises: tests/specs/sogclr.py; processes: tests/test_contrastive_distributed.py."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from specs.sogclr import sample, sogclr_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyloss.functional import sogclr_loss
from pyloss.nn import ISogCLRLoss, SogCLRLoss

F64 = torch.float64


def features(count: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    """Two views, (2, count, dim), normalised."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(count, dim, generator=g, dtype=F64)
    return F.normalize(base + 0.3 * torch.randn(2, count, dim, generator=g, dtype=F64), dim=-1)


def exact(z: torch.Tensor, tau) -> tuple[torch.Tensor, torch.Tensor]:
    """(log g, KL of the weights of the negatives from uniform) of each sample, of all others."""
    count = z.shape[1]
    every = z.flatten(0, 1)
    tau = torch.as_tensor(tau, dtype=F64).expand(count).repeat(2)
    h = every @ every.mT - (z[0] * z[1]).sum(-1).repeat(2).unsqueeze(1)
    out = torch.eye(count, dtype=torch.bool).repeat(2, 2)
    logits = (h / tau.unsqueeze(1)).masked_fill(out, -math.inf)
    p = logits.softmax(1)
    log_g = logits.logsumexp(1) - math.log(2 * count - 2)
    kl = (p * torch.where(out, 0.0, logits)).sum(1) - log_g
    log_g = log_g.view(2, count).logsumexp(0) - math.log(2)
    return log_g, kl.view(2, count).mean(0)


@pytest.mark.parametrize("bimodal", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_is_the_authors_surrogate(bimodal: bool, reduction: str) -> None:
    given = sample(5, bimodal=bimodal, gamma=0.3, rho=0.2, reduction=reduction).arguments
    loss, stats = sogclr_loss(**given)
    expected = sogclr_reference(**given)
    for found, theirs in zip((loss, *stats), expected):
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-11)


def test_gamma_1_is_the_loss_of_the_batch() -> None:
    z = features(6).requires_grad_()
    tau = 0.1
    module = SogCLRLoss(50, tau, gamma=1.0, normalize=False).double()
    module.logu.uniform_()
    (found,) = torch.autograd.grad(module(*z, torch.arange(6)), z)
    every = z.flatten(0, 1)
    s = every @ every.mT
    out = torch.eye(6, dtype=torch.bool).repeat(2, 2)
    each = tau * torch.logsumexp((s / tau).masked_fill(out, -math.inf), 1) - tau * math.log(10)
    value = (each - (z[0] * z[1]).sum(-1).repeat(2)).sum() / 6
    torch.testing.assert_close(module.last_value, value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(value, z)[0], rtol=1e-9, atol=1e-14)


def test_a_small_temperature_does_not_overflow() -> None:
    """exp(1 / 0.001) is infinite in every dtype."""
    z = features(8).float().requires_grad_()
    module = SogCLRLoss(8, 0.001, center_positive=False)
    for _ in range(3):
        module(*z, torch.arange(8)).backward()
    assert module.logu.isfinite().all() and module.logu.max() > 500 and z.grad.isfinite().all()


def test_averages_converge_geometrically() -> None:
    z, index = features(10), torch.arange(10)
    module = SogCLRLoss(10, 0.3, gamma=0.3).double()
    module.logu.zero_()  # not the first visit
    target = exact(z, 0.3)[0].exp()
    errors = []
    for _ in range(6):
        errors.append((module.logu.exp() - target).abs())
        module(*z, index)
    for before, after in zip(errors, errors[1:]):
        torch.testing.assert_close(after / before, torch.full((10,), 0.7, dtype=F64))


def test_averages_of_small_batches_are_nearer_to_those_of_all() -> None:
    count = 64
    z = features(count, seed=1)
    target = exact(z, 0.2)[0]
    module = SogCLRLoss(count, 0.2, gamma=0.1).double()
    g = torch.Generator().manual_seed(2)
    single = []
    for _ in range(200):
        index = torch.randperm(count, generator=g)[:8]
        _, stats = sogclr_loss(*z[:, index], torch.full((8,), -math.inf), temperature=0.2)
        single.append((stats.log_u - target[index]).abs().mean())
        module(*z[:, index], index)
    assert (module.logu - target).abs().mean() < 0.5 * torch.stack(single).mean()


def test_temperatures_settle_where_the_divergence_is_rho() -> None:
    z, index, rho = features(24, dim=4, seed=3), torch.arange(24), 0.5
    module = ISogCLRLoss(
        24, 0.3, tau_min=0.01, tau_max=5.0, rho=rho, eta=0.02, beta=1.0, gamma=1.0, grad_clip=None
    ).double()
    for _ in range(300):
        module(*z, index)
    assert ((module.tau > 0.01) & (module.tau < 5)).all()
    assert (exact(z, module.tau)[1] - rho).abs().max() < 1e-2


def test_frequent_samples_get_larger_temperatures() -> None:
    """80 % of the data in one dense cluster, the rest spread."""
    g = torch.Generator().manual_seed(4)
    count, dense = 40, 32
    centers = F.normalize(torch.randn(count, 16, generator=g, dtype=F64), dim=-1)
    centers[:dense] = centers[0]
    z = F.normalize(centers + 0.05 * torch.randn(2, count, 16, generator=g, dtype=F64), dim=-1)
    module = ISogCLRLoss(count, 0.2, rho=0.05, eta=0.05, gamma=0.5).double()
    for _ in range(60):
        index = torch.randperm(count, generator=g)[:20]
        module(*z[:, index], index)
    assert module.tau[:dense].mean() > 1.3 * module.tau[dense:].mean()


def test_a_sample_that_is_there_twice() -> None:
    z = features(5, seed=5)
    index = torch.tensor([7, 2, 7, 0, 7])
    module = ISogCLRLoss(9, gamma=0.4).double()
    module.logu[7] = 0.3
    start = module.logu[index].clone()
    module(*z, index)
    _, stats = sogclr_loss(*z, start, temperature=0.1, gamma=0.4, rho=0.3)
    same = index == 7
    expected = stats.log_u[same].exp().mean().log()
    torch.testing.assert_close(module.logu[7], expected)
    torch.testing.assert_close(module.logu[[2, 0]], stats.log_u[[1, 3]])
    v = 0.9 * stats.temperature_grad[same].clamp(-3, 3).mean()
    torch.testing.assert_close(module.v[7], v)
    torch.testing.assert_close(module.tau[7], (0.1 - 0.01 * v).clamp(0.05, 0.7))
    assert (module.tau[[1, 3, 4, 5, 6, 8]] == module.tau[1]).all() and module.v[1] == 0


def test_an_index_of_bytes_names_samples_of_many() -> None:
    z1, z2 = torch.randn(2, 4, 3)
    index = torch.tensor([0, 3, 100, 127], dtype=torch.int8)
    criterion = SogCLRLoss(1000)
    criterion(z1, z2, index)
    assert criterion.logu.isfinite().nonzero().squeeze(1).tolist() == index.tolist()


def test_evaluation_changes_nothing() -> None:
    module = ISogCLRLoss(6).eval()
    before = copy.deepcopy(module.state_dict())
    module(*features(6).float(), torch.arange(6))
    assert module.last_value is not None
    assert all(torch.equal(before[k], t) for k, t in module.state_dict().items())


def test_a_batch_with_nan_leaves_the_averages() -> None:
    module, index = ISogCLRLoss(6), torch.arange(6)
    z = features(6).float()
    module(*z, index)
    before = copy.deepcopy(module.state_dict())
    z[0, 2, 1] = math.nan
    assert module(*z, index).isnan()
    assert all(torch.equal(before[k], t) for k, t in module.state_dict().items())


@pytest.mark.parametrize("bimodal", [False, True])
def test_a_checkpoint_goes_on_where_it_was(bimodal: bool) -> None:
    def fresh() -> ISogCLRLoss:
        return ISogCLRLoss(
            12, rho=0.3, gamma=0.8, gamma_schedule="cosine", decay_epochs=4, bimodal=bimodal
        )

    batches = [(features(6, seed=s).float(), torch.randperm(12)[:6]) for s in range(3)]
    module, again = fresh(), fresh()
    for epoch, (z, index) in enumerate(batches[:2]):
        module.step_epoch(epoch)
        module(*z, index)
    again.load_state_dict(copy.deepcopy(module.state_dict()))
    pickled = pickle.loads(pickle.dumps(module))
    z, index = batches[2]
    expected = module(*z, index)
    for other in (again, pickled):
        assert torch.equal(other(*z, index), expected)
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), module.buffers()))
    found = module.temperature_of(torch.tensor([[index[0], index[1]]]))
    assert found.shape == ((2, 1, 2) if bimodal else (1, 2))
    found.zero_()
    assert module.tau.min() > 0  # that was a copy


def test_gamma_over_the_epochs() -> None:
    module = SogCLRLoss(2, gamma=0.2, gamma_schedule="cosine", decay_epochs=10).double()
    for epoch, gamma in ((0, 1.0), (5, 0.6), (10, 0.2), (99, 0.2)):
        module.step_epoch(epoch)
        assert math.isclose(float(module._gamma(torch.device("cpu"))), gamma, rel_tol=1e-6)
    module.step_epoch()
    assert module.epoch == 100


def test_half_precision_is_not_for_averages() -> None:
    module = ISogCLRLoss(8)
    module(*features(8).float(), torch.arange(8))
    before = copy.deepcopy(module.state_dict())
    module.half()
    assert all(torch.equal(before[k], t) for k, t in module.state_dict().items())
    assert module.double().logu.dtype == F64
    z = features(8).bfloat16()
    assert module(*z, torch.arange(8)).dtype == torch.bfloat16


def test_compiled_steps_are_those_of_eager() -> None:
    def fresh() -> ISogCLRLoss:
        return ISogCLRLoss(12, gamma_schedule="cosine", decay_epochs=3)

    module, twin = fresh(), fresh()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    frames = []
    torch._dynamo.config.error_on_recompile = True
    try:
        for epoch in range(3):
            z = features(6, seed=epoch).float().requires_grad_()
            index = torch.tensor([3, 3, 1, 2, 11, 5]) + epoch - 1
            index = index.clamp(0, 11)
            module.step_epoch(epoch)
            twin.step_epoch(epoch)
            grads = [torch.autograd.grad(m(*z, index), z)[0] for m in (module, compiled)]
            torch.testing.assert_close(*grads)
            frames.append(twin.last_value)
            torch.testing.assert_close(twin.last_value, module.last_value)
            for a, b in zip(module.buffers(), twin.buffers()):
                torch.testing.assert_close(a, b)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert len({float(v) for v in frames}) == 3


def test_the_defaults_of_two_modalities() -> None:
    module = ISogCLRLoss(5000, bimodal=True)
    found = module.temperature, module.tau_min, module.tau_max, module.rho
    assert found == (0.01, 0.005, 0.05, 6.0) and module.tau.shape == (2, 5000)


def test_memory_is_that_of_a_few_rows() -> None:
    """No matrix of similarities: of 3000 views it would have 36 MB."""
    z = torch.randn(2, 1500, 16, requires_grad=True)
    module = SogCLRLoss(2000)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Largest():
        module(*z, torch.arange(1500)).backward()
    assert largest < 2_000_000
