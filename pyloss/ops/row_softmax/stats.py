"""Statistics of rows of logits, for losses that are written in torch operations on them.

    z_j = a (x_j + c [j != y])    with a scale a and a margin c of each row, -inf where masked

The kernels know one scale of all rows, and neither mask nor margin of a row. Where there are such,
logits go through them some rows at a time: z of a block is made in scratch memory that stays in
cache, and its gradient is written there, too. Nothing of the size of the logits is kept but their
gradient. A margin is taken from the target's entry, and given back to what it would have moved. A
target that is no entry of its softmax is -inf there; its own z is kept, and so is its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops import row_softmax as op
from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.row_softmax.calls import WANT_EXTRAS
from pyloss.ops.row_softmax.records import COMP_SUM, INDEX, PLAIN, REDUCTIONS, Codes, Options
from pyloss.ops.row_softmax.statistics import RowStatistics, stat_rows

_ops = torch.ops.pyloss

# Numbers of z that are made at a time: they stay in cache, or, on a GPU, fill it.
_BLOCK = {"cpu": 2**19}
_OTHER_BLOCK = 2**24


def _codes(ignore_index: int) -> Codes:
    return Codes(INDEX, ignore_index, COMP_SUM, REDUCTIONS["none"], 0)


_HEIGHT = stat_rows(_codes(-1), PLAIN)


class Rows(NamedTuple):
    """What the statistics are of. `scale` and `margin`: a number, or one for each row.

    Named tuples of compiled code have no properties: Dynamo sees them from torch 2.13 on.
    """

    x: Tensor  # [rows, classes]
    target: Tensor  # [rows]; that of `ignore_index` leaves a row out
    scale: float | Tensor
    margin: float | Tensor
    mask: Tensor | None  # [rows, classes], what counts
    ignore_index: int
    without_target: bool = False  # in the softmax

    def has_margin(self) -> bool:
        return isinstance(self.margin, Tensor) or self.margin != 0

    def as_they_are(self) -> bool:
        """Whether the kernels take these logits."""
        others = self.has_margin() or self.mask is not None or self.without_target
        return not (others or isinstance(self.scale, Tensor))

    def codes(self) -> Codes:
        return _codes(self.ignore_index)

    def options(self) -> Options | None:
        one = isinstance(self.scale, Tensor) or not self.as_they_are() or self.scale == 1
        return None if one else Options(logit_scale=float(self.scale))

    def shift(self) -> Tensor | float:
        """What the margin adds to z of other classes."""
        return self.scale * self.margin

    def columns(self) -> tuple[Tensor, Tensor]:
        """The labels as columns that exist, [rows, 1]; and whether they are labels."""
        y = wide(self.target)
        counts = ~outside(y, self.x.shape[1]) & (y != self.ignore_index)
        return torch.where(counts, y, 0).unsqueeze(1), counts

    def block(self, rows: slice) -> Rows:
        def some(t):
            return t[rows] if isinstance(t, Tensor) else t

        return Rows(*map(some, self[:5]), self.ignore_index, self.without_target)


class Statistics(NamedTuple):
    """[rows] each."""

    lse: Tensor
    mean: Tensor  # of z, under p
    entropy: Tensor
    target: Tensor  # z of the label
    nll: Tensor


def row_stats(rows: Rows) -> Statistics:
    """Of checked arguments; differentiable in the logits and in a scale that is a tensor."""
    x, scale = rows.x, rows.scale
    if torch.compiler.is_compiling() or functorch_active() or _in_operations(x) or not x.numel():
        return composed(rows)
    of_scale = scale if isinstance(scale, Tensor) else None
    of_margin = rows.margin if isinstance(rows.margin, Tensor) else None
    numbers = (scale, rows.margin, rows.ignore_index, rows.without_target)
    return Statistics(*_RowStats.apply(x, of_scale, rows.target, of_margin, rows.mask, numbers))


def _in_operations(x: Tensor) -> bool:
    """Where no kernel runs, or none can."""
    no_kernel = x.device.type not in ("cpu", "cuda") or backends.forced() == "reference"
    return no_kernel or forward_ad_active()


# --------------------------------------------------------------------------------------------------
# In torch operations


def composed(rows: Rows) -> Statistics:
    """The same with logits of its own: for graphs, transforms and further derivatives."""
    acc = accumulator_dtype(rows.x.dtype)
    z = rows.x.to(acc)
    if rows.mask is not None:
        z = torch.where(rows.mask, z, -torch.inf)
    if isinstance(rows.scale, Tensor):  # 0 * infinity, in the gradient of the scale
        none = z == -torch.inf
        z = torch.where(none, -torch.inf, torch.where(none, 0.0, z) * rows.scale.unsqueeze(1))
    else:
        z = z * rows.scale
    column, counts = rows.columns()
    hot = (torch.arange(z.shape[1], device=z.device) == column) & counts.unsqueeze(1)
    own = z.gather(1, column).squeeze(1)
    if rows.without_target:
        z = torch.where(hot, -torch.inf, z)
    elif rows.has_margin():
        shift = rows.shift()
        z = z - torch.where(hot, shift.unsqueeze(1) if isinstance(shift, Tensor) else shift, 0.0)
    void = (z == -torch.inf).all(1)
    z = torch.where(void.unsqueeze(1), 0.0, z)
    extras = op.row_softmax(
        z, rows.target, None, None, None, None, None, rows.codes(), acc, WANT_EXTRAS, False
    )[1]
    assert extras is not None
    lse, logprob, entropy = extras[0], extras[1], extras[2]
    ignored = wide(rows.target) == rows.ignore_index
    if not rows.without_target:
        own = torch.where(void, -torch.inf, own)
    own = torch.where(ignored, 0.0, own)
    return _finished(rows, lse, entropy, own, -logprob, void & ~ignored, ignored)


def _finished(rows: Rows, lse, entropy, own, nll, void, ignored) -> Statistics:
    """With the margin given back, and what rows have of which nothing counts. `own`: z of the
    label."""
    shift = torch.where(ignored, 0.0, rows.shift())
    all_of_it = torch.where(void, -torch.inf, lse + shift)
    return Statistics(
        all_of_it,
        torch.where(void, -torch.inf, lse - entropy + shift),
        torch.where(void, 0.0, entropy),
        own,
        all_of_it - own if rows.without_target else torch.where(void, torch.inf, nll),
    )


# --------------------------------------------------------------------------------------------------
# On the kernels


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, target, margin, mask, numbers):
        ctx.numbers = numbers
        rows = _rows(x, scale, target, margin, mask, numbers)
        parts, saved, scratch = [], [], _scratch(rows)
        for at in _blocks(rows):
            part = rows.block(at)
            z, own = (part.x, None) if rows.as_they_are() else _block_of(part, scratch)
            found, kept = _forward(part, z, own)
            parts.append(found)
            saved.append(kept)
        ctx.save_for_backward(x, scale, target, margin, mask, *saved)
        ctx.set_materialize_grads(False)
        return tuple(p[0] if len(parts) == 1 else torch.cat(p) for p in zip(*parts))

    @staticmethod
    def backward(ctx, *grads):
        x, scale, target, margin, mask, *saved = ctx.saved_tensors
        need_x, need_scale = ctx.needs_input_grad[:2]
        known = [g for g in grads if g is not None]
        if not known:
            return (None,) * 6
        rows = _rows(x, scale, target, margin, mask, ctx.numbers)
        if torch.is_grad_enabled() or is_batched(known[0]) or _in_operations(x):
            dx, dscale = _composed_gradient(rows, grads, need_x, need_scale)
            return dx, dscale, None, None, None, None
        zero = torch.zeros_like(known[0])
        grads = tuple(zero if g is None else g for g in grads)
        dx, dscale = _gradient(rows, grads, saved, need_scale)
        return dx, dscale, None, None, None, None


def _rows(x, scale, target, margin, mask, numbers) -> Rows:
    scale = numbers[0] if scale is None else scale
    return Rows(x, target, scale, numbers[1] if margin is None else margin, mask, *numbers[2:])


def _blocks(rows: Rows) -> list[slice]:
    count, classes = rows.x.shape
    if rows.as_they_are():
        return [slice(0, count)]
    step = max(1, _BLOCK.get(rows.x.device.type, _OTHER_BLOCK) // classes)
    return [slice(at, min(at + step, count)) for at in range(0, count, step)]


def _scratch(rows: Rows) -> Tensor:
    """For a block of z: one for all of them, as new memory costs more than what is done in it."""
    if rows.as_they_are():
        return rows.x
    at = _blocks(rows)[0]
    size = (at.stop, rows.x.shape[1])
    return rows.x.new_empty(size, dtype=accumulator_dtype(rows.x.dtype))


def _block_of(part: Rows, scratch: Tensor) -> tuple[Tensor, Tensor | None]:
    """z of some rows, without what the margin adds to all but the label's; and the label's, where
    it is not in its row."""
    z = scratch[: part.x.shape[0]]
    if isinstance(part.scale, Tensor):
        torch.mul(part.x, part.scale.unsqueeze(1), out=z)
    else:
        z.copy_(part.x)
        if part.scale != 1:
            z.mul_(part.scale)
    if part.mask is not None:
        z.masked_fill_(~part.mask, -torch.inf)
    if not (part.without_target or part.has_margin()):
        return z, None
    column, counts = part.columns()
    if part.without_target:
        own = z.gather(1, column)
        z.scatter_(1, column, torch.where(counts.unsqueeze(1), -torch.inf, own))
        return z, own.squeeze(1)
    z.scatter_add_(1, column, -torch.where(counts, part.shift(), 0.0).to(z.dtype).unsqueeze(1))
    return z, None


def _forward(part: Rows, z: Tensor, own: Tensor | None) -> tuple[Statistics, Tensor]:
    """And what a backward reads of the block."""
    acc = accumulator_dtype(z.dtype)
    count = z.shape[0]
    nll, saved = _ops.row_softmax_fwd(
        z, part.target, None, None, None, None, part.options(), part.codes(), acc, WANT_EXTRAS
    )
    stats = RowStatistics(saved, count, _HEIGHT, True)
    lse, _, entropy, _ = stats.extras
    ignored = wide(part.target) == part.ignore_index
    void = (stats.m == -torch.inf) & ~ignored
    if own is None:  # in the kernel's row, where a margin has been taken from it
        own = stats.zy + (part.shift() if part.has_margin() else 0.0)
    own = torch.where(ignored, 0.0, own)
    found = _finished(part, lse, entropy, own, nll, void, ignored)
    # The exponentials of such a row are then 0, and not NaN.
    for row in (stats.m, stats.rest, stats.zy, entropy):
        row.masked_fill_(void, 0)
    lse.masked_fill_(void, -torch.inf)
    return found, saved


def _void(saved: Tensor, rows: int) -> Tensor:
    """Of which nothing counts, as _forward has left them."""
    return RowStatistics(saved, rows, _HEIGHT, True).extras[0] == -torch.inf


class Cotangents(NamedTuple):
    """Of what the kernels return, and of the label's z where it is not in its row."""

    nll: Tensor
    extras: Tensor  # [4, rows]
    own: Tensor


