"""Lion-K: the step of one parameter, and the gradients of its functions K."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def lion_k(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    kappa: str | Callable[[Tensor], Tensor] = "l1",
    kappa_args: Mapping[str, float] | None = None,
    group: str = "tensor",
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:
    """(param, momentum) after a step, new tensors.

    Args:
        param, grad, momentum: one shape.
        kappa: ``"l1"``, ``"lp"``, ``"soft"``, ``"huber"``, ``"topk"``, ``"smooth"``, or a function
            that gives dK.
        kappa_args: ``p``; ``e``; ``k`` or ``fraction``.
        group: what a norm is of, ``"tensor"`` or ``"row"``.
    """
    g = -grad if maximize else grad
    c = betas[0] * momentum + (1 - betas[0]) * g
    direction = kappa(c) if callable(kappa) else _gradient(c, kappa, kappa_args or {}, group)
    moved = param * (1 - lr * weight_decay) - lr * direction
    return moved, betas[1] * momentum + (1 - betas[1]) * g


def _gradient(c: Tensor, kappa: str, args: Mapping[str, float], group: str) -> Tensor:
    if kappa in ("lp", "topk"):
        rows = c.reshape(c.shape[0], -1) if group == "row" and c.dim() else c.reshape(1, -1)
        of_row = _of_norm if kappa == "lp" else _of_largest
        if c.numel() == 0:
            return c.clone()
        return torch.stack([of_row(row, args) for row in rows.unbind(0)]).reshape(c.shape)
    nan = torch.full_like(c, float("nan"))
    if kappa == "l1":
        found = c.sign()
    elif kappa == "soft":
        found = c.sign() * (c.abs() > args["e"])
    elif kappa == "huber":
        found = c.clamp(-args["e"], args["e"]) / args["e"]
    elif kappa == "smooth":
        found = c / torch.hypot(c, torch.full_like(c, args["e"]))
    else:
        raise ValueError(f"unknown kappa {kappa!r}")
    return torch.where(c.isnan(), nan, found)


def _of_norm(c: Tensor, args: Mapping[str, float]) -> Tensor:
    """sign(c) (|c| / norm_p)^(p - 1), 0 where all of c is."""
    top = c.abs().amax()
    if top == 0:
        return torch.zeros_like(c)
    ratio = c.abs() / top
    norm = ratio.pow(args["p"]).sum().pow(1 / args["p"])
    return c.sign() * (ratio / norm).pow(args["p"] - 1)


def _of_largest(c: Tensor, args: Mapping[str, float]) -> Tensor:
    """sign(c) of the k largest |c|; those that tie for the last places share them evenly."""
    n = c.numel()
    k = args["k"] if "k" in args else max(1, -int(-args["fraction"] * n // 1))
    if c.isnan().any():
        return torch.full_like(c, float("nan"))
    size = c.abs()
    last = size.sort(descending=True).values[min(int(k), n) - 1]
    above, tied = size > last, size == last
    share = (min(int(k), n) - above.sum()) / tied.sum()
    return c.sign() * (above + share * tied)
