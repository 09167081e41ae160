"""Recursive ridge regression: what joint training gives, whatever the batches and the classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pyloss.research.continual import AnalyticClassifier, RecursiveRidge

F64 = torch.float64


def samples(n: int = 120, features: int = 20, classes: int = 6) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % classes
    centers = torch.randn(classes, features, dtype=F64)
    return (centers[y] + torch.randn(n, features, dtype=F64)).relu(), y


def joint(x: Tensor, target: Tensor, gamma: float, bias: bool = False) -> Tensor:
    """The normal equations of all samples."""
    if bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if target.dim() == 1:
        target = nn.functional.one_hot(target).to(x)
    return torch.linalg.solve(x.mT @ x + gamma * torch.eye(x.shape[1], dtype=F64), x.mT @ target)


def cut(n: int) -> list[int]:
    """Sizes of up to nine pieces, some of them with one sample or none."""
    at = torch.randint(n + 1, (8,)).sort().values
    return torch.diff(at, prepend=at.new_tensor([0]), append=at.new_tensor([n])).tolist()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gamma", [0.1, 1e-3])
def test_any_split_is_joint_training(gamma: float, bias: bool) -> None:
    """Five random splits, old and new classes mixed, batches smaller and larger than D; one sample
    at a time; all at once."""
    x, y = samples()
    expected = joint(x, y, gamma, bias)
    splits = [[1] * len(x), [20, 21, 79], [len(x)], *(cut(len(x)) for _ in range(5))]
    for sizes in splits:
        ridge = RecursiveRidge(20, gamma, bias)
        for part in torch.randperm(len(x)).split(sizes):
            assert ridge.fit_batch(x[part], y[part]) is ridge
        assert (ridge.W - expected).abs().max() <= 1e-9
        assert torch.equal(ridge.R, ridge.R.mT)
        torch.testing.assert_close(ridge(x), x @ expected[:20] + (expected[20:].sum(0)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("features", [1, 7, 150])
def test_large_problems_are_joint_training(features: int) -> None:
    x, y = samples(3000, features, 30)
    for gamma in (1e-3, 0.1, 10.0):
        expected = joint(x, y, gamma)
        for sizes in ([1] * 3000, [150] * 20, [151] * 19 + [131], cut(3000), cut(3000)):
            ridge = RecursiveRidge(features, gamma)
            for part in torch.randperm(3000).split(sizes):
                ridge.fit_batch(x[part], y[part])
            assert (ridge.W - expected).abs().max() <= 1e-9, (gamma, sizes[:2])


def test_new_classes_leave_old_logits_and_tasks_cost_nothing() -> None:
    x, y = samples(200, 16, 10)
    ridge = RecursiveRidge(16)
    for task in range(5):  # classes 0 and 1, then 2 and 3, ...
        here = y // 2 == task
        before = ridge(x) if task else x[:, :0]
        # A class that is announced and has no samples yet: zero logits, the others bit for bit.
        ridge.fit_batch(x[:0], torch.zeros(0, 2 * task + 2))
        after = ridge(x)
        assert torch.equal(after[:, : 2 * task], before)
        assert not after[:, 2 * task :].any()
        ridge.fit_batch(x[here], y[here])
    assert ridge.num_classes == 10
    accuracy = (ridge(x).argmax(1) == y).double().mean()
    assert accuracy == ((x @ joint(x, y, 0.1)).argmax(1) == y).double().mean()


def test_targets_of_any_kind() -> None:
    x, _ = samples(50, 5, 2)
    Y = torch.randn(50, 3)
    ridge = RecursiveRidge(5, 0.5).fit_batch(x[:20], Y[:20]).fit_batch(x[20:], Y[20:])
    torch.testing.assert_close(ridge.W, joint(x, Y.double(), 0.5), rtol=0, atol=1e-12)
    ridge.fit_batch(x[:3], torch.ones(3, 1))  # 0 in the columns that are not there
    wide = torch.cat([Y, nn.functional.pad(torch.ones(3, 1), (0, 2))]).double()
    expected = joint(torch.cat([x, x[:3]]), wide, 0.5)
    torch.testing.assert_close(ridge.W, expected, rtol=0, atol=1e-12)
    bytes_ = RecursiveRidge(5).fit_batch(x, (torch.arange(50) % 3).to(torch.uint8))
    assert torch.equal(bytes_.W, RecursiveRidge(5).fit_batch(x, torch.arange(50) % 3).W)


def test_state() -> None:
    x, y = samples()
    ridge = RecursiveRidge(20, bias=True).fit_batch(x, y)
    assert repr(ridge) == "RecursiveRidge(in_features=20, gamma=0.1, bias=True, num_classes=6)"
    for fresh in (RecursiveRidge(20, bias=True), RecursiveRidge(20, bias=True).fit_batch(x, y + 3)):
        fresh.load_state_dict(ridge.state_dict())
        assert torch.equal(fresh(x), ridge(x)) and fresh.num_classes == 6
    assert torch.equal(copy.deepcopy(ridge).fit_batch(x, y)(x), fresh.fit_batch(x, y)(x))
    with pytest.raises(RuntimeError, match="size mismatch for R"):
        RecursiveRidge(20).load_state_dict(ridge.state_dict())
    half = copy.deepcopy(ridge).half()
    assert half.R.dtype == F64 and half(x.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert ridge(x.bfloat16()).dtype == torch.float32
    assert ridge.reset().num_classes == 0
    assert torch.equal(ridge.fit_batch(x, y).W, RecursiveRidge(20, bias=True).fit_batch(x, y).W)
    single = RecursiveRidge(20, dtype=torch.float32).fit_batch(x[:15], y[:15]).fit_batch(x, y)
    assert single.R.dtype == torch.float32
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ridge(x).sum(), x)
    torch.testing.assert_close(grad, ridge.W[:20].sum(1).expand_as(grad))


def test_what_goes_wrong_leaves_the_state() -> None:
    x, y = samples()
    ridge = RecursiveRidge(20, gamma=1e-3).fit_batch(x, y)
    before = copy.deepcopy(ridge.state_dict())
    for rows in (10, 100):  # both forms
        with pytest.raises(RuntimeError, match="raise gamma"):
            ridge.fit_batch(1e200 * (1 + x[:rows]), y[:rows] + 1)
        x_nan = x[:rows].clone()
        x_nan[0, 0] = torch.nan
        with pytest.raises(ValueError, match="X must be finite"):
            ridge.fit_batch(x_nan, y[:rows])
    assert all(torch.equal(value, before[name]) for name, value in ridge.state_dict().items())
    assert ridge(x_nan)[0].isnan().all() and ridge(x_nan)[1:].isfinite().all()


def backbone() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()).double()


def test_classifier_is_joint_training_on_frozen_features() -> None:
    x, y = samples(200, 12, 5)
    body = backbone()
    model = AnalyticClassifier(body, 8, 60, generator=torch.Generator().manual_seed(3))
    same = AnalyticClassifier(body, 8, 60, generator=torch.Generator().manual_seed(3))
    model.train()
    assert model.training and not body.training
    assert not any(p.requires_grad for p in model.parameters())
    for task in range(5):  # two thirds of a class come with its task, the others later
        here = (y == task) & (torch.arange(200) % 3 > 0) | (y == task - 1) & (
            torch.arange(200) % 3 == 0
        )
        model.fit_batch(x[here], y[here])
    last = (y == 4) & (torch.arange(200) % 3 == 0)
    model.fit_batch(x[last], y[last])
    features = (body(x) @ model.expansion.mT).relu()
    expected = features @ joint(features, y, 0.1)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)
    assert (model(x).argmax(1) == y).sum() == (expected.argmax(1) == y).sum()
    assert torch.equal(same.expansion, model.expansion)
    same.load_state_dict(model.state_dict())
    assert same.num_classes == 5 and torch.equal(same(x), model(x))
    assert AnalyticClassifier(nn.Flatten(), 12, 9).fit_batch(x.float(), y)(x.float()).dtype == (
        torch.float32
    )


def test_no_global_random_numbers() -> None:
    before = torch.get_rng_state()
    AnalyticClassifier(nn.Flatten(), 4, 5, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
