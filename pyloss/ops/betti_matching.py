"""Persistence pairs, Betti matching and its loss, of images of one or two dimensions.

    betti_loss_fused     loss terms and the gradient of the input; static shapes, no host sync
    betti_matching       tables of the matched and the unmatched bars
    persistence_pairs    table of the bars of one image

The loss with a gradient of the target, or with a second derivative, is a gather at the rows of
`betti_matching` in torch operations: :func:`composed_terms`.

Papers: arXiv 2211.15272, 2407.04683.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import _C, backends
from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import functorch_active

TERMS = 3  # the last axis of the loss: csrc/common/betti_matching.h


def _reference():
    """The reference, imported with its first use."""
    from pyloss.reference import betti_matching

    return betti_matching


class Options(NamedTuple):
    """The numbers that cross into the op as one list of floats."""

    superlevel: bool
    dims: int  # bit d: dimension d is wanted
    extreme: bool
    essential: bool
    want_grad: bool
    min_persistence: float
    matched_weight: float
    unmatched_weight: float
    dim_weight0: float
    dim_weight1: float


def _problem(input: Tensor, lead: int, superlevel: bool, dims: list[int]) -> tuple[int, ...]:
    items = 1
    for size in input.shape[:lead]:
        items *= size
    spatial = tuple(input.shape[lead:])
    if len(spatial) not in (1, 2):
        raise NotImplementedError(
            f"Betti matching is implemented for 1 and 2 spatial dimensions, got {len(spatial)}"
        )
    code = DTYPE_CODES[input.dtype]
    rows, cols = spatial if len(spatial) == 2 else (spatial[0], 1)
    return items, rows, cols, len(spatial), code, int(superlevel), int(0 in dims), int(1 in dims)


def _pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and of one dtype that holds every value of either."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return input.to(dtype).contiguous(), target.to(dtype).contiguous()


def _dims_of(mask: int) -> list[int]:
    return [d for d in range(3) if mask >> d & 1]


# --------------------------------------------------------------------------------------------------
# Loss


def _loss_fake(input, target, options):
    spatial = input.dim() - 2
    dtype = torch.promote_types(input.dtype, target.dtype)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    loss = input.new_empty((*input.shape[:2], spatial, TERMS), dtype=dtype)
    if not Options(*options).want_grad:
        return loss, input.new_empty((0,))
    return loss, torch.empty_like(input, memory_format=torch.contiguous_format)


def _loss_cpu(input, target, options):
    o = Options(*options)
    x, y = _pair(input, target)
    problem = _problem(x, 2, bool(o.superlevel), _dims_of(int(o.dims)))
    loss = x.new_empty((*x.shape[:2], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    numbers = (o.extreme, o.essential, *o[5:])
    _C.betti_loss(
        problem, numbers, x.data_ptr(), y.data_ptr(), loss.data_ptr(),
        0 if grad is None else grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return loss, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


def _loss_cuda(input, target, options):
    o = Options(*options)
    x, y = _pair(input, target)
    dims = _dims_of(int(o.dims))
    problem = _cuda_problem(x, y, 2, bool(o.superlevel), dims)
    loss = x.new_empty((*x.shape[:2], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    with torch.cuda.device_of(x):
        scratch = _scratch(x, problem)
        numbers = (o.matched_weight, o.unmatched_weight, 1.0, o.min_persistence, *o[8:])
        _C.cuda_betti_loss(
            problem, numbers, bool(o.extreme), bool(o.essential), loss.data_ptr(),
            0 if grad is None else grad.data_ptr(), 0, scratch.data_ptr(), scratch.numel(),
            _stream(x),
        )  # fmt: skip
    return loss, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


def _loss_reference(input, target, options):
    if backends.forced() != "reference":
        # A device without kernels: the CPU's, rather than matrices of the size of the image.
        return tuple(t.to(input.device) for t in _loss_cpu(input.cpu(), target.cpu(), options))
    o = Options(*options)
    x, y = _pair(input, target)
    spatial = x.dim() - 2
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        terms = _reference().betti_matching_loss(
            leaf.flatten(0, 1), y.flatten(0, 1), superlevel=bool(o.superlevel),
            dims=[d for d in _dims_of(int(o.dims)) if d < spatial], essential=bool(o.essential),
            unmatched="extreme" if o.extreme else "diagonal", min_persistence=o.min_persistence,
        )  # fmt: skip
        weight = terms.new_tensor(o[8:])[:spatial, None]
        scale = terms.new_tensor([o.matched_weight, o.unmatched_weight, 0.0])
        grad = input.new_empty((0,))
        if o.want_grad:
            (grad,) = torch.autograd.grad((terms * weight * scale).sum(), leaf)
    loss = terms.detach().view(*x.shape[:2], spatial, TERMS)
    return loss, grad.to(input.dtype)


define_op(
    "betti_loss_fused(Tensor input, Tensor target, float[] options) -> (Tensor, Tensor)",
    fake=_loss_fake,
    impls={"cpu": _loss_cpu, "cuda": _loss_cuda, "reference": _loss_reference},
)

# --------------------------------------------------------------------------------------------------
# Tables


def _table(data: bytearray, width: int) -> Tensor:
    if not data:
        return torch.empty((0, width), dtype=torch.int64)
    return torch.frombuffer(data, dtype=torch.int64).view(-1, width)


def _matching_fake(input, target, superlevel, dims):
    ctx = torch.library.get_ctx()
    widths = (12, 6, 6)
    return tuple(
        input.new_empty((ctx.new_dynamic_size(), width), dtype=torch.int64) for width in widths
    )


def _matching_cpu(input, target, superlevel, dims):
    x, y = _pair(input, target)
    problem = _problem(x, 1, superlevel, dims)
    found = _C.betti_matching(problem, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return tuple(_table(rows, width) for rows, width in zip(found, (12, 6, 6)))


def _on_cpu(kernel):
    """Tables have a size that the host must learn anyway, and their cells come from the CPU."""

    def call(input, *rest):
        rest = [t.cpu() if isinstance(t, Tensor) else t for t in rest]
        found = kernel(input.cpu(), *rest)
        if isinstance(found, Tensor):
            return found.to(input.device)
        return tuple(t.to(input.device) for t in found)

    return call


def _matching_reference(input, target, superlevel, dims):
    if backends.forced() != "reference":
        return _on_cpu(_matching_cpu)(input, target, superlevel, dims)
    x, y = _pair(input, target)
    found = _reference().betti_matching(x, y, superlevel, dims)
    return tuple(t.to(input.device) for t in found)


define_op(
    "betti_matching(Tensor input, Tensor target, bool superlevel, int[] dims) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_matching_fake,
    impls={"cpu": _matching_cpu, "cuda": _on_cpu(_matching_cpu), "reference": _matching_reference},
)


def _pairs_fake(input, superlevel, dims, essential):
    size = torch.library.get_ctx().new_dynamic_size()
    return input.new_empty((size, 6), dtype=torch.int64)


def _pairs_cpu(input, superlevel, dims, essential):
    x, _ = _pair(input, input)
    problem = _problem(x, 1, superlevel, dims)
    found = _C.persistence_pairs(problem, x.data_ptr(), essential, torch.get_num_threads())
    return _table(found, 6)


def _pairs_reference(input, superlevel, dims, essential):
    if backends.forced() != "reference":
        return _on_cpu(_pairs_cpu)(input, superlevel, dims, essential)
    x, _ = _pair(input, input)
    return _reference().persistence_pairs(x, superlevel, dims, essential).to(input.device)


define_op(
    "persistence_pairs(Tensor input, bool superlevel, int[] dims, bool essential) -> Tensor",
    fake=_pairs_fake,
    impls={"cpu": _pairs_cpu, "cuda": _on_cpu(_pairs_cpu), "reference": _pairs_reference},
)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _cuda_problem(x, y, lead, superlevel, dims) -> tuple[int, ...]:
    items, rows, cols, spatial, code, superlevel, *want = _problem(x, lead, superlevel, dims)
    images = (x.data_ptr(), code, y.data_ptr(), code)
    return items, rows, cols, spatial, *want, superlevel, *images


def _scratch(x: Tensor, problem) -> Tensor:
    nbytes = _C.cuda_betti_matching_scratch_bytes(problem)
    return x.new_empty((nbytes,), dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


def _weights(o: Options, target_weight: float, like: Tensor, spatial: int) -> Tensor:
    terms = (o.matched_weight, o.unmatched_weight, target_weight)
    dims = o[8:][:spatial]
    return like.new_tensor([[w * t for t in terms] for w in dims])


def _total(terms: Tensor, o: Options, target_weight: float) -> Tensor:
    """(N, C) from (N, C, D, 3)."""
    if o.matched_weight == o.unmatched_weight == target_weight == 1:
        if all(w == 1 for w in o[8:][: terms.shape[2]]):
            return terms.sum((2, 3))
    if target_weight == 0:  # an infinite term that is left out
        terms = terms[..., :2]
    weights = _weights(o, target_weight, terms, terms.shape[2])[:, : terms.shape[3]]
    return torch.where(weights == 0, 0.0, terms * weights).sum((2, 3))


def composed_terms(input: Tensor, target: Tensor, o: Options) -> Tensor:
    """The loss terms (N, C, D, 3) as torch operations on the matching's rows."""
    x, y = _pair(input, target)
    spatial = x.dim() - 2
    dims = [d for d in _dims_of(o.dims) if d < spatial]
    with torch.no_grad():
        a, b = x.detach().flatten(0, 1), y.detach().flatten(0, 1)
        matched, left_input, left_target = _ops.betti_matching(a, b, bool(o.superlevel), dims)
        if o.essential and 0 in dims:
            rows = _reference().essential_rows(a, b, bool(o.superlevel))
            matched = torch.cat([matched, rows.to(matched.device)])
    terms = loss_terms(
        x.flatten(0, 1).flatten(1), y.flatten(0, 1).flatten(1), matched, left_input, left_target,
        dim_count=spatial, superlevel=bool(o.superlevel),
        unmatched="extreme" if o.extreme else "diagonal", min_persistence=o.min_persistence,
    )  # fmt: skip
    return terms.view(*x.shape[:2], spatial, TERMS)


