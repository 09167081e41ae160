"""Cross entropy of the k largest: the reference forms all columns of P that it needs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import pyloss
from pyloss.functional import topk_cross_entropy
from pyloss.reference import permutahedron_projection, sorting_network_apply
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

P_K = (0.25, 0.0, 0.75)


def last_columns(z, k, sorter, steepness, distribution, art_lambda):
    """(rows, classes, k): how much of a class is at each of the last k ranks, the last the top."""
    n = z.shape[1]
    if sorter == "neuralsort":  # by its formula, for the ranks 1, 2, ... from the top
        rank = torch.arange(1, k + 1, dtype=z.dtype)
        spread = (z.unsqueeze(2) - z.unsqueeze(1)).abs().sum(2)
        rows = (n + 1 - 2 * rank).view(1, -1, 1) * z.unsqueeze(1) - spread.unsqueeze(1)
        return (rows * steepness).softmax(-1).flip(1).mT
    if sorter == "softsort":
        top = z.sort(1, descending=True).values[:, :k]
        rows = -(top.unsqueeze(2) - z.unsqueeze(1)).abs() * steepness
        return rows.softmax(-1).flip(1).mT
    columns = torch.eye(n, dtype=z.dtype)[:, n - k :]
    of_k = k if sorter == "splitter_selection" else 0
    return sorting_network_apply(
        z, columns, False, sorter, distribution, steepness, art_lambda, of_k
    )


def reference(
    input, target, p_k=(0.5, 0.0, 0.0, 0.0, 0.5), m=None, top1_mode="sm", *,
    sorter="splitter_selection", steepness=1.0, distribution="cauchy", art_lambda=0.25,
    ignore_index=-100, reduction="mean",
):  # fmt: skip
    """As the paper's code goes: one S_k after the other."""
    p_k = [float(i == p_k - 1) for i in range(p_k)] if isinstance(p_k, int) else list(p_k)
    classes = min(1, input.dim() - 1)
    z = input.movedim(classes, -1).flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    lead = input.movedim(classes, -1).shape[:-1]
    if target.is_floating_point():
        y = target.movedim(classes, -1).reshape(z.shape)
        counted = torch.ones(len(z), dtype=z.dtype)
    else:
        labels = target.flatten()
        counted = (labels != ignore_index).to(z.dtype)
        labels = torch.where(counted > 0, labels, 0)
        if m is not None:
            kept = []
            for row, label in zip(z, labels):
                others = torch.cat([row[:label], row[label + 1 :]]).sort(descending=True).values
                kept.append(torch.cat([row[label : label + 1], others[: m - 1]]))
            z, labels = torch.stack(kept), torch.zeros_like(labels)
        y = F.one_hot(labels, z.shape[1]).to(z.dtype)
    if sorter == "permutahedron":
        rank = permutahedron_projection(-z, rank=True, strength=1 / steepness)
        s = [(k + 1 - rank).clamp(0, 1) for k in range(1, len(p_k) + 1)]
    else:
        last = last_columns(z, len(p_k), sorter, steepness, distribution, art_lambda)
        s = [last[:, :, -k:].sum(-1) for k in range(1, len(p_k) + 1)]
    t = sum(p * s_k for p, s_k in list(zip(p_k, s))[1:]) + torch.zeros_like(z)
    if top1_mode == "sm":
        t = t + p_k[0] * z.softmax(-1)
    if top1_mode == "sort":
        t = t + p_k[0] * s[0]
    each = -(y * torch.log(t * (1 - 2e-7) + 1e-7)).sum(-1)
    if top1_mode == "smce":
        top1 = -(y * z.log_softmax(-1)).sum(-1)
        each = p_k[0] * top1 + sum(p_k[1:]) * each
    each = each * counted
    if reduction == "none":
        return each.reshape(lead)
    return each.sum() / (counted.sum() if reduction == "mean" else 1)


LABELS = torch.tensor([0, 4, 3])


def logits(*shape: int, target=LABELS, **options) -> Sample:
    z = make_logits(shape or (3, 6), F64, scale=0.7)
    return Sample(dict(input=z, target=target), dict(p_k=P_K) | options)


def several(**options) -> Sample:
    weights = torch.tensor([[1.0, 0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]])
    return logits(target=weights.to(F64), **options)


