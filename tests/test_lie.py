"""pyloss.nn.lie: round trips, Haar's measure, layers that move with their input."""

from __future__ import annotations

import argparse
import copy
import math
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from pyloss.nn import lie

F64 = torch.float64
EXAMPLES = Path(__file__).parent.parent / "examples"


def positive(count: int, n: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(count, n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return a[torch.linalg.det(a) > 1e-3]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_polar_and_coordinates_go_there_and_back(n: int):
    a = positive(400, n)
    p, r = lie.polar(a)
    torch.testing.assert_close(p @ r, a, rtol=0, atol=1e-10)
    torch.testing.assert_close(r @ r.mT, torch.eye(n, dtype=F64).expand_as(a), rtol=0, atol=1e-10)
    assert (p - p.mT).abs().max() < 1e-12
    assert (torch.linalg.det(r) > 0).all() and (torch.linalg.eigvalsh(p) > 0).all()
    if n <= 3:
        coords = lie.xi_inv(a)
        torch.testing.assert_close(lie.xi(coords), a, rtol=0, atol=1e-10)
        torch.testing.assert_close(lie.xi_inv(lie.xi(coords)), coords, rtol=0, atol=1e-10)


def test_coordinates_where_there_is_no_real_logarithm():
    """A fifth of GL+(2): two negative eigenvalues that differ."""
    a = positive(2000, 2)
    w = torch.linalg.eigvals(a)
    without = (w.imag == 0).all(1) & (w.real < 0).all(1)
    assert 0.1 < without.double().mean() < 0.3
    torch.testing.assert_close(lie.xi(lie.xi_inv(a[without])), a[without], rtol=0, atol=1e-10)


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.1, 3.0, math.pi - 1e-7, math.pi])
def test_rotations_of_space_at_every_angle(angle: float):
    """About axes on which the trace, or another entry, is the largest."""
    axes = torch.cat([torch.eye(3, dtype=F64), torch.randn(5, 3, dtype=F64)])
    coords = math.sqrt(2) * angle * torch.nn.functional.normalize(axes)
    r = lie.SO(3).xi(coords)
    found = lie.SO(3).xi_inv(r)
    torch.testing.assert_close(lie.SO(3).xi(found), r, rtol=0, atol=1e-12)
    if angle < math.pi:  # there both directions are right
        torch.testing.assert_close(found, coords, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n", [2, 3])
def test_ill_conditioned_matrices(n: int):
    u, v = (lie.SO(n).sample(20, dtype=F64).g for _ in range(2))
    a = u @ torch.diag(torch.tensor([1e3, 1e-3, 1.0][:n], dtype=F64)) @ v
    torch.testing.assert_close(lie.xi(lie.xi_inv(a)), a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", [lie.GL(), lie.SL(), lie.SL(3), lie.SO(), lie.SO(3), lie.GL(3)])
def test_groups(group):
    """Samples lie in the group and its coordinates are those of its dimension."""
    g, inverse, weight = group.sample(30, torch.Generator().manual_seed(0), dtype=F64)
    unit = torch.eye(group.n, dtype=F64).expand_as(g)
    torch.testing.assert_close(g @ inverse, unit)
    assert (weight == 1).all()
    coords = group.xi_inv(g)
    assert coords.shape == (30, group.dim)
    torch.testing.assert_close(group.xi(coords), g)
    det = torch.linalg.det(g)
    assert group.volume_preserving == torch.allclose(det, torch.ones_like(det))
    # Orthonormal: the length of coordinates is the norm of log P + log R.
    if isinstance(group, lie.SO):
        turn = ((torch.einsum("mii->m", g) - (group.n - 2)) / 2).clamp(-1, 1).acos()
        torch.testing.assert_close(coords.norm(dim=1), math.sqrt(2) * turn)
    else:
        log_p = torch.linalg.svdvals(g).log()
        dim = group.dim - group.n * (group.n - 1) // 2
        torch.testing.assert_close(coords[:, :dim].norm(dim=1), log_p.norm(dim=1))
    assert copy.deepcopy(group) == group == pickle.loads(pickle.dumps(group))
    assert eval(repr(group), vars(lie) | {n: getattr(lie, n) for n in lie.__all__}) == group


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_small_and_large_matrices_in_float32(size: float):
    a = size * positive(50, 3).float()[:20]
    found = lie.xi(lie.xi_inv(a))
    torch.testing.assert_close(found / size, a / size, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_third_derivative_is_right_or_nan(n: int):
    """In closed form there are all, at the identity too; of eigenvalues there are two."""
    a = torch.stack([torch.eye(n, dtype=F64), positive(20, n)[0]]).requires_grad_()

    def second(a):
        """Along the ones, twice."""
        found = torch.cat([*(t.flatten(1) for t in lie.polar(a)), lie.xi_inv(a)], 1).sin().sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(found, a, create_graph=True)
            found = g.sum()
        return g

    if n < 3:
        assert torch.autograd.gradcheck(second, (a,))
    else:
        assert second(a).isfinite().all()
        assert torch.autograd.grad(second(a).sum(), a)[0].isnan().all()


def test_half_types_are_computed_in_float32():
    a = positive(20, 2).bfloat16()
    for f in (lambda x: lie.polar(x).P, lie.xi_inv, lambda x: lie.xi(x.flatten(1) / 2)):
        assert torch.equal(f(a), f(a.float()).bfloat16())


def test_rotations_on_a_grid_and_in_a_range():
    g = lie.SO(rotations="grid").sample(8, torch.Generator().manual_seed(0), dtype=F64).g
    angles = torch.atan2(g[:, 1, 0], g[:, 0, 0]).sort().values
    torch.testing.assert_close(angles.diff(), torch.full((7,), math.pi / 4, dtype=F64))
    g = lie.SL(max_angle=0.2, variance=0.0).sample(50, dtype=F64).g
    angles = torch.atan2(g[:, 1, 0], g[:, 0, 0])
    assert 0.1 < angles.abs().max() <= 0.2


def haar_means(group, m: int, moved: torch.Tensor):
    """Weighted mean of a function of A, of (moved A) and of (A moved), with standard errors of the
    differences."""
    g, _, weight = group.sample(m, torch.Generator().manual_seed(1), dtype=F64)

    def f(a):
        size = a.square().sum((1, 2)) + torch.linalg.inv(a).square().sum((1, 2))
        return torch.exp(-size / 2) * (1.5 + a[:, 0, 0] + a[:, 0, 1])

    plain, *others = (weight * f(a) for a in (g, moved @ g, g @ moved))
    return [((o - plain).mean(), (o - plain).std() / math.sqrt(m), plain.mean()) for o in others]


@pytest.mark.parametrize("m", [10_000, pytest.param(200_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", [lie.GL, lie.SL])
def test_haar_weights_make_means_invariant(kind, m: int):
    a = torch.tensor([[1.1, 0.45], [0.0, 1 / 1.1]], dtype=F64)
    for off, error, value in haar_means(kind(variance=0.8, weighting="haar"), m, a):
        assert off.abs() < 3 * error, (off, error)
        assert error < 12 / math.sqrt(m) * value  # the test can see something
    changes = [off.abs() / error for off, error, _ in haar_means(kind(variance=0.8), m, a)]
    assert max(changes) > 5  # the measure of the samples is not invariant


def test_haar_weights_are_those_of_direct_integration():
    """Over GL+(2) with the density det(A)^-2: the ratio of two integrals."""

    def f(a):
        size = a.square().sum((1, 2)) + torch.linalg.inv(a).square().sum((1, 2))
        return torch.exp(-size / 2), torch.exp(-size / 2) * a[:, 0].square().sum(1)

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40_000, 2, 2, dtype=F64, generator=generator)
    det = torch.linalg.det(a)
    a, det = a[det > 1e-3], det[det > 1e-3]
    density = det**-2 / torch.exp(-a.square().sum((1, 2)) / 2)
    one, two = ((density * value).mean() for value in f(a))
    g, _, weight = lie.GL(variance=0.8, weighting="haar").sample(40_000, generator, dtype=F64)
    three, four = ((weight * value).mean() for value in f(g))
    assert abs(two / one - four / three) < 0.03 * two / one


# --------------------------------------------------------------------------------------------------
# Layers


def picture(points: torch.Tensor) -> torch.Tensor:
    """A smooth image at any points (..., 2)."""
    centres = torch.tensor([[0.6, 0.2], [-0.5, 0.7], [0.1, -0.9], [-0.8, -0.3]], dtype=F64)
    sizes = torch.tensor([1.0, -0.7, 0.8, 0.5], dtype=F64)
    return (sizes * torch.exp(-(points.unsqueeze(-2) - centres).square().sum(-1))).sum(-1)


def pixels(n: int, half: float) -> torch.Tensor:
    """(n, n, 2), horizontal and vertical, [-half, half]."""
    line = torch.arange(1 - n, n, 2, dtype=F64) * half / n
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)


def network(group, k: int, mask: str, deep: bool) -> nn.Sequential:
    options = dict(samples=4, hidden=6, layers=1, omega=3.0, mask=mask, extent=2.5)
    torch.manual_seed(0)
    layers = [lie.LiftConv2d(group, 1, 2, k, **options)]
    if deep:
        layers += [nn.Tanh(), lie.GroupConv2d(group, 2, 2, k, **options)]
    return nn.Sequential(*layers).double()


def moved_error(group, k: int, mask: str, deep: bool) -> float:
    """Of the output at the middle of an image, and of its transform at transformed samples."""
    model = network(group, k, mask, deep)
    # The same function of places on every grid: the first weights depend on its pixels.
    for layer in model:
        if hasattr(layer, "kernel"):
            last = layer.kernel.layers[-1]
            last.weight.data.copy_(
                torch.linspace(-1, 1.3, last.weight.numel()).view_as(last.weight)
            )
    size = 2 * k - 1 if deep else k
    grid = pixels(size, 2.5 * size / k)
    a = torch.tensor([[1.15, 0.3], [-0.1, 0.9]], dtype=F64)
    a = a if not group.volume_preserving else a / torch.linalg.det(a).sqrt()
    results = []
    for matrix in (torch.eye(2, dtype=F64), a):
        image = picture(grid @ torch.linalg.inv(matrix).T)
        g, inverse, weight = group.sample(4, torch.Generator().manual_seed(3), dtype=F64)
        sample = lie.GroupSample(matrix @ g, inverse @ torch.linalg.inv(matrix), weight)
        for layer in model:
            if isinstance(layer, (lie.LiftConv2d, lie.GroupConv2d)):
                layer.set_samples_(sample)
            if isinstance(layer, lie.GroupConv2d):
                layer.set_inputs_(sample)
        with torch.no_grad():
            results.append(model(image[None, None]).flatten())
    return ((results[0] - results[1]).norm() / results[0].norm()).item()


@pytest.mark.parametrize(
    ("group", "mask", "deep"),
    [(lie.SL(), "disc", False), (lie.GL(), "bump", False), (lie.SL(), "disc", True),
     (lie.GL(), "bump", True)],
    ids=["lift SL", "lift GL", "group SL", "group GL"],
)  # fmt: skip
def test_layers_move_with_their_input(group, mask: str, deep: bool):
    """The better, the finer the grid. Of GL: each Jacobian where it belongs."""
    errors = [moved_error(group, k, mask, deep) for k in (11, 21, 41)]
    assert errors[2] < 0.03, errors
    assert errors[2] < errors[0], errors
    if mask == "bump":
        assert errors[2] < errors[1] / 2 < errors[0] / 4, errors


def model_of(group=None, samples: int = 3, **options) -> nn.Sequential:
    group = lie.SL() if group is None else group
    options = dict(samples=samples, padding=1, hidden=4) | options
    return nn.Sequential(
        lie.LiftConv2d(group, 1, 2, 3, **options), nn.GELU(),
        lie.GroupConv2d(group, 2, 2, 3, **options), nn.GELU(),
        lie.GroupConv2d(group, 2, 3, 3, **options),
    )  # fmt: skip


def test_resample_ties_each_layer_to_the_one_before():
    model = model_of()
    lifts, first, last = model[0], model[2], model[4]
    assert torch.equal(first.h, lifts.g) and torch.equal(last.h, first.g)
    for share in (True, False):
        before = lifts.g.clone()
        assert lie.resample_(model, torch.Generator().manual_seed(1), share=share) is model
        assert torch.equal(first.h, lifts.g) and torch.equal(last.h, first.g)
        assert not torch.equal(lifts.g, before) or not share
        assert torch.equal(first.g, lifts.g) == share
        torch.testing.assert_close(first.g @ first.g_inverse, torch.eye(2).expand(3, 2, 2))
    x = torch.randn(2, 1, 5, 5)
    out = model(x)
    other = model_of()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), out) and torch.equal(copy.deepcopy(model)(x), out)


def test_gradients_are_finite_where_samples_are_the_same():
    """g^-1 g = 1 in every group convolution: there eigenvalues meet."""
    model = model_of(lie.GL())
    lie.resample_(model, torch.Generator().manual_seed(0))
    model(torch.randn(2, 1, 5, 5)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_half_precision_keeps_the_samples():
    model = model_of().bfloat16()
    assert (
        model[0].g.dtype == torch.float32
        and model[0].kernel.layers[0].weight.dtype != model[0].g.dtype
    )
    x = torch.randn(2, 1, 5, 5)
    found = model(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), model.float()(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.exhaustive
def test_lie_layers_know_sheared_digits_that_they_have_not_seen():
    """The example, one seed: by ten points at least better than plain convolution."""
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(EXAMPLES / "affine_digits.py"))
    options = dict(width=32, samples=6, variance=0.1, draws=4, epochs=20, batch=50, rate=5e-3,
                   levels=[], quick=False)  # fmt: skip
    task = example["Task"](0, argparse.Namespace(**options))
    plain, ours = task.run("plain"), task.run("SL")
    assert ours["sheared"] > plain["sheared"] + 10 and ours["turned"] > plain["turned"] + 10
