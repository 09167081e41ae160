"""The frame_pca op: the reference against torch, the kernel against the reference at the sizes,
layouts and edges that it is written around."""

from __future__ import annotations

import math

import pytest
import torch

import pyloss
from pyloss.ops.frame_pca import frame_pca
from pyloss.testing import make_logits

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {F64: 1e-12, F32: 5e-6, BF16: 5e-6, F16: 5e-6}


def reference(x, weight, offsets=None, clouds=1, centred=True, tolerance=0.0):
    """With the arguments of the op."""
    more = dict(centred=centred, tolerance=tolerance)
    return pyloss.reference.frame_pca(x, weight, offsets, clouds, **more)


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    spread = torch.tensor([1.0, 2.0, 3.5], dtype=F64)[:d]
    return make_logits((n, d), F64, scale=1.0, seed=seed) * spread + 0.5


def both(function, x, weight, *args):
    """Results and gradients, float64, for upstream gradients of all four."""
    leaves = [x.detach().requires_grad_()]
    if weight is not None:
        leaves.append(weight.detach().requires_grad_())
    found = function(leaves[0], *leaves[1:] or [None], *args)
    live = [t for t in found if t.requires_grad]
    g = [make_logits(t.shape, F64, scale=1.0, seed=3).to(t.dtype) for t in found]
    # A total without weights is a constant, in the reference alone.
    g[3] = torch.zeros_like(g[3]) if weight is None else g[3]
    g = [c for t, c in zip(found, g) if t.requires_grad]
    given = torch.autograd.grad(live, leaves, g)
    assert [t.dtype for t in given] == [t.dtype for t in leaves]
    return [t.detach().double() for t in found], [t.double() for t in given]


def test_the_reference_is_torchs_eigenproblem() -> None:
    x, w = cloud(9, 3), make_logits((9,), F64, scale=1.0).abs()
    axes, centre, value, total = (t[0] for t in reference(x, w))
    c = torch.cov(x.t(), aweights=w, correction=0) * w.sum()
    torch.testing.assert_close(axes @ value.diag() @ axes.t(), c)
    torch.testing.assert_close(centre, (w[:, None] * x).sum(0) / w.sum())
    assert value.diff().min() > 0 and total == w.sum()
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


# (sizes of clouds): around lanes, a block, a group of clouds.
BATCHES = ((7,), (16, 16), (1, 2, 3), (520,), (12,) * 35)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("d", (2, 3))
@pytest.mark.parametrize("sizes", BATCHES, ids=lambda s: f"{len(s)}x{s[-1]}")
def test_kernel_against_reference(sizes, d: int, dtype: torch.dtype) -> None:
    # Each in its own ellipsoid: clouds of a few points have equal eigenvalues, and no axes.
    x = torch.cat([cloud(n, d, seed=i) for i, n in enumerate(sizes)]).to(dtype)
    clear = torch.tensor([n > d for n in sizes])
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32 if d == 2 else torch.int64)
    weight = make_logits((len(x),), F64, scale=1.0, seed=9).abs().to(dtype)
    calls = [(x, weight, offsets, True), (x, None, offsets, False)]
    if len(set(sizes)) == 1:
        calls += [(x, None, None, True), (x.t().contiguous().t(), weight, None, True)]
    for points, w, ends, centred in calls:
        options = ends, len(sizes), centred, 1e-3
        wide = None if w is None else w.double()
        found, given = both(frame_pca, points, w, *options)
        want, expected = both(reference, points.double(), wide, *options)
        of_points = clear.repeat_interleave(torch.tensor(sizes))
        for f, e in zip(found, want):
            bound = TOLERANCES[dtype] * (1 + e.abs().max())
            torch.testing.assert_close(f[clear], e[clear], rtol=0, atol=float(bound))
        for f, e in zip(given, expected):
            size = e[of_points].abs().max() if of_points.any() else 0.0
            half = 1e-2 if dtype in (BF16, F16) else 0.0
            bound = (20 * TOLERANCES[dtype] + half) * (1 + size)
            torch.testing.assert_close(f[of_points], e[of_points], rtol=0, atol=float(bound))


def test_ragged_padded_and_alone_are_the_same_bits() -> None:
    sizes = [5, 17, 40, 3]
    x, w = cloud(65, 3).float(), make_logits((65,), F32, scale=1.0).abs()
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    ragged = frame_pca(x, w, offsets, 4, True, 0.0)
    padded, mask = pyloss.segment.to_padded(torch.cat([x, w[:, None]], 1), offsets, fill=0.0)
    points = torch.where(mask.unsqueeze(2), padded[..., :3], math.nan)
    dense = frame_pca(points.flatten(0, 1), padded[..., 3].flatten(), None, 4, True, 0.0)
    for i, (a, b) in enumerate(zip(offsets, offsets[1:])):
        alone = frame_pca(x[a:b], w[a:b], None, 1, True, 0.0)
        for r, p, one in zip(ragged, dense, alone):
            assert torch.equal(r[i], one[0])
            assert torch.equal(p[i], one[0])


