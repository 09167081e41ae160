"""Frames of point clouds and of graphs, and averages over them."""

from __future__ import annotations

import itertools
import math

import torch

from pyloss.functional import laplacian_sort_frame, pca_frames
from pyloss.nn import FrameAverage
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    """With a spread of its own along each axis: gaps above 0.1."""
    x = make_logits(shape, F64, scale=1.0, seed=seed)
    return x * torch.tensor([0.5, 1.2, 2.4, 4.0], dtype=F64)[: shape[-1]] + 0.3


def weights(*shape: int) -> torch.Tensor:
    return make_logits(shape, F64, scale=1.0, seed=7).abs() + 0.2


def cloud_frames(x, w, group):
    """(R, t, gap) of one cloud, by torch's eigenproblem and its gradient."""
    t = (w[:, None] * x).sum(0) / w.sum() if "E" in group else torch.zeros_like(x[0])
    c = (w[:, None] * (x - t)).t() @ (x - t)
    value, v = torch.linalg.eigh(c)
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=x.shape[1])), dtype=F64)
    if "S" in group:
        signs = signs[signs.prod(1) * torch.linalg.det(v).detach().round() > 0]
    gap = value.diff().min() / value[-1] if len(value) > 1 else torch.ones_like(value[0])
    return v * signs[:, None], t, gap


def each_cloud(x, weight, offsets):
    w = torch.ones_like(x[..., 0]) if weight is None else weight
    if offsets is None:
        return list(zip(x, w))
    ends = offsets.tolist()
    return [(x[a:b], w[a:b]) for a, b in zip(ends, ends[1:])]


def frames_reference(x, *, group="SE", offsets=None, weight=None, detach=False, **_):
    if not len(x):
        return x.new_zeros(0, 4, 3, 3), x.new_zeros(0, 3), x.new_zeros(0)
    parts = [cloud_frames(a, w, group) for a, w in each_cloud(x, weight, offsets)]
    return tuple(torch.stack(p).detach() if detach else torch.stack(p) for p in zip(*parts))


def sample(batch: int = 2, n: int = 5, d: int = 3, *, weight=False, **options) -> Sample:
    inputs = dict(x=points(batch, n, d))
    return Sample(inputs | (dict(weight=weights(batch, n)) if weight else {}), options)


def ragged(**options) -> Sample:
    offsets = torch.tensor([0, 5, 11], dtype=torch.int32)
    return Sample(dict(x=points(11, 3), weight=weights(11), offsets=offsets), options)


def in_frame(p, vectors=None, offsets=None):
    """What a network might be: no symmetry, and a number for each coordinate of each point."""
    place = torch.arange(p.shape[-2], dtype=p.dtype, device=p.device).unsqueeze(-1)
    if offsets is not None:
        place = place * 0
    h = (p + 0.1 * place).sin() + 0.5 * p.roll(1, -1)
    return h if vectors is None else h + (0.3 * p.roll(1, -1) + vectors).sin()


def numbers(p, vectors=None, offsets=None):
    h = in_frame(p, vectors)
    return torch.stack([h.sum((-1, -2)), (h * h).sum((-1, -2))], -1)


def tensors(p, vectors=None, offsets=None):
    h = in_frame(p, vectors)
    return h.unsqueeze(-1) * p.cos().unsqueeze(-2)


BACKBONES = {"invariant": numbers, "position": in_frame, "vector": in_frame, "tensor2": tensors}
# Made beforehand: Dynamo makes no modules.
LAYERS: dict[tuple, FrameAverage] = {}


def layer(**options) -> FrameAverage:
    key = tuple(sorted(options.items()))
    if key not in LAYERS:
        out = BACKBONES.get(options.get("out_type", "invariant"), numbers)
        LAYERS[key] = FrameAverage(out, **options)
    return LAYERS[key]


def averaged(x, weight=None, vectors=None, offsets=None, **options):
    return layer(**options)(x, weight=weight, vectors=vectors, offsets=offsets)


