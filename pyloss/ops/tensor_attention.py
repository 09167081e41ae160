"""Exact Kronecker tensor attention as an op: (out, lse) forward, up to seven gradients backward.

    S[i,j,k] = scale sum_l q[i,l] k1[j,l] (k2[k,l] + bk) + mask1[i,j] + mask2[i,k]
    out[i,c] = sum_jk softmax_jk(S)[i,j,k] v1[j,c] (v2[k,c] + bv)

Formulas, memory and cost: docs/tensor_attention.md. Kernels: csrc/cpu/tensor_attention.h,
kernels/tensor_attention.py.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype, address
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import forward_ad_active, functorch_active


class Settings(NamedTuple):
    """What is not a tensor, in the order of the schema. A window of 0 is none."""

    scale: float
    causal: bool
    w1: int
    w2: int
    q_offset: int
    bk: float
    bv: float


# Bits of `want`: q, k1, k2, v1, v2, mask1, mask2.
WANT = tuple(1 << bit for bit in range(7))

# --------------------------------------------------------------------------------------------------
# Forward


def _results(q, v1):
    """Empty (out, lse); shared by the kernels and the fake."""
    batch, heads, n_q, _ = q.shape
    out = q.new_empty((batch, heads, n_q, v1.shape[-1]))
    return out, q.new_empty((batch, heads, n_q), dtype=accumulator_dtype(q.dtype))


def _forward_fake(q, k1, k2, v1, v2, mask1, mask2, *settings):
    return _results(q, v1)


def _rows(t: Tensor) -> Tensor:
    """The kernels step through the features with stride 1."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _expanded(mask, q, n, dtype):
    """A mask of stride 1 along the keys, broadcast to (B, H, n_q, n)."""
    if mask is None:
        return None
    mask = mask.to(dtype)
    if n > 1 and mask.stride(-1) != 1 or mask.shape[-1] != n:
        mask = mask.expand(*mask.shape[:-1], n).contiguous()
    return mask.expand(*q.shape[:3], n)


def _packed(q, k1, k2, v1, v2, mask1, mask2, settings: Settings):
    """The integers and floats of csrc/bind/tensor_attention.cpp."""
    ints = [q.shape[0], q.shape[1], k1.shape[1], q.shape[2], k1.shape[2], k2.shape[2], q.shape[3]]
    ints += [v1.shape[3], DTYPE_CODES[q.dtype], q.data_ptr(), *q.stride()[:3]]
    ints += [int(settings.causal), settings.w1, settings.w2, settings.q_offset]
    for k, v, mask in ((k1, v1, mask1), (k2, v2, mask2)):
        ints += [k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3]]
        ints += [address(mask), *((0, 0, 0) if mask is None else mask.stride()[:3])]
    return ints, (settings.scale, settings.bk, settings.bv)


def _prepared(tensors, masks, settings):
    """(all tensors in the kernel's layout, their packed description); the tensors must live on."""
    acc = accumulator_dtype(tensors[0].dtype)
    tensors = [_rows(t) for t in tensors]
    q, k1, k2 = tensors[:3]
    masks = [_expanded(m, q, k.shape[2], acc) for m, k in zip(masks, (k1, k2))]
    kept = (*tensors, *masks)
    return kept, _packed(*kept, settings)


