"""What is compiled for each architecture without a GPU (tests/compile/triton_compile.py)."""

from __future__ import annotations

from .gradient import linear_softmax_grad_kernel
from .launch import OPTIONS, TABLE, for_few_rows
from .products import (
    active_tiles_kernel,
    column_sums_kernel,
    fit_mask,
    masked_matmul_nn_kernel,
    masked_matmul_tn_kernel,
    merge_column_sums_kernel,
)
from .statistics import linear_softmax_stats_kernel, merge_softmax_stats_kernel


def _case(kernel, config, pointers, integers, floats=(), absent=(), mma="big", **constexprs):
    """One entry of COMPILE_CASES; `divisible` names arguments that are usually multiples of 16.

    mma: the product instructions to look for, those of tall tiles ("big"), of low ones ("small"),
    or None. A problem of size 1 has "small" ones, and Triton makes its sizes constants.
    """
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= {name: "i64" if name.startswith("stride") else "i32" for name in integers}
    signature |= dict.fromkeys(floats, "fp32")
    if config is not None:
        constexprs |= {f"BLOCK_{k}": getattr(config, f"block_{k.lower()}") for k in "MNK"}
        constexprs["GROUP"] = config.group
    ptx = {80: "mma.sync", 90: "mma.sync", 100: "mma.sync"}
    if mma == "big":
        ptx |= {90: "wgmma.mma_async", 100: "tcgen05.mma"}
    if mma == "small":
        constexprs |= dict.fromkeys(integers, 1)
        signature = {k: v for k, v in signature.items() if k not in integers}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs | dict.fromkeys(absent),
        "options": {
            "num_warps": config.num_warps if config else 4,
            "num_stages": config.num_stages if config else 3,
            **OPTIONS,
        },
        "ptx_has": ptx if mma else {},
        "divisible": [n for n in signature if n in pointers or n.startswith(("stride", "n_"))],
    }


def _pick(name, dtype, precision, one):
    """Configuration, and the kind of product instruction to expect."""
    config = TABLE[name, "half" if dtype != "fp32" else precision]
    if one:
        return for_few_rows(config, 16), "small"
    return config, "big" if precision == "tf32" or dtype != "fp32" else None


def _stats_case(dtype, precision, full, one=False):
    c, mma = _pick("stats with more" if full else "stats", dtype, precision, one)
    optional = {"bias_ptr": dtype, "class_weight_ptr": "fp32", "n_valid_ptr": "i64"}
    return _case(
        linear_softmax_stats_kernel,
        c,
        {
            "x_ptr": dtype,
            "w_ptr": dtype,
            "target_ptr": "i64",
            "part_ptr": "fp32",
            **(optional if full else {}),
        },
        ("n_rows", "n_cols", "n_inner", "stride_x_row", "stride_w_row", "n_splits")
        + ("tiles_per_split",),
        ("pre", "post"),
        () if full else optional,
        mma=mma,
        CAP=full,
        WANT_ENTROPY=full,
        WANT_SUM=full,
        EVEN_K=not full,
        WIDE=False,
        PRECISION=precision,
    )


def _grad_case(dtype, precision, full, one=False):
    c, mma = _pick("grad", dtype, precision, one)
    optional = {
        "bias_ptr": dtype,
        "class_weight_ptr": "fp32",
        "n_valid_ptr": "i64",
        "b_ptr": "fp32",
        "spread_ptr": "fp32",
        "threshold_ptr": "fp32",
    }
    return _case(
        linear_softmax_grad_kernel,
        c,
        {
            "x_ptr": dtype,
            "w_ptr": dtype,
            "target_ptr": "i64",
            "m_ptr": "fp32",
            "a_ptr": "fp32",
            "label_a_ptr": "fp32",
            "label_ptr": "fp32",
            "dz_ptr": dtype,
            "mask_ptr": "i8",
            **(optional if full else {}),
        },
        ("n_rows", "n_cols", "n_inner", "first_class", "stride_x_row", "stride_w_row")
        + ("stride_dz_row",),
        ("pre", "post"),
        () if full else optional,
        mma=mma,
        CAP=full,
        EVEN_K=not full,
        WIDE=False,
        PRECISION=precision,
    )