def averaged_reference(x, weight=None, vectors=None, offsets=None, *, group="E", dim=3,
                       in_type="position", out_type="invariant", detach_frame=False):  # fmt: skip
    group = group.replace("E", "O") if in_type == "vector" else group
    f, found = BACKBONES[out_type], []
    v = [None] * len(each_cloud(x, None, offsets))
    if vectors is not None:
        v = [a for a, _ in each_cloud(vectors, None, offsets)]
    for (a, w), own in zip(each_cloud(x, weight, offsets), v):
        frames, t, _ = cloud_frames(a, w, group)
        if detach_frame:
            frames, t = frames.detach(), t.detach()
        total = 0
        for r in frames:
            y = f((a - t) @ r, own if own is None else own @ r, offsets)
            if out_type == "tensor2":
                y = r @ y @ r.t()
            elif out_type != "invariant":
                y = y @ r.t() + (t if out_type == "position" else 0)
            total = total + y / len(frames)
        found.append(total)
    if not found:
        return x.new_zeros(0, 2)
    return torch.stack(found) if offsets is None else torch.cat(found)


def moved(batch: int = 2, *, vectors=False, weight=False, d: int = 3, **options) -> Sample:
    inputs = dict(x=points(batch, 4, d, seed=3))
    if weight:
        inputs["weight"] = weights(batch, 4)
    if vectors:
        inputs["vectors"] = make_logits((batch, 4, d), F64, scale=1.0, seed=5)
    return Sample(inputs, options)


layer()
layer(out_type="position", group="SE")
X = points(2, 5, 3)
TRIANGLE = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]])


def orders_reference(edge_index, num_nodes, **_):
    """All orders, by the rows of the graph of this sample: a triangle with a tail."""
    return torch.tensor([[2, 0, 1, 3], [2, 1, 0, 3]])


