"""Deep conjugate directions: matrices as they stand, and convolutions offset by offset."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import conjugate_direction_loss, dcdm_solve
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec
from specs.sets import _call, _layer, _weights, build_layer


def stencil(v: Tensor) -> Tensor:
    """-v'' + v with zeros at both ends, for each vector of a batch or for one."""
    p = torch.nn.functional.pad(v, (1, 1))
    return 3 * v - p[..., 2:] - p[..., :-2]


def matrix(n: int) -> Tensor:
    ones = torch.ones(n, dtype=F64)
    return torch.diag(3 * ones) - torch.diag(ones[1:], 1) - torch.diag(ones[1:], -1)


def by_hand(b, pred, matvec, reduction="mean") -> Tensor:
    a = matrix(b.shape[-1])
    each = []
    for v, f in zip(b.reshape(-1, b.shape[-1]), pred.reshape(-1, b.shape[-1])):
        left = v - (f @ v) / (f @ a @ f) * (a @ f)
        each.append(left @ left)
    if b.dim() == 1:
        return each[0]
    each = torch.stack(each) if each else b.new_zeros(0)
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](each)


def sample(shape=(3, 4), **options) -> Sample:
    b, pred = (make_logits(shape, F64, scale=1.0, seed=s) for s in (0, 1))
    return Sample(dict(b=b, pred=pred), dict(matvec=stencil, **options))


def solution(b, x0=None, **options) -> Tensor:
    return dcdm_solve(b=b, x0=x0, **options).x


def solution_by_hand(b, x0=None, **_) -> Tensor:
    return b @ torch.linalg.inv(matrix(b.shape[-1]))  # symmetric


def system(shape=(3, 5), x0=False, **options) -> Sample:
    b, start = (make_logits(shape, F64, scale=1.0, seed=s) for s in (0, 1))
    options = dict(matvec=stencil, f=torch.tanh, tol=1e-13) | options
    return Sample(dict(b=b, x0=start if x0 else None), options)


# --------------------------------------------------------------------------------------------------
# Networks


def _net(residual, weights, kind, channels, blocks, levels):
    layer = _layer(kind, channels, blocks=blocks, levels=levels)
    return _call(layer, weights, residual)


def poisson_net_2d(residual, *, channels, blocks, levels, **weights):
    return _net(residual, weights, pyloss.nn.PoissonNet2d, channels, blocks, levels)


def poisson_net_3d(residual, *, channels, blocks, levels, **weights):
    return _net(residual, weights, pyloss.nn.PoissonNet3d, channels, blocks, levels)


def _cells(x: Tensor) -> list[tuple[slice, ...]]:
    """The cells of 2 x 2 (x 2) places, cut off at the ends."""
    axes = [[slice(i, min(i + 2, n)) for i in range(0, n, 2)] for n in x.shape[2:]]
    return list(itertools.product(*axes))


def net_by_hand(residual, *, channels, blocks, levels, **w) -> Tensor:
    def conv(x, name):
        kernel, bias = w[f"{name}__weight"], w[f"{name}__bias"]
        dims = x.dim() - 2
        padded = torch.nn.functional.pad(x, (1, 1) * dims)
        total = bias.view(-1, *(1,) * dims)
        for at in itertools.product(range(3), repeat=dims):
            window = padded[(..., *(slice(i, i + n) for i, n in zip(at, x.shape[2:])))]
            part = torch.einsum("oi,bi...->bo...", kernel[(..., *at)], window)
            total = total + part
        return total

    def chain(x, name):
        for i in range(blocks):
            inner = conv(x.clamp(min=0), f"{name}__{i}__first")
            x = x + conv(inner.clamp(min=0), f"{name}__{i}__second")
        return x

    x, fine = conv(residual.unsqueeze(1), "first"), []
    for level in range(levels):
        x = chain(x, f"down__{level}")
        fine.append(x)
        dims = tuple(range(2, x.dim()))
        means = torch.stack([x[(..., *c)].mean(dims) for c in _cells(x)], -1)
        x = means.view(*x.shape[:2], *(-(-n // 2) for n in x.shape[2:]))
    x = chain(x, "bottom")
    for level in range(levels):
        skip = fine[levels - 1 - level]
        for axis, n in enumerate(skip.shape[2:], 2):
            # As torch's nearest neighbour: of the ratio of the sizes.
            x = x.index_select(axis, torch.arange(n) * x.shape[axis] // n)
        x = chain(skip + x, f"up__{level}")
    return conv(x, "last").squeeze(1)


def net_sample(kind, shape, channels=1, blocks=1, levels=1) -> Sample:
    weights = _weights(kind, channels, blocks=blocks, levels=levels)
    return Sample(
        dict(residual=make_logits(shape, F64, scale=1.0), **weights),
        dict(channels=channels, blocks=blocks, levels=levels),
    )


def net_spec(function, kind, shapes, wrong) -> Spec:
    small, odd = shapes
    weights = _weights(kind, 1, blocks=1, levels=1)
    empty = (0, *small[1:])
    return Spec(
        function=function,
        reference=net_by_hand,
        module=kind,
        build=build_layer,
        parameters={n.replace("__", "."): n for n in weights},
        samples={
            "even": lambda: net_sample(kind, small),
            "odd": lambda: net_sample(kind, odd, channels=2, levels=0),
        },
        gradients=("residual", *weights),
        derivative_samples=("even",),
        compile_samples=("even",),  # the other is the same code with fewer grids
        dtypes=(F64, F32),
        autocast={},
        tolerances={F32: (1e-4, 1e-5)},
        empty={"no systems": Empty(lambda: net_sample(kind, empty), 0.0, empty)},
        nan={"residual": "any"},
        vmap=("residual",),
        threads=False,  # torch's convolutions
        errors=(
            Bad(TypeError, "residual must be a Tensor, got list", dict(residual=[1.0])),
            Bad(ValueError, r"residual must be \(B, .*\), got \[5\]",
                dict(residual=torch.ones(5))),
            *wrong,
        ),
    )  # fmt: skip


V = torch.ones(3, 4)
SPECS = (
    Spec(
        function=conjugate_direction_loss,
        samples={
            "mean": sample,
            "one vector": lambda: sample((4,)),
            "none": lambda: sample(reduction="none"),
            "sum": lambda: sample(reduction="sum"),
        },
        reference=by_hand,
        gradients=("b", "pred"),
        empty={
            "mean": Empty(lambda: sample((0, 4)), math.nan),
            "none": Empty(lambda: sample((0, 4), reduction="none"), 0.0, (0,)),
        },
        compile_samples=("none",),
        vmap=("b", "pred"),
        nan={"b": "all", "pred": "all"},
        large=lambda: sample((300, 200)),
        errors=(
            Bad(TypeError, "b must be a Tensor, got list", dict(b=[1.0])),
            Bad(TypeError, "b must be floating, got torch.int64", dict(b=torch.arange(4))),
            Bad(ValueError, "b must have at least one dimension", dict(b=torch.tensor(1.0))),
            Bad(TypeError, "pred must be a Tensor, got NoneType", dict(pred=None)),
            Bad(ValueError, r"pred must have the shape of b, \[3, 4\], got \[4\]",
                dict(pred=V[0])),
            Bad(TypeError, "matvec must be callable, got Tensor", dict(matvec=V)),
            Bad(ValueError, r"matvec must keep the shape of its argument, \[3, 4\], got \[3, 2\]",
                dict(matvec=lambda v: v[:, :2])),
            Bad(TypeError, "the result of matvec must be a Tensor, got NoneType",
                dict(matvec=lambda v: None)),
            Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
        ),
    ),
    Spec(
        function=solution,
        name="dcdm_solve",
        covers=(dcdm_solve,),
        samples={
            "plain": system,
            "one vector": lambda: system((5,)),
            "from x0": lambda: system(x0=True, n_orth=3),
        },
        reference=solution_by_hand,
        dtypes=(F64, F32),
        tolerances={F32: (1e-4, 1e-5), F64: (1e-9, 1e-10)},
        autocast={},
        empty={"no systems": Empty(lambda: system((0, 5)), 0.0, (0, 5))},
        compile="outside of torch.compile",
        nan={"b": "row"},
        errors=(
            Bad(TypeError, "b must be a Tensor, got list", dict(b=[1.0])),
            Bad(TypeError, "b must be float32 or float64, got torch.int64",
                dict(b=torch.arange(4))),
            Bad(ValueError, "b must have at least one dimension", dict(b=torch.tensor(1.0))),
            Bad(ValueError, r"x0 must have the shape of b, \[3, 5\], got \[3, 4\]", dict(x0=V)),
            Bad(TypeError, "matvec must be callable, got Tensor", dict(matvec=V)),
            Bad(TypeError, "f must be callable, got NoneType", dict(f=None)),
            Bad(TypeError, "callback must be callable, got int", dict(callback=1)),
            Bad(ValueError, r"f must keep the shape of its argument, \[3, 5\], got \[3\]",
                dict(f=lambda r: r[:, 0])),
            Bad(TypeError, "f must give the dtype of b, torch.float32, got torch.float64",
                dict(f=lambda r: r.double())),
            Bad(ValueError, "tol must be finite and >= 0, got -1", dict(tol=-1)),
            Bad(ValueError, "maxiter must be >= 0, got -1", dict(maxiter=-1)),
            Bad(TypeError, "maxiter must be an integer, got float", dict(maxiter=2.5)),
            Bad(ValueError, "n_orth must be >= 0, got -1", dict(n_orth=-1)),
            Bad(RuntimeError, "matvec is not positive definite: <p, A p> is -",
                dict(matvec=torch.neg)),
            Bad(ValueError, "matvec is not symmetric",
                dict(matvec=lambda v: 2 * v + v.roll(1, -1), check_symmetric=True)),
        ),
    ),
    net_spec(
        poisson_net_2d, pyloss.nn.PoissonNet2d, ((2, 2, 4), (2, 3, 4)),
        (Bad(ValueError, r"residual must be \(B, H, W\), got \[2, 1, 4, 4\]",
             dict(residual=torch.ones(2, 1, 4, 4))),),
    ),
    net_spec(poisson_net_3d, pyloss.nn.PoissonNet3d, ((1, 2, 2, 4), (1, 2, 3, 1)), ()),
)  # fmt: skip
