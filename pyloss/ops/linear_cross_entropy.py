"""Linear cross entropy: the row-softmax loss of `input @ weight.T + bias`, by chunks of rows.

A chunk's logits are one product into a buffer that all chunks share; the row-softmax kernel turns
them into losses and, in place, into the gradient of the logits; two more products give the
gradients of the input and the weight. Two strategies:

    forward      products  forward 3, backward 0    scalar losses: the upstream factor comes later
    recompute    products  forward 1, backward 3    everything else; keeps N x 4 statistics

A third one works by tiles instead of chunks (_linear_tiles.py; Triton, on CUDA): products as in
"recompute", less those of the gradient's tiles that a filter leaves out.

Beyond results: one chunk of logits, and for half dtypes the weight's gradient in float32. The
numbers, and how a chunk's length is chosen, stand in docs/linear_cross_entropy.md.

Paper: recomputation, Wijmans et al., arXiv 2411.09009; formulas, csrc/common/row_softmax.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops import row_softmax as rows
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._linear_chunks import (
    AUTO,
    AUTO_FOR_WEIGHT,
    Call,
    Chunks,
    Linear,
    Tensors,
    ignored_rows,
)
from pyloss.ops._reference import gradients
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import is_batched, saved_tensor_hooks_active
from pyloss.ops.row_softmax import (
    DENSE,
    EXTRA_ROWS,
    PLAIN,
    REDUCTIONS,
    WANT_EXTRAS,
    WANT_INDEX,
    Codes,
    Options,
)

# Bits of `wants` besides those of row_softmax: the gradients of input, weight and bias.
WANT_GRADS = (8, 16, 32)

# --------------------------------------------------------------------------------------------------
# Forward


def _result_buffers(input, options, codes, loss_dtype, wants):
    """Empty (loss, saved, extras, index); shared by the kernels and the fake."""
    n = input.shape[0]
    height = rows._stat_rows(codes, options or PLAIN) + (EXTRA_ROWS if wants & WANT_EXTRAS else 0)
    acc = accumulator_dtype(input.dtype)
    return (
        input.new_empty((n,) if codes[3] == REDUCTIONS["none"] else (), dtype=loss_dtype),
        # Every chunk has a norm of its own, and no more chunks than rows exist. Zeros, because
        # ignored rows leave theirs unwritten.
        input.new_zeros((rows._NORM + height) * n, dtype=acc),
        input.new_empty((EXTRA_ROWS, n), dtype=acc) if wants & WANT_EXTRAS else None,
        input.new_empty((2, n), dtype=torch.int64) if wants & WANT_INDEX else None,
    )


def _listed(loss, saved, extras, index, grads):
    return [t for t in (loss, saved, extras, index, *grads) if t is not None]


def _unlisted(found, wants):
    """(loss, saved, extras, index, [grads]) of the op's result."""
    loss, saved, *rest = found
    extras = rest.pop(0) if wants & WANT_EXTRAS else None
    index = rest.pop(0) if wants & WANT_INDEX else None
    return loss, saved, extras, index, _spread(rest, wants)


def _spread(grads, wants) -> list[Tensor | None]:
    """Gradients in the order (input, weight, bias), None for those not formed."""
    grads = list(grads)
    return [grads.pop(0) if wants & bit else None for bit in WANT_GRADS]


def _wanted(wants: int) -> tuple[bool, ...]:
    return tuple(bool(wants & bit) for bit in WANT_GRADS)


def _fake_grads(t: Tensors, wants) -> list[Tensor]:
    sources = (t.input, t.linear_weight, t.linear_bias)
    fmt = torch.contiguous_format
    return [torch.empty_like(s, memory_format=fmt) for s, y in zip(sources, _wanted(wants)) if y]


def _forward_fake(*args):
    t = Tensors(*args[:8])
    options, codes, loss_dtype, wants, chunk, exact = args[8:]
    buffers = _result_buffers(t.input, options, codes, loss_dtype, wants)
    return _listed(*buffers, _fake_grads(t, wants))


