"""Aggregation in trees: the reference goes pair by pair, with the gates as they stand."""

from __future__ import annotations

import itertools
import math

import torch

import pyloss
from pyloss.functional import segment_gru_reduce
from pyloss.regularizers import associativity_loss, commutativity_loss, identity_loss
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec
from specs.sets import _layer, _weights, build_layer

# --------------------------------------------------------------------------------------------------
# Trees


def tree(rows, op):
    """Of a list of rows (D,); level by level."""
    while len(rows) > 1:
        pairs = [op(a, b) for a, b in zip(rows[::2], rows[1::2])]
        rows = pairs + ([rows[-1]] if len(rows) % 2 else [])
    return rows[0]


def trees(x, offsets, op, empty):
    ends = offsets.tolist()
    found = [
        tree(list(x[a:b]), op) if a < b else empty + 0 * x.sum() for a, b in zip(ends, ends[1:])
    ]
    return torch.stack(found) if found else x.new_zeros((0, x.shape[1]))


def gru(a, h, w_ih, w_hh, b_ih, b_hh):
    d = len(a)
    u, v = w_ih @ a + b_ih, w_hh @ h + b_hh
    r, z = torch.sigmoid(u[:d] + v[:d]), torch.sigmoid(u[d : 2 * d] + v[d : 2 * d])
    n = torch.tanh(u[2 * d :] + r * v[2 * d :])
    return (1 - z) * n + z * h


def gru_reference(
    x, offsets, w_ih, w_hh, b_ih=None, b_hh=None, *, identity=None, symmetric=True, max_length=None
):  # fmt: skip
    zeros = x.new_zeros(3 * x.shape[1])
    w = (w_ih, w_hh, zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh)

    def op(a, b):
        return (gru(a, b, *w) + gru(b, a, *w)) / 2 if symmetric else gru(a, b, *w)

    return trees(x, offsets, op, x.new_zeros(x.shape[1]) if identity is None else identity)


OFFSETS = torch.tensor([0, 3, 3, 8])


def gru_sample(offsets=OFFSETS, bias=True, identity=True, d=2, **options) -> Sample:
    shapes = dict(w_ih=(3 * d, d), w_hh=(3 * d, d), b_ih=(3 * d,), b_hh=(3 * d,), identity=(d,))
    drawn = {
        k: make_logits(s, F64, scale=1.0, seed=i + 1) for i, (k, s) in enumerate(shapes.items())
    }
    if not bias:
        drawn |= dict(b_ih=None, b_hh=None)
    if not identity:
        drawn["identity"] = None
    x = make_logits((int(offsets[-1]), d), F64, scale=1.0)
    return Sample(dict(x=x, **drawn), dict(offsets=offsets, **options))


S = gru_sample().inputs

# --------------------------------------------------------------------------------------------------
# The module


OPTIONS = dict(in_channels=2, out_channels=3)


def lcm_aggregation(x, lengths, **arguments):
    options = {k: v for k, v in arguments.items() if k in MADE_WITH}
    weights = {k: v for k, v in arguments.items() if k not in MADE_WITH}
    layer = _layer(pyloss.nn.LCMAggregation, **options)
    names = {n.replace("__", "."): w for n, w in weights.items()}
    return torch.func.functional_call(
        layer, names, (x,), dict(offsets=_offsets(lengths).to(x.device))
    )


def _offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def build_lcm(spec, sample):
    layer, inputs = build_layer(spec, sample)
    return layer, dict(x=inputs["x"], offsets=_offsets(inputs["lengths"]))


MADE_WITH = ("in_channels", "out_channels", "op", "project", "shuffle")


def lcm_reference(x, lengths, *, op="gru", out_channels, project=True, **w):
    d, half = out_channels, out_channels // 2
    if project:
        x = (x @ w["lin__weight"].mT + w["lin__bias"]).relu()

    def mlp(a, b):
        weight, bias = w["mlp__first__weight"], w["mlp__first__bias"]
        hidden = weight[:d] @ a + bias[:d] + weight[d:] @ b + bias[d:]
        return w["mlp__second__weight"] @ hidden.relu() + w["mlp__second__bias"] / 2

    def phi(x, sign=1):
        first, second = x[..., :half], x[..., half:]
        for i in range(4) if sign == 1 else (3, 2, 1, 0):
            p = [w[f"phi__shifts__{i}__{j}__{k}"] for j in (0, 2) for k in ("weight", "bias")]
            given = second if i % 2 else first
            shift = (given @ p[0].mT + p[1]).tanh() @ p[2].mT + p[3]
            if i % 2:
                first = first + sign * shift
            else:
                second = second + sign * shift
        return torch.cat([first, second], -1)

    def symmetric_gru(a, b):
        cell = [w[f"gru_cell__{k}_{p}"] for k in ("weight", "bias") for p in ("ih", "hh")]
        return (gru(a, b, *cell) + gru(b, a, *cell)) / 2

    ops = {
        "gru": symmetric_gru,
        "mlp": lambda a, b: a + b + mlp(a, b) + mlp(b, a),
        "pullback": lambda a, b: phi(phi(a) + phi(b), -1),
        "max": torch.maximum,
        "logsumexp": torch.logaddexp,
    }
    empty = phi(x.new_zeros(d), -1) if op == "pullback" else w["identity"]
    return trees(x, _offsets(lengths), ops[op], empty)


