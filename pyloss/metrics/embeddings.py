"""Metrics of embeddings: how evenly they lie, how close what belongs together is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._embeddings import (
    alike,
    check_labels,
    check_rows,
    prepared,
    similarity_softmax,
    without_autocast,
)
from pyloss.functional._sums import log_summed, reduced, summed
from pyloss.metrics import _embeddings as pairs

_LOWEST = -1e30  # in place of -inf: what it is multiplied by may be 0


def check_uniformity(*, t=2.0, normalize=True, max_pairs=None) -> int | None:
    """The options of uniformity, also for its accumulator; gives max_pairs."""
    checks.check_range("t", t, 0.0, open_low=True)
    checks.checked_flag("normalize", normalize)
    if max_pairs is None:
        return None
    max_pairs = checks.checked_integer("max_pairs", max_pairs)
    if max_pairs < 1:
        raise ValueError(f"max_pairs must be at least 1, got {max_pairs}")
    return max_pairs


def check_tolerance(*, normalize=True, over="same_class") -> None:
    checks.checked_flag("normalize", normalize)
    checks.check_one_of("over", over, ("same_class", "all"))


def check_alignment(*, alpha=2.0, normalize=True) -> None:
    checks.check_range("alpha", alpha, 0.0, open_low=True)
    checks.checked_flag("normalize", normalize)


@torch.no_grad()
def uniformity(
    embeddings: Tensor,
    t: float = 2.0,
    *,
    normalize: bool = True,
    max_pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""How evenly embeddings lie: the logarithm of the mean Gaussian potential of two of them.

    .. math:: U = \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-t \|f_i - f_j\|^2}

    The pairs come in tiles: no N x N matrix is formed. Lower is more even; 0 is one point.

    Args:
        embeddings: f ``(N, D)``, floating, N >= 2.
        t: > 0.
        normalize: take f to length 1.
        max_pairs: if there are more pairs, as many are drawn, with replacement, in place of all.
        generator: of the pairs that are drawn.

    Returns:
        0-d, float32 at least. A NaN among the embeddings makes it NaN.

    Raises:
        TypeError, ValueError: embeddings that are not ``(N, D)`` or floating, fewer than two, an
            option out of range.

    Example:
        >>> import torch, pyloss
        >>> pyloss.metrics.uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-8.)

    Reference:
        Wang, Isola. Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere. arXiv 2005.10242.
    """
    check_rows("embeddings", embeddings, least=2)
    max_pairs = check_uniformity(t=t, normalize=normalize, max_pairs=max_pairs)
    with without_autocast(embeddings):
        x = prepared(embeddings, normalize)
        n = x.shape[0]
        count = n * (n - 1) // 2
        if max_pairs is not None and max_pairs < count:
            potentials, count = _of_drawn_pairs(x, t, max_pairs, generator), max_pairs
        else:
            potentials = _of_unit_pairs(x, t) if normalize else _of_all_pairs(x, t)
        return log_summed(potentials).sub(math.log(count)).to(x.dtype)


def _of_unit_pairs(x: Tensor, t: float) -> Tensor:
    """Logarithms, in float64, whose exponentials sum to that of e^(-t d^2) over the pairs.

    Of unit vectors d^2 = 2 - 2 s: a log-sum-exp of 2 t s. A vector of zeros is none: its s, 0, is
    taken off again, and its d^2 is that of the definition.
    """
    lse = similarity_softmax(x, x, 2 * t, first=0).lse
    lse = checks.widened(lse) - 2 * t
    zero = (x == 0).all(1)
    zeros, units = checks.widened(zero.sum()), checks.widened((~zero).sum())
    ordered = log_summed(torch.where(zero, -torch.inf, lse))
    left = ordered.exp() - zeros * units * math.exp(-2 * t)
    others = zeros * (zeros - 1) + 2 * zeros * units * math.exp(-t)
    mixed = (left.clamp(min=0) + others).log()
    return (torch.where(zeros == 0, ordered, mixed) - math.log(2)).view(1)


def _of_all_pairs(x: Tensor, t: float) -> Tensor:
    """The same of vectors of any length, part by part."""
    x = x * math.sqrt(2 * t)
    half = (x * x).sum(1).mul_(0.5)  # -t d^2 = x . y - |x|^2 / 2 - |y|^2 / 2
    parts = []
    for rows, columns, z in pairs.triangle(x):
        z.sub_(half[rows, None]).sub_(half[columns])
        if rows == columns:
            z.masked_fill_(pairs.lower(z), _LOWEST)
        top = z.amax()
        # Row by row: the order in which torch adds up a whole tile is one of its threads.
        parts.append(checks.widened(summed(z.sub_(top).exp_().sum(1))).log_().add_(top))
    return torch.stack(parts)


