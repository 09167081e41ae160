"""Tensor attention, its layer, and its place in transformers models."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from messages._table import Accepted, Refused, accepted, refused
from pyloss.functional import (
    tensor_attention,
    tensor_attention_cost,
    tensor_attention_error,
    tensor_attention_n,
)
from pyloss.nn import TensorAttention

Q, K1, K2, V1, V2 = T = tuple(torch.linspace(-1.0, 1.0, 5 * 48).reshape(5, 1, 2, 6, 4))
X = torch.linspace(-1.0, 1.0, 2 * 5 * 8).reshape(2, 5, 8)
LOW_RANK = dict(method="lowrank", degree=2, check="none")
BIG_NEGATIVE = torch.tensor([0.0, 0.0, 0.0, 0.0, -1e9, -1e9])
JAGGED = torch.nested.nested_tensor([torch.ones(2, 4, 4), torch.ones(3, 4, 4)], layout=torch.jagged)


def of_order(**options):
    return tensor_attention_n(Q, [K1, K2], [V1, V2], **options)


def layer(embed_dim=8, num_heads=2, **options):
    return TensorAttention(embed_dim, num_heads, batch_first=True, **options)


def called(query=X, key=X, value=X, made=None, **options):
    torch.manual_seed(0)
    return layer(**(made or {}))(query, key, value, need_weights=False, **options)[0]


def error(**options):
    return tensor_attention_error(Q, K1, K2, **options)["bound"]


def cost(shape=(1, 2, 6, 4), **options):
    return tuple(tensor_attention_cost(shape, **options))


LAYER = dict(order=2, num_kv_heads=1, window=2, scale=0.5, **LOW_RANK)
NUMPY_LAYER = dict(
    embed_dim=np.int64(8), num_heads=np.int32(2), order=np.int64(2), num_kv_heads=np.int64(1),
    window=np.int64(2), scale=np.float64(0.5), method="lowrank", degree=np.uint8(2), check="none",
    dropout=np.float32(0.0), kdim=np.int64(8), qk_norm=np.False_,
)  # fmt: skip

ROWS: tuple[Refused | Accepted, ...] = (
    # an option of low rank, where exact attention would not read it
    *(
        refused(ValueError, f'{name} is an option of method="lowrank" and "auto"', call, **option)
        for option in (
            {"degree": 3}, {"poly": "fit"}, {"tol": 0.5}, {"check": "none"}, {"logit_bound": 1.0}
        )
        for name in option
        for call in (
            lambda **o: tensor_attention(*T, **o), of_order, lambda **o: TensorAttention(4, 2, **o)
        )
    ),  # fmt: skip
    # numbers and flags of numpy
    *(
        row
        for call in (lambda **o: tensor_attention(*T, **o), of_order)
        for row in (
            accepted(call, is_causal=(np.True_, True)),
            accepted(call, window=(np.int64(2), 2)),
            accepted(call, window=((np.int32(2), None), (2, None))),
            accepted(call, window=(np.array([2, 3]), (2, 3))),
            accepted(call, is_causal=(True, True), q_offset=(np.int16(1), 1)),
            accepted(call, scale=(np.float32(0.5), 0.5)),
            accepted(call, softcap=(np.float32(0.5), 0.5)),
            accepted(call, kv_bias=((np.float64(0.5), np.int64(1)), (0.5, 1))),
            accepted(call, enable_gqa=(np.False_, False), return_lse=(np.True_, True)),
            accepted(call, **{k: (v, v) for k, v in LOW_RANK.items()} | dict(
                degree=(np.int64(2), 2), tol=(np.float32(0.5), 0.5))),
            accepted(call, method=("lowrank", "lowrank"), logit_bound=(np.float64(2.0), 2.0)),
        )
    ),
    accepted(error, degree=(np.int64(2), 2), samples=(np.int64(9), 9), window=(np.int64(2), 2)),
    accepted(cost, shape=(np.array([1, 2, 6, 4]), (1, 2, 6, 4)), is_causal=(np.True_, True)),
    accepted(cost, window=(np.int64(2), 2), rate=(np.float64(2.0), 2.0)),
    accepted(called, made=(NUMPY_LAYER, LAYER), is_causal=(np.True_, True)),
    # options
    refused(TypeError, "is_causal must be a bool or None, got str", tensor_attention, *T,
            is_causal="yes"),
    refused(TypeError, "enable_gqa must be a bool, got str", tensor_attention, *T,
            enable_gqa="yes"),
    refused(TypeError, "window must be an integer or a sequence of them, got ",
            tensor_attention, *T, window=np.float64(2.0)),
    refused(TypeError, "window must hold integers or None, got ", tensor_attention, *T,
            window=(np.True_, 2)),
    refused(TypeError, "q_offset must be an integer, got bool", tensor_attention, *T,
            q_offset=True),
    refused(TypeError, "scale must be a number, got Tensor", tensor_attention, *T,
            scale=torch.tensor(0.5)),
    refused(TypeError, "degree must be an integer or None, got 2.5 (float)", tensor_attention, *T,
            method="lowrank", degree=2.5),
    refused(TypeError, "shape must hold integers >= 0, got 6.0", cost, (1, 2, 6.0, 4)),
    refused(ValueError, "shape must hold integers >= 0, got -6", cost, (1, 2, -6, 4)),
    refused(TypeError, "shape must be a sequence of integers, got int", cost, 6),
    refused(ValueError, "rate must be finite and > 0, got 0", cost, rate=0),
    refused(ValueError, "samples must be a positive integer, got 9.0", error, samples=9.0),
    # tensors
    refused(TypeError, "q must be float32, bfloat16, float16 or float64, got torch.int64",
            tensor_attention, *(t.long() for t in T)),
    refused(TypeError, "q and k1 must have one dtype, got torch.float32 and torch.int64",
            tensor_attention, Q, K1.long(), K2, V1, V2),
    refused(TypeError, "q and v2 must have one dtype, got torch.float32 and torch.float64",
            tensor_attention, Q, K1, K2, V1, V2.double()),
    refused(TypeError, "k2 must be a Tensor, got ndarray", tensor_attention, Q, K1, K2.numpy(),
            V1, V2),
    refused(TypeError, "q must be a dense Tensor, padded and masked, got a nested one",
            tensor_attention, JAGGED.transpose(1, 2), *T[1:]),
    refused(TypeError, "k1 must be a dense Tensor, padded and masked, got one of layout torch.sp",
            tensor_attention, Q, K1.to_sparse(), *T[2:]),
    refused(TypeError, "keys must be a sequence of Tensors, got int", tensor_attention_n, Q, 2,
            [V1]),
    refused(TypeError, "attn_mask must be bool or floating, got torch.int64", tensor_attention, *T,
            attn_mask=torch.ones(6, 6).long()),
    refused(ValueError, "attn_mask must be bool, or on the CPU hold 0 and -inf only, got "
            "torch.float32 with -1e+09: where that means hidden, pass mask > -1",
            tensor_attention, *T, attn_mask=BIG_NEGATIVE, **LOW_RANK),
    refused(ValueError, "masks[1] must be bool, or on the CPU hold 0 and -inf only, got "
            "torch.float32 with -1e+09", of_order, masks=[None, BIG_NEGATIVE], **LOW_RANK),
    # the layer, when it is made
    refused(ValueError, "method must be one of exact, lowrank, auto, got 'fast'", layer,
            method="fast"),
    refused(ValueError, "poly must be one of taylor, chebyshev, fit, got 'tailor'", layer,
            poly="tailor"),
    refused(ValueError, "check must be one of warn, strict, none, got 'strickt'", layer,
            check="strickt"),
    refused(ValueError, "degree must be between 1 and 32, got 99", layer, degree=99),
    refused(ValueError, "tol must be positive, got 0.0", layer, tol=0.0),
    refused(ValueError, "logit_bound must be positive, got -1", layer, logit_bound=-1),
    refused(ValueError, "scale must be a number or 'kronecker', got 'paper'", layer, scale="paper"),
    refused(ValueError, "softcap must be finite and > 0, got -1.0", layer, softcap=-1.0),
    refused(ValueError, 'method="lowrank" takes no softcap', layer, softcap=50.0,
            method="lowrank"),
    refused(ValueError, "window must be one number or 2, got (1, 2, 3)", layer, window=(1, 2, 3)),
    refused(ValueError, "window must be positive, or -1 or None for no limit, got 0", layer,
            window=0),
    refused(TypeError, "order must be an integer, got float", layer, order=2.0),
    refused(TypeError, "num_heads must be an integer, got float", layer, num_heads=2.0),
    refused(TypeError, "embed_dim must be an integer, got str", layer, embed_dim="8"),
    refused(TypeError, "num_kv_heads must be an integer, got float", layer, num_kv_heads=1.0),
    refused(TypeError, "kdim must be an integer, got float", layer, kdim=8.0),
    refused(TypeError, "dropout must be a number, got str", layer, dropout="0"),
    refused(TypeError, "layer must be a MultiheadAttention, got Linear",
            TensorAttention.from_multihead, torch.nn.Linear(8, 8)),
    # the layer, when it is called
    refused(TypeError, "key_padding_mask must be bool (True: leave out) or floating, got "
            "torch.int64; of a tokenizer's attention_mask, pass attention_mask == 0", called,
            key_padding_mask=torch.ones(2, 5, dtype=torch.int64)),
    refused(TypeError, "key_padding_mask must be a Tensor, got list", called,
            key_padding_mask=[[True] * 5] * 2),
    refused(TypeError, "attn_mask must be bool or floating, got torch.int64", called,
            attn_mask=torch.ones(5, 5, dtype=torch.int64)),
    refused(ValueError, "a layer with a window needs query and key of one length, or "
            "is_causal=True, where the first query sees the first key, got 5 and 3", called,
            key=X[:, :3], value=X[:, :3], made=dict(window=2)),
    refused(ValueError, "key and value one length, got (batch, length) [2, 5], [2, 5], [2, 3]",
            called, value=X[:, :3]),
    refused(ValueError, "query must have 8 features, got shape [2, 5, 4]", called, X[..., :4]),
    refused(TypeError, "query must be a Tensor, got ndarray", called, X.numpy()),
    refused(ValueError, "attn_mask must be bool, or on the CPU hold 0 and -inf only, got "
            "torch.float32 with -1e+09", called, made=LOW_RANK,
            key_padding_mask=BIG_NEGATIVE[1:].expand(2, 5)),
)  # fmt: skip

if importlib.util.find_spec("transformers") is not None:
    from pyloss.integrations.transformers import convert

    def llama(**options):
        import transformers

        torch.manual_seed(0)
        sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8)
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        model = convert(transformers.LlamaForCausalLM(config).eval(), **options)
        return model, config

    def logits(**options):
        with torch.no_grad():
            return llama(**options)[0](torch.arange(6)[None]).logits

    def fresh():
        """A new model from the configuration of a converted one."""
        model, config = llama(layers="all")
        return convert(type(model)(config))

    ROWS += (
        accepted(logits, layers=(np.array([1]), [1]), window=((np.int64(2), None), (2, None))),
        accepted(logits, layers=([np.int64(-1)], [-1]), window=(np.int64(2), 2)),
        refused(TypeError, "layers must hold integers, got 1.0", logits, layers=[1.0]),
        refused(TypeError, "window must hold integers or None, got ", logits,
                window=(np.True_, 2)),
        refused(ValueError, "but it has no converted layer. If it is a new model, `del "
                "model.config.tensor_attention`, then convert it", fresh),
    )  # fmt: skip
