"""Cross entropy and log-probabilities of a linear layer, against the unfused references.

Chunks, strategies, memory and what the paths of the op do at their edges:
`test_linear_cross_entropy*.py`.
"""

from __future__ import annotations

import math

import torch
from linear_cross_entropy_cases import make_options
from torch import Tensor

import pyloss
from pyloss.functional import RowStats, fused_linear_cross_entropy, token_logprobs
from pyloss.reference import linear_cross_entropy as reference
from pyloss.reference import token_logprobs as logprobs_reference
from pyloss.testing import make_logits, make_target
from specs._spec import BF16, F16, F64, Bad, Empty, Sample, Spec

N, D, V = 7, 3, 5
PER_CALL = ("token_weight", "num_items")
NAMES = ("input", "linear_weight", "target", "linear_bias")
# The logits of half types are products in that type; the tight bounds are in the tests of the op.
HALF_TOLERANCES = {BF16: (0.03, 0.03), F16: (0.005, 0.005)}


def layer(lead: tuple[int, ...], bias: bool) -> dict[str, Tensor | None]:
    return dict(
        input=make_logits((*lead, D), F64, scale=1.0),
        linear_weight=make_logits((V, D), F64, seed=1, scale=1.0),
        linear_bias=make_logits((V,), F64, seed=2, scale=1.0) if bias else None,
    )


def plain(*lead: int, bias: bool = False, ignored: float = 0.0, **options) -> Sample:
    lead = lead or (N,)
    y = make_target((math.prod(lead), V), ignore_fraction=ignored).view(lead)
    return Sample(layer(lead, bias) | dict(target=y), options)


def case(name: str, **options) -> Sample:
    """A case of `row_softmax_cases`, of a layer with a bias."""
    target, kwargs = make_options(name, (N, V), F64)
    kwargs |= options
    inputs = layer((N,), True) | dict(target=target)
    return Sample(inputs | {k: kwargs.pop(k) for k in PER_CALL if k in kwargs}, kwargs)


def tempered(make, *lead: int, **options) -> Sample:
    """With a temperature of each row. What ignored ones have counts no more than all they have."""
    sample = make(*lead, ignored=0.3, **options)
    temperature = (make_logits(lead, F64, seed=5, scale=0.5).abs() + 0.5).where(
        sample.inputs["target" if make is plain else "tokens"] != -100, 0.0
    )
    return Sample({**sample.inputs, "temperature": temperature}, sample.options)


def loss_reference(input, linear_weight, target, linear_bias=None, *, shift=0, chunk=None,
                   strategy=None, **options):  # fmt: skip
    result = reference(input, linear_weight, target, linear_bias, shift=shift, **options)
    return (result[0], RowStats(**result[1])) if options.get("return_stats") else result


def build(spec: Spec, sample: Sample):
    """The layer belongs to the module."""
    inputs, options = dict(sample.inputs), dict(sample.options)
    weight, bias = inputs.pop("linear_weight"), inputs.pop("linear_bias")
    module = spec.module(D, V, bias=bias is not None, dtype=weight.dtype, **options)
    with torch.no_grad():
        module.linear.weight.copy_(weight)
        if bias is not None:
            module.linear.bias.copy_(bias)
    return module, inputs


def tokens(*lead: int, bias: bool = True, ignored: float = 0.0, **options) -> Sample:
    x = layer(lead, bias)
    y = make_target((math.prod(lead), V), ignore_fraction=ignored).view(lead)
    inputs = dict(hidden=x["input"], weight=x["linear_weight"], tokens=y, bias=x["linear_bias"])
    return Sample(inputs, options)


H, W, B = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5)
Y = torch.tensor([0, 1, 2, 4])
PROB = torch.full((4, 5), 0.2)
LAST, TWO = torch.tensor([0, 1, 2, 7]), torch.zeros(4, 2, dtype=torch.int64)
CUBE = torch.zeros(5, 2, 3)  # a K-dimensional weight
SEQ, LABELS = torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.int64)


def _bad(error, words: str, *args, **options) -> Bad:
    return Bad(error, f"(?s){words}", dict(zip(NAMES, args)) | options)


