"""Sorting, ranking and selecting by networks, the losses and the metric made of them.

The reference multiplies the layers of the network out; losses are written on its matrix. What the
kernels do at sizes and edges, and the peers: `test_sorting_*.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    soft_argsort,
    soft_permutation,
    soft_permute,
    soft_rank,
    soft_sort,
    soft_topk,
    sorting_cross_entropy,
    spearman_loss,
)
from pyloss.metrics import RankingAccuracy, ranking_accuracy
from pyloss.reference import sorting_network_apply, sorting_network_permutation
from pyloss.testing import make_logits
from specs import permutahedron
from specs._spec import F32, F64, HALF, Bad, Empty, Sample, Spec

# --------------------------------------------------------------------------------------------------
# References


def _straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    return hard.to(soft.dtype) + soft - soft.detach()


def _matrix(x, dim=-1, descending=False, *, network="auto", distribution="cauchy", steepness=10.0,
            art_lambda=0.25, hard=False):  # fmt: skip
    """(x with dim last, ascending in what the network sorts; the sign; P)."""
    sign = -1 if descending else 1
    rows = sign * x.movedim(dim, -1)
    if isinstance(steepness, Tensor):
        steepness = steepness.unsqueeze(-1)
    _, p = sorting_network_permutation(rows, network, distribution, steepness, art_lambda)
    if hard:
        ranks = rows.argsort(dim=-1, stable=True).argsort(-1)
        p = _straight_through(p, torch.nn.functional.one_hot(ranks, rows.shape[-1]))
    return rows, sign, p


def _of_rows(p: Tensor, v: Tensor) -> Tensor:
    return (p * v.unsqueeze(-1)).sum(-2)


def sort_reference(x, dim=-1, descending=False, *, return_permutation=False, hard=False, **options):
    if options.pop("method", "network") == "permutahedron":
        return permutahedron.reference(x, rank=False, dim=dim, descending=descending, **options)
    rows, sign, p = _matrix(x, dim, descending, **options)
    y = _of_rows(p, rows)
    if hard:
        y = _straight_through(y, rows.detach().sort(-1).values)
        p = _matrix(x, dim, descending, hard=True, **options)[2]
    y = (sign * y).movedim(-1, dim)
    return (y, p) if return_permutation else y


def rank_reference(x, dim=-1, descending=False, *, base=1, hard=False, **options):
    if options.pop("method", "network") == "permutahedron":
        found = permutahedron.reference(x, rank=True, dim=dim, descending=descending, **options)
        return found - 1 + base
    ties = options.pop("ties", "stable")
    rows, _, p = _matrix(x, dim, descending, hard=hard, **options)
    place = torch.arange(rows.shape[-1], dtype=rows.dtype)
    r = p @ place + base
    if ties == "share":
        same = (rows.unsqueeze(-1) == rows.unsqueeze(-2)).to(r.dtype)
        r = (same / same.sum(-1, keepdim=True) @ r.unsqueeze(-1)).squeeze(-1)
    return r.movedim(-1, dim)


def argsort_reference(x, dim=-1, descending=False, **options):
    rows, _, p = _matrix(x, dim, descending, **options)
    place = torch.arange(rows.shape[-1], dtype=rows.dtype)
    return _of_rows(p, place.expand_as(rows)).movedim(-1, dim)


def permute_reference(x, feats, dim=-1, descending=False, *, hard=False, **options):
    soft = _matrix(x, dim, descending, **options)[2].mT @ feats
    if not hard:
        return soft
    exact = _matrix(x, dim, descending, hard=True, **options)[2]
    return _straight_through(soft, (exact.mT @ feats).detach())


def topk_reference(x, k, dim=-1, largest=True, *, network="auto", distribution="cauchy",
                   steepness=10.0, art_lambda=0.25, hard=False):  # fmt: skip
    rows = (1 if largest else -1) * x.movedim(dim, -1)
    n = rows.shape[-1]
    columns = torch.eye(n, dtype=rows.dtype).flip(-1)[:, :k]
    of_k = k if network == "splitter_selection" else 0
    soft = sorting_network_apply(
        rows, columns, False, network, distribution, steepness, art_lambda, of_k
    )
    if not hard:
        return soft
    ranks = rows.argsort(dim=-1, stable=True).argsort(-1)
    return _straight_through(soft, torch.nn.functional.one_hot(ranks, n).double() @ columns)


def cross_entropy_reference(
    x, target, kind="bce", target_is="values", reduction="mean", *, dim=-1, descending=False,
    ties="stable", validate=False, base=0, **options,
):  # fmt: skip
    rows, sign, p = _matrix(x, dim, descending, **options)
    n = rows.shape[-1]
    if target_is == "permutation":
        q = target.to(p.dtype)
    elif target_is == "ranks":
        q = torch.nn.functional.one_hot(target.movedim(dim, -1).long() - base, n).to(p.dtype)
    else:
        t = sign * target.movedim(dim, -1)
        ranks = t.argsort(dim=-1, stable=True).argsort(-1)
        q = torch.nn.functional.one_hot(ranks, n).to(p.dtype)
        if ties == "share":
            same = (t.unsqueeze(-1) == t.unsqueeze(-2)).to(p.dtype)
            q = same @ q / same.sum(-1, keepdim=True)
    if kind == "bce":
        each = torch.nn.functional.binary_cross_entropy(p, q, reduction="none").mean((-2, -1))
    else:
        each = -(q * p.clamp(min=1e-30).log()).sum((-2, -1)) / n
    return each if reduction == "none" else getattr(each, reduction)()


def spearman_reference(x, target, reduction="mean", *, dim=-1, **options):
    if options.get("method") != "permutahedron":
        options = dict(ties="share") | options
    r = rank_reference(x, dim, **options).movedim(dim, -1).flatten(0, -2)
    t = target.movedim(dim, -1).flatten(0, -2)
    mean_rank = (t.unsqueeze(2) > t.unsqueeze(1)).sum(2) + (t.unsqueeze(2) >= t.unsqueeze(1)).sum(2)
    each = [1 - torch.corrcoef(torch.stack([a, b.to(a.dtype)]))[0, 1] for a, b in zip(r, mean_rank)]
    each = torch.stack(each).view(x.movedim(dim, -1).shape[:-1])
    return each if reduction == "none" else getattr(each, reduction)()


def accuracy_reference(input, target, dim=-1):
    pairs = list(zip(input.movedim(dim, -1).flatten(0, -2), target.movedim(dim, -1).flatten(0, -2)))

    def right(n: int) -> Tensor:
        ranks = [[v[:n].argsort(stable=True).argsort() for v in pair] for pair in pairs]
        return torch.stack([a == b for a, b in ranks])

    whole, five = right(input.shape[dim]), right(5).all(1).double().mean()
    five = five if input.shape[dim] >= 5 else five * math.nan
    return RankingAccuracy(whole.all(1).double().mean(), whole.double().mean(), five)


# --------------------------------------------------------------------------------------------------
# Samples and errors

NETWORKS = {
    "plain": {},
    "logistic": dict(distribution="logistic", network="batcher", steepness=3.0),
    "logistic_phi": dict(distribution="logistic_phi", network="odd_even", art_lambda=0.375),
    "gaussian": dict(distribution="gaussian", network="bitonic", steepness=2.0),
    "reciprocal": dict(distribution="reciprocal"),
    "optimal": dict(distribution="optimal", network="odd_even", steepness=1.5),
}


def scores(*shape: int, **options) -> Sample:
    """Near each other, as relaxations want them."""
    return Sample(dict(x=make_logits(shape or (2, 5), F64, scale=0.3)), options)


def tied(**options) -> Sample:
    x = scores(3, 6)
    return Sample(dict(x=(4 * x.inputs["x"]).round() / 4), options)


def with_steepness(**options) -> Sample:
    x = scores(**options)
    return Sample({**x.inputs, "steepness": torch.tensor([2.0, 0.75], dtype=F64)}, x.options)


def with_target(*shape: int, ties: bool = False, **options) -> Sample:
    x = scores(*shape)
    target = make_logits(shape or (2, 5), F64, seed=3)
    return Sample({**x.inputs, "target": target.round() if ties else target}, options)


def with_feats(*lead: int, **options) -> Sample:
    x = scores(**options)
    return Sample({**x.inputs, "feats": make_logits((*lead, 5, 3), F64, seed=3)}, x.options)


RANKS = torch.tensor([[0, 4, 1, 2, 3], [3, 1, 0, 2, 4]])
Q = torch.nn.functional.one_hot(RANKS, 5)
X = make_logits((2, 5))


def variants(make=scores, **options) -> dict:
    return {
        name: lambda network=network: make(**network, **options)
        for name, network in NETWORKS.items()
    } | {
        "dim": lambda: make(2, 4, 3, dim=1, **options),
    }


X_ERRORS = (
    Bad(TypeError, "x must be a Tensor, got list", dict(x=[1.0])),
    Bad(ValueError, "one dimension.*0-d", dict(x=torch.tensor(1.0))),
    Bad(TypeError, r"x must be float.*int64.*\[2, 5\]", dict(x=X.long())),
    Bad(TypeError, "x must be .*complex64", dict(x=X.cfloat())),
    Bad(TypeError, "x must be a dense Tensor, got one of layout torch.sparse_coo",
        dict(x=X.to_sparse())),
    Bad(TypeError, "dim must be an integer, got float", dict(dim=1.0)),
    Bad(TypeError, "dim must be an integer, got NoneType", dict(dim=None)),
    Bad(IndexError, r"\[-2, 1\], but got 2", dict(dim=2)),
    Bad(ValueError, "network must be one of auto, bitonic, odd_even, batcher.*; got 'bubble'",
        dict(network="bubble")),
    Bad(ValueError, "distribution must be one of logistic, .*optimal; got 'normal'",
        dict(distribution="normal")),
    Bad(NotImplementedError, "got 'normal'", dict(distribution="normal")),
    Bad(ValueError, "steepness must be posit", dict(steepness=0)),
    Bad(ValueError, r"at most 1e\+30, got 1e\+31", dict(steepness=1e31)),
    Bad(ValueError, "steepness.*nan", dict(steepness=math.nan)),
    Bad(ValueError, "steepness.*inf", dict(steepness=math.inf)),
    Bad(TypeError, "steepness must be a number.*str", dict(steepness="10")),
    Bad(ValueError, r"steepness of shape \[4\] does not broadcast to the shape \[2\]",
        dict(steepness=torch.ones(4))),
    Bad(TypeError, "steepness must be", dict(steepness=torch.tensor(1))),
    Bad(ValueError, r"in \[0, 1\), got 1", dict(art_lambda=1.0)),
    Bad(ValueError, "art_lambda", dict(art_lambda=math.nan)),
)  # fmt: skip
NOTHING = (
    Bad(ValueError, r"nothing to sort.*\[2, 0\]", dict(x=X[:, :0])),
    Bad(ValueError, "nothing to sort along dim 0", dict(x=X[:0], dim=0)),
)
NO_SELECTOR = Bad(ValueError, "network must be one", dict(network="splitter_selection"))
TARGET_ERRORS = (
    Bad(ValueError, "reduction must be one of none", dict(reduction="avg")),
    Bad(TypeError, "target must be a Tensor", dict(target=[1])),
    Bad(ValueError, r"target must have the shape \[2, 5\] with target_is='values', got \[2, 3\]",
        dict(target=X[:, :3])),
    Bad(ValueError, "real values.*complex64", dict(target=X.cfloat())),
    Bad(TypeError, "target must be a dense Tensor", dict(target=X.to_sparse())),
    Bad(ValueError, "target is on meta", dict(target=X.to("meta"))),
)  # fmt: skip


def network_spec(**fields) -> Spec:
    return Spec(
        **dict(
            gradients=("x", "steepness"),
            # Of the steepness: a sum of terms that cancel.
            tolerances={F32: (1e-4, 1e-6)},
            empty={"no rows": Empty(lambda: scores(0, 5), 0.0, (0, 5))},
            vmap=("x",),
            nan={"x": "row"},
            large=lambda: scores(300, 60),
            errors=(*X_ERRORS, NO_SELECTOR),
        )
        | fields
    )


def soft(samples: dict) -> tuple[str, ...]:
    """No finite difference agrees with the gradient of a hard result, or sees equal values."""
    return tuple(k for k in samples if k not in ("hard", "shared ties", "tied scores"))


COMMON = {
    **variants(),
    "steepness": with_steepness,
    "steepness, phi": lambda: with_steepness(distribution="logistic_phi"),
    "descending": lambda: scores(2, 6, descending=True, network="bitonic"),
    "hard": lambda: scores(hard=True, descending=True),
}
PERMUTAHEDRON = {
    "permutahedron": lambda: scores(method="permutahedron", regularization_strength=0.25),
    "permutahedron, kl": lambda: scores(
        4, 2, dim=0, descending=True, method="permutahedron", regularization="kl"
    ),
}
METHOD_ERRORS = (
    Bad(ValueError, "method must be one of", dict(method="optimal")),
    Bad(ValueError, "hard", dict(method="permutahedron", hard=True)),
    Bad(ValueError, "regularization", dict(method="permutahedron", regularization="l1")),
    *(
        Bad(ValueError, f"{name} is an option of method='permutahedron'.*'network'", {name: value})
        for name, value in (("regularization", "kl"), ("regularization_strength", 0.1))
    ),
    *(
        Bad(
            ValueError,
            f"{name} is an option of method='network'.*'permutahedron'",
            {"method": "permutahedron", name: value},
        )
        for name, value in (
            ("network", "odd_even"),
            ("distribution", "gaussian"),
            ("steepness", 3),
            ("steepness", torch.tensor(10.0)),
            ("art_lambda", 0.5),
        )
    ),
)
SORT = {
    **COMMON,
    **PERMUTAHEDRON,
    "both": lambda: scores(return_permutation=True),
    "both, steepness": lambda: with_steepness(return_permutation=True, descending=True),
}
RANK = {
    **COMMON,
    **PERMUTAHEDRON,
    "base": lambda: scores(base=0),
    "shared ties": lambda: tied(ties="share"),
}
TOPK = {
    **variants(k=2),
    "smallest": lambda: scores(k=3, largest=False),
    "splitter": lambda: scores(k=2, network="splitter_selection"),
    "hard": lambda: scores(k=2, hard=True),
}
PERMUTE = {
    **{name: lambda o=o: with_feats(2, **o) for name, o in NETWORKS.items()},
    "shared features": lambda: with_feats(descending=True),
    "hard": lambda: with_feats(2, hard=True),
}
CROSS_ENTROPY = {
    **variants(with_target),
    "row_ce": lambda: with_target(kind="row_ce", reduction="sum"),
    "col_ce, shared": lambda: with_target(ties=True, kind="col_ce").replace(dict(ties="share")),
    "descending": lambda: with_target(reduction="none", descending=True),
    "ranks": lambda: Sample({**scores().inputs, "target": RANKS},
                            dict(target_is="ranks", validate=True)),
    "ranks from 1": lambda: Sample({**scores().inputs, "target": RANKS + 1},
                                   dict(target_is="ranks", base=1)),
    "permutation": lambda: Sample({**scores().inputs, "target": Q},
                                  dict(target_is="permutation", validate=True)),
}  # fmt: skip

SPEARMAN = {
    **variants(with_target),
    "ties": lambda: with_target(3, 4, ties=True, reduction="none"),
    "tied scores": lambda: with_target(3, 6, ties=True).replace(
        dict(x=tied().inputs["x"], reduction="none")
    ),
    "tied scores, stable": lambda: with_target(3, 6).replace(
        dict(x=tied().inputs["x"], ties="stable")
    ),
    "permutahedron": lambda: with_target(
        reduction="sum", method="permutahedron", regularization_strength=0.375
    ),
}


def accuracy_sample(*shape: int, **options) -> Sample:
    """Scores of which some orders are right, some nearly."""
    target = make_logits(shape, F64, scale=1.0)
    scores = (4 * target).round()
    scores[:1] = target[:1]
    return Sample(dict(input=scores, target=target), options)


# The modules that stand in for those of the diffsort package.


def diff_sort_net(vectors, sorting_network_type, size, **options):
    return soft_sort(vectors, network=sorting_network_type, return_permutation=True, **options)


def diff_topk_net(vectors, sorting_network_type, size, k, **options):
    return soft_topk(vectors, k, network=sorting_network_type, **options).flip(-1)


NET_ERRORS = (
    Bad(ValueError, "network must be one", dict(sorting_network_type="bubble")),
    Bad(NotImplementedError, "network must be one", dict(sorting_network_type="bubble")),
    Bad(ValueError, "steepness must be posit", dict(steepness=0)),
    Bad(TypeError, "int64", dict(vectors=X.long())),
    Bad(TypeError, "x must be a Tensor", dict(vectors=[X]), of_module="vectors must be"),
)


def net(kind: str = "odd_even", rows: int = 2, **options) -> Sample:
    options = dict(sorting_network_type=kind, size=5, **options)
    return Sample(dict(vectors=scores(rows, 5).inputs["x"]), options)


SPECS = (
    network_spec(
        function=soft_sort,
        samples=SORT,
        derivative_samples=soft(SORT),
        reference=sort_reference,
        compile_samples=("steepness", "both"),
        errors=(
            *X_ERRORS,
            NO_SELECTOR,
            *METHOD_ERRORS,
            Bad(
                ValueError,
                "no permutation matrix",
                dict(method="permutahedron", return_permutation=True),
            ),
        ),
    ),
    network_spec(
        function=soft_rank,
        samples=RANK,
        derivative_samples=soft(RANK),
        reference=rank_reference,
        errors=(
            *X_ERRORS,
            NO_SELECTOR,
            *METHOD_ERRORS,
            Bad(TypeError, "base must be a number", dict(base="1")),
            Bad(ValueError, "ties must be one of stable, share", dict(ties="mean")),
        ),
    ),
    network_spec(
        function=soft_argsort,
        samples=COMMON,
        derivative_samples=soft(COMMON),
        reference=argsort_reference,
    ),
    network_spec(
        function=soft_permutation,
        samples=COMMON,
        derivative_samples=soft(COMMON),
        reference=lambda x, *args, **options: _matrix(x, *args, **options)[2],
        empty={"no rows": Empty(lambda: scores(0, 5), 0.0, (0, 5, 5))},
    ),
    network_spec(
        function=soft_permute,
        samples=PERMUTE,
        derivative_samples=soft(PERMUTE),
        reference=permute_reference,
        gradients=("x", "feats"),
        empty={
            "no rows": Empty(
                lambda: Sample(dict(x=torch.zeros(0, 5), feats=torch.ones(5, 2))), 0.0, (0, 5, 2)
            )
        },
        vmap=("x", "feats"),
        nan={"x": "row", "feats": "any"},
        large=lambda: Sample(dict(x=make_logits((300, 60)), feats=make_logits((300, 60, 4)))),
        errors=(
            *X_ERRORS,
            NO_SELECTOR,
            Bad(TypeError, "feats must be a Tensor", dict(feats=[1])),
            Bad(TypeError, "feats must be float", dict(feats=X.long())),
            Bad(ValueError, r"n = 5, .*\[3, 4, 2\]", dict(feats=torch.ones(3, 4, 2))),
            Bad(ValueError, r"\(\.\.\., n, d\)", dict(feats=torch.ones(5))),
            Bad(ValueError, r"\[3\].*\[2\]", dict(feats=torch.ones(3, 5, 2))),
            Bad(ValueError, "meta", dict(feats=torch.ones(5, 2, device="meta"))),
        ),
    ),
    network_spec(
        function=soft_topk,
        samples=TOPK,
        derivative_samples=soft(TOPK),
        reference=topk_reference,
        empty={"no rows": Empty(lambda: scores(0, 5, k=2), 0.0, (0, 5, 2))},
        large=lambda: scores(300, 60, k=4),
        errors=(
            *X_ERRORS,
            *NOTHING,
            Bad(ValueError, r"k must be in \[1, 5\].*got 0", dict(k=0)),
            Bad(ValueError, r"k must be in \[1, 5\].*got 6", dict(k=6)),
            Bad(ValueError, r"k must be in \[1, 5\]", dict(k=6, network="splitter_selection")),
            Bad(TypeError, "k must be an integer", dict(k=1.0)),
        ),
    ),
    network_spec(
        function=sorting_cross_entropy,
        module=pyloss.nn.SortingCrossEntropyLoss,
        samples=CROSS_ENTROPY,
        compile_samples=("plain", "row_ce", "col_ce, shared"),
        reference=cross_entropy_reference,
        gradients=("x",),
        empty={
            "mean": Empty(lambda: with_target(0, 5), math.nan),
            "sum": Empty(lambda: with_target(0, 5, reduction="sum"), 0.0),
            "none": Empty(lambda: with_target(0, 5, reduction="none"), 0.0, (0,)),
        },
        vmap=("x", "target"),
        nan={"x": "all", "target": "all"},
        large=lambda: with_target(300, 60),
        errors=(
            *X_ERRORS,
            NO_SELECTOR,
            *NOTHING,
            *TARGET_ERRORS,
            Bad(ValueError, "kind must be one of bce, row_ce, col_ce", dict(kind="mse")),
            Bad(ValueError, "target_is must be one of values", dict(target_is="order")),
            Bad(ValueError, "ties must be one of stable, share", dict(ties="mean")),
            Bad(ValueError, r"\[2, 5, 5\].*got \[2, 5\]", dict(target_is="permutation")),
            Bad(
                ValueError, "ties='share'.*permutation", dict(target_is="permutation", ties="share")
            ),
            Bad(ValueError, "torch.bool", dict(target=X > 0, target_is="ranks")),
            *(
                Bad(ValueError, message, dict(target=t, target_is=is_a, validate=True))
                for message, t, is_a in (
                    (
                        r"ranks must be in \[0, 4\] with base=0, got 1 to 5.*base=1",
                        RANKS + 1,
                        "ranks",
                    ),
                    ("one of each.*ties='share'", RANKS.clamp_max(2), "ranks"),
                    ("whole", RANKS * 0.5, "ranks"),
                    ("not a permutation", torch.full((2, 5, 5), 0.2), "permutation"),
                    ("not a permutation", Q[:, [0, 0, 1, 2, 3]], "permutation"),
                )
            ),
        ),
    ),
    network_spec(
        function=spearman_loss,
        module=pyloss.nn.SpearmanLoss,
        samples=SPEARMAN,
        derivative_samples=soft(SPEARMAN),
        reference=spearman_reference,
        gradients=("x",),
        empty={
            "mean": Empty(lambda: with_target(0, 5), math.nan),
            "one element": Empty(lambda: with_target(2, 1), 1.0),
        },
        vmap=("x", "target"),
        nan={"x": "all", "target": "all"},
        large=lambda: with_target(300, 60),
        errors=(
            *X_ERRORS,
            *NOTHING,
            *TARGET_ERRORS,
            *(e for e in METHOD_ERRORS if "hard" not in e.change),
            Bad(ValueError, "no ties='stable'", dict(method="permutahedron", ties="stable")),
        ),
    ),
    Spec(
        function=diff_sort_net,
        module=pyloss.nn.DiffSortNet,
        samples={
            "plain": net,
            "logistic": lambda: net("batcher", steepness=3.0, distribution="logistic"),
            "phi": lambda: net("auto", art_lambda=0.375, distribution="logistic_phi"),
        },
        reference=lambda vectors, sorting_network_type, size, **options: sort_reference(
            vectors, network=sorting_network_type, return_permutation=True, **options
        ),
        gradients=("vectors",),
        empty={"no rows": Empty(lambda: net(rows=0), 0.0, (0, 5))},
        large=lambda: net(rows=3000),
        vmap=("vectors",),
        nan={"vectors": "row"},
        errors=NET_ERRORS,
    ),
    Spec(
        function=diff_topk_net,
        module=pyloss.nn.DiffTopkNet,
        samples={
            "plain": lambda: net(k=2),
            "splitter": lambda: net("splitter_selection", k=2, distribution="gaussian"),
        },
        reference=lambda vectors, sorting_network_type, size, k, **options: topk_reference(
            vectors, k, network=sorting_network_type, **options
        ).flip(-1),
        gradients=("vectors",),
        empty={"no rows": Empty(lambda: net(rows=0, k=2), 0.0, (0, 5, 2))},
        large=lambda: net(rows=3000, k=2),
        vmap=("vectors",),
        nan={"vectors": "row"},
        errors=(
            *NET_ERRORS,
            Bad(ValueError, r"k must be in \[1, 5\]", dict(k=6)),
            Bad(TypeError, "k must be an int", dict(k=1.0)),
        ),
    ),
    Spec(
        function=ranking_accuracy,
        samples={
            "plain": lambda: accuracy_sample(6, 6),
            "four": lambda: accuracy_sample(6, 4),
            "dim": lambda: accuracy_sample(6, 5, dim=0),
        },
        reference=accuracy_reference,
        result=F32,
        rounded=False,
        autocast=dict.fromkeys((*HALF, F32, F64), F32),
        empty={"no sets": Empty(lambda: accuracy_sample(0, 6), math.nan)},
        vmap=("input", "target"),
        nan=dict.fromkeys(("input", "target"), lambda found, clean: bool(found < clean)),
        large=lambda: accuracy_sample(300, 100),
        errors=(
            Bad(ValueError, r"\[6, 6\].*\[2, 6\]", dict(target=torch.ones(2, 6))),
            Bad(IndexError, r"dim is 5.*\[6, 6\]", dict(dim=5)),
            Bad(TypeError, "input must be float", dict(input=X.long())),
            Bad(TypeError, "target must be a Tensor", dict(target=[1])),
            Bad(ValueError, "nothing to rank", dict(input=X[:, :0], target=X[:, :0])),
            Bad(TypeError, "mask must be a Tensor", dict(mask=[True])),
            Bad(
                ValueError,
                r"mask must be bool.*\[6, 6\]; got torch.float32",
                dict(mask=torch.ones(6, 6)),
            ),
        ),
    ),
)