SPECS = (
    Spec(
        function=pca_frames,
        samples={
            "rotations": lambda: sample(weight=True),
            "all of a plane": lambda: sample(d=2, group="O"),
            "ragged": lambda: ragged(group="E"),
            "four dimensions": lambda: sample(n=7, d=4, group="SO", weight=True),
        },
        derivative_samples=("rotations", "ragged", "four dimensions"),
        reference=frames_reference,
        result="wide",
        tolerances={F32: (2e-5, 2e-5)},
        gradients=("x", "weight"),
        vmap=("x", "weight"),
        empty={"no clouds": Empty(lambda: sample(0), 0, (0, 4, 3, 3))},
        nan={"x": "row", "weight": "row"},
        large=lambda: sample(900, 20, weight=True),
        errors=(
            Bad(TypeError, "x must be a Tensor, got list", dict(x=[1.0])),
            Bad(TypeError, "x must be floating, got torch.int64", dict(x=X.long())),
            Bad(ValueError, r"x must be \(B, N, d\), got shape \[5, 3\]", dict(x=X[0])),
            Bad(ValueError, r"x must be \(P, d\) beside offsets, got shape \[2, 5, 3\]",
                dict(offsets=torch.tensor([0, 2]))),
            Bad(ValueError, "from 1 to 8 dimensions, of which 2\\^d frames are made; got 9",
                dict(x=torch.ones(1, 20, 9))),
            Bad(ValueError, "a cloud without points has no frame", dict(x=X[:, :0], weight=None)),
            Bad(ValueError, "a cloud without points has no frame",
                dict(x=X[0], weight=None, offsets=torch.tensor([0, 5, 5]))),
            Bad(ValueError, "offsets must start at 0 and end at the number of values, 5",
                dict(x=X[0], weight=None, offsets=torch.tensor([0, 4]))),
            Bad(RuntimeError, "offsets must be int32 or int64, got torch.float32",
                dict(x=X[0], weight=None, offsets=torch.tensor([0.0, 5.0]))),
            Bad(ValueError, r"weight must have a number for each point, \[2, 5\], got shape \[5\]",
                dict(weight=X[0, :, 0])),
            Bad(TypeError, "weight must be floating, got torch.bool", dict(weight=X[..., 0] > 0)),
            Bad(ValueError, "group must be one of O, SO, E, SE, got 'SU'", dict(group="SU")),
            Bad(ValueError, "degenerate must be one of 'raise', 'warn', 'random', got 'skip'",
                dict(degenerate="skip")),
            Bad(ValueError, "gap_tol must be finite and >= 0, got nan", dict(gap_tol=math.nan)),
            Bad(ValueError, "the principal axes of cloud 0 are not unique.*degenerate='random'",
                dict(x=torch.eye(3).repeat(2, 2, 1)[:, :5], weight=torch.ones(2, 5),
                     degenerate="raise", gap_tol=0.9)),
        ),
    ),
    Spec(
        function=laplacian_sort_frame,
        samples={"triangle with a tail":
                 lambda: Sample(dict(edge_index=TRIANGLE), dict(num_nodes=4, max_frames=24))},
        reference=orders_reference,
        result=torch.int64,
        autocast={},
        empty={"no nodes": Empty(lambda: Sample(dict(edge_index=TRIANGLE[:, :0]),
                                                dict(num_nodes=0)), 0.0, (1, 0))},
        compile="data",
        dtypes=(F32,),
        threads=False,
        errors=(
            Bad(TypeError, "edge_index must be of integers, got torch.float32",
                dict(edge_index=TRIANGLE.float())),
            Bad(ValueError, r"edge_index must be \(2, E\), got shape \[2, 2, 2\]",
                dict(edge_index=TRIANGLE.reshape(2, 2, 2))),
            Bad(ValueError, "nodes from 0 to num_nodes - 1 = 2, got 0 to 3", dict(num_nodes=3)),
            Bad(TypeError, "num_nodes must be an integer, got float", dict(num_nodes=4.0)),
            Bad(ValueError, "decimals must be >= 0, got -1", dict(decimals=-1)),
            Bad(ValueError, "max_frames must be >= 1, got 0", dict(max_frames=0)),
        ),
    ),
    Spec(
        function=averaged,
        name="FrameAverage",
        covers=(FrameAverage,),
        samples={
            "invariant": moved,
            "position": lambda: moved(vectors=True, weight=True, out_type="position", group="SE"),
            "tensor2": lambda: moved(out_type="tensor2", group="SO", d=2, dim=2),
            "ragged": lambda: Sample(
                dict(x=points(7, 3, seed=4), vectors=points(7, 3, seed=1),
                     offsets=torch.tensor([0, 3, 7])),
                dict(out_type="position", group="E"),
            ),
            "vector": lambda: moved(in_type="vector", out_type="vector"),
            "detached": lambda: moved(detach_frame=True),
        },
        # Detached frames are constants for the gradient, not for finite differences.
        derivative_samples=("position", "tensor2", "ragged"),
        reference=averaged_reference,
        gradients=("x", "weight", "vectors"),
        dtypes=(F64, F32),
        tolerances={F32: (1e-4, 1e-4)},
        vmap=("x",),
        autocast={F32: F32, F64: F64},
        empty={"no clouds": Empty(lambda: moved(0), 0, (0, 2))},
        nan={"x": "row"},
        threads=False,
        errors=(
            Bad(ValueError, r"x must be \(B, N, 3\), got shape \[2, 4, 2\]",
                dict(x=points(2, 4, 2))),
            Bad(ValueError, r"vectors must be \[2, \*, 3\] beside x of shape \[2, 4, 3\], got",
                dict(vectors=points(3, 4, 3))),
            Bad(ValueError, "group must be one of O, SO, E, SE, got 'SL'", dict(group="SL")),
            Bad(ValueError, "out_type must be one of 'invariant', .*got 'scalar'",
                dict(out_type="scalar")),
            Bad(ValueError, "in_type must be one of 'position', 'vector', got 'point'",
                dict(in_type="point")),
            Bad(ValueError, "in_type='vector' has no place for out_type='position'",
                dict(in_type="vector", out_type="position")),
            Bad(ValueError, "dim must be from 1 to 8, got 9", dict(dim=9)),
            Bad(TypeError, "stochastic must be a bool, got int", dict(stochastic=1)),
        ),
    ),
)  # fmt: skip