def _scratch(q, problem, *, backward: bool, mask_gradients: bool = False):
    """(buffer, its bytes, threads)."""
    threads = torch.get_num_threads()
    size = _C.tensor_attention_scratch_bytes(*problem, backward, mask_gradients, threads)
    buffer = q.new_empty(size + 64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    return buffer[start : start + size], size, threads


def _forward_cpu(q, k1, k2, v1, v2, mask1, mask2, *settings):
    out, lse = _results(q, v1)
    if lse.numel():
        settings = Settings(*settings)
        kept, problem = _prepared((q, k1, k2, v1, v2), (mask1, mask2), settings)
        buffer, size, threads = _scratch(q, problem, backward=False)
        _C.tensor_attention_fwd(
            *problem, address(out), address(lse), address(buffer), size, threads
        )
        del kept
    return out, lse


def _keywords(settings: Settings):
    """The keywords of kernels/tensor_attention.py."""
    return dict(
        scale=settings.scale,
        causal=settings.causal,
        w1=settings.w1 or None,
        w2=settings.w2 or None,
        q_offset=settings.q_offset,
        kv_bias=(settings.bk, settings.bv),
    )


def _triton_takes(q, v1) -> bool:
    """Whether the Triton kernels know the case; the reference has the rest."""
    return q.dtype != torch.float64 and max(q.shape[3], v1.shape[3]) <= 256


def _forward_triton(q, k1, k2, v1, v2, mask1, mask2, *settings):
    if not _triton_takes(q, v1):
        return _forward_reference(q, k1, k2, v1, v2, mask1, mask2, *settings)
    out, lse = _results(q, v1)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    from pyloss.kernels import tensor_attention as kernels

    masks = _kernel_masks(mask1, mask2, k1, k2)
    return kernels.tensor_attention_fwd(q, k1, k2, v1, v2, *masks, **_keywords(Settings(*settings)))


def _kernel_masks(mask1, mask2, k1, k2):
    """Float32 with the keys' full length."""
    masks = []
    for mask, k in ((mask1, k1), (mask2, k2)):
        if mask is not None:
            mask = _rows(mask.float().expand(*mask.shape[:-1], k.shape[2]))
        masks.append(mask)
    return masks


def _reference_found(q, k1, k2, v1, v2, mask1, mask2, settings: Settings):
    from pyloss.reference.tensor_attention import tensor_attention  # with its first use

    return tensor_attention(
        q,
        (k1, k2),
        (v1, v2),
        masks=(mask1, mask2),
        scale=settings.scale,
        causal=settings.causal,
        windows=(settings.w1 or None, settings.w2 or None),
        q_offset=settings.q_offset,
        kv_bias=(settings.bk, settings.bv),
    )


def _forward_reference(*args):
    out, lse = _reference_found(*args[:7], Settings(*args[7:]))
    return out.contiguous(), lse.contiguous()


_TENSORS = "Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, Tensor? mask1, Tensor? mask2"
_SETTINGS = "float scale, bool causal, SymInt w1, SymInt w2, SymInt q_offset, float bk, float bv"

define_op(
    f"tensor_attention_fwd({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    impls={"cpu": _forward_cpu, "triton": _forward_triton, "reference": _forward_reference},
)

# --------------------------------------------------------------------------------------------------
# Backward


def _wanted(want: int) -> list[bool]:
    return [bool(want & bit) for bit in WANT]


def _gradients(tensors, masks, want):
    """Empty gradients of what is wanted, None for the rest: contiguous, masks' in their shape."""
    sources = (*tensors, *masks)
    fmt = torch.contiguous_format
    return [
        torch.empty_like(s, memory_format=fmt) if yes else None
        for s, yes in zip(sources, _wanted(want))
    ]


def _backward_fake(dout, dlse, *args):
    return [g for g in _gradients(args[:5], args[5:7], args[-1]) if g is not None]


def _backward_cpu(dout, dlse, *args):
    tensors, masks, (out, lse) = args[:5], args[5:7], args[7:9]
    settings, want = Settings(*args[9:-1]), args[-1]
    q, k1, k2 = tensors[:3]
    grads = _gradients(tensors, masks, want)
    acc = accumulator_dtype(q.dtype)
    # The kernel writes a mask's gradient for every batch, head and query.
    for at, k in ((5, k1), (6, k2)):
        if grads[at] is not None:
            grads[at] = q.new_zeros((*q.shape[:3], k.shape[2]), dtype=acc)
    if lse.numel() == 0:
        for g in grads:
            if g is not None:
                g.zero_()
    else:
        dout = _rows(dout)
        dlse = None if dlse is None else dlse.to(acc).contiguous()
        kept, problem = _prepared(tensors, masks, settings)
        with_masks = grads[5] is not None or grads[6] is not None
        buffer, size, threads = _scratch(q, problem, backward=True, mask_gradients=with_masks)
        addresses = [address(g) for g in grads]
        _C.tensor_attention_bwd(
            *problem, dout.data_ptr(), dout.stride()[:3], address(dlse), out.data_ptr(),
            lse.data_ptr(), addresses, address(buffer), size, threads,
        )  # fmt: skip
        del kept
    return _finished(grads, masks)


def _finished(grads, masks):
    """The wanted gradients; those of masks added up over what the masks were broadcast to."""
    for at, mask in ((5, masks[0]), (6, masks[1])):
        if grads[at] is not None:
            grads[at] = grads[at].sum_to_size(mask.shape).to(mask.dtype).contiguous()
    return [g for g in grads if g is not None]


def _backward_triton(dout, dlse, *args):
    tensors, masks, (out, lse) = args[:5], args[5:7], args[7:9]
    settings, want = Settings(*args[9:-1]), args[-1]
    q, k1, k2, v1, _ = tensors
    if not _triton_takes(q, v1):
        return _backward_reference(dout, dlse, *args)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0:
        return [g.zero_() for g in _gradients(tensors, masks, want) if g is not None]
    from pyloss.kernels import tensor_attention as kernels

    grads = kernels.tensor_attention_bwd(
        dout, dlse, *tensors, *_kernel_masks(*masks, k1, k2), out, lse, **_keywords(settings),
        want=_wanted(want),
    )  # fmt: skip
    return _finished(list(grads), masks)


def _backward_reference(dout, dlse, *args):
    settings, want = Settings(*args[9:-1]), args[-1]
    with torch.enable_grad():
        sources = [s if s is None else s.detach().requires_grad_(w)
                   for s, w in zip(args[:7], _wanted(want))]  # fmt: skip
        found = _reference_found(*sources, settings)
        cotangents = [dout, torch.zeros_like(found[1]) if dlse is None else dlse.to(found[1].dtype)]
        # A row without any valid pair has an lse without a gradient.
        cotangents[1] = torch.where(found[1] == -torch.inf, 0.0, cotangents[1])
        asked = [s for s, w in zip(sources, _wanted(want)) if w]
        grads = torch.autograd.grad(found, asked, cotangents, allow_unused=True)
    return [(torch.zeros_like(s) if g is None else g).contiguous() for s, g in zip(asked, grads)]


define_op(
    f"tensor_attention_bwd(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, "
    f"{_SETTINGS}, int want) -> Tensor[]",
    fake=_backward_fake,
    impls={"cpu": _backward_cpu, "triton": _backward_triton, "reference": _backward_reference},
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _FirstOrderOnly(torch.autograd.Function):
    """Passes gradients on; differentiating them raises.

    torch's once_differentiable would do the same with words that name neither op nor remedy.
    """

    @staticmethod
    def forward(ctx, count, *args):
        return tuple(g if g is None else g.view_as(g) for g in args[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "tensor_attention has no second derivative; its namesakes in pyloss.reference "
            "(tensor_attention, tensor_attention_lowrank), plain PyTorch, have all of them"
        )


class _TensorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        tensors, settings = args[:7], args[7]
        out, lse = _ops.tensor_attention_fwd(*tensors, *settings)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        kept = ctx.saved_tensors
        tensors, out, lse = kept[:7], kept[7], kept[8]
        want = sum(bit for bit, yes in zip(WANT, ctx.needs_input_grad) if yes)
        if want == 0 or (dout is None and dlse is None):
            return (None,) * 8
        cotangent = torch.zeros_like(out) if dout is None else dout
        found = _ops.tensor_attention_bwd(
            cotangent, dlse, *(t if t is None else t.detach() for t in tensors), out.detach(),
            lse.detach(), *ctx.settings, want,
        )  # fmt: skip
        if torch.is_grad_enabled():
            found = _FirstOrderOnly.apply(len(found), *found, cotangent, *tensors)
        grads = list(found)
        return *(grads.pop(0) if want & bit else None for bit in WANT), None


def tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments; masks are additive and floating."""
    tensors = (q, k1, k2, v1, v2, mask1, mask2)
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return _reference_found(*tensors, settings)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _TensorAttention.apply(*tensors, settings)
    return _ops.tensor_attention_fwd(*tensors, *settings)


def scratch_bytes(q, k1, k2, v1, v2, settings: Settings, backward: bool) -> int:
    """Bytes of scratch of the CPU kernel at the present number of threads; on meta tensors too."""
    q, k1, k2, v1, v2 = (t.new_empty(()).expand(t.shape) for t in (q, k1, k2, v1, v2))
    problem = _packed(q, k1, k2, v1, v2, None, None, settings)
    return _C.tensor_attention_scratch_bytes(*problem, backward, False, torch.get_num_threads())
