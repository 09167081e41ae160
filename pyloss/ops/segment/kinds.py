"""What a fold makes of each segment, and what a map makes of each value: the codes of
csrc/common/segment.h, and which tensors each of them reads."""

from __future__ import annotations

# Folds: (results, S, W). `given` (S, W) each.
SUM, MEAN, PROD, MIN, MAX, LOGSUMEXP, MOMENTS, SOFTMAX, ARGMAX, TIES, FACTORS, INNER = range(12)
# Maps: (N, W).
(
    SPREAD,  # (g): g
    SPREAD_MEAN,  # (g): g / n
    TO_TIES,  # (g, m, t): [x = m] g / t
    TO_FACTORS,  # (g, p, z): g times the product of the other values
    EXP,  # (g, l): g exp(x - l)
    TO_MOMENTS,  # (gm, gv, mean): (gm + 2 gv (x - mean)) / n
    TO_SOFTMAX,  # (gm, gs, m, s, t): gs exp(x - m) + [x = m] (gm - gs s) / t
    NORMALIZED,  # (m, s): exp(x - m) / s
    FROM_NORMALIZED,  # (d), other y: y (x - d)
) = range(9)

RESULTS = {MOMENTS: 2, SOFTMAX: 2, FACTORS: 2}  # of a fold; 1 of the others
REDUCES = {"sum": SUM, "mean": MEAN, "prod": PROD, "min": MIN, "max": MAX, "logsumexp": LOGSUMEXP}
