"""Gates: the masks of channels, the loss that foretells them, a gated convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from pyloss.functional import mask_prediction_loss, mass_topk_mask
from pyloss.nn import DynamicGate, GatedConv
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_logits(shape, F64, scale=1.0, seed=seed)


def mask_reference(act, r, *, rule="mass", min_channels=1, inclusive=False):
    rows = []
    for row in act.abs().flatten(2).amax(2) if act.dim() > 2 else act.abs():
        order = sorted(range(len(row)), key=lambda c: -row[c].item())
        kept, mass, total = [], 0.0, row.sum().item()
        for place, c in enumerate(order):
            size = row[c].item()
            if rule == "uniform":
                keep = place < len(row) - int(r * len(row)) and size > 1e-5
            elif not total:
                keep = False
            elif r == 1:
                keep = size / total > 1e-5
            else:
                before, mass = mass, mass + size / total
                keep = before < r if inclusive else mass <= r + 1e-5
            if keep or r < 0 or place < min_channels:
                kept.append(c)
        rows.append(torch.tensor([c in kept for c in range(len(row))]))
    return torch.stack(rows)


def maps(batch: int = 3, **options) -> Sample:
    act = normal(batch, 6, 2, 3).relu() * torch.linspace(0.1, 1, 6, dtype=F64)[:, None, None]
    return Sample(dict(act=act), dict(r=0.7) | options)


def mask_loss_reference(logits, masks):
    pairs = [(logits, masks)] if isinstance(logits, torch.Tensor) else list(zip(logits, masks))
    each = [F.softplus(s) - s * m.to(s) for s, m in pairs]
    return sum(e.sum() / len(e) if len(e) else e.sum() * math.nan for e in each) / len(each)


def scores(batch: int = 3, **inputs) -> Sample:
    logits = normal(batch, 4)
    return Sample(dict(logits=logits, masks=normal(batch, 4, seed=1).sigmoid()) | inputs)


def several() -> Sample:
    logits = normal(2, 3), normal(2, 5, seed=1)
    return Sample(dict(logits=logits, masks=tuple(t > 0 for t in logits)))


# Made beforehand: Dynamo makes no modules.
GATES = {size: DynamicGate(3, 5, embedding=size) for size in (None, 15)}


def gate(x, weight, bias, *, embedding=None):
    layer = GATES.get(embedding) or DynamicGate(3, 5, embedding=embedding)
    return functional_call(layer, dict(weight=weight, bias=bias), (x,))


def gate_reference(x, weight, bias, *, embedding=None):
    if embedding is None:
        pooled = x.reshape(*x.shape[:2], -1).mean(2)
    else:
        k, (h, w) = math.isqrt(embedding // x.shape[1]), x.shape[2:]
        pooled = x.reshape(-1, x.shape[1], k, h // k, k, w // k).mean((3, 5)).flatten(1)
    return pooled @ weight.t() + bias


def build_gate(spec: Spec, given: Sample):
    a = given.arguments
    layer = DynamicGate(a["x"].shape[1], 5, embedding=a.get("embedding"), dtype=a["x"].dtype)
    with torch.no_grad():
        layer.weight.copy_(a["weight"]), layer.bias.copy_(a["bias"])
    return layer, {"x": a["x"]}


def gate_sample(batch: int = 2, cells: int = 1, **options) -> Sample:
    inputs = dict(x=normal(batch, 3, 4, 4), weight=normal(5, 3 * cells**2, seed=1),
                  bias=normal(5, seed=2))  # fmt: skip
    return Sample(inputs, options)


GATE_WEIGHT, GATE_BIAS = normal(4, 2, seed=5), torch.tensor([1.0, -0.5, 0.25, 0.0]).double()


def gated_layer(mode="decoupled", ratio=0.6, train=True, **options) -> GatedConv:
    conv = nn.Conv2d(2, 4, 2, bias=False)
    return GatedConv(conv, None, nn.Softplus(), None, ratio, mode, **options).train(bool(train))


LAYER = gated_layer()


def gated(x, weight, *, train=True, **options):
    """A layer with a fixed gate: output, and the loss of its gate."""
    layer = LAYER if train and not options else gated_layer(train=train, **options)
    state = {"conv.weight": weight, "gate.weight": GATE_WEIGHT.to(x), "gate.bias": GATE_BIAS.to(x)}
    out = functional_call(layer, state, (x,))
    return out, layer.mask, layer.mask_loss() if train else layer.logits.sum()


def gated_reference(x, weight, *, mode="decoupled", ratio=0.6, train=True):
    out = F.softplus(F.conv2d(x, weight))
    seen = x.detach() if mode == "decoupled" else x
    s = seen.mean((2, 3)) @ GATE_WEIGHT.t() + GATE_BIAS
    opened = (s > 0).to(x) + s.sigmoid() - s.sigmoid().detach()
    loss = mask_loss_reference(s, mask_reference(out.detach(), ratio)) if train else s.sum()
    return out * opened[:, :, None, None], s > 0, loss


def layer_sample(batch: int = 2, **options) -> Sample:
    return Sample(dict(x=normal(batch, 2, 3, 3), weight=normal(4, 2, 2, 2, seed=3)), options)


A = maps().inputs["act"]
S = scores().inputs
SPECS = (
    Spec(
        function=mass_topk_mask,
        samples={
            "mass": maps,
            "inclusive": lambda: maps(inclusive=True, min_channels=0),
            "all of it": lambda: maps(r=1),
            "everything": lambda: maps(r=-1.0),
            "three at least": lambda: maps(r=0.0, min_channels=3),
            "uniform": lambda: maps(r=0.5, rule="uniform"),
            "numbers": lambda: Sample(dict(act=A[:, :, 0, 0]), dict(r=0.8)),
            "zeros": lambda: Sample(dict(act=0 * A), dict(r=0.9, min_channels=2)),
        },
        reference=mask_reference,
        result=torch.bool,
        autocast={},
        vmap=("act",),
        empty={"no samples": Empty(lambda: maps(0), 0, (0, 6))},
        nan={"act": lambda found, clean: found[0].all() and torch.equal(found[1:], clean[1:])},
        errors=(
            Bad(TypeError, "act must be floating", dict(act=A.long())),
            Bad(ValueError, r"act must be \(B, C, \*\), got the shape \[6\]",
                dict(act=A[0, :, 0, 0])),
            Bad(ValueError, r"act must have a pixel, got the shape \[3, 6, 0, 3\]",
                dict(act=A[:, :, :0])),
            Bad(ValueError, "r must be at most 1, got 1.5", dict(r=1.5)),
            Bad(ValueError, "r must be at most 1, got nan", dict(r=math.nan)),
            Bad(TypeError, "r must be a number, got str", dict(r="all")),
            Bad(ValueError, "rule must be one of mass, uniform, got 'top'", dict(rule="top")),
            Bad(ValueError, r"min_channels must be in \[0, 6\], got 7", dict(min_channels=7)),
            Bad(TypeError, "inclusive must be a bool, got int", dict(inclusive=1)),
        ),
    ),
    Spec(
        function=mask_prediction_loss,
        samples={"soft": scores, "masks": lambda: scores(masks=S["masks"] > 0.5),
                 "layers": several},
        derivative_samples=("soft", "masks"),
        reference=mask_loss_reference,
        result="wide",
        gradients=("logits",),
        vmap=("logits", "masks"),
        empty={"no samples": Empty(lambda: scores(0), math.nan)},
        nan={"logits": "all", "masks": "all"},
        threads=False,
        errors=(
            Bad(TypeError, "logits must be floating", dict(logits=S["logits"].long())),
            Bad(TypeError, "masks must be bool or floating, got torch.int64",
                dict(masks=S["masks"].long())),
            Bad(ValueError, r"logits must be \(B, C\) and masks of its shape, got .* and \[4\]",
                dict(masks=S["masks"][0])),
            Bad(ValueError, "of as many layers, of one or more, got 0 and 0",
                dict(logits=(), masks=())),
            Bad(ValueError, "got 1 and 2", dict(masks=[S["masks"]] * 2)),
            Bad(TypeError, "masks of layer 1 must be a Tensor, got NoneType",
                dict(logits=[S["logits"]] * 2, masks=[S["masks"], None])),
        ),
    ),
    Spec(
        function=gate,
        name="DynamicGate",
        module=DynamicGate,
        build=build_gate,
        parameters={"weight": "weight", "bias": "bias"},
        samples={"mean": gate_sample, "cells": lambda: gate_sample(cells=2, embedding=15)},
        reference=gate_reference,
        gradients=("x", "weight", "bias"),
        dtypes=(F64, F32),
        autocast={F32: torch.bfloat16, F64: F64},
        autocast_rounds=True,
        vmap=("x",),
        empty={"no samples": Empty(lambda: gate_sample(0), 0.0, (0, 5))},
        nan={"x": "row", "weight": "any", "bias": "any"},
        errors=(
            Bad(TypeError, "x must be floating", dict(x=torch.ones(2, 3, 4, 4).long())),
            Bad(ValueError, r"x must be \(B, 3, H, W\), got \[2, 3, 4\]",
                lambda a: dict(a, x=a["x"][..., 0], weight=normal(5, 12), embedding=12)),
            Bad(ValueError, "embedding must be at least 1, got 0", dict(embedding=0)),
            Bad(TypeError, "embedding must be an integer, got float", dict(embedding=1.5)),
        ),
    ),
    Spec(
        function=gated,
        name="GatedConv",
        covers=(GatedConv,),
        samples={
            "decoupled": layer_sample,
            "joint": lambda: layer_sample(mode="joint", ratio=0.4),
            "eval": lambda: layer_sample(train=False),
        },
        derivative_samples=("decoupled",),  # straight through is no derivative
        reference=gated_reference,
        gradients=("x", "weight"),
        dtypes=(F64, F32),
        autocast={F32: torch.bfloat16, F64: F64},
        autocast_rounds=True,
        empty={"no samples": Empty(lambda: layer_sample(0), 0.0, (0, 4, 2, 2))},
        nan={"x": "any", "weight": "any"},
        threads=False,
        errors=(
            Bad(ValueError, "mode must be one of decoupled, joint, got 'both'", dict(mode="both")),
            Bad(ValueError, "r must be at most 1, got 2", dict(ratio=2)),
            Bad(ValueError, r"min_channels must be in \[0, 4\], got -1", dict(min_channels=-1)),
            Bad(ValueError, "rule must be one of", dict(rule="x")),
        ),
    ),
)  # fmt: skip