def _forward_kernel(cuda: bool):
    # Exported graphs call the op on parameters, which would refuse products into buffers.
    @torch.no_grad()
    def forward(*args):
        t = Tensors(*args[:8])
        options, codes, loss_dtype, wants, chunk, exact = args[8:]
        loss, saved, extras, index = _result_buffers(t.input, options, codes, loss_dtype, wants)
        call = Call(t, options, codes)
        chunks = Chunks(t, call, chunk)
        grads = _wanted(wants)
        linear = Linear(t, chunks, grads, exact)
        if chunks.kept is not None:
            for out, fill in ((loss, 0), (extras, 0), (index, -1)):
                if out is not None:
                    out.fill_(fill)
            if index is not None:
                index[1] = 0  # the rank

        acc = saved.dtype
        losses = t.input.new_zeros(len(range(0, chunks.rows, chunks.step)), dtype=acc)
        for i, part in enumerate(chunks):
            x = chunks.take_input(part)
            logits = linear.logits(x)
            n = x.shape[0]
            chunk_loss = losses[i] if call.scalar else losses.new_empty(n, dtype=loss_dtype)
            chunk_index = None if index is None else index.new_empty((2, n))
            chunk_saved = chunks.saved(saved, part, extras is not None)
            row_tensors = chunks.row_tensors(logits, part)
            in_place = (0, 1, logits.stride(0))
            early = any(grads) and not cuda  # the CPU kernel has read a row before it writes it
            rows.launch_forward(
                cuda, row_tensors, call.options, call.codes, chunk_loss, chunk_saved, chunk_index,
                extras is not None, logits if early else None, in_place if early else (0, 0, 0),
            )  # fmt: skip
            if any(grads) and cuda:
                rows.launch_backward(
                    cuda, losses.new_ones(()), None, *row_tensors, chunk_saved, call.options,
                    call.codes, logits, in_place,
                )  # fmt: skip
            if not call.scalar:
                chunks.put(loss, part, chunk_loss)
            if extras is not None:
                chunks.put(extras.t(), part, rows._extras(chunk_saved, n).t())
            if index is not None:
                chunks.put(index.t(), part, chunk_index.t())
            if any(grads):
                linear.add(logits, x, part)
        if call.scalar:
            total = losses.double().sum()
            if call.empty is not None:
                total = torch.where(call.empty, torch.nan, total)
            loss.copy_(total)
        return _listed(loss, saved, extras, index, [g for g in linear.gradients() if g is not None])

    return forward


def _reference_found(t: Tensors, options, codes, loss_dtype, wants):
    """(loss, extras, index) of the plain-PyTorch reference."""
    logits = _logits(t, codes)
    acc = accumulator_dtype(t.input.dtype)
    kwargs = rows._reference_kwargs(*t[3:], options, codes)
    return rows._reference(
        logits.to(acc), dict(kwargs, loss_dtype=loss_dtype), wants, codes[0] != DENSE
    )


def _logits(t: Tensors, codes) -> Tensor:
    """All logits at once, as torch operations; ignored rows are not looked at."""
    x = t.input
    ignored = ignored_rows(t, codes)
    if ignored is not None:
        x = torch.where(ignored.unsqueeze(1), 0.0, x)
    bias = None if t.linear_bias is None else t.linear_bias.to(x.dtype)
    return F.linear(x, t.linear_weight.to(x.dtype), bias)


def _reference_gradients(grad_loss, grad_extras, t: Tensors, options, codes, wants):
    acc = accumulator_dtype(t.input.dtype)
    asked_extras = WANT_EXTRAS if grad_extras is not None else 0

    def found(*sources):
        moved = Tensors(*sources, *t[3:])
        return _for_gradient(*_reference_found(moved, options, codes, acc, asked_extras))

    grads = gradients(found, t[:3], _for_gradient(grad_loss, grad_extras), _wanted(wants))
    return [g.contiguous() for g in grads if g is not None]


def _for_gradient(loss, extras, index=None):
    """The outputs, or their cotangents, that a gradient depends on."""
    return loss, None if extras is None else extras[:3]


