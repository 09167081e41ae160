"""What a rank knows of some rows: its classes, their statistics, the gradient of its logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss import backends
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.row_softmax import cpu, cuda
from pyloss.ops.row_softmax.epilogue import transform
from pyloss.ops.row_softmax.records import COMP_SUM, INDEX, REDUCTIONS, Codes, Options
from pyloss.ops.row_softmax.statistics import EXTRA_ROWS, RowStatistics

# Labels of the kernels: ignored rows, and for targets of other ranks a column of this one.
_IGNORED, _ANY = -1, 0
KERNEL_CODES = Codes(INDEX, _IGNORED, COMP_SUM, REDUCTIONS["none"], 0)


class Shard(NamedTuple):
    """Which classes this rank holds: [bounds[rank], bounds[rank + 1])."""

    group: dist.ProcessGroup
    rank: int
    bounds: tuple[int, ...]  # one more than ranks

    @property
    def begin(self) -> int:
        return self.bounds[self.rank]

    @property
    def width(self) -> int:
        return self.bounds[self.rank + 1] - self.begin

    @property
    def widest(self) -> int:
        """The most classes that a rank holds."""
        return max(b - a for a, b in zip(self.bounds, self.bounds[1:]))


class Spec(NamedTuple):
    """What a call computes of a row, and how."""

    options: Options  # transform; smoothing 1 where s is asked for
    entropy: bool
    index: bool
    chunk: int  # 0: chunk_rows
    exact: bool

    @property
    def smooth(self) -> bool:
        return self.options.smoothing > 0


class Labels(NamedTuple):
    """Where the targets of some rows are, seen from one shard."""

    kernel: Tensor  # int64: column of the shard, _ANY or _IGNORED
    inside: Tensor
    bad: Tensor  # neither a class nor ignored


def find_labels(target: Tensor, ignored: Tensor, shard: Shard) -> Labels:
    y = target.long()
    column = y - shard.begin
    inside = (column >= 0) & (column < shard.width) & ~ignored
    kernel = torch.where(ignored, _IGNORED, torch.where(inside, column, _ANY))
    return Labels(kernel, inside, ((y < 0) | (y >= shard.bounds[-1])) & ~ignored)


class Merged(NamedTuple):
    """A row's softmax over all classes, [N] each; and the cotangents of what follows from it."""

    m: Tensor
    rest: Tensor
    zy: Tensor
    entropy: Tensor | None

    def sums(self) -> tuple[Tensor, Tensor]:
        """(d, log d)"""
        d = self.rest + torch.exp(self.zy - self.m)
        return d, torch.where(self.zy == self.m, torch.log1p(self.rest), torch.log(d))

    def take(self, take) -> Merged:
        return Merged(*map(take, self))


class Cotangents(NamedTuple):
    nll: Tensor
    lse: Tensor
    entropy: Tensor | None
    smooth: Tensor | None

    def take(self, take) -> Cotangents:
        return Cotangents(*map(take, self))


def _on_reference(x: Tensor) -> bool:
    kinds = ("cpu", "cuda", "reference")
    return backends.choose("row_softmax_fwd", x.device.type, kinds) == "reference"


def _kernels(x: Tensor):
    return cuda if x.is_cuda else cpu


def _transformed(x: Tensor, o: Options) -> Tensor:
    return transform(o).value(x.to(accumulator_dtype(x.dtype)))


def height(spec: Spec) -> int:
    return 3 + spec.entropy + spec.smooth + spec.index


def part_statistics(x: Tensor, labels: Labels, weight, spec: Spec) -> Tensor:
    """Rows m, D, zy, then what else was asked for, of some rows of a shard's logits."""
    if x.shape[1] == 0:
        return no_statistics(x.shape[0], x, spec)
    compute = _reference_statistics if _on_reference(x) else _kernel_statistics
    m, rest, zy, entropy, smooth, argmax = compute(x, labels.kernel, weight, spec)
    # A row whose target is elsewhere has been given a column of this shard: back into the sum.
    own = torch.where(m == -math.inf, 0.0, torch.exp(zy - m))
    rest = torch.where(labels.inside, rest, rest + own)
    m = torch.where(rest.isnan(), math.nan, m)
    found = [m, rest, torch.where(labels.inside, zy, -math.inf)]
    none_finite = m == -math.inf
    if spec.entropy:
        found.append(torch.where(none_finite, 0.0, entropy))
    if spec.smooth:
        found.append(torch.where(none_finite, math.inf, smooth))
    if spec.index:
        found.append(argmax.to(m.dtype))
    return torch.stack(found)


def no_statistics(n: int, x: Tensor, spec: Spec) -> Tensor:
    """The statistics of no classes."""
    out = x.new_zeros((height(spec), n), dtype=accumulator_dtype(x.dtype))
    out[0] = out[2] = -math.inf
    return out


