"""COMPILE_CASES: what tests/compile compiles for every supported architecture."""

from __future__ import annotations

from typing import Any

import triton

from . import scan
from .scan_kernels import (
    tensor_attention_lowrank_prefix_kernel,
    tensor_attention_lowrank_scan_kernel,
    tensor_attention_lowrank_scan_key_gradient_kernel,
    tensor_attention_lowrank_scan_query_gradient_kernel,
)
from .scan_steps import Band, Constants, Scatter
from .whole import (
    GRADIENT,
    GRADIENT_WIDE,
    PRECISION,
    QUERY,
    STATE,
    Config,
    options,
    tile_columns,
)
from .whole_kernels import (
    tensor_attention_lowrank_gradient_kernel,
    tensor_attention_lowrank_query_kernel,
    tensor_attention_lowrank_state_kernel,
)

_BYTES = ("mask_ptr", "dead_ptr", "kept_ptr", "kept")
_POINTERS = Band._fields[:8]


def _type(name: str) -> str:
    if name.endswith("_ptr") or name in _POINTERS:
        kinds = dict.fromkeys(_BYTES, "*u8") | dict.fromkeys(("index_ptr", "index"), "*i32")
        return kinds.get(name, "*fp32")
    if name == "centre":
        return "fp32"
    return "i64" if name.startswith("stride") else "i32"


def _case(kernel: Any, launched: dict[str, Any], constexprs: dict[Any, Any]) -> dict[str, Any]:
    """Of the constants that the kernel has; None for tensors that are not given."""
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    signature: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument not in constexprs:
            signature[argument] = _type(argument)
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": launched,
    }


def _whole(kernel: Any, config: Config, degree: int, d: int, plain: bool) -> dict[str, Any]:
    """plain: no mask, no column of its own."""
    width = max(16, triton.next_power_of_2(d))
    constexprs: dict[str, Any] = {
        "DEGREE": degree,
        "BLOCK_T": config.block_t,
        "BLOCK_F": config.block_f,
        "BLOCK_C": tile_columns(d),
        "D": width,
        "DV": width,
        "PRECISION": PRECISION,
    }
    if plain:
        constexprs |= dict.fromkeys(("mask_ptr", "extra_ptr", "dead_ptr"))
    return _case(kernel, options(config), constexprs)


def _scan(
    kernel: Any, config: scan.Config, axes: int, degree: int, d: int, plain: bool
) -> dict[str, Any]:
    """plain: no padded keys, no windows."""
    width = max(16, triton.next_power_of_2(d))
    moves = axes if plain else 2 * axes
    constexprs = {
        "C": Constants(axes, moves, degree, scan.BLOCK_F, width, config.block_t),
        "R": Scatter(scan.BLOCK_R, width, PRECISION),
    }
    case = _case(kernel, scan.options(config, d), constexprs)
    types = Band(*map(_type, Band._fields))
    if plain:
        types = types._replace(kept="constexpr")
        case["constexprs"][kernel.arg_names.index("b"), Band._fields.index("kept")] = None
    case["signature"]["b"] = types
    return case


COMPILE_CASES = [
    _whole(tensor_attention_lowrank_state_kernel, STATE, 2, 64, True),
    _whole(tensor_attention_lowrank_state_kernel, STATE, 4, 16, False),
    _whole(tensor_attention_lowrank_query_kernel, QUERY, 2, 128, False),
    _whole(tensor_attention_lowrank_gradient_kernel, GRADIENT, 2, 64, True),
    _whole(tensor_attention_lowrank_gradient_kernel, GRADIENT_WIDE, 2, 128, False),
    _case(
        tensor_attention_lowrank_prefix_kernel,
        scan.options(scan.FORWARD, 64),
        {"REVERSE": True, "BLOCK": 1024},
    ),
    _scan(tensor_attention_lowrank_scan_kernel, scan.FORWARD, 2, 2, 64, True),
    _scan(tensor_attention_lowrank_scan_kernel, scan.FORWARD, 3, 4, 16, False),
    _scan(tensor_attention_lowrank_scan_query_gradient_kernel, scan.QUERY, 2, 2, 64, True),
    _scan(tensor_attention_lowrank_scan_query_gradient_kernel, scan.QUERY, 1, 3, 128, False),
    _scan(tensor_attention_lowrank_scan_key_gradient_kernel, scan.KEY, 2, 2, 64, True),
    _scan(tensor_attention_lowrank_scan_key_gradient_kernel, scan.KEY, 3, 2, 128, False),
]
