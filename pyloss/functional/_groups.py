"""Groups of options that several functions share: each is declared here once, with its types.

For ``**options: Unpack[...]``, so for type checkers and readers alone: nothing imports this at run
time, where making these classes would take milliseconds. The defaults are those of the function
that has the options in its own signature, see :mod:`pyloss.functional._options`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FormulaOptions(TypedDict, total=False):
    """Of the formula of a row loss; see :func:`pyloss.fused_cross_entropy`."""

    label_smoothing: float
    tau: float
    gamma: float  # of the focal loss alone
    truncate: float | None
    z_loss: float
    softcap: float | None
    logit_scale: float
    temperature: float


class RowOptions(FormulaOptions, total=False):
    """Of a loss on rows of class scores; see :func:`pyloss.fused_cross_entropy`."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    token_weight: Tensor | None
    return_stats: Sequence[str]
    empty: str
    loss_dtype: torch.dtype | None
    num_items: float | Tensor | None


class NetworkOptions(TypedDict, total=False):
    """Of a differentiable sorting network; see :func:`pyloss.soft_sort`."""

    network: str
    distribution: str
    steepness: float | Tensor
    art_lambda: float


class DiceOptions(TypedDict, total=False):
    """Of a region loss; see :func:`pyloss.functional.soft_dice_loss`."""

    include_background: bool
    to_onehot_y: bool | None
    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None
    squared_pred: bool
    jaccard: bool
    reduction: str
    smooth_nr: float
    smooth_dr: float
    batch: bool
    weight: float | Sequence[float] | Tensor | None
    soft_label: bool
    ignore_index: int | None


class DiceCrossEntropyOptions(DiceOptions, total=False):
    """Of its sum with cross entropy; see :func:`pyloss.functional.dice_cross_entropy_loss`."""

    lambda_dice: float
    lambda_ce: float
    label_smoothing: float


class SortingLossOptions(NetworkOptions, total=False):
    """See :func:`pyloss.sorting_cross_entropy`."""

    kind: str
    target_is: str
    reduction: str
    dim: int
    descending: bool
    ties: str
    validate: bool


class SpearmanOptions(NetworkOptions, total=False):
    """See :func:`pyloss.spearman_loss`."""

    reduction: str
    dim: int
    method: str
    regularization: str
    regularization_strength: float


class BettiOptions(TypedDict, total=False):
    """See :func:`pyloss.betti_matching_loss`."""

    filtration: str
    dims: Sequence[int] | None
    weight: Sequence[float] | None
    matched_weight: float
    unmatched_weight: float
    target_weight: float
    include_target_unmatched: bool
    unmatched: str
    min_persistence: float
    essential: bool
    padding: str | float | None
    include_background: bool
    activation: str | None
    reduction: str


class LowRankOptions(TypedDict, total=False):
    """Of low-rank attention; see :func:`pyloss.tensor_attention`."""

    method: str
    degree: int | None
    poly: str
    tol: float
    check: str
    logit_bound: float | None
