"""Contrastive losses: the references go row by row, over lists of what is compared with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    clip_loss,
    dcl,
    hard_info_nce,
    info_nce,
    nt_xent,
    siglip_loss,
    simple_contrastive,
    supervised_contrastive,
)
from pyloss.testing import make_logits
from specs._spec import BF16, F16, F32, F64, Bad, Empty, Sample, Spec


def units(z: Tensor, normalize: bool) -> Tensor:
    return z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12) if normalize else z


def reduced(rows: list, like: Tensor, reduction: str, counted: int | None = None) -> Tensor:
    each = torch.stack(rows) if rows else like.sum(1)
    if reduction == "none":
        return each
    count = len(rows) if counted is None else counted
    return each.sum() / (max(1, count) if reduction == "mean" else 1)


def surprise(positive: Tensor, others: list) -> Tensor:
    """-log of the share of the positive among itself and the others."""
    return -torch.stack([positive, *others]).log_softmax(0)[0]


def info_nce_reference(
    query, key, queue=None, *, temperature=0.1, target=None, ids=None, key_ids=None,
    queue_ids=None, in_batch=True, normalize=True, symmetric=False, reduction="mean",
):  # fmt: skip
    q, k = units(query, normalize), units(key, normalize)
    extra = None if queue is None else units(queue, normalize)
    key_ids = ids if key_ids is None else key_ids
    rows = []
    for i in range(len(q)):
        own = i if target is None else int(target[i])
        if own < 0:
            rows.append(q[i].sum() * 0)
            continue
        t = temperature[i] if isinstance(temperature, Tensor) and temperature.dim() else temperature
        others = []
        for j in range(len(k) if in_batch else 0):
            if j != own and (ids is None or ids[i] != key_ids[j]):
                others.append(q[i] @ k[j] / t)
        for j in range(0 if extra is None else len(extra)):
            if ids is None or ids[i] != queue_ids[j]:
                others.append(q[i] @ extra[j] / t)
        rows.append(surprise(q[i] @ k[own] / t, others))
    if symmetric:
        options = dict(temperature=temperature, ids=ids, normalize=normalize, reduction="none")
        back = info_nce_reference(key, query, **options)
        rows = [(a + b) / 2 for a, b in zip(rows, back)]
    counted = None if target is None else int((target >= 0).sum())
    return reduced(rows, query, reduction, counted)


def clip_reference(image_features, text_features, logit_scale=1 / 0.07, **options):
    options = dict(temperature=1 / logit_scale, symmetric=True) | options
    return info_nce_reference(image_features, text_features, **options)


def nt_xent_reference(z1, z2, *, temperature=0.5, normalize=True, reduction="mean"):
    n, z = len(z1), units(torch.cat([z1, z2]), normalize)
    rows = []
    for a in range(2 * n):
        p = (a + n) % (2 * n)
        others = [z[a] @ z[b] / temperature for b in range(2 * n) if b not in (a, p)]
        rows.append(surprise(z[a] @ z[p] / temperature, others))
    return reduced(rows, z1, reduction)


def supervised_reference(features, labels, *, temperature=0.1, normalize=True, reduction="mean"):
    lead, z = features.shape[:-1], units(features.reshape(-1, features.shape[-1]), normalize)
    labels = [int(y) for y in labels for _ in range(lead[1] if len(lead) == 2 else 1)]
    rows, counted = [], 0
    for a in range(len(z)):
        others = [b for b in range(len(z)) if b != a]
        logits = {b: z[a] @ z[b] / temperature for b in others}
        positives = [b for b in others if labels[b] == labels[a]]
        if not positives or len(positives) == len(others):
            rows.append(z[a].sum() * 0)
            continue
        counted += 1
        whole = torch.stack(list(logits.values())).logsumexp(0)
        rows.append(sum(whole - logits[p] for p in positives) / len(positives))
    found = reduced(rows, z, reduction, counted)
    return found.view(lead) if reduction == "none" else found


def dcl_reference(z1, z2, *, temperature=0.1, sigma=None, normalize=True, reduction="mean"):
    n, z = len(z1), units(torch.cat([z1, z2]), normalize)
    weight = [1.0] * n
    if sigma is not None:
        agreed = torch.stack([z[i] @ z[i + n] for i in range(n)]).detach()
        weight = 2 - n * torch.exp(agreed / sigma) / torch.exp(agreed / sigma).sum()
    rows = []
    for a in range(2 * n):
        p = (a + n) % (2 * n)
        others = [z[a] @ z[b] / temperature for b in range(2 * n) if b not in (a, p)]
        if not others:
            rows.append(z[a].sum() * 0)
            continue
        whole = torch.stack(others).logsumexp(0)
        rows.append(whole - weight[a % n] * (z[a] @ z[p]) / temperature)
    return reduced(rows, z1, reduction)


def hardest(q: Tensor, k: Tensor, i: int, hard_fraction: float) -> list[int]:
    """The keys of the others that are nearest; of equal ones the first."""
    others = sorted(
        (j for j in range(len(k)) if j != i), key=lambda j: -float(q[i].detach() @ k[j].detach())
    )
    return others[: math.ceil(round(hard_fraction * len(others), 9))]


def hard_reference(
    query, key, *, temperature=0.1, hard_fraction=0.1, normalize=True, reduction="mean"
):
    q, k = units(query, normalize), units(key, normalize)
    rows = []
    for i in range(len(q)):
        t = temperature[i] if isinstance(temperature, Tensor) and temperature.dim() else temperature
        others = [q[i] @ k[j] / t for j in hardest(q, k, i, hard_fraction)]
        rows.append(surprise(q[i] @ k[i] / t, others))
    return reduced(rows, query, reduction)


def simple_reference(
    query, key, *, weight=None, hard_fraction=1.0, normalize=True, reduction="mean"
):
    q, k = units(query, normalize), units(key, normalize)
    weight = 1 / max(1, len(q)) if weight is None else weight
    rows = [
        weight * sum(q[i] @ k[j] for j in hardest(q, k, i, hard_fraction)) - q[i] @ k[i]
        for i in range(len(q))
    ]
    return reduced(rows, query, reduction)


def siglip_reference(
    image_features, text_features, logit_scale=10.0, logit_bias=-10.0, *, normalize=True,
    reduction="mean",
):  # fmt: skip
    x, y = units(image_features, normalize), units(text_features, normalize)
    rows = []
    for i in range(len(x)):
        logits = [logit_scale * (x[i] @ t) + logit_bias for t in y]
        signed = torch.stack([u if i == j else -u for j, u in enumerate(logits)])
        rows.append(-torch.nn.functional.logsigmoid(signed).sum())
    return reduced(rows, image_features, reduction)


def two(first: str, second: str, rows: int = 4, width: int = 3, **options) -> Sample:
    """Two tensors of features; what is a tensor among the options is an input."""
    inputs = {
        first: make_logits((rows, width), F64),
        second: make_logits((rows, width), F64, seed=3),
    }
    inputs |= {k: v for k, v in options.items() if isinstance(v, Tensor)}
    return Sample(inputs, {k: v for k, v in options.items() if k not in inputs})


def keys(*args: int, **options) -> Sample:
    return two("query", "key", *args, **options)


def views(*args: int, **options) -> Sample:
    return two("z1", "z2", *args, **options)


def images(*args: int, **options) -> Sample:
    return two("image_features", "text_features", *args, **options)


def labelled(lead=(6,), labels=(0, 1, 0, 2, 1, 0), width: int = 3, **options) -> Sample:
    inputs = dict(
        features=make_logits((*lead, width), F64), labels=torch.tensor(labels, dtype=torch.int64)
    )
    inputs |= {k: v for k, v in options.items() if isinstance(v, Tensor)}
    return Sample(inputs, {k: v for k, v in options.items() if k not in inputs})


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def queued(*args: int, **options) -> Sample:
    return keys(*args, queue=make_logits((5, 3), F64, seed=5), **options)


ITEMS = torch.tensor([7, 8, 7, 9])
SOME = torch.linspace(0.2, 0.9, 4, dtype=F64)
Q, Z, I, L = keys().inputs, views().inputs, images().inputs, labelled().inputs


def of_module(spec: Spec, sample: Sample):
    """A tensor is given to the call, as by a model that learns it."""
    return spec.module(**sample.options), sample.inputs


def feature_errors(first: str, second: str) -> tuple[Bad, ...]:
    z = make_logits((4, 3), F32)
    return (
        Bad(TypeError, f"{first} must be a Tensor, got list", {first: [1.0]}),
        Bad(TypeError, f"{second} must be float16.*got torch.int64", {second: z.long()}),
        Bad(ValueError, rf"{first} must be \(N, D\), got \[4\]", {first: z[:, 0]}),
        Bad(ValueError, rf"{second} must have as many features as {first}, 3, got \[4, 2\]",
            {second: z[:, :2]}),
        Bad(ValueError, f"{second} must have as many rows as {first}, 4, got 3", {second: z[:3]}),
        Bad(RuntimeError, f"{second} is on meta and {first} on cpu", {second: z.to("meta")}),
    )  # fmt: skip


COMMON_ERRORS = (
    Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
    Bad(TypeError, "normalize must be a bool, got str", dict(normalize="yes")),
)
TEMPERATURE_ERRORS = (
    *COMMON_ERRORS,
    Bad(ValueError, "temperature must be finite and > 0, got 0", dict(temperature=0.0)),
    Bad(TypeError, "temperature must be a number, got str", dict(temperature="low")),
)
# Logits of a temperature of 0.1 are ten times as large, and so are their roundings. On a GPU half
# types round features of length 1; on a CPU, where they do not, `half` asks for every bit.
TOLERANCES = {F32: (1e-4, 1e-5), BF16: (8e-2, 4e-2), F16: (1e-2, 5e-3)}
SHARED = dict(
    wide=("temperature", "logit_scale", "logit_bias"), tolerances=TOLERANCES, build=of_module
)

SPECS = (
    Spec(
        function=info_nce,
        samples={
            "plain": keys,
            "temperature": lambda: keys(temperature=number(0.3), symmetric=True, reduction="sum"),
            "temperatures": lambda: keys(temperature=SOME, reduction="none"),
            "inner products": lambda: keys(temperature=0.7, normalize=False),
            "ids": lambda: keys(ids=ITEMS, symmetric=True, temperature=0.4),
            "queue": lambda: queued(temperature=0.5, reduction="none"),
            "queue with ids": lambda: queued(
                ids=ITEMS, queue_ids=torch.tensor([1, 7, 9, 2, 8]), temperature=number(0.5)
            ),
            "queue alone": lambda: queued(in_batch=False, temperature=number(0.4)),
            "queue alone with ids": lambda: queued(
                in_batch=False, ids=ITEMS, queue_ids=torch.tensor([1, 7, 9, 2, 8])
            ),
            "target": lambda: keys(target=torch.tensor([3, 0, 0, 2]), reduction="none"),
            "some without a positive": lambda: keys(
                target=torch.tensor([-1, 0, 2, -1]), temperature=number(0.4)
            ),
            "some without a positive, queue alone": lambda: queued(
                target=torch.tensor([-1, 0, 2, -1]), in_batch=False, reduction="none"
            ),
            "target with ids": lambda: keys(
                target=torch.tensor([3, 0, 0, 2]), ids=ITEMS, key_ids=torch.tensor([8, 7, 9, 7])
            ),
        },
        reference=info_nce_reference,
        gradients=("query", "key", "queue", "temperature"),
        empty={
            "no rows": Empty(lambda: keys(0), 0.0),
            "one row": Empty(lambda: keys(1), 0.0),
            "no positives": Empty(lambda: keys(target=torch.full((4,), -1)), 0.0),
            "no negatives": Empty(
                lambda: keys(ids=torch.zeros(4, dtype=torch.int64), reduction="none"), 0.0, (4,)
            ),
        },
        vmap=("query", "key"),
        nan={"query": "any", "key": "any"},
        large=lambda: keys(600, 8),
        compile_samples=("queue with ids",),
        errors=(
            *feature_errors("query", "key"),
            *TEMPERATURE_ERRORS,
            Bad((ValueError, TypeError), r"temperature must hold one number, or 4, got shape \[3\]",
                dict(temperature=torch.ones(3)), of_module="a number, got Tensor"),
            Bad(TypeError, "temperature must be floating, got torch.int64",
                dict(temperature=torch.tensor(1)),
                of_module="must be"),
            Bad(TypeError, "symmetric must be a bool, got int", dict(symmetric=1)),
            Bad(TypeError, "in_batch must be a bool, got NoneType", dict(in_batch=None)),
        ),
        module=pyloss.nn.InfoNCELoss,
        **SHARED,
    ),
    Spec(
        function=nt_xent,
        samples={
            "plain": views,
            "temperature": lambda: views(temperature=number(0.3), reduction="none"),
            "inner products": lambda: views(3, normalize=False, reduction="sum"),
        },
        reference=nt_xent_reference,
        gradients=("z1", "z2", "temperature"),
        empty={"no rows": Empty(lambda: views(0), 0.0), "one image": Empty(lambda: views(1), 0.0)},
        vmap=("z1", "z2"),
        nan={"z1": "all", "z2": "all"},
        large=lambda: views(300, 8),
        errors=(
            *feature_errors("z1", "z2"),
            *TEMPERATURE_ERRORS,
            Bad((ValueError, TypeError), r"temperature must hold one number, got shape \[4\]",
                dict(temperature=torch.ones(4)), of_module="a number, got Tensor"),
        ),
        module=pyloss.nn.NTXentLoss,
        **SHARED,
    ),
    Spec(
        function=clip_loss,
        samples={
            "plain": images,
            "scale": lambda: images(logit_scale=number(3.0), reduction="none"),
            "inner products": lambda: images(3, logit_scale=2.0, normalize=False, reduction="sum"),
        },
        reference=clip_reference,
        gradients=("image_features", "text_features", "logit_scale"),
        empty={"no rows": Empty(lambda: images(0), 0.0), "one pair": Empty(lambda: images(1), 0.0)},
        vmap=("image_features", "text_features"),
        nan={"image_features": "any", "text_features": "any"},
        large=lambda: images(600, 8),
        errors=(
            *feature_errors("image_features", "text_features"),
            *COMMON_ERRORS,
            Bad(ValueError, "logit_scale must be finite and > 0, got -1", dict(logit_scale=-1.0)),
        ),
        module=pyloss.nn.CLIPLoss,
        **SHARED,
    ),
    Spec(
        function=supervised_contrastive,
        samples={
            "plain": labelled,
            "views": lambda: labelled((3, 2), (4, 2, 4), temperature=0.4, reduction="none"),
            "temperature": lambda: labelled(temperature=number(0.3), reduction="none"),
            "inner products": lambda: labelled(normalize=False, temperature=2.0, reduction="sum"),
        },
        reference=supervised_reference,
        gradients=("features", "temperature"),
        empty={
            "no rows": Empty(lambda: labelled((0,), ()), 0.0),
            "one": Empty(lambda: labelled((1,), (0,)), 0.0),
            "one class": Empty(lambda: labelled((3,), (2, 2, 2), reduction="none"), 0.0, (3,)),
            "no positives": Empty(lambda: labelled((3,), (0, 1, 2)), 0.0),
        },
        vmap=("features",),
        nan={"features": "all"},
        large=lambda: labelled((600,), tuple(i % 7 for i in range(600)), 8),
        errors=(
            *TEMPERATURE_ERRORS,
            Bad(TypeError, "features must be a Tensor, got list", dict(features=[1.0])),
            Bad(ValueError, r"features must be \(B, D\) or \(B, V, D\), got \[6\]",
                dict(features=L["features"][:, 0])),
            Bad(TypeError, "labels must hold integers, got torch.float32",
                dict(labels=L["labels"].float())),
            Bad(ValueError, r"labels must have the shape \[6\], got \[4\]",
                dict(labels=L["labels"][:4])),
        ),
        module=pyloss.nn.SupervisedContrastiveLoss,
        **SHARED,
    ),
    Spec(
        function=dcl,
        samples={
            "plain": views,
            "temperature": lambda: views(temperature=number(0.3), reduction="none"),
            "weighted": lambda: views(sigma=0.5, temperature=0.4, reduction="sum"),
            "inner products": lambda: views(3, normalize=False),
        },
        derivative_samples=("plain", "temperature", "inner products"),  # no gradient of the weights
        reference=dcl_reference,
        gradients=("z1", "z2", "temperature"),
        empty={"no rows": Empty(lambda: views(0), 0.0), "one image": Empty(lambda: views(1), 0.0)},
        vmap=("z1", "z2"),
        nan={"z1": "all", "z2": "all"},
        large=lambda: views(300, 8),
        errors=(
            *feature_errors("z1", "z2"),
            *TEMPERATURE_ERRORS,
            Bad(ValueError, "sigma must be finite and > 0, got 0", dict(sigma=0)),
        ),
        module=pyloss.nn.DCLLoss,
        **SHARED,
    ),
    Spec(
        function=hard_info_nce,
        samples={
            "plain": lambda: keys(hard_fraction=0.6),
            "temperature": lambda: keys(temperature=number(0.3), hard_fraction=0.3),
            "temperatures": lambda: keys(temperature=SOME, hard_fraction=0.4, reduction="none"),
            "all": lambda: keys(temperature=SOME, hard_fraction=1.0, reduction="sum"),
            "inner products": lambda: keys(5, normalize=False, hard_fraction=0.5),
        },
        reference=hard_reference,
        gradients=("query", "key", "temperature"),
        empty={"no rows": Empty(lambda: keys(0), 0.0), "one row": Empty(lambda: keys(1), 0.0)},
        vmap=("query", "key"),
        nan={"query": "any", "key": "any"},
        large=lambda: keys(600, 8, hard_fraction=0.3),
        errors=(
            *feature_errors("query", "key"),
            *TEMPERATURE_ERRORS,
            Bad(ValueError, "hard_fraction must be finite and > 0, got 0", dict(hard_fraction=0)),
            Bad(ValueError, "hard_fraction must be at most 1, got 1.5", dict(hard_fraction=1.5)),
        ),
        module=pyloss.nn.HardInfoNCELoss,
        **SHARED,
    ),
    Spec(
        function=simple_contrastive,
        samples={
            "plain": keys,
            "weight": lambda: keys(weight=0.7, reduction="none"),
            "hard": lambda: keys(5, hard_fraction=0.4, reduction="sum"),
            "inner products": lambda: keys(normalize=False, hard_fraction=0.5, weight=2.0),
        },
        reference=simple_reference,
        gradients=("query", "key"),
        empty={"no rows": Empty(lambda: keys(0), 0.0)},
        vmap=("query", "key"),
        nan={"query": "any", "key": "any"},
        large=lambda: keys(600, 8, hard_fraction=0.3),
        errors=(
            *feature_errors("query", "key"),
            *COMMON_ERRORS,
            Bad(ValueError, "weight must be finite and >= 0, got -1", dict(weight=-1.0)),
            Bad(ValueError, "hard_fraction must be at most 1, got 2", dict(hard_fraction=2)),
        ),
        module=pyloss.nn.SimpleContrastiveLoss,
        same_signature=True,
        tolerances=TOLERANCES,
    ),
    Spec(
        function=siglip_loss,
        samples={
            "plain": images,
            "scale and bias": lambda: images(
                logit_scale=number(3.0), logit_bias=number(-0.5), reduction="none"
            ),
            "inner products": lambda: images(3, logit_scale=2.0, normalize=False, reduction="sum"),
        },
        reference=siglip_reference,
        gradients=("image_features", "text_features", "logit_scale", "logit_bias"),
        empty={"no rows": Empty(lambda: images(0), 0.0)},
        vmap=("image_features", "text_features"),
        nan={"image_features": "any", "text_features": "any"},
        large=lambda: images(600, 8),
        errors=(
            *feature_errors("image_features", "text_features"),
            *COMMON_ERRORS,
            Bad(ValueError, "logit_scale must be finite and > 0, got 0", dict(logit_scale=0)),
            Bad(ValueError, "logit_bias must be finite, got inf", dict(logit_bias=math.inf)),
        ),
        module=pyloss.nn.SigLIPLoss,
        **SHARED,
    ),
)  # fmt: skip
