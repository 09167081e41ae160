"""Coordinates of matrices, maps of images, and convolutions over groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import TORCH
from torch.func import functional_call

from pyloss.nn import lie
from pyloss.testing import make_logits
from specs._spec import BF16, F32, F64, Bad, Empty, Sample, Spec, beside


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_logits(shape, F64, scale=1.0, seed=seed)


# --------------------------------------------------------------------------------------------------
# Of a + 2, so that what the checks make of a stays of positive determinant


def shifted(a: torch.Tensor) -> torch.Tensor:
    return a + 2 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def decomposed(a):
    """P, R and the coordinates."""
    a = shifted(a)
    return *lie.polar(a), lie.xi_inv(a)


def rotation(a):
    """By Newton's iteration."""
    for _ in range(12):
        a = (a + torch.linalg.inv(a).mT) / 2
    return a


def logarithm(s):
    """By square roots, each by Newton's iteration, and a series."""
    unit = torch.eye(s.shape[-1], dtype=s.dtype)
    for _ in range(5):
        y, z = s, unit.expand_as(s)
        for _ in range(9):
            y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
        s = y
    ratio = torch.linalg.solve(s + unit, s - unit)
    power, total = ratio, 0.0
    for k in range(12):
        total = total + power / (2 * k + 1)
        power = power @ ratio @ ratio
    return 64 * total


def decomposed_reference(a):
    a = shifted(a)
    r = rotation(a)
    return a @ r.mT, r, coordinates_reference(a)


def coordinates_reference(a):
    x, y = logarithm(a @ a.mT) / 2, logarithm(rotation(a))
    n = a.shape[-1]
    i, j = torch.triu_indices(n, n, 1)
    on, root = x.diagonal(dim1=-2, dim2=-1), 2**0.5
    return torch.cat([on, root * x[..., i, j], root * y[..., j, i]], -1)


def matrices(count: int = 2, n: int = 2) -> Sample:
    return Sample(dict(a=normal(count, n, n) / 2))


def multiple_of_one(n: int) -> Sample:
    """Where all eigenvalues are equal, as g^-1 g in a convolution over a group."""
    return Sample(dict(a=-torch.eye(n, dtype=F64)[None]))


def xi_reference(coords):
    n = round(coords.shape[-1] ** 0.5)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    x = torch.diag_embed(coords[..., :n])
    y = torch.zeros_like(x)
    for k, (i, j) in enumerate(pairs):
        one = torch.zeros(n, n, dtype=F64)
        one[i, j] = 2**-0.5
        x = x + coords[..., n + k, None, None] * (one + one.T)
        y = y + coords[..., n + len(pairs) + k, None, None] * (one.T - one)
    return torch.linalg.matrix_exp(x) @ torch.linalg.matrix_exp(y)


def coordinates(count: int = 2, n: int = 2) -> Sample:
    return Sample(dict(coords=normal(count, n * n) / 2))


