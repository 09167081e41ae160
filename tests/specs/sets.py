"""Losses on sets, and the layers that read and write them; the references go set by set."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.func import functional_call

import pyloss
from pyloss.functional import (
    chamfer_set_loss,
    hungarian_set_loss,
    order_search_loss,
    order_search_loss_from_table,
    sinkhorn_set_loss,
)
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

# --------------------------------------------------------------------------------------------------
# Two sets


def setwise(one):
    """A function of the costs (n, m) of one pair of sets as one of all pairs."""

    def reference(
        input, target, *, cost=None, input_mask=None, target_mask=None, input_offsets=None,
        target_offsets=None, reduction="mean", **options,
    ):  # fmt: skip
        cost = cost or ("l1" if one is hungarian else "l2")

        def sets(t, mask, offsets):
            if offsets is not None:
                return [t[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]
            return [a if mask is None else a[m] for a, m in zip(t, t if mask is None else mask)]

        pairs = zip(sets(input, input_mask, input_offsets),
                    sets(target, target_mask, target_offsets))  # fmt: skip
        found = []
        for x, y in pairs:
            if cost == "nll":
                costs = -x.log_softmax(-1)[:, y.long()]
            else:
                power = 1 if cost == "l1" else 2
                costs = (x[:, None] - y[None]).abs().pow(power).sum(-1)
            found.append(one(costs, **options) if costs.numel() else None)
        zero = input.sum() * 0
        each = torch.stack([zero if f is None else f for f in found])
        if reduction == "none":
            return each
        counted = sum(f is not None for f in found)
        return each.sum() / (counted if reduction == "mean" else 1)

    return reference


def chamfer(costs):
    return costs.min(0).values.mean() + costs.min(1).values.mean()


def hungarian(costs):
    n, m = costs.shape
    if n > m:
        return hungarian(costs.mT)
    every = [
        sum(costs[i, j] for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(m), n)
    ]
    return torch.stack(every).min() / n


def sinkhorn(costs, *, epsilon=0.1, iterations=50):
    """Not in logarithms: float64 has room for small costs."""
    n, m = costs.shape
    k = (-costs / epsilon).exp()
    v = torch.ones(m, dtype=costs.dtype)
    for _ in range(iterations):
        u = 1 / n / (k @ v)
        v = 1 / m / (k.mT @ u)
    return (u[:, None] * k * v * costs).sum()


ROWS = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
COLUMNS = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]]).bool()


def pair(**options) -> Sample:
    inputs = dict(
        input=make_logits((3, 4, 2), F64, scale=0.6),
        target=make_logits((3, 3, 2), F64, scale=0.6, seed=3),
    )
    names = ("input_mask", "target_mask", "input_offsets", "target_offsets")
    return Sample({**inputs, **{n: options.pop(n, None) for n in names}}, options)


def ragged(**options) -> Sample:
    cuts = dict(
        input_offsets=torch.tensor([0, 3, 3, 12]), target_offsets=torch.tensor([0, 4, 6, 9])
    )
    return pair(**cuts, **options).map(lambda _, t: t.flatten(0, 1))


def classes(**options) -> Sample:
    target = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1]])
    return pair(cost="nll", **options).replace(dict(target=target))


def pair_samples(**kinds) -> dict:
    return {
        "plain": pair,
        "masks": lambda: pair(input_mask=ROWS, target_mask=COLUMNS, reduction="none"),
        "offsets": lambda: ragged(reduction="sum"),
        "classes": classes,
        "other cost": lambda: pair(cost="l2"),
        **{name: lambda o=o: pair(**o) for name, o in kinds.items()},
    }


X = pair().inputs["input"]
PAIR_ERRORS = (
    Bad(TypeError, "input must be a Tensor", dict(input=[1.0])),
    Bad(TypeError, "input must be float.*int64", dict(input=X.long())),
    Bad(ValueError, r"input must hold sets, \(B, n, ...\), got \[3, 4\]", dict(input=X[..., 0])),
    Bad(TypeError, "target must be a Tensor", dict(target=None)),
    Bad(TypeError, "target must be floating with cost=", dict(target=X.long())),
    Bad(TypeError, "target must hold classes", dict(cost="nll")),
    Bad(ValueError, "as many sets, of as many features", dict(target=X[:2])),
    Bad(ValueError, "as many sets, of as many features", dict(target=X[..., :1])),
    Bad(ValueError, "cost must be one of l1, l2, nll", dict(cost="cosine")),
    Bad(ValueError, "input_mask must be bool", dict(input_mask=ROWS.long())),
    Bad(ValueError, r"target_mask must be bool.*\[3, 3\]", dict(target_mask=ROWS)),
    Bad(ValueError, "input_mask or input_offsets, not both",
        dict(input_mask=ROWS, input_offsets=torch.tensor([0, 3]))),
    Bad(ValueError, "one set behind the other", dict(target_offsets=torch.tensor([0, 3]))),
    Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
    Bad(RuntimeError, "same device", dict(target=X.to("meta"))),
)  # fmt: skip


def pair_spec(function, one, module, **fields) -> Spec:
    return Spec(
        **dict(
            function=function,
            reference=setwise(one),
            module=module,
            same_signature=True,
            gradients=("input", "target"),
            empty={
                "no sets": Empty(lambda: pair().each(lambda _, t: t[:0]), math.nan),
                "empty sets": Empty(lambda: pair().each(lambda n, t: t[:, :0]), math.nan),
            },
            nan={"input": "any"},
            tolerances={F32: (1e-4, 1e-6)},
            samples=pair_samples(),
            errors=PAIR_ERRORS,
        )
        | fields
    )


# --------------------------------------------------------------------------------------------------
# Orders. The model: the next element by the one before.


def search(weights, target_set, mask=None, **options):
    def step(prefix):
        last = (
            prefix[:, -1] if prefix.shape[1] else prefix.new_full((len(prefix),), len(weights) - 1)
        )
        return weights[last].log_softmax(-1)

    loss, order = order_search_loss(step, target_set, mask=mask, **options)
    return loss, order.detach()


def search_reference(weights, target_set, mask=None, *, mode, beam=4, reduction="mean"):
    logp, losses, orders = weights.log_softmax(-1), [], []

    def walk(items, order):
        before = [len(weights) - 1, *(items[i] for i in order)]
        return sum(logp[a, items[i]] for a, i in zip(before, order))

    for b, items in enumerate(target_set.tolist()):
        have = [i for i in range(len(items)) if mask is None or mask[b, i]]
        if mode == "greedy":
            order = []
            while len(order) < len(have):
                left = [i for i in have if i not in order]
                order.append(max(left, key=lambda i: walk(items, [*order, i])))
        else:  # a beam of all orders finds the best
            order = list(max(itertools.permutations(have), key=lambda o: float(walk(items, o))))
        losses.append(-walk(items, order) if have else weights.sum() * 0)
        orders.append(order + [i for i in range(len(items)) if i not in have])
    each = torch.stack([x + weights.sum() * 0 for x in losses])
    counted = len(each) if mask is None else int(mask.any(1).sum())
    total = each if reduction == "none" else each.sum()
    return total / counted if reduction == "mean" else total, torch.tensor(orders)


def table_reference(logprob, target_set=None, *, mode="exact", reduction="mean"):
    found, orders = [], []
    for b, table in enumerate(logprob):
        items = range(table.shape[0]) if target_set is None else target_set[b].tolist()
        best = max(
            itertools.permutations(range(len(items))),
            key=lambda o: float(sum(table[t, items[i]] for t, i in enumerate(o))),
        )
        found.append(-sum(table[t, items[i]] for t, i in enumerate(best)))
        orders.append(best)
    each = torch.stack(found)
    each = each if reduction == "none" else getattr(each, reduction)()
    return each, torch.tensor(orders)


SETS = torch.tensor([[0, 3, 1, 2], [4, 2, 0, 1]])
SOME = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]]).bool()


def model(mask=None, **options) -> Sample:
    inputs = dict(weights=make_logits((6, 5), F64), target_set=SETS, mask=mask)
    return Sample(inputs, dict(mode="exhaustive") | options)


def table(**options) -> Sample:
    return Sample(dict(logprob=make_logits((2, 4, 5), F64), target_set=SETS), options)


SET_ERRORS = (
    Bad(TypeError, "target_set must be a Tensor", dict(target_set=[1])),
    Bad(TypeError, "target_set must hold integers", dict(target_set=SETS.double())),
    Bad(ValueError, r"avg is not a valid value", dict(reduction="avg")),
)

# --------------------------------------------------------------------------------------------------
# Layers, as functions of their weights


_LAYERS: dict[tuple, torch.nn.Module] = {}  # made with the samples, so that no graph makes one


def _layer(kind, *sizes, **options):
    key = kind, sizes, tuple(sorted(options.items()))
    return _LAYERS[key] if key in _LAYERS else kind(*sizes, **options)


def _weights(kind, *sizes, **options) -> dict[str, Tensor]:
    """By names that are arguments."""
    with torch.device("meta"):
        layer = kind(*sizes, **options)
    _LAYERS[kind, sizes, tuple(sorted(options.items()))] = layer
    shapes = {n: p.shape for n, p in layer.named_parameters()}
    return {
        name.replace(".", "__"): make_logits(tuple(shape), F64, scale=0.4, seed=i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _call(layer, weights, *inputs):
    return functional_call(layer, {n.replace("__", "."): w for n, w in weights.items()}, inputs)


def read_process(x, mask=None, *, in_dim, hidden, steps, attention="dot", **weights):
    layer = _layer(pyloss.nn.ReadProcess, in_dim, hidden, steps=steps, attention=attention)
    return _call(layer, weights, x, mask)


def pointer_decoder(memory, state, mask=None, target=None, *, hidden, glimpses, **weights):
    mask_used = weights.pop("mask_used", True)
    layer = _layer(pyloss.nn.PointerDecoder, hidden, glimpses=glimpses, mask_used=mask_used)
    return _call(layer, weights, memory, state, mask, target)


def read_process_write(x, mask=None, target=None, *, in_dim, hidden, steps, **weights):
    layer = _layer(pyloss.nn.ReadProcessWrite, in_dim, hidden, steps=steps)
    return _call(layer, weights, x, mask, target)


def _lstm(w, prefix, x, h, c):
    gates = x @ w[f"{prefix}cell__weight_ih"].mT + w[f"{prefix}cell__bias_ih"]
    gates = gates + h @ w[f"{prefix}cell__weight_hh"].mT + w[f"{prefix}cell__bias_hh"]
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _scores(w, prefix, memory, q):
    if f"{prefix}__weigh__weight" not in w:
        return memory @ q
    inner = memory @ w[f"{prefix}__of_memory__weight"].mT + w[f"{prefix}__of_query__weight"] @ q
    return inner.tanh() @ w[f"{prefix}__weigh__weight"][0]


def _encoded(w, x, mask, steps, prefix=""):
    """One set: its memories at all places, those that count, q*."""
    hidden = (x @ w[f"{prefix}mlp__0__weight"].mT + w[f"{prefix}mlp__0__bias"]).relu()
    memory = hidden @ w[f"{prefix}mlp__2__weight"].mT + w[f"{prefix}mlp__2__bias"]
    own = memory[mask]
    size = memory.shape[1]
    q = c = r = memory.new_zeros(size)
    for _ in range(steps):
        q, c = _lstm(w, prefix, torch.cat([q, r]), q, c)
        share = _scores(w, f"{prefix}attention", own, q).softmax(0)
        r = (share[:, None] * own).sum(0)
    return memory, torch.cat([q, r])


def _written(w, memory, state, mask, target, glimpses, mask_used=True, prefix=""):
    h, c = (w[f"{prefix}start__weight"] @ state + w[f"{prefix}start__bias"]).chunk(2)
    given, left = w[f"{prefix}first"], mask.clone()
    logits, order = [], []
    for j in range(len(memory) if target is None else len(target)):
        h, c = _lstm(w, prefix, given, h, c)
        q = h
        for _ in range(glimpses if left.any() else 0):
            share = _scores(w, f"{prefix}glimpse", memory[left], q).softmax(0)
            q = (share[:, None] * memory[left]).sum(0)
        u = _scores(w, f"{prefix}pointer", memory, q).masked_fill(~left, -math.inf)
        u = u if left.any() else u.new_zeros(len(memory))
        chosen = int(u.argmax()) if target is None else int(target[j])
        given = memory[chosen]
        left = left.clone()
        left[chosen] &= not mask_used
        logits.append(u)
        order.append(chosen)
    return torch.stack(logits), torch.tensor(order)


def _sets(x, mask):
    return zip(x, torch.ones(x.shape[:2]).bool() if mask is None else mask)


def read_process_reference(x, mask=None, *, in_dim, hidden, steps, attention="dot", **w):
    x = x if mask is None else x * mask.unsqueeze(2)
    found = [_encoded(w, a, m, steps) for a, m in _sets(x, mask)]
    return tuple(torch.stack(part) for part in zip(*found))


def decoder_reference(memory, state, mask=None, target=None, *, hidden, glimpses, mask_used=True,
                      **w):  # fmt: skip
    targets = [None] * len(memory) if target is None else target
    found = [
        _written(w, a, s, m, t, glimpses, mask_used)
        for (a, m), s, t in zip(_sets(memory, mask), state, targets)
    ]
    return tuple(torch.stack(part) for part in zip(*found))


def write_reference(x, mask=None, target=None, *, in_dim, hidden, steps, **w):
    x = x if mask is None else x * mask.unsqueeze(2)
    targets = [None] * len(x) if target is None else target
    found = [
        _written(w, *_encoded(w, a, m, steps, "encoder__"), m, t, 1, prefix="decoder__")
        for (a, m), t in zip(_sets(x, mask), targets)
    ]
    return tuple(torch.stack(part) for part in zip(*found))


def build_layer(spec, sample):
    """The module with the sample's weights."""
    inputs = dict(sample.inputs)
    dtype = next(v.dtype for n, v in inputs.items() if n.endswith("weight"))
    layer = spec.module(**sample.options).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(inputs.pop(name.replace(".", "__")))
    return layer, inputs