def _cotangents(rows: Rows, grads, saved) -> Cotangents:
    """mean = lse - entropy; target = lse - nll, or, without the target, nll = lse - target."""
    parts = [_void(kept, rows.x[at].shape[0]) for at, kept in zip(_blocks(rows), saved)]
    void = parts[0] if len(parts) == 1 else torch.cat(parts)
    own = grads[3] - grads[4]
    lse, mean, entropy, target, nll = (torch.where(void, 0.0, g) for g in grads)
    zero = torch.zeros_like(lse)
    whole = lse + mean + (nll if rows.without_target else target)
    of_nll = zero if rows.without_target else nll - target
    return Cotangents(of_nll, torch.stack([whole, zero, entropy - mean, zero]), own)


def _gradient(rows: Rows, grads, saved, need_scale: bool) -> tuple[Tensor, Tensor | None]:
    """With respect to the logits and the scale."""
    g, none = _cotangents(rows, grads, saved), (None,) * 4
    if rows.as_they_are():
        dx = _ops.row_softmax_bwd(
            g.nll, g.extras, rows.x, rows.target, *none, saved[0], rows.options(), rows.codes()
        )
        return dx, None
    dx = torch.empty_like(rows.x, memory_format=torch.contiguous_format)
    dscale = torch.empty_like(g.nll) if need_scale else None
    scratch = _scratch(rows)
    for at, kept in zip(_blocks(rows), saved):
        part, (nll, extras, own) = rows.block(at), (g.nll[at], g.extras[:, at], g.own[at])
        z, _ = _block_of(part, scratch)
        _ops.row_softmax_bwd_(
            nll.contiguous(), extras.contiguous(), z, part.target, *none, kept, None, part.codes()
        )
        if part.without_target:
            _put_own(z, own, part)
        elif part.mask is not None:
            _clear_masked_label(z, part)
        if dscale is not None:
            dscale[at] = _scale_gradient(z, extras[0], part)
        scale = part.scale.unsqueeze(1) if isinstance(part.scale, Tensor) else part.scale
        torch.mul(z, scale, out=dx[at])
    return dx, dscale


