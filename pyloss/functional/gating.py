"""Which channels of a layer matter for a sample, and the loss of a gate that is to foresee it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks

RULES = ("mass", "uniform")
_SMALL = 1e-5  # of the paper's code


def mass_topk_mask(
    act: Tensor,
    r: float,
    *,
    rule: str = "mass",
    min_channels: int = 1,
    inclusive: bool = False,
) -> Tensor:
    r"""The channels that hold most of each sample's activation.

    A channel counts by its largest magnitude, :math:`a_c = \max_{hw} |o_c|`, and by its share
    :math:`p_c = a_c / \sum_k a_k`. From large to small, it is kept while the sum of shares, its own
    included, is at most r + 1e-5; at r = 1 where :math:`p_c > 10^{-5}`.

    Args:
        act: o, maps ``(B, C, *)`` or numbers ``(B, C)``, floating; no gradient.
        r: at most 1; below 0 everything is kept. ``"uniform"``: the share of the channels that is
            left out.
        rule: ``"mass"``, or ``"uniform"``: the ``int(r C)`` smallest are left out, and those with
            :math:`a_c \le 10^{-5}`.
        min_channels: in [0, C]: so many of the largest are kept in any case, the first ones among
            equals: without them, one channel with p > r gives an empty mask.
        inclusive: with ``"mass"``: the channel with which the sum crosses r is kept too.

    Returns:
        ``(B, C)``, bool. A sample with NaN or infinity keeps all channels, so that they show.

    Raises:
        TypeError: ``act`` that is not floating; an option of the wrong type.
        ValueError: fewer than two dimensions, or maps without a pixel; an option out of range.

    Example:
        >>> import torch, pyloss
        >>> act = torch.tensor([[5.0, 1.0, 3.0, 1.0], [9.0, 0.0, 0.5, 0.5]])
        >>> pyloss.functional.mass_topk_mask(act, 0.8)
        tensor([[ True, False,  True, False],
                [ True, False, False, False]])
        >>> pyloss.functional.mass_topk_mask(act, 0.5, rule="uniform")
        tensor([[ True, False,  True, False],
                [ True, False,  True, False]])

    Reference:
        Elkerdawy, Elhoushi, Zhang, Ray. Fire Together Wire Together. arXiv 2110.08232.
    """
    checks.check_floating("act", act)
    check_mask_options(r, rule, inclusive)
    if act.dim() < 2:
        raise ValueError(f"act must be (B, C, *), got the shape {list(act.shape)}")
    channels = act.shape[1]
    check_min_channels(min_channels, channels)
    size = act.detach().abs().to(torch.promote_types(act.dtype, torch.float32))
    if act.dim() > 2:
        if 0 in act.shape[2:]:
            raise ValueError(f"act must have a pixel, got the shape {list(act.shape)}")
        size = size.flatten(2).amax(2)
    if not channels:
        return torch.zeros_like(size, dtype=torch.bool)
    ordered, places = size.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(channels, device=act.device)
    largest = ordered[:, :1]
    if r < 0:
        kept = torch.ones_like(ordered, dtype=torch.bool)
    elif rule == "uniform":
        kept = (rank < channels - int(r * channels)) & (ordered > _SMALL)
    else:
        # Divided by the largest first, whose sum may overflow. Rows of zeros keep no share.
        share = torch.where(largest > 0, ordered / largest, 0)
        share = share / share.sum(1, keepdim=True).clamp_min(1)
        sums = share.cumsum(1)
        if r == 1:
            kept = share > _SMALL
        else:
            kept = (sums - share < r) if inclusive else (sums <= r + _SMALL)
        kept = kept & (largest > 0)
    kept = kept | (rank < min_channels) | ~size.isfinite().all(1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, places, kept)


def check_mask_options(r: float, rule: str, inclusive: bool) -> None:
    checks.check_number("r", r)
    if not r <= 1:
        raise ValueError(f"r must be at most 1, got {r}")
    checks.check_one_of("rule", rule, RULES)
    checks.checked_flag("inclusive", inclusive)


def check_min_channels(min_channels: int, channels: int) -> None:
    found = checks.checked_integer("min_channels", min_channels)
    if not 0 <= found <= max(channels, 1):
        raise ValueError(f"min_channels must be in [0, {channels}], got {min_channels}")


def mask_prediction_loss(
    logits: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor]
) -> Tensor:
    r"""How well gates foresee the masks of their layers.

    .. math:: \frac1L \sum_l \sum_c \frac1B \sum_b \mathrm{BCE}(\sigma(s_{lbc}), m_{lbc})

    Args:
        logits: s of one layer, ``(B, C)``, floating, or of several, in a sequence.
        masks: m, as many and of the same shapes: bool, or floating in [0, 1]; no gradient.

    Returns:
        0-d: the mean over layers of the sum over channels of the mean over samples; no less than
        float32. Of no samples it is NaN.

    Raises:
        TypeError: logits that are not floating; masks that are integers.
        ValueError: no layers, or another number of masks; shapes that differ.
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> masks = torch.tensor([[True, False], [True, True]])
        >>> pyloss.functional.mask_prediction_loss(torch.zeros(2, 2), masks)
        tensor(1.3863)

    Reference:
        Elkerdawy et al. arXiv 2110.08232.
    """
    logits = (logits,) if isinstance(logits, Tensor) else tuple(logits)
    masks = (masks,) if isinstance(masks, Tensor) else tuple(masks)
    if len(logits) != len(masks) or not logits:
        raise ValueError(
            f"logits and masks must be of as many layers, of one or more, got {len(logits)} and "
            f"{len(masks)}"
        )
    each = []
    for number, (scores, mask) in enumerate(zip(logits, masks)):
        of = f" of layer {number}" if len(logits) > 1 else ""
        checks.check_floating(f"logits{of}", scores)
        checks.check_tensor(f"masks{of}", mask)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"masks{of} must be bool or floating, got {mask.dtype}")
        if scores.dim() != 2 or mask.shape != scores.shape:
            raise ValueError(
                f"logits{of} must be (B, C) and masks{of} of its shape, got {list(scores.shape)} "
                f"and {list(mask.shape)}"
            )
        checks.check_device(f"masks{of}", mask, scores, f"logits{of}")
        wide = torch.promote_types(scores.dtype, torch.float32)
        loss = F.binary_cross_entropy_with_logits(
            scores.to(wide), mask.detach().to(wide), reduction="none"
        )
        each.append(loss.mean(0).sum())
    return each[0] if len(each) == 1 else torch.stack(each).mean()