def lcm_sample(lengths=(3, 0, 5), **options) -> Sample:
    options = OPTIONS | options
    weights = _weights(pyloss.nn.LCMAggregation, **options)
    x = make_logits((sum(lengths), options["in_channels"]), F64, scale=1.0, seed=9)
    return Sample(dict(x=x, lengths=lengths, **weights), options)


_LCM_WEIGHTS = dict.fromkeys(
    name for op in ("gru", "mlp", "pullback") for name in lcm_sample(op=op).inputs
)
_LCM_WEIGHTS = tuple(name for name in _LCM_WEIGHTS if name not in ("x", "lengths"))

# --------------------------------------------------------------------------------------------------
# Penalties


def operator(w):
    return lambda a, b: torch.tanh(a @ w) + b @ w.mT


def drawn(kind, count):
    """The penalty of an operator with weights w, and of the same draws each time."""

    def penalty(x, offsets, w, **options):
        generator = torch.Generator().manual_seed(3)
        return kind(operator(w), x, offsets, generator=generator, **options)

    def nodes(rows, op):
        """All levels of at least `count` nodes."""
        levels = []
        while len(rows) >= count:
            levels.append(rows)
            rest = [rows[-1]] if len(rows) % 2 else []
            rows = [op(a, b) for a, b in zip(rows[::2], rows[1::2])] + rest
        return levels

    def reference(x, offsets, w, *, samples, reduction="mean"):
        u = torch.empty(samples, 2 + count, dtype=F64)
        u.uniform_(generator=torch.Generator().manual_seed(3))
        op, ends = operator(w), offsets.tolist()
        segments = [list(x[a:b]) for a, b in zip(ends, ends[1:]) if b - a >= count]
        owner = [rows for rows in segments for _ in rows]
        each = []
        for share in u.tolist() if owner else ():
            levels = nodes(owner[int(share[0] * len(owner))], op)
            left = list(levels[int(share[1] * len(levels))])
            a, b, *c = (left.pop(int(s * len(left))) for s in share[2:])
            d = op(op(a, b), *c) - op(a, op(b, *c)) if c else op(a, b) - op(b, a)
            each.append((d * d).sum())
        each = torch.stack(each) if each else x.new_zeros(samples) + 0 * (x.sum() + w.sum())
        return {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]

    def sample(offsets=OFFSETS, samples=6, **options) -> Sample:
        x = make_logits((int(offsets[-1]), 2), F64, scale=1.0)
        inputs = dict(x=x, w=make_logits((2, 2), F64, scale=1.0, seed=1))
        return Sample(inputs, dict(offsets=offsets, samples=samples, **options))

    x = sample().inputs["x"]
    random = dict.fromkeys(("vmap", "jacfwd", "hessian"), "random")  # drawn inside
    return Spec(
        function=penalty, name=kind.__name__, covers=(kind,), reference=reference, samples={
            "plain": sample,
            "each": lambda: sample(torch.tensor([0, 2, 8], dtype=torch.int32), reduction="none"),
        },
        gradients=("x", "w"), result="wide", rounded=False, dtypes=(F64, F32), autocast={},
        empty={
            "no elements": Empty(lambda: sample(OFFSETS[:1]), 0.0),
            "too few": Empty(lambda: sample(torch.tensor([0, 1, 2])), 0.0),
        },
        transforms=random, compile="Generator",
        nan={"w": "all"},
        errors=(
            Bad(TypeError, "x must be floating", dict(x=torch.zeros(8, 2).long())),
            Bad(ValueError, r"x must be \(N, D\), got \[8\]", dict(x=x[:, 0])),
            Bad(ValueError, "offsets must start at 0 and end", dict(offsets=OFFSETS + 1)),
            Bad(ValueError, "samples must be >= 1, got 0", dict(samples=0)),
            Bad(ValueError, "avg is not a valid value", dict(reduction="avg")),
        ),
    )  # fmt: skip


