"""Low-rank tensor attention of any order m as an op: near-linear, with a polynomial for exp.

    out[i] = sum_{j1..jm} p(S[i, j1..jm]) v_1[j1] * ... * v_m[jm] / y[i]
    y[i]   = sum_{j1..jm} p(S[i, j1..jm]),   lse = log y + centre

`coefficients` are p_t s^t, so that the scale is in them. Formulas, memory and cost:
docs/tensor_attention_lowrank.md. Kernels: csrc/cpu/tensor_attention_lowrank.h,
kernels/tensor_attention_lowrank*.py. Tensors are float32 or float64; features of a half type would
lose what the polynomial gains, and are refused.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops import _tensor_attention_lowrank_cpu as cpu
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import forward_ad_active, functorch_active
from pyloss.ops.tensor_attention import _FirstOrderOnly


def _reference(*args, **options):
    """The reference, imported with its first use."""
    from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank as found

    return found(*args, **options)


class Settings(NamedTuple):
    """What is not a tensor, in the order of the schema. A window of 0 is none."""

    coefficients: tuple[float, ...]  # p_t s^t
    centre: float
    causal: bool
    windows: tuple[int, ...]
    q_offset: int

    @property
    def banded(self) -> bool:
        return self.causal or any(self.windows)


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"tensor_attention_lowrank computes its features in float32 or float64, got {q.dtype}"
        )


def _check(q: Tensor, keys, values, settings) -> None:
    _check_dtype(q)
    d, degree = q.shape[3], len(settings[0]) - 1
    numbers = sum(k.shape[0] * k.shape[1] for k in keys) * (values[0].shape[3] + 1)
    cpu.check_states(d, degree, numbers * cpu.rank(d, degree) * q.element_size())


# --------------------------------------------------------------------------------------------------
# Forward


def _forward_fake(q, keys, values, key_masks, *settings):
    _check_dtype(q)
    settings = Settings(*settings)
    return cpu.results(q, keys, values, settings.coefficients, settings.banded)


def _keywords(key_masks, settings: Settings):
    return dict(
        coefficients=settings.coefficients,
        key_masks=key_masks,
        causal=settings.causal,
        windows=settings.windows,
        q_offset=settings.q_offset,
    )


def _forward_reference(q, keys, values, key_masks, *settings):
    _check(q, keys, values, settings)
    settings = Settings(*settings)
    out, lse, y, states = _reference(
        q, keys, values, centre=settings.centre, **_keywords(key_masks, settings)
    )
    if not q.is_cuda:  # there it would wait for the device
        seen = y[lse != -torch.inf]
        cpu.raise_for_sums(not (seen > 0).all(), not torch.isfinite(seen).all(), y)
    return out.contiguous(), lse.contiguous(), y.contiguous(), [s.contiguous() for s in states]


def _forward_cpu(q, keys, values, key_masks, *settings):
    _check(q, keys, values, settings)
    return cpu.forward(q, keys, values, key_masks, *settings)


def _forward_triton(q, keys, values, key_masks, *settings):
    _check(q, keys, values, settings)
    from pyloss.kernels import tensor_attention_lowrank as kernels

    found = Settings(*settings)
    if not kernels.takes(q, values):
        return _forward_reference(q, keys, values, key_masks, *settings)
    masks = key_masks or [None] * len(keys)
    if found.banded:
        from pyloss.kernels import tensor_attention_lowrank_scan as scan

        return *scan.tensor_attention_lowrank_scan_fwd(q, keys, values, masks, *settings), []
    return kernels.tensor_attention_lowrank_fwd(
        q, keys, values, masks, found.coefficients, found.centre
    )


_TENSORS = "Tensor q, Tensor[] keys, Tensor[] values, Tensor?[] key_masks"
_SETTINGS = "float[] coefficients, float centre, bool causal, SymInt[] windows, SymInt q_offset"

define_op(
    f"tensor_attention_lowrank_fwd({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[])",
    fake=_forward_fake,
    impls={"cpu": _forward_cpu, "triton": _forward_triton, "reference": _forward_reference},
)

# --------------------------------------------------------------------------------------------------
# Backward


def _gradients(q, keys, values):
    """Empty (dq, dkeys, dvalues), contiguous."""
    dq, *rest = (torch.empty_like(t, memory_format=torch.contiguous_format)
                 for t in (q, *keys, *values))  # fmt: skip
    return dq, rest[: len(keys)], rest[len(keys) :]


def _backward_fake(dout, dlse, q, keys, values, *rest):
    return _gradients(q, keys, values)


def _backward_triton(dout, dlse, q, keys, values, key_masks, out, y, states, *settings):
    from pyloss.kernels import tensor_attention_lowrank as kernels

    found = Settings(*settings)
    if not kernels.takes(q, values):
        return _backward_reference(
            dout, dlse, q, keys, values, key_masks, out, y, states, *settings
        )
    masks = key_masks or [None] * len(keys)
    if found.banded:
        from pyloss.kernels import tensor_attention_lowrank_scan as scan

        _, _, *band = settings
        return scan.tensor_attention_lowrank_scan_bwd(
            dout, dlse, q, keys, values, masks, out, y, found.coefficients, *band
        )
    return kernels.tensor_attention_lowrank_bwd(
        dout, dlse, q, keys, values, masks, out, y, states, found.coefficients
    )


def _backward_reference(dout, dlse, q, keys, values, key_masks, out, y, states, *settings):
    from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank_backward

    settings = Settings(*settings)
    dq, dkeys, dvalues = tensor_attention_lowrank_backward(
        dout, dlse, q, keys, values, out, y, states, **_keywords(key_masks, settings)
    )
    return dq.contiguous(), [g.contiguous() for g in dkeys], [g.contiguous() for g in dvalues]


define_op(
    f"tensor_attention_lowrank_bwd(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor y, "
    f"Tensor[] states, {_SETTINGS}) -> (Tensor, Tensor[], Tensor[])",
    fake=_backward_fake,
    impls={"cpu": cpu.backward, "triton": _backward_triton, "reference": _backward_reference},
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, order, q, *others):
        keys, values, masks = others[:order], others[order : 2 * order], others[2 * order :]
        out, lse, y, states = _ops.tensor_attention_lowrank_fwd(q, keys, values, masks, *settings)
        ctx.save_for_backward(q, *others, out, y, *states)
        ctx.settings, ctx.order = settings, order
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        m = ctx.order
        if dout is None and dlse is None:
            return (None,) * (3 + 3 * m)
        q, *others = ctx.saved_tensors
        keys, values, masks = others[:m], others[m : 2 * m], others[2 * m : 3 * m]
        out, y, *states = others[3 * m :]
        cotangent = torch.zeros_like(out) if dout is None else dout
        with torch.no_grad():
            dq, dkeys, dvalues = _ops.tensor_attention_lowrank_bwd(
                cotangent, dlse, q, keys, values, masks, out, y, states, *ctx.settings
            )
        found = [dq, *dkeys, *dvalues]
        if torch.is_grad_enabled():
            found = _FirstOrderOnly.apply(len(found), *found, cotangent, q, *keys, *values)
        return None, None, *found, *(None,) * m


def tensor_attention_lowrank(
    q: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    key_masks: tuple[Tensor | None, ...],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments in float32 or float64; masks are bool, (B, G or 1, n)."""
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return _reference(
            q, keys, values, centre=settings.centre, **_keywords(key_masks, settings)
        )[:2]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *keys, *values)):
        return _LowRank.apply(settings, len(keys), q, *keys, *values, *key_masks)
    return _ops.tensor_attention_lowrank_fwd(q, keys, values, key_masks, *settings)[:2]
