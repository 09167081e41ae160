"""Betti matching of volumes: the kernel against the reference, peers, properties, cycles, metrics.

What does not depend on the number of dimensions is tested in `test_betti_matching.py`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from betti_matching_cases import KINDS, check_pair, fields, image, random_volumes, rows
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pyloss
from pyloss.functional._images import FILTRATIONS
from pyloss.reference import betti_matching as reference

# --------------------------------------------------------------------------------------------------
# Coordinates


def test_random_volumes_match_the_reference():
    rng = random.Random(2)
    for _ in range(500):
        check_pair(*random_volumes(rng))


@pytest.mark.exhaustive
def test_many_random_volumes():
    rng = random.Random(3)
    for _ in range(10_000):
        check_pair(*random_volumes(rng, 4))


def check_cavities(rng: random.Random, count: int) -> None:
    """Random volumes so small hardly ever have one."""
    total = torch.zeros(3, dtype=torch.int64)
    for levels in range(count):
        x, y = (image(rng, (1, 4, 5, 4), n) for n in (levels % 4, rng.choice([0, 1, 3])))
        for v in (x, y):
            inner = v[:, 1:-1, 1:-1, 1:-1]
            inner += (image(rng, inner.shape, 0) < 0.4).to(v.dtype)
        superlevel = rng.random() < 0.5
        x, y = (-v if superlevel else v for v in (x, y))
        check_pair(x, y, superlevel)
        found = pyloss.betti_matching(x, y, 3, filtration=FILTRATIONS[superlevel], dims=[2])
        total += found.counts[0, 2]
    assert (total > 0).all()


def test_cavities():
    check_cavities(random.Random(9), 8)


@pytest.mark.exhaustive
def test_many_cavities():
    check_cavities(random.Random(10), 300)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1), (1, 4, 3), (3, 4, 1), (2, 9, 2)])
@pytest.mark.parametrize("levels", [0, 1, 2, 4])
def test_shapes(shape, levels):
    rng = random.Random(4)
    check_pair(image(rng, (1, *shape), levels), image(rng, (1, *shape), 2), levels == 4)


def test_a_volume_of_one_slice_is_an_image():
    """Whichever axis has length 1; the voxels too, as the order of cells is the same."""
    x, y = fields(12)
    flat = rows(pyloss.betti_matching(x, y))
    for axis in (2, 3, 4):
        assert rows(pyloss.betti_matching(x.unsqueeze(axis), y.unsqueeze(axis))) == flat


def places(matching: pyloss.BettiMatching, kind: str, dim: int) -> list[list[int]]:
    return sorted(matching.coordinates(kind, 0, dim).flatten(1).tolist())


def test_betti_matching_3d():
    """The program of the paper, voxel by voxel."""
    theirs = pytest.importorskip("betti_matching")
    rng = random.Random(5)
    pairs = [random_volumes(rng, 5)[:2] for _ in range(100)] + [fields(14, spatial=3)]
    for x, y in pairs:
        x, y = x[(0,) * (x.dim() - 3)], y[(0,) * (y.dim() - 3)]
        (found,) = theirs.compute_matching([x.double().numpy()], [y.double().numpy()])
        ours = pyloss.betti_matching(x, y, 3, filtration="sublevel")
        for kind, sides in zip(KINDS, (("input1", "input2"), ("input1",), ("input2",))):
            group = kind.partition("_")[0]
            names = [f"{s}_{group}_{end}_coordinates" for s in sides for end in ("birth", "death")]
            for dim in range(3):
                ends = [getattr(found, name)[dim] for name in names]
                bars = [[int(v) for end in bar for v in end] for bar in zip(*ends)]
                assert places(ours, kind, dim) == sorted(bars), (kind, dim, x, y)


def finite(values) -> list[tuple[float, float]]:
    return sorted((round(b, 6), round(d, 6)) for b, d in values if b != d and d < 1e30)


def volumes() -> Iterator[Tensor]:
    rng = random.Random(8)
    for _ in range(20):
        shape = [rng.randint(2, 6) for _ in range(3)]
        yield image(rng, tuple(shape), rng.choice([0, 3, 6]))
    yield fields(20, spatial=3)[0][0, 0].double()


@pytest.mark.parametrize("construction", ["V", "T"])
def test_gudhi(construction):
    gudhi = pytest.importorskip("gudhi")
    name = "vertices" if construction == "V" else "top_dimensional_cells"
    for x in volumes():
        complex_ = gudhi.CubicalComplex(**{name: x.numpy()})
        theirs = complex_.persistence(homology_coeff_field=2, min_persistence=0.0)
        pairs = pyloss.persistence_pairs(x, 3, construction=construction)
        for d in range(3):
            ours = pairs.values[pairs.index[:, 1] == d].tolist()
            assert finite(ours) == finite(v for k, v in theirs if k == d)


def test_cripser():
    cripser = pytest.importorskip("cripser")
    for x in volumes():
        theirs = cripser.computePH(x.numpy(), maxdim=2)
        pairs = pyloss.persistence_pairs(x, 3)
        for d in range(3):
            ours = pairs.values[pairs.index[:, 1] == d].tolist()
            assert finite(ours) == finite((r[1], r[2]) for r in theirs if r[0] == d)


def test_threads(keep_num_threads):
    """Bit for bit: the runs of one volume in parallel, and items."""
    for batch in (1, 3):
        x = torch.cat([fields(26, seed, 3)[0] for seed in range(batch)]).requires_grad_()
        y = torch.cat([fields(26, seed, 3)[1] for seed in range(batch)])
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            value = pyloss.betti_matching_loss(x, y, reduction="none")
            (grad,) = torch.autograd.grad(value.sum(), x)
            pairs = pyloss.persistence_pairs(x).index
            found.append((value.detach(), grad, pairs, rows(pyloss.betti_matching(x, y))))
        for value, grad, pairs, table in found[1:]:
            assert torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1])
            assert torch.equal(pairs, found[0][2]) and table == found[0][3]


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(32, 256, 256), (3, 4, 40_000)])
def test_anisotropic_volumes(shape):
    """A transposed volume has the same bars, as values."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = []
    for order in itertools.islice(itertools.permutations(range(3)), 0, 6, 5):
        pairs = pyloss.persistence_pairs(x.permute(order), 3)
        order = torch.argsort(pairs.values[:, 1], stable=True)
        order = order[torch.argsort(pairs.values[order, 0], stable=True)]
        order = order[torch.argsort(pairs.index[order, 1], stable=True)]
        found.append((pairs.counts, pairs.values[order]))
    assert all(map(torch.equal, *found))


