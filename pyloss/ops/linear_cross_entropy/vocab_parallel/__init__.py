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

The input of a linear layer gets the sum over the ranks of dz W_r: of each chunk, as soon as it is
there, so that sending it hides behind the products that follow. All ranks have the same chunks.

Papers: the merge, Shoeybi et al., Megatron-LM, arXiv 1909.08053; losses, Mao et al., arXiv
2304.07288.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._empty import divided
from pyloss.ops._labels import wide
from pyloss.ops._launch import accumulator_dtype, constants
from pyloss.ops.linear_cross_entropy.call import Call, Tensors
from pyloss.ops.linear_cross_entropy.chunks import Chunks, chunk_rows
from pyloss.ops.linear_cross_entropy.products import Linear
from pyloss.ops.linear_cross_entropy.vocab_parallel.group import (
    InputSums,
    all_gather,
    eager,
    exchange,
    merge,
)
from pyloss.ops.linear_cross_entropy.vocab_parallel.shard import (
    KERNEL_CODES,
    Cotangents,
    Labels,
    Merged,
    Shard,
    Spec,
    find_labels,
    height,
    no_statistics,
    part_gradient,
    part_statistics,
)
from pyloss.ops.row_softmax.epilogue import differentiable_epilogue, unless_zero
from pyloss.ops.row_softmax.records import PLAIN, REDUCTIONS, Codes, Options

__all__ = ["Shard", "exchange", "vocab_parallel"]

# --------------------------------------------------------------------------------------------------
# All rows: of given logits, and of a layer by chunks


def _chunks(input, linear_weight, linear_bias, labels: Labels, shard: Shard, spec: Spec) -> Chunks:
    """The same rows on every rank, however many classes it has."""
    t = Tensors(input, linear_weight, linear_bias, labels.kernel, None, None, None, None)
    size = spec.chunk or chunk_rows(shard.widest, input.dtype, input.device.type)
    return Chunks(t, Call(t, spec.options, KERNEL_CODES), size)


def _statistics(
    input, linear_weight, linear_bias, labels: Labels, weight, shard: Shard, spec: Spec
) -> Tensor:
    """[K, N]; what ignored rows hold does not matter."""
    if linear_weight is None:
        return part_statistics(input, labels, weight, spec)
    n = input.shape[0]
    if linear_weight.shape[0] == 0:
        return no_statistics(n, input, spec)
    found = input.new_zeros((height(spec), n), dtype=accumulator_dtype(input.dtype))
    chunks = _chunks(input, linear_weight, linear_bias, labels, shard, spec)
    layer = Linear(chunks.t, chunks, (False,) * 3, spec.exact)
    for part in chunks:
        here = Labels(*(chunks.take(x, part) for x in labels))
        logits = layer.logits(chunks.take_input(part))
        chunks.put(found.t(), part, part_statistics(logits, here, weight, spec).t())
    return found


def _gradients(ctx, needed, labels: Labels, row: Merged, g: Cotangents) -> list[Tensor | None]:
    """Of (input, linear_weight, linear_bias)."""
    input, linear_weight, linear_bias, weight = ctx.saved_tensors[:4]
    spec, mass = ctx.spec, ctx.mass
    if linear_weight is None:
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
        if out.numel():
            part_gradient(input, labels, weight, mass, spec, row, g, out)
        return [out, None, None]
    sources = (input, linear_weight, linear_bias)
    chunks = _chunks(*sources, labels, ctx.shard, spec)
    sums = InputSums(chunks, ctx.shard.group)
    if linear_weight.shape[0] == 0:
        whole = torch.contiguous_format
        grads = [
            torch.zeros_like(s, memory_format=whole) if yes else None
            for s, yes in zip(sources, needed)
        ]
        for part in chunks:
            sums.start(None if grads[0] is None else chunks.take(grads[0], part), part)
        sums.finish(grads[0])
        return grads
    layer = Linear(chunks.t, chunks, needed, spec.exact)
    for part in chunks:

        def take(t, part=part):
            return chunks.take(t, part)

        x = chunks.take_input(part)
        logits = layer.logits(x)
        here = Labels(*map(take, labels))
        part_gradient(logits, here, weight, mass, spec, row.take(take), g.take(take), logits)
        sums.start(layer.add_input(logits, part), part)
        layer.add_weight(logits, x, part)
    sums.finish(layer.results[0])
    return layer.gradients()


