"""The CPU implementations of similarity_softmax: lay out the tensors, call the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops import _gemm
from pyloss.ops._launch import address, scratch
from pyloss.ops.similarity_softmax import by_tiles, records
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    WANT_KEYS,
    WANT_QUERIES,
    WANTS,
    Pairs,
    gradients,
    softmax_outputs,
    split_softmax,
    sums_outputs,
)


def _separate(p: Pairs) -> Pairs:
    """With keys of their own: the kernel has no columns of a tensor with itself."""
    return p._replace(keys=p.queries) if p.keys is None and p.flags & COLUMNS else p


def forward(*args) -> list[Tensor]:
    if _gemm.by_torch():
        return by_tiles.forward(*args)
    p = Pairs(*args)
    found = softmax_outputs(p.queries, p.keys, p.flags)
    problem = records.problem(_separate(p))
    threads = torch.get_num_threads()
    columns = bool(p.flags & COLUMNS)
    size = _C.similarity_softmax_fwd_scratch_bytes(problem, columns, threads)
    buffer, start = scratch(p.queries, size)
    results = records.Forward(*map(address, split_softmax(found, p.flags)))
    _C.similarity_softmax_fwd(problem, results, start, size, threads)
    del buffer
    return found


def backward(*args) -> list[Tensor]:
    if _gemm.by_torch():
        return by_tiles.backward(*args)
    given, (want, lse, column_lse, *cotangents) = Pairs(*args[:9]), args[9:]
    p = _separate(given)
    if p is not given:
        want |= (want & WANT_QUERIES) // WANT_QUERIES * WANT_KEYS
    dq, dk, dscale, _ = found = gradients(p, want)
    kept = [None if g is None else g.contiguous() for g in cotangents]
    problem = records.problem(p)
    threads = torch.get_num_threads()
    wanted = (bool(want & bit) for bit in WANTS)
    size = _C.similarity_softmax_bwd_scratch_bytes(problem, *wanted, threads)
    buffer, start = scratch(p.queries, size)
    record = records.Backward(*map(address, (lse, column_lse, *kept, dq, dk, dscale)))
    _C.similarity_softmax_bwd(problem, record, start, size, threads)
    del kept, buffer
    if p is not given and dq is not None:
        dq += dk
        found[1] = None
    return [g for g in found if g is not None]


def sums_forward(*args) -> list[Tensor]:
    if _gemm.by_torch():
        return by_tiles.sums_forward(*args)
    p, (bias, numbers, kind) = Pairs(*args[:9]), args[9:]
    found = sums_outputs(p.queries, kind)
    problem = records.problem(p)
    threads = torch.get_num_threads()
    size = _C.pair_sums_fwd_scratch_bytes(problem, threads)
    buffer, start = scratch(p.queries, size)
    results = records.PairSumResults(*map(address, (*found, None, None, None)[:4]))
    sums = records.PairSums(kind, address(bias), numbers[0], numbers[-1])
    _C.pair_sums_fwd(problem, sums, results, start, size, threads)
    del buffer
    return found


def sums_backward(*args) -> list[Tensor]:
    if _gemm.by_torch():
        return by_tiles.sums_backward(*args)
    p, (bias, numbers, kind, want, *cotangents) = Pairs(*args[:9]), args[9:]
    found = gradients(p, want, bias)
    kept = [None if g is None else g.contiguous() for g in cotangents]
    problem = records.problem(p)
    threads = torch.get_num_threads()
    wanted = (bool(want & bit) for bit in WANTS)
    size = _C.similarity_softmax_bwd_scratch_bytes(problem, *wanted, threads)
    buffer, start = scratch(p.queries, size)
    sums = records.PairSums(kind, address(bias), numbers[0], numbers[-1])
    record = records.PairSumGradients(*map(address, (*kept, *found)))
    _C.pair_sums_bwd(problem, sums, record, start, size, threads)
    del kept, buffer
    return [g for g in found if g is not None]
