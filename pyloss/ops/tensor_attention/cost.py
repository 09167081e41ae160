"""How many operations the products of exact tensor attention take; masks hide nothing here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyloss.ops.tensor_attention.plan import Settings, wanted


def tuples(
    n_q: int, lengths: Sequence[int], causal: bool, windows: Sequence[int], q_offset: int
) -> int:
    """Tuples (i, j1, ..., jm) of a query and the keys that causality and windows let it see.

    Exact, and no loop over the queries: between the places where a band leaves or meets an end of
    its keys, their number is a polynomial in i.
    """
    ends = [_ends(causal, w, q_offset) for w in windows]

    def seen(i: int) -> int:
        return math.prod(_clip(i + b, n) - _clip(i + a, n) for n, (a, b) in zip(lengths, ends))

    turns = {0, n_q}
    for n, bounds in zip(lengths, ends):
        for shift in bounds:
            turns |= {_clip(-shift, n_q), _clip(n - shift, n_q)}
    places = sorted(turns)
    return sum(_sum(seen, a, b, len(lengths)) for a, b in zip(places, places[1:]))


def _clip(x: int, n: int) -> int:
    return min(max(x, 0), n)


def _ends(causal: bool, window: int, q_offset: int) -> tuple[int, int]:
    """(a, b): query i sees the keys from i + a up to, not including, i + b."""
    far = 1 << 62
    first = q_offset - window + 1 if window else -far
    last = q_offset + (1 if causal else window) if causal or window else far
    return first, last


def _sum(polynomial, start: int, stop: int, degree: int) -> int:
    """Of a polynomial with integer values over start <= i < stop, by its differences."""
    count = stop - start
    values = [polynomial(start + i) for i in range(min(degree + 1, count))]
    total = 0
    for order in range(len(values)):
        total += math.comb(count, order + 1) * values[0]
        values = [b - a for a, b in zip(values, values[1:])]
    return total


def forward_flops(q, k1, k2, v1, v2, mask1, mask2, *settings, out_shape=None) -> int:
    """Of shapes in the place of tensors: S and its product with the values."""
    return 2 * _triples(q, k1, k2, settings) * (q[3] + v1[3])


def backward_flops(
    dout, dlse, q, k1, k2, v1, v2, mask1, mask2, out, lse, *rest, out_shape=None
) -> int:
    """S once more, dP, and a product for each of queries, keys and values with a gradient."""
    *settings, want = rest
    of_q, of_k1, of_k2, of_v1, of_v2, *of_masks = wanted(want)
    of_k, of_v = of_k1 or of_k2, of_v1 or of_v2
    of_scores = of_q or of_k or any(of_masks)
    d, dv = q[3], v1[3]
    per_triple = d * (1 + of_q + of_k) + dv * (of_scores + of_v)
    return 2 * _triples(q, k1, k2, settings) * per_triple


def _triples(q, k1, k2, settings) -> int:
    s = Settings(*settings)
    seen = tuples(q[2], (k1[2], k2[2]), s.causal, (s.w1, s.w2), s.q_offset)
    return q[0] * q[1] * seen
