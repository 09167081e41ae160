"""What the contrastive losses share: their checks, features as the op takes them, the mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._embeddings import check_integers, summed
from pyloss.ops._launch import accumulator_dtype, without_autocast
from pyloss.ops.similarity_softmax import Stats, loss, pair_sums, similarity_softmax, unit_rows


def check_positive(name: str, value) -> None:
    """A number > 0; of a tensor, which may be on a device, the dtype alone."""
    if isinstance(value, Tensor):
        checks.check_floating(name, value)
    else:
        checks.check_range(name, value, 0.0, open_low=True)


def check_finite(name: str, value) -> None:
    """A number; of a tensor the dtype alone."""
    if isinstance(value, Tensor):
        checks.check_floating(name, value)
        return
    checks.check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def checked_fraction(value) -> float:
    checks.check_range("hard_fraction", value, 0.0, open_low=True)
    if not value <= 1:
        raise ValueError(f"hard_fraction must be at most 1, got {value}")
    return value


def check_common(normalize, reduction, group=None, ring=False) -> None:
    checks.checked_flag("normalize", normalize)
    checks.check_reduction(reduction)
    if checks.checked_flag("ring", ring) and group is None:
        raise ValueError("ring needs a group, whose ranks the keys go around")


class Features:
    """Features (N, D) as the op takes them, by name, and the dtype of the loss.

    Half types are computed in float32; on a GPU the products are those of the half type, which its
    matrix units have, and features are normalised before they are rounded to it.
    """

    def __init__(self, normalize: bool, **features: Tensor) -> None:
        first_name, first = next(iter(features.items()))
        dtype = None
        for name, z in features.items():
            checks.check_tensor(name, z)
            checks.check_dense(name, z)
            if z.dtype not in checks.FLOATS:
                raise TypeError(
                    f"{name} must be float16, bfloat16, float32 or float64, got {z.dtype} of shape "
                    f"{list(z.shape)}"
                )
            if z.dim() != 2:
                raise ValueError(f"{name} must be (N, D), got {list(z.shape)}")
            if z.shape[1] != first.shape[1]:
                raise ValueError(
                    f"{name} must have as many features as {first_name}, {first.shape[1]}, got "
                    f"{list(z.shape)}"
                )
            checks.check_device(name, z, first, first_name)
            dtype = z.dtype if dtype is None else torch.promote_types(dtype, z.dtype)
        self.normalize = checks.checked_flag("normalize", normalize)
        self.sums = accumulator_dtype(dtype)
        self.products = dtype if first.is_cuda else self.sums
        self.result = checks.result_dtype(dtype, first)
        self.first = first

    def of(self, *parts: Tensor) -> Tensor:
        """For the op: the rows of all parts."""
        if self.normalize:
            return self.exact(*parts).to(self.products)
        return joined(*parts).to(self.products)

    def exact(self, *parts: Tensor) -> Tensor:
        """In the dtype of the sums."""
        if self.normalize:
            return unit_rows(*(z.to(self.sums) for z in parts))
        return joined(*parts).to(self.sums)

    def scale(self, name: str, value: float | Tensor, rows: int | None = None) -> float | Tensor:
        """A number, or a tensor of one number, or of one a row where there may be so many."""
        if not isinstance(value, Tensor):
            # A number that changes would be a graph for each value; a product is one for all.
            compiling = torch.compiler.is_compiling()
            return self.first.new_ones((), dtype=self.sums) * value if compiling else value
        checks.check_device(name, value, self.first, "the features")
        if value.dim() == 1 and rows is not None and value.shape[0] == rows:
            return value.to(self.sums)
        if value.numel() != 1:
            shape = "one number" if rows is None else f"one number, or {rows}"
            raise ValueError(f"{name} must hold {shape}, got shape {list(value.shape)}")
        return value.to(self.sums).reshape(())

    def inverse(self, name: str, value: float | Tensor, rows: int | None = None) -> float | Tensor:
        """One over a temperature."""
        return 1.0 / self.scale(name, value, rows)

    def reduced(
        self, each: Tensor, reduction: str, counted: Tensor | None = None, group=None
    ) -> Tensor:
        """Of rows, those that are not counted being 0; the mean of none is 0. With a group its mean
        over the ranks is that of all their rows."""
        if counted is not None:
            each = torch.where(counted, each, 0.0)
        if reduction == "none":
            return each.to(self.result)
        total = summed(each)
        if reduction == "mean":
            count = each.numel() if counted is None else counted.sum()
            if group is not None:
                from pyloss.functional import _contrastive_group as of_group  # with its first use

                total = of_group.mean(total, count, group)
            else:
                total = total / (max(1, count) if counted is None else count.clamp(min=1))
        return total.to(self.result)


def at_once(
    features: Features, x1: Tensor, x2: Tensor | None, scale, reduction: str, group, flags: int,
    **given,
) -> Tensor | None:  # fmt: skip
    """The mean or sum by the op that has all of it; None where that op does not serve."""
    if not features.normalize or reduction == "none" or group is not None:
        return None
    if not loss.serves(x1, x2) or (isinstance(scale, Tensor) and scale.dim() > 0):
        return None
    if reduction == "sum":
        flags |= loss.SUM
    return loss.similarity_loss(x1, x2, scale, flags, **given)


def softmax_over(group, ring: bool) -> Callable:
    """similarity_softmax, with the keys of all ranks of a group."""
    if group is None:
        return similarity_softmax
    from pyloss.functional import _contrastive_group as of_group  # with its first use

    return functools.partial(of_group.statistics, group=group, ring=ring)


def pair_sums_over(group, ring: bool) -> Callable:
    if group is None:
        return pair_sums
    from pyloss.functional import _contrastive_group as of_group  # with its first use

    return functools.partial(of_group.sums, group=group, ring=ring)


def shares(x: Tensor, group) -> Tensor:
    """Softmax over the rows, of all ranks of a group, times their count. Without a gradient."""
    if group is None:
        return x.shape[0] * x.softmax(0)
    from pyloss.functional import _contrastive_group as of_group  # with its first use

    return of_group.shares(x, group)


def of_rows(stats: Stats) -> Tensor:
    """-log p of the positive, of each row."""
    return _surprise(stats.lse, stats.positive, stats.count, stats.positives)


def of_columns(stats: Stats) -> Tensor:
    return _surprise(
        stats.column_lse, stats.column_positive, stats.column_count, stats.column_positives
    )


def _surprise(lse: Tensor, positive: Tensor, count: Tensor, positives: Tensor) -> Tensor:
    """A positive alone is certain, whatever the roundings of its logit; a NaN stays."""
    return (lse - positive) * (count > positives)


def check_same_rows(name: str, z: Tensor, other_name: str, other: Tensor) -> None:
    if z.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have as many rows as {other_name}, {other.shape[0]}, got {z.shape[0]}"
        )


def checked_labels(name: str, labels, rows: int, like: Tensor) -> Tensor:
    """Integers, one a row, as int64."""
    check_integers(name, labels, rows)
    checks.check_device(name, labels, like, "the features")
    return labels.long()


def paired(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """(2B, D), the one view and then the other; the row of each one's other view."""
    return joined(z1, z2), other_views(z1)


def other_views(z: Tensor) -> Tensor:
    """Of 2B rows, the views of B images and then their other ones: the row of the other view."""
    count = z.shape[0]
    return torch.arange(2 * count, device=z.device).roll(count)


def joined(*parts: Tensor) -> Tensor:
    """Rows of all parts, also under autocast to another half type, which torch.cat refuses."""
    if len(parts) == 1:
        return parts[0]
    with without_autocast(parts[0]):
        return torch.cat(parts)


def hardest_count(hard_fraction: float, negatives: int) -> int:
    """ceil(fraction * negatives), where a product that should be whole is not a little above."""
    return min(negatives, int(-(-hard_fraction * negatives * (1 - 1e-12) // 1)))
