"""Fuzzes the integer boundary of the compiled module: `boundary_fuzz.py PATH_OF__C SEED CALLS`.

A wrong call must end in a Python exception, never in a crash or a write outside the given buffers.
Loads the module by path and imports neither torch nor pyloss, so that it also runs in the build
with AddressSanitizer. The boundary cannot know whether an address is good, nor whether a buffer has
the size that the caller states; what is tried here is everything that it can know: null addresses,
negative and overflowing sizes and strides, unknown codes, wrong types, absurd numbers.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import random
import sys
from typing import Any

EXPECTED = (ValueError, IndexError, TypeError, RuntimeError, OverflowError)

OUTER, CLASSES, INNER = 3, 19, 2
COUNT = OUTER * CLASSES * INNER
GUARD, ROOM = 4096, 8 * COUNT
FILL = 0xA5
SCRATCH = 4 << 20


class Buffer:
    """Large enough for every dtype, between two guard areas."""

    def __init__(self, room: int = ROOM) -> None:
        self.data = (ctypes.c_ubyte * (GUARD + room + GUARD))()
        ctypes.memset(self.data, FILL, len(self.data))
        self.address = ctypes.addressof(self.data) + GUARD
        ctypes.memset(self.address, 0, room)

    def guards_intact(self) -> bool:
        guard = bytes([FILL]) * GUARD
        whole = bytes(self.data)
        return whole[:GUARD] == guard and whole[-GUARD:] == guard


class Field:
    """One argument (or element of a tuple argument): its good values and its hostile ones."""

    def __init__(self, good: list[Any], hostile: list[Any]) -> None:
        self.good, self.hostile = good, hostile


NOWHERE = [0, -1, -(2**63)]  # what is no address
HUGE = [2**62, 2**63 - 1, -(2**63), 2**31, -(2**31), 2**32 + 1]
# Of a type or a size that no argument takes; pybind11 refuses them.
MISTYPED = [None, "x", 2**70, [], (1, 2), object()]


def size(n: int) -> Field:
    # Smaller than the buffer, or so large that it must be refused.
    return Field([n], [-1, 0, 1, 2**62, 2**63 - 1, -(2**63)])


def stride(n: int) -> Field:
    return Field([n], [0, 1, -1, 2**62, 2**63 - 1, -(2**63)])


def code(*good: int) -> Field:
    return Field(list(good), [*range(-2, 12), *HUGE])


def number(*good: float) -> Field:
    nan, inf = float("nan"), float("inf")
    return Field(list(good), [nan, inf, -inf, 0.0, -0.0, -1.0, 1e308, -1e308, 5e-324])


def integer(*good: int) -> Field:
    return Field(list(good), [0, -1, *HUGE])


def address(buffer: Buffer | None) -> Field:
    """`buffer` None: an optional argument that is not given."""
    return Field([buffer.address if buffer else 0], NOWHERE)


def record(module: Any, op: str, name: str, **fields: Field | list[Any]) -> list[Any]:
    """The template of a record: the fields in the order in which the module reads them."""
    order = module.fields(op)[name]
    assert set(order) == set(fields), f"{op}.{name} has the fields {order}"
    return [fields[f] for f in order]


THREADS = Field([1, 2, 3], [0, -1, 100, *HUGE])


def row_softmax_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    """Function name -> template of its arguments; a list is a tuple argument."""
    b = {name: address(buffer) for name, buffer in buffers.items()}

    def maybe(name: str) -> Field:
        return Field([0, buffers[name].address], NOWHERE)

    def strides() -> list[Field]:
        return [stride(CLASSES * INNER), stride(INNER), stride(1)]

    def of(name: str, **fields: Field | list[Any]) -> list[Any]:
        return record(module, "row_softmax", name, **fields)

    options = of(
        "Options",
        **dict(
            logit_scale=number(1.0, 0.5), softcap=number(0.0, 5.0), temperature=number(1.0, 2.0)
        ),
        **dict(tau=number(1.0, 0.0, 2.0, 0.7), max_nll=number(float("inf"), 1.0)),
        **dict(poly1=number(0.0, -1.0), relaxation=number(0.0, 0.1)),
        **dict(margin=number(0.0, 0.5), offset=number(0.0, 1.0)),
        **dict(gamma=number(2.0), z_loss=number(0.0, 0.1), smoothing=number(0.0, 0.1)),
        **dict(num_items=number(0.0, 4.0)),
    )
    codes = of(
        "Codes",
        **dict(kind=code(0, 1, 2), ignore_index=integer(-100, 0), loss=code(0, 1, 2, 3, 4)),
        **dict(reduction=code(0, 1, 2), zero_if_empty=integer(0, 1)),
    )
    problem = of(
        "Problem",
        **dict(sizes=[size(OUTER), size(CLASSES), size(INNER)], dtype=code(0, 1, 2, 3)),
        **dict(x=b["x"], x_strides=strides(), target=b["target"], target_strides=strides()),
        **dict(target_dtype=code(0, 1, 2, 3, 4, 5, 6), target2=b["target2"], mix=b["mix"]),
        **dict(weight=maybe("weight"), token_weight=maybe("token_weight")),
        **dict(codes=codes, options=options),
    )
    saved = dict(stats=b["stats"], norm=b["norm"])
    forward = of(
        "Forward",
        **dict(loss=b["loss"], loss_dtype=code(0, 1, 2, 3), **saved, extras=maybe("extras")),
        **dict(index=maybe("index"), grad=maybe("grad"), grad_strides=strides()),
    )
    backward = of(
        "Backward",
        **dict(grad_loss=b["grad_loss"], grad_extras=maybe("cotangents"), **saved),
        **dict(extras=b["extras"], grad=b["grad"], grad_strides=strides()),
    )
    hvp = of(
        "Hvp",
        **dict(v=b["v"], v_strides=strides(), grad_rows=b["grad_rows"]),
        grad_grad_extras=b["cotangents2"],
    )
    # Device functions get null addresses only: a host address would be a valid number there.
    none = address(None)

    def on_device(name: str, **others: Field | list[Any]) -> list[Any]:
        return of(name, **{**dict.fromkeys(module.fields("row_softmax")[name], none), **others})

    forward_there = on_device("Forward", loss_dtype=code(0, 1), grad_strides=strides())
    backward_there = on_device("Backward", grad_strides=strides())
    hvp_there = on_device("Hvp", v_strides=strides())
    return {
        "row_softmax_fwd": [problem, forward, THREADS],
        "row_softmax_bwd": [problem, backward, THREADS],
        "row_softmax_hvp": [problem, backward, hvp, THREADS],
        "scale_inplace": [b["grad"], code(0, 1, 2, 3), size(COUNT), b["factor"], THREADS],
        "small_row_softmax": [
            *[size(OUTER), size(CLASSES), b["x"], b["target"], code(4, 5, 6), integer(-100, 0)],
            *[Field([True, False], [2, -1]), b["loss"], maybe("grad")],
        ],
        "cuda_row_softmax_fwd": [problem, forward_there, none, integer(0), none, none],
        "cuda_row_softmax_bwd": [problem, backward_there, none, none],
        "cuda_row_softmax_hvp": [problem, backward_there, hvp_there, none, none],
        "cuda_scale_inplace": [none, code(0, 1, 2, 3), size(COUNT), *[none] * 3],
    }


def row_moments_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    none = address(None)

    def of(name: str, **fields: Field | list[Any]) -> list[Any]:
        return record(module, "row_moments", name, **fields)

    def strides() -> list[Field]:
        return [stride(CLASSES * INNER), stride(INNER), stride(1)]

    problem = of(
        "Problem",
        **dict(sizes=[size(OUTER), size(CLASSES), size(INNER)], dtype=code(0, 1, 2, 3)),
        **dict(x=b["x"], x_strides=strides(), target=b["target"], target_dtype=code(4, 5, 6)),
        ignore_index=integer(-100, 0),
    )
    backward = of(
        "Backward", moments=b["stats"], grad=b["extras"], out=b["grad"], out_strides=strides()
    )
    there = of("Backward", moments=none, grad=none, out=none, out_strides=strides())
    return {
        "row_moments_fwd": [problem, b["stats"], THREADS],
        "row_moments_bwd": [problem, backward, THREADS],
        "cuda_row_moments_fwd": [problem, *[none] * 3],
        "cuda_row_moments_bwd": [problem, there, none, none],
    }


def segment_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    bounds = (ctypes.c_int64 * (OUTER + 1))(0, 5, 5, CLASSES)
    ctypes.memmove(buffers["offsets"].address, bounds, ctypes.sizeof(bounds))
    given = ("loss", "norm", "weight", "stats", "extras")

    def problem(place: Field, offsets: Field) -> list[Any]:
        return record(
            *(module, "segment", "Problem"),
            **dict(sizes=[size(CLASSES), size(INNER), size(OUTER)], dtype=code(0, 1, 2, 3)),
            **dict(x=place, x_stride=stride(INNER), other=place, other_stride=stride(INNER)),
            **dict(offsets=offsets, offsets_dtype=code(4), given=[b[name] for name in given]),
        )

    call, none = problem(b["x"], b["offsets"]), address(None)
    fold, back = Field(list(range(12)), [-1, 12, *HUGE]), Field(list(range(9)), [-1, 9, *HUGE])
    nowhere = problem(none, none)
    return {
        "segment_fold": [call, fold, b["grad"], THREADS],
        "segment_map": [call, back, b["grad"], THREADS],
        "segment_scratch_numbers": [size(CLASSES), size(INNER)],
        "cuda_segment_fold": [nowhere, fold, *[none] * 4],
        "cuda_segment_map": [nowhere, back, *[none] * 3],
    }


def linear_cross_entropy_calls(buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    total, x = address(buffers["stats"]), address(buffers["x"])
    maybe = {name: Field([0, buffer.address], NOWHERE) for name, buffer in buffers.items()}
    first = Field([True, False], [2, -1])
    floats = code(0, 1, 2, 3)
    return {
        "accumulate": [total, x, floats, size(COUNT), first, THREADS],
        "column_sums": [
            *[total, x, floats, size(OUTER), size(CLASSES), stride(CLASSES), first, THREADS]
        ],
        "advise_huge_pages": [x, size(ROOM)],
        "small_linear_cross_entropy": [
            *[size(OUTER), size(CLASSES), size(INNER), x, maybe["factor"], maybe["weight"]],
            *[address(buffers["target"]), code(4, 5, 6), integer(-100, 0), first],
            *[address(buffers["loss"]), maybe["grad"], maybe["v"], maybe["grad_rows"]],
        ],
    }


def gemm_calls(buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    a, b, c, bias = (address(buffers[name]) for name in ("x", "target", "grad", "weight"))
    m, n, k = OUTER, INNER, CLASSES
    return {
        "gemm": [
            *[code(0, 1, 2, 3), size(m), size(n), size(k), a, stride(k), stride(1)],
            *[b, stride(n), stride(1), c, stride(n), bias, Field([True, False], [2, -1]), THREADS],
        ],
        "multiply_adds": [code(0, 1, 2, 3), size(1000)],
    }


def similarity_topk_calls(buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    queries, keys, values, indices = (
        address(buffers[name]) for name in ("x", "target", "grad", "index")
    )
    return {
        "similarity_topk": [
            *[code(0, 1, 2, 3), size(OUTER), size(CLASSES), size(INNER), queries, stride(INNER)],
            *[keys, stride(INNER), size(2), integer(0, 1, -1), values, indices, THREADS],
        ],
    }


def margin_shift_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    none = address(None)

    def maybe(name: str) -> Field:
        return Field([0, buffers[name].address], NOWHERE)

    def strides() -> list[Field]:
        return [stride(CLASSES * INNER), stride(INNER), stride(1)]

    problem = record(
        *(module, "margin_shift", "Problem"),
        **dict(sizes=[size(OUTER), size(CLASSES), size(INNER)], dtype=code(0, 1, 2, 3)),
        **dict(x=b["x"], x_strides=strides(), adv=b["v"], adv_strides=strides()),
        **dict(target=b["target"], target_dtype=code(4, 5, 6)),
        **dict(squared=Field([0, 1], [2, -1, *HUGE]), ignore_index=integer(-100, 0)),
    )
    rows = dict(g=b["grad_rows"], shift=b["loss"], total=b["stats"])
    backward = record(
        *(module, "margin_shift", "Backward"),
        **dict(**rows, dx=maybe("grad"), dx_strides=strides()),
        **dict(dadv=maybe("scratch"), dadv_strides=strides()),
    )
    there = record(
        *(module, "margin_shift", "Backward"),
        **dict.fromkeys(module.fields("margin_shift")["Backward"], none),
    )
    return {
        "margin_shift_fwd": [problem, b["loss"], b["stats"], THREADS],
        "margin_shift_bwd": [problem, backward, THREADS],
        "cuda_margin_shift_fwd": [problem, *[none] * 4],
        "cuda_margin_shift_bwd": [problem, there, none, none],
    }


def similarity_counts_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    problem = record(
        *(module, "similarity_softmax", "Counts"),
        **dict(n=size(CLASSES), d=size(OUTER), classes=size(2), steps=size(INNER)),
        **dict(dtype=code(0, 1), x=b["x"], half=b["weight"], labels=b["target"], edges=b["v"]),
    )
    scratch = [b["scratch"], Field([SCRATCH], [0, -1, 64, -(2**63)]), THREADS]
    return {
        "similarity_counts_scratch_bytes": [problem, THREADS],
        "similarity_counts": [problem, b["grad"], *scratch],
    }


def tensor_attention_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    maybe = {name: Field([0, buffer.address], NOWHERE) for name, buffer in buffers.items()}
    (n_q, n_1, n_2), features, heads, dv = (3, 4, 5), 3, 2, 2

    def outer(count: int, width: int) -> list[Field]:
        sizes = (count * width * heads, count * width, width)
        return [*map(stride, sizes), Field([1], stride(1).hostile)]

    def axis(n: int, k: str, v: str, mask: str, bias_k: Field, bias_v: Field) -> list[Any]:
        # Masks are broadcast, too: their strides may be 0.
        sizes = (heads * n_q * n, n_q * n, n)
        strides = [*(Field([0, s], stride(s).hostile) for s in sizes), outer(n, 1)[-1]]
        return record(
            *(module, "tensor_attention", "Axis"),
            **dict(n=size(n), window=integer(0, 2), k=b[k], k_strides=outer(n, features)),
            **dict(v=b[v], v_strides=outer(n, dv), bias_k=bias_k, bias_v=bias_v),
            **dict(mask=maybe[mask], mask_strides=strides),
        )

    problem = record(
        *(module, "tensor_attention", "Problem"),
        **dict(batch=size(1), heads=size(heads), kv_heads=size(1), n_q=size(n_q)),
        **dict(d=size(features), dv=size(dv), dtype=code(0, 1, 2, 3), scale=number(1.0, 0.5)),
        **dict(softcap=number(0.0, 2.5), causal=Field([0, 1], [2, -1, *HUGE])),
        **dict(q_offset=integer(0, 1, -2), q=b["x"], q_strides=outer(n_q, features)),
        axis1=axis(n_1, "v", "grad", "target", number(0.0), number(0.0)),
        axis2=axis(n_2, "target2", "mix", "weight", number(0.0, 0.5), number(0.0, 1.0)),
    )
    gradients = dict(dq="index", dk1="loss", dk2="norm", dv1="grad_loss", dv2="cotangents")
    gradients |= dict(dmask1="cotangents2", dmask2="grad_rows", dlse="factor")
    backward = record(
        *(module, "tensor_attention", "Backward"),
        **dict(dout=b["token_weight"], dout_strides=outer(n_q, dv)),
        **dict(out=b["stats"], lse=b["extras"]),
        **{field: maybe[name] for field, name in gradients.items()},
    )
    scratch = [b["scratch"], Field([SCRATCH], [0, -1, 64, -(2**63)]), THREADS]
    return {
        "tensor_attention_fwd": [problem, b["stats"], b["extras"], *scratch],
        "tensor_attention_bwd": [problem, backward, *scratch],
    }


def similarity_softmax_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    maybe = {name: Field([0, buffer.address], NOWHERE) for name, buffer in buffers.items()}
    op, flag = "similarity_softmax", Field([0, 1], [2, -1, *HUGE])
    problem = record(
        *(module, op, "Problem"),
        **dict(n=size(4), m=size(4), d=size(5), dtype=code(0, 1, 2, 3), itself=flag),
        **dict(queries=b["x"], keys=b["v"], scale=number(1.0, 80.0), scales=maybe["weight"]),
        **dict(scale_of_each=flag, target=maybe["target"], query_ids=b["index"]),
        **dict(key_ids=b["target2"], first=integer(0, 1, -1), flags=code(*range(32))),
    )
    names = ("stats", "extras", "loss", "norm")
    results = dict(zip(("lse", "positive", "count", "positives"), (b[n] for n in names)))
    columns = ("grad_loss", "cotangents", "cotangents2", "grad_rows")
    fields = ("column_lse", "column_positive", "column_count", "column_positives")
    forward = record(
        *(module, op, "Forward"),
        **dict(results, mean=maybe["mix"], **{f: maybe[n] for f, n in zip(fields, columns)}),
    )
    given = dict(g="loss", g_positive="norm", column_g="cotangents", column_g_positive="mix")
    given |= dict(dq="grad", dk="grad_rows", dscale="factor")
    backward = record(
        *(module, op, "Backward"),
        **dict(lse=b["stats"], column_lse=b["grad_loss"]),
        **{field: maybe[name] for field, name in given.items()},
    )
    sums = record(
        *(module, op, "PairSums"),
        **dict(kind=code(0, 1), bias=maybe["states"], number1=number(0.1), number2=number(0.9)),
    )
    found = dict(sum1=b["stats"], count1=maybe["extras"], sum2=b["loss"], count2=maybe["norm"])
    sum_results = record(*(module, op, "PairSumResults"), **found)
    given = dict(g1="loss", g2="norm", dq="grad", dk="grad_rows", dscale="factor", dbias="mix")
    sum_gradients = record(
        *(module, op, "PairSumGradients"), **{field: maybe[n] for field, n in given.items()}
    )
    loss = record(
        *(module, op, "Loss"),
        **dict(rows=size(3), d=size(4), dtype=code(0, 1), views=flag, columns=flag, sigmoid=flag),
        **dict(sum=flag, scale=number(1.0, 80.0), scales=maybe["weight"], bias=number(0.1)),
        **dict(biases=maybe["states"], labels=maybe["target"], unit=b["x"], stats=b["v"]),
    )
    loss_gradients = record(
        *(module, op, "LossGradients"),
        **dict(g=b["loss"], dx1=maybe["grad"], dx2=maybe["grad_rows"], dscale=maybe["factor"]),
        dbias=maybe["mix"],
    )
    scratch = [b["scratch"], Field([SCRATCH], [0, -1, 64, -(2**63)]), THREADS]
    return {
        "similarity_loss_fwd_scratch_bytes": [loss, THREADS],
        "similarity_loss_bwd_scratch_bytes": [loss, flag, flag, flag, flag, THREADS],
        "similarity_loss_fwd": [loss, b["grad"], b["grad_rows"], b["loss"], *scratch],
        "similarity_loss_bwd": [loss, loss_gradients, *scratch],
        "similarity_softmax_fwd_scratch_bytes": [problem, flag, THREADS],
        "similarity_softmax_bwd_scratch_bytes": [problem, flag, flag, flag, flag, THREADS],
        "similarity_softmax_fwd": [problem, forward, *scratch],
        "similarity_softmax_bwd": [problem, backward, *scratch],
        "pair_sums_fwd_scratch_bytes": [problem, THREADS],
        "pair_sums_fwd": [problem, sums, sum_results, *scratch],
        "pair_sums_bwd": [problem, sums, sum_gradients, *scratch],
    }


def tensor_attention_lowrank_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    maybe = {name: Field([0, buffer.address], NOWHERE) for name, buffer in buffers.items()}
    (n_q, n_1, n_2), features, heads, dv = (3, 4, 5), 3, 2, 2
    op = "tensor_attention_lowrank"

    def outer(count: int, width: int) -> list[Field]:
        sizes = (count * width * heads, count * width, width)
        return [*map(stride, sizes), Field([1], stride(1).hostile)]

    def axis(n: int, k: str, v: str, mask: str) -> list[Any]:
        strides = [*(Field([0, n], stride(n).hostile) for _ in range(2)), outer(n, 1)[-1]]
        return record(
            *(module, op, "Axis"),
            **dict(n=size(n), window=integer(0, 2), k=b[k], k_strides=outer(n, features)),
            **dict(v=b[v], v_strides=outer(n, dv), mask=maybe[mask], mask_strides=strides),
        )

    problem = record(
        *(module, op, "Problem"),
        **dict(batch=size(1), heads=size(heads), kv_heads=size(1), n_q=size(n_q)),
        **dict(d=size(features), dv=size(dv), dtype=code(0, 1), q_offset=integer(0, 1, -2)),
        **dict(causal=Field([0, 1], [2, -1, *HUGE]), centre=number(0.0, 0.5)),
        **dict(coefficients=[number(1.0), number(0.5), number(0.1)]),
        **dict(q=b["x"], q_strides=outer(n_q, features)),
        axes=[axis(n_1, "v", "grad", "target"), axis(n_2, "mix", "weight", "norm")],
    )
    states = [b["states"], b["target2"]]
    forward = record(
        *(module, op, "Forward"),
        **dict(out=b["stats"], lse=b["extras"], y=b["index"], states=states),
    )
    backward = record(
        *(module, op, "Backward"),
        **dict(dout=b["token_weight"], dout_strides=outer(n_q, dv), dlse=maybe["factor"]),
        **dict(out=b["stats"], y=b["index"], states=states, dq=maybe["loss"]),
        dk=[maybe["grad_loss"], maybe["cotangents"]],
        dv=[maybe["cotangents2"], maybe["grad_rows"]],
    )
    scratch = [b["scratch"], Field([SCRATCH], [0, -1, 64, -(2**63)]), THREADS]
    return {
        "tensor_attention_lowrank_fwd": [problem, forward, *scratch],
        "tensor_attention_lowrank_largest": [b["x"], code(0, 1), size(features), THREADS],
        "tensor_attention_lowrank_bwd": [problem, backward, *scratch],
    }


def betti_matching_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    op, none = (module, "betti_matching"), address(None)

    def flag() -> Field:
        return Field([0, 1], [2, -1, *HUGE])

    def problem(x: Field, target: Field, dtype: Field) -> list[Any]:
        return record(
            *(*op, "Problem"),
            **dict(items=size(OUTER), shape=[size(CLASSES), size(INNER)]),
            **dict(want=Field(list(range(8)), [-1, 8, *HUGE]), superlevel=flag()),
            **dict(input=x, input_dtype=dtype, target=target, target_dtype=dtype),
        )

    here = problem(address(buffers["x"]), address(buffers["target"]), code(0, 1))
    options = record(
        *(*op, "Loss"),
        **dict(extreme=flag(), essential=flag(), min_persistence=number(0.0)),
        **dict(matched_weight=number(1.0), unmatched_weight=number(1.0, 2.0)),
        dim_weight=[number(1.0), number(1.0), number(1.0)],
    )
    grad = Field([0, buffers["grad"].address], NOWHERE)
    # As above: a host address would be a valid number on a device.
    on_device = problem(none, none, code(0, 1))
    return {
        "cuda_betti_loss": [on_device, options, *[none] * 6],
        "betti_loss": [here, options, address(buffers["loss"]), grad, THREADS],
        "betti_matching": [here, THREADS],
        "persistence_pairs": [here, Field([True, False], [2, -1]), THREADS],
    }


def sorting_network_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    none = address(None)
    op = (module, "sorting_network")

    def flag() -> Field:
        return Field([0, 1], [2, -1, *HUGE])

    def problem(x: Field, table: Field) -> list[Any]:
        return record(
            *(*op, "Problem"),
            **dict(items=size(OUTER), n=size(CLASSES), dtype=code(0, 1)),
            **dict(network=code(0, 1, 2, 3), distribution=code(0, 1, 2, 3, 4, 5)),
            **dict(steepness=number(1.0, 10.0), art_lambda=number(0.25, 0.0), x=x),
            # The buffers hold no table; only splitter selection reads one, here of no comparators.
            **dict(table=table, comparators=Field([0], [-1, 1, *HUGE])),
            **dict(offsets=table, layers=integer(0, 3)),
        )

    def features(f: Field) -> list[Any]:
        flags = dict(shared=flag(), transpose=flag())
        return record(*op, "Features", f=f, width=size(INNER), **flags)

    here = problem(b["x"], b["target"])
    f = features(b["v"])
    gf = Field([0, buffers["grad_rows"].address], NOWHERE)
    gy = Field([0, buffers["grad_loss"].address], NOWHERE)
    gx = Field([0, buffers["grad"].address], NOWHERE)
    matrix = b["scratch"]
    targets = record(
        *(*op, "Targets"),
        **dict(order=code(0, 1, 2, 3, 4), target=b["target2"]),
        # Of values any bits will do, and all of them are ordered.
        **dict(dtype=Field([5], [-1, 2, 3, 6, 7, *HUGE])),
        **dict(count=Field([0, buffers["mix"].address], NOWHERE)),
        **dict(kind=code(0, 1, 2), reduction=code(0, 1, 2)),
    )
    # As above: a host address would be a valid number on a device.
    tensors = "g gy first count y out loss gx gf".split()
    call = record(
        *(*op, "Call"),
        **dict(task=code(0, 1, 2, 3, 4, 5, 6), features=features(none), kind=code(0, 1, 2)),
        **dict.fromkeys(tensors, none),
    )
    return {
        "cuda_sorting_network": [problem(none, none), call, none, integer(0), none, none],
        "sorting_network_sort": [here, b["loss"], THREADS],
        "sorting_network_sort_bwd": [here, b["grad_loss"], b["grad"], THREADS],
        "sorting_network_apply": [here, f, b["stats"], THREADS],
        "sorting_network_apply_bwd": [here, f, b["stats"], b["grad"], gf, THREADS],
        "sorting_network_permutation": [here, b["loss"], matrix, THREADS],
        "sorting_network_permutation_bwd": [here, gy, matrix, b["grad"], THREADS],
        "sorting_network_loss": [here, targets, b["loss"], gx, THREADS],
    }


def permutahedron_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    none, flag = address(None), Field([0, 1], [2, -1, *HUGE])
    problem = record(
        *(module, "permutahedron", "Problem"),
        **dict(rows=size(OUTER), n=size(CLASSES), dtype=code(0, 1), rank=flag),
        **dict(
            kl=Field(flag.good, flag.hostile),
            centred=Field([0, 1], flag.hostile),
            strength=number(1.0, 0.1),
        ),
    )
    return {
        "permutahedron_fwd": [problem, b["x"], b["grad"], b["index"], THREADS],
        "permutahedron_bwd": [problem, b["cotangents"], b["x"], b["index"], b["v"], THREADS],
        "cuda_permutahedron_fwd": [problem, *[none] * 4, none, integer(0), none, none],
        "cuda_permutahedron_bwd": [problem, *[none] * 6],
    }


def lion_k_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b = {name: address(buffer) for name, buffer in buffers.items()}
    none, flag = address(None), Field([0, 1], [2, -1, *HUGE])
    options = record(
        *(module, "lion_k", "Options"),
        **dict(kappa=code(0, 1, 2, 3), rounding=code(0), maximize=flag),
        **dict(lr=number(1e-3), beta1=number(0.9), beta2=number(0.99), weight_decay=number(0.1)),
        **dict(e=number(0.5), seed=integer(7), step=integer(1)),
    )

    def problem(n: int, x: Field, g: Field, m: Field) -> list[Any]:
        return record(
            *(module, "lion_k", "Problem"),
            **dict(x_dtype=code(0, 1, 2, 3), g_dtype=code(0, 1, 2, 3), m_dtype=code(0, 1, 2, 3)),
            **dict(size=[size(n), size(0)], x=[x, none], g=[g, none], m=[m, none]),
            **dict(given=[], compensation=[], position=[], options=options),
        )

    here = problem(CLASSES, b["v"], b["cotangents"], b["grad_rows"])
    # As above: a host address would be a valid number on a device.
    return {
        "lion_k_step": [here, THREADS],
        "cuda_lion_k_step": [problem(0, none, none, none), none, none, none, integer(0), none],
    }


def aldr_calls(module: Any, buffers: dict[str, Buffer]) -> dict[str, list[Any]]:
    b, none = {name: address(buffer) for name, buffer in buffers.items()}, address(None)
    problem = record(
        *(module, "aldr", "Problem"),
        **dict(rows=size(OUTER), classes=size(CLASSES), dtype=code(0, 1, 2, 3), x=b["x"]),
        **dict(target=b["target"], start=Field([0, buffers["mix"].address], NOWHERE)),
        **dict(lambda0=number(1.0, 10.0), alpha=number(2.0), margin=number(0.0, 0.1)),
        **dict(ignore_index=integer(-100, 0), l1=Field([0, 1], [2, -1, *HUGE])),
    )
    return {
        "aldr_fwd": [problem, b["stats"], b["factor"], b["grad"], THREADS],
        "aldr_bwd": [problem, b["stats"], b["factor"], b["grad"], THREADS],
        "cuda_aldr_fwd": [problem, *[none] * 5],
        "cuda_aldr_bwd": [problem, *[none] * 5],
    }


def fields_of(template: list[Any]) -> list[Field]:
    return [f for part in template for f in (fields_of(part) if isinstance(part, list) else [part])]


def fill(template: list[Any], rng: random.Random, hostile: int, mistyped: bool) -> list[Any]:
    """Arguments with `hostile` of the fields changed."""
    fields = fields_of(template)
    chosen = set(map(id, rng.sample(fields, min(hostile, len(fields)))))
    wrong_type = id(rng.choice(fields)) if mistyped else None

    def value(field: Field) -> Any:
        if id(field) == wrong_type:
            return rng.choice(MISTYPED)
        return rng.choice(field.hostile if id(field) in chosen else field.good)

    def filled(part: Field | list[Any]) -> Any:
        if isinstance(part, Field):
            return value(part)
        values = [filled(p) for p in part]
        if mistyped and values and rng.random() < 0.1:
            values.pop()
        return tuple(values)

    return [filled(part) for part in template]


def main() -> None:
    path, seed, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)

    names = "x target target2 mix weight token_weight loss stats norm extras index grad"
    names += " grad_loss cotangents cotangents2 v grad_rows factor states"
    buffers = {name: Buffer() for name in names.split()}
    buffers["scratch"] = Buffer(SCRATCH)
    buffers["offsets"] = Buffer()
    templates = {
        **row_softmax_calls(module, buffers),
        **linear_cross_entropy_calls(buffers),
        **gemm_calls(buffers),
        **similarity_topk_calls(buffers),
        **betti_matching_calls(module, buffers),
        **lion_k_calls(module, buffers),
        **aldr_calls(module, buffers),
        **permutahedron_calls(module, buffers),
        **margin_shift_calls(module, buffers),
        **row_moments_calls(module, buffers),
        **segment_calls(module, buffers),
        **similarity_counts_calls(module, buffers),
        **tensor_attention_calls(module, buffers),
        **similarity_softmax_calls(module, buffers),
        **sorting_network_calls(module, buffers),
        **tensor_attention_lowrank_calls(module, buffers),
    }
    functions = {name for name in dir(module) if callable(getattr(module, name))}
    unknown = (
        functions
        - set(templates)
        - {
            "cuda_device_count",
            "cuda_driver_problem",
            "fields",
            "prefers_own_gemm",
            "simd_level",
        }
    )
    unknown -= {name for name in functions if name.endswith("_scratch_bytes")}
    assert not unknown, f"functions without a template here: {sorted(unknown)}"
    templates = {name: t for name, t in templates.items() if name in functions}

    rng = random.Random(seed)
    passed = dict.fromkeys(templates, 0)
    for i in range(calls):
        name = rng.choice(sorted(templates))
        arguments = fill(templates[name], rng, i % 4, mistyped=rng.random() < 0.05)
        if i % 64 == 0:
            ctypes.memset(buffers["x"].address, rng.choice([0, 1, 0x3C, 0x7F, 0xFF]), ROOM)
        try:
            getattr(module, name)(*arguments)
            passed[name] += 1
        except EXPECTED:
            pass
        if i % 256 == 0:
            ctypes.memset(buffers["target"].address, 0, ROOM)
    damaged = [name for name, buffer in buffers.items() if not buffer.guards_intact()]
    assert not damaged, f"written outside of {damaged}"
    # A template that no longer fits its function would only ever raise TypeError.
    for name, count in passed.items():
        assert count or name.startswith("cuda_"), f"no call of {name} was accepted"
    print(passed)


if __name__ == "__main__":
    main()
