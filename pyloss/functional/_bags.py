"""Instances in disjoint bags: the three ways to say which lies where, as one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks


class Bags(NamedTuple):
    order: Tensor | None  # that brings the instances of a bag together; None: they are
    offsets: Tensor  # (m + 1,), no bag being empty

    def rows(self, t: Tensor) -> Tensor:
        """Instances (n, *), bag by bag."""
        return t if self.order is None else t.index_select(0, self.order)

    def sizes(self) -> Tensor:
        return self.offsets.diff()


def bags_of(
    like: Tensor,
    bag_index: Tensor | None,
    bag_size: int | None,
    offsets: Tensor | None,
    *,
    count: int | None = None,
) -> Bags:
    """Of the instances (n, *), in `count` bags; None: as many as are said."""
    n = like.shape[0]
    if sum(t is not None for t in (bag_index, bag_size, offsets)) != 1:
        raise ValueError("give one of bag_index, bag_size and offsets")
    order = None
    if bag_size is not None:
        bag_size = checks.checked_count("bag_size", bag_size, 1)
        if n % bag_size:
            raise ValueError(f"bag_size must divide the number of instances, {n}, got {bag_size}")
        offsets = bag_size * torch.arange(n // bag_size + 1, device=like.device)
    elif offsets is not None:
        segment.check_offsets(offsets, n)
        checks.check_device("offsets", offsets, like, "the instances")
    else:
        segment.check_index("bag_index", bag_index)
        checks.check_device("bag_index", bag_index, like, "the instances")
        if bag_index.shape[0] != n:
            raise ValueError(
                f"bag_index must name a bag for each of {n} instances, got {bag_index.shape[0]}"
            )
        found, order = bag_index.sort(stable=True)
        message = "bag_index must be at least 0, and less than the number of bags"
        inside = (found >= 0).all() if count is None else ((found >= 0) & (found < count)).all()
        segment.require(inside, message, count)
        offsets = segment.offsets_from_index(found, count)
    if count is not None and offsets.shape[0] != count + 1:
        raise ValueError(f"there must be {count} bags, one a response, got {offsets.shape[0] - 1}")
    segment.require((offsets.diff() > 0).all(), "every bag must have an instance; one is empty")
    return Bags(order, offsets)
