"""OPIS: how much the calibration of a distance threshold differs between classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._embeddings import (
    check_labels,
    check_rows,
    near_pairs,
    prepared,
    without_autocast,
)


class OPISCurves(NamedTuple):
    """What :func:`opis` returns with ``return_curves=True``: C classes, T thresholds, float64.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(20, 4), torch.arange(20) % 2
        >>> pyloss.metrics.opis(x, y, return_curves=True).utility.shape
        torch.Size([2, 101])
    """

    opis: Tensor  # 0-d
    epsilon_opis: Tensor  # 0-d; experimental
    thresholds: Tensor  # (T,), distances, ascending
    utility: Tensor  # (C, T)
    sensitivity: Tensor  # (C, T)
    specificity: Tensor  # (C, T)
    classes: Tensor  # (C,), the labels of the rows of the curves, ascending
    sizes: Tensor  # (C,), int64: embeddings of each
    skipped: Tensor  # 0-d, int64: classes of one embedding, which have no curve


def check_options(
    *, far=(0.01, 0.1), num_thresholds=101, thresholds=None, epsilon=0.1, bounds_samples=1_000_000,
    normalize=True, return_curves=False,
) -> None:  # fmt: skip
    """Those of opis, also for its accumulator."""
    if isinstance(far, (str, bytes)) or not hasattr(far, "__len__") or len(far) != 2:
        raise ValueError(f"far must be two shares, got {far!r}")
    for value in far:
        checks.check_number("far", value)
    if not 0 < far[0] < far[1] <= 1:
        raise ValueError(f"far must be 0 < low < high <= 1, got {tuple(far)}")
    for name, value, least in (
        ("num_thresholds", num_thresholds, 2), ("bounds_samples", bounds_samples, 1)
    ):  # fmt: skip
        if checks.checked_integer(name, value) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if thresholds is not None:
        checks.check_floating("thresholds", thresholds)
        if thresholds.dim() != 1 or thresholds.shape[0] == 0:
            raise ValueError(f"thresholds must be (T,), got {list(thresholds.shape)}")
    checks.check_range("epsilon", epsilon, 0.0, open_low=True)
    if epsilon > 1:
        raise ValueError(f"epsilon must be at most 1, got {epsilon}")
    checks.checked_flag("normalize", normalize)
    checks.checked_flag("return_curves", return_curves)


@torch.no_grad()
def opis(
    embeddings: Tensor,
    labels: Tensor,
    *,
    far: tuple[float, float] = (0.01, 0.1),
    num_thresholds: int = 101,
    thresholds: Tensor | None = None,
    epsilon: float = 0.1,
    bounds_samples: int = 1_000_000,
    normalize: bool = True,
    return_curves: bool = False,
) -> Tensor | OPISCurves:
    r"""Operating-point inconsistency score: how differently one threshold serves the classes.

    .. math:: \mathrm{OPIS} = \operatorname{mean}_{t} \operatorname{var}_{c} U_c(t), \qquad
              U_c = \frac{2 \phi_c \psi_c}{\phi_c + \psi_c}

    phi_c(t) is the share of pairs within class c whose distance is at most t (sensitivity),
    psi_c(t) that of pairs with one end in c whose distance is above t (specificity), and t runs
    over the range of distances that are of use. One pass over tiles counts the pairs of each class
    between two thresholds: no N x N matrix is formed, and the counts are integers. How many classes
    there are is looked up on the host: a GPU is waited for, and there is no ``fullgraph=True``.

    Args:
        embeddings: ``(N, D)``, floating.
        labels: ``(N,)``, any integers. Classes of one embedding are others' negatives alone.
        far: the range: distances below which these shares of the negative pairs lie.
        num_thresholds: T, evenly over the range.
        thresholds: ``(T,)``, distances, ascending, in place of both.
        epsilon: share of the classes, rounded up, at either end, of ``epsilon_opis``.
        bounds_samples: of more pairs than this, the range comes from those of some embeddings, the
            same in every call.
        normalize: take embeddings to length 1.
        return_curves: return :class:`OPISCurves`.

    Returns:
        0-d, float32 at least; 0 where fewer than two classes have pairs. A NaN among the embeddings
        makes it NaN. ``epsilon_opis`` is the mean over t of the square of the difference between
        the mean utilities of the best and of the worst classes: experimental, its form in the paper
        was not verified.

    Raises:
        TypeError, ValueError: embeddings or labels of a wrong dtype or shape, an option out of
            range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.nn.functional.normalize(torch.randn(60, 8), dim=1)
        >>> x, y = torch.cat([x, x.flip(1)]), torch.arange(120) // 60  # two alike
        >>> bool(pyloss.metrics.opis(x, y) < 1e-9)
        True

    Reference:
        Zhang et al. Threshold-Consistent Margin Loss for Open-World Deep Metric Learning. arXiv
        2307.04047.
    """
    check_options(
        far=far, num_thresholds=num_thresholds, thresholds=thresholds, epsilon=epsilon,
        bounds_samples=bounds_samples, normalize=normalize, return_curves=return_curves,
    )  # fmt: skip
    check_rows("embeddings", embeddings)
    check_labels(labels, embeddings)
    with without_autocast(embeddings):
        order = labels.argsort(stable=True)
        x = prepared(embeddings[order], False)
        # In place, and without a matrix of squares: the embeddings are the most of the memory.
        length = torch.linalg.vector_norm(x, dim=1)
        if normalize:
            unit = length.clamp(min=1e-12)
            x.div_(unit.unsqueeze(1))
            length = length / unit
        classes, of_row, sizes, skipped = _classes(labels[order])
        half = length.square().mul_(0.5)
        if thresholds is None:
            low, high = _bounds(x, half, of_row, classes.shape[0], far, bounds_samples)
            steps = torch.linspace(
                0, 1, num_thresholds, dtype=checks.widest(x.device), device=x.device
            )
            thresholds = low + (high - low) * steps
        else:
            checks.check_device("thresholds", thresholds, x, "embeddings")
            thresholds = checks.widened(thresholds)
            # Not "diff < 0", which a NaN would not be.
            rising = torch.cat([thresholds[:1], thresholds.diff()]) >= 0
            if checks.can_look_at(thresholds) and not bool(rising.all()):
                raise ValueError("thresholds must be distances that ascend")
        edges = thresholds.square().mul(0.5).to(x.dtype)
        near = near_pairs(x, half, of_row, edges, classes.shape[0])[:, :-1]
        found = _curves(near, x.shape[0], classes, sizes, thresholds, epsilon, skipped)
        poison = (half * 0).sum()
        found = found._replace(opis=(found.opis + poison).to(x.dtype))
        return found if return_curves else found.opis


def _classes(ordered: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(labels, class of each row, sizes, how many of one row), of the classes that have pairs.

    They are numbered by order; rows that are alone get the number behind the last of them.
    """
    labels, of_row, sizes = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    kept = sizes > 1
    number = torch.where(kept, kept.cumsum(0) - 1, kept.sum())
    return labels[kept], number[of_row], sizes[kept], (~kept).sum()


