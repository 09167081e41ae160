"""Classification by the k largest scores instead of the largest alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sorting_rows import (
    SELECTORS,
    UnknownNetworkError,
    applied,
    checked_settings,
    rows_of,
)
from pyloss.functional.permutahedron import permutahedron_rank
from pyloss.functional.relaxed_sort import neural_sort, soft_sort_matrix
from pyloss.ops._launch import accumulator_dtype, constants

SORTERS = (*SELECTORS, "neuralsort", "softsort", "permutahedron")
TOP1 = ("sm", "smce", "sort")
# Of a share t the loss is -log(t (1 - 2 SMALL) + SMALL), as the authors have it.
_SMALL = 1e-7


class Options(NamedTuple):
    """What is checked when a module is made."""

    p_k: tuple[float, ...]
    m: int | None
    ignore_index: int


def check_options(
    p_k, m, top1_mode, sorter, steepness, distribution, art_lambda, reduction, ignore_index
) -> Options:
    checks.check_reduction(reduction)
    if top1_mode not in TOP1:
        raise ValueError(f"top1_mode must be one of {', '.join(TOP1)}; got {top1_mode!r}")
    if sorter not in SORTERS:
        raise UnknownNetworkError(f"sorter must be one of {', '.join(SORTERS)}; got {sorter!r}")
    if isinstance(steepness, Tensor):
        raise TypeError("steepness must be a number, got Tensor")
    shares = _shares(p_k)
    network = sorter if sorter in SELECTORS else "auto"
    checked_settings(network, distribution, steepness, art_lambda, len(shares), SELECTORS)
    if m is not None:
        m = checks.checked_integer("m", m)
        if m <= len(shares):
            raise ValueError(f"m must be above {len(shares)}, the largest k of p_k, got {m}")
    return Options(shares, m, checks.checked_integer("ignore_index", ignore_index))


def _shares(p_k) -> tuple[float, ...]:
    if isinstance(p_k, (str, bytes)) or not isinstance(p_k, (Sequence, Tensor)):
        k = checks.as_integer(p_k)
        if k is None:
            raise TypeError(
                f"p_k must be the shares of k = 1, 2, ..., or one k, got {type(p_k).__name__}"
            )
        if k < 1:
            raise ValueError(f"p_k must be at least 1 as one k, got {k}")
        return (0.0,) * (k - 1) + (1.0,)
    shares = tuple(p_k.tolist()) if isinstance(p_k, Tensor) else tuple(p_k)
    for share in shares:
        checks.check_range("p_k", share, 0.0)
    if not 0.9999 < sum(shares) < 1.0001:
        raise ValueError(f"p_k must sum to 1, got {list(shares)}, which sum to {sum(shares):g}")
    return tuple(map(float, shares))


def topk_cross_entropy(
    input: Tensor,
    target: Tensor,
    p_k: Sequence[float] | int = (0.5, 0.0, 0.0, 0.0, 0.5),
    m: int | None = None,
    top1_mode: str = "sm",
    *,
    sorter: str = "splitter_selection",
    steepness: float = 1.0,
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy of "the label is among the k largest scores", for a distribution over k.

    .. math:: \ell = -\log\Big(\sum_k p_k\, S_k(y)\Big), \qquad
              S_k(c) = \sum_{r \text{ of the } k \text{ last}} P_{c r}

    P is the relaxed permutation that sorts the scores, S_k(c) how much of class c is among the k
    largest. P is not formed by the networks: one vector, the share of each rank, is pushed through.

    Args:
        input: scores ``(N, C)``, ``(C,)`` or ``(N, C, ...)``, floating.
        target: classes ``(N, ...)``, integers; or a weight of each class, of the shape of ``input``
            and floating: several labels, of which the sum of the weighted losses is taken.
        p_k: shares of k = 1, 2, ..., which sum to 1, or one k.
        m: only the score of the label and the m - 1 largest others take part, max k < m < C. Not
            with several labels.
        top1_mode: what stands for S_1: ``"sm"``: the softmax; ``"sort"``: P; ``"smce"``: the loss
            is p_1 times the cross entropy plus 1 - p_1 times that of the others.
        sorter: a network of :func:`pyloss.soft_topk`, or ``"neuralsort"``, ``"softsort"``,
            ``"permutahedron"`` (S_k is k + 1 less the soft rank, within 0 and 1).
        steepness: of the comparators, or the inverse temperature.
        distribution, art_lambda: of the networks, as in :func:`pyloss.soft_sort`.
        ignore_index: a label that is none: loss 0, not counted in the mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or the shape of ``target`` without classes; of the dtype of ``input``, float32 for half
        types under autocast. A NaN makes the loss of its row NaN. Twice differentiable.

    Raises:
        TypeError: tensors or options of the wrong type.
        ValueError: an unknown name, an option out of range, shapes that do not fit.
        IndexError: a label out of bounds, on the CPU.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(8, 20, requires_grad=True)
        >>> labels = torch.randint(20, (8,))
        >>> pyloss.topk_cross_entropy(logits, labels, p_k=(0.2, 0.2, 0.2, 0.2, 0.2)).backward()

    Reference:
        Petersen, Kuehne, Borgelt, Deussen. arXiv 2206.07290.
    """
    options = check_options(
        p_k, m, top1_mode, sorter, steepness, distribution, art_lambda, reduction, ignore_index
    )
    p_k, m, ignore_index = options
    several = _checked(input, target, m, len(p_k))
    result = checks.result_dtype(input.dtype, input)
    classes = 0 if input.dim() == 1 else 1
    z = input.movedim(classes, -1).to(accumulator_dtype(input.dtype))
    lead = z.shape[:-1]
    z = z.reshape(-1, z.shape[-1])
    if several:
        y = target.movedim(classes, -1).reshape(z.shape).to(z.dtype)
        counted = None
    else:
        y = target.reshape(-1).long()
        counted = ~checks.equals(y, ignore_index)
        # Nobody waits for a device: there gather has its own assertion.
        if checks.can_look_at(y):
            checks.check_index_values(y, z.shape[1], ignore_index)
        y = torch.where(counted, y, 0).unsqueeze(1)
        if m is not None:
            others = z.scatter(1, y, -torch.inf).topk(m - 1, dim=1).values
            z, y = torch.cat([z.gather(1, y), others], 1), torch.zeros_like(y)
    in_rank = list(p_k) if top1_mode == "sort" else [0.0, *p_k[1:]]
    t = _membership(z, in_rank, sorter, steepness, distribution, art_lambda)
    if top1_mode == "sm":
        t = t + p_k[0] * z.softmax(1)

    def of_labels(values: Tensor) -> Tensor:
        return (y * values).sum(1) if several else values.squeeze(1)

    t = t if several else t.gather(1, y)  # the logarithms of one class are enough
    each = -of_labels((t * (1 - 2 * _SMALL) + _SMALL).log())
    if top1_mode == "smce":
        top1 = z.log_softmax(1)
        top1 = -of_labels(top1 if several else top1.gather(1, y))
        each = p_k[0] * top1 + sum(p_k[1:]) * each
    if counted is not None:
        each = torch.where(counted, each, 0.0)
    if reduction == "none":
        return each.view(lead).to(result)
    total = each.sum()
    if reduction == "mean":
        total = total / (each.shape[0] if counted is None else counted.sum())
    return total.to(result)


