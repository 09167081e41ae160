"""What crosses between the ranks, and what all of them make of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype, constants
from pyloss.ops._transforms import eager
from pyloss.ops.linear_cross_entropy.chunks import Chunks
from pyloss.ops.linear_cross_entropy.vocab_parallel.shard import Merged, Shard, Spec

# Renamed in torch 2.13, where the old name warns.
_gather_single = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def all_gather(x: Tensor, group) -> Tensor:
    """[ranks, *x.shape]"""
    world = dist.get_world_size(group)
    if world == 1:
        return x.unsqueeze(0)
    out = x.new_empty((world, *x.shape))
    if x.numel():
        _gather_single(out.view(-1), x.reshape(-1), group=group)
    return out


class Holdings(NamedTuple):
    """What each rank holds, in the order of the ranks."""

    sizes: tuple[int, ...]  # classes
    rows: tuple[int, ...]
    labels: tuple[int, ...]  # a checksum of them, exact
    input: tuple[float, ...]  # sum of magnitudes, where it was asked for

    def same_rows(self) -> bool:
        """Whether the ranks hold the same rows. Inputs may differ by rounding."""
        low, high = min(self.input), max(self.input)
        same = len(set(self.rows)) == len(set(self.labels)) == 1
        return same and high - low <= 1e-3 * high


@eager
def exchange(size: int, target: Tensor, input: Tensor | None, device, group) -> Holdings:
    """One gather of four numbers, before anything whose size depends on the rows."""
    y = target.detach().reshape(-1).long()
    places = torch.arange(1, y.numel() + 1, device=y.device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    if input is not None:
        total = input.detach().abs().sum(dtype=torch.float64).nan_to_num(0, 0, 0)
    known = constants((size, y.numel()), torch.int64, device)
    mine = torch.stack([*known, (y * places).sum().to(device), total.view(torch.int64)])
    every = all_gather(mine, group)
    sums = every[:, 3].contiguous().view(torch.float64)
    return Holdings(*(tuple(c) for c in every[:, :3].t().tolist()), tuple(sums.tolist()))


def merge(every: Tensor, masses: Tensor | None, spec: Spec, shard: Shard):
    """(row, nll, lse, smooth, argmax) of the ranks' statistics [ranks, K, N]."""
    m_r, rest_r, zy_r, *others = every.unbind(1)
    m, zy = m_r.amax(0), zy_r.amax(0)
    scale = torch.where(m_r == -math.inf, 0.0, torch.exp(m_r - m))
    row = Merged(m, (rest_r * scale).sum(0), zy, None)
    d, log_d = row.sums()
    nll = (m - zy) + log_d

    if spec.entropy or spec.smooth:
        own_r = rest_r + torch.where(zy_r == -math.inf, 0.0, torch.exp(zy_r - m_r))
        share_r = own_r * scale
        zero = torch.zeros_like(share_r[:1])
        before = torch.cat([zero, share_r.cumsum(0)[:-1]])
        after = torch.cat([share_r.flip(0).cumsum(0).flip(0)[1:], zero])
        rest_of_ranks = before + after
        # -log q_r; near 0 from the share of the others, as 1 - q_r would cancel.
        surprise = torch.where(
            rest_of_ranks <= share_r,
            torch.log1p(rest_of_ranks / share_r),
            (m - m_r) + log_d - torch.log(own_r),
        )
    if spec.entropy:
        q = share_r / d
        entropy = torch.where(q == 0, 0.0, q * (others[0] + surprise)).sum(0)
        row = row._replace(entropy=torch.where(nll.isnan(), math.nan, entropy))
    smooth = None
    if spec.smooth:
        masses = masses.unsqueeze(1)
        smooth = others[spec.entropy] + masses * surprise
        smooth = torch.where(masses == 0, 0.0, smooth).sum(0)  # not 0 times infinity
    argmax = None
    if spec.index:
        best = m_r.argmax(0, keepdim=True)
        begin = constants(shard.bounds[:-1], torch.int64, m.device)
        argmax = others[-1].gather(0, best).squeeze(0).long() + begin[best.squeeze(0)]
    return row, nll, m + log_d, smooth, argmax


class InputSums:
    """The sum over the ranks of the input's gradient, one all_reduce a chunk, in float32 for half
    types. It is under way while the weight's product and the next chunks are computed.
    """

    def __init__(self, chunks: Chunks, group):
        self.chunks, self.group = chunks, group
        self.alone = dist.get_world_size(group) == 1
        self.started: list[tuple[slice, Tensor, dist.Work]] = []

    def start(self, rows: Tensor | None, part: slice) -> None:
        """With this rank's gradient of a chunk's rows, which may become the sum."""
        if self.alone or rows is None or not rows.numel():
            return
        total = rows.to(accumulator_dtype(rows.dtype))
        work = dist.all_reduce(total, group=self.group, async_op=True)
        self.started.append((part, total, work))

    def finish(self, result: Tensor | None) -> None:
        """Writes the sums into the gradient whose rows were given."""
        for part, total, work in self.started:
            work.wait()  # on CUDA the stream does
            if self.chunks.kept is not None or total.dtype != result.dtype:
                self.chunks.put(result, part, total.to(result.dtype))
