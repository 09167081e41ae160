"""Distillation of data sets: tensor by tensor, and gradients of networks by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import (
    lipschitz_gradient_penalty,
    perturb_weights,
    representative_indices,
    trajectory_matching_loss,
)
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def matching(a, b, a_mid, b_mid, target, start, expert_mid, weight=1.0, mids="one"):
    """With the lists as tensors: a weight and a bias."""
    pairs = [((a_mid, b_mid), expert_mid)] if mids == "one" else mids
    return trajectory_matching_loss([a, b], target, start, pairs, mid_weight=weight)


def matching_by_hand(a, b, a_mid, b_mid, target, start, expert_mid, weight=1.0, mids="one"):
    def flat(tensors) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def ratio(student, expert) -> Tensor:
        end, begin = flat(expert).detach(), flat(start).detach()
        return (flat(student) - end).norm() ** 2 / (begin - end).norm() ** 2

    first = ratio((a, b), target)
    if not mids:
        return first
    return first + (0.5 if weight == "adaptive" else weight) * ratio((a_mid, b_mid), expert_mid)


def steps(**options) -> Sample:
    def pair(seed):
        return tuple(make_logits(s, F64, scale=1.0, seed=seed + i)
                     for i, s in enumerate(((2, 3), (2,))))  # fmt: skip

    names = ("a", "b", "a_mid", "b_mid")
    students = dict(zip(names, (*pair(0), *pair(2))))
    return Sample(students | dict(target=pair(4), start=pair(6), expert_mid=pair(8)), options)


def penalty(inputs, first, last, from_outputs=False, **options):
    def net(x):
        return torch.tanh(x @ first) @ last

    if from_outputs:
        x = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        return lipschitz_gradient_penalty(x, net(x), **options)
    return lipschitz_gradient_penalty(inputs, net, **options)


def penalty_by_hand(inputs, first, last, from_outputs=False, weight=2.0, target_norm=1.0, dims=-1):
    h = torch.tanh(inputs @ first)
    slope = ((1 - h * h) * last.sum(1)) @ first.T
    dims = (dims,) if isinstance(dims, int) else dims
    norm = (slope**2).sum(dims).sqrt() if dims else slope.abs()
    return weight * ((norm - target_norm) ** 2).mean()


def net_sample(rows=3, **options) -> Sample:
    shapes = dict(inputs=(rows, 4), first=(4, 3), last=(3, 2))
    made = {k: make_logits(s, F64, scale=1.0, seed=i) for i, (k, s) in enumerate(shapes.items())}
    return Sample(made, options)


def perturbed(weight, bias, alpha=0.5, min_dim=2):
    generator = torch.Generator().manual_seed(3)
    return tuple(perturb_weights([weight, bias], alpha, min_dim=min_dim, generator=generator))


def perturbed_by_hand(weight, bias, alpha=0.5, min_dim=2):
    # Drawn as the widths of the dtypes have it: float32 for all but float64.
    d = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    return weight + alpha * d / d.norm() * weight, bias


def kernels(shape=(2, 3), **options) -> Sample:
    inputs = dict(
        weight=make_logits(shape, F64, scale=1.0), bias=make_logits(shape[:1], F64, seed=1)
    )
    return Sample(inputs, options)


def representatives(features, labels, per_class=1, **options):
    generator = torch.Generator().manual_seed(5)
    found = representative_indices(features, labels, per_class, generator=generator, **options)
    return found.view(-1, max(1, per_class)).sort(1).values.view(-1)


def representatives_by_hand(features, labels, per_class=1, clusters=None, **_):
    """Of well separated clusters each sample is its own, or one next to it."""
    found = []
    for label in sorted(set(labels.tolist())):
        own = [i for i, y in enumerate(labels.tolist()) if y == label]
        if per_class == 1 or clusters == 1:
            centre = features[own].mean(0)
            own.sort(key=lambda i, centre=centre: float((features[i] - centre).norm()))
            found += sorted(own[:per_class])
        else:
            found += own
    return torch.tensor(found, dtype=torch.int64)


def groups(**options) -> Sample:
    features = make_logits((6, 2), F64, scale=1.0)
    return Sample(dict(features=features, labels=torch.tensor([1, 0, 1, 0, 0, 1])), dict(options))


A, B = torch.ones(2, 3), torch.ones(2)
NOTHING = dict(
    a=torch.ones(0), b=B, a_mid=None, b_mid=None, target=(torch.ones(0), B),
    start=(torch.ones(0), 2 * B), expert_mid=None,
)  # fmt: skip
SPECS = (
    Spec(
        function=matching,
        name="trajectory_matching_loss",
        covers=(trajectory_matching_loss,),
        samples={
            "one in between": steps,
            "adaptive": lambda: steps(weight="adaptive"),
        },
        reference=matching_by_hand,
        gradients=("a", "b", "a_mid", "b_mid"),
        # A tensor without numbers beside one that is where it shall be.
        empty={"no numbers": Empty(lambda: Sample(NOTHING, dict(mids=())), 0.0)},
        vmap=("a", "b"),
        nan={"a": "all", "b_mid": "all"},
        errors=(
            Bad(TypeError, r"theta\[0\] must be a Tensor, got float", dict(a=1.0)),
            Bad(TypeError, r"theta\[1\] must be floating, got torch.int64",
                dict(b=torch.arange(2))),
            Bad(TypeError, "target must be a Tensor or several, got int",
                dict(target=1)),
            Bad(ValueError, "start must hold 2 Tensors as theta does, got 1", dict(start=(A,))),
            Bad(ValueError, r"target\[1\] must have the shape of that of theta, \[2\], got \[3\]",
                dict(target=(A, torch.ones(3)))),
            Bad(ValueError, "target equals start", dict(target=(A, B), start=(A, B))),
            Bad(ValueError, r"the expert of mids\[0\] equals start",
                dict(expert_mid=(A, B), start=(A, B))),
            Bad(ValueError, r"mids\[0\] must be a pair \(student, expert\)", dict(mids=[A])),
            Bad(TypeError, "mids must be a sequence of pairs, got Tensor", dict(mids=A)),
            Bad(ValueError, "mid_weight must be one of adaptive, got 'even'",
                dict(weight="even")),
            Bad(ValueError, "mid_weight must be finite and >= 0, got -1", dict(weight=-1)),
        ),
    ),
    Spec(
        function=penalty,
        name="lipschitz_gradient_penalty",
        covers=(lipschitz_gradient_penalty,),
        samples={
            "plain": net_sample,
            "each input": lambda: net_sample(weight=0.5, target_norm=0.2, dims=()),
        },
        reference=penalty_by_hand,
        gradients=("inputs", "first", "last"),
        dtypes=(F64, F32),
        autocast={},  # derivatives of products in half types
        tolerances={F32: (1e-4, 1e-5)},
        empty={"no samples": Empty(lambda: net_sample(0), math.nan)},
        vmap=("inputs", "first"),
        nan={"inputs": "all", "first": "all"},
        errors=(
            Bad(TypeError, "inputs must be floating", dict(inputs=torch.ones(3, 4).long())),
            Bad(ValueError, "weight must be finite and >= 0, got -1", dict(weight=-1)),
            Bad(ValueError, "target_norm must be finite and >= 0, got nan",
                dict(target_norm=math.nan)),
            Bad(ValueError, r"dims must be in \[-2, 1\], got 2", dict(dims=2)),
            Bad(ValueError, r"dims must differ, got \[1, -1\]", dict(dims=(1, -1))),
            Bad(TypeError, "dims must be an integer, got float", dict(dims=0.5)),
        ),
    ),
    Spec(
        function=perturbed,
        name="perturb_weights",
        covers=(perturb_weights,),
        samples={
            "plain": kernels,
            "convolutions alone": lambda: kernels((2, 1, 1, 2), min_dim=4, alpha=1.0),
        },
        reference=perturbed_by_hand,
        gradients=("weight", "bias"),
        dtypes=(F64,),  # others draw other numbers: tests/test_dataset_distillation.py
        autocast={F64: F64},
        empty={"no numbers": Empty(lambda: kernels((0, 3)), 0.0, (0, 3))},
        compile="Generator",
        transforms=dict.fromkeys(("vmap", "jacfwd", "hessian"), "randomness"),
        nan={"weight": "any"},
        errors=(
            Bad(TypeError, r"params\[0\] must be a Tensor, got list", dict(weight=[1.0])),
            Bad(ValueError, "alpha must be finite and >= 0, got -1", dict(alpha=-1)),
            Bad(ValueError, "min_dim must be >= 0, got -1", dict(min_dim=-1)),
        ),
    ),
    Spec(
        function=representatives,
        name="representative_indices",
        covers=(representative_indices,),
        samples={
            "one": groups,
            "two next to one centre": lambda: groups(per_class=2, clusters=1),
            "all": lambda: groups(per_class=3, iterations=0),
        },
        reference=representatives_by_hand,
        result=torch.int64,
        rounded=False,
        autocast={},
        empty={"no samples": Empty(
            lambda: Sample(dict(features=torch.ones(0, 2), labels=torch.ones(0).long()), {}),
            0, (0,))},
        compile="Generator",
        nan={"features": "raises"},
        errors=(
            Bad(ValueError, r"features must be \(N, D\), got \[3\]", dict(features=torch.ones(3))),
            Bad(TypeError, "labels must hold integers", dict(labels=torch.ones(6))),
            Bad(ValueError, r"labels must have the shape \[6\], got \[2\]",
                dict(labels=torch.arange(2))),
            Bad(ValueError, "per_class must be >= 1, got 0", dict(per_class=0)),
            Bad(ValueError, "class 0 has 3 samples, fewer than per_class, 4", dict(per_class=4)),
            Bad(ValueError, "clusters must divide per_class, 2, got 4",
                dict(per_class=2, clusters=4)),
            Bad(ValueError, "iterations must be >= 0, got -1", dict(iterations=-1)),
        ),
    ),
)  # fmt: skip
