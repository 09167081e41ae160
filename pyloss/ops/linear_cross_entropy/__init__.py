"""Linear cross entropy: the row-softmax loss of `input @ weight.T + bias`, by chunks of rows.

A chunk's logits are one product into a buffer that all chunks share; the row-softmax kernel turns
them into losses and, in place, into the gradient of the logits; two more products give the
gradients of the input and the weight. Two strategies:

    forward      products  forward 3, backward 0    scalar losses: the upstream factor comes later
    recompute    products  forward 1, backward 3    everything else; keeps N x 4 statistics

A third one works by tiles instead of chunks (triton.py, on CUDA): products as in
"recompute", less those of the gradient's tiles that a filter leaves out.

Beyond results: one chunk of logits, and for half dtypes the weight's gradient in float32. The
numbers, and how a chunk's length is chosen, stand in docs/linear_cross_entropy.md.

Paper: recomputation, Wijmans et al., arXiv 2411.09009; formulas, csrc/common/row_softmax.h.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyloss.ops import row_softmax as rows
from pyloss.ops._changing import NUMBERS, split
from pyloss.ops._empty import scaled
from pyloss.ops._flops import count_by
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import distinct, is_batched, saved_tensor_hooks_active
from pyloss.ops.linear_cross_entropy import cpu, cuda, reference
from pyloss.ops.linear_cross_entropy.by_chunks import listed, result_buffers
from pyloss.ops.linear_cross_entropy.call import (
    AUTO,
    AUTO_FOR_WEIGHT,
    WANT_GRADS,
    Settings,
    Tensors,
    spread,
    wanted,
)
from pyloss.ops.linear_cross_entropy.chunks import chunk_rows
from pyloss.ops.row_softmax import EXTRA_ROWS, WANT_EXTRAS, WANT_INDEX, Codes, Options
from pyloss.ops.row_softmax.records import unpacked

__all__ = [
    "Codes",
    "Options",
    "Settings",
    "Tensors",
    "chunk_rows",
    "composed",
    "linear_cross_entropy",
    "tiles",
]

# --------------------------------------------------------------------------------------------------
# Registration: by chunks


def _fake_grads(t: Tensors, wants) -> list[Tensor]:
    fmt = torch.contiguous_format
    return [torch.empty_like(s, memory_format=fmt) for s, y in zip(t[:3], wanted(wants)) if y]


def _forward_fake(*args):
    t = Tensors(*args[:8])
    options, codes, loss_dtype, wants = args[8:12]
    buffers = result_buffers(t.input, *unpacked(options, codes), loss_dtype, wants)
    return listed(*buffers, _fake_grads(t, wants))


_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? target2, "
    "Tensor? mix, Tensor? weight, Tensor? token_weight"
)

_WHOLE = "the functions hand over what each process has, and add up themselves"

define_op(
    f"linear_cross_entropy_fwd({_TENSORS}, float[]? options, int[] codes, ScalarType loss_dtype, "
    f"int wants, int chunk, bool exact, {NUMBERS}) -> Tensor[]",
    fake=_forward_fake,
    impls={"cpu": cpu.forward, "cuda": cuda.forward, "reference": reference.forward},
    shards=_WHOLE,
    plain=functools.partial(reference.forward, recorded=False),
)
define_op(
    f"linear_cross_entropy_bwd(Tensor grad_loss, Tensor? grad_extras, {_TENSORS}, Tensor saved, "
    f"float[]? options, int[] codes, int wants, int chunk, bool exact, {NUMBERS}) -> Tensor[]",
    fake=lambda grad_loss, grad_extras, *args: _fake_grads(Tensors(*args[:8]), args[11]),
    impls={"cpu": cpu.backward, "cuda": cuda.backward, "reference": reference.backward},
    shards=_WHOLE,
)

# --------------------------------------------------------------------------------------------------
# Registration: by tiles

_TILE_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "Tensor? token_weight"
)


def tiles():
    """What computes by tiles, imported with its first use."""
    from pyloss.ops.linear_cross_entropy import triton

    return triton


def _of_tiles(six) -> Tensors:
    return Tensors(*six[:4], None, None, *six[4:])


def _without_mix(t: Tensors) -> tuple:
    return (*t[:4], *t[6:])


def _tiles_fake(*args):
    return tiles().empty_results(_of_tiles(args[:6]), *args[6:10])


def _tiles_reference(*args):
    return reference.tiles_forward(_tiles_fake(*args), _of_tiles(args[:6]), *args[6:])


def _tiles_backward(grad_loss, grad_extras, *args):
    saved, options, codes, wants, filter, exact, *numbers = args[6:]
    found = tiles().backward(
        grad_loss, grad_extras, _of_tiles(args[:6]), saved, options, codes, wanted(wants), filter,
        exact, *numbers,
    )  # fmt: skip
    return [g for g in found if g is not None]


def _tiles_backward_reference(grad_loss, grad_extras, *args):
    saved, options, codes, wants, filter, exact, *numbers = args[6:]
    t = _of_tiles(args[:6])
    return reference.tiles_backward(grad_loss, grad_extras, t, options, codes, wants, *numbers)


define_op(
    f"linear_cross_entropy_tiles_fwd({_TILE_TENSORS}, float[]? options, int[] codes, "
    f"ScalarType loss_dtype, int wants, {NUMBERS}) -> Tensor[]",
    fake=_tiles_fake,
    impls={
        "triton": lambda *args: tiles().forward(_of_tiles(args[:6]), *args[6:]),
        "reference": _tiles_reference,
    },
    shards=_WHOLE,
)
define_op(
    f"linear_cross_entropy_tiles_bwd(Tensor grad_loss, Tensor? grad_extras, {_TILE_TENSORS}, "
    "Tensor saved, float[]? options, int[] codes, int wants, float filter, bool exact, "
    f"{NUMBERS}) -> Tensor[]",
    fake=lambda grad_loss, grad_extras, *args: _fake_grads(_of_tiles(args[:6]), args[9]),
    impls={"triton": _tiles_backward, "reference": _tiles_backward_reference},
    shards=_WHOLE,
)

# --------------------------------------------------------------------------------------------------
# Multiplications and additions, of all rows: which ones are ignored is not known from shapes


def _flops(input, linear_weight, products: int, wants: int) -> int:
    """Of the given products and of those for the gradients that are wanted; a bias takes none."""
    return 2 * input[0] * linear_weight[0] * input[1] * (products + sum(wanted(wants)[:2]))


def _forward_flops(input, linear_weight, *rest, out_shape=None) -> int:
    return _flops(input, linear_weight, 1, rest[9])


def _backward_flops(grad_loss, grad_extras, input, linear_weight, *rest, out_shape=None) -> int:
    return _flops(input, linear_weight, 1, rest[9])


def _tiles_forward_flops(input, linear_weight, *rest, out_shape=None) -> int:
    return _flops(input, linear_weight, 1, 0)


def _tiles_backward_flops(grad_loss, grad_extras, input, linear_weight, *rest, out_shape=None):
    """With all tiles: what a filter leaves out is not known before."""
    return _flops(input, linear_weight, 1, rest[7])


count_by("linear_cross_entropy_fwd", _forward_flops)
count_by("linear_cross_entropy_bwd", _backward_flops)
count_by("linear_cross_entropy_tiles_fwd", _tiles_forward_flops)
count_by("linear_cross_entropy_tiles_bwd", _tiles_backward_flops)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


def _unlisted(found, wants):
    """(loss, saved, extras, index, [grads]) of a forward's result."""
    # By place: Dynamo of torch 2.6 cannot trace a pop.
    place = 2
    extras = found[place] if wants & WANT_EXTRAS else None
    place += bool(wants & WANT_EXTRAS)
    index = found[place] if wants & WANT_INDEX else None
    place += bool(wants & WANT_INDEX)
    return found[0], found[1], extras, index, spread(found[place:], wants)