def layer_spec(function, reference, module, samples, weights, **fields) -> Spec:
    return Spec(
        function=function,
        reference=reference,
        module=module,
        build=build_layer,
        parameters={n.replace("__", "."): n for n in weights},
        samples=samples,
        dtypes=(F64, F32),
        autocast={},
        tolerances={F32: (1e-4, 1e-5)},
        transforms={"vmap": "lstm_cell"},  # torch has no rule for it
        **fields,
    )


ENCODER = dict(in_dim=2, hidden=3, steps=2)
SEEN = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()


def encoder_sample(mask=None, **options) -> Sample:
    options = {**ENCODER, **options}
    weights = _weights(
        pyloss.nn.ReadProcess, 2, 3, steps=2, attention=options.get("attention", "dot")
    )
    return Sample(dict(x=make_logits((2, 4, 2), F64), mask=mask, **weights), options)


DECODER = dict(hidden=3, glimpses=1)
ORDERS = torch.tensor([[3, 1, 0, 2], [0, 2, 1, 3]])


def decoder_sample(mask=None, target=ORDERS, **options) -> Sample:
    inputs = dict(
        memory=make_logits((2, 4, 3), F64), state=make_logits((2, 6), F64, seed=7), mask=mask,
        target=target,
    )  # fmt: skip
    weights = _weights(
        pyloss.nn.PointerDecoder, 3, glimpses=1, mask_used=options.get("mask_used", True)
    )
    return Sample({**inputs, **weights}, {**DECODER, **options})