def _matmul_case(kernel, dtype, precision, masked, out="fp32", one=False):
    c, mma = _pick("matmul", dtype, precision, one)
    other = "w" if kernel is masked_matmul_nn_kernel else "x"
    optional = {"n_valid_ptr": "i64", "list_ptr": "i32", "count_ptr": "i32"}
    optional |= {"left_ptr": "fp32", "right_ptr": "fp32"}
    even = {"EVEN_N": not masked, "EVEN_K": not masked} if other == "w" else {}
    return _case(
        kernel,
        fit_mask(c, 128, 128) if masked else c,
        {
            "dz_ptr": dtype,
            f"{other}_ptr": dtype,
            "out_ptr": out,
            **(optional if masked else {}),
        },
        ("n_rows", "n_cols", "n_inner", "stride_dz_row", f"stride_{other}_row", "stride_out_row"),
        (),
        () if masked else optional,
        mma=mma,
        ACCUMULATE=out == "fp32",
        WIDE=False,
        PRECISION=precision,
        TILE=128 if masked else c.block_k,
        **even,
    )


COMPILE_CASES = [
    _stats_case("bf16", "ieee", full=True),
    _stats_case("fp16", "ieee", full=False),
    _stats_case("fp32", "tf32", full=True),
    _stats_case("fp32", "ieee", full=False),
    _stats_case("bf16", "ieee", full=True, one=True),
    _case(
        merge_softmax_stats_kernel,
        None,
        {"part_ptr": "fp32", "n_valid_ptr": "i64", "out_ptr": "fp32"},
        ("n_rows", "n_splits"),
        mma=None,
        WANT_ENTROPY=True,
        WANT_SUM=True,
        WHOLE_ROW=True,
        BLOCK_M=128,
    ),
    _grad_case("bf16", "ieee", full=True),
    _grad_case("fp16", "ieee", full=False),
    _grad_case("fp32", "tf32", full=True),
    _grad_case("fp32", "ieee", full=False),
    _grad_case("bf16", "ieee", full=True, one=True),
    _case(
        active_tiles_kernel,
        None,
        {"mask_ptr": "i8", "list_ptr": "i32", "count_ptr": "i32"},
        ("n_tiles", "stride_line", "stride_tile"),
        mma=None,
        BLOCK=1024,
    ),
    *(
        _matmul_case(kernel, dtype, precision, masked, out, one)
        for kernel in (masked_matmul_nn_kernel, masked_matmul_tn_kernel)
        for dtype, precision, masked, out, one in (
            ("bf16", "ieee", False, "bf16", False),
            ("bf16", "ieee", True, "fp32", False),
            ("bf16", "ieee", False, "fp32", True),
            ("fp32", "tf32", False, "fp32", False),
            ("fp32", "ieee", False, "fp32", False),
        )
    ),
    *(
        _case(
            column_sums_kernel,
            None,
            {"dz_ptr": "bf16", "part_ptr": "fp32", **lists},
            ("n_rows", "n_cols", "stride_dz_row"),
            absent=absent,
            mma=None,
            BLOCK_M=128,
            BLOCK_N=128,
        )
        for lists, absent in (
            ({"n_valid_ptr": "i64", "list_ptr": "i32", "count_ptr": "i32"}, ("factor_ptr",)),
            ({"factor_ptr": "fp32"}, ("n_valid_ptr", "list_ptr", "count_ptr")),
        )
    ),
    _case(
        merge_column_sums_kernel,
        None,
        {"part_ptr": "fp32", "out_ptr": "fp32"},
        ("n_cols", "n_splits"),
        mma=None,
        ACCUMULATE=True,
        BLOCK_N=256,
    ),
]