# --------------------------------------------------------------------------------------------------
# Autograd


def _raise_bad_label(target: Tensor, bad: Tensor) -> None:
    own = target[bad]
    if own.numel():
        raise IndexError(f"Target {int(own[0])} is out of bounds.")
    raise IndexError("A target of another rank of the group is out of bounds.")


class _VocabParallel(torch.autograd.Function):
    """(nll, lse, entropy, smooth, argmax) per row, None where not asked for; ignored rows 0.

    `input` is the shard's logits, or with `linear_weight` what that layer gets.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, ignored, weight, shard, spec):
        labels = find_labels(target, ignored, shard)
        mine, masses = _masses(weight, shard, spec, input)
        found = _statistics(input, linear_weight, linear_bias, labels, mine, shard, spec)
        # Sums are not negative: this one tells every rank, in the same gather.
        found[1].masked_fill_(labels.bad, -1.0)
        every = all_gather(found, shard.group)
        bad = (every[:, 1] < 0).any(0)
        if input.is_cpu and bool(bad.any()):  # on a GPU without waiting for it: NaN
            _raise_bad_label(target, labels.bad)
        row, nll, lse, smooth, argmax = merge(every, masses, spec, shard)
        row = row._replace(rest=torch.where(bad, torch.nan, row.rest))

        def finished(x, fill=0):
            if x is None:
                return None
            if x.is_floating_point():
                x = torch.where(bad, torch.nan, x)
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
        target, ignored, *row = ctx.saved_tensors[4:]
        row, spec = Merged(*row), ctx.spec
        zeros = torch.zeros_like(row.m)
        g = Cotangents(
            zeros if g_nll is None else g_nll,
            zeros if g_lse is None else g_lse,
            (zeros if g_entropy is None else g_entropy) if spec.entropy else None,
            (zeros if g_smooth is None else g_smooth) if spec.smooth else None,
        )
        grads = _gradients(ctx, needed, find_labels(target, ignored, ctx.shard), row, g)
        return *grads, *none


def _masses(weight, shard: Shard, spec: Spec, input) -> tuple[Tensor | None, Tensor | None]:
    """(class weights of this shard, their sum on each rank), for smoothing only."""
    if not spec.smooth:
        return None, None
    acc = accumulator_dtype(input.dtype)
    pieces = list(zip(shard.bounds[:-1], shard.bounds[1:]))
    if weight is None:
        return None, constants([e - b for b, e in pieces], acc, input.device)
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
    ignored = wide(target) == codes.ignore_index
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
    keep = (1 - o.smoothing) * first
    row = unless_zero(keep, keep * differentiable_epilogue(o, codes.loss, nll))
    row = torch.where(nll.isnan(), nll, row)
    if smooth is not None:
        row = row + (o.smoothing / classes) * smooth
    k = torch.ones_like(nll) if token_weight is None else token_weight.to(nll.dtype)
    row = torch.where(ignored | ((k == 0) & ~row.isnan()), 0.0, k * row)
    z_stat = (
        torch.where(ignored, 0.0, o.z_loss * lse.square()) if o.z_loss else torch.zeros_like(lse)
    )
    z_row = torch.where((k == 0) & ~z_stat.isnan(), 0.0, k * z_stat)
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

    zero = bool(codes.zero_if_empty)
    if codes.reduction == REDUCTIONS["mean"]:
        if o.num_items > 0:
            return (row + z_row) / o.num_items
        loss = divided(row, (k * first.double()).sum(), zero)
        return loss + divided(z_row, k.sum(), zero) if o.z_loss else loss
    return row + z_row if divisor is None else divided(row + z_row, divisor.double(), zero)


vocab_parallel = eager(_vocab_parallel)
