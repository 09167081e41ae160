"""Points into frames, and what is made of them back out, by one fold: all frames of all clouds are
one batch, frame by frame."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._frames import Axes, Clouds, signs_of
from pyloss.ops._launch import accumulator_dtype, without_autocast

OUT_TYPES = ("invariant", "position", "vector", "tensor2")


class Fold:
    """The frames of one batch of clouds, and the moves into and out of them.

    A frame is one basis with signs on its axes. So points are turned once, and the F copies differ
    by signs; what comes back is averaged under its signs and turned back once.

    Args:
        signs: ``(F, 1 or B, d)``; F is 1 where one frame has been drawn.
    """

    def __init__(self, axes: Axes, signs: Tensor, clouds: Clouds) -> None:
        self._clouds = clouds
        self.frames, self._of_clouds = signs.shape[0], (axes.basis, axes.centre, signs)
        self._of_points = self._of_clouds
        if clouds.offsets is not None:
            ids = segment.segment_ids(clouds.offsets, clouds.points.shape[0])
            self._of_points = (
                axes.basis[ids],
                None if axes.centre is None else axes.centre[ids],
                signs[:, ids] if signs.shape[1] > 1 else signs,
            )

    def into(self, x: Tensor, *, moves: bool) -> Tensor:
        """``(F L, *, d)`` of positions or vectors ``(L, *, d)``, L clouds or, ragged, points."""
        basis, centre, signs = self._of_points
        with _unrounded(x):
            inside = x.to(basis.dtype)
            if moves and centre is not None:
                inside = inside - _between(centre, x)
            inside = _turn(inside, basis, self._clouds.offsets is not None)
            copies = inside * _between(signs, inside, 1)
        return copies.flatten(0, 1).to(x.dtype)

    def repeated(self, given: Any, name: str) -> Any:
        """An argument that goes with the clouds, for each frame; what is no tensor as it is."""
        if not isinstance(given, Tensor) or given.dim() == 0:
            return given
        count, points = self._clouds.count, self._clouds.points.shape[0]
        ragged = self._clouds.offsets is not None
        if not _one_of(given.shape[0], (count, points) if ragged else (count,)):
            what = f"the {count} clouds" + (f" or the {points} points" if ragged else "")
            raise ValueError(
                f"{name} must have {what} in its first dimension, or none; got shape "
                f"{list(given.shape)}. What does not depend on the cloud belongs into the backbone"
            )
        return given.unsqueeze(0).expand(self.frames, *given.shape).flatten(0, 1)

    def offsets(self) -> Tensor:
        """Of the folded batch."""
        offsets, points = self._clouds.offsets, self._clouds.points.shape[0]
        total = self.frames * points
        if total > torch.iinfo(offsets.dtype).max:
            offsets = offsets.long()
        start = torch.arange(self.frames, dtype=offsets.dtype, device=offsets.device) * points
        inner = (offsets[:-1] + start.unsqueeze(1)).flatten()
        return torch.cat([inner, offsets.new_full((1,), total)])

    def average(self, y: Any, out_type: str) -> Tensor:
        """What the backbone made of the folded batch, out of the frames and averaged."""
        checks.check_floating("the result of the backbone", y)
        basis, centre, signs = self._parts(y, out_type)
        wide = y.reshape(self.frames, y.shape[0] // self.frames, *y.shape[1:])
        wide = wide.to(accumulator_dtype(y.dtype))
        if out_type == "invariant":
            return wide.mean(0).to(y.dtype)
        with _unrounded(y):
            single = self._clouds.offsets is not None and basis is self._of_points[0]
            mean = wide * _between(signs, wide[0], 1)
            if out_type == "tensor2":
                mean = (mean * _between(signs, wide[0, ..., 0], 1).unsqueeze(-1)).mean(0)
                turned = _turn(mean, basis.mT, single)
                return _turn(turned.mT, basis.mT, single).mT.to(y.dtype)
            found = _turn(mean.mean(0), basis.mT, single)
            if out_type == "position" and centre is not None:
                found = found + _between(centre, found)
        return found.to(y.dtype)

    def _parts(self, y: Tensor, out_type: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """Basis, centre and signs of each entry of the first dimension of y."""
        count, points = self._clouds.count, self._clouds.points.shape[0]
        d = self._clouds.points.shape[1]
        ragged = self._clouds.offsets is not None
        sizes = [self.frames * n for n in ((count, points) if ragged else (count,))]
        if y.dim() == 0 or not _one_of(y.shape[0], sizes):
            raise ValueError(
                f"the backbone must return {' or '.join(map(str, sizes))} entries in the first "
                f"dimension, for {self.frames} frames; got shape {list(y.shape)}"
            )
        trail = {"invariant": [], "tensor2": [d, d]}.get(out_type, [d])
        if list(y.shape[1:])[-len(trail) :] != trail and trail:
            raise ValueError(
                f"the backbone must return {trail} in the last dimensions for "
                f"out_type={out_type!r}, got shape {list(y.shape)}"
            )
        return self._of_clouds if y.shape[0] == sizes[0] else self._of_points


def without_padding(x: Tensor, weight: Tensor) -> Tensor:
    """0 for what is not finite at weight 0, as the axes count it: a basis gets its gradient from
    all points, and the 0 that a backbone's mask gives would be NaN at a NaN."""
    return torch.where((weight == 0).unsqueeze(-1) & ~x.isfinite(), 0.0, x)


def _one_of(size: int, sizes: Iterable[int]) -> bool:
    """`size in sizes`, which Dynamo takes for False where it knows one of them as a symbol."""
    return any(size == n for n in sizes)


def _unrounded(x: Tensor) -> contextlib.AbstractContextManager:
    """For products of frames; entering a context is a good part of a small call."""
    return without_autocast(x) if checks.autocast_on(x) else contextlib.nullcontext()


def _between(small: Tensor, like: Tensor, front: int = 0) -> Tensor:
    """``(*front, L, d)`` with ones before d, so that it broadcasts to ``like``, ``(L, *, d)``."""
    if like.dim() == 3:
        return small.unsqueeze(-2)
    lead = small.shape[: front + 1]
    return small.reshape(*lead, *(1,) * (like.dim() - 2), small.shape[-1])


def _turn(v: Tensor, basis: Tensor, single: bool) -> Tensor:
    """v basis for ``(L, *, d)`` and ``(L, d, d)``; `single`: few vectors for each of many bases."""
    if v.dim() == 3 and not single:
        return v @ basis
    flat = v.reshape(v.shape[0], math.prod(v.shape[1:-1]), v.shape[-1])
    if single:
        return (flat.unsqueeze(-1) * basis.unsqueeze(1)).sum(-2).reshape(v.shape)
    return (flat @ basis).reshape(v.shape)


def fold(clouds: Clouds, axes: Axes, group: str, stochastic: bool) -> Fold:
    """All frames, or one of each cloud, drawn by torch's generator of the device."""
    signs = signs_of(axes, group)
    if stochastic:
        count = clouds.count
        pick = torch.randint(signs.shape[0], (count,), device=signs.device)
        cloud = torch.arange(count, device=signs.device)
        signs = signs.expand(-1, count, -1)[pick, cloud].unsqueeze(0)
    return Fold(axes, signs, clouds)
