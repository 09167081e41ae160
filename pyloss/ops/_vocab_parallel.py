"""Row-softmax losses whose classes are split over the processes of a group.

Rank r holds the logits z_j of its classes. Each row of its shard is reduced to the numbers below,
one all_gather brings all ranks' numbers to all, and everything that follows is the same arithmetic
on the same numbers everywhere. Column sums over a shard come from the row-softmax kernels.

    m_r = max z,  D_r = sum of exp(z - m_r) without the target,  zy_r = z_y, -inf on other ranks
    H_r = entropy of the shard's own softmax                        (entropy asked for)
    s_r = sum_c w_c (lse_r - z_c)                                   (label smoothing)
    a_r = first index of the maximum                                (argmax, correct)

    m = max m_r,  D = sum_r e^(m_r - m) D_r,  zy = max zy_r,  d = D + e^(zy - m)
    nll = log1p(D) if zy = m, else (m - zy) + log d;   q_r = share of rank r = e^(lse_r - lse)
    H = sum_r q_r (H_r - log q_r);   s = sum_r (s_r - W_r log q_r),  W_r = sum of the shard's w

Nothing in the last line cancels: all terms are positive. With cotangents g_nll, g_lse, g_H, g_s the
gradient needs no communication:

    dz_j = p_j (g_nll + g_lse + W g_s - g_H (log p_j + H)) - g_nll [j = y] - g_s w_j

The input of a linear layer gets the sum over the ranks of dz W_r, one all_reduce.

Papers: the merge, Shoeybi et al., Megatron-LM, arXiv 1909.08053; losses, Mao et al., arXiv
2304.07288.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss import backends
from pyloss.ops import row_softmax as rows
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._linear_chunks import Call, Chunks, Linear, Tensors
from pyloss.ops.row_softmax import COMP_SUM, EXTRA_ROWS, INDEX, PLAIN, REDUCTIONS, Codes, Options
from pyloss.reference.row_softmax import _transform, _weighted

# Labels of the kernels: ignored rows, and for targets of other ranks a column of this one.
_IGNORED, _ANY = -1, 0
_KERNEL_CODES = Codes(INDEX, _IGNORED, COMP_SUM, REDUCTIONS["none"], 0)


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


def _labels(target: Tensor, ignored: Tensor, shard: Shard) -> Labels:
    y = target.long()
    column = y - shard.begin
    inside = (column >= 0) & (column < shard.width) & ~ignored
    kernel = torch.where(ignored, _IGNORED, torch.where(inside, column, _ANY))
    return Labels(kernel, inside, ((y < 0) | (y >= shard.bounds[-1])) & ~ignored)


# --------------------------------------------------------------------------------------------------
# One part of the rows: the shard's statistics, and its gradient


def _on_reference(x: Tensor) -> bool:
    kinds = ("cpu", "cuda", "reference")
    return backends.choose("row_softmax_fwd", x.device.type, kinds) == "reference"


def _transformed(x: Tensor, o: Options) -> Tensor:
    return _transform(
        x.to(accumulator_dtype(x.dtype)), o.logit_scale, o.softcap or None, o.temperature
    )


def _slope(z: Tensor, o: Options) -> Tensor | float:
    """dz/dx from z."""
    slope = o.logit_scale / o.temperature
    if not o.softcap:
        return slope
    th = z * (o.temperature / o.softcap)
    return slope * (1 - th) * (1 + th)


def _height(spec: Spec) -> int:
    return 3 + spec.entropy + spec.smooth + spec.index


def _part_statistics(x: Tensor, labels: Labels, weight, spec: Spec) -> Tensor:
    """Rows m, D, zy, then what else was asked for, of some rows of a shard's logits."""
    if x.shape[1] == 0:
        return _nothing(x.shape[0], x, spec)
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


def _nothing(n: int, x: Tensor, spec: Spec) -> Tensor:
    """The statistics of no classes."""
    out = x.new_zeros((_height(spec), n), dtype=accumulator_dtype(x.dtype))
    out[0] = out[2] = -math.inf
    return out


