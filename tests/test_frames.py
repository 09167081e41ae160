"""Frame averaging: symmetry under drawn moves of each group, and where there is none; conservation;
ragged, padded and single clouds; equal eigenvalues; stochastic frames; orders of graphs."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn

import pyloss
from pyloss.functional import laplacian_sort_frame, pca_frames
from pyloss.nn import FrameAverage
from pyloss.testing import make_logits

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
GROUPS = ("O", "SO", "E", "SE")
POINTS = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turns(count: int, d: int, special: bool, dtype=F64, seed: int = 1) -> torch.Tensor:
    """Haar, of determinant 1 or of both."""
    q, r = torch.linalg.qr(torch.randn(count, d, d, generator=generator(seed), dtype=F64))
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    if special:
        q[:, :, 0] *= torch.linalg.det(q).sign().unsqueeze(1)
    return q.to(dtype)


def moves(count: int, d: int, group: str, dtype=F64) -> tuple[torch.Tensor, torch.Tensor]:
    shift = 3 * torch.randn(count, 1, d, generator=generator(2), dtype=F64)
    return turns(count, d, "S" in group, dtype), shift.to(dtype) * ("E" in group)


def cloud(d: int = 3, seed: int = 0, n: int = POINTS) -> torch.Tensor:
    """With gaps between the eigenvalues, and no symmetry."""
    spread = torch.arange(1, d + 1, dtype=F64).sqrt()
    return make_logits((1, n, d), F64, scale=1.0, seed=seed) * spread


def network(d: int, *out: int, n: int = POINTS, seed: int = 0, dtype=F64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        size = torch.Size(out).numel()
        layers = nn.Flatten(), nn.Linear(n * d, 24), nn.ReLU(), nn.Linear(24, size)
        return nn.Sequential(*layers, nn.Unflatten(1, out)).to(dtype)


# --------------------------------------------------------------------------------------------------
# Symmetry


@pytest.mark.parametrize("dtype, bound", ((F64, 1e-10), (F32, 2e-5)), ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("d", (2, 3, 4))
def test_a_hundred_moves(d: int, group: str, dtype: torch.dtype, bound: float) -> None:
    x = cloud(d).to(dtype)
    g, shift = moves(100, d, group, dtype)
    moved = x @ g.mT + shift
    outs = {"invariant": (5,), "position": (4, d), "vector": (4, d), "tensor2": (2, d, d)}
    for kind, shape in outs.items():
        f = FrameAverage(network(d, *shape, dtype=dtype), group, dim=d, out_type=kind)
        y = f(x)
        wanted = {
            "invariant": lambda y=y: y,
            "position": lambda y=y: y @ g.mT + shift,
            "vector": lambda y=y: y @ g.mT,
            "tensor2": lambda y=y: g.unsqueeze(1) @ y @ g.mT.unsqueeze(1),
        }[kind]()
        assert (f(moved) - wanted).abs().max() <= bound, kind
        assert y.abs().max() > 0.01  # that it is not 0 for all


@pytest.mark.parametrize("group", GROUPS)
def test_a_reflection_is_seen_without_reflections(group: str) -> None:
    f, x = FrameAverage(network(3, 5), group), cloud()
    mirrored = x * torch.tensor([-1.0, 1, 1], dtype=F64)
    assert ((f(mirrored) - f(x)).abs().max() > 1e-3) == ("S" in group)
    moved = (f(x + 1) - f(x)).abs().max()
    assert (moved > 1e-3) == ("E" not in group)


def test_frames_move_with_the_cloud() -> None:
    """As sets: F(g x) = g F(x)."""
    for group, d in itertools.product(GROUPS, (1, 2, 3, 5)):
        x = cloud(d)
        g, shift = moves(1, d, group)
        a, b = pca_frames(x, group=group), pca_frames(x @ g.mT + shift, group=group)
        assert a.R.shape == (1, 2 ** (d - ("S" in group)), d, d)
        distance = (g @ a.R[0]).flatten(1).unsqueeze(1) - b.R[0].flatten(1)
        assert (distance.abs().amax(2).sort(1)[0][:, 0] < 1e-12).all()
        if "S" in group:
            assert (torch.linalg.det(a.R) - 1).abs().max() < 1e-12
        torch.testing.assert_close(b.t, a.t @ g[0].t() + shift[0])
        torch.testing.assert_close(b.gap, a.gap)


def test_vectors_are_turned_and_not_moved() -> None:
    g, shift = moves(50, 3, "E")
    x, v = cloud(), cloud(seed=4)
    net = network(3, 4, 3, n=2 * POINTS)
    f = FrameAverage(lambda p, vectors: net(torch.cat([p, vectors], 1)), "E", out_type="position")
    found = f(x @ g.mT + shift, vectors=v @ g.mT)
    torch.testing.assert_close(found, f(x, vectors=v) @ g.mT + shift, rtol=0, atol=1e-10)
    f = FrameAverage(network(3, 4, 3), "E", in_type="vector", out_type="vector")
    torch.testing.assert_close(f(x @ g.mT), f(x) @ g.mT, rtol=0, atol=1e-10)
    assert (f(x + 1) - f(x)).abs().max() > 1e-3  # x are vectors: 1 more is another one


def test_the_backbone_is_called_once_and_gets_what_belongs_to_a_cloud() -> None:
    seen = []

    def backbone(p, label, scale, name):
        seen.append((p, label, scale, name))
        return p.sum((1, 2)) * label

    x, label = torch.cat([cloud(), cloud(seed=1)]), torch.tensor([1.0, 2.0], dtype=F64)
    FrameAverage(backbone, "E")(x, label, 0.5, "a")
    ((p, given, *rest),) = seen
    assert p.shape == (16, POINTS, 3) and rest == [0.5, "a"]
    assert torch.equal(given, label.repeat(8))
    frames = pca_frames(x, group="E")
    inside = (x - frames.t.unsqueeze(1)).unsqueeze(1) @ frames.R
    torch.testing.assert_close(p.unflatten(0, (8, 2)).transpose(0, 1), inside)


def test_conservation() -> None:
    """Of an invariant energy: no net force, no net torque."""
    net = network(3, 1)
    for group in ("E", "SE"):
        x = cloud().requires_grad_()
        (force,) = torch.autograd.grad(FrameAverage(net, group)(x).sum(), x)
        assert force.abs().max() > 1e-2
        assert force.sum(1).abs().max() <= 1e-12
        assert torch.linalg.cross(x, force).sum(1).abs().max() <= 1e-12
        detached = FrameAverage(net, group, detach_frame=True)
        (force,) = torch.autograd.grad(detached(x).sum(), x)
        assert torch.linalg.cross(x, force).sum(1).abs().max() > 1e-3


@pytest.mark.parametrize("d", (2, 3, 4))
def test_gradient(d: int) -> None:
    x, w = cloud(d, seed=3, n=6), torch.linspace(0.3, 1, 6, dtype=F64).unsqueeze(0)
    frames = pca_frames(x, weight=w, group="SE")
    assert frames.gap > 0.1

    def f(x, w):
        return pca_frames(x, weight=w, group="SE", degenerate="raise")

    leaves = x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


# --------------------------------------------------------------------------------------------------
# Batches


def test_ragged_padded_and_a_loop_are_the_same() -> None:
    sizes = (5, 9, 4)
    x = torch.cat([cloud(n=n, seed=n)[0] for n in sizes])
    v, offsets = x.roll(1, 0), torch.tensor([0, 5, 14, 18], dtype=torch.int32)

    def backbone(p, vectors, offsets):  # of each cloud: sums over points, without an order
        h = torch.cat([(p + vectors).sin(), p.cos()], 1)
        ids = pyloss.segment.segment_ids(offsets, len(p))
        return h.new_zeros(len(offsets) - 1, 6).index_add(0, ids, h) @ torch.ones(6, 3).to(h)

    def dense(p, mask, vectors):
        h = torch.cat([(p + vectors).sin(), p.cos()], 2)
        return (h * mask.unsqueeze(2)).sum(1) @ torch.ones(6, 3).to(h)

    ragged = FrameAverage(backbone, "SE", out_type="position")(x, vectors=v, offsets=offsets)
    padded, mask = pyloss.segment.to_padded(torch.cat([x, v], 1), offsets)
    f = FrameAverage(dense, "SE", out_type="position")
    of_padded = f(padded[..., :3], mask, vectors=padded[..., 3:], weight=mask.to(F64))
    torch.testing.assert_close(of_padded, ragged, rtol=0, atol=1e-12)
    for i, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = f(x[None, a:b], mask.new_ones(1, b - a), vectors=v[None, a:b])
        torch.testing.assert_close(alone[0], ragged[i], rtol=0, atol=1e-12)
    # An entry for each point, too.
    each = FrameAverage(lambda p, offsets: (p**3).sin(), "SE", out_type="vector")
    alone = FrameAverage(lambda p: (p**3).sin(), "SE", out_type="vector")
    found = each(x, offsets=offsets)
    torch.testing.assert_close(found[5:14], alone(x[None, 5:14])[0], rtol=0, atol=1e-12)
    twice = FrameAverage(
        lambda p, offsets: torch.stack([p.sin(), p.cos()], -2) @ torch.ones(3, 9).to(p) ** 0.5,
        "E",
    )
    assert twice(x, offsets=offsets).shape == (18, 2, 9)


def test_padding_may_hold_anything() -> None:
    x, w = torch.cat([cloud(), cloud()], 1), torch.ones(1, 2 * POINTS, dtype=F64)
    w[:, POINTS:] = 0
    x[:, POINTS:] = torch.nan
    found = pca_frames(x.requires_grad_(), weight=w)
    want = pca_frames(cloud())
    torch.testing.assert_close(found, want)
    (dx,) = torch.autograd.grad(found.R[:, 0].sum(), x)
    assert dx.isfinite().all() and dx[:, :POINTS].any() and not dx[:, POINTS:].any()


def test_padding_may_hold_anything_around_a_backbone() -> None:
    """Which masks it: the gradient of the axes comes from all points."""
    full, w = torch.cat([cloud(), cloud()], 1), torch.ones(1, 2 * POINTS, dtype=F64)
    w[:, POINTS:] = 0
    full[:, POINTS:] = torch.nan

    def backbone(p, mask, vectors):
        return (torch.where(mask.unsqueeze(2), p, 0.0).sin() * vectors.cos()).sum((1, 2))

    f, found = FrameAverage(backbone, "SE"), []
    for x, given in ((full, w), (cloud(), w[:, :POINTS])):
        x = x.clone().requires_grad_()
        y = f(x, given > 0, vectors=x.roll(1, 2), weight=given)
        found.append((y.detach(), torch.autograd.grad(y, x)[0][:, :POINTS]))
    torch.testing.assert_close(*found)


def test_nan_stays_in_its_cloud() -> None:
    for d in (3, 4):
        x = cloud(d).repeat(3, 1, 1)
        x[1, 2, 0], x[2, 0, 0] = torch.nan, torch.inf
        for policy in ("raise", "warn", "random"):
            found = pca_frames(x, degenerate=policy, generator=generator())
            assert found.R[0].isfinite().all() and found.R[1:].isnan().all()


def test_half_types_and_autocast() -> None:
    x = cloud().float()
    found = pca_frames(x.bfloat16())
    assert found.R.dtype == F32
    torch.testing.assert_close(found, pca_frames(x.bfloat16().float()), rtol=0, atol=0)
    f = FrameAverage(lambda p: p.sin(), "SE", out_type="position")
    assert f(x.bfloat16()).dtype == BF16
    with torch.autocast("cpu", dtype=BF16):
        torch.testing.assert_close(f(x), f(x).float(), rtol=0, atol=0)
        inside = FrameAverage(lambda p: p, "SE", out_type="position")(x)
    torch.testing.assert_close(inside, x, rtol=0, atol=1e-5)  # no product was rounded


def test_as_many_clouds_as_dimensions_in_a_compiled_graph() -> None:
    """Which dynamic shapes take for one size."""
    net = network(3, 4, 3, dtype=F32)
    f = FrameAverage(lambda p, e: net(p) * e[:, None, None], "SE", out_type="position")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="eager")
    for count in (3, 5):
        x, e = cloud().float().expand(count, -1, -1).contiguous(), torch.arange(1.0, count + 1)
        torch.testing.assert_close(compiled(x, e), f(x, e), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Equal eigenvalues

# Corners of a tetrahedron, of a square; points on a line in space; one point.
SYMMETRIC = {
    "sphere": torch.tensor([[1.0, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]], dtype=F64),
    "disc": torch.tensor([[1.0, 1, 0], [-1, -1, 0], [-1, 1, 0], [1, -1, 0]], dtype=F64),
    "line": torch.tensor([[0.0, 0, 0], [1, 2, 3], [2, 4, 6], [4, 8, 12]], dtype=F64),
    "point": torch.ones(4, 3, dtype=F64),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_equal_eigenvalues(name: str) -> None:
    x = (SYMMETRIC[name] @ turns(1, 3, True)[0]).unsqueeze(0)
    with pytest.raises(ValueError, match="cloud 0 are not unique.*degenerate='random'"):
        pca_frames(x, degenerate="raise")
    with pytest.warns(UserWarning, match="some clouds are not unique.*weights can tell") as found:
        pca_frames(x)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = pca_frames(x.requires_grad_(), degenerate="random", generator=generator())
        again = pca_frames(x, degenerate="random", generator=generator(1))
        (dx,) = torch.autograd.grad(frames.R[:, 0].sum() + frames.t.sum(), x)
    assert dx.isfinite().all()
    assert (frames.R - again.R).abs().max() > 1e-3
    eye = torch.eye(3, dtype=F64).expand(1, 4, 3, 3)
    torch.testing.assert_close(frames.R.mT @ frames.R, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(frames.R), torch.ones(1, 4, dtype=F64))
    if name in ("disc", "line"):  # the axis that is unique stays as it is
        own = 0 if name == "disc" else 2
        torch.testing.assert_close(
            frames.R[0, :, :, own].abs(), again.R[0, :, :, own].abs(), rtol=0, atol=1e-12
        )


def test_drawn_axes_are_uniform() -> None:
    """Of the mean of f over draws: second moments of a Haar rotation are 1/3 of the identity."""
    x = SYMMETRIC["sphere"].expand(20000, 4, 3)
    R = pca_frames(x, group="O", degenerate="random", generator=generator()).R[:, 0]
    second = torch.einsum("bij,bkl->ijkl", R, R) / len(R)
    want = torch.einsum("ik,jl->ijkl", *[torch.eye(3, dtype=F64)] * 2) / 3
    assert (second - want).abs().max() < 0.015


def test_weights_tell_points_apart() -> None:
    x, w = SYMMETRIC["sphere"].unsqueeze(0), torch.tensor([[1.0, 2, 3, 5]], dtype=F64)
    assert pca_frames(x, weight=w, degenerate="raise").gap > 0.05


def test_a_gap_that_is_close() -> None:
    x = cloud()
    gap = float(pca_frames(x).gap)
    pca_frames(x, degenerate="raise", gap_tol=0.99 * gap)
    with pytest.raises(ValueError, match="not unique"):
        pca_frames(x, degenerate="raise", gap_tol=1.01 * gap)


# --------------------------------------------------------------------------------------------------
# One frame at a time


def test_stochastic_frames() -> None:
    net, x = network(3, 5), cloud().expand(64, -1, -1)
    sizes = []
    f = FrameAverage(lambda p: (sizes.append(len(p)), net(p))[1], "E", stochastic=True)
    exact = FrameAverage(net, "E")(x[:1])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        drawn = torch.cat([f(x) for _ in range(50)])
    assert sizes == [64] * 50
    frames = pca_frames(x[:1], group="E")
    each = net((x[:1] - frames.t.unsqueeze(1)) @ frames.R[0])
    distance = (drawn.unsqueeze(1) - each).abs().amax(2)
    assert (distance.min(1)[0] < 1e-12).all()
    counts = torch.bincount(distance.argmin(1), minlength=8)
    assert counts.min() > 300 and counts.max() < 500  # of 3200 draws: 400, at 18.7 each
    torch.testing.assert_close(f.eval()(x), exact.expand(64, -1))


# --------------------------------------------------------------------------------------------------
# Graphs


def adjacency(edges: torch.Tensor, n: int) -> torch.Tensor:
    a = torch.zeros(n, n)
    a[edges[0], edges[1]] = a[edges[1], edges[0]] = 1
    return a


GRAPHS = {
    "path": (torch.tensor([[0, 1, 2], [1, 2, 3]]), 4, 4),
    "triangle with a tail": (torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]]), 4, 2),
    "star": (torch.tensor([[0, 0, 0], [1, 2, 3]]), 4, 6),
    "two parts": (torch.tensor([[0, 2, 3], [1, 3, 4]]), 5, 4),
    "no edges": (torch.zeros(2, 0, dtype=torch.int32), 3, 6),
    "one node": (torch.zeros(2, 0, dtype=torch.long), 1, 1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_orders_do_not_depend_on_the_numbering(name: str) -> None:
    """The set of reordered (adjacency, features) is the same for every numbering of the nodes."""
    edges, n, size = GRAPHS[name]
    features = torch.arange(n)

    def canonical(edges, features):
        a = adjacency(edges.long(), n)
        orders = laplacian_sort_frame(edges, n, max_frames=24)
        assert (orders.sort(1)[0] == torch.arange(n)).all() and len(orders) == size
        found = [(tuple(a[o][:, o].flatten().tolist()), tuple(features[o].tolist()))
                 for o in orders]  # fmt: skip
        return set(found)

    want = canonical(edges, features)
    for seed in range(4):
        new = torch.randperm(n, generator=generator(seed))  # node i becomes new[i]
        renamed = torch.empty_like(features)
        renamed[new] = features
        assert canonical(new[edges.long()], renamed) == want


def test_an_entry_between_two_decimals_is_rounded_one_way() -> None:
    """sqrt(1/64) = 0.125 of each node of a ring: whatever the last bits are, all are equal."""
    ring = torch.stack([torch.arange(64), (torch.arange(64) + 1) % 64])
    drawn = laplacian_sort_frame(ring, 64, max_frames=1000, generator=generator())
    assert len(drawn[:, 0].unique()) == 64


def test_orders_that_are_too_many_are_drawn() -> None:
    ring = torch.stack([torch.arange(7), (torch.arange(7) + 1) % 7])
    ring = torch.cat([ring, torch.tensor([[0], [7]])], 1)  # 0 has a tail
    found = laplacian_sort_frame(ring, 8, max_frames=3, generator=generator())
    assert torch.equal(found, laplacian_sort_frame(ring, 8, max_frames=3, generator=generator()))
    assert found.shape == (3, 8)
    complete = laplacian_sort_frame(ring, 8, max_frames=100)
    assert len(complete) == 8  # three pairs of mirror images
    assert all((complete == o).all(1).any() for o in found)
    drawn = laplacian_sort_frame(ring, 8, max_frames=7, generator=generator(3))
    assert len(drawn.unique(dim=0)) > 1