class _BettiLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, options, target_weight):
        terms, grad = _ops.betti_loss_fused(input, target, list(map(float, options)))
        ctx.save_for_backward(input, target, grad)
        ctx.options, ctx.target_weight = options, target_weight
        return _total(terms, options, target_weight)

    @staticmethod
    def backward(ctx, upstream):
        input, target, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the loss again, in operations that have one
            with torch.enable_grad():
                terms = composed_terms(input, target, ctx.options)
                total = _total(terms, ctx.options, ctx.target_weight)
            (found,) = torch.autograd.grad(total, input, upstream, create_graph=True)
            return found, None, None, None
        factor = upstream.reshape(*upstream.shape, *(1,) * (input.dim() - 2))
        return (grad.to(upstream.dtype) * factor).to(input.dtype), None, None, None


def betti_loss(input: Tensor, target: Tensor, options: Options, target_weight: float) -> Tensor:
    """Loss of each item and channel (N, C), of checked arguments."""
    grad_mode = torch.is_grad_enabled()
    if functorch_active() or (grad_mode and target.requires_grad):
        return _total(composed_terms(input, target, options), options, target_weight)
    if grad_mode and input.requires_grad:
        return _BettiLoss.apply(input, target, options._replace(want_grad=True), target_weight)
    numbers = list(map(float, options._replace(want_grad=False)))
    terms, _ = _ops.betti_loss_fused(input, target, numbers)
    return _total(terms, options, target_weight)


def betti_matching(input: Tensor, target: Tensor, superlevel: bool, dims: list[int]):
    """(matched, unmatched input, unmatched target) of images (N, *spatial)."""
    return _ops.betti_matching(input.detach(), target.detach(), superlevel, dims)


def persistence_pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    """The bars of images (N, *spatial)."""
    return _ops.persistence_pairs(input.detach(), superlevel, dims, essential)


def loss_terms(*args, **options) -> Tensor:
    """The loss terms of a matching's rows, as torch operations."""
    return _reference().loss_terms(*args, **options)