def _kernel_statistics(x, y, weight, spec: Spec):
    n, acc = x.shape[0], accumulator_dtype(x.dtype)
    saved = x.new_empty(rows._NORM + (4 + EXTRA_ROWS * spec.entropy) * n, dtype=acc)
    index = x.new_empty((2, n), dtype=torch.int64) if spec.index else None
    rows.launch_forward(
        x.is_cuda, (x, y, None, None, weight, None), spec.options, _KERNEL_CODES,
        x.new_empty(n, dtype=acc), saved, index, spec.entropy, None, (0, 0, 0),
    )  # fmt: skip
    m, rest, zy, loss = saved[rows._NORM : rows._NORM + 4 * n].view(4, n)
    entropy = rows._extras(saved, n)[2] if spec.entropy else None
    # With smoothing 1 the loss is the mean of w_c (lse - z_c).
    return m, rest, zy, entropy, loss * x.shape[1], None if index is None else index[0]


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


def _part_gradient(x, labels: Labels, weight, mass, spec, row: Merged, g: Cotangents, out) -> None:
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
        saved = x.new_zeros(rows._NORM + (4 + EXTRA_ROWS) * n, dtype=row.m.dtype)
        saved[:2] = 1  # norms; the third, the sum of the weights, is in `every` already
        stats = saved[rows._NORM : rows._NORM + 4 * n].view(4, n)
        stats[0], stats[1], stats[2] = row.m, row.rest, row.zy
        extras = x.new_zeros((EXTRA_ROWS, n), dtype=row.m.dtype)
        extras[0] = every
        if g.entropy is not None:
            extras[2] = g.entropy
            rows._extras(saved, n)[2] = row.entropy
        upstream = torch.zeros_like(row.m) if g.smooth is None else g.smooth * x.shape[1]
        strides = (0, out.stride(1), out.stride(0))
        rows.launch_backward(
            x.is_cuda, upstream, extras, x, labels.kernel, None, None, weight, None, saved, o,
            _KERNEL_CODES, out, strides,
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
    value = (value * _slope(z, o)).to(out.dtype).unsqueeze(1)
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
    return (dz * _slope(z, spec.options)).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# All rows: of given logits, and of a layer by chunks


def _layer(input, linear_weight, linear_bias, labels: Labels, spec: Spec, grads) -> tuple:
    """(chunks, layer) of the rows of a shard."""
    t = Tensors(input, linear_weight, linear_bias, labels.kernel, None, None, None, None)
    chunks = Chunks(t, Call(t, spec.options, _KERNEL_CODES), spec.chunk)
    return chunks, Linear(t, chunks, grads, spec.exact)


def _statistics(input, linear_weight, linear_bias, labels: Labels, weight, spec: Spec) -> Tensor:
    """[K, N]; what ignored rows hold does not matter."""
    if linear_weight is None:
        return _part_statistics(input, labels, weight, spec)
    n = input.shape[0]
    if linear_weight.shape[0] == 0:
        return _nothing(n, input, spec)
    found = input.new_zeros((_height(spec), n), dtype=accumulator_dtype(input.dtype))
    chunks, layer = _layer(input, linear_weight, linear_bias, labels, spec, (False,) * 3)
    for part in chunks:
        here = Labels(*(chunks.take(x, part) for x in labels))
        logits = layer.logits(chunks.take_input(part))
        chunks.put(found.t(), part, _part_statistics(logits, here, weight, spec).t())
    return found


def _gradients(ctx, needed, labels: Labels, row: Merged, g: Cotangents) -> list[Tensor | None]:
    """Of (input, linear_weight, linear_bias); the input's still without the other ranks' part."""
    input, linear_weight, linear_bias, weight = ctx.saved_tensors[:4]
    spec, mass = ctx.spec, ctx.mass
    if linear_weight is None:
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
        if out.numel():
            _part_gradient(input, labels, weight, mass, spec, row, g, out)
        return [out, None, None]
    sources = (input, linear_weight, linear_bias)
    if linear_weight.shape[0] == 0:
        return [torch.zeros_like(s) if yes else None for s, yes in zip(sources, needed)]
    chunks, layer = _layer(*sources, labels, spec, needed)
    for part in chunks:

        def take(t, part=part):
            return chunks.take(t, part)

        x = chunks.take_input(part)
        logits = layer.logits(x)
        here = Labels(*map(take, labels))
        _part_gradient(logits, here, weight, mass, spec, row.take(take), g.take(take), logits)
        layer.add(logits, x, part)
    return layer.gradients()


# --------------------------------------------------------------------------------------------------
# Communication


# Renamed in torch 2.13, where the old name warns.
_gather_single = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def _all_gather(x: Tensor, group) -> Tensor:
    """[ranks, *x.shape]"""
    world = dist.get_world_size(group)
    out = x.new_empty((world, *x.shape))
    if x.numel():
        _gather_single(out.view(-1), x.reshape(-1), group=group)
    return out


def _eager(function):
    """The function, kept out of compiled graphs: compiled code calls it as it is.

    torch.compiler.disable as a decorator would do the same, and import Dynamo with all its weight.
    """

    def call(*args):
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


@_eager
def exchange_sizes(size: int, device: torch.device, group) -> tuple[int, ...]:
    """The number of classes that each rank of the group holds."""
    return tuple(_all_gather(torch.tensor([size], device=device), group).flatten().tolist())


def _raise_bad_label(target: Tensor, bad: Tensor) -> None:
    own = target[bad]
    if own.numel():
        raise IndexError(f"Target {int(own[0])} is out of bounds.")
    raise IndexError("A target of another rank of the group is out of bounds.")


def _merge(every: Tensor, masses: Tensor | None, spec: Spec, shard: Shard):
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
        begin = torch.tensor(shard.bounds[:-1], device=m.device)
        argmax = others[-1].gather(0, best).squeeze(0).long() + begin[best.squeeze(0)]
    return row, nll, m + log_d, smooth, argmax


# --------------------------------------------------------------------------------------------------
# Autograd


class _VocabParallel(torch.autograd.Function):
    """(nll, lse, entropy, smooth, argmax) per row, None where not asked for; ignored rows 0.

    `input` is the shard's logits, or with `linear_weight` what that layer gets.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, ignored, weight, shard, spec):
        labels = _labels(target, ignored, shard)
        mine, masses = _masses(weight, shard, spec, input)
        found = _statistics(input, linear_weight, linear_bias, labels, mine, spec)
        # Sums are not negative: this one tells every rank, in the same gather.
        found[1].masked_fill_(labels.bad, -1.0)
        every = _all_gather(found, shard.group)
        bad = (every[:, 1] < 0).any(0)
        if input.is_cpu and bool(bad.any()):  # on a GPU without waiting for it: NaN
            _raise_bad_label(target, labels.bad)
        row, nll, lse, smooth, argmax = _merge(every, masses, spec, shard)
        row = row._replace(rest=torch.where(bad, math.nan, row.rest))

        def finished(x, fill=0):
            if x is None:
                return None
            if x.is_floating_point():
                x = torch.where(bad, math.nan, x)
            return torch.where(ignored, fill, x)

        ctx.save_for_backward(input, linear_weight, linear_bias, mine, target, ignored, *row)
        ctx.shard, ctx.spec = shard, spec
        ctx.mass = 0.0 if masses is None else masses.sum()
        results = [finished(x) for x in (nll, lse, row.entropy, smooth)]
        results.append(finished(argmax, -1))
        if argmax is not None:
            ctx.mark_non_differentiable(results[-1])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, g_nll, g_lse, g_entropy, g_smooth, _):
        # torch's once_differentiable would let a constant upstream pass, and count as zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab-parallel losses have no second derivative (create_graph=True)"
            )
        needed = ctx.needs_input_grad[:3]
        none = (None,) * 5
        if all(g is None for g in (g_nll, g_lse, g_entropy, g_smooth)):
            return None, None, None, *none
        input, linear_weight, _, _, target, ignored, *row = ctx.saved_tensors
        row, spec = Merged(*row), ctx.spec
        zeros = torch.zeros_like(row.m)
        g = Cotangents(
            zeros if g_nll is None else g_nll,
            zeros if g_lse is None else g_lse,
            (zeros if g_entropy is None else g_entropy) if spec.entropy else None,
            (zeros if g_smooth is None else g_smooth) if spec.smooth else None,
        )
        grads = _gradients(ctx, needed, _labels(target, ignored, ctx.shard), row, g)
        if linear_weight is not None and needed[0] and input.numel():
            total = grads[0].to(accumulator_dtype(input.dtype))
            dist.all_reduce(total, group=ctx.shard.group)
            grads[0] = total.to(input.dtype)
        return *grads, *none


def _masses(weight, shard: Shard, spec: Spec, input) -> tuple[Tensor | None, Tensor | None]:
    """(class weights of this shard, their sum on each rank), for smoothing only."""
    if not spec.smooth:
        return None, None
    acc = accumulator_dtype(input.dtype)
    pieces = list(zip(shard.bounds[:-1], shard.bounds[1:]))
    if weight is None:
        return None, torch.tensor([e - b for b, e in pieces], dtype=acc, device=input.device)
    sums = torch.stack([weight[b:e].sum(dtype=torch.float64) for b, e in pieces])
    return weight[shard.begin : shard.begin + shard.width].contiguous(), sums.to(acc)


# --------------------------------------------------------------------------------------------------
# The loss of the rows


def _vocab_parallel(
    input: Tensor,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    labels: tuple[Tensor | None, ...],
    shard: Shard,
    options: Options | None,
    codes: Codes,
    loss_dtype: torch.dtype,
    stats: tuple[str, ...],
    divisor: Tensor | None,
    chunk: int,
    exact: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, statistics by name) of checked arguments; see row_softmax for their meaning.

    Args:
        labels: (target, token weight, class weight of all classes).
        divisor: of the sum, where `num_items` is a tensor.
    """
    target, token_weight, weight = labels
    o = options or PLAIN
    ignored = (target.long() if target.dtype == torch.uint8 else target) == codes.ignore_index
    smoothing = 1.0 if o.smoothing > 0 else 0.0
    transform = PLAIN._replace(
        logit_scale=o.logit_scale, softcap=o.softcap, temperature=o.temperature, smoothing=smoothing
    )
    index = "argmax" in stats or "correct" in stats
    spec = Spec(transform, "entropy" in stats, index, chunk, exact)
    nll, lse, entropy, smooth, argmax = _VocabParallel.apply(
        input, linear_weight, linear_bias, target, ignored, weight, shard, spec
    )

    # As the reference has it, on the merged numbers.
    classes = shard.bounds[-1]
    first = torch.ones_like(nll)
    if weight is not None:
        first = weight.to(nll.dtype)[target.long().clamp(0, max(classes - 1, 0))]
    truncate = None if o.max_nll == math.inf else math.exp(-o.max_nll)
    row = _weighted((1 - o.smoothing) * first, nll, o.tau, truncate)
    if smooth is not None:
        row = row + (o.smoothing / classes) * smooth
    k = torch.ones_like(nll) if token_weight is None else token_weight.to(nll.dtype)
    row = torch.where(ignored | ((k == 0) & torch.isinf(row)), 0.0, k * row)
    z_stat = (
        torch.where(ignored, 0.0, o.z_loss * lse.square()) if o.z_loss else torch.zeros_like(lse)
    )
    z_row = k * z_stat
    if codes.reduction == REDUCTIONS["none"]:
        loss = row + z_row
    else:
        loss = _reduced(row, z_row, k, first, ignored, o, codes, divisor)
    found = dict(lse=lse, logprob=-nll, entropy=entropy, z_loss=z_stat.detach(), argmax=argmax)
    if "correct" in stats:
        found["correct"] = (argmax == target) & ~ignored
    return loss.to(loss_dtype), {name: found[name] for name in stats}


def _reduced(row, z_row, k, first, ignored, o: Options, codes: Codes, divisor):
    """Sums in float64: then their order, which depends on the threads, does not show."""
    row, z_row, k = row.double().sum(), z_row.double().sum(), torch.where(ignored, 0.0, k).double()

    def divided(total, mass):
        value = total / mass
        return torch.where(mass == 0, 0.0, value) if codes.zero_if_empty else value

    if codes.reduction == REDUCTIONS["mean"]:
        if o.num_items > 0:
            return (row + z_row) / o.num_items
        loss = divided(row, (k * first.double()).sum())
        return loss + divided(z_row, k.sum()) if o.z_loss else loss
    return row + z_row if divisor is None else divided(row + z_row, divisor.double())


vocab_parallel = _eager(_vocab_parallel)