# --------------------------------------------------------------------------------------------------
# Properties


def test_properties():
    x, y = fields(11, spatial=3)
    m = pyloss.betti_matching(x, y)
    assert (m.counts.sum(-1) > 0).all()  # there are bars of every dimension
    f = lambda t: (3 * t.double()).exp() - 7  # noqa: E731
    assert rows(pyloss.betti_matching(f(x), f(y))) == rows(m)  # an increasing map keeps places
    same = pyloss.betti_matching(x, x)
    assert len(same.matched) and not len(same.unmatched_input) + len(same.unmatched_target)
    assert torch.equal(same.matched[:, 2:4], same.matched[:, 4:])
    mirror = pyloss.betti_matching(y, x)
    assert m.matched.tolist() == sorted(mirror.matched[:, [0, 1, 4, 5, 2, 3]].tolist())
    assert torch.equal(m.unmatched_input, mirror.unmatched_target)
    pairs = pyloss.persistence_pairs(x, filtration="superlevel")
    both = m.matched[:, :4].tolist() + m.unmatched_input.tolist()
    assert sorted(both) == pairs.index.tolist()
    stacked = pyloss.betti_matching(torch.cat([y, x]), torch.cat([x, y]))
    assert torch.equal(stacked.counts[1], m.counts[0])


# --------------------------------------------------------------------------------------------------
# Loss


def test_dims_add_up():
    x, y = fields(9, spatial=3)
    parts = [pyloss.betti_matching_loss(x, y, dims=[d]) for d in range(3)]
    torch.testing.assert_close(pyloss.betti_matching_loss(x, y), sum(parts))
    weighted = pyloss.betti_matching_loss(x, y, dims=[2, 1], weight=[0.5, 2.0])
    torch.testing.assert_close(weighted, 0.5 * parts[2] + 2 * parts[1])


def test_derivatives():
    x = ((torch.randperm(18) + 1) / 19.0).double().view(1, 1, 3, 2, 3).requires_grad_()
    y = torch.rand(1, 1, 3, 2, 3).double().requires_grad_()

    def loss(a, b):
        return pyloss.betti_matching_loss(a, b, padding="foreground", filtration="both")

    assert gradcheck(loss, (x, y), eps=1e-4)
    assert gradcheck(loss, (x, y.detach()), eps=1e-4)
    assert gradgradcheck(loss, (x, y), eps=1e-4)


def test_vmap():
    x, y = torch.rand(2, 3, 1, 2, 2, 3, 3, dtype=torch.float64).unbind(0)

    def loss(a, b):
        return pyloss.betti_matching_loss(a, b, essential=True, weight=[1.0, 2.0, 0.5])

    for f in (loss, torch.func.grad(loss)):
        each = torch.stack([f(a, b) for a, b in zip(x, y)])
        torch.testing.assert_close(torch.vmap(f)(x, y), each)