class _LinearCrossEntropy(torch.autograd.Function):
    """loss, or (loss, extras, index) with what was asked for."""

    # Eight tensors, then one tuple: plain ones, as in row_softmax.
    @staticmethod
    def forward(ctx, *args):
        tensors, call = args[:8], args[8]
        options, codes, loss_dtype, wants, scalar, settings, numbers = call
        chunk, strategy, exact, tiles = settings
        needed = sum(bit for bit, yes in zip(WANT_GRADS, ctx.needs_input_grad) if yes)
        if chunk == AUTO and needed & WANT_GRADS[1] and not exact:
            chunk = AUTO_FOR_WEIGHT
        settings = (chunk, strategy, exact, tiles)
        ctx.compiling = torch.compiler.is_compiling()
        ctx.early = (
            scalar
            and not wants & WANT_EXTRAS
            and tiles is None
            and _may_be_early(tensors[0].dtype, strategy)
        )
        flags = wants | (needed if ctx.early else 0)
        found = _run_forward(tensors, options, codes, loss_dtype, flags, settings, numbers)
        loss, saved, extras, index, grads = _unlisted(found, flags)
        # A compiled graph must see everything that goes from the forward to the backward.
        ctx.save_for_backward(*tensors, saved, numbers, *(grads if ctx.compiling else ()))
        ctx.grads = None if ctx.compiling else grads
        ctx.options, ctx.codes, ctx.settings = options, codes, settings
        ctx.wants, ctx.needed, ctx.scalar = wants, needed, scalar
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
        tensors, saved, numbers = kept[:8], kept[8], kept[9]
        create_graph = torch.is_grad_enabled()
        if ctx.early and ctx.compiling and not create_graph:
            grads = kept[10:]
            return *(g if g is None else scaled(g, grad_loss) for g in grads), *none
        if ctx.early and grads is not None and not (create_graph or is_batched(grad_loss)):
            factor = rows.known(grad_loss)
            if factor is None or math.isfinite(factor):
                # Handed over, not kept: a second backward computes them anew, autograd may adopt
                # them.
                if factor != 1.0:
                    for g in grads:
                        if g is not None:
                            _ops.scale_(g, grad_loss.to(accumulator_dtype(g.dtype)))
                return *grads, *none

        input, target = tensors[0], tensors[3]
        acc = accumulator_dtype(input.dtype)
        if grad_loss is None:
            shape = () if ctx.scalar else target.shape[:1]
            grad_loss = torch.zeros(shape, dtype=acc, device=input.device)
        grad_extras = others[0] if ctx.wants & WANT_EXTRAS else None
        # vmap sees into torch operations, not into an op with several results.
        if (
            create_graph
            or is_batched(grad_loss)
            or (grad_extras is not None and is_batched(grad_extras))
        ):
            return *_differentiable_gradients(ctx, tensors, grad_loss, grad_extras), *none
        if grad_extras is None and ctx.wants & WANT_EXTRAS:
            grad_extras = torch.zeros((EXTRA_ROWS, input.shape[0]), dtype=acc, device=input.device)
        found = _run_backward(
            grad_loss.to(acc), grad_extras, tensors, saved, ctx.options, ctx.codes, ctx.needed,
            ctx.settings, numbers,
        )  # fmt: skip
        return *spread(found, ctx.needed), *none


