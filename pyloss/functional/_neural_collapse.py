"""Neural collapse: statistics of classes, and what is measured on them. Metrics and analysis share
it; everything is float64, or what the statistics are in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._class_stats import ClassStats, class_stats
from pyloss.functional._row_checks import check_labels, check_rows
from pyloss.ops._labels import equals, outside
from pyloss.ops._launch import accumulator_dtype as accumulator_dtype

_RCOND = 1e-10  # of the between-class covariance: its rank is that of the classes less one


def checked_decay(name: str, value, depth: int, positive: bool = False) -> tuple[float, ...]:
    """The weight decay of each of `depth` layers, of one number or as many."""
    if isinstance(value, (int, float)):
        each = [value] * depth
    else:
        try:
            each = list(value.tolist() if isinstance(value, Tensor) else value)
        except TypeError:
            each = [value] * depth
    if len(each) != depth:
        raise ValueError(f"{name} must be a number or one for each of {depth} layers, got {each}")
    for x in each:
        checks.check_range(name, x, 0.0, open_low=positive)
    return tuple(float(x) for x in each)


def checked_classes(labels: Tensor, num_classes, ignore_index) -> tuple[int, int]:
    """(classes, the label that is left out), of labels that are one of the two."""
    ignore_index = checks.checked_integer("ignore_index", ignore_index)
    if num_classes is None:
        kept = labels[~equals(labels, ignore_index)]
        num_classes = int(kept.max()) + 1 if kept.numel() else 1
    num_classes = checks.checked_count("num_classes", num_classes, 1)
    if checks.can_look_at(labels):
        bad = labels[outside(labels, num_classes) & ~equals(labels, ignore_index)]
        if bad.numel():
            raise IndexError(f"label {int(bad[0])} is out of range for {num_classes} classes")
    return num_classes, ignore_index


def checked_samples(features, labels, num_classes, ignore_index) -> tuple[Tensor, int]:
    """Labels in which the one that is left out is the number of classes, and that number."""
    check_rows("features", features)
    check_labels(labels, features, like_name="features")
    classes, ignored = checked_classes(labels, num_classes, ignore_index)
    return torch.where(equals(labels, ignored), classes, labels.long()), classes


def stats_of(features: Tensor, y: Tensor, classes: int, dtype: torch.dtype) -> ClassStats:
    """Of a batch with labels as `checked_samples` has them: what is left out falls in a bin of its
    own, whatever stands there."""
    found = class_stats(features, y, classes + 1, dtype)
    return ClassStats(*(t[:classes] for t in found))


def residuals(features: Tensor, y: Tensor, stats: ClassStats) -> Tensor:
    """(N, D): features less the means of their classes, 0 for what is left out."""
    classes = len(stats.mean)
    off = features.detach().to(stats.mean.dtype) - stats.mean[y.clamp(max=classes - 1)]
    return torch.where((y < classes).unsqueeze(1), off, 0.0)


def centre_of(stats: ClassStats) -> Tensor:
    """(D,): the mean of all samples."""
    return (stats.count / stats.count.sum()) @ stats.mean


def off_centre(stats: ClassStats) -> Tensor:
    """(K, D): class means less the mean of all samples, 0 for classes without any."""
    return torch.where((stats.count > 0).unsqueeze(1), stats.mean - centre_of(stats), 0.0)


def nc1_trace(stats: ClassStats) -> Tensor:
    """tr(Sigma_W) / tr(Sigma_B)."""
    classes = (stats.count > 0).sum()
    between = off_centre(stats).square().sum() / classes
    return torch.where(classes > 1, stats.ssd.sum() / stats.count.sum() / between, math.nan)


def nc1_pinv(stats: ClassStats, within: Tensor) -> Tensor:
    """tr(Sigma_W pinv(Sigma_B)) / K, `within` (K, K) = M S M^T of the rows M of `off_centre` and
    the scatter S within the classes.

    By the eigenvectors v and values w of M M^T / K, which are those of Sigma_B: its own
    eigenvectors are M^T v / sqrt(K w).
    """
    means, classes = off_centre(stats), (stats.count > 0).sum()
    gram = means @ means.T / classes
    sound = gram.isfinite().all() & within.isfinite().all()  # or eigh raises
    w, v = torch.linalg.eigh(torch.where(sound, gram, 0.0))
    kept = w > _RCOND * w[-1]
    each = (v * (within @ v)).sum(0) / torch.where(kept, w, 1.0).square()
    total = torch.where(kept, each, 0.0).sum() / (stats.count.sum() * classes.square())
    return torch.where(sound & kept.any(), total, math.nan)


def nc1_of(features: Tensor, y: Tensor, stats: ClassStats) -> Tensor:
    """Of all samples at once: their residuals along the means, N x K, in place of the scatter."""
    along = residuals(features, y, stats) @ off_centre(stats).T
    return nc1_pinv(stats, along.T @ along)


def cdnv_of(stats: ClassStats) -> Tensor:
    """(K, K): (var_i + var_j) / (2 |mu_i - mu_j|^2); NaN on the diagonal and for classes without
    samples."""
    var = stats.ssd.sum(1) / stats.count  # NaN of no samples
    means = off_centre(stats)
    far = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    own = torch.eye(len(means), dtype=torch.bool, device=means.device)
    return torch.where(own, math.nan, (var.unsqueeze(1) + var) / (2 * far))


def mean_of_pairs(pairs: Tensor, present: Tensor) -> Tensor:
    """The mean over i != j of classes that are present; NaN without two of them."""
    both = present.unsqueeze(1) & present
    both = both & ~torch.eye(len(present), dtype=torch.bool, device=present.device)
    return torch.where(both, pairs, 0.0).sum() / both.sum()


# --------------------------------------------------------------------------------------------------
# Geometry of classifiers and class means


def checked_target(name: str, target, classes: int, like: Tensor) -> str | Tensor:
    """ "etf", "of", or a (K, K) matrix of a diagonal or a matrix."""
    if isinstance(target, str):
        checks.check_one_of(name, target, ("etf", "of"))
        return target
    checks.check_floating(name, target)
    if target.shape not in ((classes,), (classes, classes)):
        raise ValueError(
            f"{name} must be 'etf', 'of', or of shape {[classes]} or {[classes, classes]}, got "
            f"{list(target.shape)}"
        )
    checks.check_device(name, target, like, "the vectors")
    target = target.detach().to(like.dtype)
    return torch.diag(target) if target.dim() == 1 else target


def off_target(gram: Tensor, target: str | Tensor, present: Tensor | None = None) -> Tensor:
    """| G / |G| - T / |T| | in Frobenius norms, of the classes that are present."""
    ones = torch.ones_like(gram[0]) if present is None else present.to(gram.dtype)
    both = torch.outer(ones, ones)
    if isinstance(target, Tensor):
        goal = torch.where(both > 0, target, 0.0)
    else:
        goal = torch.diag(ones) - (both / ones.sum() if target == "etf" else 0.0)
    gram = torch.where(both > 0, gram, 0.0)
    return torch.linalg.matrix_norm(
        gram / torch.linalg.matrix_norm(gram) - goal / torch.linalg.matrix_norm(goal)
    )


def norm_spread(x: Tensor, present: Tensor | None = None) -> Tensor:
    """Standard deviation over mean of the lengths of rows."""
    norm = torch.linalg.vector_norm(x, dim=1)
    ones = torch.ones_like(norm) if present is None else present.to(norm.dtype)
    norm = torch.where(ones > 0, norm, 0.0)
    mean = norm.sum() / ones.sum()
    return ((ones * (norm - mean).square()).sum() / ones.sum()).sqrt() / mean


def angle_error(x: Tensor, target: str, present: Tensor | None = None) -> Tensor:
    """max over i != j of |cos(x_i, x_j) - c|, c = -1 / (K - 1) or 0; NaN without two rows."""
    if present is None:
        present = torch.ones(len(x), dtype=torch.bool, device=x.device)
    norm = torch.linalg.vector_norm(x, dim=1)
    cosine = x @ x.T / torch.outer(norm, norm)
    count = present.sum()
    goal = -1 / (count - 1).to(x.dtype) if target == "etf" else 0.0
    both = present.unsqueeze(1) & present
    both = both & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    found = torch.where(both, (cosine - goal).abs(), 0.0).amax()
    return torch.where(count > 1, found, math.nan)


def nearest(features: Tensor, means: Tensor, present: Tensor | None = None) -> Tensor:
    """(N,): the class whose mean is nearest."""
    middle = means.mean(0)  # or the digits go into what all of them share
    means, x = means - middle, features.detach().to(means.dtype) - middle
    far = means.square().sum(1) - 2 * x @ means.T
    if present is not None:
        far = torch.where(present, far, math.inf)
    return far.argmin(1)
