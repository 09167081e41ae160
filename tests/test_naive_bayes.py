"""Gaussian naive Bayes: batches, scikit-learn, the linear layer, small samples. What every
callable promises: tests/specs/naive_bayes.py; processes: tests/contrastive_worker.py."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from pyloss.nn import GaussianNaiveBayes

F64 = torch.float64


def data(count: int = 200, features: int = 6, classes: int = 4, dtype=F64):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (count,), generator=g)
    x = torch.randn(count, features, generator=g, dtype=F64) * torch.rand(features, generator=g)
    x = x + torch.randn(classes, features, generator=g, dtype=F64)[y]
    return x.to(dtype), y


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_batches_are_one_shot(dtype: torch.dtype) -> None:
    x, y = data(dtype=dtype)
    x = x + 1000  # a sum of squares would have lost the variances
    whole = GaussianNaiveBayes(6, 4).partial_fit(x, y)
    parts = GaussianNaiveBayes(6, 4)
    for at in (slice(0, 0), slice(0, 1), slice(1, 90), slice(90, 200)):
        parts.partial_fit(x[at], y[at])
    for a, b in zip(whole.buffers(), parts.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)
    for c in range(4):
        chosen = x[y == c].double()
        torch.testing.assert_close(whole.mean[c], chosen.mean(0))
        torch.testing.assert_close(whole.ssd[c] / len(chosen), chosen.var(0, unbiased=False))
    assert not whole.reset().count.any() and not whole.ssd.any()


@pytest.mark.parametrize("priors", ["empirical", "uniform"])
def test_scikit_learn(priors: str) -> None:
    sklearn = pytest.importorskip("sklearn.naive_bayes")
    x, y = data()
    theirs = sklearn.GaussianNB(
        var_smoothing=1e-3, priors=[0.25] * 4 if priors == "uniform" else None
    ).fit(x.numpy(), y.numpy())
    ours = GaussianNaiveBayes(
        6, 4, var_smoothing=1e-3, shared_variance=False, smoothing_mode="relative", prior=priors
    )
    ours.partial_fit(x[:77], y[:77]).partial_fit(x[77:], y[77:])
    expected = torch.from_numpy(theirs.predict_log_proba(x.numpy()))
    torch.testing.assert_close(ours.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    joint = torch.from_numpy(theirs.predict_joint_log_proba(x.numpy()))
    torch.testing.assert_close(ours.log_joint(x), joint, rtol=1e-9, atol=1e-9)


def test_logits_are_differences_of_log_densities() -> None:
    x, y = data()
    head = GaussianNaiveBayes(6, 4, var_smoothing=0.0).partial_fit(x, y)
    v = sum((y == c).double().mean() * x[y == c].var(0, unbiased=False) for c in range(4))
    joint = torch.stack(
        [
            math.log((y == c).double().mean())
            + torch.distributions.Normal(x[y == c].mean(0), v.sqrt()).log_prob(x).sum(1)
            for c in range(4)
        ],
        1,
    )
    torch.testing.assert_close(head.log_joint(x), joint, rtol=1e-10, atol=1e-10)
    logits = head(x)
    torch.testing.assert_close(logits - logits[:, :1], joint - joint[:, :1], rtol=1e-10, atol=1e-10)


def test_linear_layer() -> None:
    x, y = data(dtype=torch.float32)
    head = GaussianNaiveBayes(6, 4).partial_fit(x, y)
    layer = head.to_linear()
    assert type(layer) is torch.nn.Linear and layer.weight.requires_grad
    torch.testing.assert_close(layer(x), head(x), rtol=1e-4, atol=1e-4)
    far = GaussianNaiveBayes(6, 4).partial_fit(x + 1e4, y)  # in float32
    assert (far(x + 1e4).argmax(1) == head(x).argmax(1)).float().mean() > 0.95
    with pytest.raises(ValueError, match="shared_variance=True"):
        GaussianNaiveBayes(6, 4, shared_variance=False).partial_fit(x, y).to_linear()


def test_small_variances_in_float32() -> None:
    """Pixels that are all but constant, at the authors' smoothing of 1e-9."""
    x, y = data()
    x[:, 0] = 0.5 + 1e-4 * x[:, 0]
    for shared in (True, False):
        head = GaussianNaiveBayes(6, 4, shared_variance=shared).partial_fit(x, y)
        exact, found = head(x), head(x.float())
        torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


def test_nothing_seen_and_a_class_without_samples() -> None:
    head = GaussianNaiveBayes(6, 5)
    x, y = data()
    for call in (head, head.log_prob, head.log_joint, lambda x: head.to_linear()):
        with pytest.raises(RuntimeError, match="call partial_fit first"):
            call(x)
    for prior in ("empirical", "uniform"):
        head = GaussianNaiveBayes(6, 5, prior=prior).partial_fit(x, y)
        assert (head(x)[:, 4] == -math.inf).all() and (
            head.to_linear()(x.float())[:, 4] < -1e30
        ).all()
        p = head.log_prob(x).exp()
        torch.testing.assert_close(p.sum(1), torch.ones(200, dtype=F64))
    uniform = GaussianNaiveBayes(6, 4, prior="uniform").partial_fit(x, y)
    plain = GaussianNaiveBayes(6, 4).partial_fit(x, y)
    shares = torch.bincount(y, minlength=4) / 200
    torch.testing.assert_close(
        (plain(x) - uniform(x)).diff(dim=1), shares.double().log().diff().expand(200, 3)
    )


def test_module_state() -> None:
    x, y = data(dtype=torch.float32)
    head = GaussianNaiveBayes(6, 4).partial_fit(x, y)
    fresh = GaussianNaiveBayes(6, 4)
    fresh.load_state_dict(head.state_dict())
    for twin in (fresh, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(x), head(x)) and repr(twin) == repr(head)
    assert not list(head.parameters())
    assert head.bfloat16().mean.dtype == F64
    single = copy.deepcopy(head).float()
    assert single.mean.dtype == torch.float32
    single.partial_fit(x, y)
    torch.testing.assert_close(single(x), head(x), rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x), fresh(x), rtol=0, atol=0)


@pytest.mark.exhaustive
def test_fewer_samples_than_logistic_regression() -> None:
    """Two Gaussians with means of 1.6 / sqrt(n) in each coordinate: Zheng et al., section 5."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    bayes, logistic = [], []
    for features in (25, 100):
        g = torch.Generator().manual_seed(1)
        means = 1.6 / math.sqrt(features)

        def draw(count: int, means=means, features=features, g=g):
            y = torch.arange(count) % 2
            return torch.randn(count, features, generator=g) + means * (2 * y - 1)[:, None], y

        x_test, y_test = draw(4000)
        x, y = draw(320)
        head = GaussianNaiveBayes(features, 2).partial_fit(x, y)
        bayes.append((head(x_test).argmax(1) != y_test).float().mean().item())
        fitted = linear_model.LogisticRegression(C=1e4, max_iter=1000).fit(x.numpy(), y.numpy())
        logistic.append(1 - fitted.score(x_test.numpy(), y_test.numpy()))
    assert bayes[0] < logistic[0] and bayes[1] < logistic[1] - 0.02
    assert max(bayes) < 0.09 and logistic[1] > 0.09