def _put_own(dz: Tensor, own: Tensor, part: Rows) -> None:
    column, counts = part.columns()
    if part.mask is not None:
        counts = counts & part.mask.gather(1, column).squeeze(1)
    dz.scatter_(1, column, torch.where(counts, own, 0.0).unsqueeze(1))


def _clear_masked_label(dz: Tensor, part: Rows) -> None:
    """The kernel gives a label its part whether it is masked or not."""
    assert part.mask is not None
    column, _ = part.columns()
    there = part.mask.gather(1, column)
    dz.scatter_(1, column, torch.where(there, dz.gather(1, column), 0.0))


def _scale_gradient(dz: Tensor, whole: Tensor, part: Rows) -> Tensor:
    """sum_j dz_j (x_j + c [j != y]), where `whole` is the sum of dz but for the label's own."""
    along = torch.where(dz == 0, 0.0, dz * part.x).sum(1)
    if part.has_margin():
        column, counts = part.columns()
        label = 0.0 if part.without_target else dz.gather(1, column).squeeze(1)
        along += torch.where(counts, part.margin * (whole - label), 0.0)
    return along


def _composed_gradient(rows: Rows, grads, need_x: bool, need_scale: bool):
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the cotangents may depend on both, and the derivatives here are partial ones.
        x, scale = rows.x, rows.scale
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(need_x)
        if isinstance(scale, Tensor):
            scale = scale.view_as(scale) if scale.requires_grad else scale
        found = composed(rows._replace(x=x, scale=scale))
    asked = [t for t, yes in ((x, need_x), (scale, need_scale)) if yes]
    pairs = [(f, g) for f, g in zip(found, grads) if g is not None]
    outputs, cotangents = zip(*pairs)
    got = iter(torch.autograd.grad(outputs, asked, cotangents, create_graph=create_graph))
    return (next(got) if need_x else None), (next(got) if need_scale else None)
