"""Metrics of segmentations by their centrelines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._regions import as_bytes, read_target
from pyloss.functional._skeleton import mask_skeleton


@torch.no_grad()
def cl_dice(
    input: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    *,
    include_background: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Centreline Dice of masks: whether the skeleton of each lies inside the other.

    .. math::
        \mathrm{clDice} = \frac{2\,u\,v}{u + v}, \qquad
        u = \frac{|S_P \cap T|}{|S_P|},\quad v = \frac{|S_T \cap P|}{|S_T|}

    The skeletons are morphological: :func:`pyloss.functional.soft_skeleton` of the masks, with as
    many steps as they are thick. Papers that thin the masks to one voxel get other numbers.

    Args:
        input: ``(N, C, H, W)`` or ``(N, C, D, H, W)`` probabilities, or a mask.
        target: of the same shape, 0 and 1, or class indices ``(N, *)`` or ``(N, 1, *)`` for C > 1.
        threshold: values of ``input`` and of a floating target from here on are foreground.
        include_background: False leaves out channel 0 if there are others.
        reduction: ``"mean"`` or ``"sum"`` over items and channels, ``"none"``.

    Returns:
        float32, 0-d; ``(N, C')`` with ``reduction="none"``, C' channels count. In [0, 1]; 1 is
        best, and that of two empty masks; 0 where one is; NaN where a mask holds NaN.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as
        :func:`pyloss.functional.soft_dice_loss`.

    Example:
        >>> import torch, pyloss
        >>> tube = torch.zeros(1, 1, 7, 16, dtype=torch.bool)
        >>> tube[..., 2:5, :] = True
        >>> wide = torch.zeros_like(tube)
        >>> wide[..., 1:6, :] = True
        >>> pyloss.metrics.cl_dice(wide, tube)
        tensor(1.)

    Reference:
        Shit, Paetzold et al. clDice. arXiv 2003.07311.
    """
    checks.check_tensor("input", input)
    if input.dim() not in (4, 5):
        raise ValueError(
            f"input must have shape (N, C, H, W) or (N, C, D, H, W), got {list(input.shape)}"
        )
    checks.check_reduction(reduction)
    checks.check_number("threshold", threshold)
    found = input if input.dtype == torch.bool else input >= threshold
    read = read_target(
        found.float(),
        target,
        include_background=include_background,
        to_onehot_y=None,
        ignore_index=None,
    )
    p = found[:, read.first :]
    t = read.values
    if t.dtype != torch.bool:
        t = t >= threshold if t.is_floating_point() else t != 0
    of_p, of_t = mask_skeleton(p), mask_skeleton(t)
    sizes = [_count(m) for m in (of_p & t, of_p, of_t & p, of_t)]
    inside_p, all_p, inside_t, all_t = sizes
    u, v = inside_p / all_p, inside_t / all_t
    value = torch.where(inside_p + inside_t == 0, 0.0, 2 * u * v / (u + v))
    value = torch.where((all_p == 0) | (all_t == 0), (all_p == all_t).float(), value)
    if read.poison is not None:
        value = value * read.poison
    for mask in (input[:, read.first :], read.values):  # a comparison would take NaN for background
        if mask.is_floating_point():
            value = value.masked_fill(mask.isnan().flatten(2).any(2), math.nan)
    return value if reduction == "none" else getattr(value, reduction)()


def _count(mask: Tensor) -> Tensor:
    return as_bytes(mask).flatten(2).sum(2).float()
