"""Gaussian naive Bayes: a classifier of features in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyloss.functional import _checks as checks
from pyloss.functional import _class_stats as of_classes
from pyloss.functional import _naive_bayes as F
from pyloss.nn._module import AveragesModule


class GaussianNaiveBayes(AveragesModule):
    r"""Gaussian naive Bayes: a linear head for features that one pass over the data fits.

    .. math:: \log p(x, c) = \log \pi_c - \tfrac12 \sum_j \frac{(x_j - \mu_{cj})^2}{v_{cj}}
              - \tfrac12 \sum_j \log 2 \pi v_{cj}

    with the share, the means and the variances of the samples of a class. With
    ``shared_variance`` all classes have :math:`v_j = \sum_c \pi_c v_{cj}`, and the logits are
    linear in x. It needs O(log D) samples for D features where logistic regression needs O(D), but
    has a bias where features depend on each other.

    Args:
        num_features: D.
        num_classes: C.
        var_smoothing: added to the variances, >= 0.
        shared_variance: one variance of each feature for all classes.
        smoothing_mode: ``"absolute"``, or ``"relative"``: times the largest variance of a feature
            over all samples, as scikit-learn has it.
        prior: ``"empirical"``, or ``"uniform"`` over the classes that have samples.
        group: a process group: :meth:`partial_fit` takes the samples of all its ranks.

    Shape:
        - input: ``(N, D)``, floating
        - output: ``(N, C)``, logits; dtype of the input, float32 for half types under autocast.
          -inf for a class without samples.

    Attributes:
        count: samples of each class, ``(C,)``.
        mean, ssd: means, and sums of squared distances from them, ``(C, D)``. Buffers, float64
            until the module is cast, and never half.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit; an option out of range.
        IndexError: a label out of range (CPU).
        RuntimeError: logits before any sample (CPU; NaN on CUDA).

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(100, 5), torch.randint(3, (100,))
        >>> head = pyloss.nn.GaussianNaiveBayes(5, 3)
        >>> head.partial_fit(x[:50], y[:50]).partial_fit(x[50:], y[50:])
        GaussianNaiveBayes(num_features=5, num_classes=3, var_smoothing=1e-09, ...)
        >>> linear = head.to_linear()  # to start fine-tuning from
        >>> torch.testing.assert_close(linear(x), head(x))

    Reference:
        Zheng et al. Revisiting Discriminative vs. Generative Classifiers: Theory and Implications.
        arXiv 2302.02334.
    """

    count: Tensor
    mean: Tensor
    ssd: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        var_smoothing: float = 1e-9,
        shared_variance: bool = True,
        *,
        smoothing_mode: str = "absolute",
        prior: str = "empirical",
        group: Any = None,
    ) -> None:
        sizes = []
        for name, size in (("num_features", num_features), ("num_classes", num_classes)):
            sizes.append(checks.checked_integer(name, size))
            if sizes[-1] < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        checks.check_range("var_smoothing", var_smoothing, 0.0)
        checks.check_one_of("smoothing_mode", smoothing_mode, ("absolute", "relative"))
        checks.check_one_of("prior", prior, ("empirical", "uniform"))
        super().__init__(
            num_features=sizes[0], num_classes=sizes[1], var_smoothing=var_smoothing,
            shared_variance=checks.checked_flag("shared_variance", shared_variance),
            smoothing_mode=smoothing_mode, prior=prior, group=group,
        )  # fmt: skip
        features, classes = sizes
        self.register_buffer("count", torch.zeros(classes, dtype=torch.float64))
        for name in ("mean", "ssd"):
            self.register_buffer(name, torch.zeros(classes, features, dtype=torch.float64))

    def reset(self) -> GaussianNaiveBayes:
        """Forgets all samples."""
        for buffer in self._stats():
            buffer.zero_()
        return self

    def partial_fit(self, x: Tensor, y: Tensor) -> GaussianNaiveBayes:
        """Adds samples ``(N, D)`` of classes ``(N,)``; in which batches they come does not matter.
        With a ``group`` every rank must call it, with as many samples as it has."""
        y = F.check_batch(x, y, self.num_features, self.num_classes)
        stats = of_classes.class_stats(x, y, self.num_classes, self.mean.dtype)
        if self.group is not None:
            stats = of_classes.over_ranks(stats, self.group)
        stats = of_classes.ClassStats(*(t.to(self.count.device) for t in stats))
        with torch.no_grad():
            for buffer, value in zip(self._stats(), of_classes.merged(self._stats(), stats)):
                buffer.copy_(value)
        return self

    def forward(self, input: Tensor) -> Tensor:
        return self._rounded(self._logits(input, self.shared_variance), input)

    def log_prob(self, input: Tensor) -> Tensor:
        """log p(c | x), ``(N, C)``."""
        return self._rounded(self._logits(input, self.shared_variance).log_softmax(1), input)

    def log_joint(self, input: Tensor) -> Tensor:
        """log p(x, c), ``(N, C)``: the density whose softmax the probabilities are."""
        return self._rounded(self._logits(input, False), input)

    def variance(self) -> Tensor:
        """v, ``(C, D)``, or ``(1, D)`` if it is shared."""
        total = self.count.sum()
        smoothing: float | Tensor = self.var_smoothing
        if self.smoothing_mode == "relative":
            off = self.mean - self._center()
            spread = self.ssd + self.count.unsqueeze(1) * off.square()
            smoothing = smoothing * (spread.sum(0) / total).max()
        if self.shared_variance:
            return self.ssd.sum(0, keepdim=True) / total + smoothing
        return self.ssd / self.count.clamp(min=1).unsqueeze(1) + smoothing

    def to_linear(self) -> nn.Linear:
        """A new layer with these logits, of torch's default dtype, to fine-tune or to export."""
        if not self.shared_variance:
            raise ValueError("logits are linear with shared_variance=True only")
        self._check_fitted()
        weight, bias = self._head(), self._log_prior()
        center = self._center()
        bias = bias - 0.5 * (weight * (self.mean - center)).sum(1) - weight @ center
        layer = nn.utils.skip_init(  # which would draw random numbers
            nn.Linear, self.num_features, self.num_classes, device=self.mean.device
        )
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer

    @staticmethod
    def _rounded(found: Tensor, input: Tensor) -> Tensor:
        return found.to(checks.result_dtype(input.dtype, input))

    def _logits(self, input: Tensor, linear: bool) -> Tensor:
        """In the dtype that sums are in."""
        F.check_samples("input", input, self.num_features)
        checks.check_device("input", input, self.mean, "the module")
        self._check_fitted()
        x = input.double() if input.dtype == torch.float64 else input.float()
        log_prior = self._log_prior()
        with F.without_autocast(x):
            if linear:
                weight, center = self._head(), self._center()
                bias = log_prior - 0.5 * (weight * (self.mean - center)).sum(1)
                found = (x - center.to(x)) @ weight.to(x).T + bias.to(x)
            else:
                variance = self.variance()
                bias = log_prior - 0.5 * (2 * math.pi * variance).log().sum(1)
                distances = F.squared_distances(
                    x, self.mean.to(x), variance.expand_as(self.mean).to(x)
                )
                found = bias.to(x) - 0.5 * distances
        return torch.where(self.count > 0, found, -math.inf)  # a constant, without a gradient

    def _stats(self) -> of_classes.ClassStats:
        return of_classes.ClassStats(self.count, self.mean, self.ssd)

    def _center(self) -> Tensor:
        """(D,): the mean over all samples. Distances are measured from it, so that features with a
        large mean do not lose their digits."""
        return (self.count / self.count.sum()) @ self.mean

    def _head(self) -> Tensor:
        return (self.mean - self._center()) / self.variance()

    def _log_prior(self) -> Tensor:
        there = self.count > 0
        share = self.count if self.prior == "empirical" else there.to(self.count)
        return torch.log(share / share.sum())

    def _check_fitted(self) -> None:
        if checks.can_look_at(self.count) and not self.count.any():
            raise RuntimeError("there are no samples yet: call partial_fit first")
