"""What frames of point clouds are made of: clouds and their checks, principal axes, the signs that
turn one basis into all of them, bases of equal eigenvalues."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._ranges import can_look, warn
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._shards import beside, whole
from pyloss.ops._transforms import functorch_active
from pyloss.ops.frame_pca import frame_pca

GROUPS = ("O", "SO", "E", "SE")
POLICIES = ("raise", "warn", "random")
MAX_DIM = 8  # 2^d frames
GAP_TOL = {torch.float64: 1e-8, torch.float32: 1e-4}

_NOT_UNIQUE = "the principal axes of {which} are not unique"
_WHAT_TO_DO = (
    ": two eigenvalues are equal up to gap_tol times the largest, as in a symmetric or collinear "
    "cloud, and results are not equivariant. degenerate='random' draws such axes, which is "
    "equivariant in expectation; weights can tell points apart; a smaller gap_tol lets close ones "
    "pass"
)


class Clouds(NamedTuple):
    """A batch of clouds, as points one after the other."""

    points: Tensor  # (P, d)
    weight: Tensor | None  # (P)
    offsets: Tensor | None  # (count + 1); None: clouds of equal size
    count: int


def clouds_of(x: Tensor, weight: Tensor | None, offsets: Tensor | None) -> Clouds:
    """Of checked arguments."""
    if offsets is not None:
        return Clouds(x, weight, offsets, offsets.shape[0] - 1)
    x, weight = whole(x), None if weight is None else whole(weight)  # flat rows: no cloud is split
    return Clouds(x.flatten(0, 1), None if weight is None else weight.flatten(), None, x.shape[0])


def check_cloud_options(group, degenerate) -> None:
    checks.check_one_of("group", group, GROUPS)
    checks.check_one_of("degenerate", degenerate, POLICIES, repr)


def check_clouds(x, weight, offsets, degenerate: str, dim: int | None = None) -> None:
    """Points, weights and offsets; `dim`: that of the points, where it is known."""
    checks.check_floating("x", x)
    checks.check_dense("x", x)
    checks.check_supported("pca_frames", x)
    wanted = "(B, N, {d})" if offsets is None else "(P, {d}) beside offsets"
    wanted = wanted.format(d="d" if dim is None else dim)
    if x.dim() != (3 if offsets is None else 2) or (dim is not None and x.shape[-1] != dim):
        raise ValueError(f"x must be {wanted}, got shape {list(x.shape)}")
    if not 1 <= x.shape[-1] <= MAX_DIM:
        raise ValueError(
            f"x must have from 1 to {MAX_DIM} dimensions, of which 2^d frames are made; got "
            f"{x.shape[-1]}"
        )
    if weight is not None:
        checks.check_floating("weight", weight)
        checks.check_device("weight", weight, x, "x")
        if weight.shape != x.shape[:-1]:
            raise ValueError(
                f"weight must have a number for each point, {list(x.shape[:-1])}, got shape "
                f"{list(weight.shape)}"
            )
    if offsets is not None:
        segment.check_offsets(offsets, x.shape[0])
        checks.check_device("offsets", offsets, x, "x")
    _check_not_empty(x, offsets, degenerate)


def _check_not_empty(x: Tensor, offsets: Tensor | None, degenerate: str) -> None:
    what = "a cloud without points has no frame; degenerate='random' lets it have any"
    if degenerate == "random":
        return
    if offsets is not None:
        segment.require((offsets.diff() > 0).all(), what)
    elif x.shape[0] and not x.shape[1]:
        raise ValueError(what)


class Axes(NamedTuple):
    """One basis of each cloud: the one with all signs +1."""

    basis: Tensor  # (B, d, d), axes as columns
    centre: Tensor | None  # (B, d); None: not moved
    gap: Tensor  # (B)


def axes_of(
    clouds: Clouds,
    *,
    group: str,
    gap_tol: float | None,
    degenerate: str,
    detach: bool,
    generator: torch.Generator | None = None,
) -> tuple[Axes, Tensor]:
    """Axes and centre of checked clouds; and the centre as it is returned, 0 where not moved."""
    x, weight, offsets, count = clouds
    if detach:
        x, weight = x.detach(), None if weight is None else weight.detach()
    if gap_tol is None:
        gap_tol = GAP_TOL[accumulator_dtype(x.dtype)]
    moved = "E" in group
    basis, centre, value, _ = frame_pca(x, weight, offsets, count, moved, float(gap_tol))
    gap = _smallest_gap(value)
    if degenerate == "random":
        basis = _turned(basis, value.detach(), gap_tol, generator)
    else:
        _report(gap.detach(), gap_tol, degenerate)
    if not moved:
        return Axes(basis, None, gap), centre.detach()
    return Axes(basis, centre, gap), centre


def _smallest_gap(value: Tensor) -> Tensor:
    """Of neighbouring eigenvalues, relative to the largest; 0 where all are 0."""
    if value.shape[1] == 1:
        return value.detach() * 0 + 1 if value.shape[0] else value.new_empty(0)
    top = value[:, -1]
    return value.diff(dim=1).amin(1) / torch.where(top > 0, top, 1.0)


def _report(gap: Tensor, tol: float, degenerate: str) -> None:
    """Looks only where that waits for nobody; on a device 'raise' is an assertion there."""
    if gap.is_meta or functorch_active():
        return
    if not can_look(gap):
        if degenerate == "raise":
            torch._assert_async((~(gap < tol)).all(), _NOT_UNIQUE.format(which="a cloud"))
        return
    bad = gap < tol
    if not bad.any():
        return
    if degenerate == "raise":
        which = f"cloud {int(bad.nonzero()[0])}"
        raise ValueError(_NOT_UNIQUE.format(which=which) + _WHAT_TO_DO)
    warn(_NOT_UNIQUE.format(which="some clouds") + _WHAT_TO_DO)


def _turned(basis: Tensor, value: Tensor, tol: float, generator) -> Tensor:
    """Each block of equal eigenvalues in a Haar-random basis; other axes as they are."""
    d = value.shape[1]
    apart = value.diff(dim=1) > tol * value[:, -1:].abs()
    block = torch.nn.functional.pad(apart.cumsum(1), (1, 0))
    same = block.unsqueeze(1) == block.unsqueeze(2)
    alone = same.sum(2) == 1
    drawn = value.device if generator is None else generator.device
    z = torch.randn(basis.shape, generator=generator, dtype=value.dtype, device=drawn)
    eye = torch.eye(d, dtype=value.dtype, device=value.device)
    z = torch.where(alone.unsqueeze(2), eye, z.to(value.device) * same)
    # Gram-Schmidt of Gaussian columns is Haar; twice, so that it is orthogonal to the last digit.
    columns: list[Tensor] = []
    for k in range(d):
        v = z[:, :, k]
        for _ in range(2):
            for u in columns:
                v = v - (v * u).sum(1, keepdim=True) * u
        columns.append(v / v.norm(dim=1, keepdim=True))
    return basis @ torch.stack(columns, 2)


# --------------------------------------------------------------------------------------------------
# Signs


def signs_of(axes: Axes, group: str) -> Tensor:
    """Of the axes, for each frame: ``(F, 1, d)`` for O and E, ``(F, B, d)`` for SO and SE, whose
    last sign makes the determinant 1."""
    basis = axes.basis
    d = basis.shape[-1]
    free = d - 1 if group in ("SO", "SE") else d
    table = beside(_signs(free, basis.dtype, basis.device), basis)
    if free == d:
        return table.unsqueeze(1)
    last = handedness(basis.detach()) * table.prod(1).unsqueeze(1)
    return torch.cat([table.unsqueeze(1).expand(-1, last.shape[1], -1), last.unsqueeze(2)], 2)


def _signs(free: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(2^free, free)``, the first row of ones; no copy to a device."""
    if device.type == "cpu":
        bits = range(free - 1, -1, -1)
        signs = [[1.0 - 2.0 * ((at >> bit) & 1) for bit in bits] for at in range(2**free)]
        return torch.tensor(signs, dtype=dtype)
    frame = torch.arange(2**free, device=device).unsqueeze(1)
    bit = torch.arange(free - 1, -1, -1, device=device)
    return 1 - 2 * ((frame >> bit) & 1).to(dtype)


def handedness(basis: Tensor) -> Tensor:
    """Determinants ``(B)`` of orthogonal matrices, exactly 1 or -1."""
    d = basis.shape[-1]
    if d == 1:
        det = basis[:, 0, 0]
    elif d == 2:
        det = basis[:, 0, 0] * basis[:, 1, 1] - basis[:, 0, 1] * basis[:, 1, 0]
    elif d == 3:
        a, b, c = basis.unbind(2)
        det = (torch.linalg.cross(a, b) * c).sum(1)
    else:
        det = torch.linalg.det(basis)
    return det.sign()