def _kernel_statistics(x, y, weight, spec: Spec):
    n = x.shape[0]
    found = RowStatistics.empty(x, n, KERNEL_CODES, spec.options, spec.entropy)
    index = x.new_empty((2, n), dtype=torch.int64) if spec.index else None
    _kernels(x).run_forward(
        (x, y, None, None, weight, None), spec.options, KERNEL_CODES,
        torch.empty_like(found.loss), found, index,
    )  # fmt: skip
    entropy = found.entropy if spec.entropy else None
    # With smoothing 1 the loss is the mean of w_c (lse - z_c).
    smooth = found.loss * x.shape[1]
    return found.m, found.rest, found.zy, entropy, smooth, None if index is None else index[0]


def _reference_statistics(x, y, weight, spec: Spec):
    z = _transformed(x, spec.options)
    y = y.clamp(min=0)
    m = z.amax(1)
    u = z - torch.where(m == -math.inf, 0.0, m).unsqueeze(1)
    e = torch.exp(u)
    total = e.sum(1)
    rest = e.scatter(1, y.unsqueeze(1), 0.0).sum(1)
    entropy = torch.log(total) - torch.where(e == 0, 0.0, e * u).sum(1) / total
    nll = torch.log(total).unsqueeze(1) - u
    smooth = None
    if spec.smooth:
        smooth = (nll if weight is None else torch.where(weight == 0, 0.0, weight * nll)).sum(1)
    return m, rest, z.gather(1, y.unsqueeze(1)).squeeze(1), entropy, smooth, z.argmax(1)


def part_gradient(x, labels: Labels, weight, mass, spec, row: Merged, g: Cotangents, out) -> None:
    """Writes dx of some rows into `out`, which may be x.

    The kernel gives p_j (A + B log p_j) - g_s w_j of every column, as the gradient of a row whose
    lse and entropy have cotangents; then the one column that it took for the label is replaced.
    """
    o, n = spec.options, x.shape[0]
    column = labels.kernel.clamp(min=0).unsqueeze(1)
    z = _transformed(x.gather(1, column).squeeze(1), o)
    z = torch.where(labels.inside, row.zy, z)
    others = g.lse if g.smooth is None else g.lse + mass * g.smooth
    every = others + g.nll
    if _on_reference(x):
        dx = _reference_gradient(x, weight, spec, row, g, every)
        out.copy_(torch.where((labels.kernel == _IGNORED).unsqueeze(1), 0.0, dx))
    else:
        found = RowStatistics.empty(x, n, KERNEL_CODES, o, True)
        found.saved.zero_()
        found.norm[:2] = 1  # the third, the sum of the weights, is in `every` already
        for to, values in ((found.m, row.m), (found.rest, row.rest), (found.zy, row.zy)):
            to.copy_(values)
        extras = x.new_zeros((EXTRA_ROWS, n), dtype=row.m.dtype)
        extras[0] = every
        if g.entropy is not None:
            extras[2] = g.entropy
            found.entropy.copy_(row.entropy)
        upstream = torch.zeros_like(row.m) if g.smooth is None else g.smooth * x.shape[1]
        strides = (0, out.stride(1), out.stride(0))
        _kernels(x).run_backward(
            upstream, extras, (x, labels.kernel, None, None, weight, None), found, o, KERNEL_CODES,
            out, strides,
        )  # fmt: skip

    d, log_d = row.sums()
    log_p = z - row.m - log_d
    p = torch.exp(z - row.m) / d
    value = p * torch.where(labels.inside, others, every)
    if g.entropy is not None:
        value = value - torch.where(p == 0, 0.0, p * g.entropy * (log_p + row.entropy))
    # 1 - p_y without cancellation; a cotangent of 0 must not meet an infinite loss's NaN.
    value = value - torch.where(labels.inside, g.nll * (row.rest / d), 0.0)
    if g.smooth is not None:
        w = 1.0 if weight is None else weight[column.squeeze(1)]
        value = value - g.smooth * w
    value = (value * transform(o).slope(z)).to(out.dtype).unsqueeze(1)
    ignored = (labels.kernel == _IGNORED).unsqueeze(1)
    out.scatter_(1, column, torch.where(ignored, 0.0, value))


def _reference_gradient(x, weight, spec, row: Merged, g: Cotangents, every):
    z = _transformed(x, spec.options)
    u = z - row.m.unsqueeze(1)
    d, log_d = row.sums()
    p = torch.exp(u) / d.unsqueeze(1)
    dz = p * every.unsqueeze(1)
    if g.entropy is not None:
        inner = torch.where(p == 0, 0.0, p * (u + (row.entropy - log_d).unsqueeze(1)))
        dz = dz - g.entropy.unsqueeze(1) * inner
    if g.smooth is not None:
        dz = dz - g.smooth.unsqueeze(1) * (1.0 if weight is None else weight)
    return (dz * transform(spec.options).slope(z)).to(x.dtype)
