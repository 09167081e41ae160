"""Metrics of neural collapse: features at their class means, and the geometry of these and of the
classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _neural_collapse as collapse
from pyloss.functional._row_checks import check_rows

_WIDE = torch.float64  # of all sums: the metrics go down to where float32 ends


@torch.no_grad()
def nc1(
    features: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    kind: str = "pinv",
    ignore_index: int = -100,
) -> Tensor:
    r"""Variability within classes, measured by that between them; 0 where features have collapsed.

    .. math:: \tfrac{1}{K} \operatorname{tr}(\Sigma_W \Sigma_B^+) \quad \text{or} \quad
              \operatorname{tr} \Sigma_W / \operatorname{tr} \Sigma_B, \qquad
              \Sigma_W = \tfrac{1}{N} \sum_i (h_i - \mu_{y_i}) (h_i - \mu_{y_i})^\top, \quad
              \Sigma_B = \tfrac{1}{K} \sum_k (\mu_k - \mu) (\mu_k - \mu)^\top

    with the mean :math:`\mu` of all samples. The pseudo-inverse comes from the K x K inner products
    of the means: no D x D matrix is formed.

    Args:
        features: h ``(N, D)``, floating.
        labels: classes from 0 on, ``(N,)``, integers.
        num_classes: default: the largest label and one (waits for the device). Classes without
            samples count nowhere.
        kind: ``"pinv"`` or ``"trace"``, the first or the second.
        ignore_index: the label of samples that are left out.

    Returns:
        0-d, float32 at least; computed in float64. NaN with less than two classes, or of NaN.

    Raises:
        TypeError, ValueError: tensors or options that do not fit. IndexError: a label that is no
            class (CPU).

    Example:
        >>> import torch, pyloss
        >>> features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        >>> pyloss.metrics.nc1(features, torch.tensor([0, 0, 1, 1]), kind="trace")
        tensor(0.0100)

    Reference:
        Papyan, Han, Donoho. arXiv 2008.08186. Dang et al. Neural Collapse in Deep Linear Networks:
        From Balanced to Imbalanced Data. arXiv 2301.00437.
    """
    checks.check_one_of("kind", kind, ("pinv", "trace"))
    y, classes = collapse.checked_samples(features, labels, num_classes, ignore_index)
    with checks.without_autocast(features):
        stats = collapse.stats_of(features, y, classes, _WIDE)
        trace = kind == "trace"
        found = collapse.nc1_trace(stats) if trace else collapse.nc1_of(features, y, stats)
    return found.to(collapse.accumulator_dtype(features.dtype))


@torch.no_grad()
def cdnv(
    features: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Class-distance normalised variance: how far two classes are apart for what they spread.

    .. math:: V_{ij} = \frac{v_i + v_j}{2 \|\mu_i - \mu_j\|^2}, \qquad
              v_k = \operatorname{mean}_{y_i = k} \|h_i - \mu_k\|^2

    Args:
        features, labels, num_classes, ignore_index: as for :func:`pyloss.metrics.nc1`.
        reduction: ``"mean"``: over all pairs of classes that have samples; ``"none"``.

    Returns:
        0-d, or ``(K, K)`` with NaN on the diagonal and for classes without samples; float32 at
        least. The mean of no pair is NaN.

    Raises:
        As :func:`pyloss.metrics.nc1`.

    Example:
        >>> import torch, pyloss
        >>> features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        >>> pyloss.metrics.cdnv(features, torch.tensor([0, 0, 1, 1]))
        tensor(0.0025)

    Reference:
        Galanti, Gyorgy, Hutter. On the Role of Neural Collapse in Transfer Learning. arXiv
        2112.15121.
    """
    checks.check_reduction(reduction, ("none", "mean"))
    y, classes = collapse.checked_samples(features, labels, num_classes, ignore_index)
    with checks.without_autocast(features):
        stats = collapse.stats_of(features, y, classes, _WIDE)
        found = collapse.cdnv_of(stats)
        if reduction == "mean":
            found = collapse.mean_of_pairs(found, stats.count > 0)
    return found.to(collapse.accumulator_dtype(features.dtype))


