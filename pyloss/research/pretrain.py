"""Unsupervised pretraining: a latent variable model by maximum likelihood on unlabelled samples,
then empirical risk minimisation of a small head on what it says of the labelled ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_integers, check_rows
from pyloss.research._state import StateModule

__all__ = [
    "ComponentHead",
    "GaussianMixture",
    "LeastSquaresHead",
    "PPCA",
    "Pretrained",
    "pretrain_then_erm",
]

_LOG_2PI = math.log(2 * math.pi)
_COVARIANCES = ("diag", "full")


class _LatentModel(StateModule):
    """A density whose parameters are float64 buffers, empty until :meth:`fit`."""

    mean: Tensor

    def _checked(self, X: Tensor) -> Tensor:
        """float64, of as many features as were fitted."""
        check_rows("X", X)
        if self.mean.numel() == 0:
            raise RuntimeError("there is no fit yet: call fit first")
        if X.shape[1] != self.mean.shape[-1]:
            raise ValueError(f"X must have {self.mean.shape[-1]} features, got {list(X.shape)}")
        checks.check_device("X", X, self.mean, "the module")
        return X.to(self.mean.dtype)

    def _samples(self, X: Tensor, least: int) -> Tensor:
        """float64, to be fitted."""
        check_rows("X", X, least)
        checks.check_device("X", X, self.mean, "the module")
        if X.shape[1] == 0:
            raise ValueError(f"X must have at least one feature, got {list(X.shape)}")
        if not X.isfinite().all():
            raise ValueError("X must be finite")
        return X.detach().double()


class PPCA(_LatentModel):
    r"""Probabilistic principal components: a factor model with equal noise, in closed form.

    .. math:: x = W z + \mu + \epsilon, \quad z \sim \mathcal N(0, I_r), \quad \epsilon \sim
              \mathcal N(0, \sigma^2 I); \qquad W = U_r (\Lambda_r - \sigma^2 I)^{1/2}

    with the r largest eigenvalues of the covariance of the samples (divided by N) and their
    eigenvectors; :math:`\sigma^2` is the mean of the others. This is the maximum of the likelihood.
    The latent code is the mean of z given x, :math:`(W^\top W + \sigma^2 I)^{-1} W^\top (x - \mu)`.

    Args:
        n_components: r, >= 1 and less than the number of features.

    Attributes:
        mean: ``(D,)``.
        components: W, ``(D, r)``; the largest entry of a column is positive.
        noise: :math:`\sigma^2`, 0-d. Buffers, float64.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an option out of range; samples that are too few, not finite, or without noise:
            if they lie in r dimensions, the likelihood has no maximum.
        RuntimeError: a code before :meth:`fit`.

    Example:
        >>> import torch
        >>> from pyloss.research.pretrain import PPCA
        >>> x = torch.randn(500, 2) @ torch.randn(2, 10) + 0.1 * torch.randn(500, 10)
        >>> model = PPCA(2).fit(x)
        >>> model.encode(x).shape, model.log_prob(x).shape
        (torch.Size([500, 2]), torch.Size([500]))

    Reference:
        Tipping, Bishop. Probabilistic Principal Component Analysis. J. R. Stat. Soc. B 61 (1999).
        Ge, Tang, Fan, Jin. On the Provable Advantage of Unsupervised Pretraining. arXiv 2303.01566.
    """

    components: Tensor
    noise: Tensor

    def __init__(self, n_components: int) -> None:
        n_components = checks.checked_count("n_components", n_components, 1)
        super().__init__(n_components=n_components)
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("components", torch.zeros(0, n_components, dtype=torch.float64))
        self.register_buffer("noise", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def fit(self, X: Tensor) -> PPCA:
        """Maximum likelihood of samples ``(N, D)``, N >= 2."""
        x = self._samples(X, 2)
        r = self.n_components
        if r >= x.shape[1]:
            raise ValueError(f"n_components = {r} needs more features, got {list(X.shape)}")
        mean = x.mean(0)
        _, singular, vectors = torch.linalg.svd(x - mean, full_matrices=False)
        spectrum = singular.square() / len(x)  # D numbers, or N if that is fewer: the others are 0
        noise = spectrum[r:].sum() / (x.shape[1] - r)
        if not noise > torch.finfo(x.dtype).eps * spectrum[0]:
            raise ValueError(f"X leaves no noise beside n_components = {r}: take fewer, or more X")
        U = vectors[:r].mT
        U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        self.mean, self.noise = mean, noise
        self.components = U * (spectrum[:r] - noise).clamp(min=0).sqrt()
        return self

    def encode(self, X: Tensor) -> Tensor:
        """The mean of z for each sample, ``(N, r)``, in the dtype of X."""
        x = self._checked(X)
        with checks.without_autocast(x):
            found = (x - self.mean) @ (self.components / self._variances())
        return self._rounded(found, X)

    def log_prob(self, X: Tensor) -> Tensor:
        """log p(x) of each sample, ``(N,)``, in the dtype of X."""
        x = self._checked(X)
        variances = self._variances()
        with checks.without_autocast(x):
            off = x - self.mean
            # Axes of the components; one of length 0 has the variance of the noise in any case.
            axes = torch.nn.functional.normalize(self.components, dim=0)
            along = off @ axes
            rest = off - along @ axes.mT
        features, r = self.components.shape
        log_det = variances.log().sum() + (features - r) * self.noise.log()
        distance = (along.square() / variances).sum(1) + rest.square().sum(1) / self.noise
        return self._rounded(-0.5 * (distance + log_det + features * _LOG_2PI), X)

    def _variances(self) -> Tensor:
        """Of x along the components, (r,)."""
        return self.components.square().sum(0) + self.noise

    def _takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return name != "components" or shape[1] == self.n_components


class GaussianMixture(_LatentModel):
    r"""A mixture of k Gaussians, fitted by expectation maximisation.

    .. math:: p(x) = \sum_c \pi_c\, \mathcal N(x; \mu_c, \Sigma_c)

    The centres begin at samples that k-means++ draws. A step raises the mean over the samples of
    :math:`\log \sum_c \pi_c\, \mathcal N(x; \mu_c, \Sigma_c)\, e^{-\frac{\epsilon}{2} \operatorname
    {tr} \Sigma_c^{-1}}` or leaves it, where :math:`\epsilon` is ``reg``: a weight that keeps
    variances above it, and that is 1 for ``reg=0``. The latent code is the responsibility of each
    component.

    Args:
        k: number of components.
        covariance: ``"diag"``, or ``"full"`` for any covariances.
        reg: >= 0, added to the variances in each step.
        max_iter: >= 1, steps at most.
        tol: >= 0; the steps end where one raises the objective by less.
        n_init: >= 1, fits from other centres, the best of which is kept: a fit from a bad draw of
            centres may end in a maximum that is only local.
        generator: for k-means++, on the device of the samples.

    Attributes:
        weights: :math:`\pi`, ``(k,)``.
        mean: ``(k, D)``.
        covariances: ``(k, D)``, variances, or ``(k, D, D)``. Buffers, float64.
        history: the objective at the beginning and after each step, float64; of the fit, not
            in the state_dict.
        converged: whether the last step raised it by less than ``tol``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an option out of range; samples that are fewer than k, or not finite.
        RuntimeError: a covariance that is singular (``reg=0``); a code before :meth:`fit`.

    Example:
        >>> import torch
        >>> from pyloss.research.pretrain import GaussianMixture
        >>> x = torch.cat([torch.randn(50, 3) - 4, torch.randn(50, 3) + 4])
        >>> model = GaussianMixture(2, generator=torch.Generator().manual_seed(0)).fit(x)
        >>> model.encode(x).shape
        torch.Size([100, 2])
        >>> sorted(model.weights.tolist())
        [0.5, 0.5]

    Reference:
        Ge, Tang, Fan, Jin. On the Provable Advantage of Unsupervised Pretraining. arXiv 2303.01566.
        Arthur, Vassilvitskii. k-means++: The Advantages of Careful Seeding. SODA 2007.
    """

    weights: Tensor
    covariances: Tensor

    def __init__(
        self,
        k: int,
        covariance: str = "diag",
        *,
        reg: float = 1e-6,
        max_iter: int = 200,
        tol: float = 1e-6,
        n_init: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        k = checks.checked_count("k", k, 1)
        checks.check_one_of("covariance", covariance, _COVARIANCES)
        checks.check_range("reg", reg, 0.0)
        max_iter = checks.checked_count("max_iter", max_iter, 1)
        checks.check_range("tol", tol, 0.0)
        checks.check_generator(generator)
        n_init = checks.checked_count("n_init", n_init, 1)
        super().__init__(
            k=k, covariance=covariance, reg=reg, max_iter=max_iter, tol=tol, n_init=n_init
        )
        self.generator = generator
        shape = (k, 0) if covariance == "diag" else (k, 0, 0)
        self.register_buffer("weights", torch.zeros(k, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(k, 0, dtype=torch.float64))
        self.register_buffer("covariances", torch.zeros(shape, dtype=torch.float64))
        self.history = torch.zeros(0, dtype=torch.float64)
        self.converged = False

    @torch.no_grad()
    def fit(self, X: Tensor) -> GaussianMixture:
        """Samples ``(N, D)``, N >= k. Waits for the device in each step."""
        x = self._samples(X, self.k)
        with checks.without_autocast(x):
            state, self.history, self.converged = max(
                (self._steps(x, self._started(x)) for _ in range(self.n_init)),
                key=lambda run: float(run[1][-1]),
            )
        self.weights, self.mean, self.covariances = state
        return self

    def _started(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each sample belongs to the nearest seed."""
        centers = self._seeds(x)
        nearest = torch.cdist(x, centers).argmin(1)
        spread = (x - x.mean(0)).square().mean(0) + self.reg
        start = spread.expand(self.k, -1)
        start = start if self.covariance == "diag" else torch.diag_embed(start)
        old = (centers.new_full((self.k,), 1 / self.k), centers, start)
        return self._maximised(x, torch.nn.functional.one_hot(nearest, self.k).to(x), old)

    def _steps(
        self, x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor, bool]:
        """Parameters, history, whether it converged."""
        joint = self._log_joint(x, *state, reg=self.reg)
        history = [torch.logsumexp(joint, 1).mean()]
        converged = False
        while len(history) <= self.max_iter and not converged:
            state = self._maximised(x, joint.softmax(1), state)
            joint = self._log_joint(x, *state, reg=self.reg)
            history.append(torch.logsumexp(joint, 1).mean())
            converged = bool(history[-1] - history[-2] < self.tol)
        return state, torch.stack(history), converged

    def encode(self, X: Tensor) -> Tensor:
        """The probability of each component given x, ``(N, k)``, in the dtype of X."""
        return self._rounded(self._log_density(X).softmax(1), X)

    def log_prob(self, X: Tensor) -> Tensor:
        """log p(x) of each sample, ``(N,)``, in the dtype of X."""
        return self._rounded(torch.logsumexp(self._log_density(X), 1), X)

    def _log_density(self, X: Tensor) -> Tensor:
        """log of pi_c N(x; mu_c, Sigma_c), (N, k)."""
        x = self._checked(X)
        with checks.without_autocast(x):
            return self._log_joint(x, self.weights, self.mean, self.covariances)

    def _takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return shape[0] == self.k

    def _seeds(self, x: Tensor) -> Tensor:
        """k-means++: each next centre is a sample, drawn by the square of its distance."""
        at = torch.randint(len(x), (1,), generator=self.generator, device=x.device)
        centers = x[at]
        nearest = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        for _ in range(self.k - 1):
            nearest = torch.minimum(nearest, (x - centers[-1]).square().sum(1))
            weight = nearest if nearest.any() else torch.ones_like(nearest)  # all in the centres
            at = torch.multinomial(weight, 1, generator=self.generator)
            centers = torch.cat([centers, x[at]])
        return centers

    def _maximised(self, x: Tensor, share: Tensor, old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Weights, means and covariances for responsibilities (N, k). A component without samples
        keeps its mean and covariance."""
        count = share.sum(0)
        there = count > torch.finfo(x.dtype).tiny
        share = share / torch.where(there, count, 1.0)
        mean = torch.where(there.unsqueeze(1), share.mT @ x, old[1])
        found = []
        for c in range(self.k):  # (N, D) at a time
            off = x - mean[c]
            if self.covariance == "diag":
                found.append(share[:, c] @ off.square() + self.reg)
            else:
                scatter = (off * share[:, c : c + 1]).mT @ off
                scatter = (scatter + scatter.mT) / 2
                scatter.diagonal().add_(self.reg)
                found.append(scatter)
        covariances = torch.stack(found)
        keep = there.view(-1, *(1,) * (covariances.dim() - 1))
        return count / len(x), mean, torch.where(keep, covariances, old[2])

    def _log_joint(
        self, x: Tensor, weights: Tensor, mean: Tensor, covariances: Tensor, reg: float = 0.0
    ) -> Tensor:
        """log of the weighted densities, (N, k), less reg / 2 tr Sigma^-1."""
        found = []
        for c in range(self.k):
            off = x - mean[c]
            if self.covariance == "diag":
                if not covariances[c].gt(0).all():
                    raise RuntimeError(_SINGULAR)
                distance = (off.square() / covariances[c]).sum(1)
                log_det, trace = covariances[c].log().sum(), covariances[c].reciprocal().sum()
            else:
                factor, info = torch.linalg.cholesky_ex(covariances[c])
                if info != 0:
                    raise RuntimeError(_SINGULAR)
                inverse = torch.linalg.solve_triangular(
                    factor, torch.eye(x.shape[1], dtype=x.dtype, device=x.device), upper=False
                )
                distance = (off @ inverse.mT).square().sum(1)
                log_det, trace = 2 * factor.diagonal().log().sum(), inverse.square().sum()
            found.append(-0.5 * (distance + log_det + reg * trace + x.shape[1] * _LOG_2PI))
        return torch.stack(found, 1) + weights.log()


_SINGULAR = "the covariance of a component is singular: raise reg, or take fewer components"


class LeastSquaresHead:
    r"""Linear regression with an intercept, by least squares.

    .. math:: \min_{w, b} \sum_i (y_i - w^\top z_i - b)^2 + \gamma \lVert w \rVert^2

    Of several minimisers, with few samples, it is the one of the smallest norm.

    Args:
        gamma: >= 0.

    Raises:
        TypeError: an argument of the wrong type. ValueError: one out of range, shapes that do not
            fit, numbers that are not finite. RuntimeError: predictions before :meth:`fit`.

    Example:
        >>> import torch
        >>> from pyloss.research.pretrain import LeastSquaresHead
        >>> z = torch.tensor([[0.0], [1.0], [2.0]])
        >>> LeastSquaresHead().fit(z, 3 * z[:, 0] + 1)(torch.tensor([[5.0]]))
        tensor([16.])

    Reference:
        Ge, Tang, Fan, Jin. On the Provable Advantage of Unsupervised Pretraining. arXiv 2303.01566.
    """

    def __init__(self, gamma: float = 0.0) -> None:
        checks.check_range("gamma", gamma, 0.0)
        self.gamma = gamma
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @torch.no_grad()
    def fit(self, z: Tensor, y: Tensor) -> LeastSquaresHead:
        """Codes ``(N, r)`` and responses ``(N,)`` or ``(N, K)``, floating."""
        check_rows("z", z, 1)
        checks.check_floating("y", y)
        if y.dim() not in (1, 2) or len(y) != len(z):
            raise ValueError(f"y must be ({len(z)},) or ({len(z)}, K), got {list(y.shape)}")
        checks.check_device("y", y, z, "z")
        if not (z.isfinite().all() and y.isfinite().all()):
            raise ValueError("z and y must be finite")
        z, y = z.double(), y.double()
        middle, level = z.mean(0), y.mean(0)
        rows, target = z - middle, y - level
        if self.gamma > 0:
            penalty = math.sqrt(self.gamma) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            rows = torch.cat([rows, penalty])
            target = torch.cat([target, target.new_zeros(z.shape[1], *y.shape[1:])])
        self.weight = torch.linalg.pinv(rows) @ target
        self.bias = level - middle @ self.weight
        return self

    def __call__(self, z: Tensor) -> Tensor:
        """Predictions, ``(N,)`` or ``(N, K)``, in the dtype of z."""
        if self.weight is None:
            raise RuntimeError("there is no fit yet: call fit first")
        check_rows("z", z)
        return (z.double() @ self.weight + self.bias).to(z.dtype)


class ComponentHead:
    r"""A class for each component of a mixture.

    .. math:: c(z) = \arg\max_c \sum_j z_j\, p(c \mid j), \qquad p(c \mid j) \propto
              \sum_i z_{ij} [y_i = c]

    A component that no labelled sample belongs to says nothing.

    Raises:
        TypeError: an argument of the wrong type. ValueError: shapes that do not fit. IndexError: a
            negative label. RuntimeError: predictions before :meth:`fit`.

    Example:
        >>> import torch
        >>> from pyloss.research.pretrain import ComponentHead
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> ComponentHead().fit(z, torch.tensor([1, 0]))(z)
        tensor([1, 0])

    Reference:
        Ge, Tang, Fan, Jin. On the Provable Advantage of Unsupervised Pretraining. arXiv 2303.01566.
    """

    def __init__(self) -> None:
        self.table: Tensor | None = None  # (k, C): p(c | j)

    @torch.no_grad()
    def fit(self, z: Tensor, y: Tensor) -> ComponentHead:
        """Responsibilities ``(N, k)`` and labels ``(N,)``, integers >= 0."""
        check_rows("z", z, 1)
        check_integers("y", y, len(z))
        checks.check_device("y", y, z, "z")
        if int(y.min()) < 0:
            raise IndexError(f"y must be >= 0, got {int(y.min())}")
        votes = z.double().mT @ torch.nn.functional.one_hot(y.long()).double()
        total = votes.sum(1, keepdim=True)
        self.table = torch.where(total > 0, votes / total, 0.0)
        return self

    def __call__(self, z: Tensor) -> Tensor:
        """Labels, ``(N,)``, int64."""
        if self.table is None:
            raise RuntimeError("there is no fit yet: call fit first")
        check_rows("z", z)
        return (z.double() @ self.table).argmax(1)


class Pretrained(NamedTuple):
    """What :func:`pretrain_then_erm` returns; called with X it predicts.

    Example:
        >>> import torch
        >>> from pyloss.research.pretrain import PPCA, LeastSquaresHead, Pretrained
        >>> x = torch.randn(50, 4)
        >>> pretrainer = PPCA(1).fit(x)
        >>> head = LeastSquaresHead().fit(pretrainer.encode(x), x[:, 0])
        >>> Pretrained(pretrainer, head)(x).shape
        torch.Size([50])
    """

    pretrainer: Any
    head: Any

    def __call__(self, X: Tensor) -> Tensor:
        return self.head(self.pretrainer.encode(X))


def pretrain_then_erm(
    pretrainer: Any, head: Any, unlabeled: Tensor, X: Tensor, y: Tensor
) -> Pretrained:
    r"""Fits a latent variable model to unlabelled samples, then a head to the codes of labelled
    ones.

    .. math:: \hat\phi = \arg\max_\phi \sum_{j \le m} \log p_\phi(x_j), \qquad
              \hat\psi = \arg\min_\psi \sum_{i \le n} \ell\big(\psi(z(x_i; \hat\phi)), y_i\big)

    The excess risk is :math:`\tilde O(\sqrt{C_\Phi / m} + \sqrt{C_\Psi / n})` under the conditions
    of the paper, where learning all from labels has :math:`\tilde O(\sqrt{C_{\Phi \circ \Psi} /
    n})`.

    Args:
        pretrainer: :class:`PPCA`, :class:`GaussianMixture`, or anything with ``fit(X)`` and
            ``encode(X)``, such as an encoder that a contrastive loss has trained.
        head: :class:`LeastSquaresHead`, :class:`ComponentHead`, or anything with ``fit(z, y)`` that
            can be called with codes.
        unlabeled: ``(m, D)``, what the pretrainer is fitted to.
        X, y: n labelled samples, what the head takes; X ``(n, D)``.

    Returns:
        :class:`Pretrained`, both of them fitted, which predicts for new samples.

    Raises:
        TypeError: a pretrainer or head without the methods; what these raise.

    Example:
        >>> import torch
        >>> from pyloss.research.pretrain import PPCA, LeastSquaresHead, pretrain_then_erm
        >>> z, B = torch.randn(1000, 2), torch.randn(2, 30)
        >>> x, y = z @ B + 0.1 * torch.randn(1000, 30), z.sum(1)
        >>> predict = pretrain_then_erm(PPCA(2), LeastSquaresHead(), x[20:], x[:20], y[:20])
        >>> bool((predict(x[20:]) - y[20:]).square().mean() < 0.1)
        True

    Reference:
        Ge, Tang, Fan, Jin. On the Provable Advantage of Unsupervised Pretraining. arXiv 2303.01566.
    """
    for name, value, methods in (
        ("pretrainer", pretrainer, ("fit", "encode")),
        ("head", head, ("fit", "__call__")),
    ):
        for method in methods:
            if not callable(getattr(value, method, None)):
                raise TypeError(f"{name} must have {method}(), got {type(value).__name__}")
    pretrainer.fit(unlabeled)
    head.fit(pretrainer.encode(X), y)
    return Pretrained(pretrainer, head)
