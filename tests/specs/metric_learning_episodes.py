"""Few-shot learning: the references go point by point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import icnn_loss, icnn_score, proto_triplet_loss, prototypes
from specs._embeddings import BAD_REDUCTION, BAD_X, CLASSES, LABELS, X, embeddings, reduced
from specs._spec import F32, Bad, Empty, Sample, Spec


def prototypes_reference(support, labels, num_classes):
    rows = range(len(labels))
    return torch.stack([
        torch.stack([support[i] for i in rows if labels[i] == c]).mean(0)
        for c in range(num_classes)
    ])  # fmt: skip


def shifted(x: Tensor, y: Tensor) -> Tensor:
    return (((x - y) ** 2).sum() + 1e-6).sqrt()


def proto_reference(queries, query_labels, prototypes, margin=0.5, *, reduction="mean"):
    each = []
    for q, y in zip(queries, query_labels.tolist()):
        d = [shifted(q, p) for p in prototypes]
        each.append((d[y] - min(d[:y] + d[y + 1 :]) + margin).relu())
    return reduced(torch.stack(each), reduction)


def score_reference(embeddings, labels, targets=None, target_labels=None, *, k=4, neighbours=None,
                    use_omega=False):  # fmt: skip
    own = targets is None
    t, z = (embeddings, labels) if own else (targets, target_labels)
    many = k + 2 >= len(t)
    neighbours, k = neighbours or k + 1, len(t) - 2 if many else k
    table = []
    for i in range(len(embeddings)):
        row = [(shifted(embeddings[i], t[j]), bool(labels[i] == z[j]))
               for j in range(len(t)) if not (own and i == j)]  # fmt: skip
        table.append(sorted(row, key=lambda pair: pair[0])[: max(neighbours, k)])
    largest = max([d for row in table for d, same in row[:k] if not same], default=0.0)
    zero = embeddings.sum() * 0
    within, across, all_r, all_q, hits = [], [], [], [], 0
    for row in table:
        m = min([d for d, same in row if not same], default=math.inf)
        r = [d / (m + 1e-7) for d, _ in row[:k]]
        r = [v / max(max(r), 1.0) for v in r]
        mine = [v for v, (_, same) in zip(r, row) if same]
        theirs = [d / (largest + 1e-7) for d, same in row[:k] if not same]
        hits += len(mine)
        all_r += mine
        all_q += theirs
        within += [sum(mine) / len(mine)] if mine else []
        across += [sum(theirs) / len(theirs)] if theirs else []
    lam_s = 1 - sum(within, zero) / len(within) if within else zero
    lam_d = sum(across, zero) / len(across) if across else zero + 1
    gamma = zero + (1 if many else hits / (k * len(table)))
    terms = [(lam_s + lam_d) / 2, gamma]
    if use_omega:
        terms.append(1 - sum(torch.stack(v).var(correction=0) for v in (all_r, all_q)))
    return sum(terms) / len(terms)


def icnn_reference(*args, **options):
    return -score_reference(*args, **options).log()


POINTS = torch.tensor([0, 1, 0, 1, 1, 2, 0, 2, 1])


def support(**options) -> Sample:
    # An option, so that no layout is tried in which all labels are one: a class would be missing.
    return Sample(dict(support=embeddings()), dict(labels=CLASSES, num_classes=3) | options)


def queries(**options) -> Sample:
    inputs = dict(queries=embeddings(), query_labels=CLASSES, prototypes=embeddings(3, seed=1))
    return Sample(inputs, options)


def episode(given=False, **options) -> Sample:
    inputs = dict(embeddings=embeddings(9), labels=POINTS, targets=None, target_labels=None)
    if given:
        inputs |= dict(targets=embeddings(7, seed=1), target_labels=POINTS[:7])
    return Sample(inputs, options)


def icnn(function, reference, module, empty: dict, **fields) -> Spec:
    return Spec(
        function=function,
        reference=reference,
        module=module,
        same_signature=module is not None,
        samples={
            "plain": episode,
            "few": lambda: episode(k=2, use_omega=True),
            "targets": lambda: episode(given=True, k=3, neighbours=5),
            "all": lambda: episode(k=8),
        },
        gradients=("embeddings", "targets"),
        empty={
            "no rows": Empty(lambda: episode(given=True).replace(
                dict(embeddings=embeddings(0), labels=POINTS[:0])), math.nan),
            "one class": Empty(lambda: episode().replace(dict(labels=0 * POINTS)), empty["class"]),
            **fields.pop("more", {}),
        },
        # What is mapped over takes its neighbours by torch's gather, as one alone does.
        vmap=("embeddings",),
        nan={"embeddings": "all"},
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            *BAD_X,
            Bad(TypeError, "labels must hold integers", dict(labels=embeddings(9)[:, 0])),
            Bad(ValueError, r"labels must have the shape \[9\], got \[6\]", dict(labels=LABELS)),
            Bad(ValueError, "give both targets and target_labels", dict(targets=X)),
            Bad(ValueError, "targets must be torch.float32 with 3 features as embeddings",
                dict(targets=X, target_labels=LABELS)),
            Bad(ValueError, r"target_labels must have the shape \[6\], got \[5\]",
                dict(targets=X.float(), target_labels=LABELS[:5])),
            Bad(ValueError, r"targets must hold at least 3 rows, got \[2, 3\]",
                dict(targets=X[:2].float(), target_labels=LABELS[:2])),
            Bad(ValueError, r"embeddings must hold at least 3 rows, got \[2, 3\]",
                dict(embeddings=X[:2], labels=LABELS[:2])),
            Bad(ValueError, "k must be at least 1, got 0", dict(k=0)),
            Bad(TypeError, "k must be an integer, got float", dict(k=2.0)),
            Bad(ValueError, "neighbours must be at least k = 4, got 3", dict(neighbours=3)),
            Bad(TypeError, "use_omega must be a bool", dict(use_omega=1.0)),
        ),
        **fields,
    )  # fmt: skip


SPECS = (
    Spec(
        function=prototypes,
        reference=prototypes_reference,
        samples={"plain": support},
        gradients=("support",),
        autocast={},
        empty={"no features": Empty(lambda: support().map(lambda _, t: t[:, :0]), 0.0, (3, 0))},
        vmap=("support",),
        nan={"support": lambda found, clean: bool(found[:, 0].isnan().all())
             and torch.equal(found[:, 1:], clean[:, 1:])},
        errors=(
            Bad(TypeError, "support must be floating", dict(support=LABELS)),
            Bad(TypeError, "labels must hold integers", dict(labels=X[:, 0])),
            Bad(ValueError, r"labels must have the shape \[6\], got \[5\]",
                dict(labels=LABELS[:5])),
            Bad(IndexError, r"labels must be in \[0, 1\], got 2", dict(num_classes=2)),
            Bad(ValueError, "labels must name every class, but class 3", dict(num_classes=5)),
            Bad(ValueError, "num_classes must be at least 1", dict(num_classes=0)),
            Bad(TypeError, "num_classes must be an integer", dict(num_classes=3.0)),
        ),
    ),
    Spec(
        function=proto_triplet_loss,
        reference=proto_reference,
        module=pyloss.nn.ProtoTripletLoss,
        same_signature=True,
        samples={
            "plain": queries,
            "margin": lambda: queries(margin=1.5, reduction="none"),
            "sum": lambda: queries(margin=0.0, reduction="sum"),
        },
        gradients=("queries", "prototypes"),
        empty={"no queries": Empty(lambda: queries().replace(
            dict(queries=embeddings(0), query_labels=CLASSES[:0])), math.nan)},
        vmap=("queries", "prototypes"),
        nan={"queries": "all", "prototypes": "any"},
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            Bad(TypeError, "queries must be floating", dict(queries=LABELS)),
            Bad(ValueError, r"query_labels must have the shape \[6\]",
                dict(query_labels=LABELS[:5])),
            Bad(IndexError, r"query_labels must be in \[0, 2\], got 3",
                dict(query_labels=CLASSES + 1)),
            Bad(ValueError, "prototypes must hold at least 2 rows", dict(prototypes=X[:1])),
            Bad(ValueError, "prototypes must be torch.float32 with 3 features as queries",
                dict(prototypes=X)),
            Bad(RuntimeError, "same device, but prototypes", dict(prototypes=X.float().to("meta"))),
            Bad(ValueError, "margin must be finite and >= 0", dict(margin=-1.0)),
            BAD_REDUCTION,
        ),
    ),
    icnn(icnn_score, score_reference, None, {"class": 1.0}),
    icnn(
        icnn_loss, icnn_reference, pyloss.nn.ICNNLoss, {"class": 0.0},
        more={"no pair": Empty(
            lambda: episode().replace(dict(labels=torch.arange(9))), 0.0)},
    ),
)  # fmt: skip
