"""Calls of the ops whose launches are compiled: what makes their kernels differ.

On meta tensors, so that sizes are real ones. USUAL is what `make test` compiles, for sm_90.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import sample_kernel
import torch

from pyloss.ops.linear_cross_entropy import triton as linear
from pyloss.ops.linear_cross_entropy.call import Tensors
from pyloss.ops.row_softmax.calls import WANT_EXTRAS
from pyloss.ops.row_softmax.records import COMP_SUM, INDEX, REDUCTIONS, Codes, Options
from pyloss.ops.similarity_softmax import call as pairs_call
from pyloss.ops.similarity_softmax import triton as similarity
from pyloss.ops.tensor_attention import triton as attention
from pyloss.ops.tensor_attention.plan import WANT
from pyloss.ops.tensor_attention.plan import Settings as AttentionSettings
from pyloss.ops.tensor_attention_lowrank import triton as lowrank
from pyloss.ops.tensor_attention_lowrank.plan import Settings as LowRankSettings

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tf32(call: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(call)
    def with_tf32() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return with_tf32


# --------------------------------------------------------------------------------------------------


def linear_loss(
    n: int = 4096,
    d: int = 4096,
    classes: int = 128256,
    dtype: torch.dtype = BF16,
    bias: bool = False,
    weighted: bool = False,
    extras: bool = False,
    filter: float = 0.0,
    exact: bool = False,
    **options: float,
) -> Callable[[], None]:
    """Forward and backward of fused_linear_cross_entropy by tiles, all gradients."""

    def call() -> None:
        t = Tensors(
            meta(n, d, dtype=dtype),
            meta(classes, d, dtype=dtype),
            meta(classes, dtype=dtype) if bias else None,
            meta(n, dtype=torch.int64),
            None,
            None,
            meta(classes) if weighted else None,
            None,
        )
        codes = Codes(INDEX, -100, COMP_SUM, REDUCTIONS["mean"], 0)
        wants = WANT_EXTRAS if extras else 0
        found = linear.forward(t, Options(**options), codes, FP32, wants)
        linear.backward(
            meta(), meta(4, n) if extras else None, t, found[1], Options(**options), codes,
            (True, True, bias), filter, exact,
        )  # fmt: skip

    return call


def attention_of(
    n_q: int,
    n: int,
    d: int,
    dtype: torch.dtype = BF16,
    heads: tuple[int, int] = (8, 8),
    batch: int = 2,
    n_1: int | None = None,
    dv: int | None = None,
    masked: bool = False,
    causal: bool = False,
    windows: tuple[int, int] = (0, 0),
    q_offset: int = 0,
    dlse: bool = False,
    want: tuple[bool, ...] = (True,) * 7,
) -> Callable[[], None]:
    """Forward and backward of tensor_attention, exact."""

    def call() -> None:
        h, kv = heads
        widths, lengths = (d, d, d, dv or d, dv or d), (n_q, n_1 or n, n, n_1 or n, n)
        tensors = [
            meta(batch, h if at == 0 else kv, length, width, dtype=dtype)
            for at, (length, width) in enumerate(zip(lengths, widths))
        ]
        masks = [meta(batch, 1, n_q, k) if masked else None for k in (n_1 or n, n)]
        settings = AttentionSettings(d**-0.5, causal, *windows, q_offset, 0.0, 0.0)
        out, lse = attention.forward(*tensors, *masks, *settings)
        wanted = sum(bit for bit, yes in zip(WANT, want) if yes)
        if not masked:
            wanted &= ~(WANT[5] | WANT[6])
        attention.backward(
            torch.empty_like(out), torch.empty_like(lse) if dlse else None, *tensors, *masks,
            out, lse, *settings, wanted,
        )  # fmt: skip

    return call


def lowrank_of(
    n: int,
    d: int,
    degree: int = 2,
    order: int = 2,
    heads: tuple[int, int] = (8, 8),
    batch: int = 1,
    masked: bool = False,
    causal: bool = False,
    window: int = 0,
    q_offset: int = 0,
    n_q: int | None = None,
    backward: bool = True,
) -> Callable[[], None]:
    """Forward and backward of near-linear tensor attention."""

    def call() -> None:
        h, kv = heads
        q = meta(batch, h, n_q or n, d)
        keys, values = ([meta(batch, kv, n, d) for _ in range(order)] for _ in range(2))
        masks = [meta(batch, 1, n, dtype=torch.bool) if masked else None for _ in keys]
        coefficients = tuple(1 / math.factorial(t) for t in range(degree + 1))
        settings = LowRankSettings(coefficients, 0.0, causal, (window,) * order, q_offset)
        found = lowrank.forward(q, keys, values, masks, *settings)
        if backward:
            out, lse, y, states = found
            lowrank.backward(
                torch.empty_like(out), torch.empty_like(lse), q, keys, values, masks, out, y,
                states, *settings,
            )  # fmt: skip

    return call


def pairs_of(
    n: int,
    m: int | None,
    d: int,
    dtype: torch.dtype = BF16,
    first: int = -1,
    target: bool = True,
    same: str = "ignore",
    denominator: str = "all",
    columns: bool = False,
    mean: bool = False,
    scales: bool = False,
    sigmoid: bool = False,
) -> Callable[[], None]:
    """Forward and backward of similarity_softmax, or of pair_sums; m None: of queries alone."""

    def call() -> None:
        flags = pairs_call.SAME[same] | pairs_call.DENOMINATORS[denominator]
        flags |= pairs_call.COLUMNS * columns | pairs_call.MEAN * mean
        ids = (meta(n, dtype=torch.int64), meta(m or n, dtype=torch.int64))
        queries, keys = meta(n, d, dtype=dtype), None if m is None else meta(m, d, dtype=dtype)
        pairs = (
            queries, keys, 1.0, meta(n) if scales else meta(),
            meta(n, dtype=torch.int64) if target else None,
            *(ids if same != "ignore" else (None, None)), first, flags,
        )  # fmt: skip
        want = pairs_call.WANT_QUERIES | pairs_call.WANT_SCALE
        want |= 0 if m is None else pairs_call.WANT_KEYS
        if sigmoid:
            bias = (meta(), [0.0], pairs_call.SIGMOID)
            similarity.sums_forward(*pairs, *bias)
            want |= pairs_call.WANT_BIAS
            similarity.sums_backward(*pairs, *bias, want, meta(n), None)
            return
        lse, _, *rest = similarity.forward(*pairs)
        of_columns = (rest[-4], meta(m or n), meta(m or n)) if columns else (None,) * 3
        similarity.backward(*pairs, want, lse, of_columns[0], meta(n), meta(n), *of_columns[1:])

    return call


# --------------------------------------------------------------------------------------------------

WINDOWS = {"causal": True, "windows": (512, 32)}

# By module of kernels/; sample_kernel is that of this folder.
USUAL: dict[str, dict[str, Callable[[], Any]]] = {
    "sample_kernel": {"rows": lambda: sample_kernel.row_logsumexp(meta(64, 1000))},
    "linear_cross_entropy": {
        "plain": linear_loss(),
        "every option": linear_loss(
            filter=1e-3, weighted=True, smoothing=0.1, softcap=30.0, z_loss=1e-4, extras=True
        ),
        "few rows": linear_loss(16, 4096, 32000, exact=True),
        "float32 accumulation": linear_loss(exact=True, filter=1e-3),
        "tf32": tf32(linear_loss(dtype=FP32)),
        "odd sizes": linear_loss(777, 333, 50257, FP16, bias=True),
    },
    "similarity_softmax": {
        "NT-Xent": pairs_of(8192, None, 128, first=0),
        "wide": pairs_of(65536, None, 512, first=0),
    },
    "tensor_attention": {
        "full": attention_of(1024, 1024, 64),
        "windows": attention_of(8192, 8192, 128, **WINDOWS),
        "grouped": attention_of(2048, 2048, 128, heads=(64, 8), causal=True),
        "masks": attention_of(1000, 1001, 120, FP16, masked=True, dlse=True, heads=(4, 2)),
        "one query": attention_of(1, 4096, 64, heads=(8, 8), causal=True, q_offset=4095),
        "float32": attention_of(512, 512, 64, FP32),
    },
    "tensor_attention_lowrank": {
        "plain": lowrank_of(65536, 64),
        "masked": lowrank_of(5000, 16, degree=4, masked=True, heads=(8, 2)),
        "wide": lowrank_of(65536, 128),
        "causal": lowrank_of(65536, 64, causal=True),
        "windows": lowrank_of(5000, 16, 3, 3, masked=True, window=100, causal=True),
    },
}
MORE: dict[str, dict[str, Callable[[], Any]]] = {
    "sample_kernel": {},
    "linear_cross_entropy": {
        "float32": linear_loss(dtype=FP32, exact=True),
        "one row": linear_loss(1, 64, 1000, bias=True, filter=1e-3),
        "float16 accumulation": linear_loss(dtype=FP16, exact=True),
        "filter": linear_loss(filter=1e-3, bias=True, smoothing=0.1, extras=True),
        "no weight decides": linear_loss(8192, 2048, 50304, FP16, weighted=True, smoothing=0.1),
    },
    "similarity_softmax": {
        "two sides": pairs_of(4096, 65536, 128),
        "wide two sides": pairs_of(65536, 65536, 512),
        "CLIP": pairs_of(32768, 32768, 512, columns=True),
        "narrow CLIP": pairs_of(32768, 32768, 100, FP16, columns=True, scales=True, mean=True),
        "SupCon": pairs_of(8192, None, 128, FP16, first=0, target=False, same="positive"),
        "wide SupCon": pairs_of(4096, None, 768, first=0, target=False, same="positive"),
        "queue": pairs_of(256, 65536, 128, same="drop", denominator="negatives", scales=True),
        "DCL": pairs_of(1024, 1024, 64, first=0, denominator="negatives", mean=True),
        "one row": pairs_of(1, 5000, 7),
        "sigmoid": pairs_of(16384, 16384, 128, sigmoid=True),
        "wide sigmoid": pairs_of(16384, 16384, 1024, sigmoid=True, same="positive"),
        "float32": pairs_of(8192, 8192, 128, FP32, columns=True),
        "wide float32": pairs_of(4096, None, 512, FP32, first=0),
        "tf32": tf32(pairs_of(8192, None, 128, FP32, first=0)),
        "wide tf32": tf32(pairs_of(4096, 4096, 1000, FP32, columns=True)),
    },
    "tensor_attention": {
        "one of everything": attention_of(1, 1, 16, heads=(1, 1), batch=1),
        "grouped windows": attention_of(4096, 4096, 64, heads=(16, 2), **WINDOWS),
        "masked windows": attention_of(4096, 4096, 128, masked=True, **WINDOWS),
        "wide": attention_of(1024, 1024, 256),
        "wide windows": attention_of(4096, 4096, 256, **WINDOWS),
        "float16": attention_of(1024, 1024, 128, FP16),
        "float16 windows": attention_of(4096, 4096, 64, FP16, **WINDOWS),
        "tf32": tf32(attention_of(512, 512, 128, FP32)),
        "tf32 windows": tf32(attention_of(2048, 2048, 64, FP32, **WINDOWS)),
        "float32 windows": attention_of(2048, 2048, 128, FP32, **WINDOWS),
        "wide float32": attention_of(256, 256, 256, FP32),
        "wide tf32": tf32(attention_of(256, 256, 256, FP32)),
        "of the values only": attention_of(
            1024, 1024, 96, dv=48, want=(False, False, False, True, True, False, False)
        ),
        "longer windows": attention_of(4096, 4096, 128, causal=True, windows=(4096, 100)),
    },
    "tensor_attention_lowrank": {
        "means": lowrank_of(1000, 8, degree=0),
        "one": lowrank_of(1, 1, heads=(1, 1), order=1),
        "order 1": lowrank_of(4096, 128, 3, 1, causal=True, heads=(2, 1), backward=False),
        "order 3": lowrank_of(4096, 32, 2, 3, causal=True, q_offset=64, n_q=4000),
        "wide and causal": lowrank_of(4096, 128, causal=True, heads=(2, 2)),
        "windows alone": lowrank_of(4096, 64, window=33),
    },
}