def warp_reference(images, g, translation):
    """Pixel by pixel."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))
    rows = []
    for b in range(batch):
        matrix, shift = (g[b], translation[b]) if g.dim() == 3 else (g, translation)
        for i in range(height):
            for j in range(width):
                x = torch.tensor([(2 * j + 1) / width - 1, (2 * i + 1) / height - 1], dtype=F64)
                u = torch.linalg.solve(matrix, x - shift)
                u = (u + 1) * torch.tensor([width, height]) / 2 + 0.5  # in pixels of padded
                at = u.detach().floor()
                share, total = u - at, 0.0
                for di in (0, 1):
                    for dj in (0, 1):
                        row, column = int(at[1]) + di, int(at[0]) + dj
                        if 0 <= row < height + 2 and 0 <= column < width + 2:
                            weight = (share[1] if di else 1 - share[1]) * (
                                share[0] if dj else 1 - share[0]
                            )
                            total = total + weight * padded[b, :, row, column]
                rows.append(total if torch.is_tensor(total) else 0 * padded[b, :, 0, 0])
    if not rows:
        return images + 0 * g.sum() + 0 * translation.sum()
    return torch.stack(rows).view(batch, height, width, -1).permute(0, 3, 1, 2)


def pictures(batch: int = 2) -> Sample:
    g = torch.tensor([[0.9, 0.31], [-0.17, 1.13]], dtype=F64)
    inputs = dict(images=normal(batch, 1, 3, 4), g=g.repeat(batch, 1, 1) * 1.01,
                  translation=torch.tensor([0.11, -0.07], dtype=F64).repeat(batch, 1))  # fmt: skip
    return Sample(inputs)


def one_map() -> Sample:
    return pictures().replace({name: pictures().inputs[name][0] for name in ("g", "translation")})


# --------------------------------------------------------------------------------------------------
# Layers with small kernel networks, made beforehand: Dynamo makes no modules

SMALL = dict(samples=2, padding=1, hidden=3, layers=1, omega=3.0, extent=1.5)
GL = lie.GL(weighting="haar", variance=0.3)
LIFTS = {
    "SL": lie.LiftConv2d(lie.SL(), 2, 2, 3, **SMALL),
    "GL": lie.LiftConv2d(GL, 2, 2, 3, mask="bump", **SMALL),
    "SO": lie.LiftConv2d(lie.SO(), 2, 2, 2, mask="none", **SMALL),
}
CONVOLUTIONS = {
    "GL": lie.GroupConv2d(GL, 2, 1, 3, **SMALL),
    "SO": lie.GroupConv2d(lie.SO(rotations="grid"), 2, 1, 2, **SMALL),
}
# Other samples in than out: the Jacobian belongs to those of the input.
CONVOLUTIONS["GL"].set_inputs_(GL.sample(2, torch.Generator().manual_seed(7)))


def call(layer, x, first, last, bias):
    state = {"kernel.layers.0.weight": first, "kernel.layers.1.weight": last, "bias": bias}
    return functional_call(beside(layer, x), state, (x,))


def lift(x, first, last, bias, *, group="SL"):
    return call(LIFTS[group], x, first, last, bias)


def convolve(x, first, last, bias, *, group="GL"):
    return call(CONVOLUTIONS[group], x, first, last, bias)


def summed(layer, x, first, last, bias, entries):
    """x (B, C, M', H, W): sums over the pixels of kernels, one for each pair of samples; `entries`
    of (inverse of g, number of h) are coordinates and a factor."""
    k, out = layer.kernel_size, []
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = (n + 3 - k for n in x.shape[-2:])
    b0, b1 = (layer.kernel.layers[i].bias.double() for i in (0, 1))
    for number in range(layer.samples):
        g = layer.g[number].double()
        total, found = 0.0, [entries(g, other) for other in range(x.shape[2])]
        for i in range(k):
            for j in range(k):
                v = torch.tensor([2 * j + 1 - k, 2 * i + 1 - k], dtype=F64) * layer.extent / k
                u = torch.linalg.inv(g) @ v
                r = u.norm()
                mask = {"disc": (r <= 1).double(), "bump": (1 - r * r).clamp_min(0) ** 2,
                        "sigmoid": torch.sigmoid(2 - 2 * r), "none": 1.0}[layer.mask]  # fmt: skip
                for other, (away, factor) in enumerate(found):
                    z = torch.sin(layer.omega * (first @ torch.cat([u, away]) + b0))
                    kernel = (last @ z + b1).view(layer.out_channels, layer.in_channels)
                    kernel = kernel * (mask * factor * (2 * layer.extent / k) ** 2)
                    part = padded[:, :, other, i : i + height, j : j + width]
                    total = total + torch.einsum("oc,bchw->bohw", kernel, part)
        out.append(total + bias[:, None, None])
    return torch.stack(out, 2)


def lift_reference(x, first, last, bias, *, group="SL"):
    return summed(LIFTS[group], x.unsqueeze(2), first, last, bias,
                  lambda g, _: (g.new_zeros(0), 1 / torch.linalg.det(g).abs()))  # fmt: skip


def convolve_reference(x, first, last, bias, *, group="GL"):
    layer = CONVOLUTIONS[group]

    def entries(g, other):
        h = layer.h[other].double()
        away = coordinates_reference(torch.linalg.inv(g) @ h)
        weight = layer.h_weight[other].double() / layer.samples
        return away[-layer.group.dim :], weight / torch.linalg.det(h).abs()

    return summed(layer, x, first, last, bias, entries)


def layer_sample(layer, x, **options) -> Sample:
    sizes = [layer.kernel.layers[i].weight.shape for i in (0, 1)]
    inputs = dict(x=x, first=normal(*sizes[0], seed=1), last=normal(*sizes[1], seed=2) / 3,
                  bias=normal(layer.out_channels, seed=3))  # fmt: skip
    return Sample(inputs, options)


def lifted(group: str = "SL", batch: int = 2) -> Sample:
    return layer_sample(LIFTS[group], normal(batch, 2, 3, 2), group=group)


def convolved(group: str = "GL", batch: int = 2) -> Sample:
    return layer_sample(CONVOLUTIONS[group], normal(batch, 2, 2, 2, 2), group=group)


A, I = matrices().inputs["a"], pictures().inputs
X, Y = lifted().inputs["x"], convolved().inputs["x"]
SPECS = (
    Spec(
        function=decomposed,
        name="polar_and_xi_inv",
        covers=(lie.polar, lie.xi_inv),
        samples={
            "plane": matrices,
            "unit": lambda: multiple_of_one(2),
            "space": lambda: matrices(n=3),
            "unit of space": lambda: multiple_of_one(3),
        },
        derivative_samples=("unit", "space", "unit of space"),
        reference=decomposed_reference,
        gradients=("a",),
        dtypes=(F64, F32),
        vmap=("a",),
        autocast={F32: F32, F64: F64},
        tolerances={F32: (1e-4, 1e-5)},
        empty={"no matrices": Empty(lambda: matrices(0), 0.0, (0, 2, 2))},
        nan={"a": "row"},
        errors=(
            Bad(TypeError, "a must be floating", dict(a=A.long())),
            Bad(ValueError, "a must have positive determinants, got one of -",
                dict(a=torch.tensor([[-3.0, 0.5], [0.5, 1.0]]))),
        ),
    ),
    Spec(
        function=lie.xi,
        exhaustive=("compiled",),
        samples={
            "plane": coordinates,
            "zero": lambda: Sample(dict(coords=torch.zeros(1, 4, dtype=F64))),
            "space": lambda: coordinates(n=3),
        },
        derivative_samples=("zero", "space"),
        reference=xi_reference,
        gradients=("coords",),
        vmap=("coords",),
        autocast={BF16: BF16, F32: F32, F64: F64},
        empty={"no matrices": Empty(lambda: coordinates(0), 0.0, (0, 2, 2))},
        nan={"coords": "row"},
        errors=(
            Bad(TypeError, "coords must be floating", dict(coords=A.long())),
            Bad(ValueError, r"coords must be \(..., n \* n\), got \[2, 3\]",
                dict(coords=normal(2, 3))),
        ),
    ),
    Spec(
        function=lie.warp,
        samples={"each": pictures, "one map": one_map},
        reference=warp_reference,
        gradients=("images", "g", "translation"),
        dtypes=(F64, F32),
        autocast={F32: F32, F64: F64},
        gradgrad=TORCH >= (2, 13) or "derivative for aten::grid_sampler_2d_backward",
        forward_mode=(no_tangents := "forward AD with grid_sampler_2d"),
        transforms=dict.fromkeys(("jvp", "jacfwd", "hessian"), no_tangents),
        empty={"no images": Empty(lambda: pictures(0), 0.0, (0, 1, 3, 4))},
        nan={"images": "any", "g": "row", "translation": "row"},
        errors=(
            Bad(TypeError, "images must be floating", dict(images=I["images"].long())),
            Bad(ValueError, r"images must be \(B, C, H, W\), got \[1, 3, 4\]",
                dict(images=I["images"][0])),
            Bad(ValueError, r"g must be \(2, 2\) or \(2, 2, 2\), got \[1, 2, 2\]",
                dict(g=I["g"][:1])),
            Bad(ValueError, r"translation must be \(2,\) or \(2, 2\), got \[1, 2\]",
                dict(translation=I["translation"][:1])),
        ),
    ),
    Spec(
        function=lift,
        name="LiftConv2d",
        covers=(lie.LiftConv2d,),
        samples={"SL": lifted, "GL": lambda: lifted("GL"), "SO": lambda: lifted("SO")},
        derivative_samples=("GL",),
        reference=lift_reference,
        gradients=("x", "first", "last", "bias"),
        dtypes=(F64, F32),
        autocast={F32: BF16, F64: F64},
        autocast_rounds=True,
        tolerances={F64: (1e-4, 1e-5), F32: (1e-3, 1e-4)},  # samples are float32
        vmap=("x",),
        empty={"no images": Empty(lambda: lifted(batch=0), 0.0, (0, 2, 2, 3, 2))},
        nan={"x": "any", "last": "any"},
        threads=False,
        errors=(
            Bad(TypeError, "x must be floating", dict(x=X.long())),
            Bad(ValueError, r"x must be \(B, 2, H, W\), got \[2, 3, 2\]", dict(x=X[0])),
        ),
    ),
    Spec(
        function=convolve,
        name="GroupConv2d",
        covers=(lie.GroupConv2d,),
        exhaustive=("compiled",),
        samples={"GL": convolved, "SO": lambda: convolved("SO")},
        derivative_samples=("GL",),
        reference=convolve_reference,
        gradients=("x", "first", "last", "bias"),
        dtypes=(F64, F32),
        autocast={F32: BF16, F64: F64},
        autocast_rounds=True,
        tolerances={F64: (1e-4, 1e-5), F32: (1e-3, 1e-4)},
        vmap=("x",),
        empty={"no images": Empty(lambda: convolved(batch=0), 0.0, (0, 1, 2, 2, 2))},
        nan={"x": "any", "last": "any"},
        threads=False,
        errors=(
            Bad(TypeError, "x must be floating", dict(x=Y.long())),
            Bad(ValueError, r"x must be \(B, 2, 2, H, W\), with the samples of the layer before, "
                r"got \[2, 2, 1, 2, 2\]", dict(x=Y[:, :, :1])),
        ),
    ),
)  # fmt: skip