def _forward_reference(*args):
    t = Tensors(*args[:8])
    options, codes, loss_dtype, wants, chunk, exact = args[8:]
    loss, saved, extras, index = _result_buffers(t.input, options, codes, loss_dtype, wants)
    with torch.no_grad():
        found = _reference_found(t, options, codes, loss_dtype, wants)
    saved.zero_()  # the reference's backward starts from the input again
    for out, value in zip((loss, extras, index), found):
        if out is not None:
            out.copy_(value)
    grads = []
    if any(_wanted(wants)):
        one = torch.ones((), dtype=saved.dtype, device=t.input.device)
        grads = _reference_gradients(one, None, t, options, codes, wants)
    return _listed(loss, saved, extras, index, grads)


_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? target2, "
    "Tensor? mix, Tensor? weight, Tensor? token_weight"
)

define_op(
    f"linear_cross_entropy_fwd({_TENSORS}, float[]? options, int[] codes, ScalarType loss_dtype, "
    "int wants, int chunk, bool exact) -> Tensor[]",
    fake=_forward_fake,
    impls={
        "cpu": _forward_kernel(cuda=False),
        "cuda": _forward_kernel(cuda=True),
        "reference": _forward_reference,
    },
)

# --------------------------------------------------------------------------------------------------
# Backward, recomputing the logits


def _backward_fake(grad_loss, grad_extras, *args):
    return _fake_grads(Tensors(*args[:8]), args[11])


def _backward_kernel(cuda: bool):
    @torch.no_grad()
    def backward(grad_loss, grad_extras, *args):
        t = Tensors(*args[:8])
        saved, options, codes, wants, chunk, exact = args[8:]
        call = Call(t, options, codes)
        chunks = Chunks(t, call, chunk)
        linear = Linear(t, chunks, _wanted(wants), exact)
        for part in chunks:
            x = chunks.take_input(part)
            logits = linear.logits(x)
            chunk_extras = None
            if grad_extras is not None:
                chunk_extras = chunks.take(grad_extras.t(), part).t().contiguous()
            rows.launch_backward(
                cuda, grad_loss if call.scalar else chunks.take(grad_loss, part), chunk_extras,
                *chunks.row_tensors(logits, part),
                chunks.saved(saved, part, grad_extras is not None), call.options, call.codes,
                logits, (0, 1, logits.stride(0)),
            )  # fmt: skip
            linear.add(logits, x, part)
        return [g for g in linear.gradients() if g is not None]

    return backward


def _backward_reference(grad_loss, grad_extras, *args):
    saved, options, codes, wants, chunk, exact = args[8:]
    t = Tensors(*args[:8])
    return _reference_gradients(grad_loss, grad_extras, t, options, codes, wants)


define_op(
    f"linear_cross_entropy_bwd(Tensor grad_loss, Tensor? grad_extras, {_TENSORS}, Tensor saved, "
    "float[]? options, int[] codes, int wants, int chunk, bool exact) -> Tensor[]",
    fake=_backward_fake,
    impls={
        "cpu": _backward_kernel(cuda=False),
        "cuda": _backward_kernel(cuda=True),
        "reference": _backward_reference,
    },
)

# --------------------------------------------------------------------------------------------------
# By tiles

_TILE_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "Tensor? token_weight"
)


def tiles():
    """What computes by tiles, imported with its first use."""
    from pyloss.ops import _linear_tiles

    return _linear_tiles


def _of_tiles(six) -> Tensors:
    return Tensors(*six[:4], None, None, *six[4:])


def _tiles_forward_reference(*args):
    options, codes, loss_dtype, wants = args[6:]
    t = _of_tiles(args[:6])
    results = tiles().forward_fake(t, options, codes, loss_dtype, wants)
    with torch.no_grad():
        loss, extras, _ = _reference_found(t, options, codes, loss_dtype, wants)
    results[0].copy_(loss)
    results[1].zero_()
    if extras is not None:
        results[2].copy_(extras)
    return results


def _tiles_backward(grad_loss, grad_extras, *args):
    saved, options, codes, wants, filter, exact = args[6:]
    found = tiles().backward(
        grad_loss, grad_extras, _of_tiles(args[:6]), saved, options, codes, _wanted(wants), filter,
        exact,
    )  # fmt: skip
    return [g for g in found if g is not None]