def _membership(z, shares, sorter, steepness, distribution, art_lambda) -> Tensor:
    """(rows, classes): the sum over k of shares[k - 1] times how much is among the k largest."""
    if not any(shares):
        return torch.zeros_like(z)
    k = len(shares)
    # Of the rank r from the top, 0 the first: all k above r.
    of_rank = list(itertools.accumulate(reversed(shares)))[::-1]
    if sorter in SELECTORS:
        settings = checked_settings(sorter, distribution, steepness, art_lambda, k, SELECTORS)
        weights = F.pad(constants(of_rank[::-1], z.dtype, z.device), (z.shape[1] - k, 0))
        rows = rows_of("input", z, -1, False, settings)
        return applied(rows, weights.view(1, -1, 1), False).squeeze(-1)
    if sorter == "permutahedron":
        rank = permutahedron_rank(z, regularization_strength=1 / steepness, descending=True)
        return sum(p * (i + 2 - rank).clamp(0, 1) for i, p in enumerate(shares) if p)
    matrix = neural_sort if sorter == "neuralsort" else soft_sort_matrix
    weights = constants(of_rank, z.dtype, z.device).view(1, k, 1)
    return (weights * matrix(z, 1 / steepness)[:, :k]).sum(1)


def _checked(input, target, m, k: int) -> bool:
    """Whether the target holds weights of classes."""
    checks.check_floating("input", input)
    checks.check_dense("input", input)
    checks.check_tensor("target", target)
    checks.check_device("target", target, input)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of classes, got a 0-d tensor")
    classes = input.shape[0 if input.dim() == 1 else 1]
    several = target.is_floating_point()
    expected = list(input.shape)
    if not several:
        if target.dtype not in checks.INTEGERS:
            raise TypeError(f"target must hold classes or weights of classes, got {target.dtype}")
        expected.pop(0 if input.dim() == 1 else 1)
    if list(target.shape) != expected:
        raise ValueError(
            f"target must have the shape {expected} beside an input of {list(input.shape)}, got "
            f"{list(target.shape)}"
        )
    if m is None and classes < k:
        raise ValueError(f"p_k has shares up to k = {k}, of {classes} classes")
    if m is not None and several:
        raise ValueError("m takes one label for each row, and target holds weights of classes")
    if m is not None and m >= classes:
        raise ValueError(f"m must be below the number of classes, {classes}, got {m}")
    return several