def _run_forward(tensors, options, codes, loss_dtype, flags, settings, numbers):
    chunk, _, exact, tiles = settings
    if tiles is not None:
        return _ops.linear_cross_entropy_tiles_fwd(
            *_without_mix(tensors), options, codes, loss_dtype, flags, numbers
        )
    return _ops.linear_cross_entropy_fwd(
        *tensors, options, codes, loss_dtype, flags, chunk, exact, numbers
    )


def _run_backward(
    grad_loss, grad_extras, tensors, saved, options, codes, needed, settings, numbers
):
    chunk, _, exact, tiles = settings
    if tiles is not None:
        return _ops.linear_cross_entropy_tiles_bwd(
            grad_loss, grad_extras, *_without_mix(tensors), saved, options, codes, needed, tiles,
            exact, numbers,
        )  # fmt: skip
    return _ops.linear_cross_entropy_bwd(
        grad_loss, grad_extras, *tensors, saved, options, codes, needed, chunk, exact, numbers
    )


def _may_be_early(dtype: torch.dtype, strategy: str) -> bool:
    """Whether the gradients of a scalar loss may be formed in the forward, before the upstream
    factor is known."""
    if strategy != "auto":
        return strategy == "forward"
    # Checkpointing and offloading hook what is saved, and would not see these tensors.
    # (A compiled graph saves them like everything else.)
    return dtype in rows.EARLY_DTYPES and (
        torch.compiler.is_compiling() or not saved_tensor_hooks_active()
    )


def composed(t: Tensors, options, codes, loss_dtype, wants):
    """(loss, extras, index) by a product that is stored and the row-softmax op: for derivatives of
    higher order, forward mode, torch.func, probabilities that want a gradient."""
    logits = reference.all_logits(t, codes)
    return rows.row_softmax(logits, *t[3:], options, codes, loss_dtype, wants, False)


def _differentiable_gradients(ctx, tensors, grad_loss, grad_extras):
    """The backward as torch operations, for create_graph=True."""
    t, codes = Tensors(*tensors), Codes(*ctx.codes)
    options = None if ctx.options is None else Options(*ctx.options)
    acc = accumulator_dtype(t.input.dtype)

    def function(t, wants):
        return composed(t, options, codes, acc, wants)

    needed = wanted(ctx.needed)
    return reference.gradients_of(function, t, grad_loss, grad_extras, needed, create_graph=True)


def linear_cross_entropy(
    t: Tensors,
    options: Options | None,
    codes: Codes,
    loss_dtype: torch.dtype,
    wants: int,
    settings: Settings,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, extras, index) of checked arguments; their rows as in row_softmax."""
    chunk, strategy, exact, filter = settings
    if filter is not None and not tiles().can_filter(t.input):
        filter = None  # it allows to leave out, it does not ask to
    settings = (chunk, strategy, exact, filter)
    numbers = None
    if options is not None and torch.compiler.is_compiling():
        options, numbers = split(options)
        options = Options(*options)
    trained = (t.input, t.linear_weight, t.linear_bias)  # Dynamo of torch 2.6 slices no NamedTuple
    if torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in trained):
        call = (
            options if options is None else tuple(options), tuple(codes), loss_dtype, wants,
            codes.scalar, settings, numbers,
        )  # fmt: skip
        found = _LinearCrossEntropy.apply(*distinct(tuple(t)), call)
        found = (found,) if wants == 0 else found
        extras = found[1] if wants & WANT_EXTRAS else None
        return found[0], extras, found[-1] if wants & WANT_INDEX else None
    found = _run_forward(tuple(t), options, codes, loss_dtype, wants, settings, numbers)
    loss, _, extras, index, _ = _unlisted(found, wants)
    return loss, extras, index