def _tiles_backward_reference(grad_loss, grad_extras, *args):
    saved, options, codes, wants, filter, exact = args[6:]
    t = _of_tiles(args[:6])
    return _reference_gradients(grad_loss, grad_extras, t, options, codes, wants)


define_op(
    f"linear_cross_entropy_tiles_fwd({_TILE_TENSORS}, float[]? options, int[] codes, "
    "ScalarType loss_dtype, int wants) -> Tensor[]",
    fake=lambda *args: tiles().forward_fake(_of_tiles(args[:6]), *args[6:]),
    impls={
        "triton": lambda *args: tiles().forward(_of_tiles(args[:6]), *args[6:]),
        "reference": _tiles_forward_reference,
    },
)
define_op(
    f"linear_cross_entropy_tiles_bwd(Tensor grad_loss, Tensor? grad_extras, {_TILE_TENSORS}, "
    "Tensor saved, float[]? options, int[] codes, int wants, float filter, bool exact) -> Tensor[]",
    fake=lambda grad_loss, grad_extras, *args: _fake_grads(_of_tiles(args[:6]), args[9]),
    impls={"triton": _tiles_backward, "reference": _tiles_backward_reference},
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class Settings(NamedTuple):
    """How a call is carried out; the loss does not depend on it."""

    chunk: int  # rows, or AUTO
    strategy: str
    exact: bool  # the weight's gradient from float32 products
    tiles: float | None = None  # by tiles, leaving out what this filter allows; None: by chunks


class _LinearCrossEntropy(torch.autograd.Function):
    """loss, or (loss, extras, index) with what was asked for."""

    @staticmethod
    def forward(ctx, *args):
        t, (options, codes, loss_dtype, wants, settings) = Tensors(*args[:8]), args[8]
        needed = sum(bit for bit, yes in zip(WANT_GRADS, ctx.needs_input_grad) if yes)
        if settings.chunk == AUTO and needed & WANT_GRADS[1] and not settings.exact:
            settings = settings._replace(chunk=AUTO_FOR_WEIGHT)
        ctx.compiling = torch.compiler.is_compiling()
        ctx.early = _may_be_early(t, codes, wants, settings)
        flags = wants | (needed if ctx.early else 0)
        found = _run_forward(t, options, codes, loss_dtype, flags, settings)
        loss, saved, extras, index, grads = _unlisted(found, flags)
        # A compiled graph must see everything that goes from the forward to the backward.
        ctx.save_for_backward(*t, saved, *(grads if ctx.compiling else ()))
        ctx.grads = None if ctx.compiling else grads
        ctx.options, ctx.codes, ctx.settings = options, codes, settings
        ctx.wants, ctx.needed = wants, needed
        if index is not None:
            ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        present = [r for r in (loss, extras, index) if r is not None]
        return present[0] if len(present) == 1 else tuple(present)

    @staticmethod
    def backward(ctx, grad_loss, *others):
        grads, ctx.grads = ctx.grads, None
        none = (None,) * 6
        if grad_loss is None and all(g is None for g in others):
            return None, None, None, *none
        kept = ctx.saved_tensors  # once: checkpointing unpacks them
        t, saved = Tensors(*kept[:8]), kept[8]
        create_graph = torch.is_grad_enabled()
        if ctx.early and ctx.compiling and not create_graph:
            grads = kept[9:]
            return *(g if g is None else g * grad_loss.to(g.dtype) for g in grads), *none
        if ctx.early and grads is not None and not (create_graph or is_batched(grad_loss)):
            # Handed over, not kept: a second backward computes them anew, autograd may adopt them.
            if not rows._is_one(grad_loss):
                for g in grads:
                    if g is not None:
                        _ops.scale_(g, grad_loss.to(accumulator_dtype(g.dtype)))
            return *grads, *none

        acc = accumulator_dtype(t.input.dtype)
        if grad_loss is None:
            scalar = ctx.codes.reduction != REDUCTIONS["none"]
            grad_loss = torch.zeros(
                () if scalar else t.target.shape[:1], dtype=acc, device=t.input.device
            )
        grad_extras = others[0] if ctx.wants & WANT_EXTRAS else None
        # vmap sees into torch operations, not into an op with several results.
        if (
            create_graph
            or is_batched(grad_loss)
            or (grad_extras is not None and is_batched(grad_extras))
        ):
            return *_differentiable_gradients(ctx, t, grad_loss, grad_extras), *none
        if grad_extras is None and ctx.wants & WANT_EXTRAS:
            grad_extras = torch.zeros(
                (EXTRA_ROWS, t.input.shape[0]), dtype=acc, device=t.input.device
            )
        found = _run_backward(
            grad_loss.to(acc), grad_extras, t, saved, ctx.options, ctx.codes, ctx.needed,
            ctx.settings,
        )  # fmt: skip
        return *_spread(found, ctx.needed), *none


def _without_mix(t: Tensors) -> tuple:
    return (*t[:4], *t[6:])


def _run_forward(t: Tensors, options, codes, loss_dtype, flags, settings):
    if settings.tiles is not None:
        return _ops.linear_cross_entropy_tiles_fwd(
            *_without_mix(t), options, codes, loss_dtype, flags
        )
    chunk, exact = settings.chunk, settings.exact
    return _ops.linear_cross_entropy_fwd(*t, options, codes, loss_dtype, flags, chunk, exact)


def _run_backward(grad_loss, grad_extras, t: Tensors, saved, options, codes, needed, settings):
    chunk, exact = settings.chunk, settings.exact
    if settings.tiles is not None:
        return _ops.linear_cross_entropy_tiles_bwd(
            grad_loss, grad_extras, *_without_mix(t), saved, options, codes, needed,
            settings.tiles, exact,
        )  # fmt: skip
    return _ops.linear_cross_entropy_bwd(
        grad_loss, grad_extras, *t, saved, options, codes, needed, chunk, exact
    )


def _may_be_early(t: Tensors, codes, wants, settings) -> bool:
    """Whether the gradients may be formed in the forward, before the upstream factor is known."""
    if codes.reduction == REDUCTIONS["none"] or wants & WANT_EXTRAS or settings.tiles is not None:
        return False
    if settings.strategy != "auto":
        return settings.strategy == "forward"
    # Checkpointing and offloading hook what is saved, and would not see these tensors.
    # (A compiled graph saves them like everything else.)
    return t.input.dtype in rows._EARLY_DTYPES and (
        torch.compiler.is_compiling() or not saved_tensor_hooks_active()
    )


def composed(t: Tensors, options, codes, loss_dtype, wants):
    """(loss, extras, index) by a product that is stored and the row-softmax op: for derivatives of
    higher order, forward mode, torch.func, probabilities that want a gradient."""
    logits = _logits(t, codes)
    return rows.row_softmax(logits, *t[3:], options, codes, loss_dtype, wants, False)


def _differentiable_gradients(ctx, t: Tensors, grad_loss, grad_extras):
    """The backward as torch operations, for create_graph=True."""
    acc = accumulator_dtype(t.input.dtype)
    wants = WANT_EXTRAS if grad_extras is not None else 0

    def found(*sources):
        moved = Tensors(*sources, *t[3:])
        return _for_gradient(*composed(moved, ctx.options, ctx.codes, acc, wants))

    cotangents = _for_gradient(grad_loss, grad_extras)
    return gradients(found, t[:3], cotangents, _wanted(ctx.needed), create_graph=True)


def linear_cross_entropy(
    t: Tensors,
    options: Options | None,
    codes: Codes,
    loss_dtype: torch.dtype,
    wants: int,
    settings: Settings,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, extras, index) of checked arguments; their rows as in row_softmax."""
    if settings.tiles is not None and not tiles().runs_on(t.input):
        settings = settings._replace(tiles=None)  # a filter allows to leave out, it does not ask to
    if torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in t[:3]):
        found = _LinearCrossEntropy.apply(*t, (options, codes, loss_dtype, wants, settings))
        found = (found,) if wants == 0 else found
        extras = found[1] if wants & WANT_EXTRAS else None
        return found[0], extras, found[-1] if wants & WANT_INDEX else None
    found = _run_forward(t, options, codes, loss_dtype, wants, settings)
    loss, _, extras, index, _ = _unlisted(found, wants)
    return loss, extras, index
