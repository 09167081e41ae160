"""Checks of what attacks take, with their defaults, for functions and modules alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks

NORMS = ("linf", "l2")
STARTS = ("near", "uniform", "clean")
IGNORED = -100  # a label that counts for nothing, as that of cross entropy


class Search(NamedTuple):
    """How a maximum is looked for, checked."""

    eps: float
    norm: str
    steps: int
    step: float
    clip: tuple[float, float] | None
    restarts: int


def checked_search(eps, norm, steps, step, clip, restarts=1) -> Search:
    checks.check_range("eps", eps, 0.0)
    checks.check_one_of("norm", norm, NORMS)
    steps = _at_least_one("steps", steps)
    if step is None:
        step = 2.5 * eps / steps
    else:
        checks.check_range("step", step, 0.0, open_low=True)
    return Search(eps, norm, steps, step, _checked_clip(clip), _at_least_one("restarts", restarts))


def _at_least_one(name: str, value) -> int:
    value = checks.checked_integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _checked_clip(clip) -> tuple[float, float] | None:
    if clip is None:
        return None
    if isinstance(clip, str) or not isinstance(clip, Sequence) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (low, high), got {clip!r}")
    low, high = clip
    checks.check_number("clip[0]", low)
    checks.check_number("clip[1]", high)
    if not low < high or math.isnan(low):
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
    return low, high


def check_objective(name: str, objective: str | Callable, known: Sequence[str]) -> None:
    if callable(objective):
        return
    if not isinstance(objective, str):
        found = type(objective).__name__
        raise TypeError(f"{name} must be a name or a callable, got {found}")
    checks.check_one_of(name, objective, known)


def check_batch(model, x, y, y_needed: bool = True) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    checks.check_floating("x", x)
    checks.check_has_dimension("x", x)
    if y is None and not y_needed:
        return
    checks.check_tensor("y", y)
    if y.dim() == 0 or y.shape[0] != x.shape[0]:
        raise ValueError(f"y must have a row for each of the {x.shape[0]} of x, got {_shape(y)}")
    checks.check_device("y", y, x, "x")


def check_logits(z, x: Tensor) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"model must return a Tensor of logits, got {type(z).__name__}")
    if z.dim() < 2 or z.shape[0] != x.shape[0]:
        raise ValueError(
            f"model must return logits (N, C, ...) for the {x.shape[0]} rows of x, got {_shape(z)}"
        )


def checked_column(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The labels (N, ...) as indices of logits (N, C, ...), (N, 1, ...); and which ones count."""
    checks.check_index_dtype("y", y)
    if checks.can_look_at(y):
        checks.check_index_values(y, z.shape[1], IGNORED)
    labels = y.long()  # before it is compared: as uint8, 156 is -100
    counts = labels != IGNORED
    return torch.where(counts, labels, 0).unsqueeze(1), counts


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)
