"""The functions K of Lion-K: options, value, gradient, and the convex conjugate.

Each is even, and a sum over elements or a norm of each group of them. A norm-like one is told apart
by `of_group`: its gradient needs the whole group at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional._checks import check_number, check_range, checked_integer

GROUPS = ("tensor", "row", "global")


class Kappa(NamedTuple):
    """K of (groups, elements) in rows of one tensor each; `args` are those of the user."""

    arguments: tuple[str, ...]
    # May write to its argument, and give it back.
    gradient: Callable[[Tensor, Mapping[str, float]], Tensor]
    value: Callable[[Tensor, Mapping[str, float]], Tensor]
    conjugate: Callable[[Tensor, Mapping[str, float]], Tensor]  # inside its domain
    conjugate_slope: Callable[[Tensor, Mapping[str, float]], Tensor]
    violation: Callable[[Tensor, Mapping[str, float]], Tensor]  # how far outside, of each row
    of_group: bool = False


def _sign(c: Tensor) -> Tensor:
    """torch.sign gives 0 for NaN."""
    return torch.where(c.isnan(), c, c.sign())


def _zero(y: Tensor, args: Mapping[str, float]) -> Tensor:
    return y.new_zeros(())


def _flat(y: Tensor, args: Mapping[str, float]) -> Tensor:
    return torch.zeros_like(y)


def _outside_box(y: Tensor, args: Mapping[str, float]) -> Tensor:
    return _largest(y).sub(1).clamp_min(0)


def _largest(x: Tensor) -> Tensor:
    """Magnitude of each row, without the memory that abs() takes."""
    return torch.maximum(x.amax(1), x.amin(1).neg()) if x.shape[1] else x.new_zeros(x.shape[0])


# ---- lp ------------------------------------------------------------------------------------------


def _power_norm(x: Tensor, p: float) -> Tensor:
    """(groups, 1), of elements up to 1. torch's vector_norm is fast for p = 2 alone."""
    if p == 2:
        return torch.linalg.vector_norm(x, 2, 1, keepdim=True)
    return x.abs().pow_(p).sum(1, keepdim=True).pow_(1 / p)


def _safe(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 1.0, norm)


def _norm(x: Tensor, p: float) -> Tensor:
    """(groups, 1); by the largest element, so that no power overflows."""
    top = _largest(x).unsqueeze(1)
    return top * _power_norm(x / _safe(top), p)


def _lp_gradient(c: Tensor, args: Mapping[str, float]) -> Tensor:
    """In the memory of c: of a large tensor, new memory costs more than the arithmetic."""
    c.div_(_safe(_largest(c).unsqueeze(1)))
    c.div_(_safe(_power_norm(c, args["p"])))
    return c if args["p"] == 2 else torch.mul(c.sign(), c.abs_().pow_(args["p"] - 1), out=c)


def _lp_value(m: Tensor, args: Mapping[str, float]) -> Tensor:
    return _norm(m, args["p"]).sum()


def _lp_violation(y: Tensor, args: Mapping[str, float]) -> Tensor:
    q = args["p"] / (args["p"] - 1)
    return _norm(y, q).squeeze(1).sub(1).clamp_min(0)


# ---- topk ----------------------------------------------------------------------------------------


def _k(args: Mapping[str, float], n: int) -> int:
    if "k" in args:
        return min(int(args["k"]), n)
    return min(n, max(1, math.ceil(args["fraction"] * n)))


def _topk_gradient(c: Tensor, args: Mapping[str, float]) -> Tensor:
    """Elements that tie for the last places share them: of the subgradients, the even one."""
    if c.shape[1] == 0:
        return c.clone()
    size = c.abs()
    k = _k(args, c.shape[1])
    chosen = size.topk(k, dim=1, sorted=False).values
    last = chosen.amin(1, keepdim=True)
    tied = size == last
    share = (k - (chosen > last).sum(1, keepdim=True)) / _count(tied)
    # topk takes NaN for the largest: then the last one is NaN, and nothing compares with it.
    other = torch.where(last.isnan(), last, 0.0)
    kept = torch.where(tied, share.to(c.dtype), torch.where(size > last, 1.0, other))
    return c.sign_().mul_(kept)


def _count(where: Tensor) -> Tensor:
    """(groups, 1); torch's sum makes integers of bools first."""
    if where.shape[0] == 1:
        return where.count_nonzero().reshape(1, 1)
    return where.sum(1, keepdim=True)


def _topk_value(m: Tensor, args: Mapping[str, float]) -> Tensor:
    if m.shape[1] == 0:
        return m.new_zeros(())
    return m.abs().topk(_k(args, m.shape[1]), dim=1, sorted=False).values.sum()


def _topk_violation(y: Tensor, args: Mapping[str, float]) -> Tensor:
    over = y.abs().sum(1).sub(_k(args, y.shape[1])).clamp_min(0)
    return torch.maximum(over, _outside_box(y, args))


