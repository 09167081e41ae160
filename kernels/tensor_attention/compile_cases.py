"""COMPILE_CASES: what tests/compile compiles for every supported architecture."""

from __future__ import annotations

from typing import Any

import triton

from .arguments import Constants, Inputs, Upstream
from .backward_keys import (
    tensor_attention_bwd_kv_pairs_kernel,
    tensor_attention_bwd_kv_rows_kernel,
    tensor_attention_parts_kernel,
)
from .backward_queries import (
    tensor_attention_bwd_mask_kernel,
    tensor_attention_bwd_q_pairs_kernel,
    tensor_attention_bwd_q_rows_kernel,
    tensor_attention_bwd_rows_stats_kernel,
)
from .forward import (
    tensor_attention_fwd_pairs_kernel,
    tensor_attention_fwd_rows_kernel,
    tensor_attention_merge_kernel,
)
from .hidden import tensor_attention_clear_kernel, tensor_attention_spoil_kernel
from .launch import launch_options
from .table import TABLE, Config

_FLOAT32 = ("mask1", "mask2", "shift", "delta", "lse_ptr", "dlse_ptr", "shift_ptr", "delta_ptr")
_FLOAT32 += ("part_ptr", "part_k_ptr", "part_v_ptr", "part_lse_ptr", "dmask_ptr")
_POINTERS = Inputs._fields[:7] + Upstream._fields
_GROUPS = {"x": Inputs, "up": Upstream}
_SIZES = ("n_q", "n_1", "n_2", "n_heads", "n_splits", "n_blocks", "total_rows", "span")
_SIZES += ("batches", "heads", "mask_heads")


def _type(name: str, dtype: str) -> str:
    if name.endswith("_ptr") or name in _POINTERS:
        if name == "count_ptr":
            return "*i32"
        return "*fp32" if name in _FLOAT32 else f"*{dtype}"
    if name in ("logit_scale", "scale", "factor"):
        return "fp32"
    return "i64" if name.startswith("stride") else "i32"


def _case(
    kernel: Any,
    name: str | None,
    dtype: str,
    d: int = 64,
    precision: str = "ieee",
    even: bool = True,
    one: bool = False,
    group: int = 1,
    pack: int = 1,
    **constexprs: Any,
) -> dict[str, Any]:
    """One entry of COMPILE_CASES.

    even: no windows, no masks, everything fits the tiles. one: sizes of 1, which Triton makes
    constants.
    """
    kind = precision if dtype == "fp32" else "half"
    c = Config(0, 0, 4, 1)
    if name is not None:
        c = TABLE[name, kind, d]
        constexprs["C"] = Constants(
            GROUP=group,
            PACK=pack,
            LIMITED=not even,
            EVEN_N=even,
            EVEN_D=even,
            EVEN_DV=even,
            MASK2_ROWS=not even,
            WIDE=False,
            PRECISION=precision,
            D=d,
            DV=d,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
        )
    constants = dict.fromkeys(("mask1", "mask2", "dlse_ptr")) if even else {}
    if one:
        constants |= dict.fromkeys(_SIZES, 1)
    signature: dict[str, Any] = {}

    def type_of(argument: str, path: Any) -> str:
        """That of an argument, or of an element of a tuple: path = (argument, element)."""
        if argument not in constants:
            return _type(argument, dtype)
        constexprs[path] = constants[argument]
        return "constexpr"

    for at, argument in enumerate(kernel.arg_names):
        group_type = _GROUPS.get(argument)
        if group_type is not None:
            fields = enumerate(group_type._fields)
            signature[argument] = group_type(*(type_of(f, (at, i)) for i, f in fields))
        elif argument not in constexprs:
            signature[argument] = type_of(argument, argument)
    tensor_cores = name is not None and (kind == "half" or precision == "tf32")
    ptx = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": launch_options(c),
        "ptx_has": ptx if tensor_cores and c.block_m >= 64 else {},
    }


def _cases_of_type(
    dtype: str, d: int, precision: str = "ieee", even: bool = True, one: bool = False
) -> list[dict[str, Any]]:
    def case(kernel: Any, name: str | None, **constexprs: Any) -> dict[str, Any]:
        return _case(kernel, name, dtype, d, precision, even, one, group, **constexprs)

    kind = precision if dtype == "fp32" else "half"
    group = 1 if even else 4
    exact = {"SUM_PRECISION": "tf32x3" if kind == "half" else "ieee"}
    # Windows of 32, or as many as the tile holds.
    in_fwd, in_q = (min(32, TABLE[name, kind, d].block_m) for name in ("fwd pairs", "bwd q pairs"))
    in_kv = min(32, TABLE["bwd kv pairs", kind, d].block_n)
    sums = triton.next_power_of_2(in_q + TABLE["bwd q pairs", kind, d].block_m // in_q - 1)
    both = {"WANT_K": True, "WANT_V": True}
    one_turn = {"WANT_K": True, "WANT_V": d <= 128}
    in_q = {"BLOCK_J": in_q, "SUM_ROWS": max(16, sums)}
    return [
        case(tensor_attention_fwd_rows_kernel, "fwd rows", pack=group),
        case(tensor_attention_fwd_pairs_kernel, "fwd pairs", BLOCK_J=in_fwd),
        case(tensor_attention_bwd_q_rows_kernel, "bwd q rows", pack=group),
        case(tensor_attention_bwd_kv_rows_kernel, "bwd kv rows", **one_turn),
        case(tensor_attention_bwd_q_pairs_kernel, "bwd q pairs", **in_q, **both, **exact),
        case(tensor_attention_bwd_kv_pairs_kernel, "bwd kv pairs", BLOCK_J=in_kv, **both),
        case(tensor_attention_bwd_mask_kernel, "bwd mask", KEYS=32),
    ]


COMPILE_CASES = [
    *_cases_of_type("bf16", 64),
    *_cases_of_type("fp16", 128, even=False),
    *_cases_of_type("bf16", 256)[:4],
    *_cases_of_type("fp32", 64, "tf32")[:4],
    *_cases_of_type("fp32", 64, "ieee")[2:5],
    *_cases_of_type("bf16", 64, one=True)[:4:3],
    _case(tensor_attention_clear_kernel, None, "bf16", BLOCK=1024),
    # No products, hence no instructions to look for.
    _case(tensor_attention_spoil_kernel, "fwd rows", "bf16", even=False) | {"ptx_has": {}},
    _case(tensor_attention_spoil_kernel, "fwd rows", "bf16", 256, even=False) | {"ptx_has": {}},
    _case(tensor_attention_merge_kernel, None, "bf16", DV=64, BLOCK_R=64),
    _case(tensor_attention_bwd_rows_stats_kernel, None, "bf16", even=False, DV=64, BLOCK_R=64),
    _case(tensor_attention_parts_kernel, None, "bf16", HEADS=1, STEP=64, W=64, BLOCK_R=32),
]