def identity_penalty(e, x, w, **options):
    return identity_loss(operator(w), e, x, **options)


def identity_reference(e, x, w, *, reduction="mean"):
    op = operator(w)
    each = [((op(e, row) - row) ** 2).sum() for row in x]
    each = torch.stack(each) if each else x.new_zeros(0) + 0 * (e.sum() + w.sum())
    return {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]


def identity_sample(rows=3, **options) -> Sample:
    shapes = dict(e=(2,), x=(rows, 2), w=(2, 2))
    drawn = {k: make_logits(s, F64, scale=1.0, seed=i) for i, (k, s) in enumerate(shapes.items())}
    return Sample(drawn, options)


SPECS = (
    Spec(
        function=segment_gru_reduce,
        reference=gru_reference,
        samples={
            "plain": gru_sample,
            "one order, int32": lambda: gru_sample(OFFSETS.int(), symmetric=False, max_length=5),
            "bare": lambda: gru_sample(torch.tensor([0, 0, 1, 5]), bias=False, identity=False),
        },
        gradients=("x", "w_ih", "w_hh", "b_ih", "b_hh", "identity"),
        derivative_samples=("plain", "one order, int32"),
        tolerances={F32: (1e-4, 1e-5)},
        empty={
            "no segments": Empty(lambda: gru_sample(OFFSETS[:1]), 0.0, (0, 2)),
            "no elements": Empty(
                lambda: gru_sample(torch.zeros(3).long(), identity=False), 0.0, (2, 2)
            ),
        },
        vmap=("x", "w_ih", "b_hh"),
        nan={"x": "row", "w_ih": "any", "identity": "any"},
        threads=False,
        errors=(
            Bad(TypeError, "x must be floating", dict(x=torch.zeros(8, 2).long())),
            Bad(ValueError, r"x must be \(N, D\), got \[8\]", dict(x=S["x"][:, 0])),
            Bad(ValueError, "offsets must not decrease", dict(offsets=OFFSETS[[0, 2, 1, 0, 3]])),
            Bad(ValueError, "offsets must start at 0 and end", dict(offsets=OFFSETS[1:])),
            Bad(RuntimeError, "offsets must be int32 or int64", dict(offsets=OFFSETS.double())),
            Bad(
                ValueError,
                r"w_ih must have the shape \[6, 2\], got \[5, 2\]",
                dict(w_ih=S["w_ih"][:5]),
            ),
            Bad(ValueError, r"b_hh must have the shape \[6\]", dict(b_hh=S["b_hh"][:2])),
            Bad(ValueError, r"identity must have the shape \[2\]", dict(identity=S["b_hh"])),
            Bad(ValueError, "longer than max_length, 4", dict(max_length=4)),
            Bad(TypeError, "symmetric must be a bool", dict(symmetric=1)),
        ),
    ),
    Spec(
        function=lcm_aggregation,
        reference=lcm_reference,
        module=pyloss.nn.LCMAggregation,
        build=build_lcm,
        parameters={n.replace("__", "."): n for n in _LCM_WEIGHTS},
        samples={
            "gru": lcm_sample,
            "mlp": lambda: lcm_sample(op="mlp"),
            "pullback": lambda: lcm_sample(op="pullback"),
            "logsumexp": lambda: lcm_sample(op="logsumexp"),
        },
        # Those of the tree are segment_gru_reduce's and segment_tree_reduce's.
        derivative_samples=("pullback",),
        compile_samples=("pullback",),
        gradients=("x", *_LCM_WEIGHTS),
        dtypes=(F64, F32),
        autocast={},
        tolerances={F32: (1e-4, 1e-5)},
        empty={"no sets": Empty(lambda: lcm_sample(()), 0.0, (0, 3))},
        nan={"x": "row"},
        threads=False,
    ),
    drawn(associativity_loss, 3),
    drawn(commutativity_loss, 2),
    Spec(
        function=identity_penalty,
        name="identity_loss",
        covers=(identity_loss,),
        reference=identity_reference,
        samples={
            "mean": identity_sample,
            "each": lambda: identity_sample(reduction="none"),
        },
        gradients=("e", "x", "w"),
        result="wide",
        dtypes=(F64, F32),
        autocast={},
        vmap=("e", "x"),
        empty={"no rows": Empty(lambda: identity_sample(0), math.nan)},
        nan={"e": "all", "x": "all"},
        errors=(
            Bad(ValueError, r"e must have the shape \[2\], got \[1\]", dict(e=torch.zeros(1))),
            Bad(TypeError, "x must be floating", dict(x=torch.zeros(3, 2).long())),
            Bad(ValueError, "avg is not a valid value", dict(reduction="avg")),
        ),
    ),
)
