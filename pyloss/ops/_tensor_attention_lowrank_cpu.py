"""Near-linear tensor attention on the CPU: packs the arguments of the compiled kernels, owns their
buffers. Kernels: csrc/cpu/tensor_attention_lowrank.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, address

NOT_POSITIVE, NOT_FINITE = 1, 2  # LowrankFlag
MOST_DEGREE = 32
MOST_STATE_BYTES = 2 << 30


def rank(d: int, degree: int) -> int:
    """Number of features, C(d + degree, degree); of a symbolic d too."""
    found = 1
    for t in range(1, degree + 1):
        found = found * (d + t) // t
    return found


def check_states(d: int, degree: int, size: int) -> None:
    """ValueError where the states of all heads and axes, of `size` bytes, are too large."""
    r = rank(d, degree)
    if r >= 1 << 31 or size > MOST_STATE_BYTES:
        raise ValueError(
            f"degree {degree} with d = {d} has C({d + degree}, {degree}) = {r} features and states "
            f"of {size} bytes, more than {MOST_STATE_BYTES}; use a lower degree or fewer features"
        )


def largest_entry(t: Tensor) -> float:
    """max |t| of a tensor, NaN where one is; on the CPU in one pass."""
    ours = t.dtype in (torch.float32, torch.float64) and t.device.type == "cpu"
    if ours and type(t) in (Tensor, torch.nn.Parameter) and t.is_contiguous():
        return _C.tensor_attention_lowrank_largest(
            t.data_ptr(), DTYPE_CODES[t.dtype], t.numel(), torch.get_num_threads()
        )
    t = t.detach()
    # Two passes of amax and amin are faster than aminmax; both are NaN where one is.
    return max(t.amax().item(), -t.amin().item())


def scans(causal: bool, windows: Sequence[int]) -> bool:
    """Whether queries see different keys; then there are no states."""
    return causal or any(windows)


def results(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], coefficients, scanning):
    """Empty (out, lse, y, states); shared with the fake."""
    (b, h, n, d), dv = q.shape, values[0].shape[3]
    out, lse = q.new_empty((b, h, n, dv)), q.new_empty((b, h, n))
    y = torch.empty_like(lse)
    if scanning:
        return out, lse, y, []
    state = q.new_empty((b, keys[0].shape[1], rank(d, len(coefficients) - 1), dv + 1))
    return out, lse, y, [state, *(torch.empty_like(state) for _ in keys[1:])]


def _rows(t: Tensor) -> Tensor:
    """The kernels step through the features with stride 1."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _key_mask(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """Expanded to (B, G, n), contiguous along the keys."""
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:-1], k.shape[2])
    mask = mask if mask.stride(-1) == 1 or k.shape[2] <= 1 else mask.contiguous()
    return mask.expand(k.shape[:3])


def _prepared(q, keys, values, key_masks, coefficients, centre, causal, windows, q_offset):
    """(what must live on, problem, floats): see csrc/bind/tensor_attention_lowrank.cpp."""
    q, keys, values = _rows(q), [_rows(k) for k in keys], [_rows(v) for v in values]
    windows = windows or [0] * len(keys)
    masks = [_key_mask(m, k) for m, k in zip(key_masks or [None] * len(keys), keys)]
    problem = [q.shape[0], q.shape[1], keys[0].shape[1], q.shape[2], q.shape[3]]
    problem += [values[0].shape[3], DTYPE_CODES[q.dtype], q.data_ptr(), *q.stride()[:3]]
    problem += [int(causal), q_offset]
    for k, v, mask, window in zip(keys, values, masks, windows):
        problem += [k.shape[2], window, k.data_ptr(), *k.stride()[:3]]
        problem += [v.data_ptr(), *v.stride()[:3]]
        problem += [address(mask), *((0, 0) if mask is None else mask.stride()[:2])]
    return (q, keys, values, masks), problem, [centre, *coefficients]


def _scratch(q: Tensor, problem, floats, *, backward: bool):
    """(buffer, its address, its bytes, threads)."""
    threads = torch.get_num_threads()
    size = _C.tensor_attention_lowrank_scratch_bytes(problem, floats, backward, threads)
    buffer = q.new_empty(size + 64, dtype=torch.uint8)
    start = buffer.data_ptr()
    return buffer, start + -start % 64, size, threads


def raise_for_sums(not_positive: bool, not_finite: bool, y: Tensor) -> None:
    """RuntimeError where the sum of the polynomial over a query's keys means nothing."""
    if not (not_positive or not_finite):
        return
    found = "not finite" if not_finite else f"{y[y < torch.inf].min().item():.3g}"
    raise RuntimeError(
        "tensor_attention: with this polynomial the sum of the weights of a query's keys is "
        f"{found}; it must be positive and finite. An input is not finite, or the scores are too "
        "large for the degree: raise it, lower the scale of q and the keys, or use "
        'method="exact"'
    )


def forward(q, keys, values, key_masks, coefficients, centre, causal, windows, q_offset):
    """(out, lse, y, states); raises RuntimeError where y is not positive and finite."""
    scanning = scans(causal, windows)
    out, lse, y, states = results(q, keys, values, coefficients, scanning)
    if lse.numel() == 0 and (scanning or q.shape[1] == 0):
        return out, lse, y, states
    kept, problem, floats = _prepared(
        q, keys, values, key_masks, coefficients, centre, causal, windows, q_offset
    )
    buffer, start, size, threads = _scratch(q, problem, floats, backward=False)
    flags = _C.tensor_attention_lowrank_fwd(
        problem,
        floats,
        [address(out), address(lse), address(y)],
        [address(s) for s in states] or [0] * len(keys),
        start,
        size,
        threads,
    )
    del kept, buffer
    raise_for_sums(flags & NOT_POSITIVE, flags & NOT_FINITE, y)
    return out, lse, y, states


def backward(
    dout, dlse, q, keys, values, key_masks, out, y, states,
    coefficients, centre, causal, windows, q_offset,
):  # fmt: skip
    """(dq, dkeys, dvalues), all contiguous."""
    fmt = torch.contiguous_format
    dq = torch.empty_like(q, memory_format=fmt)
    dkeys = [torch.empty_like(k, memory_format=fmt) for k in keys]
    dvalues = [torch.empty_like(v, memory_format=fmt) for v in values]
    if q.shape[1] == 0:
        return dq, dkeys, dvalues
    kept, problem, floats = _prepared(
        q, keys, values, key_masks, coefficients, centre, causal, windows, q_offset
    )
    dout = _rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    out, y, states = out.contiguous(), y.contiguous(), [s.contiguous() for s in states]
    buffer, start, size, threads = _scratch(q, problem, floats, backward=True)
    _C.tensor_attention_lowrank_bwd(
        problem,
        floats,
        [dout.data_ptr(), *dout.stride()[:3], address(dlse)],
        [address(out), 0, address(y)],
        [address(s) for s in states] or [0] * len(keys),
        [address(g) for g in (dq, *dkeys, *dvalues)],
        start,
        size,
        threads,
    )
    del kept, buffer
    return dq, dkeys, dvalues
