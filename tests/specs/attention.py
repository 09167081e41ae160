"""Tensor attention, exact and of low rank, and its layer; the reference stores the cube of scores.

Sizes, masks of all shapes, strategies and memory are in `test_tensor_attention*.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyloss
from pyloss.functional import tensor_attention, tensor_attention_n
from pyloss.reference import tensor_attention as reference
from pyloss.testing import make_logits
from specs._spec import BF16, F16, F32, F64, Bad, Empty, Sample, Spec

NAMES = ("q", "k1", "k2", "v1", "v2")
HALF_TOLERANCES = {BF16: (2.0**-7, 2.0**-7), F16: (2.0**-10, 2.0**-10)}


def pairs(n=(4, 3, 3), heads=1, kv_heads=1, d=2, dv=2, batch=2, masks=None, **options) -> Sample:
    shapes = (
        *((batch, heads, n[0], d), (batch, kv_heads, n[1], d), (batch, kv_heads, n[2], d)),
        *((batch, kv_heads, n[1], dv), (batch, kv_heads, n[2], dv)),
    )
    inputs = {k: make_logits(s, F64, seed=i, scale=1.0)
              for i, (k, s) in enumerate(zip(NAMES, shapes))}  # fmt: skip
    if masks:
        inputs["mask1"] = make_logits((n[0], n[1]), F64, seed=7, scale=1.0)
        inputs["mask2"] = make_logits((batch, 1, 1, n[2]), seed=8) < 2
    return Sample(inputs, options)


def small(**options) -> Sample:
    return pairs(**options).map(lambda name, t: t / 8)


def _determinant(q, k1, k2):
    """Sums of determinants of (q, k1, k2) as a product over the six permutations of features."""
    q, k1, k2 = (t.unflatten(-1, (-1, 3)) for t in (q, k1, k2))
    terms = [((0, 1, 2), 1), ((1, 2, 0), 1), ((2, 0, 1), 1), ((0, 2, 1), -1), ((2, 1, 0), -1),
             ((1, 0, 2), -1)]  # fmt: skip
    many = [torch.cat([t[..., p[i]] * (s if i == 0 else 1) for p, s in terms], -1)
            for i, t in enumerate((q, k1, k2))]  # fmt: skip
    return many


def attention_reference(
    q, k1, k2, v1, v2, *, mask1=None, mask2=None, is_causal=None, window=None, q_offset=None,
    scale=None, kv_bias=(0.0, 0.0), form="product", enable_gqa=False, method="exact", degree=None,
    check="warn", return_lse=False, softcap=None,
):  # fmt: skip
    d = q.shape[-1]
    if form == "determinant":
        q, k1, k2 = _determinant(q, k1, k2)
    windows = (window, window) if isinstance(window, int) else window
    out, lse = reference(
        q,
        (k1, k2),
        (v1, v2),
        masks=[m if m is None else m[(None,) * (4 - m.dim())] for m in (mask1, mask2)],
        scale=1 / d if scale == "kronecker" else d**-0.5 if scale is None else scale,
        causal=window is not None if is_causal is None else is_causal,
        windows=windows,
        q_offset=q_offset or 0,
        kv_bias=kv_bias,
        softcap=softcap,
    )
    return (out, lse) if return_lse else out


# Any order, with keys and values as arguments of their own.


def of_order(q, k1, v1, k2=None, v2=None, k3=None, v3=None, **options):
    keys = [k for k in (k1, k2, k3) if k is not None]
    values = [v for v in (v1, v2, v3) if v is not None]
    return tensor_attention_n(q, keys, values, **options)


def of_order_reference(q, k1, v1, k2=None, v2=None, k3=None, v3=None, *, window=None,
                       is_causal=None, return_lse=False, kv_bias=(0.0, 0.0),
                       softcap=None):  # fmt: skip
    keys = [k for k in (k1, k2, k3) if k is not None]
    values = [v for v in (v1, v2, v3) if v is not None]
    causal = window is not None if is_causal is None else is_causal
    windows = [window] * len(keys) if window else None
    options = dict(causal=causal, windows=windows, kv_bias=kv_bias, softcap=softcap)
    out, lse = reference(q, keys, values, **options)
    return (out, lse) if return_lse else out


def tuples(order: int, n: int = 3, **options) -> Sample:
    names = ["q", *(f"{t}{x + 1}" for x in range(order) for t in "kv")]
    inputs = {k: make_logits((2, 1, n, 2), F64, seed=i, scale=1.0) for i, k in enumerate(names)}
    return Sample(inputs, options)


# The layer, as a function of its parameters.

EMBED, HEADS, LENGTH = 4, 2, 3
PARAMETERS = {
    "in_proj_weight": "in_weight",
    "in_proj_bias": "in_bias",
    "out_proj.weight": "out_weight",
    "out_proj.bias": "out_bias",
    "more_k_proj.0.weight": "k_weight",
    "more_k_proj.0.bias": "k_bias",
    "more_v_proj.0.weight": "v_weight",
    "more_v_proj.0.bias": "v_bias",
}
LAYER_GRADIENTS = ("query", "key", "value", *PARAMETERS.values())


def _layer(attend, query, key, value, in_weight, in_bias, out_weight, out_bias, k_weight, k_bias,
           v_weight, v_bias, *, embed_dim, num_heads, batch_first=True, window=None,
           scale=None, softcap=None, need_weights=False):  # fmt: skip
    def heads(t):
        return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    linear = nn.functional.linear
    q, k1, v1 = (
        heads(linear(t, w, b))
        for t, w, b in zip((query, key, value), in_weight.chunk(3), in_bias.chunk(3))
    )
    k2, v2 = heads(linear(key, k_weight, k_bias)), heads(linear(value, v_weight, v_bias))
    out = attend(q, k1, k2, v1, v2, window=window, scale=scale, softcap=softcap)
    return linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)


def multi_head(*args, **options) -> Tensor:
    return _layer(tensor_attention, *args, **options)


def multi_head_reference(*args, **options) -> Tensor:
    return _layer(attention_reference, *args, **options)


def layer_sample(batch: int = 2, **options) -> Sample:
    shapes = dict.fromkeys(("query", "key", "value"), (batch, LENGTH, EMBED)) | {
        "in_weight": (3 * EMBED, EMBED),
        "in_bias": (3 * EMBED,),
        **{f"{k}_weight": (EMBED, EMBED) for k in ("out", "k", "v")},
        **{f"{k}_bias": (EMBED,) for k in ("out", "k", "v")},
    }
    inputs = {k: make_logits(s, F64, seed=i, scale=0.5) for i, (k, s) in enumerate(shapes.items())}
    return Sample(inputs, dict(embed_dim=EMBED, num_heads=HEADS, batch_first=True, **options))


def _one_query(found: Tensor, _: Tensor) -> bool:
    """NaN in all features of one query, and in no other."""
    return found.isnan().sum(-1).flatten().tolist() == [EMBED] + 5 * [0]


def build_layer(spec: Spec, sample: Sample):
    inputs = dict(sample.inputs)
    layer = spec.module(**sample.options, dtype=inputs["query"].dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(inputs.pop(PARAMETERS[name]))
    return layer, inputs | dict(need_weights=False)


T = {k: torch.zeros(2, 2, 6, 4) for k in NAMES}
Q, K1, K2, V1, V2 = T.values()


def _all(f):
    return {k: f(t) for k, t in T.items()}


def _bad(error, match: str, **change) -> Bad:
    return Bad(error, match, T | change)


ERRORS = (
    _bad(TypeError, "k1 must be a Tensor, got list", k1=[1.0]),
    _bad(ValueError, r"q must have 4 dimensions .* \[2, 6, 4\]", q=Q[0]),
    _bad(ValueError, "v2 must have 4 dimensions", v2=V2[0]),
    _bad(TypeError, "q must be float32.*torch.int64", **_all(lambda t: t.long())),
    _bad(TypeError, "q must be float32", **_all(lambda t: t.cfloat())),
    _bad(TypeError, "q and v1 must have one dtype.*float64", v1=V1.double()),
    _bad(RuntimeError, "q and k2 must be on one device.*meta", k2=K2.to("meta")),
    _bad(ValueError, r"q and k1.*\[2, 2, 6, 4\] and \[1, 2, 6, 4\]", k1=K1[:1]),
    _bad(ValueError, "q and k2 must have one batch size and as", k2=K2[..., :3]),
    _bad(ValueError, "at least one feature", **_all(lambda t: t[..., :0])),
    _bad(ValueError, "q and k1 must have as many heads unless enable", q=Q[:, :1]),
    _bad(ValueError, "k1 and k2 must have as many heads", k2=K2[:, :1]),
    _bad(ValueError, "k1 and v1 must agree", v1=V1[:, :1]),
    _bad(ValueError, "the heads of q must be a multiple of those of k1",
         q=torch.zeros(2, 3, 6, 4), enable_gqa=True),
    _bad(ValueError, "k1 and v1 must agree.*length", v1=V1[:, :, 1:]),
    _bad(ValueError, "k2 and v2 must agree.*length", v2=V2[:, :, 1:]),
    _bad(ValueError, "v1 and v2 must have as many feat", v2=V2[..., :3]),
    _bad(ValueError, r"needs q_offset.*\[4, 6, 6\]", q=Q[:, :, :4], is_causal=True),
    _bad(ValueError, "needs q_offset", q=Q[:, :, :4], window=3),
    _bad(ValueError, "window must be positive.*got 0", window=(0, 3)),
    _bad(ValueError, "window must be positive.*got -2", window=(3, -2)),
    _bad(TypeError, "window must hold integers", window=(3, 2.0)),
    _bad(TypeError, "window must hold integers", window=(True, 2)),
    _bad(ValueError, "window must be one number or 2", window=(3, 2, 1)),
    _bad(TypeError, "q_offset must be an integer, got float", q_offset=1.0),
    _bad(TypeError, "is_causal must be a bool", is_causal=1),
    _bad(ValueError, "scale must be a number or 'kronecker'", scale="paper"),
    _bad(TypeError, "scale must be a number, got bool", scale=True),
    _bad(ValueError, "softcap must be finite and > 0, got 0", softcap=0),
    _bad(TypeError, "softcap must be a number, got str", softcap="30"),
    _bad(ValueError, 'method="lowrank" takes no softcap', softcap=30.0, method="lowrank"),
    _bad(TypeError, "kv_bias must be a pair of numbers, got 1.0", kv_bias=1.0),
    _bad(TypeError, "kv_bias must be a pair", kv_bias=(0.0, "1")),
    _bad(ValueError, "form must be product or determinant, got 'cross'", form="cross"),
    _bad(ValueError, "d divisible by 3, got d = 4", form="determinant"),
    _bad(ValueError, "method must be one of exact, lowrank, auto", method="fast"),
    _bad(NotImplementedError, "dropout", dropout_p=0.1),
    _bad(ValueError, "dropout_p must be between 0 and 1", dropout_p=1.5),
    _bad(TypeError, "dropout_p must be a number", dropout_p=None),
    _bad(TypeError, "mask1 must be a Tensor, got list", mask1=[True]),
    _bad(TypeError, "mask2 must be bool or floating, got torch.int64",
         mask2=torch.ones(6, 6, dtype=torch.int64)),
    _bad(ValueError, r"mask1 must broadcast to .* = \[2, 2, 6, 6\], got \[6, 7\]",
         mask1=torch.ones(6, 7)),
    _bad(ValueError, "mask1 must broadcast", mask1=torch.ones(1, 1, 1, 6, 6)),
    _bad(ValueError, "attn_mask must broad", attn_mask=torch.ones(3, 6)),
    _bad(RuntimeError, "q and mask1 must be on one device", mask1=torch.ones(6, 6, device="meta")),
)  # fmt: skip

DIFFERENTIABLE = (*NAMES, "mask1")

SPECS = (
    Spec(
        function=tensor_attention,
        samples={
            "plain": pairs,
            "lse": lambda: pairs(return_lse=True, kv_bias=(0.25, 1.0)),
            "masks": lambda: pairs(masks=True, return_lse=True),
            "window": lambda: pairs((4, 4, 4), window=(2, 3), scale="kronecker"),
            "causal": lambda: pairs((3, 4, 5), is_causal=True, q_offset=1, scale=0.75),
            "groups": lambda: pairs(heads=4, kv_heads=2, d=1, dv=2, batch=1, enable_gqa=True),
            "softcap": lambda: pairs(masks=True, return_lse=True, softcap=0.75, scale=2.0),
            "determinant": lambda: pairs(d=3, form="determinant"),
            # At such small scores a polynomial of degree 8 is the exponential.
            "low rank": lambda: small(method="lowrank", degree=8, check="none"),
        },
        reference=attention_reference,
        gradients=DIFFERENTIABLE,
        tolerances=HALF_TOLERANCES,
        autocast={BF16: BF16, F32: BF16, F64: F64},
        autocast_rounds=True,
        empty={
            "no items": Empty(lambda: pairs(batch=0), 0.0, (0, 1, 4, 2)),
            "no queries": Empty(lambda: pairs((0, 3, 3)), 0.0, (2, 1, 0, 2)),
            "no keys": Empty(lambda: pairs((4, 3, 0)), 0.0, (2, 1, 4, 2)),
        },
        compile_samples=("masks", "softcap"),
        vmap=NAMES,
        nan=dict.fromkeys(NAMES, "any"),
        large=lambda: pairs((30, 31, 29), heads=2, kv_heads=2, d=8, dv=8, return_lse=True),
        errors=ERRORS,
    ),
    Spec(
        function=of_order,
        name="tensor_attention_n",
        rounded=False,
        covers=(tensor_attention_n,),
        samples={
            "one": lambda: tuples(1, return_lse=True),
            "two": lambda: tuples(2, window=2),
            "three": lambda: tuples(3, return_lse=True, kv_bias=(0.5, 0.25)),
            "three, causal": lambda: tuples(3, is_causal=True),
            "one, softcap": lambda: tuples(1, is_causal=True, softcap=0.5),
            "three, softcap": lambda: tuples(3, return_lse=True, softcap=0.5),
        },
        reference=of_order_reference,
        gradients=("q", "k1", "v1", "k2", "v2", "k3", "v3"),
        tolerances=HALF_TOLERANCES,
        autocast={BF16: BF16, F32: BF16, F64: F64},
        autocast_rounds=True,
        compile_samples=("two",),
        vmap=("q", "k1", "v1"),
        empty={"no keys": Empty(lambda: tuples(2, 0), 0.0, (2, 1, 0, 2))},
        nan=dict.fromkeys(("q", "k1", "v1"), "any"),
        large=lambda: tuples(3, 12),
        errors=(
            Bad(ValueError, "as many, and at least one, got 2 and 1", dict(k2=torch.zeros(1))),
            Bad(ValueError, "masks must be 1, one per axis, got 2", dict(masks=[None, None])),
        ),
    ),
    Spec(
        function=multi_head,
        name="TensorAttention",
        module=pyloss.nn.TensorAttention,
        build=build_layer,
        parameters=PARAMETERS,
        samples={
            "plain": layer_sample,
            "window": lambda: layer_sample(window=2),
            "softcap": lambda: layer_sample(scale=0.75, softcap=0.5),
        },
        reference=multi_head_reference,
        gradients=LAYER_GRADIENTS,
        dtypes=(F64, F32),
        autocast={F32: BF16, F64: F64},
        autocast_rounds=True,
        batched_gradient=True,
        empty={"no items": Empty(lambda: layer_sample(batch=0), 0.0, (0, LENGTH, EMBED))},
        nan={"query": _one_query},
        large=lambda: layer_sample(batch=30),
    ),
)
