"""Contrastive losses: peers, what the papers say of them, memory. What each of them promises:
tests/specs/contrastive.py."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyloss
from pyloss.functional import _contrastive, _embeddings, dcl, hard_info_nce, simple_contrastive
from pyloss.ops import _gemm

F64 = torch.float64


def features(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


# --- peers --------------------------------------------------------------------------------------


@pytest.fixture
def peers():
    return pytest.importorskip("pytorch_metric_learning.losses")


def agree(ours, theirs, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    found, expected = (torch.autograd.grad(f, leaves, retain_graph=True) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_nt_xent_of_pytorch_metric_learning(peers) -> None:
    z1, z2 = (features(12, 5, seed=s).requires_grad_() for s in (0, 1))
    theirs = peers.SelfSupervisedLoss(peers.NTXentLoss(temperature=0.2))(z1, z2)
    agree(pyloss.nt_xent(z1, z2, temperature=0.2), theirs, z1, z2)


@pytest.mark.parametrize("classes", [3, 10])  # with 10 some stand alone
def test_supervised_contrastive_of_pytorch_metric_learning(peers, classes) -> None:
    z = features(16, 5).requires_grad_()
    labels = torch.randint(classes, (16,), generator=torch.Generator().manual_seed(1))
    theirs = peers.SupConLoss(temperature=0.3)(z, labels)
    agree(pyloss.supervised_contrastive(z, labels, temperature=0.3), theirs, z)


def test_cross_entropy_of_the_matrix() -> None:
    """As open_clip and MoCo write them, on features that are normalised outside."""
    x, y = (features(8, 5, seed=s).requires_grad_() for s in (0, 1))
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits, truth = scale.exp() * u @ v.t(), torch.arange(8)
    theirs = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.t(), truth)) / 2
    agree(pyloss.nn.CLIPLoss()(u, v, scale.exp()), theirs, x, y, scale)
    queue = F.normalize(features(20, 5, seed=2), dim=1)
    logits = torch.cat([(u * v).sum(1, keepdim=True), u @ queue.t()], 1) / 0.07
    theirs = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    agree(pyloss.info_nce(x, y, queue, temperature=0.07, in_batch=False), theirs, x, y)


# --- Understanding the Behaviour of Contrastive Loss ----------------------------------------------


def of_scores(s: Tensor, temperature: float, **options) -> Tensor:
    """InfoNCE of a matrix of similarities: the keys are unit vectors."""
    keys = torch.eye(s.shape[1], dtype=s.dtype)
    return pyloss.info_nce(
        s, keys, temperature=temperature, normalize=False, reduction="none", **options
    )


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_gradients_of_similarities(temperature) -> None:
    """P_ij / T of a negative, and of the positive as much as of all negatives together."""
    s = features(6, 6).tanh().requires_grad_()
    (found,) = torch.autograd.grad(of_scores(s, temperature).sum(), s)
    p = (s / temperature).softmax(1).detach()
    expected = (p - p.diag().diag()) / temperature
    expected = expected - expected.sum(1).diag()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_penalties_are_more_even_at_higher_temperatures() -> None:
    s = features(6, 6).tanh().requires_grad_()
    entropies = []
    for temperature in (0.02, 0.07, 0.2, 0.5, 1.0, 5.0):
        (g,) = torch.autograd.grad(of_scores(s, temperature).sum(), s)
        negative = g.masked_fill(torch.eye(6, dtype=torch.bool), 0.0)
        r = negative / negative.sum(1, keepdim=True)
        entropies.append(torch.special.entr(r).sum(1))
    for low, high in zip(entropies, entropies[1:]):
        assert (low < high).all()
    assert (entropies[-1] < math.log(5)).all()


def test_limits_of_the_temperature() -> None:
    s = features(6, 6).tanh()
    diagonal, n = s.diag(), 6
    hardest = s.masked_fill(torch.eye(n, dtype=torch.bool), -math.inf).amax(1)
    low = 1e-3 * of_scores(s, 1e-3)
    torch.testing.assert_close(low, (hardest - diagonal).clamp(min=0), rtol=0, atol=1e-6)
    simple = simple_contrastive(s, torch.eye(n, dtype=F64), normalize=False, reduction="none")
    high = of_scores(s, 1e3) - math.log(n)
    torch.testing.assert_close(high, (simple + diagonal / n) / 1e3, rtol=0, atol=1e-6)


def test_all_negatives_are_hard() -> None:
    query, key = features(9, 4), features(9, 4, seed=1)
    for temperature in (0.1, torch.linspace(0.1, 1.0, 9, dtype=F64)):
        options = dict(temperature=temperature, reduction="none")
        found = hard_info_nce(query, key, hard_fraction=1.0, **options)
        assert torch.equal(found, pyloss.info_nce(query, key, **options))
    # The same by way of the selection: 8 of 8 but for a rounding of the fraction.
    assert [_contrastive.hardest_count(f, 10) for f in (1.0, 0.7, 0.3, 0.1, 0.11, 1e-9)] == [
        10, 7, 3, 1, 2, 1,
    ]  # fmt: skip


def test_of_equal_negatives_the_first_is_hard() -> None:
    """Keys 1 and 2 are one: only the first of them gets a gradient."""
    query, key = features(4, 3), features(4, 3, seed=1)
    key[2] = key[1] = query[0]
    key.requires_grad_()
    options = dict(hard_fraction=0.3, reduction="none", normalize=False)
    (g,) = torch.autograd.grad(hard_info_nce(query, key, **options)[0], key)
    assert g[1].any() and not g[2].any() and not g[3].any()


def test_temperature_trades_tolerance_for_uniformity() -> None:
    """64 points on a sphere, four and four of one kind and near each other: the lower the
    temperature, the more evenly they spread, and the further apart is what belongs together."""
    kind = torch.arange(64) // 4
    same = (kind[:, None] == kind) & ~torch.eye(64, dtype=torch.bool)
    start = features(16, 3, seed=3)[kind] + 0.1 * features(64, 3, seed=301)
    evenness, tolerance = [], []
    for temperature in (1.0, 0.3, 0.07):
        points = start.float().requires_grad_()
        optimizer = torch.optim.SGD([points], lr=10 * temperature, momentum=0.9)
        for _ in range(40):
            loss = pyloss.info_nce(points, points.detach(), temperature=temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = F.normalize(points.detach(), dim=1)
        evenness.append(torch.pdist(z).square().mul(-2).exp().mean().log().item())
        tolerance.append((z @ z.t())[same].mean().item())
    assert evenness[0] > evenness[1] > evenness[2]
    assert tolerance[0] > tolerance[1] + 0.05 > tolerance[2] + 0.1


# --- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (pyloss.nn.InfoNCELoss, pyloss.info_nce),
        (pyloss.nn.NTXentLoss, pyloss.nt_xent),
        (pyloss.nn.CLIPLoss, pyloss.clip_loss),
        (pyloss.nn.SupervisedContrastiveLoss, pyloss.supervised_contrastive),
        (pyloss.nn.DCLLoss, dcl),
        (pyloss.nn.HardInfoNCELoss, hard_info_nce),
        (pyloss.nn.SigLIPLoss, pyloss.siglip_loss),
    ],
)
def test_options_of_modules(module, function) -> None:
    """Those of the function, with its defaults, and one more."""
    ours = {k: p.default for k, p in inspect.signature(module).parameters.items()}
    assert ours.pop("learnable") is False
    theirs = {k: p.default for k, p in inspect.signature(function).parameters.items()}
    call = {"queue", "target", "ids", "key_ids", "queue_ids"}
    assert ours == {
        k: v for k, v in theirs.items() if v is not inspect.Parameter.empty and k not in call
    }


def test_temperature_is_learned_by_its_logarithm() -> None:
    query, key = features(8, 4).float(), features(8, 4, seed=1).float()
    given = torch.tensor(0.2, requires_grad=True)
    expected = pyloss.nt_xent(query, key, temperature=given)
    expected.backward()
    criterion = pyloss.nn.NTXentLoss(0.2, learnable=True)
    found = criterion(query, key)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(criterion.log_temperature.grad, 0.2 * given.grad)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key), found)
    criterion.temperature = 0.5
    assert "temperature=0.5," in repr(criterion)
    torch.testing.assert_close(criterion.temperature, torch.tensor(0.5))
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got -1"):
        criterion.temperature = -1
    other = pyloss.nn.NTXentLoss(0.2, learnable=True)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(query, key), criterion(query, key))


def test_scale_and_bias_are_learned() -> None:
    image, text = features(8, 4).float(), features(8, 4, seed=1).float()
    criterion = pyloss.nn.SigLIPLoss(learnable=True)
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = criterion(image, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    scale, bias = criterion.logit_scale, criterion.logit_bias
    given = criterion(image, text, scale.detach(), bias.detach())
    torch.testing.assert_close(given, pyloss.siglip_loss(image, text, scale, bias))


# --- numbers, memory ------------------------------------------------------------------------------

LOSSES = {
    "info_nce": pyloss.info_nce,
    "symmetric": lambda a, b: pyloss.info_nce(a, b, symmetric=True),
    "queue": lambda a, b: pyloss.info_nce(a, b, b, in_batch=False),
    "nt_xent": pyloss.nt_xent,
    "clip_loss": pyloss.clip_loss,
    "supervised": lambda a, b: pyloss.supervised_contrastive(a, torch.arange(len(a)) // 2),
    "dcl": lambda a, b: dcl(a, b, sigma=0.5),
    "hard": lambda a, b: hard_info_nce(a, b, hard_fraction=0.5),
    "simple": lambda a, b: simple_contrastive(a, b, hard_fraction=0.5),
    "siglip": pyloss.siglip_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_kept_does_not_grow_with_the_square_of_the_batch(name) -> None:
    kept = []
    for rows in (200, 400):
        a, b = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            LOSSES[name](a, b)
        kept.append(sum(sizes))
    assert kept[1] < 2.1 * kept[0]


@pytest.mark.parametrize("name", LOSSES)
def test_checkpoints(name) -> None:
    """They give out each saved tensor once."""
    a, b = (torch.randn(30, 16, requires_grad=True) for _ in range(2))
    kept = checkpoint(LOSSES[name], a, b, use_reentrant=False)
    (found,), (expected,) = (torch.autograd.grad(f, a) for f in (kept, LOSSES[name](a, b)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_under_autocast(name) -> None:
    a, b = torch.randn(30, 16), torch.randn(30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](a, b)
        assert LOSSES[name](a.bfloat16(), b.bfloat16()).dtype == torch.float32
        _, transformed = torch.func.grad_and_value(LOSSES[name])(a, b)
    assert torch.equal(found, LOSSES[name](a, b))
    torch.testing.assert_close(transformed, found)


def test_the_other_half_type_under_autocast() -> None:
    """torch.cat refuses float16 where autocast is to bfloat16."""
    a, b = torch.randn(30, 16).half(), torch.randn(30, 16)
    expected = pyloss.nt_xent(a.float(), b, normalize=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pyloss.nt_xent(a, b, normalize=False), expected)


@pytest.mark.skipif(not _gemm.is_own(torch.empty(0)), reason="threads may show in torch's products")
def test_hardest_do_not_depend_on_threads(keep_num_threads) -> None:
    query, key = (features(1300, 24, seed=s).float().requires_grad_() for s in (0, 1))
    found = []
    for threads in (1, 3):  # torch's products show it from 3 on
        torch.set_num_threads(threads)
        loss = hard_info_nce(query, key)
        found.append((loss, *torch.autograd.grad(loss, (query, key))))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "ours, theirs",
    [(_embeddings.summed, torch.sum), (_embeddings.log_summed, lambda z: z.logsumexp(0))],
)
def test_sums_of_many_rows_do_not_depend_on_threads(ours, theirs, keep_num_threads) -> None:
    each = features(100_001).float() - 12
    each[0] = 0  # as much as all others, and the logarithm is small: it rounds nothing away
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ours(each))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], theirs(each))


def test_meta_tensors() -> None:
    x, y = torch.empty(2, 6, 4, device="meta", requires_grad=True)
    labels = torch.empty(6, device="meta", dtype=torch.long)
    for loss in (
        pyloss.functional.info_nce(x, y),
        pyloss.functional.nt_xent(x, y),
        pyloss.functional.clip_loss(x, y),
        pyloss.functional.dcl(x, y),
        pyloss.functional.siglip_loss(x, y),
        pyloss.functional.hard_info_nce(x, y, hard_fraction=0.5),
        pyloss.functional.simple_contrastive(x, y),
        pyloss.functional.supervised_contrastive(x, labels),
    ):
        assert loss.is_meta and loss.shape == ()