@torch.no_grad()
def nc2(vectors: Tensor, target: str | Tensor = "etf", *, center: Tensor | None = None) -> Tensor:
    r"""How far vectors of classes are from a frame: of a classifier's rows, or of class means.

    .. math:: \Big\| \frac{G}{\|G\|_F} - \frac{T}{\|T\|_F} \Big\|_F, \qquad
              G_{ij} = (v_i - c)^\top (v_j - c)

    The target T is :math:`I - \frac{1}{K} 1 1^\top` (simplex ETF: with a bias, or cross entropy), I
    (orthogonal frame: squared error without a bias), or the squared lengths that
    :func:`pyloss.analysis.ufm_minimizer` gives for unequal classes (general orthogonal frame).

    Args:
        vectors: v ``(K, D)``, floating.
        target: ``"etf"``, ``"of"``, the diagonal of T ``(K,)``, or T ``(K, K)``.
        center: c ``(D,)``, for class means against the ETF: the mean of all features. None: 0.

    Returns:
        0-d, float32 at least; from 0 to 2, computed in float64. NaN if G or T is 0.

    Raises:
        TypeError, ValueError: tensors that do not fit, an unknown target.

    Example:
        >>> import torch, pyloss
        >>> pyloss.metrics.nc2(torch.eye(3), "of")
        tensor(0.)

    Reference:
        Dang et al. arXiv 2301.00437.
    """
    x = _checked_vectors("vectors", vectors, center)
    target = collapse.checked_target("target", target, len(x), x)
    with checks.without_autocast(x):
        found = collapse.off_target(x @ x.T, target)
    return found.to(collapse.accumulator_dtype(vectors.dtype))


@torch.no_grad()
def nc3(
    weight: Tensor, means: Tensor, target: str | Tensor = "etf", *, center: Tensor | None = None
) -> Tensor:
    r"""How far a classifier is from being aligned with the class means.

    .. math:: \Big\| \frac{P}{\|P\|_F} - \frac{T}{\|T\|_F} \Big\|_F, \qquad
              P_{ij} = w_i^\top (\mu_j - c)

    Args:
        weight: w ``(K, D)``, floating.
        means: of the classes, ``(K, D)``, floating.
        target: as for :func:`pyloss.metrics.nc2`; of unequal classes the diagonal is that of the
            logits.
        center: c ``(D,)``, for the ETF: the mean of all features. None: 0.

    Returns:
        0-d, of the dtype of the weight, float32 at least. NaN if P or T is 0.

    Raises:
        TypeError, ValueError: tensors that do not fit, an unknown target.

    Example:
        >>> import torch, pyloss
        >>> etf = pyloss.analysis.simplex_etf(4, 8)
        >>> pyloss.metrics.nc3(3 * etf, etf) < 1e-7
        tensor(True)

    Reference:
        Dang et al. arXiv 2301.00437.
    """
    w = _checked_vectors("weight", weight, None)
    x = _checked_vectors("means", means, center)
    if w.shape != x.shape:
        raise ValueError(
            f"means must have the shape of weight, {list(w.shape)}, got {list(x.shape)}"
        )
    checks.check_device("means", means, weight, "weight")
    target = collapse.checked_target("target", target, len(x), x)
    with checks.without_autocast(x):
        found = collapse.off_target(w @ x.T, target)
    return found.to(collapse.accumulator_dtype(weight.dtype))


@torch.no_grad()
def nc4(logits: Tensor, features: Tensor, means: Tensor) -> Tensor:
    r"""Share of samples for which the classifier does not say the class whose mean is nearest.

    .. math:: \operatorname{mean}_i \big[ \arg\max_k z_{ik} \ne \arg\min_k \|h_i - \mu_k\| \big]

    Args:
        logits: z ``(N, K)``, floating.
        features: h ``(N, D)``, floating.
        means: of the classes, ``(K, D)``, floating.

    Returns:
        0-d, of the dtype of ``features``, float32 at least. NaN without samples, or of NaN.

    Raises:
        TypeError, ValueError: tensors that do not fit.

    Example:
        >>> import torch, pyloss
        >>> features, means = torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]])
        >>> pyloss.metrics.nc4(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), features, means)
        tensor(0.5000)

    Reference:
        Papyan, Han, Donoho. arXiv 2008.08186.
    """
    check_rows("features", features)
    check_rows("means", means)
    if means.shape[1] != features.shape[1] or not len(means):
        raise ValueError(f"means must be (K, {features.shape[1]}), got {list(means.shape)}")
    check_logits(logits, features, len(means))
    checks.check_device("means", means, features, "features")
    wrong = disagreements(logits, features, means.detach().to(_WIDE))
    return (wrong / features.shape[0]).to(collapse.accumulator_dtype(features.dtype))