ERRORS = (
    _bad(TypeError, "input", [[1.0]], W, Y),
    _bad(TypeError, "linear_weight", H, None, Y),
    _bad(TypeError, "linear_bias", H, W, Y, 0.5),
    _bad(TypeError, "target", H, W, [0, 1, 2, 3]),
    _bad(TypeError, "target", H, W, None),
    _bad(RuntimeError, "dimensionality", torch.tensor(1.0), W, Y),
    _bad(RuntimeError, "linear_weight", H, W[0], Y),
    _bad(RuntimeError, "3 and 4", H, torch.zeros(5, 4), Y),
    _bad(RuntimeError, "linear_bias.*\\(5,\\).*\\(4,\\)", H, W, Y, torch.zeros(4)),
    _bad(RuntimeError, "linear_bias", H, W, Y, torch.zeros(5, 1)),
    _bad(RuntimeError, "dtype", H, W.bfloat16(), Y),
    _bad(RuntimeError, "dtype", H.half(), W, Y),
    _bad(RuntimeError, "dtype", H, W, Y, B.double()),
    _bad(NotImplementedError, "Long", H.long(), W.long(), Y),
    _bad(NotImplementedError, "omplex", H.to(torch.complex64), W.to(torch.complex64), Y),
    _bad(RuntimeError, "linear_weight.*device|device", H, W.to("meta"), Y),
    _bad(RuntimeError, "target is on meta", H, W, Y.to("meta")),
    _bad(RuntimeError, "batched", H[0], CUBE, Y),
    _bad(
        ValueError, "shift", H, CUBE, TWO, shift=1
    ),
    _bad(IndexError, "Target 0 is out of bounds", H, W[:0], Y),
    _bad(ValueError, "batch_size", H, W, Y[:3]),
    _bad(ValueError, "batch_size", H, W, Y[0]),
    _bad(RuntimeError, "size", H, W, TWO),
    _bad(RuntimeError, "shape", SEQ, W, LABELS[:, 1:]),
    _bad(RuntimeError, "shape", SEQ, W, LABELS.flatten()),
    _bad(RuntimeError, "Bool", H, W, Y > 1),
    _bad(RuntimeError, "Short", H, W, Y.short()),
    _bad(RuntimeError, "floating point", H, W, PROB.long()),
    _bad(RuntimeError, "probabilities", H, W, PROB[:, :4]),
    _bad(
        RuntimeError,
        "ignore_index cannot be specified when target contains probabilities",
        H,
        W,
        PROB,
        ignore_index=-100,
    ),
    _bad(ValueError, "MixUp", H, W, (Y, Y)),
    _bad((RuntimeError, ValueError), "", H, W, (Y, Y[:2], 0.5)),
    _bad(ValueError, "lam", H, W, (Y, Y, 1.5)),
    _bad(RuntimeError, "lam", H, W, (Y, Y, torch.ones(3) / 2)),
    _bad(IndexError, "Target 5", H, W, torch.tensor([0, 5, 1, 2])),
    _bad(IndexError, "Target -1", H, W, torch.tensor([0, -1, 1, 2])),
    _bad(IndexError, "Target 7 is out of bounds", H, W, LAST, chunk=3),
    _bad(
        IndexError,
        "Target 7 is out of bounds",
        H,
        W,
        LAST,
        chunk=3,
        strategy="recompute",
    ),
    _bad(
        IndexError,
        "Target 7 is out of bounds",
        H,
        W,
        LAST,
        weight=torch.ones(5),
    ),
    _bad(IndexError, "Target 7 is out of bounds", H, W, LAST, shift=1),
    _bad(IndexError, "Target 5", H, W, (Y, Y + 1, 0.5)),
    _bad(ValueError, "reduction", H, W, Y, reduction="average"),
    _bad(RuntimeError, "label_smoothing", H, W, Y, label_smoothing=1.5),
    _bad(RuntimeError, "label_smoothing", H, W, Y, label_smoothing=-0.1),
    _bad(ValueError, "tau", H, W, Y, tau=-1.0),
    _bad(ValueError, "truncate", H, W, Y, truncate=2.0),
    _bad(ValueError, "z_loss", H, W, Y, z_loss=math.nan),
    _bad(ValueError, "softcap", H, W, Y, softcap=0.0),
    _bad(ValueError, "temperature", H, W, Y, temperature=0.0),
    _bad(ValueError, "logit_scale", H, W, Y, logit_scale=math.inf),
    _bad(ValueError, "empty", H, W, Y, empty="one"),
    _bad(ValueError, "loss_dtype", H, W, Y, loss_dtype=torch.int64),
    _bad(ValueError, "num_items", H, W, Y, num_items=0),
    _bad(TypeError, "num_items", H, W, Y, num_items="4"),
    _bad(ValueError, "num_items", H, W, Y, num_items=torch.ones(2)),
    _bad(ValueError, "lsa", H, W, Y, return_stats=("lsa",)),
    _bad(TypeError, "return_stats", H, W, Y, return_stats="lse"),
    _bad(ValueError, "rank", H, W, PROB, return_stats=("rank",)),
    _bad(RuntimeError, "weight tensor", H, W, Y, weight=torch.ones(4)),
    _bad(RuntimeError, "weight", H, W, Y, weight=torch.ones(5).double()),
    _bad(RuntimeError, "differentiable", H, W, Y, weight=torch.ones(5, requires_grad=True)),
    _bad(RuntimeError, "token_w", H, W, Y, token_weight=torch.ones(3)),
    _bad(RuntimeError, "token_weight", SEQ, W, LABELS, token_weight=torch.ones(2, 3), shift=1),
    _bad(TypeError, "token_weight", H, W, Y, token_weight=[1.0] * 4),
    _bad(ValueError, "chunk", H, W, Y, chunk=0),
    _bad(ValueError, "chunk", H, W, Y, chunk=-2),
    _bad((TypeError, ValueError), "chunk", H, W, Y, chunk="many"),
    _bad(TypeError, "chunk", H, W, Y, chunk=2.5),
    _bad(TypeError, "chunk", H, W, Y, chunk=True),
    _bad(TypeError, "chunk", H, W, Y, chunk=None),
    _bad(ValueError, "strategy", H, W, Y, strategy="fast"),
    _bad((TypeError, ValueError), "strategy", H, W, Y, strategy=None),
    _bad(ValueError, "forward", H, W, Y, strategy="forward", reduction="none"),
    _bad(ValueError, "forward", H, W, Y, strategy="forward", return_stats=("lse",)),
    _bad(ValueError, "accumulate_dtype", H, W, Y, accumulate_dtype=torch.bfloat16),
    _bad((TypeError, ValueError), "accumulate_dtype", H, W, Y, accumulate_dtype="float32"),
    _bad(ValueError, "filter", H, W, Y, filter=-1.0),
    _bad(TypeError, "filter", H, W, Y, filter="auto"),
    _bad(ValueError, "shift", H, W, Y, shift=-1),
    _bad(ValueError, "shift", H, W, Y, shift=4),
    _bad(ValueError, "shift", SEQ, W, LABELS, shift=5),
    _bad(TypeError, "shift", H, W, Y, shift=True),
    _bad(TypeError, "shift", H, W, Y, shift=1.0),
    _bad(TypeError, "shift", H, W, Y, shift=None),
    _bad(ValueError, "shift", H[0], W, Y[0], shift=1),
)  # fmt: skip