def _bounds(x, half, of_row, classes, far, samples) -> tuple[Tensor, Tensor]:
    """Distances up to which these shares of the negative pairs lie; 0 without such a pair."""
    n = x.shape[0]
    kept = min(n, math.isqrt(2 * samples) + 1)
    # Rows stand by class: evenly spaced ones keep the shares of the classes.
    rows = torch.arange(kept, device=x.device) * n // max(kept, 1)
    x, half, of_row = x[rows], half[rows], of_row[rows]
    square = (x @ x.t()).neg_().add_(half).add_(half[:, None]).mul_(2)
    negative = (of_row[:, None] != of_row) | (of_row == classes)
    negative = negative.triu_(1)
    count = int(negative.sum())
    if count == 0:
        return (square.new_zeros((), dtype=checks.widest(square.device)),) * 2
    # Not only those of the mask: their indices would take more memory than all.
    found = square.clamp_(min=0).masked_fill_(negative.logical_not_(), torch.inf).view(-1)
    at = (math.ceil(share * count) for share in far)
    return tuple(checks.widened(found.kthvalue(k).values).sqrt() for k in at)


def _curves(near, n, classes, sizes, thresholds, epsilon, skipped) -> OPISCurves:
    within, across = checks.widened(near.cumsum(2)).unbind(0)
    size = checks.widened(sizes).unsqueeze(1)
    sensitivity = within / (size * (size - 1) / 2)
    # Without another class there is no false positive.
    specificity = 1 - across / (size * (n - size)).clamp(min=1)
    total = sensitivity + specificity
    utility = 2 * sensitivity * specificity / torch.where(total > 0, total, 1.0)
    count = utility.shape[0]
    if count < 2:
        score = gap = utility.new_zeros(())
    else:
        score = utility.var(0, correction=0).mean()
        some = math.ceil(epsilon * count)
        ordered = utility.sort(0).values
        gap = (ordered[-some:].mean(0) - ordered[:some].mean(0)).square().mean()
    return OPISCurves(
        score, gap, thresholds, utility, sensitivity, specificity, classes, sizes, skipped
    )