def write_sample(mask=None, target=ORDERS, **options) -> Sample:
    weights = _weights(pyloss.nn.ReadProcessWrite, 2, 3, steps=2)
    inputs = dict(x=make_logits((2, 4, 2), F64), mask=mask, target=target, **weights)
    return Sample(inputs, {**ENCODER, **options})


def of_inputs(sample: Sample, part: slice) -> Sample:
    """Some of the sets that go into a layer, whose weights stay."""
    own = ("x", "memory", "state", "target", "mask")
    return sample.each(lambda n, t: t[part] if n in own else t)


def of_sets(sample: Sample, part: slice) -> Sample:
    return sample.replace(dict(target_set=sample.inputs["target_set"][part]))


TRANSFORMS = ("grad", "vjp", "jvp", "vmap", "jacrev", "jacfwd", "hessian")


def finite(result):
    """Without the -inf of what cannot be chosen, which have no finite difference."""
    logits, order = result
    return torch.where(logits == -math.inf, 0.0, logits), order


_DECODER_WEIGHTS = _weights(pyloss.nn.PointerDecoder, 3, glimpses=1, mask_used=True)
_WRITE_WEIGHTS = _weights(pyloss.nn.ReadProcessWrite, 2, 3, steps=2)
_ENCODER_WEIGHTS = _weights(pyloss.nn.ReadProcess, 2, 3, steps=2, attention="additive")