@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
@pytest.mark.parametrize("spread", ((1, 1, 1), (1, 1e-2, 1e-4), (1e-5, 1, 1e3), (0, 0, 1)))
def test_axes_diagonalise(spread, dtype: torch.dtype) -> None:
    """Also of graded and of singular matrices, whatever the turn."""
    turn = torch.linalg.qr(make_logits((300, 3, 3), F64, scale=1.0, seed=2))[0]
    x = make_logits((300, 6, 3), F64, scale=1.0) * torch.tensor(spread, dtype=F64) @ turn
    x = x.to(dtype)
    axes, _, value, _ = frame_pca(x.flatten(0, 1), None, None, 300, False, 0.0)
    axes, c, eps = axes.double(), x.double().mT @ x.double(), torch.finfo(dtype).eps
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(axes.mT @ axes, eye.expand(300, 3, 3), rtol=0, atol=20 * eps)
    size = value[:, -1:, None].double()
    diagonal = torch.diag_embed(value.double())
    torch.testing.assert_close((axes.mT @ c @ axes) / size, diagonal / size, rtol=0, atol=10 * eps)


@pytest.mark.parametrize("scale", (1e-16, 1e16))
def test_no_square_leaves_the_range(scale: float) -> None:
    x = cloud(20, 3).float()
    found = frame_pca(x * scale, None, None, 1, True, 0.0)[0]
    torch.testing.assert_close(found, frame_pca(x, None, None, 1, True, 0.0)[0], rtol=0, atol=1e-6)


def test_what_is_not_finite_and_what_is_not_there() -> None:
    x, w = cloud(15, 3), torch.ones(15, dtype=F64)
    x[1, 2], x[6], x[11, 0] = math.nan, math.inf, math.nan
    w[11] = 0  # padding
    w[12:] = 0
    for dtype in (F64, F32):
        args = x.to(dtype), w.to(dtype)
        found, (dx, dw) = both(frame_pca, *args, None, 3, True, 1e-6)
        want, (ex, ew) = both(reference, *args, None, 3, True, 1e-6)
        assert found[0][:2].isnan().all() and found[0][2].isfinite().all()
        torch.testing.assert_close(found[0], want[0], equal_nan=True)
        assert dx[:10].isnan().all() and not dx[11:].any()
        torch.testing.assert_close(dx[10:], ex[10:])
        torch.testing.assert_close(dw[10:], ew[10:], rtol=0, atol=1e-5)
    # No points, or no weight: t = 0, V = I.
    for weight in (torch.zeros(4, dtype=F64), None):
        n = 0 if weight is None else 4
        for op in (frame_pca, reference):
            axes, centre, value, total = op(cloud(n, 3), weight, None, 1, True, 0.0)
            assert torch.equal(axes[0], torch.eye(3, dtype=F64))
            assert not centre.any() and not value.any() and not total.any()


def test_equal_eigenvalues_have_a_gradient() -> None:
    corners = torch.tensor([[1.0, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]], dtype=F64)
    for op in (frame_pca, reference):
        _, (dx,) = both(op, corners, None, None, 1, True, 1e-8)
        assert dx.isfinite().all()


def test_threads_and_other_clouds_do_not_show() -> None:
    x = cloud(40 * 70, 3).float()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(frame_pca, x, None, None, 70, True, 0.0))
    finally:
        torch.set_num_threads(before)
    for results, (dx,) in found[1:]:
        assert all(map(torch.equal, results, found[0][0])) and torch.equal(dx, found[0][1][0])


@pytest.mark.parametrize("ends", ([0, 3, 2, 5], [1, 5], [0, 6], [0, -1, 5]), ids=str)
def test_offsets_outside_of_the_points_are_refused(ends: list[int]) -> None:
    """By the kernel too, which the checks of functional may not have come before."""
    with pytest.raises(ValueError, match="offsets must rise from 0"):
        frame_pca(cloud(5, 2), None, torch.tensor(ends), len(ends) - 1, True, 0.0)


def test_opcheck() -> None:
    x, w, offsets = cloud(9, 3).float(), torch.rand(9), torch.tensor([0, 4, 9])
    ops = torch.ops.pyloss
    frames = ops.frame_pca_fwd(x, w, offsets, 2, True)
    torch.library.opcheck(ops.frame_pca_fwd.default, (x, w, offsets, 2, True))
    torch.library.opcheck(ops.frame_pca_bwd.default, (frames, x, w, offsets, frames, True, 1e-4))
