"""Losses and metrics of ranked lists: the references go list by list, item by item."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    approx_ndcg_loss,
    lambda_loss,
    list_mle,
    list_net,
    neural_ndcg_loss,
    neural_sort,
)
from pyloss.metrics import mrr, ndcg, precision_at_k
from pyloss.reference import sorting_network_permutation
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def listwise(one):
    """A function of one list, (loss or None where it is none), as one of all lists."""

    def reference(scores, relevance, *args, mask=None, offsets=None, reduction="mean", **options):
        if offsets is not None:
            cuts = list(zip(offsets[:-1].tolist(), offsets[1:].tolist()))
            lists = [(scores[a:b], relevance[a:b]) for a, b in cuts]
            lead = (len(lists),)
        else:
            lead, n = scores.shape[:-1], scores.shape[-1]
            lists = list(zip(scores.reshape(-1, n), relevance.reshape(-1, n)))
            if mask is not None:
                lists = [(s[m], y[m]) for (s, y), m in zip(lists, mask.reshape(-1, n))]
        found = [None if len(s) == 0 else one(s, y.to(s.dtype), *args, **options) for s, y in lists]
        counted = sum(f is not None for f in found)
        zero = scores.sum() * 0
        each = torch.stack([zero if f is None else f for f in found])
        if reduction == "none":
            return each.reshape(lead)
        return each.sum() / (counted if reduction == "mean" else 1)

    return reference


def _gains(y: Tensor, gain: str) -> Tensor:
    return 2**y - 1 if gain == "exponential" else y


def _dcg(gains: Tensor, k: int | None) -> Tensor:
    return sum(g / math.log2(2 + r) for r, g in enumerate(gains[:k]))


def _ideal(gains: Tensor, k: int | None = None) -> Tensor:
    return _dcg(gains.sort(descending=True).values, k)


@listwise
def net_reference(s, y, *, temperature=1.0):
    return torch.nn.functional.cross_entropy(s, (y / temperature).softmax(0))


@listwise
def mle_reference(s, y, *, k=None):
    order = sorted(range(len(y)), key=lambda i: -y[i])
    s = s[order]
    return sum(s[r:].logsumexp(0) - s[r] for r in range(min(len(s), k or len(s))))


@listwise
def approx_reference(s, y, *, temperature=0.1, gain="exponential"):
    gains = _gains(y, gain)
    if _ideal(gains) == 0:
        return None
    rank = [1 + sum(torch.sigmoid((b - a) / temperature) for j, b in enumerate(s) if j != i)
            for i, a in enumerate(s)]  # fmt: skip
    return 1 - sum(g / torch.log2(1 + r) for g, r in zip(gains, rank)) / _ideal(gains)


@listwise
def neural_reference(s, y, *, relaxation="network", steepness=1.0, distribution="cauchy", k=None,
                     gain="exponential", sinkhorn=30):  # fmt: skip
    gains = _gains(y, gain)
    if _ideal(gains, k) == 0:
        return None
    if relaxation == "network":
        _, p = sorting_network_permutation(-s.unsqueeze(0), "auto", distribution, steepness)
        p = p[0].mT
    else:
        p = neural_sort(s, 1 / steepness)
        for _ in range(sinkhorn):
            p = p / p.sum(0)
            p = p / p.sum(1, keepdim=True)
    return 1 - _dcg(p @ gains, k) / _ideal(gains, k)


@listwise
def lambda_reference(s, y, *, weighting="lambdarank", sigma=1.0, k=None, mu=10.0,
                     gain="exponential"):  # fmt: skip
    gains, total = _gains(y, gain), s.sum() * 0
    if _ideal(gains, k) == 0:
        return None
    gains = gains / _ideal(gains, k)
    rank = (s.argsort(descending=True).argsort() + 1).tolist()
    for i in range(len(s)):
        for j in range(len(s)):
            if y[i] <= y[j] or (k is not None and min(rank[i], rank[j]) > k):
                continue
            between = abs(gains[i] - gains[j])
            exchanged = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
            apart = abs(rank[i] - rank[j])
            step = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
            weight = {
                "ranknet": 1.0,
                "lambdarank": between * exchanged,
                "ndcg_loss1": gains[i] / math.log2(1 + rank[i]),
                "ndcg_loss2": between * step,
                "ndcg_loss2++": between * (exchanged + mu * step),
            }[weighting]
            total = total + weight * torch.log2(1 + torch.exp(-sigma * (s[i] - s[j])))
    return total


@listwise
def ndcg_reference(s, y, k=None, *, gain="linear"):
    """The mean over all orders of equal scores, one gain at a time."""
    gains, found = _gains(y, gain), 0.0
    discounts = [1 / math.log2(2 + r) if k is None or r < k else 0.0 for r in range(len(s))]
    for value in s.unique():
        first, same = int((s > value).sum()), s == value
        found += gains[same].mean() * sum(discounts[first : first + int(same.sum())])
    ideal = _ideal(gains, k)
    return found / ideal if ideal else found * 0


@listwise
def mrr_reference(s, y):
    ranks = [int((s >= a).sum()) for a, b in zip(s, y) if b > 0]
    return torch.tensor(1 / min(ranks) if ranks else 0.0, dtype=F64)


@listwise
def precision_reference(s, y, k):
    found = 0.0
    for value in s.unique():
        first, same = int((s > value).sum()), s == value
        places = min(max(k - first, 0), int(same.sum()))
        found += float((y[same] > 0).double().mean()) * places
    return torch.tensor(found / k, dtype=F64)


RELEVANCE = torch.tensor([[2, 0, 1, 0, 3], [0, 1, 1, 4, 0], [0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
OFFSETS = torch.tensor([0, 5, 5, 8, 15])


def lists(mask=None, **options) -> Sample:
    inputs = dict(scores=make_logits((3, 5), F64, scale=0.6), relevance=RELEVANCE)
    return Sample({**inputs, "mask": mask, "offsets": None}, options)


def ragged(**options) -> Sample:
    inputs = dict(scores=make_logits((15,), F64, scale=0.6), relevance=RELEVANCE.flatten())
    return Sample({**inputs, "mask": None, "offsets": OFFSETS}, options)


def one_list() -> Sample:
    return lists().each(lambda _, t: t[0])


def tied(**options) -> Sample:
    s = lists(**options)
    return s.replace(dict(scores=(2 * s.inputs["scores"]).round() / 2))


def samples(**kinds) -> dict:
    return {
        "plain": lists,
        "mask": lambda: lists(mask=MASK, reduction="none"),
        "offsets": lambda: ragged(reduction="sum"),
        "one list": one_list,
        **{name: lambda o=o: lists(**o) for name, o in kinds.items()},
    }


S = lists().inputs["scores"]
ERRORS = (
    Bad(TypeError, "scores must be a Tensor, got list", dict(scores=[1.0])),
    Bad(TypeError, "scores must be float.*int64", dict(scores=S.long())),
    Bad(ValueError, "scores must have at least one dimension", dict(scores=S[0, 0])),
    Bad(TypeError, "relevance must be a Tensor", dict(relevance=[1])),
    Bad(ValueError, r"relevance must have the shape \[3, 5\].*got \[2, 5\]",
        dict(relevance=RELEVANCE[:2])),
    Bad(TypeError, "relevance must be real", dict(relevance=S.cdouble())),
    Bad(ValueError, r"mask must be bool.*got torch.int64", dict(mask=RELEVANCE)),
    Bad(ValueError, "give mask or offsets", dict(mask=MASK, offsets=OFFSETS)),
    Bad(ValueError, r"scores must be \(P,\) with offsets", dict(offsets=OFFSETS)),
    Bad(RuntimeError, "same device, but relevance is on meta",
        dict(relevance=RELEVANCE.to("meta"))),
    Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
)  # fmt: skip
BAD_K = (
    Bad(ValueError, "k must be at least 1, got 0", dict(k=0)),
    Bad(TypeError, "k must be an integer, got float", dict(k=2.0)),
)
BAD_GAIN = Bad(ValueError, "gain must be one of exponential, linear", dict(gain="square"))
BAD_T = Bad(ValueError, "temperature must be finite and > 0", dict(temperature=0.0))
# Of the scores: a list's order, and with it the function, changes where two are equal.
NAN = {"scores": "any", "relevance": "any"}


def loss_spec(function, reference, module, **fields) -> Spec:
    return Spec(
        **dict(
            function=function,
            reference=reference,
            module=module,
            same_signature=True,
            gradients=("scores",),
            empty={
                "no lists": Empty(lambda: lists().each(lambda _, t: t[:0]), math.nan),
                "no items": Empty(lambda: lists().each(lambda _, t: t[:, :0]), math.nan),
            },
            vmap=("scores", "relevance"),
            nan={"scores": "any"},
            tolerances={F32: (1e-4, 1e-6)},
        )
        | fields
    )


def metric_spec(function, reference, **fields) -> Spec:
    empty = {"no lists": Empty(lambda: lists().each(lambda _, t: t[:0]), math.nan)}
    return Spec(
        **dict(function=function, reference=reference, empty=empty, nan={"scores": "any"}) | fields
    )


SPECS = (
    loss_spec(
        list_net, net_reference, pyloss.nn.ListNetLoss,
        samples=samples(cold=dict(temperature=0.5)),
        errors=(*ERRORS, BAD_T),
    ),
    loss_spec(
        list_mle, mle_reference, pyloss.nn.ListMLELoss,
        samples=samples(two=dict(k=2)),
        errors=(*ERRORS, *BAD_K),
    ),
    loss_spec(
        approx_ndcg_loss, approx_reference, pyloss.nn.ApproxNDCGLoss,
        samples=samples(linear=dict(gain="linear", temperature=1.0)),
        errors=(*ERRORS, BAD_T, BAD_GAIN),
    ),
    loss_spec(
        neural_ndcg_loss, neural_reference, pyloss.nn.NeuralNDCGLoss,
        samples=samples(
            two=dict(k=2, steepness=3.0),
            logistic=dict(distribution="logistic", gain="linear"),
            neuralsort=dict(relaxation="neuralsort"),
            rows=dict(relaxation="neuralsort", sinkhorn=0, steepness=2.0),
            hidden=dict(relaxation="neuralsort", mask=MASK),
        ),
        errors=(
            *ERRORS, *BAD_K, BAD_GAIN,
            Bad(ValueError, "relaxation must be one of", dict(relaxation="sinkhorn")),
            Bad(ValueError, "steepness must be positive", dict(steepness=0.0)),
            Bad(ValueError, "distribution must be one of", dict(distribution="normal")),
            Bad(ValueError, "sinkhorn must be at least 0", dict(sinkhorn=-1)),
            Bad(TypeError, "sinkhorn must be an integer", dict(sinkhorn=1.5)),
        ),
    ),
    loss_spec(
        lambda_loss, lambda_reference, pyloss.nn.LambdaLoss,
        samples=samples(
            **{w: dict(weighting=w, sigma=2.0) for w in ("ranknet", "ndcg_loss1", "ndcg_loss2")},
            both=dict(weighting="ndcg_loss2++", mu=3.0, gain="linear"),
            two=dict(k=2),
        ),
        errors=(
            *ERRORS, *BAD_K, BAD_GAIN,
            Bad(ValueError, "weighting must be one of", dict(weighting="ndcg")),
            Bad(ValueError, "sigma must be finite and > 0", dict(sigma=0.0)),
            Bad(ValueError, "mu must be finite and >= 0", dict(mu=-1.0)),
        ),
    ),
    metric_spec(
        ndcg, ndcg_reference,
        samples={**samples(two=dict(k=2), exponential=dict(gain="exponential")),
                 "tied": lambda: tied(k=3, reduction="none")},
        errors=(*ERRORS, *BAD_K, BAD_GAIN),
    ),
    metric_spec(
        mrr, mrr_reference,
        samples={**samples(), "tied": lambda: tied(reduction="none")},
        errors=ERRORS,
    ),
    metric_spec(
        precision_at_k, precision_reference,
        samples={name: lambda s=s: s().replace(dict(k=2)) for name, s in
                 {**samples(), "tied": lambda: tied(reduction="none")}.items()},
        empty={"no lists": Empty(lambda: lists(k=2).each(lambda _, t: t[:0]), math.nan)},
        errors=(
            *ERRORS, *BAD_K,
            Bad(TypeError, "k must be an integer, got NoneType", dict(k=None)),
        ),
    ),
)  # fmt: skip
