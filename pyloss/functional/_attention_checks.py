"""Checks of the arguments of tensor attention."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import functorch_active
from pyloss.ops.tensor_attention_lowrank.plan import MOST_DEGREE

_METHODS = ("exact", "lowrank", "auto")
_POLYNOMIALS = ("taylor", "chebyshev", "fit")
_CHECKS = ("warn", "strict", "none")


def check_choices(method, form, dropout_p) -> None:
    checks.check_one_of("method", method, _METHODS)
    if form not in ("product", "determinant"):
        raise ValueError(f"form must be product or determinant, got {form!r}")
    checks.check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if dropout_p > 0.0 and method == "lowrank":
        raise ValueError('method="lowrank" takes no dropout, dropout_p must be 0')
    if dropout_p > 0.0:
        raise NotImplementedError("tensor_attention has no dropout yet, dropout_p must be 0")


def checked_options(method, degree, poly, tol, check, logit_bound) -> tuple:
    """The fields of _lowrank.Options, of right types and ranges."""
    if degree is not None:
        given, degree = degree, checks.as_integer(degree)
        if degree is None:
            raise TypeError(
                f"degree must be an integer or None, got {given!r} ({type(given).__name__})"
            )
        if not 1 <= degree <= MOST_DEGREE:
            raise ValueError(f"degree must be between 1 and {MOST_DEGREE}, got {degree}")
    checks.check_one_of("poly", poly, _POLYNOMIALS)
    checks.check_one_of("check", check, _CHECKS)
    for name, value in (("tol", tol), ("logit_bound", logit_bound)):
        if name == "logit_bound" and value is None:
            continue
        checks.check_number(name, value)
        if not value > 0.0:
            raise ValueError(f"{name} must be positive, got {value}")
    if method == "exact":
        of_low_rank = (("degree", degree, None), ("poly", poly, "taylor"), ("tol", tol, 0.01),
                       ("check", check, "warn"), ("logit_bound", logit_bound, None))  # fmt: skip
        for name, value, default in of_low_rank:
            if value != default:
                raise ValueError(
                    f'{name} is an option of method="lowrank" and "auto", and has no effect with '
                    '"exact"'
                )
    bound = None if logit_bound is None else float(logit_bound)
    return method, degree, poly, float(tol), check, bound


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def checked_tensors(q, keys, values, enable_gqa, key_names, value_names):
    """(q, keys, values) of shapes, dtypes and devices that fit, cast under autocast."""
    names, tensors = ("q", *key_names, *value_names), (q, *keys, *values)
    for name, t in zip(names, tensors):
        checks.check_tensor(name, t)
    if checks.autocast_on(q):
        to = torch.get_autocast_dtype(q.device.type)
        q, *rest = tensors = [
            t.to(to) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
        ]
        keys, values = rest[: len(keys)], rest[len(keys) :]
    dtype, device = q.dtype, q.device
    for name, t in zip(names, tensors):
        if t.is_nested or t.is_sparse:
            kind = "a nested one" if t.is_nested else f"one of layout {t.layout}"
            raise TypeError(f"{name} must be a dense Tensor, padded and masked, got {kind}")
        if t.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, features), got shape "
                f"{_shape(t)}"
            )
        if t.dtype != dtype:
            raise TypeError(f"q and {name} must have one dtype, got {dtype} and {t.dtype}")
        if t.device != device:
            raise RuntimeError(f"q and {name} must be on one device, got {device} and {t.device}")
    if dtype not in checks.FLOATS:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {dtype}")
    first = keys[0]
    batch, heads, _, d = q.shape
    kv_heads, dv = first.shape[1], values[0].shape[3]
    if checks.checked_flag("enable_gqa", enable_gqa):
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"the heads of q must be a multiple of those of {key_names[0]}, got {_shape(q)} "
                f"and {_shape(first)}"
            )
    elif heads != kv_heads:
        raise ValueError(
            f"q and {key_names[0]} must have as many heads unless enable_gqa=True, got {_shape(q)} "
            f"and {_shape(first)}"
        )
    if d == 0:
        raise ValueError("q must have at least one feature, got d = 0")
    for k_name, k, v_name, v in zip(key_names, keys, value_names, values):
        k_shape, v_shape = k.shape, v.shape
        if k_shape[0] != batch or k_shape[3] != d:
            raise ValueError(
                f"q and {k_name} must have one batch size and as many features, got {_shape(q)} "
                f"and {_shape(k)}"
            )
        if k_shape[1] != kv_heads:
            raise ValueError(
                f"{key_names[0]} and {k_name} must have as many heads, got {_shape(first)} and "
                f"{_shape(k)}"
            )
        if v_shape[:3] != k_shape[:3]:
            raise ValueError(
                f"{k_name} and {v_name} must agree in batch, heads and length, got {_shape(k)} and "
                f"{_shape(v)}"
            )
        if v_shape[3] != dv:
            raise ValueError(
                f"{value_names[0]} and {v_name} must have as many features, got "
                f"{_shape(values[0])} and {_shape(v)}"
            )
    return q, tuple(keys), tuple(values)


def checked_masks(q, keys, attn_mask, masks, names):
    """Per axis None or an additive floating mask of four dimensions, attn_mask included."""
    found = []
    for name, mask, k in zip(names, masks, keys):
        parts = [
            _checked_mask(n, m, q, k.shape[2])
            for n, m in ((name, mask), ("attn_mask", attn_mask))
            if m is not None
        ]
        found.append(sum(parts[1:], parts[0]) if parts else None)
    return tuple(found)


class NotOfKeys(ValueError):
    """A mask that low-rank attention cannot take."""


def key_masks(q, keys, masks, names):
    """Per axis None or bool (B, G or 1, n); the first mask holds for every axis."""
    found = []
    for mask, name, k in zip(masks[1:], names[1:], keys):
        parts = [
            _key_mask(n, _fitting_mask(n, m, q, k.shape[2]), q, k)
            for n, m in ((name, mask), (names[0], masks[0]))
            if m is not None
        ]
        parts = [part for part in parts if part is not None]
        found.append(None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1])
    return tuple(found)


def _readable(t: Tensor) -> bool:
    """Whether a look at the numbers waits for nothing and traces."""
    return t.is_cpu and not (torch.compiler.is_compiling() or functorch_active())


def _bias_found(mask: Tensor) -> str:
    """What a floating mask holds, for a message."""
    if not _readable(mask):
        return f"got {mask.dtype}, whose numbers cannot be read here"
    if mask.requires_grad:
        return f"got {mask.dtype} that requires a gradient"
    other = mask[(mask != 0) & (mask != -torch.inf)]
    text = f"got {mask.dtype} with {float(other[0]):g}"
    if bool((other <= -1e4).all()):
        return text + ": where that means hidden, pass mask > -1"
    return text


def known_finite(*tensors: Tensor) -> bool:
    """Whether a look at the numbers is free, and found neither NaN nor infinity."""
    return all(
        _readable(t) and math.isfinite(t.detach().sum(dtype=accumulator_dtype(t.dtype)))
        for t in tensors
    )


def _key_mask(name, mask, q, k):
    if mask.dtype != torch.bool:
        # Floating: nothing but 0 and -inf, which only a look at the numbers tells.
        readable = _readable(mask) and not mask.requires_grad
        if not readable or not ((mask == 0) | (mask == -torch.inf)).all():
            raise NotOfKeys(
                f'method="lowrank" takes no bias: {name} must be bool, or on the CPU '
                f"hold 0 and -inf only, {_bias_found(mask)}"
            )
        if (mask == 0).all():
            return None
        mask = mask == 0
    heads, kv_heads = mask.shape[1], k.shape[1]
    if heads not in (1, kv_heads):  # one for each query head: fine where those of a key head agree
        groups = mask.unflatten(1, (kv_heads, -1))
        if _readable(mask) and (groups == groups[:, :, :1]).all():
            mask = groups[:, :, 0]
    if mask.shape[2] != 1 and q.shape[2] != 1 or mask.shape[1] not in (1, kv_heads):
        per_head = "1" if q.shape[1] != kv_heads else "1 or heads"
        raise NotOfKeys(
            f'method="lowrank" takes masks of keys, equal for all queries and query heads of a '
            f"key head: (batch, {per_head}, 1, keys), or on the CPU one for each query head whose "
            f"groups agree, got {name} of shape {_shape(mask)}"
        )
    return mask.expand(q.shape[0], mask.shape[1], 1, k.shape[2]).squeeze(2)


def _checked_mask(name, mask, q, n):
    mask = _fitting_mask(name, mask, q, n)
    acc = accumulator_dtype(q.dtype)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=acc, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(acc)


def _fitting_mask(name, mask, q, n):
    """A mask of four dimensions, bool or floating."""
    checks.check_tensor(name, mask)
    if mask.device != q.device:
        raise RuntimeError(f"q and {name} must be on one device, got {q.device} and {mask.device}")
    full = (*q.shape[:3], n)
    if mask.dim() > 4 or any(
        size not in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(full))
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, queries, keys) = {list(full)}, got "
            f"{_shape(mask)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    return mask[(None,) * (4 - mask.dim())]


def checked_band(q, keys, is_causal, window, q_offset):
    """(causal, a window per axis with 0 for none, offset), the numbers clamped: see _near."""
    if is_causal is not None and type(is_causal) is not bool:
        is_causal = _checked_causality(is_causal)
    windows = checked_windows(window, len(keys))
    causal = any(windows) if is_causal is None else is_causal
    if q_offset is not None:
        q_offset = checks.checked_integer("q_offset", q_offset)
    if q_offset is None and (causal or any(windows)):
        lengths = [q.shape[2], *(k.shape[2] for k in keys)]
        if any(n != lengths[0] for n in lengths):
            raise ValueError(
                "a causal mask or a window over lengths that differ needs q_offset, the position "
                f"of query 0, got lengths {lengths}"
            )
    return causal, *_near(windows, 0 if q_offset is None else q_offset)


def _checked_causality(is_causal) -> bool:
    try:
        return checks.checked_flag("is_causal", is_causal)
    except TypeError:
        found = type(is_causal).__name__
        raise TypeError(f"is_causal must be a bool or None, got {found}") from None


def checked_windows(window, count: int) -> list[int]:
    """A window for each of `count` axes, 0 for none."""
    if window is None:
        return [0] * count
    if type(window) in (tuple, list):
        given = list(window)
    elif (one := checks.as_integer(window)) is not None:
        given = [one] * count
    elif isinstance(window, Iterable) and getattr(window, "ndim", 1):
        given = list(window)
    else:
        raise TypeError(f"window must be an integer or a sequence of them, got {window!r}")
    if len(given) != count:
        raise ValueError(f"window must be one number or {count}, got {window!r}")
    windows = []
    for w in given:
        n = 0 if w is None else checks.as_integer(w)
        if n is None:
            raise TypeError(f"window must hold integers or None, got {w!r}")
        if w is not None and n != -1 and n <= 0:
            raise ValueError(f"window must be positive, or -1 or None for no limit, got {w}")
        windows.append(0 if n == -1 else n)
    return windows


# Farther than any two tokens are apart, and as far as every kernel counts (kernels/
# tensor_attention/problem.py, csrc/bind/tensor_attention_lowrank.cpp).
_FAR = 2**28 - 1


def _near(windows, offset):
    """(windows, offset) that hide the same keys, in numbers that every kernel takes.

    What a window hides is decided by offset - w and offset + w. Symbols of a compiled graph stay:
    a comparison would fix them.
    """
    if type(offset) is int and abs(offset) > _FAR:
        excess = abs(offset) - _FAR
        windows = [max(w - excess, 1) if w else 0 for w in windows]
        offset = _FAR if offset > 0 else -_FAR
    return tuple(min(w, 4 * _FAR) if type(w) is int else w for w in windows), offset


def checked_scale(scale, d) -> float:
    if scale is None:
        return d**-0.5
    if isinstance(scale, str):
        if scale != "kronecker":
            raise ValueError(f"scale must be a number or 'kronecker', got {scale!r}")
        return 1.0 / d
    checks.check_number("scale", scale)
    return float(scale)


def checked_softcap(softcap, method: str) -> float:
    checks.check_range("softcap", softcap, 0.0, open_low=True)
    if method == "lowrank":
        raise ValueError(
            'method="lowrank" takes no softcap: its polynomial stands for exp alone; use '
            'method="exact"'
        )
    return float(softcap)


def checked_bias(kv_bias) -> tuple[float, float]:
    try:
        bk, bv = kv_bias
    except (TypeError, ValueError):
        raise TypeError(f"kv_bias must be a pair of numbers, got {kv_bias!r}") from None
    for value in (bk, bv):
        try:
            checks.check_number("kv_bias", value)
        except TypeError:
            raise TypeError(f"kv_bias must be a pair of numbers, got {kv_bias!r}") from None
    return float(bk), float(bv)


def checked_list(name: str, values, of: str = "Tensors") -> tuple:
    """A sequence, or anything else that lists things."""
    try:
        return tuple(values)
    except TypeError:
        found = type(values).__name__
        raise TypeError(f"{name} must be a sequence of {of}, got {found}") from None
