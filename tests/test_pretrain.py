"""Unsupervised pretraining: factor models and mixtures against densities written out and
scikit-learn, and what they save in labels."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from pyloss.research.pretrain import (
    PPCA,
    ComponentHead,
    GaussianMixture,
    LeastSquaresHead,
    pretrain_then_erm,
)

F64 = torch.float64


def factors(n: int, features: int = 8, r: int = 3, noise: float = 0.5) -> Tensor:
    z, B = torch.randn(n, r, dtype=F64), torch.randn(r, features, dtype=F64)
    return z @ B + noise * torch.randn(n, features, dtype=F64) + 2


def blobs(n: int = 300, k: int = 3, distance: float = 6.0) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % k
    centers = distance * torch.eye(k, 4, dtype=F64)
    mix = torch.randn(k, 4, 4, dtype=F64) / 3 + torch.eye(4, dtype=F64)
    return centers[y] + (torch.randn(n, 1, 4, dtype=F64) @ mix[y])[:, 0], y


def gaussian(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)


@pytest.mark.parametrize("n", [200, 6])  # fewer samples than features, too
def test_ppca_is_the_gaussian_of_largest_likelihood(n: int) -> None:
    x = factors(n)
    model = PPCA(3).fit(x)
    covariance = model.components @ model.components.mT + model.noise * torch.eye(8, dtype=F64)
    expected = gaussian(x, x.mean(0), covariance)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=0, atol=1e-8)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance).flip(0)[:3], spectrum[:3])
    torch.testing.assert_close(model.noise, spectrum[3:].mean())
    # No other parameters near by are better.
    for _ in range(5):
        other = copy.deepcopy(model)
        other.components += 0.02 * torch.randn(8, 3, dtype=F64)
        other.noise *= 1 + 0.1 * torch.randn((), dtype=F64)
        near = other.components @ other.components.mT + other.noise * torch.eye(8, dtype=F64)
        assert gaussian(x, other.mean, near).sum() < expected.sum()
    # The code is the mean of z given x.
    W = model.components
    inner = W.mT @ W + model.noise * torch.eye(3, dtype=F64)
    code = torch.linalg.solve(inner, W.mT @ (x - x.mean(0)).mT).mT
    torch.testing.assert_close(model.encode(x), code)
    assert (W.gather(0, W.abs().argmax(0, keepdim=True)) > 0).all()


def test_ppca_against_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = factors(150)
    ours, theirs = PPCA(3).fit(x), decomposition.PCA(3).fit(x.numpy())
    # scikit-learn divides by N - 1, which is not the maximum of the likelihood.
    share = 149 / 150
    assert ours.noise.item() == pytest.approx(theirs.noise_variance_ * share, rel=1e-12)
    expected = torch.from_numpy(theirs.get_covariance()) * share
    covariance = ours.components @ ours.components.mT + ours.noise * torch.eye(8, dtype=F64)
    torch.testing.assert_close(covariance, expected)
    assert ours.log_prob(x).mean() > theirs.score(x.numpy())


def test_components_of_no_length() -> None:
    """White samples: all eigenvalues are one, and what is left of a component is rounding."""
    q = torch.linalg.qr(torch.randn(40, 5, dtype=F64) - 0.0)[0]
    q = torch.linalg.qr(q - q.mean(0))[0] * 40**0.5
    model = PPCA(2).fit(q)
    expected = gaussian(q, q.mean(0), torch.eye(5, dtype=F64))
    torch.testing.assert_close(model.log_prob(q), expected, rtol=0, atol=1e-8)


def test_ppca_without_noise() -> None:
    x = torch.randn(50, 2, dtype=F64) @ torch.randn(2, 6, dtype=F64)
    with pytest.raises(ValueError, match="X leaves no noise beside n_components = 2"):
        PPCA(2).fit(x)
    with pytest.raises(ValueError, match="X leaves no noise beside n_components = 4"):
        PPCA(4).fit(factors(5))
    with pytest.raises(ValueError, match="n_components = 6 needs more features"):
        PPCA(6).fit(x)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_mixture_likelihood_rises(covariance: str) -> None:
    """Without reg the objective is the log-likelihood; with it, it rises as well, far from small
    variances and near them."""
    x, _ = blobs(distance=1.0)
    for k, reg in ((1, 0.0), (3, 0.0), (5, 1e-6), (5, 0.3)):
        generator = torch.Generator().manual_seed(k)
        model = GaussianMixture(k, covariance, reg=reg, tol=0.0, max_iter=30, generator=generator)
        history = model.fit(x).history
        assert len(history) <= 31 and history.diff().min() > -1e-12
        if k > 1:
            assert history[-1] > history[0]
        if reg == 0:
            torch.testing.assert_close(model.log_prob(x).mean(), history[-1])
        assert model.covariances.min() >= reg or covariance == "full"
    few = GaussianMixture(8, covariance, tol=0.0, max_iter=30, generator=generator).fit(x[:12])
    assert few.history.diff().min() > -1e-12  # components that shrink onto one sample


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_mixture_density(covariance: str) -> None:
    x, _ = blobs()
    model = GaussianMixture(3, covariance, generator=torch.Generator().manual_seed(0)).fit(x)
    assert model.converged
    sigma = model.covariances
    sigma = torch.diag_embed(sigma) if covariance == "diag" else sigma
    each = torch.stack([gaussian(x, m, s) for m, s in zip(model.mean, sigma)], 1)
    joint = each + model.weights.log()
    torch.testing.assert_close(model.log_prob(x), joint.logsumexp(1), rtol=0, atol=1e-8)
    torch.testing.assert_close(model.encode(x), joint.softmax(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_mixture_against_scikit_learn(covariance: str) -> None:
    """Where ours stops, scikit-learn stays, with a reg that is too small to count."""
    mixture = pytest.importorskip("sklearn.mixture")
    x, _ = blobs(distance=2.5)
    ours = GaussianMixture(3, covariance, reg=1e-9, tol=1e-13, max_iter=3000,
                           generator=torch.Generator().manual_seed(2)).fit(x)  # fmt: skip
    theirs = mixture.GaussianMixture(
        3, covariance_type=covariance, reg_covar=1e-9, tol=1e-13, max_iter=3000,
        means_init=ours.mean.numpy(), weights_init=ours.weights.numpy(), random_state=0,
        precisions_init=(1 / ours.covariances if covariance == "diag"
                         else torch.linalg.inv(ours.covariances)).numpy(),
    ).fit(x.numpy())  # fmt: skip
    torch.testing.assert_close(ours.mean, torch.from_numpy(theirs.means_), rtol=0, atol=1e-4)
    score = torch.from_numpy(theirs.score_samples(x.numpy()))
    torch.testing.assert_close(ours.log_prob(x), score, rtol=0, atol=1e-4)
    assert ours.log_prob(x).mean().item() == pytest.approx(theirs.score(x.numpy()), abs=1e-7)
    # One density for the same parameters.
    ours.load_state_dict({
        "weights": torch.from_numpy(theirs.weights_), "mean": torch.from_numpy(theirs.means_),
        "covariances": torch.from_numpy(theirs.covariances_),
    })  # fmt: skip
    torch.testing.assert_close(ours.log_prob(x), score, rtol=0, atol=1e-8)


def test_the_best_of_several_fits() -> None:
    x, _ = blobs(120, 4, 2.0)
    ends = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        ends.append(GaussianMixture(6, generator=generator).fit(x).history[-1].item())
    assert max(ends) - min(ends) > 0.01  # some of them are local maxima
    best = GaussianMixture(6, n_init=6, generator=generator.manual_seed(0)).fit(x)
    assert best.history[-1].item() == max(ends)


def test_fewer_points_than_components() -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 4.0]], dtype=F64).repeat(5, 1)
    model = GaussianMixture(3, generator=torch.Generator().manual_seed(0)).fit(x)
    assert model.weights.sum() == 1 and not model.weights.isnan().any()
    assert model.encode(x).isfinite().all() and model.history.diff().min() > -1e-12
    with pytest.raises(RuntimeError, match="covariance of a component is singular: raise reg"):
        GaussianMixture(2, reg=0.0, generator=torch.Generator().manual_seed(0)).fit(x)
    with pytest.raises(RuntimeError, match="covariance of a component is singular: raise reg"):
        GaussianMixture(2, "full", reg=0.0, generator=torch.Generator().manual_seed(0)).fit(x)
    with pytest.raises(ValueError, match="X must hold at least 11 rows"):
        GaussianMixture(11).fit(x)


@pytest.mark.parametrize(
    "make", [lambda: PPCA(2), lambda: GaussianMixture(3), lambda: GaussianMixture(3, "full")]
)
def test_state_and_dtypes(make) -> None:
    x, _ = blobs(60)
    model = make()
    with pytest.raises(RuntimeError, match="there is no fit yet: call fit first"):
        model.encode(x)
    if isinstance(model, GaussianMixture):
        model.generator = torch.Generator().manual_seed(0)
    model.fit(x)
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.encode(x), model.encode(x))
        assert torch.equal(other.log_prob(x), model.log_prob(x))
    for dtype in (torch.float32, torch.bfloat16):
        assert model.encode(x.to(dtype)).dtype == model.log_prob(x.to(dtype)).dtype == dtype
    assert model.half().mean.dtype == F64
    nan = x[:2].clone()
    nan[0, 0] = torch.nan
    for found in (model.log_prob(nan), model.encode(nan)):
        assert found[0].isnan().all() and found[1].isfinite().all()
    with pytest.raises(ValueError, match="X must be finite"):
        model.fit(nan.repeat(9, 1))
    with pytest.raises(ValueError, match="X must have 4 features"):
        model.encode(x[:, :3])
    x.requires_grad_()
    torch.autograd.gradcheck(model.log_prob, x[:3])
    torch.autograd.gradcheck(model.encode, x[:3])


def test_state_of_another_size_is_refused() -> None:
    x, _ = blobs(60)
    for model, other in ((PPCA(2), PPCA(3)), (GaussianMixture(3), GaussianMixture(2))):
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict(model.fit(x).state_dict())


def test_least_squares() -> None:
    z, w = torch.randn(50, 4, dtype=F64), torch.randn(4, 2, dtype=F64)
    y = z @ w + 3
    torch.testing.assert_close(LeastSquaresHead().fit(z, y)(z), y)
    torch.testing.assert_close(
        LeastSquaresHead().fit(z.float(), y[:, 0])(z.float()), y[:, 0].float()
    )
    ridge = LeastSquaresHead(gamma=2.0).fit(z, y)
    off = z - z.mean(0)
    expected = torch.linalg.solve(
        off.mT @ off + 2 * torch.eye(4, dtype=F64), off.mT @ (y - y.mean(0))
    )
    torch.testing.assert_close(ridge.weight, expected)
    few = LeastSquaresHead().fit(z[:3], y[:3])  # the smallest weights that fit
    torch.testing.assert_close(few(z[:3]), y[:3])
    assert few.weight.norm() < w.norm()


def test_components_name_classes() -> None:
    x, y = blobs(distance=12.0)
    pretrainer = GaussianMixture(3, generator=torch.Generator().manual_seed(0))
    predict = pretrain_then_erm(pretrainer, ComponentHead(), x, x[:3], y[:3])  # a label each
    assert torch.equal(predict(x), y)
    silent = ComponentHead().fit(torch.eye(3)[:2], torch.tensor([2, 0]))
    assert silent(torch.eye(3)).tolist() == [2, 0, 0]


def excess(seed: int, n: int, m: int = 2000) -> tuple[float, float]:
    """Of pretraining and of least squares on the inputs: the risk above that of the best
    predictor, by the formula for Gaussian inputs. d = 50, r = 5."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(5, 50, dtype=F64, generator=generator)
    beta = torch.randn(5, dtype=F64, generator=generator)
    covariance = B.mT @ B + torch.eye(50, dtype=F64)
    best = torch.linalg.solve(covariance, B.mT @ beta)  # E[y | x] = x' best

    def draw(count: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(count, 5, dtype=F64, generator=generator)
        x = z @ B + torch.randn(count, 50, dtype=F64, generator=generator)
        return x, z @ beta + 0.3 * torch.randn(count, dtype=F64, generator=generator)

    x, y = draw(n)
    pretrained = pretrain_then_erm(PPCA(5), LeastSquaresHead(), draw(m)[0], x, y)
    found = []
    for predict in (pretrained, LeastSquaresHead().fit(x, y)):
        level = predict(torch.zeros(1, 50, dtype=F64))
        off = predict(torch.eye(50, dtype=F64)) - level - best
        found.append((off @ covariance @ off + level[0] ** 2).item())
    return found[0], found[1]


@pytest.mark.parametrize("n", [20, 60, 200])
def test_pretraining_needs_fewer_labels(n: int) -> None:
    runs = torch.tensor([excess(seed, n) for seed in range(3)])
    assert (runs[:, 0] < runs[:, 1]).all(), runs


@pytest.mark.exhaustive
def test_pretraining_needs_fewer_labels_in_ten_draws() -> None:
    for n, most in ((20, 0.2), (60, 0.03), (200, 0.01), (1000, 0.002)):
        runs = torch.tensor([excess(seed, n, 10_000) for seed in range(10)])
        assert runs.mean(0)[0] < runs.mean(0)[1] and runs.mean(0)[0] < most, (n, runs.mean(0))