SPECS = (
    pair_spec(chamfer_set_loss, chamfer, pyloss.nn.ChamferSetLoss, vmap=("input", "target")),
    pair_spec(
        hungarian_set_loss, hungarian, pyloss.nn.HungarianSetLoss,
        compile="linear_sum_assignment",
        # scipy reads the numbers, and inside a transform there are none.
        transforms=dict.fromkeys(TRANSFORMS, "data pointer"),
    ),
    pair_spec(
        sinkhorn_set_loss, sinkhorn, pyloss.nn.SinkhornSetLoss,
        samples=pair_samples(sharp=dict(epsilon=0.5, iterations=7)),
        vmap=("input", "target"),
        compile_samples=("sharp",),
        errors=(
            *PAIR_ERRORS,
            Bad(ValueError, "epsilon must be finite and > 0", dict(epsilon=0.0)),
            Bad(ValueError, "iterations must be at least 1", dict(iterations=0)),
            Bad(TypeError, "iterations must be an integer", dict(iterations=2.0)),
        ),
    ),
    Spec(
        function=search,
        name="order_search_loss",
        covers=(order_search_loss,),
        reference=search_reference,
        exhaustive=("compiled",),
        samples={
            "exhaustive": model,
            "greedy": lambda: model(mode="greedy", reduction="none"),
            "beam": lambda: model(mode="beam", beam=24, reduction="sum"),
            "mask": lambda: model(mask=SOME),
            "mask, beam": lambda: model(mask=SOME, mode="beam", beam=24, reduction="none"),
        },
        gradients=("weights",),
        empty={"no sets": Empty(lambda: of_sets(model(), slice(0)), math.nan)},
        transforms={"vmap": "dynamic shape"},  # orders are taken by a mask
        nan={"weights": "any"},
        autocast={},
        tolerances={F32: (1e-4, 1e-6)},
        dtypes=(F64, F32),
        errors=(
            *SET_ERRORS,
            Bad(ValueError, r"target_set must be \(B, n\), got \[4\]", dict(target_set=SETS[0])),
            Bad(ValueError, "mask must be bool", dict(mask=SETS)),
            Bad(ValueError, "mode must be one of uniform, sample", dict(mode="best")),
            Bad(ValueError, "beam must be at least 1", dict(beam=0)),
            Bad(ValueError, "temperature must be finite and > 0", dict(temperature=0.0)),
            Bad(ValueError, "at most 7 elements, got 8", dict(target_set=SETS.repeat(1, 2))),
        ),
    ),
    Spec(
        function=order_search_loss_from_table,
        reference=table_reference,
        samples={
            "plain": table,
            "own elements": lambda: Sample(
                dict(logprob=make_logits((3, 3, 3), F64), target_set=None), dict(reduction="none")
            ),
            "twice the same": lambda: table(reduction="sum").replace(
                dict(target_set=torch.tensor([[0, 3, 1, 2], [4, 2, 0, 0]]))
            ),
        },
        gradients=("logprob",),
        empty={"no sets": Empty(lambda: table().each(lambda _, t: t[:0]), math.nan)},
        nan={"logprob": "any"},
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            *SET_ERRORS,
            Bad(TypeError, "logprob must be float", dict(logprob=SETS)),
            Bad(ValueError, r"logprob must be \(B, n, vocabulary\)", dict(logprob=X[0])),
            Bad(ValueError, r"target_set must be \[2, 4\], got \[2, 3\]",
                dict(target_set=SETS[:, :3])),
            Bad(ValueError, "without target_set the vocabulary", dict(target_set=None)),
            Bad(ValueError, "mode must be one of exact, uniform", dict(mode="beam")),
        ),
    ),
    layer_spec(
        read_process, read_process_reference, pyloss.nn.ReadProcess,
        {
            "dot": encoder_sample,
            "mask": lambda: encoder_sample(mask=SEEN),
            "additive": lambda: encoder_sample(attention="additive"),
        },
        _ENCODER_WEIGHTS,
        empty={"no sets": Empty(lambda: of_inputs(encoder_sample(), slice(0)), 0.0, (0, 4, 3))},
        nan={"x": "any"},
        gradients=("x", *_ENCODER_WEIGHTS),
        errors=(
            Bad(ValueError, r"x must be \(B, n, 2\), got \[2, 4, 3\]",
                dict(x=make_logits((2, 4, 3)))),
            Bad(TypeError, "x must be floating", dict(x=torch.zeros(2, 4, 2).long())),
            Bad(ValueError, "mask must be bool", dict(mask=torch.ones(2, 4))),
            Bad(ValueError, "steps must be at least 0", dict(steps=-1)),
            Bad(ValueError, "attention must be one of", dict(attention="cosine")),
        ),
    ),
    layer_spec(
        pointer_decoder, decoder_reference, pyloss.nn.PointerDecoder,
        {
            "taught": decoder_sample,
            "alone": lambda: decoder_sample(target=None),
            "twice": lambda: decoder_sample(mask_used=False, target=None),
        },
        _DECODER_WEIGHTS,
        empty={"no sets": Empty(lambda: of_inputs(decoder_sample(), slice(0)), 0.0, (0, 4, 4))},
        nan={"memory": "any", "state": "any"},
        exhaustive=("second_derivative",),
        gradients=("memory", "state", *_DECODER_WEIGHTS),
        tensors=finite,
        errors=(
            Bad(ValueError, r"memory must be \(B, n, 3\)", dict(memory=make_logits((2, 4, 2)))),
            Bad(ValueError, r"state must be \[2, 6\], got \[2, 5\]",
                dict(state=make_logits((2, 5)))),
            Bad(ValueError, r"target must be \(2, steps\)", dict(target=ORDERS[0])),
            Bad(ValueError, "glimpses must be at least 0", dict(glimpses=-1)),
        ),
    ),
    layer_spec(
        read_process_write, write_reference, pyloss.nn.ReadProcessWrite,
        {
            "taught": write_sample,
            "mask, alone": lambda: write_sample(mask=SEEN, target=None),
        },
        _WRITE_WEIGHTS,
        empty={"no sets": Empty(lambda: of_inputs(write_sample(), slice(0)), 0.0, (0, 4, 4))},
        nan={"x": "any"},
        exhaustive=("compiled", "second_derivative", "strides"),
        gradients=("x", *_WRITE_WEIGHTS),
        tensors=finite,
    ),
)  # fmt: skip
