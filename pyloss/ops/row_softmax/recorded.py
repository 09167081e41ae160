"""What a forward of the kernels leaves of each row, in torch operations.

The reference's own backward starts from the logits. But the backend may change after a forward:
`with pyloss.backend("reference")` ends before the backward, or autograd runs it in a thread that
does not see the block. Then a kernel reads what stands here. Formulas: csrc/common/row_softmax.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import widened
from pyloss.ops.row_softmax.epilogue import transform
from pyloss.ops.row_softmax.layout import row_count
from pyloss.ops.row_softmax.masses import Labels, ignored_rows, masses
from pyloss.ops.row_softmax.records import DENSE, MIX, REDUCTIONS, Codes, Options, is_soft
from pyloss.ops.row_softmax.statistics import RowStatistics


class Softmax(NamedTuple):
    """Transformed logits, and each row's sums; the target is in none of these."""

    z: Tensor  # [rows, classes]
    m: Tensor
    rest: Tensor
    zy: Tensor  # -inf for probabilities
    ez: Tensor


def softmax(z: Tensor, target: Tensor | None) -> Softmax:
    """Of rows whose labels are classes; None: probabilities."""
    m = z.amax(1)
    m = torch.where(m.isfinite(), m, torch.nan)  # such a row has no softmax
    u = z - m.unsqueeze(1)
    e = torch.exp(u)
    zy = torch.full_like(m, -torch.inf)
    if target is not None:
        column = target.unsqueeze(1)
        zy = z.gather(1, column).squeeze(1)
        e = e.scatter(1, column, 0.0)
    return Softmax(z, m, e.sum(1), zy, torch.where(e == 0, 0.0, e * u).sum(1))


def record(
    found: RowStatistics, input: Tensor, labels: Labels, options: Options, codes: Codes
) -> None:
    """Fills in the statistics that a backward reads, all but the extras."""
    classes = input.shape[0 if input.dim() == 1 else 1]
    if classes == 0 or found.rows == 0:
        found.saved.zero_()
        return
    acc, weight = found.saved.dtype, labels[3]
    ignored = ignored_rows(labels, codes)
    for at, value in enumerate(_norm(labels, options, codes, ignored, classes)):
        found.norm[at] = value

    y = y2 = None
    bad = input.new_zeros(found.rows, dtype=torch.bool)
    if codes.kind != DENSE:
        ignored = ignored.flatten()
        y, bad = _columns(labels[0], classes, ignored)
    if codes.kind == MIX:
        y2, bad2 = _columns(labels[1], classes, ignored)
        bad = bad | bad2
    z = transform(options).value(_by_rows(input).to(acc))
    if options.margin:
        z = z - options.margin * _one_hot(z, y, None, None)
    row = softmax(z, y)

    def put(to: Tensor, values: Tensor) -> None:
        to.copy_(values if ignored is None else torch.where(ignored, 0.0, values))

    put(found.m, torch.where(bad, torch.nan, row.m))
    put(found.rest, row.rest)
    put(found.zy, row.zy)
    found.loss.zero_()  # no backward reads it
    if found.height > 4:
        zy2 = torch.zeros_like(row.m) if y2 is None else row.z.gather(1, y2.unsqueeze(1)).squeeze(1)
        put(found.zy2, zy2)
        found.soft.zero_()
    if is_soft(codes.kind, options):
        shares = _by_rows(labels[0]).to(acc) if y is None else _one_hot(row.z, y, y2, labels[2])
        shares = (1 - options.smoothing) * shares + options.smoothing / classes
        put(found.soft, _soft_mass(row, shares if weight is None else shares * weight, options))


def _norm(labels: Labels, options: Options, codes: Codes, ignored, classes: int) -> tuple:
    weight = labels[3]
    weight_sum = classes if weight is None else widened(weight).sum()
    if codes.reduction != REDUCTIONS["mean"]:
        return 1.0, 1.0, weight_sum
    if options.num_items > 0:
        return 1 / options.num_items, 1 / options.num_items, weight_sum
    found = masses(labels, codes, ignored)
    if codes.zero_if_empty:
        return *(torch.where(m == 0, 0.0, 1 / m) for m in found), weight_sum
    return *(1 / m for m in found), weight_sum


def _by_rows(x: Tensor) -> Tensor:
    dim = 0 if x.dim() == 1 else 1
    return x.movedim(dim, -1).reshape(row_count(x), x.shape[dim])


def _columns(target: Tensor, classes: int, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """The labels as columns that exist, and which of them count but do not."""
    y = wide(target).flatten()
    out = outside(y, classes)
    return torch.where(out, 0, y), out & ~ignored


def _one_hot(z: Tensor, y: Tensor, y2: Tensor | None, mix: Tensor | None) -> Tensor:
    columns = torch.arange(z.shape[1], device=z.device)
    hot = (columns == y.unsqueeze(1)).to(z.dtype)
    if y2 is None:
        return hot
    share = mix.flatten().unsqueeze(1)
    return share * hot + (1 - share) * (columns == y2.unsqueeze(1)).to(z.dtype)


def _soft_mass(row: Softmax, r: Tensor, options: Options) -> Tensor:
    """sum_c r_c p_c^(tau-1)"""
    if options.tau == 1:
        return r.sum(1)
    log_sum = torch.where(
        row.zy == row.m, torch.log1p(row.rest), torch.log(row.rest + torch.exp(row.zy - row.m))
    )
    nll = (row.m + log_sum).unsqueeze(1) - row.z
    return torch.where(r == 0, 0.0, r * torch.exp((1 - options.tau) * nll)).sum(1)
