"""The ops of similarity_softmax on the reference, with the whole matrix of logits.

Outside of autocast, which would round the products to half types, as it does not those of the ops.
"""

from __future__ import annotations

import torch

from pyloss.ops._reference import gradients
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    DENOMINATORS,
    DROP,
    MEAN,
    NEGATIVES,
    POSITIVE,
    SIGMOID,
    SOURCES,
    WANTS,
    Pairs,
)

_OF_ROWS = {bits: name for name, bits in DENOMINATORS.items()}


def _kinds(p: Pairs) -> dict:
    same = "drop" if p.flags & DROP else "positive" if p.flags & POSITIVE else "ignore"
    return dict(first=p.first, target=p.target, query_ids=p.query_ids, key_ids=p.key_ids, same=same)


def _sides(p: Pairs):
    keys = p.queries if p.keys is None else p.keys
    return p.queries, keys, p.scale if p.scales is None else p.scales


def stats(p: Pairs) -> tuple:
    """All nine results in torch operations, None for those not wanted."""
    from pyloss.reference.similarity_softmax import similarity_softmax  # with its first use

    with torch.autocast(p.queries.device.type, enabled=False):
        return tuple(
            similarity_softmax(
                *_sides(p), **_kinds(p), denominator=_OF_ROWS[p.flags & NEGATIVES],
                columns=bool(p.flags & COLUMNS), mean=bool(p.flags & MEAN),
            )
        )  # fmt: skip


def sums(p: Pairs, bias, numbers, kind: int) -> tuple:
    """The results of similarity_sums in torch operations."""
    from pyloss.reference.similarity_softmax import margin_sums, pair_sums  # with its first use

    with torch.autocast(p.queries.device.type, enabled=False):
        if kind == SIGMOID:
            bias = numbers[0] if bias is None else bias
            return (pair_sums(*_sides(p), bias, **_kinds(p)),)
        return tuple(margin_sums(*_sides(p), *numbers, **_kinds(p)))


def _differentiated(function, sources, p: Pairs, cotangents, needed, create_graph):
    return gradients(
        lambda q, k, s, *bias: function(p._replace(queries=q, keys=k, scales=s), *bias),
        sources, cotangents, needed, create_graph=create_graph,
    )  # fmt: skip


def gradients_of_stats(p: Pairs, cotangents, needed, create_graph=False) -> list:
    """cotangents: of the nine results."""
    sources = [p[at] for at in SOURCES]
    return _differentiated(stats, sources, p, cotangents, needed, create_graph)


def gradients_of_sums(p: Pairs, bias, numbers, kind, cotangents, needed, create_graph=False):
    def function(p, bias):
        return sums(p, bias, numbers, kind)

    sources = [*(p[at] for at in SOURCES), bias]
    return _differentiated(function, sources, p, cotangents, needed, create_graph)


def forward(*args):
    with torch.no_grad():
        return [t for t in stats(Pairs(*args)) if t is not None]


def _needed(want: int) -> list[bool]:
    return [bool(want & bit) for bit in WANTS]


def backward(*args):
    p, (want, _, _, g, g_positive, column_g, column_g_positive) = Pairs(*args[:9]), args[9:]
    cotangents = (g, g_positive, None, None, None, column_g, column_g_positive, None, None)
    found = gradients_of_stats(p, cotangents, _needed(want)[:3])
    return [t for t in found if t is not None]


def sums_forward(*args):
    with torch.no_grad():
        return list(sums(Pairs(*args[:9]), *args[9:]))


def sums_backward(*args):
    p, (bias, numbers, kind, want, g, g_below) = Pairs(*args[:9]), args[9:]
    cotangents = (g,) if kind == SIGMOID else (g, None, g_below, None)
    found = gradients_of_sums(p, bias, numbers, kind, cotangents, _needed(want))
    return [t for t in found if t is not None]