def test_opcheck():
    x, y = torch.rand(1, 2, 3, 3, 2), (torch.rand(1, 2, 3, 3, 2) > 0.5).float()
    options = [1.0, 7.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    torch.library.opcheck(torch.ops.pyloss.betti_loss_fused, (x, y, options))


def test_several_classes_and_prepared_targets():
    x, labels = torch.rand(2, 3, 4, 3, 3).softmax(1), torch.randint(3, (2, 4, 3, 3))
    labels[:, 0, 0] = 255
    options = dict(include_background=False, ignore_index=255, padding="background")
    found = []
    for target in (
        labels,
        pyloss.BettiTarget.precompute(
            labels, num_classes=3, ignore_index=255, padding="background"
        ),
    ):
        leaf = x.clone().requires_grad_()
        value = pyloss.betti_matching_loss(leaf, target, **options)
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    assert all(map(torch.equal, *found)) and found[0][0] > 0
    assert not found[0][1][:, 0].any() and not found[0][1][:, :, 0, 0].any()
    hot = torch.stack([labels == 1, labels == 2], 1)
    cut = x[:, 1:].masked_fill((labels == 255)[:, None], 0)
    exact = pyloss.betti_matching_loss(cut, hot, padding="background")
    torch.testing.assert_close(found[0][0], exact)
    alone = pyloss.betti_matching_loss(x[:, 1], labels == 1, spatial_dims=3)
    torch.testing.assert_close(alone, pyloss.betti_matching_loss(x[:, 1:2], (labels == 1)[:, None]))


# --------------------------------------------------------------------------------------------------
# Betti numbers, cycles, metrics


def solids() -> tuple[Tensor, Tensor]:
    """A ring and a hollow cube beside a voxel, 7 x 7 x 7; and the ring alone."""
    ring = torch.zeros(7, 7, 7)
    ring[0, :4, :4] = 1
    ring[0, 1:3, 1:3] = 0
    both = ring.clone()
    both[3:6, 3:6, 3:6] = 1
    both[4, 4, 4] = 0
    both[6, 0, 6] = 1
    return both, ring


def test_betti_numbers():
    both, ring = solids()
    assert pyloss.betti_numbers(both, 3).tolist() == [3, 1, 1]
    assert pyloss.betti_numbers(ring, 3).tolist() == [1, 1, 0]
    assert pyloss.betti_numbers(1 - both, 3).tolist() == [2, 0, 1]
    rng = random.Random(7)
    masks = [image(rng, tuple(rng.randint(1, 4) for _ in range(3)), 2).bool() for _ in range(40)]
    for mask in masks:
        assert pyloss.betti_numbers(mask, 3).tolist() == reference.betti_numbers(mask)
    for fill in (0, 1):
        mask = torch.full((2, 1, 3, 3, 3), fill)
        assert pyloss.betti_numbers(mask).tolist() == [[[fill, 0, 0]]] * 2
    assert pyloss.betti_numbers(torch.zeros(0, 1, 3, 3, 3)).shape == (0, 1, 3)


def test_metrics():
    both, ring = (t[None, None] for t in solids())
    assert pyloss.betti_number_error(both, ring).tolist() == [2, 0, 1]
    assert pyloss.betti_matching_error(both, ring).tolist() == [2, 0, 1]
    assert pyloss.betti_matching_error(both, ring, normalize=True) == 1  # 3 errors, 2 features
    gray = pyloss.betti_matching_error(both, ring, binarize=False)
    torch.testing.assert_close(gray.sum(), pyloss.betti_matching_loss(both, ring))
    metric = pyloss.metrics.BettiNumberError(spatial_dims=3)
    metric.update(both[0], ring[0])
    metric.update(ring[0], ring[0])
    assert metric.compute().tolist() == [1, 0, 0.5]


def as_set(voxels: Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, voxels.tolist()))


def test_representative_cycles():
    both, _ = solids()
    m = pyloss.betti_matching(both, both, 3, padding="background")
    (dot, cube) = sorted(m.representative_cycles(0, "input", 0), key=len)
    assert as_set(dot[:-1]) == {(6, 0, 6)} and len(cube) == 27
    (cavity,) = m.representative_cycles(0, "target", 2)
    shell = as_set(both.nonzero()) & set(itertools.product(range(3, 6), repeat=3))
    assert as_set(cavity[:-1]) == shell and cavity[-1].tolist() == [4, 4, 4]
    for which in ("input", "comparison"):
        (loop,) = m.representative_cycles(0, which, 1)
        assert as_set(loop[:-1]) <= as_set(both.nonzero()) and len(loop) == 13
        assert both[tuple(loop[-1])] == 0


@pytest.mark.parametrize("levels", [0, 3])
def test_loops_are_closed_and_no_younger_than_their_birth(levels):
    """Each vertex has an even number of the edges; the birth is the last of them."""
    x = image(random.Random(1), (6, 5, 7), levels)
    pairs = torch.ops.pyloss.persistence_pairs(x[None], False, [1], False)
    assert len(pairs) > 10
    place = {c: i for i, c in enumerate(reference.Filtration(x).order(1))}
    number = {reference.cell_id(x.shape, c): i for i, c in enumerate(reference.cells(x.shape, 1))}
    loops = pyloss.ops.betti_matching.loops(x, pairs[:, 5].tolist())
    strides = (35, 7, 1)
    for edges, (birth, _) in zip(loops, pairs[:, 4:].tolist()):
        ends = [p for e in edges for p in (e // 3, e // 3 + strides[e % 3])]
        assert all(ends.count(p) % 2 == 0 for p in set(ends)) and len(set(edges)) == len(edges)
        assert max(edges, key=lambda e: place[number[e]]) == birth