SPECS = (
    Spec(
        function=fused_linear_cross_entropy,
        module=pyloss.nn.LinearCrossEntropyLoss,
        build=build,
        parameters={"linear.weight": "linear_weight", "linear.bias": "linear_bias"},
        samples={
            "plain": plain,
            "bias": lambda: plain(bias=True, ignored=0.3, reduction="sum", label_smoothing=0.125),
            "rows": lambda: plain(ignored=0.3, reduction="none", tau=1.75, z_loss=0.0625),
            "recompute": lambda: plain(bias=True, strategy="recompute", chunk=3),
            "sequences": lambda: plain(2, 4, bias=True, ignored=0.3, shift=1, temperature=0.875),
            **{
                name: lambda name=name: case(name)
                for name in ("everything", "token_weight_z", "num_items", "mixup_all", "prob_all")
            },
            "temperatures": lambda: tempered(plain, N, reduction="sum"),
            "temperatures, bias": lambda: tempered(
                plain, 2, 4, bias=True, shift=1, logit_scale=0.5, return_stats=("lse", "entropy")
            ),
            "temperatures, soft cap": lambda: tempered(
                plain,
                2,
                4,
                bias=True,
                shift=1,
                softcap=2.0,
                z_loss=0.0625,
                logit_scale=1.5,
                reduction="none",
                return_stats=("logprob", "argmax"),
            ),
            "temperature": lambda: Sample(
                {**plain(bias=True).inputs, "temperature": torch.tensor(0.7, dtype=F64)}
            ),
            "statistics": lambda: plain(
                bias=True, return_stats=("lse", "logprob", "entropy", "argmax", "correct", "rank")
            ),
        },
        reference=loss_reference,
        gradients=("input", "linear_weight", "linear_bias", "target", "temperature"),
        refused=("token_weight",),
        wide=("weight", "token_weight", "num_items", "temperature"),
        rounded=False,
        tolerances=HALF_TOLERANCES,
        autocast_rounds=True,
        empty={
            "mean": Empty(lambda: plain(0), math.nan),
            "mean, zero": Empty(lambda: plain(0, empty="zero"), 0.0),
            "none": Empty(lambda: plain(0, reduction="none"), 0.0, (0,)),
            "all ignored": Empty(lambda: plain(bias=True, ignored=1.0), math.nan),
        },
        compile_samples=("plain", "temperatures, bias"),
        vmap=("input", "target"),
        nan={"input": "all", "linear_weight": "all"},
        large=lambda: plain(600, chunk=100),
        errors=ERRORS,
    ),
    Spec(
        function=token_logprobs,
        samples={
            "plain": lambda: tokens(N, bias=False),
            "bias": lambda: tokens(N, temperature=0.7, ignored=0.3),
            "entropy": lambda: tokens(2, 4, temperature=2.5, return_entropy=True, chunk=3),
            "one row": tokens,
            "temperatures": lambda: tempered(tokens, 2, 4, bias=False, shift=1),
            "options": lambda: tokens(
                2, 4, softcap=3.0, logit_scale=0.5, shift=1, ignored=0.3, return_entropy=True
            ),
        },
        reference=lambda chunk=None, **arguments: logprobs_reference(**arguments),
        gradients=("hidden", "weight", "bias", "temperature"),
        wide=("temperature",),
        result="wide",
        rounded=False,
        tolerances=HALF_TOLERANCES,
        autocast_rounds=True,
        empty={"no tokens": Empty(lambda: tokens(0), 0.0, (0,))},
        compile_samples=("plain", "temperatures"),
        vmap=("hidden", "tokens"),
        nan={"hidden": "row"},
        large=lambda: tokens(600, chunk=100),
        errors=(
            Bad(ValueError, "temperature", dict(temperature=0.0)),
            Bad(
                ValueError,
                "temperature must be > 0, got -1.0",
                dict(temperature=torch.tensor([1.0] * 6 + [-1.0])),
            ),
            Bad(
                RuntimeError,
                r"0-d tensor or have the targets' shape \[7\], got \[3\]",
                dict(temperature=torch.ones(3)),
            ),
            Bad(
                TypeError,
                "temperature must hold numbers, got torch.bool",
                dict(temperature=torch.ones(7, dtype=torch.bool)),
            ),
            Bad(
                RuntimeError,
                "temperature is on meta",
                dict(temperature=torch.ones(7, device="meta")),
            ),
            Bad(IndexError, "Target 5 is out of bounds", dict(tokens=torch.full((N,), V))),
            Bad(ValueError, "batch_size", dict(tokens=torch.zeros(4, dtype=torch.int64))),
            Bad(TypeError, "must be a Tensor", dict(weight=None)),
        ),
    ),
)