def _of_drawn_pairs(x: Tensor, t: float, count: int, generator) -> Tensor:
    n, parts = x.shape[0], []
    chunk = max(1, pairs.TILE**2 // max(1, x.shape[1]))
    for begin in range(0, count, chunk):
        size = (min(chunk, count - begin),)
        i = torch.randint(n, size, generator=generator, device=x.device)
        step = torch.randint(1, n, size, generator=generator, device=x.device)
        between = x[i] - x[(i + step) % n]
        parts.append(log_summed(checks.widened((between * between).sum(1)).mul_(-t)))
    return torch.stack(parts)


@torch.no_grad()
def tolerance(
    embeddings: Tensor, labels: Tensor, *, normalize: bool = True, over: str = "same_class"
) -> Tensor:
    r"""How close embeddings of one class are: the mean inner product of two of them.

    .. math:: T = \operatorname{mean}_{i < j,\; y_i = y_j} f_i^\top f_j

    It comes from the sums of the classes, in O(N D):
    :math:`\sum_{i < j} f_i^\top f_j = (\|\sum_i f_i\|^2 - \sum_i \|f_i\|^2) / 2`.

    Args:
        embeddings: f ``(N, D)``, floating.
        labels: y ``(N,)``, any integers.
        normalize: take f to length 1.
        over: which pairs the sum is divided by: ``"same_class"``, or ``"all"``.

    Returns:
        0-d, float32 at least; NaN without such a pair. A NaN among the embeddings makes it NaN.

    Raises:
        TypeError, ValueError: embeddings or labels of a wrong dtype or shape, an option out of
            range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> pyloss.metrics.tolerance(x, torch.tensor([0, 1, 0]))
        tensor(1.)

    Reference:
        Wang, Liu. Understanding the Behaviour of Contrastive Loss. arXiv 2012.09740.
    """
    check_rows("embeddings", embeddings)
    check_labels(labels, embeddings)
    check_tolerance(normalize=normalize, over=over)
    with without_autocast(embeddings):
        x = prepared(embeddings, normalize)
        total, count = _same_class(x, labels)
        n = x.shape[0]
        return (total / (count if over == "same_class" else n * (n - 1) / 2)).to(x.dtype)


def _same_class(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the inner products over pairs of one class, number of these), float64."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    of_row = fresh.cumsum(0) - 1
    # As many places as there may be classes: nobody waits for a device to count them.
    x = checks.widened(x[order])
    sums = torch.zeros_like(x).index_add_(0, of_row, x)
    own = x.new_zeros(x.shape[0]).index_add_(0, of_row, (x * x).sum(1))
    sizes = torch.zeros_like(own).index_add_(0, of_row, torch.ones_like(own))
    # One alone is in no pair, exactly; as a NaN it counts.
    twice = torch.where(sizes > 1, (sums * sums).sum(1) - own, 0.0 * own)
    return summed(twice) / 2, summed(sizes * (sizes - 1)) / 2


@torch.no_grad()
def alignment(
    x: Tensor, y: Tensor, alpha: float = 2.0, *, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""How far the two of a positive pair lie apart.

    .. math:: A = \operatorname{mean}_i \|f(x_i) - f(y_i)\|^\alpha

    Args:
        x, y: embeddings ``(N, D)`` of the pairs, floating, of one dtype.
        alpha: > 0.
        normalize: take them to length 1.
        reduction: ``"mean"`` or ``"sum"`` over the pairs, or ``"none"``.

    Returns:
        0-d, or ``(N,)``; float32 at least. A NaN makes its pair NaN.

    Raises:
        TypeError, ValueError: embeddings of a wrong dtype or shape, an option out of range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.eye(3)
        >>> pyloss.metrics.alignment(x, x.roll(1, 0)).round(decimals=3)
        tensor(2.)

    Reference:
        Wang, Isola. arXiv 2005.10242.
    """
    check_rows("x", x)
    check_rows("y", y)
    if x.shape != y.shape or not alike(y, x):
        raise ValueError(
            f"y must be {x.dtype} of the shape {list(x.shape)} of x, got {y.dtype} {list(y.shape)}"
        )
    checks.check_device("y", y, x, "x")
    check_alignment(alpha=alpha, normalize=normalize)
    checks.check_reduction(reduction)
    each = torch.linalg.vector_norm(prepared(x, normalize) - prepared(y, normalize), dim=1).pow(
        alpha
    )
    return reduced(each, reduction)


@torch.no_grad()
def penalty_entropy(
    queries: Tensor,
    keys: Tensor | None = None,
    *,
    temperature: float = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""How many negatives a contrastive loss pushes: the entropy of its relative penalties.

    .. math:: H_i = -\sum_{k \ne i} r_{ik} \log r_{ik}, \qquad
              r_{ik} = \frac{e^{s_{ik} / \tau}}{\sum_{l \ne i} e^{s_{il} / \tau}}

    with s the inner products. e to its power is the number of negatives that share the penalty: 1
    for a small temperature, N - 1 for a large one. No N x N matrix is formed.

    Args:
        queries: ``(N, D)``, floating, N >= 2.
        keys: ``(N, D)``, of the same dtype; of the i-th query the i-th is the positive. Default:
            the queries.
        temperature: tau, > 0.
        normalize: take them to length 1.
        reduction: ``"mean"`` or ``"sum"`` over the queries, or ``"none"``.

    Returns:
        0-d, or ``(N,)``; float32 at least. A NaN among the queries makes its row NaN, one among the
        keys all others too.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, fewer than two rows, an option out
            of range.

    Example:
        >>> import torch, pyloss
        >>> x = torch.eye(5)  # all negatives alike
        >>> pyloss.metrics.penalty_entropy(x).exp().round(decimals=3)
        tensor(4.)

    Reference:
        Wang, Liu. Understanding the Behaviour of Contrastive Loss. arXiv 2012.09740.
    """
    check_rows("queries", queries, least=2)
    if keys is not None:
        check_rows("keys", keys)
        if keys.shape != queries.shape or not alike(keys, queries):
            raise ValueError(
                f"keys must be {queries.dtype} of the shape {list(queries.shape)} of queries, got "
                f"{keys.dtype} {list(keys.shape)}"
            )
        checks.check_device("keys", keys, queries, "queries")
    checks.check_range("temperature", temperature, 0.0, open_low=True)
    normalize = checks.checked_flag("normalize", normalize)
    checks.check_reduction(reduction)
    with without_autocast(queries):
        q = prepared(queries, normalize)
        k = q if keys is None else prepared(keys, normalize)
        found = similarity_softmax(q, k, 1 / temperature, first=0, mean=True)
        return reduced(found.lse - found.mean, reduction)