SORTERS = ("auto", "bitonic", "odd_even", "batcher", "neuralsort", "softsort")
X = logits().inputs["input"]
ERRORS = (
    Bad(ValueError, "sorter must be one of auto,.*permutahedron; got 'quick'",
        dict(sorter="quick")),
    Bad(NotImplementedError, "got 'quick'", dict(sorter="quick")),
    Bad(ValueError, "distribution must be one of", dict(distribution="normal")),
    Bad(ValueError, "steepness must be positive", dict(steepness=0.0)),
    Bad(TypeError, "steepness must be a number, got Tensor", dict(steepness=torch.tensor(1.0))),
    Bad(ValueError, "art_lambda must be in", dict(art_lambda=1.0)),
    Bad(ValueError, "top1_mode must be one of sm, smce, sort; got 'top'", dict(top1_mode="top")),
    Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
    Bad(ValueError, r"p_k must sum to 1, got \[0.5\], which sum to 0.5", dict(p_k=[0.5])),
    Bad(ValueError, "p_k must be finite and >= 0, got -1", dict(p_k=[2.0, -1.0])),
    Bad(ValueError, "p_k must be at least 1 as one k, got 0", dict(p_k=0)),
    Bad(TypeError, "p_k must be the shares.*got float", dict(p_k=0.5)),
    Bad(ValueError, "p_k has shares up to k = 7, of 6 classes", dict(p_k=7),
        of_module="n must be at least 7"),
    Bad(ValueError, "m must be above 3.*got 3", dict(m=3)),
    Bad(TypeError, "m must be an integer, got float", dict(m=4.0)),
    Bad(ValueError, "m must be below the number of classes, 6, got 6", dict(m=6),
        of_module="n must be at least 7"),
    Bad(TypeError, "ignore_index must be an integer, got NoneType", dict(ignore_index=None)),
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0]), of_module="input must be a Tensor"),
    Bad(TypeError, "input must be floating", dict(input=X.long())),
    Bad(ValueError, "dimension of classes", dict(input=X[0, 0]), of_module="input must hold 6"),
    Bad(TypeError, "target must be a Tensor", dict(target=[0, 4, 3])),
    Bad(TypeError, "target must hold classes.*bool", dict(target=LABELS > 3)),
    Bad(ValueError, r"target must have the shape \[3\].*got \[2\]", dict(target=LABELS[:2])),
    Bad(ValueError, r"target must have the shape \[3, 6\].*got \[3\]",
        dict(target=LABELS.double())),
    Bad(ValueError, "m takes one label for each row", dict(target=X.clone(), m=4)),
    Bad(IndexError, "Target 6 is out of bounds", dict(target=torch.tensor([0, 6, 3]))),
    Bad(RuntimeError, "same device, but target is on meta", dict(target=LABELS.to("meta"))),
)  # fmt: skip


def _build(spec, sample):
    options = dict(sample.options)
    options["diffsort_method"] = options.pop("sorter", "splitter_selection")
    options["inverse_temperature"] = options.pop("steepness", 1.0)
    scores = sample.inputs["input"]
    bare = not isinstance(scores, torch.Tensor) or scores.dim() == 0
    options["n"] = 6 if bare else scores.shape[min(1, scores.dim() - 1)]
    return spec.module(**options), sample.inputs


SPECS = (
    Spec(
        function=topk_cross_entropy,
        samples={
            "plain": logits,
            **{name: lambda name=name: logits(sorter=name, steepness=2.0) for name in SORTERS},
            "permutahedron": lambda: logits(sorter="permutahedron", steepness=0.5),
            "logistic_phi": lambda: logits(distribution="logistic_phi", art_lambda=0.5),
            "sort": lambda: logits(top1_mode="sort", reduction="sum"),
            "smce": lambda: logits(top1_mode="smce", reduction="none"),
            "smce, m": lambda: logits(top1_mode="smce", m=4),
            "m": lambda: logits(m=5),
            "one k": lambda: logits(p_k=2),
            "one row": lambda: logits(6, target=torch.tensor(2), reduction="none"),
            "pixels": lambda: logits(2, 5, 3, target=torch.tensor([[1, 0, 4], [2, 2, -100]])),
            "ignored": lambda: logits(target=torch.tensor([7, 4, 3]), ignore_index=7, m=4),
            "several": several,
            "several, smce": lambda: several(top1_mode="smce", sorter="odd_even"),
        },
        reference=reference,
        gradients=("input", "target"),
        empty={
            "no rows": Empty(lambda: logits(0, 6, target=LABELS[:0]), math.nan),
            "none counts": Empty(lambda: logits(target=torch.full((3,), -100)), math.nan),
        },
        vmap=("input", "target"),
        nan={"input": "any"},
        large=lambda: logits(700, 60, target=torch.arange(700) % 60),
        tolerances={F32: (1e-4, 1e-6)},
        errors=ERRORS,
        module=pyloss.nn.TopKCrossEntropyLoss,
        build=_build,
    ),
)