KAPPAS: dict[str, Kappa] = {
    "l1": Kappa(
        (), lambda c, a: _sign(c), lambda m, a: m.abs().sum(), _zero, _flat, _outside_box
    ),
    "lp": Kappa(("p",), _lp_gradient, _lp_value, _zero, _flat, _lp_violation, True),
    "soft": Kappa(
        ("e",),
        lambda c, a: _sign(c) * (c.abs() > a["e"]),
        lambda m, a: (m.abs() - a["e"]).clamp_min(0).sum(),
        lambda y, a: a["e"] * y.abs().sum(),
        lambda y, a: a["e"] * y.sign(),
        _outside_box,
    ),
    "huber": Kappa(
        ("e",),
        lambda c, a: c.clamp(-a["e"], a["e"]) / a["e"],
        lambda m, a: torch.where(
            m.abs() <= a["e"], m.square() / (2 * a["e"]), m.abs() - a["e"] / 2
        ).sum(),
        lambda y, a: a["e"] / 2 * y.square().sum(),
        lambda y, a: a["e"] * y,
        _outside_box,
    ),
    "topk": Kappa(("k", "fraction"), _topk_gradient, _topk_value, _zero, _flat, _topk_violation,
                  True),
    "smooth": Kappa(
        ("e",),
        lambda c, a: c / torch.hypot(c, c.new_full((), a["e"])),
        # sqrt(m^2 + e^2) - e without cancellation
        lambda m, a: (m * (m / (torch.hypot(m, m.new_full((), a["e"])) + a["e"]))).sum(),
        lambda y, a: a["e"] * (1 - (1 - y.square()).clamp_min(0).sqrt()).sum(),
        lambda y, a: a["e"] * y / (1 - y.square()).clamp_min(0).sqrt(),
        _outside_box,
    ),
}  # fmt: skip


def checked(kappa, args, group: str) -> dict[str, float]:
    """The arguments of a kappa, a dict of numbers."""
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    if args is not None and not isinstance(args, Mapping):
        raise TypeError(f"kappa_args must be a dict, got {type(args).__name__}")
    args = dict(args or {})
    if not isinstance(kappa, str):
        if not callable(kappa):
            raise TypeError(f"kappa must be a name or a function, got {type(kappa).__name__}")
        if args or group != "tensor":
            raise ValueError("a kappa that is a function takes a tensor: no kappa_args, no group")
        return args
    if kappa not in KAPPAS:
        raise ValueError(f"kappa must be one of {', '.join(KAPPAS)}, or a function, got {kappa!r}")
    known = KAPPAS[kappa].arguments
    if unknown := sorted(set(args) - set(known)):
        raise ValueError(f"kappa {kappa!r} has no argument {unknown[0]!r}")
    if len(args) != min(1, len(known)):
        raise ValueError(f"kappa {kappa!r} needs kappa_args with {' or '.join(known)}, got {args}")
    for name, value in args.items():
        _check_argument(kappa, name, value)
    return args


def _check_argument(kappa: str, name: str, value) -> None:
    shown = f"kappa_args[{name!r}]"
    if name == "k":
        if checked_integer(shown, value) < 1:
            raise ValueError(f"{shown} must be >= 1, got {value}")
    elif name == "fraction":
        check_number(shown, value)
        if not 0 < value <= 1:
            raise ValueError(f"{shown} must be in (0, 1], got {value}")
    elif name == "p":
        check_number(shown, value)
        if not 1 < value < math.inf:
            raise ValueError(f"{shown} must be finite and > 1, got {value}; p = 1 is kappa 'l1'")
    else:
        check_range(shown, value, 0, open_low=kappa != "soft")
        limits = torch.finfo(torch.float32)
        if value and not limits.tiny <= value <= limits.max:  # 0 and infinity there
            raise ValueError(f"{shown} must be a normal number of float32, got {value}")


def rows(tensors: Sequence[Tensor], group: str) -> list[Tensor]:
    """The groups as rows: (groups, elements) of each tensor; one row of all for "global"."""
    if group == "global":
        return [torch.cat([t.reshape(-1) for t in tensors]).unsqueeze(0)] if tensors else []
    if group == "row":
        return [t.reshape(t.shape[0], -1) if t.dim() and t.numel() else t.reshape(1, -1)
                for t in tensors]  # fmt: skip
    return [t.reshape(1, -1) for t in tensors]


def gradients(
    tensors: Sequence[Tensor], kappa, args: Mapping[str, float], group: str
) -> list[Tensor]:
    """dK of each tensor, in its shape, and maybe in its memory."""
    if not isinstance(kappa, str):
        return [_called(kappa, t) for t in tensors]
    gradient, of_group = KAPPAS[kappa].gradient, KAPPAS[kappa].of_group
    if not of_group:
        return [gradient(t, args) for t in tensors]
    found = [gradient(row, args) for row in rows(tensors, group)]
    if group == "global" and found:
        found = found[0].squeeze(0).split([t.numel() for t in tensors])
    return [d.reshape(t.shape) for d, t in zip(found, tensors)]


def _called(kappa: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
    found = kappa(c)
    if not isinstance(found, Tensor) or found.shape != c.shape:
        shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"kappa must return a tensor of shape {list(c.shape)}, got {shown}")
    # A copy where it gave back its argument, whose memory is in use.
    return found.to(c.dtype) if found is not c else c.clone()
