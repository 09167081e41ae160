"""What is ordered as rows of the op: folding, the network's options, the target of a loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_number, check_tensor
from pyloss.ops import sorting_network as op
from pyloss.ops._transforms import functorch_active as transformed

SORTERS = ("auto", "bitonic", "odd_even", "batcher")
SELECTORS = (*SORTERS, "splitter_selection")  # the last one selects, and does not sort
STEEPEST = 1e30  # times the slopes of the relaxations, still finite in float32
TARGETS = ("values", "ranks", "permutation")
TIES = ("stable", "share")


class UnknownNetworkError(ValueError, NotImplementedError):
    """An unknown network or distribution: a ValueError as torch's, and what diffsort raises."""


class Rows:
    """x as rows of the op, and how to go back."""

    def __init__(
        self,
        x: Tensor,  # (b, n), float32 or float64, contiguous; -x if descending
        settings: op.Settings,
        lead: tuple[int, ...],  # the shape without the sorted dimension
        dim: int,
        dtype: torch.dtype,  # of the results
        sign: int,
    ) -> None:
        self.x, self.settings, self.lead = x, settings, lead
        self.dim, self.dtype, self.sign = dim, dtype, sign

    @property
    def n(self) -> int:
        return self.x.shape[1]

    def unfolded(self, y: Tensor) -> Tensor:
        """(b, n) back to the shape of the input."""
        return y.view(*self.lead, self.n).movedim(-1, self.dim).to(self.dtype)

    def matrices(self, p: Tensor) -> Tensor:
        """(b, n, d) to (*lead, n, d)."""
        return p.view(*self.lead, *p.shape[1:]).to(self.dtype)

    def order(self) -> Tensor:
        """Which element has each rank, (b, n)."""
        return torch.argsort(self.x.detach(), dim=1, stable=True)

    def ranks(self) -> Tensor:
        """Which rank each element has, (b, n)."""
        return op.inverse(self.order())


def check_ordered(name: str, x) -> None:
    """That x is a floating tensor which can be sorted."""
    check_tensor(name, x)
    checks.check_dense(name, x)
    if x.dtype not in checks.FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype} of shape "
            f"{list(x.shape)}"
        )


def check_dim(x: Tensor, dim: int) -> None:
    """In torch's words."""
    checks.checked_integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-x.dim()}, {x.dim() - 1}], "
            f"but got {dim})"
        )


def check_choice(name: str, value, known) -> None:
    checks.check_one_of(name, value, known, then="; ")


def checked_settings(network, distribution, steepness, art_lambda, k=0, networks=SORTERS):
    """op.Settings of checked arguments; a tensor as steepness is only looked at for its dtype."""
    for name, value, allowed in (
        ("network", network, networks),
        ("distribution", distribution, op.DISTRIBUTIONS),
    ):
        if value not in allowed:
            raise UnknownNetworkError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if isinstance(steepness, Tensor):
        check_ordered("steepness", steepness)
    else:
        check_number("steepness", steepness)
        if not 0 < steepness <= STEEPEST:
            raise ValueError(
                f"steepness must be positive and at most {STEEPEST:g}, got {steepness}"
            )
    check_number("art_lambda", art_lambda)
    if not 0 <= art_lambda < 1:
        raise ValueError(f"art_lambda must be in [0, 1), got {art_lambda}")
    if network != "splitter_selection":
        k = 0
    return op.Settings(network, distribution, steepness, art_lambda, k)


def rows_of(name, x, dim, descending, settings, empty=False) -> Rows:
    """Checks x, and folds it; with `empty` also where there is nothing to sort."""
    check_ordered(name, x)
    checks.check_has_dimension(name, x)
    check_dim(x, dim)
    n = x.shape[dim]
    if n == 0 and not empty:
        raise ValueError(
            f"{name} has nothing to sort along dim {dim}: its shape is {list(x.shape)}"
        )
    dim %= x.dim()
    rows, lead = fold(x, dim)
    if x.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    if descending:
        rows = -rows
    steepness = settings.steepness
    if isinstance(steepness, Tensor):
        settings = _with_steepness(settings, _rowwise(steepness, lead, rows))
    dtype = checks.result_dtype(x.dtype, x)
    return Rows(rows.contiguous(), settings, lead, dim, dtype, -1 if descending else 1)


def _with_steepness(s: op.Settings, steepness: float | Tensor) -> op.Settings:
    """Not by _replace, which torch.compile cannot trace in every version of torch."""
    return op.Settings(s.network, s.distribution, steepness, s.art_lambda, s.k)