def check_logits(logits, features: Tensor, classes: int) -> None:
    checks.check_floating("logits", logits)
    if logits.shape != (len(features), classes):
        raise ValueError(
            f"logits must have the shape {[len(features), classes]}, got {list(logits.shape)}"
        )
    checks.check_device("logits", logits, features, "features")


def disagreements(
    logits: Tensor, features: Tensor, means: Tensor, present: Tensor | None = None
) -> Tensor:
    """How many samples nc4 counts, 0-d; NaN of NaN."""
    with checks.without_autocast(features):
        wrong = collapse.nearest(features, means, present) != logits.argmax(1)
    nan = logits.isnan().any() | features.isnan().any() | means.isnan().any()
    return torch.where(nan, math.nan, wrong.sum().to(means.dtype))


@torch.no_grad()
def equinorm(vectors: Tensor, *, center: Tensor | None = None) -> Tensor:
    r"""How unequal the lengths of vectors of classes are: their coefficient of variation.

    .. math:: \operatorname{std}_k \|v_k - c\| \,/\, \operatorname{mean}_k \|v_k - c\|

    Args:
        vectors: v ``(K, D)``, floating: rows of a classifier, or class means.
        center: c ``(D,)``; None: 0.

    Returns:
        0-d, float32 at least.

    Raises:
        TypeError, ValueError: tensors that do not fit.

    Example:
        >>> import torch, pyloss
        >>> pyloss.metrics.equinorm(torch.diag(torch.tensor([1.0, 3.0])))
        tensor(0.5000)

    Reference:
        Papyan, Han, Donoho. arXiv 2008.08186.
    """
    found = collapse.norm_spread(_checked_vectors("vectors", vectors, center))
    return found.to(collapse.accumulator_dtype(vectors.dtype))


@torch.no_grad()
def equiangle(vectors: Tensor, target: str = "etf", *, center: Tensor | None = None) -> Tensor:
    r"""How far the angles between vectors of classes are from equal ones.

    .. math:: \max_{i \ne j} |\cos(v_i - c, v_j - c) - a|, \qquad a = -\tfrac{1}{K - 1}
              \text{ or } 0

    Args:
        vectors: v ``(K, D)``, floating: rows of a classifier, or class means.
        target: ``"etf"`` or ``"of"``, the first or the second a.
        center: c ``(D,)``; None: 0.

    Returns:
        0-d, float32 at least. NaN with less than two vectors, or with one of length 0.

    Raises:
        TypeError, ValueError: tensors that do not fit, an unknown target.

    Example:
        >>> import torch, pyloss
        >>> pyloss.metrics.equiangle(torch.eye(3))
        tensor(0.5000)

    Reference:
        Papyan, Han, Donoho. arXiv 2008.08186.
    """
    checks.check_one_of("target", target, ("etf", "of"))
    x = _checked_vectors("vectors", vectors, center)
    with checks.without_autocast(x):
        found = collapse.angle_error(x, target)
    return found.to(collapse.accumulator_dtype(vectors.dtype))


def _checked_vectors(name: str, x, center) -> Tensor:
    """In float64, less the center."""
    check_rows(name, x, least=1)
    found = x.detach().to(_WIDE)
    if center is None:
        return found
    checks.check_floating("center", center)
    if center.shape != x.shape[1:]:
        raise ValueError(
            f"center must have the shape {list(x.shape[1:])}, got {list(center.shape)}"
        )
    checks.check_device("center", center, x, name)
    return found - center.detach().to(_WIDE)
