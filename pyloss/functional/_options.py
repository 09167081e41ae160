"""Groups of options that several functions share, and how a function takes a whole group.

A group is declared here once, with its types. Its defaults are those of the function that has it
in its own signature; every other function, module or distributed twin writes ``**options`` and is
decorated with :func:`options_of`, which shows the options, checks their names and fills them in.
Inside they travel as keyword arguments: plain dicts, which every version of torch.compile traces.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


class FormulaOptions(TypedDict, total=False):
    """Of the formula of a row loss; see :func:`pyloss.fused_cross_entropy`."""

    label_smoothing: float
    tau: float
    gamma: float  # of the focal loss alone, as the next three of one loss each
    poly1: float
    relaxation: float
    ldr: bool
    margin: float  # of the logits, taken from the label's
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


class RegionOptions(TypedDict, total=False):
    """Of every region loss; see :func:`pyloss.functional.soft_dice_loss`."""

    include_background: bool
    to_onehot_y: bool | None
    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None
    reduction: str
    smooth_nr: float
    smooth_dr: float
    ignore_index: int | None
    empty: str
    validate: bool | None


class OverlapOptions(RegionOptions, total=False):
    """Of those that are made of sums over the voxels."""

    batch: bool
    soft_label: bool


class DiceOptions(OverlapOptions, total=False):
    """Of Dice; see :func:`pyloss.functional.soft_dice_loss`."""

    squared_pred: bool
    jaccard: bool
    weight: float | Sequence[float] | Tensor | None


class DiceCrossEntropyOptions(DiceOptions, total=False):
    """Of its sum with cross entropy; see :func:`pyloss.functional.dice_cross_entropy_loss`."""

    lambda_dice: float
    lambda_ce: float
    label_smoothing: float


class DiceFocalOptions(DiceOptions, total=False):
    """Of its sum with the focal loss; see :func:`pyloss.functional.dice_focal_loss`."""

    gamma: float
    lambda_dice: float
    lambda_focal: float
    alpha: float | Sequence[float] | None
    use_softmax: bool


class GeneralizedDiceOptions(OverlapOptions, total=False):
    """See :func:`pyloss.functional.generalized_dice_loss`."""

    w_type: str


class GeneralizedDiceFocalOptions(GeneralizedDiceOptions, total=False):
    """See :func:`pyloss.functional.generalized_dice_focal_loss`."""

    gamma: float
    weight: float | Sequence[float] | Tensor | None
    lambda_gdl: float
    lambda_focal: float
    alpha: float | Sequence[float] | None
    use_softmax: bool


class TverskyOptions(OverlapOptions, total=False):
    """See :func:`pyloss.functional.tversky_loss`."""

    alpha: float
    beta: float
    gamma: float


class SegmentationFocalOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.segmentation_focal_loss`."""

    include_background: bool
    to_onehot_y: bool | None
    gamma: float
    alpha: float | Sequence[float] | None
    weight: float | Sequence[float] | Tensor | None
    reduction: str
    use_softmax: bool
    ignore_index: int | None
    empty: str
    validate: bool | None


class ClDiceOptions(RegionOptions, total=False):
    """See :func:`pyloss.functional.cldice_loss`."""

    iter_: int
    smooth: float


class DiceClDiceOptions(ClDiceOptions, total=False):
    """See :func:`pyloss.functional.dice_cldice_loss`."""

    alpha: float


class SortingLossOptions(NetworkOptions, total=False):
    """See :func:`pyloss.sorting_cross_entropy`."""

    kind: str
    target_is: str
    reduction: str
    dim: int
    descending: bool
    ties: str
    validate: bool | None
    base: int


class SpearmanOptions(NetworkOptions, total=False):
    """See :func:`pyloss.spearman_loss`."""

    reduction: str
    dim: int
    method: str
    regularization: str
    regularization_strength: float
    ties: str


class GroCoOptions(NetworkOptions, total=False):
    """See :func:`pyloss.groco_loss`."""

    n_pos: int | None
    topk_neg: int
    stop_grad: bool
    reduction: str
    group: Any


class SimilarityOptions(TypedDict, total=False):
    """Of a loss on similarities of features; see :func:`pyloss.nt_xent`."""

    normalize: bool
    reduction: str


class GroupOptions(SimilarityOptions, total=False):
    """Of one that a process group can share."""

    group: Any
    ring: bool


class InfoNCEOptions(GroupOptions, total=False):
    """See :func:`pyloss.info_nce`."""

    in_batch: bool
    symmetric: bool


class DCLOptions(GroupOptions, total=False):
    """See :func:`pyloss.functional.dcl`."""

    sigma: float | None


class HardInfoNCEOptions(SimilarityOptions, total=False):
    """See :func:`pyloss.functional.hard_info_nce`."""

    hard_fraction: float


class SimpleContrastiveOptions(HardInfoNCEOptions, total=False):
    """See :func:`pyloss.functional.simple_contrastive`."""

    weight: float | None


class ListNetOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.list_net`."""

    temperature: float
    reduction: str


class ListMLEOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.list_mle`."""

    k: int | None
    reduction: str


class ApproxNDCGOptions(ListNetOptions, total=False):
    """See :func:`pyloss.functional.approx_ndcg_loss`."""

    gain: str


class NeuralNDCGOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.neural_ndcg_loss`."""

    relaxation: str
    steepness: float
    distribution: str
    k: int | None
    gain: str
    sinkhorn: int
    reduction: str


class LambdaOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.lambda_loss`."""

    weighting: str
    sigma: float
    k: int | None
    mu: float
    gain: str
    reduction: str


class ChamferOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.chamfer_set_loss`."""

    cost: str
    reduction: str


class HungarianOptions(ChamferOptions, total=False):
    """See :func:`pyloss.functional.hungarian_set_loss`."""

    return_matching: bool


class SinkhornOptions(ChamferOptions, total=False):
    """See :func:`pyloss.functional.sinkhorn_set_loss`."""

    epsilon: float
    iterations: int


class TCMOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.tcm_loss`."""

    m_pos: float
    m_neg: float
    lam_pos: float
    lam_neg: float


class EmbeddingPairOptions(TypedDict, total=False):
    """Of a loss on distances of labelled embeddings."""

    distance: str
    normalize: bool
    average: str
    reduction: str


class ContrastivePairOptions(EmbeddingPairOptions, total=False):
    """See :func:`pyloss.functional.contrastive_pair_loss`."""

    pos_margin: float
    neg_margin: float


class TripletMarginOptions(EmbeddingPairOptions, total=False):
    """See :func:`pyloss.functional.triplet_margin_loss`."""

    margin: float
    mining: str


class MultiSimilarityOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.multi_similarity_loss`."""

    alpha: float
    beta: float
    base: float
    epsilon: float | None
    reduction: str


class MarginSoftmaxOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.arcface_loss`."""

    margin: float
    scale: float
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str


class ICNNOptions(TypedDict, total=False):
    """See :func:`pyloss.functional.icnn_score`."""

    k: int
    neighbours: int | None
    use_omega: bool


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
    activation: str | Callable[[Tensor], Tensor] | None
    ignore_index: int | None
    spatial_dims: int | None
    reduction: str


class LowRankOptions(TypedDict, total=False):
    """Of low-rank attention; see :func:`pyloss.tensor_attention`."""

    method: str
    degree: int | None
    poly: str
    tol: float
    check: str
    logit_bound: float | None


LOW_RANK = tuple(LowRankOptions.__annotations__)


def names_of(function: Callable, without: Sequence[str] = ()) -> tuple[str, ...]:
    """The parameters of a function that have a default, in order."""
    found = inspect.signature(function).parameters.values()
    return tuple(p.name for p in found if p.default is not p.empty and p.name not in without)


def check_names(caller: str, given: Iterable[str], known: Container[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{caller} got an unexpected keyword argument {name!r}")


def options_of(
    like: Callable,
    only: Sequence[str] | None = None,
    *,
    without: Sequence[str] = (),
    positional: int | None = 0,
    after: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Callable[[_F], _F]:
    """Decorator: says what ``**options`` of a function stands for.

    ``inspect.signature`` and ``help`` show the options in its place, a call fills in the defaults,
    and a name that is not among them is the TypeError that Python raises for it.

    Args:
        like: the function whose signature has the options, their order and their defaults.
        only: these of its parameters; default: all that have a default.
        without: but not these.
        positional: so many of them, None: all, can be given by position as well, after the
            function's own parameters.
        after: where an own keyword of the function is shown: behind this name. Default: in front.
        annotations: that differ from those of `like`.
    """
    names = [name for name in only or names_of(like) if name not in without]
    by_position = names[:positional]
    parameters = inspect.signature(like).parameters
    group = []
    for name in names:
        kind = inspect.Parameter.KEYWORD_ONLY
        if name in by_position:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        annotation = (annotations or {}).get(name, parameters[name].annotation)
        group.append(parameters[name].replace(kind=kind, annotation=annotation))
    defaults = {parameter.name: parameter.default for parameter in group}

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        signature = signature.replace(parameters=_shown(signature, group, after or {}))
        known = dict.fromkeys(signature.parameters)
        caller = f"{function.__qualname__}()"
        own = function.__code__.co_argcount

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            check_names(caller, given, known)
            options = {**defaults, **given}
            if by_position:
                options.update(_by_position(caller, args, own, by_position, given))
                args = args[:own]
            return function(*args, **options)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return cast(_F, call)

    return decorate


def _shown(signature, group, after) -> list[inspect.Parameter]:
    """The parameters of a function with the group in place of ``**options``."""
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [p for p in own if p.name not in after] + group
    for name, before in after.items():
        at = [p.name for p in shown].index(before)
        shown.insert(at + 1, signature.parameters[name])
    return shown


def _by_position(caller, args, own, names, given) -> dict[str, Any]:
    """The options that were given by position, after the function's own arguments."""
    if len(args) > own + len(names):
        raise TypeError(
            f"{caller} takes from {own} to {own + len(names)} positional arguments but {len(args)} "
            "were given"
        )
    found = dict(zip(names, args[own:]))
    for name in found:
        if name in given:
            raise TypeError(f"{caller} got multiple values for argument {name!r}")
    return found