def fold(x: Tensor, dim: int) -> tuple[Tensor, tuple[int, ...]]:
    """(x as (b, n) of what stands along dim, the shape without dim)."""
    if x.dim() == 2 and dim == 1:  # small problems are bound by the number of calls
        return x, (x.shape[0],)
    moved = x.movedim(dim, -1)
    lead = tuple(moved.shape[:-1])
    return moved.reshape(math.prod(lead), moved.shape[-1]), lead


def _rowwise(steepness: Tensor, lead: tuple[int, ...], rows: Tensor) -> Tensor:
    """A steepness for each row, (b, 1)."""
    return broadcast_steepness(steepness, lead).to(rows.dtype).reshape(rows.shape[0], 1)


def broadcast_steepness(steepness: Tensor, lead: tuple[int, ...]) -> Tensor:
    try:
        return steepness.expand(lead)
    except RuntimeError:
        raise ValueError(
            f"steepness of shape {list(steepness.shape)} does not broadcast to the shape "
            f"{list(lead)} of x without the sorted dimension"
        ) from None


def for_op(rows: Rows) -> tuple[Tensor, op.Settings]:
    """(x, settings), a tensor as steepness multiplied into x: P(x; s) = P(s x; 1)."""
    s = rows.settings.steepness
    # With logistic_phi a factor does more than that; the reference takes it as it is.
    if not isinstance(s, Tensor) or rows.settings.distribution == "logistic_phi":
        return rows.x, rows.settings
    return _times(rows.x, s), _with_steepness(rows.settings, 1.0)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor for a positive factor, which gets no gradient from infinite entries."""
    infinite = x.isinf()
    return torch.where(infinite, x, torch.where(infinite, 0.0, x) * factor)


def sorted_values(rows: Rows) -> Tensor:
    x, settings = for_op(rows)
    y = op.sort(x, settings)
    return y if x is rows.x else _times(y, 1 / rows.settings.steepness)


def permutation(rows: Rows) -> tuple[Tensor, Tensor]:
    x, settings = for_op(rows)
    y, p = op.permutation(x, settings)
    return (y if x is rows.x else _times(y, 1 / rows.settings.steepness)), p


def applied(rows: Rows, f: Tensor, transpose: bool) -> Tensor:
    x, settings = for_op(rows)
    return op.apply(x, f, transpose, settings)


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`, which is finite; NaN where that is NaN."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def straight_through_values(soft: Tensor, hard: Tensor) -> Tensor:
    """The same of values, which may be infinite. It keeps a byte for each; weights need none."""
    return torch.where(soft.isinf(), soft, straight_through(soft, hard))


def places(rows: Rows) -> Tensor:
    """0, 1, ..., n - 1 as one feature that all rows share."""
    return torch.arange(rows.n, dtype=rows.x.dtype, device=rows.x.device).view(1, -1, 1)


def shared(r: Tensor, x: Tensor) -> Tensor:
    """Each r (b, n) becomes the mean over the elements of x, (b, n), that are equal to its own."""
    x = x.detach()
    eager = not (torch.compiler.is_compiling() or transformed())
    if eager and x.device.type == "cpu":
        ordered = x.sort(1).values
        if not bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            return r  # as mostly: nothing is kept for a backward then
    first, count, _ = op.target_ranks(x, "shared")
    group = first.long().clamp_max(x.shape[1] - 1)  # a NaN is behind all others
    total = torch.zeros_like(r).scatter_add(1, group, r)
    return total.gather(1, group) / count


def nothing(rows: Rows) -> Tensor:
    """P of no elements, (b, 0, 0)."""
    return rows.x.unsqueeze(-1) * rows.x.unsqueeze(1)


def one_hot(rows: Rows) -> Tensor:
    """Q[i, rank(i)] = 1, (b, n, n)."""
    place = torch.arange(rows.n, device=rows.x.device)
    return (rows.ranks().unsqueeze(-1) == place).to(rows.x.dtype)


def expanded(rows: Rows, lead: tuple[int, ...], dtype: torch.dtype, result: torch.dtype) -> Rows:
    """The rows repeated for a wider leading shape, for results of another dtype."""
    settings, count = rows.settings, math.prod(lead)

    def wide(t: Tensor) -> Tensor:
        return (
            t.to(dtype)
            .view(*rows.lead, t.shape[1])
            .expand(*lead, t.shape[1])
            .reshape(count, t.shape[1])
        )

    if isinstance(settings.steepness, Tensor):
        settings = _with_steepness(settings, wide(settings.steepness))
    x = wide(rows.x).contiguous()
    return Rows(x, settings, lead, rows.dim, result, rows.sign)


# --------------------------------------------------------------------------------------------------
# The target of a loss


def check_target(x: Tensor, lead: tuple[int, ...], n: int, target, target_is: str) -> None:
    check_tensor("target", target)
    checks.check_dense("target", target)
    if target.device != x.device:
        raise ValueError(f"target is on {target.device}, x on {x.device}")
    expected = (*lead, n, n) if target_is == "permutation" else tuple(x.shape)
    if tuple(target.shape) != expected:
        raise ValueError(
            f"target must have the shape {list(expected)} with target_is={target_is!r}, got "
            f"{list(target.shape)}"
        )


def ordered_target(x, rows: Rows, target, target_is, ties, validate, base=0):
    """(target (b, n), order, which rows hold a NaN that the op does not see or None)."""
    n = rows.n
    check_target(x, rows.lead, n, target, target_is)
    if target_is == "permutation":
        if target.is_complex():
            raise ValueError(f"target must be real, got {target.dtype}")
        target = target.detach().reshape(-1, n, n)
        if validate:
            # A device without an answer yet is waited for, which is what was asked for.
            ones = (target == 1).sum(1, dtype=torch.int64), (target == 1).sum(2, dtype=torch.int64)
            if bool(((target != 0) & (target != 1)).any() | (ones[0] != 1).any()) or bool(
                (ones[1] != 1).any()
            ):
                raise ValueError("target is not a permutation: its rows or columns are not one-hot")
        nan = target.isnan().any(-1).any(-1) if target.is_floating_point() else None
        return _ranks_of_matrix(target), "ranks", nan
    folded, _ = fold(target.detach(), rows.dim)
    if target_is == "ranks":
        if target.dtype not in checks.INTEGERS and target.dtype not in checks.FLOATS:
            raise ValueError(f"target must hold ranks, got {target.dtype}")
        if folded.dtype in (torch.uint8, torch.int8, torch.int16):  # n may be beyond these
            folded = folded.to(torch.int32)
        if validate is None:  # no device is waited for, and no graph or transform is in the way
            on_cpu = target.device.type == "cpu"
            validate = on_cpu and not (torch.compiler.is_compiling() or transformed())
        if validate:
            _check_ranks(folded, n, ties, base)
        folded = folded - base if base else folded
        if ties == "stable":
            nan = folded.isnan().any(-1) if folded.is_floating_point() else None
            if folded.dtype != torch.int32:
                folded = folded.clamp(-1, n)  # what is not a rank stays none, also beyond 32 bits
            return folded.to(torch.int32), "ranks", nan
        return _comparable(folded), "shared", None
    if (
        target.dtype not in checks.INTEGERS
        and target.dtype not in checks.FLOATS
        and target.dtype != torch.bool
    ):
        raise ValueError(f"target must hold real values, got {target.dtype}")
    order = "shared" if ties == "share" else "values"
    return _comparable(folded), order + "_descending" * (rows.sign < 0), None


def _ranks_of_matrix(target: Tensor) -> Tensor:
    """Where each row has its 1, give or take its rounding; -1, no target, where it has none."""
    most, place = (target.to(torch.uint8) if target.dtype == torch.bool else target).max(-1)
    return torch.where(most > 0.5, place, -1).to(torch.int32)


def poisoned(rows: Rows, nan: Tensor | None) -> Rows:
    """x with NaN in the rows whose target has one."""
    if nan is None:
        return rows
    poison = torch.where(nan, math.nan, 0.0).to(rows.x.dtype)
    x = rows.x + poison.unsqueeze(1)  # a sum keeps nothing for its backward
    return Rows(x, rows.settings, rows.lead, rows.dim, rows.dtype, rows.sign)


def _comparable(values: Tensor) -> Tensor:
    """In a dtype that the op compares in, of the same order."""
    if values.dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        return values
    return values.to(torch.float32 if values.is_floating_point() else torch.int32)


def _check_ranks(ranks: Tensor, n: int, ties: str, base: int) -> None:
    if ranks.is_floating_point():  # a row with a NaN has no order, and its loss is NaN
        ranks = ranks[~ranks.isnan().any(-1)]
    inside = (ranks >= base) & (ranks <= base + n - 1)
    if not bool(inside.all()):
        raise ValueError(
            f"target ranks must be in [{base}, {base + n - 1}] with base={base}, got "
            f"{ranks.min().item()} to {ranks.max().item()}; what counts from 1 wants base=1, and "
            "validate=False lets anything pass"
        )
    ranks = ranks - base
    whole = ranks.to(torch.int64)
    if not bool((whole == ranks).all()) and ties == "stable":
        raise ValueError("target ranks must be whole numbers")
    place = torch.arange(n, device=ranks.device)
    if ties == "stable" and not bool((whole.sort(-1).values == place).all()):
        raise ValueError(
            "target ranks must be one of each 0 .. n - 1 (from base on); for equal ranks use "
            "ties='share'"
        )
